"""Entries of many streams in pages that all of them share: a long list takes no room of a short one.

Padded lists take the longest list's room for every stream. Here a stream has a row of page numbers, and entry e of it
lies in page ``table[s, e // E % T]``, row ``e % E``. A page to be filled is taken from a pile of free ones, a page that
a cap has emptied goes back to it, both on the device and by prefix sums, in the order of streams: nothing waits, equal
inputs take equal pages, and a CUDA graph can hold the step. Only ``reserve`` asks the device, once for as many rows as
it is asked to make sure of; what would find no page after all is counted, and ``check`` refuses to go on.

S streams · E entries of a page · P pages · T pages that a stream may hold · J rows that come in a step
H heads · K key · V value · R marks · M entries side by side
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hamts.ops.compact import bucket
from hamts.ops.kernels import Kernels
from hamts.ops.stores import NEVER, EntryKind, StepRead, Store, StoreError, blank
from hamts.ops.types import ScratchKeys

__all__ = ["PAGE", "PagedStore"]

# rows of a page: what a tile of the step's kernel reads
PAGE = 64
KERNELS = ("torch", "triton")


class PagedStore(Store):
    """Pages of E rows for all streams; each stream holds as many as its living entries touch.

    Args:
        pages: P, of all streams together.
        page: E, a multiple of 64.
        room: entries that a stream may have, up to its cap, until ``reserve`` makes ready for more.
        grows: whether ``reserve`` makes more pages where there are too few, instead of refusing.
        kernel: what finds the places of new rows: ``torch``, or ``triton``, in one launch where the other takes sixty.
    """

    name = "paged"

    def __init__(
        self,
        kind: EntryKind,
        streams: int,
        *,
        cap: int | None = None,
        device: torch.device | str = "cpu",
        pages: int = 0,
        page: int = PAGE,
        room: int = 0,
        grows: bool = False,
        kernel: str = "torch",
    ) -> None:
        if kernel not in KERNELS:
            raise StoreError(f"Unknown kernel {kernel!r} of a paged store. Available: {list(KERNELS)}.")
        super().__init__(kind, streams, cap=cap, device=device)
        if page < PAGE or page % PAGE:
            raise StoreError(f"page must be a multiple of {PAGE} entries. Got {page}.")
        self.page, self.grows, self.pages, self.kernel = page, grows, pages, kernel
        # entries that no stream has more of: what the read is made ready for
        self.most = room if cap is None else min(room, cap)
        self.buffers = self._pools(pages)
        # of a stream with a cap pages go round, so its row never grows
        self.table = self._whole(streams, self._width() + 1)  # [S, T + 1]; the last takes what has no place
        self.free = torch.arange(pages + 1, dtype=torch.int32, device=self.device)  # [P + 1]; the last as well
        self.n_free = torch.full((), pages, dtype=torch.int64, device=self.device)  # []
        # rows that found no page, since the store was made
        self.lost = torch.zeros((), dtype=torch.int64, device=self.device)  # []
        # entries beyond ``most`` that any stream had at a time, since the store was made
        self.over = torch.zeros((), dtype=torch.int64, device=self.device)  # []

    @property
    def width(self) -> int:
        """T, pages that a stream may hold."""
        return self.table.shape[1] - 1

    def check(self) -> None:
        """Raises StoreError where a row found no page, or a stream had more than a step reads; asks the device."""
        self._refuse(*torch.stack([self.lost, self.over]).tolist())

    def _refuse(self, lost: int, over: int) -> None:
        if over:
            what = f"A stream must have at most the {self.most} entries that reserve made ready for. One had"
            what += f" {self.most + over}, and steps may have left some out"
        elif lost:
            what = f"Every row must find a page. {lost} found none of {self.pages} pages of {self.page} entries"
        else:
            return
        raise StoreError(
            f"{what}: more came than reserve was asked to make sure of. Call reserve before that many steps, and start"
            " from a state saved before."
        )

    def reserve(self, rows: int) -> bool:
        told = torch.cat([self.first, self.past, torch.stack([self.n_free, self.lost, self.over])]).cpu()  # [2 S + 3]
        first, past, free = told[: self.streams], told[self.streams : -3], int(told[-3])
        self._refuse(*told[-2:].tolist())
        held = -(-past // self.page) - first // self.page  # [S]
        most = int((past - first).max()) + rows if self.streams else rows
        most = most if self.cap is None else min(most, self.cap)
        changed = False
        if most > self.most:
            self.most = bucket(most) if self.cap is None else min(bucket(most), self.cap)
            self._widen()
            changed = True
        # a page is given back before one is taken, so no stream holds more in between
        then = (-(-(past + rows) // self.page) - first // self.page).clamp_max(self.width)  # [S]
        short = int((then - held).clamp_min(0).sum()) - free
        if short > 0:
            if not self.grows:
                raise StoreError(
                    f"{rows} more rows of {self.streams} streams must find pages: {free + short} of {self.page} entries"
                    f" each. Got {free} free of {self.pages}. Give the store pages={self.pages + short} or more, a"
                    " smaller cap or fewer streams, or let it grow: grows=True."
                )
            self._add_pages(max(short, self.pages // 2))
            changed = True
        return changed

    def append_(self, rows: Mapping[str, torch.Tensor], accepted: torch.Tensor) -> None:
        self._check_rows(rows, accepted)
        slot = self._placed_by_kernel(accepted) if self.kernel == "triton" else self._placed(accepted)  # [S, J]
        for name, pool in self.buffers.items():
            pool[slot] = rows[name].to(pool.dtype)

    def read(self, queries: torch.Tensor, *, kernels: Kernels, **others: Any) -> StepRead:
        """``Store.read``; the kernel goes through the table, the torch form takes entries side by side."""
        if kernels.read != "triton":
            return super().read(queries, kernels=kernels, **others)
        from hamts.ops.attend_pages import attend_pages

        self._check_channels(queries.shape[2])
        output, marks = attend_pages(queries, pages=self.paged(others.pop("head_bias")), **others)
        return StepRead(output, marks)

    def paged(self, head_bias: torch.Tensor) -> Any:
        """The pages as the step's kernel takes them: ``hamts.ops.decode_triton.Paged``."""
        from hamts.ops.decode_triton import Paged

        return Paged(
            **{name: self.buffers.get(name) for name in ("keys", "values", "bias", "marks", "channel")},  # type: ignore[arg-type]
            table=self.table, first=self.first, past=self.past, head_bias=head_bias.float(), page=self.page,
            most=self.most,
        )  # fmt: skip

    def scratch(self, head_bias: torch.Tensor) -> ScratchKeys:
        slot, there = self._slots(self.most)  # 2 x [S, M]
        since = torch.where(there, 0, NEVER)  # [S, M]
        channel = self.buffers.get("channel")
        return ScratchKeys(
            keys=blank(self.buffers["keys"][slot], there),
            values=blank(self.buffers["values"][slot], there),
            channel=torch.zeros_like(since) if channel is None else blank(channel[slot], there).long(),
            bias=blank(self.buffers["bias"][slot], there)[..., None] + head_bias,
            visible_from=since,
            visible_until=torch.full_like(since, NEVER),
            marks=blank(self.buffers["marks"][slot], there) if "marks" in self.buffers else None,
        )

    def arrays(self) -> dict[str, torch.Tensor]:
        self.check()
        count = self.past - self.first  # [S]
        slot, there = self._slots(int(count.max()) if self.streams else 0)  # 2 x [S, M]
        return {**{name: blank(pool[slot], there) for name, pool in self.buffers.items()}, "count": count}

    def load(self, arrays: Mapping[str, torch.Tensor]) -> bool:
        counts = self._check_arrays(arrays)
        changed = self.allot(torch.tensor(counts, dtype=torch.int64))
        slot, there = self._slots(arrays["bias"].shape[1])  # 2 x [S, M]
        slot = torch.where(there, slot, self.pages * self.page)  # [S, M]
        for name, pool in self.buffers.items():
            pool[slot] = arrays[name].to(pool)
        return changed

    def allot(self, counts: torch.Tensor) -> bool:
        """Hold so many entries of each stream, [S], and nothing else; what their rows hold is up to the caller.

        Returns: as ``reserve``, whether a recorded step must be recorded anew: pages were added, or the step was not
            ready for so many entries.
        """
        E = self.page
        held = -(-counts.cpu() // E)  # [S]
        needed, most = int(held.sum()), int(counts.max()) if self.streams else 0
        before = self.pages
        if needed > self.pages:
            if not self.grows:
                raise StoreError(
                    f"{needed} pages of {E} entries must be there for these streams. Got {self.pages}. Give the store"
                    f" pages={needed} or more, or let it grow: grows=True."
                )
            self._add_pages(needed - self.pages)
        changed = needed > before or most > self.most
        self.most = max(self.most, most)
        self._widen()
        self.table.fill_(self.pages)
        ends = held.cumsum(0)  # [S]
        page = torch.arange(self.width)  # [T]
        rows = torch.where(page < held[:, None], (ends - held)[:, None] + page, self.pages)  # [S, T]
        self.table[:, :-1] = rows.to(self.table)
        left = self.pages - needed
        self.free[:left] = torch.arange(needed, self.pages, dtype=torch.int32, device=self.device)
        self.n_free.fill_(left)
        self.lost.zero_()
        self.over.zero_()
        self.first.zero_()
        self.past.copy_(counts)
        return changed

    # --- inside

    def _placed_by_kernel(self, accepted: torch.Tensor) -> torch.Tensor:
        from hamts.ops.pages_triton import place_rows

        return place_rows(
            accepted, past=self.past, first=self.first, table=self.table, free=self.free, n_free=self.n_free,
            lost=self.lost, over=self.over, pages=self.pages, page=self.page, cap=self.cap, most=self.most,
        )  # fmt: skip

    def _placed(self, accepted: torch.Tensor) -> torch.Tensor:
        """Row of the pools for each row that comes, [S, J]: pages are given back and taken, counts raised."""
        E, T = self.page, self.width
        past = self.past + accepted.sum(1)  # [S]
        first = self._new_first(past)  # [S]
        at_once = (accepted.shape[1] + E - 1) // E
        self._give_back(self.first // E, first // E, at_once)
        self._take(-(-self.past // E), -(-past // E), first // E + T, at_once)
        place = (accepted.cumsum(1) - 1).clamp_min(0)  # [S, J]
        entry = self.past[:, None] + place  # [S, J]
        page = self.table.gather(1, entry // E % T).long() if T else torch.full_like(entry, self.pages)  # [S, J]
        inside = accepted & (entry // E < (first // E + T)[:, None])  # [S, J]
        slot = torch.where(inside, page * E + entry % E, self.pages * E)  # [S, J]
        self.lost += (accepted & (slot >= self.pages * E)).sum()
        self.over.copy_(torch.cat([self.over[None], past - first - self.most]).max())
        self.first.copy_(first)
        self.past.copy_(past)
        return slot

    def _width(self) -> int:
        """Pages that a stream's living entries may touch; without a cap they begin with a page."""
        return -(-self.most // self.page) if self.cap is None else (self.cap + self.page - 2) // self.page + 1

    def _whole(self, *shape: int) -> torch.Tensor:
        return torch.full(shape, self.pages, dtype=torch.int32, device=self.device)

    def _pools(self, pages: int) -> dict[str, torch.Tensor]:
        """Rows of all pages, and of one more that takes what is not kept."""
        rows = (pages + 1) * self.page
        return {
            name: torch.zeros(rows, *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in self.kind.fields().items()
        }

    def _slots(self, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Row of each living entry in the pools, oldest first, and where there is one: 2 x [S, most]."""
        entry = self.first[:, None] + torch.arange(most, device=self.device)  # [S, M]
        there = entry < self.past[:, None]  # [S, M]
        if not self.width or not most:
            return torch.zeros_like(entry), there
        page = self.table.gather(1, entry // self.page % self.width).long()  # [S, M]
        return torch.where(there, page * self.page + entry % self.page, 0), there

    def _give_back(self, before: torch.Tensor, now: torch.Tensor, at_once: int) -> None:
        """Pages from ``before`` up to ``now`` of each stream, [S] each, are free again."""
        if self.cap is None:
            return
        number = before[:, None] + torch.arange(at_once, device=self.device)  # [S, k]
        page = self.table.gather(1, number % self.width).flatten()  # [S k]
        # where none was free nothing was taken, and nothing comes back
        gone = (number < now[:, None]).flatten() & (page < self.pages)  # [S k]
        place = torch.where(gone, self.n_free + gone.cumsum(0) - 1, self.pages)  # [S k]
        self.free.scatter_(0, place, page)
        self.n_free += gone.sum()

    def _take(self, before: torch.Tensor, now: torch.Tensor, end: torch.Tensor, at_once: int) -> None:
        """Free pages for numbers from ``before`` up to ``now`` of each stream, but not beyond ``end``; [S] each."""
        if not self.width:
            return
        number = before[:, None] + torch.arange(at_once, device=self.device)  # [S, k]
        wanted = (number < now[:, None]) & (number < end[:, None])  # [S, k]
        place = self.n_free - wanted.flatten().cumsum(0)  # [S k]
        got = (place >= 0).view_as(wanted)  # [S, k]
        page = torch.where(got, self.free[place.clamp_min(0)].view_as(number), self.pages)  # [S, k]
        column = torch.where(wanted, number % self.width, self.width)  # [S, k]
        self.table.scatter_(1, column, page.to(self.table.dtype))
        self.n_free -= (wanted & got).sum()

    def _widen(self) -> None:
        """Rows of page numbers long enough for ``most`` entries."""
        width = self._width()
        if width > self.width:
            wider = self._whole(self.streams, width + 1)  # [S, T + 1]
            wider[:, : self.width] = self.table[:, :-1]
            self.table = wider

    def _add_pages(self, more: int) -> None:
        before, self.pages = self.pages, self.pages + more
        # nobody's page is another one now
        self.table.masked_fill_(self.table >= before, self.pages)
        larger = self._pools(self.pages)
        for name, pool in self.buffers.items():
            larger[name][: before * self.page] = pool[: before * self.page]
        self.buffers = larger
        free = torch.empty(self.pages + 1, dtype=torch.int32, device=self.device)  # [P + 1]
        # new pages lie below the free ones, so that these are taken first
        fresh = torch.arange(before, self.pages, dtype=torch.int32, device=self.device)
        free[:more], free[more : more + before] = fresh, self.free[:before]
        self.free = free
        self.n_free += more
