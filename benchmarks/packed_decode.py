"""Decode speed of a published shape with its experts packed, at equal GPU memory for slots, beside bfloat16.

    python benchmarks/packed_decode.py --experts bf16 int4 --slots 4GiB 8GiB --batch 1 8 64 --out packed_decode.json

Weights are random and experts are made in memory, a layer's for all layers; decode steps are routed by a trace with the
habits of tiny-moe's routing, the same for all forms, prompts by the model itself. For each form and batch all experts
are resident first (what the GPU takes), then each number of slots: a cold run that captures the step, then --repeats
from the slots that the run before left. TTFT is that of a prompt of --prompt tokens at batch 1, of --prompt-large at
others. The bound is the larger of the resident step and the missing experts' bytes over the measured link.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch
from _models import open_in_rows
from _written import write_cells
from decode import link_rate

from prescope.core.machine import machine_facts
from prescope.engine.config import EngineConfig
from prescope.engine.engine import Engine
from prescope.traces.synthetic import SyntheticSpec

TRIAL_LINK_GB_PER_S = 1.0  # emulated, with --device cpu
COLUMNS = [
    "experts", "MB/expert", "batch", "slots", "share %", "tok/s", "spread", "TTFT ms", "hit %", "GB/step", "link GB/s",
    "link used %", "step ms", "resident ms", "link ms", "of bound %", "x bf16", "decode",
]  # fmt: skip
RESIDENT = "resident"


def main() -> None:
    """Measure form by form; print the table and write JSON as cells come."""
    args = _arguments()
    args.deadline = time.perf_counter() + args.seconds
    on_gpu = args.device == "cuda"
    link = link_rate() if on_gpu else TRIAL_LINK_GB_PER_S
    facts = {
        **machine_facts(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "link_gb_per_s": link,
    }
    print(
        f"# {facts['device']}, link {link:.1f} GB/s\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}",
        flush=True,
    )
    records: list[dict[str, Any]] = []
    for form in args.experts:
        run_form(form, args, link, records)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
        write_cells(args, facts, records)


def run_form(form: str, args: argparse.Namespace, link: float, records: list[dict[str, Any]]) -> None:
    """All cells of one form."""
    started = time.perf_counter()
    opened = open_in_rows(args.model, form, torch.device(args.device), getattr(torch, args.dtype))
    settings: dict[str, Any] = {"device": args.device, "slots": args.slots[0], "compiled": args.compiled}
    if args.device == "cpu":
        settings["link_gb_per_s"] = TRIAL_LINK_GB_PER_S
    with Engine(
        opened.model, EngineConfig(**settings), layers=opened.layers, packing=opened.packing, name=args.model
    ) as engine:
        print(f"# {form}: rows in {time.perf_counter() - started:.0f} s: {engine!r}", flush=True)
        for batch in args.batch:
            resident_ms = float("nan")
            for slots in [*([RESIDENT] if args.resident else []), *args.slots]:
                if time.perf_counter() > args.deadline:
                    print(f"# no time left for {form}, batch {batch}, {slots}", flush=True)
                    continue
                record = cell(engine, form, batch, slots, args, link, resident_ms)
                if slots == RESIDENT:
                    resident_ms = record["step_ms"]
                    record |= {"resident_ms": resident_ms, "of_bound": 1.0}
                plain = [
                    other["tokens_per_s"] for other in records
                    if other["experts"] == "bf16" and (other["batch"], other["slots"]) == (batch, slots)
                ]  # fmt: skip
                record["times_bf16"] = record["tokens_per_s"] / plain[0] if plain else float("nan")
                records.append(record)
                print(row(record), flush=True)


def cell(
    engine: Engine,
    form: str,
    batch: int,
    slots: str,
    args: argparse.Namespace,
    link: float,
    resident_ms: float,
) -> dict[str, Any]:
    """One form, batch and number of slots."""
    new = args.new if batch < 8 else args.new_large
    length = args.prompt if batch == 1 else args.prompt_large
    engine.configure(slots=1.0 if slots == RESIDENT else slots)
    shape = engine.shape
    spec = SyntheticSpec(
        num_layers=shape.num_layers, num_experts=shape.num_experts, top_k=shape.top_k, zipf=args.habits[0],
        persistence=args.habits[1], correlation=args.habits[2], diversity=args.habits[3],
    )  # fmt: skip
    engine.force_routing(spec.generate(prompt_tokens=length, new_tokens=new, batch=batch, seed=1))
    vocabulary = engine.model.config.vocab_size
    runs = []
    for i in range(args.repeats + 1):
        prompt = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(i))
        runs.append(engine.generate(prompt, max_new_tokens=new, min_new_tokens=new))
    warm = runs[1:]
    decode = warm[-1].metrics.decode
    step_ms = statistics.median(run.metrics.tpot_ms for run in warm)
    nbytes = decode.h2d_bytes / max(1, decode.num_steps)
    link_ms = nbytes / link / 1e6
    bound_ms = max(link_ms, 0.0 if resident_ms != resident_ms else resident_ms)
    return {
        "experts": form, "row_bytes": shape.row_bytes, "batch": batch, "slots": slots, "num_slots": engine.num_slots,
        "slots_share": engine.num_slots / shape.total_experts, "prompt": length, "new": new,
        "tokens_per_s": batch * 1e3 / step_ms,
        "tokens_per_s_runs": [run.metrics.tokens_per_s for run in warm], "step_ms": step_ms,
        "ttft_ms": statistics.median(run.metrics.ttft_ms for run in warm), "ttft_ms_first": runs[0].metrics.ttft_ms,
        "hit_rate": decode.hit_rate, "step_bytes": nbytes, "link_gb_per_s": decode.link_gb_per_s,
        "link_use_frac": decode.link_use_frac, "stall_frac": decode.stall_frac, "resident_ms": resident_ms,
        "link_ms": link_ms, "of_bound": bound_ms / step_ms, "experts_gpu_ms": decode.experts_gpu_ms,
        "decode": warm[-1].config["reasons"]["decode"], "kernels": engine.config.kernels,
    }  # fmt: skip


def row(record: dict[str, Any]) -> str:
    """One line of the table."""
    runs = record["tokens_per_s_runs"]

    def show(name: str, scale: float = 1.0, digits: int = 1) -> str:
        return "" if record[name] != record[name] else f"{record[name] * scale:.{digits}f}"

    values = [
        record["experts"], show("row_bytes", 1e-6, 2), str(record["batch"]), record["slots"],
        show("slots_share", 100, 0),
        show("tokens_per_s"), f"{min(runs):.1f}-{max(runs):.1f}", show("ttft_ms", 1, 0), show("hit_rate", 100),
        show("step_bytes", 1e-9, 3), show("link_gb_per_s"), show("link_use_frac", 100), show("step_ms", 1, 2),
        show("resident_ms", 1, 2), show("link_ms", 1, 2), show("of_bound", 100), show("times_bf16", 1, 2),
        record["decode"].partition(":")[0],
    ]  # fmt: skip
    return f"| {' | '.join(values)} |"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="qwen3-30b-a3b", help="name of a shape")
    add("--experts", nargs="+", default=["bf16", "fp8", "int4", "mxfp4"], help="bf16, int8, fp8, int4, mxfp4")
    add("--slots", nargs="+", default=["4GiB", "8GiB"])
    add("--batch", nargs="+", type=int, default=[1, 8, 64])
    add(
        "--no-resident",
        dest="resident",
        action="store_false",
        help="leave out the runs with all experts there",
    )
    add("--prompt", type=int, default=512, help="tokens in, at batch 1")
    add("--prompt-large", type=int, default=64, help="tokens in, at other batches")
    add("--new", type=int, default=40, help="tokens out below batch 8")
    add("--new-large", type=int, default=10, help="tokens out from batch 8 on")
    add("--repeats", type=int, default=2)
    add(
        "--habits",
        nargs=4,
        type=float,
        default=[1.05, 0.07, 0.29, 1.0],
        help="of the routing, as in schedules.py",
    )
    add("--compiled", action="store_true", help="layers compiled around the experts")
    add("--seconds", type=float, default=1e9, help="start no new cell after this")
    add("--dtype", default="bfloat16")
    add("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: to try the script")
    add("--out", help="JSON file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
