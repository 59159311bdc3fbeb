"""A fitted model's stream, opened from its folder, fed, closed, and opened again."""

from __future__ import annotations

import errno
import json
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from model_frames import quick, sine_frame
from stream_fakes import CountingSource, FakeStream

import hamts
from hamts.errors import DataError, DataWarning, StateFolderError
from hamts.feeding import feed
from hamts.sinks import FolderSink
from hamts.stream import Stream
from hamts.stream_open import DurableStream, parse_every
from hamts.stream_store import StateStore

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


def test_refused_rows_are_not_set_aside_into_nowhere(tmp_path: Path) -> None:
    with fake(tmp_path) as stream, pytest.raises(ValueError, match="sink"):
        feed(stream, CountingSource(), once=True, on_bad="quarantine")


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


def fake(folder: Path, **options: Any) -> DurableStream:
    store = StateStore(folder)
    loaded = store.load(FakeStream.model_hash)
    stream: Any = FakeStream() if loaded is None else FakeStream.from_state(None, loaded.arrays, loaded.meta)
    return DurableStream(stream, store, **options)


def test_commits_come_after_so_many_rows(tmp_path: Path) -> None:
    with fake(tmp_path, commit_every=5) as stream:
        generations = []
        for _ in range(6):
            stream.update([1.0, 2.0])
            generations.append(stream.last_commit.generation)
        assert generations == [0, 0, 1, 1, 1, 2]
        stream.update([1.0])
        assert stream.pending_rows == 1
    assert StateStore(tmp_path, read_only=True).load(FakeStream.model_hash).commit.generation == 3


def test_commits_come_after_so_much_time_since_the_first_row_that_waits(tmp_path: Path) -> None:
    now = 0.0
    with fake(tmp_path, commit_every="10s", clock=lambda: now) as stream:
        now = 50.0
        assert stream.commit_if_due() is None
        stream.update([1.0])
        assert stream.pending_rows == 1
        now = 59.0
        assert stream.commit_if_due() is None
        now = 60.0
        assert stream.commit_if_due() is not None
        assert stream.pending_rows == 0
        assert stream.commit() is None


def test_a_commit_that_fails_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    sink = FolderSink(tmp_path / "out")
    with fake(tmp_path / "state", commit_every=None, sink=sink) as stream:
        stream.before_commit(lambda one: sink.put("forecasts", [{"seen": one.seen}]))
        stream.update([1.0], position={"row": 1})
        sink.add("alerts", [{"row": 1}])
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
            with pytest.raises(StateFolderError, match="E-STATE-WRITE"):
                stream.commit()
        stream.update([2.0], position={"row": 2})
        sink.add("alerts", [{"row": 2}])
    assert lines_of(tmp_path / "out") == {
        "alerts-00000001.jsonl": [{"row": 1}, {"row": 2}],
        "forecasts-00000001.jsonl": [{"seen": 2}],
    }


# --- what comes out


def lines_of(folder: Path) -> dict[str, list[Any]]:
    return {
        path.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(folder.iterdir())
        if path.suffix == ".jsonl"
    }


def test_what_a_generation_that_was_given_up_said_is_set_aside_and_said_again(tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / "state"
    source = CountingSource(rows=9)

    def go_on() -> None:
        sink = FolderSink(out)
        with fake(state, sink=sink) as stream:
            feed(stream, source, once=True, poll_seconds=0.01,
                 after_update=lambda one, _: sink.add("said", [{"seen": one.seen}]))  # fmt: skip

    go_on()
    assert lines_of(out) == {f"said-0000000{n}.jsonl": [{"seen": 3 * n}] for n in (1, 2, 3)}
    next(state.glob("state-00000003-*.safetensors")).write_bytes(b"")
    with pytest.warns(DataWarning, match=r"W-STATE-FALLBACK.*\{'row': 6\}"):
        go_on()
    assert lines_of(out) == {f"said-0000000{n}.jsonl": [{"seen": 3 * n}] for n in (1, 2, 3)}
    assert (out / "said-00000003.jsonl.retracted").exists()


def fail_on(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, when: Any) -> None:
    """Let a function of a module fail for some of its first arguments."""
    real = getattr(module, name)

    def failing(first: Any, *rest: Any, **more: Any) -> Any:
        if when(first):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(first, *rest, **more)

    monkeypatch.setattr(module, name, failing)


def test_what_cannot_be_written_is_not_committed_and_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    sink = FolderSink(tmp_path / "out")
    with fake(tmp_path / "state", commit_every=None, sink=sink) as stream:
        sink.add("said", [{"row": 1}])
        stream.update([1.0])
        with monkeypatch.context() as patch:
            fail_on(patch, os, "fsync", lambda _: True)
            with pytest.raises(DataError, match="E-OUTPUT-WRITE.*not committed either"):
                stream.commit()
        assert stream.last_commit.generation == 0
        sink.add("said", [{"row": 2}])
        stream.update([2.0])
    assert lines_of(tmp_path / "out") == {"said-00000001.jsonl": [{"row": 1}, {"row": 2}]}


def test_what_was_committed_but_could_not_come_out_comes_out_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    sink = FolderSink(tmp_path / "out")
    stream = fake(tmp_path / "state", commit_every=None, sink=sink)
    sink.add("said", [{"row": 1}])
    stream.update([1.0])
    with monkeypatch.context() as patch:
        fail_on(patch, os, "replace", lambda path: str(path).endswith(".staged"))
        with pytest.raises(DataError, match="E-OUTPUT-WRITE.*next commit or start"):
            stream.commit()
    stream.store.close()
    assert lines_of(tmp_path / "out") == {}
    fake(tmp_path / "state", sink=FolderSink(tmp_path / "out")).close()
    assert lines_of(tmp_path / "out") == {"said-00000001.jsonl": [{"row": 1}]}


def test_after_a_disk_failed_at_the_last_step_the_next_start_knows_what_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CURRENT.json was renamed, the flush of its folder failed: rows must be neither lost nor said twice."""
    import hamts.stream_store as module

    sink = FolderSink(tmp_path / "out")
    with pytest.raises(StateFolderError, match="E-STATE-UNSURE"):  # noqa: SIM117
        with fake(tmp_path / "state", commit_every=None, sink=sink) as stream:
            sink.add("said", [{"row": 1}])
            stream.update([1.0], position={"row": 1})
            flushes = iter((False, True))
            fail_on(monkeypatch, module, "sync_folder", lambda _: next(flushes))
            stream.commit()
    monkeypatch.undo()
    assert lines_of(tmp_path / "out") == {}
    with fake(tmp_path / "state", sink=FolderSink(tmp_path / "out")) as stream:
        assert stream.position == {"row": 1}
    assert lines_of(tmp_path / "out") == {"said-00000001.jsonl": [{"row": 1}]}


def test_reading_leaves_no_trace(tmp_path: Path) -> None:
    fake(tmp_path).close()
    (tmp_path / "LOCK").unlink()
    (tmp_path / ".CURRENT.writing-1-00000000").write_bytes(b"of a writer")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert StateStore(tmp_path, read_only=True).load(FakeStream.model_hash) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_new_stream_does_not_mix_with_what_another_one_said(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with pytest.raises(DataError, match="E-EXISTS") if name == "two" else warnings.catch_warnings():
            sink = FolderSink(tmp_path / "out")
            with fake(tmp_path / name, sink=sink) as stream:
                sink.add("said", [{"a": 1}])
                stream.update([1.0])
    assert lines_of(tmp_path / "out") == {"said-00000001.jsonl": [{"a": 1}]}


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_rows_come_out_as_they_went_in(tmp_path: Path, format: Any) -> None:
    frame = pd.DataFrame(
        {"unique_id": ["a", "b"], "ds": pd.to_datetime(["2024-01-01", "2024-01-02"]), "y": [1 / 3, np.nan]}
    )
    sink = FolderSink(tmp_path, format)
    sink.add("alerts", frame)
    sink.add("alerts", frame[:0])
    sink.stage(4)
    assert [path.name for path in tmp_path.iterdir()] == [f".alerts-00000004.{format}.staged"]
    sink.publish(4)
    path = tmp_path / f"alerts-00000004.{format}"
    if format == "parquet":
        pd.testing.assert_frame_equal(pd.read_parquet(path), frame)
    else:
        back = pd.read_json(path, lines=True, precise_float=True)
        assert back["y"].iloc[0] == pytest.approx(1 / 3, abs=1e-15)
        assert json.loads(path.read_text().splitlines()[1]) == {
            "unique_id": "b", "ds": "2024-01-02T00:00:00.000000", "y": None,
        }  # fmt: skip


def test_unknown_formats_and_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format"):
        FolderSink(tmp_path, "csv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind"):
        FolderSink(tmp_path).add("../up", [{"a": 1}])


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
