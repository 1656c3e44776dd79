"""`prescope advise`: will a model run on a machine, how fast, with which settings."""

import json
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.paths import user_path
from .options import TRAINED, AsJson, Experts
from .terminal import tell

if TYPE_CHECKING:
    from ..advice import Advice, MachineSpec

#: What a machine consists of, as `MachineSpec` names it, and its option.
NEEDED = ("link_gb_per_s", "host_gib", "host_gb_per_s", "gpu_gib", "gpu_gb_per_s")


def _number(option: str, text: str) -> Any:
    return typer.Option(option, metavar="N", help=text, show_default=False)


def advise(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder, config.json, hub id, or a name of data/configs.")
    ],
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine", metavar="NAME", help="h200, h100, or a profile's file.", show_default=False
        ),
    ] = None,
    link_gb_per_s: Annotated[float | None, _number("--link-gb-per-s", "Host to GPU, GB/s.")] = None,
    host_gib: Annotated[float | None, _number("--host-gib", "Host memory, GiB.")] = None,
    host_gb_per_s: Annotated[float | None, _number("--host-gb-per-s", "Its rate, GB/s.")] = None,
    gpu_gib: Annotated[float | None, _number("--gpu-gib", "GPU memory that may be used, GiB.")] = None,
    gpu_gb_per_s: Annotated[float | None, _number("--gpu-gb-per-s", "Its rate, GB/s.")] = None,
    cores: Annotated[
        int | None, typer.Option("--cores", metavar="N", help="That compute experts.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", metavar="N", min=1, help="Sequences.")] = 1,
    context: Annotated[
        int, typer.Option("--context", "-c", metavar="N", min=1, help="Tokens of each.")
    ] = 4096,
    experts: Experts = "auto",
    as_json: AsJson = False,
) -> None:
    """Say whether and how a model runs on a machine, before it is loaded.

    Type five numbers in, or name a machine; fewer numbers change the one named.
    """
    typed: dict[str, float] = {
        name: value
        for name, value in (
            ("link_gb_per_s", link_gb_per_s), ("host_gib", host_gib), ("host_gb_per_s", host_gb_per_s),
            ("gpu_gib", gpu_gib), ("gpu_gb_per_s", gpu_gb_per_s), ("cores", cores),
        )
        if value is not None
    }  # fmt: skip
    # GPU memory alone is a budget: what was measured of the machine still holds.
    changes = {} if typed.keys() <= {"gpu_gib"} else typed
    missing = [f"--{name.replace('_', '-')}" for name in NEEDED if name not in typed]
    if changes and missing and machine is None:
        raise typer.BadParameter(
            f"a machine also needs {', '.join(missing)}; or name one with --machine and change it"
        )
    from .. import advice
    from ..weights.formats import lossy_name

    found = advice.advise(
        model, _machine(machine, changes), batch=batch, context=context, gpu_gib=gpu_gib, experts=experts
    )
    if as_json:
        told = {
            "model": found.model.name, "machine": found.machine.name, "kind": found.kind, "words": found.words,
            "settings": found.settings, "cliff_gib": found.cliff_gib, "budget_gib": found.budget_gib,
            "points": [point._asdict() for point in found.points], "assumptions": list(found.assumptions),
        }  # fmt: skip
        typer.echo(json.dumps(told, indent=1, default=str))
        return
    typer.echo(f"{found.model.name} on {found.machine.name}: {found.kind}. {found.words}")
    for what, value in found.facts():
        typer.echo(f"  {what}: {value}")
    if found.points:
        typer.echo(found.table().to_string(float_format="{:.4g}".format))
    for assumption in found.assumptions:
        tell(f"assumed: {assumption}")
    name = found.model.name.removesuffix(lossy_name("", experts))
    for command in _commands(found, _to_load(model, name), experts):
        tell(command)


def _to_load(model: str, name: str) -> str:
    """What `run` takes for the model of a config: its folder, or the hub id that the config names."""
    given = user_path(model)
    if given.is_dir() or ("/" in model and not given.is_file()):
        return model
    if given.name == "config.json":
        return str(given.parent)
    return "MODEL" if name == model else name


def _commands(found: "Advice", model: str, experts: str) -> list[str]:
    """The calls that do what is advised; a gain by prediction needs a predictor, and that its training."""
    options = [f"--{name} {found.settings[name]}" for name in ("slots", "schedule") if name in found.settings]
    if not options:
        return []
    quoted = shlex.quote(model) + ("" if experts == "auto" else f" --experts {experts}")
    if found.settings.get("schedule") != "presched":
        return [f"prescope run {quoted} {' '.join(options)}"]
    return [
        f"prescope train {quoted} -o {TRAINED}",
        f"prescope run {quoted} {' '.join(options)} --predictor {TRAINED}",
    ]


def _machine(named: str | None, changes: dict[str, float]) -> "MachineSpec | str | None":
    """The machine meant: the one named, as it is or changed, or one of typed numbers alone."""
    from ..advice import KNOWN, MachineSpec
    from ..profile import HardwareProfile

    if not changes:
        return named
    if named is None:
        return MachineSpec(**changes)  # type: ignore[arg-type]
    base = KNOWN[named] if named in KNOWN else MachineSpec.of_profile(HardwareProfile.load(named))
    return base.changed(**changes)
