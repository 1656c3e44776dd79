"""Online tuning: when predictions become worse than on held-out prompts, learn from the tokens just seen.

A wrapper around a `Llapor`. It keeps the last tokens (hidden states, early-router logits, experts used) in a ring; when
the error over the last `window` tokens exceeds the held-out error by `margin`, it changes the last layer and its
bias by a few gradient steps on the ring. The networks below stay as trained, so a cycle is cheap; `tuning_ms` counts.
The paper tunes when "the error exceeds 10 % over a window of 64 tokens": here the 10 points are on top of the
held-out error, for a predictor that is never better than 15 % would otherwise tune forever.

The tuned heads are used only while they are better: both heads are scored on each token before it is learned from, and
the one with the smaller error over the last window answers. Without that, tuning cost 0.01 to 0.02 of recall on
text that is merely harder (tiny-moe, Rust); on text that is new (Ukrainian) it gains 0.07 to 0.15
(docs/log/predictor.md).

Shapes: T tokens, H hidden, E experts, K top-k, L MoE layers, N = lookahead * E, W tokens of the ring.
"""

import math
import time
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

from ..core.numbers import is_number, require_count, require_size, settle
from ..errors import UnsupportedOption
from ..traces.routing import RoutingTrace
from .base import Cost, FastPath, Prediction, ScoreArray, targets_of, used_mask_torch
from .llapor import Llapor

TUNED = ("head", "head_bias", "skip")


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineConfig:
    """When and how to tune.

    Args:
        window: tokens the error is measured over.
        margin: tune when the windowed error exceeds the held-out one by more than this; 0.1 is ten points.
        ring: tokens remembered to learn from.
        steps: gradient steps of a cycle. `learning_rate`: of Adam. `pull`: weight of the squared distance to the
            trained weights, so that one odd text does not undo the training.
        pause: tokens between two cycles.
    """

    window: int = 64
    margin: float = 0.1
    ring: int = 512
    steps: int = 4
    learning_rate: float = 2e-3
    pull: float = 1e-3
    pause: int = 64

    def __post_init__(self) -> None:
        for name in ("window", "ring", "steps", "pause"):
            require_count(name, getattr(self, name))
        if self.ring < self.window:
            raise UnsupportedOption(
                f"ring is {self.ring} and window {self.window}; the ring holds a window at least"
            )
        if not is_number(self.margin) or not math.isfinite(self.margin):
            raise UnsupportedOption(f"margin is {self.margin!r}; it is a share of the experts, such as 0.1")
        require_size("learning_rate", self.learning_rate, above=True)
        require_size("pull", self.pull)
        settle(self)


class OnlineTuner:
    """A `Llapor` that learns while it runs. The trained predictor is not changed; `reset` goes back to it.

    Live it learns from steps that run layer by layer, where it is asked about every layer: on a CPU, or with
    decode="layered". Beside decode steps from a graph only the newest layer is asked about, so it predicts but does not
    learn, and the run's notes say so.

    Attributes:
        cycles: tuning cycles so far. `tuning_ms`: wall-clock they took together. `error`: over the last window.
        predictor: with what was learned; it answers for those lookaheads at which it was better (`is_tuned`).
    """

    needs_inputs = True
    needs_every_layer = True

    def __init__(self, predictor: Llapor, config: OnlineConfig | None = None) -> None:
        if not isinstance(predictor, Llapor):
            raise UnsupportedOption(
                f"only a Llapor, as prescope.train_predictor(...).predictor is one, is tuned online; this is a "
                f"{type(predictor).__name__}"
            )
        self._trained = predictor
        self.config = config or OnlineConfig()
        self.name = f"{predictor.name} tuned online"
        self.shape, self.lookahead = predictor.shape, predictor.lookahead
        self.is_calibrated = predictor.is_calibrated
        self.reset()

    def reset(self) -> None:
        """Forget what was learned online."""
        p = self._trained
        tensors = {name: t.detach().clone() if name in TUNED else t for name, t in p.tensors.items()}
        self.predictor = Llapor(
            p.config, p.shape, p.groups, tensors, p.tag, validation_error=p.validation_error
        )
        self._tuned = {name: tensors[name].requires_grad_() for name in TUNED if name in tensors}
        self._start = {name: t.detach().clone() for name, t in self._tuned.items()}
        self._optimizer = torch.optim.Adam(list(self._tuned.values()), lr=self.config.learning_rate)
        L, N, ring = (
            self.shape.num_layers,
            self.predictor.config.lookahead * self.shape.num_experts,
            self.config.ring,
        )
        device = p.device
        self._hidden = torch.zeros(L, ring, p.config.hidden, dtype=torch.float32, device=device)
        self._base = (
            torch.zeros(L, ring, N, dtype=torch.float32, device=device) if p.config.residual else None
        )
        self._used = torch.zeros(L, ring, self.shape.num_experts, dtype=torch.float32, device=device)
        # (2, window, lookahead): as trained, as tuned.
        self._errors = np.full((2, self.config.window, self.lookahead), np.nan)
        self._seen = 0
        self._last_cycle = -self.config.pause
        self._live: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._live_used: dict[int, torch.Tensor] = {}
        self.cycles = 0
        self.tuning_ms = 0.0

    @property
    def error(self) -> float:
        """1 - recall@K of what answered over the last window, mean over layers and lookaheads; NaN before any token."""
        return float(np.nanmean(self._errors, axis=1).min(axis=0).mean()) if self._seen else float("nan")

    @property
    def is_tuned(self) -> NDArray[np.bool_]:
        """(lookahead,) where the tuned heads were better over the last window, and so answer; else the trained ones."""
        if not self.cycles:
            return np.zeros(self.lookahead, dtype=bool)
        as_trained, as_tuned = np.nanmean(self._errors, axis=1)
        return as_tuned < as_trained

    def _probabilities(
        self,
        hidden: torch.Tensor,
        share: torch.Tensor | None,
        base: torch.Tensor | None,
        at: slice = slice(None),
    ) -> torch.Tensor:
        """(layers, T, lookahead, E) of the layers `at`, each lookahead by the heads that answer for it."""
        tuned = self.is_tuned
        p, q = (
            one.probabilities(one.logits(hidden, base, at), share, at) if needed else None
            for one, needed in ((self._trained, not tuned.all()), (self.predictor, tuned.any()))
        )
        if p is None or q is None:
            found = q if p is None else p
            assert found is not None
            return found
        # A shallow model has fewer layers ahead than its predictor was made for.
        p, q = (one[:, :, : self.lookahead] for one in (p, q))
        return torch.where(torch.from_numpy(tuned).to(p.device)[:, None], q, p)

    @property
    def threshold(self) -> float:
        """Windowed error above which it tunes."""
        held_out = self._trained.validation_error
        return (0.0 if np.isnan(held_out) else held_out) + self.config.margin

    # -- live --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        moe_layer: int,
        x_TD: torch.Tensor,
        ids_TK: torch.Tensor | None = None,
        weights_TK: torch.Tensor | None = None,
    ) -> list[Prediction]:
        """As `Llapor.predict`, tokens on any device; remembers the state until the step's last layer was observed."""
        if moe_layer == 0:
            self._live, self._live_used = {}, {}
        at, home = slice(moe_layer, moe_layer + 1), self.predictor.device
        x, ids, weights = (None if t is None else t.to(home) for t in (x_TD, ids_TK, weights_TK))
        assert x is not None
        h, share, base = self.predictor.live(at, x, ids, weights)
        self._live[moe_layer] = (h[0], None if base is None else base[0])
        p_TNE = self._probabilities(h, share, base, at)[0]
        return [
            Prediction(target, ahead, p_TNE[:, ahead - 1].to(x_TD.device))
            for ahead, target in targets_of(moe_layer, self.shape, self.lookahead)
        ]

    def to(self, device: torch.device | str) -> Self:
        """Itself: it learns where its predictor lies, and keeps what it has learned."""
        return self

    def fast_path(self, lookahead: int) -> FastPath | None:
        """There is none: it learns while it predicts."""
        return None

    def begin(self, num_sequences: int) -> None:
        """Another text begins: the step under way is over, what was learned stays."""
        self._live, self._live_used = {}, {}

    def observe(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """What a layer used, if it was asked there. After the last layer of a step, all layers known, it learns."""
        if moe_layer not in self._live:
            return
        self._live_used[moe_layer] = used_mask_torch(ids_TK.to(self.predictor.device), self.shape.num_experts)
        L = self.shape.num_layers
        if moe_layer != L - 1 or len(self._live_used) < L or len(self._live) < L:
            return
        states = [self._live[layer] for layer in range(L)]
        hidden = torch.stack([h for h, _ in states])
        base = torch.stack([b for _, b in states if b is not None]) if self._base is not None else None
        used = torch.stack([self._live_used[layer] for layer in range(L)])
        self._live, self._live_used = {}, {}
        self._learn(hidden, base, used)

    # -- replay ------------------------------------------------------------------------------------------------

    def replay(self, trace: RoutingTrace, lookahead: int, chunk: int = 16) -> ScoreArray:
        """As `Predictor.replay`, in the order of the rows, learning after each `chunk` of them; starts anew.

        Each chunk is scored before it is learned from; padding is not learned from.

        Raises:
            UnsupportedOption: `chunk` is no number of rows. And as `Llapor.replay`.
        """
        return self.replay_all(trace, (lookahead,), chunk)[lookahead]

    def replay_all(
        self, trace: RoutingTrace, lookaheads: tuple[int, ...], chunk: int = 16
    ) -> dict[int, ScoreArray]:
        """`replay` for several lookaheads in one pass."""
        require_count("chunk", chunk)
        for ahead in lookaheads:
            self._trained.check_trace(trace, ahead)
        self.reset()
        L, E = self.shape.num_layers, self.shape.num_experts
        out = {ahead: np.empty((len(trace), L - ahead, E), dtype=np.float32) for ahead in lookaheads}
        for first in range(0, len(trace), chunk):
            rows = slice(first, min(first + chunk, len(trace)))
            x, choice = self.predictor.batch_of(trace, rows)
            with torch.no_grad():
                (hidden, share), base = self.predictor.hidden(x, choice), self.predictor.base(x)
                p = self._probabilities(hidden, share, base)
                for ahead in lookaheads:
                    out[ahead][rows] = p[: L - ahead, :, ahead - 1].transpose(0, 1).cpu().numpy()
            real = np.where(trace.position[rows, None, None] >= 0, trace.expert_ids[rows], -1)
            ids = torch.from_numpy(real).to(self.predictor.device).transpose(0, 1)
            self._learn(hidden, base, used_mask_torch(ids, E))
        return out

    # -- learning ----------------------------------------------------------------------------------------------

    def _learn(self, hidden: torch.Tensor, base: torch.Tensor | None, used: torch.Tensor) -> None:
        """Take in T tokens (L, T, ...) whose outcome is known; tune if they say so.

        Padding used no expert. Were it a token, whatever was predicted of it would be an error.
        """
        is_token = used.any(dim=2).any(dim=0)
        if not is_token.all():
            hidden, used = hidden[:, is_token], used[:, is_token]
            base = None if base is None else base[:, is_token]
        if not hidden.shape[1]:
            return
        at = torch.arange(self._seen, self._seen + hidden.shape[1], device=hidden.device)[-self.config.ring :]
        keep = len(at)
        self._hidden[:, at % self.config.ring] = hidden[:, -keep:].detach()
        self._used[:, at % self.config.ring] = used[:, -keep:]
        if self._base is not None and base is not None:
            self._base[:, at % self.config.ring] = base[:, -keep:].detach()
        for row, predictor in enumerate((self._trained, self.predictor)):
            errors = self._token_errors(predictor, hidden, base, used)[-self.config.window :]
            last = self._seen + hidden.shape[1] - len(errors) + np.arange(len(errors))
            self._errors[row, last % self.config.window] = errors
        self._seen += hidden.shape[1]
        rested = self._seen - self._last_cycle >= self.config.pause
        if self._seen >= self.config.window and rested and self.error > self.threshold:
            self._tune()

    @torch.no_grad()
    def _token_errors(
        self, predictor: Llapor, hidden: torch.Tensor, base: torch.Tensor | None, used: torch.Tensor
    ) -> np.ndarray:
        """(T, lookahead) 1 - recall@K of each token, mean over layers."""
        z = predictor.logits(hidden, base)
        recalls = []
        for ahead in range(1, self.lookahead + 1):
            part = z[: self.shape.num_layers - ahead, :, self.predictor.columns(ahead)]
            best = part.topk(self.shape.top_k, dim=-1).indices
            hits, total = used[ahead:].gather(-1, best).sum((0, 2)), used[ahead:].sum((0, 2))
            recalls.append(hits / total.clamp_min(1))
        return 1.0 - torch.stack(recalls, dim=1).cpu().numpy()

    def _tune(self) -> None:
        started = time.perf_counter()
        n = min(self._seen, self.config.ring)
        with torch.enable_grad():
            for _ in range(self.config.steps):
                base = self._base[:, :n] if self._base is not None else None
                z = self.predictor.logits(self._hidden[:, :n], base)
                loss = self._loss(z, self._used[:, :n])
                self._optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self._optimizer.step()
        loss.item()  # waits for the device, so that the time is that of the work
        self._last_cycle = self._seen
        self.cycles += 1
        self.tuning_ms += (time.perf_counter() - started) * 1e3

    def _loss(self, z: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
        losses = [
            binary_cross_entropy_with_logits(
                z[: self.shape.num_layers - ahead, :, self.predictor.columns(ahead)], used[ahead:]
            )
            for ahead in range(1, self.lookahead + 1)
        ]
        distance = torch.stack(
            [(t - self._start[name]).square().sum() for name, t in self._tuned.items()]
        ).sum()
        return torch.stack(losses).mean() + self.config.pull * distance

    def cost(self) -> Cost:
        """Of a prediction; what tuning took stands in `tuning_ms`."""
        return self.predictor.cost()
