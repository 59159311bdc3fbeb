"""What was asked of the scratchpads and what they were given: by layer, channel, item or group, bursts included.

I items · L layers · C channels · T patches of an item · B items side by side · N patches
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from hamts.data.library import plain_frame
from hamts.data.panel import Panel
from hamts.data.patches import build_store
from hamts.errors import DataError
from hamts.groups import item_groups
from hamts.nn.controllers import BLOCK_PATCHES
from hamts.reader import HAMNetwork
from hamts.rollout import Rollout, roll

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster

__all__ = ["forecaster_usage", "usage_columns"]

UsageBy = Literal["layer", "channel", "item", "group"]
# a block with fewer observed tokens says nothing of a burst
FEWEST_TOKENS = 16


def forecaster_usage(
    model: HAMForecaster,
    df: Any = None,
    *,
    by: UsageBy = "layer",
    group_col: str | None = None,
    budget_share: float | None = None,
    static_df: Any = None,
    events: Any = None,
) -> Any:
    """Asked against achieved usage, a row for each layer, channel, item or group of items.

    Args:
        df: rows to read; None: those of the fit, where this process still has them.
        by: ``layer``, ``channel``, ``item``, or ``group`` of the static column ``group_col``.
        budget_share: another share than the fit's.

    Returns: asked_share; usage_share, written / observed tokens, tags included; score_share, asked for by a score
        among those that a score may keep; tag_share, kept because of a tag; burst_share, the largest usage of 64
        patches of an item; live_share, still held at the end; bytes, of the entries held, on average over items;
        worst, whether the row is furthest above what was asked.

    Raises DataError: E-REPLAY, E-OPTION, and what reading the frame raises.
    """
    if by not in ("layer", "channel", "item", "group"):
        known = ["channel", "group", "item", "layer"]
        raise DataError("E-OPTION", f"Unknown by={by!r}. Available: {known}.", fix="by='layer'")
    if df is not None:
        panel = model._panel_of(df, static_df, events)
    elif model._panel is None:
        raise DataError("E-REPLAY", "Usage is counted on the rows; a saved model has none.", fix="Pass df.")
    else:
        panel = model._panel
    network, share = model._fitted.network, model._share(budget_share)
    groups = item_groups(panel, by if by == "group" else None, group_col)
    plan = model._fitted.plan
    store = build_store(panel, patch_steps=plan.model.patch_steps, extra_steps=0, time_unit=plan.time_unit)
    rollout = roll(
        network, store, cutoffs=[np.zeros(0, dtype=np.int64)] * panel.n_items, steps=1, keep_traces=True,
        policies=network.policy(torch.tensor([share])),
    )  # fmt: skip
    columns = usage_columns(network, rollout, panel, share=share, by=by, groups=groups)
    return plain_frame(panel.schema.dialect, columns)


def usage_columns(
    network: HAMNetwork, rollout: Rollout, panel: Panel, *, share: float, by: str, groups: np.ndarray | None = None
) -> dict[str, list[Any]]:
    """Columns of ``forecaster_usage`` from a pass with traces; ``groups`` of the items, [I]."""
    counts = _counts(network, rollout, panel.n_items)
    labels, pick = _cells(network, panel, by, groups)
    # a token may be several entries
    counts["live"] = counts["live"] / network.config.entries_per_token
    entry_bytes = network.entry_bytes() * network.config.entries_per_token
    columns: dict[str, list[Any]] = {by: labels, "asked_share": [share] * len(labels)}
    rows = [{name: pick(number, value) for name, value in counts.items()} for number in range(len(labels))]
    parts = (
        ("usage_share", "kept", "heard"), ("score_share", "by_score", "able"), ("tag_share", "tagged", "heard"),
        ("live_share", "live", "heard"),
    )  # fmt: skip
    for name, what, of in parts:
        columns[name] = [float(row[what].sum() / max(row[of].sum(), 1)) for row in rows]
    columns["burst_share"] = [float(row["burst"].max(initial=0.0)) for row in rows]
    items = [1 if by == "item" else row["live"].shape[1] for row in rows]
    columns["bytes"] = [round(row["live"].sum()) * entry_bytes / n for row, n in zip(rows, items, strict=True)]
    most = max(columns["usage_share"], default=0.0)
    columns["worst"] = [value == most for value in columns["usage_share"]]
    return columns


def _counts(network: HAMNetwork, rollout: Rollout, items: int) -> dict[str, np.ndarray]:
    """Tokens by layer, item and channel, [L, I, C] each; the burst of each layer, item and channel."""
    layers, channels = network.config.layers, len(network.spec.roles)
    event = torch.tensor([role == "event" for role in network.spec.roles])[:, None]  # [C, 1]
    names = ("kept", "heard", "by_score", "able", "tagged", "live", "burst")
    counts = {name: np.zeros((layers, items, channels)) for name in names}
    blocks: dict[tuple[int, int], np.ndarray] = {}
    for chunk in rollout.traces:
        heard, able = chunk.heard.cpu() > 0, (chunk.heard.cpu() >= 0.5) & ~event  # 2 x [B, C, N]
        number = (chunk.first_patch[:, None] + torch.arange(heard.shape[2])) // BLOCK_PATCHES  # [B, N]
        for layer, trace in enumerate(chunk.layers):
            kept, tagged = trace.routed.cpu() & heard, trace.must_keep.cpu() & heard  # 2 x [B, C, N]
            parts = {
                "kept": kept, "heard": heard, "able": able, "tagged": tagged,
                "by_score": trace.by_score.cpu().any(-1) & able,
            }  # fmt: skip
            for name, part in parts.items():
                np.add.at(counts[name][layer], chunk.items.numpy(), part.sum(2).numpy())
            if trace.revised is not None:
                # kept after all, for a tag of this chunk
                late = trace.revised.cpu().sum(2).numpy()  # [B, C]
                for name in ("kept", "tagged"):
                    np.add.at(counts[name][layer], chunk.items.numpy(), late)
            for row, item in enumerate(chunk.items.tolist()):
                for block in number[row].unique().tolist():
                    inside = number[row] == block  # [N]
                    pair = np.stack([kept[row][:, inside].sum(1).numpy(), heard[row][:, inside].sum(1).numpy()])
                    place = blocks.setdefault((item, block), np.zeros((layers, 2, channels)))
                    place[layer] += pair
    for (item, _), found in blocks.items():
        enough = found[:, 1].sum(-1) >= FEWEST_TOKENS  # [L]
        share = np.where(enough, found[:, 0].sum(-1) / np.maximum(found[:, 1].sum(-1), 1), 0.0)  # [L]
        counts["burst"][:, item] = np.maximum(counts["burst"][:, item], share[:, None])
    assert rollout.memory is not None
    for layer, memory in enumerate(rollout.memory.layers):
        pad = memory.scratchpad
        owner, spot = pad.alive.cpu().nonzero(as_tuple=True)  # 2 x [entries]
        np.add.at(counts["live"][layer], (owner.numpy(), pad.channel.cpu()[owner, spot].numpy()), 1)
    return counts


def _cells(
    network: HAMNetwork, panel: Panel, by: str, groups: np.ndarray | None
) -> tuple[list[Any], Callable[[int, np.ndarray], np.ndarray]]:
    """Labels of the rows, and what part of [L, I, C] each of them is."""
    if by == "layer":
        return list(range(network.config.layers)), lambda row, x: x[row : row + 1]
    if by == "channel":
        return [channel.name for channel in panel.schema.channels], lambda row, x: x[:, :, row : row + 1]
    if by == "item":
        return panel.item_ids.tolist(), lambda row, x: x[:, row : row + 1]
    assert groups is not None
    names = sorted(set(groups.tolist()))
    return names, lambda row, x: x[:, groups == names[row]]
