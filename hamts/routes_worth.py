"""What a kept step is worth: how a forecast changes when it is dropped, against dropping random others.

B rows of a batch · I items · G targets · F future steps · Q quantiles · L layers · M entries
E tokens held by one item
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch

from hamts.data.clock import as_numbers, effective_clock, locate
from hamts.data.panel import Panel
from hamts.data.patches import PatchStore
from hamts.nn.head import pinball
from hamts.nn.tokens import Policy, map_tensors
from hamts.reader import HAMNetwork, StreamMemory
from hamts.rollout import forecast_from, roll
from hamts.routes_summary import time_numbers

__all__ = ["WORTH_COLUMNS", "add_worth", "locate_rows"]

WORTH_COLUMNS = ("worth", "worth_random", "worth_random_low", "worth_random_high", "worth_of")
ENTRIES_SIDE_BY_SIDE = 2**16
ROWS_SIDE_BY_SIDE = 64
LOSS, CHANGE = "quantile loss", "median change"


@dataclass(frozen=True)
class Held:
    """Tokens that one item's scratchpads hold."""

    channel: np.ndarray  # [E] int64
    patch: np.ndarray  # [E] int64, on the item's grid
    places: list[torch.Tensor]  # L of [E, M] bool: where each token lies in the layer's scratchpad
    copies: np.ndarray  # [E] int64, layers that hold it


@dataclass(frozen=True)
class Effects:
    """What dropping tokens changed at one cutoff."""

    own: float  # of the token itself
    others: np.ndarray  # [D] of random others with as many copies
    of: str


def add_worth(
    table: pd.DataFrame,
    network: HAMNetwork,
    store: PatchStore,
    panel: Panel,
    *,
    cutoffs: Sequence[np.ndarray],
    steps: int,
    policies: Policy | Sequence[Policy],
    seed: int,
    rows: int | Sequence[int] | None = 50,
    random_draws: int = 20,
    reveal_events: bool = False,
) -> pd.DataFrame:
    """The table with five more columns, filled for the rows asked for that are in a scratchpad at a cutoff.

    ============================= ================================================================================
    worth                         change of the forecast when this token is dropped from every layer that holds it,
                                  mean over cutoffs: of its mean quantile loss, in units of the stream's scale, so
                                  that positive means that the token helps; or, where no truth lies ahead of any
                                  cutoff, mean absolute change of the median forecast in the same units
    worth_random                  mean of the same for random other tokens of the item with as many copies
    worth_random_low, _high       5 % and 95 % of those
    worth_of                      ``quantile loss`` or ``median change``
    ============================= ================================================================================

    Args:
        table: of ``routes_table(..., by="entry")``.
        cutoffs: for each item, rising observed-step counts at which to forecast; may be empty, [I] arrays.
        steps: F, steps to forecast.
        policies: as for ``roll``.
        rows: labels of rows; a number: so many kept rows of each item, those with the largest score - threshold; None:
            all kept rows.
        reveal_events: whether event columns beyond the cutoffs are known.
    """
    where = locate_rows(table, store, panel)  # index, item, channel, patch
    asked = _asked(table, where, rows)
    found: dict[int, list[Effects]] = {}
    rng = np.random.default_rng(seed)
    policies = [policies] * network.config.layers if isinstance(policies, Policy) else list(policies)
    for item, cutoff, memory in memories_at(network, store, cutoffs, policies):
        own = asked[asked["item"] == item]
        if own.empty:
            continue
        held = held_entries(store, item, memory)
        forecast = Dropper(network, store, item, cutoff, memory, steps, policies, reveal_events)
        for label, effects in _compare(forecast, held, own, rng, random_draws):
            found.setdefault(label, []).append(effects)
    return _with_columns(table, found)


def locate_rows(table: pd.DataFrame, store: PatchStore, panel: Panel) -> pd.DataFrame:
    """``item``, ``channel`` and ``patch`` of every row, by number; index as the table's."""
    item = pd.Index(panel.item_ids).get_indexer(table["unique_id"])  # [rows]
    channel = pd.Index([c.name for c in panel.schema.channels]).get_indexer(table["channel"])  # [rows]
    start = time_numbers(table["ds_start"], panel.schema.dialect.time_zone)  # [rows]
    if panel.times is None:
        zone = panel.schema.dialect.time_zone
        clock = effective_clock(panel.schema.frequency, zone)
        step, _ = locate(clock, as_numbers(panel.starts)[item], start, zone)  # [rows]
    else:
        own = [as_numbers(panel.times[a:b]) for a, b in zip(panel.offsets, panel.offsets[1:], strict=False)]
        step = np.array([np.searchsorted(own[i], t) for i, t in zip(item, start, strict=True)], dtype=np.int64)
    patch = (store.lead.numpy()[item] + step) // store.patch_steps  # [rows]
    return pd.DataFrame({"item": item, "channel": channel, "patch": patch}, index=table.index)


def _asked(table: pd.DataFrame, where: pd.DataFrame, rows: int | Sequence[int] | None) -> pd.DataFrame:
    if rows is not None and not isinstance(rows, int):
        return where.loc[list(rows)]
    kept = table[table["status"] == "kept"]
    if rows is None:
        return where.loc[kept.index]
    margin = (kept["score"] - kept["threshold"]).sort_values(ascending=False, kind="stable")
    first = margin.groupby(where.loc[margin.index, "item"]).head(rows)
    return where.loc[first.index]


def memories_at(
    network: HAMNetwork, store: PatchStore, cutoffs: Sequence[np.ndarray], policies: list[Policy]
) -> Iterator[tuple[int, int, StreamMemory]]:
    """(item, cutoff, memory of one row before the cutoff), reading every item once."""
    nothing = [np.zeros(0, dtype=np.int64)] * store.n_items
    begin, memory = store.first_patch.numpy(), None
    ends = np.zeros(store.n_items, dtype=np.int64)  # [I]
    for k in range(max((len(c) for c in cutoffs), default=0)):
        due = [i for i, c in enumerate(cutoffs) if k < len(c)]
        ends = np.array([c[k] if k < len(c) else ends[i] for i, c in enumerate(cutoffs)])
        memory = roll(
            network, store, cutoffs=nothing, steps=1, policies=policies, starts=begin, ends=ends, memory=memory
        ).memory
        assert memory is not None
        begin = (store.lead.numpy() + ends) // store.patch_steps
        for item in due:
            yield item, int(ends[item]), memory.select(torch.tensor([item]))


def held_entries(store: PatchStore, item: int, memory: StreamMemory) -> Held:
    """List what a memory of one row holds."""
    first, count = int(store.first_row[item]), int(store.row_count[item])
    position = store.position[first : first + count]  # [rows of the item], rising
    keys = []
    for layer in memory.layers:
        pad = layer.scratchpad
        patch = torch.searchsorted(position, pad.position[0].contiguous()) + store.first_patch[item]  # [M]
        keys.append(torch.where(pad.alive[0], patch * len(store.roles) + pad.channel[0], -1))  # [M]
    every = torch.cat(keys).unique()
    every = every[every >= 0]  # [E]
    places = [every[:, None] == key for key in keys]  # L of [E, M]
    return Held(
        channel=(every % len(store.roles)).numpy(),
        patch=(every // len(store.roles)).numpy(),
        places=places,
        copies=torch.stack([place.any(1) for place in places]).sum(0).numpy(),
    )


@dataclass(frozen=True)
class Dropper:
    """Forecasts of one item at one cutoff, with a token of its memory missing."""

    network: HAMNetwork
    store: PatchStore
    item: int
    cutoff: int
    memory: StreamMemory  # one row
    steps: int
    policies: list[Policy]
    reveal_events: bool

    def __call__(self, held: Held, tokens: np.ndarray) -> tuple[np.ndarray, str]:
        """Effect of dropping each of some tokens, [n], or sets of them, [n, k], and what it is the effect on.

        Args:
            tokens: numbers in ``held``.
        """
        widest = max((layer.scratchpad.alive.shape[1] for layer in self.memory.layers), default=0)
        size = int(np.clip(ENTRIES_SIDE_BY_SIDE // max(widest, 1), 1, ROWS_SIDE_BY_SIDE))
        parts, of = [np.zeros(0)], CHANGE
        for low in range(0, len(tokens), size):
            quantiles, scale = self._forecasts(held, torch.from_numpy(tokens[low : low + size]))
            effect, of = self._effect(quantiles, scale)
            parts.append(effect)
        return np.concatenate(parts), of

    def _forecasts(self, held: Held, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantiles of the full memory and of each reduced one, [1 + n, G, F, Q]; the scale, [1 + n, G]."""
        rows = torch.zeros(len(tokens) + 1, dtype=torch.int64)
        memory = self.memory.select(rows)
        layers = []
        for layer, places in zip(memory.layers, held.places, strict=True):
            alive = layer.scratchpad.alive.clone()  # [1 + n, M]
            alive[1:] &= ~places[tokens].reshape(len(tokens), -1, places.shape[1]).any(1)
            layers.append(replace(layer, scratchpad=replace(layer.scratchpad, alive=alive)))
        policies = [map_tensors(p, lambda t: t[rows if len(t) == 1 else rows + self.item]) for p in self.policies]
        return forecast_from(
            self.network, self.store, rows + self.item, rows + self.cutoff, replace(memory, layers=layers),
            self.steps, policies, reveal_events=self.reveal_events,
        )  # fmt: skip

    def _effect(self, quantiles: torch.Tensor, scale: torch.Tensor) -> tuple[np.ndarray, str]:
        """Rows 1, 2, ... against row 0: [n]."""
        levels = self.network.config.quantiles
        scaled = quantiles / scale[..., None, None]  # [1 + n, G, F, Q]
        truth = self._truth() / scale[0, :, None]  # [G, F]
        known = ~torch.isnan(truth)  # [G, F]
        if not bool(known.any()):
            median = scaled[..., levels.index(0.5)]  # [1 + n, G, F]
            return (median[1:] - median[:1]).abs().mean((1, 2)).numpy(), CHANGE
        grid = torch.tensor(levels, dtype=torch.float64)  # [Q]
        losses = pinball(scaled, truth.expand(len(scaled), -1, -1), grid)[:, known].mean(1)  # [1 + n]
        return (losses[1:] - losses[0]).numpy(), LOSS

    def _truth(self) -> torch.Tensor:
        """Target values after the cutoff, [G, F]; NaN where there are none."""
        store, P = self.store, self.store.patch_steps
        step = int(store.lead[self.item]) + self.cutoff + torch.arange(self.steps)  # [F]
        step = torch.where(step < int(store.lead[self.item] + store.lengths[self.item]), step, -1)  # [F]
        row = store.first_row[self.item] + (step // P - store.first_patch[self.item]).clamp_min(0)  # [F]
        values = store.values[row, step % P][:, self.network.spec.targets].T  # [G, F]
        return torch.where(step >= 0, values, torch.nan)


def _compare(
    forecast: Dropper, held: Held, asked: pd.DataFrame, rng: np.random.Generator, draws: int
) -> Iterator[tuple[int, Effects]]:
    """(label, effects) of every asked row that is held."""
    number = pd.Series(np.arange(len(held.patch)), index=pd.MultiIndex.from_arrays([held.channel, held.patch]))
    keys = pd.MultiIndex.from_frame(asked[["channel", "patch"]])
    wanted = number.reindex(keys)
    present = wanted.notna().to_numpy()
    labels, tokens = asked.index[present], wanted[present].to_numpy(dtype=np.int64)
    samples = {}
    for copies in np.unique(held.copies[tokens]):
        pool = np.flatnonzero(held.copies == copies)
        # one more than needed, since a token is not its own comparison
        samples[copies] = rng.choice(pool, size=min(draws + 1, len(pool)), replace=False)
    needed = np.unique(np.concatenate([tokens, *samples.values()])).astype(np.int64)
    effect, of = forecast(held, needed)
    by_token = pd.Series(effect, index=needed)
    for label, token in zip(labels, tokens, strict=True):
        sample = samples[held.copies[token]]
        others = sample[sample != token][:draws]
        yield label, Effects(float(by_token[token]), by_token[others].to_numpy(), of)


def _with_columns(table: pd.DataFrame, found: dict[int, list[Effects]]) -> pd.DataFrame:
    result = table.assign(**dict.fromkeys(WORTH_COLUMNS[:4], np.nan), worth_of="")
    lines = {}
    for label, every in found.items():
        # a change of the loss says more than a change of the forecast
        of = LOSS if any(e.of == LOSS for e in every) else CHANGE
        every = [e for e in every if e.of == of]
        shortest = min(len(e.others) for e in every)
        random = np.mean([e.others[:shortest] for e in every], axis=0)  # [D]
        low, high = np.quantile(random, [0.05, 0.95]) if shortest else (np.nan, np.nan)
        mean = float(random.mean()) if shortest else np.nan
        lines[label] = (float(np.mean([e.own for e in every])), mean, float(low), float(high), of)
    if lines:
        filled = pd.DataFrame.from_dict(lines, orient="index", columns=list(WORTH_COLUMNS))
        result.loc[filled.index, list(WORTH_COLUMNS)] = filled
    return result
