"""How experts should travel: streams, pieces, batches, a bound on what is ahead of a miss, and the host's cost of it.

    python benchmarks/async_io.py --out async_io.json
    python benchmarks/async_io.py --device cpu            # tries the script on an emulated link, tiny sizes

Needs a GPU and torch; no model. Every figure is the median of --repeats with its spread (max - min) / median. Prints
markdown tables last and writes JSON after every cell, so that an interrupted run keeps what it has.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _written import write_cells

from prescope.cache.policies import LRU
from prescope.cache.prefetch import most_on_wire
from prescope.cache.residency import NOTHING, ResidencyTable
from prescope.core.machine import machine_facts
from prescope.core.types import MoEShape, Reason
from prescope.device import CudaDevice, Device, EmulatedLinkDevice
from prescope.device.cuda import Copies
from prescope.errors import UnsupportedOption
from prescope.weights.host_pool import HostLayer, HostPool
from prescope.weights.layout import row_layout
from prescope.weights.loader import Loader
from prescope.weights.pages import HostPages

MIB = 1 << 20
SIZES_MIB = [0.25, 1, 4, 9.4, 12.6, 100, 336]
TRIAL_SIZES_MIB = [0.25, 1]
TRIAL_LINK_GB_PER_S = 0.2
#: Bytes moved per timed run: long enough that the first copy's latency is below 1 % at 55 GB/s.
RUN_BYTES = 1 << 30
MOST_COPIES = 256
LAYOUTS = [("whole", 1, 1), ("whole", 1, 3), ("gate/up/down", 3, 1), ("gate/up/down", 3, 3)]


class Report:
    """Cells so far, written after each one."""

    def __init__(self, args: argparse.Namespace, facts: dict[str, Any]) -> None:
        self.args, self.facts = args, facts
        self.cells: list[dict[str, Any]] = []

    def add(self, table: str, unit: str, runs: list[float], **keys: Any) -> None:
        median = statistics.median(runs)
        cell = {
            "table": table, **keys, "median": median, "unit": unit,
            "spread": (max(runs) - min(runs)) / median if median else 0.0, "runs": runs,
        }  # fmt: skip
        self.cells.append(cell)
        print(f"# {table} {keys}: {median:.4g} {unit} +- {cell['spread']:.0%}", flush=True)
        write_cells(self.args, self.facts, self.cells)

    def note(self, table: str, why: str, **keys: Any) -> None:
        self.cells.append({"table": table, **keys, "note": why})
        print(f"# {table} {keys}: {why}", flush=True)
        write_cells(self.args, self.facts, self.cells)

    def tables(self) -> str:
        lines = []
        for table in dict.fromkeys(cell["table"] for cell in self.cells):
            cells = [cell for cell in self.cells if cell["table"] == table]
            keys = [
                key for key in cells[0] if key not in ("table", "median", "unit", "spread", "runs", "note")
            ]
            lines += ["", f"**{table}**", "", f"| {' | '.join([*keys, 'median', 'spread'])} |"]
            lines.append("|" + "---|" * (len(keys) + 2))
            for cell in cells:
                value = cell.get("note") or f"{cell['median']:.3g} {cell['unit']}"
                spread = f"{cell['spread']:.0%}" if "spread" in cell else ""
                lines.append(f"| {' | '.join([*(str(cell.get(key, '')) for key in keys), value, spread])} |")
        return "\n".join(lines)


def main() -> None:
    """Run all parts, print the tables last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="JSON file")
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    facts = {
        **machine_facts(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU standing in for the GPU",
        "link": "measured"
        if on_gpu
        else f"EMULATED, {TRIAL_LINK_GB_PER_S} GB/s: no result, a trial of the script",
    }
    print(f"# {facts['device']}, link {facts['link']}", flush=True)
    report = Report(args, facts)
    started = time.perf_counter()
    try:
        if on_gpu:
            with Link(RUN_BYTES) as link:
                streams_and_pieces(link, report)
                rate_beside_matmul(link, report)
        backlog_latency(on_gpu, report)
        loader_cost(on_gpu, report)
        if on_gpu:
            with Link(MIB) as link:
                enqueue_cost(link, report)
    except KeyboardInterrupt:
        print("# interrupted: what follows is what there is")
    print(f"# {time.perf_counter() - started:.0f} s on {facts['device']}, link {facts['link']}")
    print(report.tables())


# -- raw copies, CUDA only ---------------------------------------------------------------------------------------


class Link:
    """Pinned host memory and GPU memory of the same size, and three streams."""

    def __init__(self, nbytes: int) -> None:
        self.device = CudaDevice()
        self.pages = HostPages(nbytes)
        self.pages.touch()
        self.host = self.pages.data
        self.device.pin(self.host)
        self.gpu = torch.empty(nbytes, dtype=torch.uint8, device="cuda")
        self.streams = [torch.cuda.Stream() for _ in range(3)]

    def __enter__(self) -> "Link":
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        self.device.unpin(self.host)
        del self.host, self.gpu
        self.pages.close()

    def pieces(self, row_bytes: int, num_pieces: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(GPU, host) views of successive rows, each cut into `num_pieces`."""
        num_rows = max(1, min(MOST_COPIES, RUN_BYTES // row_bytes))
        step = -(-row_bytes // num_pieces)
        views = []
        for row in range(num_rows):
            for start in range(row * row_bytes, (row + 1) * row_bytes, step):
                stop = min(start + step, (row + 1) * row_bytes)
                views.append((self.gpu[start:stop], self.host[start:stop]))
        return views

    def time_us(self, views: list[tuple[torch.Tensor, torch.Tensor]], num_streams: int) -> float:
        """From the first copy's start to the last one's end on all streams, by CUDA events."""
        start = torch.cuda.Event(enable_timing=True)
        start.record(self.streams[0])
        for stream in self.streams[1:num_streams]:
            stream.wait_event(start)
        for i, (to, of) in enumerate(views):
            with torch.cuda.stream(self.streams[i % num_streams]):
                to.copy_(of, non_blocking=True)
        for stream in self.streams[1:num_streams]:
            done = torch.cuda.Event()
            done.record(stream)
            self.streams[0].wait_event(done)
        end = torch.cuda.Event(enable_timing=True)
        end.record(self.streams[0])
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def streams_and_pieces(link: Link, report: Report) -> None:
    """GB/s of one stream against three, whole experts against three pieces."""
    for size_mib in SIZES_MIB:
        cells = {}
        for name, num_pieces, num_streams in LAYOUTS:
            views = link.pieces(int(size_mib * MIB), num_pieces)
            cells[name, num_streams] = (views, num_streams, [])
            link.time_us(views, num_streams)  # warm-up
        for _ in range(report.args.repeats):  # alternating, so that a change of the machine hits all alike
            for views, num_streams, runs in cells.values():
                nbytes = sum(of.nbytes for _, of in views)
                runs.append(nbytes / link.time_us(views, num_streams) / 1e3)
        for (name, num_streams), (_, _, runs) in cells.items():
            report.add("streams and pieces", "GB/s", runs, row_mib=size_mib, copies=name, streams=num_streams)


def rate_beside_matmul(link: Link, report: Report) -> None:
    """Whether the link keeps its rate while the GPU computes."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(a)
    views = link.pieces(int(12.6 * MIB), 1)
    nbytes = sum(of.nbytes for _, of in views)
    for busy in (False, True):
        runs = []
        for _ in range(report.args.repeats + 1):
            if busy:  # 40 products take some 60 ms, the copies 20
                for _ in range(40):
                    torch.mm(a, a, out=out)
            runs.append(nbytes / link.time_us(views, 1) / 1e3)
            torch.cuda.synchronize()
        report.add(
            "link beside compute", "GB/s", runs[1:], row_mib=12.6, matmul="running" if busy else "none"
        )


def enqueue_cost(link: Link, report: Report) -> None:
    """Host time of enqueueing one copy of 4 KiB: views, copy_, an event, and the driver's function directly."""
    to, of, stream = link.gpu[:4096], link.host[:4096], link.streams[0]
    rows, slots = link.host[: 256 * 4096].view(256, 4096), link.gpu[: 256 * 4096].view(256, 4096)

    def make_and_copy(i: int) -> None:
        slots[i, :4096].copy_(rows[i], non_blocking=True)

    def copy(i: int) -> None:
        to.copy_(of, non_blocking=True)

    def event(i: int) -> None:
        torch.cuda.Event(enable_timing=False).record(stream)

    ways: dict[str, Callable[[int], None]] = {
        "torch copy_, views made": make_and_copy,
        "torch copy_, views kept": copy,
        "event made and recorded": event,
    }
    ways |= _direct_ways(link, report)
    for name, way in ways.items():
        runs = []
        for _ in range(report.args.repeats):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                started = time.perf_counter()
                for i in range(200):  # fewer than the driver queues before it blocks
                    way(i)
                runs.append((time.perf_counter() - started) / 200 * 1e6)
        report.add("host cost of one enqueue", "us", runs, what=name)


def _direct_ways(link: Link, report: Report) -> dict[str, Callable[[int], None]]:
    """cudaMemcpyAsync without torch: the driver by ctypes, and cuda-bindings where it is installed."""
    to, of, stream = link.gpu.data_ptr(), link.host.data_ptr(), link.streams[0].cuda_stream
    ways: dict[str, Callable[[int], None]] = {}
    memcpy = CudaDevice(copies="driver").memcpy
    assert memcpy is not None
    ways["cuMemcpyHtoDAsync by ctypes"] = lambda i: memcpy(to, of, 4096, stream)
    link.gpu[:4096].zero_()
    link.host[:4096].fill_(7)
    memcpy(to, of, 4096, stream)
    torch.cuda.synchronize()
    assert bool((link.gpu[:4096] == 7).all()), "the driver's copy moved other bytes"
    try:
        from cuda.bindings import runtime
    except ImportError as error:
        report.note("host cost of one enqueue", f"not installed ({error})", what="cuda-bindings")
        return ways
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    ways["cudaMemcpyAsync by cuda-bindings"] = lambda i: runtime.cudaMemcpyAsync(to, of, 4096, kind, stream)
    return ways


# -- through prescope's loader, on the GPU or the emulated link ----------------------------------------------------


class Bench:
    """A loader over rows of one size; two layers, slots enough that every prefetch may be on the wire."""

    def __init__(self, device: Device, row_bytes: int, num_experts: int) -> None:
        self.device = device
        self.shape = MoEShape(num_layers=2, num_experts=num_experts, top_k=1, row_bytes=row_bytes)
        weights = {"w": torch.empty(num_experts, row_bytes, dtype=torch.uint8)}
        self.host = HostPool([])
        for layer in range(2):
            weights["w"].fill_(layer + 1)
            self.host.layers.append(HostLayer(row_layout(weights), num_experts, device))
            self.host.layers[-1].fill(weights)
        self.open(num_experts)

    def open(self, most: int) -> None:
        """A fresh loader that lets `most` prefetches onto the link."""
        num_slots = 4 * self.shape.num_experts
        row_bytes = self.host.layers[0].layout.row_bytes
        self.table = ResidencyTable(self.shape, num_slots, LRU(self.shape))
        self.loader = Loader(self.device, self.host, self.table, row_bytes)
        self.loader.most_on_wire = most

    def reset(self) -> None:
        """Idle, and every slot free."""
        self.device.synchronize()
        self.table.clear()
        self.loader.clear()

    def close(self) -> None:
        """Give slots and rows back."""
        self.device.synchronize()
        self.loader.close()
        self.host.close()


def backlog_latency(on_gpu: bool, report: Report) -> None:
    """One miss behind a backlog of prefetches: all given to the stream at once, or held on the host."""
    for size_mib in [1, 9.4, 12.6, 100] if on_gpu else TRIAL_SIZES_MIB:
        num_rows = max(2, min(64, int((800 if on_gpu else 6) / size_mib)))
        device: Device = CudaDevice() if on_gpu else EmulatedLinkDevice(TRIAL_LINK_GB_PER_S)
        bench = Bench(device, int(size_mib * MIB) // 256 * 256, num_rows)
        bounds = {"no backlog": 0, "all on the stream": num_rows, "one on the link": 1}
        bounds["as the engine has it"] = most_on_wire(bench.shape.row_bytes, 4 * num_rows)
        for queue, bound in bounds.items():
            bench.open(bound)
            runs = []
            for _ in range(report.args.repeats + 1):
                bench.reset()
                if bound:
                    bench.loader.hold(np.arange(num_rows), NOTHING, Reason.PREFETCH, timed=False)
                runs.append(_demand_us(bench))
            keys = {"row_mib": size_mib, "backlog_rows": num_rows if bound else 0, "queue": queue}
            report.add("one miss behind a backlog", "us", runs[1:], **keys)
        bench.close()
        device.close()


def _demand_us(bench: Bench) -> float:
    """From the decision to copy one expert to its bytes being there, by the host's clock."""
    started = time.perf_counter()
    expert = np.asarray([0])
    slots = bench.table.take(1, expert)
    (transfer,) = bench.loader.load(1, expert, slots, Reason.ON_DEMAND, timed=True)
    while not bench.device.is_done(transfer.end):
        time.sleep(0)  # lets the emulated link's thread run
    return (time.perf_counter() - started) * 1e6


def loader_cost(on_gpu: bool, report: Report) -> None:
    """Host time per expert of `Loader.load` for a layer's misses, by way of copying."""
    ways: list[Copies] = ["torch", "driver"] if on_gpu else ["torch"]
    for way in ways:
        try:
            device: Device = CudaDevice(copies=way) if on_gpu else EmulatedLinkDevice(1000.0)
        except UnsupportedOption as error:
            report.note("host cost of Loader.load per expert", str(error), copies=way)
            continue
        bench = Bench(device, 64 * 1024, 64)
        for timed in (False, True):
            for num in (1, 4, 8):
                runs = []
                for _ in range(report.args.repeats + 1):
                    elapsed = 0.0
                    for repeat in range(20):
                        bench.reset()
                        experts = np.arange(num) * 2 + repeat % 2  # apart, so that none are joined
                        slots = bench.table.take(0, experts)
                        started = time.perf_counter()
                        bench.loader.load(0, experts, slots, Reason.ON_DEMAND, timed)
                        elapsed += time.perf_counter() - started
                    runs.append(elapsed / 20 / num * 1e6)
                report.add(
                    "host cost of Loader.load per expert",
                    "us",
                    runs[1:],
                    copies=way,
                    experts=num,
                    timed=timed,
                )
        for layer in range(2 if on_gpu else 0):
            bench.reset()
            slots = bench.table.take(layer, np.arange(64))
            bench.loader.load(layer, np.arange(64), slots, Reason.ON_DEMAND, False)
            bench.device.synchronize()
            assert bool((bench.loader.pool[slots] == layer + 1).all()), f"{way}: other bytes in the slots"
        bench.close()
        device.close()


if __name__ == "__main__":
    main()
