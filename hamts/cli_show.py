"""How the command line looks: panels, tables and notes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hamts.errors import DataError, DataWarning

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from hamts.data.catalog import Dataset
    from hamts.doctor import Section

__all__ = ["console", "show_dataset", "show_error", "show_list", "show_sections", "show_warning"]


def console(*, error: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=error, highlight=False)


def show_error(error: DataError) -> None:
    """A panel with what is wrong, where, and what to do."""
    from rich.panel import Panel
    from rich.text import Text

    lines = [Text(error.message)]
    for name, value in (("column", error.column), ("series", error.series)):
        if value is not None:
            lines.append(Text.assemble((f"{name}: ", "bold"), repr(value)))
    if error.rows:
        lines.append(Text.assemble(("first rows: ", "bold"), "; ".join(map(str, error.rows))))
    if error.fix:
        lines.append(Text.assemble(("fix: ", "bold green"), error.fix))
    console(error=True).print(Panel(Text("\n").join(lines), title=error.code, title_align="left", border_style="red"))


def show_warning(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
    """Notes about the data, one line each. What libraries warn of is not for the reader of a table."""
    if issubclass(category, DataWarning):
        from rich.text import Text

        console(error=True).print(Text.assemble(("note  ", "yellow"), str(message)))


def show_list(table: pd.DataFrame) -> None:
    """Every set that can be loaded by name."""
    from rich.table import Table

    grid = Table("name", box=None, pad_edge=False)
    for column in ("items", "rows"):
        grid.add_column(column, justify="right")
    for column in ("step", "here", "from, or missing"):
        grid.add_column(column)
    for name, items, rows, freq, source, available, missing in table.itertuples(index=False):
        here, place = ("yes", source) if available else ("", missing)
        grid.add_row(name, _count(items), _count(rows), freq, here, place)
    console().print(grid)


def _count(value: Any) -> str:
    return "" if value is None or str(value) in ("<NA>", "nan") else f"{int(value):,}"


def show_dataset(dataset: Dataset) -> None:
    """One set: sizes, columns by role, split, source and licence."""
    from rich.table import Table

    df = dataset.df
    grid = Table.grid(padding=(0, 2))
    facts: dict[str, Any] = {
        "items": f"{df['unique_id'].nunique():,}",
        "rows": f"{len(df):,}, {df['ds'].min()} to {df['ds'].max()}",
        "freq": dataset.freq,
        "h": dataset.h,
    }
    for role in ("target", "futr_cols", "past_cols", "event_cols", "action_cols"):
        facts[role] = ", ".join(getattr(dataset, role))
    if dataset.labels is not None:
        facts["labels"] = f"{len(dataset.labels)} windows"
    facts["split"] = ", ".join(f"{name} {bound}" for name, bound in dataset.split.items())
    facts |= {"source": dataset.source, "license": dataset.license, "read from": dataset.origin}
    for name, value in facts.items():
        if value not in (None, ""):
            grid.add_row(name, str(value))
    console().print(dataset.name, style="bold")
    console().print(grid)


def show_sections(sections: list[Section]) -> None:
    """The report of ``hamts doctor``."""
    from rich.table import Table
    from rich.text import Text

    for section in sections:
        console().print(section.title, style="bold")
        grid = Table.grid(padding=(0, 2))
        for finding in section.findings:
            mark = Text("  ok" if finding.good else "  !!", style="green" if finding.good else "red")
            grid.add_row(mark, Text(finding.name), Text(finding.value))
        console().print(grid)
