"""Two states of prescope against each other, or two ways to decode: A-B-B-A in one call, on one machine.

    python benchmarks/compare.py --other ../former --model qwen3-30b-a3b-cut16 mixtral-8x7b-v0.1-cut4  # a checkout
    python benchmarks/compare.py --on-link 1 2 --model mixtral-8x7b-v0.1-cut4 --schedules streaming     # prefetches
    python benchmarks/compare.py --decode host-driven copy-engine --schedules on-demand                # two drivers

Each side is a process of its own with the model in it; both are asked in turn for one run, the first side first and
last. Tokens/s is the decode phase of a run, medians and spread over the runs of a side; greedy, random weights, their
own routing, slots cold at the start of each run. Tokens of both sides are compared too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Drive both sides through all cells, print the table, write the JSON."""
    args = arguments()
    if args.worker:
        work(args)
        return
    started = time.perf_counter()
    other = Path(args.other).resolve() if args.other else ROOT
    decodes = args.decode if len(args.decode) == 2 else args.decode * 2
    mosts = args.on_link if len(args.on_link) == 2 else args.on_link * 2
    names = (
        ("this", "other")
        if args.other
        else tuple(decodes)
        if len(set(decodes)) == 2
        else tuple(map(str, mosts))
    )
    cells: list[dict[str, Any]] = []
    for model in args.model:
        sides = [Side(ROOT, model, args), Side(other, model, args)]
        print(f"# {model}: {sides[0].ask({})['about']}", flush=True)
        sides[1].ask({})
        for schedule, batch, slots in product(args.schedules, args.batch, args.slots):
            if time.perf_counter() - started > args.seconds:
                print(f"# out of time before {schedule}, batch {batch}, slots {slots}")
                continue
            base = {"schedule": schedule, "batch": batch, "slots": slots, "new": new_tokens(args.new, batch)}
            asks = [
                base | {"decode": decode, "on_link": most}
                for decode, most in zip(decodes, mosts, strict=True)
            ]
            found: list[list[dict[str, Any]]] = [[], []]
            for side, ask in zip(sides, asks, strict=True):  # both at once: compiling takes the longest
                side.tell(ask)
            for side in sides:
                side.hear()
            for _ in range(args.rounds):
                for i in (0, 1, 1, 0):
                    found[i].append(sides[i].ask(asks[i]))
            cell = base | {"model": model} | summary(names, found)
            cells.append(cell)
            print(line(cell), flush=True)
            if args.out:
                everything = {"arguments": vars(args), "cells": cells}
                Path(args.out).write_text(json.dumps(everything, indent=1) + "\n")
        for side in sides:
            side.close()
    print("\n" + "\n".join([HEADER.format(*names), "|" + "---|" * 11, *map(line, cells)]))


HEADER = (
    "| model | schedule | batch | slots | new | {} tok/s | {} tok/s | ratio | spread % | hit % | tokens |"
)


def line(cell: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"| {cell['model']} | {cell['schedule']} | {cell['batch']} | {cell['slots']:.0%} | {cell['new']} | "
        f"{cell['tok_s'][0]:.1f} | {cell['tok_s'][1]:.1f} | {cell['ratio']:.3f} | "
        f"{cell['spread_pct'][0]:.1f}, {cell['spread_pct'][1]:.1f} | "
        f"{cell['hit_pct'][0]:.1f}, {cell['hit_pct'][1]:.1f} | {cell['tokens']} |"
    )


def summary(names: tuple[str, ...], found: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians and spreads of both sides."""
    rates = [[run["tok_s"] for run in runs] for runs in found]
    medians = [statistics.median(side) for side in rates]
    same = [found[0][-1]["tokens"] == runs[-1]["tokens"] for runs in found]
    return {
        "sides": names,
        "tok_s": medians,
        "ratio": medians[0] / medians[1],
        "spread_pct": [100 * (max(side) - min(side)) / statistics.median(side) for side in rates],
        "hit_pct": [statistics.median(run["hit_pct"] for run in runs) for runs in found],
        "tokens": "equal" if all(same) else "differ",
        "runs": rates,
    }


def new_tokens(most: int, batch: int) -> int:
    """Fewer where a step takes longer."""
    return most if batch <= 8 else max(8, most * 8 // batch)


class Side:
    """A process with one checkout's prescope and the model."""

    def __init__(self, checkout: Path, model: str, args: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--worker", "--model", model, "--prompt", str(args.prompt)]
        command += ["--device", args.device, "--dtype", args.dtype]
        command += ["--predicted"] * args.predicted + ["--compiled"] * args.compiled
        path = f"{checkout}:{Path(__file__).parent}"
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        """One run; raises RuntimeError if the process has ended."""
        self.tell(what)
        return self.hear()

    def tell(self, what: dict[str, Any]) -> None:
        """Begin a run."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its result."""
        assert self._process.stdout is not None
        for text in self._process.stdout:
            if text.startswith("{"):
                return dict(json.loads(text))
        raise RuntimeError(f"a side ended with {self._process.wait()}; its error is above")

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def work(args: argparse.Namespace) -> None:
    """A side: read a line, make a run, write a line."""
    import torch
    from _models import open_model

    import prescope

    device = torch.device(args.device)
    dtypes = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    model = open_model(args.model[0], device, dtypes[args.dtype]).model
    gates = [part.weight.detach() for name, part in model.named_modules() if name.endswith("mlp.gate")]
    engine = prescope.attach(model, slots=0.5, device=args.device, compiled=args.compiled)
    if args.predicted:
        from prescope.predictor import EarlyRouter, Routers

        engine.configure(predictor=EarlyRouter(engine.shape, Routers.of_weights(torch.stack(gates)), 1))
    vocabulary = model.config.vocab_size
    where, size = Path(prescope.__file__).parent, engine.shape.row_bytes / 1e6
    about = f"{where}, {engine.num_slots} slots at 50 %, experts of {size:.1f} MB"
    former: dict[str, Any] = {}
    for text in sys.stdin:
        what = json.loads(text)
        if not what:
            print(json.dumps({"about": about}), flush=True)
            continue
        setting = {key: what[key] for key in ("schedule", "slots", "decode", "batch", "on_link")}
        if setting != former:
            profile = prescope.HardwareProfile.load("h200" if args.device == "cuda" else "test_machine")
            sizes = {"qwen": (2048, 768), "mixt": (4096, 14336), "olmo": (2048, 1024), "toy": (128, 96)}
            width, expert_width = sizes[args.model[0][:4].rstrip("-")]
            costs = profile.costs(
                engine.shape, width=width, expert_width=expert_width, batch=what["batch"], rest_us=90.0
            )
            engine.configure(
                schedule=what["schedule"], slots=what["slots"], decode=what["decode"], costs=costs
            )
            if what["on_link"]:
                engine.runner.loader.most_on_wire = what["on_link"]
            former = setting
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(0, vocabulary, (what["batch"], args.prompt), generator=generator)
        engine.clear_cache()
        run = engine.generate(ids.tolist(), max_new_tokens=what["new"], min_new_tokens=what["new"])
        decode = run.metrics.decode
        print(
            json.dumps(
                {
                    "tok_s": what["batch"] * decode.num_steps / decode.wall_ms * 1e3,
                    "hit_pct": 100 * decode.hit_rate,
                    "tokens": [[int(token) for token in row] for row in run.tokens],
                }
            ),
            flush=True,
        )
    engine.close()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", help="another checkout")
    parser.add_argument("--decode", nargs="+", default=["auto"], help="one way, or one for each side")
    parser.add_argument(
        "--on-link", nargs="+", type=int, default=[0], help="prefetches at most, one or each side"
    )
    parser.add_argument("--model", nargs="+", default=["qwen3-30b-a3b-cut16"])
    parser.add_argument("--schedules", nargs="+", default=["on-demand", "presched"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--slots", nargs="+", type=float, default=[0.5])
    parser.add_argument("--predicted", action="store_true", help="by the early router, one layer ahead")
    parser.add_argument("--compiled", action="store_true", help="the layers around the experts")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2, help="of A-B-B-A")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no cell after so long")
    parser.add_argument("--out")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
