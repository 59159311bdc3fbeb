"""All that a stream keeps of its items, batched: one row per item in tensors that grow by doubling, never per update.

Memories are trees of tensors: whatever a layer keeps, its leaves are stored here under their dotted names. Leaves of a
scratchpad, told by their mask ``alive``, have a row for each entry, and a store of their own: ``stream_entries``.

I items · R rows of room · C channels · G targets · P steps in a patch · Q quantiles · E static columns
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hamts.errors import DataError
from hamts.reader import HAMNetwork, StreamMemory
from hamts.remembered import flatten_tensors, unflatten_tensors
from hamts.stream_entries import STORES, PaddedEntries, PooledEntries, outlives, pad_of, place_of

__all__ = ["COUNTERS", "ItemTable", "MemoryStore", "StreamItems", "item_columns"]

# what is counted of each item's rows
COUNTERS = (
    "rows",
    "replayed",
    "late",
    "reopened",
    "corrected",
    "applied",
    "quarantined",
    "gap_steps",
    "patches",
    "drifted",
)
LEAST_ROOM = 4

Column = tuple[Any, tuple[int, ...], Any]


def item_columns(
    network: HAMNetwork, *, recent_rows: int, score_rows: int, static: int, with_log: bool
) -> dict[str, Column]:
    """Name -> (dtype, shape of an item's row, value before anything came) of everything kept beside the memory."""
    P, C, G = network.config.patch_steps, len(network.spec.roles), len(network.spec.targets)
    Q = len(network.config.quantiles)
    columns: dict[str, Column] = {
        "starts": (np.int64, (), 0),
        "lead": (np.int64, (), 0),
        "lengths": (np.int64, (), 0),
        "tail_values": (np.float64, (P, C), np.nan),
        "action_before": (np.float64, (C,), np.nan),
        "seen": (np.bool_, (G,), False),
        "static": (np.float64, (static,), np.nan),
        "recent_steps": (np.int64, (recent_rows,), -1),
        "recent_hashes": (np.int64, (recent_rows,), 0),
        "ahead_patch": (np.int64, (), -1),
        "ahead_quantiles": (np.float64, (G, P, Q), np.nan),
        "ahead_mean": (np.float64, (G,), np.nan),
        "ahead_scale": (np.float64, (G,), np.nan),
        "shift": (np.float64, (G, Q), 0.0),
        "shift_steps": (np.int64, (G,), 0),
        "scores": (np.float64, (score_rows,), np.nan),
        "score_count": (np.int64, (), 0),
        "kept": (np.int64, (network.config.layers,), 0),
        "heard": (np.int64, (), 0),
        "counts": (np.int64, (len(COUNTERS),), 0),
    }
    if with_log:
        columns["tail_offset"] = (np.float32, (P, C), 0.0)
    return columns


class ItemTable:
    """Columns of numbers, a row per item, with room for more."""

    def __init__(self, columns: dict[str, Column]) -> None:
        self.columns = columns
        self.count = 0
        self.arrays = {name: np.empty((0, *shape), kind) for name, (kind, shape, _) in columns.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """All rows in use, a view: [I, ...]."""
        return self.arrays[name][: self.count]

    def reserve(self, rows: int) -> None:
        room = len(self.arrays["lengths"])
        if rows <= room:
            return
        wanted = max(LEAST_ROOM, rows, 2 * room if room else rows)
        for name, (kind, shape, first) in self.columns.items():
            larger = np.full((wanted, *shape), first, dtype=kind)
            larger[: self.count] = self.arrays[name][: self.count]
            self.arrays[name] = larger

    def append(self, rows: dict[str, np.ndarray], count: int) -> None:
        """Add items; columns that are not given start as nothing was seen."""
        self.reserve(self.count + count)
        place = slice(self.count, self.count + count)
        for name, (_, _, first) in self.columns.items():
            self.arrays[name][place] = rows.get(name, first)
        self.count += count

    def keep(self, rows: np.ndarray) -> None:
        """Only these rows, in this order."""
        for name, array in self.arrays.items():
            self.arrays[name] = array[rows].copy()
        self.count = len(rows)


class MemoryStore:
    """Memories of all items: one tensor per leaf, [R, ...]; entries of scratchpads in a store of their own.

    Args:
        most_entries: the cap of a scratchpad; None for none.
        store: how entries are kept, one of ``hamts.stream_entries.STORES``.
    """

    @outlives
    def __init__(self, network: HAMNetwork, most_entries: int | None, store: str = "padded") -> None:
        self.template = network.empty_memory(1)
        empty = flatten_tensors(self.template)
        pads = {pad_of(name) for name in empty if name.endswith(".alive")}
        own = {name: leaf for name, leaf in empty.items() if pad_of(name) in pads}
        self.entries: PaddedEntries = STORES[store](own, most_entries)
        self.count = 0
        self.leaves = {name: leaf[:0].clone() for name, leaf in empty.items() if name not in own}

    @outlives
    def like(self) -> MemoryStore:
        """An empty store of the same kind."""
        other = object.__new__(MemoryStore)
        other.template, other.entries, other.count = self.template, self.entries.like(), 0
        other.leaves = {name: leaf[:0].clone() for name, leaf in self.leaves.items()}
        return other

    @property
    def entry_leaves(self) -> set[str]:
        """Names of the leaves that have a row for each entry."""
        return set(self.entries.leaves)

    @property
    def room(self) -> int:
        return len(next(iter(self.leaves.values())))

    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...], int]]:
        """Name -> dtype, shape of a row, and how many axes come before it, of every leaf that is stored."""
        entries = {name: (leaf.dtype, self.entries.row_shape(name), 2) for name, leaf in self.entries.leaves.items()}
        return {name: (leaf.dtype, tuple(leaf.shape[1:]), 1) for name, leaf in self.leaves.items()} | entries

    @outlives
    def reserve(self, rows: int) -> None:
        """Room for so many items; doubles where there is too little."""
        room = self.room
        if rows <= room:
            return
        wanted = max(LEAST_ROOM, rows, 2 * room if room else rows)
        for name, leaf in self.leaves.items():
            self.leaves[name] = torch.cat([leaf, leaf.new_zeros((wanted - room, *leaf.shape[1:]))])
        self.entries.reserve(wanted)

    def select(self, rows: np.ndarray) -> StreamMemory:
        """Memories of some items. Neighbours may come as views: what reads them must not write into them."""
        place = place_of(rows)
        found = {name: leaf[place] for name, leaf in self.leaves.items()}
        return unflatten_tensors(self.template, found | self.entries.read(rows))

    def lend(self, rows: np.ndarray) -> StreamMemory:
        """``select``, but for entries of a pool: a pass of one patch reads them where they lie, and writes into it; one
        of several patches, or of a forecast, takes them out for the items that it has.
        """
        entries = self.entries
        if not isinstance(entries, PooledEntries):
            return self.select(rows)
        place, lent = place_of(rows), entries.lend(rows)
        found = {name: leaf[place] for name, leaf in self.leaves.items()} | lent
        memory = unflatten_tensors(self.template, found)
        pads = [f"layers.{number}.scratchpad" for number in range(len(memory.layers))]
        held = [
            replace(layer, pool=entries.pools[pad], scratchpad=replace(layer.scratchpad, rows=lent[f"{pad}.rows"]))
            for pad, layer in zip(pads, memory.layers, strict=True)
        ]
        return replace(memory, layers=held)

    @outlives
    def put(self, rows: np.ndarray, memory: StreamMemory) -> None:
        """Store the memories of some items; entries beyond theirs are no longer alive."""
        device = memory_device(self.template)
        found = {name: leaf.to(device) for name, leaf in flatten_tensors(memory).items()}
        place = place_of(rows)
        for name, leaf in self.leaves.items():
            leaf[place] = found[name]
        self.entries.write(rows, found)

    @outlives
    def append(self, memory: StreamMemory) -> None:
        items = len(next(iter(flatten_tensors(memory).values())))
        self.reserve(self.count + items)
        self.count += items
        self.put(np.arange(self.count - items, self.count), memory)

    @outlives
    def keep(self, rows: np.ndarray) -> None:
        index = torch.from_numpy(rows)
        self.leaves = {name: leaf[index] for name, leaf in self.leaves.items()}
        self.entries.keep(rows)
        self.count = len(rows)

    def arrays(self) -> dict[str, torch.Tensor]:
        """Every leaf without the room, padding blank: what is written to disk."""
        found = flatten_tensors(self.select(np.arange(self.count)))
        for name in self.entry_leaves:
            alive = found[f"{pad_of(name)}.alive"]
            shown = alive.reshape(*alive.shape, *(1,) * (found[name].dim() - 2))
            found[name] = torch.where(shown, found[name], torch.zeros_like(found[name]))
        return {name: leaf.cpu() if leaf.is_cuda else leaf.clone() for name, leaf in found.items()}


class StreamItems:
    """Ids, rows and memories of all items, in one order."""

    def __init__(self, table: ItemTable, memory: MemoryStore) -> None:
        self.table, self.memory = table, memory
        self.ids: list[Any] = []
        self.slot: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def slots(self, ids: Iterable[Any]) -> np.ndarray:
        """Row of each id, -1 where there is none."""
        return np.fromiter((self.slot.get(each, -1) for each in ids), dtype=np.int64)

    def append(self, ids: Sequence[Any], rows: dict[str, np.ndarray], memory: StreamMemory) -> None:
        self.table.append(rows, len(ids))
        self.memory.append(memory)
        for each in ids:
            self.slot[each] = len(self.ids)
            self.ids.append(each)

    def keep(self, rows: np.ndarray) -> None:
        self.table.keep(rows)
        self.memory.keep(rows)
        self.ids = [self.ids[row] for row in rows]
        self.slot = {each: row for row, each in enumerate(self.ids)}

    def arrays(self) -> dict[str, torch.Tensor | np.ndarray]:
        """Everything of all items under flat names."""
        found: dict[str, torch.Tensor | np.ndarray] = {f"memory.{n}": leaf for n, leaf in self.memory.arrays().items()}
        return found | {f"items.{name}": self.table[name].copy() for name in self.table.columns}

    def load(self, ids: Sequence[Any], arrays: dict[str, torch.Tensor | np.ndarray]) -> None:
        """Add items from what ``arrays`` gave.

        Raises KeyError and ValueError where names or shapes differ, DataError E-STATE where a memory holds no numbers.
        """
        kinds = self.memory.kinds()
        leaves = {name: as_tensor(arrays[f"memory.{name}"]) for name in kinds}
        rows = {name: as_numpy(arrays[f"items.{name}"]) for name in self.table.columns}
        for name, (kind, shape, _) in self.table.columns.items():
            if rows[name].dtype != kind or rows[name].shape != (len(ids), *shape):
                raise ValueError(
                    f"items.{name} must be {np.dtype(kind).name} {(len(ids), *shape)}."
                    f" Got {rows[name].dtype.name} {rows[name].shape}."
                )
        for name, leaf in leaves.items():
            dtype, shape, skip = kinds[name]
            if leaf.dtype != dtype or tuple(leaf.shape[skip:]) != shape or len(leaf) != len(ids):
                raise ValueError(
                    f"memory.{name} must be {dtype}, rows of {shape}, for {len(ids)} items."
                    f" Got {leaf.dtype} {tuple(leaf.shape)}."
                )
            # an update says so of what it leaves behind, and of entries in a pool it looks at the new ones alone
            if name.startswith("layers.") and leaf.is_floating_point() and not bool(torch.isfinite(leaf).all()):
                bad = ~torch.isfinite(leaf.flatten(1)).all(1)  # [I]
                raise DataError(
                    "E-STATE",
                    f"The state holds values in memory.{name} that are not numbers.",
                    series=ids[int(bad.nonzero()[0])],
                    fix="Use another copy, or start the item again from its history.",
                )
        self.append(list(ids), rows, unflatten_tensors(self.memory.template, leaves))


def memory_device(memory: StreamMemory) -> torch.device:
    return memory.scale.sums.device


def as_tensor(array: torch.Tensor | np.ndarray) -> torch.Tensor:
    return array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))


def as_numpy(array: torch.Tensor | np.ndarray) -> np.ndarray:
    return array.cpu().numpy() if isinstance(array, torch.Tensor) else array
