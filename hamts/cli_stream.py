"""``hamts stream``: feed a saved model from a source, and write what it forecasts and what surprised it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hamts.cli_show import console
from hamts.errors import DataError

if TYPE_CHECKING:
    from hamts.sinks import FolderSink
    from hamts.stream_open import DurableStream

__all__ = ["stream"]


def stream(  # noqa: PLR0913 - one option for each argument
    model: Annotated[Path | None, typer.Option("--model", "-m", help="A fitted model; later that in --state.")] = None,
    source: Annotated[
        str, typer.Option("--source", "-s", help="A folder of .csv and .parquet drops, or kafka://host:port/topic.")
    ] = "",
    state: Annotated[Path | None, typer.Option("--state", help="Folder of the state; made by the first run.")] = None,
    every: Annotated[
        str, typer.Option("--every", help="Commit after so many rows, or a time: 1000, 30s, 5min.")
    ] = "30s",
    history: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to start from; default what the model remembers.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of what it writes; default STATE/outputs.")
    ] = None,
    fmt: Annotated[str, typer.Option("--format", help="jsonl or parquet.")] = "jsonl",
    h: Annotated[int | None, typer.Option("--h", help="Steps to forecast at each commit; 0 for none.")] = None,
    futr: Annotated[Path | None, typer.Option(metavar="FILE", help="Columns known ahead; read at each commit.")] = None,
    alert: Annotated[
        float, typer.Option("--alert", help="Rows of a p-value up to this are alerts; 0 for none.")
    ] = 0.01,
    once: Annotated[bool, typer.Option("--once", help="End where the source has nothing more.")] = False,
    poll: Annotated[float, typer.Option("--poll", help="Seconds between looks at a source with nothing new.")] = 1.0,
    max_rows: Annotated[int, typer.Option("--max-rows", help="Most rows read at once.")] = 10_000,
    on_bad: Annotated[
        str, typer.Option("--on-bad", help="error: stop at rows that cannot be taken; quarantine: set them aside.")
    ] = "error",
    correction: Annotated[
        str, typer.Option("--correction", help="New stream: other values for a known row: error, ignore or apply.")
    ] = "error",
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="New stream: one item at a time, the same bits however rows arrive together; slower."
        ),
    ] = False,
    tz: Annotated[str | None, typer.Option(help="Zone of the times of a CSV; default that of the fit.")] = None,
    device: Annotated[str, typer.Option("--device", help="Where it runs: cpu, or cuda, cuda:0, ...")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but problems.")] = False,
) -> None:
    """Feed a model from a source for as long as it runs. What was committed survives anything; ends well on SIGTERM."""
    check_options(state, source, every, fmt, on_bad)
    stop = threading.Event()
    with stopped_by_signals(stop):
        from hamts.feeding import feed
        from hamts.files import read_frame
        from hamts.sinks import FolderSink
        from hamts.sources import open_source
        from hamts.stream_open import open_stream

        assert state is not None
        sink = FolderSink(out or state / "outputs", cast(Any, fmt))
        rows = None if history is None else read_frame(history, zone=tz)
        options: dict[str, Any] = {"correction": correction, "device": device}
        options |= {"items_side_by_side": 1} if exact else {}
        with open_stream(state, model, history=rows, commit_every=every, sink=sink, **options) as durable:
            dialect = durable.schema.dialect
            read = {"id_column": dialect.id_column, "time_column": dialect.time_column, "zone": tz or dialect.time_zone}
            given = open_source(source, max_rows=max_rows, on_corrupt=cast(Any, on_bad), **read)
            if h != 0:
                # now, so that what a forecast lacks is said before any row is read
                put_forecasts(durable, sink, h, futr, read)
                durable.before_commit(lambda one: put_forecasts(one, sink, h, futr, read))
            if not quiet:
                show_start(durable, source)
            try:
                report = feed(
                    durable, given, stop=stop, once=once, poll_seconds=poll, on_bad=cast(Any, on_bad),
                    after_update=(lambda one, _: add_alerts(one, sink, alert)) if alert > 0 else None,
                )  # fmt: skip
            finally:
                getattr(given, "close", lambda: None)()
            if not quiet:
                show_end(durable, report, sink)


def check_options(state: Path | None, source: str, every: str, fmt: str, on_bad: str) -> None:
    """Refuse what is missing or unknown before anything is loaded. Raises DataError E-OPTION."""
    from hamts.stream_open import parse_every

    if state is None or not source:
        raise DataError("E-OPTION", "--state and --source are needed.", fix="hamts stream -m M --source DIR --state S")
    for option, value, known in (
        ("--format", fmt, ("jsonl", "parquet")),
        ("--on-bad", on_bad, ("error", "quarantine")),
    ):
        if value not in known:
            raise DataError(
                "E-OPTION", f"{option} must be one of {list(known)}. Got {value!r}.", fix=f"{option} {known[0]}"
            )
    try:
        parse_every(every)
    except ValueError as error:
        found = f"--every: commit_every must be rows (1000) or a time (30s, 5min). Got {every!r}."
        raise DataError("E-OPTION", found, fix="--every 30s, say.") from error


@contextmanager
def stopped_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT ask for an end after the rows under way, with a commit."""
    asked = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def put_forecasts(durable: DurableStream, sink: FolderSink, h: int | None, futr: Path | None, read: Any) -> None:
    from hamts.files import read_frame

    ahead = None if futr is None else read_frame(futr, **read)
    sink.put("forecasts", pandas_of(durable.stream.forecast(h, ahead).df))


def add_alerts(durable: DurableStream, sink: FolderSink, most: float) -> None:
    """Rows of the last update that were less likely than ``most``."""
    table = pandas_of(durable.stream.surprise)
    sink.add("alerts", table[table["p_value"] <= most])


def pandas_of(frame: Any) -> Any:
    return frame if hasattr(frame, "to_csv") else frame.to_pandas()


def show_start(durable: DurableStream, source: str) -> None:
    last = durable.last_commit
    place = "the start" if durable.position is None else f"{durable.position}"
    number = 0 if last is None else last.generation
    console().print(f"{len(durable.stream)} items, generation {number}; reading {source} from {place}")


def show_end(durable: DurableStream, report: Any, sink: FolderSink) -> None:
    last = durable.last_commit
    number = 0 if last is None else last.generation
    text = f"{report.rows:,} rows read, {report.rejected:,} rejected; committed as generation {number}"
    console().print(f"{text}. Written to {sink.folder}")
