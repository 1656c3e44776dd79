import json
import os
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from prescope.errors import BadTrace, TraceMismatch
from prescope.traces.events import read_events, write_events
from prescope.traces.routing import _FRAME_DTYPES, RoutingTrace, saturating_float16
from prescope.training.prepare import prompt_keys
from tests.support.small_run import NUM_EXPERTS, NUM_LAYERS, TOP_K, small_run, small_trace

ARRAYS = ["expert_ids", "weights", "inputs", "step", "sequence", "position", "phase"]


def assert_same(a: RoutingTrace, b: RoutingTrace, without: tuple[str, ...] = ()) -> None:
    for name in ARRAYS:
        if name not in without:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name, strict=True)
    assert a._metadata() == b._metadata()


@pytest.fixture
def trace() -> RoutingTrace:
    return small_trace(width=6)


def test_a_saved_trace_comes_back_exactly(trace, tmp_path):
    assert_same(RoutingTrace.load(trace.save(tmp_path / "t.safetensors")), trace)


def test_a_trace_without_inputs_comes_back_without_inputs(tmp_path):
    trace = small_trace()
    loaded = RoutingTrace.load(trace.save(tmp_path / "t.safetensors"))
    assert loaded.inputs is None
    assert_same(loaded, trace, without=("inputs",))


def test_what_is_known_of_prompts_may_be_arrays(trace, tmp_path):
    """Token ids are arrays or tensors to most people; saving ended in json's TypeError."""
    known = [{"tokens": np.arange(3000), "id": np.int64(7)}, {"tokens": torch.arange(4), "domain": "b"}]
    told = replace(trace, prompts=known)
    expected = [{"tokens": list(range(3000)), "id": 7}, {"tokens": [0, 1, 2, 3], "domain": "b"}]
    assert RoutingTrace.load(told.save(tmp_path / "a.safetensors")).prompts == expected
    assert RoutingTrace.load_parquet(told.save_parquet(tmp_path / "a.parquet")).prompts == expected
    assert told.digest() == replace(trace, prompts=expected).digest()
    other = np.arange(3000)
    other[1500] = 0  # in the part that numpy does not print
    texts = [{"tokens": np.arange(3000)}, {"tokens": list(range(3000))}, {"tokens": other}]
    keys = prompt_keys(replace(trace, prompts=texts, sequence=np.arange(len(trace)) % 3))
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(BadTrace, match="cannot be written"):
        replace(trace, prompts=[{"made": object()}]).save(tmp_path / "b.safetensors")


def test_parquet_keeps_everything_but_the_inputs(trace, tmp_path):
    loaded = RoutingTrace.load_parquet(trace.save_parquet(tmp_path / "t.parquet"))
    assert loaded.inputs is None
    assert_same(loaded, trace, without=("inputs",))


def test_parquet_keeps_the_fingerprint_in_its_schema(trace, tmp_path):
    """Other tools read it without prescope, so it stands in the file's schema and not in a column."""
    attrs = pq.read_schema(trace.save_parquet(tmp_path / "t.parquet")).metadata[b"PANDAS_ATTRS"]
    assert json.loads(json.loads(attrs)["prescope"])["fingerprint"] == trace.fingerprint


def test_parquet_keeps_tokens_that_used_no_expert(tmp_path):
    """A row of only -1 has no entry in to_frame(); losing it in the file would shift every later row."""
    trace = small_trace()
    ids = trace.expert_ids.copy()
    ids[3] = -1
    trace = replace(trace, expert_ids=ids)
    assert len(RoutingTrace.load_parquet(trace.save_parquet(tmp_path / "t.parquet"))) == len(trace)
    assert 3 not in set(trace.to_frame()["row"])


def test_a_failed_save_leaves_the_old_file(trace, tmp_path, monkeypatch):
    path = trace.save(tmp_path / "t.safetensors")
    before = path.read_bytes()

    def full_disk(*_args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        replace(trace, model="other").save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_no_truncated_file_is_taken_for_a_trace(trace, tmp_path):
    path = trace.save(tmp_path / "t.safetensors")
    whole = path.read_bytes()
    for keep in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(BadTrace, match=r"t\.safetensors"):
            RoutingTrace.load(path)


def test_no_truncated_parquet_is_taken_for_a_trace(trace, tmp_path):
    path = trace.save_parquet(tmp_path / "t.parquet")
    whole = path.read_bytes()
    for keep in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(BadTrace, match=r"t\.parquet"):
            RoutingTrace.load_parquet(path)


def rewritten(path, change):
    """A Parquet trace with another table inside, its metadata kept but for the checksum, as older versions wrote it."""
    table = pq.read_table(path)
    attrs = json.loads(table.schema.metadata[b"PANDAS_ATTRS"])
    del attrs["checksum"]
    frame = change(table.to_pandas(ignore_metadata=True))
    schema = {**table.schema.metadata, b"PANDAS_ATTRS": json.dumps(attrs).encode()}
    pq.write_table(pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(schema), path)
    return path


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda f: f.drop(index=5).pipe(lambda g: pd.concat([g, g.iloc[[7]]])),
            "missing and another there twice",
        ),
        (lambda f: f.drop(index=5), "expected rows x layers x ranks"),
        (lambda f: pd.concat([f, f.iloc[[7]]]), "expected rows x layers x ranks"),
        (lambda f: f.assign(step=f["step"].where(f.index != 3, 1)), "step differs"),
        (lambda f: f.assign(expert=f["expert"].astype(float).where(f.index != 3)), "gaps"),
        (lambda f: f.assign(row=f["row"].astype(str)), "row is"),
        (lambda f: f.assign(expert=f["expert"].astype(np.int64) + 2**20), "no int16"),
        (lambda f: f.assign(phase="postfill"), "postfill"),
    ],
)
def test_a_parquet_trace_whose_rows_are_not_each_there_once_is_refused(change, says, trace, tmp_path):
    """Twice and missing make the right number of rows, and the trace would be another one without a word."""
    path = rewritten(trace.save_parquet(tmp_path / "t.parquet"), change)
    with pytest.raises(BadTrace, match=says):
        RoutingTrace.load_parquet(path)


def test_rows_in_another_order_are_the_same_trace(trace, tmp_path):
    path = trace.save_parquet(tmp_path / "t.parquet")
    shuffled = RoutingTrace.load_parquet(rewritten(path, lambda f: f.sample(frac=1.0, random_state=0)))
    assert np.array_equal(shuffled.expert_ids, trace.expert_ids)
    assert np.array_equal(shuffled.position, trace.position)


def test_any_flipped_bit_of_the_arrays_is_found(trace, tmp_path):
    """A router weight that is off by a bit is a plausible number: only the checksum tells."""
    path = trace.save(tmp_path / "t.safetensors")
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in np.linspace(start, len(whole) - 1, 40).astype(int).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(BadTrace):
            RoutingTrace.load(path)


def test_a_parquet_file_that_says_billions_of_rows_is_refused_before_they_are_made(tmp_path):
    """Run lengths make a few bytes of them."""
    rows = 5_000_000
    pq.write_table(
        pa.table({name: np.zeros(rows, np.int8) for name in _FRAME_DTYPES}), tmp_path / "t.parquet"
    )
    assert (tmp_path / "t.parquet").stat().st_size < 200_000
    with pytest.raises(BadTrace, match=r"says it holds 5,000,000 rows"):
        RoutingTrace.load_parquet(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_experts": 2**40}, "num_experts"),
        ({"num_experts": 8.0}, "num_experts"),
        ({"top_k": True}, "top_k"),
        ({"decoder_layers": None}, "decoder_layers"),
        ({"decoder_layers": ["a"] * 4}, "decoder_layers"),
        ({"prompts": [1]}, "prompts"),
        ({"model": 3}, "model"),
        ({"versions": []}, "versions"),
    ],
)
def test_metadata_of_the_wrong_kind_is_named(change, says, trace):
    with pytest.raises(BadTrace, match=says):
        replace(trace, **change)


def test_an_event_table_comes_back_and_another_file_is_refused(tmp_path):
    events = small_run().events
    path = write_events(events, tmp_path / "e.parquet")
    pd.testing.assert_frame_equal(read_events(path), events)
    with pytest.raises(BadTrace, match="lacks the columns"):
        read_events(small_trace().save_parquet(tmp_path / "t.parquet"))
    (tmp_path / "text").write_text("no parquet")
    with pytest.raises(BadTrace, match="cannot be read as Parquet"):
        read_events(tmp_path / "text")


def test_a_missing_file_is_reported_as_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        RoutingTrace.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError):
        RoutingTrace.load_parquet(tmp_path / "none.parquet")


def test_other_safetensors_and_parquet_files_are_refused(tmp_path):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(BadTrace, match="no routing trace"):
        RoutingTrace.load(tmp_path / "weights.safetensors")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(BadTrace, match="no routing trace"):
        RoutingTrace.load_parquet(tmp_path / "other.parquet")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weights": None}, "lacks the arrays weights"),
        ({"step": np.zeros(3, np.int32)}, "step has shape"),
        ({"expert_ids": "out of range"}, "expert_ids holds 8"),
        ({"weights": "nan"}, "NaN"),
        ({"inputs": "nan"}, "inputs holds 1 NaN"),
        ({"inputs": "inf"}, "inputs holds 1 NaN"),
        ({"phase": "out of range"}, "phase holds 8"),
    ],
)
def test_damaged_arrays_are_named(change, says, trace, tmp_path):
    path = trace.save(tmp_path / "t.safetensors")
    arrays = load_file(path)
    for name, value in change.items():
        if value is None:
            del arrays[name]
        elif isinstance(value, str):
            arrays[name].ravel()[2] = float(value) if value in ("nan", "inf") else NUM_EXPERTS
        else:
            arrays[name] = value
    metadata = {"format": "prescope-routing-1", "prescope": json.dumps(trace._metadata())}
    save_file(arrays, path, metadata)
    with pytest.raises(BadTrace, match=says):
        RoutingTrace.load(path)


def test_damaged_metadata_is_a_bad_trace(trace, tmp_path):
    path = tmp_path / "t.safetensors"
    for text in ("{", "{}", '{"model": 3}'):
        save_file(trace._arrays(), path, {"format": "prescope-routing-1", "prescope": text})
        with pytest.raises(BadTrace, match="metadata"):
            RoutingTrace.load(path)


def test_ids_too_large_for_int16_are_refused_before_they_wrap():
    trace = small_trace()
    with pytest.raises(BadTrace, match="65536"):
        replace(trace, expert_ids=np.full(trace.expert_ids.shape, 2**16, dtype=np.int64))


def test_steps_that_decrease_are_refused():
    trace = small_trace()
    with pytest.raises(BadTrace, match="decrease"):
        replace(trace, step=trace.step[::-1])


def test_needed_lists_each_distinct_expert_once_with_its_tokens(trace):
    for step in trace.steps:
        ids = trace.expert_ids[trace.step == step]
        needs = list(trace.needed(step))
        assert [need.moe_layer for need in needs] == list(range(NUM_LAYERS))
        for layer, experts, tokens in needs:
            expected = np.unique(ids[:, layer], return_counts=True)
            np.testing.assert_array_equal(experts, expected[0])
            np.testing.assert_array_equal(tokens, expected[1])


def test_step_routing_is_the_step_layer_by_layer(trace):
    """Contiguous int16 and float32: what is copied into an engine's buffers as it is."""
    for step in trace.steps:
        ids, weights = trace.step_routing(step)
        rows = np.flatnonzero(trace.step == step)
        assert ids.shape == weights.shape == (NUM_LAYERS, len(rows), TOP_K)
        assert (ids.dtype, weights.dtype) == (np.int16, np.float32)
        assert ids.flags.c_contiguous and weights.flags.c_contiguous
        for layer in range(NUM_LAYERS):
            np.testing.assert_array_equal(ids[layer], trace.expert_ids[rows, layer])
            np.testing.assert_array_equal(weights[layer], trace.weights[rows, layer])


def test_step_routing_does_not_lend_the_trace_itself(trace):
    before = trace.expert_ids.copy()
    trace.step_routing(1).ids_LTK[:] = 0
    np.testing.assert_array_equal(trace.expert_ids, before)


def test_a_step_that_is_not_there_is_named(trace):
    with pytest.raises(BadTrace, match=r"no step 999; it has steps 0 to"):
        trace.step_routing(999)


def test_expert_counts_add_up_to_tokens_times_top_k(trace):
    counts = trace.expert_counts()
    assert counts.shape == (NUM_LAYERS, NUM_EXPERTS)
    assert (counts.sum(axis=1) == len(trace) * TOP_K).all()
    ids = trace.expert_ids.copy()
    ids[0, 0, 0] = -1
    assert replace(trace, expert_ids=ids).expert_counts().sum() == counts.sum() - 1


def test_prefill_and_decode_share_the_rows(trace):
    prefill, decode = trace.select(phase="prefill"), trace.select(phase="decode")
    assert len(prefill) + len(decode) == len(trace)
    assert set(prefill.step) == {0}
    assert set(trace.select(steps=[2, 4]).step) == {2, 4}


def test_concat_keeps_the_needs_of_every_run_apart(trace):
    other = small_trace(width=6, seed=1)
    both = RoutingTrace.concat([trace, other])
    assert len(both.steps) == len(trace.steps) + len(other.steps)
    np.testing.assert_array_equal(both.expert_counts(), trace.expert_counts() + other.expert_counts())
    for joined, single in zip(both.needed(len(trace.steps)), other.needed(0), strict=True):
        np.testing.assert_array_equal(joined.experts, single.experts)
    assert both.sequence.max() == 3
    assert RoutingTrace.concat([trace, small_trace()]).inputs is None


@pytest.mark.parametrize("known", ["fewer", "none", "some rows alone", "no rows"])
def test_concat_leaves_each_prompt_with_its_sequence(trace, known):
    """By its number a sequence has its domain, and sequences of one text are never split between two purposes."""
    count = int(trace.sequence.max()) + 1
    first = replace(trace, prompts=[{"id": f"first {i}"} for i in range(count)])
    second = replace(trace, prompts=[{"id": f"second {i}"} for i in range(count)])
    first = {
        "fewer": replace(first, prompts=first.prompts[:1]),
        "none": replace(first, prompts=[]),
        "some rows alone": first.take(first.sequence == 0),
        "no rows": first.take(first.sequence < 0),
    }[known]
    both = RoutingTrace.concat([first, second, first])
    of_rows = [both.prompt_of_each()[sequence].get("id") for sequence in both.sequence.tolist()]
    parts = [(part.sequence.tolist(), part.prompt_of_each()) for part in (first, second, first)]
    assert of_rows == [prompts[i].get("id") for sequences, prompts in parts for i in sequences]


@pytest.mark.parametrize(
    "sizes", [{"num_experts": NUM_EXPERTS + 1}, {"decoder_layers": [0, 1, 2, 9]}, "width"]
)
def test_traces_of_other_sizes_are_not_joined(trace, sizes):
    other = small_trace(width=5) if sizes == "width" else replace(trace, **sizes)
    for pair in ([trace, other], [other, trace]):
        with pytest.raises(TraceMismatch, match=r"cannot be joined.*one model"):
            RoutingTrace.concat(pair)


def test_traces_of_two_models_are_not_joined(trace):
    with pytest.raises(TraceMismatch, match="record a trace with this model"):
        RoutingTrace.concat([trace, replace(trace, fingerprint="f" * 16, model="other")])
    trace.check_model(trace.fingerprint, "any name")


def test_to_frame_has_one_row_for_each_expert_used(trace):
    frame = trace.to_frame()
    assert len(frame) == len(trace) * NUM_LAYERS * TOP_K
    row = frame[(frame["row"] == 4) & (frame["moe_layer"] == 2) & (frame["rank"] == 1)].iloc[0]
    assert row["expert"] == trace.expert_ids[4, 2, 1]
    assert row["weight"] == trace.weights[4, 2, 1]
    assert row["phase"] == "prefill"


def test_inputs_saturate_instead_of_becoming_infinite():
    cast = saturating_float16(np.array([1e9, -1e9, 1.5, 65504.0], dtype=np.float32))
    np.testing.assert_array_equal(cast, np.array([65504, -65504, 1.5, 65504], dtype=np.float16))


def test_bfloat16_inputs_in_the_usual_range_survive_exactly():
    bits = np.arange(0x3880, 0x4700, dtype=np.uint32) << 16  # every bfloat16 from 2**-14 to 32768
    values = bits.view(np.float32)
    np.testing.assert_array_equal(saturating_float16(values).astype(np.float32), values)
