"""Which way of writing a `quantization_config` means, and which ones are not read here."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...errors import UnsupportedExperts
from ...weights.formats import Format, Fp8, Int4, Int8, Mxfp4, Nvfp4
from .floats import BlockFp8, FinegrainedFp8, GptOssMxfp4, PackedMxfp4, PackedNvfp4
from .integers import Awq, Gptq, Grouped, IntQuantized, PackQuantized, PackQuantized8
from .published import Group, Published

SERVED = "fp8 (block, channel or tensor scales), mxfp4 (gpt-oss), compressed-tensors, awq and gptq"
#: What an expert's matrix is called in its decoder layer, family by family; at last that of all experts of a layer.
IN_LAYER = (
    "mlp.experts.0.gate_proj", "block_sparse_moe.experts.0.w1", "feed_forward.experts.0.gate_proj",
    "mixer.experts.0.up_proj", "mlp.experts",
)  # fmt: skip
#: Where tools list modules that they leave as they are: compressed-tensors, transformers and AutoAWQ, AutoFP8.
LEFT_PLAIN = ("ignore", "modules_to_not_convert", "ignored_layers")

#: One of each way to name a packed matrix's tensors.
ANY_GROUPS = tuple(map(Group, (FinegrainedFp8(), GptOssMxfp4(), PackQuantized(), Awq())))


@contextmanager
def _well_formed() -> Iterator[None]:
    """A list in place of an object, a word in place of a number, as an UnsupportedExperts: it is somebody's JSON."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, re.error) as error:
        raise UnsupportedExperts(f"its quantization_config is malformed ({error})") from error


def formats_said(
    config: Mapping[str, Any], columns: Mapping[str, int], layers: Sequence[int]
) -> list[dict[str, Format] | None]:
    """What an expert's matrices become, as far as a `quantization_config` says it, of each of some decoder layers: a
    format by name, or None where the experts of a layer are left as they are.

    Args:
        columns: weights in a row of each matrix. layers: by their index.

    Raises:
        UnsupportedExperts: they are written in a way that is not read here.
    """
    groups, is_plain = groups_of(config), _left_plain(config)
    found: list[dict[str, Format] | None] = []
    for layer in layers:
        modules = [f"model.layers.{layer}.{name}" for name in IN_LAYER]
        distance, group = min(
            ((group.distance(module), group) for group in groups for module in modules),
            key=lambda one: one[0],
        )
        is_meant = distance < 3 or not group.targets
        if not is_meant or any(map(is_plain, modules)):
            found.append(None)
        else:
            found.append({name: _format_of(group.published, one) for name, one in columns.items()})
    return found


def _format_of(published: Published, columns: int) -> Format:
    """Of a matrix with rows of `columns` weights."""
    if isinstance(published, FinegrainedFp8) and published.has_fp4_experts:
        return Mxfp4()
    if isinstance(published, BlockFp8):
        return Fp8(*published.block) if published.block is not None else Fp8(1, columns)
    match published:
        case GptOssMxfp4() | PackedMxfp4():
            return Mxfp4()
        case PackedNvfp4():
            return Nvfp4()
    assert isinstance(published, Grouped)
    said = published.said if published.group is None else published.group
    group = min(said, columns) if said is not None and said > 0 else columns
    if isinstance(published, PackQuantized8) or (
        isinstance(published, IntQuantized) and not published.is_int4
    ):
        return Int8(group if group < columns else None)
    return Int4(group, torch.bfloat16, has_zeros=not published.is_symmetric)


def _left_plain(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Whether a module is among those that a `quantization_config` leaves as they are."""
    with _well_formed():
        listed = [str(name) for key in LEFT_PLAIN for name in config.get(key) or ()]
        # GPTQModel's: "-:" and a pattern.
        listed += [f"re:{key[2:]}" for key in config.get("dynamic") or () if key.startswith("-:")]
        # Thousands of names where each expert stands there by itself, a few patterns: those are tried one by one.
        names = {name[max(0, name.find("layers.")) :] for name in listed if re.fullmatch(r"[\w.]+", name)}
        patterns = [_pattern(name) for name in listed if not re.fullmatch(r"[\w.]+", name)]
    return lambda module: (
        not names.isdisjoint(_paths(module)) or any(pattern.search(module) for pattern in patterns)
    )


def _pattern(listed: str) -> re.Pattern[str]:
    """Of compressed-tensors, which begin with "re:", from a name's start; all others name whole parts of a name."""
    if listed.startswith("re:"):
        return re.compile(rf"\A(?:{listed[3:]})")
    return re.compile(rf"(?:^|\.)(?:{listed})(?:\.|$)")


def _paths(module: str) -> set[str]:
    """All runs of the parts of a dotted name: a module is listed by its own name, an outer one's, or an end of it."""
    parts = module.split(".")
    return {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}


@_well_formed()
def groups_of(config: Mapping[str, Any]) -> tuple[Group, ...]:
    """The ways in which a checkpoint with this `quantization_config` is written: one, or one for each config group.

    Raises:
        UnsupportedExperts: one of them is not read here, with the reason.
    """
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
            return _gptq(config)
    raise UnsupportedExperts(f"quant_method {method!r} is not one of {SERVED}")


def _fp8(config: Mapping[str, Any]) -> Published:
    _require(config, expert_dtype=("fp8", "fp4", None))
    return FinegrainedFp8(_block_of(config.get("weight_block_size")), _said(config, "expert_dtype") == "fp4")


def _gptq(config: Mapping[str, Any]) -> tuple[Group, ...]:
    _require(config, bits=(4,), desc_act=(False, None), is_marlin_format=(False, None))
    # By the second name in the tool's own quantize_config.json.
    formats = ("gptq", "gptq_v2", None)
    _require(config, checkpoint_format=formats, format=formats, pack_dtype=("int32", None))
    rules: Mapping[str, Any] = config.get("dynamic") or {}  # of single modules, by patterns of names
    for rule in rules.values():
        _require(rule, bits=(4, None), desc_act=(False, None))
    is_second = "gptq_v2" in (_said(config, "checkpoint_format"), _said(config, "format"))
    offset, said = 0 if is_second else 1, _group_of(config)
    own = {pattern.removeprefix("+:"): rule for pattern, rule in rules.items() if "group_size" in rule}
    if not own:
        return (Group(Gptq(said, offset)),)
    # Names may have changed since the rules were written: the number of scales decides which one holds.
    return (
        Group(Gptq(None, offset, said)),
        *(
            Group(Gptq(None, offset, _group_of(rule)), (_target(f"re:{pattern}"),))
            for pattern, rule in own.items()
        ),
    )


def _compressed(config: Mapping[str, Any]) -> tuple[Group, ...]:
    if (config.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        raise UnsupportedExperts("compressed-tensors with sparse weights is not served")
    _require_untransformed(config.get("transform_config") or {})
    groups = list((config.get("config_groups") or {}).values()) or [{}]
    if strange := [group for group in groups if not isinstance(group, Mapping)]:
        raise UnsupportedExperts(f"compressed-tensors with a config group {strange[0]!r} is not served")
    # Of activations alone, weights are plain.
    groups = [group for group in groups if group.get("weights") and group.get("format") != "dense"] or groups
    return tuple(
        Group(
            _compressed_as(str(group.get("format") or config.get("format")), group.get("weights") or {}),
            tuple(_target(target) for target in group.get("targets") or ()),
        )
        for group in groups
    )


def _require_untransformed(config: Mapping[str, Any]) -> None:
    """Refuse weights that are right only with what the tool does to activations beside them (QuIP, SpinQuant's R4).

    Those "weight_input" and "weight_output" are in the weights already, and queries and keys that are both turned have
    the same products.
    """
    for name, transform in (config.get("config_groups") or {}).items():
        for place in transform["apply"]:
            if _said(place, "location") in ("input", "output"):
                raise UnsupportedExperts(
                    f"compressed-tensors with a transform_config that turns activations ({name}, a "
                    f"{transform.get('type')} transform of {place['location']}s) is not served"
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
    if _said(args, "actorder") in (True, "group", "dynamic"):  # two words for one thing
        raise UnsupportedExperts(f"compressed-tensors with actorder={args['actorder']!r} is not served")
    is_symmetric = args.get("symmetric") is not False
    match format:
        case "pack-quantized":
            _require(args, num_bits=(4, 8), type=("int", None))
            return (PackQuantized if args["num_bits"] == 4 else PackQuantized8)(_group_of(args), is_symmetric)
        case "float-quantized" | "naive-quantized" if _said(args, "type") == "float":
            block = _block_of(args.get("block_structure"))
            if _said(args, "strategy") == "group":
                block = 1, int(args["group_size"])
            return BlockFp8("FP8 of compressed-tensors", block, "weight_scale")
        case "int-quantized" | "naive-quantized":
            _require(args, num_bits=(8, *range(1, 8)), type=("int", None))
            bits = int(args["num_bits"])
            if bits > 4:
                _require(args, symmetric=(True, None))
            return IntQuantized(_group_of(args), is_symmetric, bits)
        case "nvfp4-pack-quantized":
            return PackedNvfp4()
        case "mxfp4-pack-quantized":
            return PackedMxfp4()
        case "mxfp8-quantized":
            return BlockFp8("MXFP8 of compressed-tensors", (1, 32), "weight_scale", is_microscaled=True)
    raise UnsupportedExperts(f"compressed-tensors in the format {format!r} is not served")


def _block_of(said: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None if a configuration says nothing."""
    if said in (None, []):
        return None
    if isinstance(said, str):  # "128x128" of early versions
        said = said.split("x")
    rows, columns = (int(size) for size in said)
    if min(rows, columns) < 1:
        raise ValueError(f"blocks of {rows} x {columns}")
    return rows, columns


def _group_of(args: Mapping[str, Any]) -> int | None:
    """Weights that share a scale by a configuration, -1 for a row; None if it does not say."""
    if _said(args, "strategy") in ("channel", "tensor"):
        return -1
    group = args.get("group_size")
    return None if group is None else int(group)


def _said(config: Mapping[str, Any], key: str) -> Any:
    """What a configuration says; words in small letters, as the tools take "GPTQ_V2" and "gptq_v2" for one."""
    found = config.get(key)
    return found.lower() if isinstance(found, str) else found


def _require(config: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        if _said(config, key) not in values:
            raise UnsupportedExperts(f"{key}={config.get(key)!r} is not served, {key}={values[0]!r} is")
