"""Feed a stream from a source until it is stopped, with nothing lost and nothing read twice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hamts.errors import DataError
from hamts.sources import Source
from hamts.stream_open import DurableStream, count_rows

__all__ = ["FeedReport", "feed"]

OnBad = Literal["error", "quarantine"]
# what is wrong with a frame is then wrong with each of its rows
OF_ALL_ROWS = {"E-SCHEMA", "E-COLUMNS", "E-TYPE", "E-DTYPE", "E-NUMERIC"}


@dataclass
class FeedReport:
    """What was read from a source.

    Attributes:
        polls: of the source that gave rows.
        rows: taken by the stream, those it knew already included.
        rejected: rows that it refused, and what the source could not make rows of.
    """

    polls: int = 0
    rows: int = 0
    rejected: int = 0


def feed(
    stream: DurableStream,
    source: Source,
    *,
    stop: threading.Event | None = None,
    once: bool = False,
    poll_seconds: float = 1.0,
    on_bad: OnBad = "error",
    after_update: Callable[[DurableStream, Any], None] | None = None,
) -> FeedReport:
    """Poll, update, and let the stream commit itself, until ``stop`` is set. Ends with a commit.

    Args:
        once: end where the source has nothing more.
        poll_seconds: between two looks at a source that has nothing new.
        on_bad: ``error``: rows that the stream refuses end it, committed up to them; ``quarantine``: the refused rows
            are put into the sink as ``rejected``, the others are read.
        after_update: gets the stream and the report of each update, such as to put alerts into the sink.
    """
    if on_bad == "quarantine" and stream.sink is None:
        raise ValueError("on_bad='quarantine' needs a stream with a sink, or refused rows would be lost.")
    stop = stop or threading.Event()
    report = FeedReport()
    while not stop.is_set():
        rows, position = source.poll(stream.position)
        rejected = _taken(source)
        if stream.sink is not None:
            stream.sink.add("rejected", rejected)
        report.rejected += len(rejected)
        if rows is None and position == stream.position:
            stream.commit_if_due()
            if once and getattr(source, "at_end", True):
                break
            if not getattr(source, "waits", False):
                stop.wait(poll_seconds)
            continue
        if rows is not None:
            report.polls += 1
            taken = _update(stream, rows, on_bad, after_update)
            report.rows += taken
            report.rejected += count_rows(rows) - taken
        # only now: a commit between the parts of a poll would leave its position behind
        stream.advance(position)
        stream.commit_if_due()
    stream.commit()
    return report


def _taken(source: Source) -> list[dict[str, Any]]:
    rejected = getattr(source, "rejected", None)
    return [] if rejected is None else rejected.take()


def _update(stream: DurableStream, rows: Any, on_bad: OnBad, after_update: Any) -> int:
    """Rows taken; refused ones are looked for by halves, since a frame is taken as a whole or not at all."""
    try:
        answer = stream.update(rows, commit=False)
    except DataError as error:
        count = count_rows(rows)
        if on_bad == "error":
            raise
        if count > 1 and error.code not in OF_ALL_ROWS:
            halves = rows[: count // 2], rows[count // 2 :]
            return sum(_update(stream, half, on_bad, after_update) for half in halves)
        if stream.sink is not None:
            stream.sink.add("rejected", rows.assign(error=f"[{error.code}] {error.message}"))
        return 0
    if after_update is not None:
        after_update(stream, answer)
    return count_rows(rows)
