"""The engine's laws: the plain model's tokens, honest counts, an exact way back, and life after every failure."""

import gc
import resource
import threading
import time
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import prescope
from prescope.cache.policies import LRU, POLICIES
from prescope.core.types import NeedOutcome
from prescope.device import NullDevice
from prescope.engine import generate, recording
from prescope.engine.config import EngineConfig
from prescope.errors import (
    AlreadyAttached,
    NotAMoE,
    NotAttached,
    SlotPoolTooLarge,
    SlotPoolTooSmall,
    TransferFailed,
    UnsupportedExperts,
    UnsupportedOption,
)
from prescope.scheduler.costs import LayerCosts
from tests.support.models import EXPERTS, LAYERS, TOP_K, plain_tokens, prompt, tiny_moe

FAST_LINK = {"device": "cpu", "link_gb_per_s": 50.0}
TOTAL = LAYERS * EXPERTS


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.mark.parametrize("device", ["cpu", "null"])
@pytest.mark.parametrize("cache", sorted(POLICIES))
@pytest.mark.parametrize("slots", [TOP_K, pytest.param(TOP_K + 1, marks=pytest.mark.slow), 7, TOTAL])
def test_tokens_are_the_plain_models_whatever_slots_cache_and_device(model, device, cache, slots):
    """The first promise: offloading changes when bytes move, never what is computed."""
    ids = prompt(batch=3)
    expected = plain_tokens(model, ids)
    frequencies = np.random.default_rng(0).random((LAYERS, EXPERTS))
    with prescope.attach(model, slots=slots, cache=cache, device=device, frequencies=frequencies) as engine:
        run = engine.generate(ids, max_new_tokens=12)
        engine.check_integrity()
    assert run.tokens == expected
    assert len({token for row in expected for token in row}) > 6, (
        "a model that repeats one token proves nothing"
    )


@pytest.mark.parametrize("seed", range(8))
def test_tokens_survive_copies_that_land_in_any_order(model, seed, monkeypatch):
    """The null device poisons a slot when its copy is issued and lands the bytes as late as the protocol allows: a
    missing wait, or a slot given away while in use, puts NaN into the logits."""
    monkeypatch.setattr("prescope.engine.engine.open_device", lambda *args: NullDevice(seed=seed))
    ids = prompt(batch=4, length=11, seed=seed)
    expected = plain_tokens(model, ids)
    with prescope.attach(model, slots=3 + seed, device="null") as engine:
        assert engine.generate(ids, max_new_tokens=12).tokens == expected


def test_a_missing_wait_is_seen_by_the_null_device(model, monkeypatch):
    """Negative control of the test above: without the wait for `ready` the tokens must go wrong."""
    monkeypatch.setattr(
        "prescope.weights.loader.Loader.wait", lambda self, slots: self._residency.landed(slots)
    )
    ids = prompt(batch=4, length=11)
    expected = plain_tokens(model, ids)
    with prescope.attach(model, slots=4, device="null", record_routing=False) as engine:
        assert engine.generate(ids, max_new_tokens=12).tokens != expected


def test_a_slot_given_away_while_in_use_is_seen_by_the_null_device(model, monkeypatch):
    """Negative control: without protection a round's copies overwrite experts that are still to be computed."""
    monkeypatch.setattr("prescope.cache.residency.ResidencyTable.protect", lambda self, slots: None)
    ids = prompt(batch=4, length=11)
    expected = plain_tokens(model, ids)
    # LRU happens to spare what is in use, so the most recently used is given up instead.

    class MRU(LRU):
        def use(self, moe_layer, experts, weights):
            self.tick -= 2.0
            super().use(moe_layer, experts, weights)

    monkeypatch.setitem(POLICIES, "lru", MRU)
    with prescope.attach(model, slots=9, device="null", record_routing=False) as engine:
        try:
            tokens = engine.generate(ids, max_new_tokens=12).tokens
        except (AssertionError, IndexError):
            return
    assert tokens != expected


def test_every_copy_waits_for_the_last_use_of_its_slot(model, monkeypatch):
    """`released` is what keeps the H2D lane from overwriting weights that the compute lane still reads."""
    device = NullDevice(seed=3)
    last_use: dict[int, float] = {}
    checked = 0
    issue = device.copy

    def copy(pairs, after, timed, each):
        nonlocal checked
        latest = max((mark.time_us for mark in after), default=-1.0)
        for slot, _ in pairs:
            checked += slot.data_ptr() in last_use
            assert last_use.get(slot.data_ptr(), -1.0) <= latest, (
                "a copy may start before the slot's last use is over"
            )
        return issue(pairs, after, timed, each)

    monkeypatch.setattr(device, "copy", copy)
    monkeypatch.setattr("prescope.engine.engine.open_device", lambda *args: device)
    with prescope.attach(model, slots=5, device="null") as engine:
        release = engine.runner.loader.release

        def released(slots, mark):
            for slot in slots.tolist():
                last_use[engine.runner.loader.pool[slot].data_ptr()] = mark.time_us
            release(slots, mark)

        monkeypatch.setattr(engine.runner.loader, "release", released)
        engine.generate(prompt(batch=2), max_new_tokens=10)
    assert checked > 50


def test_hits_late_and_misses_are_all_that_was_needed(model):
    """Three outcomes, each need exactly one; and what was needed is what the router chose."""
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        run = engine.generate(prompt(batch=2), max_new_tokens=10)
        assert sum(engine.needs.values()) == run.layers["needed"].sum()
        assert engine.needs[NeedOutcome.MISS] == run.layers["misses"].sum()
    table = run.layers
    assert (table["hits"] + table["late"] + table["misses"] == table["needed"]).all()
    for step in run.trace.steps:
        chosen = [len(need.experts) for need in run.trace.needed(step)]
        assert table[table["step"] == step]["needed"].tolist() == chosen
    transfers = run.events[run.events["kind"] == "transfer"]
    on_demand = transfers["reason"] == "on_demand"
    assert on_demand.sum() == table["misses"].sum(), "every miss is one transfer"
    assert (~on_demand).sum() <= table["late"].sum() + table["hits"].sum()
    assert transfers["bytes"].sum() == len(transfers) * engine.shape.row_bytes


@pytest.mark.parametrize("cache", ["lru", "lfu", "score", "static"])
@pytest.mark.parametrize("slots", [EXPERTS + 1, 2 * EXPERTS, 2 * EXPERTS + 4])
def test_streaming_ahead_takes_no_slot_of_the_layer_at_hand(model, cache, slots):
    """A layer that finds all its experts computes from all of them, whichever the policy would rather give up."""
    ids = prompt(batch=4, length=40)
    expected = plain_tokens(model, ids, new=3)
    frequencies = np.random.default_rng(0).random((LAYERS, EXPERTS))
    with prescope.attach(
        model, slots=slots, cache=cache, device="null", decode="layered", frequencies=frequencies
    ) as engine:
        for _ in range(3):  # the second and third find slots that the one before has filled
            assert engine.generate(ids, max_new_tokens=3).tokens == expected
            engine.check_integrity()


def test_a_long_prompt_streams_the_next_layers_experts_behind_its_own(model):
    """The link need not wait for a router that will choose all experts anyway; tokens and counts stay honest."""
    ids = prompt(batch=4, length=40)
    expected = plain_tokens(model, ids, new=3)
    with prescope.attach(model, slots=TOTAL // 2, device="null", decode="layered") as engine:
        run = engine.generate(ids, max_new_tokens=3)
        engine.check_integrity()
    assert run.tokens == expected
    prefill = run.layers[run.layers["phase"] == "prefill"].set_index("moe_layer")
    assert (prefill["needed"] == EXPERTS).all()
    assert (prefill["hits"] + prefill["late"] + prefill["misses"] == EXPERTS).all()
    ahead = run.events[(run.events["reason"] == "stream") & (run.events["phase"] == "prefill")]
    assert set(ahead["moe_layer"]) == {1, 2}, (
        "the first layer cannot be known before, and no layer follows the last"
    )
    copies = run.events[(run.events["kind"] == "transfer") & (run.events["phase"] == "prefill")]
    assert copies.groupby("moe_layer").size().tolist() == [EXPERTS] * LAYERS, "an expert was copied twice"
    for layer in (1, 2):
        assert prefill.loc[layer, "misses"] == EXPERTS - (ahead["moe_layer"] == layer).sum()


def test_a_layer_that_needs_more_experts_than_slots_takes_rounds(model):
    with prescope.attach(model, slots=TOP_K, device="null") as engine:
        run = engine.generate(prompt(batch=4, length=16), max_new_tokens=2)
    prefill = run.layers[run.layers["phase"] == "prefill"]
    assert (prefill["needed"] > TOP_K).all()
    assert (prefill["rounds"] > 1).all()


def test_ample_slots_miss_each_expert_once(model):
    with prescope.attach(model, slots=1.0, device="null") as engine:
        first = engine.generate(prompt(), max_new_tokens=20)
        again = engine.generate(prompt(), max_new_tokens=20)
    assert first.layers["misses"].sum() == np.count_nonzero(first.trace.expert_counts())
    assert again.layers["misses"].sum() == 0
    assert again.metrics.stall_ms == 0


def test_lanes_of_the_compute_stream_fill_the_run_without_overlap(model):
    """Where each token's time went: gpu + stall + host must be all of it."""
    with prescope.attach(model, slots=5, device="cpu", link_gb_per_s=0.05) as engine:
        run = engine.generate(prompt(batch=2), max_new_tokens=8)
    compute = run.events[run.events["lane"].isin(["gpu", "stall", "host"])].sort_values("start_us")
    ends = (compute["start_us"] + compute["dur_us"]).to_numpy()
    assert np.allclose(ends[:-1], compute["start_us"].to_numpy()[1:], atol=1e-3)
    assert np.isclose(compute["dur_us"].sum(), run.steps["dur_us"].sum(), rtol=1e-6)
    assert run.metrics.stall_ms > 0


def test_the_emulated_link_is_no_faster_than_it_says(model):
    with prescope.attach(model, slots=5, device="cpu", link_gb_per_s=0.05) as engine:
        run = engine.generate(prompt(batch=2), max_new_tokens=8)
    assert "emulated" in run.label
    assert 0 < run.metrics.link_gb_per_s <= 0.05 * 1.001


@pytest.mark.slow
def test_attaching_a_hundred_times_leaves_the_model_bit_identical_without_growth():
    model = tiny_moe(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: id(parameter) for name, parameter in model.named_parameters()}
    implementation = model.config._experts_implementation
    grown = []
    for _ in range(100):
        with prescope.attach(model, slots=4, **FAST_LINK) as engine:
            engine.generate(prompt(), max_new_tokens=2)
        gc.collect()
        grown.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == objects
    assert model.config._experts_implementation == implementation
    assert threading.active_count() < 20, "transfer threads outlive their engines"
    # Peak memory in KiB; the first rounds warm up the allocator. One leaked pool a round would be 25 MiB in all.
    assert grown[-1] - grown[20] < 8_000


def test_bytes_in_slots_equal_the_models_weights(model):
    weights = {name: tensor.clone() for name, tensor in model.named_parameters() if "experts" in name}
    with prescope.attach(model, slots=9, device="null") as engine:
        engine.generate(prompt(batch=2), max_new_tokens=6)
        checked = 0
        for slot, key in enumerate(engine.runner.residency.key_of.tolist()):
            if key < 0:
                continue
            layer, expert = divmod(key, EXPERTS)
            name = f"model.layers.{layer}.mlp.experts"
            assert torch.equal(engine.runner.weights[layer].up[slot], weights[f"{name}.gate_up_proj"][expert])
            assert torch.equal(engine.runner.weights[layer].down[slot], weights[f"{name}.down_proj"][expert])
            checked += 1
    assert checked == 9


def test_slots_and_cache_change_between_runs(model):
    ids = prompt(batch=2)
    expected = plain_tokens(model, ids)
    with prescope.attach(model, slots=4, **FAST_LINK) as engine:
        for slots, count in [(1.0, TOTAL), ("20KiB", 2), (5, 5)]:
            engine.configure(slots=slots)
            assert engine.num_slots == count
            assert engine.generate(ids, max_new_tokens=12).tokens == expected
        with pytest.raises(SlotPoolTooSmall):
            engine.configure(slots=1)
        assert engine.num_slots == 5, "a refused setting changes nothing"
        engine.configure(cache="lfu")
        assert engine.generate(ids, max_new_tokens=12).tokens == expected


def test_a_schedule_brings_its_cache_unless_one_was_chosen(model):
    ids, shape = prompt(), (LAYERS, EXPERTS)
    costs = LayerCosts(
        link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 80.0, 120.0), source="made up for a test"
    )
    with prescope.attach(model, slots=6, costs=costs, cpu_threads=0, **FAST_LINK) as engine:
        assert engine.config.cache == "lru"
        engine.configure(schedule="presched")
        assert engine.config.cache == "next-use" and "presched" in engine.reasons["cache"]
        engine.configure(schedule="fiddler")
        assert engine.config.cache == "lru"
        assert any("frequencies" in note for note in engine.generate(ids, max_new_tokens=2).notes)
        engine.configure(frequencies=np.ones(shape))
        assert engine.config.cache == "static"
        assert not any("frequencies" in note for note in engine.generate(ids, max_new_tokens=2).notes)
        engine.configure(cache="lfu")
        engine.configure(schedule="presched")
        assert engine.config.cache == "lfu" and engine.reasons["cache"] == "as given"
        engine.configure(cache="auto")
        assert engine.config.cache == "next-use"


def test_a_first_run_says_what_it_compiles_for_the_schedule_it_has(model, monkeypatch):
    """The first run of a new user compiled for half a minute without a sign."""
    asked: list[str] = []

    @contextmanager
    def said(function, what):
        asked.append(function.__name__)
        yield

    monkeypatch.setattr(generate, "said_if_compiled_first", said)
    costs = LayerCosts(link_us=100.0, gpu_us=5.0, rest_us=200.0, source="made up for a test")
    with prescope.attach(model, slots=6, costs=costs, cpu_threads=0, **FAST_LINK) as engine:
        for schedule, compiled in {"on-demand": "sort_need", "presched": "decide_layer"}.items():
            asked.clear()
            engine.configure(schedule=schedule)
            engine.generate(prompt(), max_new_tokens=2)
            assert asked == [compiled]


def test_the_models_own_generate_and_forward_are_recorded(model):
    ids = prompt(batch=2)
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        with engine.record() as results:
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        own = engine.generate(ids, max_new_tokens=5)
    assert results[0].trace.expert_ids.tolist() == own.trace.expert_ids.tolist()
    assert len(results[0].steps) == 5


def test_a_trace_says_which_token_used_which_expert(model):
    """Padding is marked, positions count real tokens, inputs are the router's."""
    captured = []
    router = model.model.layers[0].mlp.gate
    hook = router.register_forward_pre_hook(lambda module, args: captured.append(args[0].clone()))
    with prescope.attach(model, slots=6, record_inputs=True, **FAST_LINK) as engine:
        run = engine.generate([[5, 6, 7], [8, 9, 10, 11, 12]], max_new_tokens=3)
    hook.remove()
    trace = run.trace
    prefill = trace.step == 0
    assert trace.position[prefill].tolist() == [-1, -1, 0, 1, 2, 0, 1, 2, 3, 4]
    assert trace.position[trace.step == 1].tolist() == [3, 5]
    assert trace.sequence[trace.step == 2].tolist() == [0, 1]
    assert np.allclose(trace.inputs[prefill, 0], captured[0].reshape(-1, 32).numpy(), atol=2e-3)
    logits = torch.nn.functional.linear(captured[0].reshape(-1, 32), router.weight)
    best = logits.detach().softmax(-1).topk(TOP_K)
    assert np.allclose(trace.weights[prefill, 0], best.values.numpy(), atol=1e-4)
    assert trace.expert_ids[prefill, 0].tolist() == best.indices.tolist()


# -- what can go wrong ---------------------------------------------------------------------------------------------


def test_a_dense_model_is_refused():
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        )
    )
    with pytest.raises(NotAMoE, match="mixture-of-experts"):
        prescope.attach(llama, slots=4)


def test_fewer_slots_than_top_k_are_refused_and_the_model_is_untouched(model):
    expected = plain_tokens(model, prompt())
    with pytest.raises(SlotPoolTooSmall, match=f"slots={TOP_K}"):
        prescope.attach(model, slots=TOP_K - 1)
    with pytest.raises(SlotPoolTooSmall):
        prescope.attach(model, slots="1KiB")
    assert plain_tokens(model, prompt()) == expected


def test_slots_beyond_the_devices_memory_are_refused(model, monkeypatch):
    monkeypatch.setattr("prescope.device.emulated.available_memory_bytes", lambda: 20_000)
    with pytest.raises(SlotPoolTooLarge, match="use slots=2 or fewer"):
        prescope.attach(model, slots=1.0, device="cpu")
    assert not model.model.layers[0].mlp.experts.gate_up_proj.is_meta
    monkeypatch.undo()
    with prescope.attach(model, slots=4, **FAST_LINK) as engine:
        monkeypatch.setattr("prescope.device.emulated.available_memory_bytes", lambda: 20_000)
        with pytest.raises(SlotPoolTooLarge, match="24 slots take"):
            engine.configure(slots=1.0)
        assert engine.num_slots == 4
        assert len(engine.generate(prompt(), max_new_tokens=3).tokens[0]) == 3


@pytest.mark.parametrize(
    "setting",
    [
        {"slots": 1.5}, {"slots": 0}, {"slots": "many"}, {"slots": None}, {"cache": "fifo"}, {"device": "tpu"},
        {"link_gb_per_s": -1.0}, {"device": "cuda", "link_gb_per_s": 3.0}, {"kernels": "magic"},
        {"link_factor": 0}, {"link_factor": 1.5}, {"device": "cpu", "link_factor": 2},
        {"link_factor": 2, "decode": "gpu-driven"},
        {"record_inputs": True, "record_routing": False}, {"cache": "static"}, {"kernels": "triton", "device": "cpu"},
        {"slots": True}, {"slots": "150%"}, {"slots": "0 %"}, {"slots": "9" * 400 + "GiB"}, {"slots": np.array([6])},
        {"link_gb_per_s": "20"}, {"link_gb_per_s": [2.0]}, {"link_gb_per_s": float("inf")}, {"link_gb_per_s": True},
        {"lookahead": 1.5}, {"lookahead": "1"}, {"lookahead": float("nan")}, {"lookahead": True}, {"width": 1.5},
        {"width": "2"}, {"cpu_threads": 1.5}, {"cpu_threads": "2"}, {"threshold": "0.5"}, {"threshold": True},
        {"threshold": float("nan")}, {"events": "no"}, {"events": None}, {"record_routing": 1}, {"compiled": "yes"},
        {"schedule": {}}, {"cache": ["lru"]}, {"device": None}, {"predictor": "early"}, {"costs": "h200"},
        {"tokenizer": "gpt2"}, {"frequencies": [[1] * 8] * 2}, {"frequencies": "hot"},
        {"frequencies": np.full((3, 8), np.nan)}, {"frequencies": -np.ones((3, 8)), "cache": "static"},
    ],
)  # fmt: skip
def test_a_bad_setting_is_refused_with_the_choices(model, setting):
    with pytest.raises(UnsupportedOption):
        prescope.attach(model, **setting)
    assert not model.model.layers[0].mlp.experts.gate_up_proj.is_meta


@pytest.mark.parametrize(
    "setting",
    [
        {"slots": np.int64(6)}, {"slots": np.float32(0.25)}, {"slots": "25%"}, {"slots": " 25.0 %"},
        {"link_gb_per_s": np.float32(50.0)}, {"lookahead": np.int32(1)}, {"threshold": np.float32(0.5)},
        {"events": np.True_}, {"frequencies": [[1] * 8] * 3, "cache": "static"},
    ],
)  # fmt: skip
def test_numbers_of_numpy_shares_in_per_cent_and_nested_lists_are_settings(model, setting):
    expected = plain_tokens(model, prompt(), 3)
    with prescope.attach(model, **{"slots": 6, **FAST_LINK, **setting}) as engine:
        assert engine.num_slots == 6
        assert engine.generate(prompt(), max_new_tokens=3).tokens == expected
        values = [value for value in engine.config.to_dict().values() if value is not None]
        assert {type(value) for value in values} <= {bool, int, float, str}


def test_settings_come_as_one_object_or_as_keywords(model):
    with pytest.raises(UnsupportedOption, match="not both"):
        prescope.attach(model, EngineConfig(slots=4), cache="lfu")
    for config in ({"slots": 4}, 4):
        with pytest.raises(UnsupportedOption, match="EngineConfig"):
            prescope.attach(model, config)


def test_a_model_cannot_be_attached_twice(model):
    with prescope.attach(model, slots=4, **FAST_LINK):
        with pytest.raises(AlreadyAttached, match="detach"):
            prescope.attach(model, slots=4, **FAST_LINK)
        assert len(plain_tokens(model, prompt())[0]) == 12, "the first engine goes on"


def test_a_detached_engine_says_so(model):
    engine = prescope.attach(model, slots=4, **FAST_LINK)
    engine.detach()
    engine.detach()
    with pytest.raises(NotAttached):
        engine.generate(prompt())
    assert "detached" in repr(engine)


def test_saving_an_attached_model_is_refused(model, tmp_path):
    with prescope.attach(model, slots=4, **FAST_LINK), pytest.raises(UnsupportedExperts, match="detach"):
        model.save_pretrained(tmp_path)


def test_text_needs_a_tokenizer_and_prompts_need_tokens(model):
    with prescope.attach(model, slots=4, **FAST_LINK) as engine:
        for bad in ("Hello", [], [[1, 2], []]):
            with pytest.raises(UnsupportedOption):
                engine.generate(bad)
        assert len(engine.generate([[1, 2]], max_new_tokens=3).tokens[0]) == 3


@pytest.mark.timeout(60)
def test_an_exception_in_the_transfer_thread_surfaces_and_the_engine_works_again(model, monkeypatch):
    ids = prompt(batch=2)
    expected = plain_tokens(model, ids)
    with prescope.attach(model, slots=5, **FAST_LINK) as engine:
        engine.generate(ids, max_new_tokens=2)
        row = engine._attachment.host.row
        calls = 0

        def broken_row(moe_layer, expert):
            nonlocal calls
            calls += 1
            return row(moe_layer, expert)[:-1] if calls == 9 else row(moe_layer, expert)

        monkeypatch.setattr(engine._attachment.host, "row", broken_row)
        started = time.perf_counter()
        with pytest.raises(TransferFailed, match="transfer thread"):
            engine.generate(ids, max_new_tokens=12)
        assert time.perf_counter() - started < 5.0, "a failed copy must not hang whoever waits for it"
        assert engine.generate(ids, max_new_tokens=12).tokens == expected
        engine.check_integrity()


@pytest.mark.parametrize("moment", ["take", "wait", "release"])
def test_ctrl_c_in_the_middle_leaves_an_engine_that_works(model, monkeypatch, moment):
    """An interrupt can strike between any two lines, also where table and slots disagree for a moment."""
    ids = prompt(batch=2)
    expected = plain_tokens(model, ids)
    with prescope.attach(model, slots=5, **FAST_LINK) as engine:
        target = engine.runner.residency if moment == "take" else engine.runner.loader
        original = getattr(target, moment)
        calls = 0

        def interrupted(*args, **keywords):
            nonlocal calls
            calls += 1
            result = original(*args, **keywords)
            if calls == 7:
                raise KeyboardInterrupt
            return result

        monkeypatch.setattr(target, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ids, max_new_tokens=12)
        engine.check_integrity()
        assert engine.generate(ids, max_new_tokens=12).tokens == expected
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            plain_tokens(model, ids)  # the model's own generate, no engine around it
        assert plain_tokens(model, ids) == expected
        engine.check_integrity()


def test_cancel_returns_what_there_is(model):
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        run = engine.generate(
            prompt(), max_new_tokens=50, on_step=lambda n: engine.cancel() if n == 4 else None
        )
        assert len(run.tokens[0]) == 4
        assert any("cancelled" in note for note in run.notes)
        assert len(engine.generate(prompt(), max_new_tokens=6).tokens[0]) == 6


@pytest.mark.slow
def test_a_compiled_forward_with_a_static_cache_gives_the_same_tokens(model):
    """torch.compile breaks its graph at the experts and compiles the rest; `generate` decides it by the cache."""
    ids = prompt(batch=2)
    expected = plain_tokens(model, ids)
    compiled = CompileConfig(mode="default")
    compiled._compile_all_devices = True  # transformers compiles on accelerators only
    with prescope.attach(model, slots=6, **FAST_LINK) as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and transformers warn about their own internals while tracing
        run = engine.generate(ids, max_new_tokens=12, cache_implementation="static", compile_config=compiled)
    assert run.tokens == expected
    assert len(run.steps) == 12
    assert (run.layers[["hits", "late", "misses"]].sum(axis=1) == run.layers["needed"]).all()


def test_no_full_garbage_collection_walks_the_heap_during_a_run(model):
    """One takes as long as ten tokens; and what was frozen is thawed afterwards, also after an error."""
    frozen = []
    gc.unfreeze()  # Python 3.12 starts with 375
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        engine.generate(prompt(), max_new_tokens=3, on_step=lambda _: frozen.append(gc.get_freeze_count()))
        assert min(frozen) > 10_000
        assert gc.get_freeze_count() == 0
        with pytest.raises(ZeroDivisionError):
            engine.generate(prompt(), max_new_tokens=3, on_step=lambda _: 1 / 0)
        assert gc.get_freeze_count() == 0


@pytest.mark.parametrize(("before", "is_ours"), [(375, True), (200_000, False)])
def test_the_heap_is_frozen_beside_what_python_froze_but_not_beside_a_users_own(monkeypatch, before, is_ours):
    done = []
    fake = SimpleNamespace(
        get_freeze_count=lambda: before,
        freeze=lambda: done.append("freeze"),
        unfreeze=lambda: done.append("unfreeze"),
    )
    monkeypatch.setattr(recording, "gc", fake)
    with recording.frozen_heap():
        done.append("inside")
    assert done == (["freeze", "inside", "unfreeze"] if is_ours else ["inside"])


def test_tokens_after_a_sequences_end_are_not_counted_as_speed():
    """One sequence stops at once, the other goes on: tokens/s counts what came out."""
    model = tiny_moe()
    ids = prompt(batch=2)
    first, second = plain_tokens(model, ids)
    model.generation_config.eos_token_id = next(token for token in first[1:] if token not in second)
    model.generation_config.pad_token_id = 0
    with prescope.attach(model, slots=6, device="null") as engine:
        run = engine.generate(ids, max_new_tokens=12)
    assert [len(tokens) for tokens in run.tokens] == [
        first.index(model.generation_config.eos_token_id) + 1,
        12,
    ]
    generated = sum(map(len, run.tokens))
    assert np.isclose(run.metrics.tokens_per_s, (generated - 2) / run.metrics.decode.wall_ms * 1e3)
