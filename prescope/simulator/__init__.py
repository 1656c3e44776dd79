"""Replays a recorded routing trace on a virtual clock through the engine's own decisions, and writes the same events.

`replay` is the compiled loop over decode steps, `prepare` brings trace and predictions into its form, `prefill` its
slots into the state that a prompt leaves, `tables` its log into events; `simulator` is the door.
"""

from .prepare import as_decode
from .result import Bounds, Counts, SimResult
from .simulator import Simulator

__all__ = ["Bounds", "Counts", "SimResult", "Simulator", "as_decode"]
