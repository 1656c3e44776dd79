"""What a sweep can be after: each with its unit and its direction."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from ..errors import UnsupportedOption


class Objective(NamedTuple):
    """One figure of a point.

    Attributes:
        title: for an axis. `direction`: which way is better.
        what: its definition.
    """

    name: str
    title: str
    unit: str
    direction: Literal["maximize", "minimize"]
    what: str

    @property
    def sign(self) -> int:
        """Times this, more is better."""
        return 1 if self.direction == "maximize" else -1


_ALL = (
    Objective(
        "tokens_per_s", "Tokens per second", "1/s", "maximize",
        "decode tokens of all sequences together over the time of the decode steps",
    ),
    Objective("p50_ms", "Step, median", "ms", "minimize", "median time of a decode step"),
    Objective("p95_ms", "Step, 95th percentile", "ms", "minimize", "95 of 100 decode steps take no longer"),
    Objective(
        "ttft_ms", "Time to first token", "ms", "minimize",
        "run start to the end of the prefill; on the device alone, the simulator has no prefill on its clock",
    ),
    Objective(
        "gpu_bytes", "GPU memory of the experts", "bytes", "minimize",
        "slots times the bytes of an expert: what the settings decide of the GPU's memory",
    ),
)  # fmt: skip
OBJECTIVES: dict[str, Objective] = {one.name: one for one in _ALL}


def objectives_named(names: Sequence[str], offered: Sequence[str]) -> tuple[Objective, ...]:
    """The objectives a person chose, the first of them leading.

    Args:
        offered: those that the runner can tell.

    Raises:
        UnsupportedOption: none is given, one twice, or one that the runner does not tell.
    """
    if isinstance(names, str):
        names = (names,)
    if not names or len(set(names)) < len(names):
        raise UnsupportedOption(f"objectives are {tuple(names)!r}; give one or more, each once")
    for name in names:
        if name not in OBJECTIVES or name not in offered:
            why = f" ({OBJECTIVES[name].what})" if name in OBJECTIVES else ""
            raise UnsupportedOption(
                f"objective {name!r}{why} cannot be told here; there are {', '.join(map(repr, offered))}"
            )
    return tuple(OBJECTIVES[name] for name in names)
