"""`--experts`: packed while they are loaded, by every command that loads a model, and said so."""

import json
from pathlib import Path

import pytest

import prescope
from prescope.cli import main
from prescope.tuning import load_sweep, prove

#: On the virtual clock, so that nothing is waited for.
FAST = ["--device", "null", "--link-gb-per-s", "1"]


class Loaded(Exception):
    """Raised instead of loading."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What a model would have been loaded with."""
    settings: dict[str, object] = {}

    def load(model: str, **given: object) -> None:
        settings.update(given)
        raise Loaded

    monkeypatch.setattr("prescope.engine.load", load)
    return settings


def test_the_text_is_that_of_packed_experts_and_its_figures_say_that_they_are_lossy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", "-p", "The old man looked", "-n", "8", "--experts", "int4", *FAST]) == 0
    captured = capsys.readouterr()
    with prescope.load(device="null", link_gb_per_s=1, experts="int4") as engine:
        expected = engine.generate("The old man looked", max_new_tokens=8)
    assert captured.out == f"{expected.text[0]}\n"
    assert "int4 experts (lossy)" in captured.err


@pytest.mark.parametrize(("option", "named"), [(["--experts", "fp8"], ("fp8", True)), ([], ("plain", False))])
def test_a_row_says_how_its_experts_are_packed(
    option: list[str], named: tuple[str, bool], capsys: pytest.CaptureFixture[str]
) -> None:
    cell = ["-p", "4", "-n", "2", "-s", "0.5", "-r", "1", "--warm-up", "0", "--json"]
    assert main(["bench", *cell, *option, *FAST]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["experts"], row["lossy"]) == named


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate", "a/model"],
        ["train", "a/model"],
        ["sweep", "s", "--vary", "slots=1,2", "--measure", "a/model"],
        ["sweep", "s", "--vary", "slots=1,2", "--prove", "a/model"],
    ],
)
def test_every_command_that_loads_a_model_packs_it(
    arguments: list[str], asked: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Loaded):
        main([*arguments, "--experts", "mxfp4"])
    assert asked["experts"] == "mxfp4"


@pytest.mark.parametrize("form", ["int8", None])
def test_a_sweep_and_its_proof_say_on_which_experts_they_ran(
    form: str | None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the table, the proof, the page and the study: a lossy row stands beside exact ones there."""
    monkeypatch.chdir(tmp_path)
    packed = [] if form is None else ["--experts", form]
    points = [
        "sweep",
        "s",
        "--vary",
        "slots=0.5,0.75",
        "--method",
        "grid",
        "--measure",
        "tiny-moe",
        "--device",
        "null",
    ]
    assert main([*points, "--report", "s.html", *packed]) == 0
    said, page = capsys.readouterr().err, (tmp_path / "s.html").read_text()
    points = load_sweep("s").points()
    with prescope.load(device="null", experts=form or "auto") as engine:
        proof = prove({"slots": 0.75}, engine, ["A house by the sea"], repeats=2, new_tokens=2)
    for text in (said, page, *points["machine"], str(proof), proof.machine):
        assert ("int8 experts (lossy)" in text) == (form is not None)


def test_advice_for_packed_experts_is_told_as_calls_that_pack_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prescope.advice.capacity.LAYER_STEPS", 32)
    assert main(["advise", "olmoe-1b-7b", "--machine", "h200", "--gpu-gib", "3", "--experts", "int4"]) == 0
    captured = capsys.readouterr()
    assert "int4 experts (lossy)" in captured.out
    calls = [line for line in captured.err.splitlines() if line.startswith("prescope ")]
    assert calls and all("allenai/OLMoE-1B-7B-0125 --experts int4 " in call for call in calls)


@pytest.mark.parametrize(
    "arguments",
    [
        ["calibrate"],
        ["sweep", "s", "--vary", "slots=1,2"],
        ["train", "--trace", "t.npy"],
    ],
)
def test_packing_no_model_is_a_wrong_call(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--experts", "int4"]) == 2
    assert "--experts" in capsys.readouterr().err
