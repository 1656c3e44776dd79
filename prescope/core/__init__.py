"""Types, settings, units, paths and facts about the machine; compiled code, and C functions called by their address."""

from typing import Any

from .renamed import moved


def __getattr__(name: str) -> Any:
    return moved("core", name)
