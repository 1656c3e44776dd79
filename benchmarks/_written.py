"""What a benchmark writes: machine, arguments and cells as one JSON file."""

import argparse
import json
from pathlib import Path
from typing import Any


def write_cells(args: argparse.Namespace, machine: dict[str, Any], cells: list[dict[str, Any]]) -> None:
    """Write everything there is so far into the file of `--out`, if it is given: an interrupted run keeps its cells."""
    if args.out:
        arguments = {name: value for name, value in vars(args).items() if name not in ("deadline", "out")}
        everything = {"machine": machine, "arguments": arguments, "cells": cells}
        Path(args.out).write_text(json.dumps(everything, indent=1, default=str) + "\n")
