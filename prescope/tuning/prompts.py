"""Prompts of a search, and how a proof knows them again."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UnsupportedOption


def texts_of(prompts: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    """Prompts as a list, from a text, several, or texts by name (one or several of each).

    Raises:
        UnsupportedOption: there is none.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        each = [[value] if isinstance(value, str) else list(value) for value in prompts.values()]
        texts = [text for several in each for text in several]
    else:
        texts = list(prompts)
    if not texts or any(len(text) == 0 for text in texts):
        raise UnsupportedOption("give one prompt or more, none of them empty")
    return texts


def checksum_of_prompt(prompt: Any) -> str:
    """Of a text, or of token ids."""
    text = prompt if isinstance(prompt, str) else repr([int(token) for token in prompt])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
