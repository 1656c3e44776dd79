"""A report of runs: their summaries, figures and tables."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from ..core.files import write_text
from ..traces.metrics import METRIC_DEFINITIONS
from ..traces.result import RunResult
from .page import figure_html, page_html, provenance

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
) -> Path:
    """Write one HTML page that opens without network.

    Args:
        figures: plain figures, in order; FigureWidgets need a kernel and would come out blank. A text stands for a
            figure that cannot be drawn and says why.
        tables: heading -> frame.
        title, verdict: heading, and the finding in one sentence.
        runs: where the figures come from: their summaries and provenance are in the page.

    Raises:
        CannotWrite: no space, or no permission.
    """
    badges = " ".join(f'<span class="badge">{text}</span>' for text in dict.fromkeys(map(badge, runs)))
    summaries = "".join(
        f"<h2>{escape(run.label)}</h2>{run.metrics._repr_html_()}{_notes(run)}" for run in runs
    )
    body = (
        f"<h1>{escape(title)}</h1><p>{badges}</p><p class='verdict'>{escape(verdict)}</p>{summaries}"
        + "".join(f"<figure>{figure_html(figure)}</figure>" for figure in figures)
        + "".join(
            f"<h2>{escape(heading)}</h2><div class='table'>{table.to_html(border=0)}</div>"
            for heading, table in tables.items()
        )
        + _definitions()
    )
    facts = provenance(runs=[{"config": r.config, "hardware": r.hardware, "notes": r.notes} for r in runs])
    return write_text(path, page_html(title, body, facts))


def _notes(run: RunResult) -> str:
    return "".join(f"<p class='note'>{escape(note)}</p>" for note in run.notes)


def _definitions() -> str:
    pairs = METRIC_DEFINITIONS.items()
    rows = "".join(f"<tr><td><code>{name}</code></td><td>{escape(text)}</td></tr>" for name, text in pairs)
    return f"<details><summary>What each figure means</summary><table>{rows}</table></details>"
