"""Packed forms of a weight matrix: which tensors hold it, and its exact values in float32."""

from ...errors import UnsupportedOption
from .base import Format, PackedMatrices, Part
from .fp4 import Mxfp4, Nvfp4
from .fp8 import Fp8
from .int4 import Int4
from .int8 import Int8

__all__ = [
    "PACKED",
    "Format",
    "Fp8",
    "Int4",
    "Int8",
    "Mxfp4",
    "Nvfp4",
    "PackedMatrices",
    "Part",
    "format_for",
    "lossy_name",
    "lossy_part",
]

#: What weights can be packed to while they are loaded.
PACKED = ("int8", "fp8", "int4", "mxfp4")
#: Widths of a group of int4 weights, the widest that divides all rows is taken: fewer scales to move.
GROUPS = (128, 64, 32, 16)


def format_for(name: str, *in_dims: int) -> Format:
    """The format that `name` (one of `PACKED`) means for matrices of these row lengths.

    Raises:
        UnsupportedOption: rows of that length cannot be packed so.
    """
    if name not in PACKED:
        raise UnsupportedOption(
            f"experts is {name!r}; choose one of 'auto', 'plain', {', '.join(map(repr, PACKED))}"
        )
    if name == "int8":
        return Int8()
    if name == "fp8":
        return Fp8(128, 128)
    if name == "mxfp4" and not any(dim % 2 for dim in in_dims):
        return Mxfp4()  # the last of a row's blocks may be shorter
    group = next((group for group in GROUPS if not any(dim % group for dim in in_dims)), None)
    if name == "int4" and group is not None:
        return Int4(group)
    raise UnsupportedOption(
        f"experts={name!r} packs rows of a multiple of {GROUPS[-1] if name == 'int4' else 2} weights, the experts' "
        f"have {' and '.join(map(str, in_dims))}; use 'int8' or 'fp8'"
    )


def lossy_name(model: str, form: str) -> str:
    """What a model is called wherever packing at load has changed its experts."""
    return f"{model}, {form} experts (lossy)"


def lossy_part(name: str) -> str:
    """What `lossy_name` has put behind a model's name; nothing where it has not."""
    return next((part for form in PACKED if name.endswith(part := lossy_name("", form))), "")
