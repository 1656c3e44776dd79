"""What a page says of a run or of a setting: the answer, its numbers, its figures, and how to get them again."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import plotly.graph_objects as go

from .. import views
from ..core.machine import commit
from ..core.types import Phase
from ..core.units import digits
from ..engine.config import EngineConfig
from ..simulator import Scenario, Scenarios, code_of, verdict
from ..traces.result import RunResult
from ..traces.routing import RoutingTrace
from ..views.numbers import Numbers, bound_numbers, numbers, numbers_there, run_in_words
from ..views.theme import settings_of
from .page import drawn


class Story(NamedTuple):
    """One page's content, in the order in which a person reads it."""

    verdict: str  # one sentence
    numbers: Sequence[Numbers]
    figures: Sequence[go.Figure | str]  # a text stands for one that cannot be drawn, and says why
    code: str  # Python that gives them again
    about: Mapping[str, str]  # machine, model, settings, commit, ...
    commands: Sequence[str]
    trace: RoutingTrace | None  # to be downloaded from the page
    runs: Sequence[RunResult]


def story_of_run(run: RunResult, scenarios: Scenarios | None = None) -> Story:
    """A run: what was measured, and, where it can be simulated, whether prediction would pay and the bound.

    Args:
        scenarios: of this very run.
    """
    words, rows = run_in_words(run), [numbers(run)]
    if scenarios is not None:
        scenario = Scenario(schedule="on-demand", slots=run.config["num_slots"], cache=run.config["cache"])
        simulated = scenarios.run(scenario)
        words = f"{verdict(scenarios, scenario).words}. {words}"
        rows = [numbers(simulated), *rows, bound_numbers(simulated)]
    phase: Phase = "decode" if run.metrics.decode.num_steps else "prefill"
    figures = [
        drawn("timeline", lambda: views.timeline(run)),
        drawn("layers", lambda: views.layers(run, phase)),
        drawn("hit rate", lambda: views.hit_rate(run, phase)),
        drawn("latency", lambda: views.latency(run)),
        drawn("load", lambda: views.load(run)),
    ]
    about = {
        "machine": _machine(run.hardware),
        "model": str(run.config.get("model", "")),
        "settings": settings_of(run) + f" · batch {run.metrics.batch}",
        "commit": commit(),
    }
    return Story(words, rows, figures, _code_of_run(run), about, (), run.trace, [run])


def story_of_setting(
    scenarios: Scenarios,
    scenario: Scenario,
    runs: Sequence[RunResult] = (),
    pinned: Numbers | None = None,
    steps: range | None = None,
) -> Story:
    """A setting as a panel shows it: simulated, beside what was measured of it.

    Args:
        runs: of this very setting on the engine. pinned: the baseline's numbers. steps: that the lanes show.
    """
    result, there = scenarios.run(scenario), scenarios.measured_there(scenario)
    measured = runs[-1] if runs else None
    rows = [numbers(result)]
    if measured is not None:
        rows.append(numbers(measured))
    elif there is not None:
        rows.append(numbers_there(there, scenarios.machine(scenario).row_bytes))
    rows += [] if pinned is None else [pinned._replace(row="pinned")]
    figures: list[go.Figure | str] = [
        views.step_times(result, measured),
        views.lanes(result, steps),
        views.outcomes(result, measured),
    ]
    if measured is not None and not measured.events.empty:
        shown = range(0) if steps is None else steps
        both = [step for step in shown if step in set(measured.steps["step"])]
        figures.append(views.schedule_pair(result, measured, range(both[0], both[-1] + 1)) if both else "")
    machine = scenarios.machine(scenario)
    about = {
        "machine": f"{machine.name}: {machine.costs.source}"
        + ("" if measured is None else f"; {_machine(measured.hardware)}"),
        "model": f"{scenarios.label}: {scenarios.trace.num_layers} MoE layers, top-{scenarios.trace.top_k} of "
        f"{scenarios.trace.num_experts} experts of {digits(machine.row_bytes / 1e6)} MB",
        "settings": settings_of(result) + f" · batch {result.batch}",
        "trace": f"{scenarios.trace.model}, recorded {scenarios.trace.created}",
        "commit": commit(),
    }
    return Story(
        f"{verdict(scenarios, scenario).words}.", [*rows, bound_numbers(result)], figures,
        code_of(scenarios, scenario), about, scenarios.commands, scenarios.trace, list(runs[-1:]),
    )  # fmt: skip


def _machine(hardware: Mapping[str, Any]) -> str:
    said = [str(hardware.get("label", ""))]
    said += [f"{hardware['cores']} cores of {hardware['cpu']}"] if "cpu" in hardware else []
    said += [f"{name} {hardware[name]}" for name in ("python", "torch", "transformers") if hardware.get(name)]
    return ", ".join(said)


def _code_of_run(run: RunResult) -> str:
    """Python that makes the run again, as far as its record says: texts of prompts, but no predictor's file."""
    config = run.config
    settings = {
        field.name: config[field.name]
        for field in fields(EngineConfig)
        if field.name in config and config[field.name] != field.default and field.name != "kernels"
    }
    texts = [] if run.trace is None else [prompt.get("text") for prompt in run.trace.prompts]
    prompts = repr(texts) if texts and all(isinstance(text, str) for text in texts) else "prompts"
    keywords = "".join(f", {name}={value}" for name, value in config.get("generate", {}).items())
    lines = [
        "import prescope",
        "",
        f"engine = prescope.load({config.get('model')!r}, {', '.join(f'{k}={v!r}' for k, v in settings.items())})",
        f"run = engine.generate({prompts}{keywords})",
    ]
    if config.get("predictor", "none") != "none":
        lines.insert(3, f"engine.configure(predictor=...)  # {config['predictor']}")
    return "\n".join(lines)
