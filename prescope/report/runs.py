"""A report of runs: their summaries, figures and tables."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from ..core.files import write_text
from ..core.units import format_bytes
from ..traces.metrics import METRIC_DEFINITIONS
from ..traces.result import RunResult
from ..traces.routing import RoutingTrace
from ..views.numbers import Numbers, numbers_text
from .page import download_html, figure_html, page_html, provenance
from .story import Story

#: A page with plotly.js has 5 MB, and is mailed as long as it stays below ten.
MOST_TRACE_BYTES = 2_500_000
_BADGES = {"measured": "measured", "emulated": "emulated link", "virtual": "simulated"}


def badge(run: RunResult) -> str:
    """How a run's times came about: "measured", "emulated link" or "simulated"."""
    return _BADGES.get(str(run.hardware.get("link")), "origin unknown")


def write_report(
    figures: Sequence[go.Figure | str],
    tables: Mapping[str, pd.DataFrame],
    path: str | Path,
    *,
    title: str,
    runs: Sequence[RunResult],
    verdict: str = "",
    numbers: Sequence[Numbers] = (),
    code: str = "",
    about: Mapping[str, str] | None = None,
    commands: Sequence[str] = (),
    trace: RoutingTrace | None = None,
) -> Path:
    """Write one HTML page that opens without network: the answer first.

    Args:
        figures: plain figures, in order; FigureWidgets need a kernel and would come out blank. A text stands for a
            figure that cannot be drawn and says why.
        tables: heading -> frame.
        title, verdict: heading, and the finding in one sentence.
        runs: where the figures come from: their summaries and provenance are in the page.
        numbers: rows of the table below the finding. code: Python that gives the figures again, shown on demand.
        about: what -> words: machine, model, settings, ... commands: to be typed, to get them again.
        trace: can be downloaded from the page, without router inputs, unless it is larger than `MOST_TRACE_BYTES`.

    Raises:
        CannotWrite: no space, or no permission.
    """
    badges = " ".join(f'<span class="badge">{text}</span>' for text in dict.fromkeys(map(badge, runs)))
    summaries = "".join(
        f"<h2>{escape(run.label)}</h2>{run.metrics._repr_html_()}{_notes(run)}" for run in runs
    )
    body = (
        f"<h1>{escape(title)}</h1><p class='verdict'>{escape(verdict)}</p><p>{badges}</p>{_numbers(numbers)}"
        + "".join(f"<figure>{figure_html(figure)}</figure>" for figure in figures)
        + summaries
        + "".join(
            f"<h2>{escape(heading)}</h2><div class='table'>{table.to_html(border=0)}</div>"
            for heading, table in tables.items()
        )
        + _again(about or {}, commands, code, trace)
        + _definitions()
    )
    facts = provenance(
        runs=[{"config": r.config, "hardware": r.hardware, "notes": r.notes} for r in runs],
        about=dict(about or {}),
        commands=list(commands),
    )
    return write_text(path, page_html(title, body, facts))


def write_story(story: Story, path: str | Path, *, title: str) -> Path:
    """Write what a run or a setting says; raises as `write_report`."""
    return write_report(
        story.figures, {}, path, title=title, runs=story.runs, verdict=story.verdict, numbers=story.numbers,
        code=story.code, about=story.about, commands=story.commands, trace=story.trace,
    )  # fmt: skip


def _numbers(rows: Sequence[Numbers]) -> str:
    if not rows:
        return ""
    return f"<div class='table numbers'>{numbers_text(rows).to_html(border=0)}</div>"


def _again(about: Mapping[str, str], commands: Sequence[str], code: str, trace: RoutingTrace | None) -> str:
    """Where it comes from and how to get it again."""
    rows = "".join(
        f"<tr><th>{escape(what)}</th><td>{escape(words)}</td></tr>" for what, words in about.items() if words
    )
    typed = "".join(f"<pre>{escape(command)}</pre>" for command in commands)
    parts = [
        f"<table>{rows}</table>" if rows else "",
        f"<p>Recorded by:</p>{typed}" if typed else "",
        f"<details><summary>Code</summary><pre>{escape(code)}</pre></details>" if code else "",
        "" if trace is None else _download(trace),
    ]
    return f"<h2>How to get this again</h2>{''.join(parts)}" if any(parts) else ""


def _download(trace: RoutingTrace) -> str:
    """A link that holds the trace itself."""
    with tempfile.TemporaryDirectory(prefix="prescope-") as folder:
        content = replace(trace, inputs=None).save(Path(folder) / "trace.safetensors").read_bytes()
    if len(content) > MOST_TRACE_BYTES:
        return f"<p class='note'>The trace has {format_bytes(len(content))}, too much for a page: trace.save(path).</p>"
    link = download_html(content, "trace.safetensors", "Download the trace")
    return f"<p>{link} ({format_bytes(len(content))}): <code>prescope.RoutingTrace.load</code> reads it.</p>"


def _notes(run: RunResult) -> str:
    return "".join(f"<p class='note'>{escape(note)}</p>" for note in run.notes)


def _definitions() -> str:
    pairs = METRIC_DEFINITIONS.items()
    rows = "".join(f"<tr><td><code>{name}</code></td><td>{escape(text)}</td></tr>" for name, text in pairs)
    return f"<details><summary>What each figure means</summary><table>{rows}</table></details>"
