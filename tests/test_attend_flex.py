"""FlexAttention on compacted keys reads what the torch op reads of the scratchpad alone.

B items · N patches · H heads · K key · M entries (scratchpad)
"""

from __future__ import annotations

import pytest
import torch
from test_ops import distance

from hamts.ops.attend import attend
from hamts.ops.attend_flex import BLOCK, attend_entries, prefix_mask
from hamts.ops.types import ScratchKeys

# float32 rounds at 6e-8; sums over some hundred entries cost one digit
RELATIVE = 1e-5


@pytest.mark.parametrize(("n_patches", "n_entries"), [(1, 1), (130, 40), (200, 150), (256, 256), (300, 131)])
def test_flex_equals_torch_where_entries_arrive_in_order(n_patches: int, n_entries: int) -> None:
    generator = torch.Generator().manual_seed(n_patches)
    queries = torch.randn(2, n_patches, 1, 2, 16, generator=generator) * 0.5
    keys, values = (torch.randn(2, n_entries, 2, 16, generator=generator) for _ in range(2))
    since = torch.randint(0, n_patches + 20, (2, n_entries), generator=generator).sort(1).values
    # every query sees an entry, as every query of the layer sees its own patch
    since[:, 0] = 0
    no_window = torch.zeros(2, 1 + n_patches, 1, dtype=torch.bool)
    truth = attend(
        queries.double(),
        local_keys=torch.zeros(2, 1 + n_patches, 1, 2, 16),
        local_values=torch.zeros(2, 1 + n_patches, 1, 2, 16),
        local_present=no_window,
        scratch=ScratchKeys(
            keys=keys,
            values=values,
            channel=torch.zeros(2, n_entries, dtype=torch.int64),
            bias=torch.zeros(2, n_entries),
            visible_from=since,
            visible_until=torch.full_like(since, 2**40),
        ),
        readable=torch.ones(2, 1, 1, dtype=torch.bool),
        channel_bias=torch.zeros(2),
        window=1,
    )
    mask = prefix_mask(since, n_patches)
    got = attend_entries(queries[:, :, 0], keys=keys, values=values, mask=mask)
    assert distance(got, truth.output[:, :, 0]) <= RELATIVE


def test_only_blocks_that_some_query_sees_are_in_the_mask() -> None:
    since = torch.arange(0, 1024, 2)[None]
    mask = prefix_mask(since, 1024)
    # 128 queries see 64 more entries than the 128 before them
    assert mask.kv_num_blocks.shape == (1, 1, 1024 // BLOCK)
    full = mask.full_kv_num_blocks
    assert full is not None
    assert full.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert mask.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1, 1, 1, 1, 1]
