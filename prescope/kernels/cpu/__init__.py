"""Experts computed on CPU threads from the host rows."""

from .base import CpuJob, CpuLayer, Flag, LaneAddresses, LaneFunctions, Lot, lot_of
from .lane import CpuExperts
from .threads import default_threads, physical_cores

__all__ = [
    "CpuExperts",
    "CpuJob",
    "CpuLayer",
    "Flag",
    "LaneAddresses",
    "LaneFunctions",
    "Lot",
    "default_threads",
    "lot_of",
    "physical_cores",
]
