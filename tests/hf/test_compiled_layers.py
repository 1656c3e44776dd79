"""Decoder layers that are alike are compiled once; those that do more with their index are compiled each."""

from importlib import import_module

import pytest
import torch

import prescope
from tests.support.models import plain_tokens, prompt, tiny_moe

pytest.importorskip("triton", reason="Triton exists for Linux only")
MODULE = import_module("prescope.hf.compiled_layers")  # its function of that name hides it


@pytest.fixture
def compilations(monkeypatch):
    """What torch hands to its backend, one entry a compilation."""
    seen = []

    def backend(graph, inputs, **options):  # on CUDA there are some
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(MODULE, "BACKEND", backend)
    yield seen
    torch._dynamo.reset()


def run(model, gpu, batch=1):
    ids = prompt(batch=batch, length=5)
    with prescope.attach(model, slots=24, decode="gpu-driven", compiled=True, **gpu) as engine:
        result = engine.generate(ids, max_new_tokens=4)
    assert result.tokens == plain_tokens(model, ids, new=4)
    assert result.config["reasons"]["decode"].startswith("gpu-driven"), result.config["reasons"]["decode"]


def test_layers_that_are_alike_share_one_compilation(gpu, compilations):
    counts = []
    for layers in (2, 5):
        torch._dynamo.reset()
        compilations.clear()
        run(tiny_moe(num_hidden_layers=layers), gpu)
        counts.append(len(compilations))
    assert counts[0] == counts[1] > 0
