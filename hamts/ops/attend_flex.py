"""The read of entries by PyTorch's FlexAttention on compacted keys: a second implementation, and a yardstick.

One channel, entries in order of arrival. The window joins by a second call whose softmax is merged by its sum.

B items · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

__all__ = ["attend_entries", "prefix_mask"]

BLOCK = 128


def prefix_mask(visible_from: torch.Tensor, n_queries: int) -> BlockMask:
    """Which blocks of 128 entries each block of 128 queries sees, built from the order of arrival alone.

    Args:
        visible_from: first query that sees each entry, rising; beyond ``n_queries`` for padding, [B, M].
    """
    B, M = visible_from.shape
    since = visible_from.clamp(max=n_queries).int().contiguous()  # [B, M]
    starts = torch.arange(0, n_queries, BLOCK, device=since.device, dtype=torch.int32).expand(B, -1)  # [B, Q]
    lasts = (starts + BLOCK - 1).clamp_max(n_queries - 1)  # [B, Q]
    seen_by_all = torch.searchsorted(since, starts.contiguous(), right=True)  # [B, Q]
    seen_by_any = torch.searchsorted(since, lasts.contiguous(), right=True)  # [B, Q]
    full = seen_by_all // BLOCK  # [B, Q]
    partial = (seen_by_any + BLOCK - 1) // BLOCK - full  # [B, Q]
    n_blocks = (M + BLOCK - 1) // BLOCK
    order = torch.arange(n_blocks, device=since.device, dtype=torch.int32)
    partial_order = (order + full[..., None]) % n_blocks  # [B, Q, blocks]
    full_order = order.expand(*full.shape, -1)  # [B, Q, blocks]

    def arrived(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, entry: torch.Tensor) -> torch.Tensor:
        return since[b, entry] <= query

    return BlockMask.from_kv_blocks(
        partial[:, None].int(),
        partial_order[:, None].int().contiguous(),
        full[:, None].int(),
        full_order[:, None].int().contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=arrived,
        seq_lengths=(n_queries, M),
    )


def attend_entries(
    queries: torch.Tensor,
    *,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: BlockMask,
    compiled: Any = None,
) -> torch.Tensor:
    """Read entries alone, without the window and without biases, [B, N, H, V].

    Args:
        queries: [B, N, H, K], already scaled.
        keys: [B, M, H, K].
        values: [B, M, H, V].
        mask: of ``prefix_mask``.
        compiled: ``torch.compile(flex_attention)``; None runs the slow reference.
    """
    run = compiled or flex_attention
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))  # [B, H, N, K], [B, H, M, K], [B, H, M, V]
    return run(q, k, v, block_mask=mask, scale=1.0).transpose(1, 2)
