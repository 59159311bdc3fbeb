"""Triton's interpreter, in which kernels written for a GPU run on a CPU.

It must be asked for before triton is imported, and holds for a whole process: ``test_interpreted.py`` starts one for
each file of kernels. Where neither it nor a GPU is at hand, those files are skipped.
"""

from __future__ import annotations

import builtins
import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS = INTERPRETED or torch.cuda.is_available()
WHY_NOT = "runs in the interpreter's own process"
DEVICE = "cpu" if INTERPRETED else "cuda"


class Step(int):
    """A loop variable of plain Python that also has the method of the tensor it is once compiled."""

    def to(self, *_: Any, **__: Any) -> Step:
        return self


def steps(*bounds: Any) -> Any:
    return (Step(n) for n in builtins.range(*(int(bound) for bound in bounds)))


def let_fla_be_interpreted() -> None:
    """Cure the two things that stop fla's chunked kernels: autotuning wants a driver, loop variables want ``to``."""
    if not INTERPRETED:
        return
    import fla.ops.common.chunk_delta_h as chunk_delta_h
    from triton.runtime.autotuner import Autotuner

    def first_config(self: Any, tuning_key: Any, configs: list[Any], bench: Any) -> bool:
        self.cache[tuning_key], self.configs_timings = configs[0], {configs[0]: 0.0}
        return True

    Autotuner.check_disk_cache = first_config
    Autotuner._bench = lambda self, *args, config, **meta: [0.0, 0.0, 0.0]
    for module in (chunk_delta_h,):
        module.range = steps
