"""Every submodule is there after `import prescope`; former names lead to those of today; a missing extra is named."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import prescope
from prescope.core.renamed import MOVED, RENAMED

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_every_public_submodule_is_an_attribute_at_once():
    """In a process of its own: in this one a module that another test has imported is there for that reason alone."""
    modules = {
        path.stem
        for path in (ROOT / "prescope").iterdir()
        if (path / "__init__.py").is_file() or (path.suffix == ".py" and not path.name.startswith("_"))
    }
    done = run(
        "import prescope; print(*dir(prescope)); print(prescope.simulator.__name__, prescope.errors.BadTrace.__name__)"
    )
    at_once, used = done.stdout.splitlines()
    assert used.split() == ["prescope.simulator", "BadTrace"], done.stderr
    assert modules - set(at_once.split()) == set()
    for name in modules:
        assert prescope.__getattr__(name) is import_module(f"prescope.{name}")


@pytest.mark.parametrize("former", RENAMED)
def test_a_former_name_gives_the_module_of_today_and_says_so(former):
    today = import_module(f"prescope.{RENAMED[former]}")
    sys.modules.pop(f"prescope.{former}", None)
    with pytest.warns(FutureWarning, match=f"called prescope.{RENAMED[former]} now"):
        assert import_module(f"prescope.{former}") is today
    assert today.__spec__.name == f"prescope.{RENAMED[former]}", "the module itself is not renamed"
    with pytest.warns(FutureWarning, match=f"called prescope.{RENAMED[former]} now"):
        assert prescope.__getattr__(former) is today


@pytest.mark.parametrize(
    "package, former, today", [(package, *names) for package in MOVED for names in MOVED[package].items()]
)
def test_a_former_name_in_a_package_gives_what_it_is_today_and_says_so(package, former, today):
    module, _, name = today.rpartition(".")
    found = getattr(import_module(f"prescope.{module}"), name)
    with pytest.warns(FutureWarning, match=f"called prescope.{today} now"):
        assert getattr(import_module(f"prescope.{package}"), former) is found
    with pytest.raises(AttributeError, match="nothing_such"):
        import_module(f"prescope.{package}").nothing_such  # noqa: B018


def test_a_name_that_never_was_is_an_error():
    with pytest.raises(ModuleNotFoundError, match="nothing_such"):
        import_module("prescope.nothing_such")
    with pytest.raises(AttributeError, match="public names"):
        prescope.nothing_such  # noqa: B018


@pytest.mark.parametrize(
    "module, package",
    [
        ("views", "plotly"),
        ("widgets", "anywidget"),
        ("widgets", "ipywidgets"),
        ("report", "nbclient"),
        ("session", "plotly"),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(module, package):
    done = run(f"import sys; sys.modules[{package!r}] = None; import prescope.{module}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("pip install 'prescope[lab]'")
    assert package in done.stderr.splitlines()[-1]


def test_the_rest_works_without_the_extra():
    hidden = "; ".join(
        f"sys.modules[{name!r}] = None" for name in ("plotly", "ipywidgets", "anywidget", "nbformat")
    )
    done = run(
        f"import sys; {hidden}; import prescope; prescope.load; prescope.HardwareProfile; prescope.simulator"
    )
    assert done.returncode == 0, done.stderr
