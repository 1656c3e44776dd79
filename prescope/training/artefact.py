"""A predictor by the recipe of a public repository that is probably the paper's, to stand beside LLaPor in score cards.

Re-implemented from a description of it (https://github.com/nezha-Anonymous/LayerScope, read 2026-11; it has no licence,
none of its code is used). As there: 256 PCA dimensions of a layer's state beside a 0/1 vector of the experts chosen
there; one network a layer, for the next layer only; layers grouped by 8/27 and 20/27 of the depth; hidden 128, in the
middle 256 and two more layers with a residual, noise on the input; dropout 0.3 (output 0.4); binary cross-entropy
weighted by inverse frequency + 0.3 x focal loss; AdamW with rates and decays by group, cosine, batches of 64, clip 1,
patience 5.
Ours, where it is not known: the state is the router's input, GELU, and a Platt scaling of each layer, so that schedules
can use its scores. It takes no part in a run: it is a row of a table.

Shapes: R rows, T tokens, D width, P compressed width, E experts, L MoE layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..core.types import MoEShape
from ..predictor.base import IdArray, ScoreArray, require_inputs, used_mask, used_mask_torch
from ..predictor.baselines import Baseline, LayerInput, Scorer
from ..predictor.platt import fit_platt
from ..traces.routing import RoutingTrace
from .prepare import PCA_ROWS, Split, fit_pca, spread

PCA_WIDTH = 256
#: First middle and first output layer of the model it was written for, of 27 layers.
BORDERS = (8, 21, 27)
FOCAL_WEIGHT, FOCAL_GAMMA = 0.3, 2.0
NOISE = 0.03
BATCH, CLIP, PATIENCE = 64, 1.0, 5
EPOCHS = 20


class Recipe(NamedTuple):
    """Of one group of layers."""

    hidden: int
    is_middle: bool
    dropout: float
    learning_rate: float
    weight_decay: float


INPUT = Recipe(128, False, 0.3, 1e-3, 1e-4)
MIDDLE = Recipe(256, True, 0.3, 2e-3, 1e-4)
OUTPUT = Recipe(128, False, 0.4, 1e-3, 1e-3)


def recipe_of(moe_layer: int, num_layers: int) -> Recipe:
    """The group of the layer predicted, by its share of the depth."""
    first_middle, first_output, of = BORDERS
    if moe_layer * of < first_middle * num_layers:
        return INPUT
    return MIDDLE if moe_layer * of < first_output * num_layers else OUTPUT


class _Net(nn.Module):
    """Three layers; in the middle group two more around which there is a residual."""

    def __init__(self, inputs: int, outputs: int, recipe: Recipe) -> None:
        super().__init__()
        hidden, drop = recipe.hidden, recipe.dropout
        self.first = nn.Sequential(
            nn.Linear(inputs, hidden), nn.GELU(), nn.Dropout(drop),
            nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(drop),
        )  # fmt: skip
        self.more = (
            nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Dropout(drop), nn.Linear(hidden, hidden))
            if recipe.is_middle
            else None
        )
        self.last = nn.Linear(hidden, outputs)
        self.noise = NOISE if recipe.is_middle else 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, E) logits."""
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        h = self.first(x)
        logits: torch.Tensor = self.last(h if self.more is None else h + self.more(h))
        return logits


class ArtefactPredictor(Baseline):
    """The networks of all layers but the last; `train_artefact` makes one."""

    name = "artefact's recipe"
    needs_inputs = True
    is_calibrated = True

    def __init__(self, shape: MoEShape, pca: tuple[torch.Tensor, torch.Tensor], nets: list[_Net]) -> None:
        super().__init__(shape, 1)
        self._mean, self._components = pca
        self._nets = nets
        self.platt = [(1.0, 0.0)] * len(nets)

    def features(self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """(T, P + E): compressed states and 0/1 of the experts chosen."""
        f = (x_TD.float() - self._mean[moe_layer]) @ self._components[moe_layer]
        return torch.cat([f, used_mask_torch(ids_TK, self.shape.num_experts)], dim=1)

    @torch.no_grad()
    def _scores(self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        slope, offset = self.platt[moe_layer]
        return torch.sigmoid(slope * self._nets[moe_layer](self.features(moe_layer, x_TD, ids_TK)) + offset)

    def _scorer(self, at: LayerInput) -> Scorer:
        """By the layer's own network, one layer ahead."""
        assert at.ids_TK is not None, "the engine passes the chosen experts"
        ids_TK = at.ids_TK
        return lambda ahead, target: self._scores(at.moe_layer, at.x_TD, ids_TK)

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`. Raises BadTrace when the trace has no router inputs."""
        self._check(trace, lookahead)
        inputs = require_inputs(trace, self.name)
        ids = torch.from_numpy(trace.expert_ids)
        parts = [
            self._scores(layer, torch.from_numpy(inputs[:, layer]), ids[:, layer])
            for layer in range(len(self._nets))
        ]
        return torch.stack(parts, dim=1).numpy()


def train_artefact(
    trace: RoutingTrace,
    split: Split,
    *,
    epochs: int = EPOCHS,
    seed: int = 0,
    on_layer: Callable[[int, float], None] | None = None,
) -> ArtefactPredictor:
    """Train one network for each layer but the last, on the CPU.

    Args:
        split: rows of the trace to train on, to stop by and to calibrate on; `split_by_prompt` makes it.
        on_layer: called with each layer and its recall@K on the validation rows.

    Raises:
        BadTrace: the trace has no router inputs.
    """
    inputs = require_inputs(trace, "training by the artefact's recipe")
    shape = trace.shape
    P = min(PCA_WIDTH, inputs.shape[2])
    mean, components, _ = fit_pca(inputs[spread(split.train, PCA_ROWS)], [P] * shape.num_layers, P)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        nets = [
            _Net(P + shape.num_experts, shape.num_experts, recipe_of(layer + 1, shape.num_layers))
            for layer in range(shape.num_layers - 1)
        ]
        predictor = ArtefactPredictor(shape, (mean, components), nets)
        for layer, net in enumerate(nets):
            recall = _train_layer(predictor, net, trace, split, layer, epochs)
            if on_layer is not None:
                on_layer(layer, recall)
    for layer, net in enumerate(nets):
        x, used = _pairs(predictor, trace, split.calibration, layer)
        with torch.no_grad():
            predictor.platt[layer] = fit_platt(net(x).numpy(), used.numpy() > 0)
    return predictor


def _pairs(
    predictor: ArtefactPredictor, trace: RoutingTrace, rows: IdArray, layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features at a layer, and (T, E) 0/1 of the next layer's experts."""
    assert trace.inputs is not None, "checked"
    x = torch.from_numpy(trace.inputs[rows, layer])
    ids = torch.from_numpy(trace.expert_ids[rows])
    features = predictor.features(layer, x, ids[:, layer])
    return features, used_mask_torch(ids[:, layer + 1], predictor.shape.num_experts)


def _train_layer(
    predictor: ArtefactPredictor, net: _Net, trace: RoutingTrace, split: Split, layer: int, epochs: int
) -> float:
    """Train one network, keep its best epoch; returns the validation recall@K."""
    recipe = recipe_of(layer + 1, predictor.shape.num_layers)
    x, used = _pairs(predictor, trace, split.train, layer)
    x_held, used_held = _pairs(predictor, trace, split.validation, layer)
    rate = used_mask(trace.expert_ids[split.train, layer + 1], predictor.shape.num_experts).mean(axis=0)
    inverse = 1.0 / np.maximum(rate, 1.0 / max(1, len(x)))
    weight = torch.from_numpy(inverse / inverse.mean()).float()
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    best, kept, since = -1.0, {k: v.clone() for k, v in net.state_dict().items()}, 0
    for _ in range(epochs):
        net.train()
        for rows in torch.randperm(len(x), device="cpu").split(BATCH):
            bce = binary_cross_entropy_with_logits(net(x[rows]), used[rows], reduction="none")
            focal = (1.0 - torch.exp(-bce)).pow(FOCAL_GAMMA) * bce
            loss = (weight * bce + FOCAL_WEIGHT * focal).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
        schedule.step()
        net.eval()
        with torch.no_grad():
            found = used_held.gather(1, net(x_held).topk(predictor.shape.top_k, dim=1).indices)
        recall = float(found.sum() / used_held.sum().clamp_min(1))
        since = 0 if recall > best else since + 1
        if recall > best:
            best, kept = recall, {k: v.clone() for k, v in net.state_dict().items()}
        if since >= PATIENCE:
            break
    net.load_state_dict(kept)
    net.eval()
    return best
