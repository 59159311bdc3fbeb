"""The read of one patch of many streams whose entries lie in shared pages, by the step's kernel.

S streams · C channels · H heads · K key · V value · R marks · W window patches
"""

from __future__ import annotations

import torch

from hamts.ops.attend_triton import check
from hamts.ops.attend_triton_inputs import precision
from hamts.ops.decode_triton import MOST_CHANNELS, Paged, attend_step
from hamts.ops.stores import StoreError

__all__ = ["attend_pages"]


@torch.no_grad()
def attend_pages(
    queries: torch.Tensor,
    *,
    pages: Paged,
    local_keys: torch.Tensor,
    local_values: torch.Tensor,
    local_present: torch.Tensor,
    readable: torch.Tensor,
    channel_bias: torch.Tensor,
    window: int,
    cross_span: int = 1,
    local_marks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What ``attend`` gives of one patch, output [S, 1, C, H, V] and marks [S, 1, C, H, R], without gradients.

    Products run in the dtype of the pages, which are too large to be cast in every step; the arguments are those of
    ``attend_triton.attend``.
    """
    S, N, C, H, K = queries.shape
    if N != 1 or C > MOST_CHANNELS:
        raise ValueError(f"A step of pages reads 1 patch of at most {MOST_CHANNELS} channels. Got {N} of {C}.")
    if C > 1 and pages.channel is None:
        raise StoreError(f"Pages must say the channel of each entry where several ask. Got queries of {C} channels.")
    if not 0 <= cross_span <= window or window < 1:
        raise ValueError(f"cross_span must lie in 0 .. window. Got cross_span={cross_span}, window={window}.")
    if local_keys.shape[1] != window + 1:
        raise ValueError(f"local_keys must hold the window and the patch, {window + 1}. Got {local_keys.shape[1]}.")
    dtype, n_marks = pages.keys.dtype, 0 if local_marks is None else local_marks.shape[-1]
    width = local_values.shape[-1]
    check(key_width=K, value_width=width, dtype=dtype, device=queries.device, n_marks=n_marks)
    if (pages.marks is not None) != (n_marks > 0):
        raise ValueError("Pages must have marks where the window has them, and only there.")
    output, marks, _ = attend_step(
        queries.to(dtype).flatten(1, 2).contiguous(),  # [S, C, H, K]
        local_keys=local_keys.to(dtype).flatten(1, 2).contiguous(),  # [S, (W + 1) C, H, K]
        local_values=local_values.to(dtype).flatten(1, 2).contiguous(),  # [S, (W + 1) C, H, V]
        local_marks=None if local_marks is None or not n_marks else local_marks.flatten(1, 2),  # [S, (W + 1) C, R]
        local_present=local_present,
        scratch=pages,
        readable=readable,
        channel_bias=channel_bias,
        window=window,
        cross_span=cross_span,
        precision=precision(),
    )
    grid = (S, 1, C, H, -1)
    return output.view(grid).to(queries.dtype), None if marks is None else marks.view(grid)
