"""What a model needs: bytes of its experts, of everything else, and of a token's keys and values.

From a `config.json` alone, no weights. A family that transformers knows is counted on its own model, built without
memory, as `load` would build it; of any other, and of a bare list of numbers, it is arithmetic. Where a config says
nothing of a part, that is left out and `notes` says so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from ..core.paths import EMBEDDED_MODEL, data_dir, embedded_model, user_path
from ..core.types import ExpertSize, MoEShape
from ..engine import Engine
from ..errors import BadModelFolder, NotAMoE, PrescopeError, UnsupportedExperts
from ..hf import Outline, formats_said, outline_of, outline_of_config
from ..weights.formats import PACKED, Format, Fp8, format_for, lossy_name
from ..weights.layout import PackedMatrix, packed_layout

#: Names of one number in different families, the first one there counts.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk", "moe_k")
EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
#: What attention's sizes go by.
ATTENTION = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "kv_lora_rank", "q_lora_rank", "qk_rope_head_dim",
    "qk_nope_head_dim", "v_head_dim",
)  # fmt: skip
#: Kinds of layers that keep no keys and values of each token.
KEEP_NOTHING = {"linear_attention", "mamba", "mamba2", "conv", "moe", "mlp", "recurrent"}
AT_BYTES = "packed experts are counted as computed in the time of their bytes"
BITS = {"float32": 32.0, "bfloat16": 16.0, "float16": 16.0, "float8_e4m3fn": 8.0}


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """A model's sizes.

    Attributes:
        shape: MoE layers, experts, top-k and bytes of one expert.
        expert: the same expert's bytes with its widths.
        dense_bytes: everything that is no routed expert: embeddings, attention, routers, shared experts, dense layers.
        kv_token_bytes: keys and values of one token of one sequence, all layers.
        layer_bytes: of `dense_bytes`, what one MoE layer reads in a step.
        notes: what was left out or assumed.
    """

    name: str
    shape: MoEShape
    expert: ExpertSize
    dense_bytes: int
    kv_token_bytes: int
    layer_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def experts_bytes(self) -> int:
        """All routed experts."""
        return self.shape.total_experts * self.shape.row_bytes

    @classmethod
    def of(cls, model: str | Path | Mapping[str, Any], experts: str = "auto") -> "ModelSize":
        """Sizes of a folder, a file, a hub id that was downloaded before, a shape in `data/configs`, or a dict.

        Args:
            experts: as `load` takes it: "auto", or the format that experts are packed to.

        Raises:
            BadModelFolder: there is no such config here.
            NotAMoE, UnsupportedExperts: it has no routed experts, or some that `load` would not serve.
            UnsupportedOption: of `experts`.
        """
        if isinstance(model, Mapping):
            return cls.of_config(dict(model), str(model.get("_name_or_path") or "config"), experts)
        path = config_file(model)
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadModelFolder(f"{path} is no readable config ({error})") from error
        if not isinstance(facts, dict):
            raise BadModelFolder(f"{path} holds no JSON object")
        names = (facts.get("model"), facts.get("_name_or_path"))  # of a tokenizer.json, "model" is a dict
        name = next((one for one in names if isinstance(one, str) and one), str(model))
        return cls.of_config(facts, name, experts)

    @classmethod
    def of_config(cls, facts: Mapping[str, Any], name: str, experts: str = "auto") -> "ModelSize":
        """Sizes by the numbers of a config; raises as `of`."""
        notes: list[str] = []
        bits = _bits(facts, notes)
        outline = outline_of_config(name, facts, torch.float32 if bits == 32.0 else torch.bfloat16)
        if outline is not None:
            return _marked(_counted(outline, facts, name, bits, experts, notes), experts)
        if facts.get("model_type"):
            notes.append(
                f"the installed transformers knows no {facts['model_type']!r}: sizes are arithmetic on the config's "
                f"numbers, and prescope.load may refuse the model"
            )
        facts = {**facts, **(facts.get("text_config") or {})}
        try:
            return _marked(_reckoned(facts, name, bits, experts, notes), experts)
        except PrescopeError:  # some are ValueErrors too
            raise
        except KeyError as error:
            raise BadModelFolder(
                f"{name}: its config has no {error.args[0]}; give the whole of it"
            ) from error
        except (TypeError, ValueError) as error:
            raise BadModelFolder(f"{name}: a number of its config cannot be used ({error})") from error

    @classmethod
    def of_engine(cls, engine: Engine) -> "ModelSize":
        """Sizes of a model that runs."""
        notes: list[str] = []
        outline = outline_of(engine.model, engine.layers)
        bits = BITS.get(str(engine.hardware()["dtype"]), 16.0)
        name = lossy_name(engine.name, engine.form) if engine.is_lossy else engine.name
        size = _counted(outline, {}, name, bits, "plain", notes)
        if engine.form:
            notes += [engine.reasons["experts"], AT_BYTES]
        return replace(size, shape=engine.shape, expert=engine.expert_size, notes=tuple(notes))


def _marked(size: ModelSize, experts: str) -> ModelSize:
    """The size, named by what packing would do to the model."""
    return replace(size, name=lossy_name(size.name, experts)) if experts in PACKED else size


def _counted(
    outline: Outline, facts: Mapping[str, Any], name: str, bits: float, experts: str, notes: list[str]
) -> ModelSize:
    """Sizes as transformers builds the model; attention by the configuration, with its defaults."""
    text = outline.config.get_text_config(decoder=True)
    written = text.to_dict()  # by the family's own names
    known = {field: _first(written, (text.attribute_map.get(field, field),)) for field in ATTENTION}
    largest = max(outline.layers, key=lambda layer: layer.layout.row_bytes)
    _, width, inner = largest.expert_size
    parts = _Parts(largest.matrix_shapes, largest.bias_shapes, largest.layout.dtype(largest.spec.up))
    rows = _packed_bytes(
        _packing(facts), parts, [layer.decoder_layer for layer in outline.layers], experts, notes
    )
    nbytes = rows or int(largest.layout.row_bytes * min(1.0, bits / 16))  # float8 is counted on bfloat16
    layers = int(text.num_hidden_layers)
    kinds = written.get("layer_types") or getattr(text, "layers_block_type", None)
    keeping = layers if not kinds else sum(str(kind) not in KEEP_NOTHING for kind in kinds)
    if any("sliding" in str(kind) for kind in kinds or ()):
        notes.append("layers with a sliding window are counted with keys and values of the whole context")
    if keeping < layers:
        notes.append(
            f"{keeping} of {layers} layers keep keys and values; the states of the others are left out"
        )
    _, kv = _attention(known, width)
    return ModelSize(
        name=name,
        shape=MoEShape(len(outline.layers), largest.num_experts, outline.top_k, nbytes),
        expert=ExpertSize(nbytes, width, inner),
        dense_bytes=int(outline.dense * bits / 8),
        kv_token_bytes=int(keeping * kv * _kv_bytes(bits)),
        layer_bytes=int(outline.dense_of_layer * bits / 8),
        notes=tuple(notes),
    )


def _reckoned(facts: Mapping[str, Any], name: str, bits: float, experts: str, notes: list[str]) -> ModelSize:
    """Sizes by arithmetic on a config's numbers; norms and biases are left out."""
    num_experts, top_k = _first(facts, EXPERTS), _first(facts, TOP_K)
    if not num_experts or not top_k:
        raise NotAMoE(
            f"{name}: its config names no routed experts ({', '.join(EXPERTS)}, {', '.join(TOP_K)})"
        )
    width, inner = int(facts["hidden_size"]), int(_first(facts, EXPERT_WIDTH) or 0)
    if not inner:
        raise KeyError(EXPERT_WIDTH[0])
    layers = int(facts["num_hidden_layers"])
    moe = _moe_layers(facts, layers)
    native = (facts.get("derived") or {}).get("native_bits_per_weight")
    expert_bits = bits if native is None else float(native)
    parts = _Parts({"gate_up": (2 * inner, width), "down": (width, inner)}, {}, torch.bfloat16)
    rows = _packed_bytes(_packing(facts), parts, [layers - 1], experts, notes)
    nbytes = rows or int(3 * width * inner * expert_bits / 8)
    attention, kv = _attention(facts, width)
    every = facts.get("full_attention_interval")
    if every:
        notes.append(
            f"only every {every}th layer keeps keys and values; the states of the others are left out"
        )
        kv = kv // int(every)
    shared = _shared_width(facts)
    embeddings = (1 if facts.get("tie_word_embeddings") else 2) * int(facts["vocab_size"]) * width
    layer = attention + num_experts * width + 3 * width * shared
    dense_inner = int(facts.get("dense_intermediate_size") or facts.get("intermediate_size") or 0)
    dense = embeddings + moe * layer + (layers - moe) * (attention + 3 * width * dense_inner)
    return ModelSize(
        name=name,
        shape=MoEShape(moe, num_experts, top_k, nbytes),
        expert=ExpertSize(nbytes, width, inner),
        dense_bytes=int(dense * bits / 8),
        kv_token_bytes=int(layers * kv * _kv_bytes(bits)),
        layer_bytes=int(layer * bits / 8),
        notes=tuple(notes),
    )


def config_file(model: str | Path) -> Path:
    """Where a model's config lies.

    Raises:
        BadModelFolder: nowhere here.
    """
    if not isinstance(model, str | Path):
        raise BadModelFolder(
            f"model is {model!r:.80}; give a folder, a hub id, a config as a dict, or an engine"
        )
    given = user_path(model)
    for path in (given / "config.json", given, data_dir() / "configs" / f"{model}.json"):
        if path.is_file():
            return path
    if str(model) == EMBEDDED_MODEL:
        return embedded_model() / "config.json"
    try:
        cached = try_to_load_from_cache(str(model), "config.json")
    except HFValidationError:  # no name a hub could have
        cached = None
    if isinstance(cached, str):
        return Path(cached)
    shapes = ", ".join(sorted(path.stem for path in (data_dir() / "configs").glob("*.json")))
    raise BadModelFolder(
        f"there is no config of {str(model)!r} here: give a folder with a config.json, a hub id that was downloaded "
        f"before, or one of {shapes}"
    )


def _first(facts: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """The first of these fields that is there; of a list, one for each layer, the largest."""
    found = next((facts[name] for name in names if facts.get(name)), None)
    return None if found is None else int(max(found)) if isinstance(found, list | tuple) else int(found)


def _moe_layers(facts: Mapping[str, Any], layers: int) -> int:
    listed, often = facts.get("moe_layers"), facts.get("moe_layer_freq")
    if listed is not None:
        return len(listed) if isinstance(listed, list | tuple) else int(listed)
    if isinstance(often, list | tuple):  # 0 or 1 for each layer
        return sum(map(bool, often)) or layers
    first = int(facts.get("first_k_dense_replace") or 0)
    step = int(facts.get("decoder_sparse_step") or often or 1)
    dense = set(facts.get("mlp_only_layers") or ())
    return sum(i >= first and (i + 1) % step == 0 and i not in dense for i in range(layers)) or layers


def _bits(facts: Mapping[str, Any], notes: list[str]) -> float:
    """Bits of a weight that is not packed."""
    inner = facts.get("text_config") or {}
    found = [part.get(key) for part in (facts, inner) for key in ("dtype", "torch_dtype")]
    dtype = next((str(name).removeprefix("torch.") for name in found if name), "")
    if dtype not in BITS and not (facts.get("derived") or {}).get("native_bits_per_weight"):
        notes.append(f"the config names {dtype or 'no dtype'}: bfloat16 is assumed")
    return BITS.get(dtype, 16.0)


def _kv_bytes(bits: float) -> float:
    """Of one number of keys and values: of the weights' dtype, but never packed."""
    return max(16.0, bits) / 8


def _packing(facts: Mapping[str, Any]) -> Any:
    said = facts.get("quantization_config") or (facts.get("text_config") or {}).get("quantization_config")
    if isinstance(said, Mapping) and "expert_dtype" in facts:  # beside it in DeepSeek-V4's
        return {"expert_dtype": facts["expert_dtype"], **said}
    return said


class _Parts(NamedTuple):
    """What one expert is made of."""

    matrices: Mapping[str, tuple[int, int]]  # (N, K) by name
    biases: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype  # of what is not packed


def _packed_bytes(
    said: Any, parts: _Parts, layers: Sequence[int], experts: str, notes: list[str]
) -> int | None:
    """Bytes of one expert's row where experts are packed, by the checkpoint or while it is loaded; else None.

    Args:
        said: the `quantization_config`. layers: decoder layers with experts.
    """
    columns = {name: shape[1] for name, shape in parts.matrices.items()}
    if experts not in ("auto", "plain"):
        found = [dict.fromkeys(columns, format_for(experts, *columns.values()))]
        notes.append(f"experts are packed to {experts} while they are loaded, which is lossy")
    elif said and experts == "auto":
        try:
            of_layers = formats_said(said, columns, layers)
        except UnsupportedExperts as error:
            notes.append(f"{error}: experts are counted as if they were not packed")
            return None
        found = [_aligned(formats, parts) for formats in of_layers if formats is not None]
        if num_plain := len(of_layers) - len(found):
            notes.append(
                f"the checkpoint leaves the experts of {num_plain} of {len(of_layers)} layers as they are, and a slot "
                f"has room for any of them: none is counted as packed"
            )
            return None
    else:
        return None
    notes.append(AT_BYTES)
    return max(_row_bytes(parts, formats) for formats in found)


def _aligned(formats: Mapping[str, Format], parts: _Parts) -> dict[str, Format]:
    """The formats of a row in which gate and up, which files mostly have apart, lie one behind the other."""
    halves = {name: rows // 2 for name, (rows, _) in parts.matrices.items() if name.startswith("gate_up")}
    return {
        name: format.aligned(halves[name]) if isinstance(format, Fp8) and name in halves else format
        for name, format in formats.items()
    }


def _row_bytes(parts: _Parts, formats: Mapping[str, Format]) -> int:
    matrices = [PackedMatrix(name, formats[name], shape) for name, shape in parts.matrices.items()]
    return packed_layout(matrices, parts.dtype, parts.biases).row_bytes


def _attention(facts: Mapping[str, Any], width: int) -> tuple[int, int]:
    """Weights of one layer's attention, and numbers of keys and values for one token."""
    heads = int(facts["num_attention_heads"])
    if facts.get("kv_lora_rank"):
        rank, rope = int(facts["kv_lora_rank"]), int(facts.get("qk_rope_head_dim") or 64)
        nope, value = int(facts.get("qk_nope_head_dim") or 128), int(facts.get("v_head_dim") or 128)
        query = int(facts.get("q_lora_rank") or 0)
        q = query * (width + heads * (nope + rope)) if query else width * heads * (nope + rope)
        weights = q + width * (rank + rope) + rank * heads * (nope + value) + heads * value * width
        return weights, rank + rope  # kept compressed, once for all heads (transformers 5.23)
    head = int(facts.get("head_dim") or width // heads)
    kv_heads = int(facts.get("num_key_value_heads") or heads)
    weights = 2 * width * heads * head + 2 * width * kv_heads * head
    return weights, kv_heads * (head + int(facts.get("v_head_dim") or head))


def _shared_width(facts: Mapping[str, Any]) -> int:
    if facts.get("shared_intermediate_size"):
        return int(facts["shared_intermediate_size"])
    if facts.get("shared_expert_intermediate_size"):
        return int(facts["shared_expert_intermediate_size"])
    inner = int(facts.get("moe_intermediate_size") or 0)
    return int(facts.get("n_shared_experts") or facts.get("num_shared_experts") or 0) * inner
