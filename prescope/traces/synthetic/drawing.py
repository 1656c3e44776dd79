"""Draw which experts made-up tokens use: popularity, persistence, correlation of layers, tastes of sequences.

Everything is drawn in ranks: rank 0 is the model's most popular expert of a layer, and which expert that is, a fixed
random permutation of each layer says (`expert_of_rank`). Pure numpy; knows nothing of traces or models.

Shapes: S sequences, T tokens of each, L MoE layers, E experts, K top-k, N layers of one diagonal.
"""

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
RankArray = NDArray[np.int16]


def expert_of_rank(num_layers: int, num_experts: int, seed: int) -> RankArray:
    """(L, E): the expert that has each rank. An expert's successor is the one with its rank in the next layer."""
    rng = np.random.default_rng(seed)
    ranks = np.tile(np.arange(num_experts, dtype=np.int16), (num_layers, 1))
    return rng.permuted(ranks, axis=1)


def popularity_of_ranks(
    num_experts: int, zipf: float, diversity: float, num_sequences: int, rng: np.random.Generator
) -> Float32Array:
    """(S, E): how much each sequence likes each rank, not normalised: (i + 1) ** -zipf for its i-th favourite.

    The order is that of sqrt(1 - diversity) * common + sqrt(diversity) * own, both standard normal, so diversity is
    the share of a taste's variance that is the sequence's own: 0 gives all sequences one order, 1 unrelated ones.
    One taste holds in all layers; so a successor is as popular as the expert it follows, and `draw_ranks` leaves
    the popularity of a layer to `zipf` whatever the correlation.
    """
    quantiles = (num_experts - np.arange(num_experts) - 0.5) / num_experts
    common = np.array([NormalDist().inv_cdf(q) for q in quantiles])
    own = rng.standard_normal((num_sequences, num_experts))
    order = np.argsort(-(np.sqrt(1.0 - diversity) * common + np.sqrt(diversity) * own), axis=1, kind="stable")
    share = ((np.arange(num_experts) + 1.0) ** -zipf).astype(np.float32)
    popularity = np.empty(order.shape, dtype=np.float32)
    np.put_along_axis(popularity, order, np.broadcast_to(share, order.shape), axis=1)
    return popularity


def draw_ranks(
    popularity_SE: Float32Array,
    num_layers: int,
    num_tokens: int,
    top_k: int,
    persistence: float,
    correlation: float,
    rng: np.random.Generator,
) -> RankArray:
    """(L, T, S, K) ranks used, distinct for each token and layer, in order of a race that popular ones win more often.

    A token takes, in this order, until it has K:

    1. each rank that the token before used in this layer, with probability `persistence`;
    2. each rank that this token used in the layer before, with probability `correlation`;
    3. ranks by popularity, without repeats: the first of E exponential clocks whose speeds are the popularities.

    A token needs its predecessor and the layer before, so all (layer, token) pairs with the same sum are drawn
    together: L + T - 1 rounds instead of L * T.
    """
    S, E = popularity_SE.shape
    ranks = np.zeros((num_layers, num_tokens, S, top_k), dtype=np.int16)
    for diagonal in range(num_layers + num_tokens - 1):
        layer = np.arange(max(0, diagonal - num_tokens + 1), min(num_layers, diagonal + 1))
        token = diagonal - layer
        race = rng.standard_exponential((len(layer), S, E), dtype=np.float32) / popularity_SE
        coin = rng.random((2, len(layer), S, top_k), dtype=np.float32)
        key = race.copy()
        # Called ones stand before all others (-1 to 0), kept ones before these (-2); indices of -1 are never used.
        called = (coin[0] < correlation) & (layer > 0)[:, None, None]
        above = ranks[layer - 1, token].astype(np.int64)
        mine = np.take_along_axis(key, above, axis=-1)
        np.put_along_axis(key, above, np.where(called, -1.0 / (1.0 + mine), mine), axis=-1)
        kept = (coin[1] < persistence) & (token > 0)[:, None, None]
        before = ranks[layer, token - 1].astype(np.int64)
        mine = np.take_along_axis(key, before, axis=-1)
        np.put_along_axis(key, before, np.where(kept, np.float32(-2.0), mine), axis=-1)
        chosen = np.argpartition(key, top_k - 1, axis=-1)[..., :top_k]
        order = np.argsort(np.take_along_axis(race, chosen, axis=-1), axis=-1)
        ranks[layer, token] = np.take_along_axis(chosen, order, axis=-1)
    return ranks


def draw_weights(num_rows: int, num_layers: int, top_k: int, rng: np.random.Generator) -> Float32Array:
    """(R, L, K) router weights, largest first, 1 in sum: exponential numbers, sorted, normalised; fitted to nothing."""
    drawn = -np.sort(-rng.standard_exponential((num_rows, num_layers, top_k), dtype=np.float32), axis=-1)
    drawn += np.float32(1e-6)  # an exponential number may be 0, and a router's softmax is not
    total = drawn.sum(axis=-1, keepdims=True)
    weights: Float32Array = drawn / total
    return weights
