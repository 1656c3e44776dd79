"""`prescope train`: record a model's routing on prompts, train LLaPor on it, and judge it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.files import require_writable
from ..core.paths import user_path
from .options import DEFAULT_MODEL, TRAINED, Device, Experts, Model, shape_of
from .terminal import StatusLine, tell

if TYPE_CHECKING:
    from ..training import TrainingProgress


#: Of the model and its recording: with a trace there is neither.
NOT_WITH_TRACE = ("model", "prompts", "max_tokens", "own_tokens", "experts")


def train(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The predictor.")] = Path(
        TRAINED
    ),
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help=".jsonl or a text a line; none: prescope's own.",
            show_default=False,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace", metavar="FILE", help="Train on this trace, without the model.", show_default=False
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="L,E,K", help="Of a foreign trace's model.", show_default=False),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", min=1, help="At most.")] = 4,
    max_tokens: Annotated[int, typer.Option("--max-tokens", metavar="N", min=2, help="Of a prompt.")] = 128,
    own_tokens: Annotated[
        int | None,
        typer.Option("--own-tokens", metavar="N", min=0, help="Of the model's own text.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0)] = 0,
    device: Device = "auto",
    experts: Experts = "auto",
) -> None:
    """Train a predictor of coming experts, print its and others' recall.

    After Ctrl-C the same call goes on at the last epoch.
    """
    from .. import training
    from ..engine import load
    from ..traces.importers import read_trace

    _check_options(context, trace, shape)
    _check_output(output, trace, prompts)
    checkpoint = checkpoint_of(output)
    settings = training.TrainConfig(epochs=epochs, seed=seed)
    with StatusLine() as status:

        def on_progress(at: "TrainingProgress") -> None:
            status.share(f"epoch {at.epoch}, recall {at.validation_recall:.3f}", at.epoch / at.epochs)

        try:
            if trace is not None:
                sizes = None if shape is None else shape_of(shape)
                table = training.train_on_trace(
                    read_trace(trace, shape=sizes),
                    path=output,
                    training=settings,
                    checkpoint=checkpoint,
                    on_progress=on_progress,
                    device=device,
                ).table()
            else:
                status.show(f"loading {model}, recording")
                with load(model, slots=1.0, device=device, experts=experts) as engine:
                    table = training.train_predictor(
                        engine, training.own_prompts() if prompts is None else training.read_prompts(prompts),
                        training=settings, max_tokens=max_tokens, own_tokens=own_tokens, path=output,
                        checkpoint=checkpoint, on_progress=on_progress,
                    ).table()  # fmt: skip
        except KeyboardInterrupt:
            if checkpoint.exists():
                tell(f"kept: {checkpoint}; the same call goes on from it")
            raise
    checkpoint.unlink(missing_ok=True)
    typer.echo(table.to_string(index=False, float_format="{:.3f}".format))
    tell(f"saved: {output}")


def _check_options(context: typer.Context, trace: Path | None, shape: str | None) -> None:
    """Raises BadParameter for what was given and would not be heeded."""
    if trace is None:
        if shape is not None:
            raise typer.BadParameter("it is of a trace; give --trace", param_hint="--shape")
        return
    for name in NOT_WITH_TRACE:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            hint = "MODEL" if name == "model" else f"--{name.replace('_', '-')}"
            raise typer.BadParameter(
                "with --trace neither a model nor its text is read; leave one out", param_hint=hint
            )


def _check_output(output: Path, *sources: Path | None) -> None:
    """Raises BadParameter or CannotWrite where no predictor can be written, or what is read would be written over."""
    if not output.name or user_path(output).is_dir():
        raise typer.BadParameter(f"{output} is a folder; give the name of a file", param_hint="--output")
    written = [path.resolve() for path in (user_path(output), checkpoint_of(output))]
    for source in sources:
        if source is not None and user_path(source).resolve() in written:
            raise typer.BadParameter(
                f"{source} would be written over by the predictor or on the way to it; give another name",
                param_hint="--output",
            )
    for path in (output, checkpoint_of(output)):
        require_writable(path)


def checkpoint_of(output: Path) -> Path:
    """Where training is kept on the way to a predictor's file."""
    return user_path(output).with_suffix(".checkpoint.safetensors")
