"""Axes of a suite, one at a time: how they are asked for, and how their values are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["each_axis", "parse_axes"]


def parse_axes(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """``["items=4,8", "flag=True"]`` as axes and their values; what is no number and no truth value is a word.

    Raises:
        ValueError: a text without a name or values, or an axis named twice.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        words = [word.strip() for word in values.split(",") if word.strip()]
        if not (name and equals and words):
            raise ValueError(f"An axis and its values are needed, such as items=4,8,16. Got {text!r}.")
        if name in found:
            raise ValueError(f"The axis {name!r} is named twice. Name it once, with all its values.")
        found[name] = tuple(_value(word) for word in words)
    return found


def _value(word: str) -> Any:
    try:
        return json.loads(word.lower() if word in ("True", "False") else word)
    except ValueError:
        return word


def each_axis(axes: Mapping[str, Sequence[Any]] | None) -> Iterator[dict[str, Any]]:
    """What to change, one value of one axis at a time; nothing where no axis is asked for."""
    if not axes:
        yield {}
    for name, values in (axes or {}).items():
        yield from ({name: value} for value in values)
