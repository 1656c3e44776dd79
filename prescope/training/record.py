"""Record a model's routing: router inputs and choices for prompts, and for text the model writes itself.

Shapes: as `RoutingTrace`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..core.files import parse_object, read_lines, require_file
from ..core.numbers import require_count, require_seed
from ..core.paths import embedded_prompts, user_path
from ..core.waiting import waiting_bar
from ..engine.engine import Engine
from ..engine.generate import encoder_of
from ..engine.load import attach, load
from ..engine.recorder import NOT_FINITE
from ..engine.tokenized import is_tokenized
from ..errors import BadTrace, UnsupportedOption
from ..predictor.base import TooFewPrompts
from ..traces.routing import RoutingTrace

Prompt = str | Sequence[int]
#: One list, or one list for each domain.
PromptSet = Sequence[Prompt] | Mapping[str, Sequence[Prompt]]

#: Tokens of one forward pass when recording.
RECORD_TOKENS = 1024
#: Texts the model writes side by side, and tokens of each at most.
OWN_BATCH, OWN_TOKENS = 128, 128
OWN_DOMAIN = "own text"


def own_prompts(*domains: str) -> dict[str, list[str]]:
    """The prompts that come with prescope, by domain (all, or those named); "ood_..." are not in tiny-moe's training.

    Raises:
        UnsupportedOption: there is no such domain.
    """
    found = read_prompts(embedded_prompts())
    unknown = sorted(set(domains) - found.keys())
    if unknown:
        raise UnsupportedOption(f"no prompts of domain {', '.join(unknown)}; there are {', '.join(found)}")
    return {name: found[name] for name in domains} if domains else found


def read_prompts(path: str | Path) -> dict[str, list[str]]:
    """Prompts of a file, by domain: a `.jsonl` of objects, or a text a line.

    An object holds its text as "text", as "prompt", or as the first of "turns", and may name its "domain".

    Raises:
        UnsupportedOption: a line is none of these; with its number.
        FileNotFoundError: there is no such file.
    """
    path = user_path(path)
    require_file(path, UnsupportedOption)
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_lines(path, UnsupportedOption, "save it as UTF-8"), 1):
        if not line.strip():
            continue
        domain, text = (
            _prompt_of(line, f"{path}, line {number}") if path.suffix == ".jsonl" else ("all", line)
        )
        found.setdefault(domain, []).append(text)
    return found


def _prompt_of(line: str, where: str) -> tuple[str, str]:
    """Domain and text of one line of a .jsonl."""
    remedy = 'write objects with "text", "prompt" or "turns", one a line'
    prompt = parse_object(line, where, UnsupportedOption, remedy)
    turns = prompt.get("turns")
    text = prompt.get("text", prompt.get("prompt", turns[0] if isinstance(turns, list) and turns else None))
    if not isinstance(text, str):
        raise UnsupportedOption(f"{where} holds no text; {remedy}")
    return str(prompt.get("domain", "all")), text


def record_trace(
    engine: Engine,
    prompts: PromptSet,
    *,
    max_tokens: int = 128,
    new_tokens: int = 0,
    seed: int = 0,
    batch_tokens: int = RECORD_TOKENS,
) -> RoutingTrace:
    """Routing and router inputs of prompts, each read in one forward pass, and of tokens sampled after them.

    Prompts of similar length share a pass. The trace's `prompts` say domain, number and tokens of each sequence.
    Sampled at temperature 1, since greedy text of a small model repeats itself; the same seed gives the same text.

    Raises:
        UnsupportedOption: a prompt is neither a text, with a tokenizer for it, nor token ids of the model; or a number
            is none.
        TooFewPrompts: there is none with a token in it.
    """
    for name, value, least in (
        ("max_tokens", max_tokens, 1), ("new_tokens", new_tokens, 0), ("batch_tokens", batch_tokens, 1)
    ):  # fmt: skip
        require_count(name, value, least)
    require_seed(seed)
    items = sorted(_tokenized(engine, prompts, max_tokens), key=lambda item: len(item["tokens"]))
    if not items:
        raise TooFewPrompts("no prompt has a token in it; give texts or lists of token ids")
    parts: list[RoutingTrace] = []
    bar = waiting_bar(sum(len(item["tokens"]) + new_tokens for item in items), "recording", "token")
    with bar, _recording_inputs(engine), _seeded(seed, device_of(engine)):
        while items:
            # Sampling takes a step for each token, whatever the batch: there the batch is what counts.
            size = OWN_BATCH if new_tokens else max(1, batch_tokens // len(items[-1]["tokens"]))
            batch, items = items[-size:], items[:-size]
            tokens = [item["tokens"] for item in batch]
            trace = _sampled(engine, tokens, new_tokens, bar) if new_tokens else _read(engine, tokens)
            bar.update(sum(map(len, tokens)))
            parts.append(replace(trace, prompts=batch))
    return RoutingTrace.concat(parts)


def own_text(engine: Engine, num_tokens: int, *, length: int = OWN_TOKENS, seed: int = 0) -> RoutingTrace:
    """Routing of text that the model writes itself, each from one random token of its vocabulary.

    The broadest text there is without a corpus: a model writes about everything it was trained on. A predictor that was
    trained on dialogue alone lost 0.06 to 0.19 of recall against the early router on code; with as much own text
    beside it, it won 0.02 to 0.07 (tiny-moe; docs/log/predictor.md).

    Args:
        num_tokens: in all, about; at least one text. `length`: tokens of each.

    Raises:
        UnsupportedOption: a number is none.
    """
    require_count("num_tokens", num_tokens, 0)
    require_count("length", length)
    require_seed(seed)
    settings = engine.model.config.get_text_config()
    special = set(engine.tokenizer.all_special_ids) if engine.tokenizer is not None else set()
    starts = np.array([token for token in range(settings.vocab_size) if token not in special])
    rng = np.random.default_rng(seed)
    parts: list[RoutingTrace] = []
    recorded = 0
    bar = waiting_bar(max(length, num_tokens), "writing text to learn from", "token")
    with bar, _recording_inputs(engine), _seeded(seed, device_of(engine)):
        while recorded < max(1, num_tokens):
            count = max(1, min(OWN_BATCH, round((num_tokens - recorded) / length)))
            tokens = [[int(token)] for token in rng.choice(starts, count)]
            trace = _sampled(engine, tokens, length, bar)
            known = [{"domain": OWN_DOMAIN, "id": len(parts) * OWN_BATCH + i} for i in range(count)]
            parts.append(replace(trace, prompts=known))
            recorded += len(trace)
    return RoutingTrace.concat(parts)


def by_domain(prompts: PromptSet) -> dict[str, list[Prompt]]:
    """Prompts as lists, by domain; those that name none are of "all".

    Raises:
        UnsupportedOption: there is one text where a list of texts should be, or something else that is no list.
    """
    if is_tokenized(prompts):
        raise UnsupportedOption(
            'prompts are what a tokenizer returns; give a list with the "input_ids" of each text'
        )
    found: dict[str, list[Prompt]] = {}
    for domain, texts in prompts.items() if isinstance(prompts, Mapping) else [("all", prompts)]:
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise UnsupportedOption(
                f"prompts of domain {domain!r} are a {type(texts).__name__}: {texts!r:.60}; give a list of texts, or "
                f"of lists of token ids"
            )
        found[str(domain)] = list(texts)
    return found


def _tokenized(engine: Engine, prompts: PromptSet, max_tokens: int) -> list[dict[str, Any]]:
    encoder, position = encoder_of(engine), 0
    items: list[dict[str, Any]] = []
    for domain, texts in by_domain(prompts).items():
        for text in texts:
            tokens = encoder.row(text, position, max_tokens)
            position += 1
            if tokens:
                items.append({"domain": domain, "id": len(items), "tokens": tokens})
    return items


def _read(engine: Engine, batch: list[list[int]]) -> RoutingTrace:
    longest = max(len(tokens) for tokens in batch)
    device = device_of(engine)
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in batch], device=device)
    mask = torch.tensor(
        [[1] * len(tokens) + [0] * (longest - len(tokens)) for tokens in batch], device=device
    )
    with engine.record() as results, torch.no_grad():
        engine.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return _trace_of(results[0])


def _sampled(engine: Engine, batch: list[list[int]], new_tokens: int, bar: tqdm) -> RoutingTrace:
    """Temperature 1, nothing cut off, and no end: the text goes on over the end of a document.

    Args:
        bar: counts the new tokens of all texts.
    """
    sampling: dict[str, Any] = {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "eos_token_id": None,
    }

    def count(_so_far: int) -> None:
        bar.update(len(batch))

    return _trace_of(engine.generate(batch, max_new_tokens=new_tokens, on_step=count, **sampling))


def _trace_of(result: Any) -> RoutingTrace:
    spoilt = [note for note in result.notes if NOT_FINITE in note]
    if spoilt:
        raise BadTrace(f"nothing can be learned from this run: {spoilt[0]}")
    trace = result.trace
    assert isinstance(trace, RoutingTrace), "record_routing was switched on"
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
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Sampling draws from torch's global generators: seeded inside, given back as they were."""
    on_device = device.type != "cpu"
    devices = [device] if on_device else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if on_device else "cpu"):
        torch.manual_seed(seed)
        yield


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
    """Where the model computes."""
    return engine.model.device
