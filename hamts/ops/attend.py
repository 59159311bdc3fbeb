"""The read: one softmax over the window, the other channels and the scratchpad.

Queries run in blocks of time. Scratchpad entries are sorted by the query that first sees them, so a block multiplies
only the entries some query of it may see. Per block there are three groups of keys, joined under one softmax:

    near: every channel at the last ``cross_span`` patches     far: the own channel's older window patches
    scratch: the entries                                       plus one empty key, seen only by queries that see no other

Biases and marks ride along as extra features of the scratchpad's keys and values, so that logits and probabilities,
the only large tensors, are each written once.

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches · R marks
n queries of a block · m entries of a block · S near patches (cross_span) · F far patches · J local keys of a query
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hamts.ops.types import Attended, ScratchKeys, compute_dtype

__all__ = ["attend"]


def attend(
    queries: torch.Tensor,
    *,
    local_keys: torch.Tensor,
    local_values: torch.Tensor,
    local_present: torch.Tensor,
    scratch: ScratchKeys | None,
    readable: torch.Tensor,
    channel_bias: torch.Tensor,
    window: int,
    cross_span: int = 1,
    local_marks: torch.Tensor | None = None,
    block: int = 64,
) -> Attended:
    """Read the window, the other channels and the scratchpad under one softmax; see the twin in ``naive.py``.

    Args:
        queries: [B, N, C, H, K], already scaled and rotated.
        local_keys: W patches from before the chunk, then the chunk's own, [B, W+N, C, H, K].
        local_values: [B, W+N, C, H, V].
        local_present: absent keys are never seen, bool [B, W+N, C].
        scratch: the scratchpad, or None.
        readable: may the query's channel (row) read the key's (column)? The own one always, bool [B, C, C].
        channel_bias: added to the logits of keys of the query's own channel, [H].
        window: W, at least 1.
        cross_span: patches of other channels, 0 .. W; 1 is the same step only.
        local_marks: what ``Attended.marks`` averages, [B, W+N, C, R].
        block: queries (in time) handled at once; bounds memory, changes nothing beyond rounding.

    Source: the read of HAM, arXiv 2603.22325; channels, ``cross_span`` and the biases are ours.
    """
    n_patches, n_channels = queries.shape[1:3]
    if not 0 <= cross_span <= window or window < 1:
        raise ValueError(f"cross_span must lie in 0 .. window. Got cross_span={cross_span}, window={window}.")
    if local_keys.shape[1] != window + n_patches:
        raise ValueError(
            f"local_keys must hold window + queries patches, {window + n_patches}. Got {local_keys.shape[1]}."
        )
    entries = (None,) * 3 if scratch is None else (scratch.keys, scratch.values, scratch.bias)
    dtype = compute_dtype(queries, local_keys, local_values, channel_bias, local_marks, *entries)
    own = torch.eye(n_channels, dtype=torch.bool, device=queries.device)  # [C, C]
    local = _Local(
        keys=local_keys.to(dtype),
        values=local_values.to(dtype),
        present=local_present,
        marks=None if local_marks is None else local_marks.to(dtype),
        readable=readable | own,
        bias=channel_bias.to(dtype),
        far=window - cross_span,
        near=cross_span,
    )
    starts = range(0, n_patches, block)
    stops = [min(start + block, n_patches) for start in starts]
    features, spans = None, [(0, 0)] * len(stops)
    if scratch is not None and scratch.keys.shape[1]:
        features = _scratch_features(scratch, local, n_channels)
        spans = _spans(scratch, list(starts), stops)
    with torch.autocast(queries.device.type, enabled=False):
        blocks = [
            _block(queries[:, start:stop].to(dtype), start, local, scratch, features, span)
            for start, stop, span in zip(starts, stops, spans, strict=True)
        ]
        local_mass = torch.zeros(local_present.shape, dtype=dtype, device=queries.device)  # [B, W+N, C]
        scratch_mass = None
        if scratch is not None:
            scratch_mass = torch.zeros(scratch.channel.shape, dtype=dtype, device=queries.device)  # [B, M]
        for start, (first, last), part in zip(starts, spans, blocks, strict=True):
            _add_local_mass(local_mass, start, window, cross_span, part)
            if scratch_mass is not None and part.scratch_mass is not None:
                scratch_mass[:, first:last] += part.scratch_mass
    output = torch.cat([part.output for part in blocks], 1)  # [B, N, C, H, V]
    marks = torch.cat([part.marks for part in blocks if part.marks is not None], 1) if local_marks is not None else None
    return Attended(
        output=output.to(queries.dtype),  # [B, N, C, H, V]
        marks=None if marks is None else marks.to(queries.dtype),  # [B, N, C, H, R]
        scratch_mass=scratch_mass,
        local_mass=local_mass,
    )


@dataclass(frozen=True)
class _Local:
    """The window's side of the read, in the dtype of the softmax."""

    keys: torch.Tensor  # [B, W+N, C, H, K]
    values: torch.Tensor  # [B, W+N, C, H, V]
    present: torch.Tensor  # [B, W+N, C]
    marks: torch.Tensor | None  # [B, W+N, C, R]
    readable: torch.Tensor  # [B, C, C]
    bias: torch.Tensor  # [H]
    far: int
    near: int

    def far_of(self, x: torch.Tensor, start: int, n: int) -> torch.Tensor:
        """Far patches of queries start .. start + n, [B, n, C, ..., F], a view."""
        return x[:, start + 1 : start + n + self.far].unfold(1, self.far, 1)

    def near_of(self, x: torch.Tensor, start: int, n: int) -> torch.Tensor:
        """Near patches of queries start .. start + n, [B, n, C, ..., S], a view."""
        first = start + self.far + 1
        return x[:, first : first + n + self.near - 1].unfold(1, self.near, 1)


@dataclass(frozen=True)
class _Features:
    """The scratchpad's side: biases are features of the keys, marks of the values (one set for each channel)."""

    keys: torch.Tensor  # [B, H, M, K+1+C]
    values: torch.Tensor  # [B, H, M, V+CR]
    n_marks: int


@dataclass(frozen=True)
class _Part:
    """Result of one block."""

    output: torch.Tensor  # [B, n, C, H, V]
    marks: torch.Tensor | None  # [B, n, C, H, R]
    near_mass: torch.Tensor | None  # [B, n, S, C]
    far_mass: torch.Tensor | None  # [B, n, C, F]
    scratch_mass: torch.Tensor | None  # [B, m]


def _scratch_features(scratch: ScratchKeys, local: _Local, n_channels: int) -> _Features:
    dtype, heads = local.keys.dtype, scratch.keys.shape[2]
    keys, values = scratch.keys.to(dtype).transpose(1, 2), scratch.values.to(dtype).transpose(1, 2)  # [B, H, M, K]
    bias = scratch.bias if scratch.bias.ndim == 3 else scratch.bias[:, :, None]  # [B, M, H] or [B, M, 1]
    bias = bias.to(dtype).mT[..., None].expand(-1, heads, -1, 1)  # [B, H, M, 1]
    source = torch.nn.functional.one_hot(scratch.channel, n_channels).to(dtype)[:, None]  # [B, 1, M, C]
    own_bias = source * local.bias[:, None, None]  # [B, H, M, C]
    n_marks = 0
    if local.marks is not None and scratch.marks is not None:
        n_marks = scratch.marks.shape[-1]
        marks = source[..., None] * scratch.marks.to(dtype)[:, None, :, None]  # [B, 1, M, C, R]
        values = torch.cat([values, marks.flatten(3).expand(-1, heads, -1, -1)], -1)  # [B, H, M, V+CR]
    return _Features(torch.cat([keys, bias, own_bias], -1), values, n_marks)


def _spans(scratch: ScratchKeys, starts: list[int], stops: list[int]) -> list[tuple[int, int]]:
    """For each block, from the first to past the last entry that any of its queries, in any item, can see."""
    device = scratch.visible_from.device
    first = torch.tensor(starts, device=device)[:, None, None]  # [blocks, 1, 1]
    past = torch.tensor(stops, device=device)[:, None, None]  # [blocks, 1, 1]
    alive = ((scratch.visible_from < past) & (scratch.visible_until > first)).any(1)  # [blocks, M]
    index = torch.arange(alive.shape[1], device=device)  # [M]
    last = torch.where(alive, index + 1, 0).amax(1)  # [blocks]
    start = torch.where(alive, index, alive.shape[1]).amin(1)  # [blocks]
    return [(min(a, b), b) for a, b in torch.stack([start, last], 1).tolist()]


def _block(
    q: torch.Tensor,
    start: int,
    local: _Local,
    scratch: ScratchKeys | None,
    features: _Features | None,
    span: tuple[int, int],
) -> _Part:
    """All queries of one block, q [B, n, C, H, K]."""
    n_items, n, n_channels, n_heads, _ = q.shape
    rows = (n_items, n_heads, n * n_channels)
    logits, seen = _local_logits(q, start, local)  # [B, n, C, H, J], [B, n, C]
    scratch_output = scratch_mass = None
    if features is not None and scratch is not None and span[1] > span[0]:
        hidden = _hidden(scratch, local, start, n, span)  # [B, n, C, m]
        seen = seen | ~hidden.all(-1)  # [B, n, C]
    # the empty key: without it the softmax of a query that sees nothing would be 0 / 0
    empty = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(seen, -torch.inf)  # [B, n, C]
    logits = torch.cat([logits, empty[..., None, None].expand(-1, -1, -1, n_heads, 1)], -1)  # [B, n, C, H, J]
    if features is not None and scratch is not None and span[1] > span[0]:
        asked = torch.cat([q, _ask(q)], -1).permute(0, 3, 1, 2, 4).reshape(*rows, -1)  # [B, H, nC, K+1+C]
        local_logits = logits.permute(0, 3, 1, 2, 4).reshape(*rows, -1)  # [B, H, nC, J]
        keys, values = features.keys[:, :, slice(*span)], features.values[:, :, slice(*span)]  # [B, H, m, ...]
        got, weight, scratch_mass = _JointSoftmax.apply(asked, keys, values, local_logits, hidden.flatten(1, 2))
        weight = weight.unflatten(2, (n, n_channels)).permute(0, 2, 3, 1, 4)  # [B, n, C, H, J]
        scratch_output = got.unflatten(2, (n, n_channels)).permute(0, 2, 3, 1, 4)  # [B, n, C, H, V+CR]
    else:
        weight = torch.softmax(logits, -1)  # [B, n, C, H, J]
    return _gather(weight, scratch_output, scratch_mass, start, local, features)


def _ask(q: torch.Tensor) -> torch.Tensor:
    """What makes the features of the keys count: 1 for the bias, the own channel for the channel bias."""
    n_items, n, n_channels, n_heads, _ = q.shape
    one = q.new_ones(n_channels, 1)  # [C, 1]
    own = torch.eye(n_channels, dtype=q.dtype, device=q.device)  # [C, C]
    return torch.cat([one, own], 1)[:, None].expand(n_items, n, -1, n_heads, -1)  # [B, n, C, H, 1+C]


def _hidden(scratch: ScratchKeys, local: _Local, start: int, n: int, span: tuple[int, int]) -> torch.Tensor:
    """Which entries a query cannot see, [B, n, C, m]."""
    part = slice(*span)
    query = torch.arange(start, start + n, device=local.keys.device)[:, None]  # [n, 1]
    arrived = scratch.visible_from[:, None, part] <= query  # [B, n, m]
    alive = arrived & (query < scratch.visible_until[:, None, part])  # [B, n, m]
    n_channels = local.readable.shape[1]
    source = scratch.channel[:, None, part].expand(-1, n_channels, -1)  # [B, C, m]
    allowed = local.readable.gather(2, source)  # [B, C, m]
    return ~(alive[:, :, None] & allowed[:, None])


def _local_logits(q: torch.Tensor, start: int, local: _Local) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of near (patch by patch, all channels) then far keys, [B, n, C, H, SC+F]; who sees any, [B, n, C]."""
    n_items, n, n_channels, n_heads, _ = q.shape
    groups, seen = [], torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
    if local.near:
        keys = local.near_of(local.keys, start, n).permute(0, 1, 3, 4, 5, 2).flatten(4)  # [B, n, H, K, SC]
        logits = (
            (q.transpose(2, 3) @ keys).transpose(2, 3).unflatten(-1, (local.near, n_channels))
        )  # [B, n, C, H, S, C]
        own = torch.eye(n_channels, dtype=q.dtype, device=q.device)  # [C, C]
        logits = logits + own[:, None, None] * local.bias[:, None, None]  # [B, n, C, H, S, C]
        present = local.near_of(local.present, start, n).mT[:, :, None]  # [B, n, 1, S, C]
        visible = present & local.readable[:, None, :, None]  # [B, n, C, S, C]
        groups.append(torch.where(visible[:, :, :, None], logits, -torch.inf).flatten(4))  # [B, n, C, H, SC]
        seen = seen | visible.any(-1).any(-1)  # [B, n, C]
    if local.far:
        keys = local.far_of(local.keys, start, n)  # [B, n, C, H, K, F]
        logits = (q[..., None] * keys).sum(-2) + local.bias[:, None]  # [B, n, C, H, F]
        visible = local.far_of(local.present, start, n)  # [B, n, C, F]
        groups.append(torch.where(visible[:, :, :, None], logits, -torch.inf))  # [B, n, C, H, F]
        seen = seen | visible.any(-1)  # [B, n, C]
    return torch.cat(groups, -1), seen


def _gather(
    weight: torch.Tensor,
    scratch_output: torch.Tensor | None,
    scratch_mass: torch.Tensor | None,
    start: int,
    local: _Local,
    features: _Features | None,
) -> _Part:
    """Multiply the probabilities back into every group, weight [B, n, C, H, J]."""
    n, n_channels = weight.shape[1:3]
    width = local.values.shape[-1]
    near, far, _ = weight.split([local.near * n_channels, local.far, 1], -1)
    outputs, marks = [], []
    near_mass = far_mass = None
    if local.near:
        values = local.near_of(local.values, start, n).permute(0, 1, 3, 5, 2, 4).flatten(3, 4)  # [B, n, H, SC, V]
        outputs.append((near.transpose(2, 3) @ values).transpose(2, 3))  # [B, n, C, H, V]
        near = near.unflatten(-1, (local.near, n_channels))  # [B, n, C, H, S, C]
        near_mass = near.detach().sum((2, 3))  # [B, n, S, C]
        if local.marks is not None:
            own = near.diagonal(dim1=2, dim2=5).permute(0, 1, 4, 2, 3)  # [B, n, C, H, S]
            marks.append(own @ local.near_of(local.marks, start, n).mT)  # [B, n, C, H, R]
    if local.far:
        values = local.far_of(local.values, start, n)  # [B, n, C, H, V, F]
        outputs.append((far[..., None, :] * values).sum(-1))  # [B, n, C, H, V]
        far_mass = far.detach().sum(3)  # [B, n, C, F]
        if local.marks is not None:
            marks.append(far @ local.far_of(local.marks, start, n).mT)  # [B, n, C, H, R]
    if scratch_output is not None and features is not None:
        outputs.append(scratch_output[..., :width])  # [B, n, C, H, V]
        if features.n_marks:
            by_channel = scratch_output[..., width:].unflatten(-1, (n_channels, -1))  # [B, n, C, H, C, R]
            marks.append(by_channel.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3))  # [B, n, C, H, R]
    return _Part(
        sum(outputs[1:], outputs[0]), sum(marks[1:], marks[0]) if marks else None, near_mass, far_mass, scratch_mass
    )


def _add_local_mass(mass: torch.Tensor, start: int, window: int, near: int, part: _Part) -> None:
    """Add a block's probabilities to the patches that received them, mass [B, W+N, C]."""
    far = window - near
    if part.far_mass is not None:
        n = part.far_mass.shape[1]
        for step in range(far):
            mass[:, start + 1 + step : start + 1 + step + n] += part.far_mass[..., step]
    if part.near_mass is not None:
        n = part.near_mass.shape[1]
        for step in range(near):
            first = start + 1 + far + step
            mass[:, first : first + n] += part.near_mass[:, :, step]


class _JointSoftmax(torch.autograd.Function):
    """Attention over entries whose softmax is shared with logits computed elsewhere.

    Takes queries [B, H, T, K], keys [B, H, M, K], values [B, H, M, V], the other logits [B, H, T, J] and which
    entries are hidden, [B, T, M]. Gives the entries' part of the output [B, H, T, V], the probabilities of the other
    logits [B, H, T, J] and those of the entries summed over queries and heads [B, M].

    Written out because autograd would copy the logits three times more.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, other: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n_other = other.shape[-1]
        # rows of zeros make room for the other logits, so that nothing is copied to join them
        k = torch.nn.functional.pad(k, (0, 0, n_other, 0))  # [B, H, J+M, K]
        v = torch.nn.functional.pad(v, (0, 0, n_other, 0))  # [B, H, J+M, V]
        logits = q @ k.mT  # [B, H, T, J+M]
        logits[..., n_other:].masked_fill_(hidden[:, None], -torch.inf)
        logits[..., :n_other] = other
        weight = torch.softmax(logits, -1)  # [B, H, T, J+M]
        output = weight @ v  # [B, H, T, V]
        mass = weight[..., n_other:].sum((1, 2))  # [B, M]
        ctx.save_for_backward(q, k, v, weight, output)
        ctx.n_other = n_other
        ctx.mark_non_differentiable(mass)
        return output, weight[..., :n_other].clone(), mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor, grad_other: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weight, output = ctx.saved_tensors
        n_other = ctx.n_other
        through = (output * grad_output).sum(-1) + (weight[..., :n_other] * grad_other).sum(-1)  # [B, H, T]
        grad = grad_output @ v.mT  # [B, H, T, J+M]
        grad[..., :n_other] += grad_other
        grad.sub_(through[..., None]).mul_(weight)
        grad_k = (grad.mT @ q)[:, :, n_other:]  # [B, H, M, K]
        grad_v = (weight.mT @ grad_output)[:, :, n_other:]  # [B, H, M, V]
        return grad @ k, grad_k, grad_v, grad[..., :n_other], None
