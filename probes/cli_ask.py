"""``hamts probes ask MODEL PROBE...``: a fitted forecaster, by forecasts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hamts.cli_show import console
from probes.cli_words import chosen, numbers, usage

__all__ = ["ask"]


def ask(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A saved HAMForecaster.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="PROBE...", help="Suites or rungs, such as der or pbc/pbcD.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results.")] = Path("probe_results"),
    everything: Annotated[bool, typer.Option("--all", help="Every suite.")] = False,
    preset: Annotated[str, typer.Option(help="smoke, small or standard.")] = "smoke",
    shares: Annotated[
        str | None, typer.Option(metavar="X,Y", help="Shares of its history that it may keep; else that of its fit.")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Histories to forecast from.")] = 32,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars.")] = False,
) -> None:
    """Ask a fitted forecaster the echo questions of suites (tier 2), at its own budget or at others.

    It must have been fitted on the columns of the probe (probes.frames.training_frame).
    """
    import hamts
    from probes.adapter import HamtsAdapter
    from probes.api import load_report, run_probes

    asked = chosen(names, everything)
    fitted = hamts.load(model)
    with usage():
        external: dict[str, Any] = {
            f"{model.stem}@{share:g}": HamtsAdapter(fitted, budget_share=share) for share in numbers(shares)
        }
        run_probes(
            asked, tier="T2", external=external or {model.stem: HamtsAdapter(fitted)}, preset=preset, out=out,
            progress=not quiet, sequences=sequences,
        )  # fmt: skip
    console().print(load_report(out).to_markdown(), markup=False, soft_wrap=True)
    console().print(f"next: hamts probes report {out}")
