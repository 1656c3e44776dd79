"""Pages that open offline: a report of runs or of a sweep, an executed notebook; one HTML file without requests each.

plotly.js stands in the page once (4.8 MB). Every page carries a JSON block with its provenance
(`<script type="application/json" id="provenance">`).
"""

from ..core.extras import missing_extra

try:
    import nbclient  # noqa: F401 - asked for here, so that its absence is said once for all pages
    import nbconvert  # noqa: F401
    import plotly  # noqa: F401
except ImportError as error:
    raise missing_extra("prescope.report", "lab", error) from error

from .notebook import NotebookFailed, execute_notebook, parse_parameter
from .page import PAPER_PX
from .runs import badge, write_report, write_story
from .story import Story, story_of_run, story_of_setting
from .sweep import write_sweep_report

__all__ = [
    "PAPER_PX",
    "NotebookFailed",
    "Story",
    "badge",
    "execute_notebook",
    "parse_parameter",
    "story_of_run",
    "story_of_setting",
    "write_report",
    "write_story",
    "write_sweep_report",
]
