"""Replays a recorded routing trace on a virtual clock through the engine's own decisions, and writes the same events.

`replay` is the compiled loop over decode steps, `prepare` brings trace and predictions into its form, `prefill` its
slots into the state that a prompt leaves, `tables` its log into events; `simulator` is the door. `scenarios` replays
one recorded run under any settings on any of the `machines`, and `explain` says of each expert why it went where it
went. A `recording` is such a run with its predictions and its machine, from elsewhere; `verdict` says whether
prediction pays. `waiting` has requests come while others are served, at the pace that replays say.
"""

from .best import best_found
from .code import code_of
from .explain import WHERE, LayerExplanation, explain_layer
from .hostile import hostile
from .machines import HERE, Machine, machine_of_profile, machine_of_run, machine_with_link, shipped_machines
from .prepare import as_decode, in_batches
from .recording import Recording, shipped_recordings
from .result import Bounds, Counts, Interval, SimResult
from .scenario import NOISY, NONE, ORACLE, Scenario
from .scenarios import Scenarios
from .simulator import Simulator
from .verdict import Verdict, link_frac, predicts, verdict
from .waiting import Pace, Served, serve

__all__ = [
    "HERE",
    "NOISY",
    "NONE",
    "ORACLE",
    "WHERE",
    "Bounds",
    "Counts",
    "Interval",
    "LayerExplanation",
    "Machine",
    "Pace",
    "Recording",
    "Scenario",
    "Scenarios",
    "Served",
    "SimResult",
    "Simulator",
    "Verdict",
    "as_decode",
    "best_found",
    "code_of",
    "explain_layer",
    "hostile",
    "in_batches",
    "link_frac",
    "machine_of_profile",
    "machine_of_run",
    "machine_with_link",
    "predicts",
    "serve",
    "shipped_machines",
    "shipped_recordings",
    "verdict",
]
