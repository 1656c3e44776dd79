"""The import ladder: a module imports only from its own row and the rows above it.

Reads the source with `ast`; imports nothing of the package, so it also runs while a module is broken.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "prescope"

# Top row first. A folder imports from the rows above its own, never from its own row. A new folder is added here, in
# the highest row whose needs it meets, and to the table in README.md.
ROWS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("core",),
    ("traces", "device"),
    ("cache", "predictor"),
    ("scheduler", "weights"),
    ("profile", "kernels"),
    ("hf", "simulator"),
    ("engine",),
    ("advice", "calibration", "training", "tuning"),
    ("views",),
    ("widgets", "report"),
    ("session",),
    ("cli",),
)
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row}
BELOW_DEVICES = {module for module, rank in RANK.items() if rank > RANK["cache"]}

# One door per library: who may import it, at any depth. Imports under TYPE_CHECKING are free.
DOORS: dict[str, set[str]] = {
    "transformers": {"hf", "engine"},
    "plotly": {"views", "report", "widgets"},
    "ipywidgets": {"widgets"},
    "anywidget": {"widgets"},
    "IPython": {"views", "widgets", "report"},
    "triton": {"kernels", "predictor"},
    "optuna": {"tuning"},
    "scipy": {"tuning"},
    "sqlalchemy": {"tuning"},
    "dask": {"tuning"},
    "distributed": {"tuning"},
    "typer": {"cli"},
    "torch.cuda": {"device", "kernels"},
    "torch": {"device", "predictor", *BELOW_DEVICES - {"scheduler", "profile", "simulator"}},
}

#: Modules of the package's root besides `__init__` and `__main__`.
ROOT_MODULES = {"errors", "session"}

# (file, imported module) -> why it cannot stand at the top of the file.
LATE_IMPORTS: dict[tuple[str, str], str] = {
    ("prescope/kernels/__init__.py", "prescope.kernels.triton_experts"): "triton exists only where a GPU is",
    ("prescope/kernels/__init__.py", "prescope.kernels.graph_buffers"): "triton exists only where a GPU is",
    ("prescope/kernels/__init__.py", "prescope.kernels.inductor_pass"): "triton exists only where a GPU is",
    ("prescope/predictor/llapor.py", "prescope.predictor.llapor_triton"): "triton exists only where a GPU is",
    ("prescope/calibration/bench.py", "prescope.kernels.round_trip"): "triton exists only where a GPU is",
    (
        "prescope/session.py",
        "prescope.widgets.sweep_source",
    ): "what sweeps need comes with an extra of its own",
}

#: Folders whose functions import what they need -> why.
LATE_FOLDERS = {
    "cli": "a command's --help must not wait for torch, so a command imports what it runs when it runs"
}


class Import(NamedTuple):
    """One imported module, or one use of `torch.cuda`, in one file."""

    file: str  # relative to the repository
    importer: str  # dotted
    target: str  # dotted
    line: int
    is_late: bool  # inside a function
    is_typing: bool  # under `if TYPE_CHECKING:`


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def top(module: str) -> str:
    """`prescope.hf.taps` -> `hf`; the package itself -> `` (the door)."""
    return module.split(".")[1] if "." in module else ""


SOURCES = {dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def targets(node: ast.AST, importer: str, is_package: bool) -> list[str]:
    """Modules named by one node; `from a import b` names `a.b` when that is a module of ours."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            above = importer.split(".")[: None if is_package and node.level == 1 else is_package - node.level]
            base = ".".join([*above, *([node.module] if node.module else [])])
        named = [f"{base}.{alias.name}" for alias in node.names if alias.name != "__version__"]
        is_module = {name for name in named if name in SOURCES or name in DOORS}
        return sorted(is_module) + ([base] if len(is_module) < len(named) else [])
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return ["torch.cuda"] if (node.value.id, node.attr) == ("torch", "cuda") else []
    return []


def walk(
    node: ast.AST, is_late: bool = False, is_typing: bool = False
) -> Iterator[tuple[ast.AST, bool, bool]]:
    """Every node below, with: is it inside a function, is it under TYPE_CHECKING."""
    yield node, is_late, is_typing
    is_late = is_late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    guard = ast.unparse(node.test) if isinstance(node, ast.If) else ""
    for field, value in ast.iter_fields(node):
        in_guard = is_typing or (field == "body" and guard.endswith("TYPE_CHECKING"))
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from walk(child, is_late, in_guard)


def imports_in(source: str, importer: str, path: Path) -> list[Import]:
    is_package = path.name == "__init__.py"
    file = path.relative_to(ROOT).as_posix()
    return [
        Import(file, importer, target, getattr(node, "lineno", 0), is_late, is_typing)
        for node, is_late, is_typing in walk(ast.parse(source, filename=file))
        for target in targets(node, importer, is_package)
    ]


IMPORTS = [i for name, path in SOURCES.items() for i in imports_in(path.read_text("utf-8"), name, path)]
OURS = [i for i in IMPORTS if i.target.split(".")[0] == "prescope"]


#: Private names of other libraries that are given in the package too: NamedTuple, transformers, ctypes, IPython.
OTHERS = {"_asdict", "_replace", "_prefill", "_name", "_repr_html_"}


def private_uses() -> Iterator[tuple[Path, ast.Attribute]]:
    """Each `x._name` of the package and the benchmarks in which x is not the object itself."""
    for path in [*SOURCES.values(), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            is_private = isinstance(node, ast.Attribute) and re.fullmatch(r"_[a-z]\w*", node.attr)
            if is_private and node.attr not in OTHERS and ast.unparse(node.value) not in ("self", "cls"):
                yield path, node


#: A private name where it is given.
GIVEN = re.compile(r"(?:self\.(_\w+)\b|^ *(_\w+)\b)(?=[^=\n]*=)|def (_\w+)", re.MULTILINE)


@cache
def homes() -> dict[str, set[Path]]:
    """Private names that are given in the package, each with the folders where it is; none of another library's."""
    found: dict[str, set[Path]] = defaultdict(set)
    for path in SOURCES.values():
        for names in GIVEN.findall(path.read_text("utf-8")):
            found["".join(names)].add(path.parent)
    return found


def listed(found: list[Import], why: str) -> str:
    return "\n".join([why, *(f"  {i.file}:{i.line} imports {i.target}" for i in found)])


def cycle_in(edges: set[tuple[str, str]]) -> list[str]:
    graph: dict[str, set[str]] = {}
    for importer, target in edges:
        graph.setdefault(importer, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_folder_has_its_row():
    unknown = sorted({top(name) for name in SOURCES} - set(RANK) - {"", "__main__"})
    assert not unknown, f"without a row: {', '.join(unknown)}. Add each to ROWS in {Path(__file__).name}"
    gone = sorted(set(RANK) - {top(name) for name in SOURCES})
    assert not gone, f"ROWS names what is not there: {', '.join(gone)}"


def test_the_root_holds_only_what_a_newcomer_looks_for_first():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert modules == ROOT_MODULES


def test_the_readmes_table_is_the_folders():
    """The picture of the house that a newcomer reads first is the house."""
    text = (ROOT / "README.md").read_text("utf-8")
    table = text[text.index("| row |") :].split("\n\n")[0].splitlines()[2:]
    rows = tuple(tuple(re.findall(r"`(\w+)`", line.split("|")[2])) for line in table)
    assert rows == ROWS


def test_a_folder_imports_only_from_the_rows_above():
    """Typing-only imports count too: a type from a lower row is a dependency all the same."""
    upward = [
        i
        for i in OURS
        if top(i.importer) in RANK
        and top(i.target) in RANK
        and top(i.importer) != top(i.target)
        and RANK[top(i.target)] >= RANK[top(i.importer)]
    ]
    assert not upward, listed(upward, "these import from their own row or below it:")


def test_no_module_imports_the_door():
    """It reaches everything, so a name taken from it hides a direction; `__version__` is its own."""
    through = [i for i in OURS if i.target == "prescope" and i.importer != "prescope" and not i.is_typing]
    assert not through, listed(through, "import from the module itself, not from `prescope`:")


def test_there_is_no_cycle():
    """Among files, typing imports too: two files that need each other's types are one file."""
    files = cycle_in(
        {
            (i.importer, i.target)
            for i in OURS
            if "prescope" not in (i.importer, i.target) and i.importer != i.target
        }
    )
    assert not files, " -> ".join(files)


def test_nobody_reaches_into_another_folders_private_parts():
    """`x._name` is for the object itself and its own folder; what others need gets a public name."""
    reached = [
        f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"
        for path, node in private_uses()
        if path.parent not in homes().get(node.attr, {path.parent})
    ]
    assert not reached, "\n".join(reached)


@pytest.mark.parametrize("library", DOORS)
def test_one_door_per_library(library):
    through = [
        i
        for i in IMPORTS
        if (i.target == library or i.target.startswith(library + "."))
        and top(i.importer) not in DOORS[library]
        and not i.is_typing
    ]
    doors = ", ".join(sorted(DOORS[library]))
    assert not through, listed(through, f"{library} may be imported only in {doors}:")


def test_no_import_hides_in_a_function():
    """A late import is how a cycle is hidden. One with a better reason is named in LATE_IMPORTS."""
    late = [
        i
        for i in OURS
        if i.is_late
        and (i.file, i.target) not in LATE_IMPORTS
        and i.importer != "prescope"
        and top(i.importer) not in LATE_FOLDERS
    ]
    assert not late, listed(late, "move these to the top, or give the reason in LATE_IMPORTS:")


def test_late_imports_that_are_excused_still_exist():
    seen = {(i.file, i.target) for i in OURS if i.is_late}
    assert set(LATE_IMPORTS) <= seen, f"remove from LATE_IMPORTS: {sorted(set(LATE_IMPORTS) - seen)}"


def test_the_reader_of_imports_sees_every_form():
    """A guard for the tests above: a reader that overlooks a form would let everything pass."""
    source = (
        "import torch.nn as nn\n"
        "from .taps import tap\n"
        "from ..core.types import ExpertKey\n"
        "from prescope import errors\n"
        "if typing.TYPE_CHECKING:\n"
        "    import plotly\n"
        "def f():\n"
        "    from prescope.core.types import Phase\n"
        "    torch.cuda.synchronize()\n"
    )
    found = imports_in(source, "prescope.hf.experts", PACKAGE / "hf" / "experts.py")
    assert [(i.target, i.is_late, i.is_typing) for i in found] == [
        ("torch.nn", False, False),
        ("prescope.hf.taps", False, False),
        ("prescope.core.types", False, False),
        ("prescope.errors", False, False),
        ("plotly", False, True),
        ("prescope.core.types", True, False),
        ("torch.cuda", True, False),
    ]
    inside = imports_in(
        "from . import x\nfrom .y import z\nfrom ..core.types import k\n",
        "prescope.hf",
        PACKAGE / "hf/__init__.py",
    )
    assert [i.target for i in inside] == ["prescope.hf", "prescope.hf.y", "prescope.core.types"]


@pytest.mark.parametrize("door", ["prescope", "prescope.cli"])
def test_the_door_imports_nothing_heavy(door):
    """`import prescope` must stay cheap, and work where only the core is installed; so must a command's --help."""
    heavy = [
        "transformers",
        "plotly",
        "ipywidgets",
        "anywidget",
        "triton",
        "torch",
        "pandas",
        "numpy",
        "optuna",
    ]
    code = f"import sys, prescope, {door}; print(prescope.__version__, *(m for m in {heavy} if m in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(out.stdout.split()) == 1, f"`import {door}` imported {out.stdout.split()[1:]}"


def test_the_door_opens_on_every_public_name():
    import prescope

    for name in prescope.__all__:
        assert getattr(prescope, name) is not None
        assert name in dir(prescope)
    with pytest.raises(AttributeError, match="public names"):
        prescope.no_such_name  # noqa: B018


@pytest.mark.parametrize("door", sorted(PACKAGE.glob("*/__init__.py")), ids=lambda path: path.parent.name)
def test_what_a_folder_offers_is_there(door):
    """A name that was renamed away makes `from prescope.kernels import *` fail, and the reference warn."""
    tree = ast.parse(door.read_text("utf-8"))
    bound, offered = set(), []
    for node in tree.body:
        inner = [node, *(getattr(node, "body", []) if isinstance(node, ast.If | ast.Try) else [])]
        for one in inner:
            if isinstance(one, ast.FunctionDef | ast.ClassDef):
                bound.add(one.name)
            elif isinstance(one, ast.Import | ast.ImportFrom):
                bound.update((alias.asname or alias.name).partition(".")[0] for alias in one.names)
            elif isinstance(one, ast.Assign | ast.AnnAssign):
                targets = one.targets if isinstance(one, ast.Assign) else [one.target]
                bound.update(target.id for target in targets if isinstance(target, ast.Name))
                if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
                    assert one.value is not None
                    offered = ast.literal_eval(one.value)
    assert [name for name in offered if name not in bound] == []
