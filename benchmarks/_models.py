"""Models of the benchmarks: a folder with trained weights, or a published shape with random ones (labelled so)."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


class BenchModel(NamedTuple):
    """A model on the GPU and what its figures may be called."""

    name: str
    weights: str  # "trained" or "random"
    folder: str  # "" for a shape
    model: PreTrainedModel


CONFIGS = Path(__file__).resolve().parent.parent / "data" / "configs"
#: Families of the shapes in data/configs that the benchmarks use.
FAMILIES: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig]]] = {
    "olmoe-1b-7b": (OlmoeForCausalLM, OlmoeConfig),
    "qwen3-30b-a3b": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
    "mixtral-8x7b-v0.1": (MixtralForCausalLM, MixtralConfig),
    "toy": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
}
#: A few seconds on any machine: to try the scripts themselves.
TOY = {
    "vocab_size": 512, "hidden_size": 128, "dense_intermediate_size": 256, "moe_intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True,
}  # fmt: skip
SAME_NAME = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_experts_per_tok", "norm_topk_prob", "rms_norm_eps", "tie_word_embeddings",
]  # fmt: skip


def shape_of(name: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Class and configuration of "qwen3-30b-a3b", or of "qwen3-30b-a3b-cut16" with its first 16 layers only."""
    base, _, layers = name.partition("~")[0].partition("-cut")
    facts = TOY if base == "toy" else json.loads((CONFIGS / f"{base}.json").read_text())
    values = {key: facts[key] for key in SAME_NAME if key in facts}
    if layers:
        values["num_hidden_layers"] = int(layers)
    width = facts["moe_intermediate_size"]
    model, config = FAMILIES[base]
    if config is Qwen3MoeConfig:
        values |= {"moe_intermediate_size": width, "intermediate_size": facts["dense_intermediate_size"]}
    else:
        values["intermediate_size"] = width
    values["num_local_experts" if config is MixtralConfig else "num_experts"] = facts["num_experts"]
    return model, config(**values)


def open_model(name: str, device: torch.device, dtype: torch.dtype) -> BenchModel:
    """A shape by name, or a folder with trained weights."""
    if name.partition("~")[0].partition("-cut")[0] in FAMILIES:
        return BenchModel(name, "random", "", _random_model(name, device, dtype))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None  # all runs have the same length
    return BenchModel(name.rstrip("/").rsplit("/", 1)[-1], "trained", name, model)


@torch.no_grad()
def _random_model(
    name: str, device: torch.device, dtype: torch.dtype, num_experts: int | None = None
) -> PreTrainedModel:
    """Random weights with enough entropy: greedy decoding would otherwise fall into a loop of one token, in which
    any cache looks perfect. Unit embeddings, and attention outputs halved so that they do not drown the token; a name
    that ends in "~0.65" scales them by that instead: the more of them, the more alike is the routing of neighbours.

    num_experts: instead of the shape's own.
    """
    scale = float(name.partition("~")[2] or 0.5)
    cls, config = shape_of(name)
    if num_experts is not None:
        config.num_experts = num_experts
    config.eos_token_id = config.pad_token_id = config.bos_token_id = None
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for key, parameter in model.named_parameters():
        if key.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif "embed_tokens" in key:
            parameter.normal_(0.0, 1.0, generator=generator)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            if key.endswith("o_proj.weight"):
                parameter.mul_(scale)
    with device:  # its buffers are computed, not loaded: `to_empty` left them empty
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
