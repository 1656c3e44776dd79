"""Routing traces without a model: a generator that can be fitted to a recorded trace, and hostile traces.

`spec` is the generator, `drawing` its draws, `fit` the search for its parameters, `habits` the numbers it is judged
by, `adversarial` the hostile traces, `rows` what they all share. Pure numpy.
"""

from .adversarial import ADVERSARIAL, adversarial
from .fit import Fit, fit
from .habits import Habits, Overlaps, habits_of, lru_hit_rate
from .spec import SyntheticSpec

__all__ = [
    "ADVERSARIAL",
    "Fit",
    "Habits",
    "Overlaps",
    "SyntheticSpec",
    "adversarial",
    "fit",
    "habits_of",
    "lru_hit_rate",
]
