"""Published floats: FP8 with scales of blocks, channels or tensors; MXFP4; NVFP4."""

from abc import abstractmethod
from collections.abc import Mapping

import torch

from ...errors import UnsupportedExperts
from ...weights.formats import Format, Fp8, Mxfp4, Nvfp4
from ...weights.formats.fp4 import e8m0
from .published import FLOATS, OF_ACTIVATIONS, Entries, Naming, Published, Tensors, Wanted

#: Exponents, which torch and tools write as bytes of one kind or the other.
_E8M0 = ("U8", "F8_E8M0")
_FP8 = ("F8_E4M3", "F8_E5M2")


class BlockFp8(Published):
    """Weights of e4m3 times scales, of blocks (`weight_scale_inv`), of output channels or of the whole matrix.

    What a checkpoint says of activations is left aside: they are not rounded here.

    Args:
        label: of the tool.
        block: (rows, columns) that share a scale; None where scales are those of channels or matrices.
        scales: what scales are called, by one tool or another.
        is_microscaled: scales are exponents, and of blocks only.
    """

    weight_dims = (2, 3)

    def __init__(
        self, label: str, block: tuple[int, int] | None, *scales: str, is_microscaled: bool = False
    ) -> None:
        self.label, self.block, self.is_microscaled = label, block, is_microscaled
        self.namings = tuple(naming for scale in scales for naming in _namings(scale))

    def shape(self, entries: Entries) -> tuple[int, ...]:
        return entries["weight"].shape

    def wanted(self, entries: Entries) -> Mapping[str, Wanted]:
        *others, rows, columns = entries["weight"].shape
        if self.block is None:
            scales = ((rows, 1), (rows,), (1, 1), (1,), ())
        else:
            scales = (self._blocks(rows, columns), *(() if self.is_microscaled else ((1,), ())))
        return {
            "weight": Wanted(("F8_E4M3",), None),
            "scale": Wanted(
                _E8M0 if self.is_microscaled else (*FLOATS, *_E8M0), tuple((*others, *one) for one in scales)
            ),
        }

    def format(self, entries: Entries) -> Format:
        *others, rows, columns = entries["weight"].shape
        if self.block is not None and entries["scale"].shape[len(others) :] == self._blocks(rows, columns):
            return Fp8(*self.block)
        return Fp8(1, columns)  # a matrix's one scale is that of each channel

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


def _namings(scale: str) -> tuple[Naming, ...]:
    """Of weights with scales of that name: those of one matrix, and those of all experts."""
    spare = {"zero": ".weight_zero_point", **OF_ACTIVATIONS}
    of_matrix = {"weight": ".weight", "scale": f".{scale}"}
    if not scale.startswith("weight"):  # a word that families use for scales of other things too
        return (Naming(of_matrix, spare, ".weight", (*_FP8, "I8")),)
    # All experts in one tensor, which is then no layer's `weight`.
    of_layer = {"weight": "", "scale": scale.removeprefix("weight")}
    return Naming(of_matrix, spare, ".weight"), Naming(of_layer, {}, "")


class FinegrainedFp8(BlockFp8):
    """FP8 as transformers reads it; and beside it two e2m1 in an int8 each, with e8m0 scales of 32 (DeepSeek-V4).

    Args:
        block: see `BlockFp8`.
        has_fp4_experts: the configuration says so; the files decide.
    """

    #: AutoFP8 has `weight_scale`, DeepSeek-V4 `scale`, Mistral Large 4 `qscale_weight`; weights are multiplied by all.
    scales = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")

    def __init__(self, block: tuple[int, int] | None = None, has_fp4_experts: bool = False) -> None:
        super().__init__("FP8", block, *self.scales)
        self.has_fp4_experts = has_fp4_experts

    def shape(self, entries: Entries) -> tuple[int, ...]:
        *rows, columns = entries["weight"].shape
        return (*rows, 2 * columns if _is_fp4(entries) else columns)

    def wanted(self, entries: Entries) -> Mapping[str, Wanted]:
        if not _is_fp4(entries):
            return super().wanted(entries)
        *rows, columns = self.shape(entries)
        return {"weight": Wanted(("I8",), None), "scale": Wanted(_E8M0, ((*rows, -(-columns // 32)),))}

    def format(self, entries: Entries) -> Format:
        return Mxfp4() if _is_fp4(entries) else super().format(entries)

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        weight = tensors["weight"]
        if weight.dtype != torch.int8:
            return super().convert(tensors)
        return {"": weight.view(torch.uint8), "_scale": tensors["scale"].view(torch.uint8)}


def _is_fp4(entries: Entries) -> bool:
    return entries["weight"].dtype == "I8"


class GptOssMxfp4(Published):
    """Blocks of 32 weights (N, K / 32, 16 bytes), the even ones in the low halves, and e8m0 scales (N, K / 32)."""

    label = "MXFP4 of gpt-oss"
    is_out_in = True
    weight_dims = (4,)
    namings = (Naming({"weight": "_blocks", "scale": "_scales"}, {}, ""),)

    def shape(self, entries: Entries) -> tuple[int, ...]:
        *rows, groups, half = entries["weight"].shape
        return (*rows, 2 * groups * half)

    def wanted(self, entries: Entries) -> Mapping[str, Wanted]:
        *groups, _ = entries["weight"].shape
        return {"weight": Wanted(("U8",), ((*groups, 16),)), "scale": Wanted(_E8M0, (tuple(groups),))}

    def format(self, entries: Entries) -> Format:
        return Mxfp4()

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        return {"": tensors["weight"].flatten(-2), "_scale": tensors["scale"].view(torch.uint8)}


class PackedFp4(Published):
    """Weights of 4 bits as compressed-tensors writes them: two in a byte (N, K / 2), scales of `group` weights."""

    group: int
    scale_dtypes: tuple[str, ...]

    def shape(self, entries: Entries) -> tuple[int, ...]:
        *rows, half = entries["weight"].shape
        return (*rows, 2 * half)

    def wanted(self, entries: Entries) -> Mapping[str, Wanted]:
        rows, columns = self.shape(entries)
        if columns % self.group:
            raise UnsupportedExperts(f"groups of {self.group} do not divide rows of {columns} weights")
        return {
            "weight": Wanted(("U8",), None),
            "scale": Wanted(self.scale_dtypes, ((rows, columns // self.group),)),
            "global": Wanted(FLOATS, ((), (1,))),
        }

    def format(self, entries: Entries) -> Format:
        return self.held_as()

    @abstractmethod
    def held_as(self) -> Format:
        """The format of their rows."""


class PackedMxfp4(PackedFp4):
    """MXFP4 of compressed-tensors: scales are e8m0."""

    label, group, scale_dtypes = "MXFP4 of compressed-tensors", 32, _E8M0
    namings = (Naming({"weight": ".weight_packed", "scale": ".weight_scale"}, OF_ACTIVATIONS, ".weight"),)

    def held_as(self) -> Format:
        return Mxfp4()

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        return {"": tensors["weight"], "_scale": tensors["scale"].view(torch.uint8)}


class PackedNvfp4(PackedFp4):
    """NVFP4 of compressed-tensors: scales are e4m3, divided by one of the matrix."""

    label, group, scale_dtypes = "NVFP4 of compressed-tensors", 16, ("F8_E4M3",)
    namings = (
        Naming(
            {"weight": ".weight_packed", "scale": ".weight_scale", "global": ".weight_global_scale"},
            OF_ACTIVATIONS,
            ".weight",
        ),
    )

    def held_as(self) -> Format:
        return Nvfp4()

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        weight = tensors["weight"]
        whole = (1 / tensors["global"].float()).reshape(-1).expand(weight.shape[:-1])
        return {"": weight, "_scale": tensors["scale"], "_global": whole}
