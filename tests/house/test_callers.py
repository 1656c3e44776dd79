"""What nobody calls is not kept: every function and class of a module is named by other code than its tests."""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Code that may be a caller. A name in a string counts: `__all__`, settings that name a method, code in notebooks.
CALLERS = ("prescope", "benchmarks", "recipes", "docs")
#: Readers of what others write, for whoever has such a file.
FOR_USERS = {"read_events"}


def named(tree: ast.AST) -> Iterator[str]:
    """Every name that code uses, as often as it does; not those it defines or imports, nor words of docstrings."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from re.findall(r"[A-Za-z_]\w*", node.value)


def defined(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a module that are there without being called: none that a decorator hands on."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("__"):
            called = [one for one in node.decorator_list if isinstance(one, ast.Call)]
            if not any(isinstance(one.func, ast.Attribute) for one in called):
                yield node


@cache
def uses() -> Counter[str]:
    found: Counter[str] = Counter()
    for folder in CALLERS:
        for path in (ROOT / folder).rglob("*.py"):
            found.update(named(ast.parse(path.read_text("utf-8"))))
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        found.update(re.findall(r"[A-Za-z_]\w*", code))
    return found


def uncalled(tree: ast.Module) -> list[str]:
    """Those that no code names but their own: a function that calls itself has no caller by that."""
    return [
        node.name
        for node in defined(tree)
        if uses()[node.name] - sum(name == node.name for name in named(node)) < 1
        and node.name not in FOR_USERS
    ]


def test_every_function_and_class_has_a_caller():
    """A test alone keeps nothing alive: what only it calls is tested for nobody."""
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / "prescope").rglob("*.py"))
        for name in uncalled(ast.parse(path.read_text("utf-8")))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "def nobody_calls_this():\n    return 1",
        "def nobody_calls_this(n):\n    return n and nobody_calls_this(n - 1)",
        "class NobodyMakesThis:\n    '''NobodyMakesThis is made by nobody.'''",
        "@cache\ndef nobody_calls_this():\n    return 1",
    ],
)
def test_what_nobody_calls_is_noticed(code):
    assert len(uncalled(ast.parse(code))) == 1
