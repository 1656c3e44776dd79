"""Seeded damage to files: bits, lengths, keys, types, numbers, pipes and swapped files. Knows nothing of prescope."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

STRANGE: list[Any] = [
    None, True, -1, 0, 1, 3, 2**31, 2**63, 10**12, 1e308, -0.5, float("nan"), float("inf"), "", "x", "\ud800",
    "../../x", [], [1], [None], {}, {"a": 1}, [[1]],
]  # fmt: skip


def flip_bits(path: Path, dice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    # Half of the time near the start, where headers are.
    reach = len(content) if dice.random() < 0.5 else min(len(content), 2000)
    for _ in range(dice.choice([1, 1, 1, 8])):
        content[dice.randrange(reach)] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    return "bits flipped"


def truncate(path: Path, dice: random.Random) -> str:
    content = path.read_bytes()
    path.write_bytes(content[: dice.randrange(len(content))])
    return "cut off"


def append(path: Path, dice: random.Random) -> str:
    path.write_bytes(path.read_bytes() + dice.randbytes(dice.randrange(1, 100)))
    return "bytes appended"


def overwrite(path: Path, dice: random.Random) -> str:
    content = bytearray(path.read_bytes())
    first = dice.randrange(len(content))
    content[first : first + 64] = dice.randbytes(min(64, len(content) - first))
    path.write_bytes(content)
    return "64 bytes overwritten"


def become_pipe(path: Path, dice: random.Random) -> str:
    path.unlink()
    os.mkfifo(path)
    return "a pipe"


def become_folder(path: Path, dice: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder"


def become_loop(path: Path, dice: random.Random) -> str:
    path.unlink()
    path.symlink_to(path)
    return "a link to itself"


def vanish(path: Path, dice: random.Random) -> str:
    path.unlink()
    return "missing"


def become_another(path: Path, dice: random.Random) -> str:
    others = [one for one in path.parent.iterdir() if one != path and one.is_file()]
    if not others:
        path.write_bytes(b"")
        return "empty"
    other = dice.choice(sorted(others))
    shutil.copy(other, path)
    return f"holds {other.name}"


def change_value(path: Path, dice: random.Random) -> str:
    """Another value, or none, somewhere in a JSON file or in the JSON header of a safetensors file."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        what = _change(header, dice)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
        return f"header: {what}"
    if path.suffix != ".json":
        return flip_bits(path, dice)
    value = json.loads(content)
    what = _change(value, dice)
    path.write_text(json.dumps(value))
    return what


def _change(value: Any, dice: random.Random) -> str:
    where = "top"
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = dice.choice(keys)
        where = f"{where}.{key}"
        inner = value[key]
        if isinstance(inner, str) and inner.startswith("{") and dice.random() < 0.9:
            # JSON in a text, as the metadata of safetensors files is.
            parsed = json.loads(inner)
            if parsed:
                what = _change(parsed, dice)
                value[key] = json.dumps(parsed)
                return f"{where} -> {what}"
        if not (isinstance(inner, dict | list) and inner and dice.random() < 0.7):
            break
        value = inner
    if dice.random() < 0.3:
        del value[key]
        return f"{where} deleted"
    value[key] = dice.choice(STRANGE)
    return f"{where} = {value[key]!r}"


DAMAGES: list[Callable[[Path, random.Random], str]] = [
    flip_bits, flip_bits, truncate, append, overwrite, become_pipe, become_folder, become_loop, vanish, become_another,
    change_value, change_value, change_value,
]  # fmt: skip


def damage(folder: Path, names: list[str], seed: int) -> str:
    """Damage one of these files of a folder; says which and how."""
    dice = random.Random(seed)
    name = dice.choice(names)
    how = dice.choice(DAMAGES)
    return f"seed {seed}: {name}: {how(folder / name, dice)}"
