"""What a run returns: text, tokens, tables of what happened, and everything needed to repeat it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ..core.html import facts_html
from .metrics import Metrics
from .perfetto import write_perfetto
from .routing import RoutingTrace

#: Characters of text that stand for a run.
MOST_TEXT = 160


@dataclass(frozen=True, kw_only=True, repr=False)
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

    def __repr__(self) -> str:
        speed = f"{self.metrics.tokens_per_s:.1f} tokens/s, hit rate {self.metrics.decode.hit_rate:.3f}"
        longest = max(map(len, self.tokens), default=0)
        return f"<RunResult of {len(self.tokens)} x {longest} tokens: {speed}, {self.label}>"

    def _repr_html_(self) -> str:
        metrics, decode, config = self.metrics, self.metrics.decode, self.config
        shown = self.text[0] if self.text else ""
        rates = f"{100 * decode.hit_rate:.1f} % hits, {100 * decode.late_rate:.1f} % late, {decode.misses:,} misses"
        moved = f"{decode.h2d_bytes / 1e6:,.3g} MB in {decode.num_steps} decode steps"
        schedule = (
            f"{config.get('schedule', 'on-demand')}, {config.get('num_slots')} slots, {config.get('cache')}"
        )
        facts = [
            ("speed", f"{metrics.tokens_per_s:,.3g} tokens/s, first token after {metrics.ttft_ms:,.3g} ms"),
            (
                "per token",
                f"{decode.step_p50_ms:.3g} ms median, {decode.step_p95_ms:.3g} ms in 95 of 100 steps",
            ),
            ("experts", rates),
            ("link", f"{moved}, layers stalled {100 * decode.stall_frac:.0f} % of the time"),
            ("settings", f"{schedule}, batch {metrics.batch}"),
            ("text", shown if len(shown) <= MOST_TEXT else shown[:MOST_TEXT] + " …"),
        ]
        return facts_html(self.label, facts, self.notes)
