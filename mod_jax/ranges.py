"""The numbers that a configuration key accepts, written into the type of its field.

    rows: Count = 8

A number that is not finite is in no range.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True)
class Range:
    """Some of the finite numbers.

    Attributes:
      text: What is expected, for error messages: "a positive number".
      holds: Whether a finite number is in the range.
    """

    text: str
    holds: Callable[[float], bool]

    def __contains__(self, number: float) -> bool:
        return math.isfinite(number) and self.holds(number)


_NOT_NEGATIVE = Range("a number of at least 0", lambda x: x >= 0)
_POSITIVE = Range("a positive number", lambda x: x > 0)
_BELOW_ONE = Range("a number of at least 0 and below 1", lambda x: 0 <= x < 1)

Count = Annotated[int, Range("a number of at least 1", lambda n: n >= 1)]
CountOrZero = Annotated[int, _NOT_NEGATIVE]
Seed = Annotated[int, Range("a number within 0..2^32-1", lambda n: 0 <= n < 2**32)]
Devices = Annotated[
    int, Range("at least 1, or -1 for the devices left", lambda n: n >= 1 or n == -1)
]
AnyInt = Annotated[int, Range("a whole number", lambda n: True)]
AnyNumber = Annotated[float, Range("a finite number", lambda x: True)]
Positive = Annotated[float, _POSITIVE]
NotNegative = Annotated[float, _NOT_NEGATIVE]
BelowOne = Annotated[float, _BELOW_ONE]
Share = Annotated[float, Range("a share within 0..1", lambda x: 0 <= x <= 1)]


def ranges(cls: type) -> dict[str, Range]:
    """Name -> range of each field of a dataclass that has one, itself or as a part of its type."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = {name: next(_ranges(hint), None) for name, hint in hints.items()}
    return {name: range_ for name, range_ in found.items() if range_ is not None}


def _ranges(hint: Any) -> Iterator[Range]:
    """The ranges in a type annotation: `Positive`, `Positive | None`, `tuple[Positive, ...]`."""
    yield from (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Range))
    for part in typing.get_args(hint):
        yield from _ranges(part)
