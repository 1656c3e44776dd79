"""A cache policy that knows the order of the layers: the expert whose next use is expected last gives up its slot.

Layers come round in the same order in every step, so an expert of a layer just passed is not needed for a whole step,
one of the next layer perhaps at once; LRU evicts the layers that come next. With p the probability that a step uses
the expert, its next use is expected after

    layers until its layer comes again + L * (1 / p - 1)

layers: Belady's choice with an expectation in place of the future. p is a decayed share of the steps that used it,
mixed with whether the last one did; a use by many tokens counts for more, since the CPU would take longer for it.

Shapes: n experts needed, E experts of a layer, L MoE layers.
"""

import numpy as np

from ..core import MoEShape
from ..jit import jit
from .terms import FloatArray, IntArray

#: Number in compiled code, behind those of `cache`.
NEXT_USE_KIND = 6
#: Weight of the past in p, per step, and of the last step beside it. 0.95 to 0.99 and 0.1 to 0.4 are alike; without the
#: last step all is 2 % slower on synthetic traces (LOG.md).
USE_DECAY, LAST_STEP = 0.98, 0.2
#: What each token beyond the first adds to a use. 0.1 to 1 are alike, 0 is 1 % slower at batch 64.
TOKEN_WEIGHT = 0.1
#: Least p: an expert that was not used for long may be used again.
LEAST_USE = 1e-3


@jit
def learn_next_use(
    scores: FloatArray, tick: int, moe_layer: int, num_experts: int, experts: IntArray, tokens: FloatArray
) -> None:
    """Learn one layer's needs: experts (n,), distinct, and the tokens of each (n,).

    Args:
        scores: (2 * L * E,), changed: what is evicted by, and behind it the decayed share of uses. In one array, so
            that whoever hands on a policy's scores hands on all it knows.
        tick: layers learned from, this one too.
    """
    num_layers = len(scores) // (2 * num_experts)
    first = moe_layer * num_experts
    uses = scores[num_layers * num_experts + first :]
    now = np.zeros(num_experts)
    for i in range(len(experts)):
        now[experts[i]] = 1.0 + TOKEN_WEIGHT * (tokens[i] - 1.0)
    for expert in range(num_experts):
        uses[expert] = USE_DECAY * uses[expert] + (1.0 - USE_DECAY) * now[expert]
        p = (1.0 - LAST_STEP) * uses[expert] + LAST_STEP * now[expert]
        # L / p ticks from now, less the part that all experts share; the fraction tells a layer's experts apart.
        scores[first + expert] = 1e-6 * expert - (tick + num_layers / max(p, LEAST_USE))


class NextUse:
    """Evict the expert whose next use is expected last; see the module."""

    name, kind = "next-use", NEXT_USE_KIND

    def __init__(self, shape: MoEShape) -> None:
        self._experts = shape.num_experts
        self.scores = np.zeros(2 * shape.total_experts)
        self.tick = 0

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        """Learn one layer's needs; `weights` are tokens."""
        self.tick += 1
        learn_next_use(self.scores, self.tick, moe_layer, self._experts, experts, weights)

    def reset(self) -> None:
        """Forget everything."""
        self.scores[:] = 0.0
        self.tick = 0
