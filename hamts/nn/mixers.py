"""The rivals of the HAM layer by name, each as large as HAM's memory would be.

A rival that has a size is built as large as fits in the bytes that one item's memory of HAM takes when its scratchpads
are full: recurrent state, window and ``budget_bytes``. ``attention``, ``gdn_gsa`` and ``block_sparse`` keep everything,
``recurrent`` has the state of HAM and no more.

    attention          softmax over everything, no state, no gates
    recurrent          gated delta rule alone
    recurrent_wide     the same with keys and values as wide as the bytes allow
    window             softmax over the last patches, no state
    recurrent_window   state, and a window as long as the bytes allow
    gdn_gsa            layers of gated delta rule and of gated softmax attention in turn (the paper's stacked hybrid)
    top_write          state, and a bounded exact cache of the tokens that changed the state most (HOLA)
    log_linear         state split by age into segments, each weighted (log-linear attention)
    pooled             state, window, and one entry for every few tokens (CAT, latent contexts)
    block_sparse       everything kept, blocks of it read (mixture of block attention)
    neighbours         state, window, and raw patches whose nearest neighbours go on (retrieval)

In every one, a token also reads its own values and those of other channels at its step: that is no memory.

B items · C channels · H heads · K key · V value
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hamts.config import ModelConfig
from hamts.nn.ham import HAMLayer
from hamts.nn.mixers_base import MixerLayer, Parts
from hamts.nn.mixers_kept import BlockSparseLayer, PooledLayer, SlidingLayer, TopWriteLayer
from hamts.nn.mixers_log_linear import LogLinearLayer
from hamts.nn.mixers_neighbours import NeighboursLayer
from hamts.nn.mixers_parts import NEVER, fixed_bytes, row_bytes

__all__ = ["layer_makers"]

MOST_LEVELS = 32


@dataclass(frozen=True)
class _Allowance:
    """Bytes that the layers of one item may take together."""

    config: ModelConfig
    channels: int
    budget_bytes: int

    @property
    def total(self) -> float:
        """What HAM takes with full scratchpads."""
        return self.config.layers * self.fixed(lambda: HAMLayer(self.config)) + self.budget_bytes

    @property
    def each(self) -> float:
        """Of that, what one layer may take."""
        return self.total / self.config.layers

    def fixed(self, make: Callable[[], nn.Module]) -> int:
        """Bytes of one item in an empty layer; nothing is computed or drawn."""
        with torch.device("meta"):
            memory = make().empty_memory(1, self.channels, torch.zeros(1))  # type: ignore[operator]
        return fixed_bytes(memory)

    def rows(self, layer: MixerLayer) -> int:
        """Bytes of one kept row of a layer."""
        return row_bytes(layer.empty_memory(1, 1, torch.zeros(1, device="meta")).kept)

    def refuse(self, smallest: float) -> ValueError:
        """What to say where even the smallest size of a rival takes ``smallest`` bytes in all layers."""
        needed = math.ceil(smallest - (self.total - self.budget_bytes))
        return ValueError(
            f"mixer {self.config.mixer!r} with {self.channels} channels needs budget_bytes of at least {needed:,}."
            f" Got {self.budget_bytes:,}."
        )

    def fill(self, make: Callable[[int], MixerLayer], *, at_once: int = 1) -> int:
        """How many rows, in multiples of ``at_once``, a layer can keep beside its fixed part."""
        with torch.device("meta"):
            row = self.rows(make(1)) * at_once
        fixed = self.fixed(lambda: make(1))
        if self.each < fixed + row:
            raise self.refuse(self.config.layers * (fixed + row))
        return int((self.each - fixed) // row)

    def widest(self, make: Callable[[int], MixerLayer], *, least: int, most: int) -> int:
        """The largest size whose empty layer fits; sizes below ``least`` are no rival."""
        if self.fixed(lambda: make(least)) > self.each:
            raise self.refuse(self.config.layers * self.fixed(lambda: make(least)))
        low, high = least, most
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.fixed(lambda: make(middle)) <= self.each  # noqa: B023 - used at once
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


def layer_makers(config: ModelConfig, *, channels: int, budget_bytes: int) -> list[Callable[[], nn.Module]]:
    """For each layer of a network, from the input up, what builds it. Nothing is built, or drawn, before it is called.

    Args:
        channels: C, of one item.
        budget_bytes: bytes of one item that HAM's scratchpads may take together.

    Raises:
        ValueError: the bytes are too few for the smallest of this kind, or the layers for ``gdn_gsa``.
    """
    allowance = _Allowance(config, channels, budget_bytes)
    L, W = config.layers, config.window_patches
    if config.mixer == "ham":
        return [lambda: HAMLayer(config)] * L
    plain = Parts(recurrent=True, window=1, keeps=False)
    if config.mixer == "recurrent":
        return [lambda: MixerLayer(config, plain)] * L
    if config.mixer == "attention":
        everything = Parts(recurrent=False, window=W, keeps=True, branch_gates=False, output_gate=False)
        return [lambda: SlidingLayer(config, everything, patches=NEVER)] * L
    if config.mixer == "block_sparse":
        exact = Parts(recurrent=False, window=W, keeps=True, branch_gates=False)
        return [lambda: BlockSparseLayer(config, exact)] * L
    if config.mixer == "gdn_gsa":
        if L < 2:
            raise ValueError(f"mixer 'gdn_gsa' stacks two kinds of layers and needs layers of at least 2. Got {L}.")
        gated = Parts(recurrent=False, window=W, keeps=True, branch_gates=False)
        pair: list[Callable[[], nn.Module]] = [
            lambda: MixerLayer(config, plain),
            lambda: SlidingLayer(config, gated, patches=NEVER),
        ]
        return [pair[number % 2] for number in range(L)]
    return _sized(allowance)


def _sized(allowance: _Allowance) -> list[Callable[[], nn.Module]]:
    """Rivals that are as large as the bytes allow."""
    config, C = allowance.config, allowance.channels
    L, W = config.layers, config.window_patches
    if config.mixer in ("window", "recurrent_window"):
        parts = Parts(recurrent=config.mixer == "recurrent_window", window=W, keeps=True)

        def sliding(patches: int) -> MixerLayer:
            return SlidingLayer(config, parts, patches=patches)

        patches = allowance.fill(sliding, at_once=C)
        return [lambda: sliding(patches)] * L
    if config.mixer == "top_write":
        cache = Parts(recurrent=True, window=W, keeps=True, branch_gates=False)
        entries = allowance.fill(lambda n: TopWriteLayer(config, cache, entries=n))
        return [lambda: TopWriteLayer(config, cache, entries=entries)] * L
    if config.mixer == "pooled":
        pools = Parts(recurrent=True, window=W, keeps=True, carried=W + config.pool_patches - 1)
        entries = allowance.fill(lambda n: PooledLayer(config, pools, entries=n))
        return [lambda: PooledLayer(config, pools, entries=entries)] * L
    if config.mixer == "recurrent_wide":
        head = config.head_state_width

        def wide(width: int) -> MixerLayer:
            return MixerLayer(config, Parts(recurrent=True, window=1, keeps=False, state_width=width))

        width = allowance.widest(wide, least=head + 1, most=64 * head)
        return [lambda: wide(width)] * L
    if config.mixer == "log_linear":
        parts = Parts(recurrent=True, window=1, keeps=False)
        levels = allowance.widest(lambda n: LogLinearLayer(config, parts, levels=n), least=3, most=MOST_LEVELS)
        return [lambda: LogLinearLayer(config, parts, levels=levels)] * L
    return _neighbours(allowance)


def _neighbours(allowance: _Allowance) -> list[Callable[[], nn.Module]]:
    """Raw patches in the first layer alone: the others would store the same."""
    config = allowance.config
    parts = Parts(recurrent=True, window=config.window_patches, keeps=False)

    def layer(patches: int) -> MixerLayer:
        return NeighboursLayer(config, parts, patches=patches)

    fixed = allowance.fixed(lambda: layer(0))
    per_patch = allowance.fixed(lambda: layer(1)) - fixed
    # a stretch to ask with, one to find, and what follows it
    least = 2 * config.window_patches + 1
    spare = allowance.total - config.layers * fixed
    if spare < least * per_patch:
        raise allowance.refuse(config.layers * fixed + least * per_patch)
    patches = int(spare // per_patch)
    first: list[Callable[[], nn.Module]] = [lambda: layer(patches)]
    return first + [lambda: layer(0)] * (config.layers - 1)
