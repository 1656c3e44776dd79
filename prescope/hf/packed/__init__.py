"""Packed checkpoints: experts go into host rows as they lie in the files, all else is unpacked for transformers."""

from .load import load_packed, require_plain
from .methods import formats_said
from .on_load import packed_on_load

__all__ = ["formats_said", "load_packed", "packed_on_load", "require_plain"]
