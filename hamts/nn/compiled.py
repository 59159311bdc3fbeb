"""Compiling the parts of a network that are many small operations in a row.

The recurrence and the read are kernels already; between them lie convolutions, norms, rotations and gates, each a pass
over memory of its own unless they are fused. Sizes are compiled as symbols: windows of other lengths and numbers of
restarted streams compile nothing anew.
"""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["COMPILED", "COMPILE_MODES", "compile_parts"]

COMPILE_MODES = ("none", "default", "reduce-overhead")
# methods of a layer that are arithmetic alone: no decision on the host, no kernel of its own
COMPILED = ("_convolved", "_turned_keys", "_turned_queries", "_mix", "_fed_forward")


def compile_parts(network: nn.Module, mode: str) -> None:
    """Compile in place, by torch's inductor, what ``COMPILED`` names in every part of a network.

    Args:
        mode: ``none``; ``default``: fuse; ``reduce-overhead``: and replay CUDA graphs, for short contexts, where
            launching costs more than computing.
    """
    if mode not in COMPILE_MODES:
        raise ValueError(f"Unknown compile mode {mode!r}. Available: {list(COMPILE_MODES)}.")
    if mode == "none":
        return
    for part in network.modules():
        for name in COMPILED:
            method = getattr(type(part), name, None)
            if method is not None:
                setattr(part, name, torch.compile(getattr(part, name), dynamic=True, mode=mode))
