"""The exact memory: entries kept for good, the window's tokens that still await their decision, the layer's memory.

B items · C channels · N patches · W window patches · H heads · K key · V value · M entries · R marks
J candidates = M + (W + N) C
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from hamts.nn.rows import RowMove, rows_for
from hamts.nn.tokens import map_tensors
from hamts.ops.pool import RowPool
from hamts.ops.types import ScratchKeys

__all__ = [
    "Carried",
    "Entries",
    "LayerMemory",
    "Pending",
    "append_candidates",
    "append_shared",
    "as_entries",
    "empty_memory",
    "lifetimes",
    "merge_candidates",
]

NEVER = 2**40
# a time, and a level, below every other; finite, so that differences are numbers
LOWEST_LEVEL = -1e18


@dataclass(frozen=True)
class Entries:
    """Kept tokens of every channel of an item, oldest first; rows beyond an item's count are padding."""

    keys: torch.Tensor  # [B, M, H, K]
    values: torch.Tensor  # [B, M, H, V]
    marks: torch.Tensor  # [B, M, R]
    bias: torch.Tensor  # [B, M] added to the logits of every read
    score: torch.Tensor  # [B, M]
    channel: torch.Tensor  # [B, M] int64
    position: torch.Tensor  # [B, M] float64, in patches since the stream's origin
    must_keep: torch.Tensor  # [B, M] bool: on the must-keep list, else on the list kept by score
    alive: torch.Tensor  # [B, M] bool: False for padding
    # of typed tags, where there are any: which type (-1: none), and the logarithm of its priority as it never fades
    tag_type: torch.Tensor | None = None  # [B, M] int64
    tag_level: torch.Tensor | None = None  # [B, M]
    # where the entries lie in a pool that all items share; keys, values and marks are then of no width
    rows: torch.Tensor | None = None  # [B, M] int64

    def held(self, pool: RowPool | None) -> Entries:
        """These candidates, those that are alive written into a pool; as they are where there is none."""
        if pool is None:
            return self
        parts = {name: getattr(self, name) for name in pool.parts}
        rows = pool.hold(parts, self.alive, asks=not self.alive.is_cuda)  # [B, M]
        return replace(self, keys=self.keys[..., :0], values=self.values[..., :0], marks=self.marks[..., :0], rows=rows)

    def as_keys(
        self, pool: RowPool | None, *, head_bias: torch.Tensor, since: torch.Tensor, until: torch.Tensor
    ) -> ScratchKeys:
        """As the read takes them: seen from query ``since`` to before ``until``, [B, M] each; head_bias [H]."""
        wide = (self.keys, self.values, self.marks)
        if pool is not None:
            wide = (pool.parts["keys"], pool.parts["values"], pool.parts["marks"])
        return ScratchKeys(
            keys=wide[0],
            values=wide[1],
            channel=self.channel,
            bias=self.bias[..., None] + head_bias,
            visible_from=torch.where(self.alive, since, NEVER),
            visible_until=until,
            marks=wide[2],
            rows=self.rows,
        )

    def bytes_per_entry(self) -> int:
        """Bytes of one entry, summed over its tensors."""
        return sum(
            getattr(self, f.name)[0, 0].numel() * getattr(self, f.name).element_size()
            if self.alive.shape[1]
            else getattr(self, f.name).shape[2:].numel() * getattr(self, f.name).element_size()
            for f in fields(self)
            if getattr(self, f.name) is not None
        )


@dataclass(frozen=True)
class Pending:
    """The last W patches of every channel: read exactly, not yet decided."""

    keys: torch.Tensor  # [B, W, C, H, K]
    values: torch.Tensor  # [B, W, C, H, V]
    marks: torch.Tensor  # [B, W, C, R]
    bias: torch.Tensor  # [B, W, C]
    scores: torch.Tensor  # [B, W, C, S] one per score router
    position: torch.Tensor  # [B, W] float64
    present: torch.Tensor  # [B, W, C] bool
    routable: torch.Tensor  # [B, W, C] bool
    must_keep: torch.Tensor  # [B, W, C] bool
    # asked for by each score router under a threshold that moves; what lies below it now may have been above it then
    asked: torch.Tensor | None = None  # [B, W, C, S] bool
    tag_type: torch.Tensor | None = None  # [B, W, C] int64, of typed tags
    tag_level: torch.Tensor | None = None  # [B, W, C]
    markable: torch.Tensor | None = None  # [B, W, C] bool: a later tag may keep it
    # of every step, where steps become entries: value, whether it was observed, whether it was tagged
    steps: torch.Tensor | None = None  # [B, W, C, P, 3]

    def after(self, earlier: Pending, markable: torch.Tensor | None) -> Pending:
        """These tokens of a chunk behind those of the window, [B, W + N, C, ...].

        Keys and values, the widest, come with the window's already. What only the window's tokens have, for moving
        thresholds and typed tags, starts empty here; markable [B, C, N].
        """
        grid = self.must_keep  # [B, N, C]
        marks = self.routable if markable is None else markable.transpose(1, 2)  # [B, N, C]
        blank = {
            "asked": lambda: torch.zeros_like(self.scores, dtype=torch.bool),  # [B, N, C, S]
            "tag_type": lambda: torch.full_like(grid, -1, dtype=torch.int64),
            "tag_level": lambda: torch.full_like(grid, LOWEST_LEVEL, dtype=torch.float64),
            "markable": lambda: marks,
        }
        joined: dict[str, Any] = {}
        for f in fields(Pending):
            before = getattr(earlier, f.name)
            if f.name in ("keys", "values"):
                joined[f.name] = getattr(self, f.name)
            elif before is None:
                joined[f.name] = None
            else:
                own = blank[f.name]() if f.name in blank else getattr(self, f.name)
                joined[f.name] = torch.cat([before, own], dim=1)  # [B, W + N, C, ...]
        return Pending(**joined)


@dataclass(frozen=True)
class Carried:
    """What routing remembers from chunk to chunk; None for what the configuration does not need."""

    expected: torch.Tensor | None = None  # [B, C, P, Q] of the next patch, by the inner head
    expected_known: torch.Tensor | None = None  # [B, C] bool
    streams: torch.Tensor | None = None  # [B, C, S, 3] weight, sum and sum of squares of each stream's scores
    write_scale: torch.Tensor | None = None  # [B, C, H, 2] running logarithm of the residual's size, and its weight
    threshold: torch.Tensor | None = None  # [B, S, 3] shift, usage above what was asked for, of how many tokens
    block: torch.Tensor | None = None  # [B] int64 number of the 64 patches that usage is of, -1: none
    tagged: torch.Tensor | None = None  # [B, K] float64 position of the last tag of each type, -1e18: none


@dataclass(frozen=True)
class LayerMemory:
    """All that one layer knows of the past of B items."""

    state: torch.Tensor  # [B, C, H, G, G]; G is K unless the state has a width of its own
    conv_tail: torch.Tensor  # [B, C, taps, 3 H G] inputs of the short convolution
    error_mean: torch.Tensor  # [B, C, H, 2] running sum of squared error and its weight
    pending: Pending
    scratchpad: Entries
    carried: Carried = Carried()
    # where the scratchpad's entries lie, for items that share a pool
    pool: RowPool | None = None

    def side_by_side(self) -> LayerMemory:
        """The same memory, its entries out of the pool: what a pass of several patches reads."""
        pad = self.scratchpad
        if self.pool is None or pad.rows is None:
            return self
        wide = {name: self.pool.parts[name][pad.rows] for name in ("keys", "values", "marks")}  # [B, M, ...]
        return replace(self, scratchpad=replace(pad, **wide, rows=None), pool=None)


def empty_memory(
    *,
    items: int,
    channels: int,
    heads: int,
    head_width: int,
    state_width: int,
    window: int,
    taps: int,
    scores: int,
    marks: int,
    dtype: torch.dtype,
    device: torch.device,
    carried: Carried,
) -> LayerMemory:
    """A memory that has read nothing; ``carried`` is what its routing remembers of nothing."""

    def zeros(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=kind, device=device)

    pending = Pending(
        keys=zeros(items, window, channels, heads, head_width),
        values=zeros(items, window, channels, heads, head_width),
        marks=zeros(items, window, channels, marks),
        bias=zeros(items, window, channels),
        scores=zeros(items, window, channels, scores),
        position=zeros(items, window, kind=torch.float64),
        present=zeros(items, window, channels, kind=torch.bool),
        routable=zeros(items, window, channels, kind=torch.bool),
        must_keep=zeros(items, window, channels, kind=torch.bool),
    )
    scratchpad = Entries(
        keys=zeros(items, 0, heads, head_width),
        values=zeros(items, 0, heads, head_width),
        marks=zeros(items, 0, marks),
        bias=zeros(items, 0),
        score=zeros(items, 0),
        channel=zeros(items, 0, kind=torch.int64),
        position=zeros(items, 0, kind=torch.float64),
        must_keep=zeros(items, 0, kind=torch.bool),
        alive=zeros(items, 0, kind=torch.bool),
    )
    return LayerMemory(
        state=zeros(items, channels, heads, state_width, state_width),
        conv_tail=zeros(items, channels, taps, 3 * heads * state_width),
        error_mean=zeros(items, channels, heads, 2),
        pending=pending,
        scratchpad=scratchpad,
        carried=carried,
    )


def merge_candidates(
    kept: Entries, local: Entries, *, most: int | None = None, fused: bool = False
) -> tuple[Entries, torch.Tensor]:
    """Append newly routed tokens to the kept entries and close the gaps, oldest first.

    Args:
        kept: entries from before, [B, M].
        local: tokens of the window and the chunk in time order, [B, N C]; ``alive`` says which are routed.
        most: more than so many are never alive in an item; None: all may be.
        fused: whether kernels move wide rows, and read them without their padding.

    Returns:
        The merged entries, [B, M'], and where each came from in ``local`` ([B, M'] int64; -1 for entries from before
        and padding). M' is the largest count of any item, or more where asking for it would wait for the device.
    """
    alive = torch.cat([kept.alive, local.alive], dim=1)  # [B, J]
    moved = RowMove.closing(alive, rows_for(alive, most, skips_padding=fused), fused=fused)
    merged = {}
    for f in fields(Entries):
        if getattr(local, f.name) is None:
            continue
        before, own = getattr(kept, f.name), getattr(local, f.name)
        merged[f.name] = moved(torch.cat([before, own], dim=1) if before.shape[1] else own)  # [B, M', ...]
    merged["alive"] = moved.filled
    origin = torch.where(moved.filled, moved.source - kept.alive.shape[1], -1).clamp_min(-1)  # [B, M']
    return Entries(**merged), origin


def append_candidates(kept: Entries, local: Entries, *, fused: bool = False) -> tuple[Entries, torch.Tensor]:
    """The kept entries as they are, followed by the routed tokens without gaps between them.

    What ``merge_candidates`` gives, but for padding in the middle: kept rows have no gradient and are not moved.

    Returns:
        Entries, [B, M'], and where each came from in ``local`` ([B, M'] int64; -1 for entries from before).
    """
    fresh, origin = merge_candidates(map_tensors(kept, lambda tensor: tensor[:, :0]), local, fused=fused)
    return _behind(kept, fresh, origin)


def append_shared(kept: Entries, local: Entries) -> tuple[Entries, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``append_candidates`` by kernels, for tokens whose keys and values are read where they lie as well.

    Returns:
        Entries and origin; also keys and values of all tokens, [B, N C, ...], for the other reader.
    """
    moved = RowMove.closing(local.alive, rows_for(local.alive, skips_padding=True), fused=True)
    (same_keys, keys), (same_values, values) = moved.shared(local.keys), moved.shared(local.values)
    names = [f.name for f in fields(Entries) if getattr(local, f.name) is not None]
    rest = {name: moved(getattr(local, name)) for name in names if name not in ("keys", "values", "alive")}
    fresh = Entries(keys=keys, values=values, alive=moved.filled, **rest)
    origin = torch.where(moved.filled, moved.source, -1)  # [B, M']
    return *_behind(kept, fresh, origin), same_keys, same_values


def _behind(kept: Entries, fresh: Entries, origin: torch.Tensor) -> tuple[Entries, torch.Tensor]:
    """New entries behind those from before, and where each came from."""
    if kept.alive.shape[1] == 0:
        return fresh, origin
    names = [f.name for f in fields(Entries) if getattr(kept, f.name) is not None]
    joined = Entries(**{name: torch.cat([getattr(kept, name), getattr(fresh, name)], 1) for name in names})
    before = torch.full_like(kept.channel, -1)  # [B, M]
    return joined, torch.cat([before, origin], 1)


def as_entries(local: Pending, routed: torch.Tensor, rank: torch.Tensor, use_tags: bool) -> Entries:
    """Tokens of the window and the chunk as candidates, time first, then channel: every field [B, L C, ...].

    routed and rank [B, L, C]; the rank is what eviction by score compares.
    """
    B, L, C = routed.shape
    channel = torch.arange(C, device=routed.device).expand(B, L, C)  # [B, L, C]
    return Entries(
        keys=local.keys.flatten(1, 2),
        values=local.values.flatten(1, 2),
        marks=local.marks.flatten(1, 2),
        bias=local.bias.flatten(1, 2),
        score=rank.flatten(1, 2),
        channel=channel.flatten(1, 2),
        position=local.position[:, :, None].expand(B, L, C).flatten(1, 2),
        must_keep=(local.must_keep & use_tags).flatten(1, 2),
        alive=routed.flatten(1, 2),
        tag_type=None if local.tag_type is None else local.tag_type.flatten(1, 2),
        tag_level=None if local.tag_level is None else local.tag_level.flatten(1, 2),
    )


def lifetimes(
    entries: Entries, visible_from: torch.Tensor, *, cap_kept: int | torch.Tensor | None, cap_must: int | None
) -> torch.Tensor:
    """First query that no longer sees each entry, under first-in-first-out eviction of two lists.

    The entry of rank r on its list ends when the entry of rank r + cap appears, so that no list ever exceeds its cap.

    Args:
        visible_from: first query of this chunk that sees the entry, [B, M] int64.
        cap_kept, cap_must: most entries of each list; None for no cap; the first may be of each item, [B] int64.

    Returns:
        [B, M] int64.
    """
    until = torch.full_like(visible_from, NEVER)  # [B, M]
    for members, cap in ((entries.must_keep, cap_must), (~entries.must_keep, cap_kept)):
        members = members & entries.alive  # [B, M]
        size = members.shape[1]
        if cap is None or size == 0:
            continue
        rank = (members.cumsum(dim=1) - 1).clamp_min(0)  # [B, M]
        appears = torch.full((members.shape[0], size + 1), NEVER, device=members.device)  # [B, M + 1]
        appears.scatter_(1, torch.where(members, rank, size), visible_from)
        # the spare column took the writes of the other list
        appears[:, size] = NEVER
        ahead = cap[:, None] if isinstance(cap, torch.Tensor) else cap
        successor = (rank + ahead).clamp_max(size)  # [B, M]
        until = torch.where(members, appears.gather(1, successor), until)  # [B, M]
    return until
