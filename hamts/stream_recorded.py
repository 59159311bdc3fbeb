"""A step of a stream recorded once as a CUDA graph and replayed: the host then starts one thing instead of thousands.

A graph knows nothing but the places that it was recorded on. So what a pass reads is copied into tensors that stay,
lists of entries padded to one of few lengths; it takes its rows of the pools from a list of numbers that stays too; and
what it leaves is copied out before it is replayed again. Lists are padded at their beginning: the read starts at a
stream's first living entry, and blanks between old entries and new ones would part its sums otherwise. So the same
kernels run on the same numbers, in the same order; but for more than 64 channels, whose tiles are counted from where a
list begins, and for tokens of several entries, whose lists may be cut into other parts: their sums are rounded apart.

B items · M entries, padded · n rows that a pass takes
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hamts.config import StreamConfig
from hamts.data.constants import sent
from hamts.data.patches import Chunk
from hamts.errors import DataError
from hamts.nn.scratchpad import LayerMemory
from hamts.nn.tokens import Policy, map_tensors
from hamts.ops.compact import recorded_length
from hamts.ops.pool import RowPool
from hamts.reader import HAMNetwork, StreamMemory
from hamts.remembered import flatten_tensors

__all__ = ["Pass", "Recorder", "recorder_of"]

# recordings that are kept: a look ahead and a step of two sizes of blocks
MOST = 4

Tensors = list[torch.Tensor]
# what a pass does on the device: the memory after it, or None, and what is asked of it
Pass = Callable[[Chunk, StreamMemory, Policy], tuple[StreamMemory | None, Tensors]]
# runs what it is given once, or records it; gives what does the same again, into the same tensors
Record = Callable[[Callable[[], Tensors]], Callable[[], None]]


def recorder_of(network: HAMNetwork, config: StreamConfig) -> Recorder | None:
    """What records a stream's steps; None where that is not wanted. Raises DataError E-OPTION where it cannot be."""
    if not config.recorded:
        return None
    mixer = network.config.mixer
    if config.device == "cpu" or config.store != "paged" or not network.kernels.fused or mixer != "ham":
        raise DataError(
            "E-OPTION",
            "recorded=True needs a GPU, store='paged', kernels fla+triton and a model of HAM layers."
            f" Got device={config.device!r}, store={config.store!r}, kernels {network.kernels.name} and {mixer}.",
            fix="device='cuda', store='paged', or recorded=False.",
        )
    return Recorder(len(network.spec.roles) * network.config.entries_per_token)


@dataclass
class Recording:
    """A graph, and the tensors that it reads and writes."""

    replay: Callable[[], None]
    chunk: Chunk
    memory: StreamMemory
    numbers: Tensors  # [n] each: rows that the pass takes of each pool
    after: StreamMemory | None
    asked: Tensors
    sums: list[torch.Tensor | None]  # what each pool noted of what was written


class Recorder:
    """Passes of one patch, by their sizes: run as they are the first time, recorded the second, replayed since.

    Args:
        each: rows that a pass takes of every pool for one item.
        record: how a pass is recorded; None: as a CUDA graph.
    """

    def __init__(self, each: int, record: Record | None = None) -> None:
        self.each, self.record = each, record or _Graphs()
        self.recordings: OrderedDict[Any, Recording | None] = OrderedDict()
        self.replayed = 0

    def __call__(
        self, what: Pass, chunk: Chunk, memory: StreamMemory, policy: Policy
    ) -> tuple[StreamMemory | None, Tensors]:
        """What the pass gives, in tensors that are the caller's."""
        taken = [(pool, pool.used(), pool.take(self.each * len(chunk.values))) for pool in _pools(memory)]
        device = memory.scale.sums.device
        chunk = map_tensors(chunk, lambda tensor: sent(tensor, device))
        key = (what.__name__, id(policy), _sizes(chunk, memory), tuple(map(_place, _pools(memory))))
        if key not in self.recordings:
            # this time as it is, which also makes the kernels ready; it takes its rows itself
            self._forget(key)
            for pool, used, _ in taken:
                pool.give_back(used)
            return what(chunk, memory, policy)
        recording = self.recordings[key]
        self.recordings.move_to_end(key)
        if recording is None:
            numbers = [number.clone() for _, _, number in taken]
            recording = self.recordings[key] = _recorded(self.record, what, chunk, memory, policy, numbers)
        _copy(_leaves(chunk), _leaves(recording.chunk))
        _fill(memory, recording.memory)
        _copy([number for _, _, number in taken], recording.numbers)
        recording.replay()
        self.replayed += 1
        asked = _copies(recording.asked)
        for (pool, used, _), total in zip(taken, _copies(recording.sums), strict=True):
            pool.written = total
            if recording.after is None:
                pool.give_back(used)
        if recording.after is None:
            return None, asked
        # as many places as a launched pass leaves, which hold all that is kept: new entries come behind them
        places = [layer.scratchpad.alive.shape[1] + self.each for layer in memory.layers]
        return _owned(recording.after, _pools(memory), places), asked

    def _forget(self, key: Any) -> None:
        """Make room for another; what was recorded where the pools lay before is of no use."""
        for old in [old for old in self.recordings if old[3] != key[3]]:
            del self.recordings[old]
        self.recordings[key] = None
        while len(self.recordings) > MOST:
            self.recordings.popitem(last=False)


class _Graphs:
    """Records CUDA graphs that share their memory: what they leave is copied out before another runs."""

    def __init__(self) -> None:
        self.pool: Any = None
        self.first: Any = None

    def __call__(self, run: Callable[[], Tensors]) -> Callable[[], None]:
        # what these sizes have kernels compiled, or tuned, for cannot wait while it is recorded
        run()
        if self.first is None:
            # memory without a graph is given up and cannot be recorded into again: one that does nothing stays
            self.pool = torch.cuda.graph_pool_handle()
            self.first = self._captured(lambda: torch.zeros(1, device="cuda"))
        return self._captured(run).replay

    def _captured(self, run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # forecasts may run in other threads meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            run()
        return graph


def _recorded(
    record: Record, what: Pass, chunk: Chunk, memory: StreamMemory, policy: Policy, numbers: Tensors
) -> Recording:
    """A pass on tensors that stay; ``numbers`` are rows that it may write to."""
    own = map_tensors(chunk, torch.clone)
    borrowed = [pool.borrowed(number) for pool, number in zip(_pools(memory), numbers, strict=True)]
    layers = [replace(_roomy(layer), pool=pool) for layer, pool in zip(memory.layers, borrowed, strict=True)]
    still = StreamMemory(layers, map_tensors(memory.scale, torch.clone))
    made: list[tuple[StreamMemory | None, Tensors]] = []

    def run() -> Tensors:
        for pool in borrowed:
            pool.taken = 0
        after, asked = what(own, still, policy)
        made[:] = [(after, asked)]
        return [
            *([] if after is None else _leaves(after)),
            *asked,
            *(p.written for p in borrowed if p.written is not None),
        ]

    replay = record(run)
    after, asked = made[0]
    sums = [pool.written for pool in borrowed]
    # the graph knows where the rows lie; nobody else is to keep them there
    left = None if after is None else _without_pools(after)
    return Recording(replay, own, _without_pools(still), numbers, left, asked, sums)


def _pools(memory: StreamMemory) -> list[RowPool]:
    return [layer.pool for layer in memory.layers if layer.pool is not None]


def _without_pools(memory: StreamMemory) -> StreamMemory:
    return replace(memory, layers=[replace(layer, pool=None) for layer in memory.layers])


def _place(pool: RowPool) -> tuple[Any, ...]:
    return tuple((part.data_ptr(), len(part)) for part in pool.parts.values())


def _leaves(container: Any) -> Tensors:
    return list(flatten_tensors(container).values())


def _room(layer: LayerMemory) -> int:
    return recorded_length(layer.scratchpad.alive.shape[1])


def _sizes(chunk: Chunk, memory: StreamMemory) -> tuple[Any, ...]:
    """Names, kinds and shapes of all that is read, lists of entries by their room."""
    layers = [replace(layer, scratchpad=map_tensors(layer.scratchpad, lambda x: x[:, :0])) for layer in memory.layers]
    found = flatten_tensors(chunk, "chunk") | flatten_tensors(layers, "layers") | flatten_tensors(memory.scale, "scale")
    return tuple(map(_room, memory.layers)), tuple((name, x.dtype, tuple(x.shape)) for name, x in found.items())


def _roomy(layer: LayerMemory) -> LayerMemory:
    """A copy with blank entries at the beginning."""
    room = _room(layer)

    def longer(leaf: torch.Tensor) -> torch.Tensor:
        return torch.cat([leaf.new_zeros(len(leaf), room - leaf.shape[1], *leaf.shape[2:]), leaf], 1)

    return replace(map_tensors(layer, torch.clone), scratchpad=map_tensors(layer.scratchpad, longer))


def _fill(memory: StreamMemory, still: StreamMemory) -> None:
    """Copy a memory to the end of one with more room for entries, and blank what is before it."""
    sources, targets = _leaves(memory), _leaves(still)
    wide = [(t.shape[1] - s.shape[1], t) for s, t in zip(sources, targets, strict=True) if s.shape != t.shape]
    _copy(
        sources,
        [t if s.shape == t.shape else t[:, t.shape[1] - s.shape[1] :] for s, t in zip(sources, targets, strict=True)],
    )
    for blank, target in wide:
        target[:, :blank].zero_()


def _cut(layer: LayerMemory, places: int) -> LayerMemory:
    return replace(layer, scratchpad=map_tensors(layer.scratchpad, lambda leaf: leaf[:, :places]))


def _copy(sources: Tensors, targets: Tensors) -> None:
    """Write some tensors into others of their sizes, many with one launch."""
    pairs = [(source, target) for source, target in zip(sources, targets, strict=True) if target.numel()]
    for kind in dict.fromkeys(target.dtype for _, target in pairs):
        mine = [pair for pair in pairs if pair[1].dtype == kind]
        torch._foreach_copy_([target for _, target in mine], [source for source, _ in mine])


def _copies(tensors: Sequence[torch.Tensor | None]) -> list[Any]:
    there = [tensor for tensor in tensors if tensor is not None]
    made = [torch.empty_like(tensor) for tensor in there]
    _copy(there, made)
    each: Iterator[torch.Tensor] = iter(made)
    return [None if tensor is None else next(each) for tensor in tensors]


def _owned(after: StreamMemory, pools: list[RowPool], places: list[int]) -> StreamMemory:
    """A copy of what a recording leaves, of the real pools, with at most so many places in each layer's list."""
    after = replace(after, layers=[_cut(layer, most) for layer, most in zip(after.layers, places, strict=True)])
    copies = iter(_copies(_leaves(after)))
    memory = map_tensors(after, lambda _: next(copies))
    return replace(memory, layers=[replace(each, pool=pool) for each, pool in zip(memory.layers, pools, strict=True)])
