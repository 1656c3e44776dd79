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
