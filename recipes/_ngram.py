"""Count-based baselines on the same tokens: a unigram and an interpolated Kneser-Ney trigram.

Pure numpy. Knows token streams; knows nothing of models or files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def unigram_probabilities(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """(V,) add-one estimate (count + 1) / (N + V)."""
    counts = np.bincount(tokens, minlength=vocab_size)
    return (counts + 1) / (len(tokens) + vocab_size)


def perplexity(probabilities: np.ndarray) -> float:
    """exp of the mean negative log probability of the tokens seen."""
    return float(np.exp(-np.log(probabilities).mean()))


def _lookup(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where a key is absent; keys are sorted and unique."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def _discount(counts: np.ndarray) -> float:
    """Absolute discount n1 / (n1 + 2 n2) of Ney et al.; 0.5 where too few counts decide nothing."""
    once, twice = int((counts == 1).sum()), int((counts == 2).sum())
    return once / (once + 2 * twice) if once and twice else 0.5


@dataclass(frozen=True)
class _Order:
    """One interpolated level: counts of an n-gram, and of its context, in sorted keys."""

    keys: np.ndarray
    counts: np.ndarray
    context_keys: np.ndarray
    context_totals: np.ndarray
    context_types: np.ndarray  # distinct continuations
    discount: float

    @classmethod
    def build(cls, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Order:
        contexts = keys // vocab_size  # sorted, because keys are
        starts = np.flatnonzero(np.r_[True, contexts[1:] != contexts[:-1]])
        return cls(
            keys=keys,
            counts=counts,
            context_keys=contexts[starts],
            context_totals=np.add.reduceat(counts, starts),
            context_types=np.diff(np.r_[starts, len(keys)]),
            discount=_discount(counts),
        )

    def probabilities(self, wanted: np.ndarray, vocab_size: int, lower: np.ndarray) -> np.ndarray:
        """max(count - d, 0) / total + d * types / total * lower; `lower` alone for an unseen context."""
        total = _lookup(self.context_keys, self.context_totals, wanted // vocab_size)
        types = _lookup(self.context_keys, self.context_types, wanted // vocab_size)
        kept = np.maximum(_lookup(self.keys, self.counts, wanted) - self.discount, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(total > 0, (kept + self.discount * types * lower) / total, lower)


@dataclass(frozen=True)
class KneserNeyTrigram:
    """p(c | a b), interpolated down to the uniform distribution, one discount per order.

    Source:
        Chen and Goodman 1998, interpolated Kneser-Ney: lower orders count the distinct contexts a
        continuation was seen in, not its occurrences.
    """

    trigrams: _Order
    bigrams: _Order
    unigrams: np.ndarray  # (V,) probabilities
    vocab_size: int

    @classmethod
    def fit(cls, tokens: np.ndarray, vocab_size: int) -> KneserNeyTrigram:
        """Count ``tokens``. Sorting dominates: 18 s and 2.4 GB for 53 M tokens on one core (AMD EPYC)."""
        ids = tokens.astype(np.int64)
        keys = (ids[:-2] * vocab_size + ids[1:-1]) * vocab_size + ids[2:]
        tri_keys, tri_counts = np.unique(keys, return_counts=True)
        bi_keys, bi_counts = np.unique(tri_keys % vocab_size**2, return_counts=True)
        kinds = np.bincount(bi_keys % vocab_size, minlength=vocab_size)
        discount = _discount(kinds)
        spread = discount * (kinds > 0).sum() / kinds.sum() / vocab_size
        unigrams = np.maximum(kinds - discount, 0.0) / kinds.sum() + spread
        return cls(
            trigrams=_Order.build(tri_keys, tri_counts, vocab_size),
            bigrams=_Order.build(bi_keys, bi_counts, vocab_size),
            unigrams=unigrams,
            vocab_size=vocab_size,
        )

    def probabilities(self, tokens: np.ndarray) -> np.ndarray:
        """p of tokens[..., 2:], each given the two before it; rows, if any, are texts of their own."""
        ids = tokens.astype(np.int64)
        bigram = ids[..., 1:-1] * self.vocab_size + ids[..., 2:]
        lower = self.bigrams.probabilities(bigram, self.vocab_size, self.unigrams[ids[..., 2:]])
        return self.trigrams.probabilities(
            ids[..., :-2] * self.vocab_size**2 + bigram, self.vocab_size, lower
        )
