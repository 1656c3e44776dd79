"""Make prediction fail on purpose: wrong predictors, routing that contradicts them, text that changes.

Each is a predictor or a trace, so score card, simulator and engine take them like any other.

Shapes: R rows, T tokens, E experts, K top-k, L MoE layers.
"""

from dataclasses import replace
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.numbers import require_count
from ..core.types import MoEShape
from ..errors import TraceMismatch, UnsupportedOption
from ..predictor.base import Cost, Learns, Predictor, ScoreArray, used_mask
from ..predictor.baselines import Baseline, LayerInput, Scorer
from ..predictor.checked import replay, require_predictor
from ..predictor.controls import Chance
from ..predictor.llapor import Llapor
from ..predictor.online import OnlineConfig, OnlineTuner
from ..traces.routing import RoutingTrace
from .score_card import recall_at

#: Tokens over which a stream's recall is averaged.
WINDOW = 64


class Inverted(Baseline):
    """The opposite of another predictor: 1 - score. Prefetching by it must do worse than by nothing.

    Raises:
        UnsupportedOption: the other one learns while it runs, and nobody would tell it what layers used.
    """

    def __init__(self, predictor: Predictor) -> None:
        require_predictor(predictor)
        if isinstance(predictor, Learns):
            raise UnsupportedOption(
                f"{predictor.name} learns from what layers used; invert a predictor that does not"
            )
        super().__init__(predictor.shape, predictor.lookahead)
        self._predictor = predictor
        self.name, self.needs_inputs = f"inverted {predictor.name}", predictor.needs_inputs

    def _scorer(self, at: LayerInput) -> Scorer:
        """The other predictor's scores, inverted."""
        made = {p.moe_layer: p.scores_TE for p in self._predictor.predict(*at)}
        return lambda ahead, target: 1.0 - made[target]

    def to(self, device: torch.device | str) -> Self:
        """The other one, moved, turned round."""
        return type(self)(self._predictor.to(device))

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`."""
        return 1.0 - replay(self._predictor, trace, lookahead)

    def cost(self) -> Cost:
        """The other's."""
        return self._predictor.cost()


def random_predictor(shape: MoEShape, lookahead: int, seed: int = 0) -> Chance:
    """Random predictions: recall@k is k / E whatever the routing."""
    return Chance(shape, lookahead, seed)


def adversarial_trace(trace: RoutingTrace, predictor: Predictor, lookahead: int = 1) -> RoutingTrace:
    """The trace with the experts that a predictor holds least likely, at every layer it predicts.

    Inputs, weights and the first `lookahead` layers stay, so recall at that lookahead is 0 wherever 2K <= E: the worst
    that routing can do to a scheduler that believes the predictor.
    """
    scores = replay(predictor, trace, lookahead)
    ids = trace.expert_ids.copy()
    worst = np.argsort(scores, axis=-1, kind="stable")[..., : trace.top_k]
    ids[:, lookahead:] = np.where(ids[:, lookahead:] >= 0, worst, -1)
    return replace(trace, expert_ids=ids)


def joined_stream(before: RoutingTrace, after: RoutingTrace) -> RoutingTrace:
    """Two traces of one model as one stream in which the text changes half-way: "before", then "after"."""
    parts = [
        replace(part, prompts=[{**known, "domain": domain} for known in part.prompt_of_each()])
        for domain, part in (("before", before), ("after", after))
    ]
    return RoutingTrace.concat(parts)


class Shift(NamedTuple):
    """What a change of text does to recall, and how fast online tuning makes up for it.

    Recalls are at K, mean over layers, at one lookahead.
    """

    lookahead: int
    shift_at: int  # tokens before the change
    window: int  # tokens of one entry of the curves
    fixed: NDArray[np.float64]  # recall in each window, predictor as trained
    tuned: NDArray[np.float64]  # the same with online tuning
    before: float  # recall before the change, as trained
    after_fixed: float  # in the last half of what comes after it, as trained
    after_tuned: float  # there, with tuning
    recovery_tokens: int | None  # until the tuned curve has made up half of the drop; None: it never did
    cycles: int  # tuning cycles
    tuning_ms: float  # wall-clock of all of them, on this machine

    @property
    def drop(self) -> float:
        """Recall lost by the change, as trained."""
        return self.before - self.after_fixed


def domain_shift(
    predictor: Llapor,
    before: RoutingTrace,
    after: RoutingTrace,
    *,
    lookahead: int = 1,
    online: OnlineConfig | None = None,
    window: int = WINDOW,
) -> Shift:
    """Score two traces one after the other as one stream, with the predictor as trained and with online tuning.

    Padding is left out.

    Raises:
        TraceMismatch: the traces are of different models, or shorter than a window.
        UnsupportedOption: `window` is no number of tokens.
    """
    require_count("window", window)
    before, after = (trace.take(trace.position >= 0) for trace in (before, after))
    if min(len(before), len(after)) < window:
        raise TraceMismatch(
            f"both parts of a stream need {window} tokens; they have {len(before)} and {len(after)}"
        )
    stream = joined_stream(before, after)
    tuner = OnlineTuner(predictor, online)
    fixed = _curve(predictor.replay(stream, lookahead), stream, lookahead, window, len(before))
    tuned = _curve(tuner.replay(stream, lookahead), stream, lookahead, window, len(before))
    shift = len(before) // window
    settled = shift + (len(fixed) - shift) // 2
    level, after_fixed = float(fixed[:shift].mean()), float(fixed[settled:].mean())
    return Shift(
        lookahead=lookahead,
        shift_at=len(before),
        window=window,
        fixed=fixed,
        tuned=tuned,
        before=level,
        after_fixed=after_fixed,
        after_tuned=float(tuned[settled:].mean()),
        recovery_tokens=_recovery(tuned[shift:] - fixed[shift:], (level - after_fixed) / 2, window),
        cycles=tuner.cycles,
        tuning_ms=tuner.tuning_ms,
    )


def _recovery(gain: NDArray[np.float64], wanted: float, window: int) -> int | None:
    """Tokens until the gain of tuning, smoothed over four windows (one easy window is no recovery), is as wanted."""
    if wanted <= 0 or len(gain) < 4:
        return None
    reached = np.flatnonzero(np.convolve(gain, np.ones(4) / 4, mode="valid") >= wanted)
    return int((reached[0] + 4) * window) if len(reached) else None


def _curve(
    scores_RLE: ScoreArray, trace: RoutingTrace, lookahead: int, window: int, shift_at: int
) -> NDArray[np.float64]:
    """Recall@K in consecutive windows; none spans the change, incomplete ones are left out."""
    used = used_mask(trace.expert_ids, trace.num_experts)[:, lookahead:]
    firsts = [*range(0, shift_at - window + 1, window), *range(shift_at, len(trace) - window + 1, window)]
    L = used.shape[1]
    return np.array(
        [
            np.mean(
                [
                    recall_at(scores_RLE[i : i + window, la], used[i : i + window, la], trace.top_k)
                    for la in range(L)
                ]
            )
            for i in firsts
        ]
    )
