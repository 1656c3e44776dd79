"""`prescope sweep`: search settings on the simulator or on the device, and prove the best on the device."""

import ast
import json
import threading
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.files import require_writable
from ..core.paths import user_path
from .options import AsJson, Device, Experts, by_name, listed, shape_of
from .terminal import INTERRUPTED, StatusLine, on_interrupt, tell

if TYPE_CHECKING:
    import pandas as pd

    from ..engine import Engine
    from ..tuning import Proof, SimulatorRunner, Sweep

#: Of the prompts that points and proofs run, one of each.
DOMAINS = ("prose", "code", "maths")


def sweep(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", hidden=True, show_default=False)],
    vary: Annotated[
        list[str],
        typer.Option("--vary", metavar="X=A:B[:STEP]", help="Or X=a,b,c. Repeat it.", show_default=False),
    ],
    fix: Annotated[
        list[str] | None,
        typer.Option("--fix", metavar="X=VALUE", help="May be repeated.", show_default=False),
    ] = None,
    points: Annotated[
        int | None, typer.Option("--points", "-n", metavar="N", help="In all.", show_default=False)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option("--minutes", metavar="M", help="At most.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option("--method", metavar="NAME", help="tpe, grid, random, nsga.")] = "tpe",
    objective: Annotated[
        str, typer.Option("--objective", metavar="NAME,..", help="Also p95_ms, ...")
    ] = "tokens_per_s",
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Processes.")] = 1,
    trace: Annotated[
        str, typer.Option("--trace", metavar="NAME", help="To replay: a recording or a file.")
    ] = "medium.b1",
    shape: Annotated[
        str | None,
        typer.Option("--shape", metavar="L,E,K", help="Of a foreign trace's model.", show_default=False),
    ] = None,
    measure: Annotated[
        str | None, typer.Option("--measure", metavar="MODEL", help="Run points on it.", show_default=False)
    ] = None,
    prove: Annotated[
        str | None, typer.Option("--prove", metavar="MODEL", help="Run the best on it.", show_default=False)
    ] = None,
    device: Device = "auto",
    experts: Experts = "auto",
    storage: Annotated[
        str | None, typer.Option("--storage", metavar="URL", help="Or an SQLite file.", show_default=False)
    ] = None,
    page: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write it as an HTML page.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search settings; print the best, of several objectives the front. Ctrl-C keeps all points; a NAME that is there
    goes on.
    """
    space, fixed = by_name(map(_varied, vary), "--vary"), by_name(map(_fixed, fix or []), "--fix")
    objectives = listed(objective, "--objective")
    if experts != "auto" and measure is None and prove is None:
        raise typer.BadParameter("they are a model's; give --measure or --prove", param_hint="--experts")
    from .. import tuning

    if page is not None:
        from .. import report  # noqa: F401 - a package that it lacks is said before the search

        require_writable(page)

    cancel = threading.Event()
    with ExitStack() as stack:
        engines = _Engines(stack, device, experts)
        if prove is not None:
            _require_costs(engines.of(prove), space, fixed)
        if measure is not None:
            runner: tuning.Runner = tuning.EngineRunner(engines.of(measure), _prompts())
        else:
            runner = _replays(trace, shape)
        searched = tuning.open_sweep(
            name, {one: _range(value) for one, value in space.items()}, runner, objectives=objectives, method=method,
            storage=storage, fixed=fixed,
        )  # fmt: skip
        if points is not None:
            tell(str(searched.estimate(points, workers=workers)))
        was_interrupted = stack.enter_context(on_interrupt(cancel.set))
        with StatusLine() as status:
            done = searched.run(points, minutes, workers, lambda now: status.show(str(now)), cancel)
        tell(f"{done}; {searched.place}")
        best = searched.best() if len(searched.objectives) == 1 else searched.front()
        if not as_json:
            _print_best(searched, best)
        proof: tuning.Proof | None = None
        try:
            if prove is not None and not was_interrupted():
                with StatusLine() as status:
                    proof = tuning.prove(
                        searched, engines.of(prove), _prompts(unless=searched.prompts), cancel=cancel,
                        on_progress=lambda now, of: status.share(f"proof, run {now} of {of}", now / of),
                    )  # fmt: skip
        finally:  # after Ctrl-C in the proof too: the points are there
            if as_json:
                typer.echo(_json(best, proof, is_proved=prove is not None))
            if page is not None and len(best):
                _write_page(searched, page, context.obj, proof)
        if proof is not None:
            _print_proof(proof, as_json)
        if was_interrupted():
            tell(f"kept: the same call goes on with {name}")
            raise typer.Exit(INTERRUPTED)
    if not len(best):
        reasons = searched.points()["reason"]
        tell(f"prescope: no point finished: {next(filter(None, reasons), 'none was tried')}")
        raise typer.Exit(1)


class _Engines:
    """The engine that points or the proof run on; both on one where they name the same model."""

    def __init__(self, stack: ExitStack, device: str, experts: str) -> None:
        self._stack = stack
        self._settings: dict[str, Any] = {"device": device, "experts": experts}
        self._loaded: dict[str, Engine] = {}

    def of(self, model: str) -> "Engine":
        from ..engine import load

        if model not in self._loaded:
            self._loaded[model] = self._stack.enter_context(load(model, **self._settings))
        return self._loaded[model]


def _require_costs(engine: "Engine", space: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Say it before the search that this machine must be calibrated for the proof, not behind it.

    Raises:
        NoProfile: a schedule that may win weighs costs, and the machine's are not known.
    """
    from ..profile import HardwareProfile

    named = space.get("schedule", [fixed.get("schedule", engine.config.schedule)])
    if any(name != "on-demand" for name in named):
        HardwareProfile.of_this_machine(engine.hardware())


def _prompts(unless: Collection[str] = ()) -> list[str]:
    """The first prompt of each domain whose checksum is not among these: a proof runs none that the search used."""
    from ..training import own_prompts
    from ..tuning.prompts import checksum_of_prompt

    groups = own_prompts(*DOMAINS).values()
    first = (
        next((text for text in group if checksum_of_prompt(text) not in unless), None) for group in groups
    )
    return [text for text in first if text is not None]


def _replays(given: str, shape: str | None) -> "SimulatorRunner":
    """A recording with its machine, or any trace on the machines that come with prescope."""
    from ..simulator import shipped_machines, shipped_recordings
    from ..traces.importers import read_trace
    from ..tuning import SimulatorRunner

    path = user_path(given)
    is_recording = bool(path.name) and path.with_suffix(".trace.safetensors").exists()
    if given in shipped_recordings() or is_recording:
        return SimulatorRunner.of_recording(given)
    trace = read_trace(path, shape=None if shape is None else shape_of(shape))
    return SimulatorRunner({path.name: trace}, shipped_machines(trace.shape, 1))


def _pair(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or not value:
        raise typer.BadParameter(f"{text!r} is not name=value", param_hint=option)
    return name, value


def _value(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _fixed(text: str) -> tuple[str, Any]:
    name, value = _pair(text, "--fix")
    return name, _value(value)


def _varied(text: str) -> tuple[str, list[Any] | tuple[Any, ...]]:
    """Name with the ends of a range and its step as a tuple, or with choices as a list."""
    name, value = _pair(text, "--vary")
    ends = value.split(":")
    if len(ends) == 1:
        return name, [_value(part) for part in listed(value, "--vary")]
    numbers = tuple(_value(end) for end in ends)
    if len(ends) > 3 or any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
        raise typer.BadParameter(
            f"{text!r} is neither name=low:high[:step] nor name=a,b,c", param_hint="--vary"
        )
    return name, numbers


def _range(given: list[Any] | tuple[Any, ...]) -> Any:
    from ..tuning import Choices, Range

    return Choices(*given) if isinstance(given, list) else Range(*given)


def _json(best: "pd.DataFrame", proof: "Proof | None", is_proved: bool) -> str:
    """The best points; where they are to be proved, an object with them and the proof."""
    rows = json.loads(best.to_json(orient="records", date_format="iso"))
    if not is_proved:
        return json.dumps(rows, indent=1)
    told = proof and {
        "kept": proof.kept, "words": proof.words, "settings": dict(proof.settings), "default": dict(proof.default),
        "candidates": json.loads(proof.table().to_json(orient="records")), "notes": list(proof.notes),
        "origin": proof.origin, "machine": proof.machine, "label": proof.label,
    }  # fmt: skip
    return json.dumps({"best": rows, "proof": told}, indent=1, default=str)


def _print_best(searched: "Sweep", best: "pd.DataFrame") -> None:
    columns = ["number", *searched.space, *(one.name for one in searched.objectives), "origin"]
    if len(best):
        typer.echo(best[columns].to_string(index=False))
        for origin, machine in best[["origin", "machine"]].drop_duplicates().itertuples(index=False):
            tell(f"{origin}: {machine}")


def _write_page(searched: "Sweep", page: Path, command: str, proof: "Proof | None") -> None:
    from ..report import write_sweep_report

    tell(f"saved: {write_sweep_report(searched, page, commands=command, proof=proof)}")


def _print_proof(proof: "Proof", as_json: bool) -> None:
    if not as_json:
        typer.echo(proof.table().to_string(index=False))
    tell(str(proof))
