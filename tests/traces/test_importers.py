"""Traces in other programs' own forms become what was routed, or are refused with the place that is wrong."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import save_file

import prescope
from prescope.errors import BadTrace, TraceMismatch, UnsupportedOption
from prescope.scheduler.costs import LayerCosts
from prescope.simulator import Machine, Scenario, Scenarios, Simulator
from prescope.traces.routing import RoutingTrace
from prescope.training import TrainConfig, train_on_trace
from tests.support.foreign_traces import (
    EXPERTS,
    LAYERS,
    SHAPE,
    TOP_K,
    Known,
    base64_of,
    known,
    sglang_answer,
    vllm_answer,
    write_layers,
    write_lines,
    write_long_moe_trace,
    write_moe_trace,
    write_router_trace,
    write_sglang,
    write_vllm,
)

COSTS = LayerCosts(link_us=60.0, gpu_us=12.0, rest_us=25.0, cpu_us=(0.0, 40.0), source="made up")


def assert_holds(trace: RoutingTrace, of: Known) -> None:
    """Every token of every request is where it belongs: its prompt in one step, then one step a token."""
    for number, (ids, prompt) in enumerate(zip(of.ids, of.prompt_tokens, strict=True)):
        rows = np.flatnonzero(trace.sequence == number)
        np.testing.assert_array_equal(trace.expert_ids[rows], ids)
        np.testing.assert_array_equal(trace.position[rows], np.arange(len(ids)))
        np.testing.assert_array_equal(trace.phase[rows], np.arange(len(ids)) >= prompt)
        assert len(set(trace.step[rows[:prompt]])) <= 1
        assert len(set(trace.step[rows[prompt:]])) == len(ids) - prompt
    assert trace.fingerprint.startswith("foreign-")


@pytest.fixture
def of() -> Known:
    return known()


KINDS = {
    "vllm": lambda folder, of: write_vllm(folder / "answers.jsonl", of),
    "sglang": lambda folder, of: write_sglang(folder / "answers.jsonl", of),
    "tensors": lambda folder, of: write_layers(folder / "layers", of),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_requests_is_what_was_routed(kind, of, tmp_path):
    trace = prescope.read_trace(KINDS[kind](tmp_path, of), shape=SHAPE)
    assert_holds(trace, of)
    assert (trace.step == 0).sum() == sum(of.prompt_tokens), "one step reads all prompts"
    assert trace.versions["imported from"] == kind
    assert trace.weights[trace.expert_ids >= 0] == pytest.approx(1 / TOP_K)


def test_requests_that_did_not_run_side_by_side_follow_each_other(of, tmp_path):
    trace = prescope.read_trace(write_vllm(tmp_path / "a.jsonl", of), shape=SHAPE, batch=1)
    assert_holds(trace, of)
    first = trace.step[trace.sequence == 0]
    assert trace.step[trace.sequence == 1].min() == first.max() + 1


def test_what_vllm_returns_in_python_is_read(of):
    outputs = [
        SimpleNamespace(
            prompt_token_ids=list(range(prompt)),
            outputs=[SimpleNamespace(routed_experts=ids, token_ids=list(range(len(ids) - prompt + 1)))],
        )
        for ids, prompt in zip(of.ids, of.prompt_tokens, strict=True)
    ]
    assert_holds(prescope.read_trace(outputs, shape=SHAPE), of)


def test_an_answer_without_the_beginning_of_its_prompt_keeps_its_positions(of):
    answer = vllm_answer(of.ids[0], 4)
    answer["choices"][0]["routed_experts"] = vllm_answer(of.ids[0][2:], 2)["choices"][0]["routed_experts"]
    trace = prescope.read_trace(answer, shape=SHAPE)
    assert trace.position.tolist() == [2, 3, 4, 5]
    assert trace.phase.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("with_schema", [False, True])
def test_dense_layers_of_sglang_are_left_out_by_its_schema_or_by_name(of, with_schema):
    """Its buffers have rows for all layers; a dense layer's hold zeros."""
    wide = [np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1) for ids in of.ids]
    answers = [
        sglang_answer(ids, prompt, with_schema=with_schema)
        for ids, prompt in zip(wide, of.prompt_tokens, strict=True)
    ]
    shape = (LAYERS + 1, EXPERTS, TOP_K)
    if not with_schema:
        with pytest.raises(BadTrace, match=r"token 0, layer 0 uses expert 0 twice.*layers="):
            prescope.read_trace(answers, shape=shape)
    trace = prescope.read_trace(answers, shape=shape, layers=None if with_schema else [1, 2, 3])
    assert_holds(trace, of)
    assert trace.decoder_layers == [1, 2, 3]


def test_the_openai_endpoint_of_sglang_is_read(of):
    answer = {
        "choices": [
            {"text": "...", "sglext": {"routed_experts": base64_of(of.ids[0].astype("<i4").tobytes())}}
        ],
        "usage": {"prompt_tokens": 4, "completion_tokens": 3},
    }
    assert_holds(prescope.read_trace(answer, shape=SHAPE), Known(of.ids[:1], [4], []))


def test_llama_cpp_leaves_prompt_tokens_out_of_its_last_layer(of, tmp_path):
    ids = of.ids[0]
    trace = prescope.read_trace(write_moe_trace(tmp_path / "t.csv", ids, 4, first_layer=1), shape=SHAPE)
    expected = ids.copy()
    expected[:3, -1] = -1
    np.testing.assert_array_equal(trace.expert_ids, expected)
    assert trace.phase.tolist() == [0, 0, 0, 0, 1, 1]
    assert trace.step.tolist() == [0, 0, 0, 0, 1, 2]
    assert trace.decoder_layers == [1, 2, 3]
    assert (trace.weights[:3, -1] == 0).all()


@pytest.mark.parametrize("has_head", [True, False])
def test_the_numbered_form_of_llama_cpp_is_read(of, tmp_path, has_head):
    path = write_long_moe_trace(tmp_path / "t.csv", of.ids[0], 4)
    if not has_head:
        path.write_text(path.read_text().partition("\n")[2])
    assert_holds(prescope.read_trace(path, shape=SHAPE), Known(of.ids[:1], [4], []))


def test_megatrons_ranks_hold_texts_of_their_own_and_their_states(tmp_path):
    of = known((6, 6), (4, 4))
    trace = prescope.read_trace(write_router_trace(tmp_path / "trace", of), shape=SHAPE, batch=2)
    assert_holds(trace, of)
    assert trace.decoder_layers == [1, 2, 3]
    assert trace.inputs is not None
    for number, inputs in enumerate(of.inputs):
        np.testing.assert_array_equal(trace.inputs[trace.sequence == number], inputs)


def test_megatrons_pipeline_stages_hold_layers_of_their_own(tmp_path):
    of = known((5,), (3,))
    folder = write_router_trace(tmp_path / "trace", of, with_states=False)
    whole = folder / "router_trace_rank0.jsonl"
    records = [json.loads(line) for line in whole.read_text().splitlines()]
    write_lines(whole, [one for one in records if one["layer"] < 3])
    write_lines(
        folder / "router_trace_rank1.jsonl", [{**one, "rank": 1} for one in records if one["layer"] == 3]
    )
    assert_holds(prescope.read_trace(folder, shape=SHAPE), of)


@pytest.mark.parametrize("form", [np.asarray, torch.from_numpy, lambda ids: ids.tolist()])
def test_arrays_are_read_from_whatever_holds_them(of, form):
    source = [{"expert_ids": form(ids)} for ids in of.ids]
    assert_holds(prescope.read_trace(source, shape=SHAPE, prompt_tokens=of.prompt_tokens), of)


def test_files_of_arrays_are_read_with_weights_and_states(of, tmp_path):
    np.save(tmp_path / "one.npy", of.ids[0])
    assert_holds(prescope.read_trace(tmp_path / "one.npy", shape=SHAPE), Known(of.ids[:1], [0], []))
    np.savez(tmp_path / "several.npz", *of.ids)
    several = prescope.read_trace(tmp_path / "several.npz", shape=SHAPE, prompt_tokens=of.prompt_tokens)
    assert_holds(several, of)
    weights = np.full(of.ids[0].shape, 0.25, np.float32)
    np.savez(tmp_path / "all.npz", expert_ids=of.ids[0], weights=weights, inputs=of.inputs[0])
    trace = prescope.read_trace(tmp_path / "all.npz", shape=SHAPE)
    np.testing.assert_array_equal(trace.weights, weights)
    np.testing.assert_array_equal(trace.inputs, of.inputs[0])
    assert "weights" not in trace.versions


def test_bfloat16_states_come_over_exactly(of, tmp_path):
    trace = prescope.read_trace(write_layers(tmp_path / "layers", of), shape=SHAPE)
    np.testing.assert_array_equal(trace.inputs[trace.sequence == 0], of.inputs[0])
    tensors = {"expert_ids": torch.from_numpy(of.ids[0]), "inputs": torch.from_numpy(of.inputs[0]).bfloat16()}
    trace = prescope.read_trace(tensors, shape=SHAPE)
    np.testing.assert_array_equal(trace.inputs, of.inputs[0])


def test_prescopes_own_files_are_read_by_the_same_door(of, tmp_path):
    trace = prescope.read_trace(of.ids[0], shape=SHAPE)
    for path in (trace.save(tmp_path / "t.safetensors"), trace.save_parquet(tmp_path / "t.parquet")):
        loaded = prescope.read_trace(path)
        np.testing.assert_array_equal(loaded.expert_ids, trace.expert_ids)
        assert loaded.fingerprint == trace.fingerprint


def test_traces_of_one_foreign_model_join_and_no_engine_takes_them_for_its_own(of):
    one, other = (prescope.read_trace(ids, shape=SHAPE, model="olmoe") for ids in of.ids)
    assert len(RoutingTrace.concat([one, other])) == len(one) + len(other)
    with pytest.raises(TraceMismatch):
        RoutingTrace.concat([one, prescope.read_trace(of.ids[1], shape=SHAPE, model="mixtral")])
    with pytest.raises(TraceMismatch, match="foreign-"):
        one.check_model("0123456789abcdef", "an engine's")


def test_a_foreign_trace_is_replayed_and_compared(of, tmp_path):
    trace = prescope.read_trace(write_vllm(tmp_path / "a.jsonl", of), shape=SHAPE)
    result = Simulator(trace, COSTS, row_bytes=1 << 20).run("on-demand", slots=6)
    assert result.counts.needed > 0
    scenarios = Scenarios(trace, [Machine("made up", COSTS, 1 << 20, 10.0, 2)])
    table = scenarios.table(scenarios.compare(Scenario(slots=6, machine="made up")))
    assert (table["tokens/s"] > 0).all()


def test_a_foreign_trace_with_states_trains_a_predictor_without_the_model(tmp_path):
    """Each state says which experts the next layer uses: a predictor that learns beats chance."""
    of = known((24,) * 12, (24,) * 12, seed=1)
    states = []
    for ids in of.ids:
        one_hot = np.zeros((len(ids), LAYERS, EXPERTS), np.float32)
        np.put_along_axis(one_hot[:, :-1], ids[:, 1:].astype(np.int64), 1.0, axis=2)
        states.append(one_hot)
    trace = prescope.read_trace(
        [{"expert_ids": i, "inputs": s} for i, s in zip(of.ids, states, strict=True)], shape=SHAPE,
        prompt_tokens=24,
    )  # fmt: skip
    config = prescope.predictor.LlaporConfig.paper()
    trained = train_on_trace(
        trace,
        config=replace(config, lookahead=1),
        training=TrainConfig(epochs=4, batch_tokens=32),
        path=tmp_path / "p.safetensors",
    )
    recall = trained.table().set_index("predictor")["recall"]
    assert recall[trained.predictor.name] > recall["chance"] + 0.1
    assert trained.predictor.tag.fingerprint == trace.fingerprint
    with pytest.raises(BadTrace, match="inputs"):
        train_on_trace(replace(trace, inputs=None))


DAMAGES = {
    "an id outside": lambda ids: ids.__setitem__((3, 1, 0), EXPERTS),
    "an id below": lambda ids: ids.__setitem__((3, 1, 0), -2),
    "twice": lambda ids: ids.__setitem__((3, 1, 1), ids[3, 1, 0]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_ids_that_no_router_gives_are_refused_with_token_and_layer(damage, of, tmp_path):
    DAMAGES[damage](of.ids[0])
    sources = [of.ids[0].astype(np.int64), sglang_answer(of.ids[0], 4)]
    sources.append(
        write_router_trace(tmp_path / "trace", Known(of.ids[:1], [4], of.inputs[:1]), with_states=False)
    )
    sources.append(write_long_moe_trace(tmp_path / "t.csv", of.ids[0], 4))
    for source in sources:
        with pytest.raises(BadTrace, match=r"token 3, layer [12]"):
            prescope.read_trace(source, shape=SHAPE)


def test_shapes_that_do_not_fit_are_refused(of):
    with pytest.raises(BadTrace, match=r"\(6, 3, 2\), expected \(tokens, 4 layers, top-2\)"):
        prescope.read_trace(of.ids[0], shape=(4, EXPERTS, TOP_K))
    with pytest.raises(BadTrace, match="whole number of tokens"):
        prescope.read_trace(sglang_answer(of.ids[0], 4), shape=(5, EXPERTS, 5))
    with pytest.raises(BadTrace, match="belongs to another answer"):
        prescope.read_trace(vllm_answer(of.ids[0], 4) | {"usage": {"prompt_tokens": 1}}, shape=SHAPE)
    with pytest.raises(BadTrace, match="2 requests"):
        prescope.read_trace(of.ids, shape=SHAPE, prompt_tokens=[1])
    with pytest.raises(BadTrace, match="width"):
        prescope.read_trace(
            [
                {"expert_ids": i, "inputs": s[..., : 2 + n]}
                for n, (i, s) in enumerate(zip(of.ids, of.inputs, strict=True))
            ],
            shape=SHAPE,
        )


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({}, "how many experts"),
        ({"shape": (3, 8)}, "layers, experts, top_k"),
        ({"shape": (3, 8, 9)}, "top_k <= experts"),
        ({"shape": SHAPE, "kind": "onnx"}, "choose one of"),
        ({"shape": SHAPE, "layers": [2, 1]}, "ascending"),
    ],
)
def test_settings_that_cannot_be_are_refused(keywords, words, of):
    with pytest.raises(UnsupportedOption, match=words):
        prescope.read_trace(of.ids[0], **keywords)


def test_lines_that_are_wrong_are_named(of, tmp_path):
    path = write_moe_trace(tmp_path / "t.csv", of.ids[0], 4)
    lines = path.read_text().splitlines()
    for change, words in (
        ([*lines[:5], "1,x", *lines[6:]], "line 6: expert is 'x'"),
        (lines[:-1], "whole tokens of top-2"),
        (lines[:-2], "lacks layer 2"),
        (["a,b,c", *lines[1:]], "expected layer,expert"),
    ):
        path.write_text("\n".join(change) + "\n")
        with pytest.raises(BadTrace, match=words):
            prescope.read_trace(path, shape=SHAPE)
    folder = write_router_trace(tmp_path / "trace", of)
    file = folder / "router_trace_rank0.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[2][:40], *lines[3:]]))
    with pytest.raises(BadTrace, match=r"router_trace_rank0\.jsonl, line 3"):
        prescope.read_trace(folder, shape=SHAPE)
    file.write_text("\n".join(lines))
    (folder / "hidden_states_rank0.bin").write_bytes(b"")
    with pytest.raises(BadTrace, match="does not hold"):
        prescope.read_trace(folder, shape=SHAPE)


def test_a_file_that_is_not_there_or_says_nothing_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        prescope.read_trace(tmp_path / "gone.csv", shape=SHAPE)
    Path(tmp_path / "what.bin").write_bytes(b"1")
    with pytest.raises(UnsupportedOption, match="kind="):
        prescope.read_trace(tmp_path / "what.bin", shape=SHAPE)


@pytest.mark.parametrize("prefix", ["", "model.layers.", "layer_", "run/moe-"])
@pytest.mark.parametrize("inner", ["", "mlp.", "block_sparse_moe/gate."])
@pytest.mark.parametrize(
    "names", [("expert_ids", "hidden_states"), ("topk_ids", "router_input"), ("selected_experts", "inputs")]
)
def test_one_file_holds_all_layers_under_any_of_the_names(prefix, inner, names, of, tmp_path):
    """Names have underscores of their own: what stands before them may not take a part of them along."""
    ids, inputs = np.concatenate(of.ids), np.concatenate(of.inputs)
    tensors = {"sequence": np.repeat(np.arange(len(of.ids)), [len(one) for one in of.ids])}
    for layer in range(LAYERS):
        for name, array in zip(names, (ids, inputs), strict=True):
            tensors[f"{prefix}{layer}.{inner}{name}"] = np.ascontiguousarray(array[:, layer])
        tensors[f"{prefix}{layer}.{inner}gate_weights"] = np.ones((EXPERTS, 3), np.float32)
    save_file(tensors, tmp_path / "run.safetensors")
    trace = prescope.read_trace(tmp_path / "run.safetensors", shape=SHAPE, prompt_tokens=of.prompt_tokens)
    assert_holds(trace, of)
    np.testing.assert_array_equal(trace.inputs[trace.sequence == 0], of.inputs[0])


def test_a_layer_that_is_there_twice_is_not_chosen_from(of, tmp_path):
    for part in ("first", "second"):
        save_file(
            {f"{n}.expert_ids": np.ascontiguousarray(of.ids[0][:, n]) for n in range(LAYERS)},
            tmp_path / f"{part}.safetensors",
        )
    with pytest.raises(BadTrace, match=r"second\.safetensors: \d\.expert_ids is there beside other ids"):
        prescope.read_trace(tmp_path, "tensors", shape=SHAPE)


def test_states_of_a_dtype_that_is_not_read_are_not_left_out_in_silence(of, tmp_path):
    states = torch.from_numpy(of.inputs[0]).to(torch.float8_e4m3fn)
    tensors = {f"{n}.hidden_states": states[:, n].contiguous() for n in range(LAYERS)}
    tensors |= {f"{n}.expert_ids": torch.from_numpy(of.ids[0][:, n].copy()) for n in range(LAYERS)}
    safetensors.torch.save_file(tensors, tmp_path / "run.safetensors")
    with pytest.raises(BadTrace, match=r"hidden_states is F8_E4M3"):
        prescope.read_trace(tmp_path / "run.safetensors", shape=SHAPE)


@pytest.mark.parametrize(
    "of_kind",
    [int, np.int64, np.int16, np.asarray, torch.tensor],
    ids=["int", "int64", "int16", "array", "tensor"],
)
def test_numbers_are_pythons_numpys_or_torchs(of_kind, of):
    whole = prescope.read_trace(of.ids, shape=SHAPE, prompt_tokens=of.prompt_tokens, batch=1)
    shape, prompts = tuple(map(of_kind, SHAPE)), list(map(of_kind, of.prompt_tokens))
    trace = prescope.read_trace(of.ids, shape=shape, prompt_tokens=prompts, batch=1, layers=range(LAYERS))
    for name in ("expert_ids", "step", "phase", "sequence", "position"):
        np.testing.assert_array_equal(getattr(trace, name), getattr(whole, name))
    one = prescope.read_trace(of.ids[0], shape=shape, prompt_tokens=of_kind(2))
    assert (one.phase == 0).sum() == 2


@pytest.mark.parametrize(
    "option",
    [
        {"shape": 3}, {"shape": "3,8,2"}, {"shape": (3.0, 8, 2)}, {"prompt_tokens": 2.0}, {"prompt_tokens": [2.0]},
        {"prompt_tokens": "2"}, {"prompt_tokens": True}, {"batch": 0}, {"batch": 1.5}, {"batch": "2"}, {"layers": "12"},
        {"layers": [0.5, 1]}, {"layers": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_whole_number_is_refused_by_name(option, of, tmp_path):
    """Of every kind alike: a batch of 0 once meant 1 in Megatron's traces, half a layer the one before it."""
    for source in (of.ids[0], write_router_trace(tmp_path / "trace", of)):
        with pytest.raises(UnsupportedOption, match=next(iter(option))):
            prescope.read_trace(source, **{"shape": SHAPE, **option})


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_a_place_that_is_filled_up_with_the_largest_number_is_no_expert(dtype, of):
    ids = of.ids[0].astype(dtype)
    ids[3, 1, 0] = np.iinfo(dtype).max
    with pytest.raises(BadTrace, match=rf"token 3, layer 1: expert {np.iinfo(dtype).max} is outside"):
        prescope.read_trace(ids, shape=SHAPE)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("answer", [vllm_answer, sglang_answer])
def test_an_answer_may_hold_any_letter_in_its_text(answer, end, mark, of, tmp_path):
    """JSON Lines end in a line feed; a separator of Unicode's within a text is a letter of it."""
    texts = zip(of.ids, of.prompt_tokens, strict=True)
    answers = [answer(ids, prompt) | {"text": "a\u2028b\u2029c\x85d"} for ids, prompt in texts]
    path = tmp_path / "answers.jsonl"
    lines = end.join(json.dumps(one, ensure_ascii=False) for one in answers)
    path.write_bytes((mark + lines).encode())
    assert_holds(prescope.read_trace(path, shape=SHAPE), of)
