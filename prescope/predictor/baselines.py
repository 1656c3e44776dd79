"""Predictors that need no training, or only counting, and that a trained one has to beat.

| name | knows | source of the idea |
|---|---|---|
| early router | layer l + d's router, applied to layer l's router input | Fate, HybriMoE |
| frequency | how often each expert was used in a trace | static hot set |
| previous token | what the previous position of the sequence used | mixtral-offloading |
| transition | counts: expert at layer l -> expert at layer l + d | MoE-Infinity's kind |

Shapes: R rows, T tokens, D width, E experts, K top-k, L MoE layers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, Self

import numpy as np
import torch

from ..core.numbers import is_number, require_count
from ..core.types import MoEShape
from ..errors import BadTrace, TraceMismatch, UnsupportedOption
from ..traces.routing import RoutingTrace
from .base import (
    TINY,
    Cost,
    FastPath,
    IdArray,
    Prediction,
    ScoreArray,
    require_inputs,
    require_shape,
    targets_of,
    used_mask,
    used_mask_torch,
)
from .platt import fit_platt, logit


class LayerInput(NamedTuple):
    """What `predict` is called with, at one layer."""

    moe_layer: int
    x_TD: torch.Tensor  # the router's input
    ids_TK: torch.Tensor | None  # experts chosen there, and their weights
    weights_TK: torch.Tensor | None


#: (lookahead, target layer) -> (T, E) float32.
Scorer = Callable[[int, int], torch.Tensor]
#: Rows scored at once: bounds the memory of a replay at about ROWS x L x D floats.
ROWS = 4096
#: Weight of the prior, in tokens, where something is counted: an expert never seen is not impossible.
PRIOR_TOKENS = 1.0


@dataclass(frozen=True, eq=False)
class Routers:
    """The routers of a model as plain tensors.

    Attributes:
        weight_LED: (L, E, D) float32.
        logit_bias_LE: (L, E), added to the logits.
        selection_bias_LE: (L, E), added to the routing scores when experts are chosen (DeepSeek-V3's correction).
        scoring: how the family turns logits into routing scores.
    """

    weight_LED: torch.Tensor
    logit_bias_LE: torch.Tensor
    selection_bias_LE: torch.Tensor
    scoring: Literal["softmax", "sigmoid"] = "softmax"

    def __post_init__(self) -> None:
        L, E, _ = self.weight_LED.shape
        for name in ("logit_bias_LE", "selection_bias_LE"):
            if getattr(self, name).shape != (L, E):
                raise TraceMismatch(
                    f"{name} has shape {tuple(getattr(self, name).shape)}, the routers are {L} x {E}"
                )

    @classmethod
    def of_weights(
        cls, weight_LED: torch.Tensor, scoring: Literal["softmax", "sigmoid"] = "softmax"
    ) -> "Routers":
        """Routers without biases."""
        zeros = torch.zeros(weight_LED.shape[:2], dtype=torch.float32, device="cpu")
        return cls(weight_LED.detach().float().cpu(), zeros, zeros.clone(), scoring)

    def check_shape(self, shape: MoEShape, width: int | None = None) -> None:
        """Make sure that these are the routers of a model of this shape, and read inputs of this width if one is known.

        Raises:
            TraceMismatch: they are not.
        """
        found = tuple(self.weight_LED.shape)
        if found[:2] != shape[:2] or width not in (None, found[2]):
            inputs = "" if width is None else f", with inputs of width {width}"
            raise TraceMismatch(
                f"routers of {found[0]} layers x {found[1]} experts that read {found[2]} numbers; the trace has "
                f"{shape[0]} x {shape[1]}{inputs}. Take them out of the model that was recorded: "
                f"prescope.training.routers_of(engine, trace)"
            )

    def to(self, device: torch.device | str) -> "Routers":
        return Routers(
            self.weight_LED.to(device),
            self.logit_bias_LE.to(device),
            self.selection_bias_LE.to(device),
            self.scoring,
        )

    def logits(self, moe_layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, E) routing logits of a layer for inputs x (T, D)."""
        return torch.addmm(self.logit_bias_LE[moe_layer], x_TD.float(), self.weight_LED[moe_layer].T)

    @cached_property
    def has_selection_bias(self) -> bool:
        return bool((self.selection_bias_LE != 0).any())

    def choice(self, moe_layer: int, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, E) what the family's top-k compares, as logits: monotone in its scores plus their bias."""
        logits = self.logits(moe_layer, x_TD)
        if (
            not self.has_selection_bias
        ):  # the logits rank alike and keep more resolution than probabilities do
            return logits
        scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
        return torch.logit(scores + self.selection_bias_LE[moe_layer], TINY)


def above_threshold(logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Logits less the middle between the K-th and the next one of their row: positive for exactly the top K."""
    if top_k >= logits_TE.shape[-1]:
        return logits_TE - logits_TE.amin(-1, keepdim=True) + 1.0
    best = logits_TE.topk(top_k + 1, dim=-1).values
    return logits_TE - best[..., top_k - 1 :].mean(-1, keepdim=True)


class Baseline(ABC):
    """What all baselines share: `predict` by one `_scorer` each."""

    name = ""
    needs_inputs = False
    is_calibrated = False

    def __init__(self, shape: MoEShape, lookahead: int) -> None:
        require_count("lookahead", lookahead, 0)
        self.shape = shape.routing
        self.lookahead = lookahead

    def predict(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor | None = None,
        weights_TK: torch.Tensor | None = None,
    ) -> list[Prediction]:
        """Scores of the coming layers, one after another; raises as the predictor's own `_scorer`."""
        scores = self._scorer(LayerInput(moe_layer, x_TD, ids_TK, weights_TK))
        return [
            Prediction(target, ahead, scores(ahead, target))
            for ahead, target in targets_of(moe_layer, self.shape, self.lookahead)
        ]

    @abstractmethod
    def _scorer(self, at: LayerInput) -> Scorer:
        """What every predictor has of its own: (lookahead, target layer) -> scores (T, E) for a layer's tokens."""

    def to(self, device: torch.device | str) -> Self:
        """Itself: its numbers stay on the host."""
        return self

    def fast_path(self, lookahead: int) -> FastPath | None:
        """There is none."""
        return None

    def _check(self, trace: RoutingTrace, lookahead: int) -> None:
        require_shape(trace, self.shape, lookahead, self.lookahead, self.name)

    def cost(self) -> Cost:
        """A table look-up for each lookahead."""
        numbers = self.shape.num_experts * self.lookahead
        return Cost(numbers, 4 * numbers, numbers)


class EarlyRouter(Baseline):
    """Layer l + d's own router on layer l's router input: the residual stream changes little from layer to layer.

    Scores are a sigmoid of the logits above the row's top-k threshold; `calibrate` makes them probabilities.
    """

    name = "early router"
    needs_inputs = True

    def __init__(self, shape: MoEShape, routers: Routers, lookahead: int) -> None:
        super().__init__(shape, lookahead)
        routers.check_shape(shape)
        self.routers = routers
        self.platt: dict[int, tuple[float, float]] = {}

    def to(self, device: torch.device | str) -> Self:
        """A copy with the routers on a device."""
        moved = copy(self)
        moved.routers = self.routers.to(device)
        return moved

    def calibrate(self, trace: RoutingTrace) -> None:
        """Fit one slope and offset for each lookahead on a trace."""
        self.platt = {}
        for ahead in range(1, min(self.lookahead, self.shape.num_layers - 1) + 1):
            scores = self.replay(trace, ahead)
            self.platt[ahead] = fit_platt(
                logit(scores), used_mask(trace.expert_ids, self.shape.num_experts)[:, ahead:]
            )
        self.is_calibrated = True

    def _scores(self, target: int, ahead: int, x_TD: torch.Tensor) -> torch.Tensor:
        slope, offset = self.platt.get(ahead, (1.0, 0.0))
        margin_TE = above_threshold(self.routers.choice(target, x_TD), self.shape.top_k)
        return torch.sigmoid(slope * margin_TE + offset)

    def _scorer(self, at: LayerInput) -> Scorer:
        """Apply the routers of the coming layers now."""
        return lambda ahead, target: self._scores(target, ahead, at.x_TD)

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`. Raises BadTrace when the trace has no router inputs."""
        self._check(trace, lookahead)
        inputs_RLD = require_inputs(trace, self.name)
        L = self.shape.num_layers - lookahead
        out = np.empty((len(trace), L, self.shape.num_experts), dtype=np.float32)
        device = self.routers.weight_LED.device
        for first in range(0, len(trace), ROWS):
            for layer in range(L):
                x_TD = torch.from_numpy(inputs_RLD[first : first + ROWS, layer]).to(device)
                out[first : first + ROWS, layer] = (
                    self._scores(layer + lookahead, lookahead, x_TD).cpu().numpy()
                )
        return out

    def replay_rows(self, trace: RoutingTrace, lookahead: int, rows: IdArray) -> ScoreArray:
        """As `replay`, of some rows."""
        return self.replay(trace.take(rows), lookahead)

    def cost(self) -> Cost:
        """One router product for each lookahead; its weights are the model's own."""
        numbers = self.routers.weight_LED[0].numel() * self.lookahead
        return Cost(numbers, numbers * self.routers.weight_LED.element_size(), 2 * numbers)


class Frequency(Baseline):
    """Share of a trace's tokens that used each expert; the same answer for every token."""

    name = "frequency"
    is_calibrated = True

    def __init__(self, trace: RoutingTrace, lookahead: int) -> None:
        super().__init__(trace.shape, lookahead)
        chance = self.shape.top_k / self.shape.num_experts
        counts_LE = used_mask(trace.expert_ids, self.shape.num_experts).sum(axis=0)
        self.rate_LE = ((counts_LE + PRIOR_TOKENS * chance) / (len(trace) + PRIOR_TOKENS)).astype(np.float32)
        self._live_LE = torch.from_numpy(self.rate_LE)

    def to(self, device: torch.device | str) -> Self:
        """A copy with the rates on a device."""
        moved = copy(self)
        moved._live_LE = self._live_LE.to(device)
        return moved

    def _scorer(self, at: LayerInput) -> Scorer:
        """The rates of the coming layers, whatever the state."""
        return lambda ahead, target: self._live_LE[target].to(at.x_TD.device).expand(len(at.x_TD), -1)

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`; a read-only view."""
        return self.replay_rows(trace, lookahead, np.arange(len(trace)))

    def replay_rows(self, trace: RoutingTrace, lookahead: int, rows: IdArray) -> ScoreArray:
        """As `replay`, of some rows."""
        self._check(trace, lookahead)
        return np.broadcast_to(self.rate_LE[lookahead:], (len(rows), *self.rate_LE[lookahead:].shape))


class PreviousToken(Baseline):
    """What the sequence's previous position used at the layer; older positions, decayed, order the rest.

    Live it remembers what it is told (`base.Learns`), the prompt too. While a prompt is read all its positions pass a
    layer at once, and the state is that before it; a replay scores each row as if decoded.

    Args:
        decay: weight of the past. At most 1/2, so that the previous position outweighs all older ones.

    Raises:
        UnsupportedOption: `decay` lies outside [0, 1/2].
    """

    name = "previous token"

    def __init__(self, shape: MoEShape, lookahead: int, decay: float = 0.25) -> None:
        super().__init__(shape, lookahead)
        if not is_number(decay) or not 0.0 <= decay <= 0.5:
            raise UnsupportedOption(f"decay is {decay!r}; the past weighs 0 to 0.5")
        self.decay = decay
        self.begin(1)

    def begin(self, num_sequences: int) -> None:
        """Forget the past: a run of this many sequences starts."""
        chance = self.shape.top_k / self.shape.num_experts
        self._recent_SLE = torch.full(
            (num_sequences, *self.shape[:2]), chance, dtype=torch.float32, device="cpu"
        )

    def observe(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """As `base.Learns.observe`; of N positions a sequence at once, the newest weighs most."""
        self._recent_SLE = self._recent_SLE.to(ids_TK.device)
        used_SNE = used_mask_torch(ids_TK, self.shape.num_experts).view(
            len(self._recent_SLE), -1, self.shape.num_experts
        )
        is_token_SN = used_SNE.any(dim=-1)  # padding is no token's past
        from_here_SN = is_token_SN.flip(1).cumsum(1).flip(1)  # tokens from each position to the end
        weight_SN = (1.0 - self.decay) * self.decay ** (from_here_SN - 1) * is_token_SN
        new_SE = torch.einsum("sn,sne->se", weight_SN, used_SNE)
        kept_S1 = self.decay ** from_here_SN[:, :1]
        self._recent_SLE[:, moe_layer] = kept_S1 * self._recent_SLE[:, moe_layer] + new_SE

    def _scorer(self, at: LayerInput) -> Scorer:
        """The decayed past of each token's sequence at the coming layers."""
        tokens, recent_SLE = len(at.x_TD) // len(self._recent_SLE), self._recent_SLE
        return lambda ahead, target: recent_SLE[:, target].to(at.x_TD.device).repeat_interleave(tokens, dim=0)

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`."""
        self._check(trace, lookahead)
        used_RLE = used_mask(trace.expert_ids, self.shape.num_experts)[:, lookahead:]
        sequences, sequence_R = np.unique(trace.sequence, return_inverse=True)
        chance = self.shape.top_k / self.shape.num_experts
        recent_SLE = np.full((len(sequences), *used_RLE.shape[1:]), chance, dtype=np.float32)
        out = np.broadcast_to(np.float32(chance), used_RLE.shape).copy()
        # Padding (position -1) is no token's past.
        order = np.argsort(trace.position, kind="stable")
        order = order[trace.position[order] >= 0]
        starts = np.flatnonzero(np.diff(trace.position[order])) + 1
        for rows in np.split(order, starts):
            at = sequence_R[rows]
            out[rows] = recent_SLE[at]
            recent_SLE[at] = self.decay * recent_SLE[at] + (1.0 - self.decay) * used_RLE[rows]
        return out


class Transition(Baseline):
    """Counts of "expert i at layer l, expert j at layer l + d" in a trace, combined as if the K experts were
    independent: logit = logit of the rate + sum over chosen i of (logit of P(j | i) - logit of the rate).
    """

    name = "transition"

    def __init__(self, trace: RoutingTrace, lookahead: int) -> None:
        super().__init__(trace.shape, lookahead)
        L, E, K = self.shape[:3]
        used_LRE = used_mask(trace.expert_ids, E).transpose(1, 0, 2).astype(np.float32)
        rate_LE = (used_LRE.sum(1) + PRIOR_TOKENS * K / E) / (len(trace) + PRIOR_TOKENS)
        self._prior_LE = torch.from_numpy(logit(rate_LE).astype(np.float32))
        #: [d - 1, l, i, j]: what expert i at layer l adds to the logit of expert j at layer l + d.
        self._evidence_DLEE = torch.zeros(lookahead, L, E, E, dtype=torch.float32, device="cpu")
        for ahead in range(1, min(lookahead, L - 1) + 1):
            together = np.einsum("lri,lrj->lij", used_LRE[:-ahead], used_LRE[ahead:], optimize=True)
            rate = rate_LE[ahead:, None, :]
            given = (together + PRIOR_TOKENS * rate) / (used_LRE[:-ahead].sum(1)[:, :, None] + PRIOR_TOKENS)
            self._evidence_DLEE[ahead - 1, : L - ahead] = torch.from_numpy(logit(given) - logit(rate)).float()

    def to(self, device: torch.device | str) -> Self:
        """A copy with the counts on a device: 4 bytes for each lookahead, layer and pair of experts."""
        moved = copy(self)
        moved._prior_LE, moved._evidence_DLEE = self._prior_LE.to(device), self._evidence_DLEE.to(device)
        return moved

    def _scores(self, moe_layer: int, ahead: int, used_TE: torch.Tensor) -> torch.Tensor:
        evidence_EE = self._evidence_DLEE[ahead - 1, moe_layer].to(used_TE.device)
        prior_E = self._prior_LE[moe_layer + ahead].to(used_TE.device)
        return torch.sigmoid(torch.addmm(prior_E, used_TE, evidence_EE))

    def _scorer(self, at: LayerInput) -> Scorer:
        """From the experts chosen at this layer. Raises BadTrace without them."""
        if at.ids_TK is None:
            raise BadTrace("the transition predictor reads the chosen experts; pass ids_TK to predict()")
        used_TE = used_mask_torch(at.ids_TK, self.shape.num_experts)
        return lambda ahead, target: self._scores(at.moe_layer, ahead, used_TE)

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`."""
        return self.replay_rows(trace, lookahead, np.arange(len(trace)))

    def replay_rows(self, trace: RoutingTrace, lookahead: int, rows: IdArray) -> ScoreArray:
        """As `replay`, of some rows."""
        self._check(trace, lookahead)
        ids = trace.expert_ids[rows]
        used_RLE = torch.from_numpy(used_mask(ids, self.shape.num_experts).astype(np.float32))
        layers = range(self.shape.num_layers - lookahead)
        return torch.stack([self._scores(i, lookahead, used_RLE[:, i]) for i in layers], dim=1).numpy()

    def cost(self) -> Cost:
        """K rows of a table for each lookahead."""
        numbers = self.shape.num_experts * self.shape.top_k * self.lookahead
        return Cost(numbers, 4 * numbers, numbers)
