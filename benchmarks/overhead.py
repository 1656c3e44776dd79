"""Where a decode token's time goes, and what share of it is the engine's own.

    python benchmarks/overhead.py --model qwen3-30b-a3b-cut16 --batch 1 8 --slots 1.0 0.25 --out overhead.json

For each way to run a decode step: time of the layers around the experts, of deciding, of waiting for bytes, of the
expert kernels and between two steps, from the engine's own timeline; kernels launched from Python, graphs, and host
synchronisations per token, from torch's profiler. "ours" is what neither the model's own kernels nor the link explain:
deciding, the gaps between steps, and waiting beyond bytes / measured rate. Then the fetch kernel by its settings, and
what events cost (A-B-B-A). Prints tables, writes JSON.
"""

import argparse
import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _models import open_model
from decode import Prompts, link_rate

from prescope import attach
from prescope.core.machine import machine_facts
from prescope.engine.engine import Engine
from prescope.traces.result import RunResult

SYNCS = {"cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy"}
PARTS = ["dense", "decide", "stall", "experts", "gap", "wall", "ours"]


def main() -> None:
    """Run everything, print, write."""
    args = _arguments()
    link = link_rate()
    facts = {**machine_facts(), "device": torch.cuda.get_device_name(), "link_gb_per_s": link}
    print(
        f"# {facts['device']}, link {link:.1f} GB/s (pinned 64 MiB copies), {args.dtype}, {args.new} tokens out"
    )
    bench = open_model(args.model, torch.device("cuda"), getattr(torch, args.dtype))
    records: dict[str, Any] = {
        "machine": facts,
        "arguments": vars(args),
        "token": [],
        "fetch": [],
        "events": [],
    }
    with attach(bench.model, slots=1.0) as engine:
        source = Prompts(bench, [])
        for batch, share, mode in product(args.batch, args.slots, args.modes):
            decode, _, compiled = mode.partition("+")
            engine.configure(slots=share, decode=decode, compiled=bool(compiled))
            prompts = [source.draw(batch, args.prompt, seed=i) for i in range(args.repeats + 1)]
            row = token(engine, prompts, args.new, link)
            records["token"].append({"batch": batch, "slots": share, "mode": mode, **row})
            _write(args.out, records)
        if args.events:
            for batch in args.batch:
                engine.configure(slots=1.0, decode="gpu-driven", compiled=False)
                records["events"].append({"batch": batch, **events(engine, source, batch, args)})
        engine.configure(slots=0.25)
        records["fetch"] = fetch(engine)
    _write(args.out, records)
    _print(records)


def token(engine: Engine, prompts: list[torch.Tensor], new: int, link: float) -> dict[str, Any]:
    """Split of a decode token, microseconds, medians over the runs; the first run warms up."""
    runs = [engine.generate(prompt, max_new_tokens=new) for prompt in prompts][1:]
    splits = [split(run, link) for run in runs]
    row: dict[str, Any] = {part: statistics.median(s[part] for s in splits) for part in PARTS}
    return {**row, "ran": runs[-1].config["reasons"]["decode"], **launches(engine, prompts[0], new)}


def split(run: RunResult, link_gb_per_s: float) -> dict[str, float]:
    """Microseconds a decode token spends in each part, from the event table of one run."""
    events = run.events[run.events["phase"] == "decode"]
    steps = run.steps[run.steps["phase"] == "decode"]
    count = len(steps)
    sums = events.groupby(["lane", "kind"], observed=True)["dur_us"].sum()
    waits = events[events["kind"] == "host_wait"]
    gap = waits.loc[waits["moe_layer"] < 0, "dur_us"].sum()
    stall = float(sums.get(("stall", "stall"), 0.0))
    bytes_us = events.loc[events["lane"] == "h2d", "bytes"].sum() / link_gb_per_s / 1e3
    decide = float(waits["dur_us"].sum() - gap)
    parts = {
        "dense": float(sums.get(("gpu", "dense"), 0.0)),
        "decide": decide,
        "stall": stall,
        "experts": float(sums.get(("gpu", "experts"), 0.0)),
        "gap": float(gap),
        "wall": float(steps["dur_us"].sum()),
        "ours": decide + float(gap) + max(0.0, stall - bytes_us),
    }
    return {name: value / count for name, value in parts.items()}


def launches(engine: Engine, prompt: torch.Tensor, new: int) -> dict[str, float]:
    """Kernels on the GPU, launches from the host, graphs and host synchronisations per token: the difference between
    a long and a short run under torch's profiler."""
    long, short = (_profile(engine, prompt, tokens) for tokens in (new, new // 2))
    tokens = new - new // 2
    return {f"{name} / token": (long[name] - short[name]) / tokens for name in long}


def _profile(engine: Engine, prompt: torch.Tensor, new: int) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        engine.generate(prompt, max_new_tokens=new)
    events = profile.events()
    names = [event.name for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return {
        "kernels": len(kernels),
        "launches": sum(name in ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC")
                        for name in names),
        "graphs": sum(name == "cudaGraphLaunch" for name in names),
        "host syncs": sum(name in SYNCS for name in names),
    }  # fmt: skip


def events(engine: Engine, source: Prompts, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Cost of the timeline: wall time of whole runs with and without it, A-B-B-A."""
    prompt = source.draw(batch, args.prompt, seed=1)
    times: dict[bool, list[float]] = {True: [], False: []}
    for on in [True, False]:
        with engine.without_events(not on):
            engine.generate(prompt, max_new_tokens=args.new)
    for on in [True, False, False, True] * 3:
        with engine.without_events(not on):
            engine.generate(prompt, max_new_tokens=args.new)  # captures anew for the other setting
            run = engine.generate(prompt, max_new_tokens=args.new)
        times[on].append(run.metrics.tpot_ms)
    on_ms, off_ms = statistics.median(times[True]), statistics.median(times[False])
    return {
        "with_ms": on_ms,
        "without_ms": off_ms,
        "cost_frac": on_ms / off_ms - 1,
        "runs_ms": list(times.values()),
    }


def fetch(engine: Engine) -> list[dict[str, float]]:
    """GB/s of the fetch kernel for one layer's eight experts, by its number of programs and words per program."""
    from prescope.kernels import graph_kernels

    serving = engine.runner
    rows, pool = serving.host.layers[0].rows, serving.loader.pool
    count = min(8, len(rows), len(pool))
    which = torch.arange(count, dtype=torch.int32, device="cuda")
    needs = torch.tensor([count, count], dtype=torch.int32, device="cuda")
    stamps = torch.zeros(4, dtype=torch.int64, device="cuda")
    found = []
    for programs, words, warps in product([16, 32, 64, 132, 264], [512, 1024, 2048, 4096], [4, 8]):

        def run(programs=programs, words=words, warps=warps) -> None:
            graph_kernels.fetch[(programs,)](
                rows.view(torch.int64), pool.view(torch.int64), needs, which, which, stamps, rows.shape[1] // 8,
                pool.shape[1] // 8, BLOCK=words, TIMED=False, num_warps=warps,
            )  # fmt: skip

        run()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(8):
            run()
        end.record()
        end.synchronize()
        rate = 8 * count * rows.shape[1] / start.elapsed_time(end) / 1e6
        found.append({"programs": programs, "words": words, "warps": warps, "gb_per_s": rate})
    engine.clear_cache()
    return sorted(found, key=lambda row: -row["gb_per_s"])


def _print(records: dict[str, Any]) -> None:
    counts = ["kernels / token", "launches / token", "graphs / token", "host syncs / token"]
    print(
        "\nmicroseconds per decode token, medians; 'ours': deciding, gaps, and stall beyond bytes / link rate\n"
    )
    print("| batch | slots | mode | " + " | ".join([*PARTS, "ours %", *counts]) + " |")
    print("|" + "---|" * (len(PARTS) + len(counts) + 4))
    for row in records["token"]:
        values = [f"{row[part]:.0f}" for part in PARTS] + [f"{row['ours'] / row['wall']:.1%}"]
        values += [f"{row[count]:.1f}" for count in counts]
        print(f"| {row['batch']} | {row['slots']:.0%} | {row['mode']} | " + " | ".join(values) + " |")
    print("\nfetch kernel, best and worst five settings:")
    for row in [*records["fetch"][:5], *records["fetch"][-5:]]:
        print(
            f"  {row['programs']:4} programs x {row['words']:5} words, {row['warps']} warps: {row['gb_per_s']:.1f} GB/s"
        )
    for row in records["events"]:
        print(f"events, batch {row['batch']}: {row['with_ms']:.3f} ms with, {row['without_ms']:.3f} without "
              f"({row['cost_frac']:+.1%})")  # fmt: skip


def _write(path: str | None, records: dict[str, Any]) -> None:
    if path:
        Path(path).write_text(json.dumps(records, indent=1, default=str) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-30b-a3b-cut16")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--slots", nargs="+", type=float, default=[1.0, 0.25])
    parser.add_argument(
        "--modes", nargs="+", default=["layered", "gpu-driven", "host-driven", "gpu-driven+compiled"]
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--events", action="store_true", help="also measure what the timeline costs")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
