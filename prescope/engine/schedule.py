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

from ..cache.residency import ResidencyTable
from ..core.types import FloatArray, IntArray, MoEShape, Reason
from ..errors import UnsupportedOption
from ..hf import MoELayer
from ..kernels import ExpertsSpec
from ..kernels.cpu import CpuExperts, CpuJob, CpuLayer, ExpertBatch, expert_batch_of
from ..predictor import Prediction, Predictor
from ..predictor.base import FastPath
from ..scheduler import schedule_named
from ..scheduler.costs import LayerCosts, compiled_costs
from ..scheduler.layer import Decision
from ..scheduler.plan import ON_DEMAND
from ..scheduler.planner import Planner
from ..scheduler.settings import resolve
from ..scheduler.types import Plan, ScheduleSettings, cpu_time
from ..weights.host_pool import HostPool
from ..weights.loader import Loader, Transfer
from .config import EngineConfig
from .forced_routing import ForcedRouting

Predicted = tuple[NDArray[np.floating], NDArray[np.floating]]


class CpuWork(NamedTuple):
    """Experts of one layer under way on the CPU."""

    moe_layer: int
    experts: IntArray  # (n,)
    expert_batch: ExpertBatch
    job: CpuJob
    out: torch.Tensor  # (m, D) of the lot's pairs, one after another, on the host


class ScheduleRunner:
    """What a schedule needs to act.

    Args:
        planner: decides.
        predictor: answers for coming layers, if the schedule asks.
        cpu: computes experts on the CPU, if the schedule may.
        reason: of its prefetches.
        foresight: the predictor's networks for a few tokens, where there are such.
    """

    def __init__(
        self,
        planner: Planner,
        predictor: Predictor | None,
        cpu: CpuExperts | None,
        reason: Reason,
        fast_path: FastPath | None = None,
    ) -> None:
        self.planner, self.predictor, self.cpu, self.reason = planner, predictor, cpu, reason
        self._fast_path = fast_path
        self._under_way: list[CpuJob] = []
        self.forced: ForcedRouting | None = None  # its predictions are used instead of the predictor's

    def describe(self) -> dict[str, Any]:
        """Settings as resolved, for `RunResult.config`."""
        settings = self.planner.settings
        return {
            "lookahead": settings.lookahead,
            "lag": settings.lag,
            "width": settings.width,
            "threshold": settings.threshold,
            "cpu_threads": 0 if self.cpu is None else self.cpu.threads,
            "predictor": "none" if self.predictor is None else self.predictor.name,
        }

    # -- predictions -------------------------------------------------------------------------------------------

    @property
    def lookahead(self) -> int:
        """Layers ahead that predictions are made for."""
        return self.planner.predicts if self.predictor is not None else 0

    def scores(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> torch.Tensor | None:
        """(d, 2, E) float32 on the tokens' device: expected tokens, and probability that any uses the expert."""
        if self.predictor is None:
            return None
        if self.forced is not None and self.forced.scores is not None:
            return self.forced.scores[
                moe_layer, : self.lookahead
            ].clone()  # the next step's are put into their place
        if self._fast_path is not None and len(x_TD) <= self._fast_path.most_tokens:
            return self._fast_path(moe_layer, x_TD, ids_TK, weights_TK)
        made = self.predictor.predict(moe_layer, x_TD, ids_TK, weights_TK)[: self.lookahead]
        return of_step(made, self.lookahead, self.predictor.shape.num_experts, x_TD.device)

    def predict(
        self, moe_layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor
    ) -> Predicted | None:
        """The same, read by the host; None without a predictor."""
        scores = self.scores(moe_layer, x_TD, ids_TK, weights_TK)
        if scores is None:
            return None
        values = scores.cpu().numpy()
        return values[:, 0], values[:, 1]

    # -- decisions ---------------------------------------------------------------------------------------------

    def decide(
        self,
        moe_layer: int,
        experts: IntArray,
        tokens: IntArray,
        weights: FloatArray,
        table: ResidencyTable,
        predicted: Predicted | None,
    ) -> Decision:
        """What to do about a layer; see `Planner.decide`."""
        return self.planner.decide(moe_layer, experts, tokens, weights, table, _now_us(), predicted)

    def issued(self, num_copies: int) -> None:
        """So many experts were given to the link."""
        self.planner.issued(num_copies, _now_us())

    def hold(
        self, moe_layer: int, plan: Plan, table: ResidencyTable, loader: Loader, timed: bool
    ) -> list[Transfer]:
        """Want what a layer's plan prefetches, and nothing else; returns what could be issued at once."""
        plan = self.planner.reconsider(moe_layer, plan, table)
        transfers = loader.hold(plan.prefetch, plan.keep, self.reason, timed)
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
        """Begin to compute experts (n,) of a layer on the CPU; x_TD lies on the host."""
        assert self.cpu is not None, "a schedule without a CPU lane sent experts to the CPU"
        expert_batch = expert_batch_of(ids_TK, experts)
        out = torch.empty((len(expert_batch.places), x_TD.shape[1]), dtype=x_TD.dtype)
        job = self.cpu.submit(moe_layer, expert_batch.compact(), x_TD, out)
        self._under_way = [*(other for other in self._under_way if not other.done()), job]
        return CpuWork(moe_layer, expert_batch.experts, expert_batch, job, out)

    def merge(self, work: CpuWork, spec: ExpertsSpec, out_PD: torch.Tensor) -> None:
        """Wait for the CPU and put its pairs where they belong."""
        work.job.wait()
        start, end = work.job.span_ns()
        base_us, cpu_us = self.planner.calibrated_cpu()
        tokens = np.diff(work.expert_batch.first)
        self.planner.saw_cpu((end - start) / 1e3, base_us + sum(cpu_time(cpu_us, t) for t in tokens.tolist()))
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
        """End the CPU lane's threads."""
        if self.cpu is not None:
            self.cpu.close()


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
) -> ScheduleRunner:
    """A schedule by its settings, ready to serve.

    Raises:
        UnsupportedOption: it needs a predictor and there is none, or the predictor is of another model.
    """
    schedule = schedule_named(config.schedule)
    if schedule.predictor == "none":  # it looks at no predictions, so none are made
        predictor = None
    if predictor is None and schedule.needs_predictor:
        raise UnsupportedOption(
            f"schedule={schedule.name!r} prefetches by predictions; give predictor=... (it comes with "
            f"{schedule.predictor}), or use schedule='on-demand'"
        )
    if predictor is not None:
        _require_fit(predictor, shape)
        predictor = predictor.to(device)
    resolved = resolve(
        config.schedule,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        depth=0 if predictor is None else min(predictor.lookahead, shape.num_layers - 1),
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
    fast_path = None
    if predictor is not None and resolved.predicts and config.kernels != "torch":
        fast_path = predictor.fast_path(resolved.predicts)
    reason = Reason.STREAM if schedule.streams else Reason.PREFETCH
    return ScheduleRunner(planner, predictor, cpu, reason, fast_path)


def _require_fit(predictor: Predictor, shape: MoEShape) -> None:
    """Raises UnsupportedOption: it is no predictor, or of another model."""
    if not isinstance(predictor, Predictor):
        raise UnsupportedOption(
            f"predictor is a {type(predictor).__name__}, which lacks what prescope.predictor.Predictor asks for"
        )
    if predictor.shape.routing != shape.routing:
        raise UnsupportedOption(
            f"{predictor.name} is for (layers, experts, top-k) = {tuple(predictor.shape)[:3]}, this model has "
            f"{tuple(shape)[:3]}; train one with prescope.train_predictor"
        )


def of_step(made: list[Prediction], lookahead: int, num_experts: int, device: torch.device) -> torch.Tensor:
    """(d, 2, E) of a step's tokens together; rows beyond the last layer are zero."""
    out = torch.zeros((lookahead, 2, num_experts), device=device)
    if made:
        scores_dTE = torch.stack([prediction.scores_TE for prediction in made])
        out[: len(made), 0] = scores_dTE.sum(1)
        out[: len(made), 1] = 1.0 - (1.0 - scores_dTE).prod(1)
    return out


def _now_us() -> float:
    return time.perf_counter() * 1e6
