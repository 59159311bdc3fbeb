"""Compiling Triton kernels for a Hopper GPU on a machine that has none.

The interpreter runs kernels without compiling them. Here they are compiled and not run, through Triton's own launcher
with a driver that names the device and does nothing else; it must be the only one of its process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

BEGIN = """
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
"""
END = """
print(json.dumps(compiled))
"""


def compiled_for_hopper(program: str, *arguments: int) -> dict[str, int]:
    """Kernels that a program launches, and the bytes that each is compiled to."""
    ran = subprocess.run(
        [sys.executable, "-c", BEGIN + program + END, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=Path(__file__).parent.parent,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    compiled: dict[str, int] = json.loads(ran.stdout.strip().splitlines()[-1])
    assert min(compiled.values()) > 0
    return compiled
