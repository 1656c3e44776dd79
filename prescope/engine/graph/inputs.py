"""Inputs of a model's forward at fixed addresses, as what is captured over them needs."""

from typing import Any

import torch


def own(value: Any) -> Any:
    """A copy at an address of our own."""
    if isinstance(value, torch.Tensor):
        return value.clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {name: own(item) for name, item in value.items()}
    return value


def fits(target: Any, value: Any) -> bool:
    """Whether `value` can be copied into `target`: tensors of the same shape and dtype, all else equal."""
    if isinstance(target, torch.Tensor) and isinstance(value, torch.Tensor):
        return target.shape == value.shape and target.dtype == value.dtype
    if isinstance(target, dict) and isinstance(value, dict):
        return target.keys() == value.keys() and all(fits(target[key], value[key]) for key in target)
    return type(target) is type(value) and (target is value or bool(target == value))


def refill(target: Any, value: Any) -> None:
    """Copy into `target` what fits it (`fits`)."""
    if isinstance(target, torch.Tensor):
        target.copy_(value)
    elif isinstance(target, dict):
        for key, item in value.items():
            refill(target[key], item)
