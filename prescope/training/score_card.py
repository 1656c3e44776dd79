"""The score card: how good a predictor is, by layer, group, lookahead and domain, with intervals over prompts.

Everything is summed per prompt first (`score_sums`), so any grouping is a sum, a ratio of sums, and the bootstrap
resamples prompts: tokens of one text are not independent.

What a prediction is worth to a cache and a schedule is another card: `score_schedule`.

Shapes: R rows, E experts, K top-k, L MoE layers, Q prompts, A lookaheads, N domains, B bins, G batches of tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ..core.numbers import is_count
from ..core.types import FloatArray, MoEShape
from ..errors import BadTrace, TraceMismatch, UnsupportedOption
from ..predictor.base import Predictor, ScoreArray, require_lookahead
from ..predictor.checked import replay, require_predictor
from ..predictor.layer_groups import LayerGroups
from ..traces.routing import RoutingTrace
from .intervals import Interval, interval_of, prompts_of, resamples
from .prepare import require_coming_layer, require_trace
from .score_sums import BATCH_TOKENS, NUM_BINS, Sums, best_mask, ratio

#: Of layers, as `LayerGroups.name_of` names them.
GROUPS = ("input", "middle", "output")


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreCard:
    """What `score` returns.

    Attributes:
        predictor: its name. `is_calibrated`: whether it claims probabilities.
        lookaheads: A of them. Arrays (A, L, ...) hold at [a, l] the scores made AT layer l for layer
            l + lookaheads[a]; entries without such a layer are zero.
        trace_id: checksum of the experts used: equal for cards of one trace.
        prompts: numbers of the Q prompts. `domains`: of each.
        used: (A, L, Q) experts used. `hits`, `hits_double`: of these, found among the best K and 2K.
        predicted: (A, L, Q) experts predicted by taking the best K: K for each token.
        tokens, exact: (A, L, Q) tokens that used the layer, and those whose best K hold all that they used.
        hot_right, hot_total: (A, L, G) hot experts found and predicted in each batch of tokens.
        count_error, count_total: (A, L, G) sum over experts of |expected - true tokens|, and the true tokens.
        batch_domains, batch_size: domain and tokens of each of the G batches, one token of a prompt at most.
        bins: (A, L, N, B, 3) pairs of token and expert by domain and predicted probability: how many, sum of
            probability, used. `bin_domains`: the N domains.
    """

    predictor: str
    is_calibrated: bool
    shape: MoEShape
    groups: LayerGroups
    lookaheads: tuple[int, ...]
    trace_id: int
    prompts: NDArray[np.int64]
    domains: NDArray[np.str_]
    used: FloatArray
    hits: FloatArray
    hits_double: FloatArray
    predicted: FloatArray
    tokens: FloatArray
    exact: FloatArray
    hot_right: FloatArray
    hot_total: FloatArray
    count_error: FloatArray
    count_total: FloatArray
    batch_domains: NDArray[np.str_]
    batch_size: NDArray[np.int64]
    bin_domains: NDArray[np.str_]
    bins: FloatArray
    notes: list[str] = field(default_factory=list)

    def recall(
        self, lookahead: int, *, double: bool = False, domain: str | None = None, group: str | None = None
    ) -> float:
        """Share of used experts among the best K (or 2K) scored, mean over the layers that were used at all.

        Args:
            domain: of these prompts only. `group`: "input", "middle" or "output" layers only, by source layer.
        """
        return float(self._recall_of(np.ones(len(self.prompts)), lookahead, double, domain, group))

    def recalls(self, lookahead: int) -> tuple[float, ...]:
        """Recall@K of each source layer that has a layer so far ahead, first layer first; all prompts."""
        a, layers = self._index_of(lookahead), self.shape.num_layers - lookahead
        pairs = zip(self.hits[a, :layers].sum(axis=1), self.used[a, :layers].sum(axis=1), strict=True)
        return tuple(ratio(float(hits), float(used)) for hits, used in pairs)

    def recall_interval(self, lookahead: int, *, domain: str | None = None, seed: int = 0) -> Interval:
        """Recall@K with its 95 % interval over prompts."""
        weights = resamples(self._in_domain(domain), seed)
        values = self._recall_of(weights, lookahead, False, None, None)
        return interval_of(self.recall(lookahead, domain=domain), values)

    def exact_frac(self, lookahead: int, *, domain: str | None = None) -> float:
        """Share of tokens whose best K are exactly the experts that they use, mean over layers that were used."""
        a, layers = self._index_of(lookahead), self.shape.num_layers - lookahead
        chosen = self._in_domain(domain)
        exact, tokens = (part[a, :layers][:, chosen].sum(axis=1) for part in (self.exact, self.tokens))
        return float(_mean_of_ratios(exact, tokens))

    def hot(self, lookahead: int, *, domain: str | None = None) -> float:
        """The paper's metric: share of the predicted hot Top-4 of a batch of tokens that are in its true Top-6.

        Loose: on 8 experts of which 2 are used, chance scores 0.75. Mean over layers and batches. A batch holds one
        token of each prompt (`batch_size`), so few prompts make small batches, which are harder.
        """
        return self._of_batches(self.hot_right, self.hot_total, lookahead, domain)

    def count_error_frac(self, lookahead: int, *, domain: str | None = None) -> float:
        """Sum over experts of |expected - true tokens| in a batch over the true tokens; 0 is perfect.

        Expected tokens are the sums of the scores: of predictors that are not calibrated it is large.
        """
        return self._of_batches(self.count_error, self.count_total, lookahead, domain)

    def reliability(self, lookahead: int, *, domain: str | None = None) -> pd.DataFrame:
        """Calibration table: bin, from, to, pairs (token, expert), mean probability, share used; all layers."""
        bins = self._bins_of(lookahead, domain)
        pairs = np.maximum(bins[:, 0], 1)
        edges = np.linspace(0, 1, NUM_BINS + 1)
        return pd.DataFrame(
            {
                "bin": np.arange(NUM_BINS),
                "from": edges[:-1],
                "to": edges[1:],
                "pairs": bins[:, 0].astype(np.int64),
                "probability": np.where(bins[:, 0] > 0, bins[:, 1] / pairs, np.nan),
                "used_frac": np.where(bins[:, 0] > 0, bins[:, 2] / pairs, np.nan),
            }
        )

    def ece(self, lookahead: int, *, domain: str | None = None) -> float:
        """Expected calibration error: mean over pairs of |probability - share used| of their bin, 10 equal bins."""
        bins = self._bins_of(lookahead, domain)
        return ratio(np.abs(bins[:, 1] - bins[:, 2]).sum(), bins[:, 0].sum())

    def to_frame(self) -> pd.DataFrame:
        """One row for each lookahead, layer and domain: recall@K, recall@2K, precision@K, exact sets and the batch
        metrics.
        """
        rows: list[dict[str, Any]] = []
        for a, ahead in enumerate(self.lookaheads):
            for layer in range(self.shape.num_layers - ahead):
                for domain in np.unique(self.domains).tolist():
                    q, g = self.domains == domain, self.batch_domains == domain
                    rows.append(
                        {
                            "lookahead": ahead,
                            "moe_layer": layer,
                            "domain": domain,
                            **self._cell(a, layer, q, g),
                        }
                    )
        frame = pd.DataFrame(rows)
        frame.insert(0, "predictor", self.predictor)
        frame.insert(3, "group", [self.groups.name_of(layer) for layer in frame["moe_layer"]])
        return frame

    def _cell(self, a: int, layer: int, q: NDArray[np.bool_], g: NDArray[np.bool_]) -> dict[str, float]:
        used, hits = self.used[a, layer, q].sum(), self.hits[a, layer, q].sum()
        return {
            "used": used,
            "recall": ratio(hits, used),
            "recall_double": ratio(self.hits_double[a, layer, q].sum(), used),
            "precision": ratio(hits, self.predicted[a, layer, q].sum()),
            "exact_frac": ratio(self.exact[a, layer, q].sum(), self.tokens[a, layer, q].sum()),
            "hot": ratio(self.hot_right[a, layer, g].sum(), self.hot_total[a, layer, g].sum()),
            "count_error_frac": ratio(
                self.count_error[a, layer, g].sum(), self.count_total[a, layer, g].sum()
            ),
        }

    def by_domain(self, lookahead: int, *, seed: int = 0) -> pd.DataFrame:
        """One row for each kind of text: prompts, recall@K with its interval, exact sets, hot, ECE."""
        rows = []
        for domain in np.unique(self.domains).tolist():
            recall = self.recall_interval(lookahead, domain=domain, seed=seed)
            rows.append(
                {
                    "domain": domain,
                    "prompts": int((self.domains == domain).sum()),
                    **dict(zip(("recall", "low", "high"), recall, strict=True)),
                    "exact_frac": self.exact_frac(lookahead, domain=domain),
                    "hot": self.hot(lookahead, domain=domain),
                    "ece": self.ece(lookahead, domain=domain),
                }
            )
        return pd.DataFrame(rows)

    def _index_of(self, lookahead: int) -> int:
        """Its place in the arrays. Raises UnsupportedOption: the card has none of that lookahead."""
        if lookahead not in self.lookaheads:
            raise UnsupportedOption(
                f"the card of {self.predictor} has no lookahead {lookahead!r}; it has "
                f"{', '.join(map(str, self.lookaheads))}"
            )
        return self.lookaheads.index(lookahead)

    def _bins_of(self, lookahead: int, domain: str | None) -> FloatArray:
        """(B, 3) of all layers and of one domain, or of all."""
        self._in_domain(domain)
        kept = self.bins[self._index_of(lookahead)].sum(axis=0)
        bins: FloatArray = kept.sum(axis=0) if domain is None else kept[self.bin_domains == domain][0]
        return bins

    def _in_domain(self, domain: str | None) -> NDArray[np.bool_]:
        return prompts_of(domain, self.domains)

    def _of_batches(self, part: FloatArray, whole: FloatArray, lookahead: int, domain: str | None) -> float:
        """The sum of one array (A, L, G) over that of another: all layers, batches of one domain or of all."""
        self._in_domain(domain)
        batches = np.ones(len(self.batch_domains), bool) if domain is None else self.batch_domains == domain
        a, layers = self._index_of(lookahead), self.shape.num_layers - lookahead
        return ratio(part[a, :layers][:, batches].sum(), whole[a, :layers][:, batches].sum())

    def _recall_of(
        self, weights: FloatArray, lookahead: int, double: bool, domain: str | None, group: str | None
    ) -> FloatArray:
        """Recall for prompt weights (..., Q): mean over layers of weighted hits over weighted used."""
        if group is not None and group not in GROUPS:
            raise UnsupportedOption(f"group is {group!r}; choose one of {', '.join(map(repr, GROUPS))}")
        a = self._index_of(lookahead)
        layers = [
            layer
            for layer in range(self.shape.num_layers - lookahead)
            if group is None or self.groups.name_of(layer) == group
        ]
        if not layers:
            return np.full(weights.shape[:-1], np.nan)
        weights = weights * self._in_domain(domain)
        hits = weights @ (self.hits_double if double else self.hits)[a, layers].T
        used = weights @ self.used[a, layers].T
        return _mean_of_ratios(hits, used)


def score(
    predictor: Predictor,
    trace: RoutingTrace,
    *,
    lookaheads: Sequence[int] | None = None,
    groups: LayerGroups | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> ScoreCard:
    """Score a predictor on a trace it was not trained on. Padding is left out; domains are `prompts[i]["domain"]`.

    Args:
        lookaheads: 1..predictor.lookahead when not given.
        groups: of the layers, for the card's columns; one group when not given.

    Raises:
        BadTrace: there is no token, or no coming layer. And, with TraceMismatch, as `predictor.replay`.
        TraceMismatch: `groups` are of another number of layers.
        BadPrediction: its scores are of another shape, or no probabilities.
        UnsupportedOption: it is no predictor, a lookahead is beyond its own, or a batch has no tokens.
    """
    require_predictor(predictor, "replay")
    require_scorable(trace)
    shape = trace.shape
    most = min(predictor.lookahead, shape.num_layers - 1)
    if not (is_count(batch_tokens) and batch_tokens >= 1):
        raise UnsupportedOption(f"batch_tokens is {batch_tokens!r}; a batch has at least one token")
    ahead_A = tuple(range(1, most + 1))
    if lookaheads is not None:
        ahead_A = tuple(lookaheads) if isinstance(lookaheads, Iterable) else ()
        if not ahead_A:
            raise UnsupportedOption(
                f"lookaheads are {lookaheads!r}; give a list of one or more, such as [1, 2]"
            )
    for ahead in ahead_A:
        require_lookahead(ahead, most, predictor.name)
    if groups is not None:
        groups.check_layers(shape.num_layers)
    sums = Sums(trace, ahead_A, batch_tokens)
    for a, ahead in enumerate(ahead_A):
        sums.add(a, ahead, replay(predictor, trace, ahead))
    return ScoreCard(
        predictor=predictor.name,
        is_calibrated=predictor.is_calibrated,
        shape=shape,
        groups=groups or LayerGroups.one(shape.num_layers, "one group: none given"),
        lookaheads=ahead_A,
        **sums.arrays(),
    )


def require_scorable(trace: RoutingTrace) -> None:
    """Make sure that a predictor can be judged on a trace.

    Raises:
        BadTrace: it has no token that is no padding, or one layer, before which nothing is predicted.
        UnsupportedOption: it is no trace.
    """
    require_trace(trace)
    if not (trace.position >= 0).any():
        raise BadTrace(f"the trace of {trace.model} has no token to score; record some text")
    require_coming_layer(trace)


def difference(
    first: ScoreCard, second: ScoreCard, lookahead: int, *, domain: str | None = None, seed: int = 0
) -> Interval:
    """Recall@K of `first` less that of `second` on the same prompts, with a 95 % interval: a paired bootstrap.

    Raises:
        TraceMismatch: the cards are of different traces.
    """
    if first.trace_id != second.trace_id or not np.array_equal(first.prompts, second.prompts):
        raise TraceMismatch(
            f"{first.predictor} and {second.predictor} were scored on different traces; score both on one"
        )
    weights = resamples(first._in_domain(domain), seed)
    values = first._recall_of(weights, lookahead, False, None, None) - second._recall_of(
        weights, lookahead, False, None, None
    )
    point = first.recall(lookahead, domain=domain) - second.recall(lookahead, domain=domain)
    return interval_of(point, values)


def _mean_of_ratios(part: FloatArray, whole: FloatArray) -> FloatArray:
    """(...) from (..., L): mean over layers of part / whole. A layer of which nothing is known, since none of these
    tokens used it, is left out; NaN where that is so of all.
    """
    known = whole > 0
    ratios = np.divide(part, whole, out=np.zeros_like(part), where=known)
    layers = known.sum(axis=-1)
    return np.divide(ratios.sum(axis=-1), layers, out=np.full(layers.shape, np.nan), where=layers > 0)


def recall_at(scores_TE: ScoreArray, used_TE: NDArray[np.bool_], k: int) -> float:
    """Share of used experts among the k best scored. Equal scores are taken in order of the expert's id."""
    hits = (best_mask(scores_TE, k) & used_TE).sum()
    return ratio(float(hits), float(used_TE.sum()))
