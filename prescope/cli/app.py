"""All commands, and what becomes of errors: exit status 0 done, 1 a prescope error, 2 a wrong call, 130 Ctrl-C."""

import asyncio
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import CancelledError

import typer

from ..errors import PrescopeError
from .advise import advise
from .bench import bench
from .calibrate import calibrate
from .compile import compile_now
from .report import report
from .run import run
from .sweep import sweep
from .terminal import INTERRUPTED, quiet_libraries, tell
from .train import train

app = typer.Typer(
    name="prescope",
    help="Run MoE models with their experts in CPU memory, and see where the time goes.",
    epilog="MODEL is a folder or a hub id; without one, the small model that comes with prescope.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: boxes do not fit a screen, nor a pipe
)
for command in (run, bench, calibrate, advise, train, sweep, report):
    app.command()(command)
app.command("compile")(compile_now)


@app.callback(invoke_without_command=True)
def version(
    is_asked: bool = typer.Option(False, "--version", help="Show the version and exit."),
) -> None:
    """Run MoE models with their experts in CPU memory, and see where the time goes."""
    if is_asked:
        from .. import __version__

        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        arguments: without the program's name; those of this process when not given.
    """
    quiet_libraries()
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        app(given, prog_name="prescope", obj=shlex.join(["prescope", *given]))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except (KeyboardInterrupt, asyncio.CancelledError, CancelledError):
        return INTERRUPTED
    except (PrescopeError, OSError) as error:
        tell(f"prescope: {_one_line(error)}")
        return 1
    except ImportError as error:  # an extra that is not installed says which one
        if "pip install" not in str(error):
            raise
        tell(f"prescope: {_one_line(error)}")
        return 1
    finally:
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
    return 0


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
