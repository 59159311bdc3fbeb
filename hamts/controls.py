"""The same weights with another hand on the scratchpad: what the controls of an evaluation keep.

Each control answers one question. ``random``: does selection matter? ``shuffled``: do the scores know more than how
much to keep? ``stride``: would a schedule do? ``recency``: would the newest do? ``oracle``: what would knowing have
been worth? ``graft``: is it the router or the weights?

I items · L layers · T patches of an item, in order of time · C channels
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from hamts.checks import calibrate_thresholds
from hamts.config import ROUTERS
from hamts.data.clock import as_numbers, effective_clock, locate
from hamts.data.panel import Panel
from hamts.data.patches import PatchStore, build_store
from hamts.errors import DataError
from hamts.evaluation import Spent, Windows, backtest, policies_for, spent_by, tagless
from hamts.nn.controls import Control
from hamts.nn.tokens import Policy
from hamts.reader import HAMNetwork
from hamts.rollout import Rollout

__all__ = ["Choices", "control_policies", "item_keys", "listed", "oracle_choices", "regrafted", "shuffled_choices"]


@dataclass(frozen=True)
class Choices:
    """Which tokens of every item go to the scratchpads, decided elsewhere."""

    position: torch.Tensor  # [I, T] float64, +inf for padding
    keep: torch.Tensor  # [L, I, T, C] bool
    rank: torch.Tensor  # [L, I, T, C] float64
    able: torch.Tensor  # [I, T, C] bool: may be kept by a score

    def policies(
        self, network: HAMNetwork, share: float, keys: torch.Tensor, held: list[torch.Tensor] | None = None
    ) -> list[Policy]:
        """One policy per layer that keeps these tokens and no others, in so many entries at most, L x [I]."""
        base = network.policy(torch.full((len(keys),), share))
        rooms = [None] * len(self.keep) if held is None else held
        return [
            tagless(base, Control("given", keys, layer=layer, position=self.position, keep=keep, rank=rank), held=room)
            for layer, (keep, rank, room) in enumerate(zip(self.keep, self.rank, rooms, strict=True))
        ]


def control_policies(
    network: HAMNetwork,
    panel: Panel,
    windows: Windows,
    memory: str,
    *,
    share: float,
    model: Rollout,
    time_unit: float,
    seed: int,
    phase: float = 0.0,
    oracle: Any = None,
    graft: HAMNetwork | str | None = None,
) -> list[Policy]:
    """What one control keeps, a policy per layer.

    Args:
        memory: ``random``, ``shuffled``, ``stride``, ``recency``, ``oracle`` or ``graft``.
        model: the model's own pass over the panel, with traces: controls keep as much of each item and layer.
        phase: of ``stride``, in patches.
        oracle: ids and times of the steps to keep, a frame as the panel's, with a column ``channel`` where not all.
        graft: another fitted network for the same columns, or the name of a router that needs no weights of its own.

    Raises DataError E-OPTION: something that a control needs is missing.
    """
    spent, keys = spent_by(network, model, panel.n_items), item_keys(panel)
    if memory == "random":
        return policies_for(network, memory, share, spent=spent, seed=seed, keys=keys)
    if memory == "stride":
        shares = [torch.from_numpy(rate).float() for rate in spent.usage]  # L x [I]
        return [
            tagless(network.policy(rate), Control("stride", keys, layer=number, phase=phase), held=held)
            for number, (rate, held) in enumerate(zip(shares, spent.held, strict=True))
        ]
    if memory == "recency":
        return _recency(network, spent, share, keys)
    store = build_store(panel, patch_steps=network.config.patch_steps, extra_steps=0, time_unit=time_unit)
    if memory == "shuffled":
        choices = shuffled_choices(_choices(network, model, store), keys, seed)
        return choices.policies(network, share, keys, spent.held)
    if memory == "oracle":
        choices = oracle_choices(_choices(network, model, store), panel, store, oracle)
    else:
        choices = _grafted(network, panel, windows, graft, share, store, time_unit)
    return choices.policies(network, share, keys)


def item_keys(panel: Panel) -> torch.Tensor:
    """A number for each item that depends on its id alone, [I] int64."""
    return torch.tensor([zlib.crc32(repr(one).encode()) for one in panel.item_ids.tolist()], dtype=torch.int64)


def _recency(network: HAMNetwork, spent: Spent, share: float, keys: torch.Tensor) -> list[Policy]:
    """Everything is kept, in as many entries as the model holds at the end of each item."""
    policies = []
    for number, held in enumerate(spent.held):
        base = network.policy(torch.full((len(keys),), share))
        policy = tagless(base, Control("recency", keys, layer=number), held=held)
        policies.append(replace(policy, eviction="fifo"))
    return policies


def _choices(network: HAMNetwork, rollout: Rollout, store: PatchStore) -> Choices:
    """What a pass with traces kept, tags included."""
    if not rollout.traces:
        raise ValueError("Choices are read off a pass with traces. Got none.")
    layers, items, channels = network.config.layers, store.n_items, len(network.spec.roles)
    T = int(store.row_count.max())
    event = torch.tensor([role == "event" for role in network.spec.roles])  # [C]
    keep = torch.zeros(layers, items, T, channels, dtype=torch.bool)
    rank = torch.zeros(layers, items, T, channels, dtype=torch.float64)
    able = torch.zeros(items, T, channels, dtype=torch.bool)
    position = positions(store)
    for chunk in rollout.traces:
        N = chunk.heard.shape[2]
        place = chunk.first_patch[:, None] + torch.arange(N) - store.first_patch[chunk.items][:, None]  # [B, N]
        b, n = torch.nonzero((place >= 0) & (chunk.heard > 0).any(1), as_tuple=True)  # 2 x [R]
        rows, at = chunk.items[b], place[b, n]  # 2 x [R]
        heard = chunk.heard.transpose(1, 2)[b, n]  # [R, C]
        able[rows, at] = (heard >= 0.5) & ~event
        for number, layer in enumerate(chunk.layers):
            keep[number, rows, at] = layer.routed.transpose(1, 2)[b, n] & (heard > 0)
            if layer.rank is not None:
                rank[number, rows, at] = layer.rank.transpose(1, 2)[b, n].double()
    return Choices(position, keep, rank, able)


def shuffled_choices(choices: Choices, keys: torch.Tensor, seed: int) -> Choices:
    """As many tokens of each item and layer, drawn by lot from all that could be kept; with their ranks.

    The lot is drawn over the whole of an item, so how much is kept in it is known from its start; what is kept when,
    and of which channel, says nothing about what came.
    """
    keep, rank = torch.zeros_like(choices.keep), torch.zeros_like(choices.rank)
    for layer, (kept, ranks) in enumerate(zip(choices.keep, choices.rank, strict=True)):
        for item, key in enumerate(keys.tolist()):
            able = choices.able[item].nonzero()  # [A, 2] patch and channel
            held = ranks[item][kept[item]]  # [n] ranks of what was kept
            rng = np.random.default_rng([seed, layer, key])
            # tags keep some that no score could
            chosen = torch.from_numpy(rng.permutation(len(able))[: len(held)])
            at, channel = able[chosen].unbind(1)
            keep[layer, item, at, channel] = True
            order = torch.from_numpy(rng.permutation(len(held))[: len(chosen)])
            rank[layer, item, at, channel] = held[order]
    return replace(choices, keep=keep, rank=rank)


def oracle_choices(choices: Choices, panel: Panel, store: PatchStore, oracle: Any) -> Choices:
    """The patches that hold the steps asked for, and nothing else, in every layer.

    Args:
        oracle: a frame with the panel's id and time columns, one row per step; a column ``channel`` names the channel,
            else all of the moment are kept.
    """
    if oracle is None:
        what = "oracle_memory needs to be told which steps matter. Got oracle=None."
        raise DataError("E-OPTION", what, fix="oracle=frame of ids and times, or leave oracle_memory out.")
    item, step, channel = _places(panel, oracle)
    at = (store.lead.numpy()[item] + step) // store.patch_steps - store.first_patch.numpy()[item]  # [rows]
    mask = torch.zeros_like(choices.able)  # [I, T, C]
    for one, patch, which in zip(item, at, channel, strict=True):
        mask[one, patch, slice(None) if which < 0 else which] = True
    keep = mask & choices.able  # [I, T, C]
    return replace(choices, keep=keep.expand_as(choices.keep), rank=keep.double().expand_as(choices.rank))


def _places(panel: Panel, frame: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Item, step and channel (-1: all) of every row of a frame."""
    dialect = panel.schema.dialect
    table = pd.DataFrame(frame)
    names = [name for name in (dialect.id_column, dialect.time_column) if name is not None and name in table]
    if dialect.time_column not in names:
        what = f"oracle must have the columns {dialect.id_column!r} and {dialect.time_column!r}. Got {list(table)}."
        raise DataError("E-OPTION", what, fix="Name ids and times as in df.")
    ids = table[dialect.id_column] if dialect.id_column in table else pd.Series([panel.item_ids[0]] * len(table))
    item = pd.Index(panel.item_ids).get_indexer(ids)  # [rows]
    times = table[dialect.time_column]
    if getattr(times.dt if times.dtype.kind == "M" else None, "tz", None) is not None:
        times = times.dt.tz_convert("UTC").dt.tz_localize(None)
    stamps = as_numbers(times.to_numpy())  # [rows]
    if panel.times is None:
        zone = dialect.time_zone
        clock = effective_clock(panel.schema.frequency, zone)
        step, _ = locate(clock, as_numbers(panel.starts)[item], stamps, zone)  # [rows]
    else:
        own = [as_numbers(panel.times[a:b]) for a, b in zip(panel.offsets, panel.offsets[1:], strict=False)]
        step = np.array([np.searchsorted(own[i], t) for i, t in zip(item, stamps, strict=True)], dtype=np.int64)
    channels = [c.name for c in panel.schema.channels]
    channel = np.full(len(table), -1)
    if "channel" in table:
        channel = pd.Index(channels).get_indexer(table["channel"])
        if (channel < 0).any():
            what = f"oracle names channels that are not there. Available: {channels}."
            raise DataError("E-OPTION", what, fix="Correct the column 'channel', or leave it out.")
    inside = (item >= 0) & (step >= 0)
    inside &= step < panel.lengths[np.maximum(item, 0)]
    return item[inside], np.asarray(step)[inside], channel[inside]


def listed(policy: Policy, store: PatchStore) -> Policy:
    """A control that decides by a rule as one that goes by a list of what the rule decides."""
    control = policy.control
    if control is None or control.kind == "given":
        return policy
    position = positions(store)  # [I, T]
    share = policy.share.cpu().expand(store.n_items)  # [I]
    keep, rank = control.decide(position, len(store.roles), share)  # 2 x [I, T, C]
    # chance and schedule have been followed, so that lists of any seed are alike but for what they say
    given = replace(control, kind="given", seed=0, phase=0.0, position=position, keep=keep, rank=rank)
    return replace(policy, control=given)


def positions(store: PatchStore) -> torch.Tensor:
    """Times of every patch of every item, [I, T] float64, +inf for padding."""
    position = torch.full((store.n_items, int(store.row_count.max())), torch.inf, dtype=torch.float64)
    for item in range(store.n_items):
        first, count = int(store.first_row[item]), int(store.row_count[item])
        position[item, :count] = store.position[first : first + count]
    return position


# --- grafting


def regrafted(network: HAMNetwork, router: str) -> HAMNetwork:
    """The same weights under another router that needs none of its own; its thresholds are not set yet.

    Raises DataError E-OPTION: the router has weights that this network lacks.
    """
    try:
        config = replace(network.config, router=router)
    except ValueError as error:
        raise DataError("E-OPTION", str(error), fix=f"graft= one of {sorted(ROUTERS)}, joined by '+'.") from error
    other = HAMNetwork(config, network.memory_config, network.spec).to(network.head.project.weight.dtype)
    own = {name: value for name, value in network.state_dict().items() if ".thresholds." not in name}
    missing, _ = other.load_state_dict(own, strict=False)
    missing = [name for name in missing if ".thresholds." not in name]
    if missing:
        ready = sorted({name.split(".router.")[1].split(".")[0] for name in missing if ".router." in name})
        raise DataError(
            "E-OPTION",
            f"Router {router!r} needs weights that were not trained here: {ready}. Routers that need none: surprise,"
            " error, innovation, write, tags; and those of the fit.",
            fix="Pass graft=another fitted model, or one of those.",
        )
    other.unit = network.unit.clone()
    return other.eval()


def _grafted(
    network: HAMNetwork,
    panel: Panel,
    windows: Windows,
    graft: HAMNetwork | str | None,
    share: float,
    store: PatchStore,
    time_unit: float,
) -> Choices:
    """What another router keeps of the same rows, under the same share."""
    if graft is None:
        what = "grafted_memory needs a router to serve with. Got graft=None."
        raise DataError("E-OPTION", what, fix="graft='surprise', or graft=another fitted model.")
    other = regrafted(network, graft) if isinstance(graft, str) else graft
    if (other.spec.roles, other.config.patch_steps, other.config.layers) != (
        network.spec.roles, network.config.patch_steps, network.config.layers
    ):  # fmt: skip
        what = "A graft must have the same channels, patch_steps and layers."
        raise DataError("E-OPTION", what, fix="Fit it on the same frame with the same patch_steps and preset.")
    if isinstance(graft, str):
        # thresholds from what came before the first window, so that nothing of the windows sets them
        first = np.array([cuts[0] if len(cuts) else 0 for cuts in windows.steps])
        calibrate_thresholds(other, store, first, share=share)
    policies: Sequence[Policy] = policies_for(other, "model", share)
    done = backtest(other, panel, windows, policies, time_unit=time_unit, keep_traces=True)
    return _choices(other, done.rollout, store)
