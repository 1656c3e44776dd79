"""What a setting may be where a number is meant. A truth value is none, a text is none, numpy's numbers are."""

from typing import Any

import numpy as np


def is_count(value: Any) -> bool:
    """Whether it is a whole number of things, whichever sign it has."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """A scalar of numpy's as Python's own, which JSON and a study can hold; everything else as it is."""
    return value.item() if isinstance(value, np.generic) else value


def is_number(value: Any) -> bool:
    """Whether it is a real number, NaN included."""
    return is_count(value) or isinstance(value, float | np.floating)
