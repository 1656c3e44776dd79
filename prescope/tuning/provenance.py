"""Which state of the code a point was made by."""

from .. import __version__
from ..core.machine import commit


def commit_here() -> str:
    """The checkout's commit, with "+" behind it where files differ from it; the version where there is no checkout."""
    return commit() or __version__
