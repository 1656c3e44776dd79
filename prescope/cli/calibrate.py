"""`prescope calibrate`: measure this machine, once."""

from typing import Annotated

import typer

from .options import Device, Experts, Link
from .terminal import StatusLine, tell


def calibrate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", help="For the sizes of its experts; none: usual sizes.", show_default=False
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=0.1, help="To spend, about.")
    ] = 45.0,
    device: Device = "auto",
    link: Link = None,
    experts: Experts = "auto",
    cpu: Annotated[
        str, typer.Option("--cpu", metavar="NAME", help="CPU experts by native, torch, auto.")
    ] = "auto",
    save: Annotated[bool, typer.Option("--save/--no-save", help="Keep it for schedules to use.")] = True,
) -> None:
    """Measure link, GPU and CPU of this machine, for the schedules.

    After Ctrl-C, a call within the hour goes on where this one stopped.
    """
    if model is None and experts != "auto":
        raise typer.BadParameter("they are a model's; give MODEL", param_hint="--experts")
    from .. import calibration
    from ..engine import load
    from ..profile.files import own_file

    with StatusLine() as status:
        if model is None:
            profile = calibration.calibrate(
                device=device,
                seconds=seconds,
                on_progress=status.share,
                save=save,
                link_gb_per_s=link,
                cpu=cpu,
            )
        else:
            status.show(f"loading {model}")
            with load(model, device=device, link_gb_per_s=link, experts=experts) as engine:
                profile = calibration.calibrate(
                    engine, seconds=seconds, on_progress=status.share, save=save, cpu=cpu
                )
    for note in profile.notes:
        tell(f"note: {note}")
    typer.echo(profile.table().to_string(index=False, float_format="{:.4g}".format))
    if save:
        tell(f"saved: {own_file(profile.place)}")
