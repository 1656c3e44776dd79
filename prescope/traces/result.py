"""What a run returns: text, tokens, tables of what happened, and everything needed to repeat it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd

from ..core.html import facts_html
from ..core.units import count_of, digits
from ..errors import BadTrace
from .events import TABLES, write_events
from .files import REMEDY
from .metrics import Metrics, PhaseMetrics, compute_metrics
from .perfetto import write_perfetto
from .routing import RoutingTrace
from .run_files import read_run, write_run

#: Characters of text that stand for a run.
MOST_TEXT = 160
#: What `RunResult.save` writes as JSON, and what each is.
FACTS: dict[str, type] = {"text": list, "tokens": list, "config": dict, "hardware": dict, "notes": list}


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
        config: the settings as resolved, with the reason of each "auto" and every fallback; of a run whose steps came
            from graphs how many it has recorded, and what the engine keeps ("graphs").
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
        return write_perfetto(self, path)

    def save_events(self, path: str | Path) -> Path:
        """Write the event table as Parquet (columns in `prescope.traces.events`), for pandas, DuckDB and the like.

        Raises:
            BadTrace: the run was made with events=False.
            CannotWrite: no space, or no permission.
        """
        if self.events.empty:
            raise BadTrace("the run has no events to write; run it with events=True")
        return write_events(self.events, path)

    def save(self, folder: str | Path) -> Path:
        """Write the run with all its evidence as a folder: tables as Parquet, routing as safetensors, the rest as JSON.

        Returns:
            the folder. `load` reads it, here or elsewhere, without the model.

        Raises:
            CannotWrite: no space, no permission, or `folder` is a file. A run saved there before is unchanged.
        """
        facts = {name: getattr(self, name) for name in FACTS}
        counts = {"batch": self.metrics.batch, "output_tokens": self.metrics.output_tokens}
        return write_run(folder, {name: getattr(self, name) for name in TABLES}, self.trace, facts | counts)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a run written by `save`; its metrics are computed from its tables again.

        Raises:
            BadTrace: it is no saved run, or a part of it is damaged, missing or another run's.
            FileNotFoundError: there is none.
        """
        stored = read_run(folder)
        facts = stored.facts
        _check_facts(facts, folder)
        layers = stored.tables["layers"]
        if (layers[["hits", "late", "misses"]].sum(axis=1) != layers["needed"]).any():
            raise BadTrace(f"{folder}: hits, late ones and misses are not what was needed; {REMEDY}")
        longest = max(map(len, facts["tokens"]), default=None)
        metrics = compute_metrics(
            **stored.tables, batch=facts["batch"], output_tokens=facts["output_tokens"], longest=longest
        )
        known = {name: facts[name] for name in FACTS}
        return cls(metrics=metrics, trace=stored.trace, **stored.tables, **known)

    @property
    def label(self) -> str:
        """Where these figures come from, in one line for titles: "measured on <GPU>" or "emulated link ..."."""
        return str(self.hardware["label"])

    @property
    def driver(self) -> str:
        """Who served the misses of its decode steps: "layered", "gpu-driven", "copy-engine" or "host-driven"."""
        return str(self.config.get("reasons", {}).get("decode", "")).partition(":")[0]

    def __repr__(self) -> str:
        decode = self.metrics.decode
        speed = f"{self.metrics.tokens_per_s:.1f} tokens/s, hit rate {decode.hit_rate:.3f}"
        speed = speed if decode.num_steps else "nothing was decoded"
        longest = max(map(len, self.tokens), default=0)
        return f"<RunResult of {len(self.tokens)} x {count_of(longest, 'token')}: {speed}, {self.label}>"

    def _repr_html_(self) -> str:
        metrics, config = self.metrics, self.config
        shown = self.text[0] if self.text else ""
        first = f"first token after {digits(metrics.ttft_ms)} ms"
        decoded = metrics.decode.num_steps > 0
        schedule = (
            f"{config.get('schedule', 'on-demand')}, {config.get('num_slots')} slots, {config.get('cache')}"
        )
        facts = [
            ("speed", f"{digits(metrics.tokens_per_s)} tokens/s, {first}" if decoded else first),
            *(_decode_facts(metrics.decode) if decoded else [("per token", "nothing was decoded")]),
            ("settings", f"{schedule}, batch {metrics.batch}"),
            ("text", shown if len(shown) <= MOST_TEXT else shown[:MOST_TEXT] + " …"),
        ]
        return facts_html(self.label, facts, self.notes)


def _decode_facts(decode: PhaseMetrics) -> list[tuple[str, str]]:
    """What there is to say of decode steps; of copies nothing where no events were recorded."""
    steps = count_of(decode.num_steps, "decode step")
    moved = f"{digits(decode.h2d_bytes / 1e6)} MB in {steps}"
    stalled = f"layers stalled {100 * decode.stall_frac:.0f} % of the time"
    link = [
        text for text, value in ((moved, decode.h2d_bytes), (stalled, decode.stall_frac)) if value == value
    ]
    rates = (
        f"{100 * decode.hit_rate:.1f} % hits, {100 * decode.late_rate:.1f} % late, {decode.misses:,} misses"
    )
    return [
        ("per token", f"{decode.step_p50_ms:.3g} ms median, {decode.step_p95_ms:.3g} ms in 95 of 100 steps"),
        ("experts", rates),
        *([("link", ", ".join(link))] if link else []),
    ]


def _check_facts(facts: dict[str, Any], folder: str | Path) -> None:
    kinds: dict[str, type] = {**FACTS, "batch": int, "output_tokens": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]
    if not wrong and not all(isinstance(row, list) for row in facts["tokens"]):
        wrong = ["tokens"]
    if wrong:
        raise BadTrace(f"{folder}: {', '.join(wrong)} of the saved run cannot be read; {REMEDY}")
