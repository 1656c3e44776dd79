"""Megatron-LM's router traces: `router_trace_rank<n>.jsonl`, one record for each step, layer and rank.

A record holds step, block, layer, rank, num_tokens, topk and top_indices (tokens, top-k); with hidden states captured
also hs_offset, hs_bytes and hs_shape, which say where `hidden_states_rank<n>.bin` holds the router's inputs in bfloat16
(NVIDIA/Megatron-LM, the router trace of its MoE transformers). Records of multi-token prediction (block "mtp")
belong to other layers and are left out. Which tokens are of one text is not recorded: the tokens of a rank in a step
count as one.
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.files import parse_object, read_lines, require_file, require_memory
from ...errors import BadTrace
from ..events import DECODE, PREFILL
from ..routing import RoutingTrace, saturating_float16
from .requests import Foreign, make_trace, require_ids
from .responses import array_of_lists

FILES = "router_trace_rank*.jsonl"
#: Of a file of hidden states, and all in it.
MOST_BYTES = 2**48
REMEDY = "it is damaged, or no router trace of Megatron-LM"


class _Record(NamedTuple):
    """Routing of a rank's tokens in one layer and pass."""

    ids: NDArray[np.int64]  # (T, K)
    inputs: NDArray[np.float16] | None  # (T, D)
    where: str


#: (step, pass within it) -> layer -> rank -> record. In training a step has a pass for each micro-batch.
_Passes = dict[tuple[int, int], dict[int, dict[int, _Record]]]


def read_router_trace(path: Path, foreign: Foreign, batch: int | None) -> RoutingTrace:
    """Read the records of a folder, or of one file.

    Args:
        batch: sequences that were decoded side by side, 1 unless given: a pass over more tokens read prompts.

    Raises:
        BadTrace: a record is damaged, its ids are wrong, or layers disagree in their tokens; with file and line.
    """
    files = sorted(path.glob(FILES)) if path.is_dir() else [path]
    if not files:
        raise BadTrace(f"{path} holds no {FILES}")
    passes: _Passes = defaultdict(lambda: defaultdict(dict))
    for file in files:
        _read_file(file, foreign, passes)
    if not passes:
        raise BadTrace(f"{path} holds no record of a decoder layer")
    layers = sorted({layer for found in passes.values() for layer in found})
    if foreign.layers is None and len(layers) != foreign.shape.num_layers:
        raise BadTrace(
            f"{path} holds {len(layers)} MoE layers, shape names {foreign.shape.num_layers}; correct shape"
        )
    foreign = foreign._replace(layers=foreign.layers or layers)
    ids, inputs, columns = [], [], []
    texts = _Texts()
    for number, key in enumerate(sorted(passes)):
        found = _joined(passes[key], foreign.decoder_layers, f"{path}, step {key[0]}")
        require_ids(found[0], foreign.shape.num_experts, foreign.decoder_layers, f"{path}, step {key[0]}")
        ids.append(found[0])
        inputs.append(found[1])
        columns.append(texts.place(number, found[2], batch or 1))
    known = [part for part in inputs if part is not None]
    if known and len(known) < len(inputs):
        raise BadTrace(f"{path}: some passes have hidden states and others have none; capture all or none")
    return make_trace(
        foreign,
        ids=np.concatenate(ids),
        inputs=np.concatenate(known) if known else None,
        columns=np.concatenate(columns, axis=1),
        prompts=[{"id": i, "domain": foreign.kind} for i in range(texts.count)],
    )


class _Texts:
    """Gives the rows of each pass their sequences and positions."""

    def __init__(self) -> None:
        self.count = 0
        self._running: list[int] = []
        self._length: dict[int, int] = {}

    def place(self, step: int, sizes: list[int], batch: int) -> NDArray[np.int64]:
        """(4, T) step, phase, sequence and position of a pass over `sizes` tokens of each rank."""
        total = sum(sizes)
        is_decode = total <= batch
        if not is_decode or len(self._running) != total:
            self._running = list(range(self.count, self.count + (total if is_decode else len(sizes))))
            self.count += len(self._running)
        sequences = np.array(self._running if is_decode else np.repeat(self._running, sizes), np.int64)
        offsets = np.zeros(total, np.int64) if is_decode else np.concatenate([np.arange(n) for n in sizes])
        positions = np.array([self._length.get(int(one), 0) for one in sequences], np.int64) + offsets
        for sequence, position in zip(sequences.tolist(), positions.tolist(), strict=True):
            self._length[sequence] = position + 1
        phase = np.full(total, DECODE if is_decode else PREFILL)
        return np.stack([np.full(total, step), phase, sequences, positions])


def _read_file(file: Path, foreign: Foreign, passes: _Passes) -> None:
    require_memory(4 * require_file(file, BadTrace), str(file), BadTrace)
    seen: dict[tuple[int, int, int], int] = defaultdict(int)
    for number, line in enumerate(read_lines(file, BadTrace, REMEDY), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        record = parse_object(line, where, BadTrace, REMEDY)
        if record.get("block", "decoder") != "decoder":
            continue
        step, layer, rank = (_whole(record, name, where) for name in ("step", "layer", "rank"))
        key = step, layer, rank
        passes[step, seen[key]][layer][rank] = _record(record, rank, file.parent, foreign, where)
        seen[key] += 1


def _whole(record: dict[str, Any], name: str, where: str, below: int = 2**31) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < below:
        raise BadTrace(f"{where}: {name} is {value!r}, expected a whole number from 0; {REMEDY}")
    return value


def _record(record: dict[str, Any], rank: int, folder: Path, foreign: Foreign, where: str) -> _Record:
    tokens, K = _whole(record, "num_tokens", where), foreign.shape.top_k
    ids = array_of_lists(record.get("top_indices", []), where)
    if tokens == 0 and ids.size == 0:  # a rank whose sequences have ended
        ids = np.empty((0, K), np.int64)
    if ids.shape != (tokens, K) or ids.dtype.kind != "i":
        raise BadTrace(
            f"{where}: top_indices are {ids.dtype} of shape {ids.shape}, expected ids of ({tokens}, {K})"
        )
    inputs = (
        _hidden_states(record, tokens, folder / f"hidden_states_rank{rank}.bin", where)
        if "hs_offset" in record
        else None
    )
    return _Record(ids.astype(np.int64), inputs, where)


def _hidden_states(record: dict[str, Any], tokens: int, file: Path, where: str) -> NDArray[np.float16]:
    """(T, D) of the file beside the trace."""
    offset, nbytes = (_whole(record, name, where, MOST_BYTES) for name in ("hs_offset", "hs_bytes"))
    shape = record.get("hs_shape")
    if not (isinstance(shape, list) and len(shape) == 2 and shape[0] == tokens and isinstance(shape[1], int)):
        raise BadTrace(f"{where}: hs_shape is {shape!r}, expected [{tokens}, width]; {REMEDY}")
    if nbytes != 2 * tokens * shape[1] or offset + nbytes > require_file(file, BadTrace):
        raise BadTrace(
            f"{where}: {file.name} does not hold {nbytes} bytes of {shape} bfloat16 at {offset}; {REMEDY}"
        )
    raw = np.fromfile(file, dtype="<u2", count=nbytes // 2, offset=offset)
    return saturating_float16(of_bfloat16(raw)).reshape(tokens, shape[1])


def of_bfloat16(raw: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits as float32: they are its upper half."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def _joined(
    found: dict[int, dict[int, _Record]], layers: list[int], where: str
) -> tuple[NDArray[np.int64], NDArray[np.float16] | None, list[int]]:
    """Ids (T, L, K) and inputs (T, L, D) of a pass over all ranks, and the tokens of each rank.

    With pipeline parallelism a rank has some of the layers only, so a layer's tokens are put together by rank.
    """
    missing = set(layers) - found.keys()
    if missing:
        raise BadTrace(f"{where} lacks layer {min(missing)}; a rank's file is missing or cut off")
    parts = [[found[layer][rank] for rank in sorted(found[layer])] for layer in layers]
    sizes = [[len(record.ids) for record in part] for part in parts]
    for layer, size, part in zip(layers, sizes, parts, strict=True):
        if size != sizes[0]:
            raise BadTrace(
                f"{part[0].where}: layer {layer} has {size} tokens by rank, layer {layers[0]} has {sizes[0]}; a rank's "
                f"file is missing or cut off"
            )
    ids = np.stack([np.concatenate([record.ids for record in part]) for part in parts], axis=1)
    all_inputs = [record.inputs for part in parts for record in part]
    known = [one for one in all_inputs if one is not None]
    if not known:
        return ids, None, sizes[0]
    if len(known) < len(all_inputs) or len({one.shape[1] for one in known}) > 1:
        raise BadTrace(f"{where}: hidden states are missing in some layers, or differ in width")
    inputs = np.stack(
        [np.concatenate([r.inputs for r in part if r.inputs is not None]) for part in parts], axis=1
    )
    return ids, inputs, sizes[0]


def is_router_trace(path: Path) -> bool:
    """Whether a folder or a file is called as Megatron-LM calls them."""
    if path.is_dir():
        return any(path.glob(FILES))
    return re.fullmatch(r"router_trace_rank[0-9]+\.jsonl", path.name) is not None
