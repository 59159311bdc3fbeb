"""Pictures: what is drawn, not how it looks."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from hamts.errors import DataError
from hamts.plot import plot_forecast, plot_routes
from hamts.plot_base import thin

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
P = 10


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def series(n: int = 400, zone: str | None = "Europe/Berlin") -> pd.DataFrame:
    clock = pd.date_range("2024-03-01", periods=n, freq="h", tz=zone)
    y = np.sin(np.arange(n) / 9)
    return pd.concat([pd.DataFrame({"unique_id": name, "ds": clock, "y": y}) for name in ("a", "b")])


def table(n: int = 400, zone: str | None = "Europe/Berlin", patch: int = P) -> pd.DataFrame:
    start = pd.date_range("2024-03-01", periods=n // patch, freq=pd.Timedelta(hours=patch), tz=zone)
    count = len(start)
    status = np.array(["below"] * count, dtype=object)
    status[[2, 5, 6, 9]], status[3], status[-2:] = "kept", "evicted", "pending"
    reason = np.array([""] * count, dtype=object)
    reason[[2, 3]], reason[[5, 6]], reason[9] = "learned", "event", "surprise"
    rows = pd.DataFrame({
        "channel": "y", "ds_start": start, "ds_end": start + pd.Timedelta(hours=patch - 1), "n_steps": patch,
        "reason": reason, "tag": np.where(reason == "event", "storm", ""), "score": np.linspace(0, 1, count),
        "threshold": 0.5, "status": status,
    })  # fmt: skip
    return pd.concat([rows.assign(unique_id=name) for name in ("a", "b")], ignore_index=True)


@pytest.mark.parametrize("n", [1, 7, 3999, 4001, 100_000])
def test_thinning_keeps_every_extreme_and_every_gap(n: int, rng: np.random.Generator) -> None:
    values = rng.normal(size=n)
    values[n // 2 : n // 2 + n // 4] = np.nan
    if n > 10:
        values[n // 8] = 50.0
    clock, thinned = thin(pd.Series(np.arange(n)), pd.Series(values), 4000)
    assert len(thinned) <= max(4002, min(n, 8000))
    assert np.nanmax(thinned) == np.nanmax(values)
    assert np.nanmin(thinned) == np.nanmin(values)
    assert (np.diff(clock) >= 0).all()
    np.testing.assert_array_equal(thinned, values[clock])
    inside = (clock >= n // 2 + 60) & (clock < n // 2 + n // 4 - 60)
    assert np.isnan(thinned[inside]).all()
    assert inside.sum() >= 2 or n < 1000


def test_kept_steps_are_drawn_in_the_colour_of_their_reason() -> None:
    above, below = plot_routes(series(), table(), "y")
    assert above.get_shared_x_axes().joined(above, below)
    labels = above.get_legend_handles_labels()[1]
    assert labels == ["tagged", "kept: event (2)", "kept: surprise (1)", "kept: learned (1)", "evicted (1)", "window"]
    coloured = {line.get_color(): line for line in above.lines if line.get_linestyle() == "-"}
    # learned, blue: the ten steps of patch 2 and nothing else
    drawn = np.asarray(coloured["#0072B2"].get_ydata(), dtype=float)
    np.testing.assert_allclose(drawn[20:30], np.sin(np.arange(20, 30) / 9))
    assert np.isnan(np.delete(drawn, np.arange(20, 30))).all()
    colours = [line.get_color() for line in above.lines]
    assert {"#E69F00", "#D55E00"} <= set(colours)
    below_labels = below.get_legend_handles_labels()[1]
    assert below_labels == ["score", "threshold"]
    # markers tell reasons apart without colour
    markers = [line.get_marker() for line in below.lines if line.get_linestyle() == "None" and len(line.get_xdata())]
    assert len(set(markers)) == len(markers) == 3


def test_single_kept_steps_are_marked_where_patches_have_one_step() -> None:
    above, _ = plot_routes(series(), table(patch=1), "y", item="b")
    points = [line for line in above.lines if line.get_color() == "#0072B2" and line.get_linestyle() == "None"]
    assert any(np.isclose(line.get_ydata(), np.sin(2 / 9)).any() for line in points)


def test_given_windows_are_shaded_and_a_part_of_the_time_can_be_drawn() -> None:
    zone = "Europe/Berlin"
    windows = pd.DataFrame({
        "unique_id": ["a", "b"], "start": pd.Timestamp("2024-03-03", tz=zone),
        "end": pd.Timestamp("2024-03-04 23:00", tz=zone),
    })  # fmt: skip
    above, _ = plot_routes(series(), table(), "y", windows=windows, start="2024-03-02", end="2024-03-06")
    assert above.get_legend_handles_labels()[1][0] == "event"
    drawn = above.lines[0].get_xdata()
    assert pd.Timestamp(drawn[0]) == pd.Timestamp("2024-03-02")
    assert pd.Timestamp(drawn[-1]) == pd.Timestamp("2024-03-06")


def test_axes_can_be_given() -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(2, 1)
    above, below = plot_routes(series(zone=None), table(zone=None), "y", axes=axes)
    assert (above, below) == tuple(axes)
    _, single = plt.subplots()
    forecast = series().tail(5).rename(columns={"y": "HAM"})
    assert plot_forecast(forecast, axes=single) is single


def test_a_hundred_thousand_steps_are_drawn_quickly_and_a_spike_is_seen() -> None:
    n = 100_000
    frame = series(n)
    frame.iloc[12_345, 2] = 77.0
    began = time.perf_counter()
    above, _ = plot_routes(frame, table(n), "y", item="a")
    above.figure.canvas.draw()
    assert time.perf_counter() - began < 10
    assert max(np.nanmax(np.asarray(line.get_ydata(), dtype=float)) for line in above.lines) == 77.0
    assert all(len(line.get_xdata()) <= n // P for line in above.lines)


@pytest.mark.parametrize("style", ["levels", "quantiles", "gluonts", "polars"])
def test_a_forecast_is_drawn_with_its_bands(style: str) -> None:
    history = series(100)
    ahead = pd.DataFrame({"unique_id": "a", "ds": history["ds"].iloc[-1] + pd.to_timedelta(np.arange(1, 25), "h")})
    names = {"levels": ("HAM-lo-80", "HAM-hi-80"), "gluonts": ("0.1", "0.9")}.get(style, ("HAM_ql0.1", "HAM_ql0.9"))
    ahead["HAM"], ahead[names[0]], ahead[names[1]] = 0.0, -1.0, 1.0
    ahead["HAM_ql0.5" if style != "gluonts" else "0.5"] = 0.0
    drawn: object = ahead
    if style == "gluonts":
        drawn = ahead.rename(columns={"unique_id": "item_id", "ds": "timestamp", "HAM": "predictions"})
        history = history.rename(columns={"unique_id": "item_id", "ds": "timestamp", "y": "target"})
    if style == "polars":
        drawn = pytest.importorskip("polars").from_pandas(ahead)
    axes = plot_forecast(drawn, history, history_steps=50)
    name = "target" if style == "gluonts" else "y"
    assert axes.get_legend_handles_labels()[1] == ["80 %", "forecast", name]
    assert len(axes.lines[-1].get_xdata()) == 50


def test_one_of_several_targets_and_its_truth() -> None:
    rows = series(24).drop(columns="y").iloc[:24]
    both = pd.concat([rows.assign(target_name=name, HAM=value, y=value) for name, value in (("p", 1.0), ("q", 2.0))])
    axes = plot_forecast(both, target="q")
    assert axes.get_ylabel() == "q"
    assert all((np.asarray(line.get_ydata()) == 2.0).all() for line in axes.lines)


def test_what_cannot_be_drawn_is_named() -> None:
    with pytest.raises(DataError, match="no channel 'z'.*'y'"):
        plot_routes(series(), table(), "z")
    with pytest.raises(DataError, match="no item 'x'"):
        plot_routes(series(), table(), "y", item="x")
    with pytest.raises(DataError, match="HAM"):
        plot_forecast(series())
    with pytest.raises(DataError, match="no rows"):
        plot_forecast(series().iloc[:0])


def test_the_frames_are_not_changed() -> None:
    frame, entries = series(), table()
    before = frame.copy(), entries.copy()
    plot_routes(frame, entries, "y")
    pd.testing.assert_frame_equal(frame, before[0])
    pd.testing.assert_frame_equal(entries, before[1])
