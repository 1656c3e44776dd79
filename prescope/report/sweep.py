"""A report of a sweep: the verdict, its figures, its best points, the commands that repeat it, and the study itself."""

import gzip
import sqlite3
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from ..core.files import write_text
from ..core.units import format_bytes
from ..errors import UnsupportedOption
from ..views.numbers import formatted
from ..views.sweep_front import sweep_front
from ..views.sweep_heat import sweep_heat
from ..views.sweep_history import sweep_history
from ..views.sweep_importances import sweep_importances
from ..views.sweep_parallel import sweep_parallel
from ..views.sweep_points import best_first, finished, moved_in, points_frame, told_of_points
from ..views.theme import SOURCES
from .page import download_html, drawn, figure_html, page_html, provenance

if TYPE_CHECKING:
    from ..tuning import Proof, Sweep

#: Points in the table; all are in the study.
MOST_ROWS = 20
#: Of a study in the page, packed: a page is to stay below 10 MB with plotly.js' 4.9.
MOST_STUDY = 2_500_000


def write_sweep_report(
    sweep: "Sweep", path: str | Path, *, commands: str, proof: "Proof | None" = None, title: str = ""
) -> Path:
    """Write a sweep as one HTML page that opens without network.

    Args:
        commands: that repeat it, as `prescope.tuning.code.code_of` writes them.
        proof: of its best points on the device; without one the page says that nothing was proved.
        title: its heading, a question that the sweep answers.

    Raises:
        UnsupportedOption: no point is finished.
        CannotWrite: no space, or no permission.
    """
    points, objectives = sweep.points(), [one.name for one in sweep.objectives]
    finished(points)
    figures = "".join(f"<figure>{figure_html(one)}</figure>" for one in _figures(sweep, points, objectives))
    body = (
        f"<h1>{escape(title or f'What did the sweep {sweep.name!r} find?')}</h1>{_verdict(points, objectives, proof)}"
        f"<h2>The best points</h2><p>{told_of_points(points)}</p>"
        f"{_table(points_frame(points, objectives, MOST_ROWS).reset_index())}{figures}"
        f"<h2>Repeat it</h2><pre><code>{escape(commands)}</code></pre>{_study(sweep, points)}"
    )
    facts = provenance(
        sweep=sweep.name, space=sweep.space.to_plain(), fixed=sweep.fixed, objectives=objectives, method=sweep.method,
        seed=sweep.seed, commits=sorted(set(points["commit"])),
    )  # fmt: skip
    return write_text(path, page_html(title or sweep.name, body, facts))


def _verdict(points: pd.DataFrame, objectives: Sequence[str], proof: "Proof | None") -> str:
    """What was proved, or what the search alone says."""
    if proof is None:
        best = points_frame(points, objectives, 1).iloc[0]
        number = int(best_first(points, objectives[0])["number"].iloc[0])
        return (
            f"<p class='verdict'>Best {escape(str(best.index[0]))}: {escape(str(best.iloc[0]))}, point {number}, "
            f"{escape(str(best['origin']))}. Nothing was proved: the best was not run against the default.</p>"
        )
    notes = "".join(f"<p class='note'>{escape(note)}</p>" for note in proof.notes)
    told = f"<b>{escape(SOURCES.get(proof.origin, proof.origin))}</b> on {escape(proof.machine)}"
    return f"<p class='verdict'>{escape(proof.words)}</p><p>{told}</p>{notes}<h2>The proof</h2>{_table(proof.table())}"


def _table(frame: pd.DataFrame) -> str:
    words = dict.fromkeys(frame.select_dtypes(bool).columns, _yes_or_no)
    html = frame.to_html(border=0, na_rep="-", float_format=formatted, formatters=words, index=False)
    return f"<div class='table'>{html}</div>"


def _yes_or_no(value: object) -> str:
    return "yes" if value else "no"


def _figures(sweep: "Sweep", points: pd.DataFrame, objectives: Sequence[str]) -> list[go.Figure | str]:
    first = objectives[0]
    drawings: list[tuple[str, Callable[[], go.Figure]]] = [
        ("parallel coordinates", lambda: sweep_parallel(points, first)),
        ("history", lambda: sweep_history(points, first)),
        ("importances", lambda: sweep_importances(points, sweep.importances(), first)),
        ("heat map", lambda: sweep_heat(points, *_pair(sweep, points), first)),
    ]
    if len(objectives) > 1:
        drawings.insert(0, ("front", lambda: sweep_front(points, objectives[1], first)))
    return [drawn(what, draw) for what, draw in drawings]


def _pair(sweep: "Sweep", points: pd.DataFrame) -> tuple[str, str]:
    """The two settings that matter most."""
    moved = moved_in(points)
    if len(moved) < 2:
        raise UnsupportedOption("fewer than two settings were moved")
    shares = sweep.importances()
    first, second, *_ = sorted(moved, key=lambda name: -shares.get(name, 0.0))
    return first, second


def _study(sweep: "Sweep", points: pd.DataFrame) -> str:
    """Links to files inside the page: the study where it is one, and the table of points."""
    table = gzip.compress(points.to_csv(index=False).encode(), mtime=0)
    links = [download_html(table, f"{sweep.name}.csv.gz", "every point as a table")]
    study = b"" if sweep.file is None else gzip.compress(_database(sweep.file), mtime=0)
    if not study:
        links.append("the study itself lies in another storage, or lay in memory alone")
    elif len(study) > MOST_STUDY:
        links.append(f"the study itself is too large for a page ({format_bytes(len(study))} packed)")
    else:
        words = "the study; unpacked, load_sweep and optuna-dashboard open it"
        links.insert(0, download_html(study, f"{sweep.name}.db.gz", words))
    return f"<h2>The study</h2><p>{' · '.join(links)}</p>"


def _database(file: Path) -> bytes:
    """The file of a study as it is at one moment, though somebody writes to it."""
    with tempfile.TemporaryDirectory(prefix="prescope-") as folder:
        copy = Path(folder) / "study.db"
        source, target = sqlite3.connect(file), sqlite3.connect(copy)
        try:
            source.backup(target)
        finally:
            source.close()
            target.close()
        return copy.read_bytes()
