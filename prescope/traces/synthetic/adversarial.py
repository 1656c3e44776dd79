"""Hostile traces: bad for the cache, the predictor's table, the link, or whatever relies on regular routing.

Shapes: R rows, L MoE layers, E experts, K top-k.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedOption
from ..routing import RoutingTrace
from .drawing import draw_ranks, expert_of_rank, popularity_of_ranks
from .rows import TokenRows, fingerprint_of, synthetic_trace
from .spec import SyntheticSpec

Int16Array = NDArray[np.int16]

#: Popularity of the trace that flips: a quarter of the experts gets 65 % (16 top-2) to 77 % (128 top-8) of the uses.
FLIP_ZIPF = 1.2

#: Name -> what the trace does.
ADVERSARIAL: dict[str, str] = {
    "cyclic": (
        "step by step the next K experts of every layer, round and round, the same for all tokens of a step: LRU "
        "never hits with (L * floor(E / K) - 1) * K slots or fewer, while most-recently-used would"
    ),
    "flip": (
        "Zipf popularity that turns round after half of each sequence's tokens: what was used most is used least, so "
        "a static hot set and a table of frequencies are worse than none"
    ),
    "uniform": "every expert alike, whatever came before: LRU hits no more than its share of slots, predictors chance",
    "hot": "all tokens use the same K experts of a layer: after the first step nothing has to be copied",
    "disjoint": (
        "the tokens of a step share no expert, as long as there are K for each: a layer needs min(tokens * K, E) "
        "distinct experts, the most that a batch can need; drawn anew in each step"
    ),
}


class _Case(NamedTuple):
    rows: TokenRows
    num_layers: int
    num_experts: int
    top_k: int
    rng: np.random.Generator


def adversarial(
    name: str,
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    batch: int = 1,
    seed: int = 0,
) -> RoutingTrace:
    """A trace of the kind `name`, rows as those of `SyntheticSpec.generate`; the kinds are those of `ADVERSARIAL`.

    Raises:
        UnsupportedOption: no such kind, or a shape that no model has.
    """
    if name not in _KINDS:
        raise UnsupportedOption(f"no adversarial trace {name!r}; there are {', '.join(_KINDS)}")
    shape = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k}
    SyntheticSpec(**shape)  # checks the shape
    rng = np.random.default_rng(seed)
    case = _Case(TokenRows(prompt_tokens, new_tokens, batch), num_layers, num_experts, top_k, rng)
    return synthetic_trace(
        _KINDS[name](case),
        num_experts,
        case.rows.columns,
        case.rows.prompts,
        rng,
        label=f"adversarial: {name}",
        fingerprint=fingerprint_of(adversarial=name, seed=seed, **shape),
    )


def _cyclic(case: _Case) -> Int16Array:
    first_R = case.rows.step * case.top_k
    ids_RK = (first_R[:, None] + np.arange(case.top_k)) % case.num_experts
    return _in_all_layers(ids_RK, case.num_layers)


def _flip(case: _Case) -> Int16Array:
    rows, E = case.rows, case.num_experts
    popularity_SE = popularity_of_ranks(E, FLIP_ZIPF, 0.0, rows.batch, case.rng)
    ranks = draw_ranks(popularity_SE, case.num_layers, rows.length, case.top_k, 0.0, 0.0, case.rng)
    half = rows.length // 2
    ranks[:, half:] = E - 1 - ranks[:, half:]
    ranks_RLK = ranks[:, rows.position, rows.sequence].transpose(1, 0, 2)
    expert_LE = expert_of_rank(case.num_layers, E, int(case.rng.integers(2**31)))
    return expert_LE[np.arange(case.num_layers)[:, None], ranks_RLK]


def _uniform(case: _Case) -> Int16Array:
    alike_SE = np.ones((case.rows.batch, case.num_experts), dtype=np.float32)
    ids = draw_ranks(alike_SE, case.num_layers, case.rows.length, case.top_k, 0.0, 0.0, case.rng)
    return ids[:, case.rows.position, case.rows.sequence].transpose(1, 0, 2)


def _hot(case: _Case) -> Int16Array:
    one = _permutations(case, 1)[..., : case.top_k]
    return np.repeat(one, len(case.rows.step), axis=0)


def _disjoint(case: _Case) -> Int16Array:
    """Token i of a step takes places i * K to i * K + K - 1 of one order of all experts, round and round."""
    step = case.rows.step
    order = _permutations(case, int(step.max()) + 1)
    token_R = np.arange(len(step)) - np.searchsorted(step, step)
    place_RK = (token_R[:, None] * case.top_k + np.arange(case.top_k)) % case.num_experts
    layer = np.arange(case.num_layers)[:, None]
    return order[step[:, None, None], layer, place_RK[:, None]]


def _permutations(case: _Case, count: int) -> Int16Array:
    """(count, L, E): `count` random orders of each layer's experts."""
    experts = np.broadcast_to(
        np.arange(case.num_experts, dtype=np.int16), (count, case.num_layers, case.num_experts)
    )
    return case.rng.permuted(experts, axis=-1)


def _in_all_layers(ids_RK: NDArray[np.integer], num_layers: int) -> Int16Array:
    return np.repeat(ids_RK[:, None].astype(np.int16), num_layers, axis=1)


_KINDS: dict[str, Callable[[_Case], Int16Array]] = {
    "cyclic": _cyclic,
    "flip": _flip,
    "uniform": _uniform,
    "hot": _hot,
    "disjoint": _disjoint,
}
