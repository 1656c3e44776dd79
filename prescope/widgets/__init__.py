"""Live panels for a notebook. Without a browser (PRESCOPE_HEADLESS=1) they show plain figures instead."""

from .figures import SlimFigureWidget, is_headless
from .pair_panel import PairPanel
from .schedule_panel import SchedulePanel
from .slots_panel import SlotsPanel

__all__ = ["PairPanel", "SchedulePanel", "SlimFigureWidget", "SlotsPanel", "is_headless"]
