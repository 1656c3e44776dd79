"""How many points a minute a sweep records, by the way it searches.

    python benchmarks/sweep_speed.py --workers 2 --points 1000

Simulates a made-up trace of 16 layers x 64 experts, 128 decode steps of one token, with made-up costs,
whose replays take some ten milliseconds each. Prints for each method: points recorded a minute once workers were there,
time until then, what one point takes a worker, this process's own CPU time for one (with --workers 1 the replay too, so
that it says on a busy machine what a free core would do), and what `Sweep.estimate` had said.
"""

import argparse
import os
import sys
import tempfile
import time

from prescope.scheduler.costs import LayerCosts
from prescope.traces.synthetic import SyntheticSpec
from prescope.tuning import Choices, Progress, Range, SimulatorRunner, Space, Sweep, open_sweep

#: Where the searched settings lie; a grid needs the steps.
SPACE = Space(
    slots=Range(0.05, 0.9, step=0.01),
    schedule=Choices("on-demand", "presched", "hybrimoe", "fiddler"),
    predictor=Choices("none", "oracle"),
    lookahead=Range(1, 4),
    width=Range(0, 64, step=4),
    threshold=Range(0.0, 1.0, step=0.05),
)
#: In the order of magnitude of an H200's, for experts of 9.4 MB.
COSTS = LayerCosts(
    link_us=172.0, gpu_us=6.0, rest_us=80.0, cpu_us=(0.0, 700.0, 750.0), cpu_base_us=40.0, decide_us=12.0,
    source="made up for the speed of sweeps",
)  # fmt: skip


def runner() -> SimulatorRunner:
    """16 layers x 64 experts x 128 decode steps."""
    spec = SyntheticSpec(num_layers=16, num_experts=64, top_k=8, zipf=0.6, persistence=0.3, correlation=0.3)
    trace = spec.generate(prompt_tokens=16, new_tokens=129)
    return SimulatorRunner(trace, COSTS, row_bytes=9_437_184)


def measure(sweep: Sweep, workers: int, points: int) -> dict[str, float]:
    """Figures from the first report with points on: by then all workers are there and have compiled."""
    begin = time.monotonic()
    marks: list[tuple[float, float, Progress]] = []

    def watch(progress: Progress) -> None:
        if progress.done:
            marks.append((time.monotonic(), time.process_time(), progress))

    sweep.run(points=points, workers=workers, on_progress=watch)
    (first_s, first_cpu_s, first), (last_s, last_cpu_s, last) = marks[0], marks[-1]
    told = last.done - first.done
    done = sweep.points().query("state == 'finished'")
    return {
        "points": last.done,
        "a minute": 60 * told / (last_s - first_s),
        "first after s": first_s - begin,
        "ms a point": 1e3 * done["seconds"].median(),
        "CPU ms here": 1e3 * (last_cpu_s - first_cpu_s) / told,
        "infeasible": last.infeasible,
    }


def main() -> int:
    """One line a method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--methods", nargs="+", default=["grid", "random", "tpe", "nsga"])
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before, {arguments.workers} workers")
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            both = ("tokens_per_s", "gpu_bytes") if method == "nsga" else ("tokens_per_s",)
            sweep = open_sweep(
                method, SPACE, runner(), method=method, objectives=both, storage=f"{folder}/{method}.db"
            )
            said = sweep.estimate(arguments.points, workers=arguments.workers)
            found = measure(sweep, arguments.workers, arguments.points)
            figures = ", ".join(f"{name} {value:,.1f}" for name, value in found.items())
            print(f"{method}: {figures}; load {os.getloadavg()[0]:.1f}; said: {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
