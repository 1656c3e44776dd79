"""Phase and position of every token come from the cache and the run, whatever drives the model."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

import prescope
from prescope.errors import UnsupportedOption
from prescope.scheduler.costs import LayerCosts
from prescope.traces.events import PHASES
from tests.support.models import plain_tokens, prompt, tiny_moe

FAST_LINK = {"device": "cpu", "link_gb_per_s": 50.0}
COSTS = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, source="made up for a test")
REPEATED = prompt(length=6).repeat(1, 3)


@pytest.fixture(scope="module")
def model():
    return tiny_moe(pad_token_id=0)


@pytest.fixture(scope="module")
def engine(model):
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        yield engine


def phases(run):
    return "".join(phase[0] for phase in run.steps["phase"])


def positions(run, sequence=0):
    return run.trace.position[run.trace.sequence == sequence].tolist()


DRAFTS = {
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 3},
    "a draft model": lambda: {"assistant_model": tiny_moe(seed=3, num_hidden_layers=1)},
    "a good draft model": lambda: {"assistant_model": tiny_moe()},
}


@pytest.mark.parametrize("schedule", ["on-demand", "fiddler"])
@pytest.mark.parametrize("way", DRAFTS)
def test_verifying_a_draft_is_decoding(way, schedule):
    model = tiny_moe(pad_token_id=0)
    expected = plain_tokens(model, REPEATED, new=16)
    settings = {"schedule": schedule, "costs": COSTS, "cpu_threads": 0}
    with prescope.attach(model, slots=6, **settings, **FAST_LINK) as engine:
        told = []
        run = engine.generate(REPEATED, max_new_tokens=16, on_step=told.append, **DRAFTS[way]())
    assert run.tokens == expected
    assert told == sorted(set(told)) and told[-1] == 16, (
        "proposed tokens are nobody's until they are accepted"
    )
    assert phases(run) == "p" + "d" * (len(run.steps) - 1)
    assert (run.layers["phase"] == run.layers["step"].map(run.steps["phase"])).all()
    metrics = run.metrics
    assert 0 < metrics.ttft_ms < 1e3 * metrics.end_to_end_s
    assert metrics.tpot_ms == pytest.approx((1e3 * metrics.end_to_end_s - metrics.ttft_ms) / 15)
    assert max(positions(run)) < 18 + 16 + 5
    # A token that was refused is followed by another one at the same place.
    for step in run.trace.steps:
        rows = run.trace.position[run.trace.step == step]
        assert rows.tolist() == [*range(rows[0], rows[0] + len(rows))]
    firsts = [run.trace.position[run.trace.step == step][0] for step in run.trace.steps]
    assert sorted(set(firsts)) == firsts, "each verification begins behind what was accepted before"


def test_a_draft_by_the_models_own_first_layer_is_told_apart():
    model = tiny_moe(pad_token_id=0)
    expected, told = plain_tokens(model, REPEATED, new=16), []
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        run = engine.generate(REPEATED, max_new_tokens=16, assistant_early_exit=1, on_step=told.append)
    assert run.tokens == expected
    assert told == sorted(set(told)) and told[-1] == 16
    assert phases(run) == "pp" + "d" * (len(run.steps) - 2), "the draft reads the prompt too"


@pytest.mark.parametrize("early_exit", [1, 2])
def test_a_draft_by_the_models_own_first_layers_is_told_apart_in_a_recording_too(early_exit):
    """There the draft reads what was accepted several tokens at a time; a chat that goes on behind it is a prompt."""
    model, cache = tiny_moe(pad_token_id=0), DynamicCache()
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        with engine.record() as results:
            model.generate(
                REPEATED, attention_mask=torch.ones_like(REPEATED), max_new_tokens=16, do_sample=False,
                assistant_early_exit=early_exit,
            )  # fmt: skip
        with engine.record() as after:
            model(prompt(), past_key_values=cache)
            model(prompt(length=3), past_key_values=cache, logits_to_keep=1)
    run = results[0]
    assert phases(run) == "pp" + "d" * (len(run.steps) - 2)
    assert run.metrics.ttft_ms < 1e3 * run.metrics.end_to_end_s / 2
    assert phases(after[0]) == "pp"


@pytest.mark.parametrize("way", DRAFTS)
def test_the_same_in_a_recording_of_the_models_own_generate(engine, model, way):
    with engine.record() as results:
        model.generate(
            REPEATED,
            attention_mask=torch.ones_like(REPEATED),
            max_new_tokens=16,
            do_sample=False,
            **DRAFTS[way](),
        )
    run = results[0]
    assert phases(run) == "p" + "d" * (len(run.steps) - 1) and len(run.steps) > 1
    assert run.metrics.ttft_ms < 1e3 * run.metrics.end_to_end_s


@pytest.mark.parametrize("chunk", [1, 4, 5, 9])
def test_a_prompt_read_in_chunks_is_a_prompt(engine, model, chunk):
    """The last chunk may be a single token."""
    ids = prompt()
    run = engine.generate(ids, max_new_tokens=4, prefill_chunk_size=chunk)
    assert run.tokens == plain_tokens(model, ids, new=4)
    assert phases(run) == "p" * -(-9 // chunk) + "ddd"
    assert positions(run) == [*range(12)]


@pytest.mark.parametrize("length", [1, 2])
def test_a_prompt_of_one_token_is_a_prompt(engine, length):
    with engine.record() as results, torch.no_grad():
        for seed in range(3):
            engine.model(prompt(length=length, seed=seed))
    assert phases(results[0]) == "ppp"
    assert phases(engine.generate(prompt(length=length), max_new_tokens=3)) == "pdd"


def test_who_keeps_no_cache_decodes_all_the_same(engine, model):
    run = engine.generate(prompt(), max_new_tokens=4, use_cache=False)
    assert run.tokens == plain_tokens(model, prompt(), new=4)
    assert phases(run) == "pddd"
    assert positions(run) == [i for length in range(9, 13) for i in range(length)]
    assert run.metrics.tpot_ms > 0 and run.metrics.ttft_ms < 1e3 * run.metrics.end_to_end_s


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_the_same_in_a_recording_of_who_keeps_no_cache(engine, model, how):
    """Nobody told it of a run: that a text goes on is seen from the text. Beams go on with each other's."""
    ids = prompt(batch=2).clamp(min=1)
    with engine.record() as results:
        for _ in range(2):
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=4,
                do_sample=False,
                use_cache=False,
                **how,
            )
    run = results[0]
    assert phases(run) == "pdddpddd"
    assert positions(run) == 2 * [i for length in range(9, 13) for i in range(length)]
    assert run.metrics.ttft_ms < 1e3 * run.metrics.end_to_end_s


@torch.no_grad()
def test_a_text_of_its_own_is_a_prompt_however_long(engine, model):
    """One token longer than the text before, but another text; or the same again; or of a batch only one goes on."""
    ids = prompt(length=5)
    longer = torch.cat([ids, ids[:, :1]], dim=1)
    mixed = torch.cat([longer, prompt(length=6, seed=2)])
    with engine.record() as results:
        for given in (ids, prompt(length=6, seed=2), ids, ids, longer, longer, mixed[:, :5].flip(1), mixed):
            model(given, use_cache=False)
    assert phases(results[0]) == "ppppdppp"


def test_a_recording_says_that_continuous_batching_is_not_in_it(engine, model):
    """It runs in a thread of its own, and a forward does not say which token is of which request."""
    settings = {
        "generation_config": GenerationConfig(
            max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        # By default the memory that is free is its cache, which takes a minute to clear.
        "continuous_batching_config": ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64),
    }
    ids = prompt(batch=2).tolist()
    with engine.record() as results:
        attached = model.generate_batch(ids, **settings)
    plain = tiny_moe(pad_token_id=0).generate_batch(ids, **settings)
    texts = [[one.generated_tokens for one in outputs.values()] for outputs in (attached, plain)]
    assert texts[0] == texts[1]
    (note,) = [note for note in results[0].notes if "forward passes" in note]
    assert "4 forward passes of generate_batch are not in it" in note and "engine.generate" in note


@pytest.mark.parametrize("full", [True, False])
def test_a_chat_goes_on_with_its_cache(engine, model, full):
    """The second turn's prompt is prefill, at the places behind the first turn."""
    cache, first = DynamicCache(config=model.config), prompt()
    before = engine.generate(first, max_new_tokens=4, past_key_values=cache)
    said = torch.cat([first, torch.tensor(before.tokens), prompt(length=5, seed=2)], dim=1)  # 9 + 4 + 5
    assert cache.get_seq_length() == 12
    new = said if full else said[:, 12:]
    mask = torch.ones_like(said)
    run = engine.generate(new, attention_mask=mask, max_new_tokens=4, past_key_values=cache)
    assert run.tokens == plain_tokens(model, said, new=4)
    assert phases(run) == "pddd"
    assert positions(run) == [*range(12, 18 + 3)]


@torch.no_grad()
def test_positions_of_a_data_set_restart_with_every_text_and_run_on_with_a_cache(engine, model):
    with engine.record() as results:
        model(prompt(length=5))
        model(prompt(length=4, seed=2), use_cache=False)
        first = model(prompt(length=6)).past_key_values
        second = model(prompt(length=3)).past_key_values
        model(prompt(length=2), past_key_values=first)  # two chats that take turns
        model(prompt(length=1), past_key_values=second)
        model(prompt(length=1), past_key_values=first)
        first.crop(-4)
        model(prompt(length=2), past_key_values=first)
        plain_tokens(model, prompt(length=6), 3)
    assert positions(results[0]) == [
        *range(5), *range(4), *range(6), *range(3), 6, 7, 3, 8, 5, 6, *range(8)
    ]  # fmt: skip
    assert phases(results[0]) == "ppppp" + "dd" + "p" + "pdd"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pads", [(0, 3), (4, 0), (2, 2), (0, 0), (8, 1)])
def test_padding_has_no_position_whatever_the_cache(engine, model, pads, cache):
    """A mask made for a static cache has another form."""
    ids, mask = prompt(batch=2).clamp(min=1), torch.ones(2, 9, dtype=torch.long)
    for row, count in enumerate(pads):
        ids[row, :count], mask[row, :count] = 0, 0
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    for run in (
        engine.generate(ids, attention_mask=mask, max_new_tokens=3, **settings),
        _recorded(engine, ids, mask, settings),
    ):
        for row, count in enumerate(pads):
            assert positions(run, row) == [-1] * count + [*range(9 - count + 2)]
        assert phases(run) == "pdd"


def _recorded(engine, ids, mask, settings):
    with engine.record() as results:
        engine.model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, **settings)
    return results[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_recording_may_begin_in_the_middle_of_a_text(engine, model, kind):
    """What was cached before is known from the mask alone."""
    ids, mask = prompt(batch=2).clamp(min=1), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    cache = kind(config=model.config, max_cache_len=32) if kind is StaticCache else kind(config=model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    with engine.record() as results:
        for count in (1, 2):
            mask = torch.cat([mask, torch.ones(2, count, dtype=torch.long)], dim=1)
            model(ids[:, :count], attention_mask=mask, past_key_values=cache)
    assert [positions(results[0], row) for row in (0, 1)] == [[5, 6, 7], [9, 10, 11]]


@pytest.mark.parametrize("batch", [1, 2])
def test_beams_and_samples_of_one_prompt_have_its_positions(engine, batch):
    run = engine.generate(prompt(batch=batch), max_new_tokens=3, num_beams=3)
    assert phases(run) == "pdd"
    for sequence in range(3 * batch):
        assert positions(run, sequence) == [*range(11)]


def test_the_traces_phase_is_the_steps(engine):
    run = engine.generate(REPEATED, max_new_tokens=8, prompt_lookup_num_tokens=2)
    for step, phase in enumerate(run.steps["phase"]):
        assert {PHASES[i] for i in run.trace.phase[run.trace.step == step]} == {phase}


def test_tokens_that_a_trace_routes_are_not_verified_several_at_a_time():
    model = tiny_moe()
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        trace = engine.generate(prompt(), max_new_tokens=4).trace
        engine.force_routing(trace)
        assert len(engine.generate(prompt(), max_new_tokens=4).tokens[0]) == 4
        with pytest.raises(UnsupportedOption, match="one token of each sequence"):
            engine.generate(REPEATED, max_new_tokens=8, prompt_lookup_num_tokens=3)
        engine.force_routing(None)
        assert engine.generate(prompt(), max_new_tokens=4).tokens == plain_tokens(model, prompt(), new=4)
