"""What a run needs of its engine; `Engine` has it."""

from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.types import MoEShape
from ..hf import MoELayer
from .config import EngineConfig
from .forwards import Forwards
from .graph import Decoder
from .layered import LayeredRunner
from .turn import Turn


class ServedModel(Protocol):
    """A model attached to an engine, as runs see it; attributes as of `Engine`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    config: EngineConfig
    shape: MoEShape
    layers: list[MoELayer]
    reasons: dict[str, str]
    fingerprint: str
    chosen_cache: str
    runner: LayeredRunner
    forwards: Forwards
    decoder: Decoder
    turn: Turn

    def describe(self) -> dict[str, Any]:
        """The settings as resolved."""
        ...

    def hardware(self) -> dict[str, Any]:
        """The machine."""
        ...

    def finish_closing(self) -> None:
        """Give the model back if `close` was called meanwhile."""
        ...
