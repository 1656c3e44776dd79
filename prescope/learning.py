"""Record, train, judge: `train_predictor(model, prompts)` in one call.

The glue between an engine and the predictors: it runs prompts through the model, takes the router inputs and the routers
out of it, and hands plain tensors to `prescope.predictor`.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from .engine import Engine, attach, load
from .errors import UnsupportedOption
from .hf import MoELayer, find_moe_layers
from .predictor.base import BadState, Shape, TooFewPrompts, require_inputs, used_mask
from .predictor.baselines import Chance, EarlyRouter, Frequency, Oracle, PreviousToken, Routers, Transition
from .predictor.groups import LayerGroups
from .predictor.llapor import Llapor, LlaporConfig
from .predictor.score import ScoreCard, difference, score
from .predictor.train import MIN_PROMPTS, Progress, TrainConfig, rows_of, train
from .routing import RoutingTrace

Prompt = str | Sequence[int]
#: One list, or one list for each domain.
PromptSet = Sequence[Prompt] | Mapping[str, Sequence[Prompt]]

#: Tokens of one forward pass when recording.
RECORD_TOKENS = 1024
#: Share of the recorded choices that routers taken from a model must reproduce on the recorded inputs.
MIN_AGREEMENT = 0.9
AGREEMENT_ROWS = 2048


class TrainedPredictor(NamedTuple):
    """What `train_predictor` returns."""

    predictor: Llapor
    cards: dict[
        str, ScoreCard
    ]  # by predictor: the trained one's and those of the baselines, on the same prompts
    history: list[Progress]
    groups: LayerGroups
    trace: RoutingTrace  # recorded for training
    judged_on: str  # what the cards were measured on, in words
    seconds: float  # wall-clock of everything, on this machine

    @property
    def card(self) -> ScoreCard:
        """The trained predictor's."""
        return self.cards[self.predictor.name]

    def table(self) -> pd.DataFrame:
        """One row for each predictor and lookahead: recall@K with its interval, and less the early router's."""
        return comparison(self.cards, against="early router")


def train_predictor(
    model: Any,
    prompts: PromptSet,
    *,
    test_prompts: PromptSet | None = None,
    config: LlaporConfig | None = None,
    training: TrainConfig | None = None,
    max_tokens: int = 128,
    new_tokens: int = 0,
    path: str | Path | None = None,
    checkpoint: str | Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    device: str | None = None,
) -> TrainedPredictor:
    """Train a LLaPor predictor for a model on prompts, and judge it.

    Records the model's routing on the prompts, finds the layer groups, trains all layers at once, calibrates, and
    scores the result beside the baselines on prompts it was not trained on.

    Args:
        model: an `Engine`, a transformers MoE model, or a folder or hub id. An engine's settings stay as they are.
        prompts: texts or token id lists, some dozens or more; as a dict, by domain.
        test_prompts: to judge by, of other domains for instance; held-out prompts of `prompts` when not given.
        config: form of the networks. Without one, the residual variant, or the paper's if the model's routers cannot be
            taken out (the reason is in `predictor.tag.notes`).
        max_tokens: of each prompt. `new_tokens`: to generate and record after each.
        path: where to save the predictor; an existing file is replaced when training has ended well, never before.
        checkpoint, on_progress: see `predictor.train.train`.
        device: to train on; the engine's when not given.

    Raises:
        TooFewPrompts: fewer than 4. BadState, BadTrace: the states are NaN or missing. Nothing is overwritten.
    """
    started = time.perf_counter()
    _require_prompts(prompts)
    with opened(model) as engine:
        device = device or str(device_of(engine))
        trace = record_trace(engine, prompts, max_tokens=max_tokens, new_tokens=new_tokens)
        routers, reason = _routers_or_reason(engine, trace, config)
        config = config or (LlaporConfig() if routers is not None else LlaporConfig.paper())
        result = train(
            trace,
            config=config,
            training=training,
            routers=routers,
            device=device,
            checkpoint=checkpoint,
            on_progress=on_progress,
        )
        if test_prompts is not None:
            test = record_trace(engine, test_prompts, max_tokens=max_tokens, new_tokens=new_tokens)
            judged_on = "test prompts"
        else:
            test = rows_of(
                trace, np.sort(np.concatenate([result.split.validation, result.split.calibration]))
            )
            judged_on = "held-out prompts (half of them chose the epoch, half fitted the calibration)"
    predictor = result.predictor
    predictor.tag.notes.update(routers=reason, judged_on=judged_on, groups=result.groups.reason)
    known = rows_of(trace, result.split.train)
    cards = {
        p.name: score(p, test, groups=result.groups)
        for p in [predictor, *baselines(known, routers, predictor)]
    }
    if path is not None:
        predictor.save(path)
    return TrainedPredictor(
        predictor, cards, result.history, result.groups, trace, judged_on, time.perf_counter() - started
    )


def baselines(trace: RoutingTrace, routers: Routers | None, like: Llapor) -> list[Any]:
    """All baselines and controls for a model; those that count are fitted on `trace`."""
    shape, lookahead = Shape.of(trace), like.lookahead
    found: list[Any] = [
        Frequency(trace, lookahead),
        PreviousToken(shape, lookahead),
        Transition(trace, lookahead),
        Oracle(shape, lookahead),
        Chance(shape, lookahead),
    ]
    if routers is not None:
        early = EarlyRouter(shape, routers.to(like.device), lookahead)
        early.calibrate(trace)
        found.insert(0, early)
    return found


def comparison(cards: Mapping[str, ScoreCard], *, against: str, domain: str | None = None) -> pd.DataFrame:
    """Recall@K of each card by lookahead, with 95 % intervals over prompts, and its difference to one of them."""
    rows = []
    for name, card in cards.items():
        for ahead in card.lookaheads:
            recall = card.recall_interval(ahead, domain=domain)
            row = {
                "predictor": name,
                "lookahead": ahead,
                "recall": recall.value,
                "low": recall.low,
                "high": recall.high,
            }
            if against in cards and name != against:
                gain = difference(card, cards[against], ahead, domain=domain)
                row |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
            rows.append(row)
    return pd.DataFrame(rows)


# -- recording -------------------------------------------------------------------------------------------------


def record_trace(
    engine: Engine,
    prompts: PromptSet,
    *,
    max_tokens: int = 128,
    new_tokens: int = 0,
    batch_tokens: int = RECORD_TOKENS,
) -> RoutingTrace:
    """Routing and router inputs of prompts, each read in one forward pass, and of tokens generated after them.

    Prompts of similar length share a pass. The trace's `prompts` say domain, number and tokens of each sequence.

    Raises:
        UnsupportedOption: a text without a tokenizer.
        TooFewPrompts: there is none with a token in it.
    """
    items = sorted(_tokenized(engine, prompts, max_tokens), key=lambda item: len(item["tokens"]))
    if not items:
        raise TooFewPrompts("no prompt has a token in it; give texts or lists of token ids")
    parts = []
    with _recording_inputs(engine):
        while items:
            size = max(1, batch_tokens // len(items[-1]["tokens"]))
            batch, items = items[-size:], items[:-size]
            parts.append(
                replace(_recorded(engine, [item["tokens"] for item in batch], new_tokens), prompts=batch)
            )
    return RoutingTrace.concat(parts)


def _tokenized(engine: Engine, prompts: PromptSet, max_tokens: int) -> list[dict[str, Any]]:
    by_domain = prompts if isinstance(prompts, Mapping) else {"all": prompts}
    items = []
    for domain, texts in by_domain.items():
        for text in texts:
            if isinstance(text, str):
                if engine.tokenizer is None:
                    raise UnsupportedOption(
                        f"{engine.name} has no tokenizer; pass lists of token ids instead of text"
                    )
                text = engine.tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]
            tokens = [int(token) for token in text][:max_tokens]
            if tokens:
                items.append({"domain": domain, "id": len(items), "tokens": tokens})
    return items


def _recorded(engine: Engine, batch: list[list[int]], new_tokens: int) -> RoutingTrace:
    if new_tokens:
        trace = engine.generate(batch, max_new_tokens=new_tokens).trace
    else:
        longest = max(len(tokens) for tokens in batch)
        device = device_of(engine)
        ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in batch], device=device)
        mask = torch.tensor(
            [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch], device=device
        )
        with engine.record() as results, torch.no_grad():
            engine.model(input_ids=ids, attention_mask=mask, use_cache=False)
        trace = results[0].trace
    assert trace is not None, "record_routing was switched on"
    return trace


@contextmanager
def _recording_inputs(engine: Engine) -> Iterator[None]:
    """Router inputs are kept inside, the timeline is not."""
    former = engine.config
    engine.config = replace(former, record_routing=True, record_inputs=True, events=False)
    try:
        yield
    finally:
        engine.config = former


@contextmanager
def opened(model: Any) -> Iterator[Engine]:
    """An engine for whatever a user calls a model; detached again if it was made here."""
    if isinstance(model, Engine):
        yield model
        return
    engine = load(model, slots=1.0) if isinstance(model, str | Path) else attach(model, slots=1.0)
    with engine:
        yield engine


def device_of(engine: Engine) -> torch.device:
    """Where the model's dense part is: experts are on `meta` while an engine serves them."""
    return next(p.device for p in engine.model.parameters() if not p.is_meta)


def _require_prompts(prompts: PromptSet) -> None:
    """Fail before minutes are spent on recording."""
    groups = prompts.values() if isinstance(prompts, Mapping) else [prompts]
    count = sum(len(texts) for texts in groups)
    if isinstance(prompts, str) or count < MIN_PROMPTS:
        given = "one text" if isinstance(prompts, str) else f"{count} prompts"
        raise TooFewPrompts(
            f"training got {given}; give a list of {MIN_PROMPTS} or more, some dozens of different texts are better"
        )


# -- routers ---------------------------------------------------------------------------------------------------


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
        torch.zeros(len(layers), E, D),
        torch.zeros(len(layers), E),
        torch.zeros(len(layers), E),
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
            f"the routers found in {engine.name} choose {agreement:.0%} of the recorded experts, {MIN_AGREEMENT:.0%} are "
            f"asked for: this family computes its choice in another way; train with config=LlaporConfig.paper()"
        )
    return best


def router_agreement(routers: Routers, trace: RoutingTrace) -> float:
    """Share of the recorded choices that the routers make on the recorded inputs of the same layer."""
    inputs = require_inputs(trace, "the routers' agreement")
    real = np.flatnonzero(trace.position >= 0)
    rows = real[np.linspace(0, len(real) - 1, min(len(real), AGREEMENT_ROWS)).astype(int)]
    used = torch.from_numpy(used_mask(trace.expert_ids[rows], trace.num_experts))
    hits = 0
    for layer in range(trace.num_layers):
        choice = routers.choice(layer, torch.from_numpy(inputs[rows, layer]).float())
        hits += int(used[:, layer].gather(1, choice.topk(trace.top_k, dim=1).indices).sum())
    return hits / max(int(used.sum()), 1)


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


def _routers_or_reason(
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
