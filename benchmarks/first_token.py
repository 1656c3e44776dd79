"""Time to the first token with experts in host memory: all missing ones copied, or the rare ones left to the CPU.

    python benchmarks/first_token.py --prompt 16 64 256 1024 --slots 0.5 0.25 --out first_token.json

Under PreSched, with a CPU lane (the CPU computes a prompt's rare experts beside the link) and without one (all are
copied), A-B-B-A, a prompt of its own for each run, from the slots that the run before left. Behind them the same with
frequencies of those runs, by which PreSched brings the hot experts back behind each prompt: that is no part of the
first token, but of all --new tokens. Beside them on demand, and the bound: what was missing over link and CPU together,
or the link alone, and at least what a prompt takes when all experts have slots. Random weights, their own routing.

    python benchmarks/first_token.py --resident --prompt 16 64 256 512 1024 --out first_token_resident.json

With all experts in slots instead: launched kernel by kernel (decode="layered") and from a graph, A-B-B-A, each run with
a prompt of its own that is a token shorter than the last one's.
"""

import argparse
import statistics
import time
from dataclasses import replace
from typing import Any

import torch
from _models import open_model
from _written import write_cells
from decode import link_rate

from prescope import HardwareProfile, attach
from prescope.core.machine import machine_facts
from prescope.engine.engine import Engine

TRIAL_LINK_GB_PER_S = 1.0  # emulated, with --device cpu
COLUMNS = [
    "batch", "prompt", "slots", "who", "first token ms", "spread", "all tokens ms", "missing", "on CPU %", "GB copied",
    "bound ms",
]  # fmt: skip


def main() -> None:
    """Run all cells, print the table as it grows, write the JSON."""
    args = arguments()
    on_gpu = args.device == "cuda"
    link = link_rate() if on_gpu else TRIAL_LINK_GB_PER_S
    name = torch.cuda.get_device_name() if on_gpu else "CPU standing in for the GPU"
    facts = {**machine_facts(), "device": name, "link_gb_per_s": link}
    print(f"# {name}, link {link:.1f} GB/s, {args.model}, bfloat16\n| {' | '.join(COLUMNS)} |", flush=True)
    print("|---" * len(COLUMNS) + "|")
    cells: list[dict[str, Any]] = []
    bench = open_model(args.model, torch.device(args.device), torch.bfloat16)
    more: dict[str, Any] = {} if on_gpu else {"link_gb_per_s": TRIAL_LINK_GB_PER_S}
    with attach(bench.model, device=args.device, slots=1.0, **more) as engine:
        if args.resident:
            all_resident(engine, facts, args)
            return
        for batch in args.batch:
            for length in args.prompt:
                engine.configure(slots=1.0, schedule="on-demand")
                resident = cell_of("all in slots", several(engine, batch, length, args)[1:])
                for slots in args.slots:
                    for cell in offloaded(engine, batch, length, slots, resident["ms"], link, args):
                        cells.append(cell | {"batch": batch, "prompt": length, "slots": slots})
                        print(row(cells[-1]), flush=True)
                    write_cells(args, facts, cells)


def all_resident(engine: Engine, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """A table of its own: all experts have slots."""
    cells: list[dict[str, Any]] = []
    columns = [
        "batch",
        "prompt",
        "launched ms",
        "spread",
        "from a graph ms",
        "spread",
        "generate of one token ms",
    ]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for batch in args.batch:
        for length in args.prompt:
            runs: dict[str, list[Any]] = {"layered": [], "auto": []}
            for decode in ("auto", "layered", "layered", "auto"):
                engine.configure(decode=decode)
                runs[decode] += several(engine, batch, length, args, fewer=1)[1:]
            graphs = [run.config["graphs"]["prompt"] for run in runs["auto"]]
            cell = {"batch": batch, "prompt": length, "all_from_graph": all(graphs)}
            for decode, name in (("layered", "launched"), ("auto", "graph")):
                cell[name] = cell_of(name, runs[decode])
            # The clock on the wall, with all that `generate` does before and behind the prompt's forward pass.
            cell["generate_ms"] = statistics.median(wall_ms(engine, batch, length) for _ in range(4))
            cells.append(cell)
            values = [batch, length]
            for name in ("launched", "graph"):
                times = cell[name]["runs_ms"]
                values += [f"{cell[name]['ms']:.1f}", f"{min(times):.1f}-{max(times):.1f}"]
            mark = "" if all(graphs) else " (not all from a graph)"
            print(f"| {' | '.join(map(str, values))}{mark} | {cell['generate_ms']:.1f} |", flush=True)
            write_cells(args, facts, cells)


def wall_ms(engine: Engine, batch: int, length: int) -> float:
    """Of a call for one token."""
    begin = time.perf_counter()
    engine.generate(torch.zeros((batch, length), dtype=torch.int64), max_new_tokens=1)
    return 1e3 * (time.perf_counter() - begin)


def offloaded(
    engine: Engine,
    batch: int,
    length: int,
    slots: float,
    resident_ms: float,
    link: float,
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """On demand, and PreSched with and without a CPU lane."""
    size = engine.layers[0].expert_size
    costs = HardwareProfile.load(args.profile).costs(
        engine.shape, width=size.width, expert_width=size.expert_width, batch=batch, rest_us=90.0
    )
    ways: dict[str, dict[str, Any]] = {
        "on demand": {"schedule": "on-demand"},
        "all copied": {"schedule": "presched", "costs": replace(costs, cpu_us=(), cpu_alone_us=())},
        "rare on the CPU": {"schedule": "presched", "costs": costs},
    }
    runs: dict[str, list[Any]] = {way: [] for way in ways}
    for way in [*ways, *reversed(ways)]:
        engine.configure(slots=slots, **ways[way])
        runs[way] += several(engine, batch, length, args)[1:]
    traces = [run.trace for run in runs["rare on the CPU"] if run.trace is not None]
    hot = "rare on the CPU, hot put back"
    engine.configure(
        slots=slots,
        **ways["rare on the CPU"],
        frequencies=sum(trace.expert_counts().astype(float) for trace in traces),
    )
    runs[hot] = [run for _ in range(2) for run in several(engine, batch, length, args)[1:]]
    cells = [{"resident_ms": resident_ms, **cell_of(way, found)} for way, found in runs.items()]
    for cell in cells:
        rate = link + (engine.shape.row_bytes / costs.cpu_us[1] / 1e3 if "CPU" in cell["who"] else 0.0)
        cell["bound_ms"] = max(resident_ms, cell["missing"] * engine.shape.row_bytes / rate / 1e6)
    return cells


def several(engine: Engine, batch: int, length: int, args: argparse.Namespace, fewer: int = 0) -> list[Any]:
    """Runs, each of a prompt of its own, by so many tokens shorter than the one before; the first one warms up."""
    vocabulary = engine.model.config.vocab_size
    prompts = [
        torch.randint(0, vocabulary, (batch, length - fewer * i), generator=torch.Generator().manual_seed(i))
        for i in range(args.repeats + 1)
    ]
    return [engine.generate(prompt, max_new_tokens=args.new, min_new_tokens=args.new) for prompt in prompts]


def cell_of(who: str, runs: list[Any]) -> dict[str, Any]:
    """Medians over runs."""
    times = [run.metrics.ttft_ms for run in runs]
    prefills = [run.metrics.prefill for run in runs]
    return {
        "who": who,
        "ms": statistics.median(times),
        "runs_ms": times,
        "all_ms": statistics.median(1e3 * run.metrics.end_to_end_s for run in runs),
        "missing": statistics.median(each.misses + each.late for each in prefills),
        "needed": statistics.median(each.needed for each in prefills),
        "on_cpu": statistics.median(each.on_cpu / max(1, each.needed) for each in prefills),
        "gb_copied": statistics.median(each.h2d_bytes for each in prefills) / 1e9,
    }


def row(cell: dict[str, Any]) -> str:
    """One line of the table."""
    values = [
        cell["batch"], cell["prompt"], f"{cell['slots']:.0%}", cell["who"], f"{cell['ms']:.0f}",
        f"{min(cell['runs_ms']):.0f}-{max(cell['runs_ms']):.0f}", f"{cell['all_ms']:.0f}",
        f"{cell['missing']:.0f} of {cell['needed']:.0f}",
        f"{100 * cell['on_cpu']:.0f}", f"{cell['gb_copied']:.2f}", f"{cell['bound_ms']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, values))} |"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="qwen3-30b-a3b-cut16")
    add("--batch", nargs="+", type=int, default=[1, 8])
    add("--prompt", nargs="+", type=int, default=[16, 64, 256, 1024])
    add("--resident", action="store_true", help="all experts in slots: launched, and from a graph")
    add("--slots", nargs="+", type=float, default=[0.5, 0.25])
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the script")
    add("--profile", default="h200")
    add("--new", type=int, default=16)
    add("--repeats", type=int, default=2)
    add("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
