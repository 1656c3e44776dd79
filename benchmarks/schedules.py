"""All schedules on one model, measured, with the simulator's answer and the bound beside each.

    python benchmarks/schedules.py --model qwen3-30b-a3b-cut16 --batch 1 8 16 64 --slots 0.5 0.25 --out schedules.json

A published shape has random weights, so its decode steps are routed by a trace: drawn with the habits of tiny-moe's own
routing (--habits), the same for all schedules, and predicted by an oracle that errs as often as --recall says, labelled
"emulated predictor". A folder with a trained model routes itself and is predicted by a LLaPor trained in the same run.
What goes wrong on purpose: --routing takes hostile traces, a schedule's name +inverted or +chance for wrong
predictions, and --link-factor a slower link, emulated.
Every run starts with empty slots behind the same prompt. The schedules of a batch and number of slots take turns,
--rounds times, so that what else goes on in the machine falls on all of them. The machine is calibrated first, and six
runs of each batch (`_known_runs.py`) say what its layers take: decisions and simulator go by that, and no cell of the
table is told to the simulator. Prints a table and writes JSON after every batch and number of slots, and beside it the
trace and the predictions of each batch, so that its cells can be replayed elsewhere.
"""

import argparse
import json
import statistics
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _known_runs import OWN, known_machine
from _models import open_model
from transformers import AutoTokenizer

import prescope
from prescope.core.machine import machine_facts
from prescope.engine.engine import Engine
from prescope.predictor import NoisyOracle, Predictor
from prescope.profile import SLOWER_LINKS, HardwareProfile, markdown
from prescope.scheduler import SCHEDULES
from prescope.simulator import Machine, Simulator, as_decode
from prescope.simulator.prepare import Predicted, Predictions, predictions_of
from prescope.traces.result import RunResult
from prescope.traces.routing import RoutingTrace
from prescope.traces.synthetic import ADVERSARIAL, SyntheticSpec, adversarial
from prescope.training import Inverted, TrainConfig, random_predictor, record_trace

ORACLE = "presched+oracle"
#: How a shape is routed, besides hostile traces: by a trace drawn with --habits, or as its random weights say.
HABITS, OWN_ROUTING = "habits", "own"
COLUMNS = [
    "model", "routing", "link", "batch", "slots", "schedule", "cache", "tok/s", "spread", "hit %", "late %", "miss %",
    "on CPU %", "GB", "used %", "on time %", "link GB/s", "stall %", "CPU wait %", "host %", "simulated", "error %",
    "bound", "of bound %",
]  # fmt: skip


class Case(NamedTuple):
    """What all cells of one batch share."""

    prompt: torch.Tensor
    forced: RoutingTrace | None
    predicted: dict[str, Predicted]  # by "recall", "oracle", "inverted" and "chance"
    predictors: dict[str, Predictor | None]
    frequencies: np.ndarray  # (L, E) for the static cache


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
    tokenizer = AutoTokenizer.from_pretrained(bench.folder) if bench.folder else None
    real = HardwareProfile.load(args.profile) if args.profile else None
    for factor in args.link_factor:
        settings["link_factor"] = factor
        with prescope.attach(bench.model, tokenizer=tokenizer, slots=1.0, **settings) as engine:
            engine.name = bench.name
            real = real or calibrated(engine, args)
            profile = real.emulated(factor, SLOWER_LINKS.get(factor, "slower link")) if factor > 1 else real
            print(f"# {profile.label}\n{markdown(profile.table())}", flush=True)
            if args.out:
                profile.save(
                    Path(args.out).with_suffix(f".{plain(name)}{marked(HABITS, factor)}.profile.json")
                )
            for batch, new in zip(args.batch, args.new_of, strict=True):
                args.new = new
                for routing in args.routing if bench.weights != "trained" else [OWN_ROUTING]:
                    case = make_case(engine, bench.weights, routing, batch, args)
                    of = {"model": name, "routing": routing, "link_factor": factor, "batch": batch}
                    run_batch(engine, of, case, profile, args, facts, records)


def calibrated(engine: Engine, args: argparse.Namespace) -> HardwareProfile:
    """This machine's profile, measured now."""
    started = time.perf_counter()
    profile = prescope.calibrate(engine, seconds=args.calibrate_seconds, save=False)
    print(f"# calibrated in {time.perf_counter() - started:.0f} s", flush=True)
    return profile


def run_batch(
    engine: Engine, of: dict[str, Any], case: Case, profile: HardwareProfile, args: argparse.Namespace,
    facts: dict[str, Any], records: list[dict[str, Any]],
) -> None:  # fmt: skip
    """All slots and schedules of what `of` names: model, routing, link, batch."""
    batch = of["batch"]
    stem = f"{plain(of['model'])}{marked(of['routing'], of['link_factor'])}.b{batch}"
    engine.configure(frequencies=case.frequencies)
    engine.force_routing(case.forced)
    machine = known_machine(engine, lambda **told: generate(engine, case, args, **told), profile)
    machine = machine._replace(costs=machine.costs.with_predictor(args.predict_us))
    is_kept = not args.out
    turns = args.schedules + (args.rounds - 1) * (args.again or args.schedules)
    turns = [
        one for one in turns if prediction_of(one) in case.predictors
    ]  # nobody knows a model's own routing before
    for slots in args.slots:
        cells: dict[str, tuple[dict[str, Any], RunResult]] = {}
        for schedule in turns:
            if time.perf_counter() > args.deadline:
                print(f"# no time left for batch {batch}, {schedule}, {slots:.0%}", flush=True)
                continue
            try:
                cell, run = measure(engine, schedule, slots, case, machine, args)
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
        if cells and not is_kept:
            path = Path(args.out).with_suffix(f".{stem}.safetensors")
            next(iter(cells.values()))[1].trace.save(path)
            keep_case(case, path.with_suffix(".npz"))
            is_kept = True
        for schedule, (cell, run) in cells.items():
            if args.events:
                keep_events(run, Path(args.events), f"{stem}.{100 * slots:g}.{schedule}")
            cell |= of | {"costs": asdict(machine.costs_of(schedule))}
            try:
                cell |= simulated(cell, case, machine, run)
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


def generate(engine: Engine, case: Case, args: argparse.Namespace, **told: Any) -> RunResult:
    """One run from empty slots under these settings, after one that captures the step."""
    return turn(engine, case, args, 1, **told)[-1]


def turn(engine: Engine, case: Case, args: argparse.Namespace, repeats: int, **told: Any) -> list[RunResult]:
    """As `generate`, some runs."""
    engine.configure(**told)
    runs = []
    for _ in range(repeats + 1):
        engine.clear_cache()
        runs.append(engine.generate(case.prompt, max_new_tokens=args.new, min_new_tokens=args.new))
    return runs[1:]


def measure(
    engine: Engine, schedule: str, slots: float, case: Case, machine: Machine, args: argparse.Namespace
) -> tuple[dict[str, Any], RunResult]:
    """One turn of a schedule."""
    way, which = SCHEDULES[schedule.partition("+")[0]], prediction_of(schedule)
    cache = args.cache or way.cache
    predictor = case.predictors[which] if way.predictor != "none" else None
    is_forced = case.forced is not None and predictor is not None
    started = time.perf_counter()
    engine.force_routing(case.forced, case.predicted[which].forced() if is_forced else None)
    told = {"slots": slots, "cache": cache, "schedule": way.name, "costs": machine.costs_of(way.name)}
    told |= {"predictor": predictor or "none", "cpu_threads": None if way.uses_cpu else 0}
    runs = turn(engine, case, args, args.repeats, **OWN | told)
    decode, last = runs[-1].metrics.decode, runs[-1]
    speeds = [run.metrics.tokens_per_s for run in runs]
    steps = last.steps[last.steps["phase"] == "decode"]["dur_us"].to_numpy()
    cell = {
        "schedule": schedule, "cache": cache, "slots": slots, "num_slots": engine.num_slots, "new": args.new,
        "tokens_per_s_runs": speeds, "seconds": time.perf_counter() - started,
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


def simulated(cell: dict[str, Any], case: Case, machine: Machine, run: RunResult) -> dict[str, Any]:
    """What the simulator says of a cell, and how far it is off."""
    assert run.trace is not None
    way, which = SCHEDULES[cell["schedule"].partition("+")[0]], prediction_of(cell["schedule"])
    costs = machine.costs_of(way.name)
    simulator = Simulator(run.trace, costs, row_bytes=machine.row_bytes, step_us=machine.step_us)
    if way.predictor != "none" and which in case.predicted:
        known = Predicted(*(part[:, : len(simulator.needs.steps)] for part in case.predicted[which]))
        simulator.predictions = Predictions.given(known, simulator.trace)
    result = simulator.run(
        way.name,
        slots=cell["num_slots"],
        cache=cell["cache"],
        frequencies=case.frequencies.astype(np.float64),
        least_bytes=machine.least_bytes,
    )
    return {
        "step_us": machine.step_us, "simulated_tokens_per_s": result.tokens_per_s, "interval": result.interval,
        "simulated": {name: int(value) for name, value in result.counts._asdict().items()},
        "error_frac": result.tokens_per_s / cell["tokens_per_s"] - 1.0,
        "bounds": result.bounds._asdict(), "bound_tokens_per_s": result.bounds.tokens_per_s,
    }  # fmt: skip


def prediction_of(schedule: str) -> str:
    """Which of a case's predictions a schedule is told: what its name has behind a plus."""
    return schedule.partition("+")[2] or "recall"


def make_case(engine: Engine, weights: str, routing: str, batch: int, args: argparse.Namespace) -> Case:
    """Prompt, routing and predictions of a batch."""
    vocabulary = engine.model.config.vocab_size
    prompt = torch.randint(
        0, vocabulary, (batch, args.prompt), generator=torch.Generator().manual_seed(batch)
    )
    if weights == "trained":
        return own_case(engine, batch, args)
    shape = engine.shape
    if routing == OWN_ROUTING:
        uses = np.ones((shape.num_layers, shape.num_experts))
        return Case(prompt, None, {}, {"recall": None}, uses)
    sizes = {"num_layers": shape.num_layers, "num_experts": shape.num_experts, "top_k": shape.top_k}
    # Frequencies are of another run of the same made-up model: nobody knows those of what is to come.
    trace, other = (
        drawn(routing, sizes, args, prompt_tokens=args.prompt, new_tokens=new, batch=of, seed=seed)
        for new, of, seed in ((args.new, batch, 1), (64, max(8, batch), 2))
    )
    recall = {a: r for a, r in zip((1, 2, 4), args.recall, strict=True) if a < shape.num_layers}
    errs = NoisyOracle(trace, recall)
    predictors: dict[str, Predictor | None] = {
        "recall": errs, "oracle": NoisyOracle(trace, dict.fromkeys(recall, 1.0)),
        "inverted": Inverted(errs), "chance": random_predictor(shape, max(recall)),
    }  # fmt: skip
    asked = {prediction_of(schedule) for schedule in args.schedules}
    predicted = {
        name: predictions_of(one, trace) for name, one in predictors.items() if one and name in asked
    }
    return Case(prompt, trace, predicted, predictors, other.expert_counts())


def drawn(routing: str, sizes: dict[str, int], args: argparse.Namespace, **lengths: int) -> RoutingTrace:
    """A made-up trace: with the habits asked for, or hostile."""
    if routing in ADVERSARIAL:
        return adversarial(routing, **sizes, **lengths)
    habits = dict(zip(("zipf", "persistence", "correlation", "diversity"), args.habits, strict=True))
    return SyntheticSpec(**sizes, **habits).generate(**lengths)


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
    return Case(prompt, None, {"recall": behind}, {"recall": args.llapor}, frequencies)


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


def marked(routing: str, link_factor: int) -> str:
    """What files of a routing and a link have in their names."""
    return f".{routing}" * (routing != HABITS) + f".link{link_factor}" * (link_factor > 1)


def plain(name: str) -> str:
    """A model's name as part of a file's."""
    return Path(name).name.replace("~", "-")


def row(cell: dict[str, Any]) -> str:
    """One line of the table."""
    runs, wall, nan = cell["tokens_per_s_runs"], cell["wall_ms"], float("nan")
    values = [
        cell["model"], cell["routing"], f"1/{cell['link_factor']}" if cell["link_factor"] > 1 else "as it is",
        str(cell["batch"]), f"{cell['slots']:.1%}", cell["schedule"],
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
    add("--schedules", nargs="+", default=[*SCHEDULES, ORACLE],
        help="names, with +oracle, +inverted or +chance where they are to be told that")  # fmt: skip
    add("--cache", default="", help="one cache policy for all; by default each schedule's own")
    add("--routing", nargs="+", default=[HABITS], choices=[HABITS, OWN_ROUTING, *ADVERSARIAL],
        help="of a shape: drawn with --habits, its random weights' own (nothing is predicted), or hostile")  # fmt: skip
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
    add("--link-factor", nargs="+", type=int, default=[1],
        help="copies of each expert: 2 emulates PCIe 4 on PCIe 5, 4 PCIe 3")  # fmt: skip
    add("--compiled", action="store_true", help="compile the layers around the experts")
    add("--profile", default="", help="of this machine, to save the time of measuring it")
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
