"""What many streams keep, side by side: padded to the longest list, or in pages that all of them share.

Both take what leaves the windows, forget the oldest beyond a cap, and read one patch of every stream; both give the
same numbers. A step of either has sizes that do not depend on what was routed and waits for nothing, so a CUDA graph
can hold it. The host asks the device once for many steps, in ``reserve``.

S streams · C channels · H heads · K key · V value · R marks · M entries (room) · J rows that come in a step
W window patches
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hamts.ops.compact import append_, bucket
from hamts.ops.kernels import Kernels
from hamts.ops.types import ScratchKeys

__all__ = ["STORES", "EntryKind", "PaddedStore", "StepRead", "Store", "StoreError", "open_store"]

STORES = ("padded", "paged")
NEVER = 2**40
# of a padded list under a cap, what part of it is spare room, at least: it moves as a whole once that has filled
SPARE = 8


class StoreError(ValueError):
    """A store was asked for that is not there, or has no room for what is to come."""


@dataclass(frozen=True)
class EntryKind:
    """What an entry is made of; its bias, and its channel where there are several, are kept beside it."""

    heads: int
    key_width: int
    value_width: int
    marks: int = 0
    channels: int = 1
    dtype: torch.dtype = torch.float32

    def fields(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of one entry."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "keys": ((self.heads, self.key_width), self.dtype),
            "values": ((self.heads, self.value_width), self.dtype),
            "bias": ((), torch.float32),
        }
        if self.marks:
            found["marks"] = ((self.marks,), torch.float32)
        if self.channels > 1:
            found["channel"] = ((), torch.int32)
        return found

    def entry_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.fields().values())


@dataclass(frozen=True)
class StepRead:
    """What one patch of every stream reads."""

    output: torch.Tensor  # [S, 1, C, H, V]
    marks: torch.Tensor | None  # [S, 1, C, H, R]


class Store:
    """Entries of S streams; a stream's are counted from its first one ever, and live from ``first`` up to ``past``.

    Args:
        cap: most living entries of a stream, the oldest leave; None: all stay.
    """

    name = ""
    buffers: dict[str, torch.Tensor]

    def __init__(self, kind: EntryKind, streams: int, *, cap: int | None, device: torch.device | str) -> None:
        if cap is not None and cap < 1:
            raise StoreError(f"cap must be at least 1, or None for no cap. Got {cap}.")
        self.kind, self.streams, self.cap = kind, streams, cap
        self.device = torch.device(device)
        self.first = torch.zeros(streams, dtype=torch.int64, device=self.device)  # [S]
        self.past = torch.zeros(streams, dtype=torch.int64, device=self.device)  # [S]

    # --- what each of them does in its way

    def reserve(self, rows: int) -> bool:
        """See to it that so many more rows of every stream find room. Asks the device, once.

        Returns: whether addresses or sizes are others than before; a recorded step must then be recorded anew.
        """
        raise NotImplementedError

    def append_(self, rows: Mapping[str, torch.Tensor], accepted: torch.Tensor) -> None:
        """Take accepted rows, [S, J, ...] by name, accepted [S, J], in their order; nothing waits for the device."""
        raise NotImplementedError

    def read(
        self,
        queries: torch.Tensor,
        *,
        local_keys: torch.Tensor,
        local_values: torch.Tensor,
        local_marks: torch.Tensor | None,
        local_present: torch.Tensor,
        readable: torch.Tensor,
        channel_bias: torch.Tensor,
        head_bias: torch.Tensor,
        window: int,
        kernels: Kernels,
        cross_span: int = 1,
    ) -> StepRead:
        """One softmax over the window and the store, of one patch: queries [S, 1, C, H, K], local [S, W + 1, C, ...].

        Args:
            head_bias: added to the bias of every entry, [H].
            kernels: what runs the read.
        """
        self._check_channels(queries.shape[2])
        scratch = self.scratch(head_bias)
        got = kernels.attend(
            queries, local_keys=local_keys, local_values=local_values, local_marks=local_marks,
            local_present=local_present, scratch=scratch, readable=readable, channel_bias=channel_bias, window=window,
            cross_span=cross_span,
        )  # fmt: skip
        return StepRead(got.output, got.marks)

    def scratch(self, head_bias: torch.Tensor) -> ScratchKeys:
        """All entries side by side, as the read takes them."""
        raise NotImplementedError

    def arrays(self) -> dict[str, torch.Tensor]:
        """Living entries of every stream, oldest first, [S, M, ...] by name, and their number, ``count`` [S].

        M is the most that any stream has, and padding blank: what is written to disk, by either store the same.
        """
        raise NotImplementedError

    def load(self, arrays: Mapping[str, torch.Tensor]) -> bool:
        """Hold what ``arrays`` gave, of a store of either kind, and nothing else.

        Returns: as ``reserve``, whether a recorded step must be recorded anew.
        """
        raise NotImplementedError

    # --- what they have in common

    def allocated_bytes(self) -> int:
        """Bytes of the rows there is room for."""
        return sum(tensor.nbytes for tensor in self.buffers.values())

    def live_bytes(self) -> int:
        """Bytes of the living entries. Asks the device."""
        return int((self.past - self.first).sum()) * self.kind.entry_bytes()

    def _new_first(self, past: torch.Tensor) -> torch.Tensor:
        """The oldest living entry once there are so many, [S] -> [S]."""
        return self.first if self.cap is None else torch.maximum(self.first, past - self.cap)

    def _check_rows(self, rows: Mapping[str, torch.Tensor], accepted: torch.Tensor) -> None:
        if set(rows) != set(self.buffers):
            raise StoreError(f"rows must have the names {sorted(self.buffers)}. Got {sorted(rows)}.")
        if accepted.ndim != 2 or accepted.shape[0] != self.streams:
            raise StoreError(f"accepted must be [{self.streams} streams, rows]. Got {tuple(accepted.shape)}.")
        if self.cap is not None and accepted.shape[1] > self.cap:
            raise StoreError(
                f"At most cap={self.cap} rows of a stream can come at once. Got {accepted.shape[1]}:"
                " append them in parts."
            )

    def _check_channels(self, asking: int) -> None:
        if asking > 1 and "channel" not in self.buffers:
            raise StoreError(
                f"Entries must say their channel where several ask. Got queries of {asking} channels, and entries of"
                " one: make the store with EntryKind(channels=...)."
            )

    def _check_arrays(self, arrays: Mapping[str, torch.Tensor]) -> list[int]:
        """Entries of each stream, for the host."""
        names = {*self.buffers, "count"}
        if set(arrays) != names:
            raise StoreError(f"arrays must have the names {sorted(names)}. Got {sorted(arrays)}.")
        counts: list[int] = arrays["count"].tolist()
        most = max(counts, default=0)
        if len(counts) != self.streams or (self.cap is not None and most > self.cap):
            raise StoreError(
                f"arrays must hold {self.streams} streams of at most {self.cap} entries."
                f" Got {len(counts)} streams, the longest of {most}."
            )
        return counts


class PaddedStore(Store):
    """A row of buffers for every stream, all with room for the longest; the room doubles, or nearly."""

    name = "padded"

    def __init__(
        self,
        kind: EntryKind,
        streams: int,
        *,
        cap: int | None = None,
        device: torch.device | str = "cpu",
        room: int = 0,
    ) -> None:
        super().__init__(kind, streams, cap=cap, device=device)
        self.buffers = self._blank(bucket(room))

    @property
    def room(self) -> int:
        return self.buffers["bias"].shape[1]

    def reserve(self, rows: int) -> bool:
        first, past = torch.stack([self.first, self.past]).tolist() if self.streams else ([0], [0])
        if max(past) + rows <= self.room:
            return False
        living = max(b - a for a, b in zip(first, past, strict=True))
        # what has left stays in front until there is no room behind; under a cap as much leaves as comes, so room for
        # the rows alone would be used up, and everything moved, at every call
        spare = 0 if self.cap is None else max(rows, living // SPARE)
        self._lay_out(max(living + rows + spare, self.room))
        return True

    def append_(self, rows: Mapping[str, torch.Tensor], accepted: torch.Tensor) -> None:
        self._check_rows(rows, accepted)
        append_(self.buffers, dict(rows), accepted, self.past)
        self.first.copy_(self._new_first(self.past))

    def scratch(self, head_bias: torch.Tensor) -> ScratchKeys:
        index = torch.arange(self.room, device=self.device)  # [M]
        alive = (index >= self.first[:, None]) & (index < self.past[:, None])  # [S, M]
        since = torch.where(alive, 0, NEVER)  # [S, M]
        channel = self.buffers.get("channel")
        return ScratchKeys(
            keys=self.buffers["keys"],
            values=self.buffers["values"],
            channel=torch.zeros_like(since) if channel is None else channel.long(),
            bias=self.buffers["bias"][..., None] + head_bias,
            visible_from=since,
            visible_until=torch.full_like(since, NEVER),
            marks=self.buffers.get("marks"),
        )

    def arrays(self) -> dict[str, torch.Tensor]:
        count = self.past - self.first  # [S]
        most = int(count.max()) if self.streams else 0
        return {**_in_front(self.buffers, self.first, count, most), "count": count}

    def load(self, arrays: Mapping[str, torch.Tensor]) -> bool:
        """``Store.load``; buffers are new ones, always."""
        counts = self._check_arrays(arrays)
        self.buffers = self._blank(bucket(max(counts, default=0)))
        for name, buffer in self.buffers.items():
            buffer[:, : arrays[name].shape[1]] = arrays[name].to(self.device)
        self.first.zero_()
        self.past.copy_(arrays["count"])
        return True

    def _blank(self, room: int) -> dict[str, torch.Tensor]:
        shapes = self.kind.fields().items()
        return {
            name: torch.zeros(self.streams, room, *shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in shapes
        }

    def _lay_out(self, room: int) -> None:
        """Room for so many entries of each stream, the living ones in front."""
        count = self.past - self.first  # [S]
        larger = self._blank(bucket(room))
        width = min(self.room, larger["bias"].shape[1])
        for name, rows in _in_front(self.buffers, self.first, count, width).items():
            larger[name][:, :width] = rows
        self.buffers = larger
        self.past.copy_(count)
        self.first.zero_()


def _in_front(
    buffers: Mapping[str, torch.Tensor], first: torch.Tensor, count: torch.Tensor, most: int
) -> dict[str, torch.Tensor]:
    """Rows of each stream from its first living one on, [S, M, ...] -> [S, most, ...]; padding blank."""
    index = torch.arange(most, device=first.device)  # [most]
    there = index < count[:, None]  # [S, most]
    source = torch.where(there, first[:, None] + index, 0)  # [S, most]
    stream = torch.arange(len(first), device=first.device)[:, None]  # [S, 1]
    if not most:
        return {name: buffer[:, :0] for name, buffer in buffers.items()}
    return {name: blank(buffer[stream, source], there) for name, buffer in buffers.items()}


def blank(rows: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Rows [S, M, ...] where something is, [S, M], else 0."""
    shown = there.reshape(*there.shape, *(1,) * (rows.dim() - 2))
    return torch.where(shown, rows, torch.zeros((), dtype=rows.dtype, device=rows.device))


def open_store(
    store: str,
    kind: EntryKind,
    streams: int,
    *,
    cap: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Store:
    """An empty store, one of ``STORES``; options are those of ``PaddedStore`` or of ``pages.PagedStore``."""
    if store == "padded":
        return PaddedStore(kind, streams, cap=cap, device=device, **options)
    if store == "paged":
        from hamts.ops.pages import PagedStore

        return PagedStore(kind, streams, cap=cap, device=device, **options)
    raise StoreError(f"Unknown store {store!r}. Available: {list(STORES)}.")
