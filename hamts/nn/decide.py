"""From scores to decisions: what a layer keeps of the tokens in its window and its chunk.

B items · C channels · N patches · L = W + N tokens of the window and the chunk · S score routers · K tag types
P steps in a patch · Q quantiles · H heads
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hamts.nn.budget import ThresholdTable
from hamts.nn.controllers import track_thresholds
from hamts.nn.router import Router
from hamts.nn.scratchpad import LOWEST_LEVEL, Carried, Entries, LayerMemory, Pending
from hamts.nn.tags import mark_tagged
from hamts.nn.tokens import Policy, Tokens

__all__ = ["Decision", "decide", "prepared"]


@dataclass(frozen=True)
class Decision:
    """What is asked for and what goes to the scratchpad."""

    local: Pending  # [B, L, C, ...] with what tags say
    asked: torch.Tensor  # [B, L, C, S] bool: by each score router
    routed: torch.Tensor  # [B, L, C] bool
    rank: torch.Tensor  # [B, L, C] what eviction by score compares
    threshold: torch.Tensor  # [B, S] of the trained table
    online: torch.Tensor | None  # [B, N, S] thresholds, where they moved
    revised: torch.Tensor | None  # [B, W, C] bool: kept after all, because of a tag of this chunk
    carried: Carried


def prepared(memory: LayerMemory, *, tracked: bool, types: int, scores: int) -> LayerMemory:
    """A memory with room for what online thresholds, and typed tags, must remember; what is there stays."""
    pending, carried, pad = memory.pending, memory.carried, memory.scratchpad
    items, device, kind = len(memory.state), memory.state.device, memory.state.dtype
    if tracked and carried.threshold is None:
        asked = torch.zeros(*pending.routable.shape, scores, dtype=torch.bool, device=device)  # [B, W, C, S]
        pending = replace(pending, asked=asked)
        carried = replace(
            carried,
            threshold=torch.zeros(items, scores, 3, dtype=kind, device=device),
            block=torch.full((items,), -1, dtype=torch.int64, device=device),
        )
    if types and carried.tagged is None:
        pending, pad = _with_types(pending, pad)
        never = torch.full((items, types), LOWEST_LEVEL, dtype=torch.float64, device=device)  # [B, K]
        carried = replace(carried, tagged=never)
    return replace(memory, pending=pending, carried=carried, scratchpad=pad)


def _with_types(pending: Pending, pad: Entries) -> tuple[Pending, Entries]:
    """The same tokens and entries, of no type."""
    grid, rows = pending.must_keep, pad.must_keep  # [B, W, C], [B, M]
    pending = replace(
        pending,
        tag_type=torch.full_like(grid, -1, dtype=torch.int64),
        tag_level=torch.full_like(grid, LOWEST_LEVEL, dtype=torch.float64),
        markable=torch.zeros_like(grid),
    )
    pad = replace(
        pad,
        tag_type=torch.full_like(rows, -1, dtype=torch.int64),
        tag_level=torch.full_like(rows, LOWEST_LEVEL, dtype=torch.float64),
    )
    return pending, pad


def decide(
    local: Pending,
    *,
    tokens: Tokens,
    policy: Policy,
    carried: Carried,
    router: Router,
    thresholds: ThresholdTable,
    frozen: bool,
) -> Decision:
    """Decide about every token of the window and the chunk, from what came up to its leaving the window.

    Args:
        local: the window's carried tokens followed by the chunk's own, [B, L, C, ...].
        frozen: in a forecast thresholds stand still, and nothing decides in the router's place.
    """
    channels = local.routable.shape[2]
    fixed = thresholds(policy.share)  # [B, S]
    asked, online, carried = _asked(local, tokens, policy, carried, router, thresholds, fixed, frozen)
    rank = thresholds.rank(local.scores)  # [B, L, C]
    some = (policy.share > 0)[:, None, None]  # [B, 1, 1]; a budget of nothing keeps nothing, tagged or not
    routed = asked.any(-1)  # [B, L, C]
    if policy.control is not None and not frozen:
        chosen, order = policy.control.decide(local.position, channels, policy.share)  # 2 x [B, L, C]
        routed = chosen & local.routable & some  # [B, L, C]
        asked, rank = routed[..., None].expand(asked.shape), order.to(rank.dtype)  # [B, L, C, S], [B, L, C]
    if policy.explore_share > 0:
        chosen_by = policy.explore_generator
        where = "cpu" if chosen_by is None else chosen_by.device
        chance = torch.rand(routed.shape, generator=chosen_by, device=where)  # [B, L, C]
        lucky = (chance < policy.explore_share).to(routed.device, non_blocking=True) & some  # [B, L, C]
        routed = routed | (lucky & local.routable)  # [B, L, C]
    revised = None
    if policy.use_tags:
        before = local.must_keep
        if policy.tags is not None:
            assert carried.tagged is not None
            local, tagged = mark_tagged(policy.tags, local, tokens, carried.tagged)
            carried = carried if frozen else replace(carried, tagged=tagged)
            window = local.position.shape[1] - tokens.position.shape[1]
            revised = (local.must_keep & ~before & ~routed & local.present & some)[:, :window]  # [B, W, C]
        routed = routed | (local.must_keep & local.present & some)  # [B, L, C]
    return Decision(local, asked, routed, rank, fixed, online, revised, carried)


def _asked(
    local: Pending,
    tokens: Tokens,
    policy: Policy,
    carried: Carried,
    router: Router,
    thresholds: ThresholdTable,
    fixed: torch.Tensor,
    frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, Carried]:
    """Tokens that each score router asks for, [B, L, C, S], by thresholds that stand or move."""
    fixed = fixed.to(local.scores.dtype)  # [B, S]
    asked = local.routable[..., None] & (local.scores >= fixed[:, None, None])  # [B, L, C, S]
    # where something else decides there is nothing to track
    told = policy.control is not None and not frozen
    if policy.threshold == "fixed" or local.asked is None or not router.names or told:
        return asked, None, carried
    assert carried.threshold is not None and carried.block is not None
    window = local.position.shape[1] - tokens.position.shape[1]
    tracked = track_thresholds(
        local.scores[:, window:],
        able=local.routable[:, window:],
        position=tokens.position,
        threshold=fixed,
        spread=thresholds.spread(router.on_log_scale).to(fixed.dtype),
        on_log_scale=router.on_log_scale,
        share=thresholds.part(policy.share),
        state=carried.threshold,
        block=carried.block,
        rule=policy.threshold,
        frozen=frozen,
    )
    # what is in the window was decided as it came
    asked = torch.cat([local.asked[:, :window], tracked.asked], 1)  # [B, L, C, S]
    if not frozen:
        carried = replace(carried, threshold=tracked.state, block=tracked.block)
    return asked, tracked.threshold, carried
