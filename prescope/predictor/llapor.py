"""LLaPor, the learnable layer-aware predictor, as we re-implement it (arXiv 2509.23638; paper.md says what is known).

One small network per MoE layer on its PCA-compressed router input; layers in groups (`groups`): the outer ones
shallow (Linear - GELU - Dropout), the middle one deeper by a gated residual block. One head per lookahead. All layers
lie in one set of tensors with the layer first, so that one bmm serves all of them in training and replay.

The residual variant, the default, adds the correction to the early router's logits (layer l + d's own router on layer
l's input); `residual=False` is the paper's form. benchmarks/predictor.py measures both.

Shapes: T tokens, D width, P compressed width, H hidden, E experts, K top-k, L MoE layers, M middle layers,
N = lookahead * E outputs.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn.functional import dropout, gelu

from ..errors import TraceMismatch, UnsupportedOption
from ..routing import RoutingTrace
from .base import (
    BadPredictor,
    BadState,
    Cost,
    Prediction,
    ScoreArray,
    Shape,
    require_inputs,
    require_shape,
    targets_of,
    used_mask_torch,
)
from .baselines import Routers
from .groups import LayerGroups

FORMAT = "prescope-predictor-1"
#: Rows scored at once in a replay.
ROWS = 2048
#: Compressed widths of the paper, for hidden size 4096; a model narrower than that keeps all its dimensions.
WIDTH_OUTER, WIDTH_MIDDLE = 256, 512


@dataclass(frozen=True, kw_only=True, slots=True)
class LlaporConfig:
    """What decides the form of the networks and their loss.

    Args:
        lookahead: layers ahead, 1..lookahead are all predicted.
        width_outer, width_middle: PCA dimensions kept, cut to the model's width.
        hidden: width of the networks.
        dropout: share of hidden units dropped in training.
        residual: early-router logits + learned correction; needs the model's routers.
        use_choice: the chosen experts and their weights are inputs too.
        focal_lambda, focal_gamma: weight and exponent of the focal loss in the outer groups.
        distill: weight of the cross-entropy to the coming router's own probabilities, which say more than the K
            chosen ids; needs the model's routers; 0 is the paper's loss. Applies to the residual variant only.
    """

    lookahead: int = 4
    width_outer: int = WIDTH_OUTER
    width_middle: int = WIDTH_MIDDLE
    hidden: int = 256
    dropout: float = 0.1
    residual: bool = True
    use_choice: bool = True
    focal_lambda: float = 0.5
    focal_gamma: float = 2.0
    distill: float = 1.0

    def __post_init__(self) -> None:
        for name in ("lookahead", "width_outer", "width_middle", "hidden"):
            if getattr(self, name) < 1:
                raise UnsupportedOption(f"{name} is {getattr(self, name)}; it is at least 1")
        if not 0.0 <= self.dropout < 1.0:
            raise UnsupportedOption(f"dropout is {self.dropout}; it lies in [0, 1)")
        if min(self.focal_lambda, self.focal_gamma, self.distill) < 0.0:
            raise UnsupportedOption(
                "focal_lambda, focal_gamma and distill are weights; they are not negative"
            )

    @classmethod
    def paper(cls, **changes: Any) -> "LlaporConfig":
        """The paper's form: no early router, no distillation."""
        return cls(**{"residual": False, "distill": 0.0, **changes})


@dataclass(frozen=True, kw_only=True)
class ModelTag:
    """Which model a predictor belongs to, and what is known of its training."""

    model: str
    fingerprint: str
    notes: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


def tensor_shapes(
    config: LlaporConfig, shape: Shape, width: int, num_middle: int
) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a predictor; `width` is D. A file is checked against it."""
    L, E, _ = shape
    P = min(width, max(config.width_outer, config.width_middle))
    H, N = config.hidden, config.lookahead * E
    shapes: dict[str, tuple[int, ...]] = {
        "pca_mean": (L, 1, width),
        "pca": (L, width, P),
        "in": (L, P, H),
        "in_bias": (L, 1, H),
        "up": (num_middle, H, H),
        "up_bias": (num_middle, 1, H),
        "gate": (num_middle, H, H),
        "gate_bias": (num_middle, 1, H),
        "down": (num_middle, H, H),
        "head": (L, H, N),
        "head_bias": (L, 1, N),
        "platt": (L, config.lookahead, 2),
    }
    if config.use_choice:
        shapes["choice"] = (L, E, H)
    if config.residual:
        shapes |= {
            "skip": (L, 1, N),
            "router": (L, E, width),
            "router_bias": (L, E),
            "selection_bias": (L, E),
        }
    return shapes


#: Tensors that are not trained by gradient.
FIXED = ("pca_mean", "pca", "platt", "router", "router_bias", "selection_bias")


class Llapor:
    """A trained (or fresh) predictor. `predictor.train.train` makes a trained one.

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
        shape: Shape,
        groups: LayerGroups,
        tensors: Mapping[str, torch.Tensor],
        tag: ModelTag,
        *,
        scoring: str = "softmax",
        validation_error: float = float("nan"),
    ) -> None:
        self.config, self.shape, self.groups, self.tag = config, shape, groups, tag
        self.tensors = dict(tensors)
        self.scoring = scoring
        self.validation_error = validation_error
        self.name = "llapor" if config.residual else "llapor plain"
        self.lookahead = min(config.lookahead, shape.num_layers - 1)
        self.is_calibrated = bool((self.tensors["platt"] != _identity_platt(config, shape)).any())
        self.width = self.tensors["pca_mean"].shape[2]
        self._middle = list(groups.middle)
        self._early = self._early_routers()
        self._live: dict[int, _LiveLayer] = {}

    @classmethod
    def fresh(
        cls,
        config: LlaporConfig,
        shape: Shape,
        groups: LayerGroups,
        pca: tuple[torch.Tensor, torch.Tensor],
        tag: ModelTag,
        routers: Routers | None,
        seed: int,
    ) -> "Llapor":
        """An untrained predictor: the residual variant starts as exactly the early router.

        Args:
            pca: mean (L, 1, D) and components (L, D, P), scaled; columns beyond a layer's width are zero.

        Raises:
            UnsupportedOption: the residual variant without routers.
        """
        if config.residual and routers is None:
            raise UnsupportedOption(
                "the residual variant corrects the early router, so it needs the model's routers; pass routers=..., "
                "or use LlaporConfig.paper()"
            )
        mean, components = pca
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, torch.Tensor] = {}
        for name, size in tensor_shapes(config, shape, mean.shape[2], len(groups.middle)).items():
            if name in FIXED:
                continue
            tensors[name] = torch.zeros(size)
            is_last = name == "down" or (name == "head" and config.residual)
            if not is_last and not name.endswith("_bias") and name != "skip":
                tensors[name] = torch.randn(size, generator=generator) * size[-2] ** -0.5
        # Without the block the middle layers start as shallow ones; its gate starts half open.
        tensors |= {"pca_mean": mean.cpu(), "pca": components.cpu(), "platt": _identity_platt(config, shape)}
        if config.residual and routers is not None:
            tensors["skip"] = torch.ones(shape.num_layers, 1, config.lookahead * shape.num_experts)
            tensors["router"] = routers.weight_LED.cpu()
            tensors["router_bias"] = routers.logit_bias_LE.cpu()
            tensors["selection_bias"] = routers.selection_bias_LE.cpu()
        return cls(config, shape, groups, tensors, tag, scoring=routers.scoring if routers else "softmax")

    def _early_routers(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(L, D, N) and (L, 1, N): for each layer the routers of the coming ones, side by side; zero beyond the last."""
        if not self.config.residual:
            return None
        L, E, _ = self.shape
        router = self.tensors["router"]
        weights = router.new_zeros(L, self.width, self.config.lookahead * E)
        biases = router.new_zeros(L, 1, self.config.lookahead * E)
        for ahead in range(1, self.lookahead + 1):
            columns = self.columns(ahead)
            weights[: L - ahead, :, columns] = router[ahead:].transpose(1, 2)
            biases[: L - ahead, 0, columns] = self.tensors["router_bias"][ahead:]
        return weights, biases

    def columns(self, ahead: int) -> slice:
        E = self.shape.num_experts
        return slice((ahead - 1) * E, ahead * E)

    def to(self, device: torch.device | str) -> Self:
        """Move all tensors; returns itself."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        self._early = self._early_routers()
        self._live = {}
        return self

    @property
    def device(self) -> torch.device:
        return self.tensors["pca"].device

    def trained(self) -> dict[str, torch.Tensor]:
        """The tensors that training changes."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in FIXED}

    def forget_live(self) -> None:
        """Drop what `predict` folded; call it after changing tensors."""
        self._live = {}

    # -- all layers at once ------------------------------------------------------------------------------------

    def hidden(self, x_LTD: torch.Tensor, choice_LTE: torch.Tensor | None, drop: float = 0.0) -> torch.Tensor:
        """(L, T, H): the networks up to their heads."""
        t = self.tensors
        f = torch.bmm(x_LTD - t["pca_mean"], t["pca"])
        h = torch.baddbmm(t["in_bias"], f, t["in"])
        if self.config.use_choice and choice_LTE is not None:
            h = torch.baddbmm(h, choice_LTE, t["choice"])
        h = dropout(gelu(h), drop, training=drop > 0)
        if not self._middle:
            return h
        first, last = self._middle[0], self._middle[-1] + 1
        middle = h[first:last]
        update = dropout(gelu(torch.baddbmm(t["up_bias"], middle, t["up"])), drop, training=drop > 0)
        gate = torch.sigmoid(torch.baddbmm(t["gate_bias"], middle, t["gate"]))
        middle = middle + gate * torch.bmm(update, t["down"])
        return torch.cat([h[:first], middle, h[last:]])

    def base(self, x_LTD: torch.Tensor) -> torch.Tensor | None:
        """(L, T, N) early-router logits of the coming layers, scaled by nothing yet; None in the paper's form."""
        if self._early is None:
            return None
        weights, biases = self._early
        return self._normalised(torch.baddbmm(biases, x_LTD, weights))

    def _normalised(self, logits: torch.Tensor) -> torch.Tensor:
        """Log-softmax within each lookahead: the routers' own scale drifts from layer to layer."""
        parts = logits.unflatten(-1, (self.config.lookahead, self.shape.num_experts))
        return torch.log_softmax(parts, dim=-1).flatten(-2)

    def logits(self, h_LTH: torch.Tensor, base_LTN: torch.Tensor | None) -> torch.Tensor:
        """(L, T, N) logits of "expert is used", before Platt scaling."""
        z = torch.baddbmm(self.tensors["head_bias"], h_LTH, self.tensors["head"])
        return z if base_LTN is None else z + self.tensors["skip"] * base_LTN

    def forward(
        self, x_LTD: torch.Tensor, choice_LTE: torch.Tensor | None, drop: float = 0.0
    ) -> torch.Tensor:
        """(L, T, N) logits for router inputs x and choices of all layers."""
        return self.logits(self.hidden(x_LTD, choice_LTE, drop), self.base(x_LTD))

    def probabilities(self, z_LTE: torch.Tensor, ahead: int) -> torch.Tensor:
        """Platt-scaled probabilities of one lookahead's logits, of the first layers of the model."""
        platt = self.tensors["platt"][: len(z_LTE), ahead - 1]
        return torch.sigmoid(platt[:, 0, None, None] * z_LTE + platt[:, 1, None, None])

    @torch.no_grad()
    def replay_logits(self, trace: RoutingTrace) -> torch.Tensor:
        """(L, R, N) logits of a whole trace, on the CPU; for calibration.

        Raises:
            BadTrace, TraceMismatch, BadState: see `batch_of`.
        """
        require_shape(trace, self.shape, self.lookahead, self.lookahead, self.name)
        parts = [self.forward(*self.batch_of(trace, rows)).cpu() for rows in _chunks(len(trace))]
        return torch.cat(parts, dim=1)

    def batch_of(
        self, trace: RoutingTrace, rows: slice | np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x (L, T, D) and choice (L, T, E) of some rows of a trace, on the predictor's device.

        Raises:
            BadTrace: the trace has no router inputs.
            BadState: their width is another.
        """
        inputs = require_inputs(trace, self.name)
        if inputs.shape[2] != self.width:
            raise BadState(
                f"router inputs are {inputs.shape[2]} wide, {self.name} was trained on {self.width}"
            )
        x_LTD = torch.from_numpy(inputs[rows]).to(self.device).float().transpose(0, 1).contiguous()
        if not self.config.use_choice:
            return x_LTD, None
        ids = torch.from_numpy(trace.expert_ids[rows]).to(self.device).transpose(0, 1)
        weights = torch.from_numpy(trace.weights[rows]).to(self.device).transpose(0, 1)
        return x_LTD, choice_of(ids, weights, self.shape.num_experts)

    @torch.no_grad()
    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`. Raises BadTrace, TraceMismatch, BadState."""
        require_shape(trace, self.shape, lookahead, self.lookahead, self.name)
        L = self.shape.num_layers - lookahead
        out = np.empty((len(trace), L, self.shape.num_experts), dtype=np.float32)
        for rows in _chunks(len(trace)):
            z = self.forward(*self.batch_of(trace, rows))[:L, :, self.columns(lookahead)]
            out[rows] = self.probabilities(z, lookahead).transpose(0, 1).cpu().numpy()
        return out

    # -- one layer, live ---------------------------------------------------------------------------------------

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
        if x_TD.shape[-1] != self.width:
            raise BadState(
                f"router inputs are {x_TD.shape[-1]} wide, {self.name} was trained on {self.width}"
            )
        if moe_layer >= self.shape.num_layers - 1:
            return []
        z_TN = self.live_logits(moe_layer, *self.live_hidden(moe_layer, x_TD, ids_TK, weights_TK))
        platt = self.tensors["platt"][moe_layer]
        return [
            Prediction(
                target,
                ahead,
                torch.sigmoid(platt[ahead - 1, 0] * z_TN[:, self.columns(ahead)] + platt[ahead - 1, 1]),
            )
            for ahead, target in targets_of(moe_layer, self.shape, self.lookahead)
        ]

    def live_hidden(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor | None, weights_TK: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(T, H) and (T, N) or None: as `hidden` and `base`, for one layer, with PCA and routers in one product."""
        live = self._live.get(moe_layer) or self._fold(moe_layer)
        t, H = self.tensors, self.config.hidden
        both = torch.addmm(live.bias, x_TD.float(), live.weight)
        h = both[:, :H]
        if self.config.use_choice:
            if ids_TK is None:
                raise BadState(
                    f"{self.name} was trained with the chosen experts as input; pass ids_TK to predict()"
                )
            weights = torch.full(ids_TK.shape, 1.0 / self.shape.top_k, device=x_TD.device)
            weights = weights if weights_TK is None else weights_TK
            h = torch.addmm(h, choice_of(ids_TK, weights, self.shape.num_experts), t["choice"][moe_layer])
        h = gelu(h)
        if moe_layer in self.groups.middle:
            i = moe_layer - self._middle[0]
            update = gelu(torch.addmm(t["up_bias"][i], h, t["up"][i]))
            h = h + torch.sigmoid(torch.addmm(t["gate_bias"][i], h, t["gate"][i])) * (update @ t["down"][i])
        return h, self._normalised(both[:, H:]) if self.config.residual else None

    def live_logits(self, moe_layer: int, h_TH: torch.Tensor, base_TN: torch.Tensor | None) -> torch.Tensor:
        """(T, N), as `logits` for one layer."""
        z = torch.addmm(self.tensors["head_bias"][moe_layer], h_TH, self.tensors["head"][moe_layer])
        return z if base_TN is None else z + self.tensors["skip"][moe_layer] * base_TN

    def _fold(self, moe_layer: int) -> "_LiveLayer":
        t = self.tensors
        weight = t["pca"][moe_layer] @ t["in"][moe_layer]
        bias = t["in_bias"][moe_layer] - t["pca_mean"][moe_layer] @ weight
        if self._early is not None:
            weight = torch.cat([weight, self._early[0][moe_layer]], dim=1)
            bias = torch.cat([bias, self._early[1][moe_layer]], dim=1)
        self._live[moe_layer] = _LiveLayer(weight.contiguous(), bias.contiguous())
        return self._live[moe_layer]

    def observe(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """Nothing: `online.OnlineTuner` learns while it runs."""

    def cost(self) -> Cost:
        """Of `predict` for a middle layer (the largest) and one token; PCA and first product count as folded."""
        D, H, E = self.width, self.config.hidden, self.shape.num_experts
        N = self.config.lookahead * E
        numbers = D * H + H + H * N + N
        if self.config.residual:
            numbers += D * N + 2 * N
        if self.config.use_choice:
            numbers += E * H
        if self._middle:
            numbers += 3 * H * H + 2 * H
        return Cost(numbers, numbers * self.tensors["head"].element_size(), 2 * numbers)

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
        _require_finite(self.tensors, "the predictor", "train it again with a smaller learning rate")
        metadata = {
            "config": asdict(self.config),
            "shape": self.shape._asdict(),
            "groups": [self.groups.middle.start, self.groups.middle.stop, self.groups.reason],
            "tag": asdict(self.tag),
            "scoring": self.scoring,
            "width": self.width,
            "validation_error": None if np.isnan(self.validation_error) else self.validation_error,
        }
        return write_tensors(self.tensors, {"format": FORMAT, "prescope": json.dumps(metadata)}, Path(path))

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None, device: str = "cpu") -> "Llapor":
        """Read a predictor written by `save`.

        Args:
            fingerprint: of the model it is to serve (`engine.fingerprint`); None skips that check.

        Raises:
            BadPredictor: the file is truncated, damaged or no predictor, or a tensor is NaN or of a wrong shape.
            TraceMismatch: it was trained for another model.
            FileNotFoundError: there is none.
        """
        tensors, metadata = read_tensors(Path(path), FORMAT)
        try:
            config = LlaporConfig(**metadata["config"])
            shape = Shape(**metadata["shape"])
            start, stop, reason = metadata["groups"]
            groups = LayerGroups.at(int(start), int(stop), shape.num_layers, str(reason))
            tag = ModelTag(**metadata["tag"])
            expected = tensor_shapes(config, shape, int(metadata["width"]), len(groups.middle))
            error = metadata["validation_error"]
        except (KeyError, TypeError, ValueError) as problem:
            raise BadPredictor(
                f"{path}: its metadata is damaged: {problem!r}; train the predictor again"
            ) from problem
        check_tensors(tensors, expected, str(path))
        predictor = cls(
            config,
            shape,
            groups,
            tensors,
            tag,
            scoring=str(metadata.get("scoring", "softmax")),
            validation_error=float("nan") if error is None else float(error),
        )
        if fingerprint is not None:
            predictor.check_model(fingerprint, "this model")
        return predictor.to(device)

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


@dataclass(frozen=True)
class _LiveLayer:
    """PCA and first product folded, the early routers beside them: (D, H + N) and (1, H + N)."""

    weight: torch.Tensor
    bias: torch.Tensor


def choice_of(ids: torch.Tensor, weights: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(..., E) float32: each chosen expert's router weight at its place; ids of -1 leave nothing."""
    ids = ids.to(torch.int64)
    out = torch.zeros((*ids.shape[:-1], num_experts + 1), device=ids.device)
    return out.scatter_(-1, torch.where(ids < 0, num_experts, ids), weights.float())[..., :num_experts]


def used_of(ids: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(..., E) float32 0/1: which experts are used."""
    return used_mask_torch(ids, num_experts)


def _identity_platt(config: LlaporConfig, shape: Shape) -> torch.Tensor:
    return torch.tensor([1.0, 0.0]).repeat(shape.num_layers, config.lookahead, 1)


def _chunks(num_rows: int) -> list[slice]:
    return [slice(first, min(first + ROWS, num_rows)) for first in range(0, num_rows, ROWS)]


def _require_finite(tensors: Mapping[str, torch.Tensor], what: str, remedy: str) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadPredictor(f"{what}: tensor {name!r} holds NaN or infinite numbers; {remedy}")


def check_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raises BadPredictor unless the tensors are exactly the expected ones, finite and of their shapes."""
    if tensors.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise BadPredictor(f"{what}: tensors missing: {missing or 'none'}, unknown: {extra or 'none'}")
    for name, size in expected.items():
        if tuple(tensors[name].shape) != size:
            raise BadPredictor(
                f"{what}: tensor {name!r} has shape {tuple(tensors[name].shape)}, expected {size}"
            )
    _require_finite(tensors, what, "the file is damaged or training failed; train the predictor again")


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], path: Path) -> Path:
    """Write beside the target, then rename: a crash leaves no half-written target."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    try:
        on_host = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor.numel()
        }
        empty = {name: list(tensor.shape) for name, tensor in tensors.items() if not tensor.numel()}
        save_file(on_host, temporary, {**metadata, "empty": json.dumps(empty)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def read_tensors(path: Path, expected_format: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata written by `write_tensors`.

    Raises:
        BadPredictor: unreadable, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise BadPredictor(
            f"{path} cannot be read as safetensors, it is truncated or another file: {error}"
        ) from error
    if header.get("format") != expected_format:
        raise BadPredictor(
            f"{path}: its format is {header.get('format', 'none')!r}, expected {expected_format!r}"
        )
    try:
        empty = {name: torch.zeros(size) for name, size in json.loads(header.get("empty", "{}")).items()}
        metadata: dict[str, Any] = json.loads(header["prescope"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadPredictor(f"{path}: its metadata is damaged: {error!r}") from error
    return tensors | empty, metadata
