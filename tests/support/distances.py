"""How far numbers are from those that they should be."""

import torch


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference, as a share of the largest number: some families scale their logits by 1/16."""
    return float((got - want).abs().max() / want.abs().max())


def norm_distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Norm of the difference, as a share of what it should be."""
    return float(torch.linalg.norm(got.double() - want.double()) / torch.linalg.norm(want.double()))
