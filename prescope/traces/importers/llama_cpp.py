"""llama.cpp's moe-trace: which experts each token's layers used, as CSV, of one prompt and its continuation.

Two forms are known. `layer,expert`, one row for each used expert, as the example writes it (ggml-org/llama.cpp, pull
request 28544, `examples/moe-trace`): tokens are not numbered, but the rows of one layer and micro-batch stand together,
a token's experts in a row. And `phase,token,layer,rank,expert`, of forks that number them. Both with or without a head.

llama.cpp computes the last layer of a prompt for those tokens only whose output is wanted, so there the others have no
experts.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ...core.files import require_file, require_memory
from ...errors import BadTrace
from ..events import DECODE, PREFILL
from ..routing import RoutingTrace
from .requests import Foreign, make_trace, require_ids

SHORT, LONG = ["layer", "expert"], ["phase", "token", "layer", "rank", "expert"]
PHASE_NAMES = {"prefill": PREFILL, "prompt": PREFILL, "decode": DECODE, "generate": DECODE}


class _Block(NamedTuple):
    """Rows of one layer in one micro-batch."""

    layer: int
    first: int  # row of the table
    end: int


def read_moe_trace(path: Path, foreign: Foreign) -> RoutingTrace:
    """Read a moe-trace.

    Raises:
        BadTrace: it has other columns, a row is no numbers, ids are wrong, or it ends within a step; with the line.
    """
    table, first_line = _table(path)
    columns = list(table.columns)
    layers = sorted(set(table["layer"].tolist()))
    if foreign.layers is not None:
        layers = foreign.layers
        table = table[table["layer"].isin(layers)]
    elif len(layers) != foreign.shape.num_layers:
        raise BadTrace(
            f"{path} holds {len(layers)} MoE layers ({layers[:3]} ...), shape names {foreign.shape.num_layers}; name "
            f"the MoE layers with layers=[...], or correct shape"
        )
    foreign = foreign._replace(layers=layers)
    if table.empty:
        raise BadTrace(f"{path} holds no row of the layers {layers[:3]}")
    where = f"{path}, line {first_line} on"
    ids, columns_CR = (
        _of_blocks(table, foreign, path) if columns == SHORT else _of_tokens(table, foreign, path)
    )
    require_ids(ids, foreign.shape.num_experts, layers, where)
    return make_trace(foreign, ids=ids, columns=columns_CR, prompts=[{"id": 0, "domain": foreign.kind}])


def _table(path: Path) -> tuple[pd.DataFrame, int]:
    """The numbers of the file with their names, indexed by line, and the first line of data."""
    require_memory(4 * require_file(path, BadTrace), str(path), BadTrace)
    try:
        table = pd.read_csv(
            path,
            header=None,
            dtype=str,
            comment="#",
            skip_blank_lines=False,
            encoding="utf-8",
            na_filter=False,
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeError, OSError, ValueError) as error:
        raise BadTrace(
            f"{path} is no moe-trace ({error}); columns are {','.join(SHORT)} or {','.join(LONG)}"
        ) from error
    table.index = pd.RangeIndex(1, len(table) + 1)
    table = table[(table != "").any(axis=1)]
    names = {len(SHORT): SHORT, len(LONG): LONG}.get(len(table.columns), [])
    head = [str(value).strip() for value in table.iloc[0]] if len(table) else []
    if not names or (head != names and any(word.isalpha() for word in head[-2:])):
        raise BadTrace(f"{path} has the columns {head}, expected {','.join(SHORT)} or {','.join(LONG)}")
    table.columns = pd.Index(names)
    table = table.iloc[1:] if head == names else table
    if table.empty:
        raise BadTrace(f"{path} holds no row")
    numbers = {name: _numbers(table[name], path) for name in names}
    return pd.DataFrame(numbers, index=table.index), int(table.index[0])


def _numbers(column: pd.Series, path: Path) -> pd.Series:
    if column.name == "phase":
        found = column.str.strip().str.lower().map(PHASE_NAMES)
    else:
        is_number = column.str.strip().str.fullmatch(r"-?[0-9]{1,9}")
        found = pd.to_numeric(column.where(is_number), errors="coerce")
    wrong = found.isna()
    if wrong.any():
        line = int(column.index[wrong][0])
        raise BadTrace(
            f"{path}, line {line}: {column.name} is {column[line]!r}; {int(wrong.sum())} such rows"
        )
    return found.astype(np.int64)


def _of_blocks(
    table: pd.DataFrame, foreign: Foreign, path: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids (R, L, K) and columns (4, R) of the short form."""
    K, layers = foreign.shape.top_k, foreign.decoder_layers
    if len(layers) < 2:
        raise BadTrace(f"{path} names no tokens, so with one MoE layer nobody can tell where a step ends")
    layer, lines = table["layer"].to_numpy(), table.index.to_numpy()
    starts = np.flatnonzero(np.concatenate(([True], layer[1:] != layer[:-1])))
    ends = np.append(starts[1:], len(layer))
    steps: list[list[_Block]] = []
    for first, end in zip(starts.tolist(), ends.tolist(), strict=True):
        block = _Block(int(layer[first]), first, end)
        if (end - first) % K:
            raise BadTrace(
                f"{path}, line {lines[first]}: {end - first} rows of layer {block.layer} are no whole tokens of top-{K}"
            )
        if not steps or block.layer <= steps[-1][-1].layer:
            steps.append([])
        steps[-1].append(block)
    experts = table["expert"].to_numpy()
    parts = [_ids_of_step(step, experts, lines, foreign, path) for step in steps]
    sizes = np.array([len(part) for part in parts])
    total = int(sizes.sum())
    phase = np.repeat(np.where(sizes > 1, PREFILL, DECODE), sizes)
    step = np.repeat(np.arange(len(parts)), sizes)
    return np.concatenate(parts), np.stack([step, phase, np.zeros(total, np.int64), np.arange(total)])


def _ids_of_step(
    blocks: list[_Block], experts: NDArray[np.int64], lines: NDArray[np.int64], foreign: Foreign, path: Path
) -> NDArray[np.int64]:
    """(T, L, K) of one micro-batch; in the last layer of several tokens, only the last ones may be there."""
    K, layers = foreign.shape.top_k, foreign.decoder_layers
    T = max((block.end - block.first) // K for block in blocks)
    ids = np.full((T, len(layers), K), -1, np.int64)
    place = {layer: i for i, layer in enumerate(layers)}
    missing = set(layers) - {block.layer for block in blocks} - ({layers[-1]} if T > 1 else set())
    if missing:
        raise BadTrace(
            f"{path}: the step of lines {lines[blocks[0].first]} to {lines[blocks[-1].end - 1]} lacks layer "
            f"{min(missing)}; the file is cut off, or of a model with other layers"
        )
    for block in blocks:
        part = experts[block.first : block.end].reshape(-1, K)
        if len(part) < T and block.layer != layers[-1]:
            raise BadTrace(
                f"{path}, line {lines[block.first]}: layer {block.layer} has {len(part)} tokens, others of its step {T}"
            )
        ids[T - len(part) :, place[block.layer]] = part
    return ids


def _of_tokens(
    table: pd.DataFrame, foreign: Foreign, path: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids (R, L, K) and columns (4, R) of the long form."""
    K, layers = foreign.shape.top_k, foreign.decoder_layers
    _require_once(table, K, path)
    tokens, row = np.unique(table["token"].to_numpy(), return_inverse=True)
    phase = np.full(len(tokens), -1)
    phase[row] = table["phase"]
    if bool(np.any(phase[row] != table["phase"].to_numpy())) or (np.diff(phase) < 0).any():
        raise BadTrace(f"{path}: decoded tokens come before some of the prompt, or a token is in both phases")
    ids = np.full((len(tokens), len(layers), K), -1, np.int64)
    is_there = np.zeros(ids.shape, bool)
    place = row, np.searchsorted(layers, table["layer"]), table["rank"]
    ids[place], is_there[place] = table["expert"], True
    has_all: NDArray[np.bool_] = np.all(is_there, axis=2)
    has_all[:, -1] |= (phase == PREFILL) & ~is_there[:, -1].any(axis=1)
    if not has_all.all():
        token, layer = np.argwhere(~has_all)[0].tolist()
        raise BadTrace(
            f"{path}: token {tokens[token]} has fewer than {K} experts in layer {layers[layer]}; the file is cut off"
        )
    step = np.where(phase == DECODE, np.cumsum(phase == DECODE), 0)
    return ids, np.stack([step - step.min(), phase, np.zeros(len(tokens), np.int64), tokens])


def _require_once(table: pd.DataFrame, top_k: int, path: Path) -> None:
    wrong = (table["rank"] < 0) | (table["rank"] >= top_k) | (table["token"] < 0)
    wrong |= table.duplicated(["token", "layer", "rank"])
    if wrong.any():
        line = int(table.index[wrong][0])
        at = table.loc[line]
        raise BadTrace(
            f"{path}, line {line}: token {at['token']}, layer {at['layer']}, rank {at['rank']} is there twice, or its "
            f"rank is outside [0, {top_k})"
        )
