"""Processes that are killed while they read a stream, and what must hold of the state that they leave."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

import hamts
from hamts.errors import DataError
from hamts.feeding import feed
from hamts.sinks import FolderSink
from hamts.sources import FolderSource, Source
from hamts.stream import Stream
from hamts.stream_generations import Commit
from hamts.stream_open import DurableStream
from hamts.stream_store import CRASH_AT

__all__ = [
    "COMMIT_ROWS", "POLL", "Ended", "Place", "after_kill", "at_end", "drops_of", "in_process", "key_of",
    "read_everything", "trial", "written",
]  # fmt: skip

# rows of a commit, and of one reading of a source
COMMIT_ROWS, POLL = 40, 20


@dataclass
class Ended:
    """How a process ended, and the commits that it said had returned."""

    code: int
    commits: list[dict[str, Any]]
    seconds: float


@dataclass
class Place:
    """What all trials share."""

    folder: Path
    model: hamts.HAMForecaster
    ahead: pd.DataFrame
    # of the uninterrupted run: hash by position, alerts, and how long it took
    hashes: dict[str, str] = field(default_factory=dict)
    alerts: list[Any] = field(default_factory=list)
    seconds: float = 0.0


def key_of(position: Any) -> str:
    return json.dumps(position, sort_keys=True)


# --- processes that may be killed


def in_process(
    work: Callable[[Callable[[Any], None]], None], *, crash_at: str | None, kill_after: float | None
) -> Ended:
    """Run something in a fork of this process, which has imported everything already."""
    start = time.perf_counter()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(work, writing, crash_at)
    os.close(writing)
    text, deadline = b"", None if kill_after is None else start + kill_after
    while True:
        wait = None if deadline is None else max(0.0, deadline - time.perf_counter())
        if not select.select([reading], [], [], wait)[0]:
            os.kill(child, signal.SIGKILL)
            deadline = None
            continue
        part = os.read(reading, 1 << 16)
        if not part:
            break
        text += part
    os.close(reading)
    _, status = os.waitpid(child, 0)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    if code == 1:
        raise RuntimeError(text.decode())
    # a line that was cut off was not said
    said = [json.loads(line) for line in text.decode().splitlines(keepends=True) if line.endswith("\n")]
    return Ended(code, said, time.perf_counter() - start)


def _child(work: Callable[[Callable[[Any], None]], None], writing: int, crash_at: str | None) -> None:
    code = 1
    try:
        if crash_at is not None:
            os.environ[CRASH_AT] = crash_at

        def say(entry: Any) -> None:
            os.write(writing, (json.dumps(entry) + "\n").encode())

        work(say)
        code = 0
    except BaseException:
        os.write(writing, traceback.format_exc().encode())
    finally:
        os._exit(code)


def read_everything(
    place: Place, state: Path, make_source: Callable[[], Source], every: int, say: Callable[[Any], None], **options: Any
) -> None:
    """What ``hamts stream --once`` does, saying when a commit has returned."""
    warnings.simplefilter("error")
    sink = FolderSink(state.with_name(state.name + "-out"))

    def add_alerts(one: DurableStream, _: Any) -> None:
        sink.add("alerts", one.stream.surprise)

    with Stream.open(state, place.model, commit_every=every, sink=sink, **options) as durable:
        commit = durable.store.commit

        def told(*arguments: Any, **more: Any) -> Any:
            done = commit(*arguments, **more)
            say({"generation": done.generation, "position": done.position, "hash": done.state_hash})
            return done

        durable.store.commit = told  # type: ignore[method-assign]
        feed(durable, make_source(), once=True, poll_seconds=0.01, after_update=add_alerts)


def last_commit_of(stream: DurableStream) -> Commit:
    """The commit that a folder which was opened must have."""
    if stream.last_commit is None:
        raise RuntimeError("A stream that was opened from a folder must have a commit. This one has none.")
    return stream.last_commit


def written(state: Path) -> list[Any]:
    """Every row that came out, in the order of files."""
    folder = state.with_name(state.name + "-out")
    return [json.loads(line) for path in sorted(folder.glob("alerts-*.jsonl")) for line in path.open()]


# --- what must hold


def after_kill(place: Place, state: Path, ended: Ended, *, by_position: bool = True) -> dict[str, Any]:
    """Facts of a state that was left by a kill."""
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            found = Stream.open(state, place.model, read_only=True)
        except DataError as error:
            nothing = error.code in ("E-STATE-EMPTY", "E-STATE-FOREIGN") and not ended.commits
            return {"generation": None, "loads": nothing, "right_hash": nothing, "nothing_lost": nothing}
    last = last_commit_of(found)
    facts = {
        "generation": last.generation,
        "loads": True,
        "right_hash": found.state_hash() == last.state_hash
        and (not by_position or place.hashes[key_of(last.position)] == last.state_hash),
        "nothing_lost": not ended.commits or last.generation >= ended.commits[-1]["generation"],
        "load_ms": 1000 * (time.perf_counter() - start),
    }
    return facts


def at_end(place: Place, state: Path, wanted: str) -> dict[str, Any]:
    with Stream.open(state, read_only=True) as found:
        stats = found.stats()
        same = found.state_hash() == wanted
    rows = [(row["unique_id"], row["ds"]) for row in written(state)]
    return {
        "same_hash": same,
        "rows_read_once": (stats["rows"], stats["replayed"]) == (len(place.ahead), 0),
        "rows_written_once": sorted(rows) == sorted({(row["unique_id"], row["ds"]) for row in place.alerts}),
        "strays": sum(path.name.startswith(".") for path in state.iterdir()),
    }


def trial(place: Place, name: str, *, crash_at: str | None = None, kill_after: float | None = None) -> dict[str, Any]:
    """Kill once, look, start again, look."""
    state = place.folder / f"trial-{name}"

    def work(say: Callable[[Any], None]) -> None:
        read_everything(place, state, lambda: drops_of(place), COMMIT_ROWS, say)

    ended = in_process(work, crash_at=crash_at, kill_after=kill_after)
    facts = {"killed_at": name, "code": ended.code, "commits_said": len(ended.commits)}
    facts |= after_kill(place, state, ended) if ended.code else {}
    again = in_process(work, crash_at=None, kill_after=None) if ended.code else ended
    facts |= {"code_again": again.code, **at_end(place, state, place.hashes["end"])}
    shutil.rmtree(state)
    shutil.rmtree(state.with_name(state.name + "-out"), ignore_errors=True)
    return facts


def drops_of(place: Place) -> FolderSource:
    return FolderSource(place.folder / "drops", max_rows=POLL, settle_seconds=0)
