"""Cache policies: which resident expert gives up its slot.

Pure numpy; engine and simulator call the same objects. A policy keeps one score per expert of the model in a flat
array (index = moe_layer * E + expert) and learns from each layer's needs; the residency table evicts the lowest
score among the slots that may be given up. So every policy costs O(needed) to learn and one argpartition to evict.

Scores of experts that can be resident are distinct (a layer's experts are told apart by their number), so that the
GPU's version of a policy (`kernels.on_device._plan`) evicts the same experts and counts the same hits.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .core import MoEShape
from .errors import UnsupportedOption

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

#: Weight of the past in the `score` policy, per use of the layer. 0.9 remembers about ten tokens.
SCORE_DECAY = 0.9


class CachePolicy(Protocol):
    """What the residency table asks of a policy."""

    name: str
    scores: FloatArray  # (L * E,), the lowest is evicted first
    tick: int  # layers learned from so far

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        """Learn one layer's needs: distinct `experts` (n,), and the sum of their router weights (n,)."""
        ...

    def reset(self) -> None:
        """Forget what was learned in this run; what was given at the start stays."""
        ...


class LRU:
    """Evict the expert whose last use is longest ago."""

    name = "lru"

    def __init__(self, shape: MoEShape) -> None:
        self._experts = shape.num_experts
        self.scores = np.zeros(shape.total_experts)
        self.tick = 0

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        self.tick += 1
        self.scores[moe_layer * self._experts + experts] = self.tick + experts / self._experts

    def reset(self) -> None:
        self.scores[:] = 0.0
        self.tick = 0


class LFU:
    """Evict the expert used in the fewest steps; among equals the one used longest ago."""

    name = "lfu"

    def __init__(self, shape: MoEShape) -> None:
        self._experts = shape.num_experts
        self.scores = np.zeros(shape.total_experts)
        self.tick = 0

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        keys = moe_layer * self._experts + experts
        # Integer part: uses. Fraction: the last use, squeezed below 1, so that it only breaks ties.
        self.tick += 1
        last = self.tick + experts / self._experts
        self.scores[keys] = np.floor(self.scores[keys]) + 1.0 + last / (last + 1e9)

    def reset(self) -> None:
        self.scores[:] = 0.0
        self.tick = 0


class StaticFrequency:
    """Evict the expert that a recorded trace used least; what this run does teaches it nothing.

    With as many slots as hot experts this is the best fixed set, kept by loading on demand.

    Args:
        frequencies: (L, E) uses per expert, as `RoutingTrace.expert_counts()` gives.
    """

    name = "static"

    def __init__(self, shape: MoEShape, frequencies: FloatArray) -> None:
        if frequencies.shape != (shape.num_layers, shape.num_experts):
            raise UnsupportedOption(
                f"frequencies have shape {frequencies.shape}, the model has "
                f"{shape.num_layers} MoE layers x {shape.num_experts} experts; record a trace with this model"
            )
        # Ranks, so that no two are equal.
        order = np.argsort(frequencies.ravel(), kind="stable")
        self.scores = np.empty(order.size)
        self.scores[order] = np.arange(order.size)
        self.tick = 0

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        self.tick += 1

    def reset(self) -> None:
        pass


class DecayedScore:
    """Evict the expert with the lowest decayed sum of router weights (score-aware, after HybriMoE's idea)."""

    name = "score"

    def __init__(self, shape: MoEShape, decay: float = SCORE_DECAY) -> None:
        self._experts = shape.num_experts
        self._decay = decay
        self.scores = np.zeros(shape.total_experts)
        self.tick = 0

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        self.tick += 1
        first = moe_layer * self._experts
        self.scores[first : first + self._experts] *= self._decay
        self.scores[first + experts] += weights

    def reset(self) -> None:
        self.scores[:] = 0.0
        self.tick = 0


_BY_NAME: dict[str, Callable[[MoEShape], CachePolicy]] = {"lru": LRU, "lfu": LFU, "score": DecayedScore}


def make_policy(name: str, shape: MoEShape, frequencies: FloatArray | None = None) -> CachePolicy:
    """The policy a user chose by name.

    Raises:
        UnsupportedOption: "static" without frequencies, or frequencies of another shape.
    """
    if name == "static":
        if frequencies is None:
            raise UnsupportedOption(
                "cache='static' needs to know which experts are hot: record a run first and pass "
                "frequencies=run.trace.expert_counts()"
            )
        return StaticFrequency(shape, frequencies)
    return _BY_NAME[name](shape)
