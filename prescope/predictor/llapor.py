"""LLaPor, the learnable layer-aware predictor, as we re-implement it (arXiv 2509.23638).

One small network per MoE layer on its PCA-compressed router input; layers in groups (`layer_groups`): the outer ones
shallow (Linear - GELU - Dropout), the middle one deeper by a gated residual block. One head per lookahead. All layers
lie in one set of tensors with the layer first, so that one bmm serves all of them in training and replay, and the
same code serves one layer live. Nothing in `predict` makes the host wait, so a CUDA graph can hold it.

The residual variant, the default, adds a correction to the early router's logits (layer l + d's own router on layer
l's input); `residual=False` is the paper's form. The correction fades for states unlike those of the training, so that
on other text the predictor falls back to the early router instead of below it; where a layer's early router is weak,
the correction fades later (`tensors["trust"]`). Scores with a faded correction have a Platt scaling of their own.

Shapes: T tokens, D width, P compressed width, H hidden, B width of the block, E experts, K top-k, L MoE layers,
M middle layers, N = lookahead * E outputs.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch.nn.functional import dropout, gelu

from ..core.numbers import is_count, is_number
from ..core.types import MoEShape
from ..device import torch_device_of
from ..errors import TraceMismatch, UnsupportedOption
from ..traces.routing import RoutingTrace
from .base import (
    BadPredictor,
    BadState,
    Cost,
    FastPath,
    IdArray,
    Prediction,
    ScoreArray,
    places_of,
    require_inputs,
    require_shape,
    targets_of,
)
from .baselines import Routers, above_threshold
from .files import check_tensors, read_tensors, require_finite_tensors, write_tensors
from .layer_groups import LayerGroups
from .llapor_config import FIXED, LlaporConfig, ModelTag, tensor_shapes

FORMAT = "prescope-predictor-3"
#: Distances up to which a correction counts in full: for none of the states, and for all of them.
NEVER_TRUST, ALWAYS_TRUST = 1e-6, 1e6
#: Rows scored at once in a replay, at most; fewer where their inputs and logits of all layers, as one array each, would
#: take more than so many bytes. There are some five such arrays at a time: of 94 layers, 512 experts and four layers
#: ahead, 2048 rows took 4.6 GB.
ROWS, PART_BYTES = 2048, 16 << 20
ALL = slice(None)


class Llapor:
    """A trained (or fresh) predictor. `prescope.training.train` makes a trained one.

    Attributes:
        config, shape, groups: what it was made with.
        tag: model and fingerprint.
        tensors: name -> tensor, see `tensor_shapes`.
        validation_error: 1 - recall@K on held-out prompts, mean over layers and lookaheads; NaN before training.
    """

    needs_inputs = True

    def __init__(
        self,
        config: LlaporConfig,
        shape: MoEShape,
        groups: LayerGroups,
        tensors: Mapping[str, torch.Tensor],
        tag: ModelTag,
        *,
        validation_error: float = float("nan"),
    ) -> None:
        self.config, self.shape, self.groups, self.tag = config, shape.routing, groups, tag
        self.tensors = dict(tensors)
        self.validation_error = validation_error
        self.name = "llapor" if config.residual else "llapor plain"
        self.lookahead = min(config.lookahead, shape.num_layers - 1)
        self.is_calibrated = bool((self.tensors["platt"].cpu() != _identity_platt(config, shape)).any())
        self.width = self.tensors["pca_mean"].shape[2]
        self._early = self._early_routers()

    @classmethod
    def fresh(
        cls,
        config: LlaporConfig,
        shape: MoEShape,
        groups: LayerGroups,
        pca: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        tag: ModelTag,
        routers: Routers | None,
        seed: int,
    ) -> "Llapor":
        """An untrained predictor: the residual variant starts as exactly the early router.

        Args:
            pca: mean (L, 1, D), components (L, D, P) and whitening (L, 1, P), see `training.prepare.fit_pca`.

        Raises:
            UnsupportedOption: the residual variant without routers.
        """
        if config.residual and routers is None:
            raise UnsupportedOption(
                "the residual variant corrects the early router, so it needs the model's routers; pass routers=..., "
                "or use LlaporConfig.paper()"
            )
        fixed = dict(zip(("pca_mean", "pca", "whiten"), (part.cpu() for part in pca), strict=True))
        fixed["platt"] = _identity_platt(config, shape)
        if config.residual and routers is not None:
            fixed |= {"router": routers.weight_LED.cpu(), "router_bias": routers.logit_bias_LE.cpu()}
            fixed["platt_faded"] = _identity_platt(config, shape)
            fixed["trust"] = torch.full(
                (shape.num_layers, 1, 1), ALWAYS_TRUST, dtype=torch.float32, device="cpu"
            )
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, torch.Tensor] = {}
        width = fixed["pca_mean"].shape[2]
        for name, size in tensor_shapes(config, shape, width, len(groups.middle)).items():
            # A block or a correction that starts at zero starts as what it is added to.
            starts_at_zero = name == "down" or name.endswith("_bias") or (name == "head" and config.residual)
            if name in fixed:
                tensors[name] = fixed[name]
            elif name == "skip":
                tensors[name] = torch.ones(size, dtype=torch.float32, device="cpu")
            elif starts_at_zero:
                tensors[name] = torch.zeros(size, dtype=torch.float32, device="cpu")
            else:
                tensors[name] = (
                    torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
                    * size[-2] ** -0.5
                )
        return cls(config, shape, groups, tensors, tag)

    def _early_routers(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(L, D, N) and (L, 1, N): for each layer the routers of the coming ones, side by side; zero beyond the last.

        Views into one padded copy of the routers: at Qwen3-30B's shape copies would take 200 MB of the GPU.
        """
        if not self.config.residual:
            return None
        L, E = self.shape[:2]
        D, ahead = self.width, self.config.lookahead
        weight = torch.cat([self.tensors["router"], self.tensors["router"].new_zeros(ahead, E, D)])
        bias = torch.cat([self.tensors["router_bias"], self.tensors["router_bias"].new_zeros(ahead, E)])
        weights = weight.as_strided((L, ahead * E, D), (E * D, D, 1), E * D).transpose(1, 2)
        return weights, bias.as_strided((L, 1, ahead * E), (E, E, 1), E)

    def columns(self, ahead: int) -> slice:
        """Of the N outputs those of one lookahead."""
        E = self.shape.num_experts
        return slice((ahead - 1) * E, ahead * E)

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors to a device; returns the predictor."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        self._early = self._early_routers()
        return self

    def fast_path(self, lookahead: int) -> FastPath | None:
        """The networks in a few launches, on a GPU with Triton."""
        if self.device.type != "cuda" or find_spec("triton") is None:
            return None
        # Triton is large and exists only where there is a GPU, so it is imported only where it is used.
        from .llapor_triton import LlaporKernels

        return LlaporKernels(self, lookahead)

    @property
    def device(self) -> torch.device:
        return self.tensors["pca"].device

    def trusting(self, distance: float) -> "Llapor":
        """The same predictor (tensors shared) with corrections that count in full up to one distance in all layers."""
        tensors = self.tensors | {"trust": torch.full_like(self.tensors["trust"], distance)}
        return Llapor(self.config, self.shape, self.groups, tensors, self.tag)

    def trained(self) -> dict[str, torch.Tensor]:
        """The tensors that training changes."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in FIXED}

    # -- the networks, of all layers or of a slice of them -------------------------------------------------------

    def hidden(
        self, x_LTD: torch.Tensor, choice_LTE: torch.Tensor | None, at: slice = ALL, *, training: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The networks up to their heads (L, T, H) and the share of the correction that counts (L, T, 1), by which they
        are scaled; with dropout, unscaled and None in training. None also where nothing fades.
        """
        t = self.tensors
        drop = self.config.dropout if training else 0.0
        f = torch.bmm(x_LTD - t["pca_mean"][at], t["pca"][at])
        h = torch.baddbmm(t["in_bias"][at], f, t["in"][at])
        if self.config.use_choice and choice_LTE is not None:
            h = torch.baddbmm(h, choice_LTE, t["choice"][at])
        h = dropout(gelu(h), drop, training=training)
        h = self._through_block(h, at, drop)
        if training or not self.config.residual or not self.config.trust:
            return h, None
        distance = torch.bmm(f.square(), t["whiten"][at].transpose(1, 2))
        share = (t["trust"][at] / distance).clamp_max(1.0)
        return h * share, share

    def _through_block(self, h_LTH: torch.Tensor, at: slice, drop: float) -> torch.Tensor:
        """The gated residual block, for those of the layers that are in the middle group."""
        first, last, _ = at.indices(self.shape.num_layers)
        begin, end = max(first, self.groups.middle.start), min(last, self.groups.middle.stop)
        if begin >= end:
            return h_LTH
        t, rows = self.tensors, slice(begin - self.groups.middle.start, end - self.groups.middle.start)
        h = h_LTH[begin - first : end - first]
        update = gelu(torch.baddbmm(t["up_bias"][rows], h, t["up"][rows]))
        gate = torch.sigmoid(torch.baddbmm(t["gate_bias"][rows], h, t["gate"][rows]))
        h = torch.baddbmm(h, dropout(gate * update, drop, training=drop > 0), t["down"][rows])
        return torch.cat([h_LTH[: begin - first], h, h_LTH[end - first :]])

    def base(self, x_LTD: torch.Tensor, at: slice = ALL) -> torch.Tensor | None:
        """(L, T, N) early-router log-probabilities of the coming layers; None in the paper's form.

        Normalised within each lookahead: the routers' own scale drifts from layer to layer.
        """
        if self._early is None:
            return None
        weights, biases = self._early
        parts = torch.baddbmm(biases[at], x_LTD, weights[at])
        parts = parts.unflatten(-1, (self.config.lookahead, self.shape.num_experts))
        return torch.log_softmax(parts, dim=-1).flatten(-2)

    def logits(self, h_LTH: torch.Tensor, base_LTN: torch.Tensor | None, at: slice = ALL) -> torch.Tensor:
        """(L, T, N) logits of "expert is used", before Platt scaling."""
        z = torch.baddbmm(self.tensors["head_bias"][at], h_LTH, self.tensors["head"][at])
        return z if base_LTN is None else torch.addcmul(z, self.tensors["skip"][at], base_LTN)

    def forward(
        self, x_LTD: torch.Tensor, choice_LTE: torch.Tensor | None, *, training: bool = False
    ) -> torch.Tensor:
        """(L, T, N) logits for router inputs x and choices of all layers."""
        h, _ = self.hidden(x_LTD, choice_LTE, training=training)
        return self.logits(h, self.base(x_LTD))

    def probabilities(
        self, z_LTN: torch.Tensor, share_LT1: torch.Tensor | None, at: slice = ALL
    ) -> torch.Tensor:
        """(L, T, lookahead, E): Platt-scaled probabilities, `share_LT1` of the correction in the logits.

        The correction also sets the level of the logits. Where it has faded, a scaling fitted to full corrections gives
        sums of K / 4 instead of K, and tokens with known states outvote the others of a batch (docs/log/predictor.md).
        """
        platt = self.tensors["platt"][at][:, None, :, None, :]
        if share_LT1 is not None:
            faded = self.tensors["platt_faded"][at][:, None, :, None, :]
            platt = torch.lerp(faded, platt, share_LT1[..., None, None])
        return torch.sigmoid(torch.addcmul(platt[..., 1], platt[..., 0], self.comparable(z_LTN)))

    def comparable(self, z_LTN: torch.Tensor) -> torch.Tensor:
        """(L, T, lookahead, E) of logits, above each token's threshold if `relative`: what Platt scaling reads.

        The networks learn each token's experts apart from the others; the level of a token's logits says little. Plain
        logits covered 0.83 of a cache's misses with half a useless copy a token and layer, as the early router did;
        these 0.89 (docs/log/predictor.md).
        """
        z = z_LTN.unflatten(-1, (self.config.lookahead, self.shape.num_experts))
        return above_threshold(z, self.shape.top_k) if self.config.relative else z

    # -- ways in -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor | None = None,
        weights_TK: torch.Tensor | None = None,
    ) -> list[Prediction]:
        """Scores for the coming layers, on the device of `x_TD`, which must be the predictor's.

        A NaN in the state gives NaN scores: checking here would make the host wait at each layer. Ids are needed
        when `use_choice` is set; without weights each chosen expert counts 1 / K.
        """
        if moe_layer >= self.shape.num_layers - 1:
            return []
        at = slice(moe_layer, moe_layer + 1)
        h, share, base = self.live(at, x_TD, ids_TK, weights_TK)
        p_TNE = self.probabilities(self.logits(h, base, at), share, at)[0]
        return [
            Prediction(target, ahead, p_TNE[:, ahead - 1])
            for ahead, target in targets_of(moe_layer, self.shape, self.lookahead)
        ]

    def live(
        self, at: slice, x_TD: torch.Tensor, ids_TK: torch.Tensor | None, weights_TK: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`hidden` (both parts) and `base` of one layer for the tokens of one call."""
        self.check_live(x_TD, ids_TK)
        choice = None
        if self.config.use_choice:
            assert ids_TK is not None  # checked
            if weights_TK is None:
                weights_TK = torch.full(
                    ids_TK.shape, 1.0 / self.shape.top_k, dtype=torch.float32, device=x_TD.device
                )
            choice = choice_of(ids_TK, weights_TK, self.shape.num_experts)[None]
        x_LTD = x_TD.float()[None]
        return *self.hidden(x_LTD, choice, at), self.base(x_LTD, at)

    def check_live(self, x_TD: torch.Tensor, ids_TK: torch.Tensor | None) -> None:
        """Make sure that router inputs and chosen experts can be predicted from.

        Raises:
            BadState: the inputs' width is another, or the chosen experts are missing.
        """
        self._require_width(x_TD.shape[-1])
        if self.config.use_choice and ids_TK is None:
            raise BadState(
                f"{self.name} was trained with the chosen experts as input; pass ids_TK to predict()"
            )

    def _require_width(self, width: int) -> None:
        if width != self.width:
            raise BadState(f"router inputs are {width} wide, {self.name} was trained on {self.width}")

    def batch_of(
        self, trace: RoutingTrace, rows: slice | np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (L, T, D) and choice (L, T, E) of some rows of a trace, on the predictor's device.

        Raises:
            BadTrace: the trace has no router inputs.
            BadState: their width is another.
        """
        inputs = require_inputs(trace, self.name)
        self._require_width(inputs.shape[2])
        x_LTD = torch.from_numpy(inputs[rows]).to(self.device).transpose(0, 1).float().contiguous()
        if not self.config.use_choice:
            return x_LTD, None
        ids = torch.from_numpy(trace.expert_ids[rows]).to(self.device).transpose(0, 1)
        weights = torch.from_numpy(trace.weights[rows]).to(self.device).transpose(0, 1)
        return x_LTD, choice_of(ids, weights, self.shape.num_experts)

    @torch.no_grad()
    def replay_logits(self, trace: RoutingTrace) -> torch.Tensor:
        """(L, R, N) `comparable` logits of a whole trace, on the CPU; for calibration. Raises as `replay`."""
        self.check_trace(trace, self.lookahead)
        parts = [
            self.comparable(self.forward(*self.batch_of(trace, rows))).flatten(-2).cpu()
            for rows in self.chunks(len(trace))
        ]
        return torch.cat(parts, dim=1)

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`. Raises BadTrace, TraceMismatch, BadState."""
        return self.replay_rows(trace, lookahead, np.arange(len(trace)))

    @torch.no_grad()
    def replay_rows(self, trace: RoutingTrace, lookahead: int, rows: IdArray) -> ScoreArray:
        """As `replay`, of some rows."""
        self.check_trace(trace, lookahead)
        L = self.shape.num_layers - lookahead
        out = np.empty((len(rows), L, self.shape.num_experts), dtype=np.float32)
        for part in self.chunks(len(rows)):
            x, choice = self.batch_of(trace, rows[part])
            h, share = self.hidden(x, choice)
            p = self.probabilities(self.logits(h, self.base(x)), share)
            out[part] = p[:L, :, lookahead - 1].transpose(0, 1).cpu().numpy()
        return out

    def chunks(self, num_rows: int) -> list[slice]:
        """So many rows in parts that are scored at once."""
        numbers = self.shape.num_layers * max(self.width, self.config.lookahead * self.shape.num_experts)
        size = max(1, min(ROWS, PART_BYTES // (4 * numbers)))
        return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]

    def cost(self) -> Cost:
        """Of `predict` for a middle layer (the largest) and one token. The routers' share is the model's own."""
        D, H, E = self.width, self.config.hidden, self.shape.num_experts
        P, N = self.tensors["pca"].shape[2], self.config.lookahead * E
        numbers = D + D * P + P + P * H + H + H * N + N
        if self.config.residual:
            numbers += D * N + 2 * N
        if self.config.use_choice:
            numbers += E * H
        if len(self.groups.middle):
            numbers += 3 * H * self.config.block + 2 * self.config.block
        return Cost(numbers, numbers * self.tensors["head"].element_size(), 2 * numbers)

    @property
    def nbytes(self) -> int:
        """Of all tensors, the routers' copies included."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def __repr__(self) -> str:
        error = (
            "" if np.isnan(self.validation_error) else f", held-out recall@K {1 - self.validation_error:.3f}"
        )
        return f"<{self.name} for {self.tag.model}: lookahead {self.lookahead}, {self.cost()}{error}>"

    # -- files -------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write tensors and metadata as safetensors; a reader sees the old file or the whole new one.

        Raises:
            BadPredictor: a tensor holds NaN or infinite numbers; nothing is written.
        """
        require_finite_tensors(
            self.tensors, "the predictor", "train it again with a smaller learning rate; nothing was written"
        )
        metadata = {
            "config": asdict(self.config),
            "shape": {name: n for name, n in self.shape._asdict().items() if name != "row_bytes"},
            "groups": [self.groups.middle.start, self.groups.middle.stop, self.groups.reason],
            "tag": asdict(self.tag),
            "width": self.width,
            "validation_error": None if np.isnan(self.validation_error) else self.validation_error,
        }
        return write_tensors(self.tensors, {"format": FORMAT, "prescope": json.dumps(metadata)}, path)

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None, device: str = "cpu") -> "Llapor":
        """Read a predictor written by `save`.

        Args:
            fingerprint: of the model it is to serve (`engine.fingerprint`); None skips that check.

        Raises:
            BadPredictor: the file is truncated, damaged or no predictor, or a tensor is NaN or of a wrong shape.
            TraceMismatch: it was trained for another model.
            UnsupportedOption: there is no such device.
            FileNotFoundError: there is none.
        """
        where = torch_device_of(device)
        tensors, metadata = read_tensors(path, FORMAT)
        try:
            # Files of before do not say it: their scalings are of plain logits.
            config = LlaporConfig(**{"relative": False, **metadata["config"]})
            shape = MoEShape(**metadata["shape"])
            start, stop, reason = metadata["groups"]
            if not all(type(n) is int and n > 0 for n in shape[:3]):
                raise ValueError(f"shape {shape[:3]}")
            if not 0 <= int(start) <= int(stop) <= shape.num_layers:
                raise ValueError(f"groups {start} to {stop} of {shape.num_layers} layers")
            groups = LayerGroups.at(int(start), int(stop), shape.num_layers, str(reason))
            tag = ModelTag(**metadata["tag"])
            if not all(isinstance(text, str) for text in (tag.model, tag.fingerprint, tag.created)):
                raise TypeError(f"tag {tag}")
            width, error = metadata["width"], metadata["validation_error"]
            if not is_count(width) or not (error is None or (is_number(error) and 0.0 <= error <= 1.0)):
                raise ValueError(f"width {width!r}, validation_error {error!r}")
            expected = tensor_shapes(config, shape, width, len(groups.middle))
            error = float("nan") if error is None else float(error)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as problem:
            raise BadPredictor(
                f"{path}: its metadata is damaged: {problem!r}; train the predictor again"
            ) from problem
        check_tensors(tensors, expected, str(path))
        predictor = cls(config, shape, groups, tensors, tag, validation_error=error)
        if fingerprint is not None:
            predictor.check_model(fingerprint, "this model")
        return predictor.to(where)

    def check_trace(self, trace: RoutingTrace, lookahead: int) -> None:
        """Make sure that this predictor can score a trace at a lookahead: the shape fits, and the model is its own.

        Raises:
            TraceMismatch: of another model. UnsupportedOption: the lookahead is beyond the predictor's.
        """
        require_shape(trace, self.shape, lookahead, self.lookahead, self.name)
        self.check_model(trace.fingerprint, trace.model)

    def check_model(self, fingerprint: str, name: str) -> None:
        """Make sure that this predictor was trained for the model of this fingerprint.

        Raises:
            TraceMismatch: it was not.
        """
        if fingerprint != self.tag.fingerprint:
            raise TraceMismatch(
                f"the predictor was trained for {self.tag.model} (fingerprint {self.tag.fingerprint}), the model is "
                f"{name} (fingerprint {fingerprint}); train one for it: prescope.train_predictor(model, prompts)"
            )


def choice_of(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(..., E) float32: each chosen expert's router weight at its place; ids outside [0, E) leave nothing."""
    places = places_of(ids, num_experts)
    out = torch.zeros((*places.shape[:-1], num_experts + 2), dtype=torch.float32, device=places.device)
    return out.scatter_(-1, places, weights.float())[..., 1:-1]


def _identity_platt(config: LlaporConfig, shape: MoEShape) -> torch.Tensor:
    return torch.tensor([1.0, 0.0], dtype=torch.float32, device="cpu").repeat(
        shape.num_layers, config.lookahead, 1
    )
