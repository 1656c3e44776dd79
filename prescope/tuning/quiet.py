"""Optuna's own announcements, kept from whoever only wanted a sweep."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import ExperimentalWarning


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna says of each study that it was made, of some of its own parts that they may change, and of importances how
    they want their values, always."""
    former = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            warnings.filterwarnings("ignore", "PedAnovaImportanceEvaluator computes", UserWarning)
            yield
    finally:
        optuna.logging.set_verbosity(former)
