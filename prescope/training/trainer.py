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
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ..core.numbers import is_count, is_number, require_count, require_seed, require_size, settle
from ..core.paths import user_path
from ..core.waiting import waiting_bar
from ..device import torch_device_of
from ..errors import UnsupportedOption
from ..predictor.base import BadPredictor, BadState, IdArray, require_inputs, used_mask, used_mask_torch
from ..predictor.baselines import Routers
from ..predictor.files import check_tensors, read_tensors, write_tensors
from ..predictor.layer_groups import LayerGroups, find_groups
from ..predictor.llapor import Llapor
from ..predictor.llapor_config import LlaporConfig, ModelTag
from ..traces.routing import RoutingTrace
from .held_out import calibrate, fit_trust, layer_recalls, mean_recall
from .misses import absent_pairs
from .prepare import (
    PCA_ROWS,
    Split,
    fit_pca,
    require_coming_layer,
    require_hold_out,
    require_trace,
    rows_of,
    split_by_prompt,
    spread,
)

CHECKPOINT_FORMAT = "prescope-predictor-checkpoint-1"
#: Frequency weights of the balanced loss stay within this factor, or an expert that is never used would dominate it.
MAX_BALANCE = 4.0
CLIP_NORM = 1.0
#: Steps of an epoch when a step's tokens are not given, and the least and most tokens that a step then has. 5,700
#: tokens in 11 steps an epoch gave a gain over the early router of 0.017 / 0.030 / 0.049 on text of other kinds, in 44
#: steps at twice the rate 0.028 / 0.053 / 0.086 (docs/log/predictor.md).
STEPS_OF_EPOCH, BATCH_TOKENS = 128, (128, 512)
#: Weight of a pair of token and expert whose expert the cache has, under the objective "misses"; the others have 1.
WEIGHT_OF_RESIDENTS = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """How to train.

    Args:
        epochs: at most. `patience`: epochs without a better held-out recall after which it stops.
        batch_tokens: tokens of a step, each with all layers. None: as many as make `STEPS_OF_EPOCH` steps an epoch,
            within `BATCH_TOKENS`: on little text the number of steps is what recall depends on.
        learning_rate: AdamW's peak, with a linear warm-up over 5 % of the steps and a cosine to zero.
            `weight_decay`: AdamW's.
        hold_out: share of the prompts held out; half of them to stop by, half to calibrate on.
        seed: of weights, split, order and dropout.
        objective: "used": which experts each token uses. "misses": those that a cache would not have, which is what a
            schedule pays for: experts that have a slot count `WEIGHT_OF_RESIDENTS`, epochs are compared by the misses
            among the best K, and scores are calibrated on experts without a slot. It gained nothing on text of
            other kinds, and no speed (docs/log/predictor.md).
        slots: share of all experts that this cache, PreSched's, has; replayed over the very trace.
    """

    epochs: int = 4
    patience: int = 2
    batch_tokens: int | None = None
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    hold_out: float = 0.15
    seed: int = 0
    objective: Literal["used", "misses"] = "used"
    slots: float = 0.25

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_tokens"):
            if name != "batch_tokens" or self.batch_tokens is not None:
                require_count(name, getattr(self, name))
        require_seed(self.seed)
        require_size("learning_rate", self.learning_rate, above=True)
        require_size("weight_decay", self.weight_decay)
        require_hold_out(self.hold_out)
        is_share = is_number(self.slots) and 0.0 < self.slots <= 1.0
        if self.objective not in ("used", "misses") or not is_share:
            raise UnsupportedOption(
                f'objective is {self.objective!r} with slots {self.slots!r}; choose "used" or "misses", and a share '
                f"of all experts in (0, 1]"
            )
        settle(self)


def require_settings(config: Any, training: Any) -> None:
    """Raises UnsupportedOption unless they are settings of networks and of training; None stands for the default."""
    if not isinstance(config, LlaporConfig | None) or not isinstance(training, TrainConfig | None):
        raise UnsupportedOption(
            f"config is a LlaporConfig and training a TrainConfig, not a {type(config).__name__} and a "
            f"{type(training).__name__}"
        )


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
        device: to train on; "auto" is the GPU if there is one.
        checkpoint: written after each epoch; when it is there already, training goes on from it.
        on_progress: called after each epoch; what it raises ends training, the checkpoint stays. None: a bar shows it.

    Returns:
        The predictor; the split holds rows of `trace`, own text is not among them.

    Raises:
        BadTrace: the trace has no router inputs. TooFewPrompts: see `split_by_prompt`.
        BadState: training met NaN; nothing was overwritten.
        BadPredictor: the checkpoint is damaged, or of another trace or other settings.
        TraceMismatch: own text, routers or groups are another model's. UnsupportedOption: there is no such device.
    """
    config, training = config or LlaporConfig(), training or TrainConfig()
    require_settings(config, training)
    require_trace(trace)
    inputs = require_inputs(trace, "training LLaPor")
    require_coming_layer(trace)
    device = str(torch_device_of(device))
    if routers is not None:
        routers.check_shape(trace.shape, inputs.shape[2])
    if groups is not None:
        groups.check_layers(trace.num_layers)
    if own_text is not None:
        trace.check_same_model(own_text)
        require_inputs(own_text, "training LLaPor on own text")
    split = split_by_prompt(trace, training.hold_out, training.seed)
    groups = groups or find_groups(trace, split.train)
    rows = split
    if own_text is not None:
        more = len(trace) + np.flatnonzero(own_text.position >= 0)
        rows = split._replace(train=np.concatenate([split.train, more]))
        trace = RoutingTrace.concat([trace, own_text])
    run = _TrainingRun(trace, rows, config, training, routers, groups, device)
    path = user_path(checkpoint) if checkpoint is not None else None
    if path is not None and path.exists():
        run.resume(path)
    started = time.perf_counter()
    with waiting_bar(training.epochs, "training", "epoch") as bar:
        tell = on_progress or (lambda at: bar.update(at.epoch - bar.n))
        while run.epoch < training.epochs and run.epochs_since_best < training.patience:
            progress = run.run_epoch(started)
            if path is not None:
                run.write(path)
            tell(progress)
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
        self._absent_RLE = (
            absent_pairs(trace, slots=training.slots) if training.objective == "misses" else None
        )

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
        size = min(self._batch_tokens(len(order)), len(order))
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
        is_best = not recall <= self.best_recall  # NaN: nothing tells epochs apart, so the newest is kept
        self.epoch += 1
        self.epochs_since_best = 0 if is_best else self.epochs_since_best + 1
        if is_best:
            self.best_recall, self.best = recall, self._copy()
        seconds = time.perf_counter() - started
        self.history.append(
            TrainingProgress(self.epoch, self.training.epochs, loss, recall, is_best, seconds)
        )
        return self.history[-1]

    def _batch_tokens(self, num_rows: int) -> int:
        """Tokens of a step."""
        if self.training.batch_tokens is not None:
            return self.training.batch_tokens
        least, most = BATCH_TOKENS
        return min(most, max(least, num_rows // STEPS_OF_EPOCH))

    def _step(self, rows: IdArray, done: float) -> torch.Tensor:
        warm = min(1.0, (done + 1e-3) / 0.05)
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.learning_rate * warm * 0.5 * (1.0 + np.cos(np.pi * done))
        rows = np.sort(rows)
        x_LTD, choice = self.predictor.batch_of(self.trace, rows)
        z_LTN = self.predictor.forward(x_LTD, choice, training=True)
        ids = torch.from_numpy(self.trace.expert_ids[rows]).to(self.device).transpose(0, 1)
        used_LTE = used_mask_torch(ids, self.trace.num_experts)
        loss = self._loss(z_LTN, used_LTE, self._teacher(x_LTD), self._weights(rows))
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

    def _weights(self, rows: IdArray) -> torch.Tensor | None:
        """(L, T, E) of each pair in the loss, 1 on average in each layer; None: all alike."""
        if self._absent_RLE is None:
            return None
        absent = torch.from_numpy(self._absent_RLE[rows]).to(self.device).transpose(0, 1).float()
        weight = torch.lerp(torch.full_like(absent, WEIGHT_OF_RESIDENTS), torch.ones_like(absent), absent)
        return weight / weight.mean((1, 2), keepdim=True)

    def _loss(
        self,
        z_LTN: torch.Tensor,
        used_LTE: torch.Tensor,
        teacher: torch.Tensor | None,
        weight_LTE: torch.Tensor | None,
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
            if weight_LTE is not None:
                weighted = weighted * weight_LTE[ahead:]
            loss = weighted.sum(-1).mean() / self.predictor.shape.top_k
            if teacher is not None:
                cross = -(teacher[ahead:] * torch.log_softmax(z, dim=-1)).sum(-1).mean()
                loss = loss + self.config.distill * cross
            losses.append(loss)
        return torch.stack(losses).mean()

    def _validation_recall(self) -> float:
        """recall@K of what counts of the validation rows, mean over layers and lookaheads."""
        rows = self.split.validation
        return mean_recall(layer_recalls(self.predictor, self.trace, rows, self._absent_RLE))

    def finish(self) -> Llapor:
        """The best weights, with their trust, calibrated."""
        predictor = self.predictor
        for name, tensor in self.best.items():
            predictor.tensors[name] = tensor.detach()
        if self.config.residual:
            fit_trust(predictor, self.trace, self.split.validation)
        predictor.validation_error = 1.0 - mean_recall(
            layer_recalls(predictor, self.trace, self.split.validation)
        )
        rows = np.sort(self.split.calibration)
        counted = None if self._absent_RLE is None else self._absent_RLE[rows]
        calibrate(predictor, rows_of(self.trace, rows), counted)
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
        identity, mine = metadata.get("identity"), json.loads(json.dumps(self._identity()))
        if identity != mine:
            known = identity if isinstance(identity, dict) else {}
            differs = [name for name in mine if known.get(name) != mine[name]]
            raise BadPredictor(
                f"the checkpoint {path} is of another training: {', '.join(differs)} differ; give another path to "
                f"start anew, or the same trace and settings to go on"
            )
        reached = _reached(metadata, path)
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
        self.epoch, self.epochs_since_best, self.best_recall, self.history = reached


def _reached(metadata: dict[str, Any], path: Path) -> tuple[int, int, float, list[TrainingProgress]]:
    """How far a checkpoint's training had come: epochs, those since the best, its recall, history.

    Raises:
        BadPredictor: it does not say so, or what it says cannot be.
    """
    try:
        epoch, since, best = metadata["epoch"], metadata["epochs_since_best"], metadata["best_recall"]
        history = [TrainingProgress(*entry) for entry in metadata["history"]]
        if not (
            is_count(epoch) and is_count(since) and is_number(best) and 0 <= since <= epoch == len(history)
        ):
            raise ValueError(
                f"epoch {epoch!r}, {since!r} since the best of {best!r}, history of {len(history)}"
            )
        return epoch, since, float(best), history
    except (KeyError, TypeError, ValueError) as problem:
        raise BadPredictor(
            f"{path}: its metadata is damaged: {problem!r}; delete it to start anew"
        ) from problem
