"""Predictors: which experts the coming MoE layers will use, under one protocol (`base.Predictor`).

`llapor` is the trained one (`form` its settings and tensors), `train` trains it, `online` tunes it while it runs;
`baselines` hold those that need no training, `controls` those that must score everything and chance; `noisy` is an
oracle that errs; `groups` finds the layer groups; `score` judges them all, `worth` says whether they pay; `failures`
breaks them.
Imports no model code: routers come in as tensors, states as a `RoutingTrace`.
"""

from .base import BadPredictor, BadState, Cost, Prediction, Predictor, Shape, TooFewPrompts, measure_us
from .baselines import EarlyRouter, Frequency, PreviousToken, Routers, Transition
from .controls import Chance, Oracle
from .failures import Inverted, Shift, adversarial_trace, domain_shift, joined_stream, random_predictor
from .form import LlaporConfig, ModelTag
from .groups import Cues, LayerGroups, contrast_of, find_groups, group_layers, measure_cues
from .llapor import Llapor
from .noisy import NoisyOracle
from .online import OnlineConfig, OnlineTuner
from .prepare import Split, rows_of, split_by_prompt
from .score import Interval, ScoreCard, difference, score
from .train import Progress, TrainConfig, TrainResult, train
from .worth import Worth, worth

__all__ = [
    "BadPredictor",
    "BadState",
    "Chance",
    "Cost",
    "Cues",
    "EarlyRouter",
    "Frequency",
    "Interval",
    "Inverted",
    "LayerGroups",
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
    "Progress",
    "Routers",
    "ScoreCard",
    "Shape",
    "Shift",
    "Split",
    "TooFewPrompts",
    "TrainConfig",
    "TrainResult",
    "Transition",
    "Worth",
    "adversarial_trace",
    "contrast_of",
    "difference",
    "domain_shift",
    "find_groups",
    "group_layers",
    "joined_stream",
    "measure_cues",
    "measure_us",
    "random_predictor",
    "rows_of",
    "score",
    "split_by_prompt",
    "train",
    "worth",
]
