"""Extract a model's routers as tensors, and prove on a trace that they make the model's choices.

Shapes: L MoE layers, E experts, D width.
"""

from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..engine.engine import Engine
from ..errors import UnsupportedOption
from ..hf import MoELayer, find_moe_layers
from ..predictor.base import BadState, require_inputs, used_mask
from ..predictor.baselines import EarlyRouter, Routers
from ..predictor.llapor_config import LlaporConfig
from ..traces.routing import RoutingTrace
from .prepare import spread
from .record import own_text

#: Share of the recorded choices that routers taken from a model must reproduce on the recorded inputs.
MIN_AGREEMENT = 0.9
AGREEMENT_ROWS = 2048
#: What the model writes to prove its routers on, and to scale their scores: tokens in all, and of each text.
PROOF_TOKENS, PROOF_LENGTH = 512, 32


def routers_of(engine: Engine, trace: RoutingTrace) -> Routers:
    """The model's routers as tensors, proven on a trace: they must choose the recorded experts on recorded inputs.

    A router is the one module beside the experts with a weight of (experts, width); a bias of it is added to the
    logits, another vector of biases (DeepSeek-V3's correction) to the scores. Whether these are softmax or sigmoid
    is what agrees better with the trace.

    Raises:
        UnsupportedOption: a layer has no such router, or it chooses other experts than were recorded.
    """
    layers = find_moe_layers(engine.model)
    found = [_router_beside(engine.model, layer) for layer in layers]
    E, D = trace.num_experts, require_inputs(trace, "taking out routers").shape[2]
    weight, logit_bias, selection = (
        torch.zeros(len(layers), E, D, dtype=torch.float32, device="cpu"),
        torch.zeros(len(layers), E, dtype=torch.float32, device="cpu"),
        torch.zeros(len(layers), E, dtype=torch.float32, device="cpu"),
    )
    for i, (module, extra) in enumerate(found):
        rows, width = module.weight.shape
        weight[i, :rows, :width] = module.weight.detach().float().cpu()
        # A layer with fewer experts than the largest: the places without one are never chosen.
        logit_bias[i, rows:] = -1e4
        bias = getattr(module, "bias", None)
        if isinstance(bias, torch.Tensor) and bias.shape == (rows,):
            logit_bias[i, :rows] = bias.detach().float().cpu()
        if extra is not None:
            selection[i, :rows] = extra.detach().float().cpu()
    kinds: tuple[Literal["softmax", "sigmoid"], ...] = ("softmax", "sigmoid")
    candidates = [Routers(weight, logit_bias, selection, kind) for kind in kinds]
    best = max(candidates, key=lambda routers: router_agreement(routers, trace))
    agreement = router_agreement(best, trace)
    if agreement < MIN_AGREEMENT:
        raise UnsupportedOption(
            f"the routers found in {engine.name} choose {agreement:.0%} of the recorded experts, less than "
            f"{MIN_AGREEMENT:.0%}: this family computes its choice in another way; use config=LlaporConfig.paper()"
        )
    return best


def router_agreement(routers: Routers, trace: RoutingTrace) -> float:
    """Share of the recorded choices that the routers make on the recorded inputs of the same layer."""
    inputs = require_inputs(trace, "the routers' agreement")
    rows = spread(np.flatnonzero(trace.position >= 0), AGREEMENT_ROWS)
    used = torch.from_numpy(used_mask(trace.expert_ids[rows], trace.num_experts))
    hits = 0
    for layer in range(trace.num_layers):
        choice = routers.choice(layer, torch.from_numpy(inputs[rows, layer]).float())
        hits += int(used[:, layer].gather(1, choice.topk(trace.top_k, dim=1).indices).sum())
    return hits / max(int(used.sum()), 1)


def early_router(engine: Engine, lookahead: int = 4) -> EarlyRouter:
    """The predictor that needs no training: the model's own routers, applied up to `lookahead` layers early.

    The model writes a few short texts first, on which its routers are proven and their scores made probabilities.

    Raises:
        UnsupportedOption: as `routers_of`.
    """
    trace = own_text(engine, PROOF_TOKENS, length=PROOF_LENGTH)
    found = EarlyRouter(engine.shape, routers_of(engine, trace), lookahead)
    found.calibrate(trace)
    return found


def _router_beside(model: nn.Module, layer: MoELayer) -> tuple[Any, torch.Tensor | None]:
    """The router module of a layer and its selection bias, if there is one: in the block around the experts, or in
    the decoder layer around that.
    """
    name = layer.name
    for _ in range(2):
        name = name.rpartition(".")[0]
        block = model.get_submodule(name)
        routers = [
            module
            for module in block.modules()
            if isinstance(weight := getattr(module, "weight", None), torch.Tensor)
            and weight.dim() == 2
            and weight.shape[0] == layer.num_experts
        ]
        if len(routers) == 1:
            extra = [
                tensor
                for key, tensor in [*block.named_buffers(), *block.named_parameters()]
                if tensor.shape == (layer.num_experts,)
                and "bias" in key
                and tensor is not getattr(routers[0], "bias", None)
            ]
            return routers[0], extra[0] if len(extra) == 1 else None
    raise UnsupportedOption(
        f"no router found beside {layer.name}: no module with a weight of ({layer.num_experts} experts, width); "
        f"train with config=LlaporConfig.paper()"
    )


def routers_or_reason(
    engine: Engine, trace: RoutingTrace, config: LlaporConfig | None
) -> tuple[Routers | None, str]:
    """The routers and how well they agree; without them the reason, unless the user asked for what needs them."""
    try:
        routers = routers_of(engine, trace)
    except (UnsupportedOption, BadState) as error:
        if config is not None and config.residual:
            raise
        return None, f"not available, so the paper's form is used: {error}"
    return routers, f"reproduce {router_agreement(routers, trace):.1%} of the recorded choices"
