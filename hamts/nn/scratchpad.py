"""The exact memory: entries kept for good, the window's tokens that still await their decision, the layer's memory.

B items · C channels · N patches · W window patches · H heads · K key · V value · M entries · R marks
J candidates = M + (W + N) C
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

__all__ = ["Entries", "LayerMemory", "Pending", "append_candidates", "empty_memory", "lifetimes", "merge_candidates"]

NEVER = 2**40


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

    def bytes_per_entry(self) -> int:
        """Bytes of one entry, summed over its tensors."""
        return sum(
            getattr(self, f.name)[0, 0].numel() * getattr(self, f.name).element_size()
            if self.alive.shape[1]
            else getattr(self, f.name).shape[2:].numel() * getattr(self, f.name).element_size()
            for f in fields(self)
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


@dataclass(frozen=True)
class LayerMemory:
    """All that one layer knows of the past of B items."""

    state: torch.Tensor  # [B, C, H, K, V]
    conv_tail: torch.Tensor  # [B, C, taps, 3 D] inputs of the short convolution
    error_mean: torch.Tensor  # [B, C, H, 2] running sum of squared error and its weight
    pending: Pending
    scratchpad: Entries


def empty_memory(
    *,
    items: int,
    channels: int,
    heads: int,
    head_width: int,
    window: int,
    taps: int,
    scores: int,
    marks: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LayerMemory:
    """A memory that has read nothing."""

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
        state=zeros(items, channels, heads, head_width, head_width),
        conv_tail=zeros(items, channels, taps, 3 * heads * head_width),
        error_mean=zeros(items, channels, heads, 2),
        pending=pending,
        scratchpad=scratchpad,
    )


def merge_candidates(kept: Entries, local: Entries) -> tuple[Entries, torch.Tensor]:
    """Append newly routed tokens to the kept entries and close the gaps, oldest first.

    Args:
        kept: entries from before, [B, M].
        local: tokens of the window and the chunk in time order, [B, (W + N) C]; ``alive`` says which are routed.

    Returns:
        The merged entries, [B, M'] with M' the largest count of any item, and where each came from in ``local``
        ([B, M'] int64; -1 for entries from before).
    """
    alive = torch.cat([kept.alive, local.alive], dim=1)  # [B, J]
    count = int(alive.sum(dim=1).max()) if alive.shape[1] else 0
    slot = (alive.cumsum(dim=1) - 1).clamp_min(0)  # [B, J]
    source = torch.arange(alive.shape[1], device=alive.device).expand_as(alive)  # [B, J]
    # one column too many takes the writes of dropped candidates
    order = torch.zeros(alive.shape[0], count + 1, dtype=torch.int64, device=alive.device)  # [B, M' + 1]
    order.scatter_(1, torch.where(alive, slot, count), source)
    order = order[:, :count]  # [B, M']
    filled = torch.arange(count, device=alive.device) < alive.sum(dim=1, keepdim=True)  # [B, M']
    merged = {}
    for f in fields(Entries):
        both = torch.cat([getattr(kept, f.name), getattr(local, f.name)], dim=1)  # [B, J, ...]
        index = order.reshape(*order.shape, *(1,) * (both.dim() - 2)).expand(-1, -1, *both.shape[2:])
        merged[f.name] = both.gather(1, index)  # [B, M', ...]
    merged["alive"] = filled
    origin = torch.where(filled, order - kept.alive.shape[1], -1).clamp_min(-1)  # [B, M']
    return Entries(**merged), origin


def append_candidates(kept: Entries, local: Entries) -> tuple[Entries, torch.Tensor]:
    """The kept entries as they are, followed by the routed tokens without gaps between them.

    What ``merge_candidates`` gives, but for padding in the middle: kept rows have no gradient and are not moved.

    Returns:
        Entries, [B, M'], and where each came from in ``local`` ([B, M'] int64; -1 for entries from before).
    """
    nothing = Entries(**{f.name: getattr(kept, f.name)[:, :0] for f in fields(Entries)})
    fresh, origin = merge_candidates(nothing, local)
    joined = Entries(**{f.name: torch.cat([getattr(kept, f.name), getattr(fresh, f.name)], 1) for f in fields(Entries)})
    before = torch.full_like(kept.channel, -1)  # [B, M]
    return joined, torch.cat([before, origin], 1)


def lifetimes(
    entries: Entries, visible_from: torch.Tensor, *, cap_kept: int | None, cap_must: int | None
) -> torch.Tensor:
    """First query that no longer sees each entry, under first-in-first-out eviction of two lists.

    The entry of rank r on its list ends when the entry of rank r + cap appears, so that no list ever exceeds its cap.

    Args:
        visible_from: first query of this chunk that sees the entry, [B, M] int64.

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
        successor = (rank + cap).clamp_max(size)  # [B, M]
        until = torch.where(members, appears.gather(1, successor), until)  # [B, M]
    return until
