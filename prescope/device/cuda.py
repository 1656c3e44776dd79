"""CUDA: the compute lane is the current stream, the H2D lane a stream of its own, marks are CUDA events."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache, partial
from itertools import chain
from typing import Any, Literal

import torch
from numpy.typing import NDArray

from ..core.types import Returned
from ..core.units import format_bytes
from ..core.worker import despite_interrupts, process_id
from ..errors import NotEnoughMemory, SlotPoolTooLarge, TransferFailed, UnsupportedOption, WaitTimedOut
from .base import LinkFunctions
from .driver import DriverEvents, DriverMark, elapsed_us, link_functions, open_memcpy

#: Memory left to activations, KV cache and the allocator when slots are sized, bytes.
HEADROOM_BYTES = 1 << 30

#: GPU cycles, about 0.5 ms: longer than Python takes to launch a stamp and a mark.
BUSY_CYCLES = 1_000_000

#: Longer than everything takes that can be queued on the GPU: the host reads each layer's routing.
MOST_GPU_S = 600.0
#: So long a wait asks again and again, and then after a tenth of that each time.
HOT_S = 2e-3

#: cudaErrorHostMemoryNotRegistered.
NOT_REGISTERED = 713

Copies = Literal["torch", "driver"]
#: "torch" is `Tensor.copy_`; "driver" calls cuMemcpyHtoDAsync directly, which spares the host torch's dispatch: 3.7
#: instead of 7 us a copy (H200 machine, benchmarks/async_io.py). The link is idle until the first one is issued.
COPIES: Copies = "driver"


def visible_gpus() -> list[str]:
    """GPUs that this process sees, each as CUDA_VISIBLE_DEVICES names it to a process that shall see it alone."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = map(str, range(count)) if named is None else (name.strip() for name in named.split(","))
    return list(names)[:count]


class CudaDevice:
    """One CUDA GPU and its link.

    Args:
        index: of the GPU; by default torch's current one.
        copies: how a row is handed to the copy engine, see COPIES.
        link_factor: how many times each expert is copied, see `EngineConfig`.
    """

    kind = "cuda"
    captures_steps = small_copies_are_slow = True

    def __init__(self, index: int | None = None, copies: Copies = COPIES, link_factor: int = 1) -> None:
        if not torch.cuda.is_available():
            raise UnsupportedOption(
                "device='cuda' asked for, but torch sees no CUDA GPU; use device='cpu' for an emulated link"
            )
        if index is not None and index >= torch.cuda.device_count():
            raise UnsupportedOption(
                f"device='cuda:{index}' asked for, but torch sees {torch.cuda.device_count()} GPUs, counted from 0"
            )
        self.torch_device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._h2d = torch.cuda.Stream(self.torch_device)
        self._owner = process_id()
        self.memcpy = open_memcpy() if copies == "driver" else None
        self._repeats = link_factor
        self._shared = torch.cuda.graph_pool_handle()

    def as_current(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.torch_device)

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.torch_device)
        # kHz and bits; memory sends twice a clock.
        peak = (
            2 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8e6
        )
        return {
            "device": properties.name,
            **({"device_memory_gb_per_s": round(peak)} if peak else {}),
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "link": "measured",
            "label": f"measured on {properties.name}",
            **({} if self._repeats == 1 else self._slower(properties.name)),
        }

    def _slower(self, name: str) -> dict[str, Any]:
        """What is different when the link is made slower."""
        label = f"measured on {name}, link emulated: each expert copied {self._repeats} times"
        return {"link": "emulated", "link_factor": self._repeats, "label": label}

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device) - torch.cuda.memory_allocated(
            self.torch_device
        )
        return max(0, free + cached - HEADROOM_BYTES)

    def allocate_slots(self, num_slots: int, row_bytes: int) -> torch.Tensor:
        try:
            return torch.empty((num_slots, row_bytes), dtype=torch.uint8, device=self.torch_device)
        except torch.cuda.OutOfMemoryError as error:
            raise SlotPoolTooLarge(
                f"{num_slots} slots of {format_bytes(row_bytes)} do not fit into the GPU's memory, of which "
                f"{format_bytes(self.free_bytes())} are free; use fewer slots, or end what else holds GPU memory"
            ) from error

    def pin(self, row: torch.Tensor) -> bool:
        # Registering existing pages takes a tenth of the time of pin_memory=True (0.23 s against 2.4 s for 4 GiB on
        # an H200 host) and does not round sizes up. A helper thread calls this.
        with self.as_current():
            code = torch.cuda.cudart().cudaHostRegister(row.data_ptr(), row.nbytes, 0)
        if int(code) != 0:
            _forget_error(self.torch_device)
            raise NotEnoughMemory(
                f"the system does not let {format_bytes(row.nbytes)} of host memory be pinned for the GPU's copies "
                f"(cudaHostRegister: {code}). Raise the limit of locked memory (`ulimit -l unlimited`, docker's "
                f"--ulimit memlock=-1; under WSL more memory= in .wslconfig), free memory, take a smaller model, or "
                f"use device='cpu', which pins nothing"
            )
        return True

    def unpin(self, row: torch.Tensor) -> None:
        if (
            self._owner != process_id()
        ):  # CUDA cannot be asked in a forked process, and the pages are its parent's
            return
        with self.as_current():  # the garbage collector may call this, in any thread
            code = torch.cuda.cudart().cudaHostUnregister(row.data_ptr())
        if int(code) == NOT_REGISTERED:
            _forget_error(self.torch_device)
            return
        assert int(code) == 0, f"cudaHostUnregister failed with {code}"

    def copy(
        self,
        pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
        after: Sequence[torch.cuda.Event],
        timed: bool,
        each: bool = True,
    ) -> tuple[torch.cuda.Event, list[torch.cuda.Event]]:
        ready = []
        try:
            # The driver's function names its stream; switching torch's would cost the host as much as a copy.
            with torch.cuda.stream(self._h2d) if self.memcpy is None else nullcontext():
                for mark in after:
                    self._h2d.wait_event(mark)
                start = self._record(self._h2d, timed)
                for slot, row in pairs:
                    for _ in range(self._repeats):
                        self._issue(slot, row)
                    if each:
                        ready.append(self._record(self._h2d, timed))
                if not each:
                    ready = [self._record(self._h2d, timed)] * len(pairs)
        except RuntimeError as error:
            raise TransferFailed(f"copying {len(pairs)} experts to the GPU failed: {error}") from error
        return start, ready

    def _issue(self, slot: torch.Tensor, row: torch.Tensor) -> None:
        if self.memcpy is None:
            slot.copy_(row, non_blocking=True)
            return
        assert slot.is_contiguous() and row.is_contiguous() and slot.nbytes == row.nbytes
        self.memcpy(slot.data_ptr(), row.data_ptr(), row.nbytes, self._h2d.cuda_stream)

    def _record(self, stream: torch.cuda.Stream, timed: bool) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timed)
        event.record(stream)
        return event

    def mark(self, timed: bool) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=timed)
        event.record()  # on the current stream; naming it would cost a look-up in Python
        return event

    def graph_mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, external=True)
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        # The compute stream waits, not the host: a host wait here would stop the next layer's launches too.
        mark.wait()

    def is_done(self, mark: torch.cuda.Event) -> bool:
        try:
            return bool(mark.query())
        except RuntimeError as error:
            raise TransferFailed(f"a copy to the GPU, or work beside it, failed: {error}") from error

    def elapsed_us(self, start: torch.cuda.Event | DriverMark, end: torch.cuda.Event | DriverMark) -> float:
        if isinstance(start, DriverMark) or isinstance(end, DriverMark):
            return elapsed_us(start.cuda_event, end.cuda_event)
        return float(start.elapsed_time(end)) * 1e3

    def read(self, tensor: torch.Tensor) -> NDArray[Any]:
        return tensor.cpu().numpy()

    def send(
        self,
        pairs: Iterable[tuple[torch.Tensor, torch.Tensor]],
        last: tuple[torch.Tensor, torch.Tensor] | None,
        begin: bool = False,
        end: bool = False,
        timed: bool = False,
    ) -> tuple[torch.cuda.Event | None, torch.cuda.Event | None]:
        try:
            with torch.cuda.stream(self._h2d) if self.memcpy is None else nullcontext():
                before = self._record(self._h2d, timed) if begin else None
                for target, source in chain(pairs, [] if last is None else [last]):
                    self._issue(target, source)
                return before, self._record(self._h2d, timed) if end else None
        except RuntimeError as error:
            raise TransferFailed(f"copying experts to the GPU failed: {error}") from error

    def link_functions(self) -> LinkFunctions:
        return link_functions(self._h2d.cuda_stream, self._repeats)

    def open_events(self, timed: bool) -> DriverEvents:
        return DriverEvents()

    def capture(
        self, run: Callable[[], torch.Tensor], shares_memory: bool = False
    ) -> tuple[Callable[[], None], torch.Tensor]:
        self.synchronize()
        return capture_graph(self.torch_device, run, self._shared if shares_memory else None)

    def clock(self, stamp: Callable[[], torch.Tensor]) -> tuple[torch.cuda.Event, int]:
        self.synchronize()
        # A busy GPU comes to both when both are queued. An idle one passes each when it comes, and Python takes 80 to
        # 170 us (H200) for the launch, tens for the mark: by so much copies were drawn late or early.
        torch.cuda._sleep(BUSY_CYCLES)
        now = stamp()
        return self.mark(timed=True), int(now)

    def is_idle(self) -> bool:
        return bool(torch.cuda.current_stream(self.torch_device).query())

    def synchronize(self) -> None:
        self._await_idle()
        torch.cuda.synchronize(self.torch_device)  # other streams, if there are any

    def recover(self) -> None:
        self.synchronize()

    def close(self) -> None:
        self.synchronize()

    def _await_idle(self) -> None:
        """Both lanes, so that Ctrl-C is heard and a kernel that waits for a message nobody sends is an error."""
        ends = [
            self._record(stream, False)
            for stream in (self._h2d, torch.cuda.current_stream(self.torch_device))
        ]
        begin = time.monotonic()
        while not all(end.query() for end in ends):
            waited_s = time.monotonic() - begin
            if waited_s > MOST_GPU_S:
                raise WaitTimedOut(
                    f"the GPU was not done with copies and kernels within {MOST_GPU_S:.0f} s; restart this process"
                )
            if waited_s > HOT_S:
                time.sleep(HOT_S / 10)


#: torch captures one graph at a time in a process, whichever engine's.
_one_capture = threading.Lock()


def capture_graph(
    device: torch.device, run: Callable[[], Returned], pool: Any = None
) -> tuple[Callable[[], None], Returned]:
    """Take down the launches of `run` without running them; returns how to replay them, and `run`'s result.

    Other threads may use the GPU meanwhile. Call it with the GPU as the current one. `pool`: memory that graphs share,
    as torch hands it out.

    Raises:
        RuntimeError: a launch cannot be captured.
    """
    with _one_capture:
        graph, stream = torch.cuda.CUDAGraph(), _capture_stream(device)
        former = torch.cuda.current_stream(device)
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                result = run()
        except BaseException:
            despite_interrupts(partial(_leave_capture, graph, stream, former))
            raise
    return graph.replay, result


def _leave_capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, former: torch.cuda.Stream) -> None:
    """torch's own way out keeps the stream of a capture that failed as the thread's current one, and is Python:
    interrupted on the way in or out, it leaves the capture open, and nothing runs on that stream any more.
    """
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError):  # of what is wrong with the capture; that is raised already
        if torch.cuda.is_current_stream_capturing():
            graph.capture_end()
    torch.cuda.set_stream(former)


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Of this GPU: torch's own one is of the GPU that was the first to capture in this process. One for all graphs:
    cuBLAS keeps a workspace for each stream that it was called on, tens of MiB.
    """
    return torch.cuda.Stream(device)


def _forget_error(device: torch.device) -> None:
    """The check of the next launch takes the error that the runtime remembers of a call that failed."""
    with suppress(RuntimeError):
        torch.zeros(1, dtype=torch.float32, device=device)
