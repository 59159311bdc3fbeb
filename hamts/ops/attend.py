"""The read: one softmax over the window, the other channels and the scratchpad.

Queries run in blocks of time. Scratchpad entries are sorted by the query that first sees them, so a block multiplies
only the entries some query of it may see. Four groups of keys share the softmax:

    near      every channel at the last ``cross_span`` patches
    far       the own channel's older window patches
    entries   the scratchpad
    empty     one key of value 0, seen only by queries that see nothing else

Biases and marks ride along as extra features of the scratchpad's keys and values, so that logits and probabilities,
the only large tensors, are each written once.

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches · R marks
n queries of a block · m entries of a block · S near patches (cross_span) · F far patches · J local keys of a query
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hamts.ops.joint_softmax import JointSoftmax
from hamts.ops.types import Attended, ScratchKeys, compute_dtype

__all__ = ["attend"]

# up to this many far patches are multiplied one by one, more as a band of a matrix product
FEW_FAR = 4
# queries in time handled at once
BLOCK, BLOCK_GPU = 64, 256


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
    block: int | None = None,
) -> Attended:
    """Read the window, the other channels and the scratchpad under one softmax; see the twin in ``naive.py``.

    Hidden and absent keys get probability exactly 0, so they must be finite. The gradient can be taken once.

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
        block: queries (in time) handled at once; bounds memory, changes nothing beyond rounding. None: few where a
            cache is to hold what they multiply, many on a GPU, where starting kernels is what costs.

    Source: the read of HAM, arXiv 2603.22325; channels, ``cross_span`` and the biases are ours.
    """
    n_patches, n_channels = queries.shape[1:3]
    if block is None:
        block = BLOCK_GPU if queries.is_cuda else BLOCK
    if not 0 <= cross_span <= window or window < 1:
        raise ValueError(f"cross_span must lie in 0 .. window. Got cross_span={cross_span}, window={window}.")
    if local_keys.shape[1] != window + n_patches:
        raise ValueError(
            f"local_keys must hold window + queries patches, {window + n_patches}. Got {local_keys.shape[1]}."
        )
    scratch = None if scratch is None else scratch.side_by_side()
    floats = (None,) * 3 if scratch is None else (scratch.keys, scratch.values, scratch.bias)
    dtype = compute_dtype(queries, local_keys, local_values, channel_bias, local_marks, *floats)
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
    entries = None if scratch is None or not scratch.keys.shape[1] else _entries(scratch, local)
    starts = list(range(0, n_patches, block))
    spans: list[_Span | None] = [None] * len(starts)
    if entries is not None:
        spans = _spans(entries, starts, [*starts[1:], n_patches])
    with torch.autocast(queries.device.type, enabled=False):
        parts = [
            _block(queries[:, start : start + block].to(dtype), start, local, entries, span)
            for start, span in zip(starts, spans, strict=True)
        ]
    local_mass = torch.zeros(local_present.shape, dtype=dtype, device=queries.device)  # [B, W+N, C]
    scratch_mass = None if scratch is None else local_mass.new_zeros(scratch.channel.shape)  # [B, M]
    for start, span, part in zip(starts, spans, parts, strict=True):
        _add_local_mass(local_mass, start, window, cross_span, part)
        if scratch_mass is not None and span is not None and part.scratch_mass is not None:
            scratch_mass[:, span.entries] += part.scratch_mass
    marks = [part.marks for part in parts if part.marks is not None]
    return Attended(
        output=torch.cat([part.output for part in parts], 1).to(queries.dtype),  # [B, N, C, H, V]
        marks=torch.cat(marks, 1).to(queries.dtype) if marks else None,  # [B, N, C, H, R]
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
class _Entries:
    """The scratchpad's side: biases are features of the keys, marks of the values (one set for each channel)."""

    keys: torch.Tensor  # [B, H, M, K+1+C]
    values: torch.Tensor  # [B, H, M, V+CR]
    channel: torch.Tensor  # [B, M]
    visible_from: torch.Tensor  # [B, M]
    visible_until: torch.Tensor  # [B, M]


@dataclass(frozen=True)
class _Span:
    """Entries that some query of a block can see: from ``first`` on, ``counts[b]`` of item b."""

    first: int
    counts: list[int]

    @property
    def entries(self) -> slice:
        return slice(self.first, self.first + max(self.counts))


@dataclass(frozen=True)
class _Part:
    """Result of one block."""

    output: torch.Tensor  # [B, n, C, H, V]
    marks: torch.Tensor | None  # [B, n, C, H, R]
    near_mass: torch.Tensor | None  # [B, n, S, C]
    far_mass: torch.Tensor | None  # [B, n, C, F]
    scratch_mass: torch.Tensor | None  # [B, m]


def _entries(scratch: ScratchKeys, local: _Local) -> _Entries:
    dtype, heads, n_channels = local.keys.dtype, scratch.keys.shape[2], local.keys.shape[2]
    keys, values = scratch.keys.to(dtype).transpose(1, 2), scratch.values.to(dtype).transpose(1, 2)  # [B, H, M, K]
    bias = scratch.bias if scratch.bias.ndim == 3 else scratch.bias[:, :, None]  # [B, M, H] or [B, M, 1]
    bias = bias.to(dtype).mT[..., None].expand(-1, heads, -1, 1)  # [B, H, M, 1]
    source = torch.nn.functional.one_hot(scratch.channel, n_channels).to(dtype)[:, None]  # [B, 1, M, C]
    own_bias = source * local.bias[:, None, None]  # [B, H, M, C]
    if local.marks is not None and scratch.marks is not None:
        marks = source[..., None] * scratch.marks.to(dtype)[:, None, :, None]  # [B, 1, M, C, R]
        values = torch.cat([values, marks.flatten(3).expand(-1, heads, -1, -1)], -1)  # [B, H, M, V+CR]
    return _Entries(
        keys=torch.cat([keys, bias, own_bias], -1),
        values=values,
        channel=scratch.channel,
        visible_from=scratch.visible_from,
        visible_until=scratch.visible_until,
    )


def _spans(entries: _Entries, starts: list[int], stops: list[int]) -> list[_Span | None]:
    """For each block of queries, what can be seen at all; None where nothing can."""
    device = entries.visible_from.device
    first = torch.tensor(starts, device=device)[:, None, None]  # [blocks, 1, 1]
    past = torch.tensor(stops, device=device)[:, None, None]  # [blocks, 1, 1]
    alive = (entries.visible_from < past) & (entries.visible_until > first)  # [blocks, B, M]
    index = torch.arange(alive.shape[-1], device=device)  # [M]
    begins = torch.where(alive, index, alive.shape[-1]).amin((1, 2)).tolist()  # [blocks]
    ends = torch.where(alive, index + 1, 0).amax(2).tolist()  # [blocks, B]
    return [
        _Span(begin, [max(end - begin, 0) for end in item_ends]) if max(item_ends) else None
        for begin, item_ends in zip(begins, ends, strict=True)
    ]


def _block(q: torch.Tensor, start: int, local: _Local, entries: _Entries | None, span: _Span | None) -> _Part:
    """All queries of one block, q [B, n, C, H, K]."""
    n_items, n, n_channels, n_heads, _ = q.shape
    logits, seen = _local_logits(q, start, local)  # [B, n, C, H, J-1], [B, n, C]
    if entries is None or span is None:
        weight = torch.softmax(_with_empty(logits, seen), -1)  # [B, n, C, H, J]
        return _gather(weight, None, None, start, local)
    hidden, seen_entries = _visibility(entries, local, start, n, span.entries)  # [B, n, C, m], [B, n, C]
    logits = _with_empty(logits, seen | seen_entries)  # [B, n, C, H, J]
    rows = (n_items, n_heads, n * n_channels)
    got, weight, mass = JointSoftmax.apply(
        torch.cat([q, _ask(q)], -1).permute(0, 3, 1, 2, 4).reshape(*rows, -1),  # [B, H, nC, K+1+C]
        entries.keys[:, :, span.entries],  # [B, H, m, K+1+C]
        entries.values[:, :, span.entries],  # [B, H, m, V+CR]
        logits.permute(0, 3, 1, 2, 4).reshape(*rows, -1),  # [B, H, nC, J]
        hidden.flatten(1, 2),  # [B, nC, m]
        span.counts,
    )
    weight = weight.unflatten(2, (n, n_channels)).permute(0, 2, 3, 1, 4)  # [B, n, C, H, J]
    got = got.unflatten(2, (n, n_channels)).permute(0, 2, 3, 1, 4)  # [B, n, C, H, V+CR]
    return _gather(weight, got, mass, start, local)


def _with_empty(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Add the empty key: without it the softmax of a query that sees nothing would be 0 / 0. [B, n, C, H, J]."""
    empty = torch.zeros(seen.shape, dtype=logits.dtype, device=logits.device).masked_fill(seen, -torch.inf)  # [B, n, C]
    return torch.cat([logits, empty[..., None, None].expand(-1, -1, -1, logits.shape[3], 1)], -1)


def _ask(q: torch.Tensor) -> torch.Tensor:
    """What makes the features of the keys count: 1 for the bias, the own channel for the channel bias."""
    n_items, n, n_channels, n_heads, _ = q.shape
    one = q.new_ones(n_channels, 1)  # [C, 1]
    own = torch.eye(n_channels, dtype=q.dtype, device=q.device)  # [C, C]
    return torch.cat([one, own], 1)[:, None].expand(n_items, n, -1, n_heads, -1)  # [B, n, C, H, 1+C]


def _visibility(entries: _Entries, local: _Local, start: int, n: int, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Which entries a query cannot see, [B, n, C, m], and whether it sees any, [B, n, C]."""
    dtype, n_channels = local.keys.dtype, local.readable.shape[1]
    query = torch.arange(start, start + n, device=local.keys.device)[:, None]  # [n, 1]
    channel = entries.channel[:, part]  # [B, m]
    arrived = entries.visible_from[:, None, part] <= query  # [B, n, m]
    alive = arrived & (query < entries.visible_until[:, None, part])  # [B, n, m]
    allowed = local.readable.gather(2, channel[:, None].expand(-1, n_channels, -1))  # [B, C, m]
    source = torch.nn.functional.one_hot(channel, n_channels)  # [B, m, C]
    held = alive.to(dtype) @ source.to(dtype)  # [B, n, C]
    seen = held @ local.readable.to(dtype).mT > 0  # [B, n, C]
    return ~alive[:, :, None] | ~allowed[:, None], seen


def _local_logits(q: torch.Tensor, start: int, local: _Local) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of near (patch by patch, all channels) then far keys, [B, n, C, H, SC+F]; who sees any, [B, n, C]."""
    n, n_channels = q.shape[1:3]
    groups, seen = [], torch.zeros(q.shape[:3], dtype=torch.bool, device=q.device)
    if local.near:
        keys = local.near_of(local.keys, start, n)  # [B, n, C, H, K, S]
        keys = keys.permute(0, 1, 3, 4, 5, 2).flatten(4)  # [B, n, H, K, SC]
        logits = (q.transpose(2, 3) @ keys).transpose(2, 3)  # [B, n, C, H, SC]
        logits = logits.unflatten(-1, (local.near, n_channels))  # [B, n, C, H, S, C]
        own = torch.eye(n_channels, dtype=q.dtype, device=q.device)  # [C, C]
        logits = logits + own[:, None, None] * local.bias[:, None, None]  # [B, n, C, H, S, C]
        present = local.near_of(local.present, start, n).mT[:, :, None]  # [B, n, 1, S, C]
        visible = present & local.readable[:, None, :, None]  # [B, n, C, S, C]
        groups.append(torch.where(visible[:, :, :, None], logits, -torch.inf).flatten(4))  # [B, n, C, H, SC]
        seen = seen | visible.any(-1).any(-1)  # [B, n, C]
    if local.far:
        logits = _far_products(q, start, local) + local.bias[:, None]  # [B, n, C, H, F]
        visible = local.far_of(local.present, start, n)  # [B, n, C, F]
        groups.append(torch.where(visible[:, :, :, None], logits, -torch.inf))  # [B, n, C, H, F]
        seen = seen | visible.any(-1)  # [B, n, C]
    return torch.cat(groups, -1), seen


def _far_products(q: torch.Tensor, start: int, local: _Local) -> torch.Tensor:
    """Products of queries with their far keys, [B, n, C, H, F]."""
    n, far = q.shape[1], local.far
    if far <= FEW_FAR:
        return (q[..., None] * local.far_of(local.keys, start, n)).sum(-2)
    keys = local.keys[:, start + 1 : start + n + far].permute(0, 2, 3, 4, 1)  # [B, C, H, K, n+F-1]
    square = q.permute(0, 2, 3, 1, 4) @ keys  # [B, C, H, n, n+F-1]
    # rows one longer than they are: row i then starts at its own diagonal
    skewed = torch.nn.functional.pad(square.flatten(-2), (0, n)).unflatten(-1, (n, n + far))  # [B, C, H, n, n+F]
    return skewed[..., :far].permute(0, 3, 1, 2, 4)


def _far_output(weight: torch.Tensor, start: int, local: _Local) -> torch.Tensor:
    """Far values under their probabilities, weight [B, n, C, H, F] -> [B, n, C, H, V]."""
    n, far = weight.shape[1], local.far
    if far <= FEW_FAR:
        return (weight[..., None, :] * local.far_of(local.values, start, n)).sum(-1)
    skewed = torch.nn.functional.pad(weight.permute(0, 2, 3, 1, 4), (0, n)).flatten(-2)  # [B, C, H, n(n+F)]
    square = skewed[..., :-n].unflatten(-1, (n, n + far - 1))  # [B, C, H, n, n+F-1]
    values = local.values[:, start + 1 : start + n + far].permute(0, 2, 3, 1, 4)  # [B, C, H, n+F-1, V]
    return (square @ values).permute(0, 3, 1, 2, 4)


def _gather(
    weight: torch.Tensor,
    scratch_output: torch.Tensor | None,
    scratch_mass: torch.Tensor | None,
    start: int,
    local: _Local,
) -> _Part:
    """Multiply the probabilities back into every group, weight [B, n, C, H, J]."""
    n, n_channels = weight.shape[1:3]
    width = local.values.shape[-1]
    near, far, _ = weight.split([local.near * n_channels, local.far, 1], -1)
    outputs, marks = [], []
    near_mass = far_mass = None
    if local.near:
        values = local.near_of(local.values, start, n)  # [B, n, C, H, V, S]
        values = values.permute(0, 1, 3, 5, 2, 4).flatten(3, 4)  # [B, n, H, SC, V]
        outputs.append((near.transpose(2, 3) @ values).transpose(2, 3))  # [B, n, C, H, V]
        near = near.unflatten(-1, (local.near, n_channels))  # [B, n, C, H, S, C]
        near_mass = near.detach().sum((2, 3))  # [B, n, S, C]
        if local.marks is not None:
            own = near.diagonal(dim1=2, dim2=5).permute(0, 1, 4, 2, 3)  # [B, n, C, H, S]
            marks.append(own @ local.near_of(local.marks, start, n).mT)  # [B, n, C, H, R]
    if local.far:
        outputs.append(_far_output(far, start, local))  # [B, n, C, H, V]
        far_mass = far.detach().sum(3)  # [B, n, C, F]
        if local.marks is not None:
            marks.append(far @ local.far_of(local.marks, start, n).mT)  # [B, n, C, H, R]
    if scratch_output is not None:
        outputs.append(scratch_output[..., :width])  # [B, n, C, H, V]
        if scratch_output.shape[-1] > width:
            by_channel = scratch_output[..., width:].unflatten(-1, (n_channels, -1))  # [B, n, C, H, C, R]
            marks.append(by_channel.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3))  # [B, n, C, H, R]
    marked = sum(marks[1:], marks[0]) if marks else None  # [B, n, C, H, R]
    return _Part(sum(outputs[1:], outputs[0]), marked, near_mass, far_mass, scratch_mass)


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
