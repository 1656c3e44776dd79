"""Published floats: FP8 with scales of blocks, channels or tensors; MXFP4; NVFP4."""

from abc import abstractmethod

import torch

from ...errors import UnsupportedExperts
from ...weights.formats import Format, Fp8, Mxfp4, Nvfp4
from ...weights.formats.fp4 import e8m0
from .published import Entries, Naming, Published, Tensors


class BlockFp8(Published):
    """Weights of e4m3 times scales, of blocks (`weight_scale_inv`), of output channels or of the whole matrix.

    What a checkpoint says of activations is left aside: they are not rounded here.

    Args:
        label: of the tool.
        block: (rows, columns) that share a scale; None where scales are those of channels or matrices.
        scale: what scales are called.
    """

    def __init__(self, label: str, block: tuple[int, int] | None, scale: str) -> None:
        self.label, self.block = label, block
        spare = {"activation": ".activation_scale", "input": ".input_scale", "zero": ".weight_zero_point"}
        self.namings = (
            Naming({"weight": ".weight", "scale": f".{scale}"}, spare, ".weight"),
            # All experts in one tensor, which is then no layer's `weight`.
            Naming({"weight": "", "scale": scale.removeprefix("weight")}, {}, ""),
        )

    def shape(self, entries: Entries) -> tuple[int, ...]:
        return entries["weight"].shape

    def format(self, entries: Entries) -> Format:
        if entries["weight"].dtype != "F8_E4M3":
            raise UnsupportedExperts(f"weights are {entries['weight'].dtype} and not e4m3")
        *others, rows, columns = entries["weight"].shape
        scale = entries["scale"].shape[len(others) :]
        if self.block is not None and scale == self._blocks(rows, columns):
            return Fp8(*self.block)
        of_channels = () if self.block is not None else ((1, 1), (rows,), (rows, 1))
        if scale in ((), (1,), *of_channels):
            return Fp8(1, columns)  # a matrix's one scale is that of each channel
        raise UnsupportedExperts(
            f"scales {scale} of weights ({rows}, {columns}) are not of blocks {self.block}"
        )

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        weight, scale = tensors["weight"], tensors["scale"]
        *others, rows, columns = weight.shape
        if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
            scale = e8m0(scale.view(torch.uint8))
        if self.block is None or scale.shape[len(others) :] != self._blocks(rows, columns):
            scale = scale.reshape(*others, -1, 1).expand(*others, rows, 1)
        return {"": weight, "_scale": scale.float()}

    def _blocks(self, rows: int, columns: int) -> tuple[int, int]:
        assert self.block is not None
        return -(-rows // self.block[0]), -(-columns // self.block[1])


class GptOssMxfp4(Published):
    """Blocks of 32 weights (N, K / 32, 16 bytes), the even ones in the low halves, and e8m0 scales (N, K / 32)."""

    label = "MXFP4 of gpt-oss"
    is_out_in = True
    namings = (Naming({"blocks": "_blocks", "scale": "_scales"}, {}, ""),)

    def shape(self, entries: Entries) -> tuple[int, ...]:
        *rows, groups, half = entries["blocks"].shape
        return (*rows, 2 * groups * half)

    def format(self, entries: Entries) -> Format:
        blocks = entries["blocks"]
        if blocks.dtype != "U8" or blocks.shape[-1] != 16 or entries["scale"].shape != blocks.shape[:-1]:
            raise UnsupportedExperts(f"blocks are {blocks.shape}, scales are {entries['scale'].shape}")
        return Mxfp4()

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        return {"": tensors["blocks"].flatten(-2), "_scale": tensors["scale"].view(torch.uint8)}


class PackedFp4(Published):
    """Weights of 4 bits as compressed-tensors writes them: two in a byte (N, K / 2), scales of `group` weights."""

    group: int

    def shape(self, entries: Entries) -> tuple[int, ...]:
        *rows, half = entries["weight"].shape
        return (*rows, 2 * half)

    def format(self, entries: Entries) -> Format:
        *rows, columns = self.shape(entries)
        if columns % self.group or entries["scale"].shape != (*rows, columns // self.group):
            raise UnsupportedExperts(f"scales are {entries['scale'].shape}, weights ({rows}, {columns})")
        return self.held_as()

    @abstractmethod
    def held_as(self) -> Format:
        """The format of their rows."""


class PackedMxfp4(PackedFp4):
    """MXFP4 of compressed-tensors: scales are e8m0."""

    label, group = "MXFP4 of compressed-tensors", 32
    namings = (Naming({"weight": ".weight_packed", "scale": ".weight_scale"}, {}, ".weight"),)

    def held_as(self) -> Format:
        return Mxfp4()

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        return {"": tensors["weight"], "_scale": tensors["scale"].view(torch.uint8)}


class PackedNvfp4(PackedFp4):
    """NVFP4 of compressed-tensors: scales are e4m3, divided by one of the matrix."""

    label, group = "NVFP4 of compressed-tensors", 16
    namings = (
        Naming(
            {"weight": ".weight_packed", "scale": ".weight_scale", "global": ".weight_global_scale"},
            {"input": ".input_global_scale"},
            ".weight",
        ),
    )

    def held_as(self) -> Format:
        return Nvfp4()

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        weight = tensors["weight"]
        whole = (1 / tensors["global"].float()).reshape(-1).expand(weight.shape[:-1])
        return {"": weight, "_scale": tensors["scale"], "_global": whole}
