"""Quality against bytes and milliseconds: every router, control and rival, on streams long enough to forget.

Run ``python -m benchmarks.frontier`` from the clone, on a GPU or a CPU; ``--smoke`` takes a minute of a CPU. One JSON
per set, model and seed goes to ``benchmarks/results/frontier`` as it is measured; a cell that exists is not measured
again without ``--again``. ``--core`` runs the mandatory core alone; ``--table`` prints what is there, what is not, and
the comparisons that ``benchmarks/frontier.md`` asked for before anything was run; ``--plot`` draws it.

Events with an echo are injected into real carriers: a flag in a column of its own says that a shape is added to the
target, and, a day, a week, a month or a year later (within a fifth), that the same shape comes back. Times are random,
so that no clock tells them; a type is asked before it is stored again. ``--sets epf-flat`` has shapes of size 0.

I items · X windows · T steps
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.cells import write_cell
from benchmarks.frontier_cell import (
    BACKBONE,
    NO_CAP,
    REGISTRATION,
    SIZES,
    equal_bytes,
    finite,
    fit,
    give_back,
    live_window_bytes,
    measure,
)
from benchmarks.frontier_claims import draw, table
from benchmarks.frontier_files import refuse_others
from benchmarks.frontier_grid import MODELS, REFERENCE, SEEDS, Cell, Model, grid
from benchmarks.frontier_lines import markdown
from benchmarks.frontier_sets import SETS, SMOKE, Carrier, Set, load, smoke_carrier
from benchmarks.side_by_side import Job, run_jobs
from hamts.config import ModelConfig

RESULTS = Path(__file__).parent / "results" / "frontier"
RATES = (1e-3, 3e-3)
# learning rates are tried on one set, rivals that have a size at a tenth
TRIAL_SET, TRIAL_SHARE = "epf", 0.1
FAMILIES = sorted({spec.family for spec in SETS.values()})
# rivals that have room for a token of every column in every patch, whether there is one or not; and whether they have a
# state beside it
ROOM_FOR_ALL = {"window": False, "recurrent_window": True}


# --- one cell


def budget_of(cell: Cell, carrier: Carrier, spec: Set, config: ModelConfig) -> int:
    """Bytes that a rival gets: what a scratchpad takes that keeps the share asked for."""
    if cell.share is None:
        return NO_CAP
    budget = equal_bytes(carrier, spec, cell.share, config)
    if cell.model not in ROOM_FOR_ALL:
        return budget
    return live_window_bytes(carrier, spec, budget, config, state=ROOM_FOR_ALL[cell.model])


# --- the grid


def trial_of(cell: Cell) -> Cell:
    """The fit whose learning rate a cell takes: on one set, of a rival at one size, of all routers that of one."""
    where = TRIAL_SET if cell.set in SETS else cell.set
    model = cell.model if "mixer" in MODELS[cell.model].options else REFERENCE
    return replace(cell, set=where, model=model, seed=0, share=None if cell.share is None else TRIAL_SHARE)


def trial_path(folder: Path, cell: Cell, rate: float) -> Path:
    return folder / f"{cell.name.rpartition('--')[0]}--lr{rate:g}.json"


def best_rate(cell: Cell, folder: Path) -> float:
    """The learning rate that validated best; the same trials for every model, written down."""
    trials = {rate: json.loads(trial_path(folder, trial_of(cell), rate).read_text())["validation"] for rate in RATES}
    return min(trials, key=lambda rate: math.inf if trials[rate] is None else trials[rate])


@dataclass(frozen=True)
class Task:
    """One trial of a learning rate, or one cell; all that a process must be told."""

    cell: Cell
    folder: Path
    how: dict[str, Any]
    rate: float | None = None  # of a trial
    load_set: Callable[[str], Carrier] | None = None  # None: ``load``
    specs: dict[str, Set] = field(default_factory=lambda: SETS)
    models: dict[str, Model] = field(default_factory=lambda: MODELS)

    @property
    def path(self) -> Path:
        return (
            self.folder / f"{self.cell.name}.json"
            if self.rate is None
            else trial_path(self.folder, self.cell, self.rate)
        )

    def asked(self) -> dict[str, Any]:
        """How a file of it must have been measured; of a rate that trials decide, what those there say."""
        steps = self.how.get("max_steps") or self.specs[self.cell.set].steps
        if self.rate is not None:
            steps = self.how.get("trial_steps") or steps
        rate = self.rate or self.how.get("rate")
        if rate is None and all(trial_path(self.folder, trial_of(self.cell), one).exists() for one in RATES):
            rate = best_rate(self.cell, self.folder)
        known = {} if rate is None else {"rate": rate}
        return {"registration": REGISTRATION, "size": self.how["size"], "steps": steps, **known}


@functools.lru_cache(maxsize=2)
def loaded(name: str) -> Carrier:
    """A process needs a set many times."""
    return load(name)


def perform(task: Task) -> str:
    """Do one task and write what came of it; what there is to say about it."""
    try:
        return _perform(task)
    finally:
        # a process that waits holds nothing
        give_back()


def _perform(task: Task) -> str:
    warnings.simplefilter("ignore")
    give_back()
    torch.set_float32_matmul_precision("high")
    cell, row, spec = task.cell, task.models[task.cell.model], task.specs[task.cell.set]
    carrier = (task.load_set or loaded)(cell.set)
    how = dict(task.how)
    trial_steps, rate = how.pop("trial_steps", None), how.pop("rate", None)
    shape = ModelConfig(**SIZES[how["size"]], **BACKBONE)
    if task.rate is not None:
        how["max_steps"] = trial_steps or how.get("max_steps")
        budget = budget_of(cell, carrier, spec, shape)
        began = time.perf_counter()
        trained = fit(carrier, spec, row, rate=task.rate, seed=0, budget=budget, **how)
        said = {
            "registration": REGISTRATION, "set": cell.set, "model": cell.model, "equal_to_share": cell.share,
            "rate": task.rate, "size": how["size"], "steps": trained.report.steps,
            "validation": finite(trained.report.best_score), "s": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        write_cell(task.path, said)
        return f"{said['s']} s, validation {said['validation']} at rate {task.rate:g}"
    result = measure(
        cell, row, rate=rate or best_rate(cell, task.folder), carrier=carrier, spec=spec,
        budget=budget_of(cell, carrier, spec, shape), **how,
    )  # fmt: skip
    write_cell(task.path, result)
    scores = [f"{p['memory']} {p['share']}: {p['parts']['all']['WQL']:.4f}" for p in result["points"]]
    return f"{result['s']} s, of them {result['fit_s']} s of fit, peak {result['peak_gib']} GiB; " + ", ".join(scores)


def jobs_of(cells: list[Cell], task: Callable[..., Task], *, again: bool) -> list[Job]:
    """What is missing, in the order of the cells, with what it waits for before it; what is there must be as asked."""
    jobs: dict[str, Job] = {}

    def there(one: Task) -> bool:
        if again or not one.path.exists():
            return False
        refuse_others(one.path, one.asked())
        return True

    def needed(one: Task, needs: list[str]) -> str:
        if one.path.name not in jobs and not there(one):
            jobs[one.path.name] = Job(one.path.name, one, tuple(needs), one.cell.room, one.cell.seconds)
        return one.path.name

    for cell in cells:
        own = task(cell=cell)
        if own.path.name in jobs or there(own):
            continue
        trials = [] if own.how.get("rate") else [needed(task(cell=trial_of(cell), rate=rate), []) for rate in RATES]
        needed(own, trials)
    return list(jobs.values())


def run(
    cells: list[Cell], folder: Path, *, again: bool, workers: int = 1, most_s: float = math.inf,
    end_s: float = math.inf, devices: Sequence[str | None] = (None,), **told: Any,
) -> None:  # fmt: skip
    """Measure what is missing, until the time is up: here, or side by side in processes of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(cells, functools.partial(Task, folder=folder, **told), again=again)
    print(f"{len(jobs)} jobs", flush=True)
    if workers > 1:
        run_jobs(jobs, perform, workers=workers, begin_within_s=most_s, end_within_s=end_s, devices=devices)
        return
    began, waiting = time.monotonic(), list(jobs)
    while waiting:
        if time.monotonic() - began > most_s:
            print("the time is up; the same call goes on from here")
            return
        names = {job.name for job in waiting}
        job = next(job for job in waiting if not set(job.needs) & names)
        waiting.remove(job)
        print(f"{job.name}: {perform(job.payload)}", flush=True)


def describe(sets: list[str]) -> str:
    """Length of every set, how many events its test rows hold, and how much of what is asked there was added."""
    rows = []
    for name in sets:
        spec, carrier = SETS[name], load(name)
        columns = [column for names in carrier.roles.values() if isinstance(names, list) for column in names]
        asked = carrier.events["asked"] + 1
        inside = carrier.events[(asked >= carrier.rows - carrier.test_rows) & (asked + spec.h <= carrier.rows)]
        patches = carrier.rows // spec.patch_steps
        counts = inside["age"].value_counts(sort=False).to_dict()
        rows.append(
            {"set": name, "core": spec.core, "patches": patches, "tokens": patches * len(columns), "events": counts}
            | {"added": added_share(carrier, load(name, flat=True), spec, inside)}
        )
    return markdown(pd.DataFrame(rows))


def added_share(carrier: Carrier, flat: Carrier, spec: Set, events: pd.DataFrame) -> float:
    """Size of the shapes over size of the target, inside event windows: what remembering them could give at most."""
    shapes = size = 0.0
    for item, own in events.groupby("unique_id"):
        one, two = (x.frame.loc[x.frame["unique_id"] == item, spec.target[0]].to_numpy(float) for x in (carrier, flat))
        for asked in own["asked"]:
            rows = slice(asked + 1, asked + 1 + spec.h)
            shapes += float(np.nansum(np.abs(one[rows] - two[rows])))
            size += float(np.nansum(np.abs(one[rows])))
    return shapes / max(size, 1e-12)


def smoke(folder: Path) -> None:
    """A router and a rival on a small wave, hardly trained: that everything runs."""
    cells = [Cell("smoke", REFERENCE, 0), Cell("smoke", "window", 0, 0.1)]
    few = {
        REFERENCE: replace(MODELS[REFERENCE], shares=(0.0, 0.1), control_shares=(0.1,)),
        "window": MODELS["window"],
    }
    run(
        cells, folder, again=True, most_s=math.inf, load_set=lambda _: smoke_carrier(), specs={"smoke": SMOKE},
        models=few, how={"size": "tiny", "max_steps": 2, "accelerator": "cpu"},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--core", action="store_true", help="the mandatory core alone")
    parser.add_argument("--family", default="recent", choices=FAMILIES, help="of sets: how old echoes are")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--size", default="1M", choices=list(SIZES))
    parser.add_argument("--max-steps", type=int, help="optimiser steps; default those of the set")
    parser.add_argument("--rate", type=float, help="learning rate; default the better one of trials")
    parser.add_argument("--trial-steps", type=int, help="of a trial of a learning rate; default as many")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, of one thread each")
    parser.add_argument("--devices", nargs="+", default=[None], help="numbers of GPUs to spread the processes over")
    parser.add_argument("--end-time", type=float, default=math.inf, help="seconds after which what runs is ended")
    parser.add_argument("--max-time", type=float, default=math.inf, help="seconds after which no cell is begun")
    parser.add_argument("--again", action="store_true", help="measure cells that exist, too")
    parser.add_argument("--smoke", action="store_true", help="a minute of a CPU, to see that it runs")
    parser.add_argument("--describe", action="store_true", help="only say how long the sets are")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--plot", type=Path, help="also draw what is there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.describe:
        print(describe(options.sets))
        return
    if options.smoke:
        smoke(options.folder)
    elif not options.table:
        cells = [
            cell
            for cell in grid(core=options.core, family=options.family)
            if cell.set in options.sets and cell.model in options.models and cell.seed in options.seeds
        ]
        run(
            cells, options.folder, again=options.again, workers=options.workers, most_s=options.max_time,
            end_s=options.end_time, devices=options.devices,
            how={name: getattr(options, name) for name in ("size", "max_steps", "trial_steps", "rate")},
        )  # fmt: skip
    print(table(options.folder))
    if options.plot:
        draw(options.folder, options.plot)


if __name__ == "__main__":
    main()
