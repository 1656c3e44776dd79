"""Evaluate a trained folder on the held-out text and write `evaluation.json` into it.

    python -m recipes.evaluate_moe data/tiny-moe --corpus corpus

Perplexity per domain beside a unigram and a trigram on the same tokens, expert load per layer and domain,
mutual information between domain and expert, and one greedy continuation per domain.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from recipes._balance import load_ratios
from recipes._data import (
    END_OF_TEXT,
    Streams,
    encode_documents,
    evaluation_windows,
    load_streams,
    read_documents,
    window_starts,
)
from recipes._measure import Measurement, measure
from recipes._ngram import KneserNeyTrigram, perplexity, unigram_probabilities

PROMPT_TOKENS, NEW_TOKENS = 48, 64
LONG_CHARS = 10_000


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder written by train_moe")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit-windows", type=int, help="windows per domain; default: all")
    parser.add_argument("--batch-windows", type=int, default=32)
    parser.add_argument(
        "--ngram-tokens", type=int, help="training tokens counted for the baselines; default: all"
    )
    return parser.parse_args(argv)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) UTF-8 bytes each id stands for: byte-level BPE spells a byte as a character; special ids are 0."""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for text, index in tokenizer.get_vocab().items():
        lengths[index] = len(text)
    lengths[list(tokenizer.get_added_tokens_decoder())] = 0
    return lengths


def ngram_text(streams: Streams, limit: int | None) -> np.ndarray:
    """Training tokens for the baselines: all, or the same leading share of every domain."""
    total = sum(len(stream) for stream in streams.values())
    share = 1.0 if limit is None else min(1.0, limit / total)
    return np.concatenate([stream[: int(len(stream) * share)] for stream in streams.values()])


def domain_rows(
    result: Measurement,
    streams: Streams,
    *,
    context: int,
    limit: int | None,
    end_id: int,
    unigrams: np.ndarray,
    trigrams: KneserNeyTrigram,
    bytes_per_id: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Per domain: the model's loss and the baselines' perplexity, all on the same target tokens."""
    rows = {}
    for domain, stream in streams.items():
        # One token before each window, so that the trigram too has two tokens for the window's first target.
        index = window_starts(stream, context, limit)[:, None] + np.arange(context + 2)
        windows = np.concatenate([np.array([end_id], dtype=stream.dtype), stream])[index]
        targets = windows[:, 2:]
        loss = result.loss_nats[domain]
        rows[domain] = {
            "tokens": int(targets.size),
            "bytes": int(bytes_per_id[targets].sum()),
            "loss_nats": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": loss * targets.size / math.log(2) / int(bytes_per_id[targets].sum()),
            "unigram_perplexity": perplexity(unigrams[targets]),
            "trigram_perplexity": perplexity(trigrams.probabilities(windows)),
        }
    return rows


@torch.no_grad()
def continuations(
    model: PreTrainedModel, tokenizer: Tokenizer, corpus: Path, split: str
) -> list[dict[str, str]]:
    """Greedy continuation in each domain's first held-out document that is long enough."""
    context = model.config.max_position_embeddings
    num_prompt, num_new = min(PROMPT_TOKENS, context // 4), min(NEW_TOKENS, context // 2)
    found = []
    for path in sorted((corpus / split).glob("*.txt")):
        for document in read_documents(path):
            # Past the title page of a novel; short documents are taken from their beginning.
            start = document.find("\n\n", LONG_CHARS) + 1 if len(document) > 2 * LONG_CHARS else 0
            ids = encode_documents(tokenizer, [document[start:].lstrip()[:LONG_CHARS]]).tolist()
            if len(ids) > num_prompt + num_new:
                break
        else:
            continue
        prompt = torch.tensor([ids[:num_prompt]], device=model.device)
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, max_new_tokens=num_new, do_sample=False)
        found.append(
            {
                "domain": path.stem,
                "prompt": tokenizer.decode(ids[:num_prompt]),
                "continuation": tokenizer.decode(out[0, num_prompt:].tolist()),
                "original": tokenizer.decode(ids[num_prompt : num_prompt + num_new]),
            }
        )
    return found


def routing_report(result: Measurement, model: PreTrainedModel) -> dict[str, object]:
    """Load over the fair share per layer and expert, pooled and per domain, and the table per layer."""
    return {
        "num_experts": model.config.num_experts,
        "top_k": model.config.num_experts_per_tok,
        "assignments": int(result.counts_DLE.sum()),
        "layers": result.layer_table(),
        "load_ratio": load_ratios(result.pooled()).round(4).tolist(),
        "load_ratio_by_domain": {
            domain: load_ratios(result.counts_DLE[index]).round(4).tolist()
            for index, domain in enumerate(result.domains)
        },
    }


def print_report(report: dict) -> None:
    """The tables of evaluation.json, for people."""
    print(
        f"\n{'domain':12s} {'split':6s} {'perplexity':>10s} {'trigram':>9s} {'unigram':>9s} {'bits/byte':>9s}"
    )
    for domain, row in report["domains"].items():
        print(
            f"{domain:12s} {row['split']:6s} {row['perplexity']:10.2f} {row['trigram_perplexity']:9.1f} "
            f"{row['unigram_perplexity']:9.1f} {row['bits_per_byte']:9.3f}"
        )
    print(f"\n{'moe layer':>9s} {'min load':>9s} {'max load':>9s} {'domain-expert bits':>19s}")
    for row in report["routing"]["layers"]:
        print(
            f"{row['moe_layer']:9d} {row['min_load_ratio']:9.2f} {row['max_load_ratio']:9.2f} "
            f"{row['domain_expert_bits']:19.3f}"
        )
    for sample in report["continuations"]:
        print(f"\n[{sample['domain']}] {sample['prompt']!r}\n  -> {sample['continuation']!r}")


def main(argv: list[str] | None = None) -> None:
    """Load, count, measure, write."""
    args = parse_arguments(argv)
    begin = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    text = ngram_text(load_streams(args.corpus, "train", tokenizer), args.ngram_tokens)
    print(f"tokenised the training text in {time.perf_counter() - begin:.1f} s", flush=True)
    counting = time.perf_counter()
    trigrams = KneserNeyTrigram.fit(text, tokenizer.get_vocab_size())
    unigrams = unigram_probabilities(text, tokenizer.get_vocab_size())
    ngram = {"tokens": len(text), "seconds": time.perf_counter() - counting}
    print(f"counted {len(text) / 1e6:.1f} M tokens in {ngram['seconds']:.1f} s", flush=True)

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", local_files_only=True)
    model = model.to(args.device).eval()
    model.set_experts_implementation("grouped_mm")
    context = model.config.max_position_embeddings
    domains: dict[str, dict[str, object]] = {}
    routing, samples = {}, []
    for split in ("valid", "ood"):
        if split == "ood" and not (args.corpus / split).is_dir():
            continue
        streams = load_streams(args.corpus, split, tokenizer)
        windows = {d: evaluation_windows(s, context, args.limit_windows) for d, s in streams.items()}
        result = measure(model, windows, batch_windows=args.batch_windows)
        rows = domain_rows(
            result, streams, context=context, limit=args.limit_windows, end_id=end_id,
            unigrams=unigrams, trigrams=trigrams, bytes_per_id=token_bytes(tokenizer),
        )  # fmt: skip
        domains |= {domain: {"split": split, **row} for domain, row in rows.items()}
        routing[split] = routing_report(result, model)
        samples += continuations(model, tokenizer, args.corpus, split)
    on_cuda = args.device.startswith("cuda")
    report = {
        "context": context,
        "limit_windows": args.limit_windows,
        "hardware": torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "ngram": ngram,
        "domains": domains,
        "routing": routing["valid"],
        "routing_ood": routing.get("ood"),
        "continuations": samples,
        "wall_seconds": time.perf_counter() - begin,
    }
    path = args.model / "evaluation.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print_report(report)
    print(f"\nwrote {path} in {report['wall_seconds']:.0f} s")


if __name__ == "__main__":
    main()
