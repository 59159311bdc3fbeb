"""Activation checkpointing of a block whose decisions depend on more than its inputs.

A block forgets its intermediate tensors and computes them again for the gradient. The second time it must decide as it
did the first: between the two its thresholds have moved on, and its random numbers have been drawn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hamts.nn.tokens import Policy

__all__ = ["run_checkpointed"]


def run_checkpointed(
    block: nn.Module, x: torch.Tensor, tokens: Any, memory: Any, policy: Policy, **options: Any
) -> Any:
    """``block(x, tokens, memory, policy, **options)``, keeping these alone until the gradient is asked for."""
    generators = [g for g in (policy.explore_generator,) if g is not None]

    def contexts() -> tuple[Any, Any]:
        first = _Moment(block, generators)
        return contextlib.nullcontext(), first.again()

    return checkpoint(
        block, x, tokens, memory, policy, use_reentrant=False, preserve_rng_state=True, context_fn=contexts, **options
    )


class _Moment:
    """Buffers and random generators as they are now."""

    def __init__(self, block: nn.Module, generators: list[torch.Generator]) -> None:
        self.block, self.generators = block, generators
        self.buffers = [buffer.clone() for buffer in block.buffers()]
        self.states = [generator.get_state() for generator in generators]

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Everything as it was then; afterwards as it was before."""
        now = _Moment(self.block, self.generators)
        self._restore()
        try:
            yield
        finally:
            now._restore()

    def _restore(self) -> None:
        with torch.no_grad():
            for buffer, value in zip(self.block.buffers(), self.buffers, strict=True):
                buffer.copy_(value)
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state)
