"""The ways in: `load` a model from a folder or the hub, `attach` to one that is already in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import UnsupportedOption
from ..hf import load_model, model_in
from ..predictor import Predictor
from ..scheduler.costs import LayerCosts
from .config import EngineConfig
from .engine import Engine
from .resolve import _check_early


@torch.inference_mode(False)  # weights that are loaded inside such a block can be used and trained outside it
def load(
    model: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    frequencies: np.ndarray | None = None,
    predictor: Predictor | None = None,
    costs: LayerCosts | None = None,
    **settings: Any,
) -> "Engine":
    """Load a model folder or hub id with its experts in host memory.

    Args:
        model: folder written by `save_pretrained`, or a hub id.
        dtype: of the weights; "auto" keeps the checkpoint's.
        frequencies: (L, E) uses per expert, for cache="static".
        predictor: for schedules that prefetch by predictions.
        costs: of a layer on this machine, for schedules that weigh them; by default as `prescope.calibrate` saved them.
        settings: see `EngineConfig`: slots, device, cache, link_gb_per_s, kernels, events, ...

    Raises:
        BadModelFolder, NotAMoE, UnsupportedExperts: the model cannot be served.
        SlotPoolTooSmall, SlotPoolTooLarge, UnsupportedOption: the settings cannot.
    """
    config = EngineConfig(**settings)
    loaded = load_model(model, dtype, lambda layers, top_k: _check_early(config, layers, top_k))
    name = Path(model).name if Path(model).is_dir() else str(model)
    return Engine(
        loaded.model,
        config,
        tokenizer=loaded.tokenizer,
        name=name,
        frequencies=frequencies,
        predictor=predictor,
        costs=costs,
    )


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

    Raises: as `load`; the model is left as it was.
    """
    if config is not None and settings:
        raise UnsupportedOption(f"give either config or keywords, not both (keywords: {', '.join(settings)})")
    inner = model_in(model)
    name = inner.config.name_or_path or type(inner).__name__
    return Engine(
        inner,
        config or EngineConfig(**settings),
        tokenizer=tokenizer,
        name=name,
        frequencies=frequencies,
        predictor=predictor,
        costs=costs,
    )
