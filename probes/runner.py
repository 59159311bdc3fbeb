"""Runs cells: one after another with a bar, or many side by side; what is there already is not run again."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hamts.errors import DataError
from probes.evaluate import evaluate
from probes.registry import Probe, get_probe, list_probes
from probes.results import document, start_folder, tidy, write_document
from probes.results_t0 import remove_stale, t0_documents, t0_name
from probes.runner_plan import STACKED_MODELS, STACKED_ROUTERS, Cell, RunPlan, axis_words, budget_rows, critical_rows
from probes.stacked_run import OutOfTime, run_rung
from probes.summary import chosen_rates
from probes.t0_run import run_t0_suite
from probes.train import Fitted, TrainPlan, train

__all__ = ["check_plan", "run_cell", "run_plan", "run_t0_folder", "t0_rungs"]

Report = Callable[[str, int, int, float], None]
# each fills about 10 GiB and half of the time of a GPU
GPU_RUNGS = 4


def run_plan(
    plan: RunPlan,
    folder: str | Path,
    *,
    device: str = "cpu",
    workers: int = 1,
    progress: bool = True,
    max_time_s: float | None = None,
    in_step: bool | None = None,
) -> list[Path]:
    """Run all cells of a plan that are not in the folder yet.

    Args:
        device: of torch.
        workers: rungs a device (in step), or cells (one by one), at a time, each in a process of its own.
        progress: bars on a terminal.
        max_time_s: stop cleanly after so many seconds; what is unfinished is run by the next call.
        in_step: train all networks of a rung side by side, which is what a GPU is fast at; None: on a GPU.

    Returns: the documents of the plan, those from before included.

    Raises:
        DataError: E-PROBE-VERSION, or E-OPTION where the device is not there.
        RuntimeError: some rungs or cells failed; the others are done.
    """
    check_device(device)
    root = Path(folder)
    deadline = None if max_time_s is None else time.time() + max_time_s
    check_plan(plan)
    written = []
    if device.startswith("cuda") if in_step is None else in_step:
        own, rest = plan.split(STACKED_MODELS, STACKED_ROUTERS)
        if own is not None:
            written = _run_rungs(own, root, device, workers, deadline, progress, done=rest is None)
        if rest is None:
            return written
        plan = rest
    # of one rate there is nothing to try: all networks at once, and no worker waits for the last trial
    rates = plan.only_rates()
    if not rates:
        written += _run_cells(
            plan.trial_cells(), root, device=device, workers=workers, progress=progress, deadline=deadline, done=False
        )
        rates = chosen_rates(read_each(written))
    return sorted({*written, *_run_cells(
        plan.main_cells(rates), root, device=device, workers=workers, progress=progress, deadline=deadline, done=True
    )})  # fmt: skip


def check_plan(plan: RunPlan) -> None:
    """Refuse before anything is trained what cannot be run.

    Raises:
        DataError: E-OPTION, no suite is trained; E-PROBE-BUDGET, a budget is less than one entry.
        ValueError: an unknown axis or value.
    """
    trials = plan.trial_cells()
    if not trials:
        raise DataError(
            "E-OPTION", f"None of {list(plan.probes)} is trained: they are scored without training.",
            fix="hamts probes run stream --tier T0",
        )  # fmt: skip
    for cell in {(cell.probe, cell.rung): cell for cell in trials}.values():
        least = min(plan.budgets)
        budget_rows(least, critical_rows(get_probe(cell.probe)[0], cell.config))


def read_each(paths: list[Path]) -> list[dict[str, Any]]:
    """Documents by their paths; those that are not there are left out."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]


def _run_rungs(
    plan: RunPlan,
    root: Path,
    device: str,
    workers: int,
    deadline: float | None,
    progress: bool,
    *,
    done: bool,
) -> list[Path]:
    """Rungs in the order asked for, some at a time; one that fails or runs out of time does not cost the others."""
    rungs = list(dict.fromkeys((cell.probe, cell.rung) for cell in plan.trial_cells()))
    versions = {probe: get_probe(probe)[0].version for probe, _ in rungs}
    start_folder(root, [], versions, done=False)
    written: list[Path] = []
    failures: list[str] = []
    late: list[str] = []
    with bars(len(rungs), progress) as report:
        for rung, work in _rungs_done(plan, rungs, root, device, workers, deadline):
            try:
                found = work()
                written += found
                start_folder(root, [str(path.relative_to(root)) for path in found], versions, done=False)
            except OutOfTime:
                late.append(rung)
            except Exception as error:  # noqa: BLE001 - told at the end: the other rungs go on
                failures.append(f"{rung}: {''.join(traceback.format_exception(error))}")
            report.finish(rung)
    if failures:
        raise RuntimeError(f"{len(failures)} rungs failed, first {failures[0]}")
    start_folder(root, [], versions, done=done and not late)
    return sorted(written)


def _rungs_done(
    plan: RunPlan,
    rungs: list[tuple[str, str]],
    root: Path,
    device: str,
    workers: int,
    deadline: float | None,
) -> Iterator[tuple[str, Callable[[], list[Path]]]]:
    """Rungs as they are done, and what gives their documents, or raises: here, or in processes of their own."""
    devices = devices_of(device)
    if workers <= 1 and len(devices) == 1:
        for probe, rung in rungs:
            yield rung, partial(run_rung, plan, probe, rung, root, device=devices[0], deadline=deadline)
        return
    context = multiprocessing.get_context("spawn")
    with ExitStack() as pools:
        running: dict[Future[list[Path]], str] = {}
        for place, each in enumerate(devices):
            pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_worker)
            pools.enter_context(pool)
            running |= {
                pool.submit(run_rung, plan, probe, rung, root, device=each, deadline=deadline): rung
                for probe, rung in rungs[place :: len(devices)]
            }
        for finished in as_completed(running):
            yield running[finished], finished.result


def _run_cells(
    cells: list[Cell], root: Path, *, device: str, workers: int, progress: bool, deadline: float | None, done: bool
) -> list[Path]:
    """Run what is not there yet, and note in the folder what it holds; ``done`` if nothing is to follow."""
    wanted = [paths(cell, root) for cell in cells]
    every = [path for group in wanted for path in group]
    names = [str(path.relative_to(root)) for group in wanted for path in group]
    versions = {cell.probe: cell.suite_version for cell in cells}
    start_folder(root, names, versions, done=False)
    todo = [cell for cell, group in zip(cells, wanted, strict=True) if not all(path.is_file() for path in group)]
    with bars(len(cells), progress) as report:
        report.skip(len(cells) - len(todo))
        if workers <= 1:
            for cell in todo:
                if deadline is not None and time.time() > deadline:
                    return every
                run_cell(cell, root, device=device, report=report.step)
                report.finish(cell.name)
        elif not _side_by_side(todo, root, device, workers, deadline, report):
            return every
    start_folder(root, names, versions, done=done)
    return every


def check_device(device: str) -> None:
    """Refuse a device that torch does not have."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(
            "E-OPTION", f"Device {device!r} cannot be used here: {error}.", fix="Use --device cpu."
        ) from error


def devices_of(device: str) -> list[str]:
    """The devices that rungs are spread over: ``cuda`` stands for every GPU."""
    if device != "cuda":
        return [device]
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def side_by_side(device: str) -> int:
    """How many run at a time: cells, one a core; on a GPU rungs, each of which keeps it half busy."""
    cores = os.cpu_count() or 1
    return min(GPU_RUNGS, cores) if device.startswith("cuda") else cores


def paths(cell: Cell, root: Path) -> list[Path]:
    """The documents of a cell, one a budget."""
    return [root / cell.probe / cell.file_name(budget) for budget in cell.budgets]


def fit_cell(cell: Cell, *, device: str, report: Report | None = None) -> Fitted:
    """Train the network of a cell."""
    probe, config = get_probe(cell.probe)[0], cell.config
    rows = critical_rows(probe, config)
    # a rival is as large as HAM at the budget it is compared at
    sized = budget_rows(cell.budgets[0], rows)
    plan = TrainPlan(
        probe=probe, config=config, net=cell.net(sized), steps=cell.steps, learning_rate=cell.learning_rate,
        seed=cell.seed, critical_rows=rows, echo=cell.readout == "echo", device=device,
    )  # fmt: skip
    name = cell.name
    return train(plan, progress=None if report is None else lambda *step: report(name, *step))


def run_cell(cell: Cell, root: Path, *, device: str = "cpu", report: Report | None = None) -> list[Path]:
    """Train one network, keep it, score it at its budgets, and write a document for each."""
    from probes.saved import save_network

    fitted = fit_cell(cell, device=device, report=report)
    save_network(cell, root, fitted)
    written = paths(cell, root)
    for budget, path in zip(cell.budgets, written, strict=True):
        rows = budget_rows(budget, fitted.plan.critical_rows)
        scored = evaluate(fitted, budget_rows=rows, streams=cell.streams, sequences=cell.sequences)
        content = document(cell, fitted, scored, budget=budget, device=device)
        write_document(path, content, scored.errors)
    return written


def run_t0_folder(
    probes: tuple[str, ...],
    folder: str | Path,
    *,
    preset: str = "small",
    seed: int = 0,
    progress: bool = True,
    overrides: dict[str, Any] | None = None,
) -> list[Path]:
    """Run tier 0 of some suites into a folder: one document per rung, model, router and budget.

    Other documents of the same rung, preset, seed and axis are removed: they are of an older form of the suite.

    Args:
        overrides: values of axes that differ from the preset's; what they say makes lines of their own.

    Raises:
        ValueError: an unknown suite, preset, axis or value; nothing is run then.
    """
    root, written, gone = Path(folder), list[Path](), list[Path]()
    chosen = t0_rungs(probes, preset=preset, overrides=overrides)
    versions = {probe.name: probe.version for probe, _, _ in chosen}
    start_folder(root, [], versions, done=False)
    with bars(len(chosen), progress) as report, one_thread():
        for probe, rung, changes in chosen:
            rows = run_t0_suite(probe, preset=preset, seed=seed, rungs=(rung,), overrides=changes)
            axis = axis_words(changes)
            documents = t0_documents(probe.name, rows, preset=preset, seed=seed, axis=axis)
            own = {root / probe.name / t0_name(content): content for content in documents}
            assert len(own) == len(documents), f"two documents of {rung} have one name"
            gone += remove_stale(root / probe.name, own)
            for path, content in own.items():
                write_document(path, content)
            written += own
            report.finish(rung)
    names, old = ([str(path.relative_to(root)) for path in each] for each in (written, gone))
    start_folder(root, names, versions, done=True, gone=old)
    return written


def t0_rungs(
    probes: tuple[str, ...], *, preset: str, overrides: dict[str, Any] | None = None
) -> list[tuple[Probe, str, dict[str, Any]]]:
    """Suites, rungs and what differs from each rung's own configuration.

    Raises:
        ValueError: an unknown suite, preset, axis or value.
    """
    named = [get_probe(name) for name in probes or tuple(list_probes())]
    rungs = [(probe, each) for probe, rung in named for each in ((rung,) if rung else probe.rungs)]
    return [(probe, rung, probe.changes(preset, rung, overrides or {})) for probe, rung in rungs]


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations on small tensors in one thread: more gain nothing, and wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_table(documents: list[dict[str, Any]], path: Path) -> None:
    """The tidy table as Parquet."""
    from hamts.files import write_frame

    write_frame(tidy(documents), path)


# --- side by side


def _side_by_side(
    todo: list[Cell], root: Path, device: str, workers: int, deadline: float | None, report: Bars
) -> bool:
    """Cells in processes of their own; a cell that fails does not stop the others. Whether time was left."""
    context = multiprocessing.get_context("spawn")
    failures: list[tuple[str, BaseException]] = []
    late = False
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_worker) as pool:
        running = {pool.submit(_run_in_time, cell, root, device, deadline): cell for cell in todo}
        for done in as_completed(running):
            error = done.exception()
            if isinstance(error, OutOfTime):
                late = True
            elif error is not None:
                failures.append((running[done].name, error))
            report.finish(running[done].name)
    if failures:
        name, error = failures[0]
        raise RuntimeError(f"{len(failures)} cells failed, first {name}: {error}") from error
    return not late


def _run_in_time(cell: Cell, root: Path, device: str, deadline: float | None) -> list[Path]:
    if deadline is not None and time.time() > deadline:
        raise OutOfTime(cell.name)
    return run_cell(cell, root, device=device)


def _quiet_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


# --- bars


@dataclass
class Bars:
    """Cells done, and the steps of the one under way."""

    bar: Any = None
    total: Any = None
    cell: Any = None

    def skip(self, count: int) -> None:
        if self.bar is not None:
            self.bar.advance(self.total, count)

    def step(self, name: str, step: int, steps: int, nerr: float) -> None:
        if self.bar is not None:
            self.bar.update(self.cell, description=f"{name}  nerr {nerr:.3f}", completed=step, total=steps)

    def finish(self, name: str) -> None:
        if self.bar is not None:
            self.bar.update(self.cell, description=f"{name}  done")
            self.bar.advance(self.total)


@contextmanager
def bars(cells: int, show: bool) -> Iterator[Bars]:
    """Two bars, where they are wanted."""
    if not show:
        yield Bars()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=True) as bar:
        yield Bars(bar, bar.add_task("runs", total=cells), bar.add_task("", total=None))
