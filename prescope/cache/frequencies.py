"""How often each expert is used, as a caller gives it. Pure: what goes by it is in `policies`.

Shapes: L MoE layers, E experts.
"""

from typing import Any

import numpy as np

from ..core.types import FloatArray, MoEShape
from ..errors import UnsupportedOption


def require_frequencies(shape: MoEShape, frequencies: Any) -> FloatArray:
    """Uses per expert (L, E), from whatever numpy takes for an array.

    Raises:
        UnsupportedOption: they are another model's, or no numbers of uses.
    """
    try:
        found: FloatArray = np.asarray(frequencies, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UnsupportedOption(
            f"frequencies are a {type(frequencies).__name__} that is no array of numbers ({error}); pass "
            f"run.trace.expert_counts()"
        ) from error
    if found.shape != (shape.num_layers, shape.num_experts):
        raise UnsupportedOption(
            f"frequencies have shape {found.shape}, the model has {shape.num_layers} MoE layers x "
            f"{shape.num_experts} experts; record a trace with this model"
        )
    if not (np.isfinite(found) & (found >= 0)).all():
        raise UnsupportedOption(
            "frequencies hold negative numbers, NaN or infinities; they count uses of experts, as "
            "run.trace.expert_counts() does"
        )
    return found


def behind_prompt(known_LE: FloatArray, prompt_LE: FloatArray) -> FloatArray:
    """Uses of each expert (L, E) to go by behind a prompt: those of a recorded run, and the prompt's own.

    A text's shares are taken as drawn around the recorded ones (a Dirichlet distribution). How near to them is told by
    how much farther off the prompt is than chance makes it, chi squared over its degrees of freedom: that is what the
    recorded run is worth, in uses a layer. A prompt that is off by chance alone says nothing new.

    Args:
        known_LE: uses of the recorded run. `prompt_LE`: of the prompt, zeros for none.
    """
    uses_L1 = prompt_LE.sum(axis=1, keepdims=True)
    shares_LE = known_LE / np.maximum(known_LE.sum(axis=1, keepdims=True), 1e-9)
    expected_LE = uses_L1 * shares_LE
    is_expected = expected_LE > 0
    degrees = int(is_expected.sum() - is_expected.any(axis=1).sum())
    if degrees < 1:
        return known_LE
    off = float(((prompt_LE - expected_LE)[is_expected] ** 2 / expected_LE[is_expected]).sum()) / degrees
    if off <= 1.0:
        return known_LE
    worth = max(0.0, (float(uses_L1.mean()) - off) / (off - 1.0))
    mixed: FloatArray = prompt_LE + worth * shares_LE
    return mixed
