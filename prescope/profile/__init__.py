"""Hardware profiles: what one machine was measured to do, and what a model's layer costs on it."""

from .curves import ExpertCurve, FitError, LinkCurve
from .files import as_text, own_file, read_json, write_json
from .lanes import Lanes, nearest
from .points import KINDS, Circumstances, Point
from .profile import SLOWER_LINKS, HardwareProfile, tokens_per_expert
from .tables import markdown

__all__ = [
    "KINDS",
    "SLOWER_LINKS",
    "Circumstances",
    "ExpertCurve",
    "FitError",
    "HardwareProfile",
    "Lanes",
    "LinkCurve",
    "Point",
    "as_text",
    "markdown",
    "nearest",
    "own_file",
    "read_json",
    "tokens_per_expert",
    "write_json",
]
