"""Optuna's own announcements, kept from whoever only wanted a sweep."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.exceptions import ExperimentalWarning


@contextmanager
def unlogged() -> Iterator[None]:
    """Optuna says of each study that it was made, always."""
    former = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(former)


@contextmanager
def quiet() -> Iterator[None]:
    """Besides, it warns that some of its parts may change.

    Not for a sweep's own thread: filters of warnings are the process's, and it would take the user's along.
    """
    with unlogged(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield
