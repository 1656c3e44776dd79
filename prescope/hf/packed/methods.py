"""Which way of writing a `quantization_config` means, and which ones are not read here."""

from collections.abc import Mapping
from typing import Any

import torch

from ...errors import UnsupportedExperts
from ...weights.formats import Format, Fp8, Int4, Int8, Mxfp4, Nvfp4
from .floats import BlockFp8, GptOssMxfp4, PackedMxfp4, PackedNvfp4
from .integers import Awq, ChannelInt8, Gptq, PackQuantized, PackQuantized8
from .published import Published

SERVED = "fp8 (block, channel or tensor scales), mxfp4 (gpt-oss), compressed-tensors, awq and gptq"


def published_of(config: Mapping[str, Any]) -> Published:
    """How a checkpoint with this `quantization_config` is written.

    Raises:
        UnsupportedExperts: in a way that is not read here, with the reason.
    """
    method = str(config.get("quant_method", "unknown"))
    match method:
        case "fp8":
            return _fp8(config)
        case "mxfp4":
            return GptOssMxfp4()
        case "compressed-tensors":
            return _compressed(config)
        case "awq":
            _require(config, bits=(4,), version=("gemm", None))
            return Awq(config.get("group_size"))
        case "gptq":
            _require(config, bits=(4,), desc_act=(False, None), is_marlin_format=(False, None))
            rules = (config.get("dynamic") or {}).values()  # of single modules, by patterns of names
            for rule in rules:
                _require(rule, bits=(4, None), desc_act=(False, None))
            group = None if any("group_size" in rule for rule in rules) else config.get("group_size")
            return Gptq(group, 0 if config.get("checkpoint_format") == "gptq_v2" else 1)
    raise UnsupportedExperts(f"quant_method {method!r} is not one of {SERVED}")


def format_said(config: Mapping[str, Any], columns: int) -> Format:
    """What a matrix with rows of `columns` weights becomes, as far as a `quantization_config` says it.

    Raises:
        UnsupportedExperts: it is written in a way that is not read here.
    """
    published = published_of(config)
    if isinstance(published, BlockFp8):
        return Fp8(*published.block) if published.block is not None else Fp8(1, columns)
    match published:
        case GptOssMxfp4() | PackedMxfp4():
            return Mxfp4()
        case PackedNvfp4():
            return Nvfp4()
        case ChannelInt8():
            return Int8()
    groups = list((config.get("config_groups") or {}).values())
    said = (groups[0].get("weights") or {}) if groups else config
    group = int(said.get("group_size") or -1)
    if isinstance(published, PackQuantized8):
        return Int8(group if 0 < group < columns else None)
    has_zeros = isinstance(published, Awq | Gptq) or said.get("symmetric") is False
    return Int4(group if group > 0 else columns, torch.bfloat16, has_zeros)


def _fp8(config: Mapping[str, Any]) -> Published:
    block = config.get("weight_block_size")
    if config.get("expert_dtype") not in (None, "fp8"):
        raise UnsupportedExperts(f"expert_dtype {config['expert_dtype']!r} beside fp8 is not read")
    return BlockFp8("FP8", None if block is None else (int(block[0]), int(block[1])), "weight_scale_inv")


def _compressed(config: Mapping[str, Any]) -> Published:
    groups = list((config.get("config_groups") or {}).values())
    formats = {str(group.get("format") or config.get("format")) for group in groups} or {
        str(config.get("format"))
    }
    if len(formats) != 1:
        raise UnsupportedExperts(f"compressed-tensors in several formats ({', '.join(sorted(formats))})")
    if (config.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        raise UnsupportedExperts("compressed-tensors with sparse weights")
    weights = [group.get("weights") or {} for group in groups]
    for args in weights:
        if args.get("actorder") in (True, "group"):
            raise UnsupportedExperts("compressed-tensors with actorder='group'")
    name = formats.pop()
    match name:
        case "pack-quantized":
            for args in weights:
                _require(args, num_bits=(4, 8), type=("int", None))
            bits = {args["num_bits"] for args in weights}
            if len(bits) != 1:
                raise UnsupportedExperts("compressed-tensors with weights of 4 and of 8 bits")
            found = {_group_of(args) for args in weights}
            group = found.pop() if len(found) == 1 else None
            return PackQuantized(group) if bits == {4} else PackQuantized8(group)
        case "float-quantized" | "naive-quantized" if all(args.get("type") == "float" for args in weights):
            blocks = {tuple(args.get("block_structure") or ()) for args in weights}
            block = next(iter(blocks)) if len(blocks) == 1 else ()
            return BlockFp8(
                "FP8 of compressed-tensors", (block[0], block[1]) if block else None, "weight_scale"
            )
        case "int-quantized" | "naive-quantized":
            for args in weights:
                _require(args, num_bits=(8,), symmetric=(True, None))
            return ChannelInt8()
        case "nvfp4-pack-quantized":
            return PackedNvfp4()
        case "mxfp4-pack-quantized":
            return PackedMxfp4()
        case "mxfp8-quantized":
            return BlockFp8("MXFP8 of compressed-tensors", (1, 32), "weight_scale", is_microscaled=True)
    raise UnsupportedExperts(f"compressed-tensors in the format {name!r}")


def _group_of(args: Mapping[str, Any]) -> int | None:
    """Weights that share a scale by the arguments of a config group, -1 for a row; None if they do not say."""
    if args.get("strategy") in ("channel", "tensor"):
        return -1
    group = args.get("group_size")
    return None if group is None else int(group)


def _require(config: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        found = config.get(key)
        if (found.lower() if isinstance(found, str) else found) not in values:
            raise UnsupportedExperts(f"{key}={found!r} is not served, {key}={values[0]!r} is")
