"""Room of carried entries by counts that the host learns late: those of the chunk before, copied while a GPU goes on.

A pass by kernels gives entries all the room that they may need, so that nothing waits. Chunk after chunk that would be
room for every token ever read. So the room is cut between chunks, to the entries that there were one chunk earlier and
as many as one chunk can add: that count has long arrived when it is needed.

L layers
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hamts.nn.rows import ROOM_WITHOUT_ASKING
from hamts.nn.scratchpad import LayerMemory
from hamts.nn.tokens import map_tensors
from hamts.reader import StreamMemory

__all__ = ["LateRoom", "rounded"]

# fewest rows that sizes differ by
STEP = 128


@dataclass(frozen=True)
class _Told:
    """Most entries of an item in each layer, on their way to the host."""

    counts: torch.Tensor  # [L] int64, pinned where they come from a GPU
    arrived: torch.cuda.Event | None

    @staticmethod
    def of(memory: StreamMemory) -> _Told:
        counts = torch.stack([layer.scratchpad.alive.sum(1).max() for layer in memory.layers])  # [L]
        if not counts.is_cuda:
            return _Told(counts, None)
        pinned = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)  # [L]
        pinned.copy_(counts, non_blocking=True)
        arrived = torch.cuda.Event()
        # the copy's stream, which the current device's need not be
        arrived.record(torch.cuda.current_stream(counts.device))
        return _Told(pinned, arrived)

    def read(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.counts.tolist()


class LateRoom:
    """Cuts what chunk after chunk carries; to be called with the memory that each of them leaves, in their order."""

    def __init__(self) -> None:
        self._told: _Told | None = None

    def __call__(self, memory: StreamMemory, candidates: int) -> StreamMemory:
        """The same memory with less room.

        Args:
            candidates: entries that this chunk may have added to an item's.
        """
        rooms = [
            layer.scratchpad.alive.shape[1] if isinstance(layer, LayerMemory) else 0 for layer in memory.layers
        ]  # [L]
        if max(rooms) <= ROOM_WITHOUT_ASKING:
            self._told = None
            return memory
        before, self._told = self._told, _Told.of(memory)
        if before is None:
            return memory
        layers = [
            _cut(layer, min(room, rounded(count + candidates)))
            for layer, room, count in zip(memory.layers, rooms, before.read(), strict=True)
        ]
        return replace(memory, layers=layers)


def rounded(rows: int) -> int:
    """So many rows or up to an eighth more: eight sizes from each power of 2 to the next."""
    step = max(STEP, 2 ** (rows.bit_length() - 4)) if rows > 0 else STEP
    return -(-rows // step) * step


def _cut(layer: LayerMemory, room: int) -> LayerMemory:
    """The same entries, which lie in front, in so many rows."""
    pad = layer.scratchpad
    if room >= pad.alive.shape[1]:
        return layer
    return replace(layer, scratchpad=map_tensors(pad, lambda tensor: tensor[:, :room]))
