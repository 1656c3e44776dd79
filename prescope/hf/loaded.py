"""What loading a model gives."""

from collections.abc import Callable
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .moe_layers import MoELayer


class LoadedModel(NamedTuple):
    """A model on the CPU and its tokenizer, if it has one.

    Attributes:
        layers: its MoE layers, with the layout that their experts get in host memory.
        packing: what is packed and what was unpacked, in one line; "" for a plain checkpoint.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    layers: list[MoELayer]
    packing: str


#: Called with the MoE layers (on meta), top-k and `LoadedModel.packing` before any weight is read, to fail early.
Check = Callable[[list[MoELayer], int, str], None]
