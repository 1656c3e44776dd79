"""The routing trace: which experts every token used, with the router's weights and, if wanted, its inputs.

The engine records it; training and simulation read it. A row is one token of one step, in step order.

| array | dtype and shape | meaning |
|---|---|---|
| expert_ids | int16 (R, L, K) | experts used, -1 where the token used fewer than K |
| weights | float32 (R, L, K) | router weights as the experts' outputs were scaled; 0 where the id is -1 |
| inputs | float16 (R, L, D), optional | router inputs, see `saturating_float16` |
| step | int32 (R,) | forward pass, never decreasing |
| sequence | int32 (R,) | sequence within the batch |
| position | int32 (R,) | position of the token in its sequence, -1 for padding |
| phase | int8 (R,) | 0 prefill, 1 decode (`events.PHASES`) |

R rows, L MoE layers, K top-k, D model width, E experts. Padding tokens are rows as well: their experts are
moved and computed like any other's, and a replay that left them out would not equal the run.
Knows nothing of torch, models or clocks.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..core.files import require_checksum
from ..core.html import facts_html
from ..core.types import MoEShape, Phase
from ..core.units import count_of
from ..errors import BadTrace, TraceMismatch
from .events import DECODE, PHASES
from .files import (
    REMEDY,
    Stored,
    checksum_of,
    metadata_text,
    read_arrays,
    read_table,
    require_columns,
    write_arrays,
    write_table,
)

FORMAT = "prescope-routing-1"
#: Rows checked at once for NaN: with router inputs, a few MB.
CHECK_ROWS = 64
#: Ids are int16.
MOST_EXPERTS = 2**15
_ARRAYS: dict[str, tuple[str, str]] = {
    "expert_ids": ("int16", "RLK"),
    "weights": ("float32", "RLK"),
    "inputs": ("float16", "RLD"),
    "step": ("int32", "R"),
    "sequence": ("int32", "R"),
    "position": ("int32", "R"),
    "phase": ("int8", "R"),
}
_FRAME_DTYPES: dict[str, Any] = {
    "row": np.dtype("int64"),
    "step": np.dtype("int32"),
    "phase": pd.CategoricalDtype(PHASES),
    "sequence": np.dtype("int32"),
    "position": np.dtype("int32"),
    "moe_layer": np.dtype("int16"),
    "rank": np.dtype("int16"),
    "expert": np.dtype("int16"),
    "weight": np.dtype("float32"),
}


class LayerUse(NamedTuple):
    """What one MoE layer needs in one step."""

    moe_layer: int
    experts: np.ndarray  # (n,) int64, distinct, ascending
    tokens: np.ndarray  # (n,) int64, tokens that use each of them


class StepRouting(NamedTuple):
    """The routing of all tokens of one step, layer by layer."""

    ids_LTK: np.ndarray  # (L, T, K) int16, -1 where a token used fewer than K experts
    weights_LTK: np.ndarray  # (L, T, K) float32, 0 beside an id of -1


def used_mask(ids: NDArray[np.integer[Any]], num_experts: int) -> NDArray[np.bool_]:
    """(..., E) bool from ids (..., K): which experts are used; an id of -1 marks none."""
    flat = ids.reshape(-1, ids.shape[-1]).astype(np.int64)
    # One column more takes the ids of -1, and is cut off.
    mask = np.zeros((len(flat), num_experts + 1), dtype=bool)
    np.put_along_axis(mask, np.where(flat < 0, num_experts, flat), True, axis=1)
    return mask[:, :num_experts].reshape(*ids.shape[:-1], num_experts)


def saturating_float16(values: np.ndarray) -> np.ndarray:
    """Router inputs as float16: beyond +-65504 they become +-65504, NaN stays NaN.

    float16 has more mantissa bits than bfloat16, so bfloat16 inputs between 2**-14 and 65504 in size are kept
    exactly; smaller ones move by at most 3e-8.
    """
    if values.dtype == np.float16:  # gigabytes, and a trace is made anew for every choice of its rows
        return values
    limit = np.finfo(np.float16).max
    return np.clip(values, -limit, limit).astype(np.float16)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RoutingTrace:
    """Routing of every token of a run (or of several, see `concat`), and the model it belongs to.

    Arrays as in the module's table; they are converted to its dtypes and checked on construction.

    Attributes:
        model: name or folder, for people. `fingerprint` decides whether two models are the same.
        fingerprint: hash of what determines routing; the engine computes it.
        num_experts: the most experts any layer has. `top_k`: K.
        decoder_layers: decoder index of each of the L MoE layers.
        prompts: one dict for each sequence: id, domain, text or whatever is known of it.
        versions: of prescope, transformers and what else wrote it.
        created: ISO 8601, UTC.

    Raises:
        BadTrace: shapes disagree, an id is outside [-1, num_experts), a number is NaN or infinite, or steps
            decrease.
    """

    expert_ids: np.ndarray
    weights: np.ndarray
    step: np.ndarray
    sequence: np.ndarray
    position: np.ndarray
    phase: np.ndarray
    inputs: np.ndarray | None = None
    model: str
    fingerprint: str
    num_experts: int
    top_k: int
    decoder_layers: list[int]
    prompts: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def __post_init__(self) -> None:
        self._check_metadata()
        sizes = {"L": len(self.decoder_layers), "K": self.top_k}
        for name, (dtype, letters) in _ARRAYS.items():
            array = getattr(self, name)
            if array is None and name == "inputs":
                continue
            _check_shape(name, array, letters, sizes)
            _check_values(name, array, self.num_experts)
            cast = saturating_float16(array) if name == "inputs" else array.astype(dtype, copy=False)
            object.__setattr__(self, name, np.ascontiguousarray(cast))
        if (np.diff(self.step) < 0).any():
            raise BadTrace("steps of a routing trace never decrease; sort its rows by step")

    def _check_metadata(self) -> None:
        whole = [("num_experts", self.num_experts, MOST_EXPERTS), ("top_k", self.top_k, MOST_EXPERTS)]
        whole += [
            ("decoder_layers", layer, 2**31) for layer in _listed("decoder_layers", self.decoder_layers)
        ]
        for name, value, most in whole:
            if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value <= most:
                raise BadTrace(f"{name} is {value!r}, which is no number up to {most:,}")
        for name in ("model", "fingerprint", "created"):
            if not isinstance(getattr(self, name), str):
                raise BadTrace(f"{name} is {getattr(self, name)!r}, which is no text")
        if not all(isinstance(prompt, dict) for prompt in _listed("prompts", self.prompts)):
            raise BadTrace("prompts hold something that is no dict")
        if not isinstance(self.versions, dict):
            raise BadTrace(f"versions are {self.versions!r}, which is no dict")

    def __len__(self) -> int:
        return len(self.step)

    @property
    def shape(self) -> MoEShape:
        """Sizes of the model's MoE part, without the bytes."""
        return MoEShape(self.num_layers, self.num_experts, self.top_k)

    @property
    def num_layers(self) -> int:
        return len(self.decoder_layers)

    @property
    def num_sequences(self) -> int:
        """How many numbers its sequences take: those of prompts whose rows are not here count as well."""
        return max(len(self.prompts), int(self.sequence.max(initial=-1)) + 1)

    def prompt_of_each(self) -> list[dict[str, Any]]:
        """What is known of the prompt of each sequence, by its number; an empty dict where nothing is."""
        return [*self.prompts, *({} for _ in range(self.num_sequences - len(self.prompts)))]

    @property
    def steps(self) -> list[int]:
        """Distinct steps, ascending."""
        return np.unique(self.step).tolist()

    def __repr__(self) -> str:
        inputs = "" if self.inputs is None else f", inputs of width {self.inputs.shape[2]}"
        return (
            f"<RoutingTrace {self.model}: {count_of(len(self), 'token')} in {count_of(len(self.steps), 'step')}, "
            f"{self.num_layers} MoE layers, top-{self.top_k} of {self.num_experts}{inputs}>"
        )

    def _repr_html_(self) -> str:
        decode = int((self.phase == DECODE).sum())
        facts = [
            ("tokens", f"{len(self):,} in {count_of(len(self.steps), 'step')}, {decode:,} of them decoded"),
            ("model", f"{self.num_layers} MoE layers, top-{self.top_k} of {self.num_experts} experts"),
            ("router inputs", "none" if self.inputs is None else f"width {self.inputs.shape[2]}"),
            ("recorded", f"{self.created}, {count_of(len(self.prompts), 'prompt')}"),
        ]
        return facts_html(f"Routing of {self.model}", facts)

    def needed(self, step: int) -> Iterator[LayerUse]:
        """Distinct experts each MoE layer needs in a step, with the tokens that use them; layers in order."""
        first, end = np.searchsorted(self.step, [step, step + 1])
        counts_LE = _counts(self.expert_ids[first:end], self.num_experts)
        for layer, counts_E in enumerate(counts_LE):
            experts = np.flatnonzero(counts_E)
            yield LayerUse(layer, experts, counts_E[experts])

    def step_routing(self, step: int) -> StepRouting:
        """Ids (L, T, K) int16 and weights (L, T, K) float32 of a step's T tokens, in row order; contiguous copies.

        What an engine needs to be forced to route as recorded, one layer after the other.

        Raises:
            BadTrace: the trace has no such step.
        """
        first, end = np.searchsorted(self.step, [step, step + 1])
        if first == end:
            steps = self.steps
            known = f"steps {steps[0]} to {steps[-1]}" if steps else "no steps"
            raise BadTrace(f"the trace of {self.model} has no step {step}; it has {known}")
        rows = slice(first, end)
        return StepRouting(
            np.ascontiguousarray(self.expert_ids[rows].transpose(1, 0, 2)),
            np.ascontiguousarray(self.weights[rows].transpose(1, 0, 2)),
        )

    def expert_counts(self) -> np.ndarray:
        """(L, E) int64: tokens each expert of each MoE layer was used by; padding tokens count."""
        return _counts(self.expert_ids, self.num_experts)

    def select(self, *, phase: Phase | None = None, steps: Iterable[int] | None = None) -> Self:
        """The rows of one phase, of some steps, or both; ids, steps and metadata unchanged."""
        keep = np.ones(len(self), dtype=bool)
        if phase is not None:
            keep &= self.phase == PHASES.index(phase)
        if steps is not None:
            keep &= np.isin(self.step, list(steps))
        return self.take(keep)

    def take(self, rows: NDArray[np.bool_] | NDArray[np.integer[Any]]) -> Self:
        """Some rows, by a mask (R,) or by ascending numbers; ids, steps and metadata unchanged."""
        kept: dict[str, Any] = {name: array[rows] for name, array in self._arrays().items()}
        return replace(self, **kept)

    def check_model(self, fingerprint: str, name: str) -> None:
        """Make sure that this trace was recorded with the model of this fingerprint.

        Raises:
            TraceMismatch: it was not.
        """
        if fingerprint != self.fingerprint:
            raise TraceMismatch(
                f"the trace was recorded with {self.model} (fingerprint {self.fingerprint}), the model is "
                f"{name} (fingerprint {fingerprint}); record a trace with this model "
                f"(engine.generate(...).trace), or load the model the trace belongs to"
            )

    def check_same_model(self, other: "RoutingTrace") -> None:
        """Make sure that another trace is of this one's model, and its router inputs, if both have them, as wide.

        Raises:
            TraceMismatch: it is not.
        """
        other.check_model(self.fingerprint, self.model)
        widths = [None if one.inputs is None else one.inputs.shape[2] for one in (self, other)]
        sizes = [(one.shape[:3], one.decoder_layers) for one in (self, other)]
        if sizes[0] == sizes[1] and (None in widths or widths[0] == widths[1]):
            return
        mine, others = (
            f"(layers, experts, top-k) = {shape}, decoder layers {layers}, inputs of width {width}"
            for (shape, layers), width in zip(sizes, widths, strict=True)
        )
        raise TraceMismatch(
            f"traces of {self.model} and {other.model} cannot be joined: {mine}; {others}. Record both with one model"
        )

    @classmethod
    def concat(cls, traces: Sequence["RoutingTrace"]) -> "RoutingTrace":
        """Several runs of one model as one trace: steps and sequences of each follow those of the one before.

        Inputs are kept when all have them, else left out. Metadata is the first's, prompts are everyone's: each stays
        with its sequence, also where a trace holds some rows of a run alone, or knows nothing of its prompts.

        Raises:
            TraceMismatch: the traces are of different models.
            ValueError: no traces.
        """
        if not traces:
            raise ValueError("concat needs at least one trace")
        head = traces[0]
        knows_prompts = any(trace.prompts for trace in traces)
        columns: dict[str, list[np.ndarray]] = {}
        step = sequence = 0
        for trace in traces:
            head.check_same_model(trace)
            moved = trace._arrays() | {"step": trace.step + step, "sequence": trace.sequence + sequence}
            for name, array in moved.items():
                columns.setdefault(name, []).append(array)
            step += int(trace.step.max(initial=-1)) + 1
            sequence += trace.num_sequences
        arrays: dict[str, Any] = {name: np.concatenate(parts) for name, parts in columns.items()}
        if any(trace.inputs is None for trace in traces):
            arrays["inputs"] = None
        prompts = [prompt for trace in traces for prompt in trace.prompt_of_each()] if knows_prompts else []
        return replace(head, **arrays, prompts=prompts)

    def digest(self) -> str:
        """A checksum of arrays and metadata."""
        return checksum_of(metadata_text(self._metadata()), self._arrays())

    def save(self, path: str | Path) -> Path:
        """Write arrays and metadata as safetensors; a reader sees the old file or the whole new one.

        Raises:
            CannotWrite: no space, or no permission.
        """
        return write_arrays(path, self._arrays(), FORMAT, self._metadata())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a trace written by `save`.

        Raises:
            BadTrace: the file is truncated, corrupt, no routing trace, or its arrays do not fit together.
            FileNotFoundError: there is none.
        """
        arrays, stored = read_arrays(path, FORMAT, "routing trace")
        return cls._assemble(path, arrays, stored)

    def to_frame(self) -> pd.DataFrame:
        """One row for each expert a token used: row, step, phase, sequence, position, moe_layer, rank,
        expert, weight. Ids of -1 are left out, and so are the inputs.
        """
        frame = self._full_frame()
        return frame[frame["expert"] >= 0].reset_index(drop=True)

    def save_parquet(self, path: str | Path) -> Path:
        """Write ids and weights as Parquet for other tools; router inputs are not in it, `save` keeps them.

        Metadata, the fingerprint among it, stands in the Parquet schema metadata (key PANDAS_ATTRS).
        """
        without_inputs = {name: array for name, array in self._arrays().items() if name != "inputs"}
        return write_table(path, self._full_frame(), FORMAT, self._metadata(), without_inputs)

    @classmethod
    def load_parquet(cls, path: str | Path) -> Self:
        """Read a trace written by `save_parquet`; `inputs` is None.

        Raises:
            BadTrace: the file is no Parquet, no routing trace, a row is missing or doubled, or it is not as written.
            FileNotFoundError: there is none.
        """
        frame, stored = read_table(path, FORMAT, list(_FRAME_DTYPES), "routing trace")
        require_columns(frame, _FRAME_DTYPES, path)
        arrays = _arrays_of_frame(frame, path)
        trace = cls._assemble(path, arrays, stored)
        require_checksum(stored.checksum, checksum_of(stored.text, trace._arrays()), path, BadTrace, REMEDY)
        return trace

    def _arrays(self) -> dict[str, np.ndarray]:
        present = {name: getattr(self, name) for name in _ARRAYS}
        return {name: array for name, array in present.items() if array is not None}

    def _metadata(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _ARRAYS}

    @classmethod
    def _assemble(cls, path: str | Path, arrays: dict[str, np.ndarray], stored: Stored) -> Self:
        known = {f.name for f in fields(cls)}
        missing = sorted(_ARRAYS.keys() - arrays.keys() - {"inputs"})
        if missing:
            raise BadTrace(f"{path} lacks the arrays {', '.join(missing)}")
        try:
            return cls(**{k: v for k, v in (stored.metadata | arrays).items() if k in known})
        except TypeError as error:
            raise BadTrace(f"{path}: its metadata is damaged: {error}; {REMEDY}") from error
        except BadTrace as error:
            raise BadTrace(f"{path}: {error}") from error

    def _full_frame(self) -> pd.DataFrame:
        shape = self.expert_ids.shape
        row_RLK, layer_RLK, rank_RLK = (index.ravel() for index in np.indices(shape))
        columns = {
            "row": row_RLK,
            "step": self.step[row_RLK],
            "phase": pd.Categorical.from_codes(self.phase[row_RLK], dtype=_FRAME_DTYPES["phase"]),
            "sequence": self.sequence[row_RLK],
            "position": self.position[row_RLK],
            "moe_layer": layer_RLK,
            "rank": rank_RLK,
            "expert": self.expert_ids.ravel(),
            "weight": self.weights.ravel(),
        }
        return pd.DataFrame(columns).astype(_FRAME_DTYPES)


def _listed(name: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise BadTrace(f"{name} is {value!r}, which is no list")
    return value


def _counts(ids_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """(L, E) int64: how often each id occurs in each layer."""
    num_layers = ids_TLK.shape[1]
    flat = ids_TLK + (np.arange(num_layers, dtype=np.int64) * num_experts)[None, :, None]
    counts = np.bincount(flat[ids_TLK >= 0], minlength=num_layers * num_experts)
    return counts.reshape(num_layers, num_experts)


def _check_shape(name: str, array: np.ndarray, letters: str, sizes: dict[str, int]) -> None:
    """Each letter means one size in all arrays; L and K are known beforehand."""
    expected = tuple(sizes.get(letter, "any") for letter in letters)
    if array.ndim != len(letters) or any(
        sizes.setdefault(letter, size) != size for letter, size in zip(letters, array.shape, strict=True)
    ):
        raise BadTrace(f"{name} has shape {array.shape}, expected ({', '.join(letters)}) = {expected}")


def _check_values(name: str, array: np.ndarray, num_experts: int) -> None:
    wanted = "integer" if name not in ("weights", "inputs") else "floating"
    if not np.issubdtype(array.dtype, getattr(np, wanted)):
        raise BadTrace(f"{name} is {array.dtype}, expected {wanted} numbers")
    if wanted == "floating":
        # float16 inputs are finite by construction; from outside, an infinity is as wrong as a NaN.
        if bad := _count_not_finite(array):
            raise BadTrace(f"{name} holds {bad} NaN or infinite numbers")
        return
    ranges = {"expert_ids": (-1, num_experts), "position": (-1, 2**31), "phase": (0, len(PHASES))}
    low, high = ranges.get(name, (0, 2**31))
    outside = (array < low) | (array >= high)
    if outside.any():
        value = array[outside].ravel()[0]
        count = np.count_nonzero(outside)
        raise BadTrace(f"{name} holds {value}, outside [{low}, {high}); {count} such entries")


def _count_not_finite(array: np.ndarray) -> int:
    """NaN and infinities. In parts, and float16 by the bits of its exponent: router inputs are gigabytes, a mask of
    them at once took longer to find memory for than to compute (docs/log/predictor.md).
    """
    count = 0
    for first in range(0, len(array), CHECK_ROWS):
        part = array[first : first + CHECK_ROWS]
        if part.dtype == np.float16:
            count += int(np.count_nonzero(part.view(np.uint16) & 0x7C00 == 0x7C00))
        else:
            count += int(np.count_nonzero(~np.isfinite(part)))
    return count


def _arrays_of_frame(frame: pd.DataFrame, path: str | Path) -> dict[str, np.ndarray]:
    """The dense arrays of a full long frame, whatever order its rows are in."""
    if frame.empty:
        raise BadTrace(f"{path} holds no rows")
    axes, of_row = ["row", "moe_layer", "rank"], ["step", "phase", "sequence", "position"]
    frame = frame.sort_values(axes, ignore_index=True)
    shape = tuple(int(frame[axis].max()) + 1 for axis in axes)
    expected = f"expected rows x layers x ranks = {shape}, each once"
    if len(frame) != shape[0] * shape[1] * shape[2]:
        raise BadTrace(f"{path} holds {len(frame)} entries, {expected}")
    for axis, index in zip(axes, np.indices(shape), strict=True):
        if not np.array_equal(frame[axis].to_numpy(), index.ravel()):
            raise BadTrace(f"{path}: an entry is missing and another there twice; {expected}")
    columns = {name: frame[name] for name in of_row}
    columns["phase"] = frame["phase"].astype(pd.CategoricalDtype(PHASES)).cat.codes
    token = {name: column.to_numpy().reshape(shape[0], -1) for name, column in columns.items()}
    for name, values in token.items():
        if (values != values[:, :1]).any():
            raise BadTrace(f"{path}: column {name} differs among the entries of one row; {REMEDY}")
    return {
        "expert_ids": frame["expert"].to_numpy().reshape(shape),
        "weights": frame["weight"].to_numpy().reshape(shape),
        **{name: np.ascontiguousarray(values[:, 0]) for name, values in token.items()},
    }
