"""Quality against bytes and against time: one fitted network under every budget, window by window.

Trained under random budgets, one network serves the whole frontier: the history is read anew for each budget.

I items · X windows · C channels · G targets · F future steps · Q quantiles · L layers
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hamts.controls import control_policies
from hamts.data.library import plain_frame
from hamts.data.panel import Panel
from hamts.data.patches import build_store
from hamts.errors import DataError
from hamts.evaluation import Backtest, Windows, choose_windows, policies_for, seasonal_errors
from hamts.fitting import Fitted, Trained
from hamts.forecast import quantile_at, quantile_mean
from hamts.frontier_read import Histories
from hamts.metrics import DECILES, row_losses
from hamts.nn.tokens import Policy, map_tensors
from hamts.remembered import memory_parts
from hamts.rollout import forecast_from

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster

__all__ = [
    "FRONTIER_MEMORIES",
    "SHARES",
    "Losses",
    "Point",
    "forecaster_frontier",
    "interval",
    "measure_points",
    "pareto",
    "windows_at",
]

SHARES = (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
# what may decide at each budget; all but the first are controls on the same weights
FRONTIER_MEMORIES = ("model", "random", "shuffled", "stride", "recency")
TIMED_STEPS, WARM_STEPS = 12, 3
DRAWS = 1000
# budgets up to this are read side by side on a GPU
SMALL_SHARE = 0.3


@dataclass(frozen=True)
class Losses:
    """Losses of every window and target, rows [X G]; NaN where nothing was observed."""

    quantile: np.ndarray  # summed over the steps of a row: 2 x pinball, averaged over deciles
    size: np.ndarray  # sum of |actual|
    scaled: np.ndarray  # mean absolute error over the seasonal error
    rows: np.ndarray  # [X G] window of each row

    def wql(self, chosen: np.ndarray) -> float:
        """Mean weighted quantile loss over some rows, [X G] bool or indices."""
        return float(np.nansum(self.quantile[chosen]) / max(np.nansum(self.size[chosen]), 1e-12))

    def mase(self, chosen: np.ndarray) -> float:
        values = self.scaled[chosen]
        return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


@dataclass(frozen=True)
class Point:
    """One budget of one memory."""

    memory: str
    budget_share: float
    usage_share: float
    bytes: float  # of an item after its last window, on average
    scratchpad_bytes: float
    scratchpad_attention: float  # share of the exact branch's attention, over tokens that read the past
    ms_per_step: float  # one item, patch by patch, as a stream
    ms_per_forecast: float
    losses: Losses


def windows_at(panel: Panel, h: int, steps: Sequence[np.ndarray]) -> Windows:
    """Windows at given moments of each item: observed steps, [I] arrays, h steps before the item's end at most.

    Raises DataError E-SHORT where there is none.
    """
    cuts_of = [np.unique(cuts[(cuts >= 1) & (cuts + h <= n)]) for cuts, n in zip(steps, panel.lengths, strict=True)]
    if not any(map(len, cuts_of)):
        raise DataError("E-SHORT", f"No window of {h} steps fits. Got none of {len(steps)} items.", fix="Smaller h.")
    return Windows.at(panel, h, cuts_of)


def measure_points(
    fitted: Fitted | Trained,
    panel: Panel,
    windows: Windows,
    *,
    shares: Sequence[float] = SHARES,
    memories: Sequence[str] = ("model",),
    control_shares: Sequence[float] | None = None,
    seed: int = 0,
    timed: Sequence[str] = FRONTIER_MEMORIES,
    device: torch.device | str = "cpu",
) -> list[Point]:
    """Every memory at every budget, on the same windows. Of a rival of HAM, which has one size, the one there is.

    Args:
        memories: of ``FRONTIER_MEMORIES``; controls keep as much as the model does at that budget.
        control_shares: budgets at which controls are measured too; None: at all of ``shares``.
        timed: memories whose milliseconds are taken, on the processor, whatever the device.
        device: on which histories are read. On a GPU, where starting kernels is what costs, budgets are read side by
            side, each as further items; it changes rounding alone.

    Raises DataError E-OPTION: an unknown memory, or a control of a scratchpad that is not there.
    """
    unknown = [name for name in memories if name not in FRONTIER_MEMORIES]
    if unknown:
        what = f"memories must be of {list(FRONTIER_MEMORIES)}. Got {unknown}."
        raise DataError("E-OPTION", what, fix="memories=['model', 'random']")
    mixer = fitted.plan.model.mixer
    if mixer != "ham":
        if list(memories) != ["model"]:
            what = f"Controls of the scratchpad need one, and mixer {mixer!r} has none. Got memories={list(memories)}."
            raise DataError("E-OPTION", what, fix="memories=['model']")
        shares = [fitted.plan.memory.budget_share]
    network = fitted.network.to(device)
    side_by_side = torch.device(device).type == "cuda"
    reader = Histories(network, panel, windows, fitted.plan.time_unit)
    points: dict[tuple[float, str], Point] = {}
    try:
        for group in _groups(shares, side_by_side=side_by_side):
            served = [policies_for(network, "model", share) for share in group]
            reads = reader.read(served)
            found = {(share, "model"): one for share, one in zip(group, zip(served, reads, strict=True), strict=True)}
            # where nothing is kept it does not matter who chooses
            controlled = [s for s in group if s > 0 and (control_shares is None or s in control_shares)]
            controls = {
                (share, memory): control_policies(
                    network, panel, windows, memory, share=share, model=found[share, "model"][1].rollout, seed=seed,
                    time_unit=fitted.plan.time_unit,
                )
                for memory in memories
                for share in controlled
                if memory != "model"
            }  # fmt: skip
            found |= reader.read_controls(controls, side_by_side=side_by_side)
            for (share, memory), (policies, result) in found.items():
                if memory not in memories:
                    continue
                points[share, memory] = _point(fitted, panel, windows, memory, share, result)
                if memory in timed:
                    network.cpu()
                    points[share, memory] = _timed(points[share, memory], fitted, panel, windows, policies, result)
                    network.to(device)
    finally:
        network.cpu()
    return [points[share, memory] for share in shares for memory in memories if (share, memory) in points]


def _groups(shares: Sequence[float], *, side_by_side: bool) -> list[list[float]]:
    """Budgets to read in one pass: all but the largest, whose many entries would be padding for the others."""
    small = [share for share in shares if share <= SMALL_SHARE]
    if not side_by_side or len(small) < 2:
        return [[share] for share in shares]
    return [small, *([share] for share in shares if share > SMALL_SHARE)]


def _point(
    fitted: Fitted | Trained,
    panel: Panel,
    windows: Windows,
    memory: str,
    share: float,
    result: Backtest,
) -> Point:
    parts = memory_parts(result.memory)
    read = np.array([len(cuts) > 0 for cuts in windows.steps])  # [I]
    return Point(
        memory=memory,
        budget_share=share,
        usage_share=result.rollout.usage_share,
        bytes=float(np.sum(list(parts.values()), axis=0)[read].mean()),
        scratchpad_bytes=float(parts["scratchpad"][read].mean()),
        scratchpad_attention=_attention(fitted, result),
        ms_per_step=math.nan,
        ms_per_forecast=math.nan,
        losses=_losses(fitted, panel, windows, result),
    )


def _timed(
    point: Point,
    fitted: Fitted | Trained,
    panel: Panel,
    windows: Windows,
    policies: Sequence[Policy],
    result: Backtest,
) -> Point:
    """A point with its milliseconds, of a network and a memory on the processor."""
    alone = [map_tensors(policy, lambda tensor: tensor.cpu()) for policy in policies]
    step_ms, forecast_ms = _time(fitted, panel, windows, alone, result)
    return replace(point, ms_per_step=step_ms, ms_per_forecast=forecast_ms)


def _losses(fitted: Fitted | Trained, panel: Panel, windows: Windows, result: Backtest) -> Losses:
    """Losses of the windows, each target a row."""
    levels = fitted.plan.model.quantiles
    X, G, F = windows.actual.shape
    season = panel.schema.frequency.season_steps
    targets = panel.schema.indices("target")
    errors = np.concatenate(
        [seasonal_errors(panel.item(i)[:, targets], cuts, season) for i, cuts in enumerate(windows.steps) if len(cuts)]
    )  # [X, G]
    covered = np.isfinite(windows.actual) & np.isfinite(result.quantiles).all(-1)  # [X, G, F]
    actual = np.where(covered, windows.actual, np.nan).reshape(X * G, F)
    found = row_losses(
        actual,
        quantile_forecasts={level: quantile_at(result.quantiles, levels, level).reshape(X * G, F) for level in DECILES},
        mean=quantile_mean(result.quantiles, levels).reshape(X * G, F),
        seasonal_error=errors.ravel(),
    )
    count = found["observed"]
    size = np.where(covered, np.abs(windows.actual), 0.0).sum(-1).ravel()  # [X G]
    return Losses(
        quantile=found["quantile_loss"] * count,
        size=np.where(count > 0, size, np.nan),
        scaled=found["MASE"],
        rows=np.repeat(np.arange(X), G),
    )


def _attention(fitted: Fitted | Trained, result: Backtest) -> float:
    """Share of attention that went to entries while the past was read, over layers, heads, channels and steps."""
    heads = fitted.plan.model.heads
    spent = asked = 0.0
    for chunk in result.rollout.traces:
        B, C, N = chunk.heard.shape
        there = (chunk.first_patch[:, None] + torch.arange(N) >= 0).sum()  # of absent patches nothing is asked
        for layer in chunk.layers:
            assert layer.entries_mass is not None  # traces were asked for
            spent += float((layer.entries_mass.double() * layer.entries_sights).sum())
            asked += float(there) * C * heads
    return spent / max(asked, 1.0)


def _time(
    fitted: Fitted | Trained, panel: Panel, windows: Windows, policies: Sequence[Policy], result: Backtest
) -> tuple[float, float]:
    """Median milliseconds of a step of one item's stream and of one forecast, with the memory after its last window."""
    network, P = fitted.network, fitted.plan.model.patch_steps
    store = build_store(panel, patch_steps=P, extra_steps=0, time_unit=fitted.plan.time_unit)
    item = int(np.argmax([len(cuts) for cuts in windows.steps]))
    cut = int(windows.steps[item][-1])
    memory = result.memory.select(torch.tensor([item]))
    rows = torch.tensor([item])
    patch = torch.tensor([(int(store.lead[item]) + cut) // P - 1])
    chunk = store.window(rows, patch, 1)
    own = [_one_item(policy, item) for policy in policies]

    def step() -> None:
        with torch.no_grad():
            network(chunk, memory, own, stepwise=True, decode=False)

    def forecast() -> None:
        forecast_from(network, store, rows, torch.tensor([cut]), memory, windows.actual.shape[2], own)

    return _median_ms(step) / P, _median_ms(forecast)


def _one_item(policy: Policy, item: int) -> Policy:
    """A policy for one item of those it was made for, or of one that holds for all."""
    row = torch.tensor([0 if len(policy.share) == 1 else item], device=policy.share.device)
    return map_tensors(policy, lambda tensor: tensor[row])


def _median_ms(run: Any) -> float:
    times = []
    for number in range(WARM_STEPS + TIMED_STEPS):
        began = time.perf_counter()
        run()
        if number >= WARM_STEPS:
            times.append(time.perf_counter() - began)
    return float(np.median(times)) * 1000


# --- what the points say


def interval(
    losses: Losses, chosen: np.ndarray, score: str, *, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Bootstrap interval of ``WQL`` or ``MASE`` over windows; the targets of a window are drawn together.

    Args:
        chosen: rows that count, [X G] bool.
    """
    rng = np.random.default_rng(seed)
    X = int(losses.rows.max()) + 1
    scale = np.isfinite(losses.scaled)
    top, base = (losses.quantile, losses.size) if score == "WQL" else (losses.scaled, scale.astype(float))
    sums = [np.bincount(losses.rows, np.where(chosen, np.nan_to_num(x), 0.0), minlength=X) for x in (top, base)]
    inside = np.flatnonzero(np.bincount(losses.rows, chosen, minlength=X))
    if len(inside) < 2:
        return float("nan"), float("nan")
    drawn = rng.choice(inside, size=(DRAWS, len(inside)))
    values = sums[0][drawn].sum(1) / np.maximum(sums[1][drawn].sum(1), 1e-12)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def pareto(cost: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Which points no other beats: lower error at the same cost or less, [n] bool."""
    better = (cost[None] <= cost[:, None]) & (error[None] <= error[:, None])  # [n, n] column at least as good as row
    strictly = (cost[None] < cost[:, None]) | (error[None] < error[:, None])
    return ~(better & strictly).any(1) & np.isfinite(error)


def forecaster_frontier(
    model: HAMForecaster,
    df: Any,
    h: int | None = None,
    *,
    shares: Sequence[float] = SHARES,
    memories: Sequence[str] = ("model",),
    n_windows: int = 8,
    step_size: int | None = None,
    parts: Mapping[str, np.ndarray] | None = None,
    static_df: Any = None,
    events: Any = None,
    seed: int = 0,
) -> Any:
    """Error against bytes and milliseconds, of the fitted weights under every budget.

    Args:
        df, h, n_windows, step_size: as in ``cross_validation``.
        shares: budget shares, each in [0, 1]; the model's cap of bytes holds.
        memories: ``model``; and controls that keep as much: ``random``, ``shuffled``, ``stride``, ``recency``.
        parts: more rows of scores, over some of the windows: names and [X] bool, in the order of items, then cutoffs.

    Returns: one row per memory, share and part of the windows with WQL and MASE (each with the ends of a 95 % interval
        over windows), usage_share, bytes, scratchpad_bytes, scratchpad_attention, ms_per_step, ms_per_forecast, and
        whether no other row of the part has fewer bytes and a lower WQL.
    """
    for share in shares:
        if isinstance(share, bool) or not 0 <= share <= 1:
            raise DataError("E-OPTION", f"shares must lie in [0, 1]. Got {share!r}.", fix="shares=[0, 0.02, 0.1, 1]")
    fitted, steps = model._fitted, model._horizon(h)
    panel = model._panel_of(df, static_df, events)
    windows = choose_windows(panel, steps, n_windows=n_windows, step_size=step_size, cutoffs=None)
    points = measure_points(fitted, panel, windows, shares=shares, memories=memories, seed=seed)
    whole = {"all": np.ones(len(windows.items), dtype=bool), **(parts or {})}
    rows = [row for name, chosen in whole.items() for row in table_rows(points, name, chosen, seed=seed)]
    return plain_frame(panel.schema.dialect, {name: [row[name] for row in rows] for name in rows[0]})


def table_rows(points: Sequence[Point], part: str, windows: np.ndarray, *, seed: int = 0) -> list[dict[str, Any]]:
    """One row per point, scored over some windows, [X] bool."""
    rows = []
    for point in points:
        chosen = windows[point.losses.rows]  # [X G]
        row: dict[str, Any] = {"part": part, "memory": point.memory, "budget_share": point.budget_share}
        for score, value in (("WQL", point.losses.wql(chosen)), ("MASE", point.losses.mase(chosen))):
            low, high = interval(point.losses, chosen, score, seed=seed)
            row |= {score: value, f"{score}_low": low, f"{score}_high": high}
        names = ("usage_share", "bytes", "scratchpad_bytes", "scratchpad_attention", "ms_per_step", "ms_per_forecast")
        rows.append(row | {name: getattr(point, name) for name in names})
    best = pareto(np.array([row["bytes"] for row in rows]), np.array([row["WQL"] for row in rows]))
    return [{**row, "pareto": bool(one)} for row, one in zip(rows, best, strict=True)]
