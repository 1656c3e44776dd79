"""Workers of a sweep are killed with -9 at random moments: no point may be lost, none counted twice.

    python benchmarks/sweep_kills.py --kills 100 --workers 2

The workers of a local dask cluster try points of some 20 ms, by arithmetic; each writes down what it tries before it
does. Meanwhile one of the workers, drawn by chance, is killed again and again, each time at a random moment of up to
--apart seconds after a worker was last seen at work. Prints what became of the points, and exits with 1 if one is
missing, there twice, failed, not the same as when it is tried here, or told though nobody tried it.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd
from distributed import Client, LocalCluster

from prescope.tuning.evaluate import Measured
from prescope.tuning.settings import Setting

POINT_S = 0.02


class Slope:
    """Made-up figures; no simulator and no torch, so that a killed worker is back soon."""

    settings = {  # noqa: RUF012 - never changed
        "slots": Setting(what="a share", kind="share", high=1),
        "width": Setting(what="a count", kind="int", high=64),
    }
    objectives = ("tokens_per_s",)
    prompts = ()
    is_here = takes_gpu = False
    nbytes = 0

    def __init__(self, log: str) -> None:
        self.log = log

    def about(self) -> dict[str, Any]:
        """Nothing that could change."""
        return {"runner": "slope"}

    def run(
        self, settings: Mapping[str, Any], seed: int = 0, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Measured:
        """Write it down, wait, answer."""
        with open(self.log, "a", encoding="ascii") as file:  # one short write is whole, whoever else writes
            file.write(f"{seed} {os.getpid()}\n")
        time.sleep(POINT_S)
        return Measured({"tokens_per_s": value_of(settings)}, "simulated", "a slope")

    def restore(self) -> None:
        """Nothing was changed."""


def value_of(settings: Mapping[str, Any]) -> float:
    """The figure of a point."""
    return float(100 * settings["slots"] + settings["width"])


def kill_workers(
    cluster: LocalCluster, log: Path, kills: int, apart_s: float, rng: random.Random, end: threading.Event
) -> None:
    """Kill so many, then end the sweep."""
    killed, seen = 0, 0
    while killed < kills and not end.is_set():
        tried = log.stat().st_size if log.exists() else 0
        if tried == seen:  # all of them are starting
            time.sleep(0.02)
            continue
        seen = tried
        time.sleep(rng.uniform(0, apart_s))
        alive = [nanny.pid for nanny in cluster.workers.values() if nanny.pid]
        if not alive:
            continue
        with suppress(ProcessLookupError):  # it is being replaced just now
            os.kill(rng.choice(alive), signal.SIGKILL)
            killed += 1
            if killed % 10 == 0:
                print(f"{killed} killed", flush=True)
    end.set()


def faults(points: pd.DataFrame, tries: Counter) -> list[str]:
    """What is wrong with the points, in words."""
    found = []
    numbers = sorted(points["number"])
    if numbers != list(range(len(numbers))):
        found.append("a number is missing")
    if points["number"].duplicated().any() or points["seed"].duplicated().any():
        found.append("a point is there twice")
    if (points["state"] == "failed").any():
        found.append(f"failed: {points.loc[points['state'] == 'failed', 'reason'].unique()}")
    if any(tries[seed] < 1 for seed in points["seed"]):
        found.append("a point was told that nobody tried")
    if any(value_of(row) != row["tokens_per_s"] for row in points.to_dict("records")):
        found.append("a point is another here")
    return found


def main() -> int:
    """Run the sweep, kill, look."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--apart", type=float, default=1.0, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from prescope.tuning import Range, Space, open_sweep  # not at the top, or each worker would import torch

    space = Space(slots=Range(0.05, 0.9), width=Range(0, 64))
    end, begin = threading.Event(), time.monotonic()
    settings = {"dashboard_address": "127.0.0.1:0", "memory_limit": 0, "silence_logs": "CRITICAL"}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=arguments.workers, threads_per_worker=1, **settings) as cluster,
        Client(cluster) as client,
    ):
        log = Path(folder) / "tries"
        sweep = open_sweep("kills", space, Slope(str(log)), method="random", storage=f"{folder}/kills.db")
        killer = threading.Thread(
            target=kill_workers,
            args=(cluster, log, arguments.kills, arguments.apart, random.Random(arguments.seed), end),
        )
        killer.start()
        try:
            done = sweep.run(points=1_000_000, client=client, cancel=end)
        finally:
            end.set()
            killer.join()
        there = sweep.study.get_trials()
        unfinished = {one.number for one in there if not one.state.is_finished()}
        last = sweep.run(points=len(there), client=client)  # what was under way at the end
        points = sweep.points()
        tries = Counter(int(line.split()[0]) for line in log.read_text("ascii").splitlines())
        wrong = faults(points, tries)
        again = sum(count > 1 for count in tries.values())
        print(
            f"{arguments.kills} kills in {time.monotonic() - begin:.0f} s: {len(points)} points ({done}; then {last}), "
            f"{len(unfinished)} under way at the end, {again} tried more than once; {wrong or 'nothing wrong'}"
        )
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
