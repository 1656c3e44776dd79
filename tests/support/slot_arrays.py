"""Slots as a residency table holds them."""

import numpy as np

from prescope.cache.slots import Slots


def arrays(slot_of, key_of, scores) -> Slots:
    """As a residency table holds them; nothing is on its way or in use."""
    flags = np.zeros((3, len(key_of)), dtype=bool)
    return Slots(slot_of, key_of, *flags, scores, np.zeros(len(key_of) + 1, dtype=np.int64))
