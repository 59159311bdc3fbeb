"""Which entries were read: the attention that each received while it lay in a scratchpad, and when.

B rows of a batch · I items · C channels · N patches of a chunk · H heads · M entries · L layers · F future steps
R (entry, chunk) pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from hamts.data.panel import Panel
from hamts.data.patches import PatchStore
from hamts.nn.ham import LayerTrace
from hamts.nn.tokens import Policy
from hamts.reader import HAMNetwork, StreamMemory
from hamts.rollout import Rollout
from hamts.routes_worth import locate_rows

__all__ = ["add_reads", "forecast_reads", "read_table"]

KEYS = ["item", "channel", "patch"]


def read_table(network: HAMNetwork, store: PatchStore, rollout: Rollout) -> pd.DataFrame:
    """One row per entry and chunk of the past in which some step could see it, in order of chunks.

    Columns: ``item``, ``channel`` and ``patch`` of the entry, by number; ``first_patch`` and ``last_patch`` of the
    chunk; ``mass``: share of attention that the entry received, mean over channels and heads, summed over steps and
    layers; ``sights``: steps that could see it, summed over layers.

    Args:
        rollout: of ``roll(..., keep_traces=True)``; smaller chunks say more exactly when an entry was read.
    """
    parts = [_empty()]
    for chunk in rollout.traces:
        N = chunk.heard.shape[2]
        for layer in chunk.layers:
            parts.append(_layer_rows(network, store, chunk.items, chunk.first_patch, N, layer))
    rows = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    return rows.groupby([*KEYS, "first_patch", "last_patch"], as_index=False)[["mass", "sights"]].sum()


def add_reads(
    table: pd.DataFrame, network: HAMNetwork, store: PatchStore, panel: Panel, *, rollout: Rollout
) -> pd.DataFrame:
    """The table with one more column, ``read_mass``.

    It is the share of attention that the entry received, mean over the channels, heads, steps and layers that could
    read it since it left the window, up to the end of the rollout; NaN for what was never in a scratchpad. What other
    channels may not read counts as read with 0.

    Args:
        table: of ``routes_table(..., by="entry")`` over the same rollout.
    """
    reads = read_table(network, store, rollout).groupby(KEYS)[["mass", "sights"]].sum()
    where = locate_rows(table, store, panel)
    found = reads.reindex(pd.MultiIndex.from_frame(where[KEYS]))
    share = (found["mass"] / found["sights"]).to_numpy()
    return table.assign(read_mass=np.where(table["status"].isin(["below", "pending"]), np.nan, share))


@torch.no_grad()
def forecast_reads(
    network: HAMNetwork,
    store: PatchStore,
    *,
    item: int,
    cutoff: int,
    memory: StreamMemory,
    steps: int,
    policies: Policy | Sequence[Policy],
) -> pd.DataFrame:
    """Which entries the forecast of one item reads: ``item, channel, patch, forecast_mass``, most read first.

    ``forecast_mass`` is the share of attention, mean over channels, heads, patches of the horizon and layers.

    Args:
        memory: of one row, before the cutoff (observed steps).
        steps: F, steps to forecast.
    """
    policies = [policies] * network.config.layers if isinstance(policies, Policy) else list(policies)
    items, cutoffs = torch.tensor([item]), torch.tensor([cutoff])
    chunk = store.horizon(items, cutoffs, steps, torch.tensor([False]))
    N = chunk.present.shape[1]
    # a horizon's own entries live outside the cap
    free = [replace(policy, cap_kept=None, cap_must=None) for policy in policies]
    reading = network(chunk, memory, free, advance=False)
    first = torch.tensor([(int(store.lead[item]) + cutoff) // store.patch_steps])
    parts = [_empty()]
    parts += [_layer_rows(network, store, items, first, N, layer) for layer in reading.traces]
    rows = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    # what leaves the window on the way, and the horizon's own tokens, are no entries yet
    rows = rows[rows["patch"] < int(first) - network.config.window_patches]
    total = rows.groupby(KEYS, as_index=False)[["mass", "sights"]].sum()
    total["forecast_mass"] = total["mass"] / total["sights"]
    total = total.drop(columns=["mass", "sights"])
    return total.sort_values("forecast_mass", ascending=False, kind="stable", ignore_index=True)


def _layer_rows(
    network: HAMNetwork, store: PatchStore, items: torch.Tensor, first: torch.Tensor, N: int, trace: LayerTrace
) -> pd.DataFrame:
    """What one layer read of its entries in one chunk."""
    assert trace.entries_mass is not None  # traces were asked for
    b, m = (trace.entries_sights > 0).cpu().nonzero(as_tuple=True)  # 2 x [R]
    item = items.cpu()[b]  # [R]
    sights = trace.entries_sights.cpu()[b, m].numpy()  # [R]
    position = trace.entries_position.cpu()[b, m].numpy()  # [R]
    readers = len(store.roles) * network.config.heads
    start = first.cpu()[b].numpy()  # [R]
    rows = pd.DataFrame(
        {
            "item": item.numpy(),
            "channel": trace.entries_channel.cpu()[b, m].numpy(),
            "patch": _patches(store, item.numpy(), position),
            "first_patch": start,
            "last_patch": start + N - 1,
            "mass": trace.entries_mass.detach().cpu().double()[b, m].numpy() * sights / readers,
            "sights": sights,
        }
    )
    if network.config.entries_per_token == 1:
        return rows
    # the steps of a token are seen together, and share what it receives
    return rows.groupby([*KEYS, "first_patch", "last_patch"], as_index=False).agg({"mass": "sum", "sights": "max"})


def _patches(store: PatchStore, items: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Patch on the item's grid of every true position, [R]."""
    patch = np.zeros(len(items), dtype=np.int64)
    every = store.position.numpy()
    for item in np.unique(items):
        first, count = int(store.first_row[item]), int(store.row_count[item])
        mine = items == item
        place = np.searchsorted(every[first : first + count], position[mine])
        patch[mine] = place + int(store.first_patch[item])
    return patch


def _empty() -> pd.DataFrame:
    columns = [*KEYS, "first_patch", "last_patch", "mass", "sights"]
    return pd.DataFrame({name: np.zeros(0, dtype=float if name == "mass" else np.int64) for name in columns})
