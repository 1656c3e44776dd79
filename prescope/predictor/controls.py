"""Two controls: a predictor that knows everything must score 1.0, one that knows nothing K / E.

Shapes: R rows, T tokens, E experts, K top-k, L MoE layers.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.numbers import require_seed
from ..core.types import MoEShape
from ..errors import BadTrace
from ..traces.routing import RoutingTrace
from .base import IdArray, ScoreArray, used_mask
from .baselines import Baseline, LayerInput, Scorer

#: Draws of the generator until they begin anew: going back is going on by the rest of them.
PERIOD = 1 << 128


class Oracle(Baseline):
    """Knows the trace that it replays. A score card that gives it less than 1.0 is wrong."""

    name = "oracle"
    is_calibrated = True

    def _scorer(self, at: LayerInput) -> Scorer:
        """Always raises BadTrace: live, nobody knows the future."""
        raise BadTrace("the oracle knows a recorded trace only; use replay(trace, lookahead)")

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`: exactly what was used."""
        return self.replay_rows(trace, lookahead, np.arange(len(trace)))

    def replay_rows(self, trace: RoutingTrace, lookahead: int, rows: IdArray) -> ScoreArray:
        """As `replay`, of some rows."""
        self._check(trace, lookahead)
        return used_mask(trace.expert_ids[rows, lookahead:], self.shape.num_experts).astype(np.float32)


class Chance(Baseline):
    """Knows only the number of experts. Scores are K / E, with noise that only decides the order."""

    name = "chance"
    is_calibrated = True

    def __init__(self, shape: MoEShape, lookahead: int, seed: int = 0) -> None:
        super().__init__(shape, lookahead)
        require_seed(seed)
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    def _scores(self, noise: NDArray[np.float64]) -> ScoreArray:
        return (self.shape.top_k / self.shape.num_experts * (1.0 - 1e-3 * noise)).astype(np.float32)

    def _scorer(self, at: LayerInput) -> Scorer:
        """Another order at each call."""
        size = (len(at.x_TD), self.shape.num_experts)

        def scores(ahead: int, target: int) -> torch.Tensor:
            noise = (
                torch.rand(size, generator=self._generator, dtype=torch.float32, device="cpu")
                .double()
                .numpy()
            )
            return torch.from_numpy(self._scores(noise)).to(at.x_TD.device)

        return scores

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`; the same order at each call, another at each lookahead."""
        return self.replay_rows(trace, lookahead, np.arange(len(trace)))

    def replay_rows(self, trace: RoutingTrace, lookahead: int, rows: IdArray) -> ScoreArray:
        """As `replay`, of some rows: each has the draws that it has in a replay of all."""
        self._check(trace, lookahead)
        size = (self.shape.num_layers - lookahead, self.shape.num_experts)
        bits = np.random.PCG64([self.seed, lookahead])
        rng, at = np.random.Generator(bits), 0
        out = np.empty((len(rows), *size), np.float32)
        for i, row in enumerate(rows.tolist()):
            bits.advance((row - at) * size[0] * size[1] % PERIOD)
            out[i], at = self._scores(rng.random(size)), row + 1
        return out
