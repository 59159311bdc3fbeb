"""Labelled sets of the catalogue, one fitted forecaster each: edit, drop and lead tests, and scores around events.

The forecaster is fitted on the rows before the first window at which something is to be remembered, so that no test
row is seen in training; all tests read the rows after them. What is done is kept at once, and a stopped
run goes on.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from hamts.errors import DataError
from hamts.files import written_whole
from hamts.metrics import seasonal_naive, seasonal_scale
from probes.adapter import ROLLING_LEVELS, HamtsAdapter
from probes.contract import FAMILY, hashed
from probes.detection import detection_test
from probes.events import TAILS, EventForecasts, EventScores, event_scores, tail_quantiles
from probes.frames import ProbeFromFrame
from probes.real import LABELLED_SETS, RealResult, drop_test, edit_test, labelled_probe, lead_test
from probes.results import machine
from probes.runner import check_device

__all__ = ["SETTINGS", "RealPlan", "read_real", "run_real", "training_part"]

# two folders deep: what lies one deep is a document of a run
REAL_FOLDER = "real/sets"
PARTS_FOLDER = "real/parts"
MODEL_FILE = "model.hamts"


@dataclass(frozen=True)
class Setting:
    """Rows of a season, of the period that a replacement comes from, ages of the lead test, rows of a block."""

    season: int
    period: int
    ages: tuple[int, ...]
    horizon: int


# a day, a week and a month before the later window; tep has no calendar, its rows are 3 minutes
SETTINGS = {
    "nycflights13": Setting(season=24, period=168, ages=(24, 168, 720), horizon=24),
    "tep": Setting(season=1, period=480, ages=(60, 480, 960), horizon=60),
    "batadal": Setting(season=24, period=168, ages=(24, 168, 720), horizon=24),
    "nab/realKnownCause/nyc_taxi": Setting(season=48, period=336, ages=(48, 336, 1440), horizon=48),
}


@dataclass(frozen=True, kw_only=True)
class RealPlan:
    """One set and how it is fitted.

    Attributes:
        preset, max_time, seed: of ``hamts.fit``.
        budget_shares: of the lead test; None is that of the fit.
        most: pairs of windows that are taken, None for all.
    """

    name: str
    preset: str = "tiny"
    max_time: float = 60.0
    seed: int = 0
    budget_shares: tuple[float | None, ...] = (None, 0.0)
    most: int | None = None

    def __post_init__(self) -> None:
        if self.name not in SETTINGS:
            raise ValueError(f"Unknown labelled set {self.name!r}. Available: {sorted(LABELLED_SETS)}.")

    def path(self, folder: Path) -> Path:
        return folder / REAL_FOLDER / f"{self._stem()}.json"

    def parts(self, folder: Path) -> Path:
        """Where the fitted forecaster and the tests that are done wait until all are; another plan has another one."""
        return folder / PARTS_FOLDER / f"{self._stem()}__{hashed(asdict(self))}"

    def tests(self) -> list[str]:
        """Names of what is asked of the forecaster, each written as soon as it is there."""
        leads = [f"lead{number}" for number in range(len(self.budget_shares))]
        return ["ham", *leads, "edit", "drop", "detection", "seasonal_naive"]

    def _stem(self) -> str:
        return f"{self.name.replace('/', '-')}__{self.preset}__s{self.seed}"


def run_real(plan: RealPlan, folder: str | Path, *, device: str = "auto", workers: int = 1) -> Path:
    """Fit, test and write one document; one that is there is left as it is.

    The fitted forecaster and each test are kept until the document is written, so that a run which was stopped goes on.

    Args:
        device: of the fit and of the forecasts, cpu or cuda; auto: a GPU where there is one.
        workers: processes that tests are spread over.

    Raises:
        DataError: E-DATASET (the set is not on this machine), E-PROBE-WINDOWS (no pair of windows can be used),
            E-OPTION (a device that is not there, no worker).
    """
    path, parts = plan.path(Path(folder)), plan.parts(Path(folder))
    if path.is_file():
        return path
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise DataError(
            "E-OPTION", f"device must be auto, cpu or cuda. Got {device!r}.", fix="--device cuda takes the first."
        )
    if workers < 1:
        raise DataError("E-OPTION", f"workers must be at least 1. Got {workers}.", fix="--workers 1 tests in turn.")
    check_device(device)
    fit = _fitted(plan, parts, device)
    todo = [test for test in plan.tests() if not (parts / f"{test}.json").is_file()]
    jobs = ([plan] * len(todo), [parts] * len(todo), todo, [device] * len(todo))
    if workers > 1 and len(todo) > 1:
        with ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn")) as pool:
            list(pool.map(_test, *jobs))
    else:
        list(map(_test, *jobs))
    found = {test: json.loads((parts / f"{test}.json").read_text(encoding="utf-8")) for test in plan.tests()}
    leads = [found[f"lead{number}"] for number in range(len(plan.budget_shares))]
    content = {
        "family": FAMILY, "set": plan.name, "tier": "T2", "preset": plan.preset, "seed": plan.seed, **fit,
        "leak_status": "clean", "tests": [found["edit"], found["drop"], *leads], "detection": found["detection"],
        "event_scores": {name: found[name]["rows"] for name in ("ham", "seasonal_naive")},
        "events": found["ham"]["events"], "runtime": {**machine(), "device": device},
    }  # fmt: skip
    _write(path, content)
    shutil.rmtree(parts)
    return path


def _fitted(plan: RealPlan, parts: Path, device: str) -> dict[str, Any]:
    """Fit and save the forecaster unless it is there; what is said of it."""
    import hamts
    from hamts.data.catalog import load_dataset

    told = parts / "fit.json"
    if not told.is_file():
        probe, setting = labelled_probe(plan.name), SETTINGS[plan.name]
        train = training_part(probe)
        options = {name: part for name, part in load_dataset(plan.name).fit_kwargs().items() if name != "h"}
        started = time.monotonic()
        model = hamts.fit(
            train, h=setting.horizon, **options, preset=plan.preset, max_time=plan.max_time, seed=plan.seed,
            accelerator="gpu" if device.startswith("cuda") else "cpu", verbose=False, progress=False,
        )  # fmt: skip
        seconds = time.monotonic() - started
        parts.mkdir(parents=True, exist_ok=True)
        model.save(parts / MODEL_FILE)
        report = model.report
        _write(told, {
            "horizon": setting.horizon, "router": model.config.router, "budget_share": model._share(None),
            "fit_seconds": seconds, "fit_rows": len(train), "fit_steps": report.steps,
            "fit_stopped_by": report.stopped_by, "pairs": len(probe.pairs),
        })  # fmt: skip
    return dict(json.loads(told.read_text(encoding="utf-8")))


def _test(plan: RealPlan, parts: Path, test: str, device: str) -> None:
    """Ask the saved forecaster one thing and write it down."""
    import hamts

    probe, setting = labelled_probe(plan.name), SETTINGS[plan.name]
    model = hamts.load(parts / MODEL_FILE)
    h, most = setting.horizon, plan.most
    adapter = HamtsAdapter(model, device=device)
    found: Any
    if test == "edit":
        found = _tried(lambda: edit_test(probe, adapter, horizon=h, period_rows=setting.period, most=most))
    elif test == "drop":
        found = _tried(lambda: drop_test(probe, adapter, horizon=h, most=most, seed=plan.seed))
    elif test == "detection":
        found = detection_test(probe, adapter, most=most)
    elif test.startswith("lead"):
        share = plan.budget_shares[int(test.removeprefix("lead"))]
        reader = HamtsAdapter(model, budget_share=share, device=device)
        found = _tried(lambda: lead_test(probe, reader, horizon=h, ages=setting.ages, most=most))
        found["budget_share"] = model._share(share)
    else:
        scores = _scored(probe, training_part(probe), adapter if test == "ham" else None, setting)
        found = {"rows": scores.rows(), "events": scores.events}
    _write(parts / f"{test}.json", found)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1, default=_plain, allow_nan=True), encoding="utf-8")


def _plain(content: Any) -> Any:
    """Numbers of numpy as those of JSON."""
    return content.item() if hasattr(content, "item") else str(content)


def _tried(test: Any) -> dict[str, Any]:
    """A test's document; one for which no pair of windows can be used says so."""
    try:
        result: RealResult = test()
    except DataError as error:
        if error.code != "E-PROBE-WINDOWS":
            raise
        return {"test": "none", "note": str(error), "rows": []}
    return result.to_json()


def training_part(probe: ProbeFromFrame) -> pd.DataFrame:
    """The rows of each series before its first later window; all rows of series that have none."""
    first: dict[Any, Any] = {}
    for _, later in probe.pairs:
        series = later["unique_id"]
        first[series] = min(first.get(series, later["start"]), later["start"])
    parts = [
        part if series not in first else part[part["ds"] < first[series]]
        for series, part in probe.df.groupby("unique_id", sort=False)
    ]
    return pd.concat(parts, ignore_index=True)


# --- around events


def _scored(probe: ProbeFromFrame, train: pd.DataFrame, adapter: HamtsAdapter | None, setting: Setting) -> EventScores:
    """Scores over the rows that were not fitted on; without an adapter, of the seasonal naive forecast."""
    tested = {later["unique_id"] for _, later in probe.pairs}
    ends = train.groupby("unique_id")["ds"].max()
    rest = [
        int((part["ds"] > ends[series]).sum())
        for series, part in probe.df.groupby("unique_id", sort=False)
        if series in tested
    ]
    windows = max(max(rest) // setting.horizon, 1)
    df = probe.df[probe.df["unique_id"].isin(tested)]
    found = (
        naive_rolling(df, probe.target, horizon=setting.horizon, windows=windows, season=setting.season)
        if adapter is None
        else adapter.rolling(df, horizon=setting.horizon, windows=windows)
    )
    found = found[found["cutoff"] >= found["unique_id"].map(ends)]
    return event_scores(_event_forecasts(probe, train, found, setting))


def naive_rolling(
    df: pd.DataFrame, target: tuple[str, ...], *, horizon: int, windows: int, season: int
) -> pd.DataFrame:
    """The value one season before, at the moments of ``HamtsAdapter.rolling``; a median and nothing else."""
    parts = []
    for series, part in df.groupby("unique_id", sort=False):
        times = part["ds"].to_numpy()
        for number in range(windows, 0, -1):
            start = len(part) - number * horizon
            if start < season:
                continue
            rows = slice(start, start + horizon)
            for name in target:
                values = part[name].to_numpy(dtype=float)
                median = seasonal_naive(values[:start], season_steps=season, h=horizon)
                parts.append(pd.DataFrame({
                    "unique_id": series, "ds": times[rows], "cutoff": times[start - 1], "target": name,
                    "y": values[rows], 0.5: median,
                }))  # fmt: skip
    frame = pd.concat(parts, ignore_index=True)
    for name in ("ds", "cutoff"):
        frame[name] = frame[name].astype(df["ds"].dtype)
    return frame


def _event_forecasts(
    probe: ProbeFromFrame, train: pd.DataFrame, found: pd.DataFrame, setting: Setting
) -> EventForecasts:
    """Rolling forecasts as arrays, a row a series, target and cutoff."""
    levels = [name for name in (*ROLLING_LEVELS,) if name in found.columns]
    found = found.sort_values(["unique_id", "target", "cutoff", "ds"])
    keys = found.groupby(["unique_id", "target", "cutoff"], sort=False)
    whole = found[keys["ds"].transform("size") == setting.horizon]
    shape = (-1, setting.horizon)
    heads = whole.iloc[:: setting.horizon]
    event, labels = pd.factorize(_events_of(probe, whole))
    scale, tails = _training_numbers(probe, train, setting)
    pairs = list(zip(heads["unique_id"], heads["target"], strict=True))
    weeks = heads.groupby(["unique_id", "target"]).cumcount().to_numpy() * setting.horizon // setting.period
    return EventForecasts(
        actual=whole["y"].to_numpy(dtype=float).reshape(shape),
        quantiles={level: whole[level].to_numpy(dtype=float).reshape(shape) for level in levels},
        event=np.asarray(event).reshape(shape),
        scale=np.array([scale[pair] for pair in pairs]),
        tau={tail: np.array([tails[pair][tail] for pair in pairs]) for tail in TAILS},
        block=np.asarray(weeks),
    )


def _events_of(probe: ProbeFromFrame, rows: pd.DataFrame) -> pd.Series:
    """The event that each row lies in, by name and start; None outside of all."""
    name = pd.Series([None] * len(rows), index=rows.index, dtype=object)
    for _, window in probe.critical.iterrows():
        inside = (
            (rows["unique_id"] == window["unique_id"]) & (rows["ds"] >= window["start"]) & (rows["ds"] <= window["end"])
        )
        name[inside] = f"{window.get('label', '')} {window['start']}"
    return name


def _training_numbers(
    probe: ProbeFromFrame, train: pd.DataFrame, setting: Setting
) -> tuple[dict[tuple[Any, str], float], dict[tuple[Any, str], dict[float, float]]]:
    """Seasonal-naive error and tail quantiles of every series and target on its training part."""
    scale, tails = {}, {}
    for series, part in train.groupby("unique_id", sort=False):
        for name in probe.target:
            values = part[name].to_numpy(dtype=float)
            scale[series, name] = seasonal_scale(values, setting.season)
            tails[series, name] = tail_quantiles(values)
    return scale, tails


def read_real(folder: str | Path) -> list[dict[str, Any]]:
    """All documents of real sets in a results folder."""
    return [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted((Path(folder) / REAL_FOLDER).glob("*.json"))
    ]
