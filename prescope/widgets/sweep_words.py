"""What a sweep panel says in words: a proof, an error."""

from html import escape

from ..tuning import Proof
from ..views.theme import SOURCES
from .tables import frame_html


def error_html(error: BaseException) -> str:
    """An error in place."""
    return f"<p class='ps-error'><b>{escape(type(error).__name__)}</b>: {escape(str(error))}</p>"


def proof_html(proof: Proof) -> str:
    """The verdict, the runs behind it, and what a reader of them must know."""
    mood = "ps-good" if proof.kept else ""
    notes = "".join(f"<br><span class='ps-soft'>{escape(note)}</span>" for note in proof.notes)
    told = f"<b>{escape(SOURCES.get(proof.origin, proof.origin))}</b> on {escape(proof.machine)}"
    words = f"<b class='{mood}'>{escape(proof.words)}</b><br>{told}{notes}"
    names = [
        f"setting {place}" if one.number < 0 else f"point {one.number}"
        for place, one in enumerate(proof.candidates, 1)
    ]
    best = names[list(proof.candidates).index(proof.best)]
    return f"<p class='ps-verdict'>{words}</p>{frame_html(proof.table().set_axis(names), mark=best)}"
