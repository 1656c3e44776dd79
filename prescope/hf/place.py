"""Whether a name is a folder or a hub id, said before anything is read, and whether the hub can be asked for it."""

import os
import warnings
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from re import fullmatch

from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..errors import BadModelFolder
from .arguments import Source
from .folder import Contents, check_folder

_HUB_ID = r"[\w-][\w.-]*/[\w.-]+"
_CONFIG = "config.json"


def check_place(name: str | Path, source: Source) -> tuple[Contents | None, Source]:
    """Look at a folder's contents, or ask the hub once whether it answers.

    Args:
        name: as `load_model` takes it.

    Returns:
        The contents, None for a hub id. And the source: with `local_files_only` where the hub does not answer and its
        cache has the model.

    Raises:
        BadModelFolder: neither there nor to be had, or a folder that is no model's.
    """
    folder = Path(name)
    try:
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError) as error:
        raise BadModelFolder(f"{name} is no name of a folder: {error}") from error
    if is_folder:
        contents = check_folder(
            folder / source.subfolder,
            use_safetensors=source.use_safetensors,
            variant=source.weights.get("variant"),
        )
        return contents, source
    if exists:
        raise BadModelFolder(
            f"{name} is a file; a model is the folder that `save_pretrained` wrote, with {_CONFIG}"
        )
    if isinstance(name, Path) or not fullmatch(_HUB_ID, name):
        raise BadModelFolder(
            f"there is no folder {name}{_near(folder)}; a model is the folder that `save_pretrained` wrote, with "
            f"{_CONFIG}, or a hub id of the form 'owner/name'"
        )
    is_cached = _is_cached(name, source)
    if folder.parent.is_dir() and not is_cached:
        raise BadModelFolder(
            f"there is no folder {name}{_near(folder)}; a model is the folder that `save_pretrained` wrote, with "
            f"{_CONFIG}. If {name} is a hub id, run `hf download {name}` first: a folder named {folder.parent} is "
            f"here, so the name is taken for a path, unless the hub's cache has it"
        )
    return None, _reachable(name, source, is_cached)


def _near(folder: Path) -> str:
    """The folder that may be meant, in words."""
    try:
        beside = [path.name for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return ""
    near = get_close_matches(folder.name, beside, 1)
    return f" (did you mean {folder.parent / near[0]}?)" if near else ""


def _is_cached(name: str, source: Source) -> bool:
    """Whether the hub's cache has the configuration."""
    try:
        found = try_to_load_from_cache(
            name,
            os.path.join(source.subfolder, _CONFIG),
            cache_dir=source.hub.get("cache_dir"),
            revision=source.hub.get("revision"),
        )
    except HFValidationError as error:
        raise BadModelFolder(f"{name} is neither a folder nor a hub id: {error}") from error
    return isinstance(found, str)


def _reachable(name: str, source: Source, is_cached: bool) -> Source:
    """The source by which `name` can be read now.

    Transformers asks an unreachable hub six times for every file that its cache lacks, which takes half a minute each.
    So it is asked once here.
    """
    if is_offline_mode() or source.hub.get("local_files_only"):
        unreachable = "the hub is not asked (HF_HUB_OFFLINE or local_files_only is set)"
    else:
        unreachable = _asked_once(name, source)
        if unreachable and is_cached:
            warnings.warn(
                f"{unreachable}; {name} is read from its cache as it was fetched before", stacklevel=6
            )
            return replace(source, hub={**source.hub, "local_files_only": True})
    if unreachable and not is_cached:
        raise BadModelFolder(
            f"there is no folder {name}, the hub's cache does not have it, and {unreachable}; give the folder that "
            f"`save_pretrained` wrote, with {_CONFIG}, or run `hf download {name}` where there is a network"
        )
    return source


def _asked_once(name: str, source: Source) -> str:
    """Why the hub does not answer; empty if it does, whatever it says: transformers then says what is wrong."""
    url = hf_hub_url(name, _CONFIG, subfolder=source.subfolder or None, revision=source.hub.get("revision"))
    try:
        get_hf_file_metadata(url, token=source.hub.get("token"))
    except HfHubHTTPError:
        return ""
    except Exception as error:  # noqa: BLE001 - of no common kind, and whose depends on the hub library's version
        return (
            f"the Hugging Face hub cannot be asked ({type(error).__name__}: {' '.join(str(error).split())})"
        )
    return ""
