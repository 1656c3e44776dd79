"""Tiny random models of every MoE family of transformers that uses `use_experts_implementation`.

Knows how to make each family small, seeded and not degenerate; knows nothing of prescope, so the same models
are the plain reference and what prescope attaches to. A family is one package of `transformers.models`.

`FAMILIES` holds what the installed transformers can build, `missing()` what it does not have (older versions
have fewer), `UNSUPPORTED` what was tried and cannot be served, with the reason found.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

VOCAB = 96
CANVAS = 8  # tokens a block-diffusion model refines at once

# Every size, in every family's own spelling; a configuration takes the fields it has.
TINY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "dense_intermediate_size": 24,
    "moe_hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    # experts
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    # multi-head latent attention and its sparse indexer
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # linear attention
    "linear_head_dim": 8,
    "linear_num_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # state-space layers
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    # no token ends a generation: every run has the length asked for
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}

# What a multimodal package's towers take; they are built and never run.
TINY_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "output_channels": 16,
    "mlp_dim": 16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One MoE package of transformers, and how to make a tiny model of it."""

    name: str  # the package under transformers.models
    model: str  # class tested
    text: dict[str, Any] = field(default_factory=dict)  # what its text configuration needs beyond TINY
    outer: dict[str, Any] = field(default_factory=dict)  # what a multimodal configuration around it needs
    tower: dict[str, Any] = field(default_factory=dict)  # what vision and audio towers need beyond TINY_TOWER
    generates: bool = True  # False: it has no `generate`, only a forward
    canvas: bool = False  # True: a forward also takes the tokens to refine
    note: str = ""  # for docs/families.md: what no attribute of the experts module says

    @property
    def module(self) -> str:
        return f"transformers.models.{self.name}.modeling_{self.name}"

    @property
    def top_k(self) -> int:
        return self.text.get("num_experts_per_tok", TINY["num_experts_per_tok"])

    @property
    def is_installed(self) -> bool:
        return self.name in decorated_packages()


@lru_cache
def decorated_packages() -> tuple[str, ...]:
    """Packages of the installed transformers whose experts transformers hands on, found in their source."""
    mark = re.compile(r"^@use_experts_implementation\b", re.MULTILINE)
    sources = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    marked = (path for path in sources if mark.search(path.read_text(encoding="utf-8")))
    return tuple(sorted({path.parent.name for path in marked}))


MLA = {"num_key_value_heads": 4}  # latent attention has one key head per query head
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}


def _mrope(*section: int) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": list(section)}
    }


_FAMILIES: tuple[Family, ...] = (
    Family(name="afmoe", model="AfmoeForCausalLM"),
    Family(name="aria", model="AriaTextForCausalLM"),
    Family(name="axk1", model="AXK1ForCausalLM", text=MLA),
    Family(name="axk2", model="AXK2ForCausalLM", text=MLA),
    Family(name="bailing_hybrid", model="BailingHybridForCausalLM", text=MLA | HYBRID),
    Family(name="beam", model="BeamForCausalLM"),
    Family(name="cohere2_moe", model="Cohere2MoeForCausalLM"),
    Family(
        name="deepseek_ocr2",
        model="DeepseekOcr2ForConditionalGeneration",
        tower={"downsample_channels": [16, 16]},
    ),
    Family(name="deepseek_v2", model="DeepseekV2ForCausalLM", text=MLA),
    Family(name="deepseek_v3", model="DeepseekV3ForCausalLM", text=MLA),
    Family(name="deepseek_v32", model="DeepseekV32ForCausalLM", text=MLA),
    Family(
        name="deepseek_v4",
        model="DeepseekV4ForCausalLM",
        text={"mlp_layer_types": ["hash_moe", "moe", "moe"], "o_groups": 2, "o_lora_rank": 8},
        note="the first layers' experts follow from the token id by a fixed table",
    ),
    Family(
        name="diffusion_gemma",
        model="DiffusionGemmaForBlockDiffusion",
        text={"global_head_dim": 8},
        outer={"canvas_length": CANVAS, "vision_config": TINY_TOWER | {"model_type": "gemma4_vision"}},
        canvas=True,
        note="encoder and decoder layers hold the same expert parameters (tied); block diffusion by a `generate` "
        "of its own, not causal: call that inside `engine.record()`; the router reads another norm of the residual "
        "than the experts",
    ),
    Family(name="dots1", model="Dots1ForCausalLM"),
    Family(
        name="dots3_note",
        model="Dots3NoteForCausalLM",
        text=MLA
        | {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 16,
            "swa_qk_nope_head_dim": 8,
            "swa_v_head_dim": 8,
        },
    ),
    Family(name="ernie4_5_moe", model="Ernie4_5_MoeForCausalLM"),
    Family(
        name="ernie4_5_vl_moe",
        model="Ernie4_5_VLMoeForConditionalGeneration",
        text=_mrope(1, 1, 2) | {"moe_intermediate_size": [16, 8]},
        note="two experts modules a layer, for text and for vision tokens, of different sizes; either may "
        "get no token",
    ),
    Family(name="exaone_moe", model="ExaoneMoeForCausalLM"),
    Family(name="flex_olmo", model="FlexOlmoForCausalLM", text={"num_experts_per_tok": 3}),
    Family(name="flint", model="FlintForCausalLM", text={"mlp_only_layers": [0]}),
    Family(
        name="gemma4",
        model="Gemma4ForCausalLM",
        text={
            "enable_moe_block": True,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
        },
        note="the router reads the residual, the experts their own norm of it; a dense MLP runs beside them",
    ),
    Family(name="glm4_moe", model="Glm4MoeForCausalLM"),
    Family(name="glm4_moe_lite", model="Glm4MoeLiteForCausalLM", text=MLA),
    Family(name="glm4v_moe", model="Glm4vMoeForConditionalGeneration", text=_mrope(1, 1, 0)),
    Family(
        name="glm5_next",
        model="Glm5NextForConditionalGeneration",
        text=MLA | HYBRID | {"index_kpool": 2, "qk_rope_head_dim": 0, "head_dim": 0},
        tower={"projection_intermediate_size": 16},
    ),
    Family(name="glm_moe_dsa", model="GlmMoeDsaForCausalLM", text=MLA),
    Family(name="gpt_oss", model="GptOssForCausalLM"),
    Family(name="granitemoe", model="GraniteMoeForCausalLM"),
    Family(name="granitemoe_swa", model="GraniteMoeSWAForCausalLM"),
    Family(
        name="granitemoehybrid",
        model="GraniteMoeHybridForCausalLM",
        text={"layer_types": ["mamba", "attention", "mamba"]},
    ),
    Family(name="granitemoeshared", model="GraniteMoeSharedForCausalLM"),
    Family(name="hunyuan_v1_moe", model="HunYuanMoEV1ForCausalLM"),
    Family(name="hy_v3", model="HYV3ForCausalLM"),
    Family(name="hy_v4", model="HYV4ForCausalLM"),
    Family(name="inkling", model="InklingForCausalLM", text={"rel_extent": 16}),
    Family(
        name="inkling2", model="Inkling2ForCausalLM", text={"rel_extent": 16, "unpadded_vocab_size": VOCAB}
    ),
    Family(
        name="jamba",
        model="JambaForCausalLM",
        text={
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
        },
    ),
    Family(name="kimi_linear", model="KimiLinearForCausalLM", text=MLA | HYBRID),
    Family(name="kolibri1", model="Kolibri1ForCausalLM"),
    Family(name="laguna", model="LagunaForCausalLM"),
    Family(
        name="lfm2_moe",
        model="Lfm2MoeForCausalLM",
        text={"layer_types": ["conv", "full_attention", "conv"]},
        note="`act_fn` is a plain function, not a module",
    ),
    Family(name="mellum", model="MellumForCausalLM"),
    Family(name="mimo_v2_flash", model="MiMoV2FlashForCausalLM"),
    Family(name="minimax", model="MiniMaxForCausalLM"),
    Family(name="minimax_m2", model="MiniMaxM2ForCausalLM"),
    Family(name="minimax_m3_vl", model="MiniMaxM3VLForCausalLM"),
    Family(name="mistral4", model="Mistral4ForCausalLM", text=MLA),
    Family(name="mistral_large4", model="MistralLarge4ForConditionalGeneration", text=MLA),
    Family(name="mixtral", model="MixtralForCausalLM"),
    Family(
        name="muse_spark",
        model="MuseSparkForConditionalGeneration",
        outer={"out_hidden_size": 16, "projector_hidden_size": 16},
        tower={
            "num_hidden_layers": 4,
            "layer_types": ["full_attention"] * 4,
            "pos_emb_height": 4,
            "pos_emb_width": 4,
            "hidden_sizes": (8, 8, 8, 8),
            "depths": (1, 1, 1, 1),
        },
        note="the experts read a narrower projection of the router's input",
    ),
    Family(
        name="nemotron_h",
        model="NemotronHForCausalLM",
        text={
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "n_groups": 2,
            "moe_latent_size": 16,
        },
        note="an MoE layer has no attention; with `moe_latent_size` the experts read a narrower projection "
        "of the router's input",
    ),
    Family(name="olmoe", model="OlmoeForCausalLM", text={"num_experts_per_tok": 3}),
    Family(
        name="openai_privacy_filter",
        model="OpenAIPrivacyFilterForTokenClassification",
        generates=False,
        note="classifies tokens: a forward, no `generate`; its own loop computes in float32",
    ),
    Family(name="phimoe", model="PhimoeForCausalLM"),
    Family(name="qwen2_moe", model="Qwen2MoeForCausalLM"),
    Family(name="qwen3_5_moe", model="Qwen3_5MoeForCausalLM", text=HYBRID),
    Family(name="qwen3_moe", model="Qwen3MoeForCausalLM", text={"num_experts_per_tok": 4}),
    Family(name="qwen3_next", model="Qwen3NextForCausalLM", text=HYBRID),
    Family(
        name="qwen3_omni_moe",
        model="Qwen3OmniMoeThinkerForConditionalGeneration",
        outer={"vision_start_token_id": 151652},  # not a declared field; published configurations carry it
        # Its layers do not look at it, but the masks that transformers makes for a static cache do.
        text={"sliding_window": None},
        tower={
            "downsample_hidden_size": 8,
            "output_dim": 32,
            "num_position_embeddings": 16,
            "max_source_positions": 16,
        },
        note="the thinker; the talker, which speaks, is a second MoE and not tested",
    ),
    Family(name="qwen3_vl_moe", model="Qwen3VLMoeForConditionalGeneration"),
    Family(
        name="qwen4_exp",
        model="Qwen4ExpForCausalLM",
        text=HYBRID
        | {
            "hc_lowrank": 8,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 4,
            "indexer_compress_ratio": 2,
        },
    ),
    Family(name="solar_open", model="SolarOpenForCausalLM"),
    Family(
        name="unlimited_ocr",
        model="UnlimitedOcrForConditionalGeneration",
        tower={"downsample_channels": (16, 16)},
    ),
    Family(
        name="zaya",
        model="ZayaForCausalLM",
        text={"num_experts_per_tok": 1, "router_hidden_size": 16},
        note="a token that skips its expert comes as expert 0 with weight 0",
    ),
)

# Package -> why no model of it can be served, found by trying. Empty with transformers 5.23.
UNSUPPORTED: dict[str, str] = {}

FAMILIES: dict[str, Family] = {family.name: family for family in _FAMILIES if family.is_installed}


def missing() -> list[str]:
    """Families of the registry that the installed transformers does not have."""
    return [family.name for family in _FAMILIES if not family.is_installed]


def model_class(family: Family) -> type[PreTrainedModel]:
    return getattr(importlib.import_module(family.module), family.model)


def tiny_config(family: Family) -> PreTrainedConfig:
    """The family's configuration with every size it has made tiny; a multimodal one has tiny towers too."""
    return _shrunk(model_class(family).config_class, family, is_text=True)


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of family `name` in eval mode, its weights drawn from `seed`.

    Every parameter is drawn anew: many routers start at zeros, which routes every token to the same experts.
    """
    family = FAMILIES[name]
    model = model_class(family)(tiny_config(family))
    randomise(model, seed)
    cast(model, dtype)
    return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Draw every parameter, and the buffers that training would have filled, from one seeded generator."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(noise * _std(name, parameter) + _mean(name, parameter))
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias", "balancing_biases")):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
        elif name.endswith("tid2eid"):  # deepseek_v4: the experts of each token id in its hash-routed layers
            order = torch.rand(len(buffer), TINY["num_experts"], generator=generator).argsort(dim=1)
            buffer.copy_(order[:, : buffer.shape[1]])


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The dtypes `from_pretrained(dtype=...)` gives: some modules stay float32 (inkling2's router must)."""
    kept = "|".join(re.escape(name) for name in model._keep_in_fp32_modules_strict or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        stays = bool(kept) and re.search(rf"(^|\.)({kept})(\.|$)", name)
        if tensor.is_floating_point() and not stays:
            tensor.data = tensor.data.to(dtype)


def prompts(batch: int, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """`batch` random prompts, each two tokens shorter than the one before and padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        ids[row, : 2 * row], mask[row, : 2 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def logits(model: PreTrainedModel, name: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """One forward, whatever the family's forward needs beside the prompt."""
    if FAMILIES[name].canvas:
        canvas = torch.arange(3, 3 + CANVAS).expand(len(inputs["input_ids"]), CANVAS)
        inputs = inputs | {"decoder_input_ids": canvas}
    return model(**inputs).logits


@torch.no_grad()
def greedy_ids(
    model: PreTrainedModel, name: str, inputs: dict[str, torch.Tensor], max_new_tokens: int = 6
) -> torch.Tensor:
    """New token ids of `generate`; seeded, because a block-diffusion model starts from a random canvas."""
    # Each denoising step feeds the next, which magnifies round-off: experts summed in another order changed
    # no token of diffusion_gemma within 4 steps (4 seeds, batch 1 and 3), and 15 of 16 runs within 8 or 16.
    few_steps = {"max_denoising_steps": 2} if FAMILIES[name].canvas else {}
    torch.manual_seed(0)
    out = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0, **few_steps
    )
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    return sequences[:, inputs["input_ids"].shape[1] :]


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of `model` whose forward transformers hands on, by dotted name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "is_transposed")}


def _std(name: str, parameter: torch.Tensor) -> float:
    if parameter.dim() < 2 or name.endswith("e_score_correction_bias"):
        return 0.1
    if "embed" in name:
        return 0.5
    # 1 / sqrt(fan in) keeps activations near 1; which axis is the fan in hardly matters at these sizes.
    return 1.5 * parameter.shape[-1] ** -0.5


def _mean(name: str, parameter: torch.Tensor) -> float:
    return 1.0 if parameter.dim() == 1 and re.search(r"norm.*weight$|scale$", name) else 0.0


def _shrunk(config_class: type, family: Family, is_text: bool) -> PreTrainedConfig:
    parts = {name: part for name, part in vars(config_class()).items() if isinstance(part, PreTrainedConfig)}
    shrunk = {name: _shrunk(type(part), family, name == "text_config") for name, part in parts.items()}
    if "text_config" in shrunk:
        return config_class(**shrunk | family.outer)
    sizes, own = (TINY, family.text) if is_text else (TINY_TOWER | family.tower, {})
    known = {f.name for f in fields(config_class)} | set(getattr(config_class, "attribute_map", {}))
    return config_class(**{name: value for name, value in sizes.items() if name in known} | own | shrunk)
