"""``hamts report``: the page of a model and a history."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from hamts.cli_show import console
from hamts.files import check_output, read_frame

__all__ = ["report"]


def report(  # noqa: PLR0913 - one option for each argument
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a fitted model.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="The history: a .csv or .parquet file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    futr: Annotated[Path | None, typer.Option(metavar="FILE", help="What is known ahead of the end.")] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Windows of your own: unique_id, start, end, label.")
    ] = None,
    items: Annotated[str | None, typer.Option(metavar="A,B", help="Items to report on; default all.")] = None,
    windows: Annotated[int, typer.Option(help="Last windows of each item to forecast.")] = 8,
    worth: Annotated[int, typer.Option(help="Kept steps of each item whose worth is measured.")] = 300,
    budget_share: Annotated[float | None, typer.Option(help="Another share than that of fit.")] = None,
    events: Annotated[Path | None, typer.Option(metavar="FILE", help="Event log: id, time, type, value.")] = None,
    static: Annotated[Path | None, typer.Option(metavar="FILE", help="One row per item.")] = None,
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write one HTML page: data, accuracy, forecasts, and an explorer of what the memory kept."""
    check_output(out, force=force)
    import hamts
    from hamts.report import write_report

    fitted = hamts.load(model)
    dialect = fitted.schema.dialect
    read = {"id_column": dialect.id_column, "time_column": dialect.time_column, "zone": dialect.time_zone}
    given: dict[str, Any] = {
        "data": data, "out": out, "futr": futr, "labels": labels, "items": items, "windows": windows, "worth": worth,
        "budget_share": budget_share, "events": events, "static": static, "title": title,
    }  # fmt: skip
    frames: dict[str, Any] = {
        name: None if path is None else read_frame(path, **read)
        for name, path in (("futr_df", futr), ("labels", labels), ("events", events), ("static_df", static))
    }
    write_report(
        fitted, read_frame(data, **read), out, n_windows=windows, worth=worth, budget_share=budget_share, title=title,
        items=None if items is None else [part.strip() for part in items.split(",") if part.strip()],
        command=_command(model, given), force=force, **frames,
    )  # fmt: skip
    console(error=True).print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


def _command(model: Path, given: dict[str, Any]) -> str:
    """The command line that makes the same page."""
    words = ["hamts", "report", str(model)]
    for name, value in given.items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
