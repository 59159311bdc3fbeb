"""Numbers that a network knows from the start, on the device that asks for them, and what is sent there.

Copying even one number to a GPU waits until the GPU has done all it was given, unless it comes from pinned memory. So
what is known from the start is copied once, and the rest is sent from there.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

__all__ = ["chosen", "constant", "sent"]

Number = bool | int | float


def constant(
    values: Sequence[Number], dtype: torch.dtype, device: torch.device | str, *, kept: bool | None = None
) -> torch.Tensor:
    """A tensor of these numbers, which nobody may write to.

    Args:
        kept: whether the next call gets the same tensor; None: on a GPU.
    """
    device = torch.device(device)
    if kept if kept is not None else device.type == "cuda":
        return _kept(tuple(values), dtype, device)
    return torch.tensor(values, dtype=dtype, device=device)


def chosen(x: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Some channels of a tensor, [B, C, ...] -> [B, G, ...]; a list between brackets would be copied to the device."""
    return x.index_select(1, constant(places, torch.int64, x.device))


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor on a device, without a wait: a GPU copies from pinned memory while the host goes on."""
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    # what was expanded lies once in memory, and cannot be pinned so
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


@functools.lru_cache(maxsize=512)
def _kept(values: tuple[Number, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # what inference mode makes could never take part in a gradient
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
