"""Record, train, judge: `train_predictor(model, prompts)` in one call.

The glue between an engine and `trainer`: it runs prompts through the model, takes the router inputs and the routers out
of it, and judges what was trained.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ..core.numbers import require_count
from ..device import torch_device_of
from ..predictor.base import IdArray, TooFewPrompts, measure_us, require_inputs
from ..predictor.baselines import EarlyRouter, Frequency, PreviousToken, Routers, Transition
from ..predictor.controls import Chance, Oracle
from ..predictor.layer_groups import Cues, LayerGroups, group_layers, measure_cues
from ..predictor.llapor import Llapor
from ..predictor.llapor_config import LlaporConfig
from ..scheduler.costs import LayerCosts
from ..traces.routing import RoutingTrace
from .prepare import MIN_PROMPTS, require_trace, rows_of, split_by_prompt, spread
from .record import Prompt, PromptSet, by_domain, device_of, opened, own_text, record_trace
from .routers import routers_or_reason
from .savings import savings
from .score_card import ScoreCard, difference, require_scorable, score
from .trainer import TrainConfig, TrainingProgress, TrainResult, require_settings, train

#: Own text when the caller names no amount. Written side by side, so that it takes no more steps than a few texts do;
#: on text of kinds that were not trained on it gains more than anything else (docs/log/predictor.md).
OWN_TOKENS = 16384
#: Rows the early router's two numbers per lookahead are fitted on; against 8192 its ECE on tiny-moe moves by 0.0001.
CALIBRATION_ROWS = 2048


class TrainedPredictor(NamedTuple):
    """What `train_predictor` returns.

    Attributes:
        predictor: the trained one. `others`: the baselines and controls, for the same model.
        cards: score card of each by name, all on `test`. `judged_on`: what that is, in words.
        history: progress of each epoch. `groups`, `cues`: of the layers, measured on the training prompts.
        trace: what was recorded of the prompts.
        seconds: wall-clock of everything, on this machine.
    """

    predictor: Llapor
    others: list[Any]
    cards: dict[str, ScoreCard]
    history: list[TrainingProgress]
    groups: LayerGroups
    cues: Cues
    trace: RoutingTrace
    test: RoutingTrace
    judged_on: str
    seconds: float

    @property
    def card(self) -> ScoreCard:
        """The trained predictor's."""
        return self.cards[self.predictor.name]

    def table(self, domain: str | None = None) -> pd.DataFrame:
        """One row for each predictor and lookahead: recall@K with its interval, and less the early router's."""
        return comparison(self.cards, against="early router", domain=domain)

    def savings(self, costs: LayerCosts, **settings: Any) -> pd.DataFrame:
        """Milliseconds each predictor saves per token on `test`, at its own cost measured here and now.

        Args:
            costs: of the machine, without a predictor. `settings`: see `prescope.training.savings`.
        """
        rows = []
        for one in [self.predictor, *self.others]:
            # The controls are no real predictors: their cost is not counted.
            is_control = isinstance(one, Oracle | Chance)
            spent = (
                0.0
                if is_control
                else measure_us(one, self.predictor.width, device=str(self.predictor.device))
            )
            found = savings(one, self.test, costs.with_predictor(spent), **settings)
            rows.append(found._asdict() | {"saved_ms": found.saved_ms})
        return pd.DataFrame(rows).sort_values("saved_ms", ascending=False, ignore_index=True)


def train_predictor(
    model: Any,
    prompts: PromptSet,
    *,
    test_prompts: PromptSet | None = None,
    config: LlaporConfig | None = None,
    training: TrainConfig | None = None,
    max_tokens: int = 128,
    new_tokens: int = 0,
    own_tokens: int | None = None,
    path: str | Path | None = None,
    checkpoint: str | Path | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
    device: str | None = None,
) -> TrainedPredictor:
    """Train a LLaPor predictor for a model on prompts, and judge it.

    Records the model's routing on the prompts, finds the layer groups, trains all layers at once, calibrates, and
    scores the result beside the baselines on prompts it was not trained on.

    Args:
        model: an `Engine`, a transformers MoE model, or a folder or hub id. An engine's settings stay as they are.
        prompts: texts or token id lists, some dozens or more; as a dict, by domain.
        test_prompts: to judge by, of other domains for instance; held-out prompts of `prompts` when not given.
        config: form of the networks. Without one, the residual variant, or the paper's if the model's routers cannot be
            taken out (the reason is in the notes of `Llapor.tag`).
        max_tokens: of each prompt. `new_tokens`: to sample and record after each.
        own_tokens: of text the model writes itself, to train on as well: it keeps the predictor right on text unlike
            the prompts. 16384 when not given; 0 for none.
        path: where to save the predictor; an existing file is replaced when training has ended well, never before.
        checkpoint, on_progress: see `trainer.train`.
        device: to train on, "auto" the GPU if there is one; the engine's when not given.

    Raises:
        TooFewPrompts: fewer than 4. UnsupportedOption: one is neither a text nor token ids, or a number is none.
        BadState, BadTrace: the states are NaN or missing. Nothing is overwritten.
    """
    started = time.perf_counter()
    require_settings(config, training)
    prompts = _require_prompts(prompts)
    test_prompts = None if test_prompts is None else by_domain(test_prompts)
    own = OWN_TOKENS if own_tokens is None else own_tokens
    require_count("own_tokens", own, 0)
    training = training or TrainConfig()
    test = None
    with opened(model) as engine:
        where = str(torch_device_of(device_of(engine) if device is None else device))
        trace = record_trace(
            engine, prompts, max_tokens=max_tokens, new_tokens=new_tokens, seed=training.seed
        )
        if (
            test_prompts is not None
        ):  # before training: what is wrong with them must not cost a trained predictor
            test = record_trace(engine, test_prompts, max_tokens=max_tokens, new_tokens=new_tokens, seed=1)
        # The split that `train` makes too.
        cues = measure_cues(trace, split_by_prompt(trace, training.hold_out, training.seed).train)
        routers, reason = routers_or_reason(engine, trace, config)
        result = train(
            trace,
            own_text=own_text(engine, own, seed=training.seed) if own else None,
            config=config or (LlaporConfig() if routers is not None else LlaporConfig.paper()),
            training=training,
            routers=routers,
            groups=group_layers(cues),
            device=where,
            checkpoint=checkpoint,
            on_progress=on_progress,
        )
    notes = {"routers": reason, "own_tokens": own}
    return _judged(result, trace, cues, routers, test, notes, path, started)


def train_on_trace(
    trace: RoutingTrace,
    *,
    test: RoutingTrace | None = None,
    config: LlaporConfig | None = None,
    training: TrainConfig | None = None,
    path: str | Path | None = None,
    checkpoint: str | Path | None = None,
    on_progress: Callable[[TrainingProgress], None] | None = None,
    device: str = "cpu",
) -> TrainedPredictor:
    """Train a LLaPor predictor on a trace with router inputs, without the model, and judge it.

    For traces that were recorded earlier or elsewhere (`prescope.read_trace`). The model's routers are not there, so
    the networks take the paper's form unless `config` says otherwise, and the early router is not among the baselines.

    Args:
        test: to judge by; held-out prompts of `trace` when not given. Others: see `train_predictor`.

    Raises:
        TooFewPrompts: fewer than 4 different sequences. BadState, BadTrace: the states are NaN or missing.
        TraceMismatch: `test` is of another model.
    """
    started = time.perf_counter()
    require_settings(config, training)
    training = training or TrainConfig()
    require_trace(trace)
    require_inputs(trace, "training LLaPor")
    if test is not None:
        require_trace(test)
        trace.check_same_model(test)
        require_inputs(test, "judging LLaPor")
        require_scorable(test)
    cues = measure_cues(trace, split_by_prompt(trace, training.hold_out, training.seed).train)
    result = train(
        trace, config=config or LlaporConfig.paper(), training=training, groups=group_layers(cues), device=device,
        checkpoint=checkpoint, on_progress=on_progress,
    )  # fmt: skip
    notes = {"routers": "trained on a trace, without the model", "own_tokens": 0}
    return _judged(result, trace, cues, None, test, notes, path, started)


def _judged(
    result: TrainResult,
    trace: RoutingTrace,
    cues: Cues,
    routers: Routers | None,
    test: RoutingTrace | None,
    notes: dict[str, Any],
    path: str | Path | None,
    started: float,
) -> TrainedPredictor:
    """Score a training's predictor beside the baselines, and save it."""
    judged_on = "test prompts"
    if test is None:
        test = rows_of(trace, np.concatenate([result.split.validation, result.split.calibration]))
        judged_on = "held-out prompts (half of them chose the epoch, half fitted the calibration)"
    predictor = result.predictor
    predictor.tag.notes.update(**notes, judged_on=judged_on, groups=result.groups.reason)
    others = baselines(trace, routers, predictor, rows=result.split.train)
    cards = {p.name: score(p, test, groups=result.groups) for p in [predictor, *others]}
    if path is not None:
        predictor.save(path)
    seconds = time.perf_counter() - started
    return TrainedPredictor(
        predictor, others, cards, result.history, result.groups, cues, trace, test, judged_on, seconds
    )


def baselines(
    trace: RoutingTrace, routers: Routers | None, like: Llapor, *, rows: IdArray | None = None
) -> list[Any]:
    """All baselines and controls for a model; those that count are fitted on `trace`, or on some of its rows."""
    shape, lookahead = trace.shape, like.lookahead
    rows = np.arange(len(trace)) if rows is None else rows
    # Predictors that count read no router inputs, and a copy of those would be gigabytes.
    counted = rows_of(replace(trace, inputs=None), rows)
    found: list[Any] = [
        Frequency(counted, lookahead),
        PreviousToken(shape, lookahead),
        Transition(counted, lookahead),
        Oracle(shape, lookahead),
        Chance(shape, lookahead),
    ]
    if routers is not None:
        early = EarlyRouter(shape, routers.to(like.device), lookahead)
        early.calibrate(rows_of(trace, spread(rows[trace.position[rows] >= 0], CALIBRATION_ROWS)))
        found.insert(0, early)
    return found


def comparison(cards: Mapping[str, ScoreCard], *, against: str, domain: str | None = None) -> pd.DataFrame:
    """Recall@K of each card by lookahead, with 95 % intervals over prompts, and its difference to one of them."""
    rows = []
    for name, card in cards.items():
        for ahead in card.lookaheads:
            recall = card.recall_interval(ahead, domain=domain)
            row = {
                "predictor": name,
                "lookahead": ahead,
                "recall": recall.value,
                "low": recall.low,
                "high": recall.high,
            }
            if against in cards and name != against:
                gain = difference(card, cards[against], ahead, domain=domain)
                row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            rows.append(row)
    return pd.DataFrame(rows)


def _require_prompts(prompts: PromptSet) -> dict[str, list[Prompt]]:
    """Prompts by domain. Fails before minutes are spent on recording."""
    found = {} if isinstance(prompts, str) else by_domain(prompts)
    count = sum(map(len, found.values()))
    if count < MIN_PROMPTS:
        given = "one text" if isinstance(prompts, str) else f"{count} prompts"
        raise TooFewPrompts(
            f"training got {given}; give a list of {MIN_PROMPTS} or more, some dozens of different texts are better"
        )
    return found
