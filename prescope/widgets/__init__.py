"""Live panels for a notebook. Without a browser (PRESCOPE_HEADLESS=1) they show plain figures instead."""

from ..core.extras import missing_extra

try:
    import anywidget  # noqa: F401 - asked for here, so that its absence is said once for all panels
    import ipywidgets  # noqa: F401
    import plotly  # noqa: F401
except ImportError as error:
    raise missing_extra("prescope.widgets", "lab", error) from error

from .capacity_panel import CapacityPanel
from .dashboard import Dashboard
from .figures import SlimFigureWidget, is_headless
from .pair_panel import PairPanel
from .runs_panel import RunsPanel
from .schedule_panel import SchedulePanel
from .slots_panel import SlotsPanel

__all__ = [
    "CapacityPanel",
    "Dashboard",
    "PairPanel",
    "RunsPanel",
    "SchedulePanel",
    "SlimFigureWidget",
    "SlotsPanel",
    "is_headless",
]
