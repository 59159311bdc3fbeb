"""What a layer tells of a pass: its output, its memory, and every decision it took.

B items · C channels · N patches · D width · W window patches · M entries · S score routers
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hamts.nn.scratchpad import LayerMemory

__all__ = ["LayerOutput", "LayerTrace"]


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
