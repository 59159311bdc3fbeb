"""Which entries leave a full scratchpad, and when: exact in parallel, as in a stream.

Every rule keeps, of all that appeared on a list so far, the entries with the largest keys, so many as the cap allows:
the newest, the highest scores, random ones. What left never returns, so the rule over all that appeared equals the rule
over what is left, and an entry ends when as many larger keys as the cap have appeared.

B items · M entries · J entries compared with
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hamts.nn.controls import counted_uniform
from hamts.nn.scratchpad import NEVER, Entries, lifetimes
from hamts.nn.tokens import Policy

__all__ = ["EvictionList", "end_times", "eviction_lists", "whole_numbers"]

# scores are compared in whole steps of this size, so that the order of sums does not decide
STEP = 1e-4
LARGEST_KEY = 2.0**31
# comparisons held in memory at once
MOST_PAIRS = 2**24


@dataclass(frozen=True)
class EvictionList:
    """Entries that share a cap."""

    members: torch.Tensor  # [B, M] bool
    cap: torch.Tensor  # [B] int64
    key: torch.Tensor  # [B, M] int64: the lowest leave first, of equal ones the older
    # entries of another list that take room of this one while they live
    lodgers: torch.Tensor | None = None  # [B, M] bool


def whole_numbers(scores: torch.Tensor) -> torch.Tensor:
    """Scores as whole numbers, for comparisons that do not hang on the last digit."""
    return torch.round(scores.double() / STEP).clamp(-LARGEST_KEY, LARGEST_KEY).long()


def end_times(entries: Entries, visible_from: torch.Tensor, policy: Policy, *, fused: bool = False) -> torch.Tensor:
    """First query that no longer sees each entry, [B, M] int64.

    Args:
        visible_from: first query of this chunk that sees the entry, [B, M] int64, rising; the entries' order is that of
            time.
        fused: whether kernels work out the rule of the newest.
    """
    if policy.eviction == "fifo" and policy.tags is None:
        if fused and policy.cap_each is None:
            from hamts.ops.layer_triton_rows import end_rows

            return end_rows(
                entries.must_keep, entries.alive, visible_from, cap_kept=policy.cap_kept, cap_must=policy.cap_must
            )
        room = policy.cap_kept if policy.cap_each is None else _caps(entries, policy)[0]
        return lifetimes(entries, visible_from, cap_kept=room, cap_must=policy.cap_must)
    until = torch.full_like(visible_from, NEVER)  # [B, M]
    if policy.cap_kept is None and policy.cap_must is None and policy.cap_each is None:
        return until
    for group in eviction_lists(entries, policy):
        ends = _ends_of(group, visible_from)  # [B, M]
        until = torch.where(group.members, torch.minimum(until, ends), until)  # [B, M]
    return until


def eviction_lists(entries: Entries, policy: Policy) -> list[EvictionList]:
    """The lists of a layer, each with its cap and the order in which its entries leave."""
    cap_kept, cap_must = _caps(entries, policy)  # 2 x [B]
    must, rest = entries.alive & entries.must_keep, entries.alive & ~entries.must_keep  # 2 x [B, M]
    even = torch.zeros_like(entries.channel)  # [B, M]
    lists = _tag_lists(entries, must, cap_must, policy)
    key = even
    if policy.eviction == "lowest":
        key = whole_numbers(entries.score)  # [B, M]
    elif policy.eviction == "reservoir":
        key = _random_keys(entries, policy)  # [B, M]
    if policy.eviction != "must_last":
        return [*lists, EvictionList(rest, cap_kept, key)]
    return [*lists, EvictionList(rest, cap_kept + cap_must, even, lodgers=_ever_alive(lists, must))]


def _caps(entries: Entries, policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Most entries of each item kept by score and by tag, [B] int64 each."""
    like = entries.alive.long().sum(1)  # [B]
    kept, must = (torch.full_like(like, NEVER if cap is None else cap) for cap in (policy.cap_kept, policy.cap_must))
    if policy.cap_each is not None:
        kept = torch.minimum(kept, policy.cap_each.to(kept.device))  # [B]
    return kept, must


def _tag_lists(entries: Entries, must: torch.Tensor, cap_must: torch.Tensor, policy: Policy) -> list[EvictionList]:
    """One list for each type with a quota of its own, one for all others, by priority."""
    even = torch.zeros_like(entries.channel)  # [B, M]
    if policy.tags is None or entries.tag_type is None or entries.tag_level is None:
        return [EvictionList(must, cap_must, even)]
    lists, left, others = [], cap_must, must
    for number, quota in enumerate(policy.tags.quotas):
        if quota is None:
            continue
        own = must & (entries.tag_type == number)  # [B, M]
        whole = policy.entries_per_token
        cap = torch.floor(cap_must * quota / whole + 1e-9).long() * whole  # [B]
        lists.append(EvictionList(own, cap, even))
        left, others = left - cap, others & ~own
    return [*lists, EvictionList(others, left, whole_numbers(entries.tag_level))]


def _random_keys(entries: Entries, policy: Policy) -> torch.Tensor:
    """A random number per entry, the same whenever it is asked for, [B, M] int64."""
    items = len(entries.alive)
    key = torch.zeros(items, dtype=torch.int64, device=entries.alive.device) if policy.key is None else policy.key
    chance = counted_uniform(0, 0, key.expand(items), entries.position, entries.channel)  # [B, M]
    return (chance * LARGEST_KEY).long()


def _ever_alive(lists: list[EvictionList], must: torch.Tensor) -> torch.Tensor:
    """The must-keep entries that add to how many there are: beyond a list's cap, one more pushes one out. [B, M]."""
    adds = torch.zeros_like(must)  # [B, M]
    for group in lists:
        rank = group.members.cumsum(1)  # [B, M] 1 for the first
        adds |= group.members & (rank <= group.cap[:, None])
    return adds


def _ends_of(group: EvictionList, visible_from: torch.Tensor) -> torch.Tensor:
    """When ``cap`` entries that stand above each have appeared, [B, M]."""
    items, size = group.members.shape
    ends = torch.full_like(visible_from, NEVER)  # [B, M]
    if size == 0:
        return ends
    index = torch.arange(size, device=visible_from.device)  # [M]
    later = torch.cat([visible_from, torch.full_like(visible_from[:, :1], NEVER)], 1)  # [B, M + 1]
    rows = max(1, MOST_PAIRS // max(items * size, 1))
    for low in range(0, size, rows):
        own = slice(low, min(low + rows, size))
        key = group.key[:, own, None]  # [B, m, 1]
        newer = index > index[own, None]  # [m, J]
        above = (group.key[:, None] > key) | ((group.key[:, None] == key) & newer)  # [B, m, J]
        above = above & group.members[:, None]  # [B, m, J]
        if group.lodgers is not None:
            above = above | group.lodgers[:, None]  # [B, m, J]
        short = above.cumsum(-1) < group.cap[:, None, None]  # [B, m, J]
        ends[:, own] = later.gather(1, short.sum(-1))  # [B, m]
    # a cap of nothing ends an entry as it begins
    return torch.where((group.cap > 0)[:, None], ends, visible_from)
