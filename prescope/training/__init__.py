"""Record, train, judge: `train_predictor(model, prompts)` in one call, and its parts.

`record` runs prompts through an engine, `routers` takes the routers out of the model, `trainer` trains LLaPor,
`score_card` judges any predictor, `failures` breaks it, `worth` says whether it pays.
"""

from .failures import Inverted, Shift, adversarial_trace, domain_shift, joined_stream, random_predictor
from .pipeline import TrainedPredictor, baselines, comparison, train_predictor
from .prepare import Split, rows_of, split_by_prompt
from .record import own_prompts, own_text, record_trace
from .routers import router_agreement, routers_of
from .score_card import Interval, ScoreCard, difference, score
from .trainer import Progress, TrainConfig, TrainResult, train
from .worth import Worth, worth

__all__ = [
    "Interval",
    "Inverted",
    "Progress",
    "ScoreCard",
    "Shift",
    "Split",
    "TrainConfig",
    "TrainResult",
    "TrainedPredictor",
    "Worth",
    "adversarial_trace",
    "baselines",
    "comparison",
    "difference",
    "domain_shift",
    "joined_stream",
    "own_prompts",
    "own_text",
    "random_predictor",
    "record_trace",
    "router_agreement",
    "routers_of",
    "rows_of",
    "score",
    "split_by_prompt",
    "train",
    "train_predictor",
    "worth",
]
