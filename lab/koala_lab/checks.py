"""Checks of arguments. Each raises one sentence that names the argument, its value and what would do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any

_RANGES = {
    ">= 0": lambda x: x >= 0,
    "> 0": lambda x: x > 0,
    "in [0, 1)": lambda x: 0 <= x < 1,
    "in (0, 1]": lambda x: 0 < x <= 1,
}


def check_whole(name: str, value: object, least: int = 0, *, also: tuple[object, ...] = ()) -> None:
    """Raise ValueError unless a value is an ``int`` of at least ``least``, or one of ``also``.

    >>> check_whole("pieces", 1, 2, also=(0,))
    Traceback (most recent call last):
    ValueError: pieces must be 0 or a whole number >= 2, got 1
    """
    if any(value is other for other in also) or (type(value) is int and value >= least):
        return
    others = "".join(f"{other!r} or " for other in also)
    raise ValueError(f"{name} must be {others}a whole number >= {least}, got {value!r}")


def check_number(name: str, value: Any, bounds: str = ">= 0") -> None:
    """Raise ValueError unless a value is a finite number within bounds, a key of the table above; no ``bool``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and _RANGES[bounds](value)):
        raise ValueError(f"{name} must be a finite number {bounds}, got {value!r}")


def check_fields(values: Mapping[str, Any], kinds: Mapping[str, type | UnionType]) -> None:
    """Raise ValueError unless every named value is there and of its kind.

    >>> check_fields({"n": "5"}, {"n": int})
    Traceback (most recent call last):
    ValueError: field 'n': expected int, got '5'
    """
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            expected = getattr(kind, "__name__", str(kind))
            raise ValueError(f"field {name!r}: expected {expected}, got {values.get(name)!r:.50}")


def check_known(what: str, name: object, known: Iterable[str], *, of: str = "") -> None:
    """Raise ValueError, with the nearest known name, unless a name is known.

    Args:
        what: What is named, such as ``"optimizer"``.
        name: The name given.
        known: All names.
        of: What they belong to, such as ``"task 'gan'"``.

    >>> check_known("model", "resnet-18", ["lstm", "resnet18"])
    Traceback (most recent call last):
    ValueError: model 'resnet-18' is unknown; known are lstm, resnet18; did you mean 'resnet18'?
    """
    known = [*known]
    if name in known:
        return
    near = difflib.get_close_matches(str(name), known, n=1)
    belong, meant = f" of {of}" if of else "", f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{what} {name!r} is unknown; known are {', '.join(filter(None, known))}{belong}{meant}")
