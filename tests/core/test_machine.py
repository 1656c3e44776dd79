"""Facts about the machine, also where there is no /proc."""

from pathlib import Path

import pytest

from prescope.core import machine


def test_memory_is_known_without_proc(monkeypatch):
    """As on Windows and macOS: formerly os.sysconf was asked, which Windows does not have."""
    psutil = pytest.importorskip("psutil")
    monkeypatch.setattr(machine, "MEMINFO", Path("/there/is/no/such/file"))
    monkeypatch.delattr("os.sysconf", raising=False)
    total = machine.machine_facts()["host_memory_gib"]
    assert total == round(psutil.virtual_memory().total / 2**30, 1)
    assert 0 < machine.available_memory_bytes() <= psutil.virtual_memory().total


def test_a_containers_limit_counts(tmp_path):
    """A process that takes more than its container has is killed, whatever the machine has free."""
    assert machine._container_bytes(tmp_path) == []
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 400000\ninactive_file 200000\n")
    assert machine._container_bytes(tmp_path) == [500_000]
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._container_bytes(tmp_path) == []
