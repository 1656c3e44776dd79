"""What a call says holds, for the text, for the tokens and for every count: whoever says it, and on every path."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

import prescope
from prescope.core.paths import embedded_model
from prescope.errors import UnsupportedOption
from tests.support.models import prompt, tiny_moe

FAST_LINK = {"device": "cpu", "link_gb_per_s": 50.0}
LENGTH, NEW = 9, 12
IDS = prompt(batch=3, length=LENGTH, seed=1).clamp(min=1)


@pytest.fixture(scope="module")
def model():
    return tiny_moe(pad_token_id=0)


def alone(model, ids=IDS, **settings):
    """Each sequence's new tokens when the plain model has it to itself: then the output ends where it does."""
    settings = {"do_sample": False, **settings}
    rows = [model.generate(row[None], attention_mask=torch.ones_like(row[None]), **settings) for row in ids]
    rows = [row if isinstance(row, torch.Tensor) else row.sequences for row in rows]
    return [row[0, ids.shape[1] :].tolist() for row in rows]


def tokens_of_full_run(model):
    return alone(model, max_new_tokens=NEW, eos_token_id=None)


def check_counts(run, expected):
    """Every figure that has a number of tokens in it, from the sequences' own lengths."""
    assert run.tokens == expected
    metrics, lengths = run.metrics, [len(row) for row in expected]
    assert metrics.output_tokens == sum(lengths) and metrics.batch == len(lengths)
    after_first_s = metrics.end_to_end_s - metrics.ttft_ms / 1e3
    if max(lengths) > 1:
        assert np.isclose(metrics.tpot_ms, 1e3 * after_first_s / (max(lengths) - 1))
        decode_ms = metrics.decode.wall_ms - metrics.decode.warm_up_ms
        rate = (sum(lengths) - len(lengths)) / decode_ms * 1e3
        assert np.isclose(metrics.tokens_per_s, rate)


class EndsAt(StoppingCriteria):
    """Ends a sequence at the first of some tokens; as anybody may write it."""

    def __init__(self, tokens):
        self._tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **_):
        return torch.isin(input_ids[:, -1], self._tokens)


def settings_of(name, full):
    """Settings by name; `full`: what the sequences are without an end."""
    stop, other = full[0][3], full[1][6]
    return {
        "new tokens": {"max_new_tokens": 5},
        "one": {"max_new_tokens": 1},
        "length": {"max_length": LENGTH + 7},
        "the library's default": {},
        "one end": {"max_new_tokens": NEW, "eos_token_id": stop},
        "an end at once": {"max_new_tokens": NEW, "eos_token_id": full[0][0]},
        "several ends": {"max_new_tokens": NEW, "eos_token_id": [stop, other]},
        "an end that is padding too": {"max_new_tokens": NEW, "eos_token_id": stop, "pad_token_id": stop},
        "no end": {"max_new_tokens": NEW, "eos_token_id": -1},
        "at least": {"max_new_tokens": NEW, "min_new_tokens": 6, "eos_token_id": stop},
        "at least, in all": {"max_new_tokens": NEW, "min_length": LENGTH + 6, "eos_token_id": stop},
        "a penalty": {"max_new_tokens": NEW, "repetition_penalty": 1.5, "eos_token_id": other},
        "no repetition": {"max_new_tokens": NEW, "no_repeat_ngram_size": 2},
        "no cache": {"max_new_tokens": NEW, "use_cache": False, "eos_token_id": stop},
        "in chunks": {"max_new_tokens": NEW, "prefill_chunk_size": 4, "eos_token_id": stop},
        "a dict": {"max_new_tokens": NEW, "return_dict_in_generate": True, "eos_token_id": [other]},
    }[name]


NAMES = [
    "new tokens", "one", "length", "the library's default", "one end", "an end at once", "several ends",
    "an end that is padding too", "no end", "at least", "at least, in all", "a penalty", "no repetition", "no cache",
    "in chunks", "a dict",
]  # fmt: skip


#: Beside these the model's own end has a say in the text, and each has an answer of its own to it.
WITH_OWN_END = ("the library's default", "one end", "no end", "at least", "a penalty")


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`")
@pytest.mark.parametrize(
    ("name", "own_end"),
    [
        pytest.param(name, own_end, marks=pytest.mark.slow if own_end and name not in WITH_OWN_END else [])
        for name in NAMES
        for own_end in (False, True)
    ],
)
def test_settings_hold_whoever_gives_them(name, own_end):
    """As keywords, in a config object, and in the model's own config; beside the model's own end or without one."""
    model = tiny_moe(pad_token_id=0)
    full = tokens_of_full_run(model)
    model.generation_config.eos_token_id = full[2][2] if own_end else None
    settings = settings_of(name, full)
    expected = alone(model, **settings)
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        check_counts(engine.generate(IDS, **settings), expected)
        config = GenerationConfig(**settings)
        before = config.to_dict()
        check_counts(engine.generate(IDS, generation_config=config), expected)
        assert config.to_dict() == before, "the caller's object was written into"
        model.generation_config = GenerationConfig(**({"pad_token_id": 0} | settings))
        by_model = engine.generate(IDS)
    check_counts(by_model, alone(model))


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
@pytest.mark.parametrize("by", ["keyword", "object", "model"])
def test_numbers_may_come_as_tensors_and_arrays(kind, by):
    """A tensor of several ends has no truth value; numpy's integers are no `int`."""
    model = tiny_moe(pad_token_id=0)
    full = tokens_of_full_run(model)
    ends, most = [full[0][3], full[1][6]], 7
    expected = alone(model, max_new_tokens=most, eos_token_id=ends)
    given = {"max_new_tokens": kind(most), "eos_token_id": kind(ends), "do_sample": kind(False)}
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        if by == "model":
            model.generation_config.eos_token_id = kind(ends)
            run = engine.generate(IDS, max_new_tokens=most)
        elif by == "object":
            run = engine.generate(IDS, generation_config=GenerationConfig(**given))
        else:
            run = engine.generate(IDS, **given)
        check_counts(run, expected)
        one = engine.generate(IDS[:1], max_new_tokens=most, eos_token_id=np.int64(ends[0]))
        check_counts(one, alone(model, IDS[:1], max_new_tokens=most, eos_token_id=ends[0]))
        with pytest.raises(UnsupportedOption, match="GenerationConfig"):
            engine.generate(IDS, generation_config={"max_new_tokens": 3})


@pytest.mark.parametrize("way", ["keyword", "config"])
def test_an_end_of_none_switches_the_models_own_off(way):
    """In a config object None is "not given", and the model's own stands: as in transformers."""
    model = tiny_moe(pad_token_id=0)
    full = tokens_of_full_run(model)
    model.generation_config.eos_token_id = full[0][3]
    settings = {"max_new_tokens": NEW, "eos_token_id": None}
    given = settings if way == "keyword" else {"generation_config": GenerationConfig(**settings)}
    expected = alone(model, **given) if way == "keyword" else alone(model, max_new_tokens=NEW)
    assert (expected == full) == (way == "keyword")
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        check_counts(engine.generate(IDS, **given), expected)


def test_what_a_config_object_does_not_say_stays_greedy_and_what_it_says_samples(model):
    sampling = {"do_sample": True, "temperature": 1.3, "top_k": 0, "max_new_tokens": NEW, "pad_token_id": 0}

    def seeded(generate, **given):
        torch.manual_seed(3)
        return generate(IDS, attention_mask=torch.ones_like(IDS), **given)

    expected = seeded(model.generate, **sampling)[:, LENGTH:].tolist()
    greedy = alone(model, max_new_tokens=NEW)
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        assert seeded(engine.generate, **sampling).tokens == expected != greedy
        assert seeded(engine.generate, generation_config=GenerationConfig(**sampling)).tokens == expected
        assert engine.generate(IDS, generation_config=GenerationConfig(max_new_tokens=NEW)).tokens == greedy
        three = seeded(engine.generate, num_return_sequences=3, **sampling)
    assert seeded(model.generate, num_return_sequences=3, **sampling)[:, LENGTH:].tolist() == three.tokens
    assert three.metrics.batch == 9 and three.metrics.output_tokens == 9 * NEW


@pytest.mark.parametrize(
    "make",
    [
        lambda stop, other: [EndsAt([stop])],
        lambda stop, other: [EndsAt([stop]), EndsAt([other])],
        lambda stop, other: [EosTokenCriteria(other)],
        lambda stop, other: [MaxLengthCriteria(LENGTH + 4)],
        lambda stop, other: [MaxLengthCriteria(LENGTH + 8), EndsAt([stop, other])],
    ],
)
@pytest.mark.parametrize("own_end", [False, True])
def test_a_sequence_ends_where_a_criterion_of_the_callers_ends_it(make, own_end):
    """Without an end token transformers goes on writing into a row that is over, until all are."""
    model = tiny_moe(pad_token_id=0)
    full = tokens_of_full_run(model)
    model.generation_config.eos_token_id = full[2][2] if own_end else None
    criteria = StoppingCriteriaList(make(full[0][3], full[1][6]))
    expected = alone(model, max_new_tokens=NEW, stopping_criteria=criteria)
    seen = []
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        run = engine.generate(IDS, max_new_tokens=NEW, stopping_criteria=criteria, on_step=seen.append)
        again = engine.generate(IDS, max_new_tokens=NEW, stopping_criteria=list(criteria))
        assert engine.generate(IDS, max_new_tokens=NEW, eos_token_id=None).tokens == full, (
            "nothing stays behind"
        )
    check_counts(run, expected)
    check_counts(again, expected)
    assert seen == [*range(1, max(map(len, expected)) + 1)]


@pytest.mark.parametrize("end", [None, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"num_return_sequences": 2}, {"length_penalty": 2.0}, {"early_stopping": True}]
)
def test_beams_are_the_plain_models_without_their_filling(settings, end):
    model = tiny_moe(pad_token_id=0)
    eos = None if end is None else alone(model, max_new_tokens=NEW)[0][end]
    call = {"max_new_tokens": NEW, "num_beams": 3, "eos_token_id": eos, "do_sample": False, **settings}
    rows = model.generate(IDS, attention_mask=torch.ones_like(IDS), **call)[:, LENGTH:].tolist()
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        run = engine.generate(IDS, **call)
    assert run.tokens == expected
    assert run.metrics.output_tokens == sum(map(len, expected)) and run.metrics.batch == len(expected)


def test_stop_strings_end_text_tokens_and_counts():
    """The rows are as long as when each is alone, and the text is theirs."""
    model = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(embedded_model(), padding_side="left")
    texts = ["The old man looked", "Once upon a time there", "A little girl"]
    encoded = [tokenizer(text, return_tensors="pt") for text in texts]

    def plain(one, **settings):
        out = model.generate(**one, tokenizer=tokenizer, do_sample=False, max_new_tokens=20, **settings)
        return out[0, one["input_ids"].shape[1] :].tolist()

    free = [plain(one) for one in encoded]
    words = [tokenizer.decode(row) for row in free]
    stop = words[0][6:11]
    for strings in (stop, [stop, words[1][9:13]]):
        expected = [plain(one, stop_strings=strings) for one in encoded]
        assert len(expected[0]) < len(free[0]), "nothing was stopped, so nothing is shown"
        with prescope.attach(model, tokenizer=tokenizer, slots=0.5, **FAST_LINK) as engine:
            for given in (
                {"stop_strings": strings},
                {"generation_config": GenerationConfig(stop_strings=strings)},
            ):
                run = engine.generate(texts, max_new_tokens=20, **given)
                check_counts(run, expected)
                assert run.text == tokenizer.batch_decode(expected, skip_special_tokens=True)
    with prescope.attach(model, slots=0.5, **FAST_LINK) as engine:
        with pytest.raises(UnsupportedOption, match="tokenizer"):
            engine.generate([[5, 6]], max_new_tokens=2, stop_strings="x")
        assert engine.generate([[5, 6]], max_new_tokens=2).tokens


def test_the_models_own_generate_is_left_as_it_was(model):
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        run = engine.generate(IDS, max_new_tokens=4)
        assert "_get_stopping_criteria" not in model.__dict__
        with pytest.raises(ZeroDivisionError):
            engine.generate(IDS, max_new_tokens=4, on_step=lambda _: 1 / 0)
        assert "_get_stopping_criteria" not in model.__dict__
    assert dataclasses.asdict(run.metrics)["output_tokens"] == 12


@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": -1},
        {"max_new_tokens": "5"},
        {"max_new_tokens": 3, "num_return_sequences": 2},
        {"max_new_tokens": 3, "pad_token_id": -7, "cache_implementation": "none such"},
    ],
)
def test_settings_that_the_library_refuses_are_refused_by_name_and_the_engine_works_on(settings):
    """A panel, a sweep and the shell take an error of ours for the user's; the library's own was a crash to them."""
    with prescope.attach(tiny_moe(pad_token_id=0), slots=0.5, **FAST_LINK) as engine:
        with pytest.raises(UnsupportedOption, match=next(reversed(settings))) as refused:
            engine.generate(IDS, **settings)
        assert "transformers refuses these settings" in str(refused.value)
        assert len(engine.generate(IDS, max_new_tokens=2).tokens) == len(IDS)
