"""A progress bar for what a person waits for, in a terminal or in a notebook's cell."""

import sys

from tqdm.auto import tqdm

#: What is done sooner needs no bar.
BAR_AFTER_S = 2.0


def waiting_bar(total: float | None, what: str, unit: str, after_s: float = BAR_AFTER_S) -> tqdm:
    """A bar that comes when one has waited for `after_s` seconds, and goes when it is closed.

    Nothing is shown where nobody would see it move: in a file, or behind a pipe.

    Args:
        total: of the units; None where nobody knows.
        what: is done, in words that stand in front of the bar.
    """
    # By its name: importing it takes as long as a tenth of `prescope.load`, for ipywidgets.
    in_cell = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    is_seen = in_cell or sys.stderr.isatty()
    return tqdm(total=total, desc=what, unit=unit, delay=after_s, leave=False, disable=not is_seen)
