"""What packing experts at load costs in quality: held-out text through a model and through its packed forms.

    python benchmarks/packed_quality.py --corpus corpus --out quality.json     # data/tiny-moe, a minute or two on a CPU
    python benchmarks/packed_quality.py                                        # on the prompts that come with prescope
    python benchmarks/packed_quality.py --model medium --device cuda --corpus corpus   # a folder of recipes.train_moe

The corpus is a folder with valid/<domain>.txt and ood/<domain>.txt, neither of which was trained on. Everything is
computed in float32, so what differs is what packing has changed. Per token of all windows:

KL          mean of KL(plain || packed) of the next token's distribution, nats; p99 is of single tokens
perplexity  of the text itself, plain and packed
same top    share of tokens whose most likely successor is the same

Quality does not depend on the machine; bytes are those of one expert's row.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import prescope
from prescope.core.machine import machine_facts
from prescope.core.paths import embedded_model
from prescope.training import own_prompts
from prescope.weights.formats import PACKED

BATCH = 16


def windows_of(engine: prescope.Engine, args: argparse.Namespace) -> dict[str, list[torch.Tensor]]:
    """Token ids (B, T) by domain, windows of one length side by side."""
    assert engine.tokenizer is not None
    found: dict[str, list[torch.Tensor]] = {}
    if args.corpus is None:
        for domain, texts in own_prompts().items():
            found[domain] = [torch.tensor([engine.tokenizer(text)["input_ids"]]) for text in texts]
        return found
    for path in sorted([*args.corpus.glob("valid/*.txt"), *args.corpus.glob("ood/*.txt")]):
        ids = engine.tokenizer(path.read_text(encoding="utf-8")[: args.characters])["input_ids"]
        count = min(args.windows, len(ids) // args.length)
        if count:
            kept = torch.tensor(ids[: count * args.length]).view(count, args.length)
            name = path.stem + (" (not in training)" if path.parent.name == "ood" else "")
            found[name] = list(kept.split(BATCH))
    return found


@torch.no_grad()
def log_probabilities(
    engine: prescope.Engine, batches: list[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of each next token (n, V), and which one came (n,)."""
    for ids in batches:
        logits = engine.model(ids.to(engine.model.device)).logits[:, :-1].flatten(0, 1).double()
        yield functional.log_softmax(logits, dim=-1), ids[:, 1:].flatten().to(logits.device)


def compare(
    plain: prescope.Engine, packed: prescope.Engine, windows: dict[str, list[torch.Tensor]]
) -> dict[str, Any]:
    """The figures of one packed form, over all windows and by domain."""
    by_domain: dict[str, Any] = {}
    everything: list[np.ndarray] = []
    for domain, batches in windows.items():
        rows = []
        pairs = zip(log_probabilities(plain, batches), log_probabilities(packed, batches), strict=True)
        for (p, came), (q, _) in pairs:
            at = torch.arange(len(came), device=came.device)
            kl = (p.exp() * (p - q)).sum(-1)
            same = (p.argmax(-1) == q.argmax(-1)).double()
            rows.append(torch.stack([kl, -p[at, came], -q[at, came], same], dim=1).cpu().numpy())
        table = np.concatenate(rows)
        everything.append(table)
        by_domain[domain] = summary(table)
    return {"all": summary(np.concatenate(everything)), "domains": by_domain}


def summary(table: np.ndarray) -> dict[str, float]:
    """Of rows (KL, loss plain, loss packed, same top)."""
    kl, plain, packed, same = table.mean(axis=0)
    return {
        "tokens": len(table),
        "kl_nats": float(kl),
        "kl_p99_nats": float(np.quantile(table[:, 0], 0.99)),
        "perplexity_plain": float(np.exp(plain)),
        "perplexity_packed": float(np.exp(packed)),
        "same_top_frac": float(same),
    }


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=embedded_model())
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=16, help="of each domain at most")
    parser.add_argument("--characters", type=int, default=200_000, help="of each domain that are read")
    parser.add_argument("--forms", nargs="+", default=list(PACKED), choices=PACKED)
    parser.add_argument("--device", default="cpu", help="cuda for a large model")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    settings = {"slots": 1.0, "device": args.device, "dtype": "float32", "events": False}
    if args.device == "cpu":  # its link is emulated: no waits
        settings["link_gb_per_s"] = 1000.0
    result: dict[str, Any] = {
        "command": f"packed_quality.py --model {args.model.name}",
        "machine": machine_facts(),
        "forms": {},
    }
    print("| form | bytes of an expert | of bf16 | KL | KL p99 | perplexity | plain | same top |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    with prescope.load(args.model, **settings) as plain:
        windows = windows_of(plain, args)
        plain_bytes = plain.shape.row_bytes // 2
        for form in args.forms:
            with prescope.load(args.model, experts=form, **settings) as packed:
                found = compare(plain, packed, windows)
                found["expert_bytes"], found["bf16_bytes"] = packed.shape.row_bytes, plain_bytes
            result["forms"][form] = found
            if args.out:  # each as it comes: a call that is ended keeps those that are done
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            every = found["all"]
            print(
                f"| {form} | {found['expert_bytes']:,} | {found['expert_bytes'] / plain_bytes:.3f} "
                f"| {every['kl_nats']:.5f} | {every['kl_p99_nats']:.4f} | {every['perplexity_packed']:.3f} "
                f"| {every['perplexity_plain']:.3f} | {every['same_top_frac']:.4f} |",
                flush=True,
            )
    print(f"\n{result['forms'][args.forms[0]]['all']['tokens']:,} tokens")


if __name__ == "__main__":
    main()
