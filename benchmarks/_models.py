"""Models of the benchmarks: a folder with trained weights, or a published shape with random ones (labelled so)."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from prescope.hf import MoELayer, find_moe_layers
from prescope.hf.packed.on_load import packed_on_load
from prescope.weights.formats import Format
from prescope.weights.layout import RowLayout


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
    "gpt-oss-20b": (GptOssForCausalLM, GptOssConfig),
    "gpt-oss-120b": (GptOssForCausalLM, GptOssConfig),
    "glm-4.5-air": (Glm4MoeForCausalLM, Glm4MoeConfig),
    "toy": (Qwen3MoeForCausalLM, Qwen3MoeConfig),
}
#: A few seconds on any machine: to try the scripts themselves.
TOY = {
    "vocab_size": 512, "hidden_size": 128, "dense_intermediate_size": 256, "moe_intermediate_size": 96,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True,
}  # fmt: skip
#: What transformers names as data/configs does.
SAME_NAME = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "num_experts_per_tok", "norm_topk_prob", "rms_norm_eps", "tie_word_embeddings",
]  # fmt: skip
#: What it names otherwise, by class: experts of a layer, width of an expert, and that of dense layers if there are any.
OTHER_NAMES: dict[type[PreTrainedConfig], tuple[str, str, str | None]] = {
    OlmoeConfig: ("num_experts", "intermediate_size", None),
    MixtralConfig: ("num_local_experts", "intermediate_size", None),
    GptOssConfig: ("num_local_experts", "intermediate_size", None),
    Qwen3MoeConfig: ("num_experts", "moe_intermediate_size", "intermediate_size"),
    Glm4MoeConfig: ("n_routed_experts", "moe_intermediate_size", "intermediate_size"),
}


def shape_of(name: str) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Class and configuration of "qwen3-30b-a3b", or of "qwen3-30b-a3b-cut16" with its first 16 layers only."""
    base, _, layers = name.partition("~")[0].partition("-cut")
    facts = TOY if base == "toy" else json.loads((CONFIGS / f"{base}.json").read_text())
    values = {key: facts[key] for key in SAME_NAME if key in facts}
    if layers:
        values["num_hidden_layers"] = int(layers)
    model, config = FAMILIES[base]
    experts, width, dense = OTHER_NAMES[config]
    values |= {experts: facts["num_experts"], width: facts["moe_intermediate_size"]}
    if dense is not None:
        values[dense] = facts["dense_intermediate_size"]
    if config is GptOssConfig:
        values["sliding_window"] = facts["sliding_window"]
    if (
        config is Glm4MoeConfig
    ):  # a dense first layer, a shared expert; what is not in the file are its class's defaults
        values |= {
            "n_shared_experts": facts["num_shared_experts"],
            "first_k_dense_replace": facts["first_dense_layers"],
            "attention_bias": True,
        }
    return model, config(**values)


def is_shape(name: str) -> bool:
    """Whether a name is that of a published shape, "qwen3-30b-a3b-cut16" say, and not a folder."""
    return name.partition("~")[0].partition("-cut")[0] in FAMILIES


def open_model(name: str, device: torch.device, dtype: torch.dtype) -> BenchModel:
    """A shape by name, or a folder with trained weights."""
    if is_shape(name):
        return BenchModel(name, "random", "", _random_model(name, device, dtype))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device).eval()
    model.generation_config.eos_token_id = None  # all runs have the same length
    return BenchModel(name.rstrip("/").rsplit("/", 1)[-1], "trained", name, model)


def open_shape(name: str, device: torch.device, dtype: torch.dtype, num_experts: int) -> PreTrainedModel:
    """A shape by name with random weights, with so many experts in each layer."""
    return _random_model(name, device, dtype, num_experts=num_experts)


class RowModel(NamedTuple):
    """A published shape whose experts are nowhere but in host rows, to be given to `Engine`."""

    model: PreTrainedModel
    layers: list[MoELayer]
    packing: str


@torch.no_grad()
def open_in_rows(name: str, form: str, device: torch.device, dtype: torch.dtype) -> RowModel:
    """A shape by name with random weights; its experts are made in memory, in `form` or in `dtype` ("bf16").

    All layers have the same experts, so that rows take the time of a copy: routers and the rest differ by layer.
    """
    model = _random_model(name, device, dtype, with_experts=False)
    layers = find_moe_layers(model)
    if form != "bf16":
        layers = packed_on_load(layers, form)
    made: dict[RowLayout, dict[str, torch.Tensor]] = {}

    def read(layer: MoELayer) -> Callable[[], dict[str, torch.Tensor]]:
        return lambda: made.setdefault(layer.layout, {}) or _fill_in(made[layer.layout], layer, device)

    packing = "" if form == "bf16" else f"experts are random bytes, read as {form}"
    return RowModel(model, [replace(layer, read_fields=read(layer)) for layer in layers], packing)


def _fill_in(
    fields: dict[str, torch.Tensor], layer: MoELayer, device: torch.device
) -> dict[str, torch.Tensor]:
    made = random_fields(layer.layout, layer.num_experts, device)
    fields |= {name: tensor.cpu() for name, tensor in made.items()}
    return fields


@torch.no_grad()
def random_fields(layout: RowLayout, num: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Fields (num, ...) of random experts: any bytes as packed weights, with a spread of one over the root of a row."""
    fields = {}
    packed = () if layout.packing is None else layout.packing.matrices
    for matrix in packed:
        parts = _random_parts(matrix.format, num, matrix.shape, device)
        fields |= {field: parts[suffix] for suffix, field in matrix.field_names.items()}
    for field in layout.fields:
        if field.name not in fields:
            spread = field.shape[-1] ** -0.5 if len(field.shape) > 1 else 0.1
            fields[field.name] = torch.empty((num, *field.shape), dtype=field.dtype, device=device).normal_(
                0.0, spread
            )
    return fields


def _random_parts(
    format: Format, num: int, shape: tuple[int, int], device: torch.device
) -> dict[str, torch.Tensor]:
    parts: dict[str, torch.Tensor] = {}
    for part in format.parts(shape):
        where = (num, *part.shape)
        if part.suffix == "_zero":
            parts[part.suffix] = torch.randint(6, 11, where, dtype=torch.uint8, device=device)
        elif part.suffix == "_scale" and part.dtype == torch.uint8:
            parts[part.suffix] = torch.full(where, 127, dtype=torch.uint8, device=device)
        elif part.suffix:
            parts[part.suffix] = torch.empty(where, device=device).uniform_(0.5, 1.5).to(part.dtype)
        else:
            codes = torch.randint(0, 256, where, dtype=torch.uint8, device=device)
            if part.dtype == torch.float8_e4m3fn:
                codes &= 0xB7  # at most 1.9: no pattern that is no number
            parts[part.suffix] = codes.view(part.dtype)
    spread = format.unpack({suffix: part[0] for suffix, part in parts.items()}, shape).std()
    more = shape[1] ** -0.5 / float(spread)
    suffix = "_global" if "_global" in parts else "_scale"
    scale = parts[suffix]
    parts[suffix] = (
        scale + round(math.log2(more))
        if scale.dtype == torch.uint8
        else (scale.float() * more).to(scale.dtype)
    )
    return parts


@torch.no_grad()
def _random_model(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    with_experts: bool = True,
    num_experts: int | None = None,
) -> PreTrainedModel:
    """Random weights with enough entropy: greedy decoding would otherwise fall into a loop of one token, in which
    any cache looks perfect. Unit embeddings, and attention outputs halved so that they do not drown the token; a name
    that ends in "~0.65" scales them by that instead: the more of them, the more alike is the routing of neighbours.

    num_experts: instead of the shape's own.
    """
    scale = float(name.partition("~")[2] or 0.5)
    cls, config = shape_of(name)
    if num_experts is not None:
        setattr(config, OTHER_NAMES[type(config)][0], num_experts)
    config.eos_token_id = config.pad_token_id = config.bos_token_id = None
    with torch.device("meta"):
        model = cls._from_config(config, dtype=dtype)
    if not with_experts:  # one number stands for each weight; nothing reads it
        for layer in find_moe_layers(model):
            for weight, parameter in layer.tensors().items():
                one = torch.zeros(1, dtype=dtype).expand(parameter.shape)
                layer.module._parameters[weight] = torch.nn.Parameter(one, requires_grad=False)
    _to_empty(model, device)
    model.eval()
    generator = torch.Generator(device).manual_seed(0)
    for key, parameter in model.named_parameters():
        if parameter.stride(-1) == 0:
            continue
        if key.endswith("norm.weight"):
            parameter.fill_(1.0)
        elif "embed_tokens" in key:
            parameter.normal_(0.0, 1.0, generator=generator)
        else:
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            if key.endswith("o_proj.weight"):
                parameter.mul_(scale)
    for key in model.state_dict().keys() & dict(model.named_buffers()).keys():
        model.get_buffer(key).zero_()  # a router's correction of its scores
    with device:  # its buffers are computed, not loaded, and memory alone was taken for them
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def _to_empty(model: PreTrainedModel, device: torch.device) -> None:
    """Memory for all that is on meta."""
    for module in model.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_meta:
                empty = torch.empty_like(tensor, device=device)
                is_weight = isinstance(tensor, torch.nn.Parameter)
                setattr(module, name, torch.nn.Parameter(empty, tensor.requires_grad) if is_weight else empty)
