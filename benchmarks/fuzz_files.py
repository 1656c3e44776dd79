"""Damage files of every kind that prescope reads, thousands of times, and count what becomes of them.

    python -m benchmarks.fuzz_files --inputs 10000

Prints one line a kind, and every input that gave a foreign error, hung, took much memory, or was read as something
else although it has a checksum.
Figures are in docs/robustness.md.
"""

import argparse
import resource
import signal
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from types import FrameType

import transformers

from tests.support.damaged_files import KINDS, Outcome, Whole

#: An input that takes longer hangs; one that takes more memory asked for what a header said.
MOST_SECONDS, MOST_MIB = 20, 1024
#: Model folders take a tenth of a second each, all others milliseconds.
SHARE_OF_MODELS = 0.26


class Hung(Exception):
    """An input took too long."""


def alarm(number: int, frame: FrameType | None) -> None:
    """The handler of the clock that ends an input."""
    raise Hung


def fuzz(name: str, inputs: int, first_seed: int) -> Counter[str]:
    """Try so many inputs of a kind."""
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        files = Whole(KINDS[name], Path(folder) / "whole")
        for seed in range(first_seed, first_seed + inputs):
            peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.alarm(MOST_SECONDS)
            try:
                outcome, what = files.try_damaged(Path(folder) / "damaged", seed)
            except Hung:
                outcome, what = "hung", f"seed {seed}"
            finally:
                signal.alarm(0)
            grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib) / 1024
            if grown_mib > MOST_MIB:
                outcome, what = "memory", f"{what}: {grown_mib:.0f} MiB"
            counts[str(outcome)] += 1
            is_bad = outcome in (Outcome.FOREIGN, "hung", "memory")
            if is_bad or (outcome is Outcome.OTHER and not KINDS[name].may_differ):
                print(f"  {name}: {outcome}: {what}", flush=True)
    return counts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--first-seed", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, alarm)
    models = int(given.inputs * SHARE_OF_MODELS)
    others = (given.inputs - models) // (len(KINDS) - 1)
    for name in given.kinds:
        started = time.perf_counter()
        counts = fuzz(name, models if name == "model" else others, given.first_seed)
        seconds = time.perf_counter() - started
        print(
            f"{name}: {sum(counts.values())} inputs in {seconds:.0f} s: {dict(sorted(counts.items()))}",
            flush=True,
        )


if __name__ == "__main__":
    main()
