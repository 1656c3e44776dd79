"""What `model.generate` is to go on with, from every form in which people have prompts.

Texts, token ids, chats and what tokenizers return, as lists, arrays or tensors. What is padded here is padded on the
left, whatever the tokenizer would do: the next token follows the last one of the prompt.

Shapes: B prompts, T tokens of the longest, D model width.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import UnsupportedOption
from .tokenized import field_of, is_tokenized, row_of

#: One prompt, or several: text, token ids, a chat (messages with "role" and "content"), what a tokenizer returns.
Prompts = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Sequence[Mapping[str, Any]]
    | Sequence[Sequence[Mapping[str, Any]]]
    | Mapping[str, Any]
    | torch.Tensor
    | np.ndarray
)
FORMS = (
    "a text, a list of texts, token ids (a list, a list of lists, an array or tensor (T,) or (B, T)), a chat (a list "
    'of messages with "role" and "content", or a list of chats), or what a tokenizer returns'
)


class Encoded(NamedTuple):
    """Prompts as `model.generate` takes them."""

    inputs: dict[str, Any]  # input_ids (B, T) and what goes with them
    batch: int
    length: int  # T
    num_echoed: int  # tokens of a prompt that `generate` puts before the new ones: T, or 0 behind embeddings


class Encoder:
    """Turns prompts of any form into inputs.

    Args:
        tokenizer: for texts and chats, or None.
        name: of the model, for messages.
        device: where the inputs are wanted.
        vocabulary: number of token ids the model has embeddings for. `width`: of the embeddings, D.
        pad: id put where a prompt is shorter than the longest.
        unwanted: fields of a tokenizer's output that the model does not take.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        device: torch.device,
        vocabulary: int,
        width: int,
        pad: int,
        unwanted: Collection[str] = (),
    ) -> None:
        self._tokenizer, self._name, self._device = tokenizer, name, device
        self._vocabulary, self._width, self._pad, self._unwanted = vocabulary, width, pad, unwanted

    def encode(
        self, prompts: Any, attention_mask: Any = None, embeds: Any = None, *, goes_on: bool = False
    ) -> Encoded:
        """Inputs for prompts of any form.

        Args:
            attention_mask: 0 where a token of `prompts` is padding; of the same shape.
            embeds: (B, T, D) inputs_embeds, beside ids or instead of them.
            goes_on: a cache holds what comes before; the mask covers that too.

        Raises:
            UnsupportedOption: they have no such form, one is empty, an id is none of the model's, or a tokenizer or its
                chat template is missing.
        """
        inputs: dict[str, Any] = {}
        if isinstance(prompts, Mapping):
            prompts, attention_mask, embeds, inputs = self._unpacked(prompts, attention_mask, embeds)
        if prompts is None and embeds is None:
            raise UnsupportedOption(f"no prompt is given; pass {FORMS}")
        if attention_mask is not None and _is_written(prompts):
            raise UnsupportedOption(
                "texts are padded here; leave attention_mask out, or pass token ids with it"
            )
        ids, mask = (None, None) if prompts is None else self._ids(prompts)
        if embeds is not None:
            embeds = inputs["inputs_embeds"] = self._embeds(embeds, ids)
        if attention_mask is not None:
            mask = _mask(attention_mask, embeds if ids is None else ids, mask, goes_on)
        if ids is not None:
            inputs["input_ids"] = ids.to(self._device)
        if mask is not None:
            inputs["attention_mask"] = mask.to(self._device)
        batch, length = (embeds if ids is None else ids).shape[:2]
        return Encoded(inputs, batch, length, 0 if ids is None else length)

    def row(self, prompt: Any, position: int, most: int) -> list[int]:
        """At most so many token ids of one prompt of several, which may have none; `position` names it.

        Raises:
            UnsupportedOption: as `encode`.
        """
        if not _is_text(prompt):
            return self._item(prompt, position)[:most]
        _require_whole_characters(prompt, f"prompt {position}")
        ids: list[int] = self._need_tokenizer("text")(prompt, truncation=True, max_length=most)["input_ids"]
        return ids[:most]

    # -- forms -------------------------------------------------------------------------------------------------

    def _ids(self, prompts: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Ids (B, T) and, where padding is known or put in here, a mask."""
        if isinstance(prompts, np.ndarray):
            prompts = self._array(prompts)
        if isinstance(prompts, torch.Tensor) and prompts.is_nested:
            prompts = list(prompts.unbind())
        if isinstance(prompts, torch.Tensor):
            return self._tensor(prompts), None
        if isinstance(prompts, str):
            return self._padded(self._texts([prompts]))
        if is_tokenized(prompts):
            return self._padded([self._row(row_of(prompts, 0), 0)])
        # A frame is gone through by the names of its columns.
        if isinstance(prompts, bytes | Set | pd.DataFrame) or not isinstance(prompts, Iterable):
            raise UnsupportedOption(f"prompts are a {type(prompts).__name__}; pass {FORMS}")
        items = list(prompts)
        if not items:
            raise UnsupportedOption(f"no prompt is given; pass {FORMS}")
        if all(map(_is_text, items)):
            return self._padded(self._texts(items))
        if all(map(_is_message, items)):
            return self._padded(self._chats([items]))
        if all(_is_id(item) for item in items):
            return self._padded([self._row(items, 0)])
        for is_one, what in ((_is_id, "token ids"), (_is_text, "texts"), (_is_message, "messages")):
            if is_one(items[0]):
                i, item = next((i, item) for i, item in enumerate(items) if not is_one(item))
                raise UnsupportedOption(f"a list of {what} has a {type(item).__name__} at {i}: {item!r:.60}")
        return self._padded([self._item(item, i) for i, item in enumerate(items)])

    def _item(self, item: Any, position: int) -> list[int]:
        """One prompt of several that are neither all texts nor all messages."""
        if is_tokenized(item):
            return self._row(row_of(item, position), position)
        if isinstance(item, torch.Tensor | np.ndarray) and (item.ndim == 1 or item.shape[:-1] == (1,)):
            # (1, T) is what a tokenizer returns for one text.
            ids = self._tensor(_as_tensor(item))[0].tolist() if item.shape[-1] else []
            return self._row(ids, position)
        if isinstance(item, Sequence) and not isinstance(item, str | bytes):
            if item and all(isinstance(message, Mapping) for message in item):
                return self._chats([item])[0]
            if all(_is_id(token) for token in item):
                return self._row(item, position)
        raise UnsupportedOption(
            f"prompt {position} is of type {type(item).__name__}: {item!r:.60}; pass {FORMS}"
        )

    def _texts(self, texts: Sequence[str]) -> list[list[int]]:
        for position, text in enumerate(texts):
            _require_whole_characters(text, f"prompt {position}")
        rows: list[list[int]] = self._need_tokenizer("text")(list(texts), return_attention_mask=False)[
            "input_ids"
        ]
        return rows

    def _chats(self, chats: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
        tokenizer = self._need_tokenizer("a chat")
        if tokenizer.chat_template is None:
            raise UnsupportedOption(
                f"the tokenizer of {self._name} has no chat template; set tokenizer.chat_template, or pass the text"
            )
        rows = []
        for chat in chats:
            if not all("role" in message and message.keys() & {"content", "tool_calls"} for message in chat):
                raise UnsupportedOption(
                    'a message lacks "role" or "content"; a chat is a list of such messages'
                )
            is_begun = chat[-1]["role"] == "assistant"  # the model goes on with the answer that stands there
            try:
                text = tokenizer.apply_chat_template(
                    [dict(message) for message in chat],
                    tokenize=False,
                    add_generation_prompt=not is_begun,
                    continue_final_message=is_begun,
                )
            except (TemplateError, ValueError) as error:
                raise UnsupportedOption(
                    f"the chat template of {self._name} refuses this chat: {error}"
                ) from error
            _require_whole_characters(text, "a message")
            rows.append(tokenizer(text, add_special_tokens=False)["input_ids"])
        return rows

    def _need_tokenizer(self, form: str) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise UnsupportedOption(
                f"{self._name} has no tokenizer, which {form} needs; give attach(tokenizer=...), or pass token ids"
            )
        return self._tokenizer

    # -- numbers -----------------------------------------------------------------------------------------------

    def _row(self, ids: Sequence[Any], position: int) -> list[int]:
        row = [int(token) for token in ids]
        wrong = next((token for token in row if not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise UnsupportedOption(
                f"prompt {position} has the token id {wrong}; {self._name} has ids 0 to {self._vocabulary - 1}"
            )
        return row

    def _array(self, prompts: np.ndarray) -> Any:
        if isinstance(prompts, np.ma.MaskedArray) and np.ma.getmaskarray(prompts).any():
            raise UnsupportedOption(
                "some values of this array are masked; pass its data with attention_mask=~np.ma.getmaskarray(ids)"
            )
        if prompts.dtype.kind in "OUS" or prompts.dtype == np.uint64:  # whose largest are negative to torch
            return prompts.tolist()
        if prompts.dtype.kind not in "biufc":
            raise UnsupportedOption(
                f"token ids are integers of shape (T,) or (B, T), these are {prompts.dtype}"
            )
        return torch.from_numpy(np.array(prompts))

    def _tensor(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.dtype == torch.bool or ids.is_floating_point() or ids.is_complex() or ids.dim() not in (1, 2):
            hint = "; embeddings go into inputs_embeds=..." if ids.is_floating_point() else ""
            raise UnsupportedOption(
                f"token ids are integers of shape (T,) or (B, T), these are {ids.dtype} {tuple(ids.shape)}{hint}"
            )
        if ids.is_meta or ids.layout != torch.strided:
            kind = "without values (device 'meta')" if ids.is_meta else f"of layout {ids.layout}"
            raise UnsupportedOption(f"token ids are a tensor {kind}; pass a dense one, or a list")
        if not ids.numel():
            raise UnsupportedOption("prompt 0 is empty; every prompt needs at least one token")
        ids = ids.long().reshape(-1, ids.shape[-1])
        lowest, highest = ids.aminmax()
        if int(lowest) < 0 or int(highest) >= self._vocabulary:
            for position, row in enumerate(ids.tolist()):
                self._row(row, position)
        return ids

    def _padded(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        for position, row in enumerate(rows):
            if not row:
                raise UnsupportedOption(f"prompt {position} is empty; every prompt needs at least one token")
        longest = max(map(len, rows))
        ids = torch.tensor([[self._pad] * (longest - len(row)) + row for row in rows], device="cpu")
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device="cpu")
        return ids, mask

    def _embeds(self, given: Any, ids: torch.Tensor | None) -> torch.Tensor:
        embeds = _as_tensor(given)
        if embeds.dim() != 3 or not embeds.is_floating_point() or not embeds.numel():
            raise UnsupportedOption(
                f"inputs_embeds are floats of shape (B, T, D), these are {embeds.dtype} {tuple(embeds.shape)}"
            )
        if embeds.shape[2] != self._width:
            raise UnsupportedOption(
                f"inputs_embeds are {embeds.shape[2]} wide, those of {self._name} are {self._width}"
            )
        if ids is not None and len(ids) != len(embeds):
            raise UnsupportedOption(f"there are {len(ids)} prompts and inputs_embeds for {len(embeds)}")
        return embeds.to(self._device)

    def _unpacked(
        self, given: Mapping[str, Any], attention_mask: Any, embeds: Any
    ) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Ids, mask, embeddings and all else of what a tokenizer or processor returned."""
        fields = {name: value for name, value in given.items() if name not in self._unwanted}
        ids, inner_embeds = fields.pop("input_ids", None), fields.pop("inputs_embeds", None)
        mask = fields.pop("attention_mask", None)
        if ids is None and inner_embeds is None:
            raise UnsupportedOption(
                f"a dict of {', '.join(map(repr, given))} lacks 'input_ids'; pass {FORMS}"
            )
        if (mask is not None and attention_mask is not None) or (
            inner_embeds is not None and embeds is not None
        ):
            raise UnsupportedOption(
                "attention_mask or inputs_embeds is given twice, in the prompts and beside them"
            )
        length = _flat_length(ids)
        inputs = {name: field_of(value, length, self._device) for name, value in fields.items()}
        return (
            ids,
            attention_mask if mask is None else mask,
            embeds if inner_embeds is None else inner_embeds,
            inputs,
        )


def _require_whole_characters(text: str, what: str) -> None:
    """Half of a surrogate pair, as a text that was cut has it, is no character to any tokenizer."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedOption(
            f"{what} has {text[error.start]!a} at {error.start}, which is no character; "
            f'text.encode("utf-8", "replace").decode() puts a question mark there'
        ) from None


def _as_tensor(values: Any) -> torch.Tensor:
    """A tensor where it is; anything else as one on the CPU, whatever torch's default device is."""
    return values if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")


def _is_id(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and not (value.is_floating_point() or value.dtype == torch.bool)
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and not is_tokenized(value)


def _flat_length(ids: Any) -> int | None:
    """T of ids that are given flat, else None."""
    if isinstance(ids, torch.Tensor | np.ndarray):
        return len(ids) if ids.ndim == 1 else None
    return len(ids) if isinstance(ids, list | tuple) and ids and all(map(_is_id, ids)) else None


def _is_written(prompts: Any) -> bool:
    """Whether they are text or chats, which become ids here."""
    if isinstance(prompts, str):
        return True
    first = prompts[0] if isinstance(prompts, list | tuple) and prompts else None
    return (isinstance(first, str | Mapping) and not is_tokenized(first)) or (
        first is not None and first is not prompts and _is_written(first)
    )


def _mask(given: Any, tokens: torch.Tensor, own: torch.Tensor | None, goes_on: bool) -> torch.Tensor:
    """A given mask of the prompts' shape (B, T), or of a longer text if they go on with one.

    tokens: (B, T) ids or (B, T, D) embeddings. own: what was padded here.
    """
    if isinstance(given, list | tuple) and all(isinstance(row, list | tuple) for row in given):
        given = [[0] * (tokens.shape[1] - len(row)) + list(row) for row in given]
    try:
        mask = _as_tensor(given)
    except (TypeError, ValueError) as error:
        raise UnsupportedOption(f"attention_mask is no (B, T) of zeros and ones: {error}") from error
    mask = mask.reshape(1, -1) if mask.dim() == 1 else mask
    fits = mask.dim() == 2 and mask.shape[0] == tokens.shape[0]
    if not fits or (mask.shape[1] < tokens.shape[1] if goes_on else mask.shape[1] != tokens.shape[1]):
        raise UnsupportedOption(
            f"attention_mask is {tuple(mask.shape)}, the prompts are {tuple(tokens.shape[:2])}; it says of each of "
            f"their tokens whether it is real (1) or padding (0)"
        )
    if mask.is_meta or ((mask != 0) & (mask != 1)).any():
        raise UnsupportedOption(
            "attention_mask holds something else than zeros and ones; 1 is a real token, 0 is padding"
        )
    mask = mask.long()
    if own is not None and own.shape == mask.shape:
        mask = mask * own.to(mask.device)
    empty = (mask == 0).all(dim=1).nonzero()
    if len(empty):
        raise UnsupportedOption(
            f"prompt {int(empty[0])} is empty: its attention_mask has no 1; every prompt needs at least one token"
        )
    return mask
