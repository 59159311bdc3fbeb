"""The command line: ``hamts demo | fit | predict | stream | routes | report | frontier | datasets | doctor``.

Heavy libraries are imported inside the commands, so that ``hamts --help`` answers at once. A DataError is shown as a
panel and ends with exit code 2; nothing is written over without --force.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hamts.cli_frontier import frontier
from hamts.cli_report import report
from hamts.cli_show import console, show_dataset, show_error, show_list, show_sections, show_warning
from hamts.cli_stream import stream
from hamts.errors import DataError, DataWarning
from hamts.files import STDOUT, check_output, kind_of, read_frame, write_frame

__all__ = ["app", "main"]

EXIT_BAD_INPUT = 2
# what to do, where that is another thing here than in Python
FIXES = {
    "E-TZ": "Say which zone: --tz America/New_York, say.",
    "E-FUTURE": "hamts predict MODEL --make-futr FILE writes the rows to fill in; pass them with --futr FILE.",
    "E-REPLAY": "Pass the history with --data FILE.",
}

app = typer.Typer(
    help="Time-series forecasting with a memory that its user can see and set.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Table = Annotated[Path, typer.Argument(metavar="DATA", help="A .csv or .parquet file, one row per item and time.")]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a fitted model.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="A .csv or .parquet file; default: print as CSV.")]
Events = Annotated[Path | None, typer.Option(metavar="FILE", help="Event log: id, time, type, and perhaps value.")]
Static = Annotated[Path | None, typer.Option("--static", metavar="FILE", help="One row per item.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DataWarning)
        warnings.showwarning = show_warning
        try:
            add_commands()
            app(args=None if arguments is None else list(arguments), prog_name="hamts")
        except DataError as error:
            error.fix = FIXES.get(error.code, error.fix)
            show_error(error)
            sys.exit(EXIT_BAD_INPUT)


def add_commands() -> None:
    """Groups of commands of other packages: entry points of the group ``hamts.commands``, each a typer app."""
    known = {group.name for group in app.registered_groups}
    for entry in entry_points(group="hamts.commands"):
        if entry.name not in known:
            app.add_typer(entry.load(), name=entry.name)


def names(text: str | None) -> list[str] | None:
    """``a,b`` -> ["a", "b"]; an empty text names no column, None leaves the choice to hamts."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str | None, option: str) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise DataError(
            "E-OPTION", f"{option} must be numbers joined by commas. Got {text!r}.", fix=f"{option} 0.1,0.5,0.9, say."
        ) from error


def integer_or_text(text: str | None) -> str | int | None:
    """Steps and times of an integer clock are whole numbers."""
    return int(text) if text is not None and text.lstrip("-").isdigit() else text


def prepare(out: Path | None, force: bool) -> None:
    """Refuse a table that could not be written before any work is done."""
    check_output(out, force=force)
    if out is not None and str(out) != STDOUT:
        kind_of(out)


def answer(frame: Any, out: Path | None) -> None:
    """Write a table of either library."""
    write_frame(frame if hasattr(frame, "to_csv") else frame.to_pandas(), out)
    if out is not None and str(out) != STDOUT:
        console(error=True).print(f"{len(frame):,} rows written to {out}")


def optional_frame(path: Path | None, **columns: str | None) -> Any:
    return None if path is None else read_frame(path, **columns)


def columns_of(model: Any) -> dict[str, str | None]:
    """How the tables of a model are to be read."""
    dialect = model.schema.dialect
    return {"id_column": dialect.id_column, "time_column": dialect.time_column, "zone": dialect.time_zone}


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for what it makes.")] = Path("hamts_demo"),
    fast: Annotated[bool, typer.Option("--fast", help="A smaller model and a shorter fit.")] = False,
    force: Force = False,
) -> None:
    """Fit HAM on a year of New York flights and show what it kept and what that was worth."""
    from hamts.demo import run_demo

    run_demo(out, fast=fast, force=force, console=console())


@app.command()
def fit(  # noqa: PLR0913 - one option for each argument
    data: Table,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model.")],
    h: Annotated[int | None, typer.Option("--h", help="Steps to forecast; default one season.")] = None,
    target: Annotated[str | None, typer.Option(metavar="A,B", help="Columns to forecast; default y.")] = None,
    futr_cols: Annotated[str | None, typer.Option(metavar="A,B", help="Columns known ahead.")] = None,
    past_cols: Annotated[
        str | None, typer.Option(metavar="A,B", help="Columns known up to now; default all others, '' for none.")
    ] = None,
    event_cols: Annotated[
        str | None, typer.Option(metavar="A,B", help="Columns other than 0 where something happens.")
    ] = None,
    action_cols: Annotated[
        str | None, typer.Option(metavar="A,B", help="Control inputs, known ahead when planned.")
    ] = None,
    events: Events = None,
    static: Static = None,
    freq: Annotated[str | None, typer.Option(help="Such as h, 15min, D; default what most rows have.")] = None,
    id_col: Annotated[str | None, typer.Option(help="Column of ids; default unique_id or item_id.")] = None,
    time_col: Annotated[str | None, typer.Option(help="Column of times; default ds or timestamp.")] = None,
    tz: Annotated[str | None, typer.Option(help="Zone of the times of a CSV, such as America/New_York.")] = None,
    preset: Annotated[str, typer.Option(help="tiny, small or base.")] = "small",
    router: Annotated[str | None, typer.Option(help="surprise, innovation, learned, tags, joined by +.")] = None,
    budget_share: Annotated[float | None, typer.Option(help="Share of the tokens to keep exactly.")] = None,
    budget_bytes: Annotated[int | None, typer.Option(help="Most bytes of one item's scratchpads.")] = None,
    quantiles: Annotated[str | None, typer.Option(metavar="Q,Q", help="Levels of the answers.")] = None,
    max_time: Annotated[float | None, typer.Option(help="Most seconds to fit.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Most optimiser steps.")] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of weights and windows.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but problems.")] = False,
    force: Force = False,
) -> None:
    """Fit a model on a table and save it to a folder."""
    check_output(out, force=force)
    read: dict[str, str | None] = {"id_column": id_col, "time_column": time_col, "zone": tz}
    given: dict[str, Any] = {"df": read_frame(data, **read), "budget_bytes": budget_bytes}
    if budget_share is not None:
        given["budget_share"] = budget_share
    given["events"], given["static_df"] = (optional_frame(path, **read) for path in (events, static))
    import hamts

    model = hamts.fit(
        h=h, target=names(target), futr_cols=names(futr_cols), past_cols=names(past_cols),
        event_cols=names(event_cols), action_cols=names(action_cols), freq=integer_or_text(freq), id_col=id_col,
        time_col=time_col, preset=preset, router=router, quantiles=numbers(quantiles, "--quantiles"),
        max_time=max_time, max_steps=max_steps, accelerator=accelerator, seed=seed, verbose=not quiet,
        progress=False if quiet else None, **given,
    )  # fmt: skip
    model.save(out)
    if not quiet:
        report = model.report
        console().print(
            f"{report.steps} steps in {report.seconds:.0f} s, validation loss {report.best_score:.4f}. Saved to {out}\n"
            f"next: hamts predict {out}"
        )


@app.command()
def predict(
    model: Model,
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="History to go on from; default that of fit.")
    ] = None,
    futr: Annotated[Path | None, typer.Option(metavar="FILE", help="Ids, times and the columns known ahead.")] = None,
    make_futr: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only write the rows that --futr needs.")
    ] = None,
    h: Annotated[int | None, typer.Option("--h", help="Steps to forecast; default those of fit.")] = None,
    out: Out = None,
    quantiles: Annotated[str | None, typer.Option(metavar="Q,Q", help="Levels, such as 0.1,0.5,0.9.")] = None,
    level: Annotated[
        str | None, typer.Option(metavar="L,L", help="Central intervals in percent, such as 80,95.")
    ] = None,
    budget_share: Annotated[float | None, typer.Option(help="Another share than that of fit; needs --data.")] = None,
    events: Events = None,
    static: Static = None,
    force: Force = False,
) -> None:
    """Forecast the next steps of every item, with a model that was saved."""
    for path in (out, make_futr):
        prepare(path, force)
    import hamts

    fitted = hamts.load(model)
    read = columns_of(fitted)
    if make_futr is not None:
        answer(fitted.future_frame(h), make_futr)
        return
    forecast = fitted.predict(
        optional_frame(data, **read), h, optional_frame(futr, **read),
        quantiles=numbers(quantiles, "--quantiles"), level=numbers(level, "--level"), budget_share=budget_share,
        events=optional_frame(events, **read), static_df=optional_frame(static, **read),
    )  # fmt: skip
    answer(forecast.df, out)


app.command()(stream)
app.command()(report)
app.command()(frontier)


@app.command()
def routes(
    model: Model,
    data: Annotated[Path, typer.Option(metavar="FILE", help="The history to read.")],
    out: Out = None,
    by: Annotated[str, typer.Option(help="entry, channel, hour, weekday, tag, layer or reason.")] = "entry",
    at: Annotated[str | None, typer.Option(help="Time of the question; default the end of each item.")] = None,
    worth: Annotated[int, typer.Option(help="For so many entries of each item: what each is worth.")] = 0,
    kept: Annotated[bool, typer.Option("--kept", help="Leave out what was refused.")] = False,
    budget_share: Annotated[float | None, typer.Option(help="Another share than that of fit.")] = None,
    events: Events = None,
    static: Static = None,
    force: Force = False,
) -> None:
    """Show which steps the memory keeps and which it refuses, when and why."""
    prepare(out, force)
    import hamts

    fitted = hamts.load(model)
    read = columns_of(fitted)
    table = fitted.routes(
        read_frame(data, **read), by=cast(Any, by), at=integer_or_text(at), worth=worth, refused=not kept,
        budget_share=budget_share, events=optional_frame(events, **read),
        static_df=optional_frame(static, **read),
    )  # fmt: skip
    answer(table, out)


@app.command()
def datasets(
    name: Annotated[str | None, typer.Argument(help="A set; default: list all.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the set's rows to a .csv or .parquet file.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Print what the set is, its source and its licence.")] = False,
    force: Force = False,
) -> None:
    """List the data sets that can be loaded by name, or look at one."""
    if out is not None and name is None:
        raise DataError("E-OPTION", "--out needs the name of a set.", fix="hamts datasets nycflights13 --out FILE.csv")
    prepare(out, force)
    from hamts.data.catalog import list_datasets, load_dataset

    if name is None:
        show_list(list_datasets())
        return
    dataset = load_dataset(name)
    if card:
        from rich.markdown import Markdown

        console().print(Markdown(dataset.card))
    elif str(out) != STDOUT:
        show_dataset(dataset)
    if out is not None:
        answer(dataset.df, out)


@app.command()
def doctor() -> None:
    """Say what this machine gives hamts: versions, devices, ops and why, data folders, and a self-test."""
    from hamts.doctor import examine, is_healthy

    sections = examine()
    show_sections(sections)
    if not is_healthy(sections):
        raise typer.Exit(1)
