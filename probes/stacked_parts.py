"""What stacked layers are made of, and where the parameters of each network lie.

S networks · P parameters
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hamts.nn.ham import HAMLayer
from hamts.nn.heads import ROTARY_LONGEST_PATCHES, ROTARY_SHARE
from hamts.nn.mixers_base import MixerLayer
from hamts.nn.mixers_kept import SlidingLayer
from probes.models import ProbeNet
from probes.stacked_scores import error_weights

__all__ = ["Frame", "LayerKind", "sources", "stacked_parameters"]

# one product gives all that a memory layer asks of its input
PROJECTED = ("to_memory", "to_query", "exact.to_query", "to_gates", "to_output_gate")


@dataclass(frozen=True)
class LayerKind:
    """What a memory layer is made of."""

    recurrent: bool
    window: int
    keeps: bool
    keeps_rows: float | None  # rows for which everything stays; None: a router decides
    state_width: int
    projected: tuple[str, ...]
    widths: tuple[int, ...]
    exact: str  # where the modules of the exact branch are
    branch: str  # where those of the recurrent one are

    @classmethod
    def of(cls, layer: HAMLayer | MixerLayer) -> LayerKind:
        names = dict(layer.named_modules())
        projected = tuple(name for name in PROJECTED if names.get(name) is not None)
        widths = tuple(names[name].out_features for name in projected)
        if isinstance(layer, HAMLayer):
            return cls(True, layer.window, True, None, layer.state_width, projected, widths, "", "")
        rows = float(layer.patches) if isinstance(layer, SlidingLayer) else None
        width = 0 if layer.recurrent is None else layer.recurrent.head_width
        return cls(
            layer.recurrent is not None, layer.parts.window, layer.parts.keeps, rows, width, projected, widths,
            "exact.", "recurrent.",
        )  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """Masks, angles and weights of sequences of one size: T context rows of N."""

    T: int
    band: dict[int, torch.Tensor]  # by window, [N, N]: 0 in the window, else -inf
    left: dict[int, torch.Tensor]  # by window, [N, T] bool: has left the window when row n is read
    left_sum: dict[int, torch.Tensor]  # the same as numbers, to count with
    age: torch.Tensor  # [N, T]
    order: torch.Tensor  # [T]
    queried: torch.Tensor  # [N] bool
    error_weights: torch.Tensor  # [T, T]
    cosine: torch.Tensor  # [N, pairs]
    sine: torch.Tensor  # [N, pairs]

    @classmethod
    def of(cls, T: int, N: int, windows: set[int], width: int, device: torch.device, *, scale: float = 1.0) -> Frame:
        """Of T context rows of N; ``scale`` multiplies the positions that keys and queries are turned by."""
        row = torch.arange(N, device=device)
        age = row[:, None] - row[None]  # [N, N]
        band = {w: torch.where((age >= 0) & (age < w), 0.0, -torch.inf) for w in windows}
        left = {w: age[:, :T] >= w for w in windows}
        half = torch.float16 if device.type == "cuda" else torch.float32
        pairs = int(width * ROTARY_SHARE) // 2
        rates = torch.logspace(0, -math.log2(ROTARY_LONGEST_PATCHES / 4), pairs, base=2.0, dtype=torch.float64)
        angle = scale * row.double()[:, None] * (rates * (2 * math.pi / 4)).to(device)  # [N, pairs]
        return cls(
            T, band, left, {w: mask.to(half) for w, mask in left.items()}, age[:, :T],
            torch.arange(T, device=device, dtype=torch.float32), row >= T, error_weights(T, device),
            angle.cos().float(), angle.sin().float(),
        )  # fmt: skip


def sources(net: ProbeNet) -> dict[str, tuple[str, slice]]:
    """Of every parameter of a network: in which stacked tensor it lies, and which rows of it."""
    found: dict[str, tuple[str, slice]] = {}
    places: dict[str, int] = {}
    for name, parameter in net.named_parameters():
        head, _, tail = name.partition(".memory.")
        if tail.removesuffix(".weight") in PROJECTED and tail.endswith(".weight"):
            leaf = f"{head}.memory.project"
            first = places.get(leaf, 0)
            places[leaf] = first + len(parameter)
            found[name] = (leaf, slice(first, first + len(parameter)))
        else:
            found[name] = (name, slice(None))
    return found


def stacked_parameters(nets: Sequence[ProbeNet], device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """All parameters as one matrix, [S, P], and the tensors that lie in it, [S, ...] each, which take gradients."""
    order: dict[str, list[str]] = {}
    for name, (leaf, _) in sources(nets[0]).items():
        order.setdefault(leaf, []).append(name)
    own = [dict(net.named_parameters()) for net in nets]
    # the order of LayerKind.projected is that of PROJECTED, rows of a leaf lie in the order of named_parameters
    flat = torch.stack([
        torch.cat([parameters[name].detach().flatten() for names in order.values() for name in names])
        for parameters in own
    ]).to(device)  # fmt: skip
    leaves, first = {}, 0
    for leaf, names in order.items():
        size = sum(own[0][name].numel() for name in names)
        one = own[0][names[0]]
        shape = (-1, one.shape[1]) if leaf.endswith(".project") else one.shape
        leaves[leaf] = flat[:, first : first + size].view(len(nets), *shape).detach().requires_grad_()
        first += size
    return flat, leaves
