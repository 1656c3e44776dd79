"""A saved run is the run: every table, the routing, what was said of it; a folder holds one run, never two halves."""

import json
import re
from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest

from prescope import views
from prescope.errors import BadTrace, CannotWrite
from prescope.traces import run_files
from prescope.traces.metrics import compute_metrics
from prescope.traces.result import RunResult
from tests.support.small_run import small_run, ten_events_run


def same(one: RunResult, other: RunResult) -> None:
    for name in ("events", "layers", "steps"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(other, name))
    for name in ("text", "tokens", "config", "hardware", "notes"):
        assert getattr(one, name) == getattr(other, name), name
    assert repr(one.metrics) == repr(other.metrics), "NaN is unequal to itself"
    assert (one.trace is None) == (other.trace is None)
    if one.trace is not None and other.trace is not None:
        assert one.trace.digest() == other.trace.digest()


@pytest.mark.parametrize(
    "make", [lambda: small_run(steps=6), ten_events_run], ids=["routed", "without a trace"]
)
def test_what_is_loaded_is_what_was_saved(make, tmp_path):
    run = replace(make(), notes=["cold slots", "half a pair \ud83d"])
    loaded = RunResult.load(run.save(tmp_path / "run"))
    same(run, loaded)
    assert views.timeline(loaded).data
    assert {f.name for f in fields(RunResult)} == {
        *run_files.TABLES, "metrics", "trace", "text", "tokens", "config", "hardware", "notes",
    }, "a new field of a run is saved too"  # fmt: skip


def test_a_run_without_events_or_tokens_is_saved_too(tmp_path):
    run = small_run(steps=3)
    run = replace(run, events=run.events.iloc[:0], text=[], tokens=[])
    loaded = RunResult.load(run.save(tmp_path))
    assert loaded.events.empty
    assert loaded.tokens == []


@pytest.mark.parametrize("name", ["./~/run", "of~mine/run", "a run with ünïcode", "-"])
def test_a_folder_is_taken_as_it_is_written(name, tmp_path, monkeypatch):
    """Parquet's reader took any "~" for somebody's home, its writer did not."""
    monkeypatch.chdir(tmp_path)
    run = small_run(steps=3)
    same(RunResult.load(run.save(name)), run)
    assert (tmp_path / name / "run.json").exists()


def test_a_name_that_no_folder_can_have_is_told(tmp_path):
    with pytest.raises(CannotWrite):
        small_run(steps=3).save(tmp_path / ("a" * 300))
    with pytest.raises(BadTrace):
        RunResult.load(tmp_path / ("a" * 300))


def test_settings_are_saved_as_plain_values(tmp_path):
    run = replace(small_run(steps=3), config={"slots": np.int64(3), "shape": (1, 2), "of_layer": {0: 0.5}})
    assert RunResult.load(run.save(tmp_path)).config == {"slots": 3, "shape": [1, 2], "of_layer": {"0": 0.5}}


def test_another_run_takes_the_place_of_the_first_and_leaves_nothing_of_it(tmp_path):
    small_run(steps=3).save(tmp_path)
    other = small_run(steps=5, seed=2)
    other.save(tmp_path)
    other.save(tmp_path)
    same(RunResult.load(tmp_path / "run.json"), other)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_save_that_is_cut_off_leaves_the_former_run(tmp_path, monkeypatch):
    former = small_run(steps=3)
    former.save(tmp_path)

    def full(*_: object) -> None:
        raise CannotWrite("the disk is full")

    monkeypatch.setattr(run_files, "write_text", full)
    with pytest.raises(CannotWrite):
        small_run(steps=5, seed=2).save(tmp_path)
    same(RunResult.load(tmp_path), former)


def test_a_part_of_another_run_is_not_taken_for_this_ones(tmp_path):
    one, other = small_run(steps=4).save(tmp_path / "a"), small_run(steps=4, seed=2).save(tmp_path / "b")
    theirs, mine = next(other.glob("layers.*")), next(one.glob("layers.*"))
    theirs.replace(mine)
    with pytest.raises(BadTrace, match="not what was written"):
        RunResult.load(one)


def test_a_missing_part_is_named(tmp_path):
    small_run(steps=4).save(tmp_path)
    next(tmp_path.glob("steps.*")).unlink()
    with pytest.raises(BadTrace, match="steps"):
        RunResult.load(tmp_path)


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    path = small_run(steps=4).save(tmp_path / "run") / "run.json"
    contents = json.loads(path.read_text())
    contents["parts"]["events"]["file"] = "../elsewhere.parquet"
    del contents["checksum"]
    contents["checksum"] = run_files.checksum(run_files.sorted_json(contents))
    path.write_text(json.dumps(contents))
    with pytest.raises(BadTrace, match="elsewhere"):
        RunResult.load(tmp_path / "run")


def test_what_is_no_saved_run_is_told(tmp_path):
    with pytest.raises(FileNotFoundError):
        RunResult.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadTrace, match="folder"):
        RunResult.load(tmp_path / "file")
    with pytest.raises(CannotWrite, match="is a file"):
        small_run(steps=3).save(tmp_path / "file")


def test_what_stands_for_a_run_says_only_what_is_known():
    """A run of the first token alone showed "nan tokens/s", "nan % hits" and "1 prompts"."""
    whole, first, bare = small_run(steps=3), small_run(steps=1), small_run(steps=2)
    bare = with_metrics(replace(bare, events=bare.events.iloc[:0]))
    for run in (whole, first, bare):
        shown = run._repr_html_() + repr(run) + run.trace._repr_html_() + repr(run.trace)
        assert "nan" not in shown.lower(), shown
        assert not re.search(r"(?<![.,\d])1 (prompts|tokens|steps|decode steps)\b", shown), shown
    assert "nothing was decoded" in first._repr_html_()
    assert "nothing was decoded" in repr(first)
    assert "hits" in whole._repr_html_()
    assert "1 decode step," in small_run(steps=2)._repr_html_()
    many = replace(whole.metrics.decode, h2d_bytes=48_640_000_000)
    assert "48,640 MB" in replace(whole, metrics=replace(whole.metrics, decode=many))._repr_html_()


def with_metrics(run: RunResult) -> RunResult:
    """With the metrics of its tables as they are now."""
    tables = {name: getattr(run, name) for name in run_files.TABLES}
    counts = {"batch": run.metrics.batch, "output_tokens": run.metrics.output_tokens}
    return replace(run, metrics=compute_metrics(**tables, **counts))
