"""Routing taken from a trace instead of from the model's routers: for shapes whose weights are random.

Random weights route by near-ties, with no skew and no persistence; what caches and schedules can win shows only under
routing like a trained model's. The tokens that come out mean nothing, as they did before. Decode steps only.

Shapes: S steps, L MoE layers, T tokens, K top-k, E experts, d layers ahead.
"""

import numpy as np
import torch

from ..errors import TraceMismatch
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
        cls, trace: RoutingTrace, batch: int, device: torch.device, scores: np.ndarray | None = None
    ) -> "ForcedRouting":
        """The decode steps of a trace whose steps hold `batch` tokens each.

        Raises:
            TraceMismatch: no step does.
        """
        decode = trace.select(phase="decode")
        steps = [step for step in decode.steps if int((decode.step == step).sum()) == batch]
        if not steps:
            raise TraceMismatch(
                f"the trace has no decode step of {batch} tokens; record or generate one with batch={batch}"
            )
        ids = np.stack([decode.step_routing(step)[0] for step in steps])
        return cls(ids, scores, device)

    def restart(self) -> None:
        """The next step is the first."""
        self._next.zero_()

    def advance(self) -> None:
        """A step begins; part of a graph, where there is one."""
        self.ids_LTK.copy_(self._ids.index_select(0, self._next)[0])
        if self.scores is not None and self._all_scores is not None:
            self.scores.copy_(self._all_scores.index_select(0, self._next)[0])
        self._next.add_(1).remainder_(len(self._ids))
