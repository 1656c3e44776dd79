"""Hostile routing for a recorded model's shape, on its machines."""

from ..traces.synthetic import ADVERSARIAL, adversarial
from .scenarios import Scenarios


def hostile(
    scenarios: Scenarios, *, prompt_tokens: int = 16, new_tokens: int = 64, seed: int = 0
) -> dict[str, Scenarios]:
    """Each kind of adversarial trace in the shape and batch of a recorded one, on the same machines, by kind.

    Nobody recorded such text, so no trained predictor goes with it: an oracle does, and one that errs
    (`Scenario(predictor=NOISY, recall=...)`).
    """
    trace, batch = scenarios.trace, scenarios.batch
    return {
        kind: Scenarios(
            adversarial(
                kind, num_layers=trace.num_layers, num_experts=trace.num_experts, top_k=trace.top_k, batch=batch,
                prompt_tokens=prompt_tokens, new_tokens=new_tokens, seed=seed,
            ),
            list(scenarios.machines.values()),
            label=f"adversarial routing, {kind}",
        )
        for kind in ADVERSARIAL
    }  # fmt: skip
