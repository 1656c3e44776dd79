"""A schedule at work in the engine: predictions in, copies, CPU jobs and prefetches out.

Decides in decode steps only: a prompt needs nearly all experts of every layer, so there is nothing to predict.
Shapes: T tokens, D model width, K top-k, E experts, d layers ahead, P = T * K pairs.
"""

import time
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.residency import LayerNeed, ResidencyTable
from ..core.types import FloatArray, IntArray, MoEShape, Reason
from ..errors import UnsupportedOption
from ..hf import MoELayer
from ..kernels import ExpertsSpec
from ..kernels.cpu import CpuExperts, CpuJob, CpuLayer, ExpertBatch, expert_batch_of
from ..predictor import Predictor
from ..predictor.checked import prepared, require_predictor, try_out
from ..scheduler import schedule_named
from ..scheduler.costs import LayerCosts, compiled_costs
from ..scheduler.layer import Decision
from ..scheduler.plan import ON_DEMAND
from ..scheduler.planner import Planner
from ..scheduler.settings import resolve
from ..scheduler.types import ScheduleSettings, cpu_time
from ..weights.host_pool import HostPool
from ..weights.loader import Loader, Transfer
from .config import EngineConfig
from .forced_routing import ForcedRouting
from .positions import Forward
from .predicting import Predicted, Predicting, Predictings


class CpuWork(NamedTuple):
    """Experts of one layer under way on the CPU."""

    moe_layer: int
    experts: IntArray  # (n,)
    expert_batch: ExpertBatch
    job: CpuJob
    out: torch.Tensor  # (m, D) of the batch's pairs, one after another, on the host


class ScheduleRunner:
    """What a schedule needs to act.

    Args:
        planner: decides.
        predicting: asks a predictor about coming layers, if the schedule does.
        cpu: computes experts on the CPU, if the schedule may.
        reason: of its prefetches.
    """

    def __init__(
        self,
        planner: Planner,
        predicting: Predicting | None,
        cpu: CpuExperts | None,
        reason: Reason,
    ) -> None:
        self.planner, self.predicting, self.cpu, self.reason = planner, predicting, cpu, reason
        self._under_way: list[CpuJob] = []

    def describe(self) -> dict[str, Any]:
        """Settings as resolved, for `RunResult.config`."""
        settings = self.planner.settings
        return {
            "lookahead": settings.lookahead,
            "lag": settings.lag,
            "width": settings.width,
            "threshold": settings.threshold,
            "cpu_threads": 0 if self.cpu is None else self.cpu.threads,
            "predictor": "none" if self.predicting is None else self.predicting.predictor.name,
        }

    # -- predictions -------------------------------------------------------------------------------------------

    def force(self, forced: ForcedRouting | None) -> None:
        """Use a trace's predictions, if it has such, instead of the predictor's; None ends it."""
        if self.predicting is not None:
            self.predicting.forced = forced

    def predict(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Predicted | None:
        """What is predicted at a layer, as far as the predictor answers; None without one."""
        if self.predicting is None:
            return None
        return self.predicting.predict(moe_layer, x_TD, ids_TK, weights_TK)

    def begin_forward(self, forward: Forward, is_prefill: bool) -> None:
        """A forward pass begins; where it reads a prompt, what was wrong with the predictor is forgotten."""
        if self.predicting is None:
            return
        if is_prefill:
            self.predicting.begin_text()
        self.predicting.begin_forward(forward)

    def observe(self, moe_layer: int, ids_TK: torch.Tensor) -> None:
        """What a layer has used, for a predictor that learns."""
        if self.predicting is not None:
            self.predicting.observe(moe_layer, ids_TK)

    def end_forward(self) -> None:
        """The forward pass is over."""
        if self.predicting is not None:
            self.predicting.end_forward()

    # -- decisions ---------------------------------------------------------------------------------------------

    def decide(
        self,
        moe_layer: int,
        experts: IntArray,
        tokens: IntArray,
        weights: FloatArray,
        table: ResidencyTable,
        predicted: Predicted | None,
    ) -> tuple[Decision, int]:
        """What serves a layer; see `Planner.decide`."""
        return self.planner.decide(moe_layer, experts, tokens, weights, table, _now_us(), predicted)

    def copies_of_prompt(self, need: LayerNeed, table: ResidencyTable) -> int:
        """How many misses of a prompt's layer are copied; the CPU computes the others."""
        return need.num_misses if self.cpu is None else self.planner.copies_of_prompt(need, table)

    def issued(self, num_copies: int) -> None:
        """So many experts were given to the link."""
        self.planner.issued(num_copies, _now_us())

    def hold(self, moe_layer: int, table: ResidencyTable, loader: Loader, timed: bool) -> list[Transfer]:
        """Want what is prefetched behind a layer, and nothing else; returns what could be issued at once."""
        ahead = self.planner.prefetches(moe_layer, table)
        transfers = loader.hold(ahead.keys, ahead.keep, self.reason, timed)
        self.issued(len(transfers))
        return transfers

    def pump(self, loader: Loader, timed: bool) -> list[Transfer]:
        """Issue what is held as far as the link has room."""
        transfers = loader.pump(timed)
        self.issued(len(transfers))
        return transfers

    # -- the CPU lane ------------------------------------------------------------------------------------------

    def submit(
        self, moe_layer: int, experts: IntArray, ids_TK: NDArray[np.integer[Any]], x_TD: torch.Tensor
    ) -> CpuWork:
        """Begin to compute experts (n,) of a layer on the CPU, once their inputs (T, D) have come from the device."""
        assert self.cpu is not None, "a schedule without a CPU lane sent experts to the CPU"
        expert_batch = expert_batch_of(ids_TK, experts)
        x, tokens = _rows(x_TD.detach(), expert_batch.tokens)
        out = torch.empty((len(expert_batch.places), x_TD.shape[1]), dtype=x_TD.dtype, device="cpu")
        job = self.cpu.submit(moe_layer, expert_batch.compact()._replace(tokens=tokens), x, out)
        self._under_way = [*(other for other in self._under_way if not other.done()), job]
        return CpuWork(moe_layer, expert_batch.experts, expert_batch, job, out)

    def merge(self, work: CpuWork, spec: ExpertsSpec, out_PD: torch.Tensor, learns: bool) -> None:
        """Wait for the CPU and put its pairs where they belong; `learns`: its time says what decode steps take."""
        work.job.wait()
        if learns:
            start, end = work.job.span_ns()
            base_us, cpu_us = self.planner.calibrated_cpu()
            tokens = np.diff(work.expert_batch.first)
            expected_us = base_us + sum(cpu_time(cpu_us, t) for t in tokens.tolist())
            self.planner.saw_cpu((end - start) / 1e3, expected_us)
        y = work.out.to(out_PD.device)
        if spec.post_norm is not None:
            y = spec.post_norm(y)
        out_PD.index_copy_(0, torch.from_numpy(work.expert_batch.places).to(out_PD.device), y)

    def recover(self) -> None:
        """After an interrupt: nothing is computed any more, nothing is believed of predictions."""
        for job in self._under_way:
            job.cancel()
            # Whatever it raises, its run is over; but a flag set late must not answer the next one.
            with suppress(Exception):
                job.wait(timeout_s=1.0)
        self._under_way = []
        self.planner.restart()

    def awake(self) -> AbstractContextManager[None]:
        """While captured steps run: threads of the CPU lane do not sleep."""
        return nullcontext() if self.cpu is None else self.cpu.awake()

    def close(self) -> None:
        """End the threads of the CPU lane and of the predictor."""
        if self.predicting is not None:
            self.predicting.close()
        if self.cpu is not None:
            self.cpu.close()


def _rows(x_TD: torch.Tensor, tokens: IntArray) -> tuple[torch.Tensor, IntArray]:
    """The rows of x that tokens (m,) name, on the host, and where they are there: of a long prompt few are wanted, and
    all of it would take longer to come than an expert.
    """
    used = np.unique(tokens)
    if 2 * len(used) > len(x_TD):
        return x_TD.contiguous().cpu(), tokens
    return x_TD[torch.from_numpy(used).to(x_TD.device)].cpu(), np.searchsorted(used, tokens)


def on_demand(shape: MoEShape) -> ScheduleRunner:
    """Everything that is missing is copied when it is needed: for cache policies that only the host runs."""
    settings = ScheduleSettings(ON_DEMAND, lookahead=0, width=0, threshold=0.0)
    free = LayerCosts(link_us=0.0, gpu_us=0.0, rest_us=0.0, source="nothing is weighed on demand")
    planner = Planner(settings, compiled_costs(free, cpu=False, predicts=False), shape, 0)
    return ScheduleRunner(planner, None, None, Reason.ON_DEMAND)


def open_schedule_runner(
    config: EngineConfig,
    shape: MoEShape,
    layers: list[MoELayer],
    host: HostPool,
    predictor: Predictor | None,
    costs: LayerCosts,
    device: torch.device,
    dtype: torch.dtype,
    predictings: Predictings,
) -> ScheduleRunner:
    """A schedule by its settings, ready to serve.

    Args:
        dtype: of what the model's layers compute with, `device`: where.
        predictings: the predictors that are there already.

    Raises:
        UnsupportedOption: it needs a predictor and there is none, or the predictor is of another model or answers
            something else than a predictor's answer.
    """
    schedule = schedule_named(config.schedule)
    if schedule.predictor == "none":  # it looks at no predictions, so none are made
        predictor = None
    if predictor is None and schedule.needs_predictor:
        raise UnsupportedOption(
            f"schedule={schedule.name!r} prefetches by predictions; give predictor=... (as published the "
            f"{schedule.predictor}; prescope.training.early_router(engine) needs no training), or use "
            f"schedule='on-demand'"
        )
    depth, moved = 0, None
    if predictor is not None:
        _require_fit(predictor, shape)
        depth = min(predictor.lookahead, shape.num_layers - 1)
        moved = predictings.known(predictor)
        if moved is None:
            moved = prepared(predictor, "to", device)
            _require_fit(moved, shape)
            try_out(moved, shape, layers[0].expert_size[1], dtype, device, depth)
    resolved = resolve(
        config.schedule,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        depth=depth,
        predictor="" if predictor is None else predictor.name,
        lookahead=None
        if predictor is None
        else config.lookahead,  # one set earlier waits for the next predictor
        width=config.width,
        threshold=config.threshold,
        cpu=False if config.cpu_threads == 0 else None,
    )
    cpu = None
    if resolved.cpu:
        rows = zip(layers, host.layers, strict=True)
        cpu = CpuExperts(
            [CpuLayer(held.rows, layer.layout, layer.spec) for layer, held in rows],
            threads=config.cpu_threads,
        )
    form = compiled_costs(costs, cpu=resolved.cpu, predicts=resolved.predicts > 0)
    planner = Planner(resolved.settings, form, shape, resolved.predicts)
    predicting = None
    if predictor is not None and moved is not None:
        predicting = predictings.of(predictor, moved, resolved.predicts, config.kernels != "torch")
    reason = Reason.STREAM if schedule.streams else Reason.PREFETCH
    return ScheduleRunner(planner, predicting, cpu, reason)


def _require_fit(predictor: Predictor, shape: MoEShape) -> None:
    """Raises UnsupportedOption: it is no predictor, or of another model."""
    require_predictor(predictor, "predict", "replay", "cost", "to", "fast_path")
    if predictor.shape.routing != shape.routing:
        raise UnsupportedOption(
            f"{predictor.name} is for (layers, experts, top-k) = {tuple(predictor.shape)[:3]}, this model has "
            f"{tuple(shape)[:3]}; train one with prescope.train_predictor"
        )


def _now_us() -> float:
    return time.perf_counter() * 1e6
