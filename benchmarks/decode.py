"""Decode speed with experts in host memory, against the same model all on the GPU.

    python benchmarks/decode.py --model qwen3-30b-a3b-cut16 --batch 1 8 16 --slots 1.0 0.5 0.25 --out results.json

For each model: the plain model all on the GPU in its own modes, then the engine with each share of slots. Every cell
is the median of --repeats runs after a warm-up; tokens/s is the decode phase, the prefill stands apart. In the same
run: the link's rate, Belady's misses on the recorded trace, the distinct tokens of the last text (few: it loops, and
every cache looks good), and the check of the tokens (`check_tokens`).
Prints a table and writes JSON with everything, one record per cell.
"""

import argparse
import statistics
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _models import BenchModel, open_model
from _written import write_cells
from tokenizers import Tokenizer
from transformers import PreTrainedModel, StoppingCriteria

from prescope import attach
from prescope.core.machine import machine_facts
from prescope.engine.engine import Engine
from prescope.traces.bounds import belady_misses

TRIAL_LINK_GB_PER_S = 1.0  # emulated, with --device cpu
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COLUMNS = [
    "model", "batch", "engine", "slots", "tok/s", "spread", "TTFT ms", "hit %", "late %", "miss %", "GB moved",
    "link GB/s", "stall %", "host %", "Belady miss %", "bound ms", "efficiency %", "distinct", "tokens = plain %",
    "worst gap",
]  # fmt: skip


def main() -> None:
    """Run all models, print the table, write the JSON."""
    args = _arguments()
    args.deadline = time.perf_counter() + args.seconds
    on_gpu = args.device == "cuda"
    facts = {
        **machine_facts(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU standing in for the GPU",
        "link": "measured with pinned 64 MiB copies" if on_gpu else "emulated",
        "link_gb_per_s": link_rate() if on_gpu else TRIAL_LINK_GB_PER_S,
    }
    print(f"# {facts['device']}, link {facts['link_gb_per_s']:.1f} GB/s ({facts['link']})", flush=True)
    records: list[dict[str, Any]] = []
    try:
        for name in args.model:
            bench = open_model(name, torch.device(args.device), DTYPES[args.dtype])
            run_model(bench, args, facts, records)
            del bench
            torch.compiler.reset()
            if on_gpu:
                torch.cuda.empty_cache()
    except KeyboardInterrupt:
        print("# interrupted: what follows is what there is")
    finally:
        table = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *map(table_row, records)]
        print("\n" + "\n".join(table))
        write_cells(args, facts, records)


def run_model(
    bench: BenchModel, args: argparse.Namespace, facts: dict[str, Any], records: list[dict[str, Any]]
) -> None:
    """Append all cells of one model: the plain ones, then the engine's, then the check of the tokens."""
    first = len(records)
    source = Prompts(bench, args.text)
    prompts = {batch: source.draw(batch, args.prompt, seed=1) for batch in args.batch}
    outputs: list[torch.Tensor | None] = []
    base = {
        "prompts": source.name,
        "model": bench.name,
        "weights": bench.weights,
        "dtype": args.dtype,
        "prompt": args.prompt,
    }

    def keep(cell: dict[str, Any], tokens: torch.Tensor | None) -> None:
        records.append({**base, **cell})
        outputs.append(tokens)
        print(table_row(records[-1]), flush=True)
        write_cells(args, facts, records)

    for batch in args.batch:
        for mode in args.plain:
            if batch in {"compiled": args.compiled_batch, "eager": args.eager_batch}.get(mode, args.batch):
                cell, tokens = run_plain(bench.model, prompts[batch], mode, args)
                keep(
                    {
                        "batch": batch,
                        "new": args.new,
                        "engine": f"plain {mode}",
                        "slots": "all on GPU",
                        **cell,
                    },
                    tokens,
                )
    fastest = {
        batch: min((r["tpot_ms"] for r in records[first:] if r["batch"] == batch), default=float("inf"))
        for batch in args.batch
    }
    started = time.perf_counter()
    link = None if args.device == "cuda" else TRIAL_LINK_GB_PER_S
    with attach(
        bench.model, slots=1.0, device=args.device, kernels=args.kernels, link_gb_per_s=link
    ) as engine:
        seconds = time.perf_counter() - started
        print(f"# {engine!r}: experts to pinned rows in {seconds:.1f} s", flush=True)
        if args.events_cost:
            keep(events_cost(engine, prompts[args.batch[0]], args), None)
        modes = {batch: args.modes if batch < 8 else args.modes_large or args.modes for batch in args.batch}
        for batch in args.batch:
            for mode, share in product(modes[batch], args.slots):
                if time.perf_counter() > args.deadline:
                    print(f"# no time left for batch {batch}, {mode}, {share:.0%} slots", flush=True)
                    continue
                decode, _, compiled = mode.partition("+")
                engine.configure(slots=share, decode=decode, compiled=bool(compiled))
                bounds = (fastest[batch], facts["link_gb_per_s"])
                cell, tokens = run_engine(engine, source, prompts[batch], mode, args, bounds)
                if share == 1.0:  # the same model all on the GPU: no slots to wait for
                    fastest[batch] = min(fastest[batch], cell["tpot_ms"])
                new = new_tokens(batch, args)
                keep({"batch": batch, "new": new, "slots": f"{share:.0%}", **cell}, tokens)
    check_tokens(bench.model, args, records[first:], outputs)


def run_plain(
    model: PreTrainedModel, prompt: torch.Tensor, mode: str, args: argparse.Namespace
) -> tuple[dict[str, Any], torch.Tensor]:
    """The model all on the GPU, by experts "eager", "batched_mm", "default", or "compiled" with a static cache."""
    implementation = {"eager": "eager", "batched_mm": "batched_mm"}.get(mode, "grouped_mm")
    model.set_experts_implementation(implementation)
    keywords: dict[str, Any] = {"cache_implementation": "static"} if mode == "compiled" else {}
    prompt = prompt.to(model.device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    runs, output = [], inputs["input_ids"]
    for i in range(args.plain_repeats + (2 if mode == "compiled" else 1)):
        clock = DecodeClock()
        output = model.generate(
            **inputs, max_new_tokens=args.new, do_sample=False,
            stopping_criteria=[clock], **keywords,
        )  # fmt: skip
        tpot_ms = clock.tpot_ms()
        if i >= (2 if mode == "compiled" else 1):
            runs.append(tpot_ms)
    return speed(runs, prompt.shape[0]), output.cpu()


class DecodeClock(StoppingCriteria):
    """Wall time of the decode phase: from the first token to the end, both after the GPU is done.

    Attributes:
        first_s: when the first token was there, by `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.first_s: float | None = None
        self._tokens = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **keywords: Any) -> torch.Tensor:
        self._tokens += 1
        if self.first_s is None:
            self.first_s = self._now()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def tpot_ms(self) -> float:
        """Call when `generate` has returned."""
        assert self.first_s is not None, "no token was generated"
        return (self._now() - self.first_s) / (self._tokens - 1) * 1e3

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()


def speed(tpot_ms: list[float], batch: int) -> dict[str, Any]:
    """Median and spread of the runs."""
    median = statistics.median(tpot_ms)
    return {
        "tpot_ms": median,
        "tokens_per_s": batch * 1e3 / median,
        "tokens_per_s_runs": [batch * 1e3 / value for value in tpot_ms],
    }


def run_engine(
    engine: Engine,
    source: "Prompts",
    prompt: torch.Tensor,
    mode: str,
    args: argparse.Namespace,
    bounds: tuple[float, float],
) -> tuple[dict[str, Any], torch.Tensor]:
    """One cell of the engine: a cold run, then warm ones, each on a prompt of its own (repeated prompts flatter any
    cache). The last run has the prompt of the plain model, to compare the tokens.

    mode: `EngineConfig.decode`, with "+compiled" behind it for layers compiled around the experts.
    bounds: TPOT of the fastest plain mode in ms, and the link's rate in GB/s.
    """
    plain_tpot_ms, link = bounds
    new = new_tokens(prompt.shape[0], args)
    settings: dict[str, Any] = {"max_new_tokens": new}
    started = time.perf_counter()
    engine.generate(source.draw(*prompt.shape, seed=99), **settings)
    first_s = time.perf_counter() - started
    engine.clear_cache()
    others = [source.draw(*prompt.shape, seed=2 + i) for i in range(args.repeats)]
    cold, *runs = [engine.generate(ids, **settings) for ids in [*others, prompt]]
    before, last = [cold, *runs][-2:]
    decode = last.metrics.decode
    floor = belady_misses(last.trace, engine.num_slots, before.trace)
    steps = new - 1
    floor_ms = floor.misses_decode * engine.shape.row_bytes / steps / link / 1e6
    gpu_ms = min(plain_tpot_ms, statistics.median(run.metrics.tpot_ms for run in runs))
    bound_ms = max(gpu_ms, floor_ms)
    cell = {
        "engine": f"prescope {engine.config.cache} {mode}: {last.config['reasons']['decode'].partition(':')[0]}",
        "decode": last.config["reasons"]["decode"],
        "first_run_s": first_s,  # tuning, compiling and capturing included
        "num_slots": engine.num_slots,
        "slots_gib": engine.describe()["slots_gib"],
        **speed([run.metrics.tpot_ms for run in runs], prompt.shape[0]),
        "tpot_ms_cold": cold.metrics.tpot_ms,
        "ttft_ms": statistics.median(run.metrics.ttft_ms for run in runs),
        "ttft_ms_cold": cold.metrics.ttft_ms,
        **{name: getattr(decode, name) for name in DECODE_FIELDS},
        "belady_miss_rate": floor.misses_decode / max(1, floor.needed_decode),
        "bound_ms": bound_ms,
        "bound_is": "link (Belady)" if floor_ms > gpu_ms else "GPU (fastest way with all experts there)",
        "distinct_tokens": len({token for row in last.tokens for token in row}),
    }
    cell["efficiency"] = bound_ms / cell["tpot_ms"]
    return cell, torch.cat([prompt, torch.tensor(last.tokens)], dim=1)


DECODE_FIELDS = [
    "needed", "hits", "late", "misses", "hit_rate", "late_rate", "miss_rate", "stall_frac", "stall_ms", "host_wait_ms",
    "dense_gpu_ms", "experts_gpu_ms", "wall_ms", "h2d_bytes", "h2d_busy_ms", "link_gb_per_s", "link_use_frac",
    "overlap_frac",
]  # fmt: skip


def new_tokens(batch: int, args: argparse.Namespace) -> int:
    """Tokens out: fewer for large batches, whose steps are slow and alike."""
    return args.new if batch < 8 else min(args.new, args.new_large)


def events_cost(engine: Engine, prompt: torch.Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Cost of the timeline: TPOT with and without events, A-B-B-A, at half the experts in slots."""
    engine.configure(slots=0.5)
    times: dict[bool, list[float]] = {True: [], False: []}
    engine.generate(prompt, max_new_tokens=args.new)
    for events in [True, False, False, True] * max(2, args.repeats // 2):
        with engine.without_events(not events):
            run = engine.generate(prompt, max_new_tokens=args.new)
        times[events].append(run.metrics.tpot_ms)
    on, off = statistics.median(times[True]), statistics.median(times[False])
    return {
        "engine": "cost of events", "batch": prompt.shape[0], "slots": "50%", **speed(times[True], prompt.shape[0]),
        "tpot_ms_without_events": off, "events_cost_frac": on / off - 1,
    }  # fmt: skip


@torch.no_grad()
def check_tokens(
    model: PreTrainedModel,
    args: argparse.Namespace,
    cells: list[dict[str, Any]],
    outputs: list[torch.Tensor | None],
) -> None:
    """Hold every cell's tokens against the plain model.

    `tokens_equal`: share of tokens equal to the plain default's. In bfloat16 two correct implementations differ in
    the last bit and part at a tie, so there is also the *gap*: the plain model reads each cell's own sequence, and
    at every place the logit of the chosen token is held against the largest. 0 means its own argmax everywhere; the
    plain model's other modes show what a tie is worth.
    """
    model.set_experts_implementation("grouped_mm")
    reference = {
        cell["batch"]: tokens
        for cell, tokens in zip(cells, outputs, strict=True)
        if cell["engine"] == "plain default" and tokens is not None
    }
    for cell, tokens in zip(cells, outputs, strict=True):
        if tokens is None:
            continue
        new = tokens[:, args.prompt :]
        if cell["batch"] in reference:
            expected = reference[cell["batch"]][:, args.prompt : tokens.shape[1]]
            equal = (new == expected).float().mean()
            cell["tokens_equal"] = float(equal)
        gaps = []
        for row in tokens:  # one sequence at a time: logits of a batch over a large vocabulary take gigabytes
            logits = model(row[None].to(model.device)).logits[0, args.prompt - 1 : -1].float()
            chosen = logits.gather(1, row[args.prompt :, None].to(model.device))[:, 0]
            gaps.append((logits.max(dim=1).values - chosen).max())
        cell["worst_gap"] = float(torch.stack(gaps).max())


def link_rate() -> float:
    """GB/s of pinned 64 MiB host-to-device copies."""
    host = torch.empty(64 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device="cuda")
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    target.copy_(host, non_blocking=True)
    start.record()
    for _ in range(32):
        target.copy_(host, non_blocking=True)
    end.record()
    end.synchronize()
    return 32 * host.nbytes / start.elapsed_time(end) / 1e6


class Prompts:
    """Prompts of a given length, the same for every engine: windows of text files, or uniformly random tokens."""

    def __init__(self, bench: BenchModel, files: list[str]) -> None:
        self._vocabulary = bench.model.config.vocab_size
        self._streams: list[torch.Tensor] = []
        self.name = "random tokens"
        if files and bench.weights == "trained":
            tokenizer = Tokenizer.from_file(str(Path(bench.folder) / "tokenizer.json"))
            self._streams = [torch.tensor(tokenizer.encode(Path(f).read_text()[:400_000]).ids) for f in files]
            self.name = "held-out text: " + ", ".join(Path(f).stem for f in files)

    def draw(self, batch: int, length: int, seed: int) -> torch.Tensor:
        """Token ids (batch, length); text comes from the files in turn."""
        generator = torch.Generator().manual_seed(seed)
        if not self._streams:
            return torch.randint(0, self._vocabulary, (batch, length), generator=generator)
        rows = []
        for i in range(batch):
            stream = self._streams[(seed + i) % len(self._streams)]
            start = int(torch.randint(0, len(stream) - length, (1,), generator=generator))
            rows.append(stream[start : start + length])
        return torch.stack(rows)


def table_row(cell: dict[str, Any]) -> str:
    """One line of the table."""

    def show(name: str, scale: float = 1.0, digits: int = 1) -> str:
        value = cell.get(name)
        return "" if value is None or value != value else f"{value * scale:.{digits}f}"

    runs = cell.get("tokens_per_s_runs", [])
    note = f" ({cell['events_cost_frac']:+.1%})" if "events_cost_frac" in cell else ""
    values = [
        f"{cell['model']} ({cell['weights']})", str(cell["batch"]), cell["engine"] + note, cell["slots"],
        show("tokens_per_s"), f"{min(runs):.1f}-{max(runs):.1f}" if runs else "", show("ttft_ms"),
        show("hit_rate", 100), show("late_rate", 100), show("miss_rate", 100), show("h2d_bytes", 1e-9, 2),
        show("link_gb_per_s"), show("stall_frac", 100),
        f"{cell['host_wait_ms'] / cell['wall_ms']:.1%}".rstrip("%") if cell.get("wall_ms") else "",
        show("belady_miss_rate", 100), show("bound_ms", 1, 2), show("efficiency", 100),
        show("distinct_tokens", 1, 0), show("tokens_equal", 100), show("worst_gap", 1, 3),
    ]  # fmt: skip
    return f"| {' | '.join(values)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", default=["qwen3-30b-a3b-cut16"], help="shape names or model folders"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument(
        "--slots", nargs="+", type=float, default=[1.0, 0.5, 0.25], help="shares of all experts"
    )
    parser.add_argument("--plain", nargs="*", default=["eager", "batched_mm", "default", "compiled"])
    parser.add_argument("--compiled-batch", nargs="*", type=int, default=[1, 8])
    parser.add_argument(
        "--modes", nargs="+", default=["auto"], help="EngineConfig.decode, with or without +compiled"
    )
    parser.add_argument("--modes-large", nargs="*", default=[], help="modes at batch 8 and above, if others")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="start no new cell of the engine after this"
    )
    parser.add_argument("--eager-batch", nargs="*", type=int, default=[1, 8, 16])
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the script")
    parser.add_argument(
        "--text", nargs="*", default=[], help="text files to take a trained model's prompts from"
    )
    parser.add_argument("--prompt", type=int, default=64, help="tokens in")
    parser.add_argument("--new", type=int, default=64, help="tokens out")
    parser.add_argument("--new-large", type=int, default=64, help="tokens out at batch 8 and above")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plain-repeats", type=int, default=3)
    parser.add_argument("--events-cost", action="store_true")
    parser.add_argument("--out", help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
