"""Whether a family's gate takes gate and up one behind the other or in turns, and a gate that takes them as rows do.

Packed rows have the gate's outputs first, then those of `up`, whatever the family; nothing is known of any of them.
"""

import torch

from ...kernels import TensorFunction


@torch.no_grad()
def is_interleaved(gate: TensorFunction, width: int) -> bool:
    """Whether a gate (..., width) -> (..., width / 2) pairs its inputs 0 with 1, 2 with 3, ...; by trying.

    The second input is changed: in turns it is up's of the first output, else it is another output's.
    """
    if width < 4:  # one output: both orders are the same
        return False
    inputs = torch.linspace(0.5, 1.5, width, dtype=torch.float32, device="cpu").repeat(2, 1)
    inputs[1, 1] += 0.25
    first, second = gate(inputs)
    return not first.is_meta and bool(
        first[0] != second[0]
    )  # a gate with weights has none before they are read


def in_two_halves(gate: TensorFunction) -> TensorFunction:
    """A gate that takes its inputs in turns, for inputs that lie one behind the other."""

    def halves(h: torch.Tensor) -> torch.Tensor:
        return gate(torch.stack(h.chunk(2, dim=-1), dim=-1).flatten(-2))

    return halves
