"""What a docstring says of arguments is of those that there are: a name that was changed stays behind in words."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Names before a colon, at the start of a line of "Args": "a:", "a, b:".
NAMES = re.compile(r"\s*([a-z_]\w*(?:, [a-z_]\w*)*):(?: |$)")


def told(docstring: str) -> Iterator[str]:
    """Arguments that a docstring begins a line with."""
    _, _, rest = docstring.partition("Args:\n")
    for line in re.split(r"\n\n", rest)[0].splitlines():
        depth = len(line) - len(line.lstrip())
        if depth == 4 and (found := NAMES.match(line)):
            yield from found[1].split(", ")


def taken(node: ast.FunctionDef | ast.ClassDef) -> set[str] | None:
    """Arguments of a function, or of the making of a class; None where it takes any."""
    if isinstance(node, ast.FunctionDef):
        given = node.args
        names = {one.arg for one in [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg] if one}
        return None if given.kwarg else names
    fields = {
        one.target.id
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
    }
    makers = [one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"]
    made = [taken(one) for one in makers]
    return None if None in made else fields.union(*(names for names in made if names))


def strangers(tree: ast.Module) -> Iterator[str]:
    """Names that a docstring explains and its function does not take."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = taken(node)
            for name in told(ast.get_docstring(node) or ""):
                if names is not None and name not in names:
                    yield f"{node.name}: {name}"


@pytest.mark.parametrize("folder", ["prescope", "benchmarks", "recipes"])
def test_docstrings_explain_arguments_that_there_are(folder):
    found = [
        f"{path.relative_to(ROOT)}: {one}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for one in strangers(ast.parse(path.read_text("utf-8")))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("head", ["def f(a, *b):", "class F:\n    a: int\n    b: int\n    def g(self):"])
def test_a_name_that_is_not_there_is_noticed(head):
    lines = [
        '"""Words.',
        "",
        "Args:",
        "    a, b: there. c: within a line.",
        "    d: gone,",
        "        e: no argument.",
        '"""',
    ]
    first, *rest = head.split("\n")
    at = "\n".join(f"    {line}" for line in lines)
    source = "\n".join([first, at, *rest, "        pass" if rest else ""])
    assert [one.split(": ")[1] for one in strangers(ast.parse(source))] == ["d"]
