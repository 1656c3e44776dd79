"""The command line of pages; `prescope report` takes the same options.

python -m prescope.report notebooks/00_quickstart.ipynb --out reports/quickstart.html --param slots=0.25
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import PrescopeError
from .notebook import execute_notebook, for_stderr, parse_parameter


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when a cell failed or nothing can be written, 2 for a wrong call, 130 cancelled."""
    parser = argparse.ArgumentParser(
        prog="python -m prescope.report", description="Run a notebook, write one HTML."
    )
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the HTML file to write")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        type=parse_parameter,
        metavar="NAME=VALUE",
        help="may be repeated",
    )
    parser.add_argument("--timeout", type=int, help="longest time of one cell, seconds")
    given = parser.parse_args(arguments)
    try:
        execute_notebook(given.notebook, given.out, parameters=dict(given.param), timeout_s=given.timeout)
    except PrescopeError as error:
        print(for_stderr(str(error)), file=sys.stderr)
        return 1
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("cancelled; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
