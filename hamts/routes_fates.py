"""What became of kept tokens, told from decisions alone: an arrival at a time, under every eviction rule.

I items · T tokens · L layers · W window patches
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from hamts.nn.controls import counted_uniform
from hamts.nn.eviction import whole_numbers
from hamts.nn.tokens import Policy
from hamts.rollout import Rollout

if TYPE_CHECKING:
    from hamts.routes import Ledger

__all__ = ["Arrivals", "arrivals_of", "eviction_patches", "with_later_tags"]

NEVER = 2**40


@dataclass(frozen=True)
class Arrivals:
    """Tokens that one layer was told to keep, in order of item, patch, channel."""

    item: np.ndarray  # [M] int64
    written: np.ndarray  # [M] int64, patch whose reading brings them to the scratchpad
    must_keep: np.ndarray  # [M] bool
    channel: np.ndarray  # [M] int64
    position: np.ndarray  # [M] float64
    rank: np.ndarray  # [M] float64
    tag_type: np.ndarray  # [M] int64, -1: none
    tag_level: np.ndarray  # [M] float64


def arrivals_of(ledger: Ledger, told: np.ndarray, layer: int, window: int) -> Arrivals:
    """What one layer was told to keep: rows ``told`` of a ledger, [M]."""
    return Arrivals(
        item=ledger.item[told],
        written=ledger.patch[told] + window,
        must_keep=ledger.must_keep[told],
        channel=ledger.channel[told],
        position=ledger.position[told],
        rank=ledger.rank[told, layer],
        tag_type=ledger.tag_type[told],
        tag_level=ledger.tag_level[told],
    )


def with_later_tags(ledger: Ledger, rollout: Rollout, *, channels: int) -> Ledger:
    """A ledger in which tokens are kept, too, for tags of a later chunk that reach back to them."""
    if all(trace.window_must is None for chunk in rollout.traces for trace in chunk.layers):
        return ledger
    size = int(ledger.patch.max(initial=0)) + 2
    keys = (ledger.item * size + ledger.patch) * channels + ledger.channel  # [T] rising
    routed, must = ledger.routed.copy(), ledger.must_keep.copy()
    tag_type, tag_level = ledger.tag_type.copy(), ledger.tag_level.copy()
    for chunk in rollout.traces:
        trace = chunk.layers[0]
        if trace.window_must is None or trace.window_type is None or trace.window_level is None:
            continue
        window = trace.window_must.shape[2]
        b, c, w = trace.window_must.nonzero(as_tuple=True)  # 3 x [R]
        patch = chunk.first_patch[b] - window + w  # [R]
        sought = ((chunk.items[b] * size + patch) * channels + c).numpy()  # [R]
        place = np.searchsorted(keys, sought).clip(max=len(keys) - 1)  # [R]
        there = keys[place] == sought
        place, told = place[there], torch.from_numpy(there)
        routed[place], must[place] = True, True
        tag_type[place] = trace.window_type[b, c, w][told].numpy()
        tag_level[place] = trace.window_level[b, c, w][told].numpy()
    return replace(ledger, routed=routed, must_keep=must, tag_type=tag_type, tag_level=tag_level)


def eviction_patches(arrivals: Arrivals, policy: Policy) -> np.ndarray:
    """Patch whose reading evicts each token, [M]; ``NEVER`` for those that stay."""
    until = np.full(len(arrivals.item), NEVER)
    if policy.cap_kept is None or policy.cap_must is None:
        return until
    keys = _keys(arrivals, policy)
    for item in np.unique(arrivals.item):
        rows = np.flatnonzero(arrivals.item == item)
        lists = _Lists(policy)
        for row in rows:
            name = lists.name_of(bool(arrivals.must_keep[row]), int(arrivals.tag_type[row]))
            for gone in lists.arrive(name, (int(keys[row]), int(row))):
                until[gone] = arrivals.written[row]
    return until


def _keys(arrivals: Arrivals, policy: Policy) -> np.ndarray:
    """What is compared when a list is full, [M] int64: the lowest leaves, of equal ones the older."""
    keys = np.zeros(len(arrivals.item), dtype=np.int64)
    if policy.tags is not None:
        keys = np.where(arrivals.must_keep, whole_numbers(torch.from_numpy(arrivals.tag_level)).numpy(), keys)
        quotas = np.array([quota is not None for quota in policy.tags.quotas] + [False])
        keys = np.where(quotas[arrivals.tag_type], 0, keys)
    rest = np.zeros_like(keys)
    if policy.eviction == "lowest":
        rest = whole_numbers(torch.from_numpy(arrivals.rank)).numpy()
    elif policy.eviction == "reservoir":
        key = torch.zeros(1, dtype=torch.int64) if policy.key is None else policy.key.cpu()
        own = key.expand(int(arrivals.item.max(initial=0)) + 1)[torch.from_numpy(arrivals.item)]  # [M]
        place, channel = torch.from_numpy(arrivals.position)[:, None], torch.from_numpy(arrivals.channel)[:, None]
        rest = (counted_uniform(0, 0, own, place, channel)[:, 0] * 2.0**31).long().numpy()
    return np.where(arrivals.must_keep, keys, rest)


class _Lists:
    """The lists of one layer's scratchpad of one item."""

    def __init__(self, policy: Policy) -> None:
        assert policy.cap_kept is not None and policy.cap_must is not None
        self.shared = policy.eviction == "must_last"
        self.quotas = {} if policy.tags is None else {n: q for n, q in enumerate(policy.tags.quotas) if q is not None}
        self.caps: dict[object, int] = {n: int(policy.cap_must * q + 1e-9) for n, q in self.quotas.items()}
        self.caps["must"] = policy.cap_must - sum(self.caps.values())
        self.caps["kept"] = policy.cap_kept
        self.total = policy.cap_kept + policy.cap_must
        self.heaps: dict[object, list[tuple[int, int]]] = {name: [] for name in self.caps}
        self.rest: deque[int] = deque()

    def name_of(self, must_keep: bool, tag_type: int) -> object:
        if not must_keep:
            return "kept"
        return tag_type if tag_type in self.quotas else "must"

    def arrive(self, name: object, entry: tuple[int, int]) -> list[int]:
        """Who leaves for this one, itself perhaps."""
        gone = []
        if self.shared and name == "kept":
            self.rest.append(entry[1])
        else:
            heap = self.heaps[name]
            heapq.heappush(heap, entry)
            if len(heap) > self.caps[name]:
                gone.append(heapq.heappop(heap)[1])
        if self.shared:
            tagged = sum(len(heap) for heap in self.heaps.values())
            while len(self.rest) > self.total - tagged:
                gone.append(self.rest.popleft())
        return gone
