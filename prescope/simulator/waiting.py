"""Requests that come while others are served: how long they wait, and when each has its first token.

Simulated, as the engine would serve them: one batch at a time, of all that wait, and until its longest text is done;
who comes meanwhile waits. A step's time comes from replays at each batch. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedOption
from ..traces.arrivals import Requests

#: Sequences of one batch at most.
MOST = 16
#: Fewer served than come, by more than this share: the line grows without end.
BEHIND = 0.03


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a schedule serves a batch.

    Attributes:
        step_ms: time of a decode step, by number of sequences in it; those between are interpolated, and beyond the
            largest it goes on in proportion.
        prompt_ms: of the prompts' pass, for a batch of any size: where experts lie in host memory, bringing over all
            that have no slot, once, is the most of it.

    Raises:
        UnsupportedOption: no batch, or a time that is not above 0.
    """

    step_ms: Mapping[int, float]
    prompt_ms: float

    def __post_init__(self) -> None:
        if not self.step_ms or min(self.step_ms) < 1 or min(*self.step_ms.values(), self.prompt_ms) <= 0:
            raise UnsupportedOption(
                "a pace has the time of a step for one batch at least, and all times are above 0"
            )

    def of(self, batch: int) -> float:
        """Time of a decode step with so many sequences, ms."""
        known = sorted(self.step_ms)
        if batch > known[-1]:
            return self.step_ms[known[-1]] * batch / known[-1]
        return float(np.interp(batch, known, [self.step_ms[one] for one in known]))


class Served(NamedTuple):
    """What became of requests (N,), seconds on the clock of their arrivals."""

    arrive_s: NDArray[np.float64]
    begin_s: NDArray[np.float64]  # its batch begins
    first_s: NDArray[np.float64]  # its first token: the prompts' pass is over
    end_s: NDArray[np.float64]  # its last token
    batch: NDArray[np.int64]  # sequences of its batch
    free_s: float  # the last batch is over

    @property
    def wait_s(self) -> NDArray[np.float64]:
        """Time in line, (N,)."""
        return self.begin_s - self.arrive_s

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """From the arrival to the first token, (N,)."""
        return self.first_s - self.arrive_s

    @property
    def keeps_pace(self) -> bool:
        """As many are served as come: the line does not grow without end."""
        return self.free_s <= (1 + BEHIND) * float(self.arrive_s[-1]) + 2 * self._longest_s

    @property
    def _longest_s(self) -> float:
        return float((self.end_s - self.begin_s).max())


def serve(requests: Requests, pace: Pace, most: int = MOST) -> Served:
    """Serve requests in the order in which they come.

    Args:
        most: sequences of one batch.

    Raises:
        UnsupportedOption: most < 1.
    """
    if most < 1:
        raise UnsupportedOption(f"most is {most}; a batch has one sequence at least")
    arrive, new = requests.arrive_s, requests.new_tokens
    begin, first, end = (np.empty(len(arrive)) for _ in range(3))
    batches = np.empty(len(arrive), np.int64)
    at, free = 0, 0.0
    while at < len(arrive):
        now = max(free, float(arrive[at]))
        till = min(at + most, int(np.searchsorted(arrive, now, "right")))
        here, step_s = slice(at, till), pace.of(till - at) / 1e3
        begin[here], first[here], batches[here] = now, now + pace.prompt_ms / 1e3, till - at
        end[here] = first[here] + (new[here] - 1) * step_s
        at, free = till, float(end[here].max())
    return Served(arrive, begin, first, end, batches, free)
