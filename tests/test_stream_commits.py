"""When a stream commits, and how what it says comes out with the state that said it."""

from __future__ import annotations

import errno
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from stream_fakes import CountingSource, FakeStream

from hamts.errors import DataError, DataWarning, StateFolderError
from hamts.feeding import feed
from hamts.sinks import FolderSink
from hamts.stream_open import DurableStream
from hamts.stream_store import StateStore


def fake(folder: Path, **options: Any) -> DurableStream:
    store = StateStore(folder)
    loaded = store.load(FakeStream.model_hash)
    stream: Any = FakeStream() if loaded is None else FakeStream.from_state(None, loaded.arrays, loaded.meta)
    return DurableStream(stream, store, **options)


def test_refused_rows_are_not_set_aside_into_nowhere(tmp_path: Path) -> None:
    with fake(tmp_path) as stream, pytest.raises(ValueError, match="sink"):
        feed(stream, CountingSource(), once=True, on_bad="quarantine")


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
