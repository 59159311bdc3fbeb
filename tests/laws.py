"""What tests of the laws share: networks by their options, and what it means that two runs or memories are the same.

B items · I items · C channels · G targets · N patches · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from networks import (
    ALARM,
    HORIZON,
    LENGTHS,
    MODE,
    VALVE,
    leaves,
    make_config,
    make_network,
)

from hamts.data.panel import Panel
from hamts.data.patches import Chunk, PatchStore
from hamts.nn.scratchpad import LayerMemory
from hamts.nn.tokens import Policy
from hamts.reader import HAMNetwork, Reading, StreamMemory
from hamts.rollout import ChunkTrace, Rollout, roll

# sums in another order: float64 keeps 16 digits and float32 7, and two layers with norms and a softmax cost one or two
SAME = {torch.float64: 1e-10, torch.float32: 1e-5}

CAPS = {"cap_kept": 6, "cap_must": 4}


@functools.cache
def network_of(router: str = "learned+tags", window: int = 2, dtype: torch.dtype = torch.float64) -> HAMNetwork:
    config = make_config(router=router, window_patches=window, cross_span_patches=min(2, window))
    return make_network(config, dtype=dtype)


def middle_cutoffs(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    """In the middle of a patch, at its edge and at the very end; the last item has one only."""
    return [np.array([n - 17, n - 9, n - 8, n]) for n in lengths[:-1]] + [np.array([lengths[-1] - 1])]


def entries_of(memory: LayerMemory, item: int) -> dict[str, torch.Tensor]:
    """The live entries of one item, without padding."""
    alive = memory.scratchpad.alive[item]
    return {name: tensor[item][alive] for name, tensor in leaves(memory.scratchpad).items()}


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    """Apart by no more than ``tolerance`` times the size of what is compared."""
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} is not {tuple(wanted.shape)}"
    if not got.numel():
        return
    if not got.is_floating_point():
        assert torch.equal(got, wanted), what
        return
    assert torch.equal(got.isnan(), wanted.isnan()), what
    size = max(float(wanted.detach().nan_to_num().abs().max()), 1.0)
    apart = float((got - wanted).detach().nan_to_num().abs().max())
    assert apart <= tolerance * size, f"{what}: {apart:.1e} apart, of {size:.1e}"


def assert_same_memory(got: StreamMemory, wanted: StreamMemory, tolerance: float) -> None:
    for name, tensor in leaves(wanted.scale).items():
        assert_close(leaves(got.scale)[name], tensor, 1e-12, f"scale{name}")
    for number, (mine, other) in enumerate(zip(got.layers, wanted.layers, strict=True)):
        for name in ("state", "conv_tail", "error_mean"):
            assert_close(getattr(mine, name), getattr(other, name), tolerance, f"layer {number}.{name}")
        # what stands in the place of an absent patch is never read
        absent = ~other.pending.present[..., 0]  # [B, W]
        values = leaves(mine.pending)
        for name, tensor in leaves(other.pending).items():
            hidden = absent[(...,) + (None,) * (tensor.dim() - 2)]
            value, tensor = values[name].masked_fill(hidden, 0), tensor.masked_fill(hidden, 0)
            assert_close(value, tensor, tolerance, f"layer {number}.pending{name}")
        for item in range(len(other.state)):
            for name, tensor in entries_of(other, item).items():
                assert_close(entries_of(mine, item)[name], tensor, tolerance, f"layer {number}, item {item}{name}")


def decisions(traces: list[ChunkTrace], layer: int) -> dict[tuple[int, int, int], tuple[bool, float]]:
    """By item, channel and patch: whether it was routed, and how far its nearest score lies from the threshold."""
    found: dict[tuple[int, int, int], tuple[bool, float]] = {}
    for trace in traces:
        part = trace.layers[layer]
        distance = (part.scores - part.threshold[:, None, None]).abs()  # [B, C, N, S]
        nearest = distance.amin(-1) if distance.shape[-1] else torch.full(part.routed.shape, torch.inf)
        for row, item in enumerate(trace.items.tolist()):
            for n in range(part.routed.shape[2]):
                patch = int(trace.first_patch[row]) + n
                for c in range(part.routed.shape[1]):
                    if patch >= 0:
                        # a stream that goes on shows what it has read already as absent
                        found.setdefault((item, c, patch), (bool(part.routed[row, c, n]), float(nearest[row, c, n])))
    return found


def run(network: HAMNetwork, store: PatchStore, policy: Policy, **options: Any) -> Rollout:
    options = {"cutoffs": middle_cutoffs(), "steps": HORIZON, "keep_traces": True, **options}
    return roll(network, store, policies=policy, **options)


def assert_same_run(got: Rollout, wanted: Rollout, tolerance: float) -> None:
    """The same decisions, but for scores within 1e-5 of the threshold, and the same forecasts and memories."""
    for layer in range(len(wanted.traces[0].layers)):
        mine, other = decisions(got.traces, layer), decisions(wanted.traces, layer)
        assert mine.keys() == other.keys()
        changed = [place for place in other if mine[place][0] != other[place][0]]
        assert all(other[place][1] < 1e-5 for place in changed), f"layer {layer} decides otherwise at {changed}"
        if changed:
            assert tolerance == SAME[torch.float32], "float64 knows which side of the threshold a score is on"
            return
    apart = np.abs(got.quantiles - wanted.quantiles) / wanted.scale[:, :, None, None]
    assert np.isfinite(apart).all()
    assert apart.max() <= tolerance
    assert (got.kept, got.heard) == (wanted.kept, wanted.heard)
    assert got.memory is not None and wanted.memory is not None
    assert_same_memory(got.memory, wanted.memory, tolerance)


def edit_after(panel: Panel, steps: list[int], rng: np.random.Generator, *, same_mask: bool = False) -> Panel:
    """Everything from these steps of each item on becomes something else: values, gaps, tags, offsets."""
    values, offset = panel.values.copy(), np.zeros(panel.values.shape, dtype=np.float32)
    if panel.event_offset is not None:
        offset = panel.event_offset.copy()
    for item, step in enumerate(steps):
        rows = slice(panel.offsets[item] + step, panel.offsets[item + 1])
        old = values[rows]
        new = rng.normal(size=old.shape) * 50 + 20
        new[:, MODE] = rng.integers(0, 3, size=len(new))
        new[:, ALARM] = rng.integers(0, 2, size=len(new))
        new[:, VALVE] = rng.integers(0, 5, size=len(new))
        if same_mask:
            new[:, (ALARM, VALVE)] = old[:, (ALARM, VALVE)]
            new[np.isnan(old)] = np.nan
        else:
            new[rng.random(new.shape) < 0.4] = np.nan
        values[rows] = new
        offset[rows, ALARM] = rng.random(len(new))
    return replace(panel, values=values, event_offset=offset)


def patch_bounds(store: PatchStore, before_end: int) -> tuple[int, list[int]]:
    """An aligned patch index, and the first step of each item that belongs to it or to later ones."""
    stop = (store.lead + store.lengths) // store.patch_steps
    index = int(stop.max()) - before_end
    steps = (stop - before_end) * store.patch_steps - store.lead
    return index, steps.clamp_min(0).tolist()


@torch.no_grad()
def patch_by_patch(network: HAMNetwork, store: PatchStore, policy: Policy) -> list[tuple[Chunk, Reading]]:
    """A stream that is read one patch at a time."""
    items = torch.arange(store.n_items)
    stop = (store.lead + store.lengths) // store.patch_steps
    memory, found = network.empty_memory(store.n_items), []
    for n in range(int(stop.max())):
        chunk = store.window(items, stop - int(stop.max()) + n, 1)
        reading = network(chunk, memory, policy, stepwise=True)
        memory = reading.memory
        found.append((chunk, reading))
    return found
