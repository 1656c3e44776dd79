"""An oracle with a chosen error rate: it shows what a predictor of that recall would gain, where none can be trained.

For traces without router inputs (made-up ones, those read from Parquet), and live for an engine whose routing is forced
to follow a trace. It shows what recall is worth, not that any predictor reaches it.

Shapes: R rows, T tokens, E experts, K top-k, L MoE layers.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.numbers import is_count, is_number, require_seed
from ..core.types import MoEShape
from ..errors import BadTrace, TraceMismatch, UnsupportedOption
from ..traces.routing import RoutingTrace, used_mask
from .base import ScoreArray
from .baselines import PRIOR_TOKENS, Baseline, LayerInput, Scorer

Int16Array = NDArray[np.int16]

#: Numbers drawn at once for wrong guesses, one for each row, layer and expert: bounds the memory at 16 times as many
#: bytes.
MOST_DRAWN = 1 << 22
#: An expert that was not guessed scores at most so much of what a guessed one does: the guesses stay the best K.
MOST_BELOW = 0.999


class NoisyOracle(Baseline):
    """Knows a trace, and for each token and layer guesses K experts of which on average `recall` are right.

    A used expert is guessed with probability `recall`; each that is not leaves its place to a wrong one, drawn by the
    odds of its frequency. So a guess is right with probability `recall` whichever expert it names, and that is its
    score; an expert that was not guessed scores f * (1 - recall) / (1 - f), f the share of tokens that use it, which
    is its probability too. (That holds where f is below 1 / (2 - recall); scores of experts used more often are capped
    to stay below those of the guesses.) Guesses change from one lookahead to the next only where recall does: what is
    predicted four layers ahead is still predicted one layer ahead. Real predictors differ in that their errors come
    together, in hard tokens and layers; here each is independent. Where 2K > E there may be too few wrong experts
    to guess, and recall comes out a little higher.

    Args:
        trace: what will be used; `replay` takes no other. Frequencies are this trace's.
        recall: recall@K by lookahead, linear in between and constant outside; the largest is how far it looks.
            1 makes it the oracle.
        seed: of the errors. The same seed, trace and recall give the same scores, live and replayed.

    Raises:
        UnsupportedOption: no recall, a lookahead the model has no layers for, or a recall outside [chance, 1].
    """

    is_calibrated = True

    def __init__(self, trace: RoutingTrace, recall: Mapping[int, float], *, seed: int = 0) -> None:
        _check_recall(recall, trace.shape)
        require_seed(seed)
        super().__init__(trace.shape, max(recall))
        self.recall = dict(sorted(recall.items()))
        self.name = _name_of(self.recall)
        self.seed = seed
        self._trace = trace
        #: [ahead - 1] (L - ahead, T, E): scores of the step that was set.
        self._live: list[torch.Tensor] | None = None
        self._num_tokens = 0
        chance = self.shape.top_k / self.shape.num_experts
        uses_LE = trace.expert_counts()
        rate_LE = (uses_LE + PRIOR_TOKENS * chance) / (len(trace) + PRIOR_TOKENS)
        # Where all tokens use an expert its odds are infinite, and nobody can guess it wrongly.
        self._odds_LE = (rate_LE / np.maximum(1.0 - rate_LE, 1e-6)).astype(np.float32)
        rng = np.random.default_rng(seed)
        at_once = max(1, MOST_DRAWN // self._odds_LE.size)
        #: The right guess at a place is lost where recall falls below this.
        self._luck_RLK = rng.random(trace.expert_ids.shape, dtype=np.float32)
        self._wrong_RLK = np.concatenate(
            [
                _wrong_guesses(trace.expert_ids[i : i + at_once], self._odds_LE, rng)
                for i in range(0, len(trace), at_once)
            ]
        )

    def recall_at(self, lookahead: int) -> float:
        """The recall chosen, or interpolated, for a lookahead."""
        return float(np.interp(lookahead, list(self.recall), list(self.recall.values())))

    def set_step(self, step: int) -> None:
        """From now on `predict` is asked about this step's tokens, all of them, in row order.

        All scores of the step are made here, so that a call of `predict` costs some microseconds. That is no
        predictor's cost: emulate one by adding its time to the layer's.

        Raises:
            BadTrace: the trace has no such step.
        """
        first, end = np.searchsorted(self._trace.step, [step, step + 1])
        if first == end:
            raise BadTrace(f"the trace of {self._trace.model} has no step {step}; it has {self._trace.steps}")
        rows, L = slice(int(first), int(end)), self.shape.num_layers
        self._live = [
            torch.from_numpy(
                np.ascontiguousarray(self._scores(rows, slice(ahead, L), ahead).transpose(1, 0, 2))
            )
            for ahead in range(1, min(self.lookahead, L - 1) + 1)
        ]
        self._num_tokens = int(end - first)

    def _scorer(self, at: LayerInput) -> Scorer:
        """Scores for this step's coming layers from the trace, with the errors; reads only how many inputs there are.

        Raises:
            BadTrace: no step was set, or it has another number of tokens.
        """
        if self._live is None:
            raise BadTrace(f"{self.name} does not know which step of its trace this is; call set_step(step)")
        if len(at.x_TD) != self._num_tokens:
            raise BadTrace(
                f"this step of the trace has {self._num_tokens} tokens, predict was given {len(at.x_TD)}; "
                f"run what the trace was recorded of"
            )
        live = self._live
        return lambda ahead, target: live[ahead - 1][at.moe_layer].to(at.x_TD.device)

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`. Raises TraceMismatch when it is another trace than the one it knows."""
        self._require(trace, lookahead)
        return self._scores(slice(0, len(trace)), slice(lookahead, self.shape.num_layers), lookahead)

    def replay_rows(self, trace: RoutingTrace, lookahead: int, rows: NDArray[np.int64]) -> ScoreArray:
        """As `replay`, of some rows."""
        self._require(trace, lookahead)
        return self._scores(rows, slice(lookahead, self.shape.num_layers), lookahead)

    def _require(self, trace: RoutingTrace, lookahead: int) -> None:
        self._check(trace, lookahead)
        if trace is not self._trace and not np.array_equal(trace.expert_ids, self._trace.expert_ids):
            raise TraceMismatch(
                f"{self.name} knows the trace of {self._trace.model} it was made with, and no other; "
                f"make one for this trace"
            )

    def _scores(self, rows: slice | NDArray[np.int64], layers: slice, lookahead: int) -> ScoreArray:
        """(rows, layers, E) scores of the layers, made `lookahead` layers before them."""
        recall = self.recall_at(lookahead)
        used = self._trace.expert_ids[rows, layers]
        is_lost = self._luck_RLK[rows, layers] >= recall
        is_lost &= used >= 0  # a place that was not used is no guess either
        num_lost = is_lost.sum(axis=-1, keepdims=True)
        takes = np.arange(self.shape.top_k) < num_lost
        guesses = np.concatenate(
            [np.where(is_lost, -1, used), np.where(takes, self._wrong_RLK[rows, layers], -1)], axis=-1
        )
        below_LE = np.minimum(self._odds_LE[layers] * (1.0 - recall), MOST_BELOW * recall)
        is_guess = used_mask(guesses, self.shape.num_experts)
        scores: ScoreArray = np.where(is_guess, np.float32(recall), below_LE.astype(np.float32))
        return scores


def _wrong_guesses(ids_RLK: Int16Array, odds_LE: NDArray[np.float32], rng: np.random.Generator) -> Int16Array:
    """(R, L, K) experts that were not used, distinct, each drawn by its odds among the rest; -1 where there is none."""
    R, L, K = ids_RLK.shape
    E = odds_LE.shape[1]
    race = rng.standard_exponential((R, L, E), dtype=np.float32) / np.maximum(odds_LE, 1e-9)
    race[used_mask(ids_RLK, E)] = np.inf
    first = np.argpartition(race, K - 1, axis=-1)[..., :K]
    time = np.take_along_axis(race, first, axis=-1)
    order = np.argsort(time, axis=-1)
    found = np.where(np.isinf(time), -1, first)
    return np.take_along_axis(found, order, axis=-1).astype(np.int16)


def _check_recall(recall: Mapping[int, float], shape: MoEShape) -> None:
    if not isinstance(recall, Mapping) or not all(map(is_count, recall)) or not recall:
        raise UnsupportedOption(
            f"recall is {recall!r}; name one for a lookahead at least, such as {{1: 0.9}}"
        )
    low, high = min(recall), max(recall)
    if low < 1 or high > max(1, shape.num_layers - 1):
        raise UnsupportedOption(
            f"recall is given for lookaheads {sorted(recall)}; with {shape.num_layers} MoE layers there are "
            f"1 to {max(1, shape.num_layers - 1)}"
        )
    chance = shape.top_k / shape.num_experts
    for lookahead, value in recall.items():
        if not is_number(value) or not chance <= value <= 1.0:
            raise UnsupportedOption(
                f"recall {value!r} at lookahead {lookahead}: choose chance, {chance:.3f}, to 1; for predictions worse "
                f"than chance there is Inverted"
            )


def _name_of(recall: Mapping[int, float]) -> str:
    values = " / ".join(f"{value:.2f}" for value in recall.values())
    ahead = "" if len(recall) == 1 else f" at {' / '.join(map(str, recall))}"
    return f"oracle with recall {values}{ahead} (emulated predictor)"
