"""What tokenizers return for one text or several, read without the model: ids without padding, and what goes with them.

Shapes: B prompts, T tokens of the longest.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Encoding

from ..errors import UnsupportedOption

#: What tokenizers tell of their work, and no model computes with; `token_type_ids` some models do.
NOT_FOR_MODELS = {
    "assistant_masks", "length", "num_truncated_tokens", "offset_mapping", "overflow_to_sample_mapping",
    "overflowing_tokens", "special_tokens_mask", "token_type_ids",
}  # fmt: skip
_IDS, _MASK = "input_ids", "attention_mask"


def is_tokenized(item: Any) -> bool:
    """Whether it is a tokenizer's output, be it for one text or for several."""
    return isinstance(item, Encoding) or (isinstance(item, Mapping) and _IDS in item)


def row_of(item: Any, position: int) -> list[int]:
    """The ids of a tokenizer's output for one text, without its padding.

    Raises:
        UnsupportedOption: it is for several, or something else than ids goes with it.
    """
    ids: Any
    mask: Any
    if isinstance(item, Encoding):
        ids, mask = item.ids, item.attention_mask
    else:
        ids, mask = item[_IDS], item.get(_MASK)
        if others := item.keys() - NOT_FOR_MODELS - {_IDS, _MASK}:
            raise UnsupportedOption(
                f"prompt {position} comes with {', '.join(sorted(map(repr, others)))}; several prompts that have more "
                f"than ids are given as one dict of tensors (B, ...)"
            )
    ids_T = _flat(ids, position)
    if mask is None:
        return ids_T
    mask_T = _flat(mask, position)
    if len(mask_T) != len(ids_T):
        raise UnsupportedOption(
            f"prompt {position} has {len(ids_T)} token ids and a mask of {len(mask_T)} values"
        )
    return [token for token, is_real in zip(ids_T, mask_T, strict=True) if is_real]


def _flat(values: Any, position: int) -> list[Any]:
    """(T,) or (1, T) as a list."""
    found = values.tolist() if isinstance(values, torch.Tensor | np.ndarray) else list(values)
    if len(found) == 1 and isinstance(found[0], Sequence):
        found = list(found[0])
    if any(isinstance(value, Sequence) for value in found):
        raise UnsupportedOption(
            f"prompt {position} is a tokenizer's output for {len(found)} texts; pass it alone, or one for each text"
        )
    return found


def field_of(value: Any, length: int | None, device: torch.device) -> Any:
    """A field beside the ids as a tensor on a device, where it is made of numbers; anything else as it is.

    length: T of ids that were given flat, as a field of T values then is too; else None.
    """
    is_numbers = isinstance(value, np.ndarray) and value.dtype.kind in "iufb"
    if is_numbers or (isinstance(value, list | tuple) and value and _is_numeric(value)):
        value = torch.as_tensor(np.asarray(value), device="cpu")
    if not isinstance(value, torch.Tensor):
        return value
    value = value.to(device)
    return value[None] if length is not None and value.shape == (length,) else value


def _is_numeric(values: Sequence[Any]) -> bool:
    try:
        return np.asarray(values).dtype.kind in "iufb"
    except ValueError:  # ragged
        return False
