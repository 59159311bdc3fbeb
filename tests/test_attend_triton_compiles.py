"""The read's kernels compile for a Hopper GPU, on a machine that has none.

The interpreter runs kernels without compiling them. Here they are compiled and not run, through Triton's own launcher
with a driver that names the device and does nothing else; it must be the only one of its process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = """
import json, sys
sys.path.insert(0, "tests")
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Hopper:
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_active_torch_device(self):
        return torch.device("cpu")

driver.set_active(Hopper())
launch, compiled = JITFunction.run, {}

def compile_only(self, *positional, grid, warmup, **named):
    kernel = launch(self, *positional, grid=grid, warmup=True, **named)
    compiled[self.__name__] = len(kernel.asm["cubin"])

JITFunction.run = compile_only
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
print(json.dumps(compiled))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("n_channels", "n_patches"), [(1, 40), (3, 1)])
def test_every_kernel_compiles_for_a_hopper_gpu(n_channels: int, n_patches: int) -> None:
    root = Path(__file__).parent.parent
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(n_channels), str(n_patches)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=root,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    compiled = json.loads(ran.stdout.strip().splitlines()[-1])
    expected = {"bounds_kernel", "forward_kernel", "query_grad_kernel", "column_grad_kernel", "mass_kernel"}
    expected |= {"life_kernel", "column_kernel", "mark_kernel"}
    if n_patches == 1:
        expected |= {"living_kernel", "step_kernel", "join_kernel"}
    assert set(compiled) == expected
    assert min(compiled.values()) > 0
