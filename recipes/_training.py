"""The training step and loop: float32 masters, losses, compilation, clock, looks at the validation set.

Knows a model whose backbone returns `router_logits`; knows nothing of the corpus, flags or folders.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from recipes._balance import BalanceController, balance_losses, load_ratios, router_z_loss
from recipes._data import WindowSampler
from recipes._measure import Measurement, measure

WARMUP, HOLD = 0.06, 0.40  # shares of the budget: learning rate rises until, stays at its peak until
SYNC_EVERY = 8  # steps the host may run ahead of the GPU; more would blur the clock the schedule reads


class MasterAdamW:
    """AdamW on float32 masters of a model whose own parameters are kept in a smaller dtype.

    Routers learn more slowly: Adam moves every weight by the rate, all of a row's weights together, so at
    the full rate a router overshoots the balance it is pushed to. Seen on a toy of 6 layers with 32 experts,
    top-4: after 120 steps 13 and 19 experts had under 1/4 of the fair share in two runs at scale 1.0, 5 and
    8 in runs at 0.3 and 0.1 (warm-up or start coefficient differed between them as well).
    """

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, *, router_lr_scale: float = 0.2) -> None:
        self.parameters, self.masters = [], []
        groups: dict[str, dict[str, object]] = {
            "matrices": {"params": [], "weight_decay": 0.1, "lr_scale": 1.0},
            "routers": {"params": [], "weight_decay": 0.0, "lr_scale": router_lr_scale},
            "others": {"params": [], "weight_decay": 0.0, "lr_scale": 1.0},
        }
        for name, parameter in model.named_parameters():
            # Parameters only: model.to(bfloat16) would also round the rotary frequencies, a float32 buffer.
            master = torch.nn.Parameter(parameter.data)
            master.grad = torch.zeros_like(master)
            parameter.data = master.data.to(dtype)
            self.parameters.append(parameter)
            self.masters.append(master)
            if name.endswith("mlp.gate.weight"):
                kind = "routers"
            else:
                kind = "matrices" if parameter.ndim >= 2 and "embed" not in name else "others"
            groups[kind]["params"].append(master)
        self.optimizer = torch.optim.AdamW(
            list(groups.values()), lr=0.0, betas=(0.9, 0.95), eps=1e-8, fused=True
        )

    @torch.no_grad()
    def step(self, lr: float, max_norm: float = 1.0) -> torch.Tensor:
        """Apply the parameters' gradients and drop them; returns the gradient norm before clipping."""
        torch._foreach_copy_([master.grad for master in self.masters], [p.grad for p in self.parameters])
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        torch._foreach_copy_(self.parameters, self.masters)
        for parameter in self.parameters:
            parameter.grad = None
        return norm


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up, constant, then linear to zero at progress 1."""
    if progress < WARMUP:
        return peak * max(progress / WARMUP, 0.01)
    return peak * min(1.0, max(1.0 - progress, 0.0) / (1.0 - HOLD))


StepFunction = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def make_losses(model: PreTrainedModel, z_coefficient: float) -> StepFunction:
    """The function (windows, coefficients_L) -> (loss to minimise, cross entropy in nats)."""
    top_k = model.config.num_experts_per_tok

    def losses(windows: torch.Tensor, coefficients_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The backbone, not the causal LM: with router logits the latter also computes transformers' own
        # pooled loss, whose bincount breaks the graph in 5.17.
        out = model.model(input_ids=windows[:, :-1], use_cache=False, output_router_logits=True)
        logits = model.lm_head(out.last_hidden_state).float()
        cross_entropy = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        balance = (coefficients_L * balance_losses(out.router_logits, top_k)).sum()
        return cross_entropy + balance + z_coefficient * router_z_loss(out.router_logits), cross_entropy

    return losses


def compile_losses(
    losses: StepFunction, model: torch.nn.Module, windows: torch.Tensor, coefficients_L: torch.Tensor
) -> tuple[StepFunction, dict[str, object]]:
    """torch.compile with forward and backward tried once: one graph, else several, else eager, loudly."""
    report: dict[str, object] = {"mode": "eager", "errors": [], "seconds": 0.0}
    begin = time.perf_counter()
    for mode, fullgraph in (("one graph", True), ("several graphs", False)):
        torch._dynamo.reset()
        try:
            compiled = torch.compile(losses, fullgraph=fullgraph, dynamic=False)
            for _ in range(2):  # the second shows whether the first's guards hold
                compiled(windows, coefficients_L)[0].backward()
                model.zero_grad(set_to_none=True)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a compiler may fail in any way; eager still trains
            report["errors"].append(f"{mode}: {type(error).__name__}: {error}"[:2000])
            print(f"\n!!! TORCH.COMPILE FAILED ({mode}): {type(error).__name__}: {error}\n", flush=True)
            model.zero_grad(set_to_none=True)
            continue
        return compiled, report | {"mode": mode, "seconds": time.perf_counter() - begin}
    print("!!! TRAINING WITHOUT TORCH.COMPILE: expect several times fewer tokens/s", flush=True)
    return losses, report | {"seconds": time.perf_counter() - begin}


@dataclass
class Trainer:
    """The training loop with its clock, its looks at the validation set and its log."""

    seconds: float  # wall time of the loop
    peak_lr: float
    batch_windows: int
    model: PreTrainedModel
    optimizer: MasterAdamW
    losses: StepFunction
    sampler: WindowSampler
    valid_windows: dict[str, torch.Tensor]
    controller: BalanceController
    records: list[dict[str, object]] = field(default_factory=list)
    step: int = 0
    interrupted: bool = False

    @property
    def device(self) -> torch.device:
        """Where the training data lies, and so everything else."""
        return self.sampler.tokens.device

    @property
    def batch_tokens(self) -> int:
        """Predicted tokens of one step."""
        return self.batch_windows * (self.sampler.window - 1)

    @property
    def tokens(self) -> int:
        """Predicted tokens so far."""
        return self.step * self.batch_tokens

    def run(self) -> Measurement:
        """Train until the budget is spent or Ctrl-C; returns the measurement of the finished weights."""
        self.begin = self.last_line_at = last_look_at = time.perf_counter()
        self.last_line_step = 0
        self.loss_sum = torch.zeros((), device=self.device)  # since the last line
        self.grad_norm = torch.zeros(())
        line_every = min(5.0, self.seconds / 8)
        look_every = max(1.0, min(15.0, self.seconds / 12))
        try:
            while (elapsed := time.perf_counter() - self.begin) < self.seconds:
                self.train_step(elapsed / self.seconds)
                if self.step % SYNC_EVERY == 0:
                    self.loss_sum.item()
                now = time.perf_counter()
                if now - last_look_at >= look_every:
                    self.look()
                    last_look_at = time.perf_counter()
                elif now - self.last_line_at >= line_every:
                    self.print_line()
        except KeyboardInterrupt:
            self.interrupted = True
            print("interrupted: saving what there is (the learning rate was not annealed)", flush=True)
        return self.look()

    def train_step(self, progress: float) -> None:
        """One batch forward, backward and applied; does not wait for the GPU."""
        coefficients_L = torch.tensor(self.controller.coefficients(progress), dtype=torch.float32)
        windows = self.sampler.draw(self.batch_windows)
        # non_blocking: a plain copy would wait for all queued work. Pageable memory is staged, so it is safe.
        loss, cross_entropy = self.losses(windows, coefficients_L.to(self.device, non_blocking=True))
        loss.backward()
        self.grad_norm = self.optimizer.step(learning_rate(progress, self.peak_lr))
        self.loss_sum += cross_entropy.detach()
        self.step += 1

    def print_line(self) -> float | None:
        """Print where training stands; returns the mean training loss since the last line, in nats."""
        steps = self.step - self.last_line_step
        if steps == 0:
            return None
        loss = self.loss_sum.item() / steps
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"training loss is {loss} at step {self.step}; lower --lr {self.peak_lr}"
            )
        now = time.perf_counter()
        speed = steps * self.batch_tokens / (now - self.last_line_at)
        print(
            f"{now - self.begin:6.1f} s  step {self.step:6d}  {self.tokens / 1e6:7.1f} M tokens  "
            f"loss {loss:.3f}  grad norm {float(self.grad_norm):.2f}  {speed / 1e3:.0f} k tokens/s",
            flush=True,
        )
        self.loss_sum.zero_()
        self.last_line_step, self.last_line_at = self.step, now
        return loss

    def look(self) -> Measurement:
        """Measure validation loss and expert load, adjust the balance, add a record to the log."""
        train_loss = self.print_line()
        elapsed = time.perf_counter() - self.begin
        progress = min(elapsed / self.seconds, 1.0)
        result = measure(self.model, self.valid_windows)
        ratios_LE = load_ratios(result.pooled())
        self.records.append(
            {
                "step": self.step,
                "tokens": self.tokens,
                "seconds": elapsed,
                "tokens_per_s": self.tokens / elapsed,  # looks at the validation set included
                "learning_rate": learning_rate(progress, self.peak_lr),
                "train_loss": train_loss,
                "valid_loss": result.loss_nats,
                "min_load_ratio": ratios_LE.min(axis=1).tolist(),
                "max_load_ratio": ratios_LE.max(axis=1).tolist(),
                "balance_coefficient": self.controller.coefficients(progress).tolist(),
            }
        )
        self.controller.observe(ratios_LE)
        print(
            f"         validation loss {result.pooled_loss():.3f}  load over the fair share "
            f"{ratios_LE.min():.2f} to {ratios_LE.max():.2f}  "
            f"boosts {self.controller.boosts.round(1).tolist()}",
            flush=True,
        )
        self.last_line_at = time.perf_counter()  # the look is not training time
        return result
