"""All schedules on one model, measured, with the simulator's answer and the bound beside each.

    python benchmarks/schedules.py --model qwen3-30b-a3b-cut16 --batch 1 8 16 64 --slots 0.5 0.25 --out schedules.json

A published shape has random weights, so its decode steps are routed by a trace: drawn with the habits of tiny-moe's own
routing (--habits), the same for all schedules, and predicted by an oracle that errs as often as --recall says, labelled
"emulated predictor". A folder with a trained model routes itself and is predicted by a LLaPor trained in the same run.
Every run starts with empty slots behind the same prompt. The schedules of a batch and number of slots take turns,
--rounds times, so that what else goes on in the machine falls on all of them. The machine is calibrated first; the
simulator is then told what a layer took in one cell for each batch (marked *): its rest and decision, the link beside
the CPU, an expert on GPU and CPU; and nothing of the other cells. Prints a table and writes JSON after every batch and
number of slots, and beside it the trace and the predictions of each batch, so that its cells can be replayed elsewhere.
"""

import argparse
import json
import statistics
import time
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _models import open_model
from transformers import AutoTokenizer

import prescope
from prescope.core.machine import machine_facts
from prescope.engine.engine import Engine
from prescope.predictor import NoisyOracle, Predictor
from prescope.profile import SLOWER_LINKS, HardwareProfile, markdown
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import SimResult, Simulator, as_decode
from prescope.simulator.prepare import Predicted, Predictions, predictions_of
from prescope.traces.metrics import PhaseMetrics
from prescope.traces.result import RunResult
from prescope.traces.routing import RoutingTrace
from prescope.traces.synthetic import SyntheticSpec
from prescope.training import TrainConfig, record_trace

ORACLE = "presched+oracle"
COLUMNS = [
    "model", "batch", "slots", "schedule", "cache", "tok/s", "spread", "hit %", "late %", "miss %", "on CPU %", "GB",
    "used %", "on time %", "link GB/s", "stall %", "CPU wait %", "host %", "simulated", "error %", "bound",
    "of bound %",
]  # fmt: skip


class Case(NamedTuple):
    """What all cells of one batch share."""

    prompt: torch.Tensor
    forced: RoutingTrace | None
    predicted: dict[str, Predicted]  # by "recall" and "oracle"
    predictors: dict[str, Predictor | None]
    frequencies: np.ndarray  # (L, E) for the static cache


class Told(NamedTuple):
    """What one cell says of its batch."""

    clock: LayerCosts  # what things take in the simulator
    believed: (
        LayerCosts  # what its decisions go by: the engine learns the CPU's time with and without a busy link
    )
    step_us: float  # a step besides its layers


def main() -> None:
    """Run all models."""
    args = _arguments()
    args.deadline = time.perf_counter() + args.seconds
    records: list[dict[str, Any]] = []
    facts = machine_facts() | {"gpu": torch.cuda.get_device_name() if args.device == "cuda" else "emulated"}
    print(f"# {facts}", flush=True)
    try:
        for name in args.model:
            run_model(name, args, facts, records)
    except KeyboardInterrupt:
        print("# interrupted: what follows is what there is")
    except Exception:  # noqa: BLE001 - the cells so far are printed and kept
        traceback.print_exc()
    print("\n" + "\n".join([f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *map(row, records)]))


def run_model(
    name: str, args: argparse.Namespace, facts: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    """All cells of one model."""
    bench = open_model(name, torch.device(args.device), torch.bfloat16)
    settings: dict[str, Any] = {"device": args.device, "events": True, "compiled": args.compiled}
    settings["link_factor"] = args.link_factor
    tokenizer = AutoTokenizer.from_pretrained(bench.folder) if bench.folder else None
    with prescope.attach(bench.model, tokenizer=tokenizer, slots=1.0, **settings) as engine:
        engine.name = bench.name
        started = time.perf_counter()
        if args.profile:
            profile = HardwareProfile.load(args.profile)
        else:
            profile = prescope.calibrate(engine, seconds=args.calibrate_seconds, save=False)
        if args.link_factor > 1:
            profile = profile.emulated(args.link_factor, SLOWER_LINKS.get(args.link_factor, "slower link"))
        print(f"# calibrated in {time.perf_counter() - started:.0f} s: {profile.label}", flush=True)
        print(markdown(profile.table()), flush=True)
        if args.out:
            profile.save(Path(args.out).with_suffix(f".{plain(name)}.profile.json"))
        widths = widths_of(engine)
        for batch, new in zip(args.batch, args.new_of, strict=True):
            args.new = new
            case = make_case(engine, bench.weights, batch, args)
            sizes = {"width": widths[0], "expert_width": widths[1], "batch": batch}
            costs = profile.costs(engine.shape, rest_us=args.rest_us or None, **sizes)
            run_batch(engine, name, batch, case, costs, args, facts, records)


def run_batch(
    engine: Engine, name: str, batch: int, case: Case, costs: LayerCosts, args: argparse.Namespace,
    facts: dict[str, Any], records: list[dict[str, Any]],
) -> None:  # fmt: skip
    """All slots and schedules of one batch; PreSched's first cell sets the simulator's clock."""
    known: Told | None = None
    for slots in args.slots:
        cells: dict[str, tuple[dict[str, Any], RunResult]] = {}
        for schedule in args.schedules + (args.rounds - 1) * (args.again or args.schedules):
            if time.perf_counter() > args.deadline:
                print(f"# no time left for batch {batch}, {schedule}, {slots:.0%}", flush=True)
                continue
            try:
                cell, run = measure(engine, schedule, slots, case, costs, args)
            except Exception:  # noqa: BLE001 - one cell must not cost the others
                traceback.print_exc()
                engine.recover()
                continue
            if schedule in cells:
                cell["tokens_per_s_runs"] = (
                    cells[schedule][0]["tokens_per_s_runs"] + cell["tokens_per_s_runs"]
                )
            cell["tokens_per_s"] = statistics.median(cell["tokens_per_s_runs"])
            cells[schedule] = cell, run
        if known is None and "presched" in cells:
            cell, run = cells["presched"]
            cell["is_known"] = True
            known = told_by(engine, cell, case, run, costs, args.predict_us)
            if args.out and run.trace is not None:
                path = Path(args.out).with_suffix(f".{plain(name)}.b{batch}.safetensors")
                run.trace.save(path)
                keep_case(case, path.with_suffix(".npz"))
        for schedule, (cell, run) in cells.items():
            if args.events:
                keep_events(run, Path(args.events), f"{plain(name)}.b{batch}.{100 * slots:g}.{schedule}")
            cell |= {"model": name, "batch": batch, "costs": asdict(costs)}
            if known is not None:
                try:
                    cell |= simulated(engine, cell, case, known, run)
                except Exception:  # noqa: BLE001 - what was measured is kept
                    traceback.print_exc()
            records.append(cell)
            print(row(cell), flush=True)
        if args.out:
            arguments = {
                k: v for k, v in vars(args).items() if k not in ("llapor", "deadline", "out", "profile")
            }
            text = json.dumps(
                {"machine": facts, "arguments": arguments, "cells": records}, indent=1, default=str
            )
            Path(args.out).write_text(text + "\n")


def measure(
    engine: Engine, schedule: str, slots: float, case: Case, costs: LayerCosts, args: argparse.Namespace
) -> tuple[dict[str, Any], RunResult]:
    """Some runs from empty slots, after one that captures the step."""
    way = SCHEDULES[schedule.partition("+")[0]]
    which = "oracle" if schedule == ORACLE else "recall"
    cache = args.cache or way.cache
    predictor = case.predictors[which] if way.predictor != "none" else None
    started = time.perf_counter()
    engine.configure(slots=slots, cache=cache, schedule="on-demand", frequencies=case.frequencies)
    scores = None
    if case.forced is not None and predictor is not None:
        scores = case.predicted[which].forced()
    engine.force_routing(case.forced, scores)
    if way.name != "on-demand":
        engine.configure(schedule=way.name, predictor=predictor, costs=costs)
    runs, seconds = [], [time.perf_counter() - started]
    for i in range(args.repeats + 1):
        engine.clear_cache()
        run = engine.generate(case.prompt, max_new_tokens=args.new, min_new_tokens=args.new)
        seconds.append(time.perf_counter() - started)
        if i:
            runs.append(run)
    scheduling = engine.runner.scheduling
    cpu_factor = 1.0 if scheduling is None else scheduling.planner.cpu_factor
    beliefs = costs if scheduling is None else scheduling.planner.costs
    decode, last = runs[-1].metrics.decode, runs[-1]
    speeds = [run.metrics.tokens_per_s for run in runs]
    steps = last.steps[last.steps["phase"] == "decode"]["dur_us"].to_numpy()
    cell = {
        "schedule": schedule, "cache": cache, "slots": slots, "num_slots": engine.num_slots,
        "cpu_factor": cpu_factor, "learned_link_us": beliefs.link_us,
        "learned_link_busy_us": beliefs.link_busy_us, "is_known": False, "new": args.new,
        "tokens_per_s_runs": speeds, "seconds": seconds,  # until it is set up, until the end of each run
        "decode": last.config["reasons"]["decode"], "cpu": last.config["reasons"].get("cpu", ""),
        "predictor": predictor.name if predictor is not None else "none", "steps_us": steps.tolist(),
        **{field: getattr(decode, field) for field in FIELDS},
    }  # fmt: skip
    return cell, last


FIELDS = [
    "needed", "hits", "late", "misses", "on_cpu", "hit_rate", "late_rate", "miss_rate", "stall_ms", "stall_frac",
    "cpu_wait_ms", "host_wait_ms", "dense_gpu_ms", "experts_gpu_ms", "experts_cpu_ms", "wall_ms", "num_steps",
    "h2d_bytes", "h2d_busy_ms", "link_gb_per_s", "link_use_frac", "on_demand_transfers", "prefetch_transfers",
    "prefetched", "prefetch_accuracy", "prefetch_coverage", "prefetch_timeliness",
]  # fmt: skip


def keep_case(case: Case, path: Path) -> None:
    """What a replay of the trace needs besides: what was predicted, and the frequencies that a static cache goes by."""
    arrays = {"frequencies": case.frequencies}
    for name, predicted in case.predicted.items():
        arrays |= {f"{name}_{part}": values for part, values in predicted._asdict().items()}
    np.savez_compressed(path, **arrays)


def keep_events(run: RunResult, folder: Path, stem: str) -> None:
    """The tables of a cell's last run, to look at afterwards what its figures leave open."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in ("events", "layers", "steps"):
        getattr(run, table).to_parquet(folder / f"{stem}.{table}.parquet", index=False)


def told_by(
    engine: Engine, cell: dict[str, Any], case: Case, run: RunResult, costs: LayerCosts, predict_us: float
) -> Told:
    """Costs with a layer's rest, the decision, and an expert on link, GPU and CPU as one run had or learned them."""
    events = run.events[run.events["phase"] == "decode"]
    layers = int(run.layers["moe_layer"].max()) + 1
    steps, decode = run.metrics.decode.num_steps, run.metrics.decode
    dense = events[(events["kind"] == "dense")]
    inside = float(dense[dense["moe_layer"] >= 0]["dur_us"].sum()) / (steps * layers)
    # Layers whose experts were all there did not wait for a decision.
    missed = run.layers[run.layers["hits"] < run.layers["needed"]]
    waits = events[events["kind"] == "host_wait"].merge(missed[["step", "moe_layer"]])
    decide = float(waits["dur_us"].mean()) if len(waits) else costs.decide_us
    busy = float(events[events["lane"].isin(["gpu", "stall", "host"])]["dur_us"].sum())
    outside = (
        busy
        - float(
            events[(events["moe_layer"] >= 0) & events["lane"].isin(["gpu", "stall", "host"])]["dur_us"].sum()
        )
    ) / steps
    on_gpu = max(1, decode.needed - decode.on_cpu)
    source = (
        f"{costs.source}; rest, decision, link beside the CPU and experts' times from one run of PreSched"
    )
    # What it learned of the link, and what it copied, has in it what a batch takes besides.
    learned_us = cell["learned_link_us"]
    link_us = min(learned_us, max(costs.link_us, learned_us - costs.batch_us))
    told = replace(
        costs,
        rest_us=inside,
        link_us=link_us,
        link_busy_us=max(link_us, copy_us(decode) - costs.batch_us),
        decide_us=decide,
        gpu_us=1e3 * decode.experts_gpu_ms / on_gpu,
        predict_us=predict_us,
        source=source,
    )
    # How long link and CPU are busy beside each other depends on what both take.
    learned = replace(told, link_us=learned_us, link_busy_us=cell["learned_link_busy_us"])
    factor, believed = 1.0, with_cpu(learned, cell["cpu_factor"])
    for _ in range(4 if decode.on_cpu else 0):
        found = replay(
            engine, cell, case, Told(with_cpu(told, factor), believed, outside), run
        ).metrics.decode
        if found.on_cpu:  # by expert: how many there are is the decisions' affair
            factor *= decode.experts_cpu_ms / decode.on_cpu * found.on_cpu / found.experts_cpu_ms
        seen_us, found_us = (copy_us(of) - costs.batch_us for of in (decode, found))
        if min(seen_us, found_us) > 0:
            busy_us = told.link_busy_us or told.link_us
            told = replace(told, link_busy_us=max(told.link_us, busy_us * seen_us / found_us))
    return Told(with_cpu(told, factor), believed, outside)


def copy_us(of: PhaseMetrics) -> float:
    """What a copy took on the link, on average."""
    return 1e3 * of.h2d_busy_ms / max(1, of.on_demand_transfers + of.prefetch_transfers)


def with_cpu(costs: LayerCosts, factor: float) -> LayerCosts:
    """The same with another CPU."""
    cpu_us, alone_us = (tuple(factor * us for us in times) for times in (costs.cpu_us, costs.cpu_alone_us))
    return replace(costs, cpu_us=cpu_us, cpu_alone_us=alone_us, cpu_base_us=factor * costs.cpu_base_us)


def replay(engine: Engine, cell: dict[str, Any], case: Case, told: Told, run: RunResult) -> SimResult:
    """The same cell by the simulator."""
    assert run.trace is not None
    row_bytes = engine.shape.row_bytes
    clock = told.clock
    if cell["schedule"] == "on-demand":
        # The GPU decides, in the microseconds that are in the rest of a layer; the copy engine's orders are a message.
        way = cell["decode"]
        clock = replace(clock, decide_us=cell["costs"]["decide_us"] if way.startswith("copy-engine") else 0.0)
    simulator = Simulator(run.trace, clock, row_bytes=row_bytes, step_us=told.step_us)
    steps = len(simulator.needs.steps)
    which = "oracle" if cell["schedule"] == ORACLE else "recall"
    way = SCHEDULES[cell["schedule"].partition("+")[0]]
    if way.predictor != "none" and which in case.predicted:
        known = Predicted(*(part[:, :steps] for part in case.predicted[which]))
        simulator.predictions = Predictions.given(known, simulator.trace)
    frequencies = case.frequencies.astype(np.float64)
    return simulator.run(
        way.name,
        slots=cell["num_slots"],
        cache=cell["cache"],
        frequencies=frequencies,
        believed=told.believed,
    )


def simulated(engine: Engine, cell: dict[str, Any], case: Case, told: Told, run: RunResult) -> dict[str, Any]:
    """What the simulator says of a cell, and how far it is off."""
    result = replay(engine, cell, case, told, run)
    counts, bounds = result.counts, result.bounds
    return {
        "told": asdict(told.clock), "believed": asdict(told.believed), "step_us": told.step_us,
        "simulated_tokens_per_s": result.tokens_per_s,
        "simulated": {name: int(value) for name, value in counts._asdict().items()},
        "error_frac": result.tokens_per_s / cell["tokens_per_s"] - 1.0,
        "bounds": bounds._asdict(), "bound_tokens_per_s": bounds.tokens_per_s,
    }  # fmt: skip


def make_case(engine: Engine, weights: str, batch: int, args: argparse.Namespace) -> Case:
    """Prompt, routing and predictions of a batch."""
    vocabulary = engine.model.config.vocab_size
    prompt = torch.randint(
        0, vocabulary, (batch, args.prompt), generator=torch.Generator().manual_seed(batch)
    )
    if weights == "trained":
        return own_case(engine, batch, args)
    shape = engine.shape
    if args.own_routing:
        uses = np.ones((shape.num_layers, shape.num_experts))
        return Case(prompt, None, {}, {"recall": None, "oracle": None}, uses)
    spec = SyntheticSpec(
        num_layers=shape.num_layers, num_experts=shape.num_experts, top_k=shape.top_k, zipf=args.habits[0],
        persistence=args.habits[1], correlation=args.habits[2], diversity=args.habits[3],
    )  # fmt: skip
    trace = spec.generate(prompt_tokens=args.prompt, new_tokens=args.new, batch=batch, seed=1)
    recall = {a: r for a, r in zip((1, 2, 4), args.recall, strict=True) if a < shape.num_layers}
    predictors: dict[str, Predictor | None] = {
        "recall": NoisyOracle(trace, recall), "oracle": NoisyOracle(trace, dict.fromkeys(recall, 1.0)),
    }  # fmt: skip
    predicted = {name: predictions_of(one, trace) for name, one in predictors.items() if one is not None}
    # Of another run of the same made-up model: nobody knows the frequencies of what is to come.
    other = spec.generate(prompt_tokens=args.prompt, new_tokens=64, batch=max(8, batch), seed=2)
    return Case(prompt, trace, predicted, predictors, other.expert_counts())


def own_case(engine: Engine, batch: int, args: argparse.Namespace) -> Case:
    """A trained model on held-out text, routed by itself and predicted by LLaPor; trained for the first batch."""
    assert args.corpus, "a trained model needs --corpus, a folder with train/ and valid/"
    domains = sorted(path.stem for path in (Path(args.corpus) / "valid").glob("*.txt"))
    if not hasattr(args, "llapor"):
        train = excerpts(engine, Path(args.corpus) / "train", domains, args.train_prompts, 128)
        started = time.perf_counter()
        trained = prescope.train_predictor(
            engine, train, training=TrainConfig(epochs=args.epochs), own_tokens=8192
        )
        args.llapor = trained.predictor
        print(
            f"# LLaPor in {time.perf_counter() - started:.0f} s: {trained.predictor!r}\n{trained}", flush=True
        )
    each = -(-batch // len(domains))
    texts = excerpts(engine, Path(args.corpus) / "valid", domains, each, args.prompt)
    rows = [ids for some in zip(*texts.values(), strict=True) for ids in some][:batch]
    prompt = torch.tensor(rows)
    engine.configure(slots=1.0, schedule="on-demand")
    tokens = engine.generate(prompt, max_new_tokens=args.new, min_new_tokens=args.new).tokens
    print(
        f"# batch {batch}: {len({t for r in tokens for t in r})} distinct tokens of {args.new * batch}",
        flush=True,
    )
    whole = [[*ids, *new] for ids, new in zip(rows, tokens, strict=True)]
    trace = as_decode(record_trace(engine, {"own": whole}, max_tokens=args.prompt + args.new), batch)
    texts = excerpts(engine, Path(args.corpus) / "train", domains, 4, 128)
    frequencies = record_trace(engine, texts, max_tokens=128).expert_counts()
    predicted = predictions_of(args.llapor, trace)
    first = args.prompt  # the first decode step reads the token behind the prompt
    behind = Predicted(*(part[:, first:] for part in predicted))
    return Case(prompt, None, {"recall": behind}, {"recall": args.llapor, "oracle": None}, frequencies)


def excerpts(
    engine: Engine, folder: Path, domains: list[str], count: int, tokens: int
) -> dict[str, list[list[int]]]:
    """`count` excerpts of each domain, evenly spaced, `tokens` long each."""
    assert engine.tokenizer is not None, "text needs a tokenizer"
    found = {}
    for domain in domains:
        text = (folder / f"{domain}.txt").read_text(encoding="utf-8", errors="replace")
        starts = np.linspace(0, max(0, len(text) - 12 * tokens), count).astype(int)
        found[domain] = [
            engine.tokenizer(text[i : i + 12 * tokens])["input_ids"][1 : tokens + 1] for i in starts
        ]
    return found


def plain(name: str) -> str:
    """A model's name as part of a file's."""
    return Path(name).name.replace("~", "-")


def widths_of(engine: Engine) -> tuple[int, int]:
    """D and F of the first MoE layer."""
    _, width, expert_width = engine.layers[0].expert_size
    return width, expert_width


def row(cell: dict[str, Any]) -> str:
    """One line of the table."""
    runs, wall, nan = cell["tokens_per_s_runs"], cell["wall_ms"], float("nan")
    values = [
        cell["model"], str(cell["batch"]), f"{cell['slots']:.1%}", cell["schedule"] + ("*" if cell["is_known"] else ""),
        cell["cache"], f"{cell['tokens_per_s']:.1f}", f"{min(runs):.1f}-{max(runs):.1f}",
        *(f"{100 * cell[name]:.1f}" for name in ("hit_rate", "late_rate", "miss_rate")),
        f"{100 * cell['on_cpu'] / max(1, cell['needed']):.1f}", f"{cell['h2d_bytes'] / 1e9:.2f}",
        f"{100 * cell['prefetch_accuracy']:.0f}", f"{100 * cell['prefetch_timeliness']:.0f}",
        f"{cell['link_gb_per_s']:.1f}", f"{100 * cell['stall_frac']:.1f}", f"{100 * cell['cpu_wait_ms'] / wall:.1f}",
        f"{100 * cell['host_wait_ms'] / wall:.1f}", f"{cell.get('simulated_tokens_per_s', nan):.1f}",
        f"{100 * cell.get('error_frac', nan):+.1f}", f"{cell.get('bound_tokens_per_s', nan):.1f}",
        f"{100 * cell['tokens_per_s'] / cell.get('bound_tokens_per_s', nan):.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(values)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["qwen3-30b-a3b-cut16"], help="published shapes")
    add("--batch", nargs="+", type=int, default=[1, 8, 16, 64])
    add("--slots", nargs="+", type=float, default=[0.5, 0.25, 0.125])
    add("--schedules", nargs="+", default=[*SCHEDULES, ORACLE])
    add("--cache", default="", help="one cache policy for all; by default each schedule's own")
    add(
        "--own-routing",
        action="store_true",
        help="a shape's random weights route themselves; nothing is predicted",
    )
    add(
        "--habits",
        nargs=4,
        type=float,
        default=[1.05, 0.07, 0.29, 1.0],
        help="zipf, persistence, correlation, diversity",
    )
    add(
        "--recall",
        nargs=3,
        type=float,
        default=[0.86, 0.83, 0.80],
        help="of the emulated predictor, 1, 2, 4 layers ahead",
    )
    add("--corpus", default="", help="text for a trained model: a folder with train/ and valid/")
    add("--train-prompts", type=int, default=30, help="of each domain, for LLaPor")
    add("--epochs", type=int, default=5, help="of LLaPor's training")
    add("--prompt", type=int, default=16, help="tokens in")
    add("--new", nargs="+", type=int, default=[24], help="tokens out, for all batches or for each")
    add("--rounds", type=int, default=2, help="turns of each schedule")
    add("--again", nargs="+", default=[], help="only these have more turns than one")
    add("--repeats", type=int, default=1, help="runs of a turn")
    add(
        "--link-factor",
        type=int,
        default=1,
        help="copies of each expert: 2 emulates PCIe 4 on PCIe 5, 4 PCIe 3",
    )
    add("--compiled", action="store_true", help="compile the layers around the experts")
    add("--profile", default="", help="of this machine, to save the time of measuring it")
    add(
        "--rest-us",
        type=float,
        default=0.0,
        help="the rest of a layer, for models that --profile does not know",
    )
    add("--predict-us", type=float, default=15.0, help="one prediction, for the simulator: beside the layer")
    add("--calibrate-seconds", type=float, default=45.0)
    add("--seconds", type=float, default=1e9, help="start no new cell after this")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: an emulated link, to try the script")
    add("--out", help="JSON file; profile and traces are written beside it")
    add("--events", default="", help="folder for the event, layer and step tables of each cell's last run")
    args = parser.parse_args()
    args.new_of = args.new * len(args.batch) if len(args.new) == 1 else args.new
    if len(args.new_of) != len(args.batch):
        parser.error(f"--new has {len(args.new)} numbers, --batch {len(args.batch)}")
    return args


if __name__ == "__main__":
    main()
