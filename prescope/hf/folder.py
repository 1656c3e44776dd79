"""What is wrong with a model folder, said before anything is built on it: structure and sizes, no weight is read."""

import os
import re
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from safetensors import SafetensorError, safe_open

from ..core.files import read_object, require_file
from ..core.units import GIB, MIB
from ..errors import BadModelFolder

INDEX = "model.safetensors.index.json"
#: Names of files that may be read, by their ends; each is a regular file.
READ = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".tiktoken")
#: JSON files that hold an object, and how large they may be.
OBJECTS = {
    "config.json": 16 * MIB,
    "generation_config.json": MIB,
    "tokenizer_config.json": 64 * MIB,
    "special_tokens_map.json": 16 * MIB,
    "added_tokens.json": 64 * MIB,
}
MOST_TEXT, MOST_INDEX = GIB, 256 * MIB
#: More layers than any model has; each costs milliseconds to build even without weights.
MOST_LAYERS = 10_000
REMEDY = "fetch it again"


class Contents(NamedTuple):
    """What the weight files of a folder hold, by their headers."""

    tensors: int
    elements: int


def check_folder(folder: Path, *, use_safetensors: bool, variant: str | None) -> Contents | None:
    """Hold a folder against what a model's folder is; None where the weights are pickles that the user asked for.

    Raises:
        BadModelFolder: it cannot be loaded, with the file and the reason.
    """
    if not (folder / "config.json").exists():
        _refuse_without_config(folder)
    for path in _files(folder):
        most = MOST_TEXT if path.suffix not in (".safetensors", ".bin") else None
        require_file(path, BadModelFolder, OBJECTS.get(path.name, most))
    for name in OBJECTS:
        if (folder / name).exists():
            read_object(folder / name, BadModelFolder, REMEDY, OBJECTS[name])
    if not use_safetensors:
        return None
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        _refuse_without_safetensors(folder)
    _check_index(folder, {file.name for file in files}, variant)
    found = [_contents_of(file) for file in files]
    contents = Contents(sum(one.tensors for one in found), sum(one.elements for one in found))
    config = read_object(folder / "config.json", BadModelFolder, REMEDY, OBJECTS["config.json"])
    if "transformers_weights" not in config:  # which names a file by itself
        _require_names(folder, [file.name for file in files], variant)
    check_counts(config, str(folder / "config.json"), min(MOST_LAYERS, contents.tensors))
    return contents


def check_counts(config: dict[str, Any], where: str, most_layers: int = MOST_LAYERS) -> None:
    """Refuse a configuration with more layers than there can be: to build them would take hours.

    Raises:
        BadModelFolder: with the number.
    """
    for key, value in _items(config):
        if (
            ("layers" in str(key) or key == "depth")
            and isinstance(value, int | float)
            and value > most_layers
        ):
            raise BadModelFolder(
                f"{where} says {key} = {value}, and there are {most_layers:,} layers at most; {REMEDY}"
            )


def _items(config: dict[str, Any]) -> list[tuple[str, Any]]:
    own = list(config.items())
    return own + [item for _, value in own if isinstance(value, dict) for item in _items(value)]


def _files(folder: Path) -> list[Path]:
    """Whatever transformers may open of a folder."""
    try:
        paths = sorted(Path(entry.path) for entry in os.scandir(folder))
    except OSError as error:
        raise BadModelFolder(f"{folder} cannot be read: {error}") from error
    templates = folder / "additional_chat_templates"
    inner = sorted(templates.iterdir()) if templates.is_dir() else []
    return [path for path in [*paths, *inner] if path.name.endswith(READ)]


def _refuse_without_config(folder: Path) -> NoReturn:
    if (folder / "adapter_config.json").exists():
        raise BadModelFolder(
            f"{folder} holds an adapter, no model; load its base model with from_pretrained, merge the adapter into it "
            f"(peft's merge_and_unload), and pass the model to prescope.attach"
        )
    raise BadModelFolder(f"{folder} has no config.json; give the folder that `save_pretrained` wrote")


def _refuse_without_safetensors(folder: Path) -> NoReturn:
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles:
        raise BadModelFolder(
            f"{folder} has no *.safetensors but {pickles[0]}, a pickle, which can run code when it is read; convert "
            f"the checkpoint with `save_pretrained`, or pass use_safetensors=False if you know where it is from"
        )
    raise BadModelFolder(
        f"{folder} has no *.safetensors; convert the checkpoint with `save_pretrained` first"
    )


def _check_index(folder: Path, present: set[str], variant: str | None) -> None:
    path = folder / _index_of(variant)
    if not path.exists():
        return
    index = read_object(path, BadModelFolder, REMEDY, MOST_INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise BadModelFolder(
            f"{path} is not a safetensors index: its weight_map is no map to files; {REMEDY}"
        )
    absent = sorted(set(index.values()) - present)
    if absent:
        raise BadModelFolder(f"{folder} lacks {', '.join(absent)}, which its index names; fetch them again")


def _index_of(variant: str | None) -> str:
    return f"model.safetensors.index.{variant}.json" if variant else INDEX


def _require_names(folder: Path, present: list[str], variant: str | None) -> None:
    """Refuse weight files that are there and that transformers would not find."""
    whole, index = f"model{f'.{variant}' if variant else ''}.safetensors", _index_of(variant)
    if whole in present or (folder / index).exists():
        return
    more = f" and {len(present) - 1} more" if len(present) > 1 else ""
    if re.search(r"-\d+-of-\d+\.", present[0]):
        raise BadModelFolder(
            f"{folder} has {present[0]}{more} and no {index}, which says what is in which; fetch that too"
        )
    raise BadModelFolder(
        f"{folder} has {present[0]}{more}, and what is read is {whole}, or several files with {index}; fetch those, or "
        f"rename the file if it is a whole model in the layout of transformers"
    )


def _contents_of(file: Path) -> Contents:
    try:
        with safe_open(file, "pt") as handle:  # compares the header with the file's length
            shapes = [handle.get_slice(name).get_shape() for name in handle.keys()]  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise BadModelFolder(f"{file} is truncated or corrupt ({error}); {REMEDY}") from error
    return Contents(len(shapes), sum(map(prod, shapes)))
