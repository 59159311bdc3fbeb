"""Pictures of the whole memory and of the quality of forecasts: what they hold, not how they look."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from hamts.errors import DataError
from hamts.plot import plot_calibration, plot_channels, plot_frontier, plot_scores, plot_survival, plot_usage
from hamts.plot_memory import survival
from hamts.plot_quality import calibration

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def frame(n: int, channels: int) -> pd.DataFrame:
    wave = {f"c{k}": np.sin(np.arange(n) / (9 + k)) for k in range(channels)}
    return pd.DataFrame({"unique_id": "a", "ds": pd.date_range("2020-01-01", periods=n, freq="h"), **wave})


def table(n: int, channels: int, patch: int = 10) -> pd.DataFrame:
    """Every seventh patch kept as learned, every eleventh evicted after ten patches, in layers 0 and 0,1."""
    start = pd.date_range("2020-01-01", periods=n // patch, freq=pd.Timedelta(hours=patch))
    place = np.arange(len(start))
    marks = [place >= len(start) - 2, place % 7 == 0, place % 11 == 0]
    status = np.select(marks, ["pending", "kept", "evicted"], "below")
    wrote = np.isin(status, ["kept", "evicted"])
    end = start + pd.Timedelta(hours=patch - 1)
    written = pd.Series(end + pd.Timedelta(hours=2 * patch))
    rows = pd.DataFrame({
        "unique_id": "a", "ds_start": start, "ds_end": end, "n_steps": patch, "tag": "", "threshold": 0.5,
        "score": np.linspace(0, 1, len(start)), "status": status.astype(object),
        "reason": np.where(wrote, np.where(place % 2, "learned", "event"), ""),
        "layers": np.where(status == "kept", "0,1", np.where(wrote, "0", "")), "written_at": written.where(wrote),
        "evicted_at": (written + pd.Timedelta(hours=10 * patch)).where(status == "evicted"),
    })  # fmt: skip
    return pd.concat([rows.assign(channel=f"c{k}") for k in range(channels)], ignore_index=True)


def test_twenty_channels_of_a_hundred_thousand_steps_are_drawn_quickly_and_a_spike_is_seen() -> None:
    n = 100_000
    df = frame(n, 20)
    df.loc[54_321, "c7"] = 40.0
    began = time.perf_counter()
    axes = plot_channels(df, table(n, 20))
    axes.figure.canvas.draw()
    # one second where nothing else runs
    assert time.perf_counter() - began < 15
    assert [text.get_text() for text in axes.get_yticklabels()] == [f"c{k}" for k in range(20)]
    series = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(series) == 20
    assert all(len(line.get_xdata()) <= 1502 for line in series)
    spike = np.asarray(series[7].get_ydata(), dtype=float)
    assert spike.max() == pytest.approx(-7 + 0.42)
    assert pd.Timestamp(series[7].get_xdata()[spike.argmax()]) == df["ds"][54_321]
    # rows do not reach into one another
    assert spike.max() < -6.5 and spike.min() > -7.5
    labels = axes.get_legend_handles_labels()[1]
    assert labels[0].startswith("kept: event (") and labels[1].startswith("kept: learned (")
    # a label for each channel fits into the figure
    assert axes.figure.get_size_inches()[1] > 20 * 0.3


def test_channels_can_be_chosen_and_unknown_ones_are_named() -> None:
    axes = plot_channels(frame(100, 3), table(100, 3), channels=["c2", "c0"])
    assert [text.get_text() for text in axes.get_yticklabels()] == ["c2", "c0"]
    with pytest.raises(DataError, match="nope"):
        plot_channels(frame(100, 1), table(100, 1), channels=["nope"])
    with pytest.raises(DataError, match="no item 'z'"):
        plot_channels(frame(100, 1), table(100, 1), item="z")


def test_the_strip_says_which_share_each_layer_took() -> None:
    entries = table(2000, 2)
    axes = plot_usage(entries)
    mesh = axes.collections[0]
    share = np.asarray(mesh.get_array())
    assert share.shape[0] == 2
    kept, wrote = (entries["status"] == "kept"), entries["status"].isin(["kept", "evicted"])
    assert share.shape[1] == 199
    # the last bin has two patches, all others one
    weight = np.append(np.ones(198), 2.0) / 200
    assert (share[1] * weight).sum() == pytest.approx(kept.mean(), abs=1e-9)
    assert (share[0] * weight).sum() == pytest.approx(wrote.mean(), abs=1e-9)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["layer 0", "layer 1"]
    nothing = plot_usage(entries.assign(status="below", layers=""))
    assert np.asarray(nothing.collections[0].get_array()).max() == 0
    with pytest.raises(DataError, match="no rows"):
        plot_usage(entries[:0])


def test_survival_counts_the_living_as_long_as_they_were_seen() -> None:
    day = pd.Timedelta(days=1)
    at = pd.Timestamp("2024-01-11")
    rows = pd.DataFrame({
        "unique_id": "a", "reason": "learned", "ds_end": at,
        # lives of 1, 2 (still kept), 3 and 4 days (still kept)
        "written_at": [at - 5 * day, at - 2 * day, at - 6 * day, at - 4 * day],
        "evicted_at": [at - 4 * day, pd.NaT, at - 3 * day, pd.NaT],
    })  # fmt: skip
    curve = survival(rows)
    assert (curve["age"] / day).tolist() == [1, 2, 3, 4]
    assert curve["at_risk"].tolist() == [4, 3, 2, 1]
    np.testing.assert_allclose(curve["alive"], [3 / 4, 3 / 4, 3 / 8, 3 / 8])
    axes = plot_survival(rows)
    assert axes.get_xlabel() == "age in days"
    assert axes.get_legend_handles_labels()[1] == ["learned (4)"]
    whole = rows.assign(ds_end=11, written_at=[6, 9, 5, 7], evicted_at=pd.array([7, None, 8, None], dtype="Int64"))
    np.testing.assert_allclose(survival(whole)["alive"], curve["alive"])
    assert plot_survival(whole).get_xlabel() == "age in steps"
    with pytest.raises(DataError, match="ever kept"):
        plot_survival(rows.assign(written_at=pd.NaT))


def test_scores_and_threshold_share_one_axis() -> None:
    axes = plot_scores(table(400, 2), "c1")
    assert axes.get_legend_handles_labels()[1] == ["score", "threshold"]
    with pytest.raises(DataError, match="no channel 'x'"):
        plot_scores(table(400, 2), "x")


def test_a_frontier_has_a_line_for_each_group_and_its_interval() -> None:
    rows = pd.DataFrame({"usage_share": [0.5, 0.0, 0.1] * 2, "WQL": [3.0, 1.0, 2.0] * 2, "router": list("aaabbb")})
    axes = plot_frontier(rows.assign(lo=0.5, hi=3.5), group="router", low="lo", high="hi", levels={"emptied": 2.5})
    assert axes.get_legend_handles_labels()[1] == ["a", "b", "emptied"]
    assert list(axes.lines[0].get_xdata()) == [0.0, 0.1, 0.5]
    assert list(axes.lines[0].get_ydata()) == [1.0, 2.0, 3.0]
    assert len(axes.collections) == 2
    assert axes.lines[0].get_marker() != axes.lines[1].get_marker()
    with pytest.raises(DataError, match="MSE"):
        plot_frontier(rows, y="MSE")


def test_calibration_is_the_share_of_truths_below_each_quantile(rng: np.random.Generator) -> None:
    rows = pd.DataFrame({"unique_id": "a", "cutoff": np.repeat(np.arange(40), 25), "y": rng.random(1000)})
    for level in (0.1, 0.5, 0.9):
        rows[f"HAM_ql{level:g}"] = level
    rows.loc[0, "y"] = np.nan
    line = calibration(rows)
    assert line["level"].tolist() == [0.1, 0.5, 0.9]
    known = rows["y"].dropna()
    np.testing.assert_allclose(line["observed"], [(known <= level).mean() for level in (0.1, 0.5, 0.9)])
    assert (line["low"] < line["level"]).all() and (line["level"] < line["high"]).all()
    assert (line["cells"] == 999).all()
    axes = plot_calibration(rows, names=["HAM", "wide"], others=[rows])
    assert axes.get_legend_handles_labels()[1] == ["HAM", "wide"]
    with pytest.raises(DataError, match="quantile columns"):
        calibration(rows[["y"]])
    with pytest.raises(ValueError, match="one entry per forecast"):
        plot_calibration(rows, names=["HAM", "b"])
    with pytest.raises(DataError, match="No truth"):
        calibration(rows.assign(y=np.nan))


def test_axes_can_be_given() -> None:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(5, 1)
    entries = table(400, 2)
    assert plot_channels(frame(400, 2), entries, axes=axes[0]) is axes[0]
    assert plot_usage(entries, axes=axes[1]) is axes[1]
    assert plot_survival(entries, axes=axes[2]) is axes[2]
    assert plot_scores(entries, "c0", axes=axes[3]) is axes[3]
    rows = pd.DataFrame({"usage_share": [0.0, 1.0], "WQL": [1.0, 2.0]})
    assert plot_frontier(rows, axes=axes[4]) is axes[4]
