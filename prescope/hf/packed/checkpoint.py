"""The tensors of a checkpoint's safetensors files by name: shapes from the headers, values from mapped memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ...errors import BadModelFolder


class Entry(NamedTuple):
    """What a header says of a tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16", "F8_E4M3", "U8", ...


class Checkpoint:
    """Files that are open for reading; no weight is in memory before it is asked for.

    Attributes:
        entries: by name.

    Raises:
        BadModelFolder: a file cannot be read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        self._handles: dict[Path, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, "pt")
                for name in handle.keys():  # noqa: SIM118 - no dict
                    found = handle.get_slice(name)
                    self.entries[name] = Entry(file, tuple(found.get_shape()), found.get_dtype())
            except (SafetensorError, OSError) as error:
                raise BadModelFolder(f"{file} is truncated or corrupt ({error}); fetch it again") from error
            self._handles[file] = handle

    def read(self, name: str) -> torch.Tensor:
        """A tensor's values."""
        value: torch.Tensor = self._handles[self.entries[name].file].get_tensor(name)
        return value

    def lazy(self, name: str) -> Any:
        """Something that gives the values when it is sliced, as transformers takes it for a tensor."""
        return self._handles[self.entries[name].file].get_slice(name)
