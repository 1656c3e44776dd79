"""Small random models for tests: seconds become milliseconds, nothing is loaded from disk."""

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

VOCABULARY = 128
LAYERS, EXPERTS, TOP_K = 3, 8, 2


def tiny_moe(dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE whose router is decided enough that greedy tokens vary."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24,
        "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "num_experts": EXPERTS, "num_experts_per_tok": TOP_K, "initializer_range": 0.3, "eos_token_id": None,
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes})).to(dtype).eval()


def prompt(batch: int = 1, length: int = 9, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain_tokens(model: torch.nn.Module, ids: torch.Tensor, new: int = 12) -> list[list[int]]:
    """Greedy continuation by the model itself."""
    ids = ids.to(model.device)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    return output[:, ids.shape[1] :].tolist()
