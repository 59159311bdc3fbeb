"""The read's kernels compile for a Hopper GPU, on a machine that has none."""

from __future__ import annotations

import pytest
from hopper import compiled_for_hopper

pytest.importorskip("triton")

PROGRAM = """
from hamts.ops import attend_triton
from test_attend_triton import WideScene, gradient_of

attend_triton.check = lambda **_: None
sizes = {"n_channels": int(sys.argv[1]), "n_patches": int(sys.argv[2]), "key_width": 64, "value_width": 64}
scene = WideScene(**sizes, bias_per_head=True)
leaves, _ = scene.pair(torch.bfloat16, "cpu")
got = scene.read(attend_triton.attend, leaves, "cpu")
torch.autograd.grad(gradient_of(got), list(leaves.values()), materialize_grads=True)
got.scratch_mass
with torch.no_grad():
    scene.read(attend_triton.attend, leaves, "cpu")
"""
OF_PAGES = """
from dataclasses import replace
from hamts.ops import attend_pages, attend_triton
from hamts.ops.kernels import Kernels
from test_stores import KINDS, STREAMS, drawn_read, fed, open_store

attend_pages.check = attend_triton.check = lambda **_: None
kind = replace(KINDS["three channels"], dtype=torch.bfloat16, channels=int(sys.argv[1]))
store = open_store("paged", kind, STREAMS, grows=True, cap=90)
fed((store,), kind, 60, 2, 0)
store.kernel = "triton"
accepted = torch.ones(STREAMS, 2, dtype=torch.bool)
store._placed_by_kernel(accepted)
store.read(**drawn_read(kind, torch.Generator()), kernels=Kernels("triton"))
"""
KERNELS = {
    "bounds_kernel", "forward_kernel", "query_grad_kernel", "column_grad_kernel", "mass_kernel", "life_kernel",
    "column_kernel", "mark_kernel",
}  # fmt: skip
OF_A_STEP = {"living_kernel", "step_kernel", "join_kernel"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("n_channels", "n_patches"), [(1, 40), (3, 1)])
def test_every_kernel_compiles_for_a_hopper_gpu(n_channels: int, n_patches: int) -> None:
    expected = KERNELS | (OF_A_STEP if n_patches == 1 else set())
    assert set(compiled_for_hopper(PROGRAM, n_channels, n_patches)) == expected


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("n_channels", [1, 3])
def test_a_step_through_pages_compiles_for_a_hopper_gpu(n_channels: int) -> None:
    assert set(compiled_for_hopper(OF_PAGES, n_channels)) == {"step_kernel", "join_kernel", "place_kernel"}
