"""Event columns, the event log and the static frame."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl
import polars.testing
import pytest
from frames import long_frame, quiet_panel

from hamts.data.frame import to_panel


def test_event_columns_have_no_event_where_nothing_is_said():
    df = long_frame().assign(e=pd.array([None, True, None, False, None] * 2, dtype="boolean")).drop(index=8)
    panel = quiet_panel(df, event_cols=["e"])
    # the gap itself is a step without a row, not one without an event
    np.testing.assert_array_equal(panel.values[:, 1], [0, 1, 0, 0, 0, 0, 1, 0, np.nan, 0])


def test_the_event_log_by_hand():
    log = pd.DataFrame(
        {
            "unique_id": ["a1", "b0", "b0", "b0", "a1"],
            "ds": [pd.Timestamp(2024, 1, 1, h, m) for h, m in [(4, 59), (0, 15), (0, 45), (2, 0), (0, 0)]],
            "type": ["alarm", "alarm", "alarm", "visit", "visit"],
            "value": [1, 2, 3, None, 0.5],
        }
    )
    panel = to_panel(long_frame(), events=log)
    assert [(c.name, c.role, c.from_log) for c in panel.schema.channels[1:]] == [
        ("alarm", "event", True),
        ("visit", "event", True),
    ]
    np.testing.assert_array_equal(panel.values[:, 1], [5, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(panel.values[:, 2], [0, 0, 1, 0, 0, 0.5, 0, 0, 0, 0])
    assert panel.event_offset.dtype == np.float32 and panel.event_offset.shape == panel.values.shape
    assert panel.event_offset[0].tolist() == [0, 0.75, 0]
    assert panel.event_offset[9, 1] == np.float32(59 / 60)
    assert panel.event_offset[2, 2] == 0


def test_the_log_is_counted_the_same_on_every_kind_of_clock():
    log = pd.DataFrame({"unique_id": "b0", "ds": pd.to_datetime(["2024-03-15", "2024-01-01"]), "type": "t"})
    monthly = long_frame(1, 4, freq="MS")
    panel = to_panel(monthly, events=log)
    assert panel.values[:, 1].tolist() == [1, 0, 1, 0]
    assert panel.event_offset[2, 1] == pytest.approx(14 / 31)
    irregular = monthly.assign(ds=pd.to_datetime(["2024-01-01", "2024-01-04", "2024-02-15", "2024-04-15"]))
    native = to_panel(irregular, events=log, irregular="native")
    assert native.values[:, 1].tolist() == [1, 0, 1, 0]
    assert native.event_offset[2, 1] == pytest.approx(29 / 60)
    numbers = pd.DataFrame({"unique_id": "b0", "ds": [3, 6, 9], "y": [1.0, 2, 3]})
    counted = to_panel(numbers, events=pd.DataFrame({"unique_id": ["b0"], "ds": [8], "type": ["t"]}))
    assert counted.values[:, 1].tolist() == [0, 1, 0]
    assert counted.event_offset[1, 1] == pytest.approx(2 / 3)


def test_a_log_fills_gaps_and_an_empty_one_says_nothing_happened():
    df = long_frame().drop(index=2)
    log = pd.DataFrame({"unique_id": ["b0"], "ds": [pd.Timestamp("2024-01-01 02:30")], "type": ["t"]})
    panel = quiet_panel(df, events=log)
    assert np.isnan(panel.values[2, 0]) and panel.values[2, 1] == 1
    again = quiet_panel(df, events=log.head(0), schema=panel.schema)
    assert again.schema == panel.schema
    assert again.values[:, 1].tolist() == [0] * 10


def test_static_columns():
    static = pd.DataFrame(
        {"unique_id": ["zz", "a1", "b0"], "size": [9, 1, 2], "kind": ["u", "v", None], "open": [True, True, False]}
    )
    panel = to_panel(long_frame(), static_df=static)
    assert [(c.name, c.kind, c.levels) for c in panel.schema.static] == [
        ("kind", "categorical", ("u", "v")),
        ("open", "boolean", ()),
        ("size", "numeric", ()),
    ]
    np.testing.assert_array_equal(panel.static_values, [[np.nan, 0, 2], [2, 1, 1]])
    again = quiet_panel(long_frame(), static_df=pl.from_pandas(static), schema=panel.schema)
    np.testing.assert_array_equal(again.static_values, panel.static_values)
