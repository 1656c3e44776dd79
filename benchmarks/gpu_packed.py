"""Packed experts on the GPU: microseconds for the expert part of one layer, beside the bound and bf16.

    python benchmarks/gpu_packed.py --out gpu_packed.json     # three models' experts, two to three minutes
    python benchmarks/gpu_packed.py --tune                    # tries tiles of weights and prints the fastest of each
    TRITON_INTERPRET=1 python benchmarks/gpu_packed.py --check  # numbers only, tiny, without a GPU

All experts of a layer are in slots, twice, and every layer of a graph takes others: no cache holds them. Routing is
uniform: a token takes as many different experts as the model's router. The expert part of a decode step is what a
captured step launches between routing and the sum over experts: both linears and the gate. The bound is the packed
bytes of the distinct experts that are needed, at the rate at which this GPU reads memory, measured first. Prefill
computes the same from tiles sorted beforehand. Before a cell is timed, some of its outputs are compared with the
reference (weights unpacked by torch).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from _models import random_fields
from _written import write_cells
from torch.nn import functional

from prescope.cache.policies import LRU
from prescope.core.machine import machine_facts
from prescope.core.types import MoEShape
from prescope.kernels import ExpertsSpec, expert_output, layer_weights
from prescope.kernels.graph_buffers import BLOCK_M, DeviceTable, GraphBuffers
from prescope.kernels.packed_linear import PAIR_CANDIDATES, PackedConfig, PackedLinear
from prescope.kernels.tile_plan import block_m_for
from prescope.kernels.triton_experts import linear_of
from prescope.weights.formats import Format, Fp8, Int4, Int8, Mxfp4
from prescope.weights.layout import PackedMatrix, RowLayout, packed_layout, row_layout

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FORMATS: dict[str, Format] = {
    "int8": Int8(),
    "fp8": Fp8(128, 128),
    "int4": Int4(128),
    "int4 zeros": Int4(128, torch.float16, has_zeros=True),
    "mxfp4": Mxfp4(),
}
#: Layers of a graph: at one token they take all experts once.
LAYERS, REPLAYS = 16, 7
TILE_CANDIDATES = [
    PackedConfig(*c) for c in [
        (64, 128, 4, 3), (64, 64, 4, 3), (32, 128, 4, 3), (64, 256, 4, 2), (64, 128, 4, 4), (32, 256, 4, 3),
        (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3),
    ]
]  # fmt: skip
COLUMNS = [
    "experts", "format", "tokens", "distinct", "us", "bound us", "us more", "times bound", "bf16 us", "of bf16",
    "error",
]  # fmt: skip


class Shape(NamedTuple):
    """A model's experts."""

    width: int
    expert_width: int
    num_experts: int
    top_k: int
    formats: tuple[str, ...]
    has_biases: bool = False


SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8, ("int8", "fp8", "int4", "int4 zeros", "mxfp4")),
    "gpt-oss-120b": Shape(2880, 2880, 128, 4, ("mxfp4",), True),
    "glm-4.5-air": Shape(4096, 1408, 128, 8, ("fp8", "int4")),
    "toy": Shape(256, 128, 8, 2, tuple(FORMATS), True),
}


def silu_gate(h: torch.Tensor) -> torch.Tensor:
    """The usual one."""
    gate, up = h.chunk(2, dim=-1)
    return functional.silu(gate) * up


def clamped_gate(h: torch.Tensor) -> torch.Tensor:
    """gpt-oss's."""
    gate, up = h.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=7.0)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


class Experts:
    """A layer's experts in slots, twice, with random weights.

    Args:
        form: name in FORMATS, or "bf16".
    """

    def __init__(self, shape: Shape, form: str, dtype: torch.dtype) -> None:
        d, f, e = shape.width, shape.expert_width, shape.num_experts
        self.shape, self.dtype = shape, dtype
        names = ("up_bias", "down_bias") if shape.has_biases else (None, None)
        self.spec = ExpertsSpec(
            up="up", down="down", up_bias=names[0], down_bias=names[1], is_transposed=False,
            gate=clamped_gate if shape.has_biases else silu_gate, post_norm=None,
        )  # fmt: skip
        biases = {"up_bias": (2 * f,), "down_bias": (d,)} if shape.has_biases else {}
        self.layout = _layout(FORMATS.get(form), {"up": (2 * f, d), "down": (d, f)}, biases, dtype)
        self.pool = torch.zeros((2 * e, self.layout.row_bytes), dtype=torch.uint8, device=DEVICE)
        for name, field in random_fields(self.layout, 2 * e, DEVICE).items():
            self.layout.view(self.pool, name).copy_(field)
        self.weights = layer_weights(self.layout, self.spec, self.pool)
        self.expert_bytes = sum(field.nbytes for field in self.layout.fields)
        slots = torch.arange(2 * e, device=DEVICE, dtype=torch.int32)
        self.tables = slots.view(2, e).unbind(0)

    def want(self, x: torch.Tensor, slot: int) -> torch.Tensor:
        """What the expert in a slot makes of (n, D), by torch."""
        return expert_output(x, self.spec, self.weights, slot)


def _layout(
    format: Format | None,
    shapes: dict[str, tuple[int, int]],
    biases: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
) -> RowLayout:
    if format is None:
        fields = {
            name: torch.empty((1, *shape), dtype=dtype, device="meta")
            for name, shape in (shapes | biases).items()
        }
        return row_layout(fields)
    return packed_layout([PackedMatrix(name, format, shape) for name, shape in shapes.items()], dtype, biases)


class Way(NamedTuple):
    """One way to compute a layer: `run(i)` with the i-th layer's experts."""

    run: Callable[[int], torch.Tensor]
    ids: list[torch.Tensor]  # (T, K) of each layer
    x: torch.Tensor  # (T, D)


def draw_ids(shape: Shape, tokens: int, seed: int) -> list[torch.Tensor]:
    """Experts (T, K) of each layer; of one token, in turns, so that all are used once."""
    rng = torch.Generator().manual_seed(seed)
    if tokens == 1:
        order = torch.randperm(shape.num_experts, generator=rng).view(-1, 1, shape.top_k)
        return [order[i % len(order)].to(DEVICE) for i in range(LAYERS)]
    chosen = [
        torch.rand(tokens, shape.num_experts, generator=rng).topk(shape.top_k).indices for _ in range(LAYERS)
    ]
    return [ids.to(DEVICE) for ids in chosen]


def decode_way(experts: Experts, tokens: int, is_tuned: bool = False) -> Way:
    """As a captured step computes them; tuned, as the engine's first run on a GPU does it."""
    shape = experts.shape
    layers = MoEShape(1, shape.num_experts, shape.top_k, experts.layout.row_bytes)
    table = DeviceTable(layers, len(experts.pool), DEVICE)
    step = GraphBuffers(table, tokens, shape.top_k, policy=LRU.kind, orders=False, timed=False)
    ids = draw_ids(shape, tokens, tokens)
    flat = [one.reshape(-1).to(torch.int32) for one in ids]
    x = torch.randn((tokens, shape.width), device=DEVICE).to(experts.dtype)

    if is_tuned:
        step.tune(x, experts.spec, experts.weights, shape.num_experts)

    def run(i: int) -> torch.Tensor:
        return step.experts(
            shape.num_experts, x, flat[i], experts.tables[i % 2], experts.spec, experts.weights
        )

    return Way(run, ids, x)


def prefill_way(experts: Experts, tokens: int) -> Way:
    """Tiles of pairs sorted by expert, as a prompt's are."""
    shape, spec, weights = experts.shape, experts.spec, experts.weights
    ids = draw_ids(shape, tokens, tokens)
    x = torch.randn((tokens, shape.width), device=DEVICE).to(experts.dtype)
    block_m = block_m_for(tokens * shape.top_k / shape.num_experts)
    sorted_pairs = [one.reshape(-1).argsort(stable=True) for one in ids]
    blocks = [_blocks(one, block_m, experts.tables[i % 2]) for i, one in enumerate(ids)]
    _, up_dim, out_dim = weights.widths(False)
    h = x.new_empty((tokens * shape.top_k, up_dim))
    y = x.new_empty((tokens * shape.top_k, out_dim))

    def run(i: int) -> torch.Tensor:
        num = len(blocks[i])
        linear_of(x, shape.top_k, weights.up, weights.up_bias, h, False).tiles(
            sorted_pairs[i], blocks[i], num, block_m
        )
        act = spec.gate(h).contiguous()
        linear_of(act, 1, weights.down, weights.down_bias, y, False).tiles(
            sorted_pairs[i], blocks[i], num, block_m
        )
        return y

    return Way(run, ids, x)


def _blocks(ids: torch.Tensor, block_m: int, slot_of: torch.Tensor) -> torch.Tensor:
    """(n, 3): slot, first and end place of each tile."""
    counts = torch.bincount(ids.reshape(-1), minlength=len(slot_of)).tolist()
    rows, first = [], 0
    for slot, count in zip(slot_of.tolist(), counts, strict=True):
        rows += [(slot, place, first + count) for place in range(first, first + count, block_m)]
        first += count
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


def error_of(experts: Experts, way: Way) -> float:
    """Of one layer's outputs of a few pairs, against the reference, as a share of their size."""
    found = way.run(0).float()
    flat, top_k = way.ids[0].reshape(-1), experts.shape.top_k
    pairs = torch.linspace(0, len(flat) - 1, 6).long().unique().tolist()
    want = [
        experts.want(way.x[pair // top_k][None], int(experts.tables[0][flat[pair]]))[0].float()
        for pair in pairs
    ]
    expected = torch.stack(want)
    return float(torch.linalg.norm(found[pairs] - expected) / torch.linalg.norm(expected))


def layer_us(way: Way) -> float:
    """Median time of one layer of a graph of several."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for i in range(LAYERS):
            way.run(i)
    graph.replay()
    return _median_us(graph.replay) / LAYERS


def _median_us(run: Callable[[], object]) -> float:
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def read_rate() -> float:
    """GB/s of reading 4 GiB, by the fastest of some sums."""
    data = torch.zeros(1 << 32, dtype=torch.uint8, device=DEVICE)
    views = [data.view(torch.float32), data.view(torch.bfloat16), data.view(torch.int64)]
    runs = [view.sum for view in views] + [view.amax for view in views]
    for run in runs:
        run()
    return max(data.nbytes / _median_us(run) / 1e3 for run in runs)


def run_shape(name: str, args: argparse.Namespace, rate: float, records: list[dict[str, Any]]) -> None:
    """All cells of one model's experts."""
    shape, bf16_us = SHAPES[name], {}
    for form in ("bf16", *(form for form in shape.formats if form in args.formats)):
        torch.manual_seed(0)
        experts = Experts(shape, form, torch.bfloat16)
        makers = [(n, partial(decode_way, is_tuned=args.tuned)) for n in args.tokens]
        makers += [(n, prefill_way) for n in args.prompts]
        with ThreadPoolExecutor(args.threads) as threads:  # kernels compile side by side
            ways = list(threads.map(partial(_warm, experts), *zip(*makers, strict=True)))
        for (tokens, make), way in zip(makers, ways, strict=True):
            error = error_of(experts, way)
            assert error < 1e-2, f"{name} {form}, {tokens} tokens: {error} off"
            us = layer_us(way)
            distinct = statistics.mean(len(ids.unique()) for ids in way.ids)
            bound = distinct * experts.expert_bytes / rate / 1e3
            at = tokens, make is prefill_way
            bf16_us.setdefault(at, us)
            record = {
                "experts": name, "format": form, "tokens": tokens, "distinct": distinct, "us": us, "bound us": bound,
                "us more": us - bound, "times bound": us / bound, "bf16 us": bf16_us[at],
                "of bf16": us / bf16_us[at], "error": error, "is_prefill": at[1],
            }  # fmt: skip
            records.append(record)
            print(row(record), flush=True)
        del experts, ways, way  # before the next ones take their memory
        torch.cuda.empty_cache()


def _warm(experts: Experts, tokens: int, make: Callable[[Experts, int], Way]) -> Way:
    with torch.no_grad():
        way = make(experts, tokens)
        way.run(0)
    return way


def tune(name: str, form: str, args: argparse.Namespace) -> None:
    """Time each tile of weights, linear by linear."""
    experts = Experts(SHAPES[name], form, torch.bfloat16)
    for which in ("up", "down"):
        for tokens in args.tokens:
            _tune_linear(experts, f"{name} {form} {which}", which, tokens, args.threads)


def _tune_linear(experts: Experts, what: str, which: str, tokens: int, threads: int) -> None:
    shape, ids = experts.shape, draw_ids(experts.shape, tokens, tokens)
    flat = [one.reshape(-1).to(torch.int32) for one in ids]
    w = getattr(experts.weights, which)
    x = torch.randn((tokens if which == "up" else tokens * shape.top_k, w.shape[2]), device=DEVICE).to(
        experts.dtype
    )
    out = x.new_empty((tokens * shape.top_k, w.shape[1]))
    linear = PackedLinear(x, shape.top_k if which == "up" else 1, w, None, out)
    order = [one.reshape(-1).argsort(stable=True).to(torch.int32) for one in ids]
    blocks = [_blocks(one, BLOCK_M, experts.tables[i % 2]) for i, one in enumerate(ids)]

    def pairs(config: PackedConfig, i: int) -> torch.Tensor:
        linear.pairs(flat[i], experts.tables[i % 2], shape.num_experts, config)
        return out

    def tiles(config: PackedConfig, i: int) -> torch.Tensor:
        linear.tiles(order[i], blocks[i], len(blocks[i]), BLOCK_M, config)
        return out

    kinds = (
        [(pairs, PAIR_CANDIDATES)] if tokens == 1 else [(pairs, PAIR_CANDIDATES), (tiles, TILE_CANDIDATES)]
    )
    for kind, candidates in kinds:
        usable = [config for config in candidates if config.block_in < 2 * w.shape[2]]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda config, kind=kind: kind(config, 0), usable))
        found = [(layer_us(Way(lambda i, c=c, k=kind: k(c, i), ids, x)), tuple(c)) for c in usable]
        best = "  ".join(f"{us:.1f} {config}" for us, config in sorted(found)[:6])
        print(f"{what}, {tokens} tokens, {kind.__name__}: {best}", flush=True)


def check() -> None:
    """Compare all formats on tiny experts; no GPU needed."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    for form in SHAPES["toy"].formats:
        experts = Experts(SHAPES["toy"], form, dtype)
        for tokens, make in ((1, decode_way), (5, decode_way), (12, prefill_way)):
            error = error_of(experts, make(experts, tokens))
            print(f"{form:12} {tokens:3} tokens: {error:.1e}")
            assert error < 1e-2, f"{form} is wrong"


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    digits = {
        "distinct": 0,
        "us": 1,
        "bound us": 1,
        "us more": 1,
        "times bound": 2,
        "bf16 us": 1,
        "of bf16": 2,
    }
    shown = [
        f"{record[column]:.{digits[column]}f}" if column in digits
        else f"{record[column]:.1e}" if column == "error" else str(record[column])
        for column in COLUMNS
    ]  # fmt: skip
    return f"| {' | '.join(shown)} |"


@torch.no_grad()
def main() -> None:
    """Measure, print a table, write the JSON."""
    args = _arguments()
    if args.check:
        check()
        return
    started, records = time.perf_counter(), []
    rate = args.rate or read_rate()
    print(f"# {torch.cuda.get_device_name()}, reads {rate:.0f} GB/s")
    if args.tune:
        for what in args.tune_what:
            tune(*what.split(":"), args)
        print(f"# {time.perf_counter() - started:.0f} s")
        return
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for name in args.shapes:
        run_shape(name, args, rate, records)
    print(f"# {time.perf_counter() - started:.0f} s")
    facts = {**machine_facts(), "device": torch.cuda.get_device_name(), "read_gb_per_s": rate}
    write_cells(args, facts, records)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if name != "toy"]
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 8, 64], help="of a decode step")
    parser.add_argument("--prompts", nargs="*", type=int, default=[512, 4096], help="tokens of a prefill")
    parser.add_argument("--rate", type=float, help="GB/s of the bound, instead of measuring it")
    parser.add_argument("--threads", type=int, default=8, help="that compile kernels")
    parser.add_argument(
        "--tuned", action="store_true", help="choose tiles first, as an engine does: some minutes"
    )
    parser.add_argument("--check", action="store_true", help="compare numbers on tiny experts, nothing else")
    parser.add_argument("--tune", action="store_true", help="try tiles instead")
    parser.add_argument(
        "--tune-what", nargs="+", default=["qwen3-30b-a3b:int4", "qwen3-30b-a3b:fp8", "gpt-oss-120b:mxfp4"]
    )
    parser.add_argument("--out", help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
