"""`prescope report`: run a notebook and write it as one HTML page that opens offline."""

from pathlib import Path
from typing import Annotated

import typer

from .options import by_name
from .terminal import tell


def report(
    notebook: Annotated[
        Path, typer.Argument(metavar="NOTEBOOK", help="It is not changed.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", metavar="FILE", help="The page.", show_default=False)
    ],
    parameters: Annotated[
        list[str] | None,
        typer.Option("--param", metavar="NAME=VALUE", help="May be repeated.", show_default=False),
    ] = None,
    timeout_s: Annotated[
        int | None,
        typer.Option(
            "--timeout", metavar="S", min=1, help="Longest time of a cell, seconds.", show_default=False
        ),
    ] = None,
) -> None:
    """Run a notebook and write it as one HTML page that opens offline."""
    from .. import report as reports
    from ..report.notebook import for_stderr

    try:
        given = by_name(map(reports.parse_parameter, parameters or []), "--param")
        written = reports.execute_notebook(notebook, output, parameters=given, timeout_s=timeout_s, log=tell)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--param") from error
    except reports.NotebookFailed as error:  # the line that says what is wrong comes last, behind a traceback
        what, *traceback = for_stderr(str(error)).splitlines()
        for line in traceback:
            tell(line)
        raise reports.NotebookFailed(what) from error
    typer.echo(str(written))
