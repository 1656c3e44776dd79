"""Predictors: which experts the coming MoE layers will use, under one protocol (`base.Predictor`).

`llapor` is the trained one (`llapor_config` its settings and tensors), `online` tunes it while it runs; `baselines`
need no training, `controls` must score everything and chance; `noisy_oracle` is an oracle that errs; `recorded` repeats
what was said of one trace; `layer_groups` finds the layer groups. Trained and judged in `prescope.training`.

Imports no model code: routers come in as tensors, states as a `RoutingTrace`.
"""

from typing import Any

from ..core.renamed import moved
from .base import (
    BadPredictor,
    BadState,
    Cost,
    Learns,
    LearnsWhereAsked,
    Prediction,
    Predictor,
    TooFewPrompts,
    measure_us,
)
from .baselines import EarlyRouter, Frequency, PreviousToken, Routers, Transition
from .checked import BadPrediction
from .controls import Chance, Oracle
from .layer_groups import Cues, LayerGroups, contrast_of, find_groups, group_layers, measure_cues
from .llapor import Llapor
from .llapor_config import LlaporConfig, ModelTag
from .noisy_oracle import NoisyOracle
from .online import OnlineConfig, OnlineTuner
from .recorded import RecordedPredictor

__all__ = [
    "BadPrediction",
    "BadPredictor",
    "BadState",
    "Chance",
    "Cost",
    "Cues",
    "EarlyRouter",
    "Frequency",
    "LayerGroups",
    "Learns",
    "LearnsWhereAsked",
    "Llapor",
    "LlaporConfig",
    "ModelTag",
    "NoisyOracle",
    "OnlineConfig",
    "OnlineTuner",
    "Oracle",
    "Prediction",
    "Predictor",
    "PreviousToken",
    "RecordedPredictor",
    "Routers",
    "TooFewPrompts",
    "Transition",
    "contrast_of",
    "find_groups",
    "group_layers",
    "measure_cues",
    "measure_us",
]


def __getattr__(name: str) -> Any:
    return moved("predictor", name)
