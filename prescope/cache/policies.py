"""Cache policies: which resident expert gives up its slot.

Pure numpy; engine and simulator call the same objects. A policy keeps one score per expert of the model in a flat
array (index = moe_layer * E + expert) and learns from each layer's needs; the residency table evicts the lowest
score among the slots that may be given up. So every policy costs O(needed) to learn and one argpartition to evict.

Scores of experts that can be resident are distinct (a layer's experts are told apart by their number), so that the
GPU's version of a policy (`kernels.graph_kernels._plan`) evicts the same experts and counts the same hits.
"""

from typing import Protocol, Self

import numpy as np

from ..core.jit import jit
from ..core.types import FloatArray, IntArray, MoEShape
from ..errors import UnsupportedOption
from .arc import ARC, ARC_KIND, SHALLOW_ARC_KIND, ShallowARC, learn_arc
from .frequencies import require_frequencies
from .next_use import NEXT_USE_KIND, NextUse, learn_next_use

#: Weight of the past in the `score` policy, per use of the layer. 0.9 remembers about ten tokens.
SCORE_DECAY = 0.9
#: Numbers of the policies in compiled code.
LRU_KIND, LFU_KIND, STATIC_KIND, SCORE_KIND, SHALLOW_KIND = range(1, 6)
#: After those of `next_use` and `arc`.
CLASS_LRU_KIND = 9
#: Policies that change scores of other layers than the one they learn from.
CHANGES_ALL = (ARC_KIND, SHALLOW_ARC_KIND)
#: Tokens after which a use counts half in the `class-lru` policy.
HALF_LIFE_TOKENS = 128.0


@jit
def learn(
    kind: int,
    scores: FloatArray,
    tick: int,
    moe_layer: int,
    num_experts: int,
    experts: IntArray,
    weights: FloatArray,
    slot_of: IntArray,
) -> None:
    """What a policy of this kind makes of one layer's needs; `tick` counts the layers learned from, this one too.

    Args:
        scores: (L * E,) and more, changed. `experts`: (n,) distinct, `weights`: (n,) sums of their router weights.
        slot_of: (L * E,) slot of each key, -1 for none; as it was before the layer's copies.
    """
    if kind == NEXT_USE_KIND:  # `weights` are tokens
        learn_next_use(scores, tick, moe_layer, num_experts, experts, weights)
        return
    if kind in (ARC_KIND, SHALLOW_ARC_KIND):
        learn_arc(scores, moe_layer, num_experts, experts, slot_of, kind == SHALLOW_ARC_KIND)
        return
    first = moe_layer * num_experts
    if kind == CLASS_LRU_KIND:  # `weights` are tokens, and the last score the experts that each uses
        scores[first : first + num_experts] *= 0.5 ** (weights.sum() / scores[-1] / HALF_LIFE_TOKENS)
    if kind == SCORE_KIND:
        for i in range(first, first + num_experts):
            scores[i] *= SCORE_DECAY
    for i in range(len(experts)):
        key, last = first + experts[i], tick + experts[i] / num_experts
        if kind == LRU_KIND:
            scores[key] = last
        elif kind == LFU_KIND:
            # Integer part: uses. Fraction: the last use, squeezed below 1, so that it only breaks ties.
            scores[key] = np.floor(scores[key]) + 1.0 + last / (last + 1e9)
        elif kind == SCORE_KIND:
            if np.isfinite(weights[i]):  # a router's NaN would stay for good
                scores[key] += weights[i]
        elif kind == SHALLOW_KIND:
            # Layers before recency: the deepest layer's experts go first. Ticks stay below 1e9.
            scores[key] = last / 1e9 - moe_layer
        elif kind == CLASS_LRU_KIND:
            scores[key] += weights[i]


class CachePolicy(Protocol):
    """What the residency table asks of a policy."""

    name: str
    kind: int  # number in compiled code
    runs_on_gpu: bool  # captured steps can run it without the host, by the same number
    scores: FloatArray  # (L * E,) and whatever else it knows; the lowest is evicted first
    tick: int  # layers learned from so far

    @classmethod
    def make(cls, shape: MoEShape, frequencies: FloatArray | None) -> "CachePolicy":
        """One for a model; `frequencies`: see `make_policy`."""
        ...

    def serves(self, slot_of: IntArray, num_slots: int) -> None:
        """The table that it decides for: slot of each key (L * E,), changed in place, and how many there are."""
        ...

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        """Learn one layer's needs: distinct `experts` (n,), and the sum of their router weights (n,)."""
        ...

    def reset(self) -> None:
        """Forget what was learned in this run; what was given at the start stays."""
        ...


#: For policies that do not look at the slots.
NO_SLOTS = np.empty(0, dtype=np.int64)


class _Learned:
    """A policy that learns from the needs alone."""

    name: str
    kind: int
    runs_on_gpu = False

    @classmethod
    def make(cls, shape: MoEShape, frequencies: FloatArray | None) -> Self:
        """It needs no frequencies."""
        return cls(shape)

    def __init__(self, shape: MoEShape) -> None:
        self._experts = shape.num_experts
        self.scores = np.zeros(shape.total_experts)
        self.tick = 0

    def serves(self, slot_of: IntArray, num_slots: int) -> None:
        """It does not look at the slots."""

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        self.tick += 1
        learn(self.kind, self.scores, self.tick, moe_layer, self._experts, experts, weights, NO_SLOTS)

    def reset(self) -> None:
        self.scores[:] = 0.0
        self.tick = 0


class LRU(_Learned):
    """Evict the expert whose last use is longest ago."""

    name, kind, runs_on_gpu = "lru", LRU_KIND, True


class LFU(_Learned):
    """Evict the expert used in the fewest steps; among equals the one used longest ago."""

    name, kind, runs_on_gpu = "lfu", LFU_KIND, True


class DecayedScore(_Learned):
    """Evict the expert with the lowest decayed sum of router weights (score-aware, after HybriMoE's idea)."""

    name, kind = "score", SCORE_KIND


class ShallowFirst(_Learned):
    """Evict from the deepest layers first, there the one used longest ago (after Fate's idea: the first layers have
    the least time to prefetch).
    """

    name, kind = "shallow", SHALLOW_KIND


class ClassLRU(_Learned):
    """Evict the expert with the lowest score: uses by tokens, each worth half after 128 tokens more (after llama.cpp's
    cache of experts). Scores outlive eviction. All slots are of one size here, so there is one class of them.
    """

    name, kind = "class-lru", CLASS_LRU_KIND

    def __init__(self, shape: MoEShape) -> None:
        self._experts = shape.num_experts
        self.scores = np.zeros(shape.total_experts + 1)
        self.scores[-1] = max(1, shape.top_k)
        self.tick = 0

    def reset(self) -> None:
        self.scores[:-1] = 0.0
        self.tick = 0


class StaticFrequency:
    """Evict the expert that a recorded trace used least; what this run does teaches it nothing.

    With as many slots as hot experts this is the best fixed set, kept by loading on demand.

    Args:
        frequencies: (L, E) uses per expert, as `RoutingTrace.expert_counts()` gives.
    """

    name, kind, runs_on_gpu = "static", STATIC_KIND, True

    @classmethod
    def make(cls, shape: MoEShape, frequencies: FloatArray | None) -> Self:
        """Raises UnsupportedOption without frequencies."""
        if frequencies is None:
            raise UnsupportedOption(
                "cache='static' needs to know which experts are hot: record a run first and pass "
                "frequencies=run.trace.expert_counts()"
            )
        return cls(shape, frequencies)

    def __init__(self, shape: MoEShape, frequencies: FloatArray) -> None:
        # Ranks, so that no two are equal.
        order = by_frequency(frequencies)
        self.scores = np.empty(order.size)
        self.scores[order] = np.arange(order.size)
        self.tick = 0

    def serves(self, slot_of: IntArray, num_slots: int) -> None:
        pass

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        self.tick += 1

    def reset(self) -> None:
        pass


def by_frequency(frequencies: FloatArray) -> IntArray:
    """Keys (L * E,) by how often they are used, the most frequent last.

    Args:
        frequencies: (L, E) uses per expert.
    """
    return np.argsort(frequencies.ravel(), kind="stable")


#: By the name a user gives. Another one is a class with a number of its own, and a branch in `learn`.
POLICIES: dict[str, type[CachePolicy]] = {
    policy.name: policy
    for policy in (LRU, LFU, StaticFrequency, DecayedScore, ShallowFirst, NextUse, ARC, ShallowARC, ClassLRU)
}


def make_policy(name: str, shape: MoEShape, frequencies: FloatArray | None = None) -> CachePolicy:
    """The policy a user chose by name.

    Args:
        frequencies: (L, E) uses per expert, for those that go by them.

    Raises:
        UnsupportedOption: there is no such policy; it goes by frequencies, and there are none; or they are wrong.
    """
    if name not in POLICIES:
        raise UnsupportedOption(f"cache is {name!r}; choose one of {', '.join(map(repr, POLICIES))}")
    known = None if frequencies is None else require_frequencies(shape, frequencies)
    return POLICIES[name].make(shape, known)
