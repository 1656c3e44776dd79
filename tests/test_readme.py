"""The README's first lines of Python print what the README shows."""

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shown as of a machine without a GPU")
def test_the_readmes_python_prints_what_the_readme_shows(monkeypatch):
    """All but the time per token, which is the machine's."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text("utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    shown = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert code and shown
    printed, names = StringIO(), {}
    with redirect_stdout(printed):
        exec(code[1], names)
    names["engine"].close()
    without_times = [re.sub(r"\d+ ms", "N ms", part) for part in (printed.getvalue(), shown[1])]
    assert without_times[0] == without_times[1]
