"""Layers whose experts are all in slots are computed before the host has seen their routing."""

import pytest
import torch

import prescope
from prescope.kernels.tile_plan import _by_torch, tiles_of
from tests.support.models import EXPERTS, LAYERS, plain_tokens, prompt, tiny_moe

ALL = LAYERS * EXPERTS


@pytest.fixture
def model():
    return tiny_moe()


def reads_of(engine, monkeypatch):
    """Shapes that the host reads from now on."""
    read, shapes = engine.runner.device.read, []

    def counted(tensor):
        shapes.append(tuple(tensor.shape))
        return read(tensor)

    monkeypatch.setattr(engine.runner.device, "read", counted)
    return shapes


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (2, 9), (1, 40)])
def test_a_prompt_is_read_once_and_its_evidence_is_the_same(model, gpu, monkeypatch, batch, length):
    ids = prompt(batch, length)
    expected = plain_tokens(model, ids, new=3)
    with prescope.attach(model, slots=ALL, decode="layered", record_routing=True, **gpu) as engine:
        everything = torch.arange(128).reshape(2, -1)
        while (engine.runner.residency.slot_of < 0).any():
            engine.generate(everything, max_new_tokens=1)
            everything = everything.flip(1).roll(3, 1)
        shapes = reads_of(engine, monkeypatch)
        run = engine.generate(ids, max_new_tokens=3)
        assert len(shapes) == 3, "one reading for each forward pass"
        monkeypatch.setattr(engine.runner, "needs_nobody", lambda layer: False)
        former = engine.generate(ids, max_new_tokens=3)
    assert run.tokens == former.tokens == expected
    columns = ["step", "phase", "moe_layer", "tokens", "needed", "hits", "late", "misses"]
    assert run.layers[columns].equals(former.layers[columns])
    assert (run.trace.expert_ids == former.trace.expert_ids).all()
    assert run.metrics.prefill.hit_rate == 1.0


def test_what_an_interrupted_pass_left_is_in_nobodys_evidence(model, gpu, monkeypatch):
    ids = prompt(1, 6)
    with prescope.attach(model, slots=ALL, decode="layered", **gpu) as engine:
        while (engine.runner.residency.slot_of < 0).any():
            engine.generate(prompt(3, 30, seed=engine.runner.residency.policy.tick), max_new_tokens=2)
        serve, calls = engine.runner._serve_unread, []

        def interrupted(*args):
            calls.append(args)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return serve(*args)

        monkeypatch.setattr(engine.runner, "_serve_unread", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ids, max_new_tokens=3)
        run = engine.generate(ids, max_new_tokens=3)
        assert run.tokens == plain_tokens(tiny_moe(), ids, new=3)
        assert (run.layers["step"].value_counts() == LAYERS).all()


@pytest.mark.parametrize("experts", [5, 16])
def test_tiles_by_one_program_and_by_torch_cover_each_pair_once(experts):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(experts)
    ids = torch.randint(-1, experts + 1, (300,), generator=generator).to(device)
    slots = torch.randperm(40, generator=generator)[:experts].to(device, torch.int32)
    tiles = tiles_of(ids, slots, experts)
    order, blocks = _by_torch(ids, slots, experts, tiles.block_m, tiles.num_blocks)
    for each_order, each_blocks in ((tiles.order, tiles.blocks), (order, blocks)):
        found = {}
        for slot, first, end in each_blocks.tolist():
            assert end - first <= tiles.block_m
            found |= dict.fromkeys(each_order[first:end].tolist(), slot)
        wanted = {i: int(slots[e]) for i, e in enumerate(ids.tolist()) if 0 <= e < experts}
        assert found == wanted
