"""Measure a machine and write its hardware profile, as `prescope.calibrate()` does, with engines of published shapes.

    python benchmarks/calibrate.py --out profile.json                       # sizes of experts only, a minute
    python benchmarks/calibrate.py --model qwen3-30b-a3b-cut4 olmoe-1b-7b-cut4 --seconds 20 --out h200.json

With --model each shape (random weights: times do not depend on them) or folder is run as an engine too, which gives the
rest of a layer and the time to decide; "sizes" among them stands for some published sizes of experts without a model.
The profiles are put together into one: host costs and link are the last one's.
Prints the table last; Ctrl-C keeps what there is.
"""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from _models import open_model

import prescope
from prescope.profile import HardwareProfile, markdown

SIZES = "sizes"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    started = time.perf_counter()
    profile: HardwareProfile | None = None
    try:
        for profile in measured(args):
            print(f"# {time.perf_counter() - started:.0f} s: {len(profile.points)} points", flush=True)
            if args.out:
                profile.save(args.out)
    except KeyboardInterrupt:
        print("# interrupted: what follows is what there is")
    if profile is not None:
        report(profile)


def measured(args: argparse.Namespace):
    """One profile after the other, each with what the ones before it know."""
    settings = {"device": args.device, "seconds": args.seconds, "cpu": args.cpu, "save": args.save}
    settings["link_gb_per_s"] = args.link_gb_per_s
    words = " ".join(sys.argv[1:]).replace(f"--out {args.out}", "")
    origin = f"python benchmarks/calibrate.py {' '.join(words.split())}"
    profile: HardwareProfile | None = None
    for name in args.model or [SIZES]:
        if name == SIZES:
            new = prescope.calibrate(tuple(args.expert) if args.expert else None, **settings)
        else:
            new = of_model(name, args, settings)
        former = profile
        profile = replace(new if former is None else new.with_experts_of(former), origin=origin)
        if former is not None:
            profile = replace(profile, notes=(*former.notes, *profile.notes))
        yield profile


def of_model(name: str, args: argparse.Namespace, settings: dict) -> HardwareProfile:
    """The profile of an engine of this shape or folder."""
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    bench = open_model(name, torch.device("cuda" if on_gpu else "cpu"), DTYPES[args.dtype])
    link = None if on_gpu else args.link_gb_per_s
    with prescope.attach(
        bench.model, slots=args.slots, device=args.device, decode=args.decode, compiled=args.compiled,
        link_gb_per_s=link,
    ) as engine:  # fmt: skip
        engine.name = bench.name
        return prescope.calibrate(engine, **{**settings, "device": "auto"})


def report(profile: HardwareProfile) -> None:
    """The profile as tables."""
    print(
        f"\n**{profile.label}**, {profile.measured}: {profile.place}; CPU experts by {profile.cpu_backend}\n"
    )
    print(markdown(profile.describe()))
    print("\n| fit | error |\n|---|---|")
    for name, error in profile.fit_errors.items():
        print(f"| {name} | {error} |")
    for note in profile.notes:
        print(f"\n{note}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", default=[], help="shapes of data/configs (-cutN layers), or folders"
    )
    parser.add_argument(
        "--expert", nargs=2, type=int, metavar=("D", "F"), help="one size of experts, no model"
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=45.0, help="for each model")
    parser.add_argument("--cpu", default="auto", choices=["auto", "native", "torch"])
    parser.add_argument("--slots", type=float, default=0.25)
    parser.add_argument("--decode", default="auto")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--link-gb-per-s", type=float, help="of the emulated link")
    parser.add_argument("--save", action="store_true", help="also keep it where prescope finds it")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
