"""Histories read under several policies at once: each item as many times as there are policies, side by side.

On a GPU starting kernels is what costs; ten rows take as long as one.

I items · X windows · L layers · C channels · T patches of an item
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import numpy as np
import torch

from hamts.controls import listed
from hamts.data.panel import Panel
from hamts.data.patches import PatchStore, build_store
from hamts.evaluation import Backtest, Windows
from hamts.nn.tokens import Policy, map_tensors
from hamts.reader import HAMNetwork
from hamts.rollout import ChunkTrace, Rollout, roll

__all__ = ["Histories", "beside", "counted", "repeated", "thin"]

# copies of memories that may wait on a GPU for their forecasts
HELD_BYTES = 2**28
# of a trace: what only the worth of single entries needs
EMPTIED = ("entries_bias", "entries_judged", "entries_position", "entries_channel")


@dataclass(frozen=True)
class Histories:
    """Reads the items of a panel up to their last windows, under any number of policies at once."""

    network: HAMNetwork
    panel: Panel
    windows: Windows
    time_unit: float

    def read(self, served: Sequence[Sequence[Policy]]) -> list[Backtest]:
        """One result for each list of policies (one a layer); items are repeated, once for each list."""
        if not served:
            return []
        items, X, times = self.panel.n_items, len(self.windows.items), len(served)
        result = roll(
            self.network,
            repeated(self._store(), times),
            cutoffs=list(self.windows.steps) * times,
            steps=self.windows.actual.shape[2],
            policies=[beside(layer, items) for layer in zip(*served, strict=True)],
            ends=np.tile([cuts[-1] if len(cuts) else 0 for cuts in self.windows.steps], times),
            keep_traces=thin,
            held_bytes=HELD_BYTES if self.network.unit.device.type == "cuda" else 0,
        )
        assert result.memory is not None
        result.quantiles[~np.tile(self.windows.known, (times, 1))] = np.nan
        read = map_tensors(result.traces, lambda tensor: tensor.cpu())
        backtests = []
        for k in range(times):
            own = torch.arange(k * items, (k + 1) * items, device=self.network.unit.device)
            memory = map_tensors(result.memory.select(own), lambda tensor: tensor.cpu())
            traces = [part for trace in read if (part := rows_of(trace, k * items, items)) is not None]
            quantiles, scale = (x[k * X : (k + 1) * X] for x in (result.quantiles, result.scale))
            rollout = Rollout(quantiles, scale, memory, traces, *counted(traces))
            backtests.append(Backtest(quantiles, memory, rollout))
        return backtests

    def read_controls(
        self, controls: dict[tuple[float, str], list[Policy]], *, side_by_side: bool
    ) -> dict[tuple[float, str], tuple[list[Policy], Backtest]]:
        """Each control with what came of it; in one pass where they all evict alike, as lists of what they keep."""
        rules = {policy.eviction for policies in controls.values() for policy in policies}
        if not side_by_side or len(rules) != 1:
            return {name: (policies, self.read([policies])[0]) for name, policies in controls.items()}
        store = self._store()
        lists = [[listed(policy, store) for policy in policies] for policies in controls.values()]
        return dict(zip(controls, zip(controls.values(), self.read(lists), strict=True), strict=True))

    def _store(self) -> PatchStore:
        P = self.network.config.patch_steps
        return build_store(self.panel, patch_steps=P, extra_steps=0, time_unit=self.time_unit)


def repeated(store: PatchStore, times: int) -> PatchStore:
    """The same rows with every item so many times, in the order of all items, then all again."""
    names = ("first_row", "row_count", "first_patch", "lead", "lengths", "static_values", "static_codes")
    each = {name: getattr(store, name) for name in names}  # [I, ...]
    return replace(store, **{name: x.repeat(times, *(1,) * (x.dim() - 1)) for name, x in each.items()})


def beside(policies: Sequence[Policy], items: int) -> Policy:
    """Policies of one layer that differ in their tensors alone as one, for all items under each of them in turn."""
    whole = [map_tensors(policy, lambda x: x.expand(items, *x.shape[1:]) if len(x) == 1 else x) for policy in policies]
    return _together(whole)


def _together(parts: list[Any]) -> Any:
    """Trees of tensors that agree in all else, as one whose tensors follow one another."""
    if isinstance(parts[0], torch.Tensor):
        return torch.cat(parts)
    first = parts[0]
    if is_dataclass(first) and not isinstance(first, type):
        names = first.__dataclass_fields__
        return type(first)(**{name: _together([getattr(part, name) for part in parts]) for name in names})
    if any(part != first for part in parts):
        raise ValueError(f"Policies read side by side must differ in their tensors alone. Got {first!r} and others.")
    return first


def thin(chunk: ChunkTrace) -> ChunkTrace:
    """What a frontier needs of a trace: decisions, ranks, and attention summed over entries."""
    layers = []
    for layer in chunk.layers:
        assert layer.entries_mass is not None  # traces that are kept have masses
        spent = (layer.entries_mass.double() * layer.entries_sights).sum(1, keepdim=True)  # [B, 1]
        # a slice of no length would keep the whole alive
        none = {name: getattr(layer, name).new_zeros(len(spent), 0) for name in EMPTIED}
        layers.append(replace(layer, **none, entries_mass=spent, entries_sights=torch.ones_like(spent).long()))
    return replace(chunk, layers=layers)


def rows_of(chunk: ChunkTrace, first: int, items: int) -> ChunkTrace | None:
    """The part of a trace that is of some items, counted from the first of them."""
    rows = torch.nonzero((chunk.items >= first) & (chunk.items < first + items)).squeeze(1)  # [b]
    if not len(rows):
        return None
    own = map_tensors(chunk, lambda tensor: tensor[rows] if tensor.dim() else tensor)
    return replace(own, items=own.items - first)


def counted(traces: Sequence[ChunkTrace]) -> tuple[int, int]:
    """Tokens that were written, and that could be heard, over layers."""
    kept = heard = 0
    for chunk in traces:
        for layer in chunk.layers:
            kept += int((layer.routed & (chunk.heard > 0)).sum())
            kept += 0 if layer.revised is None else int(layer.revised.sum())
            heard += int((chunk.heard > 0).sum())
    return kept, heard
