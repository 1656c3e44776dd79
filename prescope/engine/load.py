"""The ways in: `load` a model from a folder or the hub, `attach` to one that is already in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UnsupportedOption
from ..hf import load_model
from ..predictor import Predictor
from ..scheduler.costs import LayerCosts
from .config import EngineConfig
from .engine import Engine
from .resolve import _check_early


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
    model: PreTrainedModel,
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
        model: any transformers 5 MoE (docs/families.md).
        config: settings as one object, or give them as keywords (see `EngineConfig`).

    Raises: as `load`; the model is left as it was.
    """
    if config is not None and settings:
        raise UnsupportedOption(f"give either config or keywords, not both (keywords: {', '.join(settings)})")
    name = model.config.name_or_path or type(model).__name__
    return Engine(
        model,
        config or EngineConfig(**settings),
        tokenizer=tokenizer,
        name=name,
        frequencies=frequencies,
        predictor=predictor,
        costs=costs,
    )
