"""What a predictor said of one trace, kept beside it: replayed where the predictor, its model and its GPU are not.

A trace with router inputs is a hundred times as large as one without; with the scores of its decode steps it can be
simulated under any schedule all the same. Scores are kept as float16: 0.5 % of a probability of 0.1 or more at most.

Shapes: R decode rows of a trace, E experts, L MoE layers.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.types import MoEShape
from ..errors import TraceMismatch, UnsupportedOption
from ..traces.events import DECODE
from ..traces.routing import RoutingTrace
from .base import BadPredictor, ScoreArray
from .baselines import Baseline, LayerInput, Scorer
from .files import read_tensors, write_tensors

FORMAT = "prescope-predictions-1"


class RecordedPredictor(Baseline):
    """Scores of the decode steps of one trace.

    Args:
        shape: of the model.
        scores: [ahead - 1] (R, L - ahead, E): probability that the row's token uses the expert, `ahead` layers before.
        routed: `digest` of the trace they belong to.
        name: of the predictor that made them.
        is_calibrated: its scores were fitted to be probabilities.

    Raises:
        BadPredictor: scores of another shape, or outside [0, 1].
    """

    def __init__(
        self,
        shape: MoEShape,
        scores: Sequence[NDArray[np.floating]],
        *,
        routed: str,
        name: str,
        is_calibrated: bool = True,
    ) -> None:
        super().__init__(shape, len(scores))
        self.name, self.routed, self.is_calibrated = name, routed, is_calibrated
        self._scores = [np.asarray(one, np.float16) for one in scores]
        L, E = shape[:2]
        for ahead, one in enumerate(self._scores, 1):
            wanted = (len(self._scores[0]), L - ahead, E)
            if one.shape != wanted or not ((one >= 0) & (one <= 1)).all():
                raise BadPredictor(
                    f"recorded scores of {name}, {ahead} layers ahead: shape {one.shape}, expected {wanted} with "
                    f"numbers in [0, 1]; record them again"
                )

    @classmethod
    def of_scores(
        cls, trace: RoutingTrace, scores: Sequence[ScoreArray], *, name: str, is_calibrated: bool
    ) -> Self:
        """Scores of each row of a trace's decode steps, by lookahead; see `Predictor.replay`."""
        return cls(trace.shape, scores, routed=digest(trace), name=name, is_calibrated=is_calibrated)

    def _scorer(self, at: LayerInput) -> Scorer:
        """Always raises UnsupportedOption: what it knows is one trace."""
        raise UnsupportedOption(
            f"these predictions of {self.name} were recorded with a trace; live, train a predictor for the model at "
            f"hand with prescope.train_predictor"
        )

    def replay(self, trace: RoutingTrace, lookahead: int) -> ScoreArray:
        """As `Predictor.replay`; rows that are no decode steps score 0.

        Raises:
            TraceMismatch: it is another trace than the one they were recorded with.
        """
        self._require(trace, lookahead)
        made = self._scores[lookahead - 1]
        out = np.zeros((len(trace), *made.shape[1:]), np.float32)
        out[trace.phase == DECODE] = made
        return out

    def replay_rows(self, trace: RoutingTrace, lookahead: int, rows: NDArray[np.int64]) -> ScoreArray:
        """As `replay`, of some rows of decode steps."""
        self._require(trace, lookahead)
        at = np.searchsorted(np.flatnonzero(trace.phase == DECODE), rows)
        return self._scores[lookahead - 1][at].astype(np.float32)

    def _require(self, trace: RoutingTrace, lookahead: int) -> None:
        self._check(trace, lookahead)
        if digest(trace) != self.routed:
            raise TraceMismatch(
                f"the recorded predictions of {self.name} belong to another trace than this one of {trace.model}; "
                f"load both from one recording"
            )

    def save(self, path: str | Path) -> Path:
        """Write scores and name as safetensors, by a rename."""
        tensors = {f"ahead_{i}": torch.from_numpy(one) for i, one in enumerate(self._scores, 1)}
        known = {
            "shape": self.shape[:3],
            "name": self.name,
            "routed": self.routed,
            "is_calibrated": self.is_calibrated,
        }
        return write_tensors(tensors, {"format": FORMAT, "prescope": json.dumps(known)}, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            BadPredictor: it cannot be read, or its numbers are not those of predictions.
        """
        tensors, known = read_tensors(path, FORMAT)
        try:
            scores = [tensors[f"ahead_{i}"].numpy() for i in range(1, len(tensors) + 1)]
            shape = MoEShape(*known["shape"])
            return cls(
                shape,
                scores,
                routed=known["routed"],
                name=known["name"],
                is_calibrated=known["is_calibrated"],
            )
        except (KeyError, TypeError) as error:
            raise BadPredictor(f"{path}: its metadata is damaged: {error!r}") from error


def digest(trace: RoutingTrace) -> str:
    """Which experts a trace's decode steps used, as a number: two traces of equal digests are one."""
    ids = np.ascontiguousarray(trace.expert_ids[trace.phase == DECODE])
    return hashlib.sha256(repr(ids.shape).encode() + ids.tobytes()).hexdigest()[:16]
