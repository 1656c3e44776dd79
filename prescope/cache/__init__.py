"""Which expert is in which slot, who gives one up, and what waits for the link. Pure: no device, no bytes."""

from typing import Any

from ..core.renamed import moved


def __getattr__(name: str) -> Any:
    return moved("cache", name)
