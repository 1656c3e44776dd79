"""Named tensors with metadata as safetensors: written whole, checked when read.

Never pickle: a file from a stranger must not be able to run code.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..core.files import (
    checksum,
    parse_object,
    require_checksum,
    require_file,
    require_memory,
    sorted_json,
    write_file,
)
from ..core.paths import user_path
from .base import BadPredictor

REMEDY = "the file is damaged; train the predictor again, or fetch it again"


def require_finite_tensors(tensors: Mapping[str, torch.Tensor], what: str, remedy: str) -> None:
    """Raises BadPredictor when a tensor holds NaN or infinite numbers."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadPredictor(f"{what}: tensor {name!r} holds NaN or infinite numbers; {remedy}")


def check_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raises BadPredictor unless the tensors are exactly the expected ones, float32, finite and of their shapes."""
    if tensors.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise BadPredictor(f"{what}: tensors missing: {missing or 'none'}, unknown: {extra or 'none'}")
    for name, size in expected.items():
        if tuple(tensors[name].shape) != size:
            raise BadPredictor(
                f"{what}: tensor {name!r} has shape {tuple(tensors[name].shape)}, expected {size}"
            )
        if tensors[name].dtype != torch.float32:
            raise BadPredictor(f"{what}: tensor {name!r} is {tensors[name].dtype}, expected torch.float32")
    require_finite_tensors(tensors, what, "the file is damaged or training failed; train the predictor again")


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], path: str | Path) -> Path:
    """Write tensors and metadata, whole or not at all, with a checksum of both.

    Raises:
        CannotWrite: no space, or no permission.
    """
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    filled = {name: tensor for name, tensor in on_host.items() if tensor.numel()}
    empty = {name: list(tensor.shape) for name, tensor in on_host.items() if not tensor.numel()}
    header = {**metadata, "empty": json.dumps(empty)}
    header["checksum"] = _checksum(header, filled)
    return write_file(path, lambda unfinished: save_file(filled, unfinished, header))


def read_tensors(path: str | Path, expected_format: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata written by `write_tensors`.

    Raises:
        BadPredictor: no regular file, unreadable, of another format, or not as it was written.
        FileNotFoundError: there is none.
    """
    path = user_path(path)
    require_memory(require_file(path, BadPredictor), str(path), BadPredictor)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise BadPredictor(
            f"{path} cannot be read as safetensors, it is truncated or another file: {error}"
        ) from error
    if header.get("format") != expected_format:
        raise BadPredictor(
            f"{path}: its format is {header.get('format', 'none')!r}, expected {expected_format!r}; a file of another "
            f"version is not converted, train again"
        )
    require_checksum(header.get("checksum"), _checksum(header, tensors), path, BadPredictor, REMEDY)
    where = f"{path}: its metadata is damaged:"
    empty = parse_object(header.get("empty", "{}"), f"{where} empty", BadPredictor, REMEDY)
    metadata = parse_object(header.get("prescope", ""), f"{where} prescope", BadPredictor, REMEDY)
    return tensors | {name: _empty(name, size, where) for name, size in empty.items()}, metadata


def _checksum(header: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    parts = {
        name: (f"{tensor.dtype}{tuple(tensor.shape)}", tensor.reshape(-1).view(torch.uint8).numpy())
        for name, tensor in tensors.items()
    }
    return checksum(sorted_json(header, without=["checksum"]), parts)


def _empty(name: str, size: object, where: str) -> torch.Tensor:
    """A tensor without elements, which safetensors does not keep; nothing is allocated for a size that has some."""
    is_size = isinstance(size, list) and all(type(n) is int and 0 <= n < 2**31 for n in size)
    if not isinstance(size, list) or not is_size or 0 not in size:
        raise BadPredictor(f"{where} tensor {name!r} of size {size!r} is not empty; {REMEDY}")
    return torch.zeros(size, dtype=torch.float32, device="cpu")
