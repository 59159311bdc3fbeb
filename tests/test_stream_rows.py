"""Rows that are not simply the next ones: late, replayed, corrected, far ahead, out of order, of another shape."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
from model_frames import quick, rich_frames, sine_frame
from streams import assert_like, begin, by_item, events_of, feed, plain_model, rich_model

from hamts.errors import DataError, DataWarning
from hamts.stream import Stream


def started(**options: Any) -> tuple[Stream, pd.DataFrame]:
    """Two items of which 50 hours were read: patches of 6, so that hours 48 to 53 are open."""
    return begin(plain_model(), sine_frame(items=2, steps=120), 50, **options)


def of(rows: pd.DataFrame, item: str, *hours: int) -> pd.DataFrame:
    mine = rows[rows["unique_id"] == item]
    return mine[mine["ds"].isin(pd.Timestamp("2024-01-01") + pd.to_timedelta(hours, unit="h"))]


def test_a_replayed_batch_changes_nothing_and_is_counted() -> None:
    stream, rest = started()
    stream.update(rest.iloc[:31])
    before = stream.state_hash()
    report = stream.update(rest.iloc[:31])
    assert (report.rows, report.replayed) == (0, 31)
    assert sorted(report.refused["replayed"].tolist()) == list(range(31))
    assert stream.state_hash() == before
    assert stream.stats()["replayed"] == 31 and stream.stats()["rows"] == 31


def test_rows_of_the_history_are_known_as_replayed() -> None:
    stream, _ = started()
    report = stream.update(sine_frame(items=2, steps=120).groupby("unique_id").head(50).tail(20))
    assert (report.rows, report.replayed) == (0, 20)


def test_a_batch_in_any_order_is_the_sorted_batch() -> None:
    stream, rest = started()
    other, _ = started()
    stream.update(rest.iloc[:60])
    report = other.update(rest.iloc[:60].sample(frac=1.0, random_state=3))
    assert report.rows == 60
    assert other.state_hash() == stream.state_hash()


def test_a_late_row_of_the_open_patch_is_taken_as_if_it_had_come_in_time() -> None:
    stream, rest = started()
    other, _ = started()
    stream.update(of(rest, "i0", 50, 51, 52))
    other.update(of(rest, "i0", 50, 52))
    report = other.update(of(rest, "i0", 51))
    assert (report.rows, report.reopened, report.late) == (1, 1, 0)
    assert_like(by_item(stream.forecast(12)), by_item(other.forecast(12)), tolerance=0.0)
    strict, _ = started(late="drop")
    strict.update(of(rest, "i0", 50, 52))
    dropped = strict.update(of(rest, "i0", 51))
    assert (dropped.rows, dropped.late) == (0, 1)


def test_a_late_row_of_a_patch_that_was_read_is_dropped_and_counted_or_refused() -> None:
    stream, rest = started()
    stream.update(of(rest, "i0", 50, 52, 53, 54))
    before = stream.state_hash()
    report = stream.update(of(rest, "i0", 51))
    assert (report.rows, report.late, report.reopened) == (0, 1, 0)
    assert report.refused["late"].tolist() == [0]
    assert stream.state_hash() == before
    strict, _ = started(late="error")
    strict.update(of(rest, "i0", 50, 52, 53, 54))
    before = strict.state_hash()
    with pytest.raises(DataError, match="E-LATE") as caught:
        strict.update(pd.concat([of(rest, "i0", 51, 55), of(rest, "i1", 50)]))
    assert "2024-01-03 03:00" in str(caught.value)
    assert strict.state_hash() == before


def test_a_correction_is_refused_ignored_or_applied_while_its_patch_is_open() -> None:
    changed = {"y": 99.0}
    for policy, counted in (("ignore", "corrected"), ("apply", "applied")):
        stream, rest = started(correction=policy)
        stream.update(of(rest, "i0", 50, 51))
        report = stream.update(of(rest, "i0", 50).assign(**changed))
        assert getattr(report, counted) == 1
        direct, _ = started()
        first = of(rest, "i0", 50)
        direct.update(pd.concat([first.assign(**changed) if policy == "apply" else first, of(rest, "i0", 51)]))
        assert_like(by_item(stream.forecast(12)), by_item(direct.forecast(12)), tolerance=0.0)
        # of a patch that was read, nothing can be applied
        stream.update(of(rest, "i0", 52, 53))
        assert stream.update(of(rest, "i0", 51).assign(**changed)).corrected == 1
    stream, rest = started()
    stream.update(of(rest, "i0", 50))
    before = stream.state_hash()
    with pytest.raises(DataError, match="E-CONFLICT.*cannot be unlearned"):
        stream.update(pd.concat([of(rest, "i0", 50).assign(**changed), of(rest, "i1", 50)]))
    assert stream.state_hash() == before


def test_the_same_row_twice_in_one_frame_counts_once() -> None:
    stream, rest = started(correction="ignore")
    row = of(rest, "i0", 50)
    report = stream.update(pd.concat([row, row, row.assign(y=5.0)]))
    assert (report.rows, report.replayed, report.corrected) == (1, 1, 1)
    single, _ = started()
    single.update(row)
    assert_like(by_item(stream.forecast(12)), by_item(single.forecast(12)), tolerance=0.0)


def test_a_row_of_the_far_future_is_put_aside_and_poisons_nothing() -> None:
    stream, rest = started(max_jump_steps=100)
    far = of(rest, "i0", 51).assign(ds=pd.Timestamp("2099-01-01"))
    with pytest.warns(DataWarning, match="W-JUMP"):
        report = stream.update(pd.concat([far, of(rest, "i0", 50), of(rest, "i1", 50)]))
    assert (report.rows, report.quarantined) == (2, 1)
    assert report.refused["quarantined"].tolist() == [0]
    assert stream.update(of(rest, "i0", 51)).rows == 1
    for policy, code in (("error", "E-JUMP"), ("accept", "")):
        other, _ = started(max_jump_steps=10, jump=policy)
        if code:
            with pytest.raises(DataError, match=code):
                other.update(of(rest, "i0", 70))
        else:
            assert other.update(of(rest, "i0", 70)).gap_steps == 20


def test_jumps_are_judged_against_the_row_before_not_the_first() -> None:
    stream, rest = started(max_jump_steps=10)
    report = stream.update(of(rest, "i1", 55, 65, 75, 90, 95))
    assert (report.rows, report.quarantined, report.gap_steps) == (3, 2, 23)


def test_a_long_silence_and_a_changed_unit_are_noted() -> None:
    stream, rest = started()
    feed(stream, of(rest, "i0", *range(50, 70)), [1])
    with pytest.warns(DataWarning, match="W-DRIFT"):
        report = stream.update(of(rest, "i0", 70).assign(y=3000.0))
    assert report.drifted == 1 and stream.stats()["drifted"] == 1
    late = of(rest, "i1", 60).assign(ds=pd.Timestamp("2024-02-10"))
    with pytest.warns(DataWarning, match="W-STALE"):
        stream.update(late)


def test_items_without_history_are_refused_until_they_are_added() -> None:
    stream, rest = started()
    before = stream.state_hash()
    new = of(rest, "i0", 50).assign(unique_id="new")
    with pytest.raises(DataError, match="E-ITEM") as caught:
        stream.update(pd.concat([of(rest, "i0", 50), new]))
    assert caught.value.series == ["new"] and "add" in caught.value.fix
    assert stream.state_hash() == before
    stream.add(new)
    assert stream.update(new.assign(ds=new["ds"] + pd.Timedelta("1h"))).rows == 1
    with pytest.raises(DataError, match="E-ITEM.*already"):
        stream.add(new)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda rows: rows.drop(columns="y"), "E-SCHEMA"),
        (lambda rows: rows.assign(y="text"), "E-DTYPE"),
        (lambda rows: rows.assign(y=np.inf), "E-INF"),
        (lambda rows: rows.assign(y=1e200), "E-RANGE"),
        (lambda rows: rows.assign(ds=rows["ds"].dt.tz_localize("UTC")), "E-TZ-DRIFT"),
        (lambda rows: rows.assign(ds=np.arange(len(rows))), "E-SCHEMA"),
        (lambda rows: rows.assign(ds=rows["ds"] + pd.Timedelta("7min")), "E-FREQ"),
        (lambda rows: rows.assign(ds=pd.NaT), "E-NAT"),
        (lambda rows: rows.assign(unique_id=7), "E-ID-TYPE"),
        (lambda rows: rows.assign(unique_id=None), "E-ID-NULL"),
        (lambda rows: rows.iloc[:0], "E-EMPTY"),
        (lambda rows: rows.to_numpy(), "E-TYPE"),
    ],
)
def test_rows_of_another_schema_are_refused_and_leave_the_state(change: Any, code: str) -> None:
    stream, rest = started()
    before = stream.state_hash()
    with pytest.raises(DataError, match=code):
        stream.update(change(rest.iloc[:4]))
    assert stream.state_hash() == before and stream.stats()["rows"] == 0


def test_the_callers_frame_is_not_changed() -> None:
    stream, rest = started()
    rows = rest.iloc[:20].sample(frac=1.0, random_state=1)
    copied = rows.copy(deep=True)
    stream.update(rows)
    pd.testing.assert_frame_equal(rows, copied)


def test_frames_mappings_and_polars_say_the_same() -> None:
    streams = [started()[0] for _ in range(5)]
    _, rest = started()
    rows = rest.iloc[:8]
    forms: list[Any] = [
        rows,
        pl.from_pandas(rows),
        {"unique_id": rows["unique_id"].tolist(), "ds": rows["ds"].to_numpy(), "y": rows["y"].to_numpy()},
        rows.assign(ds=rows["ds"].astype(str)),
        rows.assign(y=rows["y"].astype("Float64"), ds=rows["ds"].astype("M8[s]")),
    ]
    for stream, form in zip(streams, forms, strict=True):
        assert stream.update(form).rows == 8
    assert len({stream.state_hash() for stream in streams}) == 1
    one = {"unique_id": "i0", "ds": np.datetime64("2024-01-03T06:00"), "y": 1.0}
    assert streams[0].update(one).rows == 1


def test_zones_and_clock_changes_are_the_clocks_own() -> None:
    model, frames = rich_model(), rich_frames()
    stream, rest = begin(model, frames["df"], 100)
    part = rest.iloc[:40]
    stream.update(part, events=events_of(part))
    before = stream.state_hash()
    moved = part.assign(ds=part["ds"].dt.tz_convert("UTC"))
    with pytest.warns(DataWarning, match="W-TZ"):
        assert stream.update(moved, events=events_of(part)).replayed == 40
    assert stream.state_hash() == before


def test_events_must_come_with_a_model_that_was_fitted_with_a_log() -> None:
    stream, rest = begin(rich_model(), rich_frames()["df"], 100)
    with pytest.raises(DataError, match="E-SCHEMA.*event log"):
        stream.update(rest.iloc[:3])


def test_wide_frames_and_whole_number_clocks() -> None:
    rng = np.random.default_rng(0)
    wide = pd.DataFrame(
        {
            "ds": pd.date_range("2024-01-01", periods=90, freq="h"),
            **dict(zip("ab", rng.normal(size=(2, 90)), strict=True)),
        }
    )
    whole = pd.DataFrame({"unique_id": 4, "ds": np.arange(90) * 5, "y": rng.normal(size=90)})
    for df in (wide, whole):
        model = quick(df.iloc[:70], 4, patch_steps=4)
        stream = model.stream()
        feed(stream, df.iloc[70:], [3])
        assert_like(by_item(stream.forecast(4)), by_item(model.predict(df, 4)), tolerance=1e-5)


def test_what_a_stream_does_not_do_is_said() -> None:
    model = plain_model()
    with pytest.raises(DataError, match="E-OPTION.*late"):
        model.stream(late="never")
    with pytest.raises(DataError, match="E-OPTION"):
        model.stream(unknown=1)
    rng = np.random.default_rng(0)
    stamps = pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.exponential(60, 60).cumsum().round(3), unit="s")
    ticks = pd.DataFrame({"unique_id": "a", "ds": stamps, "y": rng.normal(size=60)})
    with pytest.raises(DataError, match="E-STREAM"):
        quick(ticks, 3, irregular="native").stream()
