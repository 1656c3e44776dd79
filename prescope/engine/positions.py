"""What a forward pass is, told from what it is given: its phase, and the position of each token in its text.

Both come from the cache. A forward of several tokens may read a prompt, or verify what a draft proposed; one without
a cache begins a new text, or reads the text of the forward before again with one token more, one with a cache goes on
with that text.

Shapes: B sequences, T tokens of the forward.
"""

import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import Cache

from ..core.types import Phase

#: Identity of a cache (a text that goes on); it must not keep the cache's keys and values in memory.
TextKey = weakref.ref | object


class Forward(NamedTuple):
    """One forward pass over B x T tokens."""

    batch: int
    length: int
    past: int  # tokens in the cache before it, padding included
    phase: Phase
    text: TextKey
    mask: torch.Tensor | None = None  # as the model was given it, whatever its form
    position_ids: torch.Tensor | None = None

    def real(self) -> NDArray[np.bool_] | None:
        """(B, past + T) or (B, T): False where a token is padding; None if none is.

        A mask of two dimensions says it. One made for a static cache has four, but `generate` gives positions with
        it: padding on the left has position 0, as the first real token has.
        """
        if self.mask is None:
            return None
        if isinstance(self.mask, torch.Tensor) and self.mask.dim() == 2:
            if self.mask.shape[0] == self.batch and self.mask.shape[1] in (
                self.length,
                self.past + self.length,
            ):
                return (self.mask != 0).cpu().numpy()
            return None
        ids = self.position_ids
        if ids is None or ids.dim() != 2 or self.past:
            return None
        at_start = (ids.expand(self.batch, -1) == 0).cpu().numpy()
        first = self.length - 1 - np.argmax(at_start[:, ::-1], axis=1)
        return np.arange(self.length) >= np.where(at_start.any(axis=1), first, 0)[:, None]


class Rereading:
    """Knows the text of the forward before, for who keeps no cache and reads all of it again for every token."""

    def __init__(self) -> None:
        self._former: torch.Tensor | None = None

    def is_next(self, ids: torch.Tensor, has_cache: bool) -> bool:
        """Whether a forward over token ids (B, T) adds one token to each sequence of the forward before."""
        former = self._former
        self._former = None if has_cache or ids.is_floating_point() else ids.detach().clone()
        if self._former is None or former is None or former.device != ids.device:
            return False
        if former.shape != (ids.shape[0], ids.shape[1] - 1):
            return False
        before = ids[:, :-1]
        if torch.equal(before, former):
            return True
        # Beams: a sequence may go on with another one's text.
        return all(bool((former == row).all(dim=1).any()) for row in before)


def forward_of(
    given: Mapping[str, Any],
    has_first_token: bool | None,
    rereading: Rereading | None = None,
    is_draft: bool = False,
) -> Forward | None:
    """What a forward pass with these arguments is; None if it reads no tokens.

    Args:
        given: arguments of the model's forward, by name.
        has_first_token: whether the run it belongs to has chosen its first token; None if nobody knows of a run.
        rereading: of the forwards of the same thread before, where nobody knows of a run.
        is_draft: whether the model's own first layers propose tokens by it, in a cache of their own.
    """
    named = (given.get(name) for name in ("input_ids", "inputs_embeds", "decoder_input_ids"))
    tokens = next((value for value in named if value is not None), None)
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    cache = given.get("past_key_values")
    past = _past(cache, length)
    if has_first_token is not None:
        is_prefill = not has_first_token
    elif rereading is not None and rereading.is_next(tokens, has_cache=cache is not None):
        is_prefill = False
    elif is_draft:  # of several tokens where it reads again what was accepted since
        is_prefill = past == 0
    else:
        # Who verifies a draft wants the logits of every token, who reads a prompt those of the last.
        is_prefill = past == 0 or (length > 1 and given.get("logits_to_keep") != length)
    return Forward(
        batch=batch,
        length=length,
        past=past,
        phase="prefill" if is_prefill else "decode",
        text=_key(cache),
        mask=given.get("attention_mask"),
        position_ids=given.get("position_ids"),
    )


def _past(cache: Any, length: int) -> int:
    """Tokens a cache holds."""
    if not isinstance(cache, Cache):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # all its layers keep a state instead of tokens, and do not count
        return int(length == 1)


def _key(cache: Any) -> TextKey:
    if not isinstance(cache, Cache):
        return object()
    key = weakref.ref(cache)
    hash(key)  # a reference keeps its hash, but cannot take it any more when the cache is gone
    return key


class Positions:
    """Positions of the tokens of a recording's forwards, taken in their order."""

    def __init__(self) -> None:
        self._texts: dict[TextKey, _Text] = {}

    def of(
        self, text: TextKey, past: int | None, shape: tuple[int, int], real: NDArray[np.bool_] | None
    ) -> NDArray[np.int32]:
        """(B, T) positions of a forward's tokens, -1 for padding.

        Args:
            text: which one it goes on with. `past`: how much of it is in the cache; None for all.
            shape: (B, T). `real`: as `Forward.real`.
        """
        batch, length = shape
        real = np.ones(shape, dtype=bool) if real is None else real
        known = self._texts.get(text)
        if known is None or known.batch != batch:
            known = self._texts[text] = _Text(batch)
        past = known.length if past is None else past
        if past > known.length:  # cached before the recording began
            before = (
                real[:, known.length : past] if real.shape[1] > length else np.ones((batch, past), dtype=bool)
            )
            known.append(before[:, : past - known.length])
        known.crop(past)
        return known.append(real[:, -length:])


class _Text:
    """Which cached tokens of some sequences are real."""

    def __init__(self, batch: int) -> None:
        self.batch, self.length = batch, 0
        self._real = np.ones((batch, 64), dtype=bool)
        self._count = np.zeros(batch, dtype=np.int64)  # real ones of each sequence

    def crop(self, length: int) -> None:
        if length < self.length:
            self.length = length
            self._count = self._real[:, :length].sum(axis=1)

    def append(self, real: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Their positions (B, T), -1 where a token is not real."""
        end = self.length + real.shape[1]
        if end > self._real.shape[1]:
            self._real = np.concatenate([self._real, np.ones((self.batch, end), dtype=bool)], axis=1)
        self._real[:, self.length : end] = real
        self.length = end
        counts = self._count[:, None] + np.cumsum(real, axis=1)
        self._count = counts[:, -1]
        return np.where(real, counts - 1, -1).astype(np.int32)
