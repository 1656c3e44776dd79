"""The CPU lane with packed experts: microseconds per expert and GB/s of packed bytes, beside bf16 and plain reads.

    python benchmarks/cpu_packed.py                          # Qwen3-30B-A3B's experts, one token; a minute
    python benchmarks/cpu_packed.py --tokens 1 4 16 --out cpu_packed.json

Experts lie in a GiB each of packed and of bf16 rows and every call takes the next eight: no cache holds them. Plain
reads of as many bytes as eight packed experts, bf16 calls and packed calls alternate, so that all meet the same
neighbours; the best is what the machine gives, the median what it gave beside its load. The share is of the best plain
read by the same threads. Torch's packed products (`_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`) run with as
many threads of OpenMP. Each format is compared with its unpacked weights in float32 first.
"""

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any, NamedTuple

import torch
from _written import write_cells
from cpu_candidates import silu_gate
from cpu_experts import make_batch, make_x

from prescope.core.machine import machine_facts
from prescope.kernels import ExpertsSpec
from prescope.kernels.cpu import CpuLayer, physical_cores
from prescope.kernels.cpu.build import load
from prescope.kernels.cpu.native import NativeLane
from prescope.weights.formats import Format, Fp8, Int4, Int8, Mxfp4, Nvfp4
from prescope.weights.layout import PackedMatrix, RowLayout, pack, packed_layout, row_layout
from prescope.weights.pages import HostPages, copy_rows

#: D, F.
SHAPES = {"qwen3-30b-a3b": (2048, 768), "gpt-oss": (2880, 2880), "mixtral-8x7b": (4096, 14336)}
FORMATS: dict[str, Format] = {
    "int8": Int8(),
    "fp8 128x128": Fp8(128, 128),
    "mxfp4": Mxfp4(),
    "int4 g128": Int4(128),
    "int4 g32": Int4(32),
    "int4 g128 zeros": Int4(128, torch.float16, has_zeros=True),
    "nvfp4": Nvfp4(),
}
EXPERTS = 8
#: Streams side by side and bytes fetched ahead, of plain reads.
WAYS = ((1, 0), (1, 1024), (4, 0), (4, 1024))
#: Experts with weights of their own; the others are copies, which no cache can know.
DISTINCT = 4
SPEC = ExpertsSpec(
    up="up", down="down", up_bias=None, down_bias=None, is_transposed=False, gate=silu_gate, post_norm=None
)


class Way(NamedTuple):
    """One way to compute experts: `run(i)` takes the i-th eight."""

    run: Callable[[int], None]
    expert_bytes: int


def main() -> None:
    """Measure each format and print its lines as they come."""
    args = _arguments()
    threads = args.threads or physical_cores()
    nbytes = int(args.gib * (1 << 30))
    shape = SHAPES[args.shape]
    plain_rows, packed_rows = HostPages(nbytes).data, HostPages(nbytes).data
    plain = plain_layer(plain_rows, *shape)
    reads = Reads(plain_rows, threads)
    cells: list[dict[str, Any]] = []
    facts = {**machine_facts(), "threads": threads}
    print(f"{facts['cpu']}, {threads} threads, {args.shape}, load {os.getloadavg()[0]:.1f}")
    print(
        f"{'format':16} tokens  MB/expert  us best  median   GB/s  of read  bf16 us best  median   read GB/s"
    )
    for name in args.formats:
        layer = packed_layer(packed_rows, FORMATS[name], *shape)
        check(layer, threads)
        for tokens in args.tokens:
            torch.set_num_threads(1)  # OpenMP's threads would spin beside the lane's
            lanes = NativeLane([plain, layer], threads)
            ways = {"bf16": lane_way(lanes, 0, plain, tokens), name: lane_way(lanes, 1, layer, tokens)}
            cells += cell(ways, reads, tokens, args.rounds, args.calls)
            lanes.close()
    if not args.no_torch:
        torch.set_num_threads(threads)
        for name, way in torch_ways(*shape, nbytes).items():
            cells += cell({name: way}, reads, 1, args.rounds, args.calls)
    write_cells(args, facts | {"load": os.getloadavg()}, cells)


def cell(ways: dict[str, Way], reads: "Reads", tokens: int, rounds: int, calls: int) -> list[dict[str, Any]]:
    """Measure ways in turns and print the last one's line."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    nbytes = EXPERTS * list(ways.values())[-1].expert_bytes
    rates: list[float] = []
    for turn in range(rounds):
        rates += [reads.rate(nbytes) for _ in range(calls)]
        for name, way in ways.items():
            for i in range(calls):
                start = time.perf_counter()
                way.run(turn * calls + i)
                seconds[name].append((time.perf_counter() - start) / EXPERTS)
    found = [
        {
            "what": name,
            "tokens": tokens,
            "expert_mb": ways[name].expert_bytes / 1e6,
            "us_best": min(times) * 1e6,
            "us_median": statistics.median(times) * 1e6,
            "gb_per_s": ways[name].expert_bytes / min(times) / 1e9,
            "read_gb_per_s": max(rates),
            "read_gb_per_s_median": statistics.median(rates),
            "load": os.getloadavg()[0],
        }
        for name, times in seconds.items()
    ]
    last, bf16 = found[-1], found[0]
    line = f"{last['what']:16} {tokens:6} {last['expert_mb']:10.2f} {last['us_best']:8.0f} {last['us_median']:7.0f}"
    line += f" {last['gb_per_s']:6.1f} {last['gb_per_s'] / max(rates):7.0%}"
    if len(found) > 1:
        line += f" {bf16['us_best']:13.0f} {bf16['us_median']:7.0f}"
    print(f"{line:90} {max(rates):9.1f}", flush=True)
    return found


class Reads:
    """Plain reads by threads that are there already, each timed by itself: from the first's start to the last's end."""

    def __init__(self, data: torch.Tensor, threads: int) -> None:
        self._data, self._threads, self._at, self._turn = data, threads, 0, 0
        self._pool = ThreadPoolExecutor(threads)
        self._read = load(Path(__file__).with_name("dram_read.c")).read_sum
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64]
        self._read.restype = ctypes.c_uint64

    def rate(self, nbytes: int) -> float:
        """GB/s of reading the next `nbytes`, in one of several ways in turns."""
        share = nbytes // self._threads // 4096 * 4096
        if self._at + self._threads * share > self._data.numel():
            self._at = 0
        way = WAYS[self._turn % len(WAYS)]
        begin = self._data.data_ptr() + self._at
        self._at, self._turn = self._at + self._threads * share, self._turn + 1
        ready = Barrier(self._threads)

        def part(thread: int) -> tuple[float, float]:
            ready.wait()
            start = time.perf_counter()
            self._read(begin + thread * share, share, *way)
            return start, time.perf_counter()

        spans = list(self._pool.map(part, range(self._threads)))
        return self._threads * share / (max(end for _, end in spans) - min(start for start, _ in spans)) / 1e9


def lane_way(lane: NativeLane, index: int, layer: CpuLayer, tokens: int) -> Way:
    """One call for eight experts of one of the lane's layers."""
    x, out = make_x(layer, tokens), torch.zeros(EXPERTS * tokens, layer.out_dim).bfloat16()
    return Way(
        lambda i: lane.submit(index, make_batch(layer, tokens, EXPERTS, i), x, out, None).wait(),
        layer.weight_bytes(),
    )


def plain_layer(data: torch.Tensor, d: int, f: int) -> CpuLayer:
    """As many bf16 experts as the memory holds."""
    weights = {name: weight.bfloat16() for name, weight in random_weights(d, f).items()}
    return filled(data, row_layout(weights), weights)


def packed_layer(data: torch.Tensor, format: Format, d: int, f: int) -> CpuLayer:
    """As many packed experts."""
    matrices = [PackedMatrix("up", format, (2 * f, d)), PackedMatrix("down", format, (d, f))]
    layout = packed_layout(matrices, torch.bfloat16, {})
    assert layout.packing is not None
    return filled(data, layout, pack(layout.packing, random_weights(d, f)))


def random_weights(d: int, f: int) -> dict[str, torch.Tensor]:
    """Up (n, 2F, D) and down (n, D, F) of a few experts."""
    rng = torch.Generator().manual_seed(0)
    return {
        "up": torch.randn(DISTINCT, 2 * f, d, generator=rng) * d**-0.5,
        "down": torch.randn(DISTINCT, d, f, generator=rng) * f**-0.5,
    }


def filled(data: torch.Tensor, layout: RowLayout, fields: dict[str, torch.Tensor]) -> CpuLayer:
    """A layer whose rows repeat a few experts over all of the memory."""
    some = torch.zeros(DISTINCT, layout.row_bytes, dtype=torch.uint8)
    for name, field in fields.items():
        layout.view(some, name).copy_(field)
    num = data.numel() // layout.row_bytes // DISTINCT
    copy_rows(data[: num * some.numel()].view(num, -1), some.view(1, -1).expand(num, -1))
    return CpuLayer(data[: num * some.numel()].view(num * DISTINCT, -1), layout, SPEC)


def check(layer: CpuLayer, threads: int) -> None:
    """One expert against its unpacked weights in float32, its activations rounded to bfloat16."""
    lane, x, batch = NativeLane([layer], threads), make_x(layer, 3), make_batch(layer, 3, 1, 3)
    out = torch.empty(3, layer.out_dim, dtype=torch.bfloat16)
    lane.submit(0, batch, x, out, None).wait()
    lane.close()
    exact = {}
    assert layer.layout.packing is not None
    for matrix in layer.layout.packing.matrices:
        parts = {
            suffix: layer.layout.view(layer.rows, name)[3] for suffix, name in matrix.field_names.items()
        }
        exact[matrix.name] = matrix.format.unpack(parts, matrix.shape)
    want = silu_gate((x.float() @ exact["up"].T).bfloat16()).float() @ exact["down"].T
    error = float(torch.linalg.norm(out.float() - want) / torch.linalg.norm(want))
    assert error < 4e-3, f"{layer.layout.packing.name} is wrong: {error}"


def torch_ways(d: int, f: int, nbytes: int) -> dict[str, Way]:
    """Torch's packed products, for one token."""
    x = torch.randn(1, d).bfloat16()
    int8 = [torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((2 * f, d), (d, f))]
    scales = [torch.full((len(w),), 0.01).bfloat16() for w in int8]
    int4 = [
        torch._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, w.shape, dtype=torch.int32), 1)
        for w in int8
    ]
    groups = [torch.full((w.shape[1] // 128, len(w), 2), 0.01).bfloat16() for w in int8]

    def way(weights: list[torch.Tensor], multiply: Callable[..., torch.Tensor], others: int) -> Way:
        expert_bytes = sum(w.nbytes for w in weights) + others
        experts = [[w.clone() for w in weights] for _ in range(nbytes // expert_bytes)]

        def run(i: int) -> None:
            for e in range(EXPERTS):
                up, down = experts[(i * EXPERTS + e) % len(experts)]
                multiply(silu_gate(multiply(x, up, 0)), down, 1)

        return Way(run, expert_bytes)

    return {
        "torch int8": way(
            int8,
            lambda x, w, which: torch._weight_int8pack_mm(x, w, scales[which]),
            sum(s.nbytes for s in scales),
        ),
        "torch int4 g128": way(
            int4,
            lambda x, w, which: torch._weight_int4pack_mm_for_cpu(x, w, 128, groups[which]),
            sum(g.nbytes for g in groups),
        ),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, help="by default one for each core")
    parser.add_argument("--gib", type=float, default=1.0, help="memory for rows of each kind")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--calls", type=int, default=20, help="of each kind in a round")
    parser.add_argument("--no-torch", action="store_true", help="leave torch's own products out")
    parser.add_argument("--out", help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
