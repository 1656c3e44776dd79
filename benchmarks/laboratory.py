"""Every schedule on the simulator: who is ahead in which cell, and by how much.

No GPU. Tokens/s of a simulator are no results of a machine; what is compared here is decisions. By cache policy (costs
are stated below, traces are synthetic or tiny-moe's own: its early router predicts, an expert counts as 9.4 MB):

    python benchmarks/laboratory.py [caches] [--traces olmoe-like qwen-like skewed tiny-moe] [--no-cpu]

By link, shape, batch, share of slots and predictor (`_cells`), PreSched against every other schedule, in parts of less
than three minutes on one core, which are put together afterwards:

    python benchmarks/laboratory.py cells --part 1/3 --out part1.json      # and 2/3, 3/3
    python benchmarks/laboratory.py merge part1.json part2.json part3.json
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from _cell_report import report as cell_report
from _cells import LINKS, RECORDED, SHAPES, STEPS, tasks, text_of
from _cells import measure as measure_cells

import prescope
from prescope.predictor import EarlyRouter, NoisyOracle, Predictor
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Simulator
from prescope.traces.routing import RoutingTrace
from prescope.traces.synthetic import SyntheticSpec
from prescope.training import own_prompts, routers_of

#: Like one Qwen3-30B expert on an H200 behind PCIe 5: stated, so that the table can be made anywhere.
COSTS = LayerCosts(
    link_us=172.0,
    gpu_us=5.0,
    rest_us=90.0,
    predict_us=60.0,
    decide_us=60.0,
    cpu_us=(0.0, *(140.0 + 6.0 * n for n in range(1, 65))),
    cpu_base_us=20.0,
    source="stated: link 172 us, GPU 5, CPU 140 + 6 a token, rest 90, prediction 60, decision 60",
)
ROW_BYTES = 9_400_000
BATCHES = {1: 128, 8: 64, 16: 48, 64: 32}  # batch -> decode steps
SLOTS = (0.125, 0.25, 0.5)
CACHES = ("lru", "lfu", "score", "static", "shallow", "next-use")
RECALL = {1: 0.85, 2: 0.8, 3: 0.75, 4: 0.7}
SPECS = {
    "olmoe-like": SyntheticSpec(
        num_layers=16, num_experts=64, top_k=8, zipf=0.7, persistence=0.3, correlation=0.3, diversity=0.3
    ),
    "qwen-like": SyntheticSpec(
        num_layers=16, num_experts=128, top_k=8, zipf=0.4, persistence=0.2, correlation=0.2, diversity=0.5
    ),
    "skewed": SyntheticSpec(
        num_layers=16, num_experts=64, top_k=4, zipf=1.2, persistence=0.4, correlation=0.3, diversity=0.2
    ),
}


class Case(NamedTuple):
    """One trace of one batch, with the frequencies of another run for the static cache."""

    name: str
    batch: int
    trace: RoutingTrace
    predictor: Predictor
    frequencies: np.ndarray


def synthetic(name: str) -> Iterator[Case]:
    """A made-up model's runs, with a predictor that errs at a chosen rate."""
    spec = SPECS[name]
    other = spec.generate(prompt_tokens=64, new_tokens=65, batch=16, seed=2).expert_counts()
    for batch, steps in BATCHES.items():
        trace = spec.generate(prompt_tokens=64, new_tokens=steps + 1, batch=batch, seed=1)
        yield Case(name, batch, trace, NoisyOracle(trace, RECALL), other)


def tiny_moe() -> Iterator[Case]:
    """tiny-moe's own runs, sampled, with its early router."""
    engine = prescope.load("data/tiny-moe", slots=1.0, device="null", decode="layered", record_inputs=True)
    texts = [text for domain in own_prompts().values() for text in domain]
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    with engine:
        traces = {}
        for batch, steps in BATCHES.items():
            chosen = [texts[i] for i in rng.choice(len(texts), batch, replace=batch > len(texts))]
            tokens = [engine.tokenizer(text, truncation=True, max_length=48)["input_ids"] for text in chosen]
            run = engine.generate(
                tokens, max_new_tokens=steps + 1, do_sample=True, temperature=1.0, eos_token_id=None
            )
            traces[batch] = run.trace
        early = EarlyRouter(traces[1].shape, routers_of(engine, traces[16]), 4)
    early.calibrate(traces[16])
    for batch, trace in traces.items():
        other = traces[8 if batch != 8 else 16].expert_counts()
        yield Case("tiny-moe", batch, trace, early, other)


def measure(case: Case, costs: LayerCosts) -> list[dict]:
    """Tokens/s of every schedule, cache and number of slots."""
    sim = Simulator(case.trace, costs, row_bytes=ROW_BYTES, predictor=case.predictor)
    rows = []
    for slots in SLOTS:
        for cache in CACHES:
            for name in SCHEDULES:
                run = sim.run(name, slots=slots, cache=cache, frequencies=case.frequencies)
                rows.append(
                    {
                        "trace": case.name,
                        "batch": case.batch,
                        "slots": slots,
                        "cache": cache,
                        "schedule": name,
                        "tokens_per_s": run.tokens_per_s,
                        "bound": run.bounds.tokens_per_s,
                    }
                )
    return rows


def markdown(frame: pd.DataFrame, digits: int) -> str:
    """A table with one row a cell."""
    head = ["trace", "batch", "slots", *map(str, frame.columns)]
    lines = ["| " + " | ".join(head) + " |", "|---|--:|--:|" + "--:|" * len(frame.columns)]
    for (trace, batch, slots), row in zip(frame.index, frame.to_numpy(), strict=True):
        numbers = " | ".join(f"{value:.{digits}f}" for value in row)
        lines.append(f"| {trace} | {batch} | {100 * slots:g} % | {numbers} |")
    return "\n".join(lines)


def report(table: pd.DataFrame) -> str:
    """Markdown: each schedule with the cache it comes with, then PreSched over the best other under each cache."""
    cells = ["trace", "batch", "slots"]
    own = table[table["cache"] == table["schedule"].map({n: s.cache for n, s in SCHEDULES.items()})]
    wide = own.pivot_table("tokens_per_s", cells, "schedule")[list(SCHEDULES)]
    wide["bound"] = own[own["schedule"] == "presched"].set_index(cells)["bound"]
    lines = ["Each schedule with its own cache, decode tokens/s:", "", markdown(wide, 1), ""]
    ratios = {}
    for cache in CACHES:
        speed = table[table["cache"] == cache].pivot_table("tokens_per_s", cells, "schedule")
        ratios[cache] = speed["presched"] / speed.drop(columns="presched").max(axis=1)
    frame = pd.DataFrame(ratios)
    lines += [
        "PreSched over the best other schedule under the same cache:",
        "",
        markdown(frame, 3),
        "",
    ]
    best = table[table["schedule"] != "presched"].groupby(cells)["tokens_per_s"].max()
    for cache in ("score", "next-use"):
        ours = table[(table["schedule"] == "presched") & (table["cache"] == cache)].set_index(cells)[
            "tokens_per_s"
        ]
        ratio = ours / best
        trace, batch, slots = ratio.idxmin()
        lines.append(
            f"PreSched with {cache} over the best other with any cache: mean {np.exp(np.log(ratio).mean()):.3f}, "
            f"least {ratio.min():.3f} ({trace}, batch {batch}, {100 * slots:g} %)."
        )
    return "\n".join(lines)


def caches(options: argparse.Namespace) -> None:
    """Print the tables by cache policy."""
    costs = replace(COSTS, cpu_us=(), source=COSTS.source + ", no CPU lane") if options.no_cpu else COSTS
    rows = []
    for name in options.traces:
        for case in tiny_moe() if name == "tiny-moe" else synthetic(name):
            rows += measure(case, costs)
    print(f"Simulated; costs {costs.source}.\n")
    print(report(pd.DataFrame(rows)))


def cells(options: argparse.Namespace) -> None:
    """Replay one part of the cells and keep or print what came of it."""
    i, n = (int(word) for word in options.part.split("/"))
    chosen = tasks(tuple(options.batch), tuple(options.shapes), tuple(options.links))[i - 1 :: n]
    rows: list[dict] = []
    habits = {}
    begin = time.perf_counter()
    for task in chosen:
        habits[f"{task.shape}, batch {task.batch}"] = text_of(task.shape, task.batch, options.seed).habits
        rows += measure_cells(task, options.seed)
    print(f"part {options.part}: {len(rows)} replays, {time.perf_counter() - begin:.0f} s")
    part = {"seed": options.seed, "habits": habits, "rows": rows}
    if options.out:
        Path(options.out).write_text(json.dumps(part))
    else:
        print(_cells_text([part]))


def merge(options: argparse.Namespace) -> None:
    """Print what several parts say together."""
    print(_cells_text([json.loads(Path(name).read_text()) for name in options.files]))


def _cells_text(parts: list[dict]) -> str:
    seeds = sorted({part["seed"] for part in parts})
    rows = pd.DataFrame([row for part in parts for row in part["rows"]])
    keys = ["shape", "batch", "link", "slots", "predictor", "schedule"]
    if len(seeds) > 1 or rows.duplicated(keys).any():
        raise SystemExit(f"these are not parts of one run: seeds {seeds}, or a cell is there twice")
    habits = {name: text for part in parts for name, text in part["habits"].items()}
    lines = [f"Simulated. Seed of the traces: {seeds[0]}.", ""]
    lines += [f"- {name}: {text}" for name, text in sorted(habits.items())]
    return "\n".join([*lines, "", cell_report(rows)])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", default="caches", choices=["caches", "cells", "merge"])
    parser.add_argument("files", nargs="*", help="merge: what `cells --out` wrote")
    group = parser.add_argument_group("caches")
    group.add_argument("--traces", nargs="+", default=[*SPECS, "tiny-moe"], choices=[*SPECS, "tiny-moe"])
    group.add_argument("--no-cpu", action="store_true", help="without a CPU lane")
    group = parser.add_argument_group("cells")
    group.add_argument("--part", default="1/1", help="i/n: the i-th of n parts")
    group.add_argument("--out", help="file for the part's figures, JSON; printed if none is given")
    group.add_argument("--seed", type=int, default=20261129, help="of the traces and their habits")
    group.add_argument("--shapes", nargs="+", default=[*SHAPES, RECORDED], choices=[*SHAPES, RECORDED])
    group.add_argument("--batch", nargs="+", type=int, default=[1, 8, 64], choices=list(STEPS))
    group.add_argument("--links", nargs="+", default=list(LINKS), choices=list(LINKS))
    options = parser.parse_args()
    {"caches": caches, "cells": cells, "merge": merge}[options.mode](options)


if __name__ == "__main__":
    main()
