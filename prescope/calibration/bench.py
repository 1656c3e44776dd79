"""The measurements themselves: one sample of any circumstances, on memory held for experts of one size."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..device import Device, Mark
from ..kernels import make_kernel
from ..kernels.cpu import CpuExperts, CpuLayer
from ..profile import Circumstances
from .busy import copying, repeating
from .experts import ExpertForm, LaneExperts, TorchExperts, host_us, random_rows
from .graphs import GraphLane
from .handover import handover_us
from .plan import Sizes

if TYPE_CHECKING:
    from ..kernels.round_trip import Ping

#: Bytes and time of one train of copies at most, and how many copies it has.
TRAIN_BYTES, TRAIN_US, TRAIN_COPIES = 256 << 20, 40_000.0, 64
#: Bytes of one copy while the link is kept busy, and of a batch of them.
LOAD_COPY_BYTES, LOAD_BATCH_BYTES = 4 << 20, 64 << 20
#: The same in time, where the link is slow.
LOAD_BATCH_US = 2_000.0
#: Products of this size in front of a train, so that all of it is queued before the first copy starts.
HOLD_DIM, HOLD_PRODUCTS = 4096, 6
ENQUEUED, ENQUEUED_BYTES = 8, 64 << 10
#: Copies each in a batch of its own; the link takes longer for one (H200: 77 us) than Python to hand it over.
BATCHES, BATCH_BYTES = 32, 4 << 20
#: A point takes some time.
LEAST_BATCH_US = 0.01

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


class Bench:
    """Rows in host memory, slots on the device and the lanes that compute with them, for experts of one size.

    Args:
        device: open; not closed here.
        form: of the experts.
        sizes: how many.
        implementation: of `CpuExperts`.
        link_gb_per_s: of an emulated link; None for a real one.
    """

    def __init__(
        self, device: Device, form: ExpertForm, sizes: Sizes, implementation: str, link_gb_per_s: float | None
    ) -> None:
        self._device, self.sizes, self._link_gb_per_s = device, sizes, link_gb_per_s
        self.host = random_rows(form, sizes.rows, device)
        try:
            self.pool = device.allocate_slots(sizes.rows, form.layout.row_bytes)
            self.pool.copy_(self.host.rows)
            layer = CpuLayer(self.host.rows, form.layout, form.spec)
            self.cpu = CpuExperts([layer], implementation=implementation)
        except BaseException:
            self.host.close()
            raise
        self._cpu_lane = LaneExperts(form, self.host, self.cpu)
        on_gpu = device.captures_steps
        kernel, _ = make_kernel("auto", device.kind, form.dtype, [form.layout])
        in_graphs = on_gpu and kernel.name == "triton"
        self._graphs = GraphLane(form, self.host, self.pool, device) if in_graphs else None
        self._torch_lane = None if in_graphs else TorchExperts(form, self.pool, device)
        self._ping = self._make_ping() if on_gpu else None
        hold_dim = HOLD_DIM if on_gpu else 0
        self._hold = torch.zeros((hold_dim, hold_dim), dtype=torch.bfloat16, device=device.torch_device)

    def _make_ping(self) -> "Ping":
        # Here and not above: Triton exists only where a GPU is.
        from ..kernels.round_trip import Ping

        return Ping(self._device)

    def close(self) -> None:
        """End the threads, wait for the lanes, give the memory back."""
        self.cpu.close()
        self._device.recover()
        self.host.close()
        self.pool = torch.empty(0, dtype=torch.uint8, device="cpu")

    # -- one sample --------------------------------------------------------------------------------------------

    def sample(self, of: Circumstances) -> float:
        """One measured time under these circumstances, microseconds; `load` keeps the other lane busy."""
        match of.kind:
            case "h2d":
                return self._train_us(of.nbytes)
            case "cpu":
                return host_us(partial(self._cpu_lane.run, of.experts, of.tokens))
            case "gpu" if self._graphs is not None:
                return self._graphs.us(of.experts, of.tokens)
            case "gpu" if self._torch_lane is not None:
                return host_us(partial(self._torch_lane.run, of.experts, of.tokens))
            case "dram":
                words = self.host.rows.view(-1)[: of.nbytes].view(torch.float32)
                return host_us(words.sum)
            case "batch":
                return self._batch_us()
            case "enqueue":
                return self._enqueue_us()
            case "handover":
                return self._handover_us(of.busy)
            case "read":
                ids = torch.arange(8, device=self._device.torch_device)
                self._device.synchronize()
                return host_us(lambda: self._device.read(ids))
            case "message" if self._ping is not None:
                return self._ping.round_trip_us()
        raise AssertionError(f"{of} cannot be measured on {self._device.kind}")

    def load(self, of: Circumstances) -> AbstractContextManager[None]:
        """Keep the other lane busy inside the block, if the circumstances say so."""
        if not of.busy or of.kind == "handover":  # which has its own: a second thread would be in its way
            return nullcontext()
        if of.kind == "h2d":
            return repeating(partial(self._cpu_lane.run, self.sizes.together, 1))
        batch_bytes = min(LOAD_BATCH_BYTES, self._bytes_in(LOAD_BATCH_US))
        size = min(LOAD_COPY_BYTES, batch_bytes, self.host.rows.nbytes)
        return repeating(copying(self._device, self._copies(size, max(1, batch_bytes // size))))

    def settle(self) -> None:
        """Wait for what a load has left on the wire."""
        self._device.synchronize()

    # -- copies ------------------------------------------------------------------------------------------------

    def _bytes_in(self, us: float) -> int:
        return 1 << 60 if self._link_gb_per_s is None else max(4096, int(us * self._link_gb_per_s * 1e3))

    def _copies(self, nbytes: int, num: int) -> Pairs:
        """`num` (slot, row) views of `nbytes` each, one behind the other, over and over."""
        to, of = self.pool.view(-1), self.host.rows.view(-1)
        assert nbytes <= len(of), f"copies of {nbytes} bytes from rows of {len(of)}"
        places = len(of) // nbytes
        starts = [(i % places) * nbytes for i in range(num)]
        return [(to[start : start + nbytes], of[start : start + nbytes]) for start in starts]

    def _train_us(self, nbytes: int) -> float:
        most = min(TRAIN_BYTES, self._bytes_in(TRAIN_US)) // nbytes
        pairs = self._copies(nbytes, max(2, min(TRAIN_COPIES, most)))
        start, ready = self._device.copy(pairs, self._held(), timed=True, each=False)
        self._device.synchronize()
        return self._device.elapsed_us(start, ready[-1]) / len(pairs)

    def _batch_us(self) -> float:
        """Batches of one copy, as a layer's or a prefetch's, against as many copies in one train."""
        pairs = self._copies(min(BATCH_BYTES, self.host.rows.nbytes), BATCHES)
        number, device = self._copies(4, 1)[0], self._device
        marks = [device.send([pair], number, begin=True, end=True, timed=True) for pair in pairs]
        start, ready = device.copy(pairs, [], timed=True, each=False)
        device.synchronize()
        first, last = marks[0][0], marks[-1][1]
        assert first is not None and last is not None
        apart_us = device.elapsed_us(first, last) - device.elapsed_us(start, ready[-1])
        return max(LEAST_BATCH_US, apart_us / BATCHES)

    def _held(self) -> Sequence[Mark]:
        if not self._hold.numel():
            return []
        for _ in range(HOLD_PRODUCTS):
            torch.mm(self._hold, self._hold)
        return [self._device.mark(False)]

    def _enqueue_us(self) -> float:
        pairs = self._copies(min(ENQUEUED_BYTES, self.host.rows.nbytes), ENQUEUED)
        self._device.synchronize()
        us = host_us(lambda: self._device.copy(pairs, [], timed=False, each=False)) / len(pairs)
        self._device.synchronize()
        return us

    def _handover_us(self, is_busy: bool) -> float:
        if is_busy:
            pairs = self._copies(min(LOAD_COPY_BYTES, self.host.rows.nbytes), TRAIN_COPIES)
            self._device.copy(pairs, [], timed=False, each=False)
        nbytes = min(ENQUEUED_BYTES, self.host.rows.nbytes)
        return handover_us(self._device, self.pool, self.host.rows, nbytes, is_busy)
