"""Axes of a suite, one at a time: how they are asked for, and how their values are read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["each_axis", "parse_axes", "parts_of"]


def parse_axes(texts: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """``["items=4,8", "flag=True", "noises=(0.05,0.8)"]`` as axes and their values; what is no value is a word.

    Raises:
        ValueError: a text without a name or values, or an axis named twice.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = (part.strip() for part in text.partition("="))
        words = parts_of(values)
        if not (name and equals and words):
            raise ValueError(f"An axis and its values are needed, such as items=4,8,16. Got {text!r}.")
        if name in found:
            raise ValueError(f"The axis {name!r} is named twice. Name it once, with all its values.")
        found[name] = tuple(_value(word) for word in words)
    return found


def parts_of(text: str) -> list[str]:
    """What stands between commas that are in no brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts if part.strip()]


def _value(word: str) -> Any:
    try:
        if word.startswith("(") and word.endswith(")"):
            return tuple(json.loads(f"[{word[1:-1]}]"))
        return json.loads(word.lower() if word in ("True", "False") else word)
    except ValueError:
        return word


def each_axis(axes: Mapping[str, Sequence[Any]] | None) -> Iterator[dict[str, Any]]:
    """What to change, one value of one axis at a time; nothing where no axis is asked for."""
    if not axes:
        yield {}
    for name, values in (axes or {}).items():
        yield from ({name: value} for value in values)
