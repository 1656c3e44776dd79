"""Models of the benchmarks: a folder with trained weights, or a published shape with random ones (labelled so)."""

from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
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


#: Published shapes (sources: data/configs). "cut" keeps every expert full-sized but fewer layers.
SHAPES = {
    "olmoe-1b-7b": (
        OlmoeForCausalLM,
        OlmoeConfig(
            vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16,
            num_attention_heads=16, num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
        ),
    ),
    "qwen3-30b-a3b-cut16": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
            num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
            num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        ),
    ),
    # A few seconds on any machine: to try the scripts themselves.
    "toy": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=96,
            num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            num_experts=16, num_experts_per_tok=4, norm_topk_prob=True,
        ),
    ),
}  # fmt: skip


def open_model(name: str, device: torch.device, dtype: torch.dtype) -> BenchModel:
    """A shape by name, or a folder with trained weights."""
    if name in SHAPES:
        return BenchModel(name, "random", "", _random_model(name, device, dtype))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    return BenchModel(name.rstrip("/").rsplit("/", 1)[-1], "trained", name, model)


@torch.no_grad()
def _random_model(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights with enough entropy: greedy decoding would otherwise fall into a loop of one token, in which
    any cache looks perfect. Unit embeddings, and attention outputs halved so that they do not drown the token.
    """
    cls, config = SHAPES[name]
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
                parameter.mul_(0.5)
    with device:  # its buffers are computed, not loaded: `to_empty` left them empty
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model
