"""House rules: one list of versions, clean notebooks, no path of one machine, no heavy files."""

import json
import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

# Spelled in pieces, or this file would break its own rule.
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:" + "|".join(["work", "root", "tmp"]) + r")/")
REGISTRY = re.compile(
    "|".join(["py" + r"pi\.org", "python" + r"hosted\.org", "download" + r"\.pytorch\.org"])
)


@cache
def tracked() -> dict[str, bytes]:
    """Path -> content of every file in git's index: what would be committed, not what a run left on disk.

    So a notebook that was run and saved does not fail the tests; committing it would.
    """
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, or no git, so there is no list of tracked files")
    # CI may run as another user than the one who cloned.
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    listing = subprocess.run([*git, "ls-files", "--stage", "-z"], capture_output=True, check=True).stdout
    entries = [entry.split("\t", 1) for entry in listing.decode().split("\0") if entry]
    if not entries:
        pytest.skip("git tracks no file yet")
    blobs = [meta.split()[1] for meta, _ in entries]
    batch = subprocess.run(
        [*git, "cat-file", "--batch"], input="\n".join(blobs).encode(), capture_output=True, check=True
    ).stdout
    contents, at = [], 0
    for _ in blobs:  # "<blob> blob <size>\n<content>\n"
        end = batch.index(b"\n", at)
        size = int(batch[at:end].split()[2])
        contents.append(batch[end + 1 : end + 1 + size])
        at = end + 1 + size + 1
    return {path: content for (_, path), content in zip(entries, contents, strict=True)}


def tracked_texts() -> dict[str, str]:
    """Tracked text files; a tokenizer's vocabulary is data that may hold any string."""
    texts = {path: content for path, content in tracked().items() if b"\0" not in content}
    return {
        path: content.decode("utf-8", "replace")
        for path, content in texts.items()
        if not Path(path).name.startswith("tokenizer")
    }


def lines_matching(pattern: re.Pattern[str]) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()[:120]}"
        for path, text in tracked_texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@pytest.fixture(scope="module")
def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def requirements(project) -> list[Requirement]:
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    return [r for r in map(Requirement, texts) if r.name != project["name"]]


def test_every_pin_is_exact_and_stands_once(pins):
    names = [canonicalize_name(pin.name) for pin in pins]
    assert names == sorted(set(names)), "a name twice, or out of order"
    for pin in pins:
        assert [spec.operator for spec in pin.specifier] == ["=="], pin
        assert "+" not in str(pin.specifier), f"{pin}: a local version exists on one kind of machine only"


def test_every_direct_requirement_is_pinned_within_its_range(pins, requirements):
    version_of = {canonicalize_name(pin.name): next(iter(pin.specifier)).version for pin in pins}
    for requirement in requirements:
        version = version_of.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt has no {requirement.name}"
        assert requirement.specifier.contains(version), f"{requirement} but constraints.txt says {version}"


def test_pyproject_names_each_requirement_once_and_pins_nothing(requirements):
    names = [canonicalize_name(r.name) for r in requirements]
    assert len(names) == len(set(names)), sorted(n for n in set(names) if names.count(n) > 1)
    assert not [str(r) for r in requirements if any(s.operator in ("==", "===") for s in r.specifier)]


def test_environment_yml_leaves_the_versions_to_the_other_two(project):
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    python, pip, by_pip = environment["dependencies"]
    assert pip == "pip"
    assert by_pip == {"pip": ["-c constraints.txt", "-e .[lab,sweep,dev]"]}
    assert {"lab", "dev"} <= set(project["optional-dependencies"])
    name, version = python.split("=")
    assert name == "python"
    assert Requirement(f"python{project['requires-python']}").specifier.contains(version)


def test_readme_names_the_commands_that_exist():
    readme = (ROOT / "README.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    named = set(re.findall(r"\bmake ([a-z]+)\b", readme))
    assert {"lab", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), (
            f"README says `make {target}`, Makefile has none"
        )


def test_every_install_command_in_the_readme_uses_the_constraints():
    readme = (ROOT / "README.md").read_text("utf-8")
    commands = re.findall(r"pip install .*", readme)
    assert commands
    assert all("-c constraints.txt" in command for command in commands), commands


def test_readme_shows_python_by_line_40():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert lines.index("import prescope") < 40


def test_notebooks_are_committed_without_outputs():
    """Outputs are megabytes nobody reviews, and GitHub draws neither plotly nor widgets."""
    dirty = []
    for path in (p for p in tracked() if p.endswith(".ipynb")):
        notebook = json.loads(tracked()[path])
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        if (
            any(cell["outputs"] or cell["execution_count"] is not None for cell in code)
            or "widgets" in notebook["metadata"]
        ):
            dirty.append(path)
    assert not dirty, f"`make format` strips them: {', '.join(dirty)}"


def test_no_tracked_file_names_a_path_of_one_machine():
    found = lines_matching(MACHINE_PATH)
    assert not found, "\n".join(found)


def test_no_tracked_file_names_a_package_registry():
    """pip's own configuration says where packages come from; on some machines that is a mirror."""
    found = lines_matching(REGISTRY)
    assert not found, "\n".join(found)


def test_no_tracked_file_is_one_that_runs_leave():
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    tracked()  # skips where there is no checkout
    command = [*git, "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(command, capture_output=True, check=True, text=True).stdout == ""


def test_no_tracked_file_is_heavy():
    limit = {True: 16 * MIB, False: MIB}
    heavy = [
        f"{path}: {len(content) / MIB:.1f} MiB"
        for path, content in tracked().items()
        if len(content) > limit[path.startswith("data/")]
    ]
    assert not heavy, f"{heavy}; the limit is 1 MiB, under data/ 16 MiB"
