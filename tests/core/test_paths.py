"""The embedded model is found in a checkout and in a wheel, and its absence is explained."""

import re
import tomllib
from pathlib import Path

import pytest

from prescope.core import paths
from prescope.errors import BadModelFolder

ROOT = Path(__file__).resolve().parents[2]


def make_model(data: Path) -> Path:
    folder = data / "tiny-moe"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An installed package with nothing around it."""
    folder = tmp_path / "site" / "prescope"
    folder.mkdir(parents=True)
    monkeypatch.setattr(paths, "_PACKAGE", folder)
    return folder


def test_a_checkout_uses_its_own_data_folder(package):
    (package.parent / "pyproject.toml").touch()
    model = make_model(package.parent / "data")
    make_model(package / "_data")  # a stale copy must not win
    assert paths.embedded_model() == model


def test_a_wheel_uses_the_copy_inside_the_package(package):
    model = make_model(package / "_data")
    assert paths.embedded_model() == model


def test_a_stranger_s_data_folder_is_not_taken_for_ours(package):
    """Beside an installed package stands site-packages, where another project may put `data/`."""
    make_model(package.parent / "data")
    with pytest.raises(BadModelFolder, match=r"tiny-moe.*pip install -e"):
        paths.embedded_model()


def test_the_wheel_puts_data_where_paths_looks():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["sources"] == {"data": "prescope/_data"}
    assert set(wheel["only-include"]) == {"prescope", "data"}


def test_the_sdist_holds_what_pages_and_notebooks_name():
    """benchmarks/results was left out: its notebook stopped, links led nowhere, and tests/house failed in an sdist."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    left_out = pyproject["tool"]["hatch"]["build"]["targets"]["sdist"]["exclude"]
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    named = {
        path
        for page in pages
        for path in re.findall(
            r"(?:benchmarks|data|docs|notebooks|recipes)/[\w./-]*\w", page.read_text("utf-8")
        )
        if (ROOT / path).exists()
    }
    assert any(path.startswith("benchmarks/results/") for path in named)
    gone = [path for path in named for pattern in left_out if f"/{path}".startswith(pattern)]
    assert not gone


def test_this_checkout_has_the_model():
    assert paths.embedded_model() == ROOT / "data" / "tiny-moe"
