"""Which settings may move, and how far. Pure but for Optuna's descriptions of a range."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from ..core.numbers import plain
from ..errors import UnsupportedOption
from .settings import Setting

#: A value of a setting that a study can hold.
Value = bool | int | float | str | None


def _decimal(number: int | float) -> Decimal:
    """As it was meant: 3 * 0.1 is 0.3."""
    return Decimal(number) if isinstance(number, int) else Decimal(f"{number:.12g}")


@dataclass(frozen=True)
class Range:
    """All values from `low` to `high`, both included; whole numbers if low, high and step are ints. Of a setting that
    is a share in [0, 1], such as the threshold, there are always fractions between them.

    Args:
        step: only low, low + step, ...; a grid needs one for fractions. `log`: small values as likely as large ones.

    Raises:
        UnsupportedOption: no value lies in it, or log goes with a step or a low that is not positive.
    """

    low: int | float
    high: int | float
    step: int | float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        for name in ("low", "high", "step"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        numbers = [n for n in (self.low, self.high, self.step) if n is not None]
        if any(
            isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers
        ):
            raise UnsupportedOption(f"{self} is no range: low, high and step are finite numbers")
        if self.low > self.high:
            raise UnsupportedOption(f"{self} holds nothing: low is above high")
        if self.step is not None and self.step <= 0:
            raise UnsupportedOption(f"{self}: a step is above 0")
        if self.log and (self.step is not None or self.low <= 0):
            raise UnsupportedOption(f"{self}: log needs low above 0, and no step")

    def in_numbers_of(self, setting: Setting) -> "Range":
        """The same with fractions in it where the setting is a share: Range(0, 1) has more than its two ends there."""
        if setting.kind != "share":
            return self
        return replace(self, low=float(self.low), high=float(self.high))

    @property
    def ends(self) -> tuple[int | float, int | float]:
        """Its lowest and its highest value, as they are drawn: fractions, unless all of it is whole."""
        return (self.low, self.last) if self.is_int else (float(self.low), float(self.last))

    @property
    def is_int(self) -> bool:
        return all(isinstance(n, int) for n in (self.low, self.high, self.step) if n is not None)

    @property
    def last(self) -> int | float:
        """The highest value that steps reach."""
        if self.step is None:
            return self.high
        low, step = _decimal(self.low), _decimal(self.step)
        last = low + (_decimal(self.high) - low) // step * step
        return int(last) if self.is_int else float(last)

    def distribution(self) -> BaseDistribution:
        """As Optuna says it."""
        if self.is_int:
            return IntDistribution(int(self.low), int(self.last), log=self.log, step=int(self.step or 1))
        if self.step is None:
            return FloatDistribution(float(self.low), float(self.high), log=self.log)
        return FloatDistribution(float(_decimal(self.low)), float(self.last), step=float(_decimal(self.step)))

    def values(self) -> list[Value] | None:
        """All of them; None where they cannot be counted."""
        if self.is_int:
            return list(range(int(self.low), int(self.high) + 1, int(self.step or 1)))
        if self.step is None:
            return [float(self.low)] if self.low == self.high else None
        low, step = _decimal(self.low), _decimal(self.step)
        count = int((_decimal(self.last) - low) / step) + 1
        return [float(low + i * step) for i in range(count)]


@dataclass(frozen=True, init=False)
class Choices:
    """One of these values: texts, numbers, True, False, or None for the setting's own default.

    Raises:
        UnsupportedOption: there is none, one twice, or one that cannot be written down.
    """

    options: tuple[Value, ...]

    def __init__(self, *values: Value) -> None:
        if len(values) == 1 and isinstance(values[0], list | tuple | set | dict):
            raise UnsupportedOption(f"Choices takes the values one by one: Choices(*{values[0]!r})")
        values = tuple(map(plain, values))
        if not values:
            raise UnsupportedOption("Choices() offers nothing; give one value or more")
        for value in values:
            if not (value is None or isinstance(value, bool | int | float | str)) or value != value:
                raise UnsupportedOption(f"{value!r} is no choice: texts, numbers, True, False and None are")
        if len(set(values)) < len(values):
            raise UnsupportedOption(f"Choices{values} names one twice (1, 1.0 and True are one value)")
        object.__setattr__(self, "options", values)

    def __repr__(self) -> str:
        return f"Choices({', '.join(map(repr, self.options))})"

    def distribution(self) -> BaseDistribution:
        """As Optuna says it."""
        return CategoricalDistribution(self.options)

    def values(self) -> list[Value]:
        """All of them."""
        return list(self.options)


class Space(Mapping[str, Range | Choices]):
    """Settings that may move, by name; from a mapping, from keywords, or both.

    Raises:
        UnsupportedOption: it is empty, or something is neither `Range` nor `Choices`.
    """

    def __init__(
        self, settings: Mapping[str, Range | Choices] | None = None, **more: Range | Choices
    ) -> None:
        self._settings: dict[str, Range | Choices] = {**(settings or {}), **more}
        if not self._settings:
            raise UnsupportedOption("the space is empty; name a setting: Space(slots=Range(0.1, 0.9))")
        for name, one in self._settings.items():
            if not isinstance(one, Range | Choices):
                raise UnsupportedOption(
                    f"{name} is {one!r}; say Range(low, high, step) or Choices(...), and what does not move in fixed"
                )

    def __getitem__(self, name: str) -> Range | Choices:
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def __repr__(self) -> str:
        return f"Space({', '.join(f'{name}={one}' for name, one in self.items())})"

    @cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """As Optuna says them."""
        return {name: one.distribution() for name, one in self.items()}

    @property
    def size(self) -> int | None:
        """Points of its grid; None where a range has no steps."""
        values = [one.values() for one in self.values()]
        return None if None in values else math.prod(len(each or ()) for each in values)

    def checked(self, known: Mapping[str, Setting], fixed: Mapping[str, Any]) -> "Space":
        """Check names and values against what a runner knows; the space in the numbers of its settings.

        Raises:
            UnsupportedOption: there is no such setting, a range reaches where it has no values, or one is fixed too.
        """
        for name in (*self, *fixed):
            if name not in known:
                listed = "; ".join(f"{one}: {setting.what}" for one, setting in known.items())
                raise UnsupportedOption(f"there is no setting {name!r} to move here. There are {listed}")
        if both := sorted(self.keys() & fixed.keys()):
            raise UnsupportedOption(f"{', '.join(both)}: either in the space or in fixed, not in both")
        moved = {
            name: one.in_numbers_of(known[name]) if isinstance(one, Range) else one
            for name, one in self.items()
        }
        for name, one in moved.items():
            ends = one.ends if isinstance(one, Range) else one.values()
            problems = [known[name].problem(end) for end in ends]
            if isinstance(one, Range) and not any(problems) and known[name].is_beyond(one.low):
                problems = [f"the model has none above {known[name].most:g}"]
            for problem in filter(None, problems):
                raise UnsupportedOption(f"{name}={one}: {problem} ({name}: {known[name].what})")
        for name, value in fixed.items():
            if problem := known[name].problem(value):
                raise UnsupportedOption(f"fixed {name}={value!r}: {problem} ({name}: {known[name].what})")
        return Space(moved)

    # -- as a study keeps it -----------------------------------------------------------------------------------

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            name: {"choices": list(one.options)}
            if isinstance(one, Choices)
            else {"low": one.low, "high": one.high, "step": one.step, "log": one.log}
            for name, one in self.items()
        }

    @classmethod
    def of_plain(cls, plain: Mapping[str, Mapping[str, Any]]) -> "Space":
        """What `to_plain` gave."""
        return cls(
            {
                name: Choices(*one["choices"]) if "choices" in one else Range(**one)
                for name, one in plain.items()
            }
        )
