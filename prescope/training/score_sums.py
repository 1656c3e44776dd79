"""What a score card is made of: hits, uses and errors summed per prompt, per batch of tokens and per bin.

Shapes: R rows, E experts, K top-k, L MoE layers, Q prompts, A lookaheads, N domains, B bins, G batches of tokens.
"""

import zlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..predictor.base import ScoreArray, used_mask
from ..traces.routing import RoutingTrace
from .prepare import prompt_keys

#: Tokens scored together in the metrics of batches, at most; the paper's batches are 4 to 64 sequences.
BATCH_TOKENS = 64
#: The paper's "hot Top-4": right if among the true Top-6.
HOT_PREDICTED, HOT_TRUE = 4, 6
NUM_BINS = 10
#: What is summed per prompt; see `ScoreCard`.
PER_PROMPT = ("used", "hits", "hits_double", "predicted", "tokens", "exact")


def best_mask(scores: NDArray[Any], k: int) -> NDArray[np.bool_]:
    """(..., E) the k best scored; stable, so a tie goes to the lower id and does not depend on the machine."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    mask = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(mask, order, True, axis=-1)
    return mask


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN, not 0, where there is no whole."""
    return float(part / whole) if whole > 0 else float("nan")


def domain_of_each(trace: RoutingTrace) -> NDArray[np.str_]:
    """The domain of each sequence's prompt, by the sequence's number; "all" where none is named."""
    return np.array([str(prompt.get("domain", "all")) for prompt in trace.prompt_of_each()], dtype=np.str_)


class Sums:
    """Adds up one trace's scores, lookahead by lookahead."""

    def __init__(self, trace: RoutingTrace, lookaheads: tuple[int, ...], batch_tokens: int) -> None:
        self.K, self.E = trace.top_k, trace.num_experts
        self.real = np.flatnonzero(trace.position >= 0)
        self.used_RLE = used_mask(trace.expert_ids, self.E)
        self.trace_id = zlib.crc32(trace.expert_ids[self.real].tobytes())
        keys = prompt_keys(trace)[self.real]
        self.prompts, self.prompt_R = np.unique(keys, return_inverse=True)
        row_domain = domain_of_each(trace)[trace.sequence[self.real]]
        self.domains = np.array([row_domain[self.prompt_R == q][0] for q in range(len(self.prompts))])
        self.batch_R, self.batch_domains = _batches(
            trace.position[self.real], self.prompt_R, row_domain, batch_tokens
        )
        self.batch_size = np.bincount(self.batch_R, minlength=len(self.batch_domains))
        self.bin_domains, self.domain_R = np.unique(row_domain, return_inverse=True)
        A, L, Q, G = len(lookaheads), trace.num_layers, len(self.prompts), len(self.batch_domains)
        self.per_prompt = {name: np.zeros((A, L, Q)) for name in PER_PROMPT}
        self.per_batch = {
            name: np.zeros((A, L, G)) for name in ("hot_right", "hot_total", "count_error", "count_total")
        }
        self.bins = np.zeros((A, L, len(self.bin_domains), NUM_BINS, 3))

    def add(self, a: int, ahead: int, scores_RLE: ScoreArray) -> None:
        """Scores for layer l + ahead at [:, l]."""
        for layer in range(scores_RLE.shape[1]):
            scores = np.asarray(scores_RLE[self.real, layer])
            used = self.used_RLE[self.real, layer + ahead]
            self._per_token(a, layer, scores, used)
            self._per_batch(a, layer, scores, used)
            self._calibration(a, layer, scores, used)

    def _per_token(self, a: int, layer: int, scores: ScoreArray, used: NDArray[np.bool_]) -> None:
        Q = len(self.prompts)
        # Stable: a tie goes to the lower id and does not depend on the machine.
        order = np.argsort(-scores, axis=1, kind="stable")[:, : 2 * self.K]
        found = np.take_along_axis(used, order, axis=1)
        values = {
            "used": used.sum(1),
            "hits": found[:, : self.K].sum(1),
            "hits_double": found.sum(1),
            # A row without experts (the layer did not run for it) needs no prediction.
            "predicted": np.where(used.any(1), self.K, 0),
            "tokens": used.any(1),
            "exact": used.any(1) & (found[:, : self.K].sum(1) == used.sum(1)),
        }
        for name, per_row in values.items():
            self.per_prompt[name][a, layer] = np.bincount(self.prompt_R, per_row, Q)

    def _per_batch(self, a: int, layer: int, scores: ScoreArray, used: NDArray[np.bool_]) -> None:
        G = len(self.batch_domains)
        flat = self.batch_R[:, None] * self.E + np.arange(self.E)
        expected = np.bincount(flat.ravel(), scores.ravel(), G * self.E).reshape(G, self.E)
        true = np.bincount(flat.ravel(), used.ravel(), G * self.E).reshape(G, self.E)
        hot = best_mask(expected, min(HOT_PREDICTED, self.E))
        # An expert tied with the sixth counts as in the Top-6; one that no token used never does.
        sixth = np.sort(true, axis=1)[:, -min(HOT_TRUE, self.E)]
        right = (true >= sixth[:, None]) & (true > 0)
        # No more can be right than are used at all.
        possible = np.minimum(hot.sum(1), (true > 0).sum(1))
        self.per_batch["hot_right"][a, layer] = (hot & right).sum(1)
        self.per_batch["hot_total"][a, layer] = possible
        self.per_batch["count_error"][a, layer] = np.abs(expected - true).sum(1)
        self.per_batch["count_total"][a, layer] = true.sum(1)

    def _calibration(self, a: int, layer: int, scores: ScoreArray, used: NDArray[np.bool_]) -> None:
        p = np.clip(scores.ravel().astype(np.float64), 0.0, 1.0)
        N = len(self.bin_domains)
        which = np.repeat(self.domain_R, self.E) * NUM_BINS
        which += np.minimum((p * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        columns = (np.ones_like(p), p, used.ravel().astype(np.float64))
        sums = [np.bincount(which, c, N * NUM_BINS).reshape(N, NUM_BINS) for c in columns]
        self.bins[a, layer] = np.stack(sums, axis=-1)

    def arrays(self) -> dict[str, Any]:
        return {
            "trace_id": self.trace_id,
            **self.per_prompt,
            **self.per_batch,
            "prompts": self.prompts,
            "domains": self.domains,
            "batch_domains": self.batch_domains,
            "batch_size": self.batch_size,
            "bin_domains": self.bin_domains,
            "bins": self.bins,
        }


def _batches(
    position_R: NDArray[np.integer[Any]],
    prompt_R: NDArray[np.integer[Any]],
    domain_R: NDArray[np.str_],
    batch_tokens: int,
) -> tuple[NDArray[np.int64], NDArray[np.str_]]:
    """A batch number for each row and each batch's domain: tokens at one position of different prompts, as a decode
    step has them; of one domain each, and as many prompts as there are, up to `batch_tokens`.

    No prompt is twice in a batch. Where batches held several positions of a prompt, what its previous tokens used was
    mostly used in the same batch, and "previous token" scored 1.00 by no foresight.
    """
    names, domain_index = np.unique(domain_R, return_inverse=True)
    # A prompt that several sequences share is there once more for each of them: one after the other.
    again = _place_in(position_R.astype(np.int64) * (int(prompt_R.max(initial=0)) + 1) + prompt_R)
    step = (domain_index * (int(position_R.max(initial=0)) + 1) + position_R) * (
        int(again.max(initial=0)) + 1
    )
    kinds, step_R = np.unique(step + again, return_inverse=True)
    parts = -(-np.bincount(step_R, minlength=len(kinds)) // batch_tokens)
    # A step's rows are dealt to its batches in turn, so that their sizes differ by one at most.
    batch_R = (np.cumsum(parts) - parts)[step_R] + _place_in(step_R) % parts[step_R]
    domains = np.empty(int(parts.sum()), dtype=names.dtype)
    domains[batch_R] = names[domain_index]
    return batch_R, domains


def _place_in(group_R: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """(R,) how many rows of the same group come before each row."""
    order = np.argsort(group_R, kind="stable")
    _, sizes = np.unique(group_R, return_counts=True)
    place = np.empty(len(group_R), dtype=np.int64)
    place[order] = np.arange(len(group_R)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return place
