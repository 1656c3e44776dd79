"""What a run returns: text, tokens, tables of what happened, and everything needed to repeat it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from .metrics import Metrics
from .perfetto import write_perfetto
from .routing import RoutingTrace


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One generation run and what was recorded of it.

    Attributes:
        text: generated text of each sequence, prompt excluded; empty strings without a tokenizer.
        tokens: generated token ids of each sequence, prompt and padding excluded.
        metrics: summary, see `Metrics` for each definition.
        events: event table (see `prescope.traces.events`); empty when events=False.
        layers: needs by step and MoE layer: needed, hits, late, misses, rounds.
        steps: wall-clock of each forward pass.
        trace: routing of every token, or None when record_routing=False.
        config: the settings as resolved, with the reason of each "auto" and every fallback.
        hardware: machine, device, link ("measured" or "emulated" with its GB/s), dtype, versions.
    """

    text: list[str]
    tokens: list[list[int]]
    metrics: Metrics
    events: pd.DataFrame
    layers: pd.DataFrame
    steps: pd.DataFrame
    trace: RoutingTrace | None
    config: dict[str, Any]
    hardware: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def save_perfetto(self, path: str | Path) -> Path:
        """Write the timeline as Chrome-trace JSON; open it at ui.perfetto.dev or in chrome://tracing."""
        return write_perfetto(self.events, self.layers, path, hardware=self.hardware, config=self.config)

    @property
    def label(self) -> str:
        """Where these figures come from, in one line for titles: "measured on <GPU>" or "emulated link ..."."""
        return str(self.hardware["label"])
