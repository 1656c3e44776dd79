"""The Python that makes a sweep, to repeat it or to change it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .space import Choices, Range, Space


def code_of(
    name: str,
    runner: str,
    space: Space,
    *,
    objectives: Sequence[str],
    method: str,
    seed: int,
    fixed: Mapping[str, Any],
    limits: Mapping[str, Any],
) -> str:
    """Python that makes a sweep and runs it.

    Args:
        runner: Python that makes its runner. limits: keywords of `Sweep.run`; those that are None are left out.
    """
    maker = re.split(r"\W", runner)[0]
    kinds = sorted({type(one).__name__ for one in space.values()} | {"Space", "open_sweep", maker})
    moved = "".join(f"    {one}={_code(span)},\n" for one, span in space.items())
    kept = f", fixed={dict(fixed)!r}" if fixed else ""
    keywords = ", ".join(f"{key}={value!r}" for key, value in limits.items() if value is not None)
    return (
        f"from prescope.tuning import {', '.join(kinds)}\n\n"
        f"space = Space(\n{moved})\n"
        f"sweep = open_sweep(\n    {name!r}, space, {runner},\n"
        f"    objectives={tuple(objectives)!r}, method={method!r}, seed={seed}{kept},\n)\n"
        f"sweep.run({keywords})\n"
        f"sweep.best(5)\n"
    )


def _code(span: Range | Choices) -> str:
    if isinstance(span, Choices):
        return repr(span)
    step = "" if span.step is None else f", step={span.step!r}"
    return f"Range({span.low!r}, {span.high!r}{step}{', log=True' if span.log else ''})"
