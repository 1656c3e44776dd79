"""Routing taken from a trace instead of from the model's routers: for shapes whose weights are random.

Random weights route by near-ties, with no skew and no persistence; what caches and schedules can win shows only under
routing like a trained model's. The tokens that come out mean nothing, as they did before. Decode steps only.

Shapes: S steps, L MoE layers, T tokens, K top-k, E experts, d layers ahead.
"""

from typing import Any

import numpy as np
import torch

from ..core.types import MoEShape
from ..errors import TraceMismatch, UnsupportedOption
from ..traces.routing import RoutingTrace


class ForcedRouting:
    """Expert ids of decode steps, and what is predicted of them, step by step in buffers at fixed addresses.

    Args:
        ids_SLTK: expert ids; after the last step the first follows.
        scores: (S, L, d, 2, E) float32, expected tokens and probability of use for the layers behind each, or None.
        device: where the model runs.
    """

    def __init__(self, ids_SLTK: np.ndarray, scores: np.ndarray | None, device: torch.device) -> None:
        # All steps lie on the device, and so does their number: a graph advances by itself.
        self._ids = torch.from_numpy(ids_SLTK.astype(np.int64)).to(device)
        self._all_scores = None if scores is None else torch.from_numpy(scores.astype(np.float32)).to(device)
        self.ids_LTK = self._ids[0].clone()
        self.scores = None if self._all_scores is None else self._all_scores[0].clone()
        self._next = torch.zeros(1, dtype=torch.int64, device=device)

    @classmethod
    def of_trace(
        cls, trace: RoutingTrace, shape: MoEShape, device: torch.device, scores: Any = None
    ) -> "ForcedRouting":
        """The decode steps of a trace that hold as many tokens as its first one, for a model of `shape`.

        Args:
            scores: an array as `__init__` takes it, for these steps.

        Raises:
            UnsupportedOption: what is given is no trace, or no array of numbers.
            TraceMismatch: it is of another shape, or has no decode step.
        """
        if not isinstance(trace, RoutingTrace):
            raise UnsupportedOption(
                f"trace is a {type(trace).__name__}; it is a RoutingTrace, such as engine.generate(...).trace"
            )
        found, here = trace.shape[:3], shape[:3]
        if found != here:
            raise TraceMismatch(f"the trace has (layers, experts, top-k) = {found}, the model has {here}")
        decode = trace.select(phase="decode")
        if not len(decode):
            raise TraceMismatch(
                "the trace has no decode steps, only a prompt's; record or generate one of several new tokens"
            )
        numbers, counts = np.unique(decode.step, return_counts=True)
        steps = numbers[counts == counts[0]]
        ids = np.stack([decode.step_routing(int(step))[0] for step in steps])
        return cls(ids, None if scores is None else _scores(scores, len(ids), shape), device)

    def require(self, num_tokens: int) -> None:
        """Raise TraceMismatch unless a step of the model has as many tokens as one of the trace."""
        _, here, _ = self.ids_LTK.shape
        if num_tokens != here:
            raise TraceMismatch(
                f"decode steps are routed by a trace of {here} tokens a step, and this one has {num_tokens} (a token "
                f"of each sequence; beams and samples are sequences too); generate {here} at once, or end it with "
                f"force_routing(None)"
            )

    def restart(self) -> None:
        """The next step is the first."""
        self._next.zero_()

    def advance(self) -> None:
        """A step begins; part of a graph, where there is one."""
        self.ids_LTK.copy_(self._ids.index_select(0, self._next)[0])
        if self.scores is not None and self._all_scores is not None:
            self.scores.copy_(self._all_scores.index_select(0, self._next)[0])
        self._next.add_(1).remainder_(len(self._ids))


def _scores(given: Any, num_steps: int, shape: MoEShape) -> np.ndarray:
    """An array (S, L, d, 2, E) of numbers. Raises UnsupportedOption, TraceMismatch."""
    scores = np.asarray(given)
    if scores.dtype.kind not in "biuf":
        raise UnsupportedOption(f"scores are a {type(given).__name__}; they are an array of numbers")
    wanted = (num_steps, shape.num_layers, 2, shape.num_experts)
    if scores.ndim != 5 or scores.shape[:2] + scores.shape[3:] != wanted or not scores.shape[2]:
        raise TraceMismatch(
            f"scores are {scores.shape}; for the decode steps of this trace they are (steps, layers, layers ahead, 2, "
            f"experts) = ({wanted[0]}, {wanted[1]}, 1 or more, {wanted[2]}, {wanted[3]})"
        )
    return scores
