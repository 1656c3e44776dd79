"""The CPU lane: GB/s of weights read by tokens per expert, alone and beside a busy link; and what it was chosen over.

    python benchmarks/cpu_experts.py --out cpu_experts.json                # 16 cores, a GPU; two minutes
    python benchmarks/cpu_experts.py --threads 2 --gib 1 --parts dram lane # anywhere

Experts lie in pinned rows, four GiB of them by default, and each call takes the next ones: no cache holds them. GB/s
is bytes of the experts computed over the time from `submit` to the end of `wait`, medians. With the link busy, copies
of 64 MiB to the GPU run in a loop. DRAM: the fastest of several plain reads by the same number of threads. Every kind
of cell is compared with a product in float32 first. Random weights; speed does not depend on them.
"""

import argparse
import ctypes
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import cpu_candidates as candidates
import numpy as np
import torch
from _written import write_cells

from prescope.core.machine import machine_facts
from prescope.kernels import ExpertsSpec
from prescope.kernels.cpu import CpuLayer, ExpertBatch, default_threads, physical_cores
from prescope.kernels.cpu.base import CpuLane
from prescope.kernels.cpu.build import load
from prescope.kernels.cpu.native import NativeLane
from prescope.kernels.cpu.with_torch import TorchLane
from prescope.weights.layout import row_layout
from prescope.weights.pages import HostPages, copy_rows

LINK_BYTES = 64 << 20
#: D, F and the most experts of one call.
SHAPES = {"qwen3-30b-a3b": (2048, 768, 8), "olmoe-1b-7b": (2048, 1024, 8), "mixtral-8x7b": (4096, 14336, 2)}
TOKENS = (1, 2, 4, 8, 16, 32, 64)
EXPERTS = (1, 2, 4, 8)
#: Constants of kernel.c that were tried beside its own.
VARIANTS = [
    ("AHEAD_BYTES=512",), ("AHEAD_BYTES=1024",), ("AHEAD_BYTES=4096",), ("MOST_ITEM_BYTES=65536",),
    ("MOST_ITEM_BYTES=262144",), ("SHARES=3",), ("SHARES=12",), ("TILE_PAIRS=1000000",), ("TILE_PAIRS=1",),
]  # fmt: skip
PARTS = ("dram", "lane", "fallback", "latency", "threads", "variants", "operators", "numba", "inductor")


class Memory(NamedTuple):
    """Pinned bytes that all shapes share as their rows."""

    data: torch.Tensor
    link: "Link | None"


def main() -> None:
    """Run the parts in the order given, print the tables, write the JSON after each part."""
    args = _arguments()
    started = time.perf_counter()
    memory = make_memory(int(args.gib * (1 << 30)))
    facts = {
        **machine_facts(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
        "physical_cores": physical_cores(),
        "flags": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in _cpu_flags()],
        "link_alone_gb_per_s": link_alone(memory.link) if memory.link else None,
        "weights": "random",
        "tiles": NativeLane([make_layer(memory.data, 64, 64)], 1).has_tiles,
    }
    print(f"# {facts}", flush=True)
    bench = Bench(memory, args.threads or default_threads(), args.cell_seconds)
    for part in args.parts:
        if time.perf_counter() - started > args.seconds:
            print(f"# no time left for {part}")
            continue
        getattr(bench, part)()
        print(f"# {part} done after {time.perf_counter() - started:.0f} s", flush=True)
        write_cells(args, facts, bench.cells)
    if memory.link:
        memory.link.close()


class Bench:
    """Measures cells and keeps them."""

    def __init__(self, memory: Memory, threads: int, cell_seconds: float) -> None:
        self.memory = memory
        self.num_threads = threads
        self.cell_seconds = cell_seconds
        self.cells: list[dict[str, Any]] = []
        self._tensors: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        # OpenMP's threads spin for some ms after an operator of torch (32768 elements are enough to wake them), in the
        # lane's way: one expert took 7 ms instead of 0.2.
        torch.set_num_threads(1)

    # -- parts ---------------------------------------------------------------------------------------------------

    def dram(self) -> None:
        """Plain reads, alone and beside the link."""
        for threads in sorted({4, 8, self.num_threads, physical_cores()}):
            for busy in self.links():
                with self.link(busy) as rate:
                    best = max(
                        read_rate(self.memory.data, threads, *way) for way in product((1, 4), (0, 1024))
                    )
                self.keep(what="read", threads=threads, link=busy, gb_per_s=best, link_gb_per_s=rate[0])

    def lane(self) -> None:
        """The compiled lane at its default threads: every shape, tokens and experts."""
        for shape in SHAPES:
            self.lane_cells("native", shape, self.num_threads, TOKENS, EXPERTS)

    def threads(self) -> None:
        """More and fewer threads."""
        for threads in sorted({4, 8, 12, 14, 16, physical_cores()}):
            for shape, tokens in product(SHAPES, (1, 8)):
                self.lane_cells("native", shape, threads, (tokens,), (SHAPES[shape][2],))

    def fallback(self) -> None:
        """The lane without a compiler."""
        for shape in SHAPES:
            self.lane_cells("torch", shape, self.num_threads, TOKENS, (SHAPES[shape][2],))

    def operators(self) -> None:
        """Torch's operators by torch's own threads."""
        for shape, tokens in product(SHAPES, (1, 4, 16, 64)):
            self.candidate("linear", candidates.linear, shape, tokens)
        self.candidate(
            "batched", candidates.batched, "qwen3-30b-a3b", 1
        )  # bmm copies what it is given strided

    def latency(self) -> None:
        """One expert after a pause, threads told to stay awake or not; of 0.2 MB it is what a submission costs."""
        for d, f in ((64, 512), SHAPES["olmoe-1b-7b"][:2]):
            layer = make_layer(self.memory.data, d, f)
            for awake, pause in product((False, True), (0.0, 3e-4, 1e-3, 3e-3)):
                lane = NativeLane([layer], self.num_threads)
                lane.stay_awake(awake)
                times = [self.call(lane, layer, 1, 1, i, pause) for i in range(120)][20:]
                lane.close()
                whole = sorted(total for _, total in times)
                self.keep(
                    what=f"one expert, threads {'told to stay awake' if awake else 'as they are'}",
                    threads=self.num_threads,
                    nbytes=layer.weight_bytes(),
                    pause_us=pause * 1e6,
                    submit_us=statistics.median(submit for submit, _ in times) * 1e6,
                    us=statistics.median(whole) * 1e6,
                    us_p90=whole[len(whole) * 9 // 10] * 1e6,
                )

    def variants(self) -> None:
        """Other constants in kernel.c."""
        for defines in [(), *VARIANTS]:
            for shape in ("qwen3-30b-a3b", "mixtral-8x7b"):
                self.lane_cells(
                    "native",
                    shape,
                    self.num_threads,
                    (1, 4, 8, 16, 64),
                    (SHAPES[shape][2],),
                    defines,
                    (False,),
                )

    def numba(self) -> None:
        """The same product by numba."""
        experts = candidates.with_numba(self.num_threads)
        if experts is not None:
            for shape in SHAPES:
                self.candidate("numba", experts, shape, 1)

    def inductor(self) -> None:
        """The same product by torch.compile's C++."""
        for tokens in (1, 4):
            self.candidate("inductor", candidates.inductor(), "qwen3-30b-a3b", tokens)

    # -- cells ---------------------------------------------------------------------------------------------------

    def lane_cells(
        self,
        kind: str,
        shape: str,
        threads: int,
        tokens: tuple[int, ...],
        experts: tuple[int, ...],
        other: tuple[str, ...] = (),
        links: tuple[bool, ...] | None = None,
    ) -> None:
        """All cells of one lane and shape; each kind of call is checked once. `other` constants than the lane's own."""
        layer = make_layer(self.memory.data, *SHAPES[shape][:2])
        lane: CpuLane = (
            NativeLane([layer], threads, defines=other) if kind == "native" else TorchLane([layer], threads)
        )
        for n, num in product(tokens, [e for e in experts if e <= SHAPES[shape][2]]):
            error = check(lane, layer, n) if num == experts[-1] or num == SHAPES[shape][2] else None
            for busy in links or self.links():
                with self.link(busy) as rate:
                    times = self.repeat(lambda i, n=n, num=num: self.call(lane, layer, n, num, i)[1])
                self.keep(
                    what=" ".join([kind, *other]), shape=shape, threads=threads, tokens=n, experts=num, link=busy,
                    **self.rates(times, num * layer.weight_bytes()), link_gb_per_s=rate[0], error=error,
                )  # fmt: skip
        lane.close()

    def candidate(self, name: str, compute: candidates.Candidate, shape: str, tokens: int) -> None:
        """A cell of another way; alone only."""
        layer = make_layer(self.memory.data, *SHAPES[shape][:2])
        num = SHAPES[shape][2]
        up, down = (layer.layout.view(layer.rows, field) for field in ("up", "down"))
        x = make_x(layer, tokens)

        torch.set_num_threads(physical_cores())

        def run(i: int) -> float:
            first = i * num % (len(up) - num + 1)
            start = time.perf_counter()
            compute(up[first : first + num], down[first : first + num], x)
            return time.perf_counter() - start

        run(0)
        times = self.repeat(run)
        self.keep(
            what=name, shape=shape, threads=torch.get_num_threads(), tokens=tokens, experts=num, link=False,
            **self.rates(times, num * layer.weight_bytes()),
        )  # fmt: skip
        torch.set_num_threads(1)

    def call(
        self, lane: CpuLane, layer: CpuLayer, tokens: int, num: int, i: int, pause: float = 0.0
    ) -> tuple[float, float]:
        """Seconds of `submit`, and until `wait` returns."""
        expert_batch = make_batch(layer, tokens, num, i)
        x, out = self.tensors(layer, tokens, num)
        start = time.perf_counter() + pause
        while time.perf_counter() < start:  # as the thread does that serves a step
            pass
        job = lane.submit(0, expert_batch, x, out, None)
        submitted = time.perf_counter()
        job.wait()
        return submitted - start, time.perf_counter() - start

    def tensors(self, layer: CpuLayer, tokens: int, num: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x and the outputs, made once: an engine has buffers of its own too, and fresh memory is faulted in."""
        key = layer.in_dim, tokens, num
        if key not in self._tensors:
            self._tensors[key] = make_x(layer, tokens), torch.zeros(num * tokens, layer.out_dim).bfloat16()
        return self._tensors[key]

    def repeat(self, run: Callable[[int], float]) -> list[float]:
        """Seconds of each run after the first two, for `cell_seconds` and at least 3."""
        times: list[float] = []
        end = time.perf_counter() + self.cell_seconds
        while len(times) < 5 or time.perf_counter() < end:
            times.append(run(len(times)))
        return times[2:]

    def rates(self, times: list[float], nbytes: int) -> dict[str, Any]:
        """Median time and rates of the runs."""
        rates = sorted(nbytes / t / 1e9 for t in times)
        return {
            "ms": statistics.median(times) * 1e3,
            "gb_per_s": statistics.median(rates),
            "gb_per_s_p10": rates[len(rates) // 10],
            "runs": len(times),
        }

    def keep(self, **cell: Any) -> None:
        """Remember a cell and print it."""
        self.cells.append(cell)
        print(
            " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in cell.items()),
            flush=True,
        )

    def links(self) -> tuple[bool, ...]:
        """Alone, and beside the link where there is one."""
        return (False, True) if self.memory.link else (False,)

    @contextmanager
    def link(self, busy: bool) -> Iterator[list[float | None]]:
        """Copies to the GPU while the block runs; the list holds their GB/s afterwards."""
        rate: list[float | None] = [None]
        if not busy or self.memory.link is None:
            yield rate
            return
        with self.memory.link.running() as measured:
            yield rate
        rate[0] = measured[0]


class Link:
    """Copies of 64 MiB to the GPU in a loop, four under way, by a thread of their own."""

    def __init__(self) -> None:
        self.pages = HostPages(16 * LINK_BYTES)
        self.pages.touch()
        _pin(self.pages.data)
        self.target = torch.empty(LINK_BYTES, dtype=torch.uint8, device="cuda")
        self.stream = torch.cuda.Stream()

    @contextmanager
    def running(self) -> Iterator[list[float]]:
        """GB/s between the first and the last copy that ended inside the block."""
        rate: list[float] = []
        ends: list[float] = []
        stop = threading.Event()
        thread = threading.Thread(target=self._run, args=(stop, ends))
        thread.start()
        while len(ends) < 2:
            time.sleep(0.001)
        first = len(ends) - 1
        yield rate
        last = len(ends) - 1
        stop.set()
        thread.join()
        rate.append((last - first) * LINK_BYTES / max(1e-9, ends[last] - ends[first]) / 1e9)

    def _run(self, stop: threading.Event, ends: list[float]) -> None:
        sources = self.pages.data.split(LINK_BYTES)
        under_way: list[torch.cuda.Event] = []
        i = 0
        while not stop.is_set():
            while len(under_way) < 4:
                with torch.cuda.stream(self.stream):
                    self.target.copy_(sources[i % len(sources)], non_blocking=True)
                    event = torch.cuda.Event(blocking=True)
                    event.record()
                under_way.append(event)
                i += 1
            under_way.pop(0).synchronize()
            ends.append(time.perf_counter())
        self.stream.synchronize()

    def close(self) -> None:
        """Unpin."""
        torch.cuda.cudart().cudaHostUnregister(self.pages.data.data_ptr())


def link_alone(link: Link) -> float:
    """GB/s of the copies with nothing beside them."""
    with link.running() as rate:
        time.sleep(0.3)
    return rate[0]


def make_memory(nbytes: int) -> Memory:
    """Small random bfloat16 numbers, 64 MiB of them over and over."""
    pages = HostPages(nbytes)
    block = (
        (torch.randn(32 << 20, generator=torch.Generator().manual_seed(0)) / 50).bfloat16().view(torch.uint8)
    )
    num = nbytes // block.numel()
    copy_rows(pages.data[: num * block.numel()].view(num, -1), block.expand(num, -1))
    if not torch.cuda.is_available():
        return Memory(pages.data, None)
    _pin(pages.data)
    return Memory(pages.data, Link())


def make_layer(data: torch.Tensor, d: int, f: int) -> CpuLayer:
    """As many experts as the memory holds."""
    layout = row_layout(
        {
            "up": torch.empty(1, 2 * f, d, dtype=torch.bfloat16),
            "down": torch.empty(1, d, f, dtype=torch.bfloat16),
        }
    )
    num = min(512, data.numel() // layout.row_bytes)
    spec = ExpertsSpec(
        up="up", down="down", up_bias=None, down_bias=None, is_transposed=False, gate=candidates.silu_gate,
        post_norm=None,
    )  # fmt: skip
    return CpuLayer(data[: num * layout.row_bytes].view(num, layout.row_bytes), layout, spec)


def make_batch(layer: CpuLayer, tokens: int, num: int, i: int) -> ExpertBatch:
    """All tokens to each of the i-th `num` experts."""
    experts = (np.arange(num) + i * num) % layer.rows.shape[0]
    pairs = np.arange(num * tokens)
    return ExpertBatch(experts, np.arange(num + 1) * tokens, pairs % tokens, pairs)


def make_x(layer: CpuLayer, tokens: int) -> torch.Tensor:
    """Token states (T, D)."""
    return torch.randn(tokens, layer.in_dim, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def check(lane: CpuLane, layer: CpuLayer, tokens: int) -> float:
    """Relative error of one expert against products in float32, its activations rounded to bfloat16."""
    expert_batch, x = make_batch(layer, tokens, 1, 3), make_x(layer, tokens)
    out = torch.empty(tokens, layer.out_dim, dtype=torch.bfloat16)
    lane.submit(0, expert_batch, x, out, None).wait()
    expert = int(expert_batch.experts[0])
    up, down = (layer.layout.view(layer.rows, field)[expert].float() for field in ("up", "down"))
    act = candidates.silu_gate((x.float() @ up.T).bfloat16())
    want = act.float() @ down.T
    error = float(torch.linalg.norm(out.float() - want) / torch.linalg.norm(want))
    assert error < 1e-2, f"{lane.name} is wrong at {tokens} tokens: {error}"
    return error


def read_rate(data: torch.Tensor, threads: int, streams: int, ahead: int) -> float:
    """GB/s of plain reads, each thread its own part of the memory."""
    function = load(Path(__file__).with_name("dram_read.c")).read_sum
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
    function.restype = ctypes.c_uint64
    share = data.numel() // threads // 4096 * 4096
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: time.sleep(0.002), range(threads)))  # so that all threads are there
        start = time.perf_counter()
        list(pool.map(lambda t: function(data.data_ptr() + t * share, share, streams, ahead), range(threads)))
        return threads * share / (time.perf_counter() - start) / 1e9


def _pin(data: torch.Tensor) -> None:
    code = torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, 0)
    assert int(code) == 0, code


def _cpu_flags() -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--threads", type=int, help="of the lane; by default all cores but two")
    parser.add_argument("--gib", type=float, default=4.0, help="memory for experts")
    parser.add_argument("--cell-seconds", type=float, default=0.04)
    parser.add_argument("--seconds", type=float, default=110.0, help="no part is begun after that")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
