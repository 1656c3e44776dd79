"""How often each expert is used, as a caller gives it. Pure: what goes by it is in `policies`.

Shapes: L MoE layers, E experts, T tokens, K experts of each.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


class Repeats(NamedTuple):
    """How much the tokens of a prompt choose what others of it choose, as shares of their experts."""

    of_next: float  # chosen by the token before too
    of_any: float  # by any other one
    num_tokens: int


def repeats_of(ids_TK: NDArray[np.integer[Any]], num_experts: int) -> Repeats:
    """Of one layer, tokens in their order; ids outside [0, E) are padding.

    Where one sequence ends and the next begins is not looked for: that is one of many pairs.
    """
    is_expert = (ids_TK >= 0) & (ids_TK < num_experts)
    is_token = is_expert.any(axis=1)
    ids_TK, is_expert = ids_TK[is_token], is_expert[is_token]
    T, K = ids_TK.shape
    if T < 2:
        return Repeats(0.0, 0.0, T)
    uses_E = np.bincount(ids_TK[is_expert], minlength=num_experts).astype(np.float64)
    total = float(uses_E.sum())
    # Choice against choice: 1 ms for 8,192 tokens and 512 experts, where a table of tokens and experts takes 4.
    same = sum(int(((ids_TK[1:] == ids_TK[:-1, k, None]) & is_expert[1:]).sum()) for k in range(K))
    of_any = float((uses_E * (uses_E - 1.0)).sum()) / total / (T - 1)
    return Repeats(same / total * T / (T - 1), of_any, T)


def scatter_of(repeats: list[Repeats]) -> float:
    """By how much the uses of a prompt's experts vary more than if each token chose by itself, by its layers.

    Tokens choose in part what the one before chose. With autocorrelation r the variance of a sum is (1 + r) / (1 - r)
    times as much, so that a prompt says as much as one of so many tokens fewer; at least as much as one token.
    """
    if not repeats:
        return 1.0
    of_next, of_any = (float(np.mean([each[i] for each in repeats])) for i in (0, 1))
    r = (of_next - of_any) / max(1e-9, 1.0 - of_any)
    num_tokens = max(1, repeats[0].num_tokens)
    r = min(max(0.0, r), (num_tokens - 1) / (num_tokens + 1))
    return (1.0 + r) / (1.0 - r)


def behind_prompt(known_LE: FloatArray, prompt_LE: FloatArray, scatter: float = 1.0) -> FloatArray:
    """Uses of each expert (L, E) to go by behind a prompt: those of a recorded run, and the prompt's own.

    A text's shares are taken as drawn around the recorded ones (a Dirichlet distribution). How near to them is told by
    how much farther off the prompt is than chance makes it, chi squared over its degrees of freedom: that is what the
    recorded run is worth, in uses a layer. A prompt that is off by chance alone says nothing new.

    Args:
        known_LE: uses of the recorded run. `prompt_LE`: of the prompt, zeros for none.
        scatter: see `scatter_of`. Without it a prompt whose tokens repeat each other seems far off, and puts experts
            into the slots that it used for some tokens on end: up to 6 % slower at batch 1 behind slow links.
    """
    prompt_LE = prompt_LE / scatter
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
