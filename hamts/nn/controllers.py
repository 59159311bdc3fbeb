"""Thresholds that follow the scores online, so that usage stays near the share asked for when scores change.

Every rule moves one shift per layer, item and score router, from the past alone, and sees a patch's own scores only
after that patch is decided. A shift is counted in spreads: the distance of the trained thresholds for the shares 2 %
and 75 %, on the logarithm for scores that are never negative. So tripled scores are a constant shift.

B items · C channels · N patches · S score routers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hamts.nn.scores import as_level, from_level

__all__ = ["BLOCK_PATCHES", "Tracked", "track_thresholds"]

BLOCK_PATCHES = 64
# spreads per token, per token, and per block of one unit of usage too much
QUANTILE_RATE, FEEDBACK_RATE, BLOCK_RATE = 0.03, 0.008, 1.0
FEEDBACK_HALF_LIFE_TOKENS = 32.0
# many channels say the same at once
MOST_TOKENS_AT_ONCE = 4.0
LARGEST_SHIFT = 10.0


@dataclass(frozen=True)
class Tracked:
    """Decisions of a chunk under moving thresholds."""

    asked: torch.Tensor  # [B, N, C, S] bool
    threshold: torch.Tensor  # [B, N, S]
    state: torch.Tensor  # [B, S, 3] shift, usage above what was asked for, and of how many tokens
    block: torch.Tensor  # [B] int64


def track_thresholds(
    scores: torch.Tensor,
    *,
    able: torch.Tensor,
    position: torch.Tensor,
    threshold: torch.Tensor,
    spread: torch.Tensor,
    on_log_scale: torch.Tensor,
    share: torch.Tensor,
    state: torch.Tensor,
    block: torch.Tensor,
    rule: str,
    frozen: bool = False,
) -> Tracked:
    """Decide a chunk patch by patch, moving the threshold after each.

    ``quantile``: shift += rate (asked - share) for every token, stochastic approximation of a quantile.
    ``feedback``: shift += rate (running usage - share), as HAM's Algorithm 2 (arXiv 2603.22325), whose pseudo-gradient
    is the gap of usage. ``block``: shift += rate (usage of the block - share) at the end of every 64 patches of
    absolute time.

    Args:
        scores: [B, N, C, S].
        able: tokens that may be kept by their score, [B, N, C] bool.
        position: [B, N] float64, in patches since the stream's origin.
        threshold: of the trained table, [B, S].
        spread: of the trained table on the level scale, [S].
        on_log_scale: [S] bool.
        share: asked of each router, [B, S], or the same of all, [B].
        state, block: from the chunk before.
        frozen: a forecast moves nothing.
    """
    levels = as_level(scores, on_log_scale)  # [B, N, C, S]
    base = torch.where(threshold.isfinite(), as_level(threshold, on_log_scale), threshold)  # [B, S]
    number = torch.floor(position / BLOCK_PATCHES).long()  # [B, N]
    asked, thresholds = [], []
    for n in range(scores.shape[1]):
        if rule == "block" and not frozen:
            state, block = _next_block(state, block, number[:, n], able[:, n].any(1))
        limit = base + state[..., 0] * spread  # [B, S]
        here = able[:, n, :, None] & (levels[:, n] >= limit[:, None])  # [B, C, S]
        if not frozen:
            state = _moved(state, here, able[:, n], share, rule)
        asked.append(here)
        thresholds.append(limit)
    limits = torch.stack(thresholds, 1)  # [B, N, S]
    return Tracked(torch.stack(asked, 1), from_level(limits, on_log_scale), state, block)


def _moved(
    state: torch.Tensor, asked: torch.Tensor, able: torch.Tensor, share: torch.Tensor, rule: str
) -> torch.Tensor:
    """The state after one patch: asked [B, C, S], able [B, C]."""
    shift, usage, of = state.unbind(-1)  # 3 x [B, S]
    kind = state.dtype
    count = able.sum(1).to(kind)[:, None]  # [B, 1]
    hits = asked.sum(1).to(kind)  # [B, S]
    target = share.to(kind) if share.ndim == 2 else share.to(kind)[:, None]  # [B, S or 1]
    weight = count.clamp_max(MOST_TOKENS_AT_ONCE)  # [B, 1]
    rate = hits / count.clamp_min(1.0)  # [B, S]
    if rule == "quantile":
        shift = shift + QUANTILE_RATE * weight * torch.where(count > 0, rate - target, 0.0)  # [B, S]
    elif rule == "feedback":
        keep = 0.5 ** (weight / FEEDBACK_HALF_LIFE_TOKENS)  # [B, 1]; 1 where nothing was there to decide
        # the running gap starts at 0, so that the first tokens weigh no more than others
        gap = keep * usage + (1 - keep) * (rate - target)  # [B, S]
        shift, usage = shift + FEEDBACK_RATE * weight * gap, gap
    else:
        usage, of = usage + hits - target * count, of + count  # [B, S]
    return torch.stack([shift.clamp(-LARGEST_SHIFT, LARGEST_SHIFT), usage, of.expand_as(usage)], -1)


def _next_block(
    state: torch.Tensor, block: torch.Tensor, number: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Close the block where a patch with something to decide lies in another one."""
    shift, usage, of = state.unbind(-1)  # 3 x [B, S]
    new = (number != block) & counts  # [B]
    over = usage / of.clamp_min(1.0)  # [B, S] usage - share of the block
    moved = (shift + BLOCK_RATE * over).clamp(-LARGEST_SHIFT, LARGEST_SHIFT)  # [B, S]
    closed = torch.stack([moved, torch.zeros_like(usage), torch.zeros_like(of)], -1)  # [B, S, 3]
    return torch.where(new[:, None, None], closed, state), torch.where(new, number, block)
