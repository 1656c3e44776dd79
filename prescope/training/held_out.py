"""What is found on held-out prompts: recall, how far each layer's correction may be trusted, and Platt scalings.

Shapes: R rows, T tokens, E experts, K top-k, L MoE layers, N = lookahead * E outputs.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from ..predictor.base import IdArray, used_mask, used_mask_torch
from ..predictor.llapor import ALWAYS_TRUST, NEVER_TRUST, Llapor
from ..predictor.platt import fit_platt
from ..traces.routing import RoutingTrace

#: Share of errors that a correction is taken to leave at least: a few hundred held-out tokens do not show fewer.
MIN_ERROR = 0.01


@torch.no_grad()
def layer_recalls(
    predictor: Llapor, trace: RoutingTrace, rows: IdArray, counted_RLE: NDArray[np.bool_] | None = None
) -> torch.Tensor:
    """(lookahead, L) recall@K of some rows by source layer; NaN where there is no layer to predict, or none used it.

    Args:
        counted_RLE: pairs of the trace that count, all unless given.
    """
    L, _, K = predictor.shape[:3]
    hits, total = torch.zeros(2, predictor.lookahead, L, dtype=torch.float32, device=predictor.device)
    for chunk in predictor.chunks(len(rows)):
        part = rows[chunk]
        z_LTN = predictor.forward(*predictor.batch_of(trace, part))
        ids = torch.from_numpy(trace.expert_ids[part]).to(predictor.device).transpose(0, 1)
        used = used_mask_torch(ids, trace.num_experts)
        if counted_RLE is not None:
            used = used * torch.from_numpy(counted_RLE[part]).to(predictor.device).transpose(0, 1)
        for ahead in range(1, predictor.lookahead + 1):
            best = z_LTN[: L - ahead, :, predictor.columns(ahead)].topk(K, dim=-1).indices
            hits[ahead - 1, : L - ahead] += used[ahead:].gather(-1, best).sum((1, 2))
            total[ahead - 1, : L - ahead] += used[ahead:].sum((1, 2))
    return torch.where(total > 0, hits / total.clamp_min(1), torch.nan).cpu()


def mean_recall(recalls: torch.Tensor) -> float:
    """Over layers, then over lookaheads; NaN where nothing counts at all."""
    return float(recalls.nanmean(1).nanmean())


def fit_trust(predictor: Llapor, trace: RoutingTrace, rows: IdArray) -> None:
    """Find how far each layer's correction may be trusted: `LlaporConfig.trust` times the errors it corrects over those
    it leaves.

    On unfamiliar text errors are added to those left, so a correction that removes many errors and leaves few is still
    useful further out than one that improves a good early router only a little. One number serves all lookaheads of a
    layer: the best one differs more from model to model than from lookahead to lookahead (docs/log/predictor.md).
    """
    errors = [
        1.0 - layer_recalls(predictor.trusting(trust), trace, rows).nanmean(0)
        for trust in (NEVER_TRUST, ALWAYS_TRUST)
    ]
    mended, left = errors[0] - errors[1], errors[1].clamp_min(MIN_ERROR)
    # The last layer predicts nothing.
    trust = (predictor.config.trust * mended / left).nan_to_num(ALWAYS_TRUST).clamp_min(NEVER_TRUST)
    predictor.tensors["trust"] = trust.view(-1, 1, 1).to(predictor.device)


def calibrate(predictor: Llapor, trace: RoutingTrace, counted_RLE: NDArray[np.bool_] | None = None) -> None:
    """Fit Platt scaling of each layer and lookahead on a trace the networks were not trained on.

    Where corrections fade, one for those that count in full and one for those that do not count; in between
    `probabilities` interpolates.

    Args:
        counted_RLE: pairs that the scores shall be probabilities of, all unless given: experts that have a slot were
            used not long ago, and are likelier to be used than others of the same score.
    """
    used_RLE = used_mask(trace.expert_ids, trace.num_experts)
    parts = {"platt": predictor}
    if predictor.config.residual:
        parts = {"platt": predictor.trusting(ALWAYS_TRUST), "platt_faded": predictor.trusting(NEVER_TRUST)}
    for name, part in parts.items():
        z_LRN = part.replay_logits(trace).numpy()
        platt = predictor.tensors[name].cpu().clone()
        for ahead in range(1, predictor.lookahead + 1):
            for layer in range(predictor.shape.num_layers - ahead):
                z, used = z_LRN[layer, :, predictor.columns(ahead)], used_RLE[:, layer + ahead]
                pairs = None if counted_RLE is None else counted_RLE[:, layer + ahead]
                if (
                    pairs is not None and pairs.any()
                ):  # where none counts, all do: nothing else is known of the layer
                    z, used = z[pairs][:, None], used[pairs][:, None]
                platt[layer, ahead - 1] = torch.tensor(fit_platt(z, used), dtype=torch.float32, device="cpu")
        predictor.tensors[name] = platt.to(predictor.device)
    predictor.is_calibrated = True
