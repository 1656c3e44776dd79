"""The command line: results on stdout and nothing else, one line for an error, exit codes, and what Ctrl-C leaves."""

import csv
import html
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import CancelledError
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pandas as pd
import pytest

import prescope
from prescope import tuning
from prescope.advice import advise
from prescope.cli import main
from prescope.cli.options import Schedule, slots_of
from prescope.cli.terminal import StatusLine
from prescope.core.files import require_writable
from prescope.core.paths import data_dir, embedded_model
from prescope.engine import Engine
from prescope.profile import HardwareProfile
from prescope.scheduler import SCHEDULES
from prescope.scheduler.costs import LayerCosts
from prescope.traces.events import read_events
from prescope.tuning import load_sweep
from prescope.tuning.proof import Candidate, Proof
from tests.support.small_run import small_run, small_trace

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = ["run", "bench", "calibrate", "advise", "train", "sweep", "report", "compile"]
#: On the virtual clock, so that nothing is waited for.
FAST = ["--device", "null", "--link-gb-per-s", "1"]


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """What the command line sets for its process is not for the tests'."""
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY"):
        monkeypatch.setenv(name, "1" if name != "TRANSFORMERS_VERBOSITY" else "error")
    monkeypatch.setattr("warnings.showwarning", lambda *_, **__: None)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_screen(command, capsys, monkeypatch):
    """24 lines of 80 columns, less the line of the shell's next prompt."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"] if command else ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 23
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in "".join(lines)
    if command is None:
        assert all(any(line.strip().startswith(name) for line in lines) for name in COMMANDS)


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{prescope.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"], ["run", "--new", "0"], ["run", "--new", "many"], ["bench", "--prompt", "8,x"],
        ["bench", "--json", "--csv"], ["bench", "-o", "cells.txt"], ["advise"], ["report", "n.ipynb"],
        ["advise", "olmoe-1b-7b", "--link-gb-per-s", "25"], ["sweep", "s"], ["sweep", "s", "--vary", "slots"],
        ["sweep", "s", "--vary", "slots=0.1:x"], ["sweep", "s", "--vary", "slots=1:2:3:4"],
        ["train", "--trace", "t.npy", "--shape", "4,8"], ["bench", "--schedule", ""], ["bench", "--slots", ","],
        ["sweep", "s", "--vary", "slots=,"], ["sweep", "s", "--vary", "slots=0.1:1", "--objective", ","],
        ["sweep", "s", "--vary", "slots=0.1:0.3", "--vary", "slots=0.5:0.9"],
        ["sweep", "s", "--vary", "slots=1,2", "--fix", "width=1", "--fix", "width=2"],
        ["report", "n.ipynb", "-o", "x.html", "--param", "a=1", "--param", "a=2"],
        ["train", "--trace", "t.npy", "--prompts", "p.txt"], ["train", "some/model", "--trace", "t.npy"],
        ["train", "--trace", "t.npy", "--own-tokens", "0"], ["train", "--trace", "t.npy", "--max-tokens", "128"],
        ["train", "--shape", "4,8,2"], ["train", "--seed", "-1"], ["train", "--own-tokens", "-1"],
        ["train", "--trace", "t.npy", "-o", "."], ["train", "--trace", "t.npy", "-o", "/"],
    ],
)  # fmt: skip
def test_a_wrong_call_is_2_and_says_what_is_wrong(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Error" in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "no/such/model", "-p", "x"], "no/such/model"),
        (["run", "-p", "x", "--schedule", "none", *FAST], "choose one of"),
        (["run", "-p", "x", "--slots", "8Gigs", *FAST], "8GiB"),
        (["run", "-p", "x", "--predictor", "gone.safetensors", *FAST], "gone.safetensors"),
        (["run", "-p", "x", "--schedule", "fat", "--predictor", "early-router", *FAST], "choose one of"),
        (["bench", "-n", "1", *FAST], "2 new tokens"),
        (["advise", "no-such-shape"], "no-such-shape"),
        (["train", "--trace", "gone.npy", "--shape", "4,8,2"], "gone.npy"),
        (["report", "gone.ipynb", "--out", "x.html"], "gone.ipynb"),
        (["report", ".", "--out", "x.html"], "folder"),
        (["report", str(ROOT / "README.md"), "--out", "x.html"], "is no notebook"),
        (["report", str(ROOT / "pyproject.toml"), "--out", "x.html"], "is no notebook"),
        (["report", str(embedded_model() / "config.json"), "--out", "x.html"], "is no notebook"),
        (["train", "--prompts", "."], "folder"),
        *((["sweep", "a", "--vary", "slots=1:4", "--trace", at], "shape") for at in (".", "/", "")),
    ],
)
def test_an_error_is_1_and_one_line_with_the_remedy(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("prescope: ")
    assert words in line


def test_run_prints_the_text_as_the_engine_returns_it_and_figures_beside_it(capsys, tmp_path):
    """Streamed in words: put together they are the text."""
    prompt = "The old man looked at the sea"
    saved = ["--trace", str(tmp_path / "t.safetensors"), "--timeline", str(tmp_path / "e.parquet")]
    assert main(["run", "-p", prompt, "-n", "12", *saved, *FAST]) == 0
    captured = capsys.readouterr()
    with prescope.load(device="null", link_gb_per_s=1) as engine:
        expected = engine.generate(prompt, max_new_tokens=12)
    assert captured.out == f"{expected.text[0]}\n"
    assert "TTFT" in captured.err
    trace = prescope.read_trace(tmp_path / "t.safetensors")
    assert len(trace.steps) == 12
    assert read_events(tmp_path / "e.parquet")["bytes"].sum() == expected.metrics.h2d_bytes


def test_run_reads_the_prompt_from_a_pipe(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time"))
    assert main(["run", "-n", "3", *FAST]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.skipif(os.name != "posix", reason="pipes as a shell makes them")
def test_a_reader_that_has_enough_ends_the_text_and_what_was_asked_for_is_written(tmp_path):
    """As `prescope run | head`: no traceback of a thread, no thousand tokens for nobody."""
    arguments = ["run", "-p", "The old man", "-n", "3000", "--device", "cpu", "--trace", "t.safetensors"]
    with started(*arguments, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(5)
        process.stdout.close()
        told = process.stderr.read()
        assert process.wait(timeout=60) == 1
    assert "Traceback" not in told
    assert len(prescope.read_trace(tmp_path / "t.safetensors").steps) < 3000


@pytest.mark.parametrize("arguments", [["--version"], ["run", "-p", "Hello", "-n", "3", *FAST]])
def test_no_stdout_at_all_is_no_error(arguments, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout", None)
    assert main(arguments) == 0


def test_bench_measures_the_grid_one_row_a_cell(capsys, tmp_path):
    grid = ["-p", "4,8", "-n", "3", "-b", "1,2", "-s", "0.5,64", "-r", "2", "--warm-up", "0"]
    assert main(["bench", *grid, "--json", "-o", str(tmp_path / "cells.csv"), *FAST]) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    cells = [(row["prompt"], row["batch"], row["slots"]) for row in rows]
    assert cells == [(p, b, s) for p in (4, 8) for b in (1, 2) for s in (0.5, 64)]
    for row in rows:
        assert row["error"] == ""
        assert row["tokens_per_s_least"] <= row["tokens_per_s"] <= row["tokens_per_s_most"]
        assert row["dtype"] == "bfloat16" and row["prescope"] and row["torch"] and row["label"]
        assert 0 <= row["hit_rate"] <= 1
    kept = pd.read_csv(tmp_path / "cells.csv")
    assert kept["tokens_per_s"].tolist() == pytest.approx([row["tokens_per_s"] for row in rows])


def test_bench_as_csv_and_as_a_table_has_one_line_a_cell_and_goes_on_after_one_that_cannot_run(capsys):
    """A grid has settings that do not fit; the others are what was asked for."""
    grid = ["bench", "-p", "4", "-n", "3", "-s", "1,0.5", "-r", "1", "--warm-up", "0", *FAST]
    assert main([*grid, "--csv"]) == 1
    captured = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(captured.out)))
    assert [row["error"].partition(":")[0] for row in rows] == ["SlotPoolTooSmall", ""]
    assert float(rows[1]["tokens_per_s"]) > 0
    assert captured.err.count("prescope: ") == 1
    assert main(grid) == 1
    assert len(capsys.readouterr().out.splitlines()) == 3, "names, and two cells"


def test_advise_takes_a_typed_machine_and_changes_a_named_one(capsys, monkeypatch):
    """With one point of the curve, a fraction of a simulated second: the curve is the advice's own test."""
    monkeypatch.setattr("prescope.advice.capacity.LAYER_STEPS", 32)
    monkeypatch.setattr("prescope.advice.advise", partial(advise, shares=(0.5,)))
    five = {"link-gb-per-s": 12, "host-gib": 64, "host-gb-per-s": 40, "gpu-gib": 12, "gpu-gb-per-s": 500}
    typed = [text for name, value in five.items() for text in (f"--{name}", str(value))]
    assert main(["advise", "olmoe-1b-7b", *typed, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"] == "typed in"
    assert found["budget_gib"] == 12
    assert found["points"]
    assert main(["advise", "olmoe-1b-7b", "--machine", "h100", *typed[:4]]) == 0
    captured = capsys.readouterr()
    assert "changed" in captured.out
    assert "assumed: " in captured.err


@pytest.mark.parametrize(
    ("given", "to_load"),
    [
        ("olmoe-1b-7b", "allenai/OLMoE-1B-7B-0125"),
        ("my model", "'my model'"),
        ("my model/config.json", "'my model'"),
        ("sizes.json", "MODEL"),
    ],
)
@pytest.mark.parametrize("schedule", ["fiddler", "presched"])
def test_what_is_advised_is_told_as_calls_that_can_be_made(
    given, to_load, schedule, capsys, tmp_path, monkeypatch
):
    """`run` knows neither names of data/configs nor files; and PreSched's gain is of a predictor that is trained."""
    monkeypatch.chdir(tmp_path)
    sizes = (data_dir() / "configs" / "olmoe-1b-7b.json").read_text()
    nameless = json.dumps({name: value for name, value in json.loads(sizes).items() if name != "model"})
    Path("my model").mkdir()
    for path in (Path("my model/config.json"), Path("sizes.json")):
        path.write_text(nameless)
    monkeypatch.setattr("prescope.advice.capacity.LAYER_STEPS", 32)
    settings = {"slots": 64, "schedule": schedule}
    monkeypatch.setattr(
        "prescope.advice.advise", lambda *a, **k: replace(advise(*a, **k, shares=(0.5,)), settings=settings)
    )
    assert main(["advise", given, "--machine", "h200"]) == 0
    calls = [line for line in capsys.readouterr().err.splitlines() if line.startswith("prescope ")]
    trained = ["--predictor", "llapor.safetensors"] if schedule == "presched" else []
    assert calls[-1].split(" run ")[1].startswith(f"{to_load} --slots 64")
    assert calls[-1].split()[-2 - len(trained) :] == ["--schedule", schedule, *trained]
    assert [call.split(" -o ")[0] for call in calls[:-1]] == (
        [f"prescope train {to_load}"] if trained else []
    )


@pytest.mark.parametrize(
    ("call", "work"),
    [
        (["run", "-p", "a", "--trace"], "prescope.cli.run.loaded"),
        (["run", "-p", "a", "--timeline"], "prescope.cli.run.loaded"),
        (["bench", "-o"], "prescope.cli.bench.loaded"),
        (["train", "-o"], "prescope.engine.load"),
        (["sweep", "a", "--vary", "slots=1:4", "--report"], "prescope.tuning.open_sweep"),
        (
            ["report", str(ROOT / "notebooks" / "00_quickstart.ipynb"), "-o"],
            "prescope.report.notebook._execute",
        ),
    ],
)
@pytest.mark.parametrize("output", ["file/a.json", "folder.json", "x" * 300 + ".json"])
def test_what_cannot_be_written_is_said_before_the_work(call, work, output, capsys, tmp_path, monkeypatch):
    """A page was refused when its notebook had run, a timeline behind the text, a predictor behind its first epoch."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder.json").mkdir()

    def worked(*_, **__):
        pytest.fail("it worked before it said so")

    monkeypatch.setattr(work, worked)
    assert main([*call, output]) in (1, 2)
    assert output in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"]


def test_what_can_be_written_is_left_as_it_is(tmp_path):
    path = tmp_path / "new" / "a.json"
    require_writable(path)
    assert path.parent.is_dir() and not list(path.parent.iterdir())
    path.write_text("{}")
    require_writable(path)
    assert path.read_text() == "{}" and len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("option", ["--trace", "--prompts"])
@pytest.mark.parametrize("output", ["a.safetensors", "./b/../a.safetensors", "link", "a.x"])
def test_train_never_writes_over_what_it_reads(option, output, capsys, tmp_path, monkeypatch):
    """The predictor took the place of the trace that it was trained on, and its checkpoint that of another's."""
    monkeypatch.chdir(tmp_path)
    source = Path("a.checkpoint.safetensors" if output == "a.x" else "a.safetensors")
    small_trace(width=6).save(source)
    Path("link").symlink_to(source)
    content = source.read_bytes()
    assert main(["train", option, str(source), "-o", output]) == 2
    assert "written over" in " ".join(capsys.readouterr().err.split())
    assert source.read_bytes() == content


@pytest.mark.parametrize("shape", ["4,9,2", "3,8,2", "4,8,1"])
def test_a_shape_that_is_not_the_traces_is_told(shape, capsys, tmp_path):
    path = small_trace(width=6).save(tmp_path / "a.safetensors")
    assert main(["train", "--trace", str(path), "--shape", shape, "-o", str(tmp_path / "x")]) == 1
    assert "leave shape out" in capsys.readouterr().err


@pytest.mark.slow
def test_train_writes_a_predictor_and_prints_recall(capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    texts = [f"Text {i}: the old man and the sea, {'again ' * i}" for i in range(6)]
    prompts.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    output = tmp_path / "llapor.safetensors"
    command = ["train", "--prompts", str(prompts), "-o", str(output), "--epochs", "1", "--own-tokens", "0"]
    assert main([*command, "--device", "cpu"]) == 0
    assert "llapor" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == []
    assert main(["run", "-p", "x", "-n", "2", "--predictor", str(output), *FAST]) == 0


@pytest.fixture
def with_costs(monkeypatch):
    """Of a machine that nobody has calibrated."""
    costs = LayerCosts(link_us=60.0, gpu_us=12.0, rest_us=25.0, source="made up")
    monkeypatch.setattr(Engine, "_costs_here", lambda *_: costs)


@pytest.mark.usefixtures("with_costs")
@pytest.mark.parametrize("schedule", ["fate", "moe-infinity", "presched"])
def test_a_schedule_runs_by_the_models_own_routers_without_training(schedule, capsys, tmp_path):
    """`fate` and `moe-infinity` could not be run from the shell at all before a predictor was trained."""
    timeline = tmp_path / "t.parquet"
    command = [
        "run",
        "-p",
        "The old man",
        "-n",
        "6",
        "--schedule",
        schedule,
        "--predictor",
        "early-router",
        "-s",
        "0.3",
    ]
    assert main([*command, "--schedule", schedule, "--timeline", str(timeline), *FAST]) == 0
    assert "prefetch" in set(read_events(timeline)["reason"])
    assert capsys.readouterr().out.strip()


@pytest.mark.usefixtures("with_costs")
def test_a_schedule_without_the_predictor_it_needs_names_one_that_needs_no_training(capsys):
    assert main(["run", "-p", "x", "--schedule", "fate", *FAST]) == 1
    assert "early_router(engine)" in capsys.readouterr().err


@pytest.mark.usefixtures("with_costs")
def test_bench_measures_schedules_that_need_predictions_beside_the_others(capsys):
    command = ["bench", "-p", "8", "-n", "4", "-s", "0.3", "-r", "1", "--warm-up", "0", "--json"]
    assert main([*command, "--schedule", "fate,on-demand", "--predictor", "early-router", *FAST]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["schedule"], row["error"]) for row in rows] == [("fate", ""), ("on-demand", "")]


def test_calibrate_prints_what_it_measured(capsys, monkeypatch):
    """Measuring is calibration's own test."""
    asked = {}

    def measured(**options):
        asked.update(options)
        options["on_progress"]("link", 0.5)
        return HardwareProfile.load("test_machine")

    monkeypatch.setattr("prescope.calibration.calibrate", measured)
    assert main(["calibrate", "--seconds", "2", "--no-save", "--link-gb-per-s", "3"]) == 0
    captured = capsys.readouterr()
    assert "h2d" in captured.out
    assert "saved" not in captured.err
    assert (asked["seconds"], asked["save"], asked["link_gb_per_s"]) == (2.0, False, 3.0)


def test_an_interrupt_in_the_third_cell_leaves_two(capsys, tmp_path, monkeypatch):
    calls, generate = iter(range(99)), Engine.generate

    def interrupted(engine, *args, **keywords):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return generate(engine, *args, **keywords)

    monkeypatch.setattr(Engine, "generate", interrupted)
    grid = [
        "-p",
        "4",
        "-n",
        "3",
        "-s",
        "0.25,0.5,1.0",
        "-r",
        "1",
        "--warm-up",
        "0",
        "-o",
        str(tmp_path / "c.json"),
    ]
    assert main(["bench", *grid, "--json", *FAST]) == 130
    captured = capsys.readouterr()
    assert [row["slots"] for row in json.loads(captured.out)] == [0.25, 0.5]
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(captured.out)
    assert "Traceback" not in captured.err


@pytest.fixture
def swept(tmp_path):
    """A sweep over two numbers of slots of a small trace."""
    trace = small_run(steps=6).trace.save(tmp_path / "t.safetensors")
    storage = str(tmp_path / "sweeps.db")
    return ["sweep", "small", "--trace", str(trace), "--storage", storage, "--vary", "slots=0.25,0.5,0.75", "--fix",
            "schedule=on-demand", "--method", "grid"]  # fmt: skip


def test_sweep_prints_the_best_and_goes_on_where_it_was(swept, capsys):
    assert main([*swept, "--json", "--points", "2"]) == 0
    captured = capsys.readouterr()
    first = json.loads(captured.out)
    assert len(first) == 2
    assert "points of" in captured.err, "time and memory are said before it begins"
    assert main(swept) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3
    speeds = [float(line.split()[2]) for line in lines[1:]]
    assert speeds == sorted(speeds, reverse=True)


def test_a_sweep_of_several_objectives_prints_the_front(swept, capsys):
    """The best of the first objective alone would be the one with the most memory."""
    several = [*swept, "--objective", "gpu_bytes,tokens_per_s"]
    assert main([*several, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sweep = load_sweep(swept[swept.index("--storage") + 1])
    assert [one["number"] for one in found] == list(sweep.front()["number"])
    assert [one["gpu_bytes"] for one in found] == sorted(one["gpu_bytes"] for one in found)
    assert main(several) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found)


def test_a_sweep_writes_its_page_with_the_call_that_repeats_it(swept, capsys, tmp_path):
    assert main([*swept, "--report", str(tmp_path / "a page.html")]) == 0
    assert f"saved: {tmp_path / 'a page.html'}" in capsys.readouterr().err
    text = html.unescape((tmp_path / "a page.html").read_text("utf-8"))
    assert shlex.join(["prescope", *swept, "--report", str(tmp_path / "a page.html")]) in text
    assert "Nothing was proved" in text


def test_a_proof_is_part_of_what_json_says_and_of_the_page(swept, capsys, tmp_path, monkeypatch):
    verdict = SimpleNamespace(low=0.1, high=0.2, gain=0.15, kept=True)
    candidate = Candidate({"slots": 0.5}, 1, (1.0,), (1.0,), verdict, 10.0, 11.0, 0.1, 1e6, 0)
    proof = Proof(
        kept=True, settings={"slots": 0.5}, keywords={}, best=candidate, candidates=[candidate],
        default={"slots": 0.25}, words="+15.0 % against the default: keep it", origin="emulated",
        machine="here", label="a label",
    )  # fmt: skip
    monkeypatch.setattr(tuning, "prove", lambda *_, **__: proof)
    page = tmp_path / "page.html"
    proved = [*swept, "--prove", str(embedded_model()), "--device", "null"]
    assert main([*proved, "--json", "--report", str(page)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["best"]) == 3
    assert told["proof"]["words"] == proof.words and told["proof"]["settings"] == {"slots": 0.5}
    assert told["proof"]["candidates"][0]["gain %"] == pytest.approx(15)
    text = page.read_text("utf-8")
    assert proof.words in text and "Nothing was proved" not in text

    def ends(*_, **__):
        raise CancelledError

    monkeypatch.setattr(tuning, "prove", ends)
    assert main([*proved, "--json"]) == 130
    told = json.loads(capsys.readouterr().out)
    assert len(told["best"]) == 3 and told["proof"] is None


def test_a_sweep_in_which_nothing_can_be_is_1_and_says_why(swept, capsys):
    few = [word.replace("0.25,0.5,0.75", "1e-9,2e-9") for word in swept]
    assert main(few) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no point finished: SlotPoolTooSmall" in captured.err


def test_a_trace_of_a_run_is_written_as_its_name_says(capsys, tmp_path):
    for name in ("t.parquet", "t.safetensors"):
        assert main(["run", "-p", "Hello", "-n", "3", "--trace", str(tmp_path / name), *FAST]) == 0
    one, other = (prescope.read_trace(tmp_path / name) for name in ("t.parquet", "t.safetensors"))
    assert (one.expert_ids == other.expert_ids).all()
    assert len(pd.read_parquet(tmp_path / "t.parquet")) > 0


def test_ctrl_c_ends_a_sweep_whose_points_are_kept(swept, capsys, monkeypatch):
    presses = iter([signal.SIGINT])
    monkeypatch.setattr(
        StatusLine, "show", lambda self, text: [signal.raise_signal(number) for number in presses]
    )
    assert main([*swept, "--json"]) == 130
    captured = capsys.readouterr()
    kept = json.loads(captured.out)
    assert "the same call goes on" in captured.err
    monkeypatch.undo()
    assert main([*swept, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 3 >= len(kept)


def test_an_unknown_setting_of_a_sweep_is_named_with_those_there_are(swept, capsys):
    assert main([*swept, "--vary", "slot=1,2"]) == 1
    assert "lookahead" in capsys.readouterr().err


def test_slots_are_a_count_a_share_or_a_size():
    assert [slots_of(text) for text in ("64", "0.25", "1.0", "8GiB")] == [64, 0.25, 1.0, "8GiB"]
    assert isinstance(slots_of("64"), int)


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "prescope", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=cwd, env=environment,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_keeps_the_cells_that_are_done_and_is_130(tmp_path):
    grid = [
        "-p",
        "4",
        "-n",
        "3",
        "-s",
        "0.5",
        "-b",
        ",".join(["1"] * 500),
        "-r",
        "1",
        "--csv",
        "-o",
        "cells.json",
    ]
    process = started("bench", *grid, "--device", "null", cwd=tmp_path)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]  # names, and two cells
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    printed = list(csv.DictReader(io.StringIO("".join([*lines, rest]))))
    kept = json.loads((tmp_path / "cells.json").read_text())
    assert len(printed) >= 2
    assert len(kept) - len(printed) in (0, 1), "a cell is kept, then printed"


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_ends_a_text_which_is_printed_to_there(tmp_path):
    process = started(
        "run", "-p", "The old man looked at the sea", "-n", "100000", "-s", "0.25", cwd=tmp_path
    )
    assert process.stdout is not None
    first = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert first.startswith(", and")
    assert rest.endswith("\n")
    assert "cancelled after" in errors
    assert "TTFT" in errors


def test_a_proof_whose_schedules_need_a_calibration_says_so_before_the_search(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage = tmp_path / "sweep.db"
    words = ["--vary", "schedule=fiddler,on-demand", "--method", "grid", "--storage", str(storage)]
    assert main(["sweep", "early", *words, "--prove", str(embedded_model()), "--device", "null"]) == 1
    captured = capsys.readouterr()
    assert "has not been calibrated; run prescope.calibrate()" in captured.err
    assert not storage.exists(), "no point was tried"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_from_the_shell_is_proved_to_its_end(tmp_path):
    """The recording that is swept by default was made of own prompts: the proof's are others."""
    process = started(
        "sweep", "proved", "--vary", "cache=lfu", "--fix", "schedule=on-demand", "--method", "grid", "--device", "cpu",
        "--prove", str(embedded_model()), "--storage", str(tmp_path / "sweep.db"), cwd=tmp_path,
    )  # fmt: skip
    printed, told = process.communicate(timeout=280)
    assert process.returncode == 0, told
    assert "Traceback" not in told
    assert "simulator off %" in printed
    assert "default" in told
    assert "a run of another model: its tokens/s are not held against those measured here" in told
    assert "the simulator said" not in told


def test_the_page_and_the_help_offer_schedules_that_run_as_they_are_written():
    """`bench --schedule on-demand,fate` stood there: every cell of fate ended in an error, for want of a predictor."""
    page = (ROOT / "docs" / "cli.md").read_text("utf-8")
    calls = [line for line in page.splitlines() if line.startswith("prescope") and "--predictor" not in line]
    named = [
        name for call in calls for names in re.findall(r"--schedule (\S+)", call) for name in names.split(",")
    ]
    said = get_args(Schedule)[1].help.removesuffix(", ...").split(", ")
    assert named and said
    assert not [name for name in [*named, *said] if SCHEDULES[name].needs_predictor]
    sentence = re.search(r"Of the schedules only (.*?) do not run without predictions", page)
    assert sentence
    assert set(re.findall(r"`([\w-]+)`", sentence[1])) == {
        name for name, schedule in SCHEDULES.items() if schedule.needs_predictor
    }
