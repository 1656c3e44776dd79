"""The engine on a clock that other processes cannot disturb; experts are computed for real, so text and routing are the
model's own.

On the virtual clock link, layers and experts take stated times, so the simulator must agree exactly: what differs here
is a rule that the two do not share. On the clock of processor time only the link's time is stated: the rest takes what
the thread's own processor time says, as on an idle machine of one core beside a link and a CPU lane.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from prescope.device.null import NullDevice, VirtualMark
from prescope.engine.layered import LayeredRunner
from prescope.kernels import make_kernel
from prescope.kernels.cpu import CpuExperts, ExpertBatch
from prescope.kernels.reference import TorchKernel
from prescope.scheduler.costs import LayerCosts, compiled_costs
from prescope.scheduler.types import cpu_time

LABELS = {
    "VirtualDevice": "virtual clock, stated times",
    "ProcessorTimeDevice": "emulated link of stated time, the rest by the thread's processor time",
}


class VirtualDevice(NullDevice):
    """A link that makes one copy after the other, and a clock that stands still but for what is stated.

    Args:
        costs: of a layer. Each read of a router's choice lets the rest of a layer pass, and a prediction; what follows
            when the host has looked where the experts are is the decision.
    """

    def __init__(self, costs: LayerCosts) -> None:
        super().__init__(compute_us=0.0)
        self.costs = costs

    def now(self) -> float:
        """Microseconds."""
        return self.now_us

    def passed(self, us: float) -> None:
        """So much was computed."""
        self.now_us += us

    def job(self, compute: Callable[[], object], tokens: list[int]) -> "_Job":
        """Experts on the CPU, with `tokens` each: computed at once, and done when the lane would have been."""
        compute()
        costs = compiled_costs(self.costs, cpu=True, predicts=False)
        return _Job(self, costs.cpu_base_us + sum(cpu_time(costs.cpu_us, n) for n in tokens))

    def describe(self) -> dict[str, Any]:
        return {"device": "virtual", "link": "virtual", "label": LABELS[type(self).__name__]}

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        after: Sequence[VirtualMark],
        timed: bool,
        each: bool = True,
    ) -> tuple[VirtualMark, list[VirtualMark]]:
        """Copied at once; they land when the link is through with them."""
        at_us = max(self.now_us, self._link_free_us)
        start, ready = VirtualMark(at_us), []
        for slot, row in pairs:
            slot.copy_(row)
            at_us += self.costs.link_us
            ready.append(VirtualMark(at_us))
        self._link_free_us = at_us
        return start, ready

    def read(self, tensor: torch.Tensor) -> NDArray[Any]:
        if not tensor.is_floating_point():
            self.passed(self.costs.rest_us + self.costs.predict_us)
        return super().read(tensor)


class ProcessorTimeDevice(VirtualDevice):
    """What a thread computes takes its processor time; only copies take what is stated. For one thread.

    Attributes:
        jobs: of the CPU lane: the tokens of each expert, and the processor time of all.
    """

    def __init__(self, costs: LayerCosts) -> None:
        self._waited_us = self._left_out_us = 0.0
        self.jobs: list[tuple[list[int], float]] = []
        super().__init__(costs)

    @property
    def now_us(self) -> float:  # type: ignore[override]
        """The thread's processor time, and what it has waited."""
        return 1e6 * time.thread_time() - self._left_out_us + self._waited_us

    @now_us.setter
    def now_us(self, to_us: float) -> None:
        self._waited_us += max(0.0, to_us - self.now_us)

    def passed(self, us: float) -> None:
        pass

    def copy(self, *args: Any, **keywords: Any) -> tuple[VirtualMark, list[VirtualMark]]:
        begin, waited = time.thread_time(), self._waited_us
        made = super().copy(*args, **keywords)
        assert waited == self._waited_us
        self._left_out_us += 1e6 * (time.thread_time() - begin)  # the link does it
        return made

    def job(self, compute: Callable[[], object], tokens: list[int]) -> "_Job":
        begin, mine = time.process_time(), time.thread_time()
        compute()
        took_us = 1e6 * (time.process_time() - begin)  # of the lane's thread, and of this one that waits
        self._left_out_us += 1e6 * (time.thread_time() - mine)
        self.jobs.append((tokens, took_us))
        return _Job(self, took_us)


class _Kernel(TorchKernel):
    """Experts take `gpu_us` each."""

    device: VirtualDevice

    def run(self, work: Any, spec: Any, weights: Any, experts: Any, slots: Any) -> None:
        super().run(work, spec, weights, experts, slots)
        self.device.passed(len(experts) * self.device.costs.gpu_us)


class _Job:
    """Computed already; it ends later."""

    def __init__(self, device: VirtualDevice, us: float) -> None:
        self._device, self._begin_us, self._end_us = device, device.now_us, device.now_us + us

    def done(self) -> bool:
        return self._end_us <= self._device.now_us

    def wait(self, timeout_s: float | None = None) -> None:
        self._device.now_us = max(self._device.now_us, self._end_us)

    def cancel(self) -> None:
        pass

    def span_ns(self) -> tuple[int, int]:
        return round(1e3 * self._begin_us), round(1e3 * self._end_us)


class _CpuExperts(CpuExperts):
    """The CPU lane; experts take what is stated, without regard to the link."""

    device: VirtualDevice

    def submit(self, moe_layer: int, expert_batch: ExpertBatch, *args: Any, **keywords: Any) -> Any:
        lane = super()

        def compute() -> None:
            lane.submit(moe_layer, expert_batch, *args, **keywords).wait()

        return self.device.job(compute, np.diff(expert_batch.first).tolist())


@contextmanager
def virtual_clock(costs: LayerCosts, kind: type[VirtualDevice] = VirtualDevice) -> Iterator[VirtualDevice]:
    """The engine that is made inside runs on a clock of this kind; give it decode="layered" and device="null"."""
    device = kind(costs)

    def kernel(*args: Any) -> tuple[TorchKernel, str]:
        _, reason = make_kernel(*args)
        made = _Kernel()
        made.device = device
        return made, reason

    def lane(*args: Any, **keywords: Any) -> _CpuExperts:
        made = _CpuExperts(*args, **keywords, implementation="torch")
        made.device = device
        return made

    def find(*args: Any, **keywords: Any) -> Any:
        found = former(*args, **keywords)
        device.passed(costs.decide_us)
        return found

    former = LayeredRunner.find
    places: dict[str, Callable[..., Any]] = {
        "engine.engine.open_device": lambda *_: device,
        "engine.layered.make_kernel": kernel,
        "engine.layered.LayeredRunner.find": find,
        "engine.schedule.CpuExperts": lane,
        "engine.schedule._now_us": device.now,
        "engine.predicting._now_us": device.now,
    }
    with ExitStack() as stack:
        for place, instead in places.items():
            stack.enter_context(patch(f"prescope.{place}", instead))
        yield device
