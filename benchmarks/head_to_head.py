"""prescope beside transformers, with what the machine would allow: resident, offloaded, with and without predictions.

    python benchmarks/head_to_head.py --out head_to_head.json                      # Qwen3-30B-A3B cut to 16 layers
    python benchmarks/head_to_head.py --model qwen3-30b-a3b --slots 16GiB --out .. # full depth, 64 GiB of host memory

All in one call, on one model with random weights. First transformers alone (compiled, static cache), then prescope
with all experts in slots, then each share of slots: on demand and PreSched, A-B-B-A, by the model's own routing; then
PreSched without predictions, with predictions of an oracle that errs (recall as given) and with an oracle, by routing
from a trace with the habits of tiny-moe. Layers around the experts are compiled in all of them. Cells are medians of
decode steps behind a first run; first tokens are those of the later runs too.

Two bounds stand beside each: *no prediction*, the resident step and then the missing experts' bytes over link and CPU
together, as fast as both were measured at the same time; *overlapped*, the larger of the two. *Belady* is the least
that any cache of these slots would miss, on the run's own routing.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from _models import open_model
from _written import write_cells
from decode import DecodeClock, link_rate

from prescope import HardwareProfile, attach
from prescope.core.machine import machine_facts
from prescope.engine.engine import Engine
from prescope.predictor import NoisyOracle
from prescope.scheduler.costs import LayerCosts
from prescope.simulator.prepare import predictions_of
from prescope.traces.bounds import belady_misses
from prescope.traces.result import RunResult
from prescope.traces.synthetic import SyntheticSpec

COLUMNS = [
    "who", "batch", "slots", "tok/s", "spread", "first token ms", "hit %", "Belady hit %", "on CPU %", "step ms",
    "no prediction ms", "of it %", "overlapped ms", "of it %", "ms: GPU", "bytes", "CPU", "host",
]  # fmt: skip
#: Where a step's time goes on the compute lane: computing, waiting for bytes, for the CPU's experts, for decisions.
PARTS = {
    "gpu_ms": ("dense_gpu_ms", "experts_gpu_ms"), "stall_ms": ("stall_ms",), "cpu_wait_ms": ("cpu_wait_ms",),
    "host_wait_ms": ("host_wait_ms",),
}  # fmt: skip
#: Of tiny-moe's routing, as `schedules.py` has them.
HABITS = {"zipf": 1.05, "persistence": 0.07, "correlation": 0.29, "diversity": 1.0}
TRIAL_LINK_GB_PER_S = 1.0  # emulated, with --device cpu


def main() -> None:
    """Run all cells, print the table as it grows, write the JSON."""
    args = arguments()
    args.deadline = time.perf_counter() + args.seconds
    on_gpu = args.device == "cuda"
    link = link_rate() if on_gpu else TRIAL_LINK_GB_PER_S
    name = torch.cuda.get_device_name() if on_gpu else "CPU standing in for the GPU"
    facts = {**machine_facts(), "device": name, "link_gb_per_s": link}
    print(
        f"# {facts['device']}, link {link:.1f} GB/s, {args.model}, bfloat16, {args.prompt} in, {args.new} out"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    bench = open_model(args.model, torch.device(args.device), torch.bfloat16)
    cells: list[dict[str, Any]] = []

    def keep(cell: dict[str, Any]) -> None:
        cells.append(cell)
        print(row(cell), flush=True)
        write_cells(args, facts, cells)

    if args.transformers:
        for batch in args.batch:
            keep(transformers_cell(bench.model, prompts(bench.model, batch, args)[0], args))
        torch.compiler.reset()
    more: dict[str, Any] = {} if on_gpu else {"link_gb_per_s": TRIAL_LINK_GB_PER_S}
    with attach(bench.model, device=args.device, compiled=on_gpu, record_routing=True, **more) as engine:
        for batch in args.batch:
            resident_ms = float("nan")
            if args.resident:
                engine.configure(slots=1.0, schedule="on-demand")
                cell = measured("prescope, all resident", engine, batch, args)[0]
                resident_ms = cell["step_ms"]
                keep(cell)
            for slots in args.slots:
                for cell in offloaded(engine, batch, slots, resident_ms, args):
                    keep(cell)


def offloaded(
    engine: Engine, batch: int, slots: str, resident_ms: float, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """On demand and PreSched by the model's own routing, then PreSched with predictions by a trace's."""
    if time.perf_counter() > args.deadline:
        print(f"# no time left for batch {batch}, {slots}", flush=True)
        return []
    amount: float | str = slots if slots.endswith("iB") else float(slots)
    engine.force_routing(None)
    engine.configure(slots=amount, schedule="on-demand", predictor="none")
    costs = costs_of(engine, batch, args)
    runs: dict[str, list[RunResult]] = {"on-demand": [], "presched": []}
    for schedule in ("on-demand", "presched", "presched", "on-demand"):
        engine.configure(schedule=schedule, **({"costs": costs} if schedule != "on-demand" else {}))
        runs[schedule] += several(engine, batch, args)[1:]
    cells = [cell_of(f"{name}", engine, batch, slots, found) for name, found in runs.items()]
    shape = engine.shape
    spec = SyntheticSpec(
        num_layers=shape.num_layers, num_experts=shape.num_experts, top_k=shape.top_k, **HABITS
    )
    trace = spec.generate(prompt_tokens=args.prompt, new_tokens=args.new, batch=batch, seed=1)
    for recall in args.recalls if args.predict else ():
        if recall:
            ahead = {1: recall, 2: recall - 0.06 * (recall < 1), 4: recall - 0.15 * (recall < 1)}
            oracle = NoisyOracle(trace, {a: r for a, r in ahead.items() if a < shape.num_layers})
            engine.force_routing(trace, predictions_of(oracle, trace).forced())
            engine.configure(schedule="presched", predictor=oracle, costs=costs)
        else:
            engine.configure(schedule="presched", predictor="none", costs=costs)
            engine.force_routing(trace)
        found = several(engine, batch, args)[1:]
        cells.append(cell_of(f"presched, forced, recall {recall or 'none'}", engine, batch, slots, found))
    engine.force_routing(None)
    return [cell | bounds(cell, costs, shape.row_bytes, resident_ms) for cell in cells]


def costs_of(engine: Engine, batch: int, args: argparse.Namespace) -> LayerCosts:
    """What the profile says of these experts."""
    size = engine.layers[0].expert_size
    profile = HardwareProfile.load(args.profile)
    return profile.costs(
        engine.shape, width=size.width, expert_width=size.expert_width, batch=batch, rest_us=90.0
    )


def several(engine: Engine, batch: int, args: argparse.Namespace) -> list[RunResult]:
    """Runs of one setting, each of a prompt of its own; the first one captures."""
    runs = []
    for prompt in prompts(engine.model, batch, args):
        runs.append(engine.generate(prompt, max_new_tokens=args.new, min_new_tokens=args.new))
    return runs


def measured(who: str, engine: Engine, batch: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One cell by the model's own routing."""
    several(engine, batch, args)
    return [cell_of(who, engine, batch, "all", several(engine, batch, args))]


def cell_of(who: str, engine: Engine, batch: int, slots: str, runs: list[RunResult]) -> dict[str, Any]:
    """Medians of the runs."""
    last, decode = runs[-1], runs[-1].metrics.decode
    steps = [run.metrics.tpot_ms for run in runs]
    needed = max(1, decode.needed)
    least = float("nan")
    if last.trace is not None and engine.num_slots < engine.shape.total_experts:
        found = belady_misses(last.trace, engine.num_slots, runs[-2].trace if len(runs) > 1 else None)
        least = 1.0 - found.misses_decode / max(1, found.needed_decode)
    return {
        "who": who, "batch": batch, "slots": slots, "tokens_per_s": batch * 1e3 / statistics.median(steps),
        "tokens_per_s_runs": [batch * 1e3 / step for step in steps], "step_ms": statistics.median(steps),
        "ttft_ms": statistics.median(run.metrics.ttft_ms for run in runs),
        "hit_rate": decode.hit_rate, "belady_hit_rate": least, "on_cpu": decode.on_cpu / needed,
        **{
            name: statistics.median(
                sum(getattr(run.metrics.decode, part) for part in parts) / max(1, run.metrics.decode.num_steps)
                for run in runs
            )
            for name, parts in PARTS.items()
        },
        "missing_per_step": (needed - decode.hits) / max(1, decode.num_steps),
        "decode": last.config["reasons"]["decode"],
    }  # fmt: skip


def bounds(cell: dict[str, Any], costs: LayerCosts, row_bytes: int, resident_ms: float) -> dict[str, Any]:
    """What the machine would allow for the misses of a cell."""
    link_us = costs.link_busy_us or costs.link_us
    per_us = 1.0 / link_us + (1.0 / costs.cpu_us[1] if len(costs.cpu_us) > 1 else 0.0)
    bytes_ms = cell["missing_per_step"] / per_us / 1e3
    return {
        "bytes_ms": bytes_ms,
        "gb_per_s_together": row_bytes * per_us / 1e3,
        "no_prediction_ms": resident_ms + bytes_ms,
        "overlapped_ms": max(resident_ms, bytes_ms),
    }


def transformers_cell(model: Any, prompt: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """The plain model all on the GPU, compiled by transformers over a static cache."""
    model.set_experts_implementation("grouped_mm")
    inputs = {"input_ids": prompt.to(model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    steps, first = [], []
    for i in range(args.repeats + 2):
        clock, start = DecodeClock(), time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=args.new, min_new_tokens=args.new, do_sample=False,
            stopping_criteria=[clock], cache_implementation="static",
        )  # fmt: skip
        if i >= 2:
            steps.append(clock.tpot_ms())
            first.append((clock.first_s - start) * 1e3 if clock.first_s else float("nan"))
    batch, step = prompt.shape[0], statistics.median(steps)
    return {
        "who": "transformers, compiled", "batch": batch, "slots": "all", "tokens_per_s": batch * 1e3 / step,
        "tokens_per_s_runs": [batch * 1e3 / each for each in steps], "step_ms": step,
        "ttft_ms": statistics.median(first),
    }  # fmt: skip


def prompts(model: Any, batch: int, args: argparse.Namespace) -> list[torch.Tensor]:
    """Random tokens, one prompt for each run."""
    return [
        torch.randint(
            0, model.config.vocab_size, (batch, args.prompt), generator=torch.Generator().manual_seed(i)
        )
        for i in range(args.repeats + 1)
    ]


def row(cell: dict[str, Any]) -> str:
    """One line of the table."""

    def show(name: str, scale: float = 1.0, digits: int = 1) -> str:
        value = cell.get(name, float("nan"))
        return "" if value != value else f"{value * scale:.{digits}f}"

    def share(name: str) -> str:
        value = cell.get(name, float("nan")) / cell["step_ms"]
        return "" if value != value else f"{100 * value:.0f}"

    runs = cell["tokens_per_s_runs"]
    values = [
        cell["who"], str(cell["batch"]), cell["slots"], show("tokens_per_s"), f"{min(runs):.0f}-{max(runs):.0f}",
        show("ttft_ms", 1, 0), show("hit_rate", 100), show("belady_hit_rate", 100), show("on_cpu", 100),
        show("step_ms", 1, 2), show("no_prediction_ms", 1, 2), share("no_prediction_ms"), show("overlapped_ms", 1, 2),
        share("overlapped_ms"), *(show(name, 1, 2) for name in PARTS),
    ]  # fmt: skip
    return f"| {' | '.join(values)} |"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="qwen3-30b-a3b-cut16")
    add("--batch", nargs="+", type=int, default=[1, 8])
    add("--slots", nargs="+", default=["0.5", "0.25"], help="shares, or GiB: 16GiB")
    add("--recalls", nargs="+", type=float, default=[0.0, 0.86, 1.0], help="one layer ahead; 0: no predictor")
    add("--no-predict", dest="predict", action="store_false", help="leave out forced routing")
    add("--no-transformers", dest="transformers", action="store_false")
    add("--no-resident", dest="resident", action="store_false", help="the bounds then lack the GPU's part")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the script")
    add("--profile", default="h200")
    add("--prompt", type=int, default=64)
    add("--new", type=int, default=48)
    add("--repeats", type=int, default=2)
    add("--seconds", type=float, default=1e9, help="begin no cell after so long")
    add("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
