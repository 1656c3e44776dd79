"""Record, train, judge: `train_predictor(model, prompts)` in one call, and its parts.

`record` runs prompts through an engine, `routers` takes the routers out of the model, `trainer` trains LLaPor,
`score_card` judges any predictor, `score_schedule` what it is worth to a cache and a schedule, `failures` makes
prediction fail on purpose, `savings` says whether it pays.
"""

from .artefact import train_artefact
from .failures import Inverted, Shift, adversarial_trace, domain_shift, joined_stream, random_predictor
from .intervals import Interval
from .pipeline import TrainedPredictor, baselines, comparison, train_on_trace, train_predictor
from .prepare import Split, rows_of, split_by_prompt
from .record import own_prompts, own_text, read_prompts, record_trace
from .routers import early_router, router_agreement, routers_of
from .savings import Savings, savings
from .score_card import ScoreCard, difference, score
from .score_schedule import ScheduleCard, schedule_cards
from .trainer import TrainConfig, TrainingProgress, TrainResult, train

__all__ = [
    "Interval",
    "Inverted",
    "Savings",
    "ScheduleCard",
    "ScoreCard",
    "Shift",
    "Split",
    "TrainConfig",
    "TrainResult",
    "TrainedPredictor",
    "TrainingProgress",
    "adversarial_trace",
    "baselines",
    "comparison",
    "difference",
    "domain_shift",
    "early_router",
    "joined_stream",
    "own_prompts",
    "own_text",
    "random_predictor",
    "read_prompts",
    "record_trace",
    "router_agreement",
    "routers_of",
    "rows_of",
    "savings",
    "schedule_cards",
    "score",
    "split_by_prompt",
    "train",
    "train_artefact",
    "train_on_trace",
    "train_predictor",
]
