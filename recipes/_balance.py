"""Keep every expert of every layer in use: losses, loads and the controller of their strength.

Knows router logits and counts; knows nothing of text, files or optimisers.
Shapes: T tokens, E experts, K top-k, L MoE layers, D domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F


def assignment_share(router_logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """(E,) share of the T * K assignments each expert gets; sums to 1, fair is 1 / E. No gradient."""
    num_experts = router_logits_TE.shape[-1]
    with torch.no_grad():
        # The router takes its top-k from the float32 softmax; so do we, lest ties in bf16 break differently.
        chosen_TK = F.softmax(router_logits_TE, dim=-1, dtype=torch.float).topk(top_k, dim=-1).indices
        experts = torch.arange(num_experts, device=router_logits_TE.device)
        return (chosen_TK.reshape(-1, 1) == experts).float().mean(dim=0)


def layer_balance_loss(router_logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Load-balancing loss of one layer: E * sum_e(share_e * mean probability_e).

    1.0 when routing is uniform, E / K when all tokens share the same K experts with certainty.
    Over the whole batch, not per sequence, so that a domain may prefer some experts.

    Source:
        Switch Transformers, https://arxiv.org/abs/2101.03961, equation 4, per layer.
        transformers' `load_balancing_loss_func` pools all layers, where a dead expert of one layer hides
        behind a busy one of another.
    """
    share_E = assignment_share(router_logits_TE, top_k)
    probability_E = F.softmax(router_logits_TE, dim=-1, dtype=torch.float).mean(dim=0)
    return router_logits_TE.shape[-1] * (share_E * probability_E).sum()


def balance_losses(router_logits: Sequence[torch.Tensor], top_k: int) -> torch.Tensor:
    """(L,) `layer_balance_loss` of every MoE layer."""
    return torch.stack([layer_balance_loss(logits_TE, top_k) for logits_TE in router_logits])


def router_z_loss(router_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over layers and tokens of logsumexp(logits) ** 2: keeps logits small, so bf16 ranks them well."""
    return torch.stack(
        [torch.logsumexp(logits.float(), dim=-1).square().mean() for logits in router_logits]
    ).mean()


def expert_counts(router_logits: Sequence[torch.Tensor], top_k: int) -> np.ndarray:
    """(L, E) int64 assignments."""
    counts = []
    for logits_TE in router_logits:
        chosen_TK = F.softmax(logits_TE, dim=-1, dtype=torch.float).topk(top_k, dim=-1).indices
        counts.append(torch.bincount(chosen_TK.reshape(-1), minlength=logits_TE.shape[-1]))
    return torch.stack(counts).cpu().numpy()


def load_ratios(counts_LE: np.ndarray) -> np.ndarray:
    """(L, E) load over the fair share: 1.0 is fair, 0.0 is dead; each layer's mean is 1."""
    return counts_LE * counts_LE.shape[-1] / counts_LE.sum(axis=-1, keepdims=True)


def mutual_information_bits(counts_DE: np.ndarray) -> float:
    """Bits that one assignment's expert tells about its token's domain, domains weighted by their counts.

    0.0 when every domain uses the experts alike; at most the smaller of log2 D and log2 E. Plug-in
    estimate: biased up by about (D - 1)(E - 1) / (2 N ln 2) bits, negligible beyond 10,000 assignments.
    """
    joint = counts_DE / counts_DE.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    used = joint > 0
    return float((joint[used] * np.log2(joint[used] / independent[used])).sum())


@dataclass
class BalanceController:
    """Coefficient of each layer's balance loss: strong at first, annealed to a floor, raised where needed.

    The base is the same for all layers; the boost is a layer's own, doubled whenever a look at the
    validation set finds its worst expert outside [min_ratio, max_ratio] of the fair share, and let
    down slowly once it is well inside.
    """

    num_layers: int
    start: float = 0.05
    floor: float = 0.01
    anneal: tuple[float, float] = (0.10, 0.40)  # progress at which the base leaves `start`, reaches `floor`
    min_ratio: float = 0.4
    max_ratio: float = 2.5
    max_boost: float = 16.0
    boosts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.boosts = np.ones(self.num_layers)

    def observe(self, ratios_LE: np.ndarray) -> None:
        """Adjust the boosts after a measurement of the load."""
        lowest, highest = ratios_LE.min(axis=1), ratios_LE.max(axis=1)
        outside = (lowest < self.min_ratio) | (highest > self.max_ratio)
        well_inside = (lowest > 1.25 * self.min_ratio) & (highest < 0.9 * self.max_ratio)
        self.boosts = np.where(
            outside, self.boosts * 2.0, np.where(well_inside, self.boosts * 0.8, self.boosts)
        )
        self.boosts = self.boosts.clip(1.0, self.max_boost)

    def coefficients(self, progress: float) -> np.ndarray:
        """(L,) at this share of the training budget, 0 to 1."""
        begin, end = self.anneal
        done = min(max((progress - begin) / (end - begin), 0.0), 1.0)
        return self.boosts * (self.start + (self.floor - self.start) * done)
