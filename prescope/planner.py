"""Keeps what a schedule knows from layer to layer, and asks it what to do about each.

Shapes: n experts needed, E experts of a layer, L MoE layers, d layers ahead.
"""

import numpy as np
from numpy.typing import NDArray

from .core import MoEShape
from .jit import jit
from .residency import LayerNeed, ResidencyTable
from .scheduler.decide import discount, learn_trust, plan
from .scheduler.terms import Costs, FloatArray, IntArray, Knobs, Need, Plan

#: Copies below this do not reach the link's rate: PCIe 5 gave 53 GB/s at 4 MiB, 48 at 1 MiB (benchmarks/async_io.py).
LEAST_BYTES_UNDER_WAY = 4 << 20


def most_in_flight(device_kind: str, row_bytes: int) -> int:
    """Prefetches under way at most: one on the wire and one behind it, so that demand waits for no more.

    On CUDA as many more as small experts need to keep the link at its rate.
    """
    return max(2, LEAST_BYTES_UNDER_WAY // row_bytes) if device_kind == "cuda" else 2


@jit
def plan_layer(
    knobs: Knobs,
    costs: Costs,
    moe_layer: int,
    need: Need,
    backlog_us: float,
    slot_of: IntArray,
    trust: FloatArray,
    predicted_dLE: FloatArray,
    tokens_dE: FloatArray,
    used_dE: FloatArray,
) -> Plan:
    """One layer's plan; predictions count for as much as those for this layer were worth.

    Args:
        trust, predicted_dLE: changed; see `scheduler.decide.learn_trust`.
        tokens_dE, used_dE: as predicted at this layer, for the layers behind it; changed.
    """
    d, num_layers, E = predicted_dLE.shape
    if d:
        counts_E = np.zeros(E, np.int64)
        for i in range(len(need.experts)):
            counts_E[need.experts[i]] = need.tokens[i]
        learn_trust(trust, moe_layer, counts_E, predicted_dLE, knobs.threshold)
    for ahead in range(1, d + 1):
        factor = discount(trust, ahead) if moe_layer + ahead < num_layers else 0.0
        for e in range(E):
            if moe_layer + ahead < num_layers:
                predicted_dLE[ahead - 1, moe_layer + ahead, e] = used_dE[ahead - 1, e]
            used_dE[ahead - 1, e] *= factor
            tokens_dE[ahead - 1, e] *= factor
    return plan(knobs, costs, moe_layer, num_layers, need, backlog_us, slot_of, tokens_dE, used_dE)


class Planner:
    """One run's decisions.

    Args:
        knobs: the schedule and its settings.
        costs: of this machine and model.
        shape: of the model's MoE part.
        predicts: layers ahead that a predictor answers for; 0 without one.
    """

    def __init__(self, knobs: Knobs, costs: Costs, shape: MoEShape, predicts: int) -> None:
        self.knobs, self.costs, self._shape = knobs, costs, shape
        self.predicts = predicts
        self._link_free_us = 0.0  # by the caller's clock: when the link will be done with what it was given
        self._nothing = np.zeros((0, shape.num_experts))
        self.restart()

    def restart(self) -> None:
        """Forget what was predicted and how far that could be trusted."""
        shape = self._shape
        self._trust = np.zeros((self.predicts, 2))
        self._predicted_dLE = np.zeros((self.predicts, shape.num_layers, shape.num_experts))

    def plan(
        self,
        need: LayerNeed,
        table: ResidencyTable,
        now_us: float,
        predicted: tuple[NDArray[np.floating], NDArray[np.floating]] | None,
    ) -> Plan:
        """What to do about a layer's needs.

        Args:
            now_us: by any clock that goes on.
            predicted: expected tokens and probability of use, (d, E) each, for the layers behind this one; rows
                beyond the last layer hold zeros.
        """
        tokens_dE, used_dE = (self._nothing, self._nothing) if predicted is None else predicted
        return plan_layer(
            self.knobs,
            self.costs,
            need.moe_layer,
            Need(need.experts, need.tokens, need.num_hits, need.num_late),
            max(0.0, self._link_free_us - now_us),
            table.slot_of,
            self._trust,
            self._predicted_dLE if predicted is not None else self._predicted_dLE[:0],
            np.array(tokens_dE, dtype=np.float64),
            np.array(used_dE, dtype=np.float64),
        )

    def issued(self, num_copies: int, now_us: float) -> None:
        """The link was given so many experts more."""
        self._link_free_us = max(self._link_free_us, now_us) + num_copies * self.costs.link_us
