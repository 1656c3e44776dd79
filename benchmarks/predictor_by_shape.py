"""How well is routing predicted in MoEs of different shapes: experts, top-k, depth?

    python benchmarks/predictor_by_shape.py --corpus corpus --out by_shape.json                        # CPU, minutes
    python benchmarks/predictor_by_shape.py --corpus corpus --out by_shape.json --seconds 60 --set large   # a GPU
    python benchmarks/predictor_by_shape.py --models data/tiny-moe --out by_shape.json                 # trained ones

Each shape is trained by the recipe for `--seconds`, on the same text and with the same width, then LLaPor is trained
for it on the prompts that come with prescope and judged, beside the predictors that need no training, on those held
out. Needs the corpus of the recipe (train/, valid/, tokenizers/) unless models are given. A shape that stands in the
file already is replaced, so that a run can be made in parts (`--only`).

Recall@K is a mean over layers; intervals are 95 %, over prompts. The loss says how far the model got: routing of one
that was trained for a minute is not that of a finished model.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import prescope
from prescope.core.files import write_text
from prescope.core.machine import machine_facts
from prescope.training import TrainConfig, TrainedPredictor, own_prompts

ROOT = Path(__file__).resolve().parent.parent
#: Name of a set -> its shapes, (layers, experts, top-k), and what all of them share, as flags of the recipe.
SETS: dict[str, tuple[tuple[tuple[int, int, int], ...], str]] = {
    "small": (
        ((4, 8, 2), (4, 16, 2), (4, 32, 4), (8, 16, 2)),
        "--preset tiny --hidden 128 --heads 4 --kv-heads 2 --expert-width 64 --context 128 --batch-tokens 1024 "
        "--valid-tokens 8192",
    ),
    "large": (
        ((8, 8, 2), (8, 32, 4), (8, 64, 8), (16, 32, 4)),
        "--preset medium --hidden 1024 --heads 16 --kv-heads 4 --head-dim 64 --expert-width 512",
    ),
}
#: Predictors and lookaheads that are kept.
PREDICTORS = ("llapor", "early router", "transition", "previous token", "chance")
LOOKAHEADS = (1, 2, 4)


def train_shape(shape: tuple[int, int, int], flags: str, args: argparse.Namespace, out: Path) -> Path:
    """A model of that shape, trained by the recipe in a process of its own."""
    layers, experts, top_k = shape
    sizes = {"layers": layers, "experts": experts, "top-k": top_k, "seconds": args.seconds}
    places = {"corpus": args.corpus.resolve(), "out": out, "device": args.device}
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    command = [sys.executable, "-m", "recipes.train_moe", *flags.split(), "--dtype", dtype]
    for name, value in (sizes | places).items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, cwd=ROOT, check=True)
    return out


def judge(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train LLaPor for a model, and what came of it as plain numbers."""
    with prescope.load(folder, slots=1.0, device=args.device, events=False) as engine:
        shape, name = engine.shape, engine.name
        trained = prescope.train_predictor(
            engine,
            own_prompts("code", "dialogue", "docs", "french", "german", "maths", "mixed", "prose"),
            new_tokens=args.new_tokens,
            own_tokens=args.own_tokens,
            training=TrainConfig(epochs=args.epochs, hold_out=0.25),
        )
    row = {
        "model": name, "layers": shape.num_layers, "experts": shape.num_experts, "top_k": shape.top_k,
        "chance": shape.top_k / shape.num_experts, "loss_nats": loss_of(folder), "seconds": trained.seconds,
        "prompts": len(trained.card.prompts), "groups": trained.groups.reason,
    }  # fmt: skip
    return row | {"recall": recalls(trained), "by_layer": by_layer(trained)}


def recalls(trained: TrainedPredictor) -> list[dict[str, Any]]:
    """One row for each predictor and lookahead that the model has."""
    found = []
    for name in PREDICTORS:
        card = trained.cards.get(name)
        for ahead in () if card is None else (one for one in LOOKAHEADS if one in card.lookaheads):
            interval = card.recall_interval(ahead)
            found.append({
                "predictor": name, "lookahead": ahead, "recall": interval.value, "low": interval.low,
                "high": interval.high, "hot": card.hot(ahead),
            })  # fmt: skip
    return found


def by_layer(trained: TrainedPredictor) -> dict[str, list[float]]:
    """Recall one layer ahead, by source layer."""
    return {name: list(trained.cards[name].recalls(1)) for name in PREDICTORS[:2] if name in trained.cards}


def loss_of(folder: Path) -> float | None:
    """Validation loss at the end of training, mean over domains, where the folder says it."""
    log = folder / "training_log.json"
    if not log.is_file():
        return None
    losses = json.loads(log.read_text(encoding="utf-8"))["records"][-1]["valid_loss"].values()
    return float(sum(losses) / len(losses))


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"# LLaPor by the MoE's shape: {report['machine']['device']}, {report['date']}", "",
        *sorted({f"    {row['command']}" for row in report["rows"]}), "",
        "Recall@K on held-out prompts, mean over layers: LLaPor / early router, by layers ahead. Loss: of the model,",
        "on held-out text, mean over domains. Hot: hot Top-4 in Top-6, one layer ahead.", "",
        "| layers x experts, top-k | loss, nats | chance | 1 ahead | 2 ahead | 4 ahead | gain at 1 | hot |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for row in report["rows"]:
        cell = {(one["predictor"], one["lookahead"]): one for one in row["recall"]}
        pairs = [
            f"{cell['llapor', ahead]['recall']:.3f} / {cell['early router', ahead]['recall']:.3f}"
            if ("llapor", ahead) in cell and ("early router", ahead) in cell
            else ""
            for ahead in LOOKAHEADS
        ]
        gain = cell["llapor", 1]["recall"] - cell["early router", 1]["recall"]
        loss = "" if row["loss_nats"] is None else f"{row['loss_nats']:.2f}"
        lines.append(
            f"| {row['layers']} x {row['experts']}, top-{row['top_k']} ({row['model']}) | {loss} | "
            f"{row['chance']:.3f} | {' | '.join(pairs)} | {gain:+.3f} | {cell['llapor', 1]['hot']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train and judge what is asked for; the file is written after each model."""
    args = arguments()
    shapes, flags = SETS[args.set]
    known = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.is_file() else []
    rows = {row["model"]: row for row in known}

    def keep(row: dict[str, Any]) -> None:
        rows[row["model"]] = row | {"command": f"python benchmarks/predictor_by_shape.py {shown(args)}"}
        report = {
            "date": time.strftime("%Y-%m-%d"), "machine": machine_facts() | {"device": device_name(args.device)},
            "rows": list(rows.values()),
        }  # fmt: skip
        write_text(args.out, json.dumps(report, indent=1) + "\n")
        write_text(args.out.with_suffix(".md"), as_text(report))
        print(as_text(report).splitlines()[-1], flush=True)

    for folder in args.models:
        keep(judge(folder, args))
    for shape in () if args.models else shapes:
        name = "{}x{}-top{}".format(*shape)
        if not args.only or name in args.only:
            with tempfile.TemporaryDirectory() as folder:
                keep(judge(train_shape(shape, flags, args, Path(folder) / name), args))


def device_name(device: str) -> str:
    """As results name it."""
    return torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def shown(args: argparse.Namespace) -> str:
    """The flags that say what was run, without those that only cut it into parts."""
    if args.models:
        return " ".join(["--models", *(folder.name for folder in args.models)])
    return (
        f"--set {args.set} --seconds {args.seconds:g} --epochs {args.epochs} --own-tokens {args.own_tokens}"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--corpus", type=Path, help="folder with train/, valid/ and tokenizers/")
    add("--models", type=Path, nargs="*", default=[], help="trained folders, instead of training some")
    add("--out", type=Path, required=True, help="JSON; a .md is written beside it")
    add("--set", choices=SETS, default="small")
    add("--only", nargs="*", default=[], metavar="LxE-topK", help="of the set, such as 4x16-top2")
    add("--seconds", type=float, default=75.0, help="of each model's training")
    add("--new-tokens", type=int, default=32, help="sampled after each prompt and recorded too")
    add("--own-tokens", type=int, default=4096, help="of text the model writes itself, to train LLaPor on")
    add("--epochs", type=int, default=4, help="of LLaPor")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not args.models and args.corpus is None:
        parser.error("give --corpus, the recipe's text, or --models that are trained already")
    return args


if __name__ == "__main__":
    main()
