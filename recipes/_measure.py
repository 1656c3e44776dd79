"""Measure a model over held-out windows: loss and expert use, per domain.

Knows a transformers causal-LM with `router_logits`; knows nothing of training or of files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from recipes._balance import expert_counts, load_ratios, mutual_information_bits


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """What one pass over the windows of every domain gave. D domains, L MoE layers, E experts."""

    domains: list[str]
    loss_nats: dict[str, float]  # mean cross entropy per token
    num_tokens: dict[str, int]  # predicted tokens
    counts_DLE: np.ndarray  # assignments (K per token)

    def pooled(self, domains: list[str] | None = None) -> np.ndarray:
        """(L, E) assignments over these domains, all by default."""
        chosen = [self.domains.index(domain) for domain in domains or self.domains]
        return self.counts_DLE[chosen].sum(axis=0)

    def pooled_loss(self) -> float:
        """Mean cross entropy in nats over all tokens."""
        total = sum(self.num_tokens.values())
        return sum(self.loss_nats[domain] * self.num_tokens[domain] for domain in self.domains) / total

    def layer_table(self) -> list[dict[str, float]]:
        """Per MoE layer: lowest and highest load over the fair share, and bits between domain and expert."""
        ratios_LE = load_ratios(self.pooled())
        return [
            {
                "moe_layer": layer,
                "min_load_ratio": float(ratios_LE[layer].min()),
                "max_load_ratio": float(ratios_LE[layer].max()),
                "domain_expert_bits": mutual_information_bits(self.counts_DLE[:, layer]),
            }
            for layer in range(ratios_LE.shape[0])
        ]


@torch.no_grad()
def measure(
    model: PreTrainedModel, windows: dict[str, torch.Tensor], *, batch_windows: int = 32
) -> Measurement:
    """Loss and expert counts over every window; windows are (W, context + 1) token ids on the CPU.

    Eager on purpose: a second compiled graph would cost more seconds than it saves. The model's training
    flag is left alone, because a flip would make torch.compile trace the training step anew; the recipe's
    models have no dropout, so it changes nothing.
    """
    device = model.get_input_embeddings().weight.device
    top_k = model.config.num_experts_per_tok
    losses, tokens, counts = {}, {}, []
    for domain, domain_windows in windows.items():
        nll_sum, domain_counts = 0.0, 0
        for batch in domain_windows.split(batch_windows):
            ids = batch.to(device)
            out = model.base_model(input_ids=ids[:, :-1], use_cache=False, output_router_logits=True)
            logits = model.get_output_embeddings()(out.last_hidden_state).float()
            nll_sum += float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
            domain_counts = domain_counts + expert_counts(out.router_logits, top_k)
        tokens[domain] = domain_windows.shape[0] * (domain_windows.shape[1] - 1)
        losses[domain] = nll_sum / tokens[domain]
        counts.append(domain_counts)
    return Measurement(
        domains=list(windows), loss_nats=losses, num_tokens=tokens, counts_DLE=np.stack(counts)
    )
