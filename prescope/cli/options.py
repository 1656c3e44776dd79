"""Options that several commands share, and how their texts are read."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.paths import EMBEDDED_MODEL

if TYPE_CHECKING:
    from ..engine import Engine

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub id.", show_default=False)]
Slots = Annotated[str, typer.Option("--slots", "-s", metavar="S", help="0.25 (share), 64 or 8GiB.")]
Schedule = Annotated[str, typer.Option("--schedule", metavar="NAME", help="presched, klotski, ...")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cuda, cuda:1, cpu.")]
Link = Annotated[
    float | None,
    typer.Option("--link-gb-per-s", metavar="GB/S", help="Of the emulated link.", show_default=False),
]
Predictor = Annotated[
    str | None,
    typer.Option("--predictor", metavar="FILE", help="Of train, or early-router.", show_default=False),
]
Dtype = Annotated[str, typer.Option("--dtype", metavar="NAME", help="bf16, fp16, fp32, auto.")]
Experts = Annotated[str, typer.Option("--experts", metavar="FORM", help="int8, fp8, int4, mxfp4: lossy.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

#: What MODEL is when it is not given.
DEFAULT_MODEL = EMBEDDED_MODEL
#: Where `train` puts a predictor that was given no name.
TRAINED = "llapor.safetensors"
#: The predictor that no file holds: the routers of the model that is loaded.
EARLY_ROUTER = "early-router"


def slots_of(text: str) -> int | float | str:
    """Slots as `EngineConfig` takes them: "64" is a count, "0.25" a share, all else a size, which the engine checks."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def listed(text: str, name: str) -> list[str]:
    """Values of a comma list.

    Raises:
        BadParameter: there is none; `name` is the option's.
    """
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise typer.BadParameter("give one value or more", param_hint=name)
    return found


def by_name(pairs: Iterable[tuple[str, Any]], option: str) -> dict[str, Any]:
    """What an option that may be repeated says of each name.

    Raises:
        BadParameter: it says something of a name twice, and only one of them could hold.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise typer.BadParameter(f"{name} is there twice; give it once", param_hint=option)
        found[name] = value
    return found


def numbers(text: str, name: str) -> list[int]:
    """Whole numbers of a comma list.

    Raises:
        BadParameter: one is none, or there are none.
    """
    try:
        return [int(part) for part in listed(text, name)]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers", param_hint=name) from error


def shape_of(text: str) -> tuple[int, int, int]:
    """Layers, experts and top-k of a comma list.

    Raises:
        BadParameter: they are not three numbers.
    """
    found = numbers(text, "--shape")
    if len(found) != 3:
        raise typer.BadParameter(f"{text!r} is not layers,experts,top-k", param_hint="--shape")
    layers, experts, top_k = found
    return layers, experts, top_k


def loaded(model: str, predictor: str | None, *, schedule: str, **settings: Any) -> "Engine":
    """An engine with the predictor that an option names; raises as `engine.load` and `Llapor.load`.

    A schedule waits for a predictor that is made of the model.
    """
    from ..engine import load
    from ..predictor import Llapor
    from ..scheduler import schedule_named
    from ..training import early_router

    schedule_named(schedule)  # a wrong name is told before minutes of loading
    if predictor != EARLY_ROUTER:
        known = None if predictor is None else Llapor.load(predictor)
        return load(model, schedule=schedule, predictor=known, **settings)
    engine = load(model, **settings)
    engine.configure(schedule=schedule, predictor=early_router(engine))
    engine.clear_cache()  # of what the model wrote for it: a run begins from empty slots
    return engine
