"""Which kernels a decode step and a prompt consist of, when all experts are in slots: where the GPU's time goes.

    python benchmarks/step_profile.py --model qwen3-30b-a3b-cut16 --batch 1 8 --compiled --out profile.json

Kernels of captured decode steps, from torch's profiler: how often each runs in a step, its time, and the time between
kernels. Then the second of two equal prompts: wall time to the first token, time of its kernels, and the Python
functions that take longest on the way (cProfile). Random weights, their own routing, greedy.
"""

import argparse
import cProfile
import io
import json
import pstats
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from _models import open_model
from decode import Prompts
from torch.profiler import ProfilerActivity, profile

from prescope import attach
from prescope.core.machine import machine_facts
from prescope.engine.engine import Engine

COMMON = 24  # kernels and functions that are printed


def main() -> None:
    """Profile each batch, print, write."""
    args = arguments()
    bench = open_model(args.model, torch.device("cuda"), torch.bfloat16)
    cells: list[dict[str, Any]] = []
    with attach(bench.model, slots=args.slots, schedule="on-demand", compiled=args.compiled) as engine:
        source = Prompts(bench, [])
        for batch in args.batch:
            prompt = source.draw(batch, args.prompt, seed=1).tolist()
            for _ in range(3):  # slots filled, everything compiled and captured
                engine.generate(prompt, max_new_tokens=args.new, min_new_tokens=args.new)
            cell = {"batch": batch, **decode(engine, prompt, args.new), **first_token(engine, prompt)}
            cells.append(cell)
            show(cell)
    if args.out:
        everything = {"machine": machine_facts(), "model": args.model, "slots": args.slots, "cells": cells}
        Path(args.out).write_text(json.dumps(everything, indent=1) + "\n")


def decode(engine: Engine, prompt: list[list[int]], new: int) -> dict[str, Any]:
    """Kernels per captured step."""
    run = engine.generate(prompt, max_new_tokens=new, min_new_tokens=new)
    wall = run.metrics.decode.wall_ms / run.metrics.decode.num_steps * 1e3
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.generate(prompt, max_new_tokens=new, min_new_tokens=new)
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    ends = [i for i, event in enumerate(kernels) if event.name == "_finish"]
    assert len(ends) > 4, "no captured step was found"
    first, last = ends[1] + 1, ends[-1]
    steps = len(ends) - 2
    found = kernels[first : last + 1]
    span = found[-1].time_range.end - found[0].time_range.start
    table: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in found:
        row = table[event.name]
        row[0] += 1
        row[1] += event.time_range.elapsed_us()
    busy = sum(row[1] for row in table.values())
    rows = [
        {"kernel": name, "per_step": count / steps, "us_per_step": us / steps}
        for name, (count, us) in sorted(table.items(), key=lambda item: -item[1][1])
    ]
    return {
        "tok_s": len(prompt) / wall * 1e6,
        "wall_us": wall,
        "profiled_us": span / steps,
        "busy_us": busy / steps,
        "kernels_per_step": len(found) / steps,
        "kernels": rows,
    }


def first_token(engine: Engine, prompt: list[list[int]]) -> dict[str, Any]:
    """The way to the first token of a prompt, when the slots have all it needs."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run = engine.generate(prompt, max_new_tokens=1)
        times.append((time.perf_counter() - start) * 1e3)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        engine.generate(prompt, max_new_tokens=1)
    events = profiler.events()
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    profiled = cProfile.Profile()
    profiled.enable()
    engine.generate(prompt, max_new_tokens=1)
    profiled.disable()
    text = io.StringIO()
    pstats.Stats(profiled, stream=text).sort_stats("cumulative").print_stats(70)
    return {
        "ttft_ms": run.metrics.ttft_ms,
        "generate_ms": sorted(times)[2],
        "prefill_kernels": len(kernels),
        "prefill_busy_ms": sum(event.time_range.elapsed_us() for event in kernels) / 1e3,
        "python": text.getvalue(),
    }


def show(cell: dict[str, Any]) -> None:
    """Print one batch."""
    print(
        f"\n## batch {cell['batch']}: {cell['tok_s']:.1f} tok/s, {cell['wall_us']:.0f} us a step "
        f"({cell['profiled_us']:.0f} profiled, {cell['busy_us']:.0f} in {cell['kernels_per_step']:.0f} kernels)\n"
    )
    print("| kernel | per step | us per step |\n|---|--:|--:|")
    for row in cell["kernels"][:COMMON]:
        print(f"| {row['kernel'][:90]} | {row['per_step']:.1f} | {row['us_per_step']:.1f} |")
    print(
        f"\nfirst token {cell['ttft_ms']:.1f} ms, generate with one token {cell['generate_ms']:.1f} ms, "
        f"{cell['prefill_kernels']} kernels of {cell['prefill_busy_ms']:.1f} ms\n"
    )
    print("\n".join(line[:150] for line in cell["python"].splitlines()[6:]))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-30b-a3b-cut16")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--slots", type=float, default=1.0)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
