"""What `advise` finds: a curve, a choice among four, and everything that was assumed for it."""

from dataclasses import dataclass
from html import escape
from typing import Any, Literal, NamedTuple

import pandas as pd

from ..core.units import digits, format_bytes
from .machine_spec import MachineSpec
from .model_size import ModelSize

Kind = Literal["all on the GPU", "offload", "static split", "not with this machine"]


class CapacityPoint(NamedTuple):
    """One number of slots: what the best schedules do there, simulated."""

    slots: int
    share: float  # of all experts
    gpu_gib: float  # slots, dense part, keys and values, work space
    hit_rate: float  # of the best schedule; distinct experts per layer and step
    tokens_per_s: float  # of the best schedule
    schedule: str  # that one
    on_demand: float  # tokens/s without prediction and CPU lane
    on_demand_hit_rate: float
    without: float  # tokens/s of the best without prediction
    perfect: float  # tokens/s with a predictor that knows the future and costs nothing
    limit: str  # "link", "GPU", "launches", "CPU" or "waiting"
    limit_frac: float


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Whether and how a model runs on a machine.

    Attributes:
        kind: which of four. words: why, for people.
        points: by rising number of slots. best: the one that is advised, None if there is none.
        cliff_gib: GPU memory below which LRU slots hold less than one step needs, so that they find nothing.
        budget_gib: GPU memory there is, or what the user allows.
        settings: for `prescope.load(model, **settings)`.
        assumptions: what is not known and was assumed, one sentence each.
    """

    model: ModelSize
    machine: MachineSpec
    batch: int
    context: int
    budget_gib: float
    points: tuple[CapacityPoint, ...]
    best: CapacityPoint | None
    kind: Kind
    words: str
    cliff_gib: float
    settings: dict[str, Any]
    assumptions: tuple[str, ...]

    @property
    def perfect_gain(self) -> float:
        """Tokens/s that perfect prediction adds at the advised slots, as a share; 0.0 without a choice."""
        return 0.0 if self.best is None else self.best.perfect / self.best.without - 1

    def table(self) -> pd.DataFrame:
        """The curve, one row for each number of slots, units in the heads."""
        rows = [
            {
                "slots": p.slots, "share, %": 100 * p.share, "GPU memory, GiB": p.gpu_gib,
                "hit rate, %": 100 * p.hit_rate, "tokens/s": p.tokens_per_s, "by": p.schedule,
                "on demand, tokens/s": p.on_demand, "on demand, hit rate %": 100 * p.on_demand_hit_rate,
                "without prediction, tokens/s": p.without, "perfect prediction, tokens/s": p.perfect,
                "limit": f"{p.limit} {100 * p.limit_frac:.0f} %", "fits": p.gpu_gib <= self.budget_gib,
            }
            for p in self.points
        ]  # fmt: skip
        return pd.DataFrame(rows).set_index("slots") if rows else pd.DataFrame()

    def facts(self) -> list[tuple[str, str]]:
        """Sizes and numbers behind the advice, as (what, value)."""
        model, machine = self.model, self.machine
        shape = model.shape
        return [
            (
                "experts",
                f"{shape.num_layers} layers x {shape.num_experts} of {digits(model.expert.nbytes / 1e6)} MB = "
                f"{format_bytes(model.experts_bytes)}, top-{shape.top_k}",
            ),
            ("everything else", format_bytes(model.dense_bytes)),
            (
                "keys and values",
                f"{format_bytes(self.batch * self.context * model.kv_token_bytes)} for {self.batch} x "
                f"{self.context:,} tokens",
            ),
            (
                "machine",
                f"{machine.name}: link {digits(machine.link_gb_per_s)} GB/s, host {machine.host_gib:,.0f} GiB at "
                f"{machine.host_gb_per_s:,.0f} GB/s, GPU {machine.gpu_gib:,.0f} GiB at "
                f"{machine.gpu_gb_per_s:,.0f} GB/s ({machine.origin})",
            ),
            ("GPU memory budget", f"{digits(self.budget_gib)} GiB"),
        ]

    def __repr__(self) -> str:
        return f"<Advice for {self.model.name} on {self.machine.name}: {self.kind}. {self.words}>"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{escape(what)}</td><td style='text-align:left'>{escape(value)}</td></tr>"
            for what, value in self.facts()
        )
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.assumptions)
        return (
            f"<div class='ps-advice'><h4>{escape(self.model.name)}: {escape(self.kind)}</h4><p>{escape(self.words)}</p>"
            f"<table>{rows}</table><details><summary>{len(self.assumptions)} assumptions</summary><ul>{notes}</ul>"
            f"</details></div>"
        )
