"""Workers of a sweep are killed with -9 at random moments: no point may be lost, none counted twice.

    python benchmarks/sweep_kills.py --kills 100 --workers 2

A local dask cluster simulates the recorded run that comes with prescope; each worker writes down what it tries before
it does. Meanwhile one of the workers, drawn by chance, is killed again and again, each time at a random moment of up
to --apart seconds after a worker was last seen at work. Prints what became of the points, and exits with 1 if one is
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
from pathlib import Path
from typing import Any

import pandas as pd
from distributed import Client, LocalCluster

from prescope.tuning import Choices, Measured, Range, SimulatorRunner, Space, open_sweep

SPACE = Space(
    slots=Range(0.05, 0.9),
    schedule=Choices("on-demand", "presched", "hybrimoe"),
    threshold=Range(0.0, 1.0),
    width=Range(0, 32),
)


class Logged(SimulatorRunner):
    """Writes each point's seed down before it is tried."""

    log = ""

    def run(
        self, settings: Mapping[str, Any], seed: int = 0, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Measured:
        """As it does, after writing it down."""
        with open(self.log, "a", encoding="ascii") as file:  # one short write is whole, whoever else writes
            file.write(f"{seed} {os.getpid()}\n")
        return super().run(settings, seed)


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
        if alive:
            os.kill(rng.choice(alive), signal.SIGKILL)
            killed += 1
            if killed % 10 == 0:
                print(f"{killed} killed", flush=True)
    end.set()


def faults(points: pd.DataFrame, tries: Counter, runner: SimulatorRunner) -> list[str]:
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
    for row in points[points["state"] == "finished"].sample(50, random_state=0).to_dict("records"):
        here = SimulatorRunner.run(runner, {name: row[name] for name in SPACE})
        if here.values["tokens_per_s"] != row["tokens_per_s"]:
            found.append(f"point {row['number']} is another here")
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
    runner = Logged.of_recording("medium.b1")
    end, begin = threading.Event(), time.monotonic()
    settings = {"dashboard_address": "127.0.0.1:0", "memory_limit": 0, "silence_logs": "CRITICAL"}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(n_workers=arguments.workers, threads_per_worker=1, **settings) as cluster,
        Client(cluster) as client,
    ):
        log = Path(folder) / "tries"
        runner.log = str(log)
        sweep = open_sweep("kills", SPACE, runner, method="random", storage=f"{folder}/kills.db")
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
        wrong = faults(points, tries, runner)
        again = sum(count > 1 for count in tries.values())
        print(
            f"{arguments.kills} kills in {time.monotonic() - begin:.0f} s: {len(points)} points ({done}; then {last}), "
            f"{len(unfinished)} under way at the end, {again} tried more than once; {wrong or 'nothing wrong'}"
        )
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
