"""Quality against bytes and milliseconds: every router, control and rival, on streams long enough to forget.

Run ``python -m benchmarks.frontier`` from the clone, on a GPU or a CPU; ``--smoke`` takes a minute of a CPU. One JSON
per set, model and seed goes to ``benchmarks/results/frontier`` as it is measured; a cell that exists is not measured
again without ``--again``. ``--core`` runs the mandatory core alone; ``--table`` prints what is there, what is not, and
the comparisons that ``benchmarks/README.md`` asked for before anything was run; ``--plot`` draws it.

Events with an echo are injected into real carriers: a flag in a column of its own says that a shape is added to the
target, and, a day, a week, a month or a year later (within a fifth), that the same shape comes back. Times are random,
so that no clock tells them; a type is asked before it is stored again. ``--sets epf-flat`` has shapes of size 0.

I items · X windows · T steps
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import hamts
from benchmarks.frontier_claims import draw, markdown, table
from benchmarks.frontier_echoes import fresh_echoes
from benchmarks.frontier_grid import MODELS, REFERENCE, SEEDS, Cell, Model, grid
from benchmarks.frontier_sets import SETS, SMOKE, Carrier, Set, load, smoke_carrier
from benchmarks.side_by_side import Job, run_jobs
from hamts.config import PRESETS, MachineConfig, ModelConfig
from hamts.data.frame import to_panel
from hamts.fitting import Trained, ValidationTail, train_panel, validation_tail
from hamts.frontier import Point, measure_points, windows_at
from hamts.nn.ham import HAMLayer
from hamts.resolve import FitOptions, make_plan

RESULTS = Path(__file__).parent / "results" / "frontier"
RATES = (1e-3, 3e-3)
# learning rates are tried on one set, rivals that have a size at a tenth
TRIAL_SET, TRIAL_SHARE = "epf", 0.1
# presets, and two sizes of about so many weights
SIZES: dict[str, dict[str, Any]] = {name: preset.model for name, preset in PRESETS.items()} | {
    "1M": {"width": 192, "layers": 2, "heads": 6},
    "10M": {"width": 384, "layers": 4, "heads": 12},
}
# of every model here: tokens know the events of their patch, and the exact read starts open and sharp
BACKBONE = {"event_context": True, "entry_bias": -1.0, "match_gain": 2.0}
# of every fit here: each stream is read once, in one pass, and asked at most of the echoes of what it has seen
TRAINING = {
    "batch_windows": 32, "context_patches": 128, "origins": 1, "prefix_patches": 1, "reset_share": 1.0,
    "recall_share": 0.7, "checks": 2, "patience": 4,
}  # fmt: skip
# validation forecasts of an item: at so many moments evenly apart, and at so many echoes
REGULAR_CHECKS, ECHO_CHECKS = 8, 16
# of a GPU's memory; the rest is the processes' own
USED_GPU = 0.93
BLOCKS = 20
NO_CAP = 1 << 40


# --- one cell


def entry_bytes(config: ModelConfig) -> int:
    """Bytes of one scratchpad entry of this shape."""
    with torch.device("meta"):
        return HAMLayer(config).empty_memory(1, 1, torch.zeros(1)).scratchpad.bytes_per_entry()


def budget_of(cell: Cell, folder: Path, carrier: Carrier, spec: Set, config: ModelConfig) -> int:
    """Bytes that a rival gets: what the reference took at that share, or would if it kept what it was asked for."""
    if cell.share is None:
        return NO_CAP
    path = folder / f"{cell.set}--{REFERENCE}--seed{cell.seed}.json"
    if path.exists():
        for point in json.loads(path.read_text())["points"]:
            if (point["memory"], point["share"]) == ("model", cell.share):
                return int(point["scratchpad_bytes"])
    return equal_bytes(carrier, spec, cell.share, config)


def equal_bytes(carrier: Carrier, spec: Set, share: float, config: ModelConfig) -> int:
    """Bytes of the scratchpads of an item of which such a share of tokens was kept, in all layers.

    Of tokens that a score may keep: those of event columns are not among them.
    """
    kept = [names for role, names in carrier.roles.items() if isinstance(names, list) and role != "event_cols"]
    tokens = carrier.rows // spec.patch_steps * sum(map(len, kept))
    return int(share * tokens) * config.layers * entry_bytes(config)


def fit(
    carrier: Carrier, spec: Set, model: Model, *, rate: float, seed: int, budget: int, size: str = "small",
    max_steps: int | None = None, accelerator: str = "auto",
) -> Trained:  # fmt: skip
    """Fit on everything before the test rows; nothing is read afterwards."""
    seen = carrier.frame.groupby("unique_id", sort=False).head(carrier.rows - carrier.test_rows)
    panel = to_panel(seen, **carrier.roles)
    options = FitOptions(
        h=spec.h, budget_bytes=budget, preset=size if size in PRESETS else "small", **model.options,
        patch_steps=spec.patch_steps, val_size=carrier.test_rows // 2, max_steps=max_steps, learning_rate=rate,
        seed=seed, machine=MachineConfig(accelerator=accelerator, kernel="torch"),
    )  # fmt: skip
    plan = make_plan(panel, options)
    plan = replace(plan, model=replace(plan.model, **SIZES[size], **BACKBONE), train=replace(plan.train, **TRAINING))
    return train_panel(
        panel, plan, tail=checked_tail(panel, plan, carrier, spec), verbose=False, progress=False,
        augment=fresh_echoes(carrier, spec, panel, seed),
    )  # fmt: skip


def checked_tail(panel: Any, plan: Any, carrier: Carrier, spec: Set) -> ValidationTail:
    """The validation rows, with forecasts at echoes among the moments that are checked."""
    most = REGULAR_CHECKS * panel.n_items
    tail = validation_tail(panel.lengths, h=plan.h, patch_steps=spec.patch_steps, val_size=plan.val_size, most=most)
    cutoffs = []
    for item, end, length, regular in zip(panel.item_ids, tail.ends, panel.lengths, tail.cutoffs, strict=True):
        cuts = asked_of(carrier, item)["asked"].to_numpy(int) + 1
        inside = cuts[(cuts >= end) & (cuts + spec.h <= length)]
        chosen = inside[np.linspace(0, len(inside) - 1, min(ECHO_CHECKS, len(inside))).round().astype(int)]
        cutoffs.append(np.unique(np.concatenate([regular, chosen])))
    return replace(tail, cutoffs=cutoffs)


def asked_of(carrier: Carrier, item: Any) -> pd.DataFrame:
    """The echoes of an item, or the moments that its labels name; of a carrier without either none."""
    if carrier.events.empty:
        return pd.DataFrame({"asked": [], "age": []})
    return carrier.events[carrier.events["unique_id"] == item]


def judged(trained: Trained, carrier: Carrier, spec: Set) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Panel, test windows, and which of them each part holds, [X] bool: all that are regular, and those at events."""
    panel = to_panel(carrier.frame, schema=trained.panel.schema)
    regular = np.arange(carrier.rows - carrier.test_rows, carrier.rows - spec.h + 1, spec.stride)
    asked: list[dict[str, np.ndarray]] = []
    for item in panel.item_ids:
        own = asked_of(carrier, item)
        # the step of the event itself has been seen, what follows it has not
        cuts = own["asked"].to_numpy(int) + 1
        inside = (cuts >= carrier.rows - carrier.test_rows) & (cuts + spec.h <= carrier.rows)
        asked.append({age: cuts[inside & (own["age"] == age).to_numpy()] for age in own["age"].unique()})
    windows = windows_at(panel, spec.h, [np.concatenate([regular, *one.values()]) for one in asked])
    parts = {"all": np.isin(windows.cuts, regular)}
    for age in dict.fromkeys(age for one in asked for age in one):
        parts[age] = np.array(
            [cut in asked[item].get(age, ()) for item, cut in zip(windows.items, windows.cuts, strict=True)]
        )
    parts["events"] = np.logical_or.reduce([part for name, part in parts.items() if name != "all"] or [~parts["all"]])
    return panel, windows, {name: part for name, part in parts.items() if part.any()}


def blocks_of(point: Point, windows: np.ndarray) -> dict[str, list[float]]:
    """Loss and size of neighbouring windows of one part, in at most so many blocks: what intervals are drawn from."""
    rows = np.flatnonzero(windows[point.losses.rows])
    groups = np.array_split(rows, min(BLOCKS, len(np.unique(point.losses.rows[rows]))))
    return {
        name: [round(float(np.nansum(getattr(point.losses, name)[group])), 6) for group in groups]
        for name in ("quantile", "size")
    }


def measure(
    cell: Cell, row: Model, *, rate: float, carrier: Carrier, spec: Set, budget: int, size: str, **how: Any
) -> dict[str, Any]:
    """Fit one model and score it under every budget."""
    seed, share = cell.seed, cell.share
    began = time.perf_counter()
    gpu = torch.cuda.is_available() and how.get("accelerator") != "cpu"
    trained = fit(carrier, spec, row, rate=rate, seed=seed, budget=budget, size=size, **how)
    fit_s = time.perf_counter() - began
    give_back(peak=False)
    panel, windows, parts = judged(trained, carrier, spec)
    points = measure_points(
        trained, panel, windows, shares=row.shares, memories=("model", *row.controls),
        control_shares=row.control_shares, seed=seed, timed=("model",), device="cuda" if gpu else "cpu",
    )  # fmt: skip
    return {
        "set": cell.set, "model": cell.model, "size": size, "seed": seed, "rate": rate, "equal_to_share": share,
        "budget_bytes": budget,
        "fit_s": round(fit_s, 1), "steps": trained.report.steps, "validation": finite(trained.report.best_score),
        "best_step": trained.report.best_step,
        "weights": sum(p.numel() for p in trained.network.parameters()), "patch_steps": spec.patch_steps,
        "tokens_of_an_item": carrier.rows // spec.patch_steps * len(panel.schema.channels),
        "windows": {part: int(chosen.sum()) for part, chosen in parts.items()},
        "device": torch.cuda.get_device_name() if gpu else platform.machine(),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
        "versions": {"hamts": hamts.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "s": round(time.perf_counter() - began, 1),
        "points": [point_of(point, parts, share, rival="mixer" in row.options) for point in points],
    }  # fmt: skip


def point_of(point: Point, parts: dict[str, np.ndarray], share: float | None, *, rival: bool) -> dict[str, Any]:
    """One budget of one memory, with a score for each part of the windows; a rival without a choice has no share."""
    names = ("usage_share", "bytes", "scratchpad_bytes", "scratchpad_attention", "ms_per_step", "ms_per_forecast")
    return {
        "memory": point.memory,
        "share": share if rival else point.budget_share,
        **{name: finite(getattr(point, name)) for name in names},
        "parts": {
            part: {
                "WQL": finite(point.losses.wql(chosen[point.losses.rows])),
                "MASE": finite(point.losses.mase(chosen[point.losses.rows])),
                **blocks_of(point, chosen),
            }
            for part, chosen in parts.items()
        },
    }


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


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
    gpu_share: float = 1.0  # of its memory, where several processes use it: what waits in caches is others' room
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


@functools.lru_cache(maxsize=2)
def loaded(name: str) -> Carrier:
    """A process needs a set many times."""
    return load(name)


def give_back(*, peak: bool = True) -> None:
    """Memory of a GPU that others need; and the count of it starts anew."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        if peak:
            torch.cuda.reset_peak_memory_stats()


def perform(task: Task) -> str:
    """Do one task and write what came of it; what there is to say about it."""
    warnings.simplefilter("ignore")
    give_back()
    torch.set_float32_matmul_precision("high")
    if torch.cuda.is_available() and task.gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(task.gpu_share)
    cell, row, spec = task.cell, task.models[task.cell.model], task.specs[task.cell.set]
    carrier = (task.load_set or loaded)(cell.set)
    how = dict(task.how)
    trial_steps, rate = how.pop("trial_steps", None), how.pop("rate", None)
    shape = ModelConfig(**SIZES[how["size"]], **BACKBONE)
    if task.rate is not None:
        how["max_steps"] = trial_steps or how.get("max_steps")
        # not the bytes of a reference that is there or not: trials need not wait
        budget = NO_CAP if cell.share is None else equal_bytes(carrier, spec, cell.share, shape)
        began = time.perf_counter()
        trained = fit(carrier, spec, row, rate=task.rate, seed=0, budget=budget, **how)
        said = {
            "set": cell.set, "model": cell.model, "equal_to_share": cell.share, "rate": task.rate, "size": how["size"],
            "steps": trained.report.steps, "validation": finite(trained.report.best_score),
            "s": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        write(task.path, said)
        return f"{said['s']} s, validation {said['validation']} at rate {task.rate:g}"
    result = measure(
        cell, row, rate=rate or best_rate(cell, task.folder), carrier=carrier, spec=spec,
        budget=budget_of(cell, task.folder, carrier, spec, shape), **how,
    )  # fmt: skip
    write(task.path, result)
    scores = [f"{p['memory']} {p['share']}: {p['parts']['all']['WQL']:.4f}" for p in result["points"]]
    return f"{result['s']} s, of them {result['fit_s']} s of fit, peak {result['peak_gib']} GiB; " + ", ".join(scores)


def jobs_of(cells: list[Cell], task: Callable[..., Task], *, again: bool) -> list[Job]:
    """What is missing, with what it waits for; what others wait for comes first."""
    jobs: dict[str, Job] = {}

    def needed(one: Task, needs: list[str]) -> str:
        if one.path.name not in jobs and (again or not one.path.exists()):
            jobs[one.path.name] = Job(one.path.name, one, tuple(needs))
        return one.path.name

    def add(cell: Cell) -> str:
        own = task(cell=cell)
        if own.path.name in jobs or (own.path.exists() and not again):
            return own.path.name
        # a rival gets the bytes that the reference took
        reference = [add(replace(cell, model=REFERENCE, share=None))] if cell.share is not None else []
        trials = [] if own.how.get("rate") else [needed(task(cell=trial_of(cell), rate=rate), []) for rate in RATES]
        return needed(own, trials + reference)

    for cell in sorted(cells, key=lambda cell: cell.model != REFERENCE):
        add(cell)
    order = {name: place for place, name in enumerate(jobs)}
    waited_for = {need for job in jobs.values() for need in job.needs}
    return sorted(jobs.values(), key=lambda job: (job.name not in waited_for, order[job.name]))


def run(
    cells: list[Cell], folder: Path, *, again: bool, workers: int = 1, most_s: float = math.inf,
    end_s: float = math.inf, **told: Any,
) -> None:  # fmt: skip
    """Measure what is missing, until the time is up: here, or side by side in processes of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    share = USED_GPU / workers if workers > 1 else 1.0
    jobs = jobs_of(cells, functools.partial(Task, folder=folder, gpu_share=share, **told), again=again)
    print(f"{len(jobs)} jobs", flush=True)
    if workers > 1:
        run_jobs(jobs, perform, workers=workers, begin_within_s=most_s, end_within_s=end_s)
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


def write(path: Path, content: dict[str, Any]) -> None:
    """All or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


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
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--size", default="1M", choices=list(SIZES))
    parser.add_argument("--max-steps", type=int, help="optimiser steps; default as the fit chooses")
    parser.add_argument("--rate", type=float, help="learning rate; default the better one of trials")
    parser.add_argument("--trial-steps", type=int, help="of a trial of a learning rate; default as many")
    parser.add_argument("--workers", type=int, default=1, help="processes side by side, of one thread each")
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
            for cell in grid(core=options.core)
            if cell.set in options.sets and cell.model in options.models and cell.seed in options.seeds
        ]
        run(
            cells, options.folder, again=options.again, workers=options.workers, most_s=options.max_time,
            end_s=options.end_time,
            how={name: getattr(options, name) for name in ("size", "max_steps", "trial_steps", "rate")},
        )  # fmt: skip
    print(table(options.folder))
    if options.plot:
        draw(options.folder, options.plot)


if __name__ == "__main__":
    main()
