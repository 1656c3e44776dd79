"""Published integers of 4 bits in words of 32: compressed-tensors, AWQ, GPTQ; and of up to 8 bits, a byte each.

Each is brought to `Int4` or `Int8`, which hold the same numbers: no value changes.
"""

import sys
from collections.abc import Mapping

import torch

from ...errors import UnsupportedExperts
from ...weights.formats import Format, Int4, Int8
from ...weights.formats.int4 import MIDDLE
from ...weights.formats.nibbles import join
from .published import FLOATS, OF_ACTIVATIONS, Entries, Naming, Published, Tensors, Wanted

_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
#: Where AWQ has put the eight numbers of a word, from its lowest bits on.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_FIXED_ORDER = "weights in another order than their columns (act-order) are not served"


def nibbles_of(words: torch.Tensor) -> torch.Tensor:
    """The eight numbers (..., 8) of int32 words (...), from the lowest bits on."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device="cpu")
    return ((words.unsqueeze(-1) >> shifts) & 0xF).to(torch.uint8)


def bytes_of(words: torch.Tensor) -> torch.Tensor:
    """Bytes (N, 4 x words) of words whose lowest bits are the first column: in memory they are that already."""
    assert sys.byteorder == "little", "torch has no other machines"
    # Flat: of one word in each row, turned round, torch says that it is contiguous, and not that its bytes are.
    return (
        words.contiguous().flatten().view(torch.uint8).unflatten(0, (*words.shape[:-1], 4 * words.shape[-1]))
    )


class Grouped(Published):
    """Integers whose scales are those of groups of a row.

    Args:
        group: weights of a row that share a scale, -1 for all of them, None where the configuration does not say: then
            it follows from the number of scales.
        is_symmetric: the configuration says that there are no zeros; the files decide.
        said: like `group`, what the configuration says where the number of scales decides.
    """

    def __init__(self, group: int | None = None, is_symmetric: bool = False, said: int | None = None) -> None:
        self.group, self.is_symmetric, self.said = group, is_symmetric, said

    def num_groups(self, columns: int, num_scales: int) -> int:
        """Groups of a row of so many weights.

        Raises:
            UnsupportedExperts: the last one would be shorter.
        """
        num = num_scales if self.group is None else 1 if self.group <= 0 else -(-columns // self.group)
        # A row that is shorter than a group has one scale.
        group = (
            min(self.group, columns) if self.group is not None and self.group > 0 else columns // max(num, 1)
        )
        if num == 0 or group == 0 or num * group != columns:
            raise UnsupportedExperts(f"{num} groups of {group} are no row of {columns} weights")
        return num


def int4(columns: int, num_groups: int, scale_dtype: str, has_zeros: bool) -> Format:
    """The format of rows of `columns` weights.

    Raises:
        UnsupportedExperts: none has such scales.
    """
    if columns // num_groups < 2:
        raise UnsupportedExperts(f"{num_groups} groups of a row of {columns} weights are too many")
    return Int4(columns // num_groups, _DTYPES[scale_dtype], has_zeros)


class PackQuantized(Grouped):
    """compressed-tensors: words of 8 columns (N, K / 8), numbers stored as q + 8; zeros packed along N likewise."""

    label = "int4 of compressed-tensors"
    namings = (
        Naming(
            {"scale": ".weight_scale", "weight": ".weight_packed"},
            {
                "zero": ".weight_zero_point",
                "shape": ".weight_shape",
                "order": ".weight_g_idx",
                **OF_ACTIVATIONS,
            },
            ".weight",
        ),
    )

    #: Numbers in a word.
    per_word = 8

    def shape(self, entries: Entries) -> tuple[int, ...]:
        *rows, words = entries["weight"].shape
        return (*rows, self.per_word * words)

    def wanted(self, entries: Entries) -> Mapping[str, Wanted]:
        if "order" in entries:
            raise UnsupportedExperts(_FIXED_ORDER)
        rows, columns = self.shape(entries)
        groups = self.num_groups(columns, (entries["scale"].shape or (1,))[-1])
        whole = () if groups > 1 else ((), (1,), (1, 1))  # one of a matrix
        zero = entries.get("zero")
        in_words = zero is not None and zero.dtype == "I32"
        return {
            "weight": Wanted(("I32",), None),
            "scale": Wanted(FLOATS, ((rows, groups), *whole)),
            "zero": Wanted(
                ("I32", "I8", "U8"), ((-(-rows // 8), groups),) if in_words else ((rows, groups), *whole)
            ),
            "shape": Wanted(("I64", "I32"), ((2,),)),
        }

    def format(self, entries: Entries) -> Format:
        columns, scale = self.shape(entries)[-1], entries["scale"]
        return int4(columns, (scale.shape or (1,))[-1], scale.dtype, "zero" in entries)

    def check(self, tensors: Tensors, where: str) -> None:
        rows, words = tensors["weight"].shape
        said = tensors["shape"].tolist() if "shape" in tensors else [rows, self.per_word * words]
        if said[0] == rows and 0 < self.per_word * words - said[1] < self.per_word:
            raise UnsupportedExperts(
                f"{where} has rows of {said[1]} weights, and the last of their words is not full (it would be with "
                f"{self.per_word}), which is not served"
            )
        if said != [rows, self.per_word * words]:
            raise UnsupportedExperts(
                f"{where} holds a weight of {said} in ({rows}, {words}) words: not {32 // self.per_word} bits each"
            )

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        words = tensors["weight"]
        rows, scale = words.shape[-2], torch.atleast_1d(tensors["scale"])
        parts = {"": bytes_of(words), "_scale": scale.expand(rows, scale.shape[-1])}
        if "zero" in tensors:
            zero = tensors["zero"]
            if zero.dtype == torch.int32:
                zero = nibbles_of(zero.mT).flatten(-2).mT[..., :rows, :]
            else:  # as early versions have it, and for one of a matrix: a number each, from -8 to 7
                zero = torch.atleast_1d(zero).expand(rows, -1) + MIDDLE
            parts["_zero"] = zero.to(torch.uint8)
        return parts


class PackQuantized8(PackQuantized):
    """The same with 8 bits: words of 4 columns (N, K / 4), numbers stored as q + 128; symmetric."""

    label = "int8 of compressed-tensors, in words"
    per_word = 4

    def wanted(self, entries: Entries) -> Mapping[str, Wanted]:
        if "zero" in entries:
            raise UnsupportedExperts("8 bits with zeros are not served, symmetric ones are")
        return super().wanted(entries)

    def format(self, entries: Entries) -> Format:
        columns, groups = self.shape(entries)[-1], (entries["scale"].shape or (1,))[-1]
        return Int8(None if groups == 1 else columns // groups)

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        stored, scale = bytes_of(tensors["weight"]), torch.atleast_1d(tensors["scale"]).float()
        scale = scale.expand(*stored.shape[:-1], scale.shape[-1])
        # 128 less, in bytes that count modulo 256, is the highest bit turned over.
        return {"": (stored ^ 0x80).view(torch.int8), "_scale": scale.squeeze(-1)}


class IntQuantized(Grouped):
    """compressed-tensors: int8 weights (N, K), scales of channels or groups (N, groups), zeros likewise.

    Numbers of up to 4 bits become `Int4`, of which two lie in a byte; others `Int8`, without zeros.

    Args:
        group, is_symmetric: see `Grouped`.
        bits: of a number.
    """

    label = "int8 of compressed-tensors"
    namings = (
        Naming(
            {"weight": ".weight", "scale": ".weight_scale"},
            {"zero": ".weight_zero_point", **OF_ACTIVATIONS},
            ".weight",
        ),
    )

    def __init__(self, group: int | None = None, is_symmetric: bool = False, bits: int = 8) -> None:
        super().__init__(group, is_symmetric)
        self.bits = bits
        self.is_int4 = bits <= 4
        if self.is_int4:
            self.label = "int4 of compressed-tensors, in bytes"

    def shape(self, entries: Entries) -> tuple[int, ...]:
        return entries["weight"].shape

    def wanted(self, entries: Entries) -> Mapping[str, Wanted]:
        rows, columns = entries["weight"].shape
        groups = self._groups(entries)
        shapes = ((rows, groups),) if groups > 1 else ((rows,), (rows, 1), (), (1,), (1, 1))
        if self.is_int4 and columns % 2:
            raise UnsupportedExperts(f"rows of {columns} weights are no pairs")
        return {
            "weight": Wanted(("I8",), None),
            "scale": Wanted(FLOATS, shapes),
            "zero": Wanted(("I8",), shapes),
        }

    def format(self, entries: Entries) -> Format:
        groups, (_, columns) = self._groups(entries), entries["weight"].shape
        if self.is_int4:
            return int4(columns, groups, entries["scale"].dtype, "zero" in entries)
        return Int8(None if groups == 1 else columns // groups)

    def check(self, tensors: Tensors, where: str) -> None:
        if self.is_int4:
            least, most = tensors["weight"].aminmax()
            if least < -MIDDLE or most >= MIDDLE:
                raise UnsupportedExperts(
                    f"{where} holds numbers from {least} to {most}: more than {self.bits} bits"
                )
        elif "zero" in tensors and tensors["zero"].any():
            raise UnsupportedExperts(f"{where}: 8 bits with zeros are not served, symmetric ones are")

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        weight = tensors["weight"]
        scales = {
            role: self._by_row(tensors[role], len(weight)) for role in ("scale", "zero") if role in tensors
        }
        if not self.is_int4:
            return {"": weight, "_scale": scales["scale"].float().squeeze(-1)}
        parts = {"": join((weight + MIDDLE).to(torch.uint8)), "_scale": scales["scale"]}
        return parts | ({"_zero": (scales["zero"] + MIDDLE).to(torch.uint8)} if "zero" in scales else {})

    def _groups(self, entries: Entries) -> int:
        shape = entries["scale"].shape
        return self.num_groups(entries["weight"].shape[-1], shape[1] if len(shape) == 2 else 1)

    def _by_row(self, scale: torch.Tensor, rows: int) -> torch.Tensor:
        """Scales (N, groups) of channels, groups or the whole matrix."""
        return (scale if scale.dim() == 2 else scale.reshape(-1, 1)).expand(rows, -1)


class Turned(Grouped):
    """What AWQ and GPTQ share: scales and zeros lie by groups first, and zeros in words along N."""

    def wanted(self, entries: Entries) -> Mapping[str, Wanted]:
        rows, columns = self.shape(entries)
        groups = self.num_groups(columns, (entries["scale"].shape or (1,))[0])
        return {
            "weight": Wanted(("I32",), None),
            "zero": Wanted(("I32",), ((groups, -(-rows // 8)),)),
            "scale": Wanted(FLOATS, ((groups, rows),)),
            "order": Wanted(("I32", "I64"), ((columns,),)),
        }

    def format(self, entries: Entries) -> Format:
        scale = entries["scale"]
        return int4(self.shape(entries)[1], scale.shape[0], scale.dtype, has_zeros=True)


class Awq(Turned):
    """Words of 8 outputs (K, N / 8) in an order of their own, zeros (K / g, N / 8), scales (K / g, N)."""

    label = "AWQ"
    namings = (Naming({"zero": ".qzeros", "scale": ".scales", "weight": ".qweight"}, {}, ".weight"),)

    def shape(self, entries: Entries) -> tuple[int, ...]:
        inputs, words = entries["weight"].shape
        return 8 * words, inputs

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        q, zero = (_awq_rows(tensors[role]) for role in ("weight", "zero"))
        return {"": join(q), "_scale": tensors["scale"].mT, "_zero": zero}


def _awq_rows(words: torch.Tensor) -> torch.Tensor:
    """Numbers (N, columns) of words (columns, N / 8)."""
    turned = words.mT.contiguous()  # words rather than numbers: an eighth of the time
    of_places = [((turned >> 4 * AWQ_ORDER.index(place)) & 0xF).to(torch.uint8) for place in range(8)]
    return torch.stack(of_places, dim=1).flatten(0, 1)


class Gptq(Turned):
    """Words of 8 inputs (K / 8, N), zeros (K / g, N / 8) less one, scales (K / g, N), groups in order (`g_idx`).

    Args:
        group, said: see `Grouped`.
        zero_offset: what zeros are stored less: 1, or 0 of checkpoint_format "gptq_v2".
    """

    label = "GPTQ"
    namings = (
        Naming({"zero": ".qzeros", "scale": ".scales", "weight": ".qweight"}, {"order": ".g_idx"}, ".weight"),
    )

    def __init__(self, group: int | None = None, zero_offset: int = 1, said: int | None = None) -> None:
        super().__init__(group, said=said)
        self._zero_offset = zero_offset

    def shape(self, entries: Entries) -> tuple[int, ...]:
        words, outputs = entries["weight"].shape
        return outputs, 8 * words

    def check(self, tensors: Tensors, where: str) -> None:
        if "order" not in tensors:
            return
        inputs = 8 * tensors["weight"].shape[0]
        group = inputs // tensors["scale"].shape[0]
        if not torch.equal(tensors["order"].long(), torch.arange(inputs, device="cpu") // group):
            raise UnsupportedExperts(f"{where}: {_FIXED_ORDER}")

    def convert(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        # The tools' own readers add modulo 16: a zero of 0 is stored as 15.
        zero = (nibbles_of(tensors["zero"]).flatten(-2).mT + self._zero_offset) & 0xF
        scale = tensors["scale"].mT
        return {"": bytes_of(tensors["weight"].mT), "_scale": scale, "_zero": zero[: len(scale)]}
