"""Packed checkpoints: experts go into host rows as they lie in the files, all else is unpacked for transformers."""

from .in_files import ExpertsInFiles
from .load import experts_in_files, load_packed, read_around, require_plain
from .methods import formats_said
from .on_load import packed_on_load

__all__ = [
    "ExpertsInFiles",
    "experts_in_files",
    "formats_said",
    "load_packed",
    "packed_on_load",
    "read_around",
    "require_plain",
]
