"""An operator's hand on the scratchpad: spans that must be kept, and spans that must go.

B items · C channels · W window patches · M entries · L layers
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from hamts.nn.scratchpad import Entries, LayerMemory
from hamts.nn.tokens import map_tensors
from hamts.reader import StreamMemory

__all__ = ["Edited", "Pin", "erase_span", "mark_span", "pin_window"]


@dataclass(frozen=True)
class Pin:
    """A line of the log: what an operator asked for."""

    action: str  # pin or forget
    item: Any
    first_patch: int  # on the item's grid
    last_patch: int
    label: str
    at_length: int  # steps of the item that were read when it was asked for
    entries: int  # entries of the scratchpads that it met, over layers
    window: int  # tokens of the window, over layers

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Edited:
    """Memory of one item after an edit, and what it met."""

    memory: StreamMemory
    entries: int
    window: int


@torch.inference_mode()
def pin_window(memory: StreamMemory, pins: list[Pin], ids: list[Any], patch: np.ndarray) -> StreamMemory:
    """Tokens just read that lie in a pinned span are kept when they leave the window.

    ids and patch: [B], of the items whose memory this is.
    """
    wanted: dict[Any, list[Pin]] = {}
    for pin in pins:
        if pin.action == "pin":
            wanted.setdefault(pin.item, []).append(pin)
    rows = [
        row
        for row, (each, at) in enumerate(zip(ids, patch.tolist(), strict=True))
        if each in wanted and any(p.first_patch <= at <= p.last_patch for p in wanted[each])
    ]
    if not rows:
        return memory
    layers = []
    for layer in memory.layers:
        must_keep = layer.pending.must_keep.clone()  # [B, W, C]
        must_keep[rows, -1] |= layer.pending.routable[rows, -1]
        layers.append(replace(layer, pending=replace(layer.pending, must_keep=must_keep)))
    return StreamMemory(layers, memory.scale)


def mark_span(memory: StreamMemory, first: int, last: int) -> Edited:
    """Must-keep for everything of one item between two patches, both included; the memory is copied."""
    entries = window = 0
    layers = []
    for layer in memory.layers:
        inside = _within(layer.scratchpad.position, first, last) & layer.scratchpad.alive  # [1, M]
        near = _within(layer.pending.position, first, last)[..., None] & layer.pending.present  # [1, W, C]
        near = near & layer.pending.routable
        entries, window = entries + int(inside.sum()), window + int(near.sum())
        layers.append(
            replace(
                layer,
                scratchpad=replace(layer.scratchpad, must_keep=layer.scratchpad.must_keep | inside),
                pending=replace(layer.pending, must_keep=layer.pending.must_keep | near),
            )
        )
    return Edited(StreamMemory(layers, memory.scale), entries, window)


def erase_span(memory: StreamMemory, first: int, last: int) -> Edited:
    """Nothing exact of one item between two patches, both included; the memory is copied."""
    entries = window = 0
    layers: list[LayerMemory] = []
    for layer in memory.layers:
        inside = _within(layer.scratchpad.position, first, last) & layer.scratchpad.alive  # [1, M]
        near = _within(layer.pending.position, first, last)[..., None] & layer.pending.present  # [1, W, C]
        entries, window = entries + int(inside.sum()), window + int(near.sum())
        pending = replace(
            layer.pending,
            present=layer.pending.present & ~near,
            routable=layer.pending.routable & ~near,
            must_keep=layer.pending.must_keep & ~near,
        )
        layers.append(replace(layer, scratchpad=_without(layer.scratchpad, inside), pending=pending))
    return Edited(StreamMemory(layers, memory.scale), entries, window)


def _within(position: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return (position >= first) & (position <= last)


def _without(entries: Entries, gone: torch.Tensor) -> Entries:
    """The other entries of one item, close together and in their order."""
    stay = (entries.alive & ~gone)[0].nonzero()[:, 0]  # [M']
    return map_tensors(entries, lambda tensor: tensor[:, stay])
