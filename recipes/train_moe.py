"""Train a small Mixture-of-Experts language model from scratch and write a Hugging Face folder.

    python -m recipes.train_moe --preset tiny --corpus corpus --out data/tiny-moe --seconds 240

`--seconds` is the wall time of the training loop alone: reading the corpus, compiling and saving come on
top. The learning rate follows elapsed / budget, so it always anneals to zero, whatever the speed. Beside
the weights it writes `training_log.json`. Ctrl-C ends the loop early and saves what there is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recipes._balance import BalanceController
from recipes._data import (
    END_OF_TEXT,
    Streams,
    WindowSampler,
    evaluation_windows,
    load_streams,
    mixture_weights,
)
from recipes._folder import MIB, check_folder, write_folder
from recipes._measure import Measurement, measure
from recipes._training import MasterAdamW, Trainer, compile_losses, make_losses

PAD = "<|pad|>"

# Sizes and the training settings that belong to them; every one is also a flag.
PRESETS: dict[str, dict[str, float]] = {
    # 11.57 M parameters: 84 would be the widest expert under 12.0 M, but grouped_mm wants rows of 16 bytes.
    "tiny": {
        "hidden": 256, "layers": 8, "heads": 8, "kv_heads": 4, "head_dim": 32, "experts": 16, "top_k": 2,
        "expert_width": 80, "context": 512, "batch_tokens": 65_536, "lr": 3e-3, "shards_mib": 15,
    },
    # 1.71 G parameters; one expert is 3 * 2048 * 1024 bf16 numbers = 12.6 MB, as in OLMoE.
    "medium": {
        "hidden": 2048, "layers": 8, "heads": 16, "kv_heads": 4, "head_dim": 128, "experts": 32, "top_k": 4,
        "expert_width": 1024, "context": 512, "batch_tokens": 32_768, "lr": 6e-4, "shards_mib": 4096,
    },
}  # fmt: skip


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, with the preset's value wherever a size is not given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder with train/, valid/ and tokenizers/"
    )
    parser.add_argument("--tokenizer", default="bpe8192", help="name under the corpus folder's tokenizers/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=240.0, help="wall time of the training loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=None, help="default: on CUDA"
    )
    parser.add_argument("--valid-tokens", type=int, default=131_072, help="tokens of one look at validation")
    parser.add_argument("--balance-start", type=float, default=0.05, help="coefficient per layer, at first")
    parser.add_argument("--balance-floor", type=float, default=0.01, help="coefficient it anneals to")
    parser.add_argument("--z-coefficient", type=float, default=1e-3)
    for name, value in PRESETS["tiny"].items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), help="default: the preset's")
    args = parser.parse_args(argv)
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.compile is None:
        args.compile = args.device.startswith("cuda")
    if args.batch_tokens % args.context:
        parser.error(f"--batch-tokens {args.batch_tokens} is not a multiple of --context {args.context}")
    return args


def build_model(args: argparse.Namespace, tokenizer: Tokenizer) -> Qwen3MoeForCausalLM:
    """A freshly initialised float32 model on the device."""
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    config = Qwen3MoeConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.head_dim,
        num_experts=args.experts, num_experts_per_tok=args.top_k, moe_intermediate_size=args.expert_width,
        intermediate_size=args.expert_width * args.top_k, max_position_embeddings=args.context,
        norm_topk_prob=True, tie_word_embeddings=True, initializer_range=0.4 / math.sqrt(args.hidden),
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        router_aux_loss_coef=0.0,  # the balance loss is ours, per layer: see _balance.py
        bos_token_id=end_id, eos_token_id=end_id, pad_token_id=tokenizer.token_to_id(PAD),
    )  # fmt: skip
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        model = Qwen3MoeForCausalLM(config)
    # An attention name without a mask function gets no mask, so SDPA runs `is_causal`: under torch.compile
    # transformers builds a (batch, 1, context, context) mask for "sdpa", which rules the flash kernel out.
    ALL_ATTENTION_FUNCTIONS.register("causal_sdpa", sdpa_attention_forward)
    model.set_attn_implementation("causal_sdpa")
    model.set_experts_implementation("grouped_mm")
    return model.train()


def choose_valid_windows(streams: Streams, context: int, num_tokens: int) -> dict[str, torch.Tensor]:
    """About ``num_tokens`` of validation text, each domain with its share, at least 2 windows each."""
    total = sum(len(stream) for stream in streams.values())
    return {
        domain: evaluation_windows(stream, context, max(2, round(num_tokens / context * len(stream) / total)))
        for domain, stream in streams.items()
    }


def print_tables(result: Measurement) -> None:
    """Loss per domain and load per layer of the finished weights."""
    print(f"\n{'domain':12s} {'loss (nats)':>12s} {'perplexity':>11s} {'tokens':>8s}")
    for domain in result.domains:
        loss = result.loss_nats[domain]
        print(f"{domain:12s} {loss:12.3f} {math.exp(loss):11.1f} {result.num_tokens[domain]:8d}")
    print(f"\n{'moe layer':>9s} {'min load':>9s} {'max load':>9s} {'domain-expert bits':>19s}")
    for row in result.layer_table():
        print(
            f"{row['moe_layer']:9d} {row['min_load_ratio']:9.2f} {row['max_load_ratio']:9.2f} "
            f"{row['domain_expert_bits']:19.3f}"
        )


def recorded_command(arguments: list[str]) -> str:
    """The command line, absolute paths cut to their last part: where a folder lay tells others nothing."""
    words = [Path(word).name if word.startswith("/") else word for word in arguments]
    return " ".join(["python -m recipes.train_moe", *words])


def main(argv: list[str] | None = None) -> None:
    """Read, build, compile, train, save, check."""
    args = parse_arguments(argv)
    begin = time.perf_counter()
    tokenizer = Tokenizer.from_file(str(args.corpus / "tokenizers" / f"{args.tokenizer}.json"))
    train_streams = load_streams(args.corpus, "train", tokenizer)
    valid_windows = choose_valid_windows(
        load_streams(args.corpus, "valid", tokenizer), args.context, args.valid_tokens
    )
    num_tokens = {domain: len(stream) for domain, stream in train_streams.items()}
    weights = mixture_weights(train_streams)
    print(
        f"tokenised {sum(num_tokens.values()) / 1e6:.1f} M tokens in {time.perf_counter() - begin:.1f} s",
        flush=True,
    )

    model = build_model(args, tokenizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters / 1e6:.2f} M parameters on {args.device}, {args.dtype}", flush=True)
    optimizer = MasterAdamW(model, getattr(torch, args.dtype))
    sampler = WindowSampler.build(train_streams, weights, args.context + 1, args.device, args.seed)
    controller = BalanceController(args.layers, start=args.balance_start, floor=args.balance_floor)
    trainer = Trainer(
        seconds=args.seconds,
        peak_lr=args.lr,
        batch_windows=args.batch_tokens // args.context,
        model=model,
        optimizer=optimizer,
        losses=make_losses(model, args.z_coefficient),
        sampler=sampler,
        valid_windows=valid_windows,
        controller=controller,
    )
    # This look also installs transformers' output hooks, behind a lock that torch.compile cannot trace.
    untrained = measure(model, valid_windows)
    compile_report: dict[str, object] = {"mode": "not asked for", "errors": [], "seconds": 0.0}
    if args.compile:
        coefficients_L = torch.tensor(controller.coefficients(0.0), dtype=torch.float32, device=args.device)
        windows = sampler.draw(trainer.batch_windows)
        trainer.losses, compile_report = compile_losses(trainer.losses, model, windows, coefficients_L)
    print(f"compile: {compile_report['mode']}, {compile_report['seconds']:.1f} s", flush=True)

    result = trainer.run()
    write_folder(model, tokenizer, args.out, end_token=END_OF_TEXT, pad_token=PAD, shards_mib=args.shards_mib)
    on_cuda = args.device.startswith("cuda")
    log = {
        "command": recorded_command(sys.argv[1:] if argv is None else argv),
        "arguments": {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()},
        "num_parameters": num_parameters,
        "hardware": torch.cuda.get_device_name() if on_cuda else f"CPU, {torch.get_num_threads()} threads",
        "peak_gpu_mib": torch.cuda.max_memory_allocated() / MIB if on_cuda else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "compile": compile_report,
        "train_tokens_per_domain": num_tokens,
        "mixture_weights": weights,
        "untrained_valid_loss": untrained.loss_nats,
        "records": trainer.records,
        "interrupted": trainer.interrupted,
        "final_layers": result.layer_table(),
        "wall_seconds": time.perf_counter() - begin,
    }
    log_path = args.out / "training_log.json"
    log_path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print_tables(result)

    ids = next(iter(valid_windows.values()))[:2, :-1].to(args.device)
    log["reload_max_logit_difference"] = check_folder(model, tokenizer, args.out, ids)
    log_path.write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    print(
        f"\nwrote {args.out}; reloaded, its logits differ by {log['reload_max_logit_difference']:g} at most; "
        f"{time.perf_counter() - begin:.0f} s in all"
    )


if __name__ == "__main__":
    main()
