"""When requests come and how much they ask for: drawn with the statistics of a public trace, which prescope ships.

Pure numpy. Drawn, not replayed: gaps between arrivals are independent of each other here. In the trace they are not
quite: its rate drifts over minutes, so that lines were longer than such draws say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..core.files import read_object
from ..core.numbers import is_count, is_number
from ..core.paths import data_dir
from ..errors import BadTrace

#: Traces in the file, by what they are of.
NAMES = {"conv": "conversations", "code": "code completions"}
FILE = "azure_llm_2023.json"
MOST_BYTES = 1 << 20
REMEDY = "it comes with prescope; install it again"
#: The last percentile that is known; gaps beyond it are drawn so that the mean is the trace's.
LAST = 99.0


class Requests(NamedTuple):
    """Requests (N,) in the order in which they come."""

    arrive_s: NDArray[np.float64]  # ascending; the first comes at 0
    new_tokens: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """What is known of a trace's requests.

    Attributes:
        name: of the trace, in words. rate_per_s: mean, of whatever served them.
        gaps_s: between arrivals, by percentile (1 to 99). cv: their standard deviation over their mean; 1 is a
            Poisson process, more comes in bursts.
        new_tokens: generated for a request, by percentile (1 to 99).
        source: where it is from, with its licence.
    """

    name: str
    rate_per_s: float
    gaps_s: Mapping[float, float]
    cv: float
    new_tokens: Mapping[float, float]
    source: str

    @classmethod
    def load(cls, name: str = "conv") -> Self:
        """One of the traces that come with prescope: "conv" or "code", an hour each of 2023.

        Raises:
            BadTrace: there is none of this name, or its file is damaged.
        """
        path = data_dir() / "arrivals" / FILE
        if name not in NAMES:
            raise BadTrace(f"there are no arrivals {name!r}; choose one of {', '.join(map(repr, NAMES))}")
        if not path.is_file():
            raise BadTrace(f"the arrivals that come with prescope are not at {path}; {REMEDY}")
        contents = read_object(path, BadTrace, REMEDY, MOST_BYTES)
        try:
            found = contents["traces"][name]
            return cls(
                name=NAMES[name],
                rate_per_s=float(found["mean_rate_per_s"]),
                gaps_s=_percentiles(found["interarrival"]["percentiles_s"]),
                cv=float(found["interarrival"]["cv"]),
                new_tokens=_percentiles(found["generated_tokens"]["percentiles"]),
                source=str(contents["source"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BadTrace(f"{path} is not whole ({error!r}); {REMEDY}") from error

    def draw(self, count: int, *, rate_per_s: float | None = None, seed: int = 0) -> Requests:
        """Some requests. The same seed gives the same ones, at another rate closer together or further apart.

        Gaps and lengths lie between the percentiles in a straight line, lengths on a logarithmic scale. Of the gaps,
        the longest hundredth is exponential behind the last percentile; of the lengths it is cut.

        Args:
            count: of requests. rate_per_s: mean; by default the trace's.

        Raises:
            BadTrace: no request, a rate that is not above 0, or a seed that is no whole number of 0 or more.
        """
        rate = self.rate_per_s if rate_per_s is None else rate_per_s
        is_whole = is_count(count) and count >= 1 and is_count(seed) and seed >= 0
        if not is_whole or not is_number(rate) or not 0 < rate < np.inf:
            raise BadTrace(
                f"count is {count!r}, rate_per_s {rate!r} and seed {seed!r}; one request at least, at a rate above 0, "
                f"by a seed of 0 or more"
            )
        rng = np.random.default_rng(seed)
        gaps = self._gaps(rng, count)
        logs = np.interp(
            100 * rng.random(count), list(self.new_tokens), np.log(list(self.new_tokens.values()))
        )
        arrive = (np.cumsum(gaps) - gaps[0]) * self.rate_per_s / rate
        return Requests(arrive, np.maximum(1, np.rint(np.exp(logs))).astype(np.int64))

    def _gaps(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Seconds at the trace's own rate, (count,)."""
        percents, known = [0.0, *self.gaps_s], [0.0, *self.gaps_s.values()]
        below = np.trapezoid(known, percents) / 100  # what they add to the mean
        beyond = (1 / self.rate_per_s - below) / (1 - LAST / 100) - known[-1]
        percent = 100 * rng.random(count)
        far = max(0.0, beyond) * rng.exponential(size=count)
        return np.interp(percent, percents, known) + np.where(percent > LAST, far, 0.0)


def _percentiles(plain: Mapping[str, float]) -> dict[float, float]:
    found = {float(percent): float(value) for percent, value in plain.items()}
    values = list(found.values())
    if list(found) != sorted(found) or values != sorted(values) or max(found) != LAST or not min(values) > 0:
        raise ValueError("percentiles do not rise to the last")
    return found
