"""Error against age since the start of a stream, cold and warm."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import hamts
from hamts.errors import DataError

HOURS = 60 * 24
START = 40 * 24


def frame() -> pd.DataFrame:
    """Two items of a daily wave whose level wanders, so that what is remembered of it matters."""
    noise = np.random.default_rng(0).normal(size=(2, HOURS)).cumsum(1) * 0.1
    wave = np.sin(2 * np.pi * np.arange(HOURS) / 24)
    ds = pd.date_range("2024-01-01", periods=HOURS, freq="h")
    parts = [pd.DataFrame({"unique_id": f"s{i}", "ds": ds, "y": wave + noise[i]}) for i in range(2)]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def model() -> hamts.HAMForecaster:
    return hamts.fit(frame(), preset="tiny", max_steps=8, verbose=False, progress=False)


def mae(table: pd.DataFrame) -> float:
    return float((table["y"] - table["HAM_ql0.5"]).abs().mean())


def test_the_cold_stream_is_the_history_cut_off_at_the_start_and_the_warm_one_the_whole(
    model: hamts.HAMForecaster,
) -> None:
    df = frame()
    start = df["ds"][START - 1]
    table = model.errors_by_age(df, start)
    n = (HOURS - START - model.h) // model.h
    whole = model.cross_validation(df, n_windows=n, quantiles=[0.5])
    late = model.cross_validation(df[df["ds"] > start], n_windows=n, quantiles=[0.5])
    age = (whole["cutoff"] - start) / pd.Timedelta("1h")
    for row in table.to_dict("records"):
        chosen = (age > row["age_from"]) & (age <= row["age_to"])
        expected = mae((whole if row["method"] == "warm" else late)[chosen])
        assert row["MAE"] == pytest.approx(expected, rel=1e-5)
    assert set(table["method"]) == {"cold", "warm"}
    # a stream of one day knows little of its level
    young = table[table["age_to"] == 24].set_index("method")
    assert young.loc["cold", "MAE"] != young.loc["warm", "MAE"]


def test_ages_double_from_one_season_on_and_count_every_window(model: hamts.HAMForecaster) -> None:
    df = frame()
    table = model.errors_by_age(df, df["ds"][START - 1])
    warm = table[table["method"] == "warm"]
    assert list(warm["age_from"]) == [0, 24, 48, 96, 192, 384]
    assert list(warm["age_to"]) == [24, 48, 96, 192, 384, 768]
    assert warm["windows"].sum() == 2 * ((HOURS - START - model.h) // model.h)
    assert np.isfinite(table[["MASE", "MAE", "WQL"]].to_numpy()).all()


@pytest.mark.parametrize(("options", "code"), [({"step_size": 0}, "E-OPTION"), ({"start": HOURS - 3}, "E-SHORT")])
def test_what_cannot_be_reported_is_refused(model: hamts.HAMForecaster, options: dict[str, int], code: str) -> None:
    df = frame()
    start = df["ds"][options.pop("start", START)]
    with pytest.raises(DataError) as info:
        model.errors_by_age(df, start, **options)
    assert info.value.code == code
