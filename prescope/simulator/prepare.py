"""Trace, predictions and costs in the form that `replay` reads; made once, used by every run.

Shapes: R rows, S decode steps, L MoE layers, E experts, K top-k, d layers ahead.
"""

from copy import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..core.numbers import is_count, require_count
from ..errors import BadTrace, UnsupportedOption
from ..predictor.base import Predictor, ReplaysRows, ScoreArray
from ..predictor.checked import replay, replay_rows, require_predictor
from ..traces.events import DECODE
from ..traces.routing import RoutingTrace

#: Layers ahead that predictions are prepared for, unless told.
LOOKAHEAD = 4
#: Predictions are kept if they take no more, else made again for each replay, in parts of `PART_BYTES`. A model of 94
#: layers of 512 experts, 4,096 steps and four layers ahead would keep 6.3 GB.
KEPT_BYTES, PART_BYTES = 256 << 20, 8 << 20


class Needs(NamedTuple):
    """What each decode step needs: n entries, one for each expert that a layer of a step uses, in this order."""

    steps: NDArray[np.int64]  # (S,) numbers of the steps in the trace
    tokens_S: NDArray[np.int64]  # tokens of each step
    num_experts: int
    first: NDArray[np.int64]  # (S * L + 1,) of each layer's entries, and behind the last one
    experts: NDArray[np.int32]  # (n,) ascending within a layer
    tokens: NDArray[np.int32]  # (n,) tokens that use the expert
    weights: NDArray[np.float32]  # (n,) sums of their router weights

    def at(self, s: int, layer: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Experts (n,) that a layer of the s-th step needs, and the tokens of each."""
        i = s * self.num_layers + layer
        here = slice(int(self.first[i]), int(self.first[i + 1]))
        return self.experts[here], self.tokens[here]

    @property
    def num_layers(self) -> int:
        """L."""
        return (len(self.first) - 1) // len(self.steps)

    @property
    def tokens_SLE(self) -> NDArray[np.int32]:
        """The tokens as one array with all experts, (S, L, E): made anew at each call."""
        S, L, E = len(self.steps), self.num_layers, self.num_experts
        out = np.zeros((S * L, E), np.int32)
        out[np.repeat(np.arange(S * L), np.diff(self.first)), self.experts] = self.tokens
        return out.reshape(S, L, E)

    def until(self, s: int, layer: int) -> "Needs":
        """Nothing is needed by this layer of the s-th step, and those after it in the step."""
        begin, end = s * self.num_layers + layer, (s + 1) * self.num_layers
        gone = int(self.first[end] - self.first[begin])
        first = self.first.copy()
        first[begin : end + 1] = first[begin]
        first[end + 1 :] -= gone
        keep = np.r_[: self.first[begin], self.first[end] : len(self.experts)]
        return self._replace(
            first=first, experts=self.experts[keep], tokens=self.tokens[keep], weights=self.weights[keep]
        )


class Predicted(NamedTuple):
    """What a predictor says of each decode step, d layers ahead at most; zeros where there is no such layer."""

    expected_dSLE: NDArray[np.float32]  # tokens that use the expert
    used_dSLE: NDArray[np.float32]  # probability that any token uses it

    def forced(self) -> NDArray[np.float32]:
        """The same by the layer that predicts, (S, L, d, 2, E), as `Engine.force_routing` takes them."""
        d, S, L, E = self.used_dSLE.shape
        scores = np.zeros((S, L, d, 2, E), np.float32)
        for ahead in range(1, d + 1):
            for kind, values in enumerate(self):
                scores[:, : L - ahead, ahead - 1, kind] = values[ahead - 1][:, ahead:]
        return scores


def needs_of(trace: RoutingTrace) -> Needs:
    """Needs of a trace's decode steps.

    Raises:
        BadTrace: it has none.
    """
    decode = np.flatnonzero(trace.phase == DECODE)
    if len(decode) == 0:
        raise BadTrace(
            f"the trace of {trace.model} has no decode step; generate tokens (record_trace(..., new_tokens=64)), "
            f"or let simulator.as_decode(trace, batch=...) feed the tokens of its prompts one by one"
        )
    steps, step_R, tokens_S = np.unique(trace.step[decode], return_inverse=True, return_counts=True)
    S, L, E = len(steps), trace.num_layers, trace.num_experts
    ids = trace.expert_ids[decode]
    cell = (step_R[:, None] * L + np.arange(L))[:, :, None] * E + ids
    is_used = ids >= 0
    used, at = np.unique(cell[is_used], return_inverse=True)
    return Needs(
        steps.astype(np.int64),
        tokens_S,
        E,
        np.searchsorted(used, np.arange(S * L + 1) * E),
        (used % E).astype(np.int32),
        np.bincount(at).astype(np.int32),
        np.bincount(at, trace.weights[decode][is_used]).astype(np.float32),
    )


class Predictions:
    """A predictor's scores for the decode steps of a trace, summed over each step's tokens.

    All are kept where they fit into `KEPT_BYTES`, or the predictor scores whole traces alone; else each part is made
    when a replay comes to it.

    Args:
        predictor: None: nothing is predicted.
    """

    def __init__(self, predictor: Predictor | None, trace: RoutingTrace, lookahead: int = LOOKAHEAD) -> None:
        if predictor is not None:
            require_predictor(predictor, "replay")
        # One that reads router inputs needs nothing else of the past; others may know it from the prompt.
        told = trace.select(phase="decode") if predictor is not None and predictor.needs_inputs else trace
        asked: object = predictor
        self._predictor, self._trace = predictor, told
        self._by_rows = asked if isinstance(asked, ReplaysRows) else None
        self._rows = np.flatnonzero(told.phase == DECODE)
        steps, first = np.unique(told.step[self._rows], return_index=True)
        self._first = np.append(first, len(self._rows))
        most = 0 if predictor is None else predictor.lookahead
        self.depth = min(lookahead, most, trace.num_layers - 1)
        self._size = (len(steps), trace.num_layers, trace.num_experts)
        self._until: tuple[int, int] | None = None
        self._kept: Predicted | None = None
        if self._by_rows is None or len(steps) * self.step_bytes <= KEPT_BYTES:
            self._kept = self._made(0, len(steps))

    @classmethod
    def given(cls, predicted: Predicted, trace: RoutingTrace) -> "Predictions":
        """Some that were made before, for the decode steps of a trace."""
        made = cls(None, trace)
        made.depth, made._kept = len(predicted.used_dSLE), predicted
        return made

    @property
    def step_bytes(self) -> int:
        """Of the numbers of one step."""
        return 2 * 4 * self.depth * self._size[1] * self._size[2]

    def until(self, s: int, layer: int) -> "Predictions":
        """The same, but behind this layer of the s-th step nothing is predicted for the layers after it."""
        other = copy(self)
        other._until = s, layer
        return other

    def of(self, steps: slice) -> Predicted:
        """Of some steps, by their ranks; both ends given. Not to be changed."""
        begin, end = steps.start, steps.stop
        if self._kept is None:
            found = self._made(begin, end)
        else:
            found = Predicted(*(np.ascontiguousarray(part[:, begin:end]) for part in self._kept))
        if self._until is not None and begin <= self._until[0] < end:
            s, layer = self._until
            found = Predicted(*(part.copy() for part in found))
            for part in found:
                for ahead in range(self.depth):  # of those that the layer itself makes
                    part[ahead, s - begin, layer + ahead + 1 :] = 0.0
        return found

    def _made(self, begin: int, end: int) -> Predicted:
        _, L, E = self._size
        shape = (self.depth, end - begin, L, E)
        expected, used = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        trace = self._trace
        most = max(1, PART_BYTES // (4 * L * E))  # rows scored at once
        for ahead in range(1, self.depth + 1):
            assert self._predictor is not None
            if self._by_rows is None:
                scores = replay(self._predictor, trace, ahead)
                scores = scores if len(self._rows) == len(trace) else scores[self._rows]
                _sum_up(scores, self._first[:-1], expected[ahead - 1, :, ahead:], used[ahead - 1, :, ahead:])
                continue
            first = begin
            while first < end:
                last = int(np.searchsorted(self._first, self._first[first] + most, "right")) - 1
                last = min(end, max(first + 1, last))
                rows = self._rows[self._first[first] : self._first[last]]
                here = slice(first - begin, last - begin)
                _sum_up(
                    replay_rows(self._predictor, self._by_rows, trace, ahead, rows),
                    self._first[first:last] - self._first[first],
                    expected[ahead - 1, here, ahead:],
                    used[ahead - 1, here, ahead:],
                )
                first = last
        return Predicted(expected, used)


def _sum_up(
    scores: ScoreArray, first: NDArray[np.int64], expected: NDArray[np.float32], used: NDArray[np.float32]
) -> None:
    """Of rows (R, L, E), steps of which begin at `first` (S,): fills (S, L, E) expected tokens and probabilities."""
    expected[:] = np.add.reduceat(scores, first, axis=0)
    with np.errstate(divide="ignore"):  # a probability of 1: log 0 = -inf, and exp(-inf) = 0
        unused = np.exp(np.add.reduceat(np.log1p(-np.minimum(scores, 1.0)), first, axis=0))
    used[:] = 1.0 - unused


def predictions_of(predictor: Predictor, trace: RoutingTrace, lookahead: int = LOOKAHEAD) -> Predicted:
    """A predictor's scores for all decode steps of a trace, summed over each step's tokens."""
    made = Predictions(predictor, trace, lookahead)
    return made.of(slice(0, made._size[0]))


def in_batches(trace: RoutingTrace, batch: int) -> tuple[RoutingTrace, NDArray[np.int64]]:
    """The sequences of a trace as if `batch` of them had been served at a time, and which rows those are.

    A group's prompts are one step, then each of its steps has the next token of every sequence that still goes on.
    Padding is left out.

    Raises:
        UnsupportedOption: batch < 1, or more than there are sequences.
    """
    real = np.flatnonzero(trace.position >= 0)
    found, rank = np.unique(trace.sequence[real], return_inverse=True)
    if not (is_count(batch) and 1 <= batch <= len(found)):
        raise UnsupportedOption(
            f"batch is {batch!r}; the trace has {len(found)} sequences, so it is 1 to {len(found)}"
        )
    # The n-th decoded token of its sequence: prompts of a group are of different lengths. -1 for a prompt's.
    by_sequence = np.lexsort((trace.position[real], rank))
    decoded = (trace.phase[real] == DECODE)[by_sequence].astype(np.int64)
    so_far = np.cumsum(decoded) - decoded
    begins = np.searchsorted(rank[by_sequence], rank[by_sequence])
    nth = np.empty(len(real), np.int64)
    nth[by_sequence] = np.where(decoded, so_far - so_far[begins], -1)
    order = np.lexsort((trace.position[real], rank, nth, rank // batch))
    rows = real[order]
    steps = np.stack([rank[order] // batch, nth[order]])
    step = np.concatenate(([0], np.cumsum((np.diff(steps) != 0).any(axis=0)))).astype(np.int32)
    arrays = {
        name: getattr(trace, name)[rows]
        for name in ("expert_ids", "weights", "sequence", "position", "phase")
    }
    inputs = None if trace.inputs is None else trace.inputs[rows]
    return replace(trace, step=step, inputs=inputs, **arrays), rows


def as_decode(trace: RoutingTrace, batch: int = 1) -> RoutingTrace:
    """The tokens of a trace as if they had been decoded: steps of `batch` tokens of different sequences.

    Sequences are taken in groups of `batch`; a group's step is one position, so it shrinks as its shorter sequences
    end. Padding is left out. For traces of prompts, which have no decode steps, and to change the batch.

    Raises:
        UnsupportedOption: batch < 1.
    """
    require_count("batch", batch)
    real = np.flatnonzero(trace.position >= 0)
    _, rank = np.unique(trace.sequence[real], return_inverse=True)
    order = np.lexsort((trace.sequence[real], trace.position[real], rank // batch))
    rows = real[order]
    group, position = (rank // batch)[order], trace.position[rows]
    begins = np.concatenate(([True], (np.diff(group) != 0) | (np.diff(position) != 0))) if len(rows) else rows
    step = np.cumsum(begins).astype(np.int32) - 1
    return replace(
        trace,
        expert_ids=trace.expert_ids[rows],
        weights=trace.weights[rows],
        step=step,
        sequence=trace.sequence[rows],
        position=position,
        phase=np.full(len(rows), DECODE, np.int8),
        inputs=None if trace.inputs is None else trace.inputs[rows],
    )
