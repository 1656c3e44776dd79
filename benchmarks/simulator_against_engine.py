"""The engine against the simulator, at settings drawn by a seed: hits, late ones, tokens/s inside the stated interval.

    python benchmarks/simulator_against_engine.py --settings 48 --json out.json --md ...      # the GPU, else emulated
    python benchmarks/simulator_against_engine.py --model qwen3-30b-a3b-cut16 ...             # a shape, random weights
    python benchmarks/simulator_against_engine.py --clock virtual                             # rules alone, no times

Of each batch six runs are known to the simulator: two on demand, two whose schedule decides without predictions, and
two with the CPU lane, beside copies and without; a seventh, which no time is taken of, records what the routers read.
They say what a layer takes, a calibration says it of the CPU's experts. All settings that are drawn are held out. The
engine runs each from cold slots, by the same costs that the simulator believes. Predictors: those that need no
training, one that is right as often as --recall says (forced upon the engine), and with --train a LLaPor.

Runs are routed as the recorded one was: with other slots sums are rounded in another order, and a text that goes on
otherwise says nothing of the simulator.

On a virtual clock the engine computes for real and link, layers and experts take stated times: what differs there is a
rule, what differs on another clock alone is a time. With --clock processor only the link's time is stated (emulated),
the rest takes the thread's processor time: an idle machine on a busy one, of one core beside link and CPU lane. On the
real clock the script measures between cells which share of a core's time others take; on a busy machine the table says
so, and its tokens/s say little.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _known_runs import OWN, known_machine
from _models import is_shape, open_model

import prescope
from prescope.cache.policies import POLICIES
from prescope.core.machine import machine_facts
from prescope.engine.engine import Engine
from prescope.engine.graph.prediction_time import prediction_us
from prescope.engine.predicting import Predicting
from prescope.predictor import EarlyRouter, Frequency, Predictor, Transition
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import (
    HERE,
    NOISY,
    NONE,
    Machine,
    Scenario,
    Scenarios,
    SimResult,
    Simulator,
)
from prescope.traces.result import RunResult
from prescope.training import own_prompts, record_trace, routers_of
from tests.support.virtual_clock import ProcessorTimeDevice, VirtualDevice, virtual_clock

SHARES = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.625, 0.75)
LOOKAHEAD = 4
#: Of the virtual clock: the copy of an expert takes as long as a layer, so that many prefetches are late.
STATED = LayerCosts(
    link_us=1000.0,
    gpu_us=50.0,
    rest_us=700.0,
    decide_us=100.0,
    cpu_us=(0.0, *(400.0 + 100.0 * n for n in range(1, 65))),
    cpu_base_us=100.0,
    is_layered=True,
    source="stated",
)
#: From this share on, the time that others take of a core is said.
BUSY = 0.1
#: Prompts drawn for a model without a tokenizer, besides those that predictors are made from.
DRAWN_PROMPTS = 72
#: Points by which hits may differ.
CLOSE = 1.0


#: Texts, or lists of token ids of a model that has no tokenizer.
Prompts = list[str] | list[list[int]]


class Case(NamedTuple):
    """One batch: its prompts, its recorded trace under any setting, and the length of its runs."""

    prompts: Prompts
    scenarios: Scenarios
    run: RunResult
    new: int


def drawn(
    count: int, batches: list[int], predictors: list[str], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Settings; each schedule comes equally often."""
    names = [list(SCHEDULES)[i % len(SCHEDULES)] for i in range(count)]
    found = []
    for name in names:
        way = SCHEDULES[name]
        is_predicting = way.predictor != "none"
        found.append(
            {
                "batch": int(rng.choice(batches)),
                "schedule": name,
                "share": float(rng.choice(SHARES)),
                "cache": str(rng.choice(list(POLICIES))) if rng.random() < 0.4 else None,
                "cpu": bool(way.uses_cpu and rng.random() < 0.6),
                "predictor": str(rng.choice(predictors)) if is_predicting else NONE,
                "lookahead": int(rng.choice([1, 2, 4])) if is_predicting and rng.random() < 0.4 else None,
                "threshold": float(rng.choice([0.1, 0.3, 0.5]))
                if is_predicting and rng.random() < 0.3
                else None,
            }
        )
    return sorted(found, key=lambda one: one["batch"])


def stated(args: argparse.Namespace) -> LayerCosts:
    """Times of the virtual clock; of the processor's, only the link's is."""
    return replace(STATED, link_us=args.link_us)


# -- the engine ------------------------------------------------------------------------------------------------------


@contextmanager
def opened(args: argparse.Namespace) -> Iterator[Engine]:
    """An engine on the clock that is asked for."""
    kinds = {"virtual": VirtualDevice, "processor": ProcessorTimeDevice}
    is_real = args.clock == "real"
    clock = nullcontext() if is_real else virtual_clock(stated(args), kinds[args.clock])
    where = {"device": args.device} if is_real else {"device": "null", "decode": "layered"}
    if args.clock == "processor":
        torch.set_num_threads(1)  # all of it is in one thread's time
    kept = {"slots": 0.5, "record_routing": True, **where}
    with clock:
        if not args.model or not is_shape(args.model):
            with prescope.load(args.model, **kept) as engine:
                yield engine
            return
        on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bench = open_model(args.model, on, torch.bfloat16)
        with prescope.attach(bench.model, **kept) as engine:
            engine.name = f"{bench.name}'s shape, {bench.weights} weights,"
            yield engine


def prompts_of(engine: Engine, args: argparse.Namespace) -> Prompts:
    """What the settings run and predictors are made from: the project's own texts, or tokens drawn by the seed."""
    if engine.tokenizer is not None:
        return [text[: args.prompt] for several in own_prompts().values() for text in several]
    rng = np.random.default_rng([args.seed, 1])
    words = engine.model.config.get_text_config().vocab_size
    return rng.integers(1, words, (args.fitted + DRAWN_PROMPTS, args.prompt // 4)).tolist()


def predictors_of(engine: Engine, texts: Prompts, *, trained: bool) -> list[Predictor]:
    """Made from prompts that the settings do not run."""
    trace = record_trace(engine, texts, max_tokens=64)
    made: list[Predictor] = [
        EarlyRouter(trace.shape, routers_of(engine, trace), LOOKAHEAD),
        Transition(trace, LOOKAHEAD),
        Frequency(trace, LOOKAHEAD),
    ]
    return [prescope.train_predictor(engine, texts).predictor, *made] if trained else made


def generate(engine: Engine, prompts: Prompts, new: int, **settings: Any) -> RunResult:
    """One run from cold slots, behind one that warms up."""
    engine.configure(**settings)
    engine.generate(prompts, max_new_tokens=new if engine.runner.device.captures_steps else 2)
    engine.clear_cache()
    return engine.generate(prompts, max_new_tokens=new, min_new_tokens=new)


def record_run(engine: Engine, prompts: Prompts, new: int) -> RunResult:
    """One run with what its routers read, which takes a host step longer than without."""
    former = engine.config
    engine.config = replace(former, record_inputs=True)
    try:
        return engine.generate(prompts, max_new_tokens=new, min_new_tokens=new)
    finally:
        engine.config = former


def case_of(engine: Engine, prompts: Prompts, predictors: list[Predictor], args: argparse.Namespace) -> Case:
    """Record a batch, and what its layers take."""
    new = args.new if len(prompts) <= 8 else max(8, args.new // 2)
    engine.force_routing(None)
    engine.configure(schedule="on-demand", slots=0.5, **OWN)
    recorded = record_run(engine, prompts, new)
    assert recorded.trace is not None
    hot = recorded.trace.expert_counts()
    engine.force_routing(recorded.trace)
    engine.configure(frequencies=hot)
    if args.clock == "virtual":
        machine = Machine(HERE, stated(args), engine.shape.row_bytes, 0.0, 0, is_here=True)
        return Case(prompts, Scenarios(recorded.trace, [machine], predictors, frequencies=hot), recorded, new)

    def run(**settings: Any) -> RunResult:
        return generate(engine, prompts, new, **settings)

    machine = known_machine(engine, run, args.profile, has_lane=args.clock == "real")
    if args.clock == "processor":
        engine.runner.device.jobs.clear()
        run(schedule="static-split", slots=0.5, cpu_threads=1, costs=stated(args), **OWN)
        machine = machine._replace(costs=with_cpu(machine.costs, engine.runner.device.jobs, len(prompts)))
    spent = {one.name: predict_us(one, recorded, engine, args) for one in predictors}
    spent[NOISY] = spent["frequency"]
    scenarios = Scenarios(recorded.trace, [machine], predictors, predict_us=spent, frequencies=hot)
    return Case(prompts, scenarios, recorded, new)


def with_cpu(costs: LayerCosts, jobs: list[tuple[list[int], float]], batch: int) -> LayerCosts:
    """Costs with a CPU lane whose jobs took so long: a submission, each expert, each of its tokens."""
    parts = np.array([[1.0, len(tokens), sum(tokens)] for tokens, _ in jobs])
    took = np.array([us for _, us in jobs])
    fitted = np.maximum(0.0, np.linalg.lstsq(parts, took, rcond=None)[0])
    fitted *= np.median(took / (parts @ fitted))
    base, each, token = fitted.tolist()
    low, high = np.quantile(took / (parts @ fitted), [0.05, 0.95])
    return replace(
        costs,
        cpu_us=(0.0, *(each + token * n for n in range(1, max(batch, 16) + 1))),
        cpu_base_us=base,
        spread=costs.spread._replace(cpu=float(high - low) / 2),
    )


def predict_us(one: Predictor, run: RunResult, engine: Engine, args: argparse.Namespace) -> float:
    """What a prediction takes in a layer's way."""
    assert run.trace is not None and run.trace.inputs is not None
    batch, device = run.metrics.batch, engine.runner.device.torch_device
    if args.clock == "real":
        width, is_captured = run.trace.inputs.shape[2], engine.runner.device.captures_steps
        return prediction_us(one, engine.runner.device, batch, width, is_captured)
    asked = Predicting(one.to(device), LOOKAHEAD)
    rows = [
        torch.from_numpy(part[-batch:, 0])
        for part in (run.trace.inputs, run.trace.expert_ids, run.trace.weights)
    ]
    x, ids, weights = rows[0].float(), rows[1].long(), rows[2]
    took = []
    for _ in range(30):
        begin = time.thread_time()
        asked.predict(0, x, ids, weights)
        took.append(1e6 * (time.thread_time() - begin))
    return statistics.median(took)


def scenario_of(setting: dict[str, Any], engine: Engine, recall: float) -> Scenario:
    """The same, in the simulator's words."""
    slots = max(engine.shape.top_k, round(setting["share"] * engine.shape.total_experts))
    told = {
        name: setting[name] for name in ("schedule", "cache", "cpu", "predictor", "lookahead", "threshold")
    }
    return Scenario(slots=slots, recall=recall, **told)


def measure(engine: Engine, case: Case, setting: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One setting, run and simulated."""
    scenario = scenario_of(setting, engine, args.recall)
    scenarios, is_forced = case.scenarios, setting["predictor"] == NOISY
    stand_in = replace(scenario, predictor="frequency") if is_forced else scenario
    told = scenarios.engine_settings(stand_in)
    engine.configure(**told)
    trace = case.run.trace
    engine.force_routing(trace, scenarios.simulator(scenario).predicted.forced() if is_forced else None)
    busy = taken_by_others()
    runs = [generate(engine, case.prompts, case.new) for _ in range(args.runs)]
    busy = max(busy, taken_by_others())
    result = scenarios.run(scenario)
    own = 100 * by_own_times(engine, case, scenario, runs[0]).counts.hit_rate
    return setting | row_of(runs, result) | {"busy": busy, "own_times_hits": own}


def by_own_times(engine: Engine, case: Case, scenario: Scenario, run: RunResult) -> SimResult:
    """The same setting where layers take what they took in this very run: what differs then is no matter of times."""
    scenarios, simulator = case.scenarios, case.scenarios.simulator(scenario)
    full, machine = scenarios.resolved(scenario), scenarios.machine(scenario)
    costs, decode = simulator.costs, run.metrics.decode
    layers = decode.num_steps * engine.shape.num_layers
    inside = run.events[(run.events["phase"] == "decode") & (run.events["moe_layer"] >= 0)]
    if costs.source != "stated":
        computed = max(1, decode.needed - decode.on_cpu)
        in_the_way = costs.predict_us if costs.is_layered and full.lookahead else 0.0
        costs = replace(
            costs,
            rest_us=float(inside.loc[inside["kind"] == "dense", "dur_us"].sum()) / layers,
            decide_us=max(0.0, 1e3 * decode.host_wait_ms / layers - in_the_way),
            gpu_us=1e3 * decode.experts_gpu_ms / computed,
        )
    again = Simulator(
        simulator.trace, costs, row_bytes=machine.row_bytes, predictor=simulator.predictor, lookahead=LOOKAHEAD,
        step_us=simulator.step_us,
    )  # fmt: skip
    return again.run(
        full.schedule, slots=full.slots, cache=full.cache, lookahead=full.lookahead, width=full.width,
        threshold=full.threshold, cpu=full.cpu, frequencies=simulator.trace.expert_counts(),
        least_bytes=machine.least_bytes, believed=simulator.costs,
    )  # fmt: skip


def row_of(runs: list[RunResult], result: SimResult) -> dict[str, Any]:
    """Both sides of one setting."""
    decode, simulated = runs[0].metrics.decode, result.metrics.decode
    rates = [run.metrics.tokens_per_s for run in runs]
    rate = statistics.median(rates)
    low, high = result.interval
    return {
        "slots": result.config["num_slots"],
        "cache": result.config["cache"],
        "hits": 100 * decode.hit_rate,
        "simulated_hits": 100 * result.counts.hit_rate,
        "on_cpu": decode.on_cpu,
        "simulated_on_cpu": result.counts.on_cpu,
        "late": 100 * decode.late / decode.needed,
        "simulated_late": 100 * result.counts.late / result.counts.needed,
        "tokens_per_s": rate,
        "runs": rates,
        "simulated": result.tokens_per_s,
        "low": low,
        "high": high,
        "is_inside": bool(low <= rate <= high),
        "shares": shares(decode),
        "simulated_shares": shares(simulated),
    }


def shares(decode: Any) -> dict[str, float]:
    """Of the decode phase's time, %."""
    parts = {
        "rest": decode.dense_gpu_ms,
        "experts": decode.experts_gpu_ms,
        "copies": decode.stall_ms,
        "cpu": decode.cpu_wait_ms,
        "host": decode.host_wait_ms,
    }
    return {name: 100 * ms / decode.wall_ms for name, ms in parts.items()}


def taken_by_others(seconds: float = 0.05) -> float:
    """Share of a core's time that this thread did not get while it asked for all of it."""
    begin, used = time.perf_counter(), time.thread_time()
    while time.perf_counter() - begin < seconds:
        pass
    return max(0.0, 1.0 - (time.thread_time() - used) / (time.perf_counter() - begin))


# -- tables ----------------------------------------------------------------------------------------------------------

HEADS = (
    "batch", "schedule", "predictor", "slots", "cache", "CPU", "hits %", "sim.", "diff", "by own times", "late %",
    "sim.", "tok/s", "sim.", "interval", "inside", "rest, experts, copies, CPU, host %", "sim.", "busy %",
)  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    both = [
        " ".join(f"{value:.0f}" for value in row[name].values()) for name in ("shares", "simulated_shares")
    ]
    hits = row["hits"]
    values = [
        row["batch"], row["schedule"], row["predictor"], f"{row['slots']} ({100 * row['share']:.0f} %)", row["cache"],
        "yes" if row["cpu"] else "", f"{hits:.1f}", f"{row['simulated_hits']:.1f}",
        f"{row['simulated_hits'] - hits:+.1f}", f"{row['own_times_hits'] - hits:+.1f}", f"{row['late']:.1f}",
        f"{row['simulated_late']:.1f}", f"{row['tokens_per_s']:.3g}", f"{row['simulated']:.3g}",
        f"{row['low']:.3g} to {row['high']:.3g}", "yes" if row["is_inside"] else "no", *both,
        f"{100 * row['busy']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(map(str, values))} |"


def summary(rows: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """What it comes to."""
    n = len(rows)
    diffs = [abs(row["simulated_hits"] - row["hits"]) for row in rows]
    close = sum(diff <= CLOSE for diff in diffs)
    inside = sum(row["is_inside"] for row in rows)
    width = statistics.median((row["high"] - row["low"]) / row["simulated"] for row in rows)
    off = [row["simulated"] / row["tokens_per_s"] - 1 for row in rows]
    busy, load = statistics.median(row["busy"] for row in rows), os.getloadavg()[0]
    lines = [
        f"{n} settings: hits within {CLOSE:g} point in {close} ({100 * close / n:.0f} %), median difference "
        f"{statistics.median(diffs):.2f}, most {max(diffs):.1f} points. Where layers take what they took in the run "
        f"itself: {sum(abs(row['own_times_hits'] - row['hits']) <= CLOSE for row in rows)}.",
    ]
    if args.clock != "virtual":
        lines += [
            f"Tokens/s inside the interval in {inside} ({100 * inside / n:.0f} %). Its width is {100 * width:.0f} % of "
            f"the simulated tokens/s (median); these are {100 * statistics.median(off):+.1f} % off in the median, "
            f"{100 * statistics.median(map(abs, off)):.1f} % without sign.",
        ]
        if args.clock == "real" and (busy > BUSY or load > (os.cpu_count() or 1)):
            lines.append(
                f"**The machine was busy**: others took {100 * busy:.0f} % of a core's time (median), load {load:.1f} "
                f"on {os.cpu_count()} cores; tokens/s, and hits of what is prefetched, say little."
            )
    return lines


def main() -> None:
    """Run all settings; print the table, write it."""
    args = arguments()
    rng = np.random.default_rng(args.seed)
    started, rows = time.perf_counter(), []
    with opened(args) as engine:
        texts = prompts_of(engine, args)
        order = rng.permutation(len(texts)).tolist()
        kept, used = [texts[i] for i in order[: args.fitted]], [texts[i] for i in order[args.fitted :]]
        if args.clock == "real":
            args.profile = args.profile or prescope.calibrate(engine, seconds=args.calibrate, save=False)
        label = engine.hardware()["label"]
        predictors = predictors_of(engine, kept, trained=args.train)
        names = [one.name for one in predictors] + [NOISY]
        settings, case = drawn(args.settings, args.batches, names, rng), None
        print(f"# {engine.name} on {label}", flush=True)
        print("\n".join(head()), flush=True)
        for setting in settings:
            if time.perf_counter() - started > args.seconds:
                print(f"# out of time after {len(rows)} of {len(settings)} settings")
                break
            if case is None or len(case.prompts) != setting["batch"]:
                chosen = rng.choice(len(used), setting["batch"], replace=setting["batch"] > len(used))
                case = case_of(engine, [used[i] for i in chosen], predictors, args)
            rows.append(measure(engine, case, setting, args))
            print(line(rows[-1]), flush=True)
    said = summary(rows, args)
    print("\n" + "\n".join(said))
    label += "" if args.clock == "real" else f", {args.link_us:g} us an expert"
    about = f"seed {args.seed}, {args.new} new tokens, recall {args.recall:g}"
    facts = f"{engine.name} on {label}; {datetime.now(UTC).date()}, {about}"
    if args.json:
        told = {name: value for name, value in vars(args).items() if name != "profile"}
        contents = {
            "command": sys.argv,
            "arguments": told,
            "label": label,
            "machine": machine_facts(),
            "rows": rows,
        }
        args.json.write_text(json.dumps(contents, indent=1, default=str) + "\n")
    if args.md:
        title = f"# Simulator against engine: {facts}"
        args.md.write_text("\n".join([title, "", *said, "", *head(), *map(line, rows)]) + "\n")


def head() -> list[str]:
    """Of the table."""
    return [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder or hub id; the embedded model when not given")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clock", choices=["real", "processor", "virtual"], default="real")
    parser.add_argument("--link-us", type=float, default=1000.0, help="of an expert, where times are stated")
    parser.add_argument("--settings", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 3, 8, 16, 64])
    parser.add_argument(
        "--new", type=int, default=24, help="tokens of each prompt; half of them above batch 8"
    )
    parser.add_argument(
        "--prompt",
        type=int,
        default=200,
        help="characters of each prompt, at most; of a shape 4 a token",
    )
    parser.add_argument("--fitted", type=int, default=24, help="prompts that predictors are made from")
    parser.add_argument(
        "--recall", type=float, default=0.8, help="of the predictor that is forced upon the engine"
    )
    parser.add_argument("--train", action="store_true", help="train a LLaPor as well")
    parser.add_argument("--runs", type=int, default=1, help="of each setting; the median counts")
    parser.add_argument("--calibrate", type=float, default=45.0, help="seconds of the calibration")
    parser.add_argument(
        "--profile", type=prescope.HardwareProfile.load, help="of this machine, instead of calibrating"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no setting after so long")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--md", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
