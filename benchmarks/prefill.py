"""Prefill with experts in host memory, against the bound max(GPU alone, every needed expert once over the link).

    python benchmarks/prefill.py --model qwen3-30b-a3b-cut16 --prompt 512 --batch 16 --slots 0.25 --out prefill.json

Time to the first token, from the prompt's forward pass to the logits: the plain model all on the GPU (grouped_mm), then
the engine with cold slots and with the slots that the prompt before left; medians, a prompt of its own for each run.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from _models import open_model
from _written import write_cells
from decode import Prompts, link_rate

from prescope import attach
from prescope.core.machine import machine_facts


def main() -> None:
    """Run, print the table, write the JSON."""
    args = _arguments()
    link = link_rate()
    facts = {**machine_facts(), "device": torch.cuda.get_device_name(), "link_gb_per_s": link}
    records: list[dict[str, Any]] = []
    for name in args.model:
        bench = open_model(name, torch.device("cuda"), getattr(torch, args.dtype))
        source = Prompts(bench, [])
        prompts = [source.draw(args.batch, args.prompt, seed=i) for i in range(args.repeats + 2)]
        bench.model.set_experts_implementation("grouped_mm")
        plain = [forward_ms(bench.model, prompt) for prompt in prompts][2:]
        with attach(bench.model, slots=1.0) as engine:
            for share in args.slots:
                engine.configure(slots=share)
                for cold in (True, False):
                    records.append(cell(engine, prompts, cold, statistics.median(plain), link))
                    records[-1] |= {"model": name, "batch": args.batch, "prompt": args.prompt, "slots": share}
                    write_cells(args, facts, records)
        del bench
        torch.cuda.empty_cache()
    print(
        f"\n{facts['device']}, link {link:.1f} GB/s, {args.dtype}, {args.batch} x {args.prompt} tokens in\n"
    )
    print("| model | slots | start | ms | spread | plain ms | GB moved | link bound ms | bound / measured |")
    print("|---|---|---|--:|---|--:|--:|--:|--:|")
    for row in records:
        spread = f"{min(row['runs_ms']):.0f}-{max(row['runs_ms']):.0f}"
        print(
            f"| {row['model']} | {row['slots']:.0%} | {row['start']} | {row['ms']:.0f} | {spread} "
            f"| {row['plain_ms']:.0f} | {row['gb_moved']:.2f} | {row['link_ms']:.0f} | {row['efficiency']:.1%} |"
        )


def cell(
    engine: Any, prompts: list[torch.Tensor], cold: bool, plain_ms: float, link: float
) -> dict[str, Any]:
    """Median of the runs, and the bound of the bytes that had to move."""
    runs, moved = [], []
    for i, prompt in enumerate(prompts):
        if cold:
            engine.clear_cache()
        with engine.record() as results:
            elapsed = forward_ms(engine.model, prompt)
        if i >= 2:
            runs.append(elapsed)
            moved.append(results[0].metrics.h2d_bytes)
    link_ms = statistics.median(moved) / link / 1e6
    bound = max(plain_ms, link_ms)
    median = statistics.median(runs)
    return {
        "start": "cold" if cold else "warm",
        "ms": median,
        "runs_ms": runs,
        "plain_ms": plain_ms,
        "gb_moved": statistics.median(moved) / 1e9,
        "link_ms": link_ms,
        "efficiency": bound / median,
    }


@torch.no_grad()
def forward_ms(model: Any, prompt: torch.Tensor) -> float:
    """One forward pass over a prompt, with a cache, to the last logits."""
    prompt = prompt.to(model.device)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["qwen3-30b-a3b-cut16"])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--slots", nargs="+", type=float, default=[0.25])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
