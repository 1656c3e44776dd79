"""How much else ran on the machine meanwhile: measured times scatter with it, simulated ones do not."""

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")
#: From this share of the cores on, a run's times are worth a warning.
IS_BUSY = 0.25


class OthersWork:
    """Share of the machine's cores that other processes took since it was made."""

    def __init__(self) -> None:
        self._begin = _seconds()

    def frac(self) -> float | None:
        """0 to 1; None where the system does not tell (no /proc/stat)."""
        end = _seconds()
        if self._begin is None or end is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._begin, end, strict=True))
        return max(0.0, busy - own) / max(1e-9, wall * (os.cpu_count() or 1))


def _seconds() -> tuple[float, float, float] | None:
    """Clock, time all cores worked, time this process and its children worked."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _wait, irq, soft = map(int, _STAT.read_text().split()[1:8])
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    return time.monotonic(), (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK"), own
