"""benchmarks/record_demo.py at its smallest, on the embedded model: what it writes can be simulated."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prescope.core.paths import embedded_model
from prescope.simulator import Recording, Scenario

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_recording_made_by_the_script_replays_its_own_run(tmp_path):
    command = [
        sys.executable, "benchmarks/record_demo.py", "--model", str(embedded_model()), "--out", str(tmp_path),
        "--small",
        "--batch", "1", "--slots", "0.5",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=170, capture_output=True)
    recording = Recording.load(tmp_path / "medium.b1.json")
    assert [one.name for one in recording.predictors] == ["llapor", "early router"]
    assert {row["way"] for row in recording.measured} == {"on-demand", "presched", "presched, CPU lane"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 4_000_000
    row = recording.measured[0]
    scenario = Scenario(schedule="on-demand", slots=row["num_slots"], machine=recording.machine.name)
    result = recording.scenarios().run(scenario)
    assert result.counts.hit_rate == pytest.approx(row["hit_rate"]), (
        "the same slots, the same routing, the same hits"
    )
