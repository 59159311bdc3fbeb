"""What teaches the scores beside the task: attention received, or what dropping an entry would cost; and inner heads.

B streams side by side · M entries · S score routers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from hamts.nn.router import kept_probability
from hamts.training_parallel import total

__all__ = ["inner_loss", "score_loss"]


def score_loss(traces: Sequence[Any], task: torch.Tensor, target: str) -> torch.Tensor:
    """How far each learned score is from what its token turned out to be good for, [].

    Args:
        traces: of every pass of a step.
        task: the task's loss, []; ``gain`` asks for its gradient.
        target: ``attention``: mass received against an even spread over the stream's entries; ``gain``: what dropping
            the entry would cost, against the typical size of that; ``none``.
    """
    if target == "none":
        return torch.zeros((), device=task.device)
    judgements = torch.stack([trace.entries_judged.sum() for trace in traces])  # [traces]
    # of the mean over all processes, what the mean over this one's counts for: 1 where there is one
    parts = judgements / total(judgements).clamp_min(1e-12)  # [traces]
    gains = _gains(traces, task) if target == "gain" else [None] * len(traces)
    loss = torch.zeros((), device=parts.device)
    for trace, part, gain in zip(traces, parts, gains, strict=True):
        judged, mass = trace.entries_judged, trace.entries_mass
        if not trace.entries_bias.requires_grad or (mass is None and target == "attention"):
            continue
        if target == "gain":
            if gain is None:
                continue
            typical = (gain.square() * judged).sum(1, keepdim=True) / judged.sum(1, keepdim=True).clamp_min(1)  # [B, 1]
            wanted = torch.sigmoid(gain / typical.sqrt().clamp_min(1e-12))  # [B, M']; a half where it costs nothing
        else:
            even = (mass * judged).sum(1, keepdim=True) / judged.sum(1, keepdim=True).clamp_min(1)  # [B, 1]
            wanted = mass / (mass + even).clamp_min(1e-12)  # [B, M']; a half where it is the mean
        given = kept_probability(trace.entries_bias)  # [B, M']
        with torch.autocast(given.device.type, enabled=False):
            each = F.binary_cross_entropy(given.float(), wanted.float(), reduction="none")  # [B, M']
        # how many are judged is known where they are: picking them out would wait for the device
        loss = loss + part * torch.where(judged, each, 0.0).sum() / judged.sum().clamp_min(1)
    return loss / max(len(traces), 1)


def _gains(traces: Sequence[Any], task: torch.Tensor) -> list[torch.Tensor | None]:
    """Rise of the loss if each entry were left out, to first order, [B, M'] each.

    An entry of small probability w changes what is read by -w / (1 - w) (value - read) when it is dropped, and by
    w (value - read) for each unit of its logit: so leaving it out costs minus the gradient with respect to its bias.
    """
    place = [number for number, trace in enumerate(traces) if trace.entries_bias.requires_grad]
    found: list[torch.Tensor | None] = [None] * len(traces)
    if not place or not task.requires_grad:
        return found
    slopes = torch.autograd.grad(
        task, [traces[number].entries_bias for number in place], retain_graph=True, allow_unused=True
    )
    for number, slope in zip(place, slopes, strict=True):
        found[number] = None if slope is None else -slope.detach()
    return found


def inner_loss(traces: Sequence[Any], like: torch.Tensor) -> torch.Tensor:
    """Mean one-patch-ahead loss of the inner heads, []; 0 where there are none."""
    losses = [trace.inner_loss for trace in traces if trace.inner_loss is not None]
    return torch.stack(losses).mean() if losses else torch.zeros((), device=like.device)
