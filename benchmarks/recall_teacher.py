"""A teacher of the learned score that counts only reads which something depends on: those of places that are asked.

B sequences · L tokens · n places asked, at most · M entries · H heads · K key · W window tokens
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from hamts.nn.router import kept_probability

__all__ = ["Asked", "asked_loss", "asked_losses", "asked_of", "asked_reads", "own_gradients"]

# places [B, n], and which of them are real [B, n]
Asked = tuple[torch.Tensor, torch.Tensor]


def asked_of(right: torch.Tensor, most: int) -> Asked:
    """Places where something is asked, right [B, L] >= 0; ``most`` of them at most."""
    found = (right >= 0).int().topk(max(most, 1), dim=1)
    return found.indices, found.values > 0


@torch.no_grad()
def asked_reads(queries: torch.Tensor, scratch: Any, others: dict[str, Any], asked: Asked) -> torch.Tensor:
    """How often each entry is read by a place that is asked: sum of its weights, the heads' mean, [B, M].

    Args:
        queries: of one channel, [B, L, 1, H, K].
        scratch: entries as the read takes them.
        others: what else the read takes: keys of the window, [B, W + L, 1, H, K], and the bias of the own channel.
    """
    place, real = asked  # [B, n] each
    W = others["window"]
    rows = torch.arange(len(place), device=place.device)[:, None]  # [B, 1]
    q = queries[:, :, 0][rows, place]  # [B, n, H, K]
    far = torch.einsum("bnhk,bmhk->bhnm", q, scratch.keys)  # [B, H, n, M]
    own = others["channel_bias"][:, None, None]  # [H, 1, 1] entries are of the own channel too
    far = far + scratch.bias.mT[:, :, None] + own  # [B, H, n, M]
    seen = (scratch.visible_from[:, None] <= place[..., None]) & (place[..., None] < scratch.visible_until[:, None])
    far = far.masked_fill(~seen[:, None], -torch.inf)
    near_place = place[..., None] + 1 + torch.arange(W, device=place.device)  # [B, n, W]
    near = torch.einsum("bnhk,bnwhk->bhnw", q, others["local_keys"][:, :, 0][rows[..., None], near_place])
    near = near + own  # [B, H, n, W]
    there = others["local_present"][:, :, 0][rows[..., None], near_place]  # [B, n, W]
    near = near.masked_fill(~there[:, None], -torch.inf)
    weight = torch.cat([far, near], -1).softmax(-1)[..., : far.shape[-1]]  # [B, H, n, M]
    return (weight.mean(1) * real[..., None]).sum(1)


def asked_loss(traces: list[Any], reads: list[torch.Tensor]) -> torch.Tensor:
    """How far learned scores are from the reads that their entries received, the layers' mean, []."""
    return torch.stack(asked_losses(traces, reads)).mean()


def asked_losses(traces: list[Any], reads: list[torch.Tensor]) -> list[torch.Tensor]:
    """How far each learned score is from the reads that its entry received, against an even spread, [] of each layer.

    The target of ``hamts.training_auxiliary`` with the attention of places that are asked in place of all. Reads alone,
    1 for an entry that one place reads whole, would silence all: most are read by none, and all start alike.
    """
    losses = []
    for trace, read in zip(traces, reads, strict=True):
        given, judged = kept_probability(trace.entries_bias), trace.entries_judged  # [B, M] each
        even = (read * judged).sum(1, keepdim=True) / judged.sum(1, keepdim=True).clamp_min(1)  # [B, 1]
        wanted = read / (read + even).clamp_min(1e-12)  # [B, M]; a half where it is the mean
        each = F.binary_cross_entropy(given, wanted, reduction="none")  # [B, M]
        losses.append(torch.where(judged, each, 0.0).sum() / judged.sum().clamp_min(1))
    return losses


def own_gradients(
    layers: list[Any], losses: list[torch.Tensor], weight: float
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """What the mean of the layers' losses, times ``weight``, teaches if no score's input has a gradient.

    A layer's input does not depend on its own score: so the gradient of its own loss at its score's own weights is the
    one that a detached input gives. Nothing is computed twice, and the graph stays as it is for the task.
    """
    taught = []
    for layer, loss in zip(layers, losses, strict=True):
        own = list(layer.router.learned.parameters())
        gradients = torch.autograd.grad(loss * (weight / len(losses)), own, retain_graph=True)
        taught += list(zip(own, gradients, strict=True))
    return taught
