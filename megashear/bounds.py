"""Metadata in the type of a configuration field: the range of its numbers, its place in help."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True, slots=True)
class Between:
    """Metadata of a number's type: ``Annotated[int, Between(1, 1024)]``.

    The range applies to the number itself, to each number of a list, and to the number of each
    ``name=number``. ``None`` and words that are no number pass, because their type checks them.
    """

    least: float
    """Smallest value, allowed."""
    most: float
    """Largest value, allowed unless ``below``."""
    below: bool = False
    """Whether ``most`` itself is refused."""

    def __str__(self) -> str:
        if self.below:
            return f"{_plain(self.least)} or more, below {_plain(self.most)}"
        return f"{_plain(self.least)} to {_plain(self.most)}"

    def allows(self, value: float) -> bool:
        """Return whether a number is in the range; NaN is in no range."""
        return self.least <= value and (value < self.most if self.below else value <= self.most)

    def check(self, value: object, flag: str) -> None:
        """Refuse a value with a number out of the range.

        Args:
            value: value of a field.
            flag: the name as the user typed it.

        Raises:
            ValueError: with the number and the range.
        """
        for word, number in _numbers(value):
            if not self.allows(number):
                found = f"is {word}" if word is value else f"has {word}"
                raise ValueError(f"{flag} {_short(found)}; wanted {self}")


def check_bounds(config: object) -> None:
    """Refuse a configuration with a number out of its field's range.

    Args:
        config: a dataclass; only fields whose type has a range are checked.

    Raises:
        ValueError: with the flag, the number and the range.
    """
    owner: type = type(config)
    for name, bounds in ranges_of(owner).items():
        bounds.check(getattr(config, name), "--" + name.replace("_", "-"))


@functools.cache
def ranges_of(owner: type) -> Mapping[str, Between]:
    """Return the range of each field of a dataclass that has one, by the field's name."""
    hints = get_type_hints(owner, include_extras=True)
    return {name: found[0] for name, hint in hints.items() if (found := list(_ranges(hint)))}


def _ranges(hint: Any) -> Iterator[Between]:
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, Between):
            yield part
    for part in get_args(hint):
        yield from _ranges(part)


def _numbers(value: object) -> Iterator[tuple[object, float]]:
    """Yield the word as written and its number, for each number of a value."""
    for word in value if isinstance(value, tuple) else (value,):
        if isinstance(word, str):
            try:
                yield word, float(word.rpartition("=")[2])
            except ValueError:
                continue
        elif isinstance(word, int | float) and not isinstance(word, bool):
            yield word, word


def _plain(number: float) -> str:
    """Return a number as a person would type it."""
    if isinstance(number, int) or (number.is_integer() and abs(number) < 1e6):
        return str(int(number))
    return re.sub(r"e([+-]?)0*", r"e\1", f"{number:g}").replace("e+", "e")


def _short(found: str) -> str:
    """Return a text, without the middle of a number of hundreds of digits."""
    return found if len(found) <= _LONGEST else f"{found[:24]}...{found[-8:]}"


_LONGEST = 64
"""Characters of a value in a message."""

MOST_EXTENT = 2**31 - 1
"""Largest extent of a model: kernels index with 32 bits."""
TINY = 1e-30
"""Smallest value of a number that must be above 0; float32 holds it."""
MOST_RATE = 1e4
"""Largest learning rate, of weights and of masks."""

Ranks = Annotated[int, Between(1, 2**20)]
"""Processes, devices, or parts of a model that they hold."""
Steps = Annotated[int, Between(1, 10**9)]
StepsOrNever = Annotated[int, Between(0, 10**9)]
Sequences = Annotated[int, Between(1, 2**20)]
"""Sequences that are held at once."""
Length = Annotated[int, Between(1, 2**24)]
"""Tokens of a sequence."""
Tokens = Annotated[int, Between(1, 10**18)]
Minutes = Annotated[int, Between(0, 10**6)]
Extent = Annotated[int, Between(1, MOST_EXTENT)]
Workers = Annotated[int, Between(1, 4096)]
Seed = Annotated[int, Between(0, 2**53)]
"""JSON keeps every whole number up to the largest seed, and offsets for stages and ranks fit."""
Share = Annotated[float, Between(1e-9, 1)]
Part = Annotated[float, Between(0, 1, below=True)]
Rate = Annotated[float, Between(TINY, MOST_RATE)]
Epsilon = Annotated[float, Between(TINY, 1)]

COMMON = "common"
"""Metadata of a field's type: ``--help`` shows the field, and not only ``--help-all``."""


@functools.cache
def common_of(owner: type) -> frozenset[str]:
    """Return the names of a dataclass's fields that ``--help`` shows."""
    hints = get_type_hints(owner, include_extras=True)
    return frozenset(n for n, hint in hints.items() if COMMON in getattr(hint, "__metadata__", ()))
