"""A packed checkpoint gives what its numbers give, however its experts are moved; what cannot be read is refused.

The numbers are those of `tests.support.packed_checkpoints`, in float32, in a plain model of transformers.
"""

from functools import partial

import pytest
import torch

import prescope
from prescope.core.types import MoEShape
from prescope.predictor import EarlyRouter, Routers
from prescope.scheduler.costs import LayerCosts
from tests.support.distances import distance
from tests.support.models import plain_tokens, prompt
from tests.support.packed_checkpoints import EXPERTS, FORMS, LAYOUTS, TOP_K, write

pytestmark = [
    pytest.mark.filterwarnings("ignore:experts on the CPU run on torch"),
    pytest.mark.usefixtures("one_thread"),
]
#: Of the largest logit, as in test_families; dequantising with a wrong scale or order moves one by 0.1 and more.
TOLERANCE = 1e-5
COSTS = LayerCosts(
    link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 80.0, 120.0, 160.0), cpu_base_us=10.0, decide_us=30.0,
    source="made up for a test",
)  # fmt: skip
load = partial(prescope.load, dtype="float32", device="cpu", link_gb_per_s=50.0)


@pytest.fixture(scope="module", params=LAYOUTS)
def written(request, tmp_path_factory):
    """A layout's name, its folder and the plain model."""
    folder = tmp_path_factory.mktemp("packed")
    return request.param, folder, write(request.param, folder)


@pytest.mark.parametrize("slots", [TOP_K, 1.0])
def test_logits_and_tokens_are_those_of_the_numbers(written, slots):
    name, folder, plain = written
    with load(folder, slots=slots) as engine, torch.no_grad():
        assert engine.form == FORMS[name] and not engine.is_lossy
        for batch in (1, 3):
            ids = prompt(batch)
            assert distance(engine.model(ids).logits, plain(ids).logits) < TOLERANCE
            assert engine.generate(ids, max_new_tokens=8).tokens == plain_tokens(plain, ids, 8)
        engine.check_integrity()


@pytest.mark.parametrize("schedule", ["fiddler", "presched", "hybrimoe"])
def test_tokens_are_the_same_under_schedules_that_compute_on_the_cpu_and_prefetch(written, schedule):
    _, folder, plain = written
    ids = prompt(2)
    with load(folder, slots=7, schedule=schedule, costs=COSTS, cpu_threads=1, frequencies=None) as engine:
        if schedule == "presched":
            engine.configure(predictor=early_router(engine))
        run = engine.generate(ids, max_new_tokens=8)
        assert run.tokens == plain_tokens(plain, ids, 8)
        assert run.layers["on_cpu"].sum() > 0 or schedule != "fiddler"
        engine.check_integrity()


def early_router(engine) -> EarlyRouter:
    layers = len(engine.layers)
    weights = torch.randn(
        layers, EXPERTS, engine.model.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    return EarlyRouter(MoEShape(layers, EXPERTS, TOP_K), Routers.of_weights(weights), layers - 1)


@pytest.mark.parametrize("layout", ["qwen3 fp8", "mixtral awq"])
def test_in_bfloat16_every_weight_is_rounded_once(tmp_path, layout):
    """So the logits are, to the bit, those of the numbers rounded to bfloat16."""
    write(layout, tmp_path / "packed").save_pretrained(tmp_path / "plain")
    found = []
    for folder in ("packed", "plain"):
        with load(tmp_path / folder, slots=9, dtype="bfloat16") as engine, torch.no_grad():
            assert engine.hardware()["dtype"] == "bfloat16"
            found.append(engine.model(prompt(2)).logits)
    assert torch.equal(*found)


#: One with scales of blocks, and one with biases and a gate of its own.
QUICK = ("qwen3 fp8", "gpt-oss mxfp4")


@pytest.mark.parametrize(
    "layout", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_on_a_gpu_packed_experts_are_unpacked_in_registers_and_steps_run_from_a_graph(layout, tmp_path, gpu):
    """In Triton's interpreter where there is no GPU. The first step is served layer by layer, then it is captured."""
    plain, ids = write(layout, tmp_path), prompt(2, length=4)
    with prescope.load(tmp_path, slots=9, dtype="float32", **gpu) as engine, torch.no_grad():
        assert engine.form == FORMS[layout] and engine.config.kernels == "triton"
        assert distance(engine.model(ids.to(gpu["device"])).logits.cpu(), plain(ids).logits) < 1e-4
        run = engine.generate(ids[:1, :3], max_new_tokens=4)
        assert not any("layer by layer" in note for note in run.notes), run.notes
        assert run.tokens == plain_tokens(plain, ids[:1, :3], 4)
        engine.check_integrity()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_short_prompts_come_from_a_graph_where_all_experts_have_slots(layout, tmp_path, gpu):
    plain = write(layout, tmp_path)
    with prescope.load(tmp_path, slots=1.0, dtype="float32", **gpu) as engine:
        for length, is_recorded in ((4, False), (7, True)):
            ids = prompt(1, length=length)
            run = engine.generate(ids, max_new_tokens=3)
            assert run.tokens == plain_tokens(plain, ids, 3)
            assert run.config["graphs"]["prompt"] is is_recorded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: runs on a machine that has one")
def test_on_cuda_it_is_said_who_unpacks(written):
    _, folder, plain = written
    ids = prompt(3)
    with prescope.load(folder, slots=9, dtype="float32", device="cuda", kernels="torch") as engine:
        assert "unpacked by torch" in engine.reasons["experts"]
        with pytest.warns(UserWarning, match="layer by layer: kernels='torch'"):
            run = engine.generate(ids, max_new_tokens=4)
        assert any("layer by layer" in note for note in run.notes)
        assert run.tokens == plain_tokens(plain, ids, 4)
    with prescope.load(folder, slots=9, dtype="float32", device="cuda") as engine:
        assert "unpacked in registers" in engine.reasons["experts"]
