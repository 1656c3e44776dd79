"""Calls into transformers that read somebody's files: whatever they raise is said in one line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..core.waiting import BAR_AFTER_S
from ..errors import BadModelFolder, PrescopeError, UnsupportedExperts
from .arguments import Source

SAID = 400  # characters of somebody else's error that are quoted


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever transformers raises while it reads somebody's files is the files' fault, and is said so."""
    try:
        yield
    except PrescopeError:
        raise
    # tokenizers raises plain Exception, and fuzzed files many other kinds (docs/robustness.md): no list of them would
    # be whole. Only calls into transformers stand inside.
    except Exception as error:
        text = " ".join(str(error).split())
        said = text if len(text) <= SAID else f"{text[:SAID]} ..."
        raise BadModelFolder(f"{what}: {type(error).__name__}: {said}") from error


def file_of(model: str | Path, name: str, source: Source) -> str | None:
    """Where a file of a model lies, fetched if need be; None if the model has none of this name."""
    found: str | None = cached_file(model, name, _raise_exceptions_for_missing_entries=False, **source.hub)
    return found


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in errors of packed experts which model they are of."""
    try:
        yield
    except UnsupportedExperts as error:
        raise UnsupportedExperts(
            f"{what}, and {error}; load the same model in bfloat16, or in another format"
        ) from error


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Transformers' progress bars come only where one has to wait, in our words, and go when they are full."""

    def later(make: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        words = {"desc": "reading weights"} if named.get("desc") == "Loading weights" else {}
        return make(*positional, **{**named, **words, "delay": BAR_AFTER_S, "leave": False})

    former = logging.set_tqdm_hook(later)
    try:
        yield
    finally:
        logging.set_tqdm_hook(former)


def read_model(
    name: str | Path,
    found: Any,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    state_dict: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> PreTrainedModel:
    """The model with its weights, by transformers: from where `name` says, or from a state that is given."""
    with reading(f"{name} cannot be loaded"), quiet_bars():
        model, info = found.from_pretrained(
            name if state_dict is None else None,
            dtype=dtype,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below, in words that help
            **({} if state_dict is None else {"state_dict": state_dict}),
            **keywords,
        )
    if lost := sorted(info["missing_keys"]):
        raise BadModelFolder(
            f"{name} lacks {len(lost)} weights ({', '.join(lost[:3])}, ...); they would be random. Fetch the "
            f"checkpoint again"
        )
    if other := sorted(info["mismatched_keys"], key=str):
        weight, found_shape, wanted = other[0]
        raise BadModelFolder(
            f"{name} has {len(other)} weights in another shape than its config.json says: {weight} is "
            f"{tuple(found_shape)} in the files and {tuple(wanted)} by the config; they do not belong together, or one "
            f"was edited. Fetch the checkpoint again"
        )
    return model.eval()
