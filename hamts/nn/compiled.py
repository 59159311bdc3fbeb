"""Compiling the parts of a network that are many small operations in a row.

The recurrence and the read are kernels already; between them lie convolutions, norms, rotations and gates, each a pass
over memory of its own unless they are fused. Sizes that change, like the number of restarted streams, are compiled as
symbols at their second value, and nothing is compiled anew after that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["COMPILED", "COMPILE_MODES", "compile_parts"]

COMPILE_MODES = ("none", "default", "reduce-overhead")
# methods of a layer that are arithmetic alone: no decision on the host, no kernel of its own
COMPILED = ("_compared", "_convolved", "_turned_keys", "_turned_queries", "_mix", "_fed_forward")


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
    # the analysis of tiles fails on some graphs of symbolic sizes (torch 2.11)
    options: dict[str, Any] = {"triton.cudagraphs": mode == "reduce-overhead", "triton.coalesce_tiling_analysis": False}
    for part in network.modules():
        for name in COMPILED:
            method = getattr(type(part), name, None)
            if method is not None:
                setattr(part, name, torch.compile(getattr(part, name), options=options))
