"""How many slots a setting means: a count, a share of all experts, or the memory they may take."""

import re

from ..core.numbers import plain
from ..core.units import format_bytes, parse_bytes
from ..errors import SlotPoolTooSmall, UnsupportedOption

_PER_CENT = re.compile(r"\s*([0-9]{1,3}(?:\.[0-9]{1,9})?)\s*%\s*")


def _plain(slots: int | float | str) -> int | float | str:
    """A text such as "25%" as the share it is, numpy's numbers as Python's; everything else as it is."""
    found: int | float | str = plain(slots)
    match = _PER_CENT.fullmatch(found) if isinstance(found, str) else None
    return found if match is None else float(match[1]) / 100


def require_slots_setting(slots: int | float | str) -> None:
    """Raises UnsupportedOption unless it is a count, a share in (0, 1], or a text such as "25%" or "8GiB"."""
    slots = _plain(slots)
    if isinstance(slots, bool) or not isinstance(slots, int | float | str):
        raise UnsupportedOption(f"slots is {slots!r}; give a count, a share such as 0.25 or '25%', or '8GiB'")
    if isinstance(slots, str):
        try:
            parse_bytes(slots)
        except ValueError as error:
            raise UnsupportedOption(f"slots: {error}") from error
    if isinstance(slots, float) and not 0 < slots <= 1:
        raise UnsupportedOption(
            f"slots is {slots}; a float is a share of all experts and lies in (0, 1]; "
            f"for a count write an int"
        )
    if isinstance(slots, int) and slots < 1:
        raise UnsupportedOption(f"slots is {slots}; a count is at least 1")


def resolve_slots(
    slots: int | float | str, *, total_experts: int, row_bytes: int, top_k: int
) -> tuple[int, str]:
    """Number of slots a setting means for a model, and the reason as one sentence.

    A setting above the number of experts gives one slot to each: more could never be used.

    Raises:
        UnsupportedOption: it is no such setting. SlotPoolTooSmall: fewer than top_k.
    """
    require_slots_setting(slots)
    slots = _plain(slots)
    if isinstance(slots, str):
        count = parse_bytes(slots) // row_bytes
        meaning = f"{slots} / {format_bytes(row_bytes)} per expert"
    elif isinstance(slots, float):
        count = round(slots * total_experts)
        meaning = f"{slots:.4g} of {total_experts} experts"
    else:
        count, meaning = slots, "as given"
    if count < top_k:
        raise SlotPoolTooSmall(
            f"slots={slots!r} gives {count} slots ({format_bytes(count * row_bytes)}), but one token of one layer "
            f"needs top-k = {top_k} experts at once; use slots={top_k} ({format_bytes(top_k * row_bytes)}) or more"
        )
    if count > total_experts:
        return total_experts, f"{meaning}, cut to one slot for each of the {total_experts} experts"
    return count, meaning
