"""One prompt in every form goes on as one text; what has no form is refused by its place, and the engine works on."""

import copy
import json
from collections import UserDict

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

import prescope
from prescope.core.paths import embedded_model
from prescope.errors import UnsupportedOption
from recipes._folder import CHAT_TEMPLATE
from tests.support.models import VOCABULARY, prompt, tiny_moe

FAST_LINK = {"device": "cpu", "link_gb_per_s": 50.0}
NEW = 6
TEXTS = ["The", "The old man looked at the sea"]
CHAT = [{"role": "user", "content": "Who looked at the sea?"}]
OTHER_CHAT = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is blue?"},
    {"role": "assistant", "content": "The sky"},
    {"role": "user", "content": "And green?"},
]


@pytest.fixture(scope="module")
def model():
    return tiny_moe(pad_token_id=0)


@pytest.fixture(scope="module")
def engine(model):
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        yield engine


@pytest.fixture(scope="module")
def story():
    """The embedded model, plain."""
    return AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32).eval()


def tokenizer_of(side: str = "left"):
    return AutoTokenizer.from_pretrained(embedded_model(), padding_side=side)


def continued(model, new=NEW, **inputs):
    """What the plain model's `generate` appends."""
    echoed = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    out = model.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    return out[:, echoed:].tolist()


# -- token ids ---------------------------------------------------------------------------------------------------------


SINGLE = {
    "flat list": lambda ids: ids[0].tolist(),
    "flat tuple": lambda ids: tuple(ids[0].tolist()),
    "list of numpy integers": lambda ids: list(ids[0].numpy()),
    "range-like": lambda ids: (token for token in ids[0].tolist()),
    "tensor (T,)": lambda ids: ids[0],
    "tensor (T,) of int32": lambda ids: ids[0].int(),
    "array (T,)": lambda ids: ids[0].numpy(),
    "list in a list": lambda ids: ids.tolist(),
    "tensor (1, T)": lambda ids: ids,
    "array (1, T)": lambda ids: ids.numpy(),
    "array of uint16": lambda ids: ids.numpy().astype("uint16"),
    "array of uint64": lambda ids: ids.numpy().astype("uint64"),
    "array that could be masked": lambda ids: np.ma.array(ids.numpy()),
    "ragged tensor": lambda ids: torch.nested.nested_tensor([ids[0]], layout=torch.jagged),
    "dict of lists": lambda ids: {"input_ids": ids.tolist()},
    "dict of a flat list": lambda ids: {"input_ids": ids[0].tolist(), "attention_mask": [1] * ids.shape[1]},
    "dict of tensors": lambda ids: {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    "BatchEncoding": lambda ids: BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
    "with token types": lambda ids: {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)},
    "UserDict": lambda ids: UserDict(input_ids=ids),
    "with what a tokenizer tells of its work": lambda ids: {
        "input_ids": ids, "special_tokens_mask": torch.zeros_like(ids), "length": torch.tensor([9]),
        "offset_mapping": torch.zeros(1, 9, 2), "overflow_to_sample_mapping": torch.tensor([0]),
    },
    "with positions as a list": lambda ids: {"input_ids": ids[0].tolist(), "position_ids": list(range(9))},
    "with positions as an array": lambda ids: {"input_ids": ids.numpy(), "position_ids": np.arange(9)[None]},
}  # fmt: skip
SEVERAL = {
    "lists": lambda ids: ids.tolist(),
    "tuples": lambda ids: tuple(map(tuple, ids.tolist())),
    "list of tensors": lambda ids: list(ids),
    "list of arrays": lambda ids: list(ids.numpy()),
    "list of tensors (1, T)": lambda ids: list(ids.split(1)),
    "list of arrays (1, T)": lambda ids: list(ids.numpy()[:, None]),
    "array of objects": lambda ids: np.array([*map(list, ids.tolist()), [1]], dtype=object)[:-1],
    "tensor (B, T)": lambda ids: ids,
    "array (B, T)": lambda ids: ids.numpy(),
    "array that may not be written": lambda ids: np.broadcast_to(ids.numpy(), tuple(ids.shape)),
    "ragged tensor": lambda ids: torch.nested.nested_tensor(list(ids), layout=torch.jagged),
    "values of a dict": lambda ids: dict(enumerate(ids.tolist())).values(),
    "list of BatchEncodings": lambda ids: [BatchEncoding({"input_ids": row[None]}) for row in ids],
    "list of dicts, one of them padded": lambda ids: [
        {"input_ids": [0, *row, 0], "attention_mask": [0] + [1] * 9 + [0]} if i == 1 else {"input_ids": row}
        for i, row in enumerate(ids.tolist())
    ],
}  # fmt: skip


@pytest.mark.parametrize("form", SINGLE)
def test_one_prompt_of_ids(engine, model, form):
    ids = prompt().clamp(min=1)
    expected = continued(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert engine.generate(SINGLE[form](ids), max_new_tokens=NEW).tokens == expected


@pytest.mark.parametrize("form", SEVERAL)
def test_several_prompts_of_ids(engine, model, form):
    ids = prompt(batch=3).clamp(min=1)
    expected = continued(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert engine.generate(SEVERAL[form](ids), max_new_tokens=NEW).tokens == expected


@pytest.mark.parametrize("name", ["prompts", "input_ids", "inputs"])
def test_prompts_have_transformers_names_too(engine, name):
    ids = prompt()
    assert (
        engine.generate(**{name: ids}, max_new_tokens=3).tokens
        == engine.generate(ids, max_new_tokens=3).tokens
    )
    with pytest.raises(UnsupportedOption, match="twice"):
        engine.generate(ids, max_new_tokens=3, **{"inputs" if name == "prompts" else name: ids})


@pytest.mark.parametrize("lengths", [(3, 9), (9, 3, 5), (1, 9)])
def test_shorter_prompts_are_padded_on_the_left_and_go_on_as_alone(engine, model, lengths):
    rows = [prompt(length=length, seed=i)[0].tolist() for i, length in enumerate(lengths)]
    alone = [
        continued(model, input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row)))[0]
        for row in rows
    ]
    encoded = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    for given in (rows, [torch.tensor(row) for row in rows], encoded):
        run = engine.generate(given, max_new_tokens=NEW)
        assert run.tokens == alone
    position = run.trace.position[run.trace.step == 0].reshape(len(rows), -1)
    for i, length in enumerate(lengths):
        assert position[i].tolist() == [-1] * (max(lengths) - length) + [*range(length)]


# -- masks -------------------------------------------------------------------------------------------------------------

MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1, 1, 1, 1, 1, 1, 1, 0, 0], [1] * 9],
    "a hole": [[0, 1, 1, 0, 0, 1, 1, 1, 1], [1] * 9],
    "nothing": [[1] * 9, [1] * 9],
    "both": [[0] * 8 + [1], [0, 0] + [1] * 7],
}


@pytest.mark.parametrize("form", [torch.tensor, list, np.array, lambda mask: torch.tensor(mask).bool()])
@pytest.mark.parametrize("where", MASKS)
def test_a_mask_beside_the_ids_is_heeded(engine, model, where, form):
    ids, mask = prompt(batch=2).clamp(min=1), MASKS[where]
    expected = continued(model, input_ids=ids, attention_mask=torch.tensor(mask))
    for prompts, beside in [(ids, form(mask)), ({"input_ids": ids, "attention_mask": form(mask)}, None)]:
        run = engine.generate(prompts, attention_mask=beside, max_new_tokens=NEW)
        assert run.tokens == expected
    real = np.array(mask)
    assert run.trace.position[:18].tolist() == np.where(real, real.cumsum(1) - 1, -1).ravel().tolist()
    assert run.trace.position[18:20].tolist() == real.sum(1).tolist()


@pytest.mark.parametrize("eos", [None, 0, 5])
@pytest.mark.parametrize("pads", [((0, 4),), ((0, 0), (1, 3)), ((0, 4), (1, 2)), ()])
def test_a_padded_tensor_without_a_mask_is_what_generate_takes_it_for(pads, eos):
    """It infers a mask from the pad token, unless that is the end token too."""
    model, ids = tiny_moe(pad_token_id=0), prompt(batch=2).clamp(min=1)
    model.generation_config.eos_token_id = eos
    for row, count in pads:
        ids[row, :count] = 0
    expected = continued(model, input_ids=ids)
    with prescope.attach(model, slots=6, **FAST_LINK) as engine:
        for given in (ids, {"input_ids": ids}):
            assert engine.generate(given, max_new_tokens=NEW, min_new_tokens=NEW).tokens == expected


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("is_padded", [False, True])
def test_embeddings_take_the_place_of_ids_or_stand_beside_them(engine, model, batch, is_padded):
    ids, mask = prompt(batch=batch), torch.ones(batch, 9, dtype=torch.long)
    mask[0, : 3 * is_padded] = 0
    embeds = model.get_input_embeddings()(ids).detach()
    expected = continued(model, inputs_embeds=embeds, attention_mask=mask)
    assert expected == continued(model, input_ids=ids, attention_mask=mask)
    call = {"inputs_embeds": embeds, "attention_mask": mask, "max_new_tokens": NEW}
    assert engine.generate(**call).tokens == expected
    assert engine.generate(ids, **call).tokens == expected
    run = engine.generate({"inputs_embeds": embeds, "attention_mask": mask}, max_new_tokens=NEW)
    assert run.tokens == expected
    assert run.trace.position[:9].tolist() == ([-1, -1, -1, *range(6)] if is_padded else [*range(9)])


# -- text and chats ----------------------------------------------------------------------------------------------------


def expected_of_texts(story, texts):
    return continued(story, **tokenizer_of()(texts, return_tensors="pt", padding=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_text_is_padded_on_the_left_whatever_the_tokenizer_would_do(story, side):
    expected, tokenizer = expected_of_texts(story, TEXTS), tokenizer_of(side)
    before = copy.deepcopy(tokenizer.__dict__["_pad_token_type_id"]), tokenizer.padding_side
    left = tokenizer_of()(TEXTS, return_tensors="pt", padding=True)
    with prescope.attach(story, tokenizer=tokenizer, slots=0.5, **FAST_LINK) as engine:
        forms = {
            "list": TEXTS, "tuple": tuple(TEXTS), "array": np.array(TEXTS), "series": pd.Series(TEXTS),
            "encoding": left, "encoding of lists": tokenizer(TEXTS), "unpacked": dict(left),
            "one encoding a text": [tokenizer(text) for text in TEXTS],
            "of the library below": tokenizer.backend_tokenizer.encode_batch(TEXTS),
        }  # fmt: skip
        for form, given in forms.items():
            assert engine.generate(given, max_new_tokens=NEW, min_new_tokens=NEW).tokens == expected, form
        one = engine.generate(TEXTS[1], max_new_tokens=NEW, min_new_tokens=NEW)
        below = engine.generate(tokenizer(TEXTS[1]).encodings[0], max_new_tokens=NEW, min_new_tokens=NEW)
        assert below.tokens == one.tokens
    assert (one.tokens, one.text) == (expected[1:], [tokenizer.decode(expected[1], skip_special_tokens=True)])
    assert (before[0], side) == (tokenizer.__dict__["_pad_token_type_id"], tokenizer.padding_side)


def test_a_tokenizer_without_a_pad_token_pads_too(story):
    expected, tokenizer = expected_of_texts(story, TEXTS), tokenizer_of()
    tokenizer.pad_token = None
    with prescope.attach(story, tokenizer=tokenizer, slots=0.5, **FAST_LINK) as engine:
        assert engine.generate(TEXTS, max_new_tokens=NEW, min_new_tokens=NEW).tokens == expected
    assert tokenizer.pad_token is None


def chat_ids(chat):
    """As transformers 5 itself gives them; an answer that stands there already is gone on with."""
    is_begun = chat[-1]["role"] == "assistant"
    return tokenizer_of().apply_chat_template(
        chat, add_generation_prompt=not is_begun, continue_final_message=is_begun, return_tensors="pt"
    )


def test_chats_go_by_the_tokenizers_template(story):
    chats = [CHAT, OTHER_CHAT, OTHER_CHAT[:3]]
    expected = [continued(story, **chat_ids(chat))[0] for chat in chats]
    with prescope.attach(story, tokenizer=tokenizer_of(), slots=0.5, **FAST_LINK) as engine:
        for chat, tokens in zip(chats, expected, strict=True):
            for form in (chat, [chat], tuple(map(UserDict, chat)), chat_ids(chat)):
                assert engine.generate(form, max_new_tokens=NEW, min_new_tokens=NEW).tokens == [tokens]
        assert engine.generate(chats, max_new_tokens=NEW, min_new_tokens=NEW).tokens == expected


def test_the_recipe_writes_the_template_that_the_embedded_model_has():
    assert (embedded_model() / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE
    config = json.loads((embedded_model() / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "chat_template" not in config, "one template, in the file transformers 5 writes"


# -- what is refused ---------------------------------------------------------------------------------------------------

IDS = [[5, 6], [7, 8]]
REFUSED = {
    "nothing": ({}, "no prompt"),
    "an empty list": ({"prompts": []}, "no prompt"),
    "an empty tensor": ({"prompts": torch.zeros(1, 0, dtype=torch.long)}, "prompt 0 is empty"),
    "an empty prompt": ({"prompts": [[1, 2], [], [3]]}, "prompt 1 is empty"),
    "an empty array among others": ({"prompts": [np.array([1]), np.array([], dtype=int)]}, "prompt 1 is empty"),
    "a mask without ones": ({"prompts": IDS, "attention_mask": [[1, 1], [0, 0]]}, "prompt 1 is empty"),
    "a mask of another shape": ({"prompts": IDS, "attention_mask": [[1, 1, 1]]}, r"\(1, 3\).*\(2, 2\)"),
    "a mask of words": ({"prompts": IDS, "attention_mask": "yes"}, "attention_mask"),
    "a ragged mask": ({"prompts": IDS, "attention_mask": [[1, 1, 1], [1, 1]]}, "attention_mask"),
    "two masks": ({"prompts": {"input_ids": [5], "attention_mask": [1]}, "attention_mask": [1]}, "twice"),
    "floats": ({"prompts": torch.rand(1, 4)}, "integers"),
    "embeddings as ids": ({"prompts": torch.rand(1, 4, 32)}, "inputs_embeds"),
    "truth values": ({"prompts": torch.ones(1, 4).bool()}, "integers"),
    "three dimensions": ({"prompts": torch.ones(1, 2, 4).long()}, r"\(1, 2, 4\)"),
    "a float in a list": ({"prompts": [5, 6.5]}, "a float at 1"),
    "a text among ids": ({"prompts": [[5, 6], "seven"]}, "prompt 1 is of type str"),
    "ids among texts": ({"prompts": ["five", [5, 6]]}, "texts has a list at 1"),
    "None among texts": ({"prompts": ["five", "six", None]}, "texts has a NoneType at 2"),
    "NaN among texts of a column": ({"prompts": pd.Series(["five", np.nan])}, "texts has a float at 1"),
    "a chat among texts": ({"prompts": ("five", CHAT)}, "texts has a list at 1"),
    "a text among messages": ({"prompts": [*CHAT, "five"]}, "messages has a str at 1"),
    "a masked array": ({"prompts": np.ma.array([5, 6, 7], mask=[0, 1, 0])}, "attention_mask="),
    "an id beyond 63 bits": ({"prompts": np.array([5, 2**63 + 5], dtype=np.uint64)}, str(2**63 + 5)),
    "an end that is a word": ({"prompts": [5], "eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    "ends in a set": ({"prompts": [5], "eos_token_id": {5, 6}}, "eos_token_id is {5, 6}"),
    "a message among ids": ({"prompts": [[5, 6], CHAT[0]]}, "prompt 1 is of type dict"),
    "None among prompts": ({"prompts": [[5, 6], None]}, "prompt 1 is of type NoneType"),
    "bytes": ({"prompts": b"text"}, "bytes"),
    "a set": ({"prompts": {5, 6}}, "set"),
    "a number": ({"prompts": 5}, "int"),
    "a dict without ids": ({"prompts": {"text": "Hello"}}, "lacks 'input_ids'"),
    "a message alone": ({"prompts": CHAT[0]}, "chat"),
    "an id too large": ({"prompts": [[5, 6], [7, VOCABULARY]]}, f"prompt 1 has the token id {VOCABULARY}"),
    "a negative id": ({"prompts": torch.tensor([[5, -1]])}, "prompt 0 has the token id -1"),
    "text without a tokenizer": ({"prompts": "Hello"}, "no tokenizer"),
    "a chat without a tokenizer": ({"prompts": CHAT}, "no tokenizer"),
    "embeddings of another batch": ({"prompts": IDS, "inputs_embeds": torch.rand(3, 2, 32)}, "2 prompts"),
    "a mask of other numbers": ({"prompts": IDS, "attention_mask": [[1, 2], [1, 1]]}, "zeros and ones"),
    "a mask of shares": ({"prompts": IDS, "attention_mask": torch.full((2, 2), 0.5)}, "zeros and ones"),
    "ids without values": ({"prompts": torch.ones(1, 4, dtype=torch.long, device="meta")}, "meta"),
    "sparse ids": ({"prompts": torch.ones(1, 4).long().to_sparse()}, "layout"),
    "prompts of several rows each": ({"prompts": [torch.ones(2, 4).long()]}, "prompt 0 is of type Tensor"),
    "an empty row of a tokenizer": ({"prompts": [torch.zeros(1, 0).long()]}, "prompt 0 is empty"),
    "embeddings of another width": ({"inputs_embeds": torch.rand(1, 4, 7)}, "7 wide"),
    "a frame": ({"prompts": pd.DataFrame({"text": ["The"]})}, "DataFrame"),
    "dates": ({"prompts": np.array(["2026-01-01"], dtype="datetime64[D]")}, "datetime64"),
    "several texts' output among others": ({"prompts": [{"input_ids": IDS}, {"input_ids": [5]}]}, "for 2 texts"),
    "pictures beside one prompt of several": ({"prompts": [{"input_ids": [5], "pixels": [1]}]}, "'pixels'"),
    "a mask of another length": ({"prompts": [{"input_ids": [5], "attention_mask": [1, 1]}]}, "2 values"),
    "embeddings of two dimensions": ({"inputs_embeds": torch.rand(3, 32)}, r"\(B, T, D\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_form_is_refused_and_the_engine_works_on(engine, case):
    call, words = REFUSED[case]
    with pytest.raises(UnsupportedOption, match=words):
        engine.generate(**call, max_new_tokens=2)
    assert len(engine.generate([5, 6], max_new_tokens=2).tokens[0]) == 2


def test_texts_and_chats_that_cannot_be_are_refused(story):
    tokenizer = tokenizer_of()
    with prescope.attach(story, tokenizer=tokenizer, slots=0.5, **FAST_LINK) as engine:
        for call, words in [
            ({"prompts": ["The", ""]}, "prompt 1 is empty"),
            ({"prompts": ""}, "prompt 0 is empty"),
            ({"prompts": ["The", "Th\ud800e"]}, r"prompt 1 has '\\ud800' at 2"),
            ({"prompts": [{"role": "user", "content": "\udc00"}]}, "a message has"),
            ({"prompts": TEXTS, "attention_mask": [[1], [1]]}, "leave attention_mask out"),
            ({"prompts": [{"content": "Hello"}]}, 'lacks "role" or "content"'),
            ({"prompts": [{"role": "user"}]}, 'lacks "role" or "content"'),
        ]:
            with pytest.raises(UnsupportedOption, match=words):
                engine.generate(**call, max_new_tokens=2)
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(UnsupportedOption, match="roles must alternate"):
            engine.generate(CHAT, max_new_tokens=2)
        tokenizer.chat_template = None
        with pytest.raises(UnsupportedOption, match="no chat template"):
            engine.generate(CHAT, max_new_tokens=2)
        assert len(engine.generate("The", max_new_tokens=2).tokens[0]) == 2
