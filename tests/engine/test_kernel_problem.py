"""A kernel that Triton cannot compile, or that the GPU has no room for: the reference computes, and says why."""

import ast

import pytest

import prescope
from tests.support.models import EXPERTS, LAYERS, plain_tokens, prompt, tiny_moe

pytest.importorskip("triton", reason="Triton exists for Linux only")
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

ALL = LAYERS * EXPERTS
NO_ROOM = OutOfResources(300_000, 232_448, "shared memory")
NO_CODE = CompilationError(None, ast.parse("x").body[0], "no such instruction")


class Fails:
    """Stands for a kernel that cannot be launched."""

    def __init__(self, name, error):
        self.__name__, self._error = name.rpartition(".")[2], error

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            raise self._error

        return launch


@pytest.fixture
def fails(monkeypatch):
    return lambda name, error: monkeypatch.setattr(f"prescope.kernels.{name}", Fails(name, error))


@pytest.mark.parametrize(
    ("kernel", "error", "length", "said"),
    [
        ("triton_experts._pair_linear", NO_ROOM, 1, "_pair_linear cannot run here: out of resource: shared memory"),
        ("triton_experts._grouped_linear", NO_CODE, 40, "_grouped_linear cannot run here: (?s:.*)no such instruction"),
    ],
    ids=["a pair each", "tiles"],
)  # fmt: skip
def test_plain_torch_computes_instead_and_says_so_once(gpu, fails, kernel, error, length, said):
    model, ids = tiny_moe(), prompt(1, length)
    expected = plain_tokens(model, ids, new=3)
    fails(kernel, error)
    with prescope.attach(model, slots=5, decode="layered", **gpu) as engine:
        with pytest.warns(UserWarning, match=f"plain torch, .*{said}"):
            run = engine.generate(ids, max_new_tokens=3)
        assert run.tokens == expected
        assert run.config["reasons"]["kernels"].startswith("torch, layer by layer: Triton's kernel")
        engine.configure(slots=6)  # new kernels would fail, and warn, again
        assert engine.generate(ids, max_new_tokens=3).tokens == expected


@pytest.mark.parametrize("decode", ["layered", "gpu-driven"])
def test_so_it_does_where_the_host_has_not_seen_the_routing(gpu, fails, decode):
    model, ids = tiny_moe(), prompt(1, 40)
    expected = plain_tokens(model, ids, new=2)
    with prescope.attach(model, slots=ALL, decode=decode, record_routing=True, **gpu) as engine:
        while (engine.runner.residency.slot_of < 0).any():
            engine.generate(prompt(3, 30, seed=engine.runner.residency.policy.tick), max_new_tokens=2)
        fails("tile_plan.align", NO_ROOM)
        with pytest.warns(UserWarning, match="align cannot run here"):
            run = engine.generate(ids, max_new_tokens=2)
        assert run.tokens == expected
        assert (run.layers["step"].value_counts() == LAYERS).all(), "no layer is counted twice"


def test_a_step_that_has_such_a_kernel_runs_layer_by_layer(gpu, fails):
    model, ids = tiny_moe(), prompt(1, 3)
    expected = plain_tokens(model, ids, new=4)
    fails("graph_kernels._finish", NO_ROOM)
    with prescope.attach(model, slots=5, decode="gpu-driven", **gpu) as engine:
        with pytest.warns(UserWarning, match="layer by layer: Triton's kernel _finish cannot run here"):
            run = engine.generate(ids, max_new_tokens=4)
        assert run.tokens == expected
        assert "_finish" in run.config["reasons"]["decode"]
