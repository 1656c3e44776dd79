"""`prescope run`: text in, text out, figures on stderr."""

import sys
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.files import require_writable
from .options import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    Experts,
    Link,
    Model,
    Predictor,
    Schedule,
    Slots,
    loaded,
    slots_of,
)
from .terminal import INTERRUPTED, StatusLine, on_interrupt, tell

if TYPE_CHECKING:
    from ..engine import Engine
    from ..traces.result import RunResult


def run(
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="- is stdin.", show_default=False)
    ] = "-",
    new: Annotated[int, typer.Option("--new", "-n", metavar="N", min=1, help="Tokens to generate.")] = 64,
    slots: Slots = "0.5",
    schedule: Schedule = "on-demand",
    device: Device = "auto",
    dtype: Dtype = "auto",
    experts: Experts = "auto",
    link: Link = None,
    predictor: Predictor = None,
    chat: Annotated[bool, typer.Option("--chat", help="By the model's chat template.")] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Save the routing, also .parquet.", show_default=False),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            "--timeline",
            metavar="FILE",
            help="Save .json(.gz) for Perfetto, or .parquet.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Stream generated text to stdout, figures to stderr; Ctrl-C ends the text."""
    for path in (trace, timeline):
        if path is not None:
            require_writable(path)
    if prompt == "-":
        if sys.stdin.isatty():
            tell("type the prompt, then Ctrl-D")
        prompt = sys.stdin.read()
    from ..engine.job import Job

    with StatusLine() as status:
        status.show(f"loading {model}")
        engine = loaded(
            model, predictor, slots=slots_of(slots), schedule=schedule, device=device, dtype=dtype, experts=experts,
            link_gb_per_s=link,
        )  # fmt: skip
    prompts = [{"role": "user", "content": prompt}] if chat else prompt
    shown = _Shown(engine)
    job = Job(partial(engine.generate, prompts), engine.turn, {"max_new_tokens": new}, engine.tokens_so_far)

    def show(job: Job[Any]) -> None:
        try:
            shown.tell(job.tokens[0])
        except BrokenPipeError:  # nobody reads on; this thread's own end says so again
            job.cancel()

    job.on_progress(show)
    with engine, on_interrupt(job.cancel) as was_interrupted:
        try:
            result = job.start().result()
        except CancelledError:  # before the first token
            raise typer.Exit(INTERRUPTED) from None
        try:
            shown.end(result.text[0])
            typer.echo()
        finally:  # whoever read the text may be gone, what was asked for is still written
            tell(f"{result.metrics}\n{result.label}")
            for note in result.notes:
                tell(f"note: {note}")
            _save(result, trace, timeline)
    if was_interrupted():
        raise typer.Exit(INTERRUPTED)


def _save(result: "RunResult", trace: Path | None, timeline: Path | None) -> None:
    """Routing and timeline, each in the form that its name says."""
    if trace is not None and result.trace is not None:
        store = result.trace.save_parquet if trace.suffix == ".parquet" else result.trace.save
        store(trace)
    if timeline is not None:
        save = result.save_events if timeline.suffix == ".parquet" else result.save_perfetto
        save(timeline)


class _Shown:
    """The text as far as it was printed."""

    def __init__(self, engine: "Engine") -> None:
        self._engine, self._text = engine, ""

    def tell(self, tokens: list[int]) -> None:
        """Print what is new; a letter whose bytes are not all there waits for them."""
        if self._engine.tokenizer is None:
            return
        text = self._engine.tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self.end(text)

    def end(self, text: str) -> None:
        """Print the rest of this text."""
        if text.startswith(self._text):
            typer.echo(text[len(self._text) :], nl=False)
            self._text = text
