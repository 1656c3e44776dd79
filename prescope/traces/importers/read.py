"""The door to traces of every kind: `read_trace`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ...core.files import require_file
from ...core.numbers import is_count
from ...core.paths import user_path
from ...core.types import MoEShape
from ...errors import BadTrace, UnsupportedOption
from ..routing import FORMAT, MOST_EXPERTS, RoutingTrace
from .llama_cpp import read_moe_trace
from .megatron import is_router_trace, read_router_trace
from .requests import Foreign, trace_of_requests
from .responses import RequestOutput, responses_in, sglang_requests, vllm_requests
from .tensors import array_requests, read_arrays_file, read_layers, to_array

Shape = MoEShape | tuple[int, int, int]


class _Wanted(NamedTuple):
    """A call of `read_trace`."""

    source: Any  # a path is a `Path`
    foreign: Foreign
    prompt_tokens: int | list[int] | None
    batch: int | None

    @property
    def where(self) -> str:
        return str(self.source) if isinstance(self.source, Path) else f"this {self.foreign.kind} trace"

    @property
    def path(self) -> Path:
        """Of kinds that are files.

        Raises:
            BadTrace: something else was given.
        """
        if not isinstance(self.source, Path):
            raise BadTrace(
                f"kind={self.foreign.kind!r} is a file or a folder, not a {type(self.source).__name__}"
            )
        return self.source


def read_trace(
    source: Any,
    kind: str | None = None,
    *,
    shape: Shape | None = None,
    layers: Sequence[int] | None = None,
    prompt_tokens: int | Sequence[int] | None = None,
    batch: int | None = None,
    model: str = "",
) -> RoutingTrace:
    """Read routing: prescope's own files, and what other programs recorded.

    A foreign trace is simulated and swept like one's own, and with router inputs it trains LLaPor
    (`prescope.training.train_on_trace`), all without the model. Its fingerprint is that of no engine. Who knows that
    an engine has the very model that was traced says so: `dataclasses.replace(trace, fingerprint=engine.fingerprint)`.

    Args:
        source: a file or folder, arrays (numpy or torch: ids (tokens, layers, top-k), or several such), or what a
            server returned: one answer or a list of them.
        kind: one of `KINDS`: "prescope", "vllm", "sglang", "llama.cpp", "megatron", "tensors" (safetensors by layer) or
            "array"; None: told by names and contents.
        shape: layers, experts and top-k of the model, or `engine.shape`; of all kinds but prescope's own: how many
            experts a layer has does not stand in any. Of prescope's own it has to be the trace's. Layers are those of
            the source.
        layers: numbers of the MoE layers, where the source has others too: vLLM's and SGLang's arrays have rows for
            dense layers.
        prompt_tokens: of each request, or of all, of arrays and safetensors; they were read in one pass, all other
            tokens one by one. None: each token counts as decoded.
        batch: requests that ran side by side; None: all of them together. Of "megatron" the sequences decoded together.
        model: name, for people.

    Raises:
        BadTrace: it cannot be read, or holds what no router gives; with file and line, or token and layer.
        UnsupportedOption: an unknown kind, a shape that is missing or cannot be, or numbers that are none.
        FileNotFoundError: there is no such file.
    """
    source = user_path(source) if isinstance(source, str | Path) else source
    if isinstance(source, Path) and not source.exists():
        raise FileNotFoundError(f"there is no trace at {source}")
    kind = kind or _kind_of(source)
    if kind not in KINDS:
        raise UnsupportedOption(f"kind is {kind!r}; choose one of {', '.join(map(repr, KINDS))}")
    if kind == "prescope":
        trace = _read_own(source)
        if shape is not None and (told := _shape_of(shape, kind)[:3]) != trace.shape[:3]:
            raise BadTrace(
                f"{source} is of (layers, experts, top-k) = {trace.shape[:3]}, shape says {told}; leave shape out, or "
                f"give the trace that is meant"
            )
        return trace
    name = model or (source.stem if isinstance(source, Path) else kind)
    kept = None if layers is None else _counts_of(layers, "layers")
    if isinstance(kept, int) or (kept is not None and sorted(set(kept)) != kept):
        raise UnsupportedOption(f"layers={layers!r} are not ascending numbers of layers")
    if batch is not None and (not is_count(batch) or batch < 1):
        raise UnsupportedOption(f"batch is {batch!r}; it counts requests that run side by side, 1 or more")
    counts = None if prompt_tokens is None else _counts_of(prompt_tokens, "prompt_tokens")
    foreign = Foreign(kind, name, _shape_of(shape, kind), kept)
    return KINDS[kind](_Wanted(source, foreign, counts, None if batch is None else int(batch)))


def _counts_of(value: Any, what: str) -> int | list[int]:
    """One whole number or several, of Python, numpy or torch.

    Raises:
        UnsupportedOption: it is something else.
    """
    try:
        array = to_array(value, what)
    except BadTrace as error:
        raise UnsupportedOption(f"{what} is {value!r}; give whole numbers") from error
    if array.ndim > 1 or (array.size and array.dtype.kind not in "iu"):
        raise UnsupportedOption(f"{what} is {value!r}; give whole numbers")
    found: int | list[int] = array.astype(np.int64).tolist()
    return found


def _shape_of(shape: Shape | None, kind: str) -> MoEShape:
    if shape is None:
        raise UnsupportedOption(
            f"a trace of kind {kind!r} does not say how many experts a layer has; give shape=(layers, experts, top_k)"
        )
    sizes = _counts_of(shape, "shape")
    if (
        not isinstance(sizes, list)
        or len(sizes) < 3
        or not 0 < sizes[2] <= sizes[1] <= MOST_EXPERTS
        or sizes[0] < 1
    ):
        raise UnsupportedOption(f"shape is {shape!r}; it is (layers, experts, top_k), with top_k <= experts")
    return MoEShape(*sizes[:3])


def _kind_of(source: Any) -> str:
    """What a source is, by its name and its first bytes.

    Raises:
        UnsupportedOption: nobody can tell.
    """
    if isinstance(source, Path):
        return _kind_of_path(source)
    first = source[0] if isinstance(source, list | tuple) and source else source
    if isinstance(first, RequestOutput):
        return "vllm"
    if isinstance(first, Mapping) and not {"expert_ids", "selected_experts", "topk_ids"} & first.keys():
        return _kind_of_response(first)
    return "array"


def _kind_of_path(path: Path) -> str:
    if is_router_trace(path):
        return "megatron"
    if path.is_dir():
        return "tensors"
    by_suffix = {".parquet": "prescope", ".npy": "array", ".npz": "array", ".csv": "llama.cpp"}
    if path.suffix == ".safetensors":
        return "prescope" if _is_own(path) else "tensors"
    if path.suffix in (".json", ".jsonl"):
        first = responses_in(path)[:1]
        if first and "top_indices" in first[0]:
            return "megatron"
        return _kind_of_response(first[0] if first else {})
    if path.suffix not in by_suffix:
        raise UnsupportedOption(
            f"{path}: its name does not say what it is; give kind=, one of {', '.join(KINDS)}"
        )
    return by_suffix[path.suffix]


def _kind_of_response(response: Mapping[str, Any]) -> str:
    if {"meta_info", "sglext", "sgl_ext"} & response.keys():
        return "sglang"
    choices = response.get("choices")
    if not isinstance(choices, list):
        raise UnsupportedOption(f"nobody can tell what this is; give kind=, one of {', '.join(KINDS)}")
    has_ext = any(isinstance(one, Mapping) and {"sglext", "sgl_ext"} & one.keys() for one in choices)
    return "sglang" if has_ext else "vllm"


def _is_own(path: Path) -> bool:
    require_file(path, BadTrace)
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except (SafetensorError, OSError) as error:
        raise BadTrace(
            f"{path} cannot be read as safetensors, it is truncated or another file: {error}"
        ) from error


def _read_own(source: Any) -> RoutingTrace:
    if not isinstance(source, Path):
        raise BadTrace(f"kind='prescope' is a file, not a {type(source).__name__}")
    return RoutingTrace.load_parquet(source) if source.suffix == ".parquet" else RoutingTrace.load(source)


def _responses(wanted: _Wanted) -> list[Any]:
    source = wanted.source
    if isinstance(source, Path):
        return list(responses_in(source))
    found = list(source) if isinstance(source, list | tuple) else [source]
    for number, one in enumerate(found):
        if not isinstance(one, Mapping | RequestOutput):
            raise BadTrace(f"request {number} is a {type(one).__name__}, expected what the server returned")
    return found


def _vllm(wanted: _Wanted) -> RoutingTrace:
    requests = list(vllm_requests(_responses(wanted), wanted.where))
    return trace_of_requests(requests, wanted.foreign, wanted.batch)


def _sglang(wanted: _Wanted) -> RoutingTrace:
    found = list(sglang_requests(_responses(wanted), wanted.foreign, wanted.where))
    named = [layers for _, layers in found if layers is not None]
    foreign = wanted.foreign
    if foreign.layers is None and named:
        if any(layers != named[0] for layers in named):
            raise BadTrace(f"{wanted.where}: answers name different MoE layers; they are of different models")
        foreign = foreign._replace(layers=named[0])
    return trace_of_requests([request for request, _ in found], foreign, wanted.batch)


def _arrays(wanted: _Wanted) -> RoutingTrace:
    source = wanted.source
    arrays = read_arrays_file(source) if isinstance(source, Path) else source
    requests = list(array_requests(arrays, wanted.prompt_tokens, wanted.where))
    return trace_of_requests(requests, wanted.foreign, wanted.batch)


def _tensors(wanted: _Wanted) -> RoutingTrace:
    requests, found = read_layers(wanted.path, wanted.prompt_tokens, wanted.foreign.layers)
    if len(found) != wanted.foreign.shape.num_layers and wanted.foreign.layers is None:
        raise BadTrace(
            f"{wanted.where} holds {len(found)} layers, shape names {wanted.foreign.shape.num_layers}; correct shape"
        )
    shape = wanted.foreign.shape._replace(num_layers=len(found))
    trace = trace_of_requests(requests, wanted.foreign._replace(shape=shape, layers=None), wanted.batch)
    return replace(trace, decoder_layers=found)


KINDS: dict[str, Callable[[_Wanted], RoutingTrace]] = {
    "prescope": lambda wanted: _read_own(wanted.source),
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": lambda wanted: read_moe_trace(wanted.path, wanted.foreign),
    "megatron": lambda wanted: read_router_trace(wanted.path, wanted.foreign, wanted.batch),
    "tensors": _tensors,
    "array": _arrays,
}
