"""What a user has torch make tensors with by default is the user's: nothing here goes by it, and no text changes."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import prescope
from prescope.core.paths import embedded_model
from prescope.predictor import Chance, EarlyRouter, LlaporConfig, Routers
from prescope.scheduler.costs import LayerCosts
from prescope.training import TrainConfig
from tests.support.models import EXPERTS, LAYERS, VOCABULARY, plain_tokens, prompt, tiny_moe
from tests.support.predictors import SHAPE

pytestmark = pytest.mark.filterwarnings("ignore:experts on the CPU run on torch")
FAST_LINK = {"device": "cpu", "link_gb_per_s": 50.0}
COSTS = LayerCosts(
    link_us=100.0, gpu_us=5.0, rest_us=200.0, cpu_us=(0.0, 50.0, 60.0, 70.0), source="made up for a test"
)
NEW = 5
PACKAGE = Path(prescope.__file__).parent
#: Functions of torch that make a tensor by its defaults, with what besides the device must be named.
MAKERS = {
    **{f"torch.{name}": () for name in ("arange", "as_tensor", "asarray", "randint", "randperm", "tensor")},
    **{
        f"torch.{name}": ("dtype",)
        for name in ("empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "zeros")
    },
}


@pytest.fixture(params=["device", "dtype"])
def other_default(request):
    """Begins what a user may have begun: "meta", where no value can be read, stands for a GPU."""
    former = torch.get_default_dtype()

    def begin():
        if request.param == "device":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(torch.bfloat16)

    yield begin
    torch.set_default_device(None)
    torch.set_default_dtype(former)


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


SETTINGS = {
    "on demand": {},
    "on the CPU too": {"schedule": "fiddler", "cpu_threads": 1},
    "early router": {"schedule": "presched", "cpu_threads": 1, "predictor": "early"},
    "chance": {"schedule": "fate", "predictor": "chance"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_text_changes_and_the_model_comes_back(name, model, other_default):
    ids = prompt(batch=2)
    expected = plain_tokens(model, ids, NEW)
    predictors = {
        "early": EarlyRouter(
            SHAPE, Routers.of_weights(torch.stack([layer.mlp.gate.weight for layer in model.model.layers])), 2
        ),
        "chance": Chance(SHAPE, 2),
    }
    settings = dict(SETTINGS[name])
    if "predictor" in settings:
        settings["predictor"] = predictors[settings["predictor"]]
    other_default()
    with prescope.attach(
        model, slots=6, costs=COSTS, frequencies=np.ones((LAYERS, EXPERTS)), **settings, **FAST_LINK
    ) as engine:
        for form in (ids, ids.tolist(), {"input_ids": ids.numpy(), "attention_mask": [[1] * 9] * 2}):
            assert engine.generate(form, max_new_tokens=NEW).tokens == expected
        engine.configure(slots=9, cache="lfu")
        assert engine.generate(ids, max_new_tokens=NEW).tokens == expected
        engine.check_integrity()
        engine.recover()
        assert engine.generate(ids, max_new_tokens=NEW).tokens == expected
    torch.set_default_device(None)
    assert plain_tokens(model, ids, NEW) == expected


def test_a_predictor_is_trained_and_used(tmp_path, other_default):
    model = tiny_moe()
    prompts = np.random.default_rng(0).integers(1, VOCABULARY, (20, 24)).tolist()
    ids = prompt()
    expected = plain_tokens(model, ids, NEW)
    other_default()
    with prescope.attach(model, slots=24, costs=COSTS, **FAST_LINK) as engine:
        trained = prescope.train_predictor(
            engine, prompts, config=LlaporConfig(hidden=16, block=8), path=tmp_path / "llapor.safetensors",
            training=TrainConfig(epochs=1, batch_tokens=64), own_tokens=0,
        )  # fmt: skip
        engine.configure(schedule="presched", predictor=trained.predictor, slots=8)
        assert engine.generate(ids, max_new_tokens=NEW).tokens == expected


def test_a_folder_is_read_to_the_cpu(other_default):
    """transformers reads weights to the default device, where the experts of a large model have no room."""
    with prescope.load(embedded_model(), slots=0.5, **FAST_LINK) as engine:
        expected = engine.generate("The old man", max_new_tokens=NEW).tokens
    other_default()
    with prescope.load(embedded_model(), slots=0.5, **FAST_LINK) as engine:
        assert {parameter.device.type for parameter in engine.model.parameters()} == {"cpu"}
        assert engine.generate(["The old man"], max_new_tokens=NEW).tokens == expected


def made():
    """Calls of the package that make a tensor: where and what, the function, and the arguments that are named."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in MAKERS:
                where = f"{path.relative_to(PACKAGE)}:{node.lineno} {ast.unparse(node)}"
                yield where, ast.unparse(node.func), {keyword.arg for keyword in node.keywords}


def test_whoever_makes_a_tensor_names_its_device_and_where_its_values_do_not_say_it_its_dtype():
    lacks = [where for where, maker, named in made() if not {"device", *MAKERS[maker]} <= named]
    assert not lacks, "what is not named there is a default that a user may have set"
