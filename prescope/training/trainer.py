"""Train LLaPor on a routing trace: PCA, all layers at once, early stopping on held-out prompts, calibration.

Deterministic by seed: order and dropout of epoch n depend on (seed, n) only, so a run that was resumed from its
checkpoint ends at the same weights as one that was not interrupted.

Shapes: R rows, T tokens of a batch, D width, P compressed width, E experts, K top-k, L MoE layers,
N = lookahead * E outputs.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ..errors import BadTrace, UnsupportedOption
from ..predictor.base import BadPredictor, BadState, IdArray, require_inputs, used_mask, used_mask_torch
from ..predictor.baselines import Routers
from ..predictor.files import check_tensors, read_tensors, write_tensors
from ..predictor.layer_groups import LayerGroups, find_groups
from ..predictor.llapor import ALWAYS_TRUST, NEVER_TRUST, Llapor
from ..predictor.llapor_config import LlaporConfig, ModelTag
from ..predictor.platt import fit_platt
from ..traces.routing import RoutingTrace
from .prepare import PCA_ROWS, Split, fit_pca, rows_of, split_by_prompt, spread

CHECKPOINT_FORMAT = "prescope-predictor-checkpoint-1"
#: Frequency weights of the balanced loss stay within this factor, or an expert that is never used would dominate it.
MAX_BALANCE = 4.0
CLIP_NORM = 1.0
#: Share of errors that a correction is taken to leave at least: a few hundred held-out tokens do not show fewer.
MIN_ERROR = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train.

    Args:
        epochs: at most. `patience`: epochs without a better held-out recall after which it stops.
        batch_tokens: tokens of a step, each with all layers.
        learning_rate: AdamW's peak, with a linear warm-up over 5 % of the steps and a cosine to zero.
            `weight_decay`: AdamW's.
        hold_out: share of the prompts held out; half of them to stop by, half to calibrate on.
        seed: of weights, split, order and dropout.
    """

    epochs: int = 5
    patience: int = 2
    batch_tokens: int = 512
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    hold_out: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.patience, self.batch_tokens) < 1:
            raise UnsupportedOption("epochs, patience and batch_tokens are at least 1")
        if not 0.0 < self.hold_out < 1.0:
            raise UnsupportedOption(f"hold_out is {self.hold_out}; it is a share of the prompts, in (0, 1)")
        if not self.learning_rate > 0:
            raise UnsupportedOption(f"learning_rate is {self.learning_rate}; it is positive")


class TrainingProgress(NamedTuple):
    """What training reports after each epoch."""

    epoch: int  # from 1
    epochs: int
    loss: float  # mean over the epoch's steps
    validation_recall: float  # recall@K of the held-out prompts, mean over layers and lookaheads
    is_best: bool
    seconds: float  # since training began, in this process


class TrainResult(NamedTuple):
    """A trained predictor and how it came about."""

    predictor: Llapor
    history: list[TrainingProgress]
    split: Split
    groups: LayerGroups


def train(
    trace: RoutingTrace,
    *,
    own_text: RoutingTrace | None = None,
    config: LlaporConfig | None = None,
    training: TrainConfig | None = None,
    routers: Routers | None = None,
    groups: LayerGroups | None = None,
    device: str = "cpu",
    checkpoint: str | Path | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> TrainResult:
    """Train a predictor on a trace with router inputs.

    Args:
        own_text: more to train on, never held out: text the model wrote itself, from `prescope.training.own_text`.
            Without it a predictor trained on one kind of text falls behind the early router on another.
        routers: of the model, for the residual variant; `prescope.training.routers_of` extracts them.
        groups: of the layers; measured on the training prompts when not given.
        checkpoint: written after each epoch; when it is there already, training goes on from it.
        on_progress: called after each epoch; what it raises ends training, the checkpoint stays.

    Returns:
        The predictor; the split holds rows of `trace`, own text is not among them.

    Raises:
        BadTrace: the trace has no router inputs. TooFewPrompts: see `split_by_prompt`.
        BadState: training met NaN; nothing was overwritten.
        BadPredictor: the checkpoint is damaged, or of another trace or other settings.
    """
    config, training = config or LlaporConfig(), training or TrainConfig()
    require_inputs(trace, "training LLaPor")
    if trace.num_layers < 2:
        raise BadTrace(f"{trace.model} has {trace.num_layers} MoE layer; there is no coming layer to predict")
    split = split_by_prompt(trace, training.hold_out, training.seed)
    groups = groups or find_groups(trace, split.train)
    rows = split
    if own_text is not None:
        more = len(trace) + np.flatnonzero(own_text.position >= 0)
        rows = split._replace(train=np.concatenate([split.train, more]))
        trace = RoutingTrace.concat([trace, own_text])
    run = _TrainingRun(trace, rows, config, training, routers, groups, device)
    path = Path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        run.resume(path)
    started = time.perf_counter()
    while run.epoch < training.epochs and run.epochs_since_best < training.patience:
        progress = run.run_epoch(started)
        if path is not None:
            run.write(path)
        if on_progress is not None:
            on_progress(progress)
    predictor = run.finish()
    return TrainResult(predictor, run.history, split, groups)


class _TrainingRun:
    """State of one training: weights, optimiser, best weights so far, history."""

    def __init__(
        self,
        trace: RoutingTrace,
        split: Split,
        config: LlaporConfig,
        training: TrainConfig,
        routers: Routers | None,
        groups: LayerGroups,
        device: str,
    ) -> None:
        self.trace, self.split, self.config, self.training = trace, split, config, training
        shape = trace.shape
        inputs = require_inputs(trace, "training LLaPor")
        D = inputs.shape[2]
        width = [
            min(D, config.width_middle if layer in groups.middle else config.width_outer)
            for layer in range(shape.num_layers)
        ]
        # As wide as the widest setting, so that the file's shapes follow from the settings alone.
        most = min(D, max(config.width_outer, config.width_middle))
        pca = fit_pca(inputs[spread(split.train, PCA_ROWS)], width, most, device)
        tag = ModelTag(model=trace.model, fingerprint=trace.fingerprint)
        self.predictor = Llapor.fresh(config, shape, groups, pca, tag, routers, training.seed).to(device)
        self.routers = routers.to(device) if routers is not None else None
        self.device = torch.device(device)
        for tensor in self.predictor.trained().values():
            tensor.requires_grad_()
        self.optimizer = torch.optim.AdamW(
            [{"params": [t], "name": n} for n, t in self.predictor.trained().items()],
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
        )
        self.epoch = 0
        self.epochs_since_best = 0
        self.best_recall = -1.0
        self.best = self._copy()
        self.history: list[TrainingProgress] = []
        self._is_outer = torch.tensor(
            [layer not in groups.middle for layer in range(shape.num_layers)], device=self.device
        ).float()[:, None, None]
        self._balance_LE = self._balance()

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.predictor.trained().items()}

    def _balance(self) -> torch.Tensor:
        """(L, E) weights of the balanced loss: inverse to an expert's use, 1 on average, within a factor."""
        used = used_mask(self.trace.expert_ids[self.split.train], self.trace.num_experts)
        rate_LE = used.mean(axis=0)
        chance = self.trace.top_k / self.trace.num_experts
        weight = np.clip(chance / np.maximum(rate_LE, 1e-6), 1.0 / MAX_BALANCE, MAX_BALANCE)
        return torch.from_numpy(weight / weight.mean(axis=1, keepdims=True)).float().to(self.device)

    # -- epochs ------------------------------------------------------------------------------------------------

    def run_epoch(self, started: float) -> TrainingProgress:
        """One pass over the training rows, then the held-out recall."""
        rng = np.random.default_rng([self.training.seed, self.epoch])
        order = rng.permutation(self.split.train)
        size = min(self.training.batch_tokens, len(order))
        batches = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        losses = []
        # Dropout draws from torch's global generator: seeded for this epoch, and given back as it was.
        devices = [self.device] if self.device.type != "cpu" else []
        with torch.random.fork_rng(devices=devices, device_type=self.device.type if devices else "cpu"):
            torch.manual_seed(int(rng.integers(2**31)))
            for i, rows in enumerate(batches):
                losses.append(self._step(rows, (self.epoch + i / len(batches)) / self.training.epochs))
        loss = float(torch.stack(losses).mean())
        if not np.isfinite(loss):
            raise BadState(
                f"the loss became {loss} in epoch {self.epoch + 1}; lower learning_rate "
                f"({self.training.learning_rate}); nothing was overwritten"
            )
        recall = self._validation_recall()
        is_best = recall > self.best_recall
        self.epoch += 1
        self.epochs_since_best = 0 if is_best else self.epochs_since_best + 1
        if is_best:
            self.best_recall, self.best = recall, self._copy()
        seconds = time.perf_counter() - started
        self.history.append(
            TrainingProgress(self.epoch, self.training.epochs, loss, recall, is_best, seconds)
        )
        return self.history[-1]

    def _step(self, rows: IdArray, done: float) -> torch.Tensor:
        warm = min(1.0, (done + 1e-3) / 0.05)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * warm * 0.5 * (1.0 + np.cos(np.pi * done))
        rows = np.sort(rows)
        x_LTD, choice = self.predictor.batch_of(self.trace, rows)
        z_LTN = self.predictor.forward(x_LTD, choice, training=True)
        ids = torch.from_numpy(self.trace.expert_ids[rows]).to(self.device).transpose(0, 1)
        loss = self._loss(z_LTN, used_mask_torch(ids, self.trace.num_experts), self._teacher(x_LTD))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(self.predictor.trained().values()), CLIP_NORM)
        self.optimizer.step()
        return loss.detach()

    def _teacher(self, x_LTD: torch.Tensor) -> torch.Tensor | None:
        """(L, T, E) what each layer's own router says about its own input."""
        if self.routers is None or not self.config.residual or self.config.distill == 0.0:
            return None
        with torch.no_grad():
            return torch.stack([self.routers.choice(layer, x).softmax(-1) for layer, x in enumerate(x_LTD)])

    def _loss(
        self, z_LTN: torch.Tensor, used_LTE: torch.Tensor, teacher: torch.Tensor | None
    ) -> torch.Tensor:
        """Mean over lookaheads of: balanced BCE + lambda x focal outside, BCE in the middle, + distillation.

        In units of one token: summed over experts, divided by K.
        """
        losses = []
        for ahead in range(1, self.predictor.lookahead + 1):
            L = self.predictor.shape.num_layers - ahead
            z = z_LTN[:L, :, self.predictor.columns(ahead)]
            used = used_LTE[ahead:]
            bce = binary_cross_entropy_with_logits(z, used, reduction="none")
            outer = self._is_outer[:L]
            # exp(-bce) is the probability given to what happened.
            focal = (1.0 - torch.exp(-bce)).pow(self.config.focal_gamma) * bce
            balance = self._balance_LE[ahead:, None, :]
            weighted = (1.0 - outer) * bce + outer * (balance * bce + self.config.focal_lambda * focal)
            loss = weighted.sum(-1).mean() / self.predictor.shape.top_k
            if teacher is not None:
                cross = -(teacher[ahead:] * torch.log_softmax(z, dim=-1)).sum(-1).mean()
                loss = loss + self.config.distill * cross
            losses.append(loss)
        return torch.stack(losses).mean()

    def _validation_recall(self) -> float:
        """recall@K of the validation rows, mean over layers and lookaheads."""
        return _mean(layer_recalls(self.predictor, self.trace, self.split.validation))

    def finish(self) -> Llapor:
        """The best weights, with their trust, calibrated."""
        predictor = self.predictor
        for name, tensor in self.best.items():
            predictor.tensors[name] = tensor.detach()
        if self.config.residual:
            fit_trust(predictor, self.trace, self.split.validation)
        predictor.validation_error = 1.0 - self._validation_recall()
        calibrate(predictor, rows_of(self.trace, self.split.calibration))
        return predictor

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be of this training."""
        return {
            "config": asdict(self.config),
            "training": asdict(self.training),
            "fingerprint": self.trace.fingerprint,
            "rows": [len(part) for part in self.split],
            "ids": int(self.trace.expert_ids[self.split.train].astype(np.int64).sum()),
        }

    def write(self, path: Path) -> None:
        """Weights, best weights, optimiser and history, by rename."""
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in self.predictor.trained().items():
            state = self.optimizer.state.get(tensor, {})
            tensors |= {f"now.{name}": tensor, f"best.{name}": self.best[name]}
            tensors |= {
                f"{key}.{name}": state[key] for key in ("exp_avg", "exp_avg_sq", "step") if key in state
            }
        metadata = {
            "identity": self._identity(),
            "epoch": self.epoch,
            "epochs_since_best": self.epochs_since_best,
            "best_recall": self.best_recall,
            "history": [list(p) for p in self.history],
        }
        write_tensors(tensors, {"format": CHECKPOINT_FORMAT, "prescope": json.dumps(metadata)}, path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            BadPredictor: it is damaged, or of another training.
        """
        tensors, metadata = read_tensors(path, CHECKPOINT_FORMAT)
        identity, mine = metadata.get("identity", {}), json.loads(json.dumps(self._identity()))
        if identity != mine:
            differs = [name for name in mine if identity.get(name) != mine[name]]
            raise BadPredictor(
                f"the checkpoint {path} is of another training: {', '.join(differs)} differ; give another path to "
                f"start anew, or the same trace and settings to go on"
            )
        expected: dict[str, tuple[int, ...]] = {}
        for name, tensor in self.predictor.trained().items():
            expected |= {
                f"{part}.{name}": tuple(tensor.shape) for part in ("now", "best", "exp_avg", "exp_avg_sq")
            }
            expected[f"step.{name}"] = ()
        check_tensors(tensors, expected, str(path))
        with torch.no_grad():
            for name, tensor in self.predictor.trained().items():
                tensor.copy_(tensors[f"now.{name}"])
                self.best[name] = tensors[f"best.{name}"].to(self.device)
                self.optimizer.state[tensor] = {
                    "step": tensors[f"step.{name}"],
                    "exp_avg": tensors[f"exp_avg.{name}"].to(self.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(self.device),
                }
        self.epoch, self.epochs_since_best = int(metadata["epoch"]), int(metadata["epochs_since_best"])
        self.best_recall = float(metadata["best_recall"])
        self.history = [TrainingProgress(*entry) for entry in metadata["history"]]


@torch.no_grad()
def layer_recalls(predictor: Llapor, trace: RoutingTrace, rows: IdArray) -> torch.Tensor:
    """(lookahead, L) recall@K of some rows by source layer; NaN where there is no layer to predict."""
    L, _, K = predictor.shape[:3]
    hits, total = torch.zeros(2, predictor.lookahead, L, device=predictor.device)
    for first in range(0, len(rows), 2048):
        part = rows[first : first + 2048]
        z_LTN = predictor.forward(*predictor.batch_of(trace, part))
        ids = torch.from_numpy(trace.expert_ids[part]).to(predictor.device).transpose(0, 1)
        used = used_mask_torch(ids, trace.num_experts)
        for ahead in range(1, predictor.lookahead + 1):
            best = z_LTN[: L - ahead, :, predictor.columns(ahead)].topk(K, dim=-1).indices
            hits[ahead - 1, : L - ahead] += used[ahead:].gather(-1, best).sum((1, 2))
            total[ahead - 1, : L - ahead] += used[ahead:].sum((1, 2))
    exists = torch.arange(L) < L - torch.arange(1, predictor.lookahead + 1)[:, None]
    return torch.where(exists, (hits / total.clamp_min(1)).cpu(), torch.nan)


def _mean(recalls: torch.Tensor) -> float:
    """Over layers, then over lookaheads."""
    return float(recalls.nanmean(1).mean())


def fit_trust(predictor: Llapor, trace: RoutingTrace, rows: IdArray) -> None:
    """Find how far each layer's correction may be trusted: `LlaporConfig.trust` times the errors it corrects over those
    it leaves.

    On unfamiliar text errors are added to those left, so a correction that removes many errors and leaves few is still
    useful further out than one that improves a good early router only a little. One number serves all lookaheads of a
    layer: the best one differs more from model to model than from lookahead to lookahead (docs/log/predictor.md).
    """
    errors = [
        1.0 - layer_recalls(predictor.trusting(trust), trace, rows).nanmean(0)
        for trust in (NEVER_TRUST, ALWAYS_TRUST)
    ]
    mended, left = errors[0] - errors[1], errors[1].clamp_min(MIN_ERROR)
    # The last layer predicts nothing.
    trust = (predictor.config.trust * mended / left).nan_to_num(ALWAYS_TRUST).clamp_min(NEVER_TRUST)
    predictor.tensors["trust"] = trust.view(-1, 1, 1).to(predictor.device)


def calibrate(predictor: Llapor, trace: RoutingTrace) -> None:
    """Fit Platt scaling of each layer and lookahead on a trace the networks were not trained on.

    Where corrections fade, one for those that count in full and one for those that do not count; in between
    `probabilities` interpolates.
    """
    used_RLE = used_mask(trace.expert_ids, trace.num_experts)
    parts = {"platt": predictor}
    if predictor.config.residual:
        parts = {"platt": predictor.trusting(ALWAYS_TRUST), "platt_faded": predictor.trusting(NEVER_TRUST)}
    for name, part in parts.items():
        z_LRN = part.replay_logits(trace).numpy()
        platt = predictor.tensors[name].cpu().clone()
        for ahead in range(1, predictor.lookahead + 1):
            for layer in range(predictor.shape.num_layers - ahead):
                z = z_LRN[layer, :, predictor.columns(ahead)]
                platt[layer, ahead - 1] = torch.tensor(fit_platt(z, used_RLE[:, layer + ahead]))
        predictor.tensors[name] = platt.to(predictor.device)
    predictor.is_calibrated = True
