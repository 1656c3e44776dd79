"""Layer groups (input, middle, output) from three measured cues; nothing about any model is hard-coded.

The cues of each MoE layer are those by which the paper describes its groups ("Outer groups"):

1. *routing correlation*: how well the experts at a layer predict those at its neighbours, and those of the previous
   token those of this one. Normalised: 0 is what the experts' frequencies alone give, 1 is certainty.
2. *skew*: how unequal the load of the experts is, and how much of a token's weight its first expert takes.
3. *similarity*: cosine between the router inputs of successive layers.

Outer layers have high correlation and skew, middle layers high similarity, so one curve, standardised
(correlation + skew) / 2 - similarity, is high outside and low in the middle. Borders are the two change points of
its best three-piece fit; they hold only if the pieces are ordered so and a permutation test finds that no accident.

Shapes: R rows, L MoE layers, E experts, K top-k, D width.
"""

from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import TraceMismatch
from ..traces.routing import RoutingTrace
from .base import require_inputs, used_mask

Curve = NDArray[np.float64]  # (L,)

#: The borders hold if, with the layers in random order, ordered pieces that explain as much come up at most this
#: often. A rule that adapts to L: three pieces explain 60 % of pure noise over 8 layers, 17 % over 48.
MAX_CHANCE = 0.05
SHUFFLES = 2000
#: Layers that it takes for three groups to mean anything: one layer outside on each side, two in the middle.
MIN_LAYERS = 4
#: Rows used for the cosine: enough for two digits, and bounded in memory.
MAX_ROWS = 8192


class Cues(NamedTuple):
    """The three cues, one number per MoE layer; and their parts."""

    correlation_L: Curve
    skew_L: Curve
    similarity_L: Curve
    layer_correlation_L: Curve  # with the neighbouring layers
    token_correlation_L: Curve  # with the previous token
    load_skew_L: Curve  # Gini coefficient of the experts' loads: 0 all equal, towards 1 one takes all
    weight_skew_L: Curve  # first expert's share of a token's weight: 0 all K equal, 1 it takes all


class LayerGroups(NamedTuple):
    """MoE layers by group, each a range; `reason` says how the borders were found or why there are none."""

    input: range
    middle: range
    output: range
    reason: str

    @property
    def has_borders(self) -> bool:
        return len(self.input) + len(self.output) > 0

    def name_of(self, moe_layer: int) -> str:
        """ "input", "middle" or "output"."""
        return "input" if moe_layer in self.input else "output" if moe_layer in self.output else "middle"

    def check_layers(self, num_layers: int) -> None:
        """Make sure that these are groups of a model with so many MoE layers.

        Raises:
            TraceMismatch: they are not.
        """
        named = [*self.input, *self.middle, *self.output]
        if named != list(range(num_layers)):
            raise TraceMismatch(
                f"groups name {len(named)} layers ({self.input}, {self.middle}, {self.output}), the trace has "
                f"{num_layers}; find_groups(trace) finds its own"
            )

    @classmethod
    def one(cls, num_layers: int, reason: str) -> "LayerGroups":
        """All layers as one group, the middle one."""
        return cls(range(0), range(num_layers), range(num_layers, num_layers), reason)

    @classmethod
    def at(cls, first_middle: int, first_output: int, num_layers: int, reason: str) -> "LayerGroups":
        """Three groups by their borders."""
        return cls(
            range(first_middle), range(first_middle, first_output), range(first_output, num_layers), reason
        )


def measure_cues(trace: RoutingTrace, rows: NDArray[np.integer[Any]] | None = None) -> Cues:
    """The cues of a trace with router inputs, or of some of its rows; padding is left out.

    Raises:
        BadTrace: it has no router inputs.
    """
    inputs_RLD = require_inputs(trace, "the similarity of router inputs")
    real = np.flatnonzero(trace.position >= 0)
    if rows is not None:
        real = np.intersect1d(real, rows)
    used_RLE = used_mask(trace.expert_ids[real], trace.num_experts).astype(np.float32)
    by_layer = _neighbour_correlation(used_RLE)
    by_token = _token_correlation(trace, used_RLE, real)
    load = np.array([_gini(load_E) for load_E in used_RLE.sum(axis=0)])
    weight = _weight_skew(trace.weights[real])
    return Cues(
        (by_layer + by_token) / 2,
        (load + weight) / 2,
        _similarity(inputs_RLD, real[np.linspace(0, len(real) - 1, min(len(real), MAX_ROWS)).astype(int)]),
        by_layer,
        by_token,
        load,
        weight,
    )


def contrast_of(cues: Cues) -> Curve:
    """(L,) the one curve that is high in outer layers: standardised (correlation + skew) / 2 - similarity."""
    return (_standardised(cues.correlation_L) + _standardised(cues.skew_L)) / 2 - _standardised(
        cues.similarity_L
    )


def group_layers(cues: Cues, max_chance: float = MAX_CHANCE) -> LayerGroups:
    """Borders by least squares: the two that split the contrast into the three most constant pieces.

    They hold if both outer pieces lie above the middle one, and if shuffled layers give ordered pieces that explain as
    much of the variance at most `max_chance` of the time (2,000 shuffles, seeded). Otherwise all layers are one
    group, and the reason says which condition failed.
    """
    curve_L = contrast_of(cues)
    L = len(curve_L)
    if L < MIN_LAYERS:
        return LayerGroups.one(L, f"one group: {L} MoE layers are too few for three groups ({MIN_LAYERS})")
    if curve_L.std() < 1e-9:
        return LayerGroups.one(L, "one group: the cues are the same in all layers")
    (start,), (end,), (explained,), (is_ordered,) = _best_cuts(curve_L[None])
    found = f"the best borders, before layers {start} and {end}, explain {explained:.0%} of the contrast"
    if not is_ordered:
        means = " / ".join(f"{curve_L[a:b].mean():+.2f}" for a, b in pairwise((0, start, end, L)))
        return LayerGroups.one(L, f"one group: {found}, but it is not higher on both sides ({means})")
    shuffled = np.random.default_rng(0).permuted(np.tile(curve_L, (SHUFFLES, 1)), axis=1)
    _, _, by_accident, also_ordered = _best_cuts(shuffled)
    chance = float((also_ordered & (by_accident >= explained - 1e-12)).mean())
    found += f"; shuffled layers do as well {chance:.1%} of the time"
    if chance > max_chance:
        return LayerGroups.one(L, f"one group: {found}, more than the {max_chance:.0%} allowed")
    return LayerGroups.at(int(start), int(end), L, f"three groups: {found}")


def find_groups(trace: RoutingTrace, rows: NDArray[np.integer[Any]] | None = None) -> LayerGroups:
    """Groups of the layers of a trace, or of some of its rows: `group_layers(measure_cues(trace, rows))`."""
    return group_layers(measure_cues(trace, rows))


def _best_cuts(
    curves_NL: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.int64], Curve, NDArray[np.bool_]]:
    """For each curve: the two cuts of its best piecewise constant fit, the share of variance that it explains, and
    whether both outer pieces lie above the middle one. The middle piece has at least two layers.
    """
    N, L = curves_NL.shape
    sums = np.concatenate([np.zeros((N, 1)), curves_NL.cumsum(axis=1)], axis=1)
    cuts = np.array([(a, b) for a, b in combinations(range(1, L), 2) if b - a >= 2])
    start, end = cuts.T
    first = sums[:, start] / start
    middle = (sums[:, end] - sums[:, start]) / (end - start)
    last = (sums[:, [L]] - sums[:, end]) / (L - end)
    # The variance that pieces explain is that of their means about the mean of all.
    mean = curves_NL.mean(axis=1, keepdims=True)
    between = (
        start * (first - mean) ** 2 + (end - start) * (middle - mean) ** 2 + (L - end) * (last - mean) ** 2
    )
    best = between.argmax(axis=1)
    at = (np.arange(N), best)
    explained = between[at] / np.maximum(((curves_NL - mean) ** 2).sum(axis=1), 1e-12)
    return start[best], end[best], explained, np.minimum(first[at], last[at]) > middle[at]


def _standardised(values_L: Curve) -> Curve:
    """Mean 0, deviation 1; all 0 when the values do not differ."""
    spread = values_L.std()
    return (values_L - values_L.mean()) / spread if spread > 1e-9 else np.zeros_like(values_L)


def _gini(load_E: NDArray[np.floating]) -> float:
    ordered = np.sort(load_E.astype(np.float64))
    n = len(ordered)
    ranks = 2 * np.arange(1, n + 1) - n - 1
    return float((ranks * ordered).sum() / max(n * ordered.sum(), 1e-12))


def _cramer(together_EE: NDArray[np.floating]) -> float:
    """Cramer's V of a contingency table: 0 independent, 1 one tells the other. Bias-corrected (Bergsma 2013)."""
    table = together_EE[together_EE.sum(1) > 0][:, together_EE.sum(0) > 0].astype(np.float64)
    n = table.sum()
    rows, columns = table.shape
    if n < 2 or min(rows, columns) < 2:
        return 0.0
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / n
    phi2 = max(
        0.0, float(((table - expected) ** 2 / expected).sum() / n) - (rows - 1) * (columns - 1) / (n - 1)
    )
    least = min(rows - (rows - 1) ** 2 / (n - 1), columns - (columns - 1) ** 2 / (n - 1)) - 1
    return float(np.sqrt(phi2 / least)) if least > 0 else 0.0


def _neighbour_correlation(used_RLE: NDArray[np.float32]) -> Curve:
    """Mean association of each layer's experts with those of the layers beside it."""
    L = used_RLE.shape[1]
    links = [_cramer(used_RLE[:, a].T @ used_RLE[:, a + 1]) for a in range(L - 1)]
    around: list[list[float]] = [links[max(0, layer - 1) : layer + 1] for layer in range(L)]
    return np.array([float(np.mean(near)) if near else 0.0 for near in around])


def _token_correlation(trace: RoutingTrace, used_RLE: NDArray[np.float32], real: NDArray[np.intp]) -> Curve:
    """Association of each layer's experts with those of the previous position of the same sequence."""
    sequence, position = trace.sequence[real], trace.position[real]
    order = np.lexsort((position, sequence))
    follows = (np.diff(sequence[order]) == 0) & (np.diff(position[order]) == 1)
    before, after = order[:-1][follows], order[1:][follows]
    return np.array([_cramer(used_LE[before].T @ used_LE[after]) for used_LE in used_RLE.transpose(1, 0, 2)])


def _weight_skew(weights_RLK: NDArray[np.float32]) -> Curve:
    K = weights_RLK.shape[2]
    if K == 1:
        return np.zeros(weights_RLK.shape[1])
    total = np.abs(weights_RLK).sum(axis=2)
    share = np.abs(weights_RLK).max(axis=2) / np.maximum(total, 1e-12)
    used = total > 0
    mean = (share * used).sum(axis=0) / np.maximum(used.sum(axis=0), 1)
    return ((mean - 1 / K) / (1 - 1 / K)).astype(np.float64)


def _similarity(inputs_RLD: NDArray[np.float16], rows: NDArray[np.integer[Any]]) -> Curve:
    """Mean cosine between the router inputs of each layer and of those beside it, on some rows."""
    L = inputs_RLD.shape[1]
    links = []
    former_RD = np.empty((0, 0), dtype=np.float32)
    for layer in range(L):
        x_RD = inputs_RLD[rows, layer].astype(np.float32)
        x_RD /= np.maximum(np.linalg.norm(x_RD, axis=1, keepdims=True), 1e-12)
        if layer:
            links.append(float(np.einsum("rd,rd->r", former_RD, x_RD).mean()))
        former_RD = x_RD
    return np.array([float(np.mean(links[max(0, a - 1) : a + 1])) if links else 0.0 for a in range(L)])
