"""What the simulator takes for large models: peak memory and time by the number of layers.

Each cell runs in a process of its own, whose peak includes Python, numba and torch (`imports_mib`). Decisions are
compiled before the clock starts. Routing is drawn by popularity, top-10 of 512 experts, batch 1.

    python benchmarks/simulator_scale.py [--layers 24 48 94] [--tokens 4096] [--json scale.json] [--md ...]

The first rows are what the house promises: the largest model with predictions made in parts takes 1 GB at most, and
time grows with the layers, not with their square. No cell begins after --seconds.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from prescope.core.machine import machine_facts
from prescope.predictor import NoisyOracle
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator
from prescope.traces.routing import RoutingTrace

COSTS = LayerCosts(
    link_us=172.0,
    gpu_us=5.0,
    rest_us=90.0,
    decide_us=60.0,
    cpu_us=(0.0, *(140.0 + 6.0 * n for n in range(1, 17))),
    cpu_base_us=20.0,
    source="stated: link 172 us, GPU 5, CPU 140 + 6 a token, rest 90, decision 60",
)
EXPERTS, TOP_K = 512, 10
#: Schedule, and whether it is predicted for.
WAYS = (("presched", True), ("on-demand", False), ("presched", False), ("fiddler", False))
SLOTS = 0.25


def trace_of(layers: int, tokens: int, seed: int = 0) -> RoutingTrace:
    """A run of one sequence: a prompt of one token, then decode steps whose experts are drawn by popularity."""
    rng = np.random.default_rng(seed)
    odds = -np.log(rng.random((layers, EXPERTS), dtype=np.float32))
    ids = np.empty((tokens + 1, layers, TOP_K), np.int16)
    for row in range(tokens + 1):
        race = rng.standard_exponential((layers, EXPERTS), dtype=np.float32) / odds
        ids[row] = np.argpartition(race, TOP_K, axis=-1)[:, :TOP_K]
    step = np.arange(tokens + 1)
    return RoutingTrace(
        expert_ids=ids,
        weights=np.full(ids.shape, 1.0 / TOP_K, np.float32),
        step=step,
        sequence=np.zeros(tokens + 1, int),
        position=step,
        phase=(step > 0).astype(int),
        model=f"{layers} x {EXPERTS}, top-{TOP_K}, drawn",
        fingerprint="",
        num_experts=EXPERTS,
        top_k=TOP_K,
        decoder_layers=list(range(layers)),
    )


def peak_mib() -> float:
    """Most memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def cell(layers: int, tokens: int, schedule: str, predicted: bool) -> dict[str, Any]:
    """One replay, in this process."""
    small = trace_of(4, 8)
    warm = NoisyOracle(small, {1: 0.8, 2: 0.7}) if predicted else None
    Simulator(small, COSTS, row_bytes=9_400_000, predictor=warm, lookahead=2).run(schedule, slots=SLOTS)
    imports = peak_mib()
    trace = trace_of(layers, tokens)
    begin = time.process_time()
    predictor = NoisyOracle(trace, {1: 0.8, 2: 0.7}) if predicted else None
    simulator = Simulator(trace, COSTS, row_bytes=9_400_000, predictor=predictor, lookahead=2)
    ready = time.process_time()
    run = simulator.run(schedule, slots=SLOTS)
    end = time.process_time()
    return {
        "layers": layers,
        "tokens": tokens,
        "schedule": schedule,
        "predicted": predicted,
        "imports_mib": round(imports),
        "peak_mib": round(peak_mib()),
        "prepare_s": round(ready - begin, 2),
        "replay_s": round(end - ready, 2),
        "tokens_per_s": run.tokens_per_s,
    }


def main() -> None:
    """Run all cells, each in a process."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[24, 48, 94])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ways", type=int, nargs="+", default=[0, 1, 2], help="numbers in WAYS")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no cell after so long")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--md", type=Path)
    parser.add_argument("--cell", help="one cell as JSON, in this process: what the others are started with")
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(cell(**json.loads(args.cell))))
        return
    rows, started = [], time.perf_counter()
    print("\n".join(head()), flush=True)
    for way in args.ways:
        for layers in args.layers:
            if time.perf_counter() - started > args.seconds:
                print(f"# out of time before {WAYS[way]}, {layers} layers")
                continue
            schedule, predicted = WAYS[way]
            told = {"layers": layers, "tokens": args.tokens, "schedule": schedule, "predicted": predicted}
            done = subprocess.run(
                [sys.executable, __file__, "--cell", json.dumps(told)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(line(rows[-1]), flush=True)
    said = f"{EXPERTS} experts, top-{TOP_K}, {100 * SLOTS:.0f} % in slots; costs {COSTS.source}"
    print(f"\n{growth(rows)}\n{said}")
    command = " ".join(["python", *sys.argv])
    if args.json:
        contents = {
            "date": datetime.now(UTC).date().isoformat(),
            "command": command,
            "machine": machine_facts(),
            "load": os.getloadavg()[0],
            "about": said,
            "rows": rows,
        }
        args.json.write_text(json.dumps(contents, indent=1) + "\n")
    if args.md:
        title = f"# What the simulator takes for large models, {datetime.now(UTC).date()}"
        about = f"`{command}`, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; {said}."
        args.md.write_text(
            "\n".join([title, "", about, "", *head(), *map(line, rows), "", growth(rows)]) + "\n"
        )


def head() -> list[str]:
    """Of the table."""
    names = (
        "layers",
        "tokens",
        "schedule",
        "predicted",
        "peak, MiB",
        "of it imports",
        "prepare, s",
        "replay, s",
    )
    return [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]


def line(row: dict[str, Any]) -> str:
    """A row of the table; seconds are the processor's."""
    values = [row[name] for name in ("layers", "tokens", "schedule")]
    values += [
        "yes" if row["predicted"] else "",
        row["peak_mib"],
        row["imports_mib"],
        row["prepare_s"],
        row["replay_s"],
    ]
    return f"| {' | '.join(map(str, values))} |"


def growth(rows: list[dict[str, Any]]) -> str:
    """Peak of all, and the power of the layers that a replay's time grows with, of each way."""
    told = [f"Peak of all: {max(row['peak_mib'] for row in rows)} MiB."]
    for schedule, predicted in WAYS:
        own = [row for row in rows if (row["schedule"], row["predicted"]) == (schedule, predicted)]
        own = [row for row in own if row["replay_s"] > 0]
        if len({row["layers"] for row in own}) > 1:
            layers, took = (np.log([row[name] for row in own]) for name in ("layers", "replay_s"))
            name = f"{schedule}{' with predictions' if predicted else ''}"
            told.append(f"Time of {name} grows with layers ^ {np.polyfit(layers, took, 1)[0]:.2f}.")
    return " ".join(told)


if __name__ == "__main__":
    main()
