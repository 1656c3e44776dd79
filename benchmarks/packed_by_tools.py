"""Checkpoints packed by the tools themselves, served beside a plain model of what the tools say they hold.

    python benchmarks/packed_by_tools.py make FOLDER    # where llmcompressor, gptqmodel, autoawq are installed
    python benchmarks/packed_by_tools.py check FOLDER   # where prescope is

Tools pin transformers and torch of their own, hence two steps. Models are tiny and random. llm-compressor packs whole
folders (model_free_ptq); of GPTQModel and AutoAWQ it is the packing of a matrix that is used, since their ways to find
scales need a GPU, on scales of least and largest weights. What a packed matrix is worth says the tool's own unpacking,
in float32, in a second folder ("-plain") that any transformers reads. `check` loads both and compares.
"""

import argparse
import importlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SCHEMES = [
    "W4A16",
    "W4A16_ASYM",
    "W8A16",
    "W8A8",
    "FP8_DYNAMIC",
    "FP8_BLOCK",
    "MXFP4A16",
    "MXFP8A16",
    "NVFP4A16",
]
FAMILIES = ["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3"]
GROUP = 64  # of AWQ and GPTQ
NOT_PACKED = ["lm_head", "re:.*embed_tokens$", "re:.*gate$"]
TOLERANCE = 1e-5  # of the largest logit


def tiny(family: str) -> PreTrainedModel:
    """Three layers of eight experts, top-2, in bfloat16."""
    sizes: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "num_experts_per_tok": 2, "eos_token_id": None, "bos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    match family:
        case "qwen3_moe":
            sizes |= {"num_experts": 8}
        case "mixtral":
            sizes |= {"num_local_experts": 8, "sliding_window": None}
        case "glm4_moe":
            sizes |= {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
        case "deepseek_v3":
            sizes |= {
                "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4,
                "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
                "first_k_dense_replace": 1,
            }  # fmt: skip
            del sizes["head_dim"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1)
    return model.to(torch.bfloat16)


def make(folder: Path) -> None:
    """All that the tools which are installed can write."""
    for family in FAMILIES:
        source = folder / family
        tiny(family).save_pretrained(source)
        for scheme in SCHEMES:
            with_llm_compressor(source, scheme, is_mla=family == "deepseek_v3")
        if family in ("qwen3_moe", "mixtral"):
            for way in ("awq", "gptq", "gptq symmetric", "gptq_v2"):
                with_packers(source, way)


def with_llm_compressor(source: Path, scheme: str, is_mla: bool) -> None:
    """A folder packed by llm-compressor, and its plain one, unpacked by compressed-tensors in float32."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import dequantize
    from llmcompressor import model_free_ptq

    out = source.with_name(f"{source.name}.{scheme}")
    ignored = [*NOT_PACKED, *(["re:.*self_attn.*"] if is_mla else [])]  # whose ranks are no whole groups
    model_free_ptq(str(source), str(out), scheme=scheme, ignore=ignored, device="cpu")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    matrices: dict[str, dict[str, torch.Tensor]] = {}
    for file in out.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            stem, _, leaf = name.rpartition(".")
            matrices.setdefault(stem, {})[leaf] = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    plain: dict[str, torch.Tensor] = {}
    for stem, parts in matrices.items():
        if "weight_scale" not in parts:
            plain |= {f"{stem}.{leaf}": tensor for leaf, tensor in parts.items()}
        elif scheme.startswith("NVFP4"):  # its own unpacking rounds to bfloat16
            rows, half = parts["weight_packed"].shape
            plain[f"{stem}.weight"] = dequantize(
                unpack_fp4_from_uint8(parts["weight_packed"], rows, 2 * half).float(),
                parts["weight_scale"].float(),
                args=group.weights,
                global_scale=parts["weight_global_scale"],
                dtype=torch.float32,
            )
        else:
            plain[f"{stem}.weight"] = compressor.decompress(parts, group)["weight"].float()
    write(source, out.with_name(f"{out.name}-plain"), plain, None)
    print(f"{out.name}: llmcompressor {version('llmcompressor')}", flush=True)


def with_packers(source: Path, way: str) -> None:
    """Every linear packed by the class of AutoAWQ or GPTQModel, and what that class unpacks, in float32."""
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if weight.dim() != 2 or any(part in name for part in ("embed_tokens", "lm_head", "gate.weight")):
            packed[name], plain[name] = weight, weight.float()
            continue
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).half()
        linear.weight.data = weight.half()
        groups = weight.float().unflatten(-1, (-1, GROUP))
        if way == "gptq symmetric":
            scale = (groups.abs().amax(-1) / 7.5).clamp(min=1e-5).half()
            zero = torch.full_like(scale, 8.0)
        else:
            low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
            scale = ((high - low) / 15).clamp(min=1e-5).half()
            zero = (-low / scale.float()).round().clamp(0, 15).half()
        parts, value = awq(linear, scale, zero) if way == "awq" else gptq(linear, scale, zero, way)
        packed |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in parts.items()}
        plain[name] = value.float().contiguous()
    out = source.with_name(f"{source.name}.{way.replace(' ', '_')}")
    config: dict[str, Any] = {
        "quant_method": way.partition("_")[0].partition(" ")[0],
        "bits": 4,
        "group_size": GROUP,
    }
    if way == "awq":
        config |= {"version": "gemm", "zero_point": True, "modules_to_not_convert": ["gate"]}
    else:
        config |= {
            "desc_act": False, "sym": way == "gptq symmetric", "checkpoint_format": way.partition(" ")[0],
            "pack_dtype": "int32", "dynamic": {"-:.*mlp\\.gate.*": {}},
        }  # fmt: skip
    write(source, out, packed, config)
    write(source, out.with_name(f"{out.name}-plain"), plain, None)
    print(f"{out.name}: {'autoawq' if way == 'awq' else 'gptqmodel'}", flush=True)


def awq(
    linear: nn.Linear, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of a matrix as AutoAWQ packs them, and their value (N, K)."""
    gemm = importlib.import_module("awq.modules.linear.gemm")
    packing = importlib.import_module("awq.utils.packing_utils")
    made = gemm.WQLinear_GEMM.from_linear(
        linear, 4, GROUP, scales=scale.t().contiguous(), zeros=zero.t().contiguous()
    )
    parts = {name: tensor for name, tensor in made.state_dict().items() if tensor is not None}
    return parts, packing.dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, GROUP).t()


def gptq(
    linear: nn.Linear, scale: torch.Tensor, zero: torch.Tensor, way: str
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Tensors of a matrix as GPTQModel packs them, in its first or second format, and their value (N, K)."""
    qlinear = importlib.import_module("gptqmodel.nn_modules.qlinear.torch")
    formats = importlib.import_module("gptqmodel.utils.model")
    made = qlinear.TorchLinear(
        bits=4, group_size=GROUP, desc_act=False, sym=way == "gptq symmetric", in_features=linear.in_features,
        out_features=linear.out_features, bias=False, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    order = torch.arange(linear.in_features, dtype=torch.int32) // GROUP
    made.pack_original(linear, scale.contiguous(), zero.contiguous(), order)
    parts = {name: made.state_dict()[name].clone() for name in ("qweight", "qzeros", "scales", "g_idx")}
    made.scales = made.scales.float()
    value = made.eval().dequantize_weight().t().clone()
    if way != "gptq_v2":
        formats.convert_gptq_v2_to_v1_format_module(made, made)
        parts["qzeros"] = made.qzeros
    return parts, value


def write(source: Path, out: Path, tensors: dict[str, torch.Tensor], packing: dict[str, Any] | None) -> None:
    """A folder with the source's config."""
    config = json.loads((source / "config.json").read_text())
    config |= {"dtype": "float32"} if packing is None else {"quantization_config": packing}
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        out / "model.safetensors",
        {"format": "pt"},
    )


def check(folder: Path) -> None:
    """A table; exits with 1 if anything differs."""
    import prescope

    ids = torch.randint(1, 128, (2, 7), generator=torch.Generator().manual_seed(0))
    print("| checkpoint | experts | logits differ by | tokens |\n|---|---|--:|---|")
    all_same = True
    for plain_folder in sorted(folder.glob("*-plain")):
        packed = plain_folder.with_name(plain_folder.name.removesuffix("-plain"))
        plain = AutoModelForCausalLM.from_pretrained(plain_folder, dtype=torch.float32).eval()
        with (
            prescope.load(packed, dtype="float32", device="cpu", link_gb_per_s=50.0, slots=8) as engine,
            torch.no_grad(),
        ):
            expected = plain(ids).logits
            distance = float((engine.model(ids).logits - expected).abs().max() / expected.abs().max())
            tokens = engine.generate(ids, max_new_tokens=8).tokens
            form = engine.form
        whole = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        are_same = [list(text) for text in tokens] == whole[:, ids.shape[1] :].tolist()
        all_same &= are_same and distance < TOLERANCE
        print(
            f"| {packed.name} | {form} | {distance:.1e} | {'the same' if are_same else 'others'} |",
            flush=True,
        )
    if not all_same:
        raise SystemExit(1)


def main() -> None:
    """Make or check."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["make", "check"])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    (make if args.step == "make" else check)(args.folder)


if __name__ == "__main__":
    main()
