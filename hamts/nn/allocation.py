"""How a budget spreads over layers: whose scores set whose thresholds.

S score routers
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hamts.nn.budget import POOLED
from hamts.nn.ham import HAMLayer

__all__ = ["POOLED", "update_tables"]


def update_tables(
    layers: Sequence[HAMLayer],
    samples: Sequence[torch.Tensor],
    allocation: str,
    *,
    calibrate: bool,
    counted: torch.Tensor | None = None,
) -> None:
    """Move every layer's thresholds to its scores, [n, S] each, or to those of all layers, and its part of the whole.

    Args:
        calibrate: set them for good, from a large sample of the finished network, instead of following a batch.
        counted: which rows of every sample count, [n] bool; None: all. Not where ``calibrate``.
    """
    own, own_counted = samples, counted
    if allocation in POOLED and samples:
        counted = None if counted is None else counted.repeat(len(samples))  # [n of all]
        samples = [torch.cat(list(samples))] * len(samples)
    for layer, scores, mine in zip(layers, samples, own, strict=True):
        if calibrate:
            layer.thresholds.calibrate(scores, own=mine)
        else:
            layer.thresholds.follow(scores, counted, own=(mine, own_counted))
