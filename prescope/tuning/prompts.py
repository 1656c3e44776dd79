"""Prompts of a search, and how a proof knows them again."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, SupportsIndex

from ..core.numbers import is_count
from ..errors import UnsupportedOption


def texts_of(prompts: Sequence[Any] | Mapping[str, Any]) -> list[Any]:
    """Prompts as a list, from a text, several, or texts by name (one or several of each).

    Raises:
        UnsupportedOption: there is none, or one is neither a text nor a list of token ids.
    """
    given = list(prompts.values()) if isinstance(prompts, Mapping) else [prompts]
    texts = [
        text for one in given for text in ([one] if isinstance(one, str) or not _is_several(one) else one)
    ]
    for text in texts:
        if not isinstance(text, str) and not (
            _is_several(text) and all(isinstance(token, SupportsIndex) for token in text)
        ):
            raise UnsupportedOption(f"{text!r} is no prompt; give texts, or lists of token ids")
    if not texts or any(len(text) == 0 for text in texts):
        raise UnsupportedOption("give one prompt or more, none of them empty")
    return texts


def _is_several(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def require_new_tokens(new_tokens: int) -> None:
    """Raises UnsupportedOption unless there are tokens after the first one, which comes from the prompt."""
    if not is_count(new_tokens) or new_tokens < 2:
        raise UnsupportedOption(
            f"new_tokens is {new_tokens!r}; the first comes from the prompt, so give 2 or more"
        )


def checksum_of_prompt(prompt: Any) -> str:
    """Of a text, or of token ids."""
    text = prompt if isinstance(prompt, str) else repr([int(token) for token in prompt])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
