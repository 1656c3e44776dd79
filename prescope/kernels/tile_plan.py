"""Tiles of pairs of one expert, made on the GPU from routing that the host has not seen.

`order` (P,) are the pairs sorted by expert, `blocks` (n, 3) slot, first and end place in that order of each tile; those
behind the last tile are empty.
"""

from typing import NamedTuple

import torch
import triton

from .graph_kernels import align
from .launch import launch

#: One program sorts so many pairs.
MOST_PAIRS_OF_ONE_PROGRAM = 2048


class Tiles(NamedTuple):
    """Arguments of `Linear.tiles`."""

    order: torch.Tensor
    blocks: torch.Tensor
    num_blocks: int
    block_m: int


def pairs_per_expert(num_pairs: int, num_experts: int) -> float:
    """Pairs of each expert that has any, if all are chosen alike: known without looking at the routing."""
    return num_pairs / (num_experts * (1.0 - (1.0 - 1.0 / num_experts) ** num_pairs)) if num_pairs else 0.0


def rows_of_tile(num_pairs: int, num_experts: int) -> int:
    """Pairs in a tile: a function of sizes alone, so that a pair's result does not depend on others."""
    return block_m_for(pairs_per_expert(num_pairs, num_experts))


def block_m_for(pairs_per_expert: float) -> int:
    """Pairs of a tile: as many as an expert has on average, in powers of two."""
    return next((rows for rows in (16, 32, 64) if pairs_per_expert <= rows), 128)


def tiles_of(ids_P: torch.Tensor, slot_row: torch.Tensor, num_experts: int) -> Tiles:
    """The tiles of a layer; `ids_P` integers, outside [0, E) for no expert, `slot_row` (E,) int32."""
    num_pairs, device = len(ids_P), ids_P.device
    block_m = rows_of_tile(num_pairs, num_experts)
    most = min(num_pairs, num_experts + num_pairs // block_m)
    if num_pairs > MOST_PAIRS_OF_ONE_PROGRAM:
        return Tiles(*_by_torch(ids_P, slot_row, num_experts, block_m, most), most, block_m)
    order = torch.empty(num_pairs, dtype=torch.int32, device=device)
    blocks = torch.empty((most, 3), dtype=torch.int32, device=device)
    experts = triton.next_power_of_2(num_experts + 1)
    first = torch.empty(experts, dtype=torch.int32, device=device)
    # Histograms of fewer elements than threads are not supported everywhere.
    pairs = max(128, triton.next_power_of_2(num_pairs))
    launch(
        align, (1,),
        ids_P, slot_row, order, first, blocks, num_pairs, num_experts, most,
        PAIRS=pairs, EXPERTS=experts, BLOCKS=triton.next_power_of_2(most), BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip
    return Tiles(order, blocks, most, block_m)


def _by_torch(
    ids_P: torch.Tensor, slot_row: torch.Tensor, num_experts: int, block_m: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    known = (ids_P >= 0) & (ids_P < num_experts)
    mine = torch.where(known, ids_P, num_experts).long()
    order = mine.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids_P.device)
    counts.scatter_add_(0, mine, torch.ones_like(mine))
    starts = counts.cumsum(0) - counts
    counts[num_experts:] = 0
    num = (counts + block_m - 1) // block_m
    ends = num.cumsum(0)
    block = torch.arange(most, device=ids_P.device)
    expert = torch.searchsorted(ends, block, right=True).clamp(max=num_experts)
    first = starts[expert] + (block - (ends - num)[expert]) * block_m
    end = torch.minimum(first + block_m, (starts + counts)[expert])
    slots = torch.cat([slot_row.long(), slot_row.new_zeros(1).long()])[expert]
    is_tile = expert < num_experts
    rows = torch.stack([slots, first, end], dim=1)
    return order, torch.where(is_tile[:, None], rows, 0).to(torch.int32)
