"""Typed tags: which tokens an event or an action asks to be kept, for how long before and after, and how much.

B items · C channels · N patches · P steps in a patch · W window patches · K tag types
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from hamts.config import MemoryConfig, TagType
from hamts.data.constants import chosen, constant
from hamts.nn.scratchpad import LOWEST_LEVEL, Pending
from hamts.nn.tokens import Tokens

__all__ = ["TagRules", "mark_tagged", "tag_rules"]

# a position is a time in patches; on the grid it is a whole number, but for its last digits
ROUNDING_PATCHES = 1e-6
TAGGED_ROLES = ("event", "action")


@dataclass(frozen=True)
class TagRules:
    """Types of tags, one for each event and action channel, in the order of channels."""

    channels: tuple[int, ...]  # K of each type
    names: tuple[str, ...]  # K
    levels: tuple[float, ...]  # K logarithm (base 2) of the priority
    quotas: tuple[float | None, ...]  # K
    before: tuple[int, ...]  # K patches
    after: tuple[int, ...]  # K patches
    half_life_patches: float | None


def tag_rules(config: MemoryConfig, roles: tuple[str, ...], names: tuple[str, ...], window: int) -> TagRules | None:
    """The rules of a configuration for these channels; None where every tag is treated alike.

    Raises:
        ValueError: a type that is no event or action column, or a window before a tag that is decided already.
    """
    if not config.tag_types and config.tag_half_life_patches is None:
        return None
    channels = tuple(c for c, role in enumerate(roles) if role in TAGGED_ROLES)
    known = {names[c] if names else str(c): c for c in channels}
    unknown = [one.name for one in config.tag_types if one.name not in known]
    if unknown:
        raise ValueError(f"Unknown tag type {unknown[0]!r}. Available: {sorted(known)}, the event and action columns.")
    far = [one for one in config.tag_types if one.before_patches >= window]
    if far:
        raise ValueError(
            f"before_patches must be below window_patches, what is older is decided already. Got"
            f" {far[0].before_patches} for tag type {far[0].name!r} with window_patches={window}. Choose"
            f" before_patches={window - 1} at most, or window_patches={far[0].before_patches + 1}."
        )
    given = {one.name: one for one in config.tag_types}
    types = [given.get(name, TagType(name=name)) for name in known]
    return TagRules(
        channels=channels,
        names=tuple(known),
        levels=tuple(math.log2(one.priority) for one in types),
        quotas=tuple(one.quota for one in types),
        before=tuple(one.before_patches for one in types),
        after=tuple(one.after_patches for one in types),
        half_life_patches=config.tag_half_life_patches,
    )


def mark_tagged(rules: TagRules, local: Pending, tokens: Tokens, tagged: torch.Tensor) -> tuple[Pending, torch.Tensor]:
    """Say of every token in the window and the chunk which tag keeps it.

    A tagged token is kept for its own type. The observed targets from ``before`` patches before the tag to ``after``
    patches after it are kept for the type of the highest priority that reaches them.

    Args:
        local: the window's tokens followed by the chunk's own, [B, W + N, C, ...], as they were judged before.
        tagged: position of the last tag of each type before the chunk, [B, K] float64.

    Returns:
        The same tokens, with must_keep, tag_type and tag_level, and ``tagged`` after the chunk.
    """
    assert local.tag_type is not None and local.tag_level is not None and local.markable is not None
    window = local.position.shape[1] - tokens.position.shape[1]
    now = tokens.tags.any(-1)  # [B, C, N]
    now = chosen(now & tokens.must_keep, rules.channels).transpose(1, 2)  # [B, N, K]
    last = torch.where(now, tokens.position[..., None], LOWEST_LEVEL)  # [B, N, K]
    last = torch.cat([tagged[:, None], last], 1).cummax(1).values  # [B, 1 + N, K]
    reach = _reached(rules, local, tokens, now, last[:, 1:], window)  # [B, W + N, K]
    own = torch.zeros(*local.must_keep.shape, len(rules.channels), dtype=torch.bool, device=now.device)
    for number, channel in enumerate(rules.channels):
        own[:, window:, channel, number] = now[..., number]
    asked = own | (local.markable[..., None] & reach[:, :, None])  # [B, W + N, C, K]
    fades = 0.0 if rules.half_life_patches is None else 1.0 / rules.half_life_patches
    level = constant(rules.levels, torch.float64, now.device)  # [K]
    highest = torch.where(asked, level, -torch.inf).amax(-1, keepdim=True)  # [B, W + N, C, 1]
    # the first of those of the same priority, in one chunk as in several
    kind = (asked & (level == highest)).int().argmax(-1)  # [B, W + N, C]
    fresh = asked.any(-1)  # [B, W + N, C]
    rank = level[kind] + fades * local.position[..., None]  # [B, W + N, C]
    first = (rank == local.tag_level) & (kind < local.tag_type)  # [B, W + N, C]
    # what an earlier chunk said of the window stands, unless something of a higher priority reaches back
    better = fresh & ((rank > local.tag_level) | first)  # [B, W + N, C]
    marked = replace(
        local,
        must_keep=local.must_keep | fresh,
        tag_type=torch.where(better, kind, local.tag_type),
        tag_level=torch.where(better, rank, local.tag_level),
        bias=torch.where(fresh, 0.0, local.bias),
    )
    return marked, last[:, -1]


def _reached(
    rules: TagRules, local: Pending, tokens: Tokens, now: torch.Tensor, last: torch.Tensor, window: int
) -> torch.Tensor:
    """Which types reach each moment of the window and the chunk: now and last [B, N, K] -> [B, W + N, K]."""
    B, N, K = now.shape
    after = constant(rules.after, torch.float64, now.device)  # [K]
    before = constant(rules.before, torch.float64, now.device)  # [K]
    since = tokens.position[..., None] - last  # [B, N, K]
    reach = torch.zeros(B, window + N, K, dtype=torch.bool, device=now.device)  # [B, W + N, K]
    reach[:, window:] = since <= after + ROUNDING_PATCHES
    tagged = torch.cat([reach.new_zeros(B, window, K), now], 1)  # [B, W + N, K]
    for back in range(1, min(max(rules.before), window - 1) + 1):
        apart = (local.position[:, back:] - local.position[:, :-back])[..., None]  # [B, W + N - back, 1]
        reach[:, :-back] |= tagged[:, back:] & (apart <= before + ROUNDING_PATCHES)
    return reach
