"""Prompts and decode steps from graphs, family by family: the plain model's tokens in float32."""

import pytest
import torch

import prescope
from prescope.errors import UnsupportedOption
from prescope.hf import static_cache
from tests.support import families
from tests.support.families_table import NOT_CAPTURED

pytest.importorskip("triton", reason="Triton exists for Linux only")
NEW = 4


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, family in families.FAMILIES.items() if family.generates])
def test_tokens_are_the_plain_models(name, gpu):
    if gpu["device"] == "cuda" and name in NOT_CAPTURED:
        pytest.skip(f"it {NOT_CAPTURED[name]} in each forward pass, which cannot be captured")
    model = families.build(name)
    try:
        static_cache(model, 20, 2)
    except UnsupportedOption as error:
        pytest.skip(f"its steps run layer by layer: {error}")
    # The second prompt of a length is from a graph; the third one is longer, and filled up less.
    prompts = [families.prompts(2, length, seed) for length, seed in ((7, 0), (9, 1), (13, 2))]
    expected = [families.greedy_ids(model, name, inputs, NEW).tolist() for inputs in prompts]
    with prescope.attach(model, slots=1.0, **gpu) as engine:
        for i, (inputs, tokens) in enumerate(zip(prompts, expected, strict=True)):
            torch.manual_seed(0)
            run = engine.generate(**inputs, max_new_tokens=NEW, pad_token_id=0)
            ends = [found == wanted[: len(found)] for found, wanted in zip(run.tokens, tokens, strict=True)]
            assert all(ends), (i, run.tokens, tokens)
            assert "layered" not in run.config["reasons"]["decode"], run.config["reasons"]["decode"]
            # Who cannot be asked for the last token's logits alone would make those of what was filled up as well.
            has_graph = i > 0 and model._supports_logits_to_keep()
            assert run.config["graphs"]["prompt"] == has_graph, run.notes
