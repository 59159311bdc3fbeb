"""A stream without a network, for what must hold of any stream on disk; it needs neither torch nor pandas."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

ROWS, PER_POLL = 40, 3


@dataclass(frozen=True)
class FakeReport:
    rows: int


class FakeStream:
    """Folds rows into an array, one after the other: its state depends on every row and on their order."""

    model_hash = "ab" * 32

    def __init__(self, folded: np.ndarray | None = None, seen: int = 0) -> None:
        self.folded = np.zeros(64) if folded is None else folded
        self.seen = seen

    def update(self, rows: Iterable[float]) -> FakeReport:
        count = 0
        for count, value in enumerate(rows, start=1):  # noqa: B007
            self.folded = np.roll(self.folded, 1) * 0.9 + value
            self.seen += 1
        return FakeReport(count)

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {"folded": self.folded}, {"seen": self.seen}

    @classmethod
    def from_state(cls, model: Any, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> FakeStream:
        return cls(np.asarray(arrays["folded"]), meta["seen"])

    def state_hash(self) -> str:
        return hashlib.sha256(self.folded.tobytes() + json.dumps(self.seen).encode()).hexdigest()

    def forecast(self, h: int) -> list[float]:
        return [float(self.folded.sum())] * h


class FakeItems:
    """Folds the rows of each item by itself, so that the order of rows of different items does not matter."""

    model_hash = "cd" * 32

    def __init__(self) -> None:
        self.items: dict[str, FakeStream] = {}

    def update(self, rows: Any) -> FakeReport:
        for name, value in zip(rows["unique_id"], rows["y"], strict=True):
            self.items.setdefault(name, FakeStream()).update([value])
        return FakeReport(len(rows))

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        return {f"folded.{name}": item.folded for name, item in self.items.items()}, {
            "seen": {name: self.items[name].seen for name in sorted(self.items)}
        }

    @classmethod
    def from_state(cls, model: Any, arrays: dict[str, np.ndarray], meta: dict[str, Any]) -> FakeItems:
        made = cls()
        made.items = {name: FakeStream(np.asarray(arrays[f"folded.{name}"]), n) for name, n in meta["seen"].items()}
        return made

    def state_hash(self) -> str:
        parts = "".join(f"{name} {self.items[name].state_hash()}" for name in sorted(self.items))
        return hashlib.sha256(parts.encode()).hexdigest()


class CountingSource:
    """Rows that are a function of their number; a poll returns the next few."""

    def __init__(self, rows: int = ROWS, per_poll: int = PER_POLL) -> None:
        self.rows, self.per_poll = rows, per_poll

    def poll(self, position: dict[str, int] | None) -> tuple[list[float] | None, dict[str, int] | None]:
        low = 0 if position is None else position["row"]
        high = min(low + self.per_poll, self.rows)
        if low == high:
            return None, position
        return [np.sin(float(row)) for row in range(low, high)], {"row": high}


def uninterrupted(rows: int = ROWS) -> dict[int, str]:
    """Hash of the state after each poll, by the rows read."""
    stream, hashes = FakeStream(), {}
    hashes[0] = stream.state_hash()
    source, position = CountingSource(rows), None
    while (polled := source.poll(position))[0] is not None:
        stream.update(polled[0])
        position = polled[1]
        hashes[position["row"]] = stream.state_hash()
    return hashes
