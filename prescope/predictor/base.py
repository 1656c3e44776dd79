"""What a predictor is: from a router's input at one MoE layer, how likely each expert of the coming layers is used.

One protocol, two ways in. `predict` answers live, for the tokens of one layer, on whatever device they are.
`replay` scores a whole recorded trace at once, vectorised over rows and layers, for score cards and the simulator;
each row is replayed as if it were decoded: what earlier positions of its sequence used is known, what it uses is not.
Knows nothing of models, caches or links.

Shapes: R rows of a trace, T tokens of a call, D model width, E experts, K top-k, L MoE layers.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.numbers import is_count
from ..core.types import MoEShape
from ..errors import BadTrace, PrescopeError, TraceMismatch, UnsupportedOption
from ..traces.routing import RoutingTrace
from ..traces.routing import used_mask as used_mask

ScoreArray = NDArray[np.float32]
IdArray = NDArray[np.int64]

#: Probabilities stay this far from 0 and 1, so that their logarithms are finite.
TINY = 1e-6


class BadPredictor(PrescopeError):
    """A predictor file cannot be read, or its tensors are not those of a predictor."""


class TooFewPrompts(PrescopeError, ValueError):
    """Too few prompts to hold some out: a predictor must not be judged on what it was trained on."""


class BadState(PrescopeError, ValueError):
    """A router input is NaN or infinite, or has another width than the predictor was trained on."""


class Prediction(NamedTuple):
    """Scores for one coming MoE layer."""

    moe_layer: int  # the layer predicted, a rank among the MoE layers
    lookahead: int  # layers between the state and the use, >= 1
    scores_TE: torch.Tensor  # (T, E) float32 in [0, 1]: probability that the token uses the expert


class Cost(NamedTuple):
    """What one call of `predict` costs for one layer and one token, all lookaheads together; the largest layer's."""

    parameters: int  # numbers read, those taken from the model's own routers included
    nbytes: int  # of these, in the dtype they are held in
    flops: int  # two for each multiply-add

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {self.nbytes / 2**20:.2f} MiB, {self.flops / 1e6:.2f} MFLOP per layer"


class FastPath(Protocol):
    """A predictor's answers for a few tokens in fewer launches than `predict` makes."""

    most_tokens: int

    def __call__(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor:
        """(d, 2, E) float32: expected tokens, and probability that any uses an expert, for the next d layers."""
        ...


@runtime_checkable
class Predictor(Protocol):
    """What engine, simulator and score card ask of a predictor."""

    name: str
    shape: MoEShape  # a model's, without the bytes (`MoEShape.routing`)
    lookahead: int  # D: layers it looks ahead at most
    needs_inputs: bool  # True: it reads router inputs, so a trace for `replay` must hold them
    is_calibrated: bool  # True: scores were fitted to be probabilities

    def predict(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor | None = None,
        weights_TK: torch.Tensor | None = None,
    ) -> list[Prediction]:
        """Scores for layers `moe_layer + 1 ..  moe_layer + lookahead`, those that exist, in this order.

        Args:
            x_TD: router input at `moe_layer`. `ids_TK`, `weights_TK`: experts chosen there and their weights.
        """
        ...

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """(R, L - lookahead, E): [:, l] are the scores for layer l + lookahead given what is known at layer l."""
        ...

    def cost(self) -> Cost:
        """Operations and bytes as counted, not measured; `measure_us` measures."""
        ...

    def to(self, device: torch.device | str) -> "Predictor":
        """The same with its tensors on a device, for the engine that runs there."""
        ...

    def fast_path(self, lookahead: int) -> FastPath | None:
        """A faster way to the same answers for the next `lookahead` layers; None: there is none here."""
        ...


@runtime_checkable
class ReplaysRows(Protocol):
    """A predictor that scores each row of a trace by itself, so that a long trace can be replayed in parts."""

    def replay_rows(self, trace: RoutingTrace, lookahead: int, rows: IdArray) -> ScoreArray:
        """As `Predictor.replay`, of the rows (n,) alone: (n, L - lookahead, E)."""
        ...


@runtime_checkable
class Learns(Protocol):
    """A predictor that remembers what layers have used, and answers by it: an engine tells it.

    It is no part of a graph, where Python remembers nothing; and `to` gives it on another device with one memory.
    """

    def begin(self, num_sequences: int) -> None:
        """A text of so many sequences begins: the one before is nobody's past."""
        ...

    def observe(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """Learn which experts a layer has used; behind `predict`, if that was asked about the layer at all.

        Args:
            ids_TK: of the sequences' tokens, sequence by sequence; -1 in the rows of padding.
        """
        ...


@runtime_checkable
class LearnsWhereAsked(Learns, Protocol):
    """One that learns from a step only if it was asked about all of its layers: beside a graph it learns nothing."""

    needs_every_layer: bool


def targets_of(moe_layer: int, shape: MoEShape, lookahead: int) -> Iterator[tuple[int, int]]:
    """(lookahead, layer) for each coming layer that exists."""
    for ahead in range(1, lookahead + 1):
        if moe_layer + ahead < shape.num_layers:
            yield ahead, moe_layer + ahead


def used_mask_torch(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(..., E) float32 0/1 from ids (..., K); as `used_mask`, on the ids' device. Ids outside [0, E) mark none."""
    places = places_of(ids_TK, num_experts)
    mask = torch.zeros((*places.shape[:-1], num_experts + 2), dtype=torch.float32, device=places.device)
    return mask.scatter_(-1, places, 1.0)[..., 1:-1]


def places_of(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Columns of a table of E + 2, int64: those of experts are 1 to E, other ids have the first and the last."""
    return ids.to(torch.int64).clamp(-1, num_experts) + 1


def require_inputs(trace: RoutingTrace, name: str) -> NDArray[np.float16]:
    """The router inputs (R, L, D) of a trace.

    Raises:
        BadTrace: it was recorded without.
    """
    if trace.inputs is None:
        raise BadTrace(
            f"{name} reads router inputs and this trace of {trace.model} has none; record it with "
            f"record_inputs=True (prescope.load(..., record_inputs=True), or prescope.training.record_trace)"
        )
    return trace.inputs


def require_shape(trace: RoutingTrace, shape: MoEShape, lookahead: int, most: int, name: str) -> None:
    """Make sure that a predictor can replay a trace at a lookahead.

    Raises:
        TraceMismatch: the trace is of a model of another shape.
        UnsupportedOption: the lookahead is beyond the predictor's or the model's.
    """
    if trace.shape != shape:
        raise TraceMismatch(
            f"{name} was made for (layers, experts, top-k) = {tuple(shape)[:3]}, the trace of {trace.model} has "
            f"{tuple(trace.shape)[:3]}; record a trace with the predictor's model, or train one for this model"
        )
    require_lookahead(lookahead, min(most, shape.num_layers - 1), name)


def require_lookahead(lookahead: int, most: int, name: str) -> None:
    """Raises UnsupportedOption unless 1 <= lookahead <= most."""
    if not (is_count(lookahead) and 1 <= lookahead <= most):
        raise UnsupportedOption(f"lookahead {lookahead!r} of {name}: choose 1 to {most}")


def measure_us(
    predictor: Predictor, width: int, *, tokens: int = 1, repeats: int = 50, device: str = "cpu"
) -> float:
    """Median microseconds of `predict` on `device` for a middle layer, with random inputs of `width`; it is waited for.

    Measured on this machine, when it is called; a first call is left out as warm-up.
    """
    predictor = predictor.to(device)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, width, generator=generator, dtype=torch.float32, device="cpu").to(device)
    ids_TK = torch.arange(predictor.shape.top_k, device="cpu").expand(tokens, -1).to(device)
    weights_TK = torch.full(ids_TK.shape, 1.0 / predictor.shape.top_k, dtype=torch.float32, device=device)
    layer = max(0, (predictor.shape.num_layers - 1 - predictor.lookahead) // 2)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        predictions = predictor.predict(layer, x_TD, ids_TK, weights_TK)
        for prediction in predictions[-1:]:
            prediction.scores_TE[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]) * 1e6)
