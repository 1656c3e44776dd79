"""Decode steps from a graph: the same tokens, counts and text as layer by layer, whoever drives, whatever is missing.

Without a GPU a step's launches are run by Triton's interpreter in a thread of their own, as a GPU would beside
the host.
"""

import ctypes
import time
from importlib import import_module

import pytest
import torch
from transformers import GenerationConfig, MixtralConfig, MixtralForCausalLM

import prescope
from prescope.core.native import address_of
from prescope.core.types import NeedOutcome
from prescope.engine.graph import DecodeLoop
from prescope.errors import TransferFailed, UnsupportedOption
from tests.support.models import EXPERTS, LAYERS, TOP_K, plain_tokens, prompt, tiny_moe

pytest.importorskip("triton", reason="Triton exists for Linux only")
TOTAL = LAYERS * EXPERTS


MEMCPY = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * 4)


@MEMCPY
def refuse(target: int, source: int, nbytes: int, stream: int) -> int:
    return 700


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


def found_and_missed(engine) -> tuple[int, int]:
    """Counts so far. Whether what is on its way is there already or still late is the link's affair."""
    return engine.needs[NeedOutcome.HIT] + engine.needs[NeedOutcome.LATE], engine.needs[NeedOutcome.MISS]


@pytest.fixture
def nothing_streamed(monkeypatch):
    """Which slots a prompt's streamed experts take depends on what is on its way just then: so do later misses."""
    monkeypatch.setattr("prescope.cache.rounds.STREAM_SHARE", 2.0)


@pytest.mark.usefixtures("nothing_streamed")
@pytest.mark.parametrize("driver", ["gpu-driven", "copy-engine", "host-driven"])
@pytest.mark.parametrize(
    ("batch", "slots", "cache"),
    [
        (1, 5, "lru"),
        pytest.param(2, 9, "lfu", marks=pytest.mark.slow),
        pytest.param(3, TOTAL, "lru", marks=pytest.mark.slow),
    ],
)
def test_tokens_and_counts_are_those_of_serving_layer_by_layer(model, gpu, driver, batch, slots, cache):
    ids = prompt(batch=batch, length=5)
    expected = plain_tokens(model, ids, new=6)
    runs, needs = {}, {}
    for decode in ("layered", driver):
        with prescope.attach(model, slots=slots, cache=cache, decode=decode, **gpu) as engine:
            runs[decode] = [engine.generate(ids, max_new_tokens=6) for _ in range(2)]
            engine.check_integrity()
            needs[decode] = found_and_missed(engine)
        for run in runs[decode]:
            assert run.config["reasons"]["decode"].startswith(decode), run.config["reasons"]["decode"]
            assert run.tokens == expected
    assert needs[driver] == needs["layered"], "hits or misses were counted in another way"
    for layered, captured in zip(runs["layered"], runs[driver], strict=True):
        for run in (layered, captured):
            run.layers["hits"] += run.layers.pop("late")
        assert layered.layers.equals(captured.layers)
        assert (layered.trace.expert_ids == captured.trace.expert_ids).all()


@pytest.mark.parametrize("driver", ["copy-engine", "host-driven"])
def test_router_inputs_are_recorded_from_the_graph_too(model, gpu, driver):
    ids, traces = prompt(batch=2, length=5), {}
    for decode in ("layered", driver):
        with prescope.attach(model, slots=9, decode=decode, record_inputs=True, **gpu) as engine:
            runs = [engine.generate(ids, max_new_tokens=7) for _ in range(2)]
        assert runs[-1].config["reasons"]["decode"].startswith(decode)
        traces[decode] = [run.trace for run in runs]
    for layered, captured in zip(traces["layered"], traces[driver], strict=True):
        assert (layered.expert_ids == captured.expert_ids).all()
        assert layered.inputs.shape == (2 * (5 + 6), LAYERS, model.config.hidden_size)
        assert abs(layered.inputs - captured.inputs).max() < 1e-3


def test_recording_a_graph_is_warm_up(model, gpu):
    with prescope.attach(model, slots=TOTAL, **gpu) as engine:
        runs = [engine.generate(prompt(), max_new_tokens=6) for _ in range(2)]
    # A part of the timeline; of runs without one it is said.
    said = [any("what is done once" in note for note in run.notes) for run in runs]
    warm = [run.metrics.decode.warm_up_ms > 0 for run in runs]
    assert [one or other for one, other in zip(said, warm, strict=True)] == [True, False]


@pytest.mark.parametrize("window", [6, pytest.param(64, marks=pytest.mark.slow)])
def test_a_sliding_window_is_captured(gpu, window):
    """The run has 9 + 8 tokens."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, sliding_window=window, eos_token_id=None,
        initializer_range=0.3,
    )  # fmt: skip
    model, ids = MixtralForCausalLM(config).eval(), prompt()
    expected = plain_tokens(model, ids, new=8)
    with prescope.attach(model, slots=5, **gpu) as engine:
        runs = [engine.generate(ids, max_new_tokens=8) for _ in range(2)]
    for run in runs:
        assert run.tokens == expected
        assert not run.config["reasons"]["decode"].startswith("layered"), run.config["reasons"]


def test_the_score_policy_needs_the_host(model, gpu):
    ids = prompt()
    with prescope.attach(model, slots=6, cache="score", **gpu) as engine:
        run = engine.generate(ids, max_new_tokens=6)
    assert run.config["reasons"]["decode"].startswith("host-driven")
    assert run.tokens == plain_tokens(model, ids, new=6)


def test_the_faster_driver_is_kept_and_the_result_says_so(model, gpu):
    ids = prompt()
    with prescope.attach(model, slots=6, **gpu) as engine:
        run = engine.generate(ids, max_new_tokens=16)
        again = engine.generate(ids, max_new_tokens=5)
    assert "against" in run.config["reasons"]["decode"]
    assert again.config["reasons"]["decode"].split(":")[0] == run.config["reasons"]["decode"].split(":")[0]
    assert run.tokens == plain_tokens(model, ids, new=16)


@pytest.mark.usefixtures("nothing_streamed")
@pytest.mark.parametrize("driver", ["gpu-driven", "host-driven"])
def test_generation_ends_with_the_text_and_the_step_launched_too_early_is_not_counted(gpu, driver):
    model = tiny_moe()
    ids = prompt(batch=2, seed=3).clamp(min=1)  # no pad token in it
    free = plain_tokens(model, ids, new=7)
    end = free[0][3]
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, 0
    with prescope.attach(model, slots=10, decode="layered", **gpu) as engine:
        layered = engine.generate(ids[:1], max_new_tokens=7)
        needs = found_and_missed(engine)
    with prescope.attach(model, slots=10, decode=driver, **gpu) as engine:
        captured = engine.generate(ids[:1], max_new_tokens=7)
        assert found_and_missed(engine) == needs
        both = engine.generate(ids, max_new_tokens=7)
    assert captured.tokens == layered.tokens
    assert len(captured.tokens[0]) == free[0].index(end) + 1
    assert len(captured.steps) == len(layered.steps)
    for row, expected in zip(both.tokens, free, strict=True):
        assert row == expected[: expected.index(end) + 1 if end in expected else None]


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["gpu-driven", "host-driven"])
def test_settings_hold_in_captured_steps_whoever_gives_them(gpu, driver):
    """An end of the call, in a config object or the model's own; padding has no position in the static cache either."""
    model, ids, mask = (
        tiny_moe(pad_token_id=0),
        prompt(batch=2, seed=3).clamp(min=1),
        torch.ones(2, 9, dtype=torch.long),
    )
    mask[0, :3] = 0
    call = {"attention_mask": mask, "max_new_tokens": 7}

    def plain(**settings):
        return model.generate(ids, **call, do_sample=False, **settings)[:, 9:].tolist()

    full = plain()
    model.generation_config.eos_token_id = full[1][4]
    with prescope.attach(model, slots=10, decode=driver, **gpu) as engine:
        for ends, given in [
            ([full[1][4]], call),
            ([full[0][2], full[1][3]], call | {"eos_token_id": [full[0][2], full[1][3]]}),
            ([], call | {"eos_token_id": None}),
            ([full[0][3]], {"attention_mask": mask, "generation_config": GenerationConfig(
                max_new_tokens=7, eos_token_id=full[0][3])}),
            ([full[0][1]], {"attention_mask": mask, "max_length": 16, "eos_token_id": full[0][1]}),
        ]:  # fmt: skip
            run = engine.generate(ids, **given)
            assert run.config["reasons"]["decode"].startswith(driver), run.config["reasons"]["decode"]
            cut = [next((i + 1 for i, token in enumerate(row) if token in ends), 7) for row in full]
            assert run.tokens == [row[:end] for row, end in zip(full, cut, strict=True)]
            assert run.metrics.output_tokens == sum(cut)
            steps = max(cut) - 1
            position = [run.trace.position[run.trace.sequence == i].tolist() for i in (0, 1)]
            assert position == [[-1] * 3 + [*range(6 + steps)], [*range(9 + steps)]]
            assert run.steps["phase"].tolist() == ["prefill"] + ["decode"] * steps


def test_calling_the_model_from_a_captured_run_is_refused_and_the_engine_works_on(model, gpu):
    ids = prompt()
    with prescope.attach(model, slots=8, decode="gpu-driven", **gpu) as engine:
        with pytest.raises(UnsupportedOption, match="decode='layered'"):
            engine.generate(ids, max_new_tokens=8, on_step=lambda n: model(ids) if n == 4 else None)
        assert engine.generate(ids, max_new_tokens=6).tokens == plain_tokens(model, ids, new=6)


def test_sampling_and_processors_choose_on_the_host(model, gpu):
    ids = prompt(batch=2)
    settings = {"max_new_tokens": 8, "do_sample": True, "top_k": 5, "repetition_penalty": 1.2}
    texts = []
    for decode in ("layered", "gpu-driven"):
        with prescope.attach(model, slots=8, decode=decode, **gpu) as engine:
            torch.manual_seed(5)
            texts.append(engine.generate(ids, **settings).tokens)
    assert texts[0] == texts[1]


DRIVERS = {"host-driven": "host_driver.serve", "copy-engine": "copy_driver.follow_orders"}


def interrupted_at(number, genuine, calls):
    """A function that an interrupt strikes before its call of this number; `calls` gets an entry for each."""

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return genuine(*arguments)

    return interrupted


@pytest.mark.parametrize("driver", DRIVERS)
def test_an_interrupt_in_a_step_leaves_an_engine_that_works(model, gpu, monkeypatch, driver):
    ids = prompt()
    expected = plain_tokens(model, ids, new=6)
    module, _, name = DRIVERS[driver].partition(".")
    served = getattr(import_module(f"prescope.engine.graph.{module}"), name)
    with prescope.attach(model, slots=6, decode=driver, **gpu) as engine:
        engine.generate(ids, max_new_tokens=4)
        engine.clear_cache()
        with monkeypatch.context() as patch:
            patch.setattr(f"prescope.engine.graph.{module}.{name}", interrupted_at(4, served, []))
            with pytest.raises(KeyboardInterrupt):
                engine.generate(ids, max_new_tokens=30)
        assert engine.generate(ids, max_new_tokens=6).tokens == expected


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    ("second", "at"), [("GraphBuffers.served", 1), ("InterpretedGpu.send", 1), ("InterpretedGpu.recover", 2)]
)
def test_a_second_interrupt_while_the_first_is_put_right_leaves_an_engine_that_works(
    model, gpu, monkeypatch, driver, second, at
):
    """Ctrl-C is pressed twice. The GPU waited for its answers for ever, or slots passed for full that were not."""
    if torch.cuda.is_available():
        pytest.skip("a GPU that waits for ever cannot be given back: runs where there is none")
    ids = prompt()
    expected = plain_tokens(model, ids, new=6)
    name, _, method = second.partition(".")
    module = "prescope.kernels.graph_buffers" if name == "GraphBuffers" else "tests.support.interpreted_gpu"
    kind = getattr(import_module(module), name)
    genuine, calls = getattr(kind, method), []

    def interrupted(*arguments):
        patch.setattr(kind, method, interrupted_at(at, genuine, calls))
        raise KeyboardInterrupt

    with prescope.attach(model, slots=6, decode=driver, **gpu) as engine:
        engine.generate(ids, max_new_tokens=4)
        engine.clear_cache()
        with monkeypatch.context() as patch:
            patch.setattr(f"prescope.engine.graph.{DRIVERS[driver]}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(ids, max_new_tokens=30)
        assert len(calls) >= at
        assert engine.generate(ids, max_new_tokens=6).tokens == expected
        engine.check_integrity()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_copy_that_the_driver_refuses_is_an_error_and_the_engine_works_again(
    model, gpu, monkeypatch, driver
):
    ids = prompt()
    expected = plain_tokens(model, ids, new=6)
    with prescope.attach(model, slots=6, decode=driver, **gpu) as engine:
        good = engine._device.link_functions()
        with monkeypatch.context() as patch:
            patch.setattr(engine._device, "link_functions", lambda: good._replace(memcpy=address_of(refuse)))
            with pytest.raises(TransferFailed, match="refused a copy to the GPU with 700"):
                engine.generate(ids, max_new_tokens=6)
        assert engine.generate(ids, max_new_tokens=6).tokens == expected
        engine.check_integrity()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_slower_link_copies_each_expert_more_often(model, gpu, monkeypatch, driver):
    ids = prompt()
    expected = plain_tokens(model, ids, new=6)
    with prescope.attach(model, slots=6, decode=driver, **gpu) as engine:
        good, sizes = engine._device.link_functions(), []
        copy = MEMCPY(good.memcpy)

        @MEMCPY
        def counted(target: int, source: int, nbytes: int, stream: int) -> int:
            sizes.append(nbytes)
            return copy(target, source, nbytes, stream)

        engine.generate(ids, max_new_tokens=6)  # captures the step behind one that is served layer by layer
        for times in (1, 3):
            way = good._replace(memcpy=address_of(counted), repeats=times)
            monkeypatch.setattr(engine._device, "link_functions", lambda way=way: way)
            engine.clear_cache()
            sizes.clear()
            run = engine.generate(ids, max_new_tokens=6)
            assert run.tokens == expected
            # How many are missed is the link's affair too: which slots a prompt has filled depends on when they were.
            missed = run.layers.loc[run.layers["phase"] == "decode", "misses"].sum()
            assert sum(size > 4 for size in sizes) == times * missed > 0


@pytest.mark.parametrize("decode", ["layered", "gpu-driven", "host-driven"])
def test_tokens_can_be_read_while_they_come(model, gpu, decode):
    """What is told must be there to be read, and stay: a reader shows it to a person."""
    ids, seen = prompt(batch=2), []
    with prescope.attach(model, slots=6, decode=decode, **gpu) as engine:

        def read(number: int) -> None:
            seen.append((number, [list(row) for row in engine.tokens_so_far()]))

        run = engine.generate(ids, max_new_tokens=6, on_step=read)
        assert engine.tokens_so_far() == []
    assert [number for number, _ in seen] == [1, 2, 3, 4, 5, 6]
    for number, rows in seen:
        assert rows == [tokens[:number] for tokens in run.tokens]


def test_cancelling_returns_what_there_is(model, gpu):
    ids = prompt()
    with prescope.attach(model, slots=TOTAL, decode="gpu-driven", **gpu) as engine:
        run = engine.generate(ids, max_new_tokens=40, on_step=lambda n: engine.cancel() if n == 5 else None)
    assert 5 <= len(run.tokens[0]) < 10
    assert run.tokens[0] == plain_tokens(model, ids, new=12)[0][: len(run.tokens[0])]


def test_a_step_that_cannot_be_captured_is_said_aloud_and_runs_layer_by_layer(model, gpu, monkeypatch):
    ids = prompt()
    with prescope.attach(model, slots=6, **gpu) as engine:

        def refuse(run):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(engine._device, "capture", refuse)
        with pytest.warns(UserWarning, match="layer by layer"):
            run = engine.generate(ids, max_new_tokens=6)
    assert run.config["reasons"]["decode"].startswith("layered: capturing")
    assert run.tokens == plain_tokens(model, ids, new=6)


def test_a_gpu_that_stops_is_an_error_and_not_a_hang(model, gpu, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a real GPU cannot be stopped by a test: runs where there is none")
    ids = prompt()
    with prescope.attach(model, slots=6, decode="gpu-driven", **gpu) as engine:
        engine.generate(ids, max_new_tokens=4)
        monkeypatch.setattr("prescope.kernels.graph_buffers.GraphBuffers.finish", lambda self, tokens: None)
        with pytest.raises(TransferFailed, match="stopped"):
            engine.generate(ids, max_new_tokens=4)
    assert engine.needs[NeedOutcome.MISS] > 0


def test_the_host_reads_the_routing_once_a_layer_and_waits_for_nothing_else(model, monkeypatch):
    """Layer by layer, each read is a wait for the GPU: one per MoE layer and step, whatever is missing."""
    with prescope.attach(model, slots=5, device="null", decode="layered") as engine:
        engine.generate(prompt(), max_new_tokens=2)
        reads = []
        read = engine._device.read
        monkeypatch.setattr(engine._device, "read", lambda tensor: reads.append(tensor.shape) or read(tensor))
        run = engine.generate(prompt(), max_new_tokens=6)
    assert reads.count((1, TOP_K)) == LAYERS * (len(run.steps) - 1)
    assert len(reads) - LAYERS * len(run.steps) <= 1, "at most the prompt's attention mask is read beside"


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("driver", ["gpu-driven", "copy-engine"])
def test_steps_from_a_graph_do_not_wait_for_the_gpu_at_all(driver, monkeypatch):
    """torch raises at every synchronising call between the first captured step and the last."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: runs on a machine that has one")
    with prescope.attach(tiny_moe(), slots=6, device="cuda", decode=driver) as engine:
        engine.generate(prompt(), max_new_tokens=4)
        run_steps = DecodeLoop._run_steps

        def strict(self, *arguments):
            torch.cuda.set_sync_debug_mode("error")
            try:
                run_steps(self, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(DecodeLoop, "_run_steps", strict)
        run = engine.generate(prompt(), max_new_tokens=20)
    assert len(run.tokens[0]) == 20


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # inductor's advice
def test_compiled_layers_give_the_same_tokens():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: runs on a machine that has one")
    model, ids = tiny_moe(), prompt(batch=2)
    expected = plain_tokens(model, ids, new=20)
    with prescope.attach(model, slots=9, device="cuda", compiled=True) as engine:
        assert engine.generate(ids, max_new_tokens=20).tokens == expected
        assert engine.generate(ids, max_new_tokens=20).tokens == expected


@pytest.mark.gpu
def test_copies_are_drawn_before_the_end_of_the_wait_for_them():
    """Copies are timed by events, layers by the GPU's own clock: both have to be brought to one."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU: runs on a machine that has one")
    with prescope.attach(tiny_moe(), slots=6, device="cuda", decode="host-driven", events=True) as engine:
        engine.generate(prompt(), max_new_tokens=4)
        events = engine.generate(prompt(), max_new_tokens=20).events
    key = ["step", "moe_layer"]
    events["end_us"] = events["start_us"] + events["dur_us"]
    is_copy = (events["kind"] == "transfer") & (events["phase"] == "decode")
    copies = events[is_copy].groupby(key)["end_us"].max().rename("copied_us").reset_index()
    waits = copies.merge(events[events["kind"] == "stall"][[*key, "end_us"]])
    late_us = waits["copied_us"] - waits["end_us"]
    assert len(waits) > 20 and -60.0 < late_us.median() < 10.0, late_us.describe()
    begun = events[is_copy].groupby(key)["start_us"].min().rename("copying_us").reset_index()
    asked = begun.merge(events[events["kind"] == "host_wait"][[*key, "start_us"]])
    after_us = asked["copying_us"] - asked["start_us"]
    assert len(asked) > 20 and 0.0 < after_us.median() < 100.0, after_us.describe()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="for the interpreted GPU, whose steps take milliseconds"
)
def test_compiling_decisions_is_in_no_captured_step(gpu, monkeypatch):
    """A step that waited for the compiler would look like one that waited for the host."""
    compiled = []

    def slowly(*_: object) -> None:
        compiled.append(time.perf_counter())
        time.sleep(3.0)

    monkeypatch.setattr("prescope.engine.graph.host_driver.compile_first", slowly)
    model = tiny_moe(num_hidden_layers=1)
    with prescope.attach(model, slots=6, decode="host-driven", **gpu) as engine:
        run = engine.generate(prompt(), max_new_tokens=6)
    assert compiled and run.config["reasons"]["decode"].startswith("host-driven")
    decode = run.steps[run.steps["phase"] == "decode"]
    # The first decode step runs layer by layer, before anything is captured.
    assert len(decode) == 5 and (decode["dur_us"].iloc[1:] < 2.5e6).all()
