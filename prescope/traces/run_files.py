"""A run as a folder: its tables as Parquet, its routing as safetensors, everything else as JSON.

`run.json` names the other files by their content, and is written last: whoever reads sees the run before or the new
one, never parts of both. Knows files and tables; what a run is, is `result`'s business.
"""

import json
import re
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..core.files import checksum, read_object, require_checksum, sorted_json, write_text
from ..core.paths import user_path
from ..errors import BadTrace, CannotWrite
from .events import TABLES, digest_of_table, read_named_table, write_named_table
from .files import REMEDY
from .routing import RoutingTrace

FORMAT = "prescope.run"
VERSION = 1
INDEX = "run.json"
#: Text and tokens of a batch of long generations.
MOST_BYTES = 256 << 20
#: Name of a part: what it is, and the first digits of its checksum.
_PART = re.compile(r"(events|layers|steps|trace)\.[0-9a-f]{12}\.(parquet|safetensors)")


class StoredRun(NamedTuple):
    """What a folder holds."""

    tables: dict[str, pd.DataFrame]  # as `events.TABLES`
    trace: RoutingTrace | None
    facts: dict[str, Any]


def write_run(
    folder: str | Path,
    tables: Mapping[str, pd.DataFrame],
    trace: RoutingTrace | None,
    facts: Mapping[str, Any],
) -> Path:
    """Write a run's parts into a folder, which is made if it is not there; a run that was there is replaced.

    Raises:
        CannotWrite: no space, no permission, or `folder` is a file. What was there before is unchanged.
    """
    folder = user_path(folder)
    if isfile(folder):  # also of a name that is too long
        raise CannotWrite(f"{folder} is a file; a run is saved as a folder, give another name")
    parts = {}
    for name, table in tables.items():
        found = digest_of_table(name, table)
        parts[name] = {"file": f"{name}.{found[:12]}.parquet", "checksum": found}
        write_named_table(name, table, folder / parts[name]["file"])
    if trace is not None:
        found = trace.digest()
        parts["trace"] = {"file": f"trace.{found[:12]}.safetensors", "checksum": found}
        trace.save(folder / parts["trace"]["file"])
    # As a reader gets it, so that its checksum is of that: no tuples, no numbers as keys.
    contents = json.loads(
        json.dumps({"format": FORMAT, "version": VERSION, "parts": parts, **facts}, default=_plain)
    )
    written = {**contents, "checksum": checksum(sorted_json(contents))}
    write_text(folder / INDEX, json.dumps(written, indent=1) + "\n")
    kept = {part["file"] for part in parts.values()}
    for file in folder.iterdir():  # of the run that this one replaces
        if _PART.fullmatch(file.name) and file.name not in kept:
            file.unlink(missing_ok=True)
    return folder


def read_run(folder: str | Path) -> StoredRun:
    """What `write_run` wrote; `folder` may be its `run.json` too.

    Raises:
        BadTrace: it is no saved run, a part is damaged, missing, or of another run.
        FileNotFoundError: there is none.
    """
    folder = user_path(folder)
    folder = folder.parent if folder.name == INDEX else folder
    if isfile(folder):
        raise BadTrace(f"{folder} is a file; a saved run is a folder with a {INDEX}")
    path = folder / INDEX
    contents = read_object(path, BadTrace, REMEDY, MOST_BYTES)
    if (contents.pop("format", None), contents.pop("version", None)) != (FORMAT, VERSION):
        raise BadTrace(f"{path} is no run saved in version {VERSION}; {REMEDY}")
    written = contents.pop("checksum", None)
    found = checksum(sorted_json({"format": FORMAT, "version": VERSION, **contents}))
    require_checksum(written or "none", found, path, BadTrace, REMEDY)
    named = contents.pop("parts", None)
    if not isinstance(named, dict):
        raise BadTrace(f"{path} names no parts; {REMEDY}")
    parts = {name: _Part.of(name, one, path) for name, one in named.items()}
    if missing := TABLES.keys() - parts.keys():
        raise BadTrace(f"{path} names no {', '.join(sorted(missing))}; {REMEDY}")
    try:
        tables = {name: read_named_table(name, folder / parts[name].file) for name in TABLES}
        trace = RoutingTrace.load(folder / parts["trace"].file) if "trace" in parts else None
    except FileNotFoundError as error:
        raise BadTrace(f"{folder}: a part of the run is missing ({error.filename}); {REMEDY}") from error
    for name, table in tables.items():
        require_checksum(
            parts[name].checksum, digest_of_table(name, table), folder / parts[name].file, BadTrace, REMEDY
        )
    if trace is not None:
        require_checksum(
            parts["trace"].checksum, trace.digest(), folder / parts["trace"].file, BadTrace, REMEDY
        )
    return StoredRun(tables, trace, contents)


def _plain(value: object) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{value!r} in a run's settings cannot be written as JSON")


class _Part(NamedTuple):
    """A file of a run and the checksum of what it holds."""

    file: str
    checksum: str

    @classmethod
    def of(cls, name: str, said: Any, path: Path) -> "_Part":
        """As `run.json` says it; a name that leads out of the folder is no part's."""
        file, written = (
            (said.get(key) for key in ("file", "checksum")) if isinstance(said, dict) else (None, None)
        )
        if not isinstance(file, str) or not isinstance(written, str) or not _PART.fullmatch(file):
            raise BadTrace(f"{path}: its part {name!r} is {said!r}; {REMEDY}")
        return cls(file, written)
