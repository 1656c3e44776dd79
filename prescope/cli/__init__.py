"""The command line: `prescope run`, `bench`, `calibrate`, `advise`, `train`, `sweep`, `report`, `compile`.

A command reads its options, calls the public function of its name, and prints what came back: the result on stdout,
all else on stderr. Nothing heavy is imported before a command runs, so that `--help` comes at once.
"""

from .app import main

__all__ = ["main"]
