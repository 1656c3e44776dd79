"""Which state of the code a point was made by."""

import subprocess
from functools import cache
from pathlib import Path

from .. import __version__

#: Of the checkout; git answers in milliseconds, a network file system may not.
GIT_S = 20


@cache
def commit_here() -> str:
    """The checkout's commit, with "+" behind it where files differ from it; the version where there is no checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return __version__
    git = ["git", "-c", f"safe.directory={root}", "-C", str(root)]
    try:
        commit, changed = (
            subprocess.run(
                [*git, *command], capture_output=True, text=True, check=True, timeout=GIT_S
            ).stdout.strip()
            for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):  # no git, or not allowed to read it
        return __version__
    return commit + ("+" if changed else "")
