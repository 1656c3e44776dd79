"""Where profiles lie and how their JSON is read and written. Knows files, not what a profile means.

A measured profile is kept in the user's cache folder, one file per place; those that come with prescope are in
`data/profiles`.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..core.files import checksum, read_object, require_checksum, sorted_json, write_text
from ..core.machine import Place
from ..core.paths import cache_dir, shipped_profiles, user_path
from ..errors import BadProfile

FORMAT = "prescope.profile"
VERSION = 1
#: A profile has a few hundred points of a hundred bytes each.
MOST_BYTES = 16 << 20


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
    given = user_path(path)
    for candidate in (
        given,
        shipped_profiles() / f"{given.name}.json" if given.name == str(given) else given,
    ):
        if candidate.is_file():
            return candidate
    names = ", ".join(file.stem for file in shipped_files()) or "none"
    raise BadProfile(f"there is no profile at {path}; those that come with prescope: {names}")


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write values with a checksum of them, whole or not at all.

    Raises:
        CannotWrite: no space, or no permission.
    """
    written = checksum(sorted_json(contents))
    write_text(path, as_text({**contents, "checksum": written}))


def as_text(contents: dict[str, Any]) -> str:
    """JSON with one point a line, so that two measurements can be compared line by line."""
    rows = contents.get("points", [])
    text = json.dumps({**contents, "points": []}, indent=1, allow_nan=False)
    lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
    return text.replace('"points": []', f'"points": [\n{lines}\n ]' if lines else '"points": []') + "\n"


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a profile's file, its format and version checked.

    Raises:
        BadProfile: it cannot be read, is cut off, is no profile, of a later version, or not as it was written.
    """
    remedy = "delete it and run prescope.calibrate()"
    try:
        contents = read_object(path, BadProfile, remedy, MOST_BYTES)
    except FileNotFoundError as error:
        raise BadProfile(f"{path} cannot be read: {error}") from error
    if contents.get("format") != FORMAT:
        raise BadProfile(f"{path} is no hardware profile: it does not say format = {FORMAT!r}")
    version = contents.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise BadProfile(
            f"{path} is of version {version!r}, this prescope reads 1 to {VERSION}; update it, or {remedy}"
        )
    require_checksum(
        contents.get("checksum"),
        checksum(sorted_json(contents, without=["checksum"])),
        path,
        BadProfile,
        f'if you changed it on purpose, take out its line "checksum", else {remedy}',
    )
    return contents


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text.partition(" (")[0]).strip("-").lower()
