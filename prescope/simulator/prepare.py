"""Trace, predictions and costs in the form that `replay` reads; made once, used by every run.

Shapes: R rows, S decode steps, L MoE layers, E experts, K top-k, d layers ahead.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import BadTrace, UnsupportedOption
from ..predictor.base import Predictor
from ..traces.events import PHASES
from ..traces.routing import RoutingTrace

DECODE = PHASES.index("decode")
#: Layers ahead that predictions are prepared for, unless told.
LOOKAHEAD = 4


class Needs(NamedTuple):
    """What each decode step needs."""

    steps: NDArray[np.int64]  # (S,) numbers of the steps in the trace
    tokens_S: NDArray[np.int64]  # tokens of each step
    tokens_SLE: NDArray[np.int32]  # of these, those that use the expert
    weights_SLE: NDArray[np.float32]  # sums of their router weights


class Predicted(NamedTuple):
    """What a predictor says of each decode step, d layers ahead at most; zeros where there is no such layer."""

    expected_dSLE: NDArray[np.float32]  # tokens that use the expert
    used_dSLE: NDArray[np.float32]  # probability that any token uses it


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
    ids = trace.expert_ids[decode].astype(np.int64)
    cell = (step_R[:, None] * L + np.arange(L))[:, :, None] * E + ids
    is_used = ids >= 0
    tokens = np.bincount(cell[is_used], minlength=S * L * E)
    weights = np.bincount(cell[is_used], trace.weights[decode][is_used], minlength=S * L * E)
    return Needs(
        steps.astype(np.int64),
        tokens_S,
        tokens.astype(np.int32).reshape(S, L, E),
        weights.astype(np.float32).reshape(S, L, E),
    )


def predictions_of(predictor: Predictor, trace: RoutingTrace, lookahead: int = LOOKAHEAD) -> Predicted:
    """A predictor's scores for the decode steps of a trace, summed over each step's tokens."""
    # One that reads router inputs needs nothing else of the past; others may know it from the prompt.
    told = trace.select(phase="decode") if predictor.needs_inputs else trace
    rows = np.flatnonzero(told.phase == DECODE)
    steps, first = np.unique(told.step[rows], return_index=True)
    depth = min(lookahead, predictor.lookahead, trace.num_layers - 1)
    shape = (depth, len(steps), trace.num_layers, trace.num_experts)
    expected, used = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for ahead in range(1, depth + 1):
        scores = predictor.replay(told, ahead)
        scores = scores if len(rows) == len(told) else scores[rows]
        expected[ahead - 1, :, ahead:] = np.add.reduceat(scores, first, axis=0)
        with np.errstate(divide="ignore"):  # a probability of 1: log 0 = -inf, and exp(-inf) = 0
            unused = np.exp(np.add.reduceat(np.log1p(-np.minimum(scores, 1.0)), first, axis=0))
        used[ahead - 1, :, ahead:] = 1.0 - unused
    return Predicted(expected, used)


def as_decode(trace: RoutingTrace, batch: int = 1) -> RoutingTrace:
    """The tokens of a trace as if they had been decoded: steps of `batch` tokens of different sequences.

    Sequences are taken in groups of `batch`; a group's step is one position, so it shrinks as its shorter sequences
    end. Padding is left out. For traces of prompts, which have no decode steps, and to change the batch.

    Raises:
        UnsupportedOption: batch < 1.
    """
    if batch < 1:
        raise UnsupportedOption(f"batch is {batch}; a step has at least one token")
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
