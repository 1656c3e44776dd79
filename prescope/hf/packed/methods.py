"""Which way of writing a `quantization_config` means, and which ones are not read here."""

import re
from collections.abc import Mapping
from typing import Any

import torch

from ...errors import UnsupportedExperts
from ...weights.formats import Format, Fp8, Int4, Int8, Mxfp4, Nvfp4
from .floats import BlockFp8, GptOssMxfp4, PackedMxfp4, PackedNvfp4
from .integers import Awq, ChannelInt8, Gptq, Grouped, PackQuantized, PackQuantized8
from .published import Group, Published

SERVED = "fp8 (block, channel or tensor scales), mxfp4 (gpt-oss), compressed-tensors, awq and gptq"
#: A module that a config group of experts targets, in most families.
AN_EXPERT = "model.layers.1.mlp.experts.0.gate_proj"


def groups_of(config: Mapping[str, Any]) -> tuple[Group, ...]:
    """The ways in which a checkpoint with this `quantization_config` is written: one, or one for each config group.

    Raises:
        UnsupportedExperts: one of them is not read here, with the reason.
    """
    try:
        return _groups_of(config)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, re.error) as error:
        # A list in place of an object, a word in place of a number: somebody's JSON, of any shape.
        raise UnsupportedExperts(f"its quantization_config is malformed ({error})") from error


def _groups_of(config: Mapping[str, Any]) -> tuple[Group, ...]:
    method = str(config.get("quant_method", "unknown"))
    match method:
        case "fp8":
            return (Group(_fp8(config)),)
        case "mxfp4":
            return (Group(GptOssMxfp4()),)
        case "compressed-tensors":
            return _compressed(config)
        case "awq":
            _require(config, bits=(4,), version=("gemm", None))
            _require(config, checkpoint_format=("gemm", None), format=("gemm", None))
            return (Group(Awq(_group_of(config))),)
        case "gptq":
            return (Group(_gptq(config)),)
    raise UnsupportedExperts(f"quant_method {method!r} is not one of {SERVED}")


def format_said(config: Mapping[str, Any], columns: int) -> Format:
    """What an expert's matrix with rows of `columns` weights becomes, as far as a `quantization_config` says it.

    Raises:
        UnsupportedExperts: it is written in a way that is not read here.
    """
    published = min(groups_of(config), key=lambda group: group.distance(AN_EXPERT)).published
    if isinstance(published, BlockFp8):
        return Fp8(*published.block) if published.block is not None else Fp8(1, columns)
    match published:
        case GptOssMxfp4() | PackedMxfp4():
            return Mxfp4()
        case PackedNvfp4():
            return Nvfp4()
        case ChannelInt8():
            return Int8()
    assert isinstance(published, Grouped)
    group = published.group if published.group is not None and published.group > 0 else columns
    if isinstance(published, PackQuantized8):
        return Int8(group if group < columns else None)
    return Int4(group, torch.bfloat16, has_zeros=not published.is_symmetric)


def _fp8(config: Mapping[str, Any]) -> Published:
    if config.get("expert_dtype") not in (None, "fp8"):
        raise UnsupportedExperts(f"expert_dtype {config['expert_dtype']!r} beside fp8 is not read")
    # AutoFP8 has `weight_scale`; weights are multiplied by both.
    names = ("weight_scale_inv", "weight_scale")
    return BlockFp8("FP8", _block_of(config.get("weight_block_size")), *names)


def _gptq(config: Mapping[str, Any]) -> Published:
    _require(config, bits=(4,), desc_act=(False, None), is_marlin_format=(False, None))
    # By the second name in the tool's own quantize_config.json.
    formats = ("gptq", "gptq_v2", None)
    _require(config, checkpoint_format=formats, format=formats, pack_dtype=("int32", None))
    rules = (config.get("dynamic") or {}).values()  # of single modules, by patterns of names
    for rule in rules:
        _require(rule, bits=(4, None), desc_act=(False, None))
    group = None if any("group_size" in rule for rule in rules) else _group_of(config)
    is_second = "gptq_v2" in (config.get("checkpoint_format"), config.get("format"))
    return Gptq(group, 0 if is_second else 1)


def _compressed(config: Mapping[str, Any]) -> tuple[Group, ...]:
    if (config.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        raise UnsupportedExperts("compressed-tensors with sparse weights")
    groups = list((config.get("config_groups") or {}).values()) or [{}]
    if strange := [group for group in groups if not isinstance(group, Mapping)]:
        raise UnsupportedExperts(f"compressed-tensors with a config group {strange[0]!r}")
    # Of activations alone, weights are plain.
    groups = [group for group in groups if group.get("weights") and group.get("format") != "dense"] or groups
    return tuple(
        Group(
            _compressed_as(str(group.get("format") or config.get("format")), group.get("weights") or {}),
            tuple(_target(target) for target in group.get("targets") or ()),
        )
        for group in groups
    )


def _target(target: Any) -> str:
    re.compile(str(target).removeprefix("re:"))  # refused here, and not where modules are looked at
    return str(target)


def _compressed_as(format: str, args: Mapping[str, Any]) -> Published:
    """How compressed-tensors writes the matrices of a config group.

    Args:
        args: what it says of weights.

    Raises:
        UnsupportedExperts: in a way that is not read here.
    """
    if args.get("actorder") in (True, "group"):
        raise UnsupportedExperts("compressed-tensors with actorder='group'")
    match format:
        case "pack-quantized":
            _require(args, num_bits=(4, 8), type=("int", None))
            is_symmetric = args.get("symmetric") is not False
            return (PackQuantized if args["num_bits"] == 4 else PackQuantized8)(_group_of(args), is_symmetric)
        case "float-quantized" | "naive-quantized" if args.get("type") == "float":
            block = _block_of(args.get("block_structure"))
            return BlockFp8("FP8 of compressed-tensors", block, "weight_scale")
        case "int-quantized" | "naive-quantized":
            _require(args, num_bits=(8,), symmetric=(True, None))
            return ChannelInt8()
        case "nvfp4-pack-quantized":
            return PackedNvfp4()
        case "mxfp4-pack-quantized":
            return PackedMxfp4()
        case "mxfp8-quantized":
            return BlockFp8("MXFP8 of compressed-tensors", (1, 32), "weight_scale", is_microscaled=True)
    raise UnsupportedExperts(f"compressed-tensors in the format {format!r}")


def _block_of(said: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if a configuration says nothing."""
    if said in (None, []):
        return None
    rows, columns = (int(size) for size in said)
    if min(rows, columns) < 1:
        raise ValueError(f"blocks of {rows} x {columns}")
    return rows, columns


def _group_of(args: Mapping[str, Any]) -> int | None:
    """Weights that share a scale by a configuration, -1 for a row; None if it does not say."""
    if args.get("strategy") in ("channel", "tensor"):
        return -1
    group = args.get("group_size")
    return None if group is None else int(group)


def _require(config: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        found = config.get(key)
        if (found.lower() if isinstance(found, str) else found) not in values:
            raise UnsupportedExperts(f"{key}={found!r} is not served, {key}={values[0]!r} is")
