"""Experts computed on CPU threads from the host rows."""

from .base import CpuJob, CpuLayer, ExpertBatch, Flag, LaneAddresses, LaneFunctions, expert_batch_of
from .lane import CpuExperts
from .threads import default_threads, physical_cores

__all__ = [
    "CpuExperts",
    "CpuJob",
    "CpuLayer",
    "ExpertBatch",
    "Flag",
    "LaneAddresses",
    "LaneFunctions",
    "default_threads",
    "expert_batch_of",
    "physical_cores",
]
