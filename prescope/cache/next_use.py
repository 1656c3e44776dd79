"""A cache policy that knows the order of the layers: the expert whose next use is expected last gives up its slot.

Layers come in the same order in every step, so an expert of the layer just computed is not needed for a whole step, and
one of the next layer perhaps at once. LRU does the opposite: it evicts the experts of the layers that come next. With p
the probability that a step uses the expert, its next use is expected after

    layers until its layer comes again + L * (1 / p - 1)

layers: Belady's choice with an expectation in place of the future. p is a decayed share of the steps that used it,
mixed with whether the last one did; a use by many tokens counts for more, since the CPU would take longer for it.
How much the last step counts is learned from the run, since texts differ. Where tokens choose the same experts again
and again it counts fully, in varied text not at all, and where two tokens alternate it counts negatively.

Steps differ in size, a prompt, one token, a batch of 64, and a share takes some twenty to follow. So a layer's shares
are brought to the level of its present step: all together as much as the step's uses. Otherwise a layer that has just
been learned from seems to be used more than one whose turn comes next: in the first steps behind a prompt a batch of 64
gave the deep layers' slots to the first ones, 5 of 8 experts there and 1 here, and stayed up to 7 % slower (simulated,
docs/log/cache.md).

Shapes: n experts needed, E experts of a layer, L MoE layers.
"""

from typing import Self

import numpy as np

from ..core.jit import jit
from ..core.types import FloatArray, IntArray, MoEShape

#: Number in compiled code, after those of `policies`.
NEXT_USE_KIND = 6
#: Weight of the past in the share of uses, per step. A prompt is one step, so the experts it used do not stay for
#: long. With 0.98 a trained model's text has up to 3 points fewer hits at batch 1 (docs/log/cache.md).
USE_DECAY = 0.95
#: Weight of the past in how much the last step counts, per layer of a step: remembers about a hundred layers.
LAST_STEP_DECAY = 0.99
#: The last step counts at least this much. Below 0 the experts just used go before those of the step before: a loop of
#: two tokens that does not fit into the slots has 53 % hits, with 0 30 %; -0.15 to -1 are alike.
LEAST_LAST_STEP = -0.3
#: What each doubling of its tokens adds to a use. 0.5 is alike. Without the logarithm a prompt of 200 tokens holds its
#: experts for so long that a loop of two tokens behind it has up to 2 points less than with LRU (docs/log/cache.md).
TOKEN_WEIGHT = 0.3
#: Two steps are compared only if neither has so many times the other's uses: what a prompt used says nothing of what a
#: token repeats.
ALIKE = 2.0
#: Evidence that the last step says nothing, before a run has shown any, in squared uses. With 1 a quarter of the slots
#: has up to 2 points less than LRU where two tokens alternate behind a prompt, with 100 an eighth up to 1 point less
#: where tokens repeat half of their choice (docs/log/cache.md).
FIRST_EVIDENCE = 40.0
#: Least p: an expert that was not used for long may be used again.
LEAST_USE = 1e-3


@jit
def learn_next_use(
    scores: FloatArray, tick: int, moe_layer: int, num_experts: int, experts: IntArray, tokens: FloatArray
) -> None:
    """Learn one layer's needs: experts (n,), distinct, and the tokens of each (n,).

    How much the last step counts is the slope of a regression: how far an expert's use now is from its share, over how
    far its last one was; over the experts of all layers, decayed, by steps that are alike in size.

    Args:
        scores: (3 * L * E + 2,), changed: what is evicted by; the decayed share of uses; the last step's use; and the
            two sums of the regression. In one array, so that passing on a policy's scores passes on all it knows.
        tick: layers learned from, this one too.
    """
    num_layers = len(scores) // (3 * num_experts)
    first, size = moe_layer * num_experts, num_layers * num_experts
    share, last, sums = scores[size + first :], scores[2 * size + first :], scores[3 * size :]
    now = np.zeros(num_experts)
    for i in range(len(experts)):
        now[experts[i]] = 1.0 + TOKEN_WEIGHT * np.log2(tokens[i])
    before, uses, former = 0.0, 0.0, 0.0
    for expert in range(num_experts):
        before += share[expert]
        uses += now[expert]
        former += last[expert]
    if max(uses, former) < ALIKE * min(uses, former):
        sums *= LAST_STEP_DECAY
        for expert in range(num_experts):
            beyond = last[expert] - share[expert]
            sums[0] += beyond * (now[expert] - share[expert])
            sums[1] += beyond * beyond
    worth = min(1.0, max(LEAST_LAST_STEP, sums[0] / (FIRST_EVIDENCE + sums[1])))
    # A first step's shares stay as low as they are: what it used goes before what the next steps use.
    level = uses / (USE_DECAY * before + (1.0 - USE_DECAY) * uses) if before > 0.0 and uses > 0.0 else 1.0
    for expert in range(num_experts):
        share[expert] = USE_DECAY * share[expert] + (1.0 - USE_DECAY) * now[expert]
        last[expert] = now[expert]
        p = (1.0 - worth) * level * share[expert] + worth * now[expert]
        # L / p ticks from now, less the part that all experts share; the fraction tells a layer's experts apart.
        scores[first + expert] = 1e-6 * expert - (tick + num_layers / max(p, LEAST_USE))


class NextUse:
    """Evict the expert whose next use is expected last; see the module."""

    name, kind, runs_on_gpu = "next-use", NEXT_USE_KIND, False

    @classmethod
    def make(cls, shape: MoEShape, frequencies: FloatArray | None) -> Self:
        """One that begins with what a recorded run used, if its (L, E) `frequencies` are known."""
        return cls(shape, frequencies)

    def __init__(self, shape: MoEShape, frequencies: FloatArray | None = None) -> None:
        self._experts = shape.num_experts
        self.scores = np.zeros(3 * shape.total_experts + 2)
        self._prior = None if frequencies is None else _prior(shape, frequencies)
        self.reset()

    def serves(self, slot_of: IntArray, num_slots: int) -> None:
        """It does not look at the slots."""

    def use(self, moe_layer: int, experts: IntArray, weights: FloatArray) -> None:
        """Learn one layer's needs; `weights` are tokens."""
        self.tick += 1
        learn_next_use(self.scores, self.tick, moe_layer, self._experts, experts, weights)

    def reset(self) -> None:
        """Forget everything that this run has shown."""
        self.scores[:] = 0.0
        self.tick = 0
        if self._prior is not None:
            size = len(self._prior)
            # As if the last step had been like all others: it says nothing of what the last step is worth.
            self.scores[size : 2 * size] = self.scores[2 * size : 3 * size] = self._prior
            self.scores[:size] = -(size // self._experts) / np.maximum(self._prior, LEAST_USE)


def _prior(shape: MoEShape, frequencies: FloatArray) -> FloatArray:
    """Share of the steps of one token that use each expert (L * E,), by what a recorded run used."""
    sums = np.maximum(frequencies.sum(axis=1, keepdims=True), 1e-9)
    prior: FloatArray = np.minimum(1.0, shape.top_k * frequencies / sums).ravel()
    return prior
