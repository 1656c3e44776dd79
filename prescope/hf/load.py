"""Load a model folder or hub id, and say clearly what is wrong with one that cannot be loaded."""

import json
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import BadModelFolder, NotAMoE
from .moe_layers import MoELayer, find_moe_layers, top_k_of

INDEX = "model.safetensors.index.json"


class LoadedModel(NamedTuple):
    """A model on the CPU and its tokenizer, if it has one."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def load_model(
    name: str | Path,
    dtype: torch.dtype | str,
    check: Callable[[list[MoELayer], int], None],
) -> LoadedModel:
    """Load a causal LM onto the CPU.

    Args:
        name: folder or hub id.
        dtype: of the weights; "auto" keeps the checkpoint's.
        check: called with the MoE layers (on meta) and top-k before any weight is read, to fail early.

    Raises:
        BadModelFolder: not there, incomplete, truncated, corrupt, or of a family transformers does not know.
        NotAMoE: it has no experts.
    """
    folder = Path(name)
    local = folder.is_dir()
    if not local and (folder.exists() or str(name).startswith((".", "/", "~")) or str(name).count("/") != 1):
        raise BadModelFolder(f"{name} is neither a folder nor a hub id of the form 'owner/name'")
    if local:
        _check_folder(folder)
    elif folder.parent.is_dir():
        # More likely a slip of the hand; without a network the hub is asked for half a minute.
        near = get_close_matches(
            folder.name, [path.name for path in folder.parent.iterdir() if path.is_dir()], 1
        )
        meant = f"; did you mean {folder.parent / near[0]}?" if near else ""
        warnings.warn(
            f"there is no folder {name}, so the Hugging Face hub is asked for it{meant}", stacklevel=3
        )
    config = _read_config(name)
    skeleton = _skeleton(config, dtype)
    check(find_moe_layers(skeleton), top_k_of(skeleton))
    del skeleton
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise BadModelFolder(f"{name} cannot be loaded: {error}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        bad = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
        raise BadModelFolder(
            f"{name} lacks {len(bad)} weights or has them in another shape ({', '.join(bad[:3])}, ...); they would be "
            f"random. Fetch the checkpoint again"
        )
    return LoadedModel(model.eval(), _read_tokenizer(name))


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").exists():
        raise BadModelFolder(f"{folder} has no config.json; give the folder that `save_pretrained` wrote")
    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).exists():
        try:
            named = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
        except (json.JSONDecodeError, KeyError) as error:
            raise BadModelFolder(f"{folder / INDEX} is not a safetensors index: {error}") from error
        absent = sorted(named - {file.name for file in files})
        if absent:
            raise BadModelFolder(
                f"{folder} lacks {', '.join(absent)}, which its index names; fetch them again"
            )
    if not files:
        raise BadModelFolder(
            f"{folder} has no *.safetensors; convert the checkpoint with `save_pretrained` first"
        )
    for file in files:
        try:
            with safe_open(file, "pt") as handle:  # compares the header with the file's length
                handle.keys()
        except SafetensorError as error:
            raise BadModelFolder(f"{file} is truncated or corrupt ({error}); fetch it again") from error


def _read_config(name: str | Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise BadModelFolder(
            f"the configuration of {name} cannot be used: {error}. If its family is new, update transformers"
        ) from error


def _skeleton(config: PreTrainedConfig, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model on meta: shapes without weights."""
    wanted = getattr(config, "dtype", None) if dtype == "auto" else dtype
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=wanted or torch.float32)
    except ValueError as error:
        raise NotAMoE(
            f"{type(config).__name__} is not the configuration of a causal language model: {error}"
        ) from error


def _read_tokenizer(name: str | Path) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        return None  # prompts can still be given as token ids; `generate` says so when it gets text
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
