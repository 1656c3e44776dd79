import os
import subprocess
import sys
from pathlib import Path

import pytest

import prescope
from prescope.cli.compile import compile_now
from prescope.core.jit import IS_COMPILED
from prescope.errors import NoProfile
from prescope.profile import HardwareProfile

#: With settings of its own, as a person's first notebook has them.
FIRST_RUN = """
import prescope
from prescope.simulator import Recording, Scenario, shipped_recordings

with prescope.load(slots=0.25, schedule="hybrimoe", cache="lfu", device="cpu", record_inputs=True) as engine:
    run = engine.generate(["The old man", "import json"], max_new_tokens=4)
    engine.configure(schedule="presched", cache="auto", slots=20)
    engine.generate("The", max_new_tokens=2)
recording = Recording.load(shipped_recordings()[0])
scenarios = recording.scenarios()
for schedule in ("presched", "static-split", "klotski"):
    scenarios.run(Scenario(machine=recording.machine.name, schedule=schedule, slots=0.25, lookahead=0))
"""


def test_it_needs_no_calibrated_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`make setup` calls it on machines that no profile is known of, as most are."""
    monkeypatch.setattr("prescope.core.machine._cpu_name", lambda: "A CPU that nobody measured")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(NoProfile):
        HardwareProfile.of_this_machine()
    compile_now()


@pytest.mark.slow
@pytest.mark.skipif(not IS_COMPILED, reason="nothing is compiled here")
def test_behind_it_nothing_is_compiled_any_more(tmp_path: Path) -> None:
    def compiled() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.nbc")}

    env = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(prescope.__file__).parents[1]),
    }

    def python(*arguments: str) -> None:
        subprocess.run([sys.executable, *arguments], env=env, check=True, timeout=600)

    python("-m", "prescope", "compile")
    before = compiled()
    assert any("replay.replay" in name for name in before)
    python("-W", "ignore", "-c", FIRST_RUN)
    assert compiled() == before
