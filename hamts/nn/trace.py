"""What a layer tells of a pass: its output, its memory, and every decision it took.

B items · C channels · N patches · D width · W window patches · M entries · S score routers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hamts.nn.decide import Decision
from hamts.nn.router import Scores
from hamts.nn.scratchpad import Entries, LayerMemory
from hamts.nn.tokens import Policy
from hamts.ops.types import Attended

__all__ = ["LayerOutput", "LayerTrace", "layer_trace"]


@dataclass(frozen=True)
class LayerTrace:
    """What one layer decided about a chunk, and how its entries were read."""

    scores: torch.Tensor  # [B, C, N, S]
    threshold: torch.Tensor  # [B, S] of the trained table
    by_score: torch.Tensor  # [B, C, N, S] bool: asked for by this router
    must_keep: torch.Tensor  # [B, C, N] bool: asked for by a tag
    routed: torch.Tensor  # [B, C, N] bool: goes to the scratchpad on leaving the window
    entries_bias: torch.Tensor  # [B, M'] with gradient
    # attention received in a step, summed over channels and heads; None where the policy does not ask
    entries_mass: torch.Tensor | None  # [B, M']
    entries_judged: torch.Tensor  # [B, M'] bool: kept by score, so that mass teaches their bias
    entries_sights: torch.Tensor  # [B, M'] int64: steps of this chunk that could see the entry; 0 for padding
    entries_position: torch.Tensor  # [B, M'] float64, and
    entries_channel: torch.Tensor  # [B, M'] int64: which token it is
    rank: torch.Tensor | None = None  # [B, C, N] what eviction by score compares
    online: torch.Tensor | None = None  # [B, N, S] thresholds in force, where they moved
    tag_type: torch.Tensor | None = None  # [B, C, N] int64 of typed tags, -1: none
    tag_level: torch.Tensor | None = None  # [B, C, N]
    # of the window before the chunk, as the chunk leaves it: kept by a tag, of which type and level
    window_must: torch.Tensor | None = None  # [B, C, W] bool
    window_type: torch.Tensor | None = None  # [B, C, W] int64
    window_level: torch.Tensor | None = None  # [B, C, W]
    revised: torch.Tensor | None = None  # [B, C, W] bool: of these, the ones that were not to be kept before
    inner_loss: torch.Tensor | None = None  # [] of the inner head, in training


@dataclass(frozen=True)
class LayerOutput:
    output: torch.Tensor  # [B, C, N, D]
    memory: LayerMemory
    trace: LayerTrace


def layer_trace(
    scores: Scores,
    decision: Decision,
    read: Attended,
    entries: Entries,
    until: torch.Tensor,
    visible_from: torch.Tensor,
    policy: Policy,
) -> LayerTrace:
    """Every decision about a chunk, and how its entries were read.

    Args:
        until, visible_from: first query that no longer sees each entry, and first that does, [B, M'] int64.
    """
    local, N = decision.local, scores.scores.shape[2]
    W = local.position.shape[1] - N

    def own(x: torch.Tensor | None, *, before: bool = False) -> torch.Tensor | None:
        return None if x is None else x[:, slice(W) if before else slice(W, None)].transpose(1, 2)  # [B, C, N, ...]

    # how many steps of this chunk could see each entry: those still in the window are not judged yet
    sights = until.clamp_max(N) - visible_from.clamp_min(0)  # [B, M']
    mass = None
    if policy.masses:
        mass = read.scratch_mass if read.scratch_mass is not None else torch.zeros_like(entries.bias)  # [B, M']
        mass = mass / sights.clamp_min(1)  # [B, M']
    must_keep = local.must_keep & policy.use_tags & (policy.share > 0)[:, None, None]  # [B, W + N, C]
    return LayerTrace(
        scores=scores.scores,
        threshold=decision.threshold,
        by_score=decision.asked[:, W:].transpose(1, 2),
        must_keep=must_keep[:, W:].transpose(1, 2),
        routed=decision.routed[:, W:].transpose(1, 2),
        entries_bias=entries.bias,
        entries_mass=mass,
        entries_judged=entries.alive & ~entries.must_keep & (sights > 0),
        entries_sights=torch.where(entries.alive, sights.clamp_min(0), 0),
        entries_position=entries.position,
        entries_channel=entries.channel,
        rank=decision.rank[:, W:].transpose(1, 2),
        online=decision.online,
        tag_type=own(local.tag_type),
        tag_level=own(local.tag_level),
        window_must=None if local.tag_type is None else own(must_keep & local.present, before=True),
        window_type=own(local.tag_type, before=True),
        window_level=own(local.tag_level, before=True),
        revised=None if decision.revised is None else decision.revised.transpose(1, 2),
        inner_loss=scores.inner_loss,
    )
