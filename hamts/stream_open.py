"""A stream that survives: opened from a folder, committed to it, and given back to it.

    folder/model/          the model, written once and never changed
    folder/CURRENT.json    and the state's generations, see ``stream_store``
    folder/LOCK            of the one writer

The promise: when ``commit`` has returned, what was read before it is in. After any crash the stream is what it was at
some commit, no earlier than the last one that returned, and rows read again from that commit's position make it the
same once more. It is the same bit for bit (same machine and version) if rows are grouped into updates as before, as
they are from a source whose polls depend on the position alone. Where they are grouped otherwise, it is the same within
rounding, since items that are computed side by side round together; ``items_side_by_side=1`` gives the same bits for
any grouping. Rows that are read twice change nothing.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamts.errors import DataError, StateFolderError
from hamts.stream_device import HERE
from hamts.stream_generations import Commit
from hamts.stream_store import MODEL, StateStore, reached

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster
    from hamts.sinks import FolderSink
    from hamts.stream import Stream

__all__ = ["CommitEvery", "DurableStream", "open_stream", "parse_every"]

CommitEvery = int | str | timedelta | None
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0}


def parse_every(every: CommitEvery) -> tuple[float, float]:
    """Rows and seconds after which a commit is due; infinite where they do not count.

    Raises ValueError where it is neither a number of rows, a time such as ``30s``, nor None.
    """
    never = float("inf")
    if every is None:
        return never, never
    if isinstance(every, timedelta) and every > timedelta(0):
        return never, every.total_seconds()
    if isinstance(every, str):
        found = _SECONDS.fullmatch(every.strip())
        if found and float(found[1]) > 0:
            return never, float(found[1]) * _UNITS[found[2]]
        every = int(every) if every.strip().isdigit() else 0
    if isinstance(every, int) and not isinstance(every, bool) and every > 0:
        return float(every), never
    raise ValueError(f"commit_every must be rows (1000), a time ('30s', '5min') or None. Got {every!r}.")


def open_stream(
    folder: str | os.PathLike[str],
    model: HAMForecaster | str | os.PathLike[str] | None = None,
    *,
    history: Any = None,
    commit_every: CommitEvery = 1,
    sink: FolderSink | None = None,
    read_only: bool = False,
    **options: Any,
) -> DurableStream:
    """Go on with the stream of a folder, or start one there.

    Args:
        folder: of the state; made if it is not there.
        model: a fitted model, or its folder. A new stream needs one and keeps a copy; later it may be left out, and
            one that is given must be the same.
        history: rows to start a new stream from; default what the model remembers. A stream that goes on ignores it.
        commit_every: rows (1000) or time ("30s") after which an update commits; None: only ``commit`` and ``close``. A
            commit writes the whole state and waits for the disk: choose it by the state's size.
        sink: where forecasts and alerts come out with each commit.
        read_only: look at the last commit, even while another process writes; nothing can be committed.
        options: of ``HAMForecaster.stream`` for a new stream. One that goes on keeps those that it was started with,
            ``store`` among them, and ignores these; but for ``device`` and ``recorded``, which no state knows of.

    Raises StateFolderError: E-STATE-LOCKED, E-STATE-READONLY, E-STATE-FOREIGN, E-STATE-MODEL, E-STATE-VERSION,
        E-STATE-DAMAGED, E-STATE-EMPTY (read_only, or no model, and nothing was ever committed).
    """
    from hamts.config import StreamConfig
    from hamts.stream import Stream

    parse_every(commit_every)
    store = StateStore(folder, read_only=read_only)
    try:
        fitted = _fitted(store, model)
        loaded = store.load(Stream(fitted, StreamConfig(), fitted.plan.memory.budget_share).model_hash)
        if loaded is not None:
            here = {name: options[name] for name in HERE if name in options}
            stream = Stream.from_state(fitted, loaded.arrays, loaded.meta, **here)
            return DurableStream(stream, store, commit_every=commit_every, sink=sink)
        if read_only:
            raise _empty(store.folder)
        # what is refused, an option or the history, leaves no model behind
        stream = fitted.stream(history, **options)
        fitted.save(store.folder / MODEL)
        return DurableStream(stream, store, commit_every=commit_every, sink=sink)
    except BaseException:
        store.close()
        raise


def _fitted(store: StateStore, model: Any) -> HAMForecaster:
    """The model that was given, or the copy in the state's folder."""
    if model is not None and not isinstance(model, str | os.PathLike):
        return model
    from hamts.forecaster import load

    kept = store.folder / MODEL
    if model is None and not kept.is_dir():
        raise _empty(store.folder)
    return load(kept if model is None else model)


def _empty(folder: Path) -> StateFolderError:
    return StateFolderError(
        "E-STATE-EMPTY", f"'{folder}' holds no stream yet.", fix="Start one there: give a model, without read_only."
    )


class DurableStream:
    """A ``Stream`` that commits itself to a folder. Everything that a stream answers, it answers too.

    Args:
        stream: in the state that ``store`` has loaded, or a new one, which is committed at once.
        store: open; closed with this stream.
        commit_every, sink: see ``open_stream``.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        stream: Stream,
        store: StateStore,
        *,
        commit_every: CommitEvery = 1,
        sink: FolderSink | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream, self.store, self.sink = stream, store, sink
        self._every_rows, self._every_seconds = parse_every(commit_every)
        self._clock = clock
        self._pending_rows = 0
        self._broken: str | None = None
        self._before_commit: list[Callable[[DurableStream], None]] = []
        self._since = clock()
        self._position = None if store.last is None else store.last.position
        if store.read_only:
            return
        if sink is not None:
            sink.recover(None if store.last is None else store.last.generation)
        if store.last is None:
            self._commit(self.stream.state_hash())

    def __enter__(self) -> DurableStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Commit what was read and give the folder back, also after an error that left the stream whole."""
        if kind is None:
            self.close()
            return
        # the error under way is the one to hear of
        with suppress(DataError):
            self.close()

    def __repr__(self) -> str:
        last = self.store.last
        number = "none" if last is None else last.generation
        return f"DurableStream({self.stream!r}, folder={str(self.store.folder)!r}, generation={number})"

    def __len__(self) -> int:
        return len(self.stream)

    def __getattr__(self, name: str) -> Any:
        # only what is not found here: forecast, surprise, stats, routes, usage, pin, ...
        if name in ("stream", "_broken"):
            raise AttributeError(name)
        return getattr(self.stream, name)

    @property
    def position(self) -> Any:
        """Where the source goes on after what was read, committed or not."""
        return self._position

    @property
    def last_commit(self) -> Commit | None:
        """The generation on disk."""
        return self.store.last

    @property
    def pending_rows(self) -> int:
        """Rows that were read since the last commit, and that a crash would make the source give again."""
        return self._pending_rows

    def before_commit(self, action: Callable[[DurableStream], None]) -> None:
        """Call something with this stream just before each commit, such as to put forecasts into the sink."""
        self._before_commit.append(action)

    def update(self, rows: Any, events: Any = None, *, position: Any = None, commit: bool = True) -> Any:
        """Read rows, and commit if that is due; see ``Stream.update``. ``pending_rows`` says whether they are in.

        Args:
            position: of the source after these rows; kept with the next commit.
            commit: False: not even if it is due, since more rows come before the next position.

        Raises DataError where the rows are refused; the stream is then as before.
        """
        self._require_whole()
        try:
            report = self.stream.update(rows) if events is None else self.stream.update(rows, events)
        except DataError:
            raise
        except BaseException as error:
            self._broken = f"an update was cut off ({type(error).__name__})"
            raise
        if position is not None:
            self._position = position
        self._pending_rows += count_rows(rows)
        reached("updated")
        if commit:
            self.commit_if_due()
        return report

    def advance(self, position: Any) -> None:
        """Note that the source has moved over something without rows."""
        self._position = position

    def commit_if_due(self) -> Commit | None:
        """Commit if enough rows or time have passed, and there is something to commit."""
        if self._pending_rows == 0 and (self.store.last is None or self._position == self.store.last.position):
            # time counts from the first row that waits
            self._since = self._clock()
            return None
        if self._pending_rows >= self._every_rows or self._clock() - self._since >= self._every_seconds:
            return self.commit()
        return None

    def commit(self) -> Commit | None:
        """Make everything that was read durable. None where nothing has changed since the last commit."""
        self._require_whole()
        last = self.store.last
        state_hash = self.stream.state_hash()
        unchanged = last is not None and state_hash == last.state_hash and self._position == last.position
        if unchanged and self._pending_rows == 0:
            return None
        for action in self._before_commit:
            action(self)
        return self._commit(state_hash)

    def close(self) -> None:
        """Commit what is left and give the folder back. Without effect when it was closed before."""
        if self.store.closed:
            return
        try:
            if self._broken is None and not self.store.read_only:
                self.commit()
        finally:
            self.store.close()

    def _commit(self, state_hash: str) -> Commit:
        generation = self.store.next_generation
        if self.sink is not None:
            self.sink.stage(generation)
        reached("staged")
        arrays, meta = self.stream.state()
        commit = self.store.commit(
            arrays, meta, model_hash=self.stream.model_hash, state_hash=state_hash, position=self._position
        )
        self._pending_rows, self._since = 0, self._clock()
        if self.sink is not None:
            self.sink.publish(generation)
        reached("published")
        return commit

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise StateFolderError(
                "E-STATE-BROKEN",
                f"This stream cannot go on: {self._broken}. What was committed before is safe.",
                fix="Open the folder again and give the rows after its position.",
            )


def count_rows(rows: Any) -> int:
    """Rows of a frame, or of a mapping of columns; single values are one row."""
    if not isinstance(rows, Mapping):
        return len(rows)
    single = (str, bytes)
    lengths = [len(c) if hasattr(c, "__len__") and not isinstance(c, single) else 1 for c in rows.values()]
    return max(lengths, default=0)
