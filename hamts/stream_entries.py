"""Where a stream keeps the scratchpads of its items: padded to the longest, or in rows of a pool that all items share.

Padded, every item has room for as many entries as the longest scratchpad of all, doubled as it grows, up to the cap; a
step reads those of neighbours where they lie and those of others in a copy, closes them up in a copy, and writes it
back. Paged, an item holds as many rows as it has entries, and a page is a row: what leaves does so one by one, and a
step changes numbers of rows. What comes out is the same.

R items · B items of a call · M entries · P rows of a pool
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from hamts.data.constants import sent
from hamts.ops.pool import RowPool

if TYPE_CHECKING:
    from hamts.reader import StreamMemory

__all__ = ["STORES", "PaddedEntries", "PooledEntries", "outlives", "pad_of", "place_of"]

Leaves = dict[str, torch.Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])
LEAST_ENTRIES = 16
# room to grow of a list of row numbers: an eighth of its length
SPARE = 8


def outlives(function: Function) -> Function:
    """What it makes can be written into later, though its caller may be in inference mode now and not then."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class PaddedEntries:
    """One tensor per leaf, [R, M, ...]."""

    def __init__(self, empty: Leaves, most: int | None) -> None:
        """``empty``: leaves of scratchpads as they are without entries, [1, 0, ...]; ``most``: the cap."""
        self.most = most
        self.leaves = {name: leaf[:0, :0].clone() for name, leaf in empty.items()}
        # rows in use of each item, by the scratchpad's prefix
        self.used = {pad_of(name): np.zeros(0, dtype=np.int64) for name in empty}

    def like(self) -> PaddedEntries:
        """An empty store of the same kind."""
        return type(self)({name: leaf[:0, :0] for name, leaf in self.leaves.items()}, self.most)

    def row_shape(self, name: str) -> tuple[int, ...]:
        """Shape of one entry's row."""
        return tuple(self.leaves[name].shape[2:])

    def reserve(self, items: int) -> None:
        """Room for so many items."""
        self._lay_out(items, {})
        self._more_items(items)

    def read(self, rows: np.ndarray) -> Leaves:
        """Leaves of some items, [B, M, ...] with M the most that any of them uses; views where they are neighbours."""
        place = place_of(rows)
        width = {pad: int(used[rows].max()) if len(rows) else 0 for pad, used in self.used.items()}
        return {name: leaf[:, : width[pad_of(name)]][place] for name, leaf in self.leaves.items()}

    def write(self, rows: np.ndarray, found: Leaves) -> None:
        """Store leaves of some items, [B, M, ...]; entries beyond theirs are no longer alive."""
        self._lay_out(0, {pad_of(name): found[name].shape[1] for name in self.leaves})
        place = place_of(rows)
        for name, leaf in self.leaves.items():
            width = found[name].shape[1]
            leaf[place, :width] = found[name]
            if name.endswith(".alive"):
                leaf[place, width:] = False
        for pad in self.used:
            self.used[pad][rows] = in_use(found[f"{pad}.alive"])

    def keep(self, rows: np.ndarray) -> None:
        """Only these items, in this order."""
        index = torch.from_numpy(rows)
        self.leaves = {name: leaf[index] for name, leaf in self.leaves.items()}
        self.used = {pad: used[rows] for pad, used in self.used.items()}

    def short(self) -> bool:
        """Whether there may be too little room for the next step; ``tidy`` finds some."""
        return False

    def tidy(self, under_way: Sequence[StreamMemory] = ()) -> None:
        """Find room that nobody uses any more.

        Args:
            under_way: memories of an update that is not stored yet.
        """

    def nbytes(self) -> int:
        """Bytes of all the room there is."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def _more_items(self, items: int) -> None:
        for pad, used in self.used.items():
            if items > len(used):
                self.used[pad] = np.concatenate([used, np.zeros(items - len(used), dtype=np.int64)])

    def _lay_out(self, items: int, entries: dict[str, int]) -> None:
        for name, leaf in self.leaves.items():
            have = leaf.shape[:2]
            wanted = (max(have[0], items), self._entry_room(have[1], entries.get(pad_of(name), 0)))
            if wanted != have:
                larger = leaf.new_zeros((*wanted, *leaf.shape[2:]))
                larger[: have[0], : have[1]] = leaf
                self.leaves[name] = larger

    def _entry_room(self, have: int, needed: int) -> int:
        if needed <= have:
            return have
        doubled = max(LEAST_ENTRIES, needed, 2 * have)
        return doubled if self.most is None else max(needed, min(doubled, self.most))


class PooledEntries(PaddedEntries):
    """Rows of a pool for each scratchpad, and lists of numbers that say which are whose.

    A step reads entries where they lie (``lend``), and what it appends is in the pool before the lists know of it: an
    update that fails has changed nothing. Row 0 is blank, and stands for an entry that is not alive.
    """

    def __init__(self, empty: Leaves, most: int | None) -> None:
        self.most = most
        self.used = {pad_of(name): np.zeros(0, dtype=np.int64) for name in empty}
        first = {name: leaf.new_zeros(1, *leaf.shape[2:]) for name, leaf in empty.items()}
        self.pools = {pad: RowPool(_inside(first, pad)) for pad in self.used}
        self.lists = {pad: RowLists(pool.device, most) for pad, pool in self.pools.items()}

    @property
    def leaves(self) -> Leaves:  # type: ignore[override]
        """Every part of every pool, [P, ...]."""
        return {f"{pad}.{name}": part for pad, pool in self.pools.items() for name, part in pool.parts.items()}

    def like(self) -> PooledEntries:
        return type(self)({name: leaf[None, :0] for name, leaf in self.leaves.items()}, self.most)

    def row_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.leaves[name].shape[1:])

    def reserve(self, items: int) -> None:
        self._more_items(items)
        for lists in self.lists.values():
            lists.reserve(items)

    def read(self, rows: np.ndarray) -> Leaves:
        found: Leaves = {}
        for pad, pool in self.pools.items():
            number = self.lists[pad].read(rows, self.used[pad][rows])  # [B, M]
            found |= {f"{pad}.{name}": part[number] for name, part in pool.parts.items()}
        return found

    def lend(self, rows: np.ndarray) -> Leaves:
        """``read``, with the numbers of rows in place of all that is wide: nothing that a step reads is copied."""
        found: Leaves = {}
        for pad, pool in self.pools.items():
            number = self.lists[pad].read(rows, self.used[pad][rows])  # [B, M]
            for name, part in pool.parts.items():
                # of the wide parts, of which there are none, only the shape
                whole = part[number] if part.dim() == 1 else part.new_zeros(*number.shape, *part.shape[1:-1], 0)
                found[f"{pad}.{name}"] = whole
            found[f"{pad}.rows"] = number
        return found

    def write(self, rows: np.ndarray, found: Leaves) -> None:
        for pad, pool in self.pools.items():
            alive = found[f"{pad}.alive"]  # [B, M]
            number = found.get(f"{pad}.rows")
            if number is None:
                number = pool.hold(_inside(found, pad), alive)  # [B, M]
                pool.settle()
            used = in_use(alive)  # [B]
            self.lists[pad].write(rows, torch.where(alive, number, 0), self.used[pad], used)
            self.used[pad][rows] = used

    def keep(self, rows: np.ndarray) -> None:
        for pad in self.pools:
            self._keep(pad, rows)

    def _keep(self, pad: str, rows: np.ndarray) -> None:
        """Only these items' entries; what the others held is given up, and rows are numbered anew."""
        pool, lists = self.pools[pad], self.lists[pad]
        used = self.used[pad][rows]  # [B]
        number = lists.named(rows, used)  # [n]
        alive = number > 0
        pool.keep(number[alive])
        number = torch.where(alive, alive.cumsum(0), 0)  # [n]
        self.used[pad] = used
        self.lists[pad] = RowLists(pool.device, self.most)
        self.lists[pad].begin_anew(number, used)

    def short(self) -> bool:
        return any(pool.short(pool.latest) for pool in self.pools.values())

    @outlives
    def tidy(self, under_way: Sequence[StreamMemory] = ()) -> None:
        for pad, pool in self.pools.items():
            if not pool.short(pool.latest):
                continue
            layer = int(pad.split(".")[1]) if under_way else 0
            pads = [memory.layers[layer].scratchpad for memory in under_way]
            fresh = [torch.where(pad.alive, pad.rows, 0).flatten() for pad in pads if pad.rows is not None]
            every = np.arange(len(self.used[pad]))
            pool.sweep(torch.cat([self.lists[pad].named(every, self.used[pad]), *fresh]), pool.latest)
            # numbers that an update goes by must stay what they are
            if not under_way and pool.sparse():
                self._keep(pad, every)

    def nbytes(self) -> int:
        return sum(pool.nbytes() for pool in self.pools.values()) + sum(x.numbers.nbytes for x in self.lists.values())


class RowLists:
    """Numbers of each item's rows, one list behind the other, each with some room to grow."""

    def __init__(self, device: torch.device, most: int | None) -> None:
        self.most = most
        # the last takes what has no place
        self.numbers = torch.zeros(1, dtype=torch.int32, device=device)
        self.begin, self.room = np.zeros((2, 0), dtype=np.int64)  # 2 x [R]

    def reserve(self, items: int) -> None:
        missing = max(0, items - len(self.room))
        self.begin, self.room = (np.concatenate([x, np.zeros(missing, np.int64)]) for x in (self.begin, self.room))

    def read(self, rows: np.ndarray, used: np.ndarray) -> torch.Tensor:
        """Numbers of some items' rows, [B, M] int64, 0 beyond the ``used`` [B] of each."""
        place, there = self._places(rows, used, int(used.max(initial=0)))
        return torch.where(there, self.numbers[place], 0).long()

    def named(self, rows: np.ndarray, used: np.ndarray) -> torch.Tensor:
        """Numbers of some items' rows one behind the other, [n] int64: no more than there are, however long one is."""
        return self.numbers[self._flat(rows, used)].long()

    def begin_anew(self, number: torch.Tensor, used: np.ndarray) -> None:
        """Lists of ``used`` [R] numbers each, one behind the other in ``number`` [n]."""
        self.reserve(len(used))
        self._lay_out(np.arange(len(used)), used * 0, used)
        self.numbers[self._flat(np.arange(len(used)), used)] = number.int()

    def _flat(self, rows: np.ndarray, used: np.ndarray) -> torch.Tensor:
        """Where the numbers of some items lie, those of one behind those of the other, [n] int64."""
        entry = np.arange(int(used.sum())) - np.repeat(np.cumsum(used) - used, used)  # [n] in its list
        return sent(torch.from_numpy(np.repeat(self.begin[rows], used) + entry), self.numbers.device)

    def write(self, rows: np.ndarray, number: torch.Tensor, before: np.ndarray, used: np.ndarray) -> None:
        """Numbers [B, M] in place of some items' lists; ``before``: length of every list [R], ``used`` [B] of these."""
        if (used > self.room[rows]).any():
            self._lay_out(rows, before, used)
        place, there = self._places(rows, used, number.shape[1])
        self.numbers[torch.where(there, place, len(self.numbers) - 1)] = number.int()

    def _places(self, rows: np.ndarray, used: np.ndarray, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the first ``width`` numbers of some items lie, and which of them are theirs: 2 x [B, width]."""
        device = self.numbers.device
        begin, end = sent(torch.from_numpy(np.stack([self.begin[rows], used])), device)[..., None]  # 2 x [B, 1]
        entry = torch.arange(width, device=device)  # [width]
        return (begin + entry).clamp_max(len(self.numbers) - 1), entry < end

    def _lay_out(self, rows: np.ndarray, before: np.ndarray, used: np.ndarray) -> None:
        """More room for all: an eighth as much again as each has used, so that lists move seldom."""
        wanted = before.copy()  # [R]
        wanted[rows] = np.maximum(wanted[rows], used)
        spare = np.maximum(LEAST_ENTRIES, wanted // SPARE) * (wanted > 0)
        capped = wanted + spare if self.most is None else np.maximum(wanted, np.minimum(wanted + spare, self.most))
        room = np.maximum(self.room, capped)  # [R]
        begin = np.cumsum(room) - room  # [R]
        larger = self.numbers.new_zeros(int(room.sum()) + 1)
        every = np.arange(len(before))
        kept = self.numbers[self._flat(every, before)]  # [n]
        self.numbers, self.begin, self.room = larger, begin, room
        self.numbers[self._flat(every, before)] = kept


STORES: dict[str, Any] = {"padded": PaddedEntries, "paged": PooledEntries}


def pad_of(name: str) -> str:
    """The scratchpad that a leaf belongs to: ``layers.0.scratchpad`` of ``layers.0.scratchpad.keys``."""
    return name.rsplit(".", 1)[0]


def _inside(leaves: Leaves, pad: str) -> Leaves:
    """Leaves of one scratchpad under the names that they have there."""
    return {name.removeprefix(f"{pad}."): leaf for name, leaf in leaves.items() if pad_of(name) == pad}


def in_use(alive: torch.Tensor) -> np.ndarray:
    """Rows up to the last living entry, [B, M] -> [B]."""
    if not alive.shape[1]:
        return np.zeros(len(alive), dtype=np.int64)
    last = torch.arange(1, alive.shape[1] + 1, device=alive.device)
    return (alive * last).amax(1).cpu().numpy()


def place_of(rows: np.ndarray) -> Any:
    """A slice where the rows are neighbours, so that nothing is copied; else their index."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (len(rows) == 1 or bool((np.diff(rows) == 1).all())):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)
