"""What an engine's settings mean for a model: its shape, its cache policy, its number of slots."""

from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..cache.num_slots import resolve_slots
from ..core.types import MoEShape
from ..core.units import format_bytes
from ..errors import UnsupportedOption
from ..hf import PROGRESS_BYTES, MoELayer
from ..scheduler import schedule_named
from ..scheduler.costs import LayerCosts
from ..weights.host_pool import host_bytes, require_host_memory
from .config import EngineConfig


def shape_of(layers: list[MoELayer], top_k: int) -> MoEShape:
    """Sizes of a model with these MoE layers: the largest where they differ, and a top-k that all have experts for."""
    return MoEShape(
        num_layers=len(layers),
        num_experts=max(layer.num_experts for layer in layers),
        top_k=min(top_k, *(layer.num_experts for layer in layers)) if layers else top_k,
        row_bytes=max(layer.layout.row_bytes for layer in layers),
    )


def check_early(config: EngineConfig, layers: list[MoELayer], top_k: int, packing: str) -> None:
    """Fail on settings that the model's shape already rules out, before gigabytes are read; say what packed ones take.

    Args:
        packing: what is packed, in one line; "" for nothing.
    """
    shape = shape_of(layers, top_k)
    num_slots, _ = count_slots(config, shape, layers)
    if not packing:
        return
    rows_bytes, ahead_bytes = sum(layer.nbytes for layer in layers), max(layer.nbytes for layer in layers)
    # Given up layer by layer while they are packed.
    read_bytes = sum(
        tensor.nbytes for layer in layers if layer.is_read_whole for tensor in layer.tensors().values()
    )
    require_host_memory(rows_bytes, taken_bytes=0, ahead_bytes=ahead_bytes, read_bytes=read_bytes)
    if max(rows_bytes, read_bytes) >= PROGRESS_BYTES:  # it will take a while: what it is that takes it
        tqdm.write(
            f"{packing}. Experts take {host_bytes(rows_bytes, read_bytes)} of host memory, {num_slots} slots "
            f"{format_bytes(num_slots * shape.row_bytes)} of the device"
        )


def require_kinds(*, predictor: Any = None, costs: Any = None, tokenizer: Any = None) -> None:
    """Raise UnsupportedOption where the name or the values of something are given in its place.

    Predictors and tokenizers of one's own are not asked for their class; whether they work is seen when they are used.
    """
    no_object = str | bytes | int | float | Path | list | tuple | dict
    if isinstance(predictor, no_object):
        raise UnsupportedOption(
            f"predictor is a {type(predictor).__name__}; it is an object such as prescope.train_predictor returns"
        )
    if isinstance(tokenizer, no_object):
        raise UnsupportedOption(
            f"tokenizer is a {type(tokenizer).__name__}; it is an object such as AutoTokenizer.from_pretrained returns"
        )
    if not isinstance(costs, LayerCosts | None):
        raise UnsupportedOption(
            f"costs are a {type(costs).__name__}; they are the LayerCosts of a HardwareProfile, which profile=... names"
        )


def form_of(layers: list[MoELayer]) -> tuple[str, bool]:
    """The form of the experts in slots, "" where they are as they are computed with; and whether it lost anything."""
    names = {layer.layout.packing.name for layer in layers if layer.layout.packing is not None}
    return " and ".join(sorted(names)), any(layer.is_lossy for layer in layers)


def unpacked_by(kernels: str, reason: str) -> str:
    """What unpacks experts on a GPU, to go behind what is packed."""
    if kernels == "triton":
        return "; unpacked in registers where they are used"
    return f"; unpacked by torch on the GPU, one expert at a time, before each product: {reason}"


def cache_of(config: EngineConfig, frequencies: np.ndarray | None) -> tuple[str, str]:
    """The cache policy, and why."""
    if config.cache != "auto":
        return config.cache, "as given"
    own = schedule_named(config.schedule).cache
    if own == "static" and frequencies is None:
        return "lru", (
            f"schedule={config.schedule!r} comes with a static cache, which needs to know which experts are hot: LRU "
            f"until a run is recorded and frequencies=run.trace.expert_counts() is passed"
        )
    return own, f"as schedule={config.schedule!r} has it"


def count_slots(config: EngineConfig, shape: MoEShape, layers: list[MoELayer]) -> tuple[int, str]:
    """The number of slots, and why."""
    return resolve_slots(
        config.slots,
        total_experts=sum(layer.num_experts for layer in layers),
        row_bytes=shape.row_bytes,
        top_k=shape.top_k,
    )
