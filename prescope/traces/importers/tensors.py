"""Plain arrays of expert ids, and safetensors by layer with the router inputs beside them.

Arrays: ids (tokens, layers, top-k) of one request, a list of such or a fourth axis in front for several; from numpy,
torch, or .npy and .npz files. With weights and router inputs as a mapping: expert_ids, weights, inputs.

Safetensors: no program is known to write routing by layer in one agreed form, so this is the form that is read: in one
file, or in the files of a folder, tensors called `<any prefix>.<layer>.<name>`, or `<name>` in a file whose own name
ends in the layer's number (layer_03.safetensors). Names: expert_ids (tokens, top-k), or selected_experts, topk_ids,
top_indices; weights (tokens, top-k) or topk_weights, routing_weights; hidden_states (tokens, width) or router_input,
inputs. Without a layer: sequence (tokens,), which text a token is of, and prompt_tokens (sequences,).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from ...core.files import require_file, require_memory
from ...errors import BadTrace
from .megatron import of_bfloat16
from .requests import Request, split_prompts
from .responses import NOT_NUMPY

NAMES = {
    "expert_ids": "ids", "selected_experts": "ids", "topk_ids": "ids", "top_indices": "ids", "weights": "weights",
    "topk_weights": "weights", "routing_weights": "weights", "hidden_states": "inputs", "router_input": "inputs",
    "inputs": "inputs",
}  # fmt: skip
DTYPES = {
    "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F16": "<f2",
    "F32": "<f4", "F64": "<f8",
}  # fmt: skip
# A name has underscores of its own, so what may stand before it ends in a point or a slash.
OF_LAYER = re.compile(rf"(?:.*?[._/-])?(?P<layer>[0-9]+)[._/](?:.*[./])?(?P<name>{'|'.join(NAMES)})")
LAYER_FILE = re.compile(r".*?(?P<layer>[0-9]+)")


@runtime_checkable
class Tensor(Protocol):
    """As far as a tensor of torch is looked at: nothing here imports torch."""

    def detach(self) -> "Tensor": ...

    def cpu(self) -> "Tensor": ...

    def float(self) -> "Tensor": ...


def to_array(value: Any, where: str) -> NDArray[Any]:
    """An array or a tensor of any device as numpy; bfloat16 becomes float32.

    Raises:
        BadTrace: it is no array of numbers.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if str(getattr(value, "dtype", "")) == "torch.bfloat16" else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadTrace(f"{where}: {type(value).__name__} is no array ({error})") from error
    if array.dtype.kind not in "iuf":
        raise BadTrace(f"{where}: an array of {array.dtype}, expected numbers")
    return array


def array_requests(source: Any, prompt_tokens: int | Sequence[int] | None, where: str) -> Iterator[Request]:
    """Requests of arrays, as in the module's text.

    Raises:
        BadTrace: it is none of these.
    """
    several = isinstance(source, list | tuple) and not all(isinstance(one, int | float) for one in source)
    if isinstance(source, Mapping):
        groups = [source]
    elif several:
        groups = [one if isinstance(one, Mapping) else {"expert_ids": one} for one in source]
    else:
        ids = to_array(source, where)
        groups = [{"expert_ids": part} for part in (ids if ids.ndim == 4 else [ids])]
    for number, (group, count) in enumerate(split_prompts(groups, prompt_tokens, where)):
        place = f"{where}, request {number}"
        arrays: dict[str, Any] = {
            NAMES[name]: to_array(value, f"{place}, {name}")
            for name, value in group.items()
            if name in NAMES and value is not None
        }
        if "ids" not in arrays:
            raise BadTrace(f"{place} holds {', '.join(map(str, group)) or 'nothing'}, but no expert_ids")
        yield Request(**arrays, num_prompt=count, where=place)


def read_arrays_file(path: Path) -> Any:
    """A .npy as an array, a .npz as a mapping of its arrays, or a list of them where none is called expert_ids.

    Raises:
        BadTrace: it is neither, or holds objects.
    """
    require_memory(require_file(path, BadTrace), str(path), BadTrace)
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            arrays = {name: found[name] for name in found.files}
    except NOT_NUMPY as error:
        raise BadTrace(f"{path} is no .npy or .npz of numbers ({error})") from error
    return arrays if NAMES.keys() & arrays.keys() else list(arrays.values())


def read_layers(
    path: Path, prompt_tokens: int | Sequence[int] | None, only: Sequence[int] | None
) -> tuple[list[Request], list[int]]:
    """Requests of safetensors by layer, and the layers that were found; `only` some of them.

    Raises:
        BadTrace: a file is damaged, a layer lacks its ids or has them twice, or layers disagree in their tokens.
    """
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    layers: dict[int, dict[str, NDArray[Any]]] = {}
    of_all: dict[str, NDArray[Any]] = {}
    for file in files:
        for name, array in _tensors(file):
            layer, part = _place_of(name, file)
            if part is not None and layer is not None:
                parts = layers.setdefault(layer, {})
                if part in parts:
                    raise BadTrace(
                        f"{file}: {name} is there beside other {part} of layer {layer}; leave one of them"
                    )
                parts[part] = array
            elif name in ("sequence", "prompt_tokens"):
                of_all[name] = array
    if only is not None:
        layers = {number: parts for number, parts in layers.items() if number in only}
    if not layers:
        raise BadTrace(f"{path} holds no tensor called <layer>.expert_ids or the like")
    numbers = sorted(layers)
    stacked: dict[str, NDArray[Any]] = {}
    for part in ("ids", "weights", "inputs"):
        having = [number for number in numbers if part in layers[number]]
        if part != "ids" and not having:
            continue
        if len(having) < len(numbers):
            raise BadTrace(f"{path}: layer {min(set(numbers) - set(having))} has no {part}, others have")
        shapes = {layers[number][part].shape for number in numbers}
        if len(shapes) > 1 or len(next(iter(shapes))) != 2:
            raise BadTrace(
                f"{path}: {part} of the layers have the shapes {sorted(shapes)}, expected one (tokens, n)"
            )
        stacked[part] = np.stack([layers[number][part] for number in numbers], axis=1)
    return list(_by_sequence(stacked, of_all, prompt_tokens, str(path))), numbers


def _by_sequence(
    stacked: Mapping[str, NDArray[Any]],
    of_all: Mapping[str, NDArray[Any]],
    prompt_tokens: int | Sequence[int] | None,
    where: str,
) -> Iterator[Request]:
    T = len(stacked["ids"])
    sequence = of_all.get("sequence", np.zeros(T, np.int64))
    if sequence.shape != (T,) or sequence.dtype.kind not in "iu":
        raise BadTrace(f"{where}: sequence has shape {sequence.shape}, expected whole numbers of ({T},)")
    numbers = np.unique(sequence)
    counts = (
        prompt_tokens
        if prompt_tokens is not None
        else of_all.get("prompt_tokens", np.zeros(0)).tolist() or None
    )
    for number, count in split_prompts(numbers.tolist(), counts, where):
        rows = np.flatnonzero(sequence == number)
        place = f"{where}, sequence {number}"
        if not isinstance(count, int):
            raise BadTrace(f"{place}: prompt_tokens is {count!r}, expected a count")
        arrays: dict[str, Any] = {name: array[rows] for name, array in stacked.items()}
        yield Request(**arrays, num_prompt=count, where=place)


def _place_of(name: str, file: Path) -> tuple[int | None, str | None]:
    """Layer and part of a tensor; None for what is neither ids, weights nor inputs."""
    match = OF_LAYER.fullmatch(name)
    if match is not None:
        return int(match["layer"]), NAMES[match["name"]]
    own = LAYER_FILE.fullmatch(file.stem)
    return (int(own["layer"]) if own is not None else None), NAMES.get(name)


def _tensors(file: Path) -> Iterator[tuple[str, NDArray[Any]]]:
    require_memory(3 * require_file(file, BadTrace), str(file), BadTrace)
    try:
        found = deserialize(file.read_bytes())
        for name, tensor in found:
            dtype, shape = tensor["dtype"], tensor["shape"]
            if dtype == "BF16":
                array: NDArray[Any] = of_bfloat16(np.frombuffer(tensor["data"], dtype="<u2"))
            elif dtype in DTYPES:
                array = np.frombuffer(tensor["data"], dtype=DTYPES[dtype])
            elif _place_of(name, file)[1] is not None:
                raise BadTrace(f"{file}: {name} is {dtype}, expected ids as whole numbers, states as floats")
            else:
                continue
            yield name, array.reshape(shape)
    except (SafetensorError, OSError, ValueError) as error:
        raise BadTrace(
            f"{file} cannot be read as safetensors, it is truncated or another file: {error}"
        ) from error
