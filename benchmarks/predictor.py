"""How well do predictors predict: in the domains they were trained on, and when the text changes.

    python benchmarks/predictor.py --model data/tiny-moe --train code=train/code.txt --test code=valid/code.txt ... --out r.json

Trains LLaPor in both forms on excerpts of the training files, fits the counting baselines on the same trace, and scores all
on the test files and, apart, on the shifted ones. Then a second training on the --only domains alone, scored on all others:
dialogue -> code, prose -> maths, another language. Recall@K is the mean over layers; intervals are 95 %, over prompts.
Prints tables and writes JSON. Accuracy does not depend on the machine; training times do, so the machine stands beside them.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import prescope
from prescope.engine import Engine
from prescope.hardware import machine_facts
from prescope.learning import baselines, record_trace, router_agreement, routers_of
from prescope.predictor import (
    LlaporConfig,
    OnlineConfig,
    Routers,
    ScoreCard,
    TrainConfig,
    difference,
    domain_shift,
    find_groups,
    measure_us,
    score,
    train,
)
from prescope.predictor.train import rows_of
from prescope.routing import RoutingTrace

LOOKAHEADS = (1, 2, 4)


def main() -> None:
    """Record, train, score, print, write."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    engine = prescope.load(args.model, slots=1.0, device=args.device, events=False)
    report: dict[str, Any] = {"machine": machine_facts(), "arguments": vars(args), "model": engine.name}
    started = time.perf_counter()
    traces = {
        name: record_trace(
            engine, excerpts(engine, pairs(getattr(args, name)), count, args.tokens), max_tokens=args.tokens
        )
        for name, count in (
            ("train", args.prompts),
            ("test", args.test_prompts),
            ("shifted", args.test_prompts),
        )
    }
    report["recording_s"] = time.perf_counter() - started
    report["tokens"] = {name: len(trace) for name, trace in traces.items()}
    routers = routers_of(engine, traces["train"])
    report["router_agreement"] = router_agreement(routers, traces["train"])
    groups = find_groups(traces["train"])
    report["groups"] = groups.reason
    print(
        f"# {report['tokens']} tokens recorded in {report['recording_s']:.0f} s; {groups.reason}", flush=True
    )
    everything = run(
        args, traces["train"], {k: traces[k] for k in ("test", "shifted")}, routers, report, "all domains"
    )
    for only in args.only:
        known = of_domain(traces["train"], only)
        run(args, known, {"test": traces["test"]}, routers, report, f"{only} only", by_domain=True)
    shift_study(everything, traces, report)
    write(args, report)


def run(
    args: argparse.Namespace,
    trace: RoutingTrace,
    tests: dict[str, RoutingTrace],
    routers: Routers,
    report: dict[str, Any],
    label: str,
    by_domain: bool = False,
) -> Any:
    """Train both forms on a trace, score everything on the tests; returns the residual predictor."""
    trained = {}
    for config in (LlaporConfig(), LlaporConfig.paper()):
        started = time.perf_counter()
        training = TrainConfig(epochs=args.epochs, seed=args.seed)
        result = train(trace, config=config, training=training, routers=routers, device=args.train_device)
        predictor = result.predictor
        trained[predictor.name] = predictor
        report.setdefault("trained", []).append({
            "on": label, "predictor": predictor.name, "tokens": len(trace), "seconds": time.perf_counter() - started,
            "epochs": len(result.history), "cost": predictor.cost()._asdict(),
            "predict_us": measure_us(predictor, predictor.width, device=args.train_device),
        })  # fmt: skip
        print(f"# {label}: {predictor!r} in {report['trained'][-1]['seconds']:.0f} s", flush=True)
    residual = trained["llapor"]
    everyone = [*trained.values(), *baselines(trace, routers, residual)]
    for name, test in tests.items():
        cards = {p.name: score(p, test, lookaheads=LOOKAHEADS, groups=residual.groups) for p in everyone}
        domains = sorted(set(cards["llapor"].domains.tolist())) if by_domain or name == "shifted" else []
        for domain in [None, *domains]:
            cells = [cell(card, cards["early router"], domain) for card in cards.values()]
            report.setdefault("scores", []).append(
                {"trained_on": label, "scored_on": name, "domain": domain, "cells": cells}
            )
            print_table(f"trained on {label}, scored on {name} ({domain or 'all domains'})", cells)
        by_layer = {c.predictor: c.to_frame().groupby(["lookahead", "moe_layer"]).recall.mean().unstack(0).to_dict()
                    for c in (cards["llapor"], cards["early router"])}  # fmt: skip
        report.setdefault("by_layer", []).append({"trained_on": label, "scored_on": name, "recall": by_layer})
    return residual


def cell(card: ScoreCard, early: ScoreCard, domain: str | None) -> dict[str, Any]:
    """All metrics of a predictor on one domain (None: all)."""
    out: dict[str, Any] = {"predictor": card.predictor}
    for ahead in card.lookaheads:
        out[f"@{ahead}"] = {
            "recall": card.recall_interval(ahead, domain=domain)._asdict(),
            "recall_double": card.recall(ahead, double=True, domain=domain),
            "gain": difference(card, early, ahead, domain=domain)._asdict(),
            "hot": card.hot(ahead, domain=domain),
            "count_error_frac": card.count_error_frac(ahead, domain=domain),
            "ece": card.ece(ahead) if domain is None else None,
        }
    return out


def print_table(title: str, cells: list[dict[str, Any]]) -> None:
    """Recall@K at each lookahead with its interval, the gain over the early router, then 2K, hot 4 in 6 and ECE."""
    print(
        f"\n{title}\n| predictor | " + " | ".join(f"@{a} | gain | 2K | hot | ECE" for a in LOOKAHEADS) + " |"
    )
    print("|---|" + "---|" * 5 * len(LOOKAHEADS))
    for one in cells:
        parts = []
        for ahead in LOOKAHEADS:
            c = one[f"@{ahead}"]
            r, g = c["recall"], c["gain"]
            gain = f"{g['value']:+.3f} [{g['low']:+.3f}, {g['high']:+.3f}]"
            ece = "" if c["ece"] is None else f"{c['ece']:.3f}"
            parts.append(
                f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}] | {gain} | {c['recall_double']:.3f} | "
                f"{c['hot']:.3f} | {ece}"
            )
        print(f"| {one['predictor']} | " + " | ".join(parts) + " |", flush=True)


def shift_study(predictor: Any, traces: dict[str, RoutingTrace], report: dict[str, Any]) -> None:
    """The text changes in mid-stream, with and without online tuning, for each margin."""
    for margin in (0.1, 0.02):
        shift = domain_shift(predictor, traces["test"], traces["shifted"], online=OnlineConfig(margin=margin))
        report.setdefault("shift", []).append(
            {"margin": margin, **{k: v for k, v in shift._asdict().items() if k not in ("fixed", "tuned")}}
        )
        cycle = shift.tuning_ms / max(shift.cycles, 1)
        print(
            f"# shift, margin {margin}: recall {shift.before:.3f} before, {shift.after_fixed:.3f} after, "
            f"{shift.after_tuned:.3f} tuned; half the drop made up after {shift.recovery_tokens} tokens; "
            f"{shift.cycles} cycles of {cycle:.1f} ms"
        )


def of_domain(trace: RoutingTrace, domain: str) -> RoutingTrace:
    """The rows of one domain's prompts."""
    sequences = [i for i, prompt in enumerate(trace.prompts) if prompt["domain"] == domain]
    return rows_of(trace, np.flatnonzero(np.isin(trace.sequence, sequences)))


def excerpts(engine: Engine, files: dict[str, str], count: int, tokens: int) -> dict[str, list[list[int]]]:
    """`count` excerpts of each file at evenly spaced places, `tokens` long each."""
    assert engine.tokenizer is not None, "text needs a tokenizer"
    found: dict[str, list[list[int]]] = {}
    for domain, path in files.items():
        text = Path(path).read_text(encoding="utf-8")
        starts = np.linspace(0, max(0, len(text) - 8 * tokens), count).astype(int)
        # The first token may be a piece of a word.
        found[domain] = [
            engine.tokenizer(text[i : i + 8 * tokens])["input_ids"][1 : tokens + 1] for i in starts
        ]
    return found


def pairs(items: list[str]) -> dict[str, str]:
    """["code=a.txt"] -> {"code": "a.txt"}."""
    return dict(item.split("=", 1) for item in items)


def write(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write the JSON, if asked to."""
    if args.out:
        Path(args.out).write_text(json.dumps(report, indent=1, default=str) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="data/tiny-moe")
    parser.add_argument("--train", nargs="+", required=True, metavar="DOMAIN=FILE")
    parser.add_argument("--test", nargs="+", required=True, metavar="DOMAIN=FILE")
    parser.add_argument("--shifted", nargs="+", required=True, metavar="DOMAIN=FILE")
    parser.add_argument(
        "--only", nargs="*", default=[], help="train on one domain alone as well, for each of these"
    )
    parser.add_argument("--prompts", type=int, default=64, help="of each training domain")
    parser.add_argument("--test-prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of each prompt")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--train-device", default="cpu")
    parser.add_argument("--out", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
