"""The `--runs` part of startup.py: what a person waits for in the first calls, and in those behind them."""

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from _models import open_shape

import prescope
from prescope.core.paths import embedded_model
from prescope.engine.engine import Engine
from prescope.scheduler.costs import LayerCosts

PROMPT, NEW, LONGER, BATCH = 64, 12, 200, 8
#: In the order in which they stand in the table; times in milliseconds.
RUN_COLUMNS = [
    "compiled", "call", "tokens in", "batch", "graphs recorded", "before prefill", "token 1", "token 2", "token 3",
    "others", "graphs kept", "caches GiB",
]  # fmt: skip
#: In the order in which a new process comes there. Importing transformers is but its first part: prescope imports the
#: rest, transformers alone does so as it loads. On a CPU the column of the GPU is that of a first tensor.
COLD_COLUMNS = [
    "cold start", "python s", "torch s", "transformers s", "prescope s", "GPU s", "load s", "first token s", "all s",
]  # fmt: skip
#: Made up: only what is decided depends on them, and here nothing does.
COSTS = LayerCosts(
    link_us=200.0, gpu_us=10.0, rest_us=100.0, decide_us=30.0, cpu_us=(0.0, 150.0, 200.0), cpu_base_us=20.0,
    source="made up: start-up does not depend on them",
)  # fmt: skip
#: A process from its start to a first token; {load} and {generate} are prescope's or those of transformers alone.
COLD = """
import time
stamps = [time.time()]
import torch
stamps.append(time.time())
from transformers import AutoModelForCausalLM, AutoTokenizer
stamps.append(time.time())
{imports}
stamps.append(time.time())
torch.zeros(1, device={device!r})
stamps.append(time.time())
{load}
stamps.append(time.time())
{generate}
stamps.append(time.time())
print("times", *stamps)
"""
COLD_PRESCOPE = {
    "imports": "from prescope.engine import load",
    "load": "engine = load(slots=0.5, device={device!r})",
    "generate": "engine.generate('Once upon a time', max_new_tokens=1)",
}
COLD_TRANSFORMERS = {
    "imports": "",
    "load": "model = AutoModelForCausalLM.from_pretrained({folder!r}, dtype='auto').to({device!r})\n"
    "tokenizer = AutoTokenizer.from_pretrained({folder!r})",
    "generate": "ids = tokenizer('Once upon a time', return_tensors='pt').to({device!r})\n"
    "model.generate(**ids, max_new_tokens=1)[0].tolist()",
}


class Call(NamedTuple):
    """One call of `generate`."""

    name: str
    prompt: torch.Tensor  # (B, T)
    configure: dict[str, Any]


def runs(args: Any, keep: Callable[[dict[str, Any]], None]) -> None:
    """Cold starts of the embedded model, then the calls, without and with compiled layers."""
    for name, code in (
        ("embedded model", COLD_PRESCOPE),
        ("transformers alone", COLD_TRANSFORMERS),
        ("embedded model, again", COLD_PRESCOPE),
        ("transformers alone, again", COLD_TRANSFORMERS),
    ):
        keep(cold_start(name, code, args.device))
    device = torch.device(args.device)
    model = open_shape(args.model, device, torch.bfloat16, args.experts)
    for compiled in (False, True) if args.device == "cuda" else (False,):
        settings: dict[str, Any] = {"link_gb_per_s": 50.0} if args.device == "cpu" else {}
        began = time.perf_counter()
        with prescope.attach(
            model,
            slots=args.slots,
            device=args.device,
            schedule="presched",
            costs=COSTS,
            compiled=compiled,
            **settings,
        ) as engine:
            keep(
                {
                    "part": "runs",
                    "compiled": compiled,
                    "call": "attach",
                    "others": (time.perf_counter() - began) * 1e3,
                }
            )
            for call in _calls(engine):
                keep(_measured(engine, call, compiled))


def cold_start(name: str, code: dict[str, str], device: str) -> dict[str, Any]:
    """A new process, to the embedded model's first token."""
    filled = {part: text.format(device=device, folder=str(embedded_model())) for part, text in code.items()}
    began = time.time()
    done = subprocess.run(
        [sys.executable, "-c", COLD.format(device=device, **filled)],
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("times"))
    stamps = [began, *map(float, line.split()[1:])]
    took = [later - earlier for earlier, later in pairwise(stamps)]
    row = [name, *took, stamps[-1] - began]
    return {"part": "cold", **dict(zip(COLD_COLUMNS, row, strict=True))}


def _calls(engine: Engine) -> list[Call]:
    generator = torch.Generator().manual_seed(0)
    vocabulary = engine.model.config.vocab_size

    def tokens(length: int, batch: int = 1) -> torch.Tensor:
        return torch.randint(1, vocabulary, (batch, length), generator=generator)

    first = tokens(PROMPT)
    chat = torch.cat([first, tokens(NEW + 40)], dim=1)  # the answer, and what is said to it
    return [
        Call("first", first, {}),
        Call("second", tokens(PROMPT), {}),
        Call("chat goes on", chat, {}),
        Call("longer than any before", tokens(LONGER), {}),
        Call(f"batch {BATCH}", tokens(PROMPT, BATCH), {}),
        Call("batch 1 again", tokens(PROMPT), {}),
        Call("after width, costs", tokens(PROMPT), {"width": 8, "costs": replace(COSTS, link_us=150.0)}),
        Call("after cache='lfu'", tokens(PROMPT), {"cache": "lfu"}),
        Call("next bucket", tokens(1100), {}),
        Call("short again", tokens(PROMPT), {}),
    ]


def _measured(engine: Engine, call: Call, compiled: bool) -> dict[str, Any]:
    model, stamps = engine.model, [0.0]
    plain = model._prefill

    def stamped(*arguments: Any, **keywords: Any) -> Any:
        stamps.append(time.perf_counter())
        return plain(*arguments, **keywords)

    began = time.perf_counter()
    if call.configure:
        engine.configure(**call.configure)
    model.__dict__["_prefill"] = stamped
    try:
        run = engine.generate(
            call.prompt, max_new_tokens=NEW, on_step=lambda _: stamps.append(time.perf_counter())
        )
    finally:
        del model.__dict__["_prefill"]
    stamps[0] = began
    took = [1e3 * (later - earlier) for earlier, later in pairwise(stamps)]
    graphs = run.config.get("graphs", {})
    return {
        "part": "runs", "compiled": compiled, "call": call.name, "tokens in": call.prompt.shape[1],
        "batch": call.prompt.shape[0], "graphs recorded": graphs.get("recorded"), "before prefill": took[0],
        "token 1": took[1], "token 2": took[2], "token 3": took[3],
        "others": sum(took[4:]) / max(1, len(took[4:])), "graphs kept": graphs.get("kept"),
        "caches GiB": graphs.get("cache_bytes", 0) / 2**30, "decode": run.config["reasons"]["decode"],
    }  # fmt: skip
