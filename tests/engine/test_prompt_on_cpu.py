"""A prompt's rare experts are computed on the CPU beside the link: the same text, fewer bytes, as simulated."""

import numpy as np
import pytest

import prescope
from prescope.cache.policies import make_policy
from prescope.cache.residency import ResidencyTable
from prescope.scheduler.costs import LayerCosts, compiled_costs
from prescope.scheduler.settings import resolve
from prescope.simulator.prefill import prefill
from tests.support.models import EXPERTS, LAYERS, TOP_K, plain_tokens, prompt, tiny_moe

COSTS = LayerCosts(
    link_us=1000.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, *range(300, 3500, 50)), cpu_base_us=50.0,
    source="made up for a test",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:experts on the CPU run on torch")


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


def served(model, ids, schedule, slots):
    settings = {"schedule": schedule, "cache": "lru", "costs": COSTS, "cpu_threads": 1}
    with prescope.attach(model, slots=slots, device="cpu", link_gb_per_s=50.0, **settings) as engine:
        run = engine.generate(ids, max_new_tokens=5)
        engine.check_integrity()
    return run


@pytest.mark.parametrize(
    ("batch", "length", "slots"), [(1, 6, TOP_K), (1, 6, 7), (3, 6, 3 * TOP_K), (2, 90, 9)]
)
def test_rare_experts_of_a_prompt_are_computed_on_the_cpu(model, batch, length, slots):
    ids = prompt(batch=batch, length=length)
    expected = plain_tokens(model, ids, new=5)
    shared, copied = (served(model, ids, schedule, slots) for schedule in ("presched", "fiddler"))
    assert shared.tokens == copied.tokens == expected
    prefill, whole = shared.metrics.prefill, copied.metrics.prefill
    assert 0 < prefill.on_cpu < prefill.misses and whole.on_cpu == 0
    assert prefill.h2d_bytes < whole.h2d_bytes
    assert prefill.needed == whole.needed
    row = shared.layers.query("phase == 'prefill'")
    assert (row["on_cpu"] + row["hits"] + row["late"] <= row["needed"]).all()


@pytest.mark.parametrize("slots", [6, LAYERS * EXPERTS // 2])
def test_the_simulator_leaves_the_slots_as_the_engines_prompts_do(model, slots, monkeypatch):
    """The first one finds free slots, and fills them; the second one finds none."""
    # Which slots streamed experts take depends on what is on its way just then.
    monkeypatch.setattr("prescope.cache.rounds.STREAM_SHARE", 2.0)
    settings = {"schedule": "presched", "cache": "lru", "costs": COSTS, "cpu_threads": 1}
    found = []
    with prescope.attach(model, slots=slots, device="cpu", link_gb_per_s=50.0, **settings) as engine:
        for seed in (0, 1):
            run = engine.generate(prompt(length=6, seed=seed), max_new_tokens=1)
            found.append((run, engine.runner.residency.slot_of >= 0))
        shape = engine.shape
    assert found[0][1].sum() > 0.8 * slots and found[1][0].metrics.prefill.on_cpu > 0
    table = ResidencyTable(shape, slots, make_policy("lru", shape))
    resolved = resolve("presched", num_experts=EXPERTS, depth=0)
    for run, is_here in found:
        prefill(table, run.trace, 0, resolved.settings, compiled_costs(COSTS, cpu=True, predicts=False))
        assert np.array_equal(is_here, table.slot_of >= 0)
