"""An interrupt at any line of attaching or detaching: the model is then as it was, at once or after the next call."""

import pytest
import torch

import prescope
from prescope.device.null import NullDevice
from prescope.hf.attach import Attachment
from prescope.hf.moe_layers import find_moe_layers
from tests.support.interrupted_lines import interrupted, is_interrupted
from tests.support.models import plain_tokens, prompt, tiny_moe


@pytest.fixture(scope="module")
def model():
    return tiny_moe()


@pytest.fixture(scope="module")
def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def require_as_it_was(model, weights) -> None:
    for module in model.modules():
        assert not {"_apply", "_prescope", "forward"} & module.__dict__.keys()
    assert all(type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    now = model.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in weights)
    model.load_state_dict(now)


def attached(model) -> Attachment:
    made = Attachment(model, find_moe_layers(model), NullDevice())
    made.attach(lambda *arguments: None)
    return made


EACH = pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 7])


@EACH
def test_interrupted_at_any_line_attaching_leaves_the_model_as_it_was(model, weights, stride):
    with interrupted(set()) as lines:
        whole = attached(model)
    whole.detach()
    raised = []
    for at in range(1, lines[0] - 10, stride):
        made = list[Attachment]()
        raised.append(is_interrupted({at}, lambda made=made: made.append(attached(model))))
        for whole in made:
            whole.detach()
        require_as_it_was(model, weights)
    assert sum(raised) > 0.95 * len(raised) > 10


def test_two_interrupts_leave_it_as_well(model, weights):
    """The second comes while the first is undone; nobody has the attachment yet, to call `detach` of."""
    for at in range(10, 120, 19):
        for after in range(1, 60, 9):
            assert is_interrupted({at, at + after}, lambda: attached(model))
            require_as_it_was(model, weights)


@EACH
def test_interrupted_at_any_line_detaching_is_ended_by_the_next_call(model, weights, stride):
    """Formerly the layers' numbers had shifted by then: a layer got another one's rows, or none."""
    whole = attached(model)
    with interrupted(set()) as lines:
        whole.detach()
    raised = []
    for at in range(1, lines[0] + 1, stride):
        whole = attached(model)
        raised.append(is_interrupted({at}, whole.detach))
        whole.detach()
        require_as_it_was(model, weights)
    assert (
        sum(raised) > 0.8 * len(raised) > 10
    )  # what the lines before have left to be collected has lines as well


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError, SystemExit])
@pytest.mark.parametrize("kind", ["attach", "close"])
def test_an_engine_interrupted_on_its_way_gives_the_model_back(model, weights, kind, error):
    """Not every line, since an engine takes longer to make; `close` goes on to the end and raises then. A handler of
    SIGALRM, as whoever limits the time of a cell has one, raises another error than Ctrl-C does.
    """
    settings = {"slots": 6, "device": "null"}
    with interrupted(set()) as lines:
        engine = prescope.attach(model, **settings)
    made = lines[0]
    with interrupted(set()) as lines:
        engine.close()
    raised = []
    for at in range(1, made - 10 if kind == "attach" else lines[0], 61 if kind == "attach" else 11):
        engines = list[prescope.Engine]()

        def open_one(engines=engines) -> None:
            engines.append(prescope.attach(model, **settings))

        if kind == "attach":
            raised.append(is_interrupted({at}, open_one, error))
        else:
            open_one()
            raised.append(is_interrupted({at}, engines[0].close, error))
        for engine in engines:
            engine.close()
        require_as_it_was(model, weights)
    assert sum(raised) > 0.8 * len(raised) > 5
    with prescope.attach(model, **settings) as engine:
        ids = prompt()
        assert engine.generate(ids, max_new_tokens=4).tokens == plain_tokens(tiny_moe(), ids, new=4)
