"""Checks of a submission. The compiled kernel reads and writes where it says, so everything is checked."""

import numpy as np
import torch

from .base import CpuLayer, ExpertBatch, Flag


def check_tensors(
    layer: CpuLayer, expert_batch: ExpertBatch, x_TD: torch.Tensor, out: torch.Tensor, flag: Flag | None
) -> None:
    """Raise ValueError if dtypes, shapes or places of the tensors do not fit the layer."""
    for name, tensor, width in (("x_TD", x_TD, layer.in_dim), ("out", out, layer.out_dim)):
        if tensor.device.type != "cpu" or tensor.dtype != layer.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}; it must be {layer.dtype} on the CPU"
            )
        if tensor.dim() != 2 or tensor.shape[1] != width or tensor.stride(1) != 1:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} with strides {tensor.stride()}; it must be (rows, {width}), each "
                f"row without gaps"
            )
    if any(part.dtype != np.int64 or part.ndim != 1 for part in expert_batch):
        parts = [(part.dtype, part.shape) for part in expert_batch]
        raise ValueError(f"an expert batch is of one row of int64 each, not {parts}")
    num_experts, num_tokens = len(expert_batch.experts), len(expert_batch.tokens)
    if len(expert_batch.first) != num_experts + 1 or len(expert_batch.places) != num_tokens:
        raise ValueError(
            f"{num_experts} experts have {len(expert_batch.first)} bounds, {num_tokens} tokens have "
            f"{len(expert_batch.places)} places"
        )
    if flag is not None and (
        flag.word.dtype != torch.int32 or flag.word.numel() != 1 or flag.word.device.type != "cpu"
    ):
        raise ValueError(f"a flag is one int32 on the CPU, not {flag.word}")


def check_batch(layer: CpuLayer, expert_batch: ExpertBatch, x_TD: torch.Tensor, out: torch.Tensor) -> None:
    """Raise ValueError if an index leaves its tensor. (kernel.c checks this itself, in a tenth of the time.)"""
    first = expert_batch.first
    if first[0] != 0 or first[-1] != len(expert_batch.tokens) or (np.diff(first) < 0).any():
        raise ValueError(f"first is {first}; {len(expert_batch.tokens)} pairs are shared from 0 on")
    for name, part, limit in (
        ("experts", expert_batch.experts, layer.rows.shape[0]),
        ("tokens", expert_batch.tokens, x_TD.shape[0]),
        ("places", expert_batch.places, out.shape[0]),
    ):
        if len(part) and (part.min() < 0 or part.max() >= limit):
            raise ValueError(
                f"{name} must be from 0 to {limit - 1}, they reach from {part.min()} to {part.max()}"
            )
