import os
import subprocess
import sys
from pathlib import Path

import pytest

import prescope
from prescope.core.jit import IS_COMPILED

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
