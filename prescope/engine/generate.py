"""How a run is made: prompts in, settings settled, tokens and evidence out."""

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from ..cache.slots import sort_need
from ..core.jit import said_if_compiled_first
from ..errors import UnsupportedOption
from ..scheduler import schedule_named
from ..scheduler.layer import decide_layer
from ..traces.result import RunResult
from .forwards import depth_of, restore_depth
from .graph import DecodeLoop
from .prompts import Encoder
from .recorder import Recorder
from .recording import put_right, recorded, result_of
from .served import ServedModel
from .stopping import RunProgress, watched_criteria
from .tokenized import NOT_FOR_MODELS

#: What `generate` takes as a setting.
SETTINGS = frozenset(vars(GenerationConfig()))
#: Settings that need the tokenizer while tokens are chosen.
NEED_TOKENIZER = ("stop_strings", "token_healing")


class GenerateSettings(NamedTuple):
    """Settings of one `model.generate`."""

    given: dict[str, Any]  # its arguments, but for the prompts
    in_force: GenerationConfig  # they, over the model's own, over the library's
    names: set[str]  # those that are not the library's, and arguments that are no settings

    @property
    def eos(self) -> list[int]:
        """Ids that end a sequence. Raises UnsupportedOption if they are none."""
        eos = self.in_force.eos_token_id
        try:
            return [] if eos is None else [int(token) for token in np.atleast_1d(eos)]
        except (TypeError, ValueError) as error:
            raise UnsupportedOption(
                f"eos_token_id is {eos!r:.60}; it is a token id, a list of them, or None for no end"
            ) from error

    def length(self, prompt_length: int) -> int | None:
        """Most tokens of a sequence, prompt included; None if neither call nor model says."""
        if self.in_force.max_new_tokens is not None:
            return prompt_length + int(self.in_force.max_new_tokens)
        return int(self.in_force.max_length) if "max_length" in self.names else None


def generate(
    engine: ServedModel,
    prompts: Any,
    attention_mask: Any,
    inputs_embeds: Any,
    on_step: Callable[[int], None] | None,
    keywords: Mapping[str, Any],
) -> RunResult:
    """`Engine.generate`; call it in a turn."""
    _require_generate(engine.model)
    prompts, keywords = _only_once(prompts, keywords)
    settings = settle(engine, keywords)
    encoder = encoder_of(engine, settings.in_force.pad_token_id)
    encoded = encoder.encode(
        prompts, attention_mask, inputs_embeds, goes_on=keywords.get("past_key_values") is not None
    )
    claim = engine.turn.holder
    assert claim is not None
    progress = RunProgress(
        encoded.num_echoed,
        settings.eos,
        settings.in_force.pad_token_id,
        on_step or _ignore,
        lambda: claim.is_cancelled,
    )
    loop = engine.decoder.loop(
        engine.config,
        encoded.batch,
        settings.length(encoded.length),
        settings.names | (encoded.inputs.keys() - {"input_ids", "attention_mask"}),
        progress,
    )
    if engine.runner.forced is not None:
        engine.runner.forced.restart()
    arguments = encoded.inputs | _with_pad(engine, settings, is_masked="attention_mask" in encoded.inputs)
    given = {name: settings.given.get(name, value) for name, value in keywords.items()}
    said = {name: value for name, value in given.items() if not isinstance(value, torch.Tensor)}

    def run(recorder: Recorder) -> RunResult:
        with said_if_compiled_first(_decides(engine), "what decides about experts"):
            tokens = progress.tokens(_sequences(engine, arguments, progress, loop, recorder))
        result = result_of(
            engine,
            recorder,
            said,
            batch=len(tokens),
            output_tokens=sum(map(len, tokens)),
            longest=max(map(len, tokens)),
        )
        return replace(result, tokens=tokens)

    result = recorded(engine, run)
    result.notes.extend(_notes(engine, loop))
    if isinstance(loop, DecodeLoop):
        graphs = {"recorded": loop.num_recorded, "prompt": loop.has_prompt, **engine.decoder.describe()}
        result.config["graphs"] = graphs
    if claim.is_cancelled:
        result.notes.append(f"cancelled after {len(result.steps)} steps")
    tokenizer, tokens = engine.tokenizer, result.tokens
    text = tokenizer.batch_decode(tokens, skip_special_tokens=True) if tokenizer else [""] * len(tokens)
    hardware = {**result.hardware, "label": _label(engine, loop, result.label)}
    return replace(result, text=text, hardware=hardware)


def _decides(engine: ServedModel) -> Callable[..., Any]:
    """The compiled function that every layer of a prompt or a step calls."""
    return sort_need if engine.runner.schedule_runner is None else decide_layer


def _sequences(
    engine: ServedModel,
    arguments: dict[str, Any],
    progress: RunProgress,
    loop: DecodeLoop | str,
    recorder: Recorder,
) -> torch.Tensor:
    """(B, T) what `model.generate` returns."""
    model, runner, forwards = engine.model, engine.runner, engine.forwards
    patched, former, depth = model.__dict__, runner.recorder, depth_of(model)
    try:
        runner.recorder, forwards.progress = recorder, progress
        if isinstance(loop, DecodeLoop):
            output = model.generate(**arguments, custom_generate=loop, past_key_values=loop.cache)
        else:
            patched["_get_stopping_criteria"] = watched_criteria(model, progress)
            output = model.generate(**arguments)
        engine.reasons["decode"] = loop.reason if isinstance(loop, DecodeLoop) else loop
    except BaseException as error:
        put_right(engine, error)
        raise
    finally:
        runner.recorder, forwards.progress = former, None
        patched.pop("_get_stopping_criteria", None)
        restore_depth(model, depth)
    sequences: torch.Tensor = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences


def _why_slow(engine: ServedModel, loop: DecodeLoop | str) -> str:
    """Why steps did not run from a graph although nobody has chosen that; "" if they did."""
    if not engine.runner.device.captures_steps or engine.config.decode == "layered":
        return ""
    return loop.removeprefix("layered: ") if isinstance(loop, str) else loop.problem


def _label(engine: ServedModel, loop: DecodeLoop | str, label: str) -> str:
    """Where a run's figures come from: with what it fell back to, so that every figure says it."""
    schedule_runner = engine.runner.schedule_runner
    predicting = None if schedule_runner is None else schedule_runner.predicting
    fallen = [
        (bool(_why_slow(engine, loop)), "decode layer by layer"),
        (predicting is not None and bool(predicting.problem), "not all steps with predictions"),
    ]
    return ", ".join([label, *(text for is_so, text in fallen if is_so)])


def _notes(engine: ServedModel, loop: DecodeLoop | str) -> list[str]:
    notes = []
    if problem := _why_slow(engine, loop):
        notes.append(f"decode steps ran layer by layer: {problem}")
    if isinstance(loop, DecodeLoop) and loop.prompt_problem:
        notes.append(f"the prompt was launched kernel by kernel: {loop.prompt_problem}")
    if engine.chosen_cache == "auto" and engine.config.cache != schedule_named(engine.config.schedule).cache:
        notes.append(engine.reasons["cache"])
    if engine.runner.forced is not None:
        notes.append("decode steps were routed by a trace, not by the model: the tokens mean nothing")
    return notes


def _require_generate(model: PreTrainedModel) -> None:
    """Raise UnsupportedOption for a model that cannot be asked for the next token, with what can be called instead."""
    if isinstance(model, GenerationMixin):
        return
    has, call = (
        ("a generate of another kind", "model.generate(...)")
        if model.can_generate()
        else ("no generate", "model(...)")
    )
    raise UnsupportedOption(
        f"{type(model).__name__} has {has}, and engine.generate goes by the one that adds token by token; call {call} "
        f"inside `with engine.record() as results:`, which leaves the same evidence"
    )


# -- settings ----------------------------------------------------------------------------------------------------------


def _only_once(prompts: Any, keywords: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Prompts by whatever name, as `model.generate` takes them too, and the other arguments."""
    others = dict(keywords)
    found = [others.pop(name, None) for name in ("input_ids", "inputs")]
    given = [value for value in (prompts, *found) if value is not None]
    if len(given) > 1:
        raise UnsupportedOption("prompts are given twice; pass them once, as the first argument")
    return (given[0] if given else None), others


def settle(engine: ServedModel, keywords: Mapping[str, Any]) -> GenerateSettings:
    """The settings of a run: greedy, unless the call or its `generation_config` says otherwise.

    Raises:
        UnsupportedOption: one needs a tokenizer and there is none, or transformers refuses one.
    """
    model, given = engine.model, {name: _plain(name, value) for name, value in keywords.items()}
    config = given.pop("generation_config", None)
    if config is None:
        given.setdefault("do_sample", False)
    elif not isinstance(config, GenerationConfig):
        raise UnsupportedOption(
            f"generation_config is a {type(config).__name__}; it is a transformers.GenerationConfig"
        )
    else:
        config = _of_plain_values(deepcopy(config))
        if config.do_sample is None:
            config.do_sample = False
    try:
        in_force, others = model._prepare_generation_config(config, **given)
    except (ValueError, TypeError) as error:  # max_new_tokens=0, say, or "5"
        told = {name: value for name, value in given.items() if name in SETTINGS}
        said = ", ".join(f"{name}={value!r:.60}" for name, value in told.items())
        raise UnsupportedOption(f"transformers refuses these settings ({said}): {error}") from error
    in_force = _of_plain_values(in_force)
    standard = GenerationConfig()
    standard.update(**standard._get_default_generation_params(), defaults_only=True)
    defaults = standard.to_dict()
    names = {
        name
        for name, value in defaults.items()
        if not name.startswith("_") and (getattr(in_force, name) or None) != (value or None)  # False is None
    }
    if config is not None:
        given["generation_config"] = config
    for name in NEED_TOKENIZER:
        if getattr(in_force, name):
            if given.setdefault("tokenizer", engine.tokenizer) is None:
                raise UnsupportedOption(f"{name} needs a tokenizer; give it as tokenizer=... with the call")
            names.add(name)
    return GenerateSettings(
        given, in_force, names | {name for name, value in others.items() if value is not None}
    )


def _plain(name: str, value: Any) -> Any:
    """A setting of numbers as Python's own, where it comes as an array or a tensor; anything else as it is.

    As a tensor such a setting has no truth value, and cannot be written into a result.
    """
    return (
        value.tolist()
        if name in SETTINGS and isinstance(value, torch.Tensor | np.ndarray | np.generic)
        else value
    )


def _of_plain_values(config: GenerationConfig) -> GenerationConfig:
    for name, value in vars(config).items():
        setattr(config, name, _plain(name, value))
    return config


def _with_pad(engine: ServedModel, settings: GenerateSettings, is_masked: bool) -> dict[str, Any]:
    """The arguments, with the tokenizer's pad token where neither call nor model has one.

    Without a mask `generate` infers one from its pad token, so it must find no other than the plain model's.
    """
    pad = None if engine.tokenizer is None else engine.tokenizer.pad_token_id
    if not is_masked or pad is None or settings.in_force.pad_token_id is not None:
        return settings.given
    config = settings.given.get("generation_config")
    if config is None:
        return settings.given | {"pad_token_id": pad}
    config.pad_token_id = pad  # the copy that `settle` made
    return settings.given


def encoder_of(engine: ServedModel, pad: int | None = None) -> Encoder:
    """Encodes prompts for an engine's model; `pad` where its tokenizer has no such token."""
    tokenizer, model = engine.tokenizer, engine.model
    pads = (None if tokenizer is None else tokenizer.pad_token_id, pad, 0)
    vocabulary, width = model.get_input_embeddings().weight.shape
    return Encoder(
        tokenizer,
        engine.name,
        engine.runner.device.torch_device,
        vocabulary=vocabulary,
        width=width,
        pad=next(int(pad) for pad in pads if pad is not None),
        unwanted=NOT_FOR_MODELS - inspect.signature(model.forward).parameters.keys(),
    )


def _ignore(tokens: int) -> None:
    """Nobody asked to be told."""
