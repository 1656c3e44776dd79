"""Routing of single requests, checked, and laid out as the steps of a batch.

Shapes: T tokens of a request, L MoE layers, E experts, K top-k, D model width, R rows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...core.types import MoEShape
from ...errors import BadTrace
from ..events import DECODE, PREFILL
from ..routing import RoutingTrace


class Foreign(NamedTuple):
    """What is known of a foreign trace besides its rows."""

    kind: str  # of program
    model: str
    shape: MoEShape  # of what is in the source; its layers before any are left out
    layers: list[int] | None  # decoder indices of its MoE layers; None: all layers of the source are

    @property
    def decoder_layers(self) -> list[int]:
        return list(range(self.shape.num_layers)) if self.layers is None else self.layers

    @property
    def fingerprint(self) -> str:
        """Of the model, as far as it is known: traces of one foreign model can be joined; no engine has it."""
        known = repr((self.model, *self.shape.routing, self.decoder_layers))
        return f"foreign-{hashlib.blake2b(known.encode(), digest_size=8).hexdigest()}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """Routing of one request's tokens, in order.

    Attributes:
        ids: (T, L, K) integers, -1 where a token used fewer. weights: (T, L, K), or None.
        inputs: (T, L, D) router inputs, or None.
        num_prompt: tokens read in one pass; the others were decoded one by one.
        first: position of the first one.
        where: for messages. about: for the trace's `prompts`.
    """

    ids: NDArray[np.integer[Any]]
    weights: NDArray[np.floating[Any]] | None = None
    inputs: NDArray[np.floating[Any]] | None = None
    num_prompt: int = 0
    first: int = 0
    where: str = ""
    about: dict[str, Any] = field(default_factory=dict)


def checked(request: Request, foreign: Foreign) -> Request:
    """The request with the MoE layers alone.

    Raises:
        BadTrace: no integers of the shape, an id outside the experts, or one twice for a token; with the place.
    """
    ids, (L, E, K) = np.asarray(request.ids), foreign.shape[:3]
    if ids.ndim != 3 or ids.shape[1:] != (L, K):
        raise BadTrace(
            f"{request.where}: expert ids of shape {ids.shape}, expected (tokens, {L} layers, top-{K}), by "
            f"shape={(L, E, K)}"
        )
    if not np.issubdtype(ids.dtype, np.integer):
        raise BadTrace(f"{request.where}: expert ids are {ids.dtype}, expected whole numbers")
    if not 0 <= request.num_prompt <= len(ids):
        raise BadTrace(
            f"{request.where}: {request.num_prompt} prompt tokens of {len(ids)}; see prompt_tokens"
        )
    kept = foreign.decoder_layers
    if foreign.layers is not None:
        _require_layers(kept, L)
    require_ids(ids[:, kept], E, kept, request.where)  # before they are cast: 2**64 - 1 would become -1
    changes: dict[str, NDArray[Any]] = {"ids": ids[:, kept].astype(np.int64)}
    for name in ("weights", "inputs"):
        array = getattr(request, name)
        if array is None:
            continue
        if (
            array.shape[:2] != ids.shape[:2]
            or array.ndim != 3
            or (name == "weights" and array.shape != ids.shape)
        ):
            raise BadTrace(f"{request.where}: {name} of shape {array.shape} beside expert ids of {ids.shape}")
        changes[name] = array[:, kept]
    return Request(**{**vars(request), **changes})


def _require_layers(layers: Sequence[int], L: int) -> None:
    if not layers or sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] < L:
        raise BadTrace(f"layers={list(layers)} are no ascending numbers of the {L} layers that shape names")


def require_ids(
    ids_TLK: NDArray[np.integer[Any]], num_experts: int, layers: Sequence[int], where: str
) -> None:
    """Make sure that ids are experts, and no token uses one twice in a layer.

    Raises:
        BadTrace: with token, layer and id of the first that is not.
    """
    outside = (ids_TLK < -1) | (ids_TLK >= num_experts)
    if outside.any():
        token, layer, rank = np.argwhere(outside)[0].tolist()
        raise BadTrace(
            f"{where}: token {token}, layer {layers[layer]}: expert {ids_TLK[token, layer, rank]} is outside "
            f"[0, {num_experts}); {np.count_nonzero(outside)} such entries"
        )
    ordered = np.sort(ids_TLK, axis=2)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        token, layer, rank = np.argwhere(twice)[0].tolist()
        raise BadTrace(
            f"{where}: token {token}, layer {layers[layer]} uses expert {ordered[token, layer, rank]} twice, in "
            f"{np.count_nonzero(twice.any(axis=2))} such places; a dense layer, which routes nothing, is left out by "
            f"layers=[...] with the MoE layers"
        )


def trace_of_requests(requests: Sequence[Request], foreign: Foreign, batch: int | None) -> RoutingTrace:
    """Requests as runs of `batch` side by side, one run behind the other; None: all in one run.

    A run's first step reads all its prompts; then each step decodes one token of every request that still goes on.

    Raises:
        BadTrace: as `checked`; there is no request, or some have router inputs and others have none.
    """
    if not requests:
        raise BadTrace(f"there is no request in this {foreign.kind} trace")
    whole = [checked(request, foreign) for request in requests]
    size = batch or len(whole)
    first_rows = np.cumsum([0, *(len(one.ids) for one in whole)])
    order: list[NDArray[np.int64]] = []
    step = 0
    for begin in range(0, len(whole), size):
        numbers = range(begin, min(begin + size, len(whole)))
        rows = np.concatenate([_rows(whole[i], i, first_rows[i]) for i in numbers], axis=1)
        if rows.shape[1] == 0:
            continue
        rows[0] += step - rows[0].min()  # without prompts the first decoded token is the run's first step
        order.append(rows[:, np.lexsort((rows[3], rows[2], rows[0]))])
        step = int(rows[0].max()) + 1
    if not order:
        raise BadTrace(f"the requests of this {foreign.kind} trace have no token")
    columns = np.concatenate(order, axis=1)
    return make_trace(
        foreign,
        ids=_joined(whole, "ids")[columns[4]],
        weights=None if any(one.weights is None for one in whole) else _joined(whole, "weights")[columns[4]],
        inputs=_inputs(whole, columns[4]),
        columns=columns,
        prompts=[{"id": i, "domain": foreign.kind, **one.about} for i, one in enumerate(whole)],
    )


def _rows(request: Request, number: int, first_row: int) -> NDArray[np.int64]:
    """(5, T) step, phase, sequence, position and row of a request's tokens; its prompt is step 0."""
    T, P = len(request.ids), request.num_prompt
    token = np.arange(T)
    is_decoded = (token >= P).astype(np.int64)
    step = np.where(is_decoded == 1, token - P + 1, 0)
    phase = np.where(is_decoded == 1, DECODE, PREFILL)
    return np.stack([step, phase, np.full(T, number), request.first + token, first_row + token])


def _joined(requests: Sequence[Request], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(request, name) for request in requests])


def _inputs(requests: Sequence[Request], rows: NDArray[np.int64]) -> NDArray[Any] | None:
    widths = {None if one.inputs is None else one.inputs.shape[2] for one in requests}
    if widths == {None}:
        return None
    if len(widths) > 1:
        raise BadTrace(
            f"router inputs differ in width between requests, or some have none: {sorted(map(str, widths))}"
        )
    return _joined(requests, "inputs")[rows]


def make_trace(
    foreign: Foreign,
    *,
    ids: NDArray[np.int64],
    columns: NDArray[np.int64],
    weights: NDArray[Any] | None = None,
    inputs: NDArray[Any] | None = None,
    prompts: Sequence[dict[str, Any]] = (),
) -> RoutingTrace:
    """A trace of rows (R, L, K) in step order; `columns` (4 or more, R): step, phase, sequence, position.

    Without weights the experts of a token weigh the same, and `versions` says so.
    """
    versions = {"imported from": foreign.kind}
    if weights is None:
        used = ids >= 0
        weights = used / np.maximum(1, used.sum(axis=2, keepdims=True))
        versions["weights"] = "not recorded: a token's experts weigh the same"
    return RoutingTrace(
        expert_ids=ids,
        weights=np.asarray(weights, dtype=np.float32) * (ids >= 0),
        inputs=inputs,
        step=columns[0],
        phase=columns[1],
        sequence=columns[2],
        position=columns[3],
        model=foreign.model,
        fingerprint=foreign.fingerprint,
        num_experts=foreign.shape.num_experts,
        top_k=foreign.shape.top_k,
        decoder_layers=foreign.decoder_layers,
        prompts=list(prompts),
        versions=versions,
    )


def split_prompts(
    ids: Sequence[Any], prompt_tokens: int | Sequence[int] | None, where: str
) -> Iterator[tuple[Any, int]]:
    """Each request's array with its prompt tokens; one number counts for all, none means that all were decoded.

    Raises:
        BadTrace: there are more or fewer numbers than requests.
    """
    counts = [prompt_tokens or 0] * len(ids) if isinstance(prompt_tokens, int | None) else list(prompt_tokens)
    if len(counts) != len(ids):
        raise BadTrace(f"{where}: prompt_tokens has {len(counts)} numbers for {len(ids)} requests")
    yield from zip(ids, counts, strict=True)
