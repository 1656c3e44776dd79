"""The ways in: `load` a model from a folder or the hub, `attach` to one that is already in memory."""

import os
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..core.paths import EMBEDDED_MODEL, embedded_model, user_path
from ..errors import UnsupportedOption
from ..hf import PASSED_ON, load_model, model_in, take_source
from ..predictor import Predictor
from ..scheduler.costs import LayerCosts
from .config import EngineConfig
from .engine import Engine
from .resolve import check_early


@torch.inference_mode(False)  # weights that are loaded inside such a block can be used and trained outside it
def load(
    model: str | Path | None = None,
    *,
    dtype: torch.dtype | str = "auto",
    frequencies: np.ndarray | None = None,
    predictor: Predictor | None = None,
    costs: LayerCosts | None = None,
    **settings: Any,
) -> "Engine":
    """Load a model folder or hub id with its experts in host memory.

    Args:
        model: folder written by `save_pretrained`, or a hub id; None or "tiny-moe": the model that comes with prescope.
            Beside a folder named `owner`, "owner/name" is a hub id only if the hub's cache has it.
        dtype: of the weights, also by name ("bf16"); "auto" keeps the checkpoint's. `torch_dtype` is the same.
        frequencies: (L, E) uses per expert, for cache="static" and for schedules that have the most frequent in slots
            from the start ("fiddler", "static-split", "artefact"); "next-use" begins with them.
        predictor: for schedules that prefetch by predictions.
        costs: of a layer on this machine, for schedules that weigh them; by default as `prescope.calibrate` saved them.
        settings: of the engine, see `EngineConfig`: slots, experts, device, cache, link_gb_per_s, kernels, ...
            And what is passed on to transformers' `from_pretrained`: revision, token, subfolder, cache_dir,
            local_files_only, force_download, proxies, variant, attn_implementation, quantization_config,
            trust_remote_code, code_revision, use_safetensors. Code that comes with a checkpoint runs, and a pickle is
            read, only if you say so here.

    Raises:
        BadModelFolder, NotAMoE, UnsupportedExperts: the model cannot be served.
        SlotPoolTooSmall, SlotPoolTooLarge, UnsupportedOption: the settings cannot.
    """
    older = settings.pop("torch_dtype", None)  # of both, transformers goes by the newer name
    dtype = dtype if older is None or dtype != "auto" else older
    source = take_source(settings)
    config = _config_of(settings)
    place = _place_of(model)
    # transformers reads weights to the default device, which has no room for all experts: the engine moves the others.
    with torch.device("cpu"):
        loaded = load_model(place, dtype, partial(check_early, config), source, config.experts)
    return Engine(
        loaded.model,
        config,
        layers=loaded.layers,
        packing=loaded.packing,
        tokenizer=loaded.tokenizer,
        name=Path(place).name if Path(place).is_dir() else str(place),
        frequencies=frequencies,
        predictor=predictor,
        costs=costs,
    )


def _place_of(model: Any) -> str | Path:
    """Folder or hub id of what was given to `load`."""
    is_its_name = isinstance(model, str) and model == EMBEDDED_MODEL and not Path(model).is_dir()
    if model is None or is_its_name:
        return embedded_model()
    if not isinstance(model, str | os.PathLike):
        raise UnsupportedOption(
            f"prescope.load takes a folder or a hub id, not a {type(model).__name__}; a model in memory goes to "
            f"prescope.attach(model, ...)"
        )
    name = os.fspath(model)
    return user_path(name) if name.startswith("~") or isinstance(model, os.PathLike) else name


def _config_of(settings: dict[str, Any]) -> EngineConfig:
    """The settings as a config; one that does not exist is said with the one that may be meant."""
    known = [field.name for field in fields(EngineConfig)]
    for name in settings.keys() - known:
        near = get_close_matches(name, [*known, *PASSED_ON], 1)
        meant = (
            f"; did you mean {near[0]}?"
            if near
            else f"; there are {', '.join(known)}, and {', '.join(PASSED_ON)}"
        )
        raise UnsupportedOption(f"there is no setting {name!r}{meant}")
    return EngineConfig(**settings)


def attach(
    model: nn.Module,
    config: EngineConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    frequencies: np.ndarray | None = None,
    predictor: Predictor | None = None,
    costs: LayerCosts | None = None,
    **settings: Any,
) -> "Engine":
    """Move the experts of a model that is already in memory to host rows; `detach` brings them back.

    Args:
        model: any transformers 5 MoE (docs/families.md), or a wrapper of one without weights of its own, such as
            `torch.compile(model)` or a PeftModel. One that is attached already is taken over: the former engine is
            detached first, unless it is in the middle of a run or inside its `with` block (AlreadyAttached). So a cell
            can be run twice, and `attach(model).detach()` gives back a model whose engine was lost.
        config: settings as one object, or give them as keywords (see `EngineConfig`).

    While attached, weights of experts can be neither read nor changed: whatever tries gets an UnsupportedExperts. All
    others can, adapters may be put on them and trained.

    `experts` stays "auto": what is packed cannot be given back as it was.

    Raises: as `load`; the model is left as it was.
    """
    if config is not None and settings:
        raise UnsupportedOption(f"give either config or keywords, not both (keywords: {', '.join(settings)})")
    if not isinstance(config, EngineConfig | None):
        raise UnsupportedOption(
            f"config is a {type(config).__name__}; it is an EngineConfig, or give settings: attach(model, slots=4)"
        )
    inner, config = model_in(model), config or _config_of(settings)
    if config.experts not in ("auto", "plain"):
        raise UnsupportedOption(
            f"experts={config.experts!r} packs weights with a loss, and attach gives a model back as it was; pack it "
            f"with prescope.load(folder, experts={config.experts!r})"
        )
    name = inner.config.name_or_path or type(inner).__name__
    return Engine(
        inner,
        config,
        tokenizer=tokenizer,
        name=name,
        frequencies=frequencies,
        predictor=predictor,
        costs=costs,
    )
