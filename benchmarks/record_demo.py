"""Record what the dashboard opens with: a trained model's routing, LLaPor's predictions of it, and the GPU's costs.

    python benchmarks/record_demo.py --corpus corpus --out demo                    # trains the medium model first
    python benchmarks/record_demo.py --model medium --corpus corpus --out demo     # a folder that was trained before
    python benchmarks/record_demo.py --model data/tiny-moe --out demo --small      # to try the script, on any machine

The corpus is a folder with train/<domain>.txt and tokenizers/, as recipes/train_moe.py takes it; without one LLaPor is
trained on the prompts that come with prescope. The model goes on with those prompts (CC0, never trained on), sampled at
temperature 1, in captured steps with all experts resident: that is the trace. LLaPor and the early router score it from
router inputs that are read again in one pass. Then the same prompts run under schedules behind fewer slots, with the
same seeds: those give the costs of a layer and are kept beside the trace as what was measured.

Writes <name>.b<batch>.json, .trace.safetensors and one .safetensors for each predictor, and <name>.profile.json.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _models import open_model
from predictor import excerpts
from transformers import AutoTokenizer

import prescope
from prescope.core.machine import machine_facts
from prescope.engine.engine import Engine
from prescope.engine.graph.prediction_time import prediction_us
from prescope.predictor import Predictor, RecordedPredictor
from prescope.profile import HardwareProfile
from prescope.simulator import Machine, Recording, Scenario, machine_of_run
from prescope.traces.result import RunResult
from prescope.traces.routing import RoutingTrace
from prescope.training import TrainConfig, TrainedPredictor, own_prompts, record_trace, train_predictor

ROOT = Path(__file__).resolve().parent.parent
#: The longest lookahead whose scores are kept.
LOOKAHEAD = 4
#: Runs beside the trace: a name, and settings of `Engine.configure`.
WAYS: dict[str, dict[str, Any]] = {
    "on-demand": {"schedule": "on-demand"},
    "presched": {"schedule": "presched", "cpu_threads": 0},
    "presched, CPU lane": {"schedule": "presched", "cpu_threads": None},
}


def main() -> None:
    """Train what is not there, record, measure, write."""
    args = arguments()
    args.started = time.perf_counter()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    folder = args.model or trained_model(args)
    bench = open_model(str(folder), torch.device(args.device), torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with prescope.attach(
        bench.model, tokenizer=tokenizer, slots=1.0, device=args.device, compiled=args.compiled
    ) as engine:
        engine.name = args.name
        trained = train_predictor(
            engine,
            texts(engine, args),
            training=TrainConfig(epochs=args.epochs),
            own_tokens=args.own_tokens,
        )
        say(args, f"LLaPor in {trained.seconds:.0f} s: {judged(trained)}")
        profile = prescope.calibrate(engine, seconds=args.calibrate_seconds, save=False)
        profile.save(out / f"{args.name}.profile.json")
        say(args, f"calibrated: {profile.label}")
        for batch in args.batch:
            recording = record(engine, trained, profile, batch, args)
            files = recording.save(out, f"{args.name}.b{batch}")
            say(
                args,
                f"batch {batch}: {len(recording.trace)} rows, {sum(f.stat().st_size for f in files):,} bytes",
            )
            simulate(recording)
    if args.archive:
        say(args, shutil.make_archive(args.archive, "tar", out))


def trained_model(args: argparse.Namespace) -> Path:
    """Train the medium model of the recipe; a process of its own gives its memory back."""
    folder = Path(args.work) / "medium"
    command = [
        sys.executable, "-m", "recipes.train_moe", "--preset", "medium", "--corpus", str(Path(args.corpus).resolve()),
        "--out", str(folder.resolve()), "--seconds", str(args.seconds), "--valid-tokens", "16384",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    say(args, "model trained")
    return folder


def texts(engine: Engine, args: argparse.Namespace) -> Any:
    """What LLaPor is trained on, by domain; the prompts to be recorded are not among it."""
    if args.corpus:
        return excerpts(engine, Path(args.corpus) / "train", args.prompts, args.tokens)
    kept = {text for group in chosen(engine, max(args.batch), args) for text in group}
    return {
        domain: [text for text in some if text not in kept][: args.prompts]
        for domain, some in own_prompts().items()
    }


def chosen(engine: Engine, batch: int, args: argparse.Namespace) -> list[list[str]]:
    """Groups of prompts, a step's sequences each, of as many domains as there are."""
    by_domain = own_prompts()
    in_turn = [
        text for some in zip(*(t[: args.groups * batch] for t in by_domain.values()), strict=False) for text in some
    ]  # fmt: skip
    usable = [text for text in in_turn if len(engine.tokenizer(text)["input_ids"]) >= args.least_prompt]
    return [usable[i : i + batch] for i in range(0, args.groups * batch, batch)]


def tokens_of(engine: Engine, group: list[str]) -> list[list[int]]:
    """Token ids, all as long as the shortest: then no row of a step is padding."""
    ids = [engine.tokenizer(text)["input_ids"] for text in group]
    return [one[: min(map(len, ids))] for one in ids]


def generate(engine: Engine, ids: list[list[int]], seed: int, new: int) -> RunResult:
    """The same text for the same seed, as far as the numbers are the same."""
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return engine.generate(ids, max_new_tokens=new, min_new_tokens=new, **sampling)


def record(
    engine: Engine, trained: TrainedPredictor, profile: HardwareProfile, batch: int, args: argparse.Namespace
) -> Recording:
    """Trace, scores, machine and measured runs of one batch size."""
    groups = chosen(engine, batch, args)
    engine.configure(slots=1.0, schedule="on-demand")
    runs, scores = [], {}
    early = [one for one in trained.others if one.name == "early router"]
    everyone: list[Predictor] = [trained.predictor, *early]
    for seed, group in enumerate(groups):
        ids = tokens_of(engine, group)
        run = generate(engine, ids, seed, args.new)
        assert run.trace is not None, "routing is recorded unless told otherwise"
        known = [{"text": text, "tokens": len(one)} for text, one in zip(group, ids, strict=True)]
        runs.append(replace(run, trace=replace(run.trace, prompts=known)))
        whole = [[*one, *more] for one, more in zip(ids, run.tokens, strict=True)]
        for one in everyone:
            scores.setdefault(one.name, []).append(scores_of(engine, one, whole, run.trace))
    trace = RoutingTrace.concat([run.trace for run in runs if run.trace is not None])
    predictors = [
        RecordedPredictor.of_scores(
            trace,
            [np.concatenate(parts) for parts in zip(*scores[one.name], strict=True)],
            name=one.name,
            is_calibrated=one.is_calibrated,
        )
        for one in everyone
    ]
    hot, llapor = trained.trace.expert_counts(), trained.predictor
    measured = [
        measure(engine, way, slots, groups, trained, profile, hot, trace, args)
        for slots in args.slots
        for way in WAYS
        if slots == args.slots[0] or time.perf_counter() - args.started < args.no_more_after
    ]
    cells = {(row["way"], row["slots"]): kept for row, kept in measured}
    slots = args.slots[0]
    others = [run for _, run in measured]
    machine = machine_of(
        engine, cells["on-demand", slots], cells["presched", slots], others, profile, args.name
    )
    return Recording(
        trace=trace,
        predictors=predictors,
        machine=machine,
        predict_us={llapor.name: prediction_us(llapor, engine.runner.device, batch, llapor.width, True)},
        measured=[row for row, _ in measured],
        about={
            "label": f"{args.name}, recorded on {engine.hardware()['device']}",
            "recorded": datetime.now(UTC).date().isoformat(),
            "batch": batch,
            "command": " ".join(["python benchmarks/record_demo.py", *named(sys.argv[1:])]),
            "machine": machine_facts() | {"device": engine.hardware()["device"]},
            "expert": engine.expert_size._asdict(),
            "recall": recalls(trace, predictors),
            "judged": judged(trained),
        },
    )


def judged(trained: TrainedPredictor) -> dict[str, dict[str, float]]:
    """Recall@K of every predictor on held-out text, by lookahead."""
    return {
        name: {str(d): round(card.recall(d), 4) for d in card.lookaheads}
        for name, card in trained.cards.items()
    }


def scores_of(
    engine: Engine, one: Predictor, whole: list[list[int]], trace: RoutingTrace
) -> list[np.ndarray]:
    """[ahead - 1] (R, L - ahead, E) for the decode rows of a run, from router inputs of its whole texts."""
    read = record_trace(engine, whole, max_tokens=max(map(len, whole)), batch_tokens=sum(map(len, whole)) + 1)
    places = {
        (int(s), int(p)): row for row, (s, p) in enumerate(zip(read.sequence, read.position, strict=True))
    }
    decode = trace.select(phase="decode")
    rows = [places[int(s), int(p)] for s, p in zip(decode.sequence, decode.position, strict=True)]
    depth = min(LOOKAHEAD, one.lookahead, trace.num_layers - 1)
    return [one.replay(read, ahead)[rows] for ahead in range(1, depth + 1)]


def recalls(trace: RoutingTrace, predictors: list[RecordedPredictor]) -> dict[str, dict[str, float]]:
    """Recall@K of the recorded scores on the recorded trace, by lookahead."""
    decode = trace.phase == 1
    found: dict[str, dict[str, float]] = {}
    for one in predictors:
        for ahead in range(1, one.lookahead + 1):
            best = np.argsort(-one.replay(trace, ahead)[decode], axis=-1)[..., : trace.top_k]
            used = trace.expert_ids[decode][:, ahead:]
            hits = (best[..., :, None] == used[..., None, :]).any(-1).mean()
            found.setdefault(one.name, {})[str(ahead)] = round(float(hits), 4)
    return found


def measure(
    engine: Engine, way: str, slots: float, groups: list[list[str]], trained: TrainedPredictor,
    profile: HardwareProfile, hot: np.ndarray, trace: RoutingTrace, args: argparse.Namespace,
) -> tuple[dict[str, Any], RunResult]:  # fmt: skip
    """All groups one after another from cold slots, twice: as one row, and one group's run with its timeline."""
    batch = len(groups[0])
    size = engine.expert_size
    settings = dict(WAYS[way])
    if settings["schedule"] != "on-demand":
        settings["predictor"] = trained.predictor
        settings["costs"] = profile.costs(
            engine.shape, width=size.width, expert_width=size.expert_width, batch=batch
        )
    engine.configure(slots=slots, frequencies=hot, **settings)
    rates, runs = [], []
    for turn in range(args.rounds + 1):  # the first captures, compiles and tunes
        engine.clear_cache()
        some = groups[:1] if turn == 0 else groups
        runs = [generate(engine, tokens_of(engine, group), seed, args.new) for seed, group in enumerate(some)]
        spent_ms = sum(run.metrics.decode.wall_ms for run in runs)
        rates.append(1e3 * batch * sum(run.metrics.decode.num_steps for run in runs) / spent_ms)
    decode = [run.metrics.decode for run in runs]
    steps = np.concatenate([run.steps[run.steps["phase"] == "decode"]["dur_us"].to_numpy() for run in runs])
    again = RoutingTrace.concat([run.trace for run in runs if run.trace is not None])
    same = again.expert_ids.shape == trace.expert_ids.shape and (again.expert_ids == trace.expert_ids).mean()
    row = {
        "way": way, "schedule": WAYS[way]["schedule"], "cpu": way.endswith("CPU lane"), "slots": slots,
        "num_slots": engine.num_slots, "cache": engine.config.cache, "tokens_per_s": statistics.median(rates[1:]),
        "tokens_per_s_runs": rates[1:], "p50_ms": float(np.percentile(steps, 50)) / 1e3,
        "p95_ms": float(np.percentile(steps, 95)) / 1e3,
        "hit_rate": sum(d.hits for d in decode) / sum(d.needed for d in decode),
        "link_use_frac": sum(d.h2d_busy_ms for d in decode) / sum(d.wall_ms for d in decode),
        "bytes_per_token": sum(d.h2d_bytes for d in decode) / (batch * sum(d.num_steps for d in decode)),
        "same_routing_frac": float(same), "decode": runs[-1].config["reasons"]["decode"],
        "ttft_ms": float(np.median([run.metrics.ttft_ms for run in runs])),
    }  # fmt: skip
    say(args, json.dumps(row))
    return row, runs[0]


def machine_of(
    engine: Engine, alone: RunResult, ahead: RunResult, others: list[RunResult], profile: HardwareProfile, name: str
) -> Machine:  # fmt: skip
    """Costs of a layer on demand from one run, and under a schedule from another: there the host decides."""
    here = engine.shape, engine.expert_size, profile
    on_demand = machine_of_run(alone, *here, others).costs_of("on-demand")
    machine = machine_of_run(ahead, *here, others)
    device = engine.hardware()["device"]
    source = f"runs of {name} on {device}, {datetime.now(UTC).date()}"
    return machine._replace(
        name=f"{device}, {name}",
        costs=replace(machine.costs, source=source),
        on_demand=replace(on_demand, source=source),
        is_here=False,
    )


def simulate(recording: Recording) -> None:
    """What the simulator says beside what was measured, to be looked at at once."""
    scenarios = recording.scenarios()
    for row in recording.measured:
        for name in ("none", *(one.name for one in recording.predictors), "oracle"):
            is_alone = row["schedule"] == "on-demand"
            if is_alone != (name == "none"):
                continue
            cpu = bool(row["cpu"])
            result = scenarios.run(
                Scenario(
                    schedule=row["schedule"],
                    slots=row["num_slots"],
                    predictor=name,
                    cpu=cpu,
                    machine=recording.machine.name,
                )
            )
            print(
                f"  {row['way']:20s} {row['slots']:.0%} {name:14s} simulated {result.tokens_per_s:8.1f}, measured "
                f"{row['tokens_per_s']:8.1f}, bound {result.bounds.tokens_per_s:8.1f}, "
                f"hit {result.counts.hit_rate:.3f}",
                flush=True,
            )


def named(words: list[str]) -> list[str]:
    """A command's words, absolute paths cut to their last part."""
    return [Path(word).name if word.startswith("/") else word for word in words]


def say(args: argparse.Namespace, text: str) -> None:
    """Progress with the seconds since the start."""
    print(f"# {time.perf_counter() - args.started:5.0f} s: {text}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    on_gpu = torch.cuda.is_available()
    add("--model", default="", help="folder of a trained model; by default the medium one is trained")
    add("--corpus", default="", help="folder with train/ and tokenizers/")
    add("--work", default="work", help="folder for the model that is trained here")
    add("--seconds", type=float, default=150.0, help="of training the model")
    add("--out", default="demo")
    add("--name", default="medium")
    add("--batch", nargs="+", type=int, default=[1, 4])
    add("--groups", type=int, default=3, help="of prompts that are recorded, one after another")
    add("--least-prompt", type=int, default=12, help="tokens of a prompt at least")
    add("--new", type=int, default=64, help="tokens out")
    add("--slots", nargs="+", type=float, default=[0.5, 0.25])
    add("--rounds", type=int, default=2, help="of measuring, after one to warm up")
    add("--prompts", type=int, default=160, help="of each domain, to train LLaPor on")
    add("--tokens", type=int, default=128, help="of each of these")
    add("--own-tokens", type=int, default=8192)
    add("--epochs", type=int, default=5)
    add(
        "--no-more-after",
        type=float,
        default=420.0,
        help="seconds: then only the first number of slots is measured",
    )
    add("--archive", default="", help="one .tar of all files as well, at this path without its ending")
    add("--calibrate-seconds", type=float, default=25.0)
    add("--compiled", action=argparse.BooleanOptionalAction, default=on_gpu)
    add("--device", default="cuda" if on_gpu else "cpu")
    add("--small", action="store_true", help="as little as there can be, to try the script")
    args = parser.parse_args()
    if args.small:
        args.groups, args.new, args.prompts, args.tokens = 2, 6, 4, 16
        args.own_tokens, args.epochs, args.calibrate_seconds, args.rounds = 128, 1, 2.0, 1
    if not (args.model or args.corpus):
        parser.error("give --corpus to train a model, or --model")
    return args


if __name__ == "__main__":
    main()
