"""Where profiles lie and how their JSON is read and written. Knows files, not what a profile means.

A measured profile is kept in the user's cache folder, one file per place; those that come with prescope are in
`data/profiles`.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from ..core.machine import Place
from ..core.paths import cache_dir, shipped_profiles
from ..errors import BadProfile

FORMAT = "prescope.profile"
VERSION = 1


def own_file(place: Place) -> Path:
    """Where the profile of a machine is kept once it is calibrated.

    A home folder may be shared by machines, so the name depends on all of the place.
    """
    digest = hashlib.blake2b(repr(tuple(place)).encode(), digest_size=4).hexdigest()
    return cache_dir() / f"profile_{_slug(place.device)}_{_slug(place.link)}_{digest}.json"


def shipped_files() -> list[Path]:
    """The profiles that come with prescope, by name."""
    return sorted(shipped_profiles().glob("*.json"))


def named_file(path: str | Path) -> Path:
    """A path, or the file of a profile that comes with prescope by its plain name.

    Raises:
        BadProfile: there is no such file.
    """
    given = Path(path)
    for candidate in (
        given,
        shipped_profiles() / f"{given.name}.json" if given.name == str(given) else given,
    ):
        if candidate.is_file():
            return candidate
    names = ", ".join(file.stem for file in shipped_files()) or "none"
    raise BadProfile(f"there is no profile at {path}; those that come with prescope: {names}")


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write by an atomic rename: a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        unfinished.write_text(as_text(contents))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def as_text(contents: dict[str, Any]) -> str:
    """JSON with one point a line, so that two measurements can be compared line by line."""
    rows = contents.get("points", [])
    text = json.dumps({**contents, "points": []}, indent=1, allow_nan=False)
    lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
    return text.replace('"points": []', f'"points": [\n{lines}\n ]' if lines else '"points": []') + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a profile's file, its format and version checked.

    Raises:
        BadProfile: it cannot be read, is cut off, is no profile, or is of a later version.
    """
    remedy = "delete it and run prescope.calibrate()"
    try:
        contents = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise BadProfile(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadProfile(f"{path} is no whole JSON file ({error}); {remedy}") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise BadProfile(f"{path} is no hardware profile: it does not say format = {FORMAT!r}")
    version = contents.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise BadProfile(
            f"{path} is of version {version!r}, this prescope reads 1 to {VERSION}; update it, or {remedy}"
        )
    return contents


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no time")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text.partition(" (")[0]).strip("-").lower()
