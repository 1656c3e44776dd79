"""Nobody's code runs unasked: what comes with a checkpoint, what it names on a hub, what hides in a pickle."""

import json
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import prescope
from prescope.errors import BadModelFolder, UnsupportedExperts, UnsupportedOption
from tests.support.models import plain_tokens, prompt, tiny_moe

SETTINGS = {"slots": 6, "device": "cpu", "link_gb_per_s": 50.0}

CODE = """
from pathlib import Path
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

(Path({folder!r}) / "it_ran").touch()

class StrangeConfig(Qwen3MoeConfig):
    model_type = {model_type!r}

class StrangeForCausalLM(Qwen3MoeForCausalLM):
    config_class = StrangeConfig
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_moe().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def with_code(folder) -> Path:
    (folder / "strange.py").write_text(CODE.format(folder=str(folder), model_type="strange_moe"))
    edit(
        folder / "config.json",
        model_type="strange_moe",
        architectures=["StrangeForCausalLM"],
        auto_map={
            "AutoConfig": "strange.StrangeConfig",
            "AutoModelForCausalLM": "strange.StrangeForCausalLM",
        },
    )
    return folder


def test_code_of_a_checkpoint_is_refused_without_a_question(with_code, monkeypatch):
    """transformers asks on a terminal, and an answer of "y" runs it."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(BadModelFolder, match="trust_remote_code=True"):
        prescope.load(with_code, **SETTINGS)
    assert not (with_code / "it_ran").exists()


def test_code_of_a_checkpoint_runs_when_it_is_trusted(with_code, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Weights are stored by expert and stacked by a table of model types, which a made-up one is not in.
    (with_code / "strange.py").write_text(CODE.format(folder=str(with_code), model_type="qwen3_moe"))
    edit(with_code / "config.json", model_type="qwen3_moe")
    ids = prompt()
    with prescope.load(with_code, trust_remote_code=True, **SETTINGS) as engine:
        assert type(engine.model).__name__ == "StrangeForCausalLM"
        assert engine.generate(ids, max_new_tokens=6).tokens == plain_tokens(tiny_moe(), ids, 6)
    assert (with_code / "it_ran").exists()


def test_code_of_a_family_that_transformers_knows_is_left_alone(folder):
    """Its own class is used, and the file beside it is not read."""
    (folder / "strange.py").write_text(CODE.format(folder=str(folder), model_type="strange_moe"))
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "strange.StrangeForCausalLM"})
    with prescope.load(folder, **SETTINGS) as engine:
        assert type(engine.model) is Qwen3MoeForCausalLM
    assert not (folder / "it_ran").exists()


def test_code_of_a_tokenizer_is_refused(folder):
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["strange.StrangeTokenizer", None]}})
    )
    (folder / "strange.py").write_text(CODE.format(folder=str(folder), model_type="strange_moe"))
    with pytest.raises(BadModelFolder, match="tokenizer"):
        prescope.load(folder, **SETTINGS)
    assert not (folder / "it_ran").exists()


@pytest.mark.parametrize("asked", ["kernels-community/flash-attn2", "someone/kernel", "flash_attention_2"])
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_a_config_names_reaches_no_hub(folder, monkeypatch, asked, key):
    edit(folder / "config.json", **{key: asked})
    monkeypatch.setattr(
        "transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **k: pytest.fail("fetched")
    )
    with (
        pytest.warns(UserWarning, match="may be code from a hub"),
        prescope.load(folder, **SETTINGS) as engine,
    ):
        assert engine.model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize(
    "asked", [["someone/kernel"], {"": ["someone/kernel"]}, 7, {"": {"": "someone/kernel"}}]
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_what_names_no_implementation_is_dropped_or_refused(folder, asked, key):
    """Whatever stands in a config.json in a name's place: no other error, and no way to a hub."""
    edit(folder / "config.json", **{key: asked})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            engine = prescope.load(folder, **SETTINGS)
        except BadModelFolder:
            return
    with engine:
        assert engine.model.config._attn_implementation in ("sdpa", "eager")


def test_attention_that_the_caller_names_is_passed_on(folder):
    with prescope.load(folder, attn_implementation="eager", **SETTINGS) as engine:
        assert engine.model.config._attn_implementation == "eager"
    with pytest.raises(BadModelFolder, match="kernels"):
        prescope.load(folder, attn_implementation="kernels-community/flash-attn2", **SETTINGS)


def test_experts_that_a_config_names_are_not_fetched(folder):
    edit(folder / "config.json", experts_implementation="sonicmoe")
    with pytest.warns(UserWarning, match="sonicmoe"), prescope.load(folder, **SETTINGS) as engine:
        assert engine.generate(prompt(), max_new_tokens=2).tokens


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_a_pickle_beside_safetensors_is_not_read(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "it_ran")))
    with prescope.load(folder, **SETTINGS):
        pass
    assert not (folder / "it_ran").exists()


def test_a_folder_with_only_a_pickle_is_refused_unless_asked_for(folder):
    torch.save(tiny_moe().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadModelFolder, match="use_safetensors=False"):
        prescope.load(folder, **SETTINGS)
    ids = prompt()
    with prescope.load(folder, use_safetensors=False, **SETTINGS) as engine:
        assert engine.generate(ids, max_new_tokens=5).tokens == plain_tokens(tiny_moe(), ids, 5)


def test_even_a_pickle_that_is_asked_for_runs_no_code(folder):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(folder / "it_ran")))
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadModelFolder):
        prescope.load(folder, use_safetensors=False, **SETTINGS)
    assert not (folder / "it_ran").exists()


def test_an_adapter_is_not_taken_for_a_model(folder):
    """Its configuration names a base model on a hub, which transformers would fetch."""
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(BadModelFolder, match=r"adapter.*prescope\.attach"):
        prescope.load(folder, **SETTINGS)


def test_nothing_in_the_package_unpickles():
    """transformers' own reader of a pickle that was asked for is the only one, and it takes weights only."""
    imports = r"^\s*(import|from) (pickle|joblib|dill|marshal|shelve)\b(?! import UnpicklingError$)"
    calls = (
        r"torch\.load\(|np\.load\((?!.*allow_pickle=False)|allow_pickle=True|read_pickle|weights_only=False"
    )
    readers = re.compile(f"{imports}|{calls}", re.MULTILINE)
    assert readers.search("import pickle\n") and readers.search("from pickle import load\n")
    assert not readers.search("from pickle import UnpicklingError\n")  # an error that is caught
    assert readers.search("x = torch.load(path)")
    assert readers.search("np.load(path)") and not readers.search("np.load(path, allow_pickle=False)")
    package = Path(prescope.__file__).parent
    found = [path for path in package.rglob("*.py") if readers.search(path.read_text(encoding="utf-8"))]
    assert not found


@pytest.mark.parametrize("method", ["mxfp4", "fp8", "gptq", "awq", "bitsandbytes", "from_next_year"])
def test_packing_that_is_not_there_or_not_known_is_refused_in_one_line(folder, monkeypatch, method):
    more = {"load_in_4bit": True, "quant_type": "nf4"} if method == "bitsandbytes" else {"bits": 4}
    edit(folder / "config.json", quantization_config={"quant_method": method, **more})
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *a, **k: pytest.fail("read"))
    with pytest.raises((UnsupportedExperts, BadModelFolder)) as refused:
        prescope.load(folder, **SETTINGS)
    assert "quanti" in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


@pytest.mark.parametrize(
    "keywords, way",
    [
        ({"device_map": "auto"}, "device="),
        ({"max_memory": {0: "1GB"}}, "slots="),
        ({"load_in_4bit": True}, "quantization_config"),
        ({"use_kernels": True}, "kernels="),
        ({"gguf_file": "x"}, "attach"),
        ({"trust_remote_code": "yes"}, "True or False"),
        ({"slotz": 3}, "did you mean slots"),
        ({"revison": "main"}, "did you mean revision"),
        ({"dtype": "int8"}, "bfloat16"),
        ({"torch_dtype": torch.int8}, "bfloat16"),
        ({"device": "cuda:x"}, "'cuda:1'"),
        ({"device": torch.device("mps")}, "'cuda:1'"),
        ({"device": torch.device("cuda", 99), "link_gb_per_s": None}, "GPU"),
        ({"device": "cuda:99", "link_gb_per_s": None}, "GPU"),
    ],
)
def test_what_has_another_place_is_refused_with_that_place(folder, keywords, way):
    with pytest.raises(UnsupportedOption, match=way):
        prescope.load(folder, **SETTINGS | keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {"revision": "main"},
        {"local_files_only": True},
        {"token": None},
        {"torch_dtype": "bf16"},
        {"dtype": "torch.bfloat16"},
        {"dtype": "bf16", "torch_dtype": torch.float32},
        {"code_revision": "main"},
        {"code_revision": "main", "trust_remote_code": False},
    ],
)
def test_what_from_pretrained_takes_is_taken(folder, keywords, tmp_path):
    with prescope.load(folder, cache_dir=tmp_path / "hub", **SETTINGS, **keywords) as engine:
        wanted = "bfloat16" if any("dtype" in key for key in keywords) else "float32"
        assert engine.hardware()["dtype"] == wanted


def test_a_device_may_be_torchs_own(folder):
    with prescope.load(folder, **SETTINGS | {"device": torch.device("cpu")}) as engine:
        assert engine.config.device == "cpu"


def test_a_subfolder_is_the_models_folder(folder):
    with prescope.load(folder.parent, subfolder="model", **SETTINGS) as engine:
        ids = prompt()
        assert engine.generate(ids, max_new_tokens=4).tokens == plain_tokens(tiny_moe(), ids, 4)


def test_a_model_in_memory_is_sent_to_attach():
    with pytest.raises(UnsupportedOption, match="attach"):
        prescope.load(tiny_moe())


@pytest.mark.parametrize("name", [None, "tiny-moe"])
def test_the_embedded_model_needs_no_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with prescope.load(*([] if name is None else [name]), slots=8, device="cpu") as engine:
        assert engine.generate("The old man", max_new_tokens=3).text[0]


def test_a_folder_of_the_embedded_models_name_goes_first(tmp_path, monkeypatch):
    tiny_moe().save_pretrained(tmp_path / "tiny-moe")
    monkeypatch.chdir(tmp_path)
    with prescope.load("tiny-moe", **SETTINGS) as engine:
        assert isinstance(engine.model.config, Qwen3MoeConfig) and engine.tokenizer is None
