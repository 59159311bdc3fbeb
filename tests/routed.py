"""What tests of routes share: a small network that has read a panel, and its table against its live memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch

from hamts.config import MemoryConfig, ModelConfig
from hamts.data.frame import to_panel
from hamts.data.panel import Panel
from hamts.data.patches import PatchStore, build_store
from hamts.nn.backbone import ChannelSpec
from hamts.nn.tokens import Policy, map_tensors
from hamts.reader import HAMNetwork, StreamMemory
from hamts.rollout import Rollout, roll
from hamts.routes import memory_layers, routes_table

P, W = 4, 2

SHARE = 0.25


@dataclass(frozen=True)
class World:
    network: HAMNetwork
    store: PatchStore
    panel: Panel
    policy: Policy
    rollout: Rollout

    def table(self, **arguments: object) -> pd.DataFrame:
        return routes_table(
            self.network, self.store, self.panel, rollout=self.rollout, policies=self.policy, **arguments
        )  # type: ignore[arg-type]

    def read(self, ends: np.ndarray | None = None) -> Rollout:
        return roll(
            self.network, self.store, cutoffs=[np.zeros(0, int)] * self.store.n_items, steps=1,
            policies=self.policy, ends=ends, keep_traces=True, chunk_patches=7,
        )  # fmt: skip


def frame(
    lengths: dict[str, int], *, zone: str | None = None, first: str = "2024-03-28 05:00", holes: float = 0.1
) -> pd.DataFrame:
    """Hourly items with gaps, holes, a rare event and an action that is switched now and then."""
    rng = np.random.default_rng(4)
    parts = []
    for number, (name, length) in enumerate(lengths.items()):
        clock = pd.date_range(first, periods=length, freq="h", tz=zone) + pd.Timedelta(hours=3 * number)
        part = pd.DataFrame({"unique_id": name, "ds": clock})
        part["y"] = np.sin(np.arange(length) / 4) + rng.normal(0, 0.3, length)
        part["z"] = rng.normal(5, 1, length)
        part["past"] = rng.normal(size=length).cumsum()
        part["ahead"] = np.arange(length) % 24
        part["event"] = (rng.random(length) < 0.03).astype(float)
        part["action"] = np.repeat(rng.integers(0, 2, length // 20 + 1), 20)[:length].astype(float)
        part.loc[rng.random(length) < holes, "y"] = np.nan
        part.loc[length // 3 : length // 3 + 30, ["y", "z", "past"]] = np.nan
        # rows that are not there at all
        parts.append(part.drop(index=range(length // 2, length // 2 + 9)))
    return pd.concat(parts, ignore_index=True)


def world(
    panel: Panel,
    *,
    router: str = "learned+innovation+tags",
    caps: tuple[int, int],
    layers: int = 2,
    memory: MemoryConfig | None = None,
    resolution: str = "patch",
) -> World:
    patch_steps = P if panel.times is None else 1
    store = build_store(panel, patch_steps=patch_steps, extra_steps=24)
    config = ModelConfig(
        width=16, layers=layers, heads=2, patch_steps=patch_steps, window_patches=W, router=router, dropout=0.0,
        half_life_steps=(24.0, 96.0), resolution=resolution,
    )  # fmt: skip
    names = tuple(channel.name for channel in panel.schema.channels)
    spec = ChannelSpec(store.roles, (0,) * len(store.roles), store.calendar.shape[1], names=names)
    with torch.random.fork_rng():
        torch.random.manual_seed(3)
        network = HAMNetwork(config, memory or MemoryConfig(), spec).double().eval()
    policy = replace(network.policy(torch.tensor([SHARE])), cap_kept=caps[0], cap_must=caps[1])
    result = World(network, store, panel, policy, None)  # type: ignore[arg-type]
    sample = result.read()
    for number, layer in enumerate(memory_layers(network)):
        scores = torch.cat([chunk.layers[number].scores[chunk.heard >= 0.5] for chunk in sample.traces])
        layer.thresholds.calibrate(scores)
    return replace(result, rollout=result.read())


def without(memory: StreamMemory, row: int, position: float, channel: int) -> tuple[StreamMemory, int]:
    """A memory of one row with every copy of an entry cut out of the tensors, and how many there were."""
    one, layers, copies = memory.select(torch.tensor([row])), [], 0
    for layer in one.layers:
        pad = layer.scratchpad
        hit = pad.alive[0] & (pad.position[0] == position) & (pad.channel[0] == channel)
        copies += int(hit.sum())
        kept = map_tensors(pad, lambda tensor: tensor[:, ~hit])  # noqa: B023 - used at once
        layers.append(replace(layer, scratchpad=kept))
    return replace(one, layers=layers), copies


def three_items() -> Panel:
    with pytest.warns():
        return to_panel(
            frame({"a": 400, "b": 130, "c": 311}, zone="Europe/Berlin"),
            target=["y", "z"], futr_cols=["ahead"], event_cols=["event"], action_cols=["action"],
        )  # fmt: skip
