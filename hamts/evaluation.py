"""Forecasts at many cutoffs of a history in one pass over it, and their scores beside the same model without memory.

I items · X windows, in the order of items, then cutoffs · G targets · F future steps · Q quantiles · L layers · T steps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hamts.data.cutoffs import cutoff_steps, first_observed, times_of
from hamts.data.panel import Panel
from hamts.data.patches import build_store
from hamts.errors import DataError
from hamts.metrics import DECILES, score, seasonal_naive
from hamts.nn.controls import Control
from hamts.nn.tokens import Policy
from hamts.reader import HAMNetwork, StreamMemory
from hamts.remembered import memory_parts
from hamts.rollout import Rollout, roll

__all__ = [
    "CONTROLS",
    "MEMORIES",
    "Backtest",
    "Spent",
    "Windows",
    "backtest",
    "choose_windows",
    "layer_usage",
    "point_levels",
    "policies_for",
    "score_rows",
    "seasonal_errors",
    "seasonal_naive_forecasts",
    "spent_by",
]

MEMORIES = ("model", "none", "full", "random")
# rows that may stand beside the model's, and the memory each has; seasonal naive has none
CONTROLS = {
    "seasonal_naive": None,
    "no_memory": "none",
    "full_memory": "full",
    "random_memory": "random",
    "shuffled_memory": "shuffled",
    "stride_memory": "stride",
    "recency_memory": "recency",
    "oracle_memory": "oracle",
    "grafted_memory": "graft",
}
# seasons of history that nearly always hold the last value of every phase
RECENT_SEASONS = 10


def policies_for(
    network: HAMNetwork,
    memory: str,
    share: float,
    *,
    spent: Spent | None = None,
    seed: int = 0,
    keys: torch.Tensor | None = None,
) -> list[Policy]:
    """What the scratchpads may do, one policy per layer.

    Args:
        memory: ``model``; ``none``: nothing is kept, tags neither; ``full``: everything observed, without a cap;
            ``random``: as many random steps in each layer as the model keeps there, tags or not, in no more entries.
        share: budget share of the model.
        spent: what the model kept and held; for ``random`` only.
        seed, keys: what chance is counted from, one key per item, [I] int64; for ``random`` only.
    """
    layers = network.config.layers
    if memory == "model":
        return [network.policy(torch.tensor([share]))] * layers
    if memory == "none":
        return [network.policy(torch.zeros(1), use_tags=False)] * layers
    if memory == "full":
        return [network.policy(torch.ones(1), capped=False)] * layers
    if memory != "random":
        raise DataError("E-OPTION", f"memory must be one of {list(MEMORIES)}. Got {memory!r}.", fix="memory='model'")
    if spent is None:
        raise ValueError("Random routing needs spent, what the model keeps in each layer. Got None.")
    return [
        tagless(
            network.policy(torch.from_numpy(rate).float()),
            Control("random", torch.arange(len(rate)) if keys is None else keys, seed=seed, layer=number),
            held=held,
        )
        for number, (rate, held) in enumerate(zip(spent.usage, spent.held, strict=True))
    ]


def tagless(policy: Policy, control: Control, *, held: torch.Tensor | None = None) -> Policy:
    """A policy under which a control alone says what is kept, with the room that tags had.

    Args:
        held: most entries of each item, [I]: what the model held. Its two lists may fill one and not the other, and a
            control that could fill both would hold more than it.
    """
    kept = None if policy.cap_kept is None or policy.cap_must is None else policy.cap_kept + policy.cap_must
    must = None if kept is None else 0
    return replace(policy, control=control, use_tags=False, cap_kept=kept, cap_must=must, cap_each=held)


@dataclass(frozen=True)
class Spent:
    """What a pass kept, and held at the end."""

    usage: np.ndarray  # [L, I] of ``layer_usage``
    held: list[torch.Tensor]  # L x [I] entries


def spent_by(network: HAMNetwork, rollout: Rollout, items: int) -> Spent:
    """What controls may keep and hold; of a pass with traces."""
    if rollout.memory is None:
        raise ValueError("What a pass held is read off its memory. Got memory=None.")
    held = [layer.scratchpad.alive.sum(1) for layer in rollout.memory.layers]
    return Spent(layer_usage(network, rollout, items), held)


def layer_usage(network: HAMNetwork, rollout: Rollout, items: int) -> np.ndarray:
    """Share of the tokens that could be kept which each layer kept of each item, [L, I]; needs traces."""
    event = torch.tensor([role == "event" for role in network.spec.roles])[:, None]  # [C, 1]
    kept, possible = torch.zeros(network.config.layers, items), torch.zeros(items)  # [L, I], [I]
    for chunk in rollout.traces:
        able = (chunk.heard >= 0.5) & ~event  # [B, C, N]
        possible[chunk.items] += able.sum((1, 2)).float()
        for number, layer in enumerate(chunk.layers):
            kept[number, chunk.items] += (layer.routed & (chunk.heard > 0)).sum((1, 2)).float()
    return (kept / possible.clamp_min(1)).clamp_max(1).numpy()


# --- windows


@dataclass(frozen=True)
class Windows:
    """Cutoffs of a panel and what came after them."""

    steps: list[np.ndarray]  # [I] arrays, observed steps at each cutoff of an item
    items: np.ndarray  # [X] item of each window
    cuts: np.ndarray  # [X] observed steps
    actual: np.ndarray  # [X, G, F]; NaN where missing
    known: np.ndarray  # [X, G] whether the target was observed before the cutoff
    times: np.ndarray  # [X, F]
    cutoff_times: np.ndarray  # [X] time of the last observed step
    left_out: int  # items without a window

    @staticmethod
    def at(panel: Panel, h: int, steps: list[np.ndarray]) -> Windows:
        """Those after so many observed steps of each item, [I] arrays, h steps before its end at most."""
        counts = np.array([len(cuts) for cuts in steps])  # [I]
        items, cuts = np.repeat(np.arange(panel.n_items), counts), np.concatenate(steps)  # 2 x [X]
        ahead = cuts[:, None] + np.arange(h)  # [X, F]
        targets = panel.schema.indices("target")
        rows = panel.offsets[items][:, None] + ahead  # [X, F]
        return Windows(
            steps=steps,
            items=items,
            cuts=cuts,
            actual=panel.values[:, targets][rows].transpose(0, 2, 1),
            known=first_observed(panel)[items] < cuts[:, None],
            times=times_of(panel, items[:, None], ahead),
            cutoff_times=times_of(panel, items, cuts - 1),
            left_out=int((counts == 0).sum()),
        )


def choose_windows(
    panel: Panel, h: int, *, n_windows: int, step_size: int | None, cutoffs: Sequence[Any] | None
) -> Windows:
    """The last ``n_windows`` complete windows of each item, ``step_size`` apart (default h); or given times.

    Raises DataError: E-OPTION, E-SHORT (no item has a complete window).
    """
    lengths = panel.lengths
    if cutoffs is not None:
        steps = [cuts[cuts + h <= n] for cuts, n in zip(cutoff_steps(panel, cutoffs), lengths, strict=True)]
    else:
        for name, value in (("n_windows", n_windows), ("step_size", h if step_size is None else step_size)):
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                what = f"{name} must be a whole number, at least 1. Got {value!r}."
                raise DataError("E-OPTION", what, fix=f"{name}=1, say.")
        back = h + (h if step_size is None else step_size) * np.arange(n_windows)[::-1]  # [n_windows]
        steps = [(n - back)[n - back >= 1] for n in lengths]
    if not any(map(len, steps)):
        raise DataError(
            "E-SHORT",
            f"A window needs a step before its cutoff and {h} after it. No item has one: the longest has"
            f" {int(lengths.max())} steps.",
            fix="Pass longer items, a smaller h, or cutoffs inside the history.",
        )
    return Windows.at(panel, h, steps)


@dataclass(frozen=True)
class Backtest:
    """Forecasts of one method at all windows."""

    quantiles: np.ndarray  # [X, G, F, Q] float64
    memory: StreamMemory
    rollout: Rollout

    @property
    def bytes_per_item(self) -> float:
        """Mean bytes of an item's memory after the last cutoff."""
        return float(sum(part.mean() for part in memory_parts(self.memory).values()))


def backtest(
    network: HAMNetwork,
    panel: Panel,
    windows: Windows,
    policies: Sequence[Policy],
    *,
    time_unit: float,
    keep_traces: bool = False,
) -> Backtest:
    """Read each item once, up to its last cutoff, and forecast at all of them on the way."""
    store = build_store(panel, patch_steps=network.config.patch_steps, extra_steps=0, time_unit=time_unit)
    result = roll(
        network,
        store,
        cutoffs=windows.steps,
        steps=windows.actual.shape[2],
        policies=policies,
        ends=np.array([cuts[-1] if len(cuts) else 0 for cuts in windows.steps]),
        keep_traces=keep_traces,
    )
    result.quantiles[~windows.known] = np.nan
    assert result.memory is not None
    return Backtest(result.quantiles, result.memory, result)


# --- scores


def seasonal_errors(values: np.ndarray, cuts: np.ndarray, season: int) -> np.ndarray:
    """``seasonal_scale`` of the history before each cutoff: [T, G], [X] -> [X, G]. One pass for all of them."""
    T = len(values)
    lag = np.where(season < cuts, season, 1)  # [X]
    errors = np.empty((len(cuts), values.shape[1]))
    for each in np.unique(lag):
        apart = np.abs(values[each:] - values[: T - each])  # [T - lag, G]
        seen = ~np.isnan(apart)
        sums = np.cumsum(np.where(seen, apart, 0.0), axis=0)
        counts = np.cumsum(seen, axis=0)
        chosen = lag == each
        place = cuts[chosen] - each - 1  # [X'] last pair inside the history
        total, count = sums[np.maximum(place, 0)], counts[np.maximum(place, 0)]
        known = (place >= 0)[:, None] & (count > 0)
        errors[chosen] = np.where(known, total / np.maximum(count, 1), np.nan)
    return errors


def seasonal_naive_forecasts(panel: Panel, windows: Windows) -> np.ndarray:
    """The last observed value of the same phase of the season, [X, G, F]."""
    season, h = panel.schema.frequency.season_steps, windows.actual.shape[2]
    targets = panel.schema.indices("target")
    answer = np.empty_like(windows.actual)
    for place, (item, cut) in enumerate(zip(windows.items, windows.cuts, strict=True)):
        history = panel.item(item)[:cut, targets].T  # [G, T]
        recent = history[:, -RECENT_SEASONS * season :]
        answer[place] = seasonal_naive(recent, season_steps=season, h=h)
        if np.isnan(recent).any():
            answer[place] = seasonal_naive(history, season_steps=season, h=h)
    return answer


def score_rows(
    panel: Panel,
    windows: Windows,
    forecasts: dict[str, tuple[dict[float, np.ndarray], np.ndarray]],
    by: str | None,
    groups: np.ndarray | None = None,
) -> list[dict[str, Any]]:
    """One row per method, or per method and target, item or group. All are scored on the cells that all cover.

    Args:
        forecasts: quantiles by level and the mean, each [X, G, F], by method.
        groups: of each item, [I], where ``by`` is ``group``.
    """
    targets = panel.schema.indices("target")
    season = panel.schema.frequency.season_steps
    errors = np.concatenate(
        [seasonal_errors(panel.item(i)[:, targets], cuts, season) for i, cuts in enumerate(windows.steps) if len(cuts)]
    )  # [X, G]
    covered = np.ones(windows.actual.shape, dtype=bool)
    for levels, mean in forecasts.values():
        for values in (mean, *levels.values()):
            covered &= np.isfinite(values)
    actual = np.where(covered, windows.actual, np.nan)  # [X, G, F]
    rows = []
    for method, (levels, mean) in forecasts.items():
        for label, chosen in _groups(panel, windows, by, groups):
            result = score(
                actual[chosen],
                quantile_forecasts={level: values[chosen] for level, values in levels.items()},
                mean=mean[chosen],
                seasonal_error=errors[chosen],
            )
            rows.append({"method": method, **label, **_named(result, levels)})
    return rows


def _groups(
    panel: Panel, windows: Windows, by: str | None, groups: np.ndarray | None
) -> list[tuple[dict[str, Any], np.ndarray]]:
    """Label and members [X, G] of each group of rows."""
    names = panel.schema.targets
    whole = np.ones((len(windows.items), len(names)), dtype=bool)  # [X, G]
    if by is None:
        return [({}, whole)]
    if by == "target":
        return [({"target_name": name}, whole & (np.arange(len(names)) == g)) for g, name in enumerate(names)]
    if groups is not None:
        own = groups[windows.items]  # [X]
        return [({"group": name}, whole & (own == name)[:, None]) for name in sorted(set(own.tolist()))]
    if by != "item":
        known = "None, 'target', 'item' or 'group'"
        raise DataError("E-OPTION", f"by must be {known}. Got {by!r}.", fix="by='target'")
    column = panel.schema.dialect.id_column or "item"
    items = np.unique(windows.items)
    return [({column: panel.item_ids[i]}, whole & (windows.items == i)[:, None]) for i in items]


def _named(result: dict[str, float], levels: dict[float, np.ndarray]) -> dict[str, float]:
    """The metrics under their short names; a point forecast has no intervals."""
    is_point = len({id(values) for values in levels.values()}) == 1
    named = {"MASE": result["MASE"], "MSE": result["MSE"], "MAE": result["MAE"]}
    named["WQL"] = result["weighted_quantile_loss"]
    for name, key in (("MSIS", "MSIS"), ("coverage_80", "coverage[80%]"), ("coverage_95", "coverage[95%]")):
        named[name] = float("nan") if is_point else result.get(key, float("nan"))
    return named


def point_levels(values: np.ndarray) -> dict[float, np.ndarray]:
    """A point forecast as the same value at every decile."""
    return dict.fromkeys(DECILES, values)
