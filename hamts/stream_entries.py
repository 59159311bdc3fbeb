"""Where a stream keeps the scratchpads of its items: padded to the longest, or in pages that all items share.

Padded, every item has room for as many entries as the longest scratchpad of all, doubled as it grows, up to the cap.
Paged, an item holds as many pages of a few rows as its own entries fill. What comes out is the same.

R items · B items of a call · M entries · E rows of a page · P pages
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["STORES", "PaddedEntries", "PagedEntries", "pad_of", "place_of"]

Leaves = dict[str, torch.Tensor]
LEAST_ENTRIES = 16
# rows of a page: half a page is empty on average, and the cost of finding one is shared by so many rows
PAGE = 16


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


class PagedEntries(PaddedEntries):
    """Pools of pages, [P E, ...] per leaf; page 0 is blank for ever, and is read where an item has no entry."""

    def __init__(self, empty: Leaves, most: int | None) -> None:
        super().__init__(empty, most)
        self.leaves = {name: leaf.new_zeros((PAGE, *leaf.shape[2:])) for name, leaf in self.leaves.items()}
        # pages of each item, [R, T], 0: none; and those that nobody holds, the next one last
        self.pages = {pad: np.zeros((0, 0), dtype=np.int64) for pad in self.used}
        self.free: dict[str, list[int]] = {pad: [] for pad in self.used}

    def like(self) -> PagedEntries:
        return type(self)({name: leaf[None, :0] for name, leaf in self.leaves.items()}, self.most)

    def row_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.leaves[name].shape[1:])

    def reserve(self, items: int) -> None:
        self._more_items(items)
        for pad, pages in self.pages.items():
            if items > len(pages):
                self.pages[pad] = np.pad(pages, ((0, items - len(pages)), (0, 0)))

    def read(self, rows: np.ndarray) -> Leaves:
        found: Leaves = {}
        for pad, used in self.used.items():
            width = int(used[rows].max()) if len(rows) else 0
            entry = np.arange(width)
            page = self.pages[pad][rows][:, entry // PAGE]  # [B, M]
            index = torch.from_numpy(np.where(entry < used[rows][:, None], page * PAGE + entry % PAGE, 0))  # [B, M]
            for name in self._of(pad):
                found[name] = self.leaves[name][index.to(self.leaves[name].device)]
        return found

    def write(self, rows: np.ndarray, found: Leaves) -> None:
        for pad in self.used:
            used = in_use(found[f"{pad}.alive"])  # [B]
            self._hold(pad, rows, -(-used // PAGE))
            self.used[pad][rows] = used
            item, entry = np.nonzero(np.arange(used.max(initial=0)) < used[:, None])  # 2 x [rows in use]
            slot = torch.from_numpy(self.pages[pad][rows[item], entry // PAGE] * PAGE + entry % PAGE)
            source = (torch.from_numpy(item), torch.from_numpy(entry))
            for name in self._of(pad):
                leaf = self.leaves[name]
                leaf[slot.to(leaf.device)] = found[name][tuple(part.to(leaf.device) for part in source)]

    def keep(self, rows: np.ndarray) -> None:
        self.used = {pad: used[rows] for pad, used in self.used.items()}
        for pad, pages in self.pages.items():
            left = pages[rows]
            # what the others held is given up: pages are numbered anew, in the order of items
            order = left[left > 0]
            self.pages[pad] = np.zeros_like(left)
            self.pages[pad][left > 0] = np.arange(1, len(order) + 1)
            self.free[pad] = []
            index = np.concatenate([[0], order])[:, None] * PAGE + np.arange(PAGE)  # [P, E]
            for name in self._of(pad):
                leaf = self.leaves[name]
                self.leaves[name] = leaf[torch.from_numpy(index.ravel()).to(leaf.device)]

    def _of(self, pad: str) -> list[str]:
        return [name for name in self.leaves if pad_of(name) == pad]

    def _hold(self, pad: str, rows: np.ndarray, wanted: np.ndarray) -> None:
        """Give each item the number of pages it needs, [B]."""
        table, free = self.pages[pad], self.free[pad]
        if wanted.max(initial=0) > table.shape[1]:
            wide = max(int(wanted.max()), 2 * table.shape[1])
            table = self.pages[pad] = np.pad(table, ((0, 0), (0, wide - table.shape[1])))
        held = (table[rows] > 0).sum(1)  # [B]
        for row, have, need in zip(rows, held, wanted, strict=True):
            free.extend(table[row, need:have][::-1].tolist())
            table[row, need:have] = 0
        short = int((wanted - held).clip(0).sum()) - len(free)
        if short > 0:
            self._add_pages(pad, short)
        for row, have, need in zip(rows, held, wanted, strict=True):
            for number in range(have, need):
                table[row, number] = free.pop()

    def _add_pages(self, pad: str, fewest: int) -> None:
        """More pages, a quarter as many again as there are, so that what is copied is shared by what comes."""
        names = self._of(pad)
        have = len(self.leaves[names[0]]) // PAGE
        more = max(fewest, have // 4)
        for name in names:
            leaf = self.leaves[name]
            self.leaves[name] = torch.cat([leaf, leaf.new_zeros((more * PAGE, *leaf.shape[1:]))])
        self.free[pad][:0] = range(have + more - 1, have - 1, -1)


STORES: dict[str, Any] = {"padded": PaddedEntries, "paged": PagedEntries}


def pad_of(name: str) -> str:
    """The scratchpad that a leaf belongs to: ``layers.0.scratchpad`` of ``layers.0.scratchpad.keys``."""
    return name.rsplit(".", 1)[0]


def in_use(alive: torch.Tensor) -> np.ndarray:
    """Rows up to the last living entry, [B, M] -> [B]."""
    if not alive.shape[1]:
        return np.zeros(len(alive), dtype=np.int64)
    last = torch.arange(1, alive.shape[1] + 1)
    return (alive.cpu() * last).amax(1).numpy()


def place_of(rows: np.ndarray) -> Any:
    """A slice where the rows are neighbours, so that nothing is copied; else their index."""
    if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (len(rows) == 1 or bool((np.diff(rows) == 1).all())):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return torch.from_numpy(rows)
