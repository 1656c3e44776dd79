"""Named tensors with metadata as safetensors: written by rename, checked when read.

Never pickle: a file from a stranger must not be able to run code.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .base import BadPredictor


def require_finite_tensors(tensors: Mapping[str, torch.Tensor], what: str, remedy: str) -> None:
    """Raises BadPredictor when a tensor holds NaN or infinite numbers."""
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise BadPredictor(f"{what}: tensor {name!r} holds NaN or infinite numbers; {remedy}")


def check_tensors(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raises BadPredictor unless the tensors are exactly the expected ones, finite and of their shapes."""
    if tensors.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
        raise BadPredictor(f"{what}: tensors missing: {missing or 'none'}, unknown: {extra or 'none'}")
    for name, size in expected.items():
        if tuple(tensors[name].shape) != size:
            raise BadPredictor(
                f"{what}: tensor {name!r} has shape {tuple(tensors[name].shape)}, expected {size}"
            )
    require_finite_tensors(tensors, what, "the file is damaged or training failed; train the predictor again")


def write_tensors(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], path: Path) -> Path:
    """Write beside the target, then rename: a crash leaves no half-written target."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(descriptor)
    try:
        on_host = {
            name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor.numel()
        }
        empty = {name: list(tensor.shape) for name, tensor in tensors.items() if not tensor.numel()}
        save_file(on_host, temporary, {**metadata, "empty": json.dumps(empty)})
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return path


def read_tensors(path: Path, expected_format: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and metadata written by `write_tensors`.

    Raises:
        BadPredictor: unreadable, or of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except SafetensorError as error:
        raise BadPredictor(
            f"{path} cannot be read as safetensors, it is truncated or another file: {error}"
        ) from error
    if header.get("format") != expected_format:
        raise BadPredictor(
            f"{path}: its format is {header.get('format', 'none')!r}, expected {expected_format!r}; a file of another "
            f"version is not converted, train again"
        )
    try:
        empty = {name: torch.zeros(size) for name, size in json.loads(header.get("empty", "{}")).items()}
        metadata: dict[str, Any] = json.loads(header["prescope"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadPredictor(f"{path}: its metadata is damaged: {error!r}") from error
    return tensors | empty, metadata
