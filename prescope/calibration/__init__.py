"""Measure what this machine can do: `prescope.calibrate()`."""

from .calibrate import calibrate
from .experts import ExpertForm, silu_form

__all__ = ["ExpertForm", "calibrate", "silu_form"]
