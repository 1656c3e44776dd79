"""A checkpoint's tokenizer, if it has one that can be used."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import BadModelFolder
from .arguments import Source
from .reading import file_of, reading

#: A folder or repository with one of these has a tokenizer.
TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "tiktoken.model",
)  # fmt: skip


def read_tokenizer(name: str | Path, source: Source) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None where there is none: then prompts are token ids, and `generate` says so when it gets text."""
    if not _has_tokenizer(name, source):
        return None
    with reading(
        f"the tokenizer of {name} cannot be used (fetch it again; without one, load the model with from_pretrained, "
        f"pass it to prescope.attach and give token ids)"
    ):
        tokenizer = AutoTokenizer.from_pretrained(name, **source.hub, **source.code)
        if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
            # transformers makes one without a vocabulary where tokenizer_config.json is all there is.
            raise BadModelFolder(f"the tokenizer of {name} has no vocabulary; fetch the folder again")
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _has_tokenizer(name: str | Path, source: Source) -> bool:
    if Path(name).is_dir():
        return any((Path(name) / source.subfolder / file).exists() for file in TOKENIZER_FILES)
    with reading(f"the tokenizer of {name} cannot be fetched"):
        return any(file_of(name, file, source) is not None for file in TOKENIZER_FILES)
