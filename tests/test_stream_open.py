"""A fitted model's stream, opened from its folder, fed, closed, and opened again."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from model_frames import quick, sine_frame
from test_stream_commits import lines_of

import hamts
from hamts.errors import DataError, StateFolderError
from hamts.feeding import feed
from hamts.sinks import FolderSink
from hamts.stream import Stream
from hamts.stream_open import parse_every

STEPS = 200


@pytest.fixture(scope="module")
def model() -> hamts.HAMForecaster:
    return quick(sine_frame(steps=STEPS), 6)


@pytest.fixture(scope="module")
def ahead() -> pd.DataFrame:
    """70 further hours of both items, in the order of time."""
    df = sine_frame(steps=STEPS + 70)
    return df[df["ds"] > df["ds"].iloc[STEPS - 1]].sort_values(["ds", "unique_id"], ignore_index=True)


def pieces(df: pd.DataFrame, size: int) -> list[pd.DataFrame]:
    return [df.iloc[low : low + size].reset_index(drop=True) for low in range(0, len(df), size)]


@pytest.mark.parametrize("options", [{"device": "tpu"}, {"store": "heap"}, {"history": sine_frame(steps=0)}])
def test_a_new_stream_that_is_refused_leaves_no_model_behind(
    model: hamts.HAMForecaster, options: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        Stream.open(tmp_path / "state", model, **options)
    assert not (tmp_path / "state" / "model").exists()
    with Stream.open(tmp_path / "state", model, store="paged") as stream:
        assert stream.stream.config.store == "paged"
    # what it was started with, it keeps
    with Stream.open(tmp_path / "state", store="padded") as stream:
        assert stream.stream.config.store == "paged"


def test_a_stream_goes_on_where_it_was_closed(model: hamts.HAMForecaster, ahead: pd.DataFrame, tmp_path: Path) -> None:
    whole = model.stream()
    for piece in pieces(ahead, 20):
        whole.update(piece)
    for number, piece in enumerate(pieces(ahead, 20)):
        # the model is given once; from then on its copy in the folder serves
        with Stream.open(tmp_path / "state", model if number == 0 else None, commit_every=None) as stream:
            assert stream.position == (None if number == 0 else {"piece": number - 1})
            stream.update(piece, position={"piece": number})
            assert stream.pending_rows == len(piece)
    with Stream.open(tmp_path / "state") as stream:
        assert stream.state_hash() == whole.state_hash()
        pd.testing.assert_frame_equal(stream.forecast(6).df, whole.forecast(6).df)
        assert stream.stats() == whole.stats()


def test_replayed_rows_change_nothing_and_are_counted(
    model: hamts.HAMForecaster, ahead: pd.DataFrame, tmp_path: Path
) -> None:
    with Stream.open(tmp_path, model) as stream:
        stream.update(ahead)
        before = stream.state_hash()
        assert stream.update(ahead[30:]).replayed == len(ahead) - 30
        assert stream.state_hash() == before
    with Stream.open(tmp_path) as stream:
        assert stream.state_hash() == before
        assert stream.stats()["replayed"] == len(ahead) - 30


def test_a_stream_shows_itself_and_where_it_lies(model: hamts.HAMForecaster, tmp_path: Path) -> None:
    with Stream.open(tmp_path, model) as stream:
        assert len(stream) == 2
        assert repr(stream).startswith("DurableStream(Stream(items=2")
        assert str(tmp_path) in repr(stream)
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            _ = stream.nothing_of_the_kind


def test_what_was_not_committed_is_read_again(model: hamts.HAMForecaster, ahead: pd.DataFrame, tmp_path: Path) -> None:
    one, two, three = pieces(ahead, 47)
    stream = Stream.open(tmp_path, model, commit_every=None)
    stream.update(one, position={"read": 1})
    stream.commit()
    stream.update(two, position={"read": 2})
    # as a kill would: the lock goes, nothing is committed
    stream.store.close()
    with Stream.open(tmp_path) as stream:
        assert stream.position == {"read": 1}
        for number, piece in ((2, two), (3, three)):
            stream.update(piece, position={"read": number})
        found = stream.state_hash()
    whole = model.stream()
    for piece in (one, two, three):
        whole.update(piece)
    assert found == whole.state_hash()


def test_refused_rows_leave_the_stream_and_its_position(
    model: hamts.HAMForecaster, ahead: pd.DataFrame, tmp_path: Path
) -> None:
    with Stream.open(tmp_path, model) as stream:
        before = stream.state_hash()
        with pytest.raises(DataError):
            stream.update(ahead.rename(columns={"y": "z"}), position={"read": 1})
        assert (stream.state_hash(), stream.position, stream.pending_rows) == (before, None, 0)
        stream.update(ahead[:10], position={"read": 2})
    assert Stream.open(tmp_path, read_only=True).position == {"read": 2}


def test_an_update_that_is_cut_off_in_the_middle_is_never_committed(
    model: hamts.HAMForecaster, ahead: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Stream.open(tmp_path, model) as stream:
        stream.update(ahead[:10])
        committed = stream.last_commit

        def cut_off(_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(stream.stream, "update", cut_off)
        with pytest.raises(KeyboardInterrupt):
            stream.update(ahead[10:20])
        for again in (stream.commit, lambda: stream.update(ahead[10:20])):
            with pytest.raises(StateFolderError, match="E-STATE-BROKEN.*KeyboardInterrupt"):
                again()
    assert Stream.open(tmp_path, read_only=True).last_commit == committed


def test_pins_and_other_edits_are_committed(model: hamts.HAMForecaster, ahead: pd.DataFrame, tmp_path: Path) -> None:
    with Stream.open(tmp_path, model, commit_every=None) as stream:
        stream.update(ahead)
        stream.commit()
        stream.pin((ahead["ds"].iloc[-40], ahead["ds"].iloc[-1]), "watch", item="i0")
        pins, wanted = stream.pins, stream.state_hash()
    with Stream.open(tmp_path) as stream:
        assert stream.pins == pins
        assert stream.state_hash() == wanted


def test_another_model_is_refused_and_a_saved_copy_is_not(
    model: hamts.HAMForecaster, ahead: pd.DataFrame, tmp_path: Path
) -> None:
    with Stream.open(tmp_path / "state", model) as stream:
        stream.update(ahead[:10])
    model.save(tmp_path / "saved")
    with Stream.open(tmp_path / "state", tmp_path / "saved") as stream:
        assert stream.stats()["rows"] == 10
    other = quick(sine_frame(steps=STEPS), 6, seed=1)
    with pytest.raises(StateFolderError, match=r"E-STATE-MODEL[^$]*Leave the model out"):
        Stream.open(tmp_path / "state", other)
    # the refusal gave the lock back and left the copy of the model alone
    Stream.open(tmp_path / "state").close()


def test_a_start_that_was_killed_while_it_copied_the_model_is_begun_again(
    model: hamts.HAMForecaster, tmp_path: Path
) -> None:
    half = tmp_path / ".model.saving-12-0123abcd"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    Stream.open(tmp_path, model).close()
    assert not list(tmp_path.glob(".model*"))
    Stream.open(tmp_path).close()


def test_a_reader_sees_the_last_commit_of_a_stream_that_runs(
    model: hamts.HAMForecaster, ahead: pd.DataFrame, tmp_path: Path
) -> None:
    with Stream.open(tmp_path, model) as stream:
        with pytest.raises(StateFolderError, match="E-STATE-LOCKED"):
            Stream.open(tmp_path)
        stream.update(ahead[:40])
        reader = Stream.open(tmp_path, read_only=True)
        assert reader.state_hash() == stream.state_hash()
        reader.update(ahead[40:50], commit=False)
        with pytest.raises(StateFolderError, match="E-STATE-READONLY"):
            reader.commit()
        reader.close()
    with pytest.raises(StateFolderError, match="E-STATE-EMPTY"):
        Stream.open(tmp_path / "none").close()
    (tmp_path / "empty").mkdir()
    with pytest.raises(StateFolderError, match="E-STATE-EMPTY"):
        Stream.open(tmp_path / "empty", model, read_only=True)


# --- when to commit


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, (1, np.inf)), (500, (500, np.inf)), ("500", (500, np.inf)), ("30s", (np.inf, 30)),
        ("1.5 min", (np.inf, 90)), ("250ms", (np.inf, 0.25)), (timedelta(hours=1), (np.inf, 3600)),
        (None, (np.inf, np.inf)),
    ],
)  # fmt: skip
def test_when_to_commit_is_rows_or_a_time(every: Any, expected: tuple[float, float]) -> None:
    assert parse_every(every) == expected


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "", "soon", "0s", "-3", "0", "30 days", timedelta(0)])
def test_when_to_commit_is_nothing_else(every: Any, tmp_path: Path, model: hamts.HAMForecaster) -> None:
    with pytest.raises(ValueError, match="commit_every"):
        Stream.open(tmp_path / "state", model, commit_every=every)
    assert not (tmp_path / "state").exists()


# --- feeding


def test_rows_that_the_stream_refuses_are_set_aside_one_by_one(
    model: hamts.HAMForecaster, ahead: pd.DataFrame, tmp_path: Path
) -> None:
    unknown = ahead.assign(unique_id=["nobody" if n in (3, 17) else i for n, i in enumerate(ahead["unique_id"])])
    drops = tmp_path / "drops"
    drops.mkdir()
    unknown.to_csv(drops / "one.csv", index=False)
    from hamts.sources import FolderSource

    sink = FolderSink(tmp_path / "out")
    with Stream.open(tmp_path / "state", model, sink=sink) as stream:
        source = FolderSource(drops, settle_seconds=0)
        with pytest.raises(DataError, match="E-ITEM"):
            feed(stream, source, once=True)
        assert stream.position is None
        report = feed(stream, source, once=True, poll_seconds=0.01, on_bad="quarantine")
        assert (report.rows, report.rejected) == (len(ahead) - 2, 2)
        assert stream.stats()["rows"] == len(ahead) - 2
    (rejected,) = lines_of(tmp_path / "out").values()
    assert [row["unique_id"] for row in rejected] == ["nobody", "nobody"]
    assert all("E-ITEM" in row["error"] for row in rejected)
