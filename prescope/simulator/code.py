"""A setting as Python, to be copied from a panel or a page."""

from dataclasses import MISSING, fields

from .scenario import Scenario
from .scenarios import Scenarios


def code_of(scenarios: Scenarios, scenario: Scenario) -> str:
    """Python that simulates a setting, and runs it where it can be run."""
    given = {
        field.name: getattr(scenario, field.name)
        for field in fields(Scenario)
        if field.default is MISSING or getattr(scenario, field.name) != field.default
    }
    settings = ", ".join(f"{name}={value!r}" for name, value in given.items())
    lines = [
        "from prescope.simulator import Scenario",
        "",
        "# scenarios: session.scenarios(), or `live.scenarios` of the dashboard",
        *([f"scenarios = scenarios.at_batch({scenarios.batch})"] if scenarios.most_batch > 1 else []),
        f"scenario = Scenario({settings})",
        "result = scenarios.run(scenario)",
    ]
    if not scenarios.why_not_here(scenario):
        keywords = "configure=scenarios.engine_settings(scenario), max_new_tokens=64"
        lines.append(f"run = session.run(prompts, {keywords})")
    return "\n".join(lines)
