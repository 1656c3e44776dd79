"""Do the tests notice a fault? Mutants of what decides, counts and reports, each run against its folder's tests.

    pip install cosmic-ray
    python benchmarks/mutants.py --mutants 200 --seed 1 --out mutants.json

cosmic-ray makes the changes; the runs are made here. mutmut changes no function that has a decorator, and all compiled
decisions have one; cosmic-ray's own runner starts an interpreter for each mutant, where importing torch takes longer
than most tests, and changes the working tree. Here the libraries are imported once, and each mutant gets a forked
process and a copy of the tree. Compiled code runs as plain Python (NUMBA_DISABLE_JIT=1). A place in the code is drawn,
then one of the changes possible there; annotations and numba's decorators are left alone. A mutant may take some times
what its tests take without one; one that runs out of time is counted as that. Prints each survivor as a diff.

    python benchmarks/mutants.py --again mutants.json --out mutants.json

tries those again that were not killed, after tests were added, and writes all results anew.
"""

import argparse
import ast
import difflib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

os.environ.update(
    NUMBA_DISABLE_JIT="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1"
)
ROOT = Path(__file__).resolve().parents[1]
#: What is mutated.
MUTATED = [
    ROOT / "prescope" / name
    for name in ("cache", "scheduler", "weights/loader.py", "traces/metrics.py", "report")
]
#: Begin of a path -> pytest's words for the tests that are to notice; of two that fit, the former holds. A browser's
#: and a kernel's start take ten times as long as all others, so they are left to what they are about.
QUICK = ["-m", "not browser and not slow"]
TESTS = {
    "prescope/cache": ["tests/cache"],
    "prescope/scheduler": ["tests/scheduler"],
    "prescope/weights/loader.py": ["tests/weights/test_loader.py"],
    "prescope/traces/metrics.py": ["tests/traces/test_metrics.py"],
    "prescope/report/sweep.py": ["tests/test_sweep_report.py", *QUICK],
    "prescope/report/runs.py": [
        "tests/test_report.py",
        "tests/test_story.py",
        *QUICK,
        "-k",
        "not kernel and not cell",
    ],
    "prescope/report/story.py": ["tests/test_story.py"],
    "prescope/report": ["tests/test_report.py", "-m", "not browser"],
}
#: They measure compiled code.
LEFT_OUT = ["tests/scheduler/test_scheduler.py::test_a_decision_takes_microseconds"]
LIBRARIES = (
    "torch", "transformers", "numba", "pandas", "pyarrow.parquet", "plotly.graph_objects", "hypothesis", "pytest"
)  # fmt: skip
#: cosmic-ray 8.7.0 raises where it meets `except (A, B)`.
UNFIT = {"core/ExceptionReplacer"}
#: Seconds for a mutant: these, and so many times what its tests take without one.
LEAST_S, TIMES = 20.0, 4.0
#: Of address space for one mutant: some ask for as much memory as there is.
MOST_BYTES = 16 << 30
OUTPUT = "output_of_tests.txt"
Place = tuple[tuple[int, int], tuple[int, int]]  # (line, column) of begin and end


Result = dict[str, object]  # a mutant with its outcome and what it changes


class Mutant(NamedTuple):
    """One change of one file."""

    path: str
    operator: str
    occurrence: int
    line: int


def kept(code: str) -> list[Place]:
    """Places that are not mutated: annotations, and decorators that name numba's."""
    tree, places = ast.parse(code), []
    for node in ast.walk(tree):
        found = [getattr(node, name, None) for name in ("annotation", "returns")]
        found += [d for d in getattr(node, "decorator_list", []) if "jit" in ast.unparse(d)]
        places += [
            ((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in found if n is not None
        ]
    return places


def places_of(path: str) -> dict[Place, list[Mutant]]:
    """All places of a file that can be changed, each with its changes."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    code = (ROOT / path).read_text()
    fixed, nodes = kept(code), list(ast_nodes(get_ast(code)))
    found: dict[Place, list[Mutant]] = {}
    same: dict[str, list[Place]] = {}  # whatever an arithmetic operator is replaced by
    for name in sorted(set(operator_names()) - UNFIT):
        try:
            operator = get_operator(name)()
        except TypeError:  # wants arguments of its own
            continue
        key = name.rpartition("_")[0] if "BinaryOperator" in name else name
        if key not in same:
            same[key] = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, place in enumerate(same[key]):
            begin = place[0]
            if not any(first <= begin < last for first, last in fixed):
                found.setdefault(place, []).append(Mutant(path, name, occurrence, begin[0]))
    return found


def drawn(count: int, seed: int, only: list[str]) -> list[Mutant]:
    """Mutants of places drawn without repetition from all files, or from those whose path begins with one of `only`."""
    files = [p for path in MUTATED for p in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    if only:
        files = [path for path in files if str(path.relative_to(ROOT)).startswith(tuple(only))]
    places = [
        changes for path in files for _, changes in sorted(places_of(str(path.relative_to(ROOT))).items())
    ]
    rng = random.Random(seed)
    print(
        f"{len(places)} places in {len(files)} files; {min(count, len(places))} mutants, seed {seed}",
        flush=True,
    )
    return [rng.choice(changes) for changes in rng.sample(places, min(count, len(places)))]


def of_former(result: Result) -> Mutant:
    """A former run's mutant. Ends the program if its file has changed: another change would be tried."""
    mutant = Mutant(*(result[name] for name in Mutant._fields))  # type: ignore[arg-type]
    if diff_of(*mutated(mutant), mutant.path) != result["diff"]:
        sys.exit(f"{mutant.path} has changed since; run all again")
    return mutant


def diff_of(before: str, after: str, path: str) -> str:
    """What a mutant changes."""
    return "\n".join(difflib.unified_diff(before.splitlines(), after.splitlines(), path, n=1, lineterm=""))


def mutated(mutant: Mutant) -> tuple[str, str]:
    """The file's text before and after."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    code = (ROOT / mutant.path).read_text()
    after = mutate_code(code, get_operator(mutant.operator)(), mutant.occurrence)
    assert after is not None, mutant
    return code, after


def key_of(mutant: Mutant) -> str:
    """Where its tests stand in `TESTS`."""
    return next(name for name in TESTS if mutant.path.startswith(name))


def run_tests(tree: Path, tests: list[str]) -> None:
    """In a forked process: pytest in a tree; the process ends with its exit code. Its output is in the tree."""
    os.setsid()
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    output = os.open(tree / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    sys.path[:] = [
        str(tree),
        *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "benchmarks")),
    ]
    sys.dont_write_bytecode = True
    import pytest

    left_out = [word for test in LEFT_OUT for word in ("--deselect", test)]
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning", "-p", "no:cacheprovider", "--timeout=0"]
    os._exit(int(pytest.main(["-x", "-q", *quiet, *left_out, *tests])))


class Run(NamedTuple):
    """A mutant under test."""

    mutant: Mutant
    tree: Path
    before: str
    after: str
    ends: float


def start(mutant: Mutant, tree: Path, most_s: float) -> tuple[int, Run]:
    """Run a mutant's tests in a process of their own, whose number is returned."""
    before, after = mutated(mutant)
    (tree / mutant.path).write_text(after)
    pid = os.fork()
    if pid == 0:
        try:
            run_tests(tree, TESTS[key_of(mutant)])
        finally:
            os._exit(70)
    return pid, Run(mutant, tree, before, after, time.monotonic() + most_s)


def outcome(pid: int, run: Run) -> str | None:
    """ "killed", "survived" or "out of time"; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        return "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
    if time.monotonic() < run.ends:
        return None
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "out of time"


def seconds_of_tests(tree: Path, mutants: list[Mutant]) -> dict[str, float]:
    """How long the tests take on the code as it is. Ends the program if they fail: they would notice every mutant, as
    in the first run of it.
    """
    took_s = {}
    for name in sorted({key_of(mutant) for mutant in mutants}):
        tests, begin = TESTS[name], time.monotonic()
        pid = os.fork()
        if pid == 0:
            try:
                run_tests(tree, tests)
            finally:
                os._exit(70)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
            sys.exit(f"{' '.join(tests)} fail without a mutant:\n{(tree / OUTPUT).read_text()[-3000:]}")
        took_s[name] = time.monotonic() - begin
    print("seconds without a mutant:", {name: round(s, 1) for name, s in took_s.items()}, flush=True)
    return took_s


def test_all(mutants: list[Mutant], jobs: int, results: list[Result], out: Path | None) -> None:
    """Run every mutant in one of `jobs` copies of the tree; `results` grow, and are written as they do."""
    with tempfile.TemporaryDirectory() as folder:
        free = [Path(folder) / str(i) for i in range(jobs)]
        for tree in free:
            shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "__pycache__", "*.ipynb"))
        took_s = seconds_of_tests(free[0], mutants)
        waiting, running = mutants[::-1], dict[int, Run]()
        while waiting or running:
            while waiting and free:
                mutant = waiting.pop()
                pid, run = start(mutant, free.pop(), LEAST_S + TIMES * took_s[key_of(mutant)])
                running[pid] = run
            time.sleep(0.05)
            for pid, run in list(running.items()):
                if (how := outcome(pid, run)) is None:
                    continue
                (run.tree / run.mutant.path).write_text(run.before)
                free.append(run.tree)
                del running[pid]
                diff = diff_of(run.before, run.after, run.mutant.path)
                results.append({**run.mutant._asdict(), "outcome": how, "diff": diff})
                if out is not None:
                    out.write_text(json.dumps(results, indent=1) + "\n")
                if how != "killed":
                    print(f"-- {how}, {run.mutant.operator}\n{diff}", flush=True)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[], help="begins of paths, as prescope/scheduler")
    parser.add_argument("--again", type=Path, help="JSON of a former run: only what was not killed there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    for name in LIBRARIES:
        __import__(name)
    results: list[Result] = []
    if options.again:
        former = json.loads(options.again.read_text())
        results = [result for result in former if result["outcome"] == "killed"]
        mutants = [of_former(result) for result in former if result["outcome"] != "killed"]
    else:
        mutants = drawn(options.mutants, options.seed, options.only)
    test_all(mutants, options.jobs, results, options.out)
    for name in sorted({Path(str(result["path"])).parts[1] for result in results}):
        counts = Counter(str(r["outcome"]) for r in results if Path(str(r["path"])).parts[1] == name)
        print(f"{name}: " + ", ".join(f"{count} {how}" for how, count in sorted(counts.items())))
    print("all:", dict(Counter(str(r["outcome"]) for r in results)))


if __name__ == "__main__":
    main()
