"""Units: GiB = 2**30 bytes, GB = 10**9 bytes, times in microseconds unless a name says otherwise."""

import re

GB = 10**9
KIB, MIB, GIB = 2**10, 2**20, 2**30

_FACTORS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "kib": KIB, "mib": MIB, "gib": GIB}
#: Characters of a size that anything could have.
LONGEST_SIZE = 64
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]?i?b)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Number of bytes in a text such as "8GiB", "512 MiB" or "1.5GB".

    Raises:
        ValueError: no number, or a unit other than B, kB, MB, GB, KiB, MiB, GiB.
    """
    match = _SIZE.fullmatch(text)
    if match is None or len(text) > LONGEST_SIZE:
        raise ValueError(f"{text!r:.80} is not a size; write it like '8GiB', '512MiB' or '1.5GB'")
    return int(float(match[1]) * _FACTORS[match[2].lower()])


def gb_per_s(nbytes: float, us: float) -> float:
    """Bandwidth in GB/s (10**9 bytes per second); 0.0 when no time passed."""
    return nbytes / us / 1e3 if us > 0 else 0.0


def digits(value: float) -> str:
    """Three significant digits at least, without an exponent: "0.0123", "34.5", "1,750"."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def count_of(number: int, what: str) -> str:
    """ "1 step", "1,200 steps": of words whose plural ends in s."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def format_bytes(nbytes: float) -> str:
    """Human-readable binary size in three digits: "1.5 GiB", "384 KiB"; in four from 1,000 to 1,023 of a unit."""
    for factor, unit in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if nbytes >= factor:
            size = nbytes / factor
            return f"{size:,.0f} {unit}" if size >= 999.5 else f"{size:.3g} {unit}"
    return f"{int(nbytes)} B"
