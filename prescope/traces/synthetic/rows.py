"""Made-up ids as a routing trace: which token each row of a run is, and the label that says no model was run.

Shapes: R rows, L MoE layers, K top-k.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import __version__
from ...errors import UnsupportedOption
from ..routing import RoutingTrace
from .drawing import draw_weights


class TokenRows:
    """Which token each row of a run is: step 0 reads the prompts, every later step adds a token to each sequence.

    As an engine records it: `new_tokens` tokens take one prefill step and `new_tokens - 1` decode steps.

    Attributes:
        step, sequence, position: (R,). `length`: tokens of each sequence that were read.

    Raises:
        UnsupportedOption: a count below 1.
    """

    def __init__(self, prompt_tokens: int, new_tokens: int, batch: int) -> None:
        for name, count in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("batch", batch)):
            if count < 1:
                raise UnsupportedOption(f"{name} is {count}; a run has at least one")
        steps = new_tokens - 1
        self.batch, self.length = batch, prompt_tokens + steps
        prefill, decode = np.arange(prompt_tokens), prompt_tokens + np.arange(steps)
        self.step = np.repeat(np.arange(new_tokens), [batch * prompt_tokens] + [batch] * steps)
        self.sequence = np.concatenate(
            [np.repeat(np.arange(batch), prompt_tokens), np.tile(np.arange(batch), steps)]
        )
        self.position = np.concatenate([np.tile(prefill, batch), np.repeat(decode, batch)])

    @property
    def columns(self) -> dict[str, NDArray[np.int64]]:
        """The columns of a trace that do not depend on what is routed."""
        phase = (self.step > 0).astype(np.int64)
        return {"step": self.step, "sequence": self.sequence, "position": self.position, "phase": phase}

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """One dict for each sequence."""
        return [{"domain": "synthetic", "id": i} for i in range(self.batch)]


def fingerprint_of(**settings: Any) -> str:
    """A fingerprint like a model's, that no model has."""
    text = json.dumps(settings, sort_keys=True)
    return "synthetic-" + hashlib.sha256(text.encode()).hexdigest()[:22]


def synthetic_trace(
    ids_RLK: NDArray[np.int16],
    num_experts: int,
    columns: Mapping[str, Any],
    prompts: list[dict[str, Any]],
    rng: np.random.Generator,
    *,
    label: str,
    fingerprint: str,
) -> RoutingTrace:
    """A trace of made-up ids (R, L, K), with made-up weights; `label` says what it was made by."""
    R, L, K = ids_RLK.shape
    return RoutingTrace(
        expert_ids=ids_RLK,
        weights=draw_weights(R, L, K, rng),
        **columns,
        model=f"synthetic {L} x {num_experts} top-{K} ({label})",
        fingerprint=fingerprint,
        num_experts=num_experts,
        top_k=K,
        decoder_layers=list(range(L)),
        prompts=prompts,
        versions={
            "prescope": __version__,
            "numpy": np.__version__,
            "synthetic": f"no model was run: {label}",
        },
    )
