"""Rows of entries that many lists name by number, so that a list may lose any of its entries without a copy.

A row is written once, as its token leaves the window, and never changed after: a list that takes, loses or is put back
to what it was holds other numbers, and no more. Rows that no list names any longer are found by looking through all
lists, once few are free; nothing is counted in between, and nothing waits for the device.

P rows · B items · J rows that come
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["RowPool"]

# lists are looked through once less than such a part of the rows is free, and rows are added if more is not found
FEW, ENOUGH, MORE = 16, 8, 4
# of so many rows one is named where rows are given up
SPARSE = 4


class RowPool:
    """Rows [P, ...] of every part of an entry; row 0 is blank for ever.

    Args:
        parts: a row of each, whatever it holds, [1, ...].
    """

    def __init__(self, parts: Mapping[str, torch.Tensor]) -> None:
        self.parts = {name: torch.zeros_like(part[:1]) for name, part in parts.items()}
        self.free = torch.zeros(0, dtype=torch.int64, device=self.device)  # [F] numbers, and how many of them are taken
        self.taken = 0
        # sum of all that is wide of what the latest ``hold`` wrote: no number where any of it is none
        self.written: torch.Tensor | None = None
        # how many were taken at once, the last time
        self.latest = 0

    @property
    def device(self) -> torch.device:
        return next(iter(self.parts.values())).device

    @property
    def rows(self) -> int:
        return len(next(iter(self.parts.values())))

    @property
    def left(self) -> int:
        """Rows that can be taken before there are more."""
        return len(self.free) - self.taken

    def hold(self, rows: Mapping[str, torch.Tensor], alive: torch.Tensor, *, asks: bool = True) -> torch.Tensor:
        """Write rows that are alive, [B, J, ...] by name; their numbers, [B, J] int64, and 0 for the others.

        Args:
            asks: whether it is asked how many there are, which waits for a GPU; else the others take rows as well.
        """
        self.written = None
        if not asks:
            number = self.take(alive.numel())  # [B J]
            for name, part in self.parts.items():
                part[number] = rows[name].flatten(0, 1).to(part.dtype)
            self._note(number, alive.flatten())
            return torch.where(alive, number.view(alive.shape), 0)  # [B, J]
        found = torch.zeros(alive.numel(), dtype=torch.int64, device=alive.device)  # [B J]
        place = alive.flatten().nonzero()[:, 0]  # [n]
        if len(place):
            number = found[place] = self.take(len(place))  # [n]
            for name, part in self.parts.items():
                part[number] = rows[name].flatten(0, 1)[place].to(part.dtype)
            self._note(number, None)
        return found.view(alive.shape)

    def _note(self, number: torch.Tensor, alive: torch.Tensor | None) -> None:
        """Sum up what is wide of rows that were written, [n]; what those hold that are not alive nobody reads."""
        wide = [part for part in self.parts.values() if part.dim() > 1 and part.is_floating_point()]
        if wide:
            sums = torch.stack([part[number].flatten(1).sum(1) for part in wide]).sum(0)  # [n]
            self.written = (sums if alive is None else torch.where(alive, sums, 0)).sum()

    def take(self, count: int) -> torch.Tensor:
        """Numbers of so many rows that nobody names, [count]."""
        if count > self.left:
            self.grow(count - self.left)
        number = self.free[self.taken : self.taken + count]  # [count]
        self.taken += count
        self.latest = count
        return number

    def used(self) -> int:
        """Rows that were taken since they were last looked for, whether anybody names them or not."""
        return self.rows - self.left

    def borrowed(self, numbers: torch.Tensor) -> RowPool:
        """The same rows for a reader that takes these, [n], which were taken of this pool for it."""
        other = object.__new__(RowPool)
        other.parts, other.free, other.taken, other.written, other.latest = self.parts, numbers, 0, None, 0
        return other

    def give_back(self, used: int) -> None:
        """What was taken since ``used`` was asked for is free again."""
        self.taken -= self.used() - used

    def settle(self) -> None:
        """What was taken is not given back any more: its numbers need no room."""
        self.free, self.taken = self.free[self.taken :].clone(), 0

    # a step may ask for more in inference mode, whose tensors nobody could write into later
    @torch.inference_mode(False)
    @torch.no_grad()
    def grow(self, fewest: int) -> None:
        """More rows, a quarter as many again as there are, so that what is copied is shared by what comes."""
        have = self.rows
        more = max(fewest, have // MORE)
        self.parts = {
            name: torch.cat([part, part.new_zeros(more, *part.shape[1:])]) for name, part in self.parts.items()
        }
        fresh = torch.arange(have, have + more, device=self.device)  # [more]
        self.free, self.taken = torch.cat([self.free[self.taken :], fresh]), 0

    def short(self, coming: int = 0) -> bool:
        """Whether it is time to ``sweep``: few are left, or less than are to come before it can be asked again."""
        return self.left < max(self.rows // FEW, coming)

    def sweep(self, named: torch.Tensor, coming: int = 0) -> None:
        """Every row but these, [n] numbers, is free again. Asks the device how many those are."""
        used = torch.zeros(self.rows, dtype=torch.bool, device=self.device)  # [P]
        used[named] = True
        used[0] = True
        self.free, self.taken = (~used).nonzero()[:, 0], 0
        if self.left < max(self.rows // ENOUGH, 2 * coming):
            self.grow(max(self.rows // MORE, 2 * coming))

    def sparse(self) -> bool:
        """Whether so few of the rows are named that the others are worth giving up; to be asked after ``sweep``.

        An update needs twice what is named, since until it is stored the lists from before stay whole.
        """
        return self.rows > SPARSE * max(self.rows - self.left, self.latest)

    def keep(self, named: torch.Tensor) -> None:
        """Nothing but these rows, [n] numbers, which are 1, 2, ... from now on."""
        order = torch.cat([named.new_zeros(1), named]).long()  # [1 + n]
        self.parts = {name: part[order] for name, part in self.parts.items()}
        self.free, self.taken = self.free[:0], 0

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values()) + self.free.nbytes
