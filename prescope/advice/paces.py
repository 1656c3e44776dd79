"""How fast a model's schedules serve batches on a machine, before anything is downloaded: for `simulator.serve`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..profile import HardwareProfile
from ..simulator.waiting import Pace
from .capacity import advise
from .machine_spec import MachineSpec

#: Sequences of the batches that are simulated.
BATCHES = (1, 4, 16)


def paces(
    model: str | Path | dict[str, Any],
    machine: MachineSpec | HardwareProfile | str | None = None,
    *,
    share: float = 0.5,
    batches: Sequence[int] = BATCHES,
) -> dict[str, Pace]:
    """On demand, the best without prediction, the best schedule, and that with perfect prediction, by these names.

    Steps are simulated by `advise` for each batch: routing is made up, and an oracle that errs as LLaPor does predicts.
    The prompts' pass is the link's bound: every expert that has no slot is brought over once.

    Args:
        model, machine: as `advise` takes them. share: of all experts that have a slot.

    Raises:
        as `advise`.
    """
    ways = {"on demand": "on_demand", "best without prediction": "without", "best schedule": "tokens_per_s",
            "perfect prediction": "perfect"}  # fmt: skip
    found = {batch: advise(model, machine, batch=batch, shares=[share]) for batch in batches}
    points = {batch: one.points[0] for batch, one in found.items()}
    one = found[batches[0]]
    missing = one.model.shape.total_experts - points[batches[0]].slots
    prompt_ms = max(1e-3, missing * one.model.shape.row_bytes / one.machine.link_gb_per_s / 1e6)
    return {
        name: Pace(
            step_ms={batch: 1e3 * batch / getattr(point, field) for batch, point in points.items()},
            prompt_ms=prompt_ms,
        )
        for name, field in ways.items()
    }
