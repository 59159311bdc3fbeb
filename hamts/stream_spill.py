"""Idle items on disk: one file an item, its checksum in memory, back on first use. Not a store that survives a crash.

``Stream.state`` holds spilled items too; a folder of spilled items alone cannot be opened again.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np

from hamts.errors import DataError
from hamts.stream_state import StreamItems, as_numpy

__all__ = ["Spill"]


class Spill:
    """Items moved out of memory.

    Args:
        folder: made where there is none.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[Any, tuple[Path, str]] = {}

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, item: Any) -> bool:
        return item in self._files

    @property
    def ids(self) -> list[Any]:
        return list(self._files)

    def store(self, items: StreamItems, slot: int) -> None:
        """Write one item; its row in memory stays until the caller drops it."""
        alone = StreamItems(type(items.table)(items.table.columns), items.memory.like())
        place = np.array([slot])
        alone.append(
            [items.ids[slot]],
            {name: items.table[name][place] for name in items.table.columns},
            items.memory.select(place),
        )
        buffer = io.BytesIO()
        # plain arrays: nothing that runs code on loading
        arrays: dict[str, Any] = {name: as_numpy(array) for name, array in alone.arrays().items()}
        np.savez(buffer, **arrays)
        content = buffer.getvalue()
        name = hashlib.sha256(repr(items.ids[slot]).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.npz"
        path.write_bytes(content)
        self._files[items.ids[slot]] = (path, hashlib.sha256(content).hexdigest())

    def put_away(self, items: StreamItems, slots: np.ndarray) -> None:
        """Write the items of these slots and drop them from memory; the others keep their order."""
        for slot in slots:
            self.store(items, int(slot))
        items.keep(np.setdiff1d(np.arange(len(items)), slots))

    def recall(self, items: StreamItems, item: Any) -> None:
        """Bring an item back to memory. Raises DataError E-STATE where its file is gone or damaged."""
        path, wanted = self._files[item]
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != wanted:
            raise DataError(
                "E-STATE",
                f"The spilled state '{path}' is {'damaged' if content else 'gone'}.",
                series=item,
                fix="Start the item again from its history: drop it, then add(df).",
            )
        with np.load(io.BytesIO(content), allow_pickle=False) as found:
            items.load([item], {name: found[name] for name in found.files})
        del self._files[item]
        path.unlink()
