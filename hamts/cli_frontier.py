"""``hamts frontier``: error of a fitted model against the bytes and the time of its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hamts.cli_show import console
from hamts.errors import DataError
from hamts.files import STDOUT, check_output, kind_of, read_frame, write_frame

__all__ = ["frontier"]


def frontier(  # noqa: PLR0913 - one option for each argument
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The folder of a fitted model.")],
    data: Annotated[Path, typer.Option(metavar="FILE", help="The history: a .csv or .parquet file.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A .csv or .parquet file; default: print as CSV.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: a .png, .svg or .pdf file.")] = None,
    x: Annotated[str, typer.Option(help="What the drawing has below: bytes, ms_per_step or usage_share.")] = "bytes",
    shares: Annotated[
        str | None, typer.Option(metavar="S,S", help="Budget shares; default 0,0.02,0.05,0.1,0.25,0.5,1.")
    ] = None,
    memories: Annotated[
        str, typer.Option(metavar="A,B", help="model, and controls: random, shuffled, stride, recency.")
    ] = "model",
    h: Annotated[int | None, typer.Option("--h", help="Steps to forecast; default those of fit.")] = None,
    windows: Annotated[int, typer.Option(help="Last windows of each item to forecast.")] = 8,
    events: Annotated[Path | None, typer.Option(metavar="FILE", help="Event log: id, time, type, value.")] = None,
    static: Annotated[Path | None, typer.Option("--static", metavar="FILE", help="One row per item.")] = None,
    seed: Annotated[int, typer.Option(help="Of the controls and the intervals.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Score a model under every budget: error against bytes and against milliseconds a step."""
    for path in (out, plot):
        check_output(path, force=force)
    if out is not None and str(out) != STDOUT:
        kind_of(out)
    try:
        asked = None if shares is None else [float(part) for part in shares.split(",") if part.strip()]
    except ValueError as error:
        what = f"--shares must be numbers joined by commas. Got {shares!r}."
        raise DataError("E-OPTION", what, fix="--shares 0,0.1,1, say.") from error
    import hamts
    from hamts.frontier import SHARES

    fitted = hamts.load(model)
    dialect = fitted.schema.dialect
    read = {"id_column": dialect.id_column, "time_column": dialect.time_column, "zone": dialect.time_zone}
    table = fitted.frontier(
        read_frame(data, **read), h, shares=SHARES if asked is None else asked, n_windows=windows, seed=seed,
        memories=[part.strip() for part in memories.split(",") if part.strip()],
        events=None if events is None else read_frame(events, **read),
        static_df=None if static is None else read_frame(static, **read),
    )  # fmt: skip
    table = table if hasattr(table, "to_csv") else table.to_pandas()
    write_frame(table, out)
    if out is not None and str(out) != STDOUT:
        console(error=True).print(f"{len(table):,} rows written to {out}")
    if plot is not None:
        from hamts.plot_frontier import save_frontier

        save_frontier(table, plot, x=x)
        console(error=True).print(f"drawn to {plot}")
