"""Gates of experts that several tests compute with."""

import torch
from torch.nn import functional


def silu_gate(h: torch.Tensor) -> torch.Tensor:
    gate, up = h.chunk(2, dim=-1)
    return functional.silu(gate) * up


def alternating(h: torch.Tensor) -> torch.Tensor:
    """As of gpt-oss: gates and values alternate, clamped, and the value is shifted by one."""
    gate, up = h[..., ::2].clamp(max=7.0), h[..., 1::2].clamp(min=-7.0, max=7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
