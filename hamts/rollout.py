"""Run a network along streams: read the past once, and forecast at any number of cutoffs, on copies of the memory.

Used by prediction, cross-validation, evaluation and the checks while fitting: all of them see the same forecasts.

B items side by side · I items · C channels · G targets · N patches · P steps in a patch · F future steps · Q quantiles
X cutoffs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from hamts.data.patches import Chunk, PatchStore
from hamts.nn.ham import LayerTrace
from hamts.nn.tokens import Policy, map_tensors
from hamts.ops.kernels import launched_on
from hamts.reader import HAMNetwork, StreamMemory
from hamts.rollout_room import LateRoom

__all__ = ["ChunkTrace", "Rollout", "forecast_from", "join_memories", "roll", "stack_memories", "stack_trees"]

CHUNK_PATCHES = 64
ITEMS_SIDE_BY_SIDE = 64
HORIZONS_SIDE_BY_SIDE = 128


@dataclass(frozen=True)
class ChunkTrace:
    """Decisions about one chunk of the past."""

    items: torch.Tensor  # [B] int64
    first_patch: torch.Tensor  # [B] int64, on each item's grid; negative ones are absent
    layers: list[LayerTrace]
    heard: torch.Tensor  # [B, C, N]


@dataclass
class Rollout:
    """Result of ``roll``."""

    quantiles: np.ndarray  # [X, G, F, Q] float64, in the user's units
    scale: np.ndarray  # [X, G] float64, the stream's scale at each cutoff
    memory: StreamMemory | None  # of all items, at their ends
    traces: list[ChunkTrace] = field(default_factory=list)
    kept: int = 0
    heard: int = 0

    @property
    def usage_share(self) -> float:
        """Written / observed tokens, over layers, channels and items."""
        return self.kept / max(self.heard, 1)


@torch.no_grad()
def roll(
    network: HAMNetwork,
    store: PatchStore,
    *,
    cutoffs: Sequence[np.ndarray],
    steps: int,
    policies: Policy | Sequence[Policy],
    starts: np.ndarray | None = None,
    ends: np.ndarray | None = None,
    memory: StreamMemory | None = None,
    reveal_events: bool = False,
    keep_traces: bool | Callable[[ChunkTrace], ChunkTrace] = False,
    chunk_patches: int = CHUNK_PATCHES,
    held_bytes: int = 0,
) -> Rollout:
    """Read every item to its end and forecast at its cutoffs.

    Args:
        cutoffs: for each item, rising observed-step counts at which to forecast; may be empty, [I] arrays.
        steps: F, steps to forecast at each.
        policies: one for all layers, or one per layer; ``share`` has one entry per item or a single one.
        starts: patch (on the item's grid) to start reading from, [I]; None: the first stored.
        ends: observed steps of each item to stop reading at, [I]; None: all. No cutoff may lie beyond.
        memory: memory of all items before ``starts``; None: empty.
        reveal_events: whether event columns beyond the cutoff are known.
        keep_traces: whether decisions are kept; or what is kept of them.
        held_bytes: copies of memories that may wait, so that forecasts of several moments are made side by side.

    Returns:
        Forecasts in the order of items, then cutoffs.
    """
    network.eval()
    begin = store.first_patch.numpy() if starts is None else np.asarray(starts)  # [I]
    steps_read = store.lengths.numpy() if ends is None else np.asarray(ends)  # [I]
    stop = (store.lead.numpy() + steps_read) // store.patch_steps  # [I] complete patches
    _check_cutoffs(store, cutoffs, begin, steps_read, steps)
    counts = [len(c) for c in cutoffs]
    G, Q = len(network.spec.targets), len(network.config.quantiles)
    result = Rollout(
        quantiles=np.full((sum(counts), G, steps, Q), np.nan),  # [X, G, F, Q]
        scale=np.full((sum(counts), G), np.nan),  # [X, G]
        memory=None,
    )
    reader = _Reader(
        network=network,
        store=store,
        steps=steps,
        policies=[replace(p, masses=p.masses and bool(keep_traces)) for p in _per_layer(network, policies)],
        cutoffs=cutoffs,
        places=np.concatenate([[0], np.cumsum(counts)]),
        result=result,
        reveal_events=reveal_events,
        keep_traces=keep_traces,
        chunk_patches=chunk_patches,
        held_bytes=held_bytes,
    )
    parts: list[tuple[np.ndarray, StreamMemory]] = []
    for group in _groups(stop - begin, mixed=memory is None):
        items = torch.from_numpy(group).to(network.unit.device)
        before = network.empty_memory(len(group)) if memory is None else memory.select(items)
        with launched_on(network.unit.device):
            parts.append((group, reader.read(group, begin[group], stop[group], before)))
    result.memory = join_memories(parts)
    result.kept, result.heard = (int(torch.stack(x).sum()) if x else 0 for x in (reader.kept, reader.heard))
    return result


def _check_cutoffs(
    store: PatchStore, cutoffs: Sequence[np.ndarray], begin: np.ndarray, end: np.ndarray, steps: int
) -> None:
    """Every cutoff must lie where its item is read, and leave room for its horizon in the store."""
    lead, P = store.lead.numpy(), store.patch_steps
    room = (store.first_patch.numpy() + store.row_count.numpy()) * P - lead  # [I] steps
    for item, cuts in enumerate(cutoffs):
        if len(cuts) == 0:
            continue
        if (lead[item] + cuts[0]) // P < begin[item] or cuts[-1] > end[item] or cuts[-1] + steps > room[item]:
            raise ValueError(
                f"Cutoffs must lie between the first and the last step read, {steps} steps before the store's end."
                f" Got {int(cuts[0])} to {int(cuts[-1])} for item {item}, which is read from patch {int(begin[item])}"
                f" to step {int(end[item])} and stored to step {int(room[item])}. Build it with more extra_steps."
            )


def _per_layer(network: HAMNetwork, policies: Policy | Sequence[Policy]) -> list[Policy]:
    many = [policies] * network.config.layers if isinstance(policies, Policy) else list(policies)
    return [map_tensors(policy, lambda tensor: tensor.to(network.unit.device)) for policy in many]


def _groups(patches: np.ndarray, *, mixed: bool) -> Iterator[np.ndarray]:
    """Items to read side by side, of like length, so that less is read that is absent.

    Absent patches come before an empty memory only: they would push the window, the conv tail and the running sums of
    a given one out. Not ``mixed``: of equal length.
    """
    order = np.argsort(patches, kind="stable")
    cuts = [] if mixed else (np.flatnonzero(np.diff(patches[order])) + 1).tolist()
    for part in np.split(order, cuts):
        for low in range(0, len(part), ITEMS_SIDE_BY_SIDE):
            yield np.sort(part[low : low + ITEMS_SIDE_BY_SIDE])


@dataclass(frozen=True)
class _Stop:
    """A forecast to be made when a group has been read up to some boundary."""

    row: int  # in the group
    cutoff: int  # observed steps
    place: int  # in the answer


@dataclass(frozen=True)
class _Held:
    """Forecasts that wait to be made together, each with a copy of the memory as it was at its boundary."""

    stops: tuple[_Stop, ...] = ()
    memories: list[StreamMemory] = field(default_factory=list)
    bytes: int = 0

    def joined(self, stops: list[_Stop], memory: StreamMemory) -> _Held:
        """These, and some that share a boundary."""
        rows = torch.tensor([stop.row for stop in stops], device=memory.scale.sums.device)
        copy = memory.select(rows)
        size = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal size
            size += tensor.numel() * tensor.element_size()
            return tensor

        map_tensors(copy, count)
        return _Held((*self.stops, *stops), [*self.memories, copy], self.bytes + size)


@dataclass(frozen=True)
class _Reader:
    """What is the same for all groups of one ``roll``."""

    network: HAMNetwork
    store: PatchStore
    steps: int
    policies: list[Policy]
    cutoffs: Sequence[np.ndarray]
    places: np.ndarray  # [I + 1] where each item's forecasts begin in the answer
    result: Rollout
    reveal_events: bool
    keep_traces: bool | Callable[[ChunkTrace], ChunkTrace]
    chunk_patches: int
    held_bytes: int
    # numbers stay where they are until all is read: asking for one waits for the device
    kept: list[torch.Tensor] = field(default_factory=list)
    heard: list[torch.Tensor] = field(default_factory=list)

    def read(self, group: np.ndarray, begin: np.ndarray, ends: np.ndarray, memory: StreamMemory) -> StreamMemory:
        """Read items side by side, aligned at their ends, and forecast on the way; the memory at the ends."""
        longest = int((ends - begin).max()) if len(group) else 0
        shift = ends - longest  # [B] patch of each item's grid at aligned index 0
        stops = self._stops(group, shift)
        policies = [_policy_rows(p, group) for p in self.policies]
        held, room = _Held(), LateRoom()
        tokens = len(self.network.spec.roles) * self.network.config.entries_per_token
        at = 0
        for boundary in sorted({*stops, longest}):
            while at < boundary:
                size = min(self.chunk_patches, boundary - at)
                memory = room(self._advance(group, shift + at, begin, size, memory, policies), size * tokens)
                at += size
            waiting = stops.get(boundary, [])
            for low in range(0, len(waiting), HORIZONS_SIDE_BY_SIDE):
                part = waiting[low : low + HORIZONS_SIDE_BY_SIDE]
                if len(held.stops) + len(part) > HORIZONS_SIDE_BY_SIDE:
                    held = self._forecast(group, held, policies)
                held = held.joined(part, memory)
                if held.bytes >= self.held_bytes:
                    held = self._forecast(group, held, policies)
        self._forecast(group, held, policies)
        return memory

    def _stops(self, group: np.ndarray, shift: np.ndarray) -> dict[int, list[_Stop]]:
        """By aligned boundary, what is to be forecast there."""
        stops: dict[int, list[_Stop]] = {}
        for row, item in enumerate(group):
            for k, cutoff in enumerate(self.cutoffs[item]):
                patch = (int(self.store.lead[item]) + int(cutoff)) // self.store.patch_steps
                stop = _Stop(row, int(cutoff), int(self.places[item]) + k)
                stops.setdefault(patch - int(shift[row]), []).append(stop)
        return stops

    def _advance(
        self,
        group: np.ndarray,
        first: np.ndarray,
        begin: np.ndarray,
        size: int,
        memory: StreamMemory,
        policies: list[Policy],
    ) -> StreamMemory:
        """Read the next patches of every item of the group."""
        items, start = torch.from_numpy(group), torch.from_numpy(first)  # [B], [B]
        chunk = _hide_before(self.store.window(items, start, size), start, torch.from_numpy(begin))
        reading = self.network(chunk, memory, policies, decode=False)
        for trace in reading.traces:
            self.kept.append((trace.routed & (reading.heard > 0)).sum())
            if trace.revised is not None:
                self.kept.append(trace.revised.sum())
            self.heard.append((reading.heard > 0).sum())
        if self.keep_traces:
            trace = ChunkTrace(items, start, reading.traces, reading.heard)
            self.result.traces.append(trace if self.keep_traces is True else self.keep_traces(trace))
        return reading.memory

    def _forecast(self, group: np.ndarray, held: _Held, policies: list[Policy]) -> _Held:
        """Forecast what waits, on its copies of the memory; nothing waits afterwards."""
        if not held.stops:
            return held
        rows = np.array([stop.row for stop in held.stops])  # [B]
        cutoffs = torch.tensor([stop.cutoff for stop in held.stops])  # [B]
        places = [stop.place for stop in held.stops]
        quantiles, scale = forecast_from(
            self.network,
            self.store,
            torch.from_numpy(group[rows]),
            cutoffs,
            held.memories[0] if len(held.memories) == 1 else stack_memories(held.memories),
            self.steps,
            [_policy_rows(p, rows) for p in policies],
            reveal_events=self.reveal_events,
        )
        self.result.quantiles[places] = quantiles.cpu().numpy()
        self.result.scale[places] = scale.cpu().numpy()
        return _Held()


@torch.no_grad()
def forecast_from(
    network: HAMNetwork,
    store: PatchStore,
    items: torch.Tensor,
    cutoffs: torch.Tensor,
    memory: StreamMemory,
    steps: int,
    policies: Policy | Sequence[Policy],
    *,
    reveal_events: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Forecast from given memories, which stay as they are.

    Args:
        items, cutoffs: [B] int64; rows may repeat, for instance with one entry of the memory removed in each.
        memory: of B rows, each having read exactly the complete patches before its cutoff.

    Returns:
        Quantiles in the user's units, [B, G, F, Q], and the stream's scale at the cutoff, [B, G]; both float64.
    """
    reveal = torch.full((len(items),), reveal_events)
    chunk = store.horizon(items, cutoffs, steps, reveal)
    with launched_on(network.unit.device):
        reading = network(chunk, memory, [_uncapped(p) for p in _per_layer(network, policies)], advance=False)
    assert chunk.horizon is not None
    values = reading.unscaled().flatten(2, 3)  # [B, G, N P, Q]
    wanted = chunk.horizon.flatten(1).to(values.device)  # [B, N P]; F steps of each
    picked = values.transpose(1, 2)[wanted].view(len(items), steps, *values.shape[1:2], -1)  # [B, F, G, Q]
    return picked.transpose(1, 2), reading.scale[:, :, -1]


def _hide_before(chunk: Chunk, first: torch.Tensor, begin: torch.Tensor) -> Chunk:
    """Patches before an item's start are absent, also where the store holds them (they were read already)."""
    index = first[:, None] + torch.arange(chunk.present.shape[1])  # [B, N]
    present = chunk.present & (index >= begin[:, None])  # [B, N]
    if bool((present == chunk.present).all()):
        return chunk
    there = present[:, None, :, None]  # [B, 1, N, 1]
    return replace(
        chunk,
        values=torch.where(there, chunk.values, 0.0),
        observed=chunk.observed & there,
        tags=chunk.tags & there,
        complete=chunk.complete & present[:, None],
        present=present,
    )


def _uncapped(policy: Policy) -> Policy:
    """Entries of the forecast's own tokens live outside the cap, and are those that the model itself asks for."""
    return replace(policy, cap_kept=None, cap_must=None, cap_each=None, control=None)


def _policy_rows(policy: Policy, rows: np.ndarray) -> Policy:
    """A policy for some items; one that holds for a single item holds for all."""
    shared = len(policy.share) == 1
    index = torch.zeros(len(rows), dtype=torch.int64) if shared else torch.from_numpy(np.asarray(rows))
    return map_tensors(policy, lambda tensor: tensor[index])


def join_memories(parts: list[tuple[np.ndarray, StreamMemory]]) -> StreamMemory:
    """Memories of groups of items as one, in the order of items; shorter scratchpads are padded."""
    joined = stack_memories([memory for _, memory in parts])
    order = torch.from_numpy(np.argsort(np.concatenate([group for group, _ in parts])))
    return joined.select(order.to(joined.scale.sums.device))


def stack_memories(memories: list[StreamMemory]) -> StreamMemory:
    """Memories side by side, [B1 + B2 + ..., ...]; shorter scratchpads are padded with entries that are not alive."""
    layers = [stack_trees(list(parts)) for parts in zip(*(memory.layers for memory in memories), strict=True)]
    return StreamMemory(layers, stack_trees([memory.scale for memory in memories]))


def _pad_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    missing = rows - tensor.shape[1]
    if missing == 0:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], 1)


def stack_trees(parts: list[Any]) -> Any:
    """Concatenate like trees of tensors along items; rows of entries are padded to the most of any part."""
    if parts[0] is None:
        return None
    if isinstance(parts[0], torch.Tensor):
        most = max(part.shape[1] for part in parts) if parts[0].dim() > 1 else 0
        return torch.cat([_pad_rows(part, most) for part in parts] if most else parts)
    names = type(parts[0]).__dataclass_fields__
    return type(parts[0])(**{name: stack_trees([getattr(part, name) for part in parts]) for name in names})
