"""Hours of a careless user in minutes: interrupts at any moment, two threads, fork, close, every schedule.

    python benchmarks/stress.py --minutes 10 --out stress.json

A small model with random weights (float32) runs in child processes, one after the other, each with random schedules,
slots, caches, batches and prompts, on the GPU if there is one. Every text is compared with the plain model's. A child
that crashes, hangs (no sign of life for --patience seconds; its threads' stacks are kept) or ends in an unforeseen
error is counted and the next one started. Prints a table; exits with 1 unless wrong texts, errors, crashes and hangs
are all 0.
"""

import argparse
import faulthandler
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import prescope
from prescope.core.machine import machine_facts
from prescope.errors import ForkedProcess, NotAttached
from prescope.predictor import EarlyRouter, Predictor, Routers
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts

LAYERS, EXPERTS, TOP_K, VOCABULARY = 4, 8, 2, 128
NEW_TOKENS = 10
#: Decided enough that greedy tokens vary, so that a wrong expert shows in the text.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "initializer_range": 0.3, "eos_token_id": None,
}  # fmt: skip
#: By which schedules send some experts to the CPU, copy some and prefetch some.
COSTS = LayerCosts(
    link_us=100.0,
    gpu_us=5.0,
    rest_us=200.0,
    cpu_us=(0.0, 80.0, 120.0, 160.0),
    source="made up for the stress test",
)
CHILD_SECONDS = 40.0
#: Until a child has run its first texts. On a machine that had just started, 20 s until torch was imported and then
#: more than 90 s until decisions were compiled, beside eight processes that did the same (H200, 2026-11-30).
START_SECONDS = 300.0
#: For a child that hangs to write down its stacks.
STACKS_SECONDS = 5.0
#: Of the time divided by the kinds, so that each has its turn: a child takes some seconds to start as well.
MOST_SHARE = 0.5
COUNTS = ("calls", "interrupts", "forks", "closes")
FAULTS = ("wrong texts", "errors", "crashes", "hangs")


class Case(NamedTuple):
    """A model with what it says by itself."""

    model: Qwen3MoeForCausalLM
    prompts: list[torch.Tensor]  # (B, T) each
    expected: list[list[list[int]]]
    predictor: Predictor
    device: str


def make_case(device: str) -> Case:
    """The model, and its own texts by transformers alone."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).eval().to(device)
    rng = torch.Generator().manual_seed(1)
    prompts = [
        torch.randint(0, VOCABULARY, (batch, length), generator=rng)
        for batch, length in ((1, 3), (1, 17), (2, 6), (3, 9), (5, 4))
    ]
    expected = [plain(model, ids) for ids in prompts]
    weights = torch.stack([layer.mlp.gate.weight.detach().cpu() for layer in model.model.layers])
    with prescope.attach(model, slots=EXPERTS, device="cpu" if device == "cpu" else "cuda") as engine:
        shape = engine.shape
    return Case(model, prompts, expected, EarlyRouter(shape, Routers.of_weights(weights), LAYERS - 1), device)


def plain(model: Qwen3MoeForCausalLM, ids: torch.Tensor) -> list[list[int]]:
    """Greedy tokens of the model's own `generate`."""
    ids = ids.to(model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
    return out[:, ids.shape[1] :].tolist()


class Child:
    """One child's minute: counts what it does, and prints each count as a sign of life."""

    def __init__(self, case: Case, seed: int, seconds: float) -> None:
        self.case, self.rng = case, random.Random(seed)
        self.ends = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.said: list[str] = []

    def run(self, act: Callable[["Child", prescope.Engine], None]) -> None:
        """Open engines with random settings and do one thing to them, until the time is over."""
        while time.monotonic() < self.ends:
            settings = self.settings()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    engine = prescope.attach(self.case.model, **settings)
                    for _ in range(6):
                        act(self, engine)
                    engine.close()
                    self.check(plain(self.case.model, self.case.prompts[0]), 0, f"after close of {settings}")
                except Exception as error:
                    self.counts["errors"] += 1
                    self.say(f"{type(error).__name__}: {error} ({settings})")
                    raise
            self.report()

    def settings(self) -> dict[str, Any]:
        """A random engine."""
        schedule = self.rng.choice(sorted(SCHEDULES))
        on_gpu = self.case.device != "cpu"
        return {
            "schedule": schedule,
            "cache": self.rng.choice(["auto", "lru", "lfu", "score", "static"]),
            "slots": self.rng.choice([TOP_K, TOP_K + 1, 5, EXPERTS, 13, LAYERS * EXPERTS]),
            "device": "cuda" if on_gpu else "cpu",
            "predictor": self.case.predictor,
            "costs": COSTS,
            "cpu_threads": self.rng.choice([0, 1, 2]),
            "frequencies": np.random.default_rng(self.rng.randrange(9)).random((LAYERS, EXPERTS)),
            "events": self.rng.random() < 0.5,
            **({"decode": self.rng.choice(["auto", "layered"])} if on_gpu else {"link_gb_per_s": 20.0}),
        }

    def choose(self) -> int:
        """Number of a prompt."""
        return self.rng.randrange(len(self.case.prompts))

    def check(self, tokens: list[list[int]], number: int, where: str) -> None:
        """Compare a text with the plain model's."""
        self.counts["calls"] += 1
        if tokens != self.case.expected[number]:
            self.counts["wrong texts"] += 1
            self.say(f"wrong text {where}: {tokens} instead of {self.case.expected[number]}")

    def generate(self, engine: prescope.Engine, number: int, **keywords: Any) -> None:
        """One run, by the engine or by the model itself, whose text must be right."""
        if self.rng.random() < 0.3 and not keywords:
            self.check(plain(self.case.model, self.case.prompts[number]), number, "by model.generate")
            return
        ids = self.case.prompts[number]
        run = engine.generate(ids, max_new_tokens=NEW_TOKENS, **keywords)
        self.check(run.tokens, number, f"with {engine!r}")

    def say(self, what: str) -> None:
        """Keep a fault's story for the parent."""
        self.said.append(what[:600])
        self.report()

    def report(self) -> None:
        """A sign of life with all counts so far."""
        print(json.dumps({"counts": dict(self.counts), "said": self.said}), flush=True)


# -- what is done to an engine ------------------------------------------------------------------------------------


def interrupts(child: Child, engine: prescope.Engine) -> None:
    """A signal somewhere in a run; the next one must be right."""
    number = child.choose()
    try:
        signal.setitimer(signal.ITIMER_REAL, child.rng.uniform(1e-4, 0.12))
        child.generate(engine, number)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        child.counts["interrupts"] += 1
    child.generate(engine, child.choose())
    engine.check_integrity()


def threads(child: Child, engine: prescope.Engine) -> None:
    """Two threads on one model, by the engine and by the model's own `generate`."""
    numbers = [[child.choose() for _ in range(3)] for _ in range(2)]
    failed: list[BaseException] = []

    def work(mine: list[int]) -> None:
        try:
            for number in mine:
                child.generate(engine, number)
        except BaseException as error:  # noqa: BLE001 - raised by whoever started the threads
            failed.append(error)

    both = [threading.Thread(target=work, args=(mine,), daemon=True) for mine in numbers]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    if failed:
        raise failed[0]
    engine.check_integrity()


def forks(child: Child, engine: prescope.Engine) -> None:
    """A forked process that uses the engine is told so; the engine of its parent goes on."""
    child.generate(engine, child.choose())
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        code = 1
        try:
            child.rng.choice([lambda: engine.generate(child.case.prompts[0]), engine.recover, engine.close])()
        except ForkedProcess:
            code = 0
        finally:
            os._exit(code)
    child.counts["forks"] += 1
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code != 0:
        child.counts["hangs" if code == -signal.SIGALRM else "crashes" if code < 0 else "errors"] += 1
        child.say(f"a forked process ended with {code}")
    child.generate(engine, child.choose())


def closes(child: Child, engine: prescope.Engine) -> None:
    """Close in a callback, in another thread, or before a run; the next engine takes over."""
    way, at, number = (
        child.rng.choice(["callback", "thread", "before"]),
        child.rng.randrange(1, 8),
        child.choose(),
    )
    second = prescope.attach(child.case.model, **child.settings()) if engine.is_closed else engine
    if way == "before":
        second.close()
    closer = threading.Thread(target=second.close)

    def on_step(tokens: int) -> None:
        if tokens == at:
            second.close() if way == "callback" else closer.start()

    try:
        run = second.generate(child.case.prompts[number], max_new_tokens=NEW_TOKENS, on_step=on_step)
    except NotAttached:
        if way != "before":
            raise
    else:
        child.counts["calls"] += 1
        wanted = [row[: len(got)] for row, got in zip(child.case.expected[number], run.tokens, strict=True)]
        if run.tokens != wanted or len(run.tokens[0]) < at:
            child.counts["wrong texts"] += 1
            child.say(f"wrong text of a run closed by {way}: {run.tokens} instead of {wanted}")
    if way == "thread" and closer.ident is not None:
        closer.join()
    child.counts["closes"] += 1
    second.close()
    child.check(plain(child.case.model, child.case.prompts[number]), number, f"after close by {way}")


ACTS = {"interrupts": interrupts, "threads": threads, "forks": forks, "closes": closes}


def child_main(kind: str, seed: int, seconds: float, device: str) -> None:
    """What a child process does."""
    torch.set_num_threads(1)
    if kind != "forks":  # its watchdog is a thread, for which a forked process would wait at its end
        faulthandler.enable()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    child = Child(make_case(device), seed, seconds)
    child.report()
    child.run(ACTS[kind])


# -- the parent ------------------------------------------------------------------------------------------------------


def watch(
    kind: str, seed: int, seconds: float, device: str, patience_s: float
) -> tuple[Counter[str], list[str]]:
    """Run a child to its end, or to the end of patience."""
    command = [sys.executable, __file__, "--child", kind, "--seed", str(seed), "--seconds", str(seconds)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, "--device", device], stdout=subprocess.PIPE, stderr=errors, text=True
        )
        last: dict[str, Any] = {"counts": {}, "said": []}
        alive = [time.monotonic()]

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    last.update(json.loads(line))
                    alive[0] = time.monotonic()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        hung = False
        while process.poll() is None and not hung:
            time.sleep(0.2)
            patience_now_s = patience_s if last["counts"] else max(START_SECONDS, patience_s)
            hung = time.monotonic() - alive[0] > patience_now_s
        if hung:
            process.send_signal(signal.SIGABRT)
            try:
                process.wait(timeout=STACKS_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        code = process.wait()
        reader.join()
        errors.seek(0)
        tail = errors.read().split("\nExtension modules:")[0][-2500:]
    counts, said = Counter(last["counts"]), list(last["said"])
    if hung:
        counts["hangs"] += 1
        said.append(f"{kind}, seed {seed}: no sign of life for {patience_now_s:.0f} s; {tail}")
    elif code < 0:
        counts["crashes"] += 1
        said.append(f"{kind}, seed {seed}: ended by signal {-code}; {tail}")
    elif code != 0 and not counts["errors"]:
        counts["errors"] += 1
        said.append(f"{kind}, seed {seed}: ended with {code}; {tail}")
    return counts, said


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kinds", nargs="+", choices=sorted(ACTS), default=sorted(ACTS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=90.0, help="seconds without a sign of life: a hang")
    parser.add_argument("--out", type=Path, help="JSON with all counts and the machine")
    parser.add_argument("--child", choices=sorted(ACTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=CHILD_SECONDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.child:
        child_main(options.child, options.seed, options.seconds, device)
        return
    ends, seed = time.monotonic() + 60 * options.minutes, options.seed
    longest = min(options.seconds, MOST_SHARE * 60 * options.minutes / len(options.kinds))
    totals: dict[str, Counter[str]] = {kind: Counter() for kind in options.kinds}
    said: list[str] = []
    while time.monotonic() < ends:
        kind = options.kinds[(seed - options.seed) % len(options.kinds)]
        seconds = min(longest, max(5.0, ends - time.monotonic()))
        counts, stories = watch(kind, seed, seconds, device, options.patience)
        totals[kind] += counts
        totals[kind]["children"] += 1
        for story in stories:
            print(story, flush=True)
        said += stories
        seed += 1
    columns = ["children", *COUNTS, *FAULTS]
    rows = [*((kind, totals[kind]) for kind in options.kinds), ("all", sum(totals.values(), Counter()))]
    print("| what | " + " | ".join(columns) + " |\n|---|" + "--:|" * len(columns))
    for kind, counts in rows:
        print(f"| {kind} | " + " | ".join(f"{counts[column]:,}" for column in columns) + " |")
    everything = rows[-1][1]
    if options.out:
        result = {
            "minutes": options.minutes, "seed": options.seed, "device": device, "machine": machine_facts(),
            "counts": {kind: {column: counts[column] for column in columns} for kind, counts in rows}, "said": said,
        }  # fmt: skip
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(1 if any(everything[fault] for fault in FAULTS) else 0)


if __name__ == "__main__":
    main()
