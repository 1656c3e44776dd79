"""Is a setting faster than the default? Pure: timings in, an answer out.

Runs go in blocks of four, default - candidate - candidate - default, so that a machine that slowly gets warmer or
busier hits both alike. The ratio of a block is one sample; the interval is Student's over the logarithms of these.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import t as student

from ..errors import UnsupportedOption

#: A smaller gain is not worth another setting.
LEAST_GAIN = 0.03
#: An interval that ends beyond this says nothing.
MOST_SAID = 10.0
#: That the interval holds the true gain, for all candidates of a proof together.
CONFIDENCE = 0.95


class Verdict(NamedTuple):
    """What timings say of a candidate.

    Attributes:
        gain: how much faster than the default, 0.1 for 10 %; `low`, `high`: its interval.
        kept: the whole interval lies above `LEAST_GAIN`. `words`: the same as one line.
    """

    gain: float
    low: float
    high: float
    kept: bool
    words: str


def verdict(default_ms: Sequence[float], candidate_ms: Sequence[float], *, candidates: int = 1) -> Verdict:
    """Whether a candidate is kept.

    Args:
        default_ms: time per token, two runs a block: the first and the last. `candidate_ms`: the two between them.
        candidates: that are compared with the default; the more there are, the surer each must be.

    Raises:
        UnsupportedOption: fewer than two blocks, or times that are none.
    """
    times = [*default_ms, *candidate_ms]
    if len(default_ms) != len(candidate_ms) or len(default_ms) % 2 or len(default_ms) < 4:
        raise UnsupportedOption(
            f"{len(default_ms)} and {len(candidate_ms)} times; each block has two of both, and two blocks or more show "
            f"the spread"
        )
    if not all(math.isfinite(ms) and ms > 0 for ms in times):
        raise UnsupportedOption("times are finite and above 0")
    logs = [
        math.log((default_ms[i] + default_ms[i + 1]) / (candidate_ms[i] + candidate_ms[i + 1]))
        for i in range(0, len(default_ms), 2)
    ]
    n = len(logs)
    mean = math.fsum(logs) / n
    deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in logs) / (n - 1))
    share = 1 - (1 - CONFIDENCE) / candidates / 2  # below the upper end of the interval
    margin = float(student.ppf(share, n - 1)) * deviation / math.sqrt(n)
    gain, low, high = (math.expm1(one) for one in (mean, mean - margin, mean + margin))
    kept = low > LEAST_GAIN
    return Verdict(gain, low, high, kept, _words(gain, low, high, kept))


def _words(gain: float, low: float, high: float, kept: bool) -> str:
    end = f"{100 * high:+.1f}" if high < MOST_SAID else f"more than {100 * MOST_SAID:+.0f}"
    said = f"{100 * gain:+.1f} % ({100 * low:+.1f} to {end}) against the default"
    if kept:
        return f"{said}: keep it"
    if low <= 0 <= high:
        return f"{said}, no difference beyond the spread: keep the default"
    if high < 0:
        return f"{said}: keep the default"
    return f"{said}, not surely more than {100 * LEAST_GAIN:.0f} %: keep the default"
