"""95 % intervals by resampling prompts: tokens of one text are not independent, so whole prompts are drawn.

Shapes: Q prompts.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedOption

#: Resamples of a 95 % interval: its ends move by about 1 % of its width from seed to seed.
RESAMPLES = 2000


class Interval(NamedTuple):
    """A value and its 95 % percentile interval over resampled prompts."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def prompts_of(domain: str | None, domains: NDArray[np.str_]) -> NDArray[np.bool_]:
    """(Q,) which prompts are of a domain, all for None.

    Args:
        domains: (Q,) of each prompt.

    Raises:
        UnsupportedOption: none is, with the domains that there are.
    """
    chosen = np.ones(len(domains), dtype=bool) if domain is None else domains == domain
    if not chosen.any():
        raise UnsupportedOption(f"no prompt of domain {domain!r}; there are {sorted(set(domains.tolist()))}")
    return chosen


def resamples(chosen: NDArray[np.bool_], seed: int) -> NDArray[np.float64]:
    """(RESAMPLES, Q) how often each prompt is drawn, with replacement, among the chosen (Q,)."""
    n = int(chosen.sum())
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES)
    weights = np.zeros((RESAMPLES, len(chosen)))
    weights[:, chosen] = drawn
    return weights


def interval_of(value: float, resampled: NDArray[np.float64]) -> Interval:
    """The 95 % percentile interval of resampled values (RESAMPLES,) around a value; those that are NaN say nothing."""
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (value, value)
    # The percentile interval of few, skewed prompts can miss the point; it never should.
    return Interval(value, min(float(low), value), max(float(high), value))
