"""What a setting may be where a number is meant. A truth value is none, a text is none, numpy's numbers are."""

import math
from dataclasses import fields
from typing import Any

import numpy as np

from ..errors import UnsupportedOption

#: Seeds that numpy and torch both take.
MOST_SEED = 2**63 - 1


def is_count(value: Any) -> bool:
    """Whether it is a whole number of things, whichever sign it has."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A scalar of numpy's as Python's own, which JSON and a study can hold; everything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def is_number(value: Any) -> bool:
    """Whether it is a real number, NaN included."""
    return is_count(value) or isinstance(value, float | np.floating)


def require_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raises UnsupportedOption unless it is a whole number from `least` on, up to `most` if that is given."""
    if not (is_count(value) and value >= least and (most is None or value <= most)):
        reach = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UnsupportedOption(f"{name} is {value!r}; it is a whole number, {reach}")


def require_seed(value: Any) -> None:
    """Raises UnsupportedOption unless it is a seed for numpy and torch."""
    require_count("seed", value, 0, MOST_SEED)


def require_size(name: str, value: Any, *, above: bool = False) -> None:
    """Raises UnsupportedOption unless it is a finite number, not negative; `above`: and not 0 either."""
    if not (is_number(value) and 0 <= value < math.inf and (value > 0 or not above)):
        raise UnsupportedOption(
            f"{name} is {value!r}; it is a finite number, {'above 0' if above else 'not negative'}"
        )


def settle(settings: Any) -> None:
    """Numbers of numpy's in a dataclass as Python's own, which files can hold."""
    for field in fields(settings):
        object.__setattr__(settings, field.name, plain(getattr(settings, field.name)))
