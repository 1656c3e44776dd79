"""Decode steps of fixed shapes where layers have a sliding window: every token leaves it when it should."""

import pytest
import torch

from prescope.engine.graph.step import GraphStep
from prescope.hf.static_cache import AllTokens
from tests.support import families

WINDOW, LENGTH, NEW = families.TINY["sliding_window"], 11, 14
FAMILIES = [
    "afmoe", "cohere2_moe", "exaone_moe", "gemma4", "gpt_oss", "granitemoe_swa", "mimo_v2_flash", "mixtral", "phimoe",
]  # fmt: skip


def by_steps(model, ids, mask):
    """Greedy tokens, each step behind the prompt by the inputs of the step before, as a captured one."""
    step = GraphStep(
        model,
        None,
        batch=len(ids),
        length=LENGTH + NEW,
        drivers=[],
        timed=False,
        keeps_inputs=False,
        compiled=False,
    )
    assert any(type(layer) is AllTokens for layer in step.cache.layers)

    def loop(model, input_ids, *, logits_processor, stopping_criteria, generation_config, **kwargs):
        outputs = model._prefill(input_ids, generation_config, kwargs)
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs)
        found = [input_ids, outputs.logits[:, -1].argmax(-1)[:, None]]
        step.load(model.prepare_inputs_for_generation(torch.cat(found, 1), next_sequence_length=1, **kwargs))
        for _ in range(NEW - 1):
            found.append(step._forward()[1][:, None])
        return torch.cat(found, 1)

    return generated(model, ids, mask, custom_generate=loop, past_key_values=step.cache)


def generated(model, ids, mask, **more):
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        **more,
    )
    return output[:, LENGTH:].tolist()


@torch.no_grad()
@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_window_that_slides(family, pads):
    if family not in families.FAMILIES:
        pytest.skip("this transformers does not have it")
    model = families.build(family).eval()
    assert LENGTH > WINDOW, "the prompt fills the window"
    ids = torch.randint(1, families.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if pads:
        mask[1, :4] = ids[1, :4] = 0
    assert by_steps(model, ids, mask) == generated(model, ids, mask)
