"""Where files lie: those that a user names, and those that come with prescope, beside the package in a checkout or
inside it in a wheel.

Knows paths only; reads no model.
"""

import os
from pathlib import Path

from prescope.errors import BadModelFolder

#: What the embedded model is called.
EMBEDDED_MODEL = "tiny-moe"
_PACKAGE = Path(__file__).resolve().parent.parent


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user names it: `~` is the home folder, as in a shell. Every file that a caller names goes through
    here, often twice, so what comes back does not change again: a folder that is really called `~` (`./~`) comes back
    as an absolute path.
    """
    found = Path(os.path.expanduser(path))
    return found.absolute() if str(found).startswith("~") else found


def data_dir() -> Path:
    """Folder `data/` of the checkout (also of an editable install), else `prescope/_data/` of the wheel."""
    checkout = _PACKAGE.parent
    # pyproject.toml tells a checkout from site-packages, where another project may have put a `data/`.
    return checkout / "data" if (checkout / "pyproject.toml").is_file() else _PACKAGE / "_data"


def embedded_model() -> Path:
    """Folder of the small MoE model that comes with prescope, for `prescope.load`.

    Raises:
        BadModelFolder: this installation does not have it.
    """
    folder = data_dir() / EMBEDDED_MODEL
    if not (folder / "config.json").is_file():
        raise BadModelFolder(
            f"the embedded model is not at {folder} (no config.json); work in a checkout of the repository "
            f"(pip install -e .), install a wheel built from one, or pass the folder of any MoE model"
        )
    return folder


def embedded_prompts() -> Path:
    """File of the prompts that come with prescope, one JSON object a line: id, domain, turns, licence.

    Raises:
        BadModelFolder: this installation does not have it.
    """
    path = data_dir() / "prompts" / "own_prompts.jsonl"
    if not path.is_file():
        raise BadModelFolder(f"the embedded prompts are not at {path}; work in a checkout, or pass your own")
    return path


def shipped_profiles() -> Path:
    """Folder of the hardware profiles that come with prescope; a wheel that somebody else built may lack it."""
    return data_dir() / "profiles"


def cache_dir() -> Path:
    """Folder for what is measured or built once per machine: $XDG_CACHE_HOME/prescope, else ~/.cache/prescope."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prescope"
