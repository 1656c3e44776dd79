"""Tiny random checkpoints in the layouts in which tools publish packed models, and what their numbers are.

Written from the layouts alone: integers are drawn, packed bit by bit in numpy, and worth what the formula of each
format says in float32. Nothing of the package is used, so that it cannot be wrong in the same way.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY, EXPERTS, TOP_K = 128, 8, 2
HIDDEN, WIDTH = 64, 96  # of an expert; 96 is no whole number of FP8's blocks of 128
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": TOP_K,
    "initializer_range": 0.3, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
    "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip

#: Tensors that stand for one weight (N, K), by suffix of its stem; and its values.
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
Pack = Callable[[torch.Tensor, np.random.Generator], Packed]
#: By a pattern of the weight's name, the first that is found.
Packs = Mapping[str, Pack]


def qwen3() -> PreTrainedModel:
    config = Qwen3MoeConfig(**COMMON, num_experts=EXPERTS, moe_intermediate_size=WIDTH)
    return Qwen3MoeForCausalLM(config)


def mixtral() -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=EXPERTS, sliding_window=None))


def glm() -> PreTrainedModel:
    config = Glm4MoeConfig(
        **COMMON, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, n_shared_experts=1,
        first_k_dense_replace=1, n_group=1, topk_group=1,
    )  # fmt: skip
    return Glm4MoeForCausalLM(config)


def deepseek() -> PreTrainedModel:
    sizes = COMMON | {"num_key_value_heads": 4}
    del sizes["head_dim"]
    config = DeepseekV3Config(
        **sizes, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, n_shared_experts=1, q_lora_rank=32,
        first_k_dense_replace=1, n_group=2, topk_group=1, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16,
        v_head_dim=16,
    )  # fmt: skip
    return DeepseekV3ForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    sizes = COMMON | {"intermediate_size": 64}
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    config = GptOssConfig(**sizes, num_local_experts=EXPERTS, sliding_window=16, layer_types=layer_types)
    return GptOssForCausalLM(config)


# -- formats -----------------------------------------------------------------------------------------------------


def words_of(numbers: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """int32 words (..., n / 8) of numbers below 16 (..., n); place i of a word, from its low end, holds order[i]."""
    eights = numbers.reshape(*numbers.shape[:-1], -1, 8).astype(np.uint64)
    words = np.zeros(eights.shape[:-1], dtype=np.uint64)
    for place, column in enumerate(order):
        words |= eights[..., column] << np.uint64(4 * place)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32).copy())


def fp8_block(weight: torch.Tensor, rng: np.random.Generator, block: int = 128) -> Packed:
    """e4m3 weights and `weight_scale_inv` of blocks."""
    rows, columns = weight.shape
    scale = torch.empty(-(-rows // block), -(-columns // block))
    q, values = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scale[i, j] = weight[at].abs().max() / 448 * float(rng.uniform(1.0, 1.2))
            q[at] = (weight[at] / scale[i, j]).to(torch.float8_e4m3fn)
            values[at] = q[at].float() * scale[i, j]
    return {".weight": q, ".weight_scale_inv": scale}, values


def fp8_channel(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
    """e4m3 weights and bfloat16 `weight_scale` of output channels."""
    scale = (weight.abs().amax(1, keepdim=True) / 400).bfloat16()
    q = (weight / scale.float()).to(torch.float8_e4m3fn)
    return {".weight": q, ".weight_scale": scale}, q.float() * scale.float()


def fp8_matrix(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
    """AutoFP8: e4m3 weights, one `weight_scale` of the matrix without dimensions, and one of the activations."""
    scale = weight.abs().max() / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    return {".weight": q, ".weight_scale": scale, ".input_scale": torch.tensor(0.5)}, q.float() * scale


def int8_channel(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
    """int8 weights and bfloat16 `weight_scale` of output channels."""
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    q = (weight / scale.float()).round().clamp(-128, 127)
    return {".weight": q.to(torch.int8), ".weight_scale": scale}, q * scale.float()


def int4_groups(
    weight: torch.Tensor, group: int, dtype: torch.dtype, zeros: np.ndarray | None
) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Numbers below 16 (N, K), scales (N, K / group), and what they are worth."""
    scale = (weight.reshape(len(weight), -1, group).abs().amax(-1) / 7).to(dtype)
    spread = scale.float().repeat_interleave(group, 1)
    zero = torch.full(scale.shape, 8.0) if zeros is None else torch.from_numpy(zeros.astype(np.float32))
    offsets = zero.repeat_interleave(group, 1)
    q = ((weight / spread).round() + offsets).clamp(0, 15)
    return q.numpy().astype(np.uint8), scale, (q - offsets) * spread


def some_zeros(weight: torch.Tensor, group: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 16, (weight.shape[0], weight.shape[1] // group))


def compressed_int4(asymmetric: bool, group: int = 32) -> Pack:
    """compressed-tensors: words along K, zeros in words along N, `weight_shape`."""

    def pack(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
        zeros = some_zeros(weight, group, rng) if asymmetric else None
        q, scale, values = int4_groups(weight, group, torch.bfloat16, zeros)
        tensors = {
            ".weight_packed": words_of(q),
            ".weight_scale": scale,
            ".weight_shape": torch.tensor(weight.shape),
        }
        if zeros is not None:
            tensors[".weight_zero_point"] = words_of(zeros.T).T.contiguous()
        return tensors, values

    return pack


def awq(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
    """AWQ's gemm: (K, N / 8) words, columns 0 2 4 6 1 3 5 7 from the low end, zeros likewise, float16 scales."""
    zeros = some_zeros(weight, 32, rng)
    q, scale, values = int4_groups(weight, 32, torch.float16, zeros)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        ".qweight": words_of(q.T, order), ".qzeros": words_of(zeros.T, order), ".scales": scale.T.contiguous()
    }, values  # fmt: skip


def gptq(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
    """GPTQ: words along K, zeros less one (0 becomes 15) in words along N, float16 scales, `g_idx`."""
    zeros = some_zeros(weight, 32, rng)
    q, scale, values = int4_groups(weight, 32, torch.float16, zeros)
    return {
        ".qweight": words_of(q).T.contiguous(),
        ".qzeros": words_of((zeros.T - 1) % 16),
        ".scales": scale.T.contiguous(),
        ".g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // 32,
    }, values


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def nvfp4(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
    """compressed-tensors: bytes of two e2m1, the first in the low half; e4m3 scales of 16, divided by a global one."""
    rows, columns = weight.shape
    q = rng.integers(0, 16, (rows, columns))
    scale = torch.from_numpy(rng.uniform(50, 448, (rows, columns // 16))).to(torch.float8_e4m3fn)
    whole = torch.tensor([448 * 6 / float(weight.abs().max())])
    values = torch.from_numpy(E2M1[q]) * (scale.float() / whole).repeat_interleave(16, 1)
    packed = torch.from_numpy((q[:, 0::2] | (q[:, 1::2] << 4)).astype(np.uint8))
    return {".weight_packed": packed, ".weight_scale": scale, ".weight_global_scale": whole}, values


def mxfp4_words(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
    """compressed-tensors: bytes of two e2m1 as for NVFP4, and exponents plus 127 of 32."""
    rows, columns = weight.shape
    q, exponents = rng.integers(0, 16, (rows, columns)), rng.integers(121, 126, (rows, columns // 32))
    values = E2M1[q] * np.repeat(np.float32(2.0) ** (exponents - 127), 32, axis=1).astype(np.float32)
    packed = torch.from_numpy((q[:, 0::2] | (q[:, 1::2] << 4)).astype(np.uint8))
    scale = torch.from_numpy(exponents.astype(np.uint8))
    return {".weight_packed": packed, ".weight_scale": scale}, torch.from_numpy(values)


def mxfp8(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
    """compressed-tensors: e4m3 weights, and exponents plus 127 of 32."""
    groups = weight.unflatten(1, (-1, 32))
    exponents = (groups.abs().amax(-1) / 448).log2().ceil()
    q = (groups / torch.exp2(exponents).unsqueeze(-1)).to(torch.float8_e4m3fn)
    values = (q.float() * torch.exp2(exponents).unsqueeze(-1)).flatten(1)
    return {".weight": q.flatten(1), ".weight_scale": (exponents + 127).to(torch.uint8)}, values


def int8_words(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
    """compressed-tensors: four numbers plus 128 in a word, from the low end; bfloat16 scales of 32."""
    groups = weight.unflatten(1, (-1, 32))
    scale = (groups.abs().amax(-1) / 127).bfloat16()
    q = (groups / scale.float().unsqueeze(-1)).round().clamp(-128, 127)
    stored = (q.flatten(1) + 128).numpy().astype(np.uint64).reshape(len(weight), -1, 4)
    words = (stored << np.arange(0, 32, 8, dtype=np.uint64)).sum(-1).astype(np.uint32).view(np.int32)
    shape = torch.tensor(weight.shape)
    packed = {
        ".weight_packed": torch.from_numpy(words.copy()),
        ".weight_scale": scale,
        ".weight_shape": shape,
    }
    return packed, (q * scale.float().unsqueeze(-1)).flatten(1)


def int_bytes(bits: int, group: int, zeros: bool = False) -> Pack:
    """compressed-tensors: a byte for each number of `bits`; bfloat16 scales of groups, zeros less the middle."""

    def pack(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
        most = 2 ** (bits - 1) - 1
        groups = weight.unflatten(1, (-1, group))
        scale = (groups.abs().amax(-1) / most).bfloat16()
        zero = torch.from_numpy(rng.integers(-most - 1, most + 1, scale.shape) * zeros)
        q = ((groups / scale.float().unsqueeze(-1)).round() + zero.unsqueeze(-1)).clamp(-most - 1, most)
        values = ((q - zero.unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(1)
        packed = {".weight": q.flatten(1).to(torch.int8), ".weight_scale": scale}
        return packed | ({".weight_zero_point": zero.to(torch.int8)} if zeros else {}), values.float()

    return pack


def fp8_blocks(rows: int, columns: int, scale_name: str = ".weight_scale") -> Pack:
    """e4m3 weights and float32 scales of blocks, of any size."""

    def pack(weight: torch.Tensor, rng: np.random.Generator) -> Packed:
        (n, k), spread = weight.shape, torch.empty_like(weight)
        scale = torch.from_numpy(rng.uniform(0.002, 0.004, (-(-n // rows), -(-k // columns)))).float()
        for i, j in np.ndindex(*scale.shape):
            spread[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = scale[i, j]
        q = (weight / spread).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {".weight": q, scale_name: scale}, q.float() * spread

    return pack


def mxfp4(
    rows: int, columns: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks (E, N, K / 32, 16), scales (E, N, K / 32) and values (E, N, K) as gpt-oss has them."""
    q = rng.integers(0, 16, (EXPERTS, rows, columns))
    exponents = rng.integers(121, 126, (EXPERTS, rows, columns // 32))
    values = E2M1[q] * np.repeat(np.float32(2.0) ** (exponents - 127), 32, axis=2).astype(np.float32)
    blocks = (q[..., 0::2] | (q[..., 1::2] << 4)).astype(np.uint8).reshape(EXPERTS, rows, columns // 32, 16)
    return torch.from_numpy(blocks), torch.from_numpy(exponents.astype(np.uint8)), torch.from_numpy(values)


# -- checkpoints -------------------------------------------------------------------------------------------------


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def mixed(**groups: dict[str, Any]) -> dict[str, Any]:
    """As compressed-tensors says that groups of modules are packed each in its own way."""
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}


def group(format: str, *targets: str, **weights: Any) -> dict[str, Any]:
    return {"format": format, "targets": list(targets), "weights": weights, "input_activations": None}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "actorder": None}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
#: Name -> model, how its Linear weights are packed, what config.json says of it.
LAYOUTS: dict[str, tuple[Callable[[], PreTrainedModel], Pack | Packs | None, dict[str, Any]]] = {
    "qwen3 fp8": (qwen3, fp8_block, FP8),
    "deepseek fp8": (deepseek, fp8_block, FP8),
    "mixtral fp8 matrix": (mixtral, fp8_matrix, {"quant_method": "fp8", "activation_scheme": "static"}),
    "glm fp8 channel": (glm, fp8_channel, compressed("float-quantized", num_bits=8, type="float")),
    "glm int8": (glm, int8_channel, compressed("int-quantized", num_bits=8, type="int", symmetric=True)),
    "qwen3 int4": (qwen3, compressed_int4(False), compressed("pack-quantized", symmetric=True, **GROUPS)),
    "glm int4 zeros": (glm, compressed_int4(True), compressed("pack-quantized", symmetric=False, **GROUPS)),
    "mixtral awq": (mixtral, awq, AWQ),
    "mixtral gptq": (mixtral, gptq, GPTQ),
    "qwen3 nvfp4": (qwen3, nvfp4, compressed("nvfp4-pack-quantized", num_bits=4, type="float")),
    "mixtral mxfp4": (mixtral, mxfp4_words, compressed("mxfp4-pack-quantized", num_bits=4, type="float")),
    "glm mxfp8": (glm, mxfp8, compressed("mxfp8-quantized", num_bits=8, type="float")),
    "qwen3 int8 words": (
        qwen3,
        int8_words,
        compressed("pack-quantized", symmetric=True, **GROUPS | {"num_bits": 8}),
    ),
    "gpt-oss mxfp4": (gpt_oss, None, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}),
    "glm int4 bytes": (
        glm,
        int_bytes(4, 32, zeros=True),
        compressed("int-quantized", symmetric=False, **GROUPS),
    ),
    "qwen3 nvfp4 beside fp8": (
        qwen3,
        {"self_attn": fp8_channel, "experts": nvfp4},
        mixed(
            group_0=group("float-quantized", r"re:.*self_attn\.[qkvo]_proj$", num_bits=8, type="float"),
            group_1=group("nvfp4-pack-quantized", "re:.*mlp.*", num_bits=4, type="float"),
        ),
    ),
    "glm int4 beside int8": (
        glm,
        {r"layers\.2\.mlp\.experts": int8_words, "proj": compressed_int4(False)},
        mixed(
            group_0=group("pack-quantized", "Linear", symmetric=True, **GROUPS),
            group_1=group(
                "pack-quantized",
                r"re:.*layers\.2\.mlp\.experts.*",
                symmetric=True,
                **GROUPS | {"num_bits": 8},
            ),
        ),
    ),
}
#: Forms of rows that the layouts become.
FORMS = {
    "qwen3 fp8": "fp8", "deepseek fp8": "fp8", "mixtral fp8 matrix": "fp8",
    "glm fp8 channel": "fp8", "glm int8": "int8", "qwen3 int4": "int4",
    "glm int4 zeros": "int4", "mixtral awq": "int4", "mixtral gptq": "int4", "qwen3 nvfp4": "nvfp4",
    "mixtral mxfp4": "mxfp4", "glm mxfp8": "fp8", "qwen3 int8 words": "int8", "gpt-oss mxfp4": "mxfp4",
    "glm int4 bytes": "int4", "qwen3 nvfp4 beside fp8": "nvfp4", "glm int4 beside int8": "int4 and int8",
}  # fmt: skip


def is_packed(name: str) -> bool:
    """Linears of layers; not embeddings, heads, norms and routers."""
    return name.endswith("proj.weight") or any(f".{w}.weight" in name for w in ("w1", "w2", "w3"))


def write(layout: str, folder: Path, keep: Callable[[str], bool] = is_packed) -> PreTrainedModel:
    """Write a checkpoint in a layout, and give the plain model of its numbers in float32.

    Args:
        keep: whether a weight of that name is packed.
    """
    build, pack, packing = LAYOUTS[layout]
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    build().save_pretrained(folder)
    file = folder / "model.safetensors"
    with safe_open(file, "pt") as handle:
        plain = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 - no dict
    packed: dict[str, torch.Tensor] = {}
    plain |= {name: torch.randn_like(bias) * 0.3 for name, bias in plain.items() if name.endswith("bias")}
    for name, weight in list(plain.items()):
        if pack is None and name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales, values = mxfp4(weight.shape[2], weight.shape[1], rng)
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = values.mT.contiguous()  # gpt-oss computes with (E, in, out)
        elif pack is not None and keep(name):
            one = pack if callable(pack) else next(pack[key] for key in pack if re.search(key, name))
            tensors, plain[name] = one(weight, rng)
            packed |= {name.removesuffix(".weight") + suffix: tensor for suffix, tensor in tensors.items()}
        else:
            packed[name] = weight
    save_file(plain, file, metadata={"format": "pt"})
    model = build().from_pretrained(folder, dtype=torch.float32)
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, file, metadata={"format": "pt"})
    edit_config(folder, quantization_config=packing)
    return model.eval()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
