"""Documentation names what exists: each path and name of ours in README, docs, notebooks, docstrings and comments.

Reads the source with `ast` and `tokenize`; imports nothing of the package.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "prescope"
PAGES = [ROOT / "README.md", ROOT / "docs" / "architecture.md", ROOT / "docs" / "results.md"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: Python files whose docstrings and comments are read.
SOURCES = sorted(
    path for folder in (PACKAGE, ROOT / "benchmarks", ROOT / "recipes") for path in folder.rglob("*.py")
)

#: What a word in front of a dot stands for where it is an object and no module.
OBJECTS = {
    "run": "RunResult",
    "engine": "Engine",
    "session": "Session",
    "trained": "TrainedPredictor",
    "trace": "RoutingTrace",
    "profile": "HardwareProfile",
    "scenarios": "Scenarios",
    "panel": "SchedulePanel",
    "config": "EngineConfig",
    "settings": "ScheduleSettings",
    "costs": "LayerCosts",
    "spec": "ExpertsSpec",
    "host": "HostPool",
    "slots": "Slots",
    "predictor": "Predictor",
    "sweep": "Sweep",
    "proof": "Proof",
}
#: First words of dotted names that belong to others.
OTHERS = {"torch", "Tensor", "transformers", "triton", "model", "gc", "time", "_layout_obj"}
#: Names of other libraries' functions and arguments that no code of ours writes.
FOREIGN = {"load_balancing_loss_func", "is_causal", "use_experts_implementation"}
BACKTICKED = re.compile(r"`+([^`\n]+)`+")
DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
#: A file; a name with a folder in front counts wherever it stands, a bare one only if it is source or a page.
PATH = re.compile(
    r"(?<![\w/.-])(?:\.\./)*(?:[\w-]+/)*[\w.-]+\.(?:py|md|c|h|json|jsonl|svg|png|ipynb)(?![\w.])"
)
#: Files that a run makes, and other people's.
NOT_OURS = re.compile(r"transformers/|reports/|ATTRIBUTION\.md|paper\.md|^[\w.-]+\.(?:json|svg)$")


class Text(NamedTuple):
    """A docstring, a comment, or a page."""

    path: Path
    line: int
    text: str


@cache
def names_in(path: Path) -> dict[str, set[str]]:
    """What a module gives: "" its own names, and of each class its members; inherited ones are looked up by name."""
    tree = ast.parse(path.read_text("utf-8"))
    found: dict[str, set[str]] = {"": set()}
    for node in tree.body:
        found[""] |= set(bound(node))
        if isinstance(node, ast.ClassDef):
            members = {name for child in node.body for name in bound(child)}
            for child in ast.walk(node):
                if isinstance(child, ast.Attribute) and ast.unparse(child.value) == "self":
                    members.add(child.attr)
            found[node.name] = members | {f"<{ast.unparse(base).split('[')[0]}" for base in node.bases}
    return found


def bound(node: ast.stmt) -> Iterator[str]:
    """Names that a statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        yield from (
            child.id for target in targets for child in ast.walk(target) if isinstance(child, ast.Name)
        )
    elif isinstance(node, ast.If | ast.Try):
        for child in node.body:
            yield from bound(child)


MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = sorted({path.parent for path in MODULES} - {PACKAGE})


@cache
def classes() -> dict[str, set[str]]:
    """Members of all classes of the package by the class's name; of two with one name, those of both."""
    joined: dict[str, set[str]] = {}
    for path in MODULES:
        for name, members in names_in(path).items():
            if name:
                joined[name] = joined.get(name, set()) | members
    return joined


def has_member(name: str, member: str) -> bool:
    """Also of its bases; a base that is another library's is believed to have it."""
    members = classes()[name]
    bases = {base[1:] for base in members if base.startswith("<")} - {"NamedTuple", "Protocol"}
    return member in members or any(base not in classes() or has_member(base, member) for base in bases)


@cache
def identifiers() -> frozenset[str]:
    """Every name and word that code of the package, the benchmarks and the recipes uses, strings included."""
    words: set[str] = set()
    for path in SOURCES:
        words.add(path.stem)
        for token in tokens_of(path):
            if token.type == tokenize.NAME:
                words.add(token.string)
            elif token.type == tokenize.STRING and not token.string.lstrip("rbfRBF").startswith('"""'):
                words |= set(re.findall(r"\w+", token.string))
    return frozenset(words)


@cache
def tokens_of(path: Path) -> list[tokenize.TokenInfo]:
    return list(tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline))


def places_of(first: str, home: Path) -> list[Path]:
    """Modules and folders that a word may mean, those beside the file first."""
    everywhere = [path for path in (*MODULES, *FOLDERS) if path.stem == first]
    return sorted(everywhere, key=lambda path: path.parent != home.parent)


def resolves(parts: list[str], place: Path) -> bool:
    """Whether a dotted rest names something in a module or a folder."""
    if not parts:
        return True
    if place.is_dir():
        inner = [place / f"{parts[0]}.py", place / parts[0]]
        if any(resolves(parts[1:], path) for path in inner if path.exists()):
            return True
        place = place / "__init__.py"
        if not place.exists():
            return False
    names = names_in(place)
    if parts[0] not in names[""] and parts[0] not in lazy_names(place):
        return False
    if len(parts) == 1 or parts[0] not in classes():
        return len(parts) == 1 or parts[0] not in names
    return has_member(parts[0], parts[1])


@cache
def lazy_names(place: Path) -> frozenset[str]:
    """Names that the door of the package opens on demand."""
    return (
        frozenset(re.findall(r'"(\w+)": "prescope', place.read_text("utf-8")))
        if place == PACKAGE / "__init__.py"
        else frozenset()
    )


def problem_with(name: str, home: Path) -> str:
    """Why a name in backticks is none of ours any more; "" if it is, or never claimed to be."""
    first, *rest = name.split(".")
    if first in OTHERS or name in FOREIGN or name.endswith("_"):  # the last one: a prefix
        return ""
    if first == "prescope":
        return "" if resolves(rest, PACKAGE) else "no such name in the package"
    if not rest:
        return "" if first in identifiers() else "no code uses this name"
    if any(resolves(rest, place) for place in places_of(first, home)):
        return ""
    owner = first if first in classes() else OBJECTS.get(first, "")
    if owner:
        return "" if has_member(owner, rest[0]) else f"{owner} has no {rest[0]}"
    return "neither a module, a class nor an object that docs may name"


@cache
def texts() -> tuple[Text, ...]:
    """Docstrings and comments of all Python files."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    found.append(Text(path, node.body[0].lineno, text))
        comments = (token for token in tokens_of(path) if token.type == tokenize.COMMENT)
        found += [Text(path, token.start[0], token.string) for token in comments]
    return tuple(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_name_what_exists(page):
    text = page.read_text("utf-8")
    prose = Text(page, 0, re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    gone = [*gone_names(prose), *gone_paths(Text(page, 0, re.sub(r"\[[^]`]*\]", "", text)))]
    for path, name in re.findall(r"`([\w/]+\.py)`,? `([\w.]+)`", text):
        if (PACKAGE / path).exists() and not resolves(name.split("."), PACKAGE / path):
            gone.append(f"{path} has no {name}")
    assert not gone, "\n".join(gone)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_name_what_exists(notebook):
    cells = json.loads(notebook.read_text("utf-8"))["cells"]
    texts = [Text(notebook, 0, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "markdown"]
    gone = [problem for text in texts for problem in (*gone_names(text), *gone_paths(text))]
    assert not gone, "\n".join(gone)


def gone_names(text: Text) -> Iterator[str]:
    for quoted in BACKTICKED.findall(text.text):
        name = quoted.removesuffix("()")
        if DOTTED.fullmatch(name) and not PATH.fullmatch(name) and (problem := problem_with(name, text.path)):
            yield f"{text.path.relative_to(ROOT)}:{text.line} `{name}`: {problem}"


def gone_paths(text: Text) -> Iterator[str]:
    for path in PATH.findall(text.text):
        bases = (ROOT, PACKAGE, text.path.parent, PACKAGE / "kernels" / "cpu" / "kernel")
        if not NOT_OURS.search(path) and not any((base / path).exists() for base in bases):
            yield f"{text.path.relative_to(ROOT)}:{text.line} {path}: no such file"


def test_the_readme_is_short():
    """What a person needs fits on a few screens; figures and history have pages of their own."""
    text = re.sub(
        r"```.*?```|^\|.*?$|^!.*?$|\]\([^)]*\)",
        "",
        (ROOT / "README.md").read_text("utf-8"),
        flags=re.S | re.M,
    )
    assert len(text.split()) <= 930  # 900 words, and the marks of lists and headings


def test_docstrings_and_comments_name_what_exists():
    gone = [problem for text in texts() for problem in gone_names(text)]
    assert not gone, "\n".join(gone)


@pytest.mark.parametrize(
    "name",
    [
        "prescope.learning",
        "scheduler.decide.plan",
        "raw.call",
        "core.Reason",
        "Engine.nothing",
        "WasNeverThere",
    ],
)
def test_the_reader_notices_a_name_that_is_gone(name):
    """A guard for the tests here: a reader that lets everything pass would let these pass."""
    assert problem_with(name, PACKAGE / "scheduler" / "plan.py")


@pytest.mark.parametrize(
    "name", ["prescope.Engine", "plan.make_plan", "Loader.pump", "engine.shape", "core.types.Reason.CPU"]
)
def test_the_reader_finds_a_name_that_is_there(name):
    assert not problem_with(name, PACKAGE / "scheduler" / "presched.py")


def test_docstrings_and_comments_name_files_that_exist():
    gone = [problem for text in texts() for problem in gone_paths(text)]
    assert not gone, "\n".join(gone)
