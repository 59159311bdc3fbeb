"""The fused layer's kernels compile for a Hopper GPU, on a machine that has none."""

from __future__ import annotations

import pytest
from hopper import compiled_for_hopper

pytest.importorskip("triton")

PROGRAM = """
import test_layer_triton as layer

layer.DEVICE = "cpu"
width = int(sys.argv[1])
whole = layer.make_layer(2, width, torch.Generator().manual_seed(0))
half = {"dtype": torch.bfloat16, "requires_grad": True}
turn = whole.turn_of(torch.zeros(2, 9, dtype=torch.float64))
mixed, tail = torch.zeros(2, 3, 9, 6 * width, **half), torch.zeros(2, 3, 3, 6 * width, **half)
pending = torch.zeros(2, 2, 3, 2, width, **half)
present = torch.ones(2, 9, dtype=torch.bool)
q, k, v, keys, values = layer.layer_triton.layer_inputs(
    mixed, tail=tail, present=present, conv=whole.conv, gain=whole.key_norm.gain, turn=turn, pending_keys=pending,
    pending_values=pending,
)
queries = layer.layer_triton.turned_queries(mixed[..., : 2 * width], gain=whole.query_norm.gain, turn=turn, scale=1.0)
both = layer.layer_triton.mixed_branches(
    v.unflatten(0, (2, 3)), queries, marks=torch.zeros(2, 9, 3, 2, 3), now=torch.zeros(2, 3, 9, 3),
    gates=torch.zeros(2, 3, 9, 4, 2), opened=mixed[..., : 2 * width], recurrent_gain=whole.recurrent_norm.gain,
    exact_gain=whole.exact_norm.gain, from_marks=whole.from_marks,
)
layer.layer_triton.compared(v, v)
(q.sum() + k.sum() + keys.sum() + values.sum() + both.sum()).backward()
from hamts.ops.layer_triton_gates import cast_and_map, widened_sum

wide, weight = torch.zeros(9, width), torch.zeros(8, width)
narrow, made = cast_and_map(wide, weight, torch.zeros(8), torch.bfloat16)
widened_sum(narrow, made, weight)
from hamts.ops.layer_triton_rows import add_rows_, close_rows, end_rows, take_rows

with torch.no_grad():
    rows, index = torch.zeros(2, 9, 2, width, **half), torch.zeros(2, 4, dtype=torch.int64)
    add_rows_(rows, take_rows(rows, index, present[:, :4]), index, present[:, :4])
close_rows(present, 5)
end_rows(present, present, torch.zeros(2, 9, dtype=torch.int64), cap_kept=3, cap_must=2)
"""
KERNELS = {
    "inputs_kernel", "written_grad_kernel", "inputs_grad_kernel", "queries_kernel", "queries_grad_kernel",
    "mix_kernel", "mix_grad_kernel", "compared_kernel", "rows_kernel", "add_kernel",
    "closing_kernel", "rank_kernel", "end_kernel",
    "cast_and_map_kernel", "widened_sum_kernel",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("width", [32, 64])
def test_every_kernel_compiles_for_a_hopper_gpu(width: int) -> None:
    assert set(compiled_for_hopper(PROGRAM, width)) == KERNELS
