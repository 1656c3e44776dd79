"""Published integers of 4 bits in words of 32: compressed-tensors, AWQ, GPTQ; and of 8 bits by channel.

Each is brought to `Int4` or `Int8`, which hold the same numbers: no value changes.
"""

import sys

import torch

from ...errors import UnsupportedExperts
from ...weights.formats import Format, Int4, Int8
from ...weights.formats.int4 import MIDDLE
from ...weights.formats.nibbles import join
from .published import Entries, Naming, Published, Tensors

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
#: Where AWQ has put the eight numbers of a word, from its lowest bits on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FIXED_ORDER = "weights in another order than their columns (act-order) are not served"


def nibbles_of(words: torch.Tensor) -> torch.Tensor:
    """The eight numbers (..., 8) of int32 words (...), from the lowest bits on."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & 0xF).to(torch.uint8)


def bytes_of(words: torch.Tensor) -> torch.Tensor:
    """Bytes (N, 4 x words) of words whose lowest bits are the first column: in memory they are that already."""
    assert sys.byteorder == "little", "torch has no other machines"
    return words.contiguous().view(torch.uint8)


def int4(columns: int, scale_shape: tuple[int, ...], scale_dtype: str, has_zeros: bool) -> Format:
    """The format of rows of `columns` weights with scales (N, groups).

    Raises:
        UnsupportedExperts: none has such scales.
    """
    groups = scale_shape[-1]
    if scale_dtype not in _DTYPES or groups == 0 or columns % groups or columns // groups < 2:
        raise UnsupportedExperts(f"{groups} scales of {scale_dtype} do not divide rows of {columns} weights")
    return Int4(columns // groups, _DTYPES[scale_dtype], has_zeros)


class PackQuantized(Published):
    """compressed-tensors: words of 8 columns (N, K / 8), numbers stored as q + 8; zeros packed along N likewise."""

    label = "int4 of compressed-tensors"
    namings = (
        Naming(
            {"scale": ".weight_scale", "weight": ".weight_packed"},
            {"zero": ".weight_zero_point", "shape": ".weight_shape", "order": ".weight_g_idx"},
            ".weight",
        ),
    )

    #: Numbers in a word.
    per_word = 8

    def shape(self, entries: Entries) -> tuple[int, ...]:
        *rows, words = entries["weight"].shape
        return (*rows, self.per_word * words)

    def format(self, entries: Entries) -> Format:
        if "order" in entries:
            raise UnsupportedExperts(_FIXED_ORDER)
        columns = self.shape(entries)[-1]
        return int4(columns, entries["scale"].shape, entries["scale"].dtype, "zero" in entries)

    def check(self, tensors: Tensors, where: str) -> None:
        rows, words = tensors["weight"].shape
        if "shape" in tensors and tensors["shape"].tolist() != [rows, self.per_word * words]:
            raise UnsupportedExperts(
                f"{where} holds a weight of {tensors['shape'].tolist()} in ({rows}, {words}) words: "
                f"not {32 // self.per_word} bits each"
            )

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        words = tensors["weight"]
        rows, scale = words.shape[-2], tensors["scale"]
        parts = {"": bytes_of(words), "_scale": scale.expand(rows, scale.shape[-1])}
        if "zero" in tensors:
            zero = tensors["zero"]
            if zero.dtype == torch.int32:
                zero = nibbles_of(zero.mT).flatten(-2).mT[..., :rows, :]
            else:  # as early versions have it: a number each, from -8 to 7
                zero = zero + MIDDLE
            parts["_zero"] = zero.to(torch.uint8)
        return parts


class PackQuantized8(PackQuantized):
    """The same with 8 bits: words of 4 columns (N, K / 4), numbers stored as q + 128; symmetric."""

    label = "int8 of compressed-tensors, in words"
    per_word = 4

    def format(self, entries: Entries) -> Format:
        if "order" in entries:
            raise UnsupportedExperts(_FIXED_ORDER)
        if "zero" in entries:
            raise UnsupportedExperts("8 bits with zeros are not served, symmetric ones are")
        columns, groups = self.shape(entries)[-1], entries["scale"].shape[-1]
        if groups == 0 or columns % groups:
            raise UnsupportedExperts(f"{groups} scales do not divide rows of {columns} weights")
        return Int8(None if groups == 1 else columns // groups)

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        stored, scale = bytes_of(tensors["weight"]), tensors["scale"].float()
        scale = scale.expand(*stored.shape[:-1], scale.shape[-1])
        # 128 less, in bytes that count modulo 256, is the highest bit turned over.
        return {"": (stored ^ 0x80).view(torch.int8), "_scale": scale.squeeze(-1)}


class ChannelInt8(Published):
    """compressed-tensors: int8 weights (N, K) with a scale for each channel (N, 1), symmetric."""

    label = "int8 of compressed-tensors"
    namings = (Naming({"weight": ".weight", "scale": ".weight_scale"}, {"input": ".input_scale"}, ".weight"),)

    def shape(self, entries: Entries) -> tuple[int, ...]:
        return entries["weight"].shape

    def format(self, entries: Entries) -> Format:
        if entries["weight"].dtype != "I8" or entries["scale"].shape[-1:] not in ((), (1,)):
            raise UnsupportedExperts(
                f"weights of {entries['weight'].dtype} with scales {entries['scale'].shape}: only int8 by channel is"
            )
        return Int8()

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        weight = tensors["weight"]
        return {"": weight, "_scale": tensors["scale"].float().reshape(-1).expand(weight.shape[:-1])}


class Awq(Published):
    """Words of 8 outputs (K, N / 8) in an order of their own, zeros (K / g, N / 8), scales (K / g, N)."""

    label = "AWQ"
    namings = (Naming({"zero": ".qzeros", "scale": ".scales", "weight": ".qweight"}, {}, ".weight"),)

    def shape(self, entries: Entries) -> tuple[int, ...]:
        inputs, words = entries["weight"].shape
        return 8 * words, inputs

    def format(self, entries: Entries) -> Format:
        return int4(
            self.shape(entries)[1], entries["scale"].shape[::-1], entries["scale"].dtype, has_zeros=True
        )

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        q, zero = (_awq_columns(tensors[role]).mT for role in ("weight", "zero"))
        return {"": join(q), "_scale": tensors["scale"].mT, "_zero": zero}


def _awq_columns(words: torch.Tensor) -> torch.Tensor:
    """Numbers (rows, N) of words (rows, N / 8)."""
    numbers = nibbles_of(words)
    ordered = torch.empty_like(numbers)
    ordered[..., list(AWQ_ORDER)] = numbers
    return ordered.flatten(-2)


class Gptq(Published):
    """Words of 8 inputs (K / 8, N), zeros (K / g, N / 8) less one, scales (K / g, N), groups in order (`g_idx`).

    Args:
        zero_offset: what zeros are stored less: 1, or 0 of checkpoint_format "gptq_v2".
    """

    label = "GPTQ"
    namings = (
        Naming({"zero": ".qzeros", "scale": ".scales", "weight": ".qweight"}, {"order": ".g_idx"}, ".weight"),
    )

    def __init__(self, zero_offset: int) -> None:
        self._zero_offset = zero_offset

    def shape(self, entries: Entries) -> tuple[int, ...]:
        words, outputs = entries["weight"].shape
        return outputs, 8 * words

    def format(self, entries: Entries) -> Format:
        return int4(
            self.shape(entries)[1], entries["scale"].shape[::-1], entries["scale"].dtype, has_zeros=True
        )

    def check(self, tensors: Tensors, where: str) -> None:
        if "order" not in tensors:
            return
        inputs = 8 * tensors["weight"].shape[0]
        group = inputs // tensors["scale"].shape[0]
        if not torch.equal(tensors["order"].long(), torch.arange(inputs) // group):
            raise UnsupportedExperts(f"{where}: {_FIXED_ORDER}")

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        # The tools' own readers add modulo 16: a zero of 0 is stored as 15.
        zero = (nibbles_of(tensors["zero"]).flatten(-2).mT + self._zero_offset) & 0xF
        return {"": bytes_of(tensors["weight"].mT), "_scale": tensors["scale"].mT, "_zero": zero}
