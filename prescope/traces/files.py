"""Arrays and metadata as safetensors, and long tables as Parquet: written whole, checked when read.

Knows files, numpy arrays and plain values; what they mean is `routing`'s and `events`' business.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..core.files import checksum, parse_object, require_checksum, require_file, require_memory, write_file
from ..core.paths import user_path
from ..errors import BadTrace

REMEDY = "record it again, or fetch it again"
#: Rows that a byte of a Parquet file may stand for: run lengths can say that a few bytes are billions of equal rows.
MOST_ROWS_PER_BYTE, FREE_ROWS = 16, 1 << 20
#: Where pandas keeps what is attached to a DataFrame.
_ATTRS = b"PANDAS_ATTRS"


class Stored(NamedTuple):
    """What a file holds besides its arrays or columns."""

    format: str
    metadata: dict[str, Any]
    text: str  # the metadata as it is written, which the checksum is of
    checksum: object  # None in files written before there was one


def metadata_text(metadata: Any) -> str:
    """Plain values as they stand in a file; arrays, tensors and numbers of numpy's as lists and numbers.

    Raises:
        BadTrace: there is something else, which no file can hold.
    """
    try:
        return json.dumps(metadata, default=lambda value: value.tolist())
    except (AttributeError, TypeError, ValueError) as error:
        raise BadTrace(
            f"what is known of a trace cannot be written: {error}; use texts, numbers and lists"
        ) from error


def checksum_of(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """The checksum of metadata and arrays."""
    return checksum(
        text,
        {
            name: (f"{array.dtype.str}{array.shape}", np.ascontiguousarray(array).reshape(-1).view(np.uint8))
            for name, array in arrays.items()
        },
    )


def write_arrays(
    path: str | Path, arrays: Mapping[str, np.ndarray], format_name: str, metadata: Mapping[str, Any]
) -> Path:
    """Write arrays as safetensors with their metadata and a checksum of both.

    Raises:
        BadTrace: as `metadata_text`.
        CannotWrite: the disk is full, or the place cannot be written.
    """
    text = metadata_text(metadata)
    header = {"format": format_name, "prescope": text, "checksum": checksum_of(text, arrays)}
    return write_file(path, lambda unfinished: save_file(dict(arrays), unfinished, header))


def read_arrays(path: str | Path, format_name: str, what: str) -> tuple[dict[str, np.ndarray], Stored]:
    """Arrays and metadata written by `write_arrays`; `what` it should be, in words.

    Raises:
        BadTrace: no regular file, truncated, corrupt, of another format, or not as it was written.
        FileNotFoundError: there is none.
    """
    path = user_path(path)
    require_memory(require_file(path, BadTrace), str(path), BadTrace)
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError, TypeError, ValueError, KeyError) as error:  # numpy lacks some dtypes
        raise BadTrace(
            f"{path} cannot be read as safetensors, it is truncated or another file: {error}"
        ) from error
    stored = _stored(header, path, format_name, what)
    require_checksum(stored.checksum, checksum_of(stored.text, arrays), path, BadTrace, REMEDY)
    return arrays, stored


def write_table(
    path: str | Path,
    frame: pd.DataFrame,
    format_name: str,
    metadata: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
) -> Path:
    """Write a table as Parquet with metadata in its schema, and a checksum of the `arrays` that it stands for.

    Raises:
        CannotWrite: the disk is full, or the place cannot be written.
    """
    text = metadata_text(metadata)
    frame = frame.copy(deep=False)
    frame.attrs = {"format": format_name, "prescope": text, "checksum": checksum_of(text, arrays)}
    return write_file(path, lambda unfinished: frame.to_parquet(unfinished, index=False))


def read_table(
    path: str | Path, format_name: str | None, columns: list[str], what: str
) -> tuple[pd.DataFrame, Stored]:
    """A table written by `write_table`, with exactly these columns; `format_name` None: of any format.

    Raises:
        BadTrace: no Parquet, of another format, a column is missing, or it holds more rows than a file of its size can.
        FileNotFoundError: there is none.
    """
    path = user_path(path)
    nbytes = require_file(path, BadTrace)
    try:
        with pq.ParquetFile(path) as file:
            attrs = (file.schema_arrow.metadata or {}).get(_ATTRS, b"{}").decode("utf-8")
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if rows > FREE_ROWS + MOST_ROWS_PER_BYTE * nbytes:
                raise BadTrace(f"{path} has {nbytes:,} bytes and says it holds {rows:,} rows; {REMEDY}")
            missing = [column for column in columns if column not in names]
            if not missing:
                frame = file.read(columns=columns).to_pandas(ignore_metadata=True)
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        raise BadTrace(f"{path} cannot be read as Parquet: {error}") from error
    header = parse_object(attrs, f"{path}: its metadata", BadTrace, REMEDY)
    stored = _stored(header, path, format_name, what)
    if missing:
        raise BadTrace(
            f"{path} is {what if format_name is None else 'no ' + what}; it lacks the columns {missing}"
        )
    return frame, stored


def require_columns(frame: pd.DataFrame, dtypes: Mapping[str, Any], path: str | Path) -> None:
    """Make sure that columns can be cast to these dtypes without a change: no gaps, no words for numbers, in range.

    Raises:
        BadTrace: with the column.
    """
    for name, dtype in dtypes.items():
        column = frame[name]
        if column.isna().any():
            raise BadTrace(f"{path}: column {name} has gaps; {REMEDY}")
        if isinstance(dtype, pd.CategoricalDtype):
            unknown = sorted(set(map(str, column.unique())) - set(dtype.categories))
            if unknown:
                raise BadTrace(
                    f"{path}: column {name} holds {unknown[:3]}, which this version does not know; {REMEDY}"
                )
            continue
        if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
            raise BadTrace(f"{path}: column {name} is {column.dtype}, expected {dtype}; {REMEDY}")
        if np.issubdtype(dtype, np.integer) and len(column):
            limits = np.iinfo(dtype)
            if (
                not np.issubdtype(column.dtype, np.integer)
                or column.min() < limits.min
                or column.max() > limits.max
            ):
                raise BadTrace(f"{path}: column {name} holds numbers that are no {dtype}; {REMEDY}")


def _stored(header: Mapping[str, Any], path: str | Path, format_name: str | None, what: str) -> Stored:
    found = header.get("format", "none")
    if format_name is not None and found != format_name:
        raise BadTrace(f"{path} is no {what}: its format is {found!r}, expected {format_name!r}")
    text = str(header.get("prescope", "{}"))
    values = parse_object(text, f"{path}: its metadata", BadTrace, REMEDY)
    return Stored(str(found), values, text, header.get("checksum"))
