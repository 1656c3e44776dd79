"""Write a trained model as a Hugging Face folder, and prove that the folder gives the model back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

MIB = 2**20
#: A chat as plain text, in the words of the stories the models are trained on: they know no other marks.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- message['role'] | capitalize + ': ' + message['content'] | trim + '\\n\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'Assistant:' }}
{%- endif %}
"""


def write_folder(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    out: Path,
    *,
    end_token: str,
    pad_token: str,
    shards_mib: int,
) -> None:
    """Weights in shards of at most ``shards_mib`` MiB, both configs and the tokenizer with a chat template.

    A tensor larger than a shard gets a shard of its own.
    """
    out.mkdir(parents=True, exist_ok=True)
    ids = {"bos_token_id": model.config.bos_token_id, "eos_token_id": model.config.eos_token_id}
    model.generation_config = GenerationConfig(**ids, pad_token_id=model.config.pad_token_id)
    model.save_pretrained(out, max_shard_size=shards_mib * MIB)
    for shard in out.glob("*.safetensors"):
        shard.chmod(0o644)  # safetensors writes through a private temporary file
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end_token, eos_token=end_token, pad_token=pad_token,
        model_max_length=model.config.max_position_embeddings, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(out)
    # transformers 5 writes its internal class name here; this one every version since 4 can load, and it
    # keeps AutoTokenizer from taking the class of the model type, which would pre-tokenise differently.
    config_path = out / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8")) | {
        "tokenizer_class": "PreTrainedTokenizerFast"
    }
    config_path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@torch.no_grad()
def check_folder(model: PreTrainedModel, tokenizer: Tokenizer, out: Path, ids: torch.Tensor) -> float:
    """Load the folder and compare: largest logit difference to ``model`` on ``ids`` (B, T), 0.0 expected.

    Raises AssertionError if the folder's tokenizer gives other ids than the one trained with.
    """
    device = ids.device
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto", local_files_only=True).to(device)
    loaded.set_experts_implementation(model.config._experts_implementation)
    loaded.set_attn_implementation(model.config._attn_implementation)
    difference = (loaded(ids).logits.float() - model(ids).logits.float()).abs().max().item()
    text = tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)
    wanted = tokenizer.encode(text, add_special_tokens=False).ids
    found = AutoTokenizer.from_pretrained(out, local_files_only=True)(text, add_special_tokens=False)[
        "input_ids"
    ]
    assert found == wanted, f"the saved tokenizer gives {found[:8]}..., the one trained with {wanted[:8]}..."
    return difference
