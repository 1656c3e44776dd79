"""Write `README.md` and `loss.svg` of a trained folder from what training and evaluation recorded there.

    python -m recipes.write_model_card data/tiny-moe --corpus corpus

Every number comes from `training_log.json`, `evaluation.json` and `config.json`; the table of sources from
the corpus folder's `ATTRIBUTION.md`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

from recipes._loss_svg import loss_svg

MAIN_SOURCES = 3  # named per domain by size; sources that ask for credit (CC BY) are named always
TOP_EXPERTS = 4
LOAD_GOAL = (0.25, 4.0)


def table(header: list[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table; the first column left, the others right."""
    lines = [
        "| " + " | ".join(header) + " |",
        "|" + "|".join(["---", *["--:"] * (len(header) - 1)]) + "|",
    ]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def read_attribution(path: Path) -> list[dict[str, str]]:
    """Rows of the table in ATTRIBUTION.md, keyed by its header."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def licence_names(licence: str) -> list[str]:
    """Names in a licence expression, spelled one way; whether AND or OR joined them is left out."""
    bare = re.sub(r" \(.*| [Ll]icen[sc]e", "", licence).replace("Apache 2", "Apache-2")
    return re.split(" AND | OR ", bare)


def sources_table(rows: list[dict[str, str]], domains: list[str]) -> str:
    """Per domain: its largest sources by name with licence, the small ones counted, their licences listed."""
    out = []
    for domain in domains:
        mine = [row for row in rows if domain in row["domain"].split(", ")]
        mine.sort(key=lambda row: -int(row["bytes"]))
        named = [row for i, row in enumerate(mine) if i < MAIN_SOURCES or row["licence"].startswith("CC-BY")]
        names = [f"{row['source']} ({row['licence']}; {row['credit'].split(';')[0]})" for row in named]
        rest = [row for row in mine if row not in named]
        if rest:
            licences = sorted({name for row in rest for name in licence_names(row["licence"])})
            names.append(f"{len(rest)} smaller ones ({', '.join(licences)})")
        out.append([domain, "<br>".join(names) or "not listed"])
    return "\n".join(
        ["| domain | sources (licence; credit) |", "|---|---|", *(f"| {d} | {s} |" for d, s in out)]
    )


def shape_section(config: dict, log: dict) -> str:
    """Sizes of the model."""
    expert_bytes = 3 * config["hidden_size"] * config["moe_intermediate_size"] * 2
    rows = [
        ("parameters", f"{log['num_parameters'] / 1e6:.2f} M, tied embedding included"),
        ("hidden size, layers", f"{config['hidden_size']}, {config['num_hidden_layers']} (all MoE)"),
        ("experts", f"{config['num_local_experts']} per layer, top-{config['num_experts_per_tok']}"),
        (
            "one expert",
            f"{config['moe_intermediate_size']} wide, {expert_bytes / 2**20:.3g} MiB in bf16",
        ),
        (
            "attention",
            f"{config['num_attention_heads']} heads of {config['head_dim']}, "
            f"{config['num_key_value_heads']} key-value heads",
        ),
        ("context", f"{config['max_position_embeddings']} tokens"),
        ("vocabulary", f"{config['vocab_size']} (byte-level BPE made from the same text)"),
        ("stored as", config["dtype"]),
    ]
    return table(["", config["architectures"][0]], rows)


def recipe_section(log: dict) -> str:
    """How it was made, in the numbers of the run."""
    last = log["records"][-1]
    corpus_tokens = sum(log["train_tokens_per_domain"].values())
    compile_report = log["compile"]
    lines = [
        "```\n" + log["command"] + "\n```",
        f"Trained for {last['seconds']:.0f} s on {log['hardware']} (torch {log['versions']['torch']}, "
        f"transformers {log['versions']['transformers']}; torch.compile: {compile_report['mode']}, "
        f"{compile_report['seconds']:.0f} s of compiling apart): {last['step']} steps, "
        f"{last['tokens'] / 1e6:.0f} M tokens, {last['tokens_per_s'] / 1e3:.0f} k tokens/s with the looks at "
        f"the validation set included. That is {last['tokens'] / corpus_tokens:.1f} times the corpus of "
        f"{corpus_tokens / 1e6:.1f} M tokens, windows drawn at random, every batch from all domains "
        f"with shares proportional to size^0.7.",
        "AdamW on float32 masters, warm-up, constant, then linear decay to zero over the budget; a "
        "load-balancing loss per layer (not pooled over layers) and a router z-loss. Parameters, shares, "
        "and every look at the validation set are in `training_log.json`.",
    ]
    if compile_report["errors"]:
        lines.append(f"torch.compile reported: `{compile_report['errors'][0].splitlines()[0]}`")
    if log["interrupted"]:
        lines.append("**The run was interrupted: the learning rate was not annealed.**")
    return "\n\n".join(lines)


def perplexity_section(evaluation: dict) -> str:
    """Model against the counting baselines."""
    rows = [
        (
            domain if row["split"] == "valid" else f"{domain} (not in training)",
            f"{row['perplexity']:.2f}",
            f"{row['trigram_perplexity']:.1f}",
            f"{row['unigram_perplexity']:.0f}",
            f"{row['bits_per_byte']:.2f}",
            row["tokens"],
        )
        for domain, row in evaluation["domains"].items()
    ]
    header = ["domain", "this model", "trigram", "unigram", "bits per byte", "tokens"]
    limit = evaluation["limit_windows"]
    scope = "all held-out windows" if limit is None else f"up to {limit} windows per domain"
    words = (
        f"Perplexity per token of this tokenizer, lower is better; {scope} of {evaluation['context']} "
        f"tokens, context reset at each. Trigram: interpolated Kneser-Ney over "
        f"{evaluation['ngram']['tokens'] / 1e6:.1f} M training tokens of all domains together; it sees the "
        f"two tokens before, across window borders. Unigram: add-one."
    )
    return words + "\n\n" + table(header, rows)


def routing_section(evaluation: dict) -> str:
    """Load per layer, and who uses which expert where the domains differ most."""
    routing = evaluation["routing"]
    layers = routing["layers"]
    low, high = LOAD_GOAL
    missed = [r["moe_layer"] for r in layers if r["min_load_ratio"] < low or r["max_load_ratio"] > high]
    verdict = f"Missed in layers {missed}." if missed else "Met in every layer."
    rows = [
        (
            row["moe_layer"],
            f"{row['min_load_ratio']:.2f}",
            f"{row['max_load_ratio']:.2f}",
            f"{row['domain_expert_bits']:.3f}",
        )
        for row in layers
    ]
    most = max(layers, key=lambda row: row["domain_expert_bits"])["moe_layer"]
    preferred = []
    for domain, ratios in routing["load_ratio_by_domain"].items():
        best = sorted(range(len(ratios[most])), key=lambda expert: -ratios[most][expert])[:TOP_EXPERTS]
        preferred.append((domain, ", ".join(f"{e} ({ratios[most][e]:.1f}x)" for e in best)))
    return "\n\n".join(
        [
            f"Load of the least and the most used expert over the fair share (1 is fair), on the validation "
            f"set; the goal was {low} to {high}. {verdict} The last column is the mutual information "
            f"between the domain of a token and one of its experts: 0 would mean that domains route alike.",
            table(["MoE layer", "min load", "max load", "domain-expert bits"], rows),
            f"Experts each domain uses most in MoE layer {most}, where domains differ most, with their load "
            f"over the fair share:",
            table(["domain", "experts"], preferred),
        ]
    )


def samples_section(evaluation: dict) -> str:
    """Prompts from held-out documents and what greedy decoding makes of them."""
    parts = [
        "Greedy, in the first held-out document of each domain that is long enough, not selected. "
        "The model's part follows `>>>`."
    ]
    for sample in evaluation["continuations"]:
        # A fence longer than any run of backquotes inside keeps code samples from closing it.
        inside = sample["prompt"] + sample["continuation"]
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", inside)), default=0))
        parts.append(
            f"**{sample['domain']}**\n\n{fence}text\n{sample['prompt'].rstrip()}\n"
            f">>> {sample['continuation'].strip()}\n{fence}"
        )
    return "\n\n".join(parts)


def limits_section(config: dict) -> str:
    """What the folder is not."""
    return (
        f"A model of this size, trained for minutes, writes text that looks like its sources and means "
        f"little. It is no assistant and knows no facts to rely on; it may repeat what its sources say, "
        f"offensive passages of old novels included, word for word at times. Nothing was filtered or "
        f"aligned. It was never trained beyond {config['max_position_embeddings']} tokens of context. It "
        f"exists to give experts, routers and caches real routing to work on; what is found on it about "
        f"predictors need not hold for models of useful size."
    )


def main(argv: list[str] | None = None) -> None:
    """Read the three JSON files, write the card and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder with training_log.json and evaluation.json")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with ATTRIBUTION.md")
    parser.add_argument("--name", help="title; default: the folder's name")
    args = parser.parse_args(argv)
    log, evaluation, config = (
        json.loads((args.model / name).read_text(encoding="utf-8"))
        for name in ("training_log.json", "evaluation.json", "config.json")
    )
    name = args.name or args.model.resolve().name
    records = log["records"]
    svg = loss_svg(
        {d: [(r["tokens"] / 1e6, r["valid_loss"][d]) for r in records] for d in records[-1]["valid_loss"]},
        [(r["tokens"] / 1e6, r["train_loss"]) for r in records if r["train_loss"] is not None],
        title=f"{name}: validation loss per domain (grey: training)",
        x_label="training tokens (millions)",
        y_label="cross entropy (nats per token)",
    )
    (args.model / "loss.svg").write_text(svg, encoding="utf-8")
    attribution = args.corpus / "ATTRIBUTION.md"
    domains = list(evaluation["domains"])
    sources = sources_table(read_attribution(attribution), domains) if attribution.exists() else "Not listed."
    sections = [
        f"# {name}",
        "A Mixture-of-Experts language model trained from scratch in minutes, for trying out how experts are "
        "routed, cached and prefetched. This card was written by `recipes/write_model_card.py` from the JSON "
        "files beside it.",
        shape_section(config, log),
        "## Recipe",
        recipe_section(log),
        "![validation loss per domain](loss.svg)",
        "## Perplexity",
        perplexity_section(evaluation),
        "## Routing",
        routing_section(evaluation),
        "## Samples",
        samples_section(evaluation),
        "## Limits",
        limits_section(config),
        "## Text it was trained and tested on",
        "Only the tokenizer and the weights are here, not the text. Markup, links and metadata were removed, "
        "duplicates dropped, long novels cut.\n\n" + sources,
        "## Licence",
        "Weights and tokenizer: Apache-2.0, as the rest of this repository. The licences of the texts are above.",
    ]
    (args.model / "README.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    print(f"wrote {args.model / 'README.md'} and loss.svg")


if __name__ == "__main__":
    main()
