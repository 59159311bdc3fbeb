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
from benchmarks.side_by_side import Job, run_jobs
from hamts.config import MIXERS, PRESETS, MachineConfig, ModelConfig
from hamts.data.frame import to_panel
from hamts.fitting import Trained, train_panel, validation_tail
from hamts.frontier import Point, measure_points, windows_at
from hamts.nn.ham import HAMLayer
from hamts.resolve import FitOptions, make_plan

RESULTS = Path(__file__).parent / "results" / "frontier"
SHARES = (0.0, 0.02, 0.05, 0.1, 0.25, 1.0)
CORE_SHARES = (0.0, 0.02, 0.1, 1.0)
CONTROL_SHARES = (0.02, 0.1)
CONTROLS = ("shuffled", "random", "recency")
RATES = (1e-3, 3e-3)
TRIAL_SHARE = 0.1
# presets, and two sizes of about so many weights
SIZES: dict[str, dict[str, Any]] = {name: preset.model for name, preset in PRESETS.items()} | {
    "1M": {"width": 192, "layers": 2, "heads": 6},
    "10M": {"width": 384, "layers": 4, "heads": 12},
}
SEEDS = (0, 1, 2)
BLOCKS = 20
DRAWS, MARGIN = 2000, 0.02
# memories are of the same size up to this share
SAME_SIZE = 0.1
# whose bytes at a share the rivals get
REFERENCE = "learned"
NO_CAP = 1 << 40
# twice the typical step of the target
AMPLITUDE = 2.0
MAD_TO_DEVIATION = 1.48


@dataclass(frozen=True)
class Set:
    """A carrier, how it is cut, and what is injected or labelled."""

    dataset: str
    target: tuple[str, ...]
    h: int
    patch_steps: int
    test_share: float
    stride: int
    day: int  # steps
    futr: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    actions: tuple[str, ...] = ()
    copies: int = 1
    amplitude: float | None = AMPLITUDE  # None: events are labels of the set
    core: bool = False
    most_items: int | None = None


SETS = {
    "epf": Set(
        "epf/NP", ("price",), 24, 12, 0.2, 96, 24,
        futr=("grid_load_forecast", "wind_power_forecast"), copies=4, core=True,
    ),
    "household": Set(
        "household_power", ("Global_active_power",), 96, 24, 0.2, 96, 96,
        past=("Sub_metering_1", "Sub_metering_2", "Sub_metering_3"), copies=2, core=True,
    ),
    "beijing": Set("beijing_air_multisite", ("PM2.5",), 24, 8, 0.2, 24, 24, past=("TEMP", "WSPM"), most_items=4),
    "flights": Set(
        "nycflights13", ("dep_delay_mean",), 24, 2, 0.15, 24, 24,
        futr=("flights_scheduled", "holiday"), past=("precip",),
    ),
    "tep": Set(
        "tep", ("XMEAS_7", "XMEAS_9", "XMEAS_11"), 60, 6, 0.3, 60, 480, actions=("XMV_5", "XMV_10"), amplitude=None
    ),
}  # fmt: skip
SETS["epf-flat"] = replace(SETS["epf"], amplitude=0.0, core=False)
AGES = {"day": 1, "week": 7, "month": 30, "year": 365}  # days


@dataclass(frozen=True)
class Model:
    """One row of the grid: options of ``fit``, and what is measured with its weights."""

    options: dict[str, Any]
    shares: tuple[float, ...] = SHARES
    controls: tuple[str, ...] = ()
    control_shares: tuple[float, ...] = CONTROL_SHARES
    sized: bool = False  # fitted once for each budget
    core: bool = False


def _router(name: str, *, core: bool, controls: tuple[str, ...] = CONTROLS, **options: Any) -> Model:
    return Model({"router": name, **options}, controls=controls, core=core)


MODELS: dict[str, Model] = {
    "surprise": _router("surprise", core=True),
    "innovation": _router("innovation", core=True),
    "learned": _router("learned", core=True),
    "tags": _router("learned+tags", core=True),
    "mix": _router("mix", core=True),
    "error": _router("error", core=False),
    "write": _router("write", core=False),
    "uncertainty": _router("uncertainty", core=False),
    "residual": _router("residual", core=False),
    "learned-token": _router("learned", core=True, routing={"learned_features": "token"}),
} | {
    name: Model(
        {"mixer": name},
        shares=CONTROL_SHARES,
        sized=name not in ("attention", "recurrent", "gdn_gsa", "block_sparse"),
        core=name in ("recurrent_wide", "window", "gdn_gsa", "pooled", "neighbours"),
    )
    for name in MIXERS
    if name != "ham"
}
SMOKE = Set("", ("y",), 6, 3, 0.3, 6, 24, copies=2)


@dataclass(frozen=True)
class Carrier:
    """Rows with events, ready to be fitted and judged."""

    frame: pd.DataFrame
    roles: dict[str, Any]
    rows: int  # of an item
    test_rows: int
    events: pd.DataFrame = field(default_factory=pd.DataFrame)  # unique_id, asked (row), age


# --- data


def load(name: str) -> Carrier:
    """A set with its events; from HAMTS_DATA, installed packages or the cache."""
    spec = SETS[name]
    data = hamts.load_dataset(spec.dataset)
    columns = [*spec.target, *spec.futr, *spec.past, *spec.actions]
    frame = data.df[["unique_id", "ds", *columns]]
    if spec.most_items is not None:
        chosen = frame["unique_id"].unique()[: spec.most_items]
        frame = frame[frame["unique_id"].isin(chosen)]
    if spec.dataset == "tep":
        return _runs_in_sequence(frame, data.labels, spec)
    return with_echoes(frame, spec, freq=data.freq)


def with_echoes(frame: pd.DataFrame, spec: Set, *, freq: Any) -> Carrier:
    """Copies of every item, each with echoed events of its own."""
    parts, events = [], []
    for copy in range(spec.copies):
        for number, (item, own) in enumerate(frame.groupby("unique_id", sort=False)):
            one = own.assign(unique_id=f"{item}#{copy}" if spec.copies > 1 else item).reset_index(drop=True)
            one, asked = _echo(one, spec, np.random.default_rng([copy, number]))
            parts.append(one)
            events.append(asked.assign(unique_id=one["unique_id"].iloc[0]))
    whole = pd.concat(parts, ignore_index=True)
    rows = int(whole.groupby("unique_id").size().min())
    roles = {
        "target": list(spec.target), "futr_cols": list(spec.futr), "past_cols": list(spec.past),
        "action_cols": list(spec.actions), "event_cols": [f"echo_{age}" for age in AGES], "freq": freq,
    }  # fmt: skip
    return Carrier(whole, roles, rows, int(spec.test_share * rows), pd.concat(events, ignore_index=True))


def _echo(one: pd.DataFrame, spec: Set, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One item with shapes added where they are stored (flag 1) and where they are asked (flag 2)."""
    T, length = len(one), max(spec.h // 2, 1)
    values = one[spec.target[0]].to_numpy(float).copy()
    train = values[: int((1 - spec.test_share) * T)]
    typical = MAD_TO_DEVIATION * np.nanmedian(np.abs(np.diff(train)))
    asked = []
    for age, days in AGES.items():
        flags = np.zeros(T)
        steps = days * spec.day
        at = int(rng.uniform(0, min(steps, T // 2)))
        while True:
            echo = at + round(steps * rng.uniform(0.8, 1.2))
            if echo + length >= T:
                break
            shape = (spec.amplitude or 0.0) * typical * rng.uniform(-1.7, 1.7, size=length)
            for place, flag in ((at, 1.0), (echo, 2.0)):
                flags[place] = flag
                values[place + 1 : place + 1 + length] += shape
            asked.append({"asked": echo, "age": age})
            # ten days apart on average, so that most rows are the carrier's own
            at = echo + length + round(rng.exponential(10 * spec.day))
        one[f"echo_{age}"] = flags
    one[spec.target[0]] = values
    return one, pd.DataFrame(asked, columns=["asked", "age"])


def _runs_in_sequence(frame: pd.DataFrame, labels: pd.DataFrame, spec: Set) -> Carrier:
    """All runs one after the other as one stream; the moments at which a fault sets in are its events."""
    offsets, at = {}, 0
    for item, own in frame.groupby("unique_id", sort=False):
        offsets[item] = at
        at += len(own)
    whole = frame.assign(unique_id="plant", ds=np.arange(len(frame))).reset_index(drop=True)
    onsets = [
        {"unique_id": "plant", "asked": offsets[r.unique_id] + int(r.start), "age": "fault"}
        for r in labels.itertuples()
    ]
    roles = {
        "target": list(spec.target), "futr_cols": [], "past_cols": [], "action_cols": list(spec.actions), "freq": 1,
    }  # fmt: skip
    return Carrier(whole, roles, len(whole), int(spec.test_share * len(whole)), pd.DataFrame(onsets))


def smoke_carrier() -> Carrier:
    """A wave with noise, long enough for days and weeks to come back."""
    rng = np.random.default_rng(0)
    T = 24 * 20
    y = 3 * np.sin(2 * np.pi * np.arange(T) / 24) + rng.normal(0, 0.2, T)
    frame = pd.DataFrame({"unique_id": "a", "ds": pd.date_range("2024-01-01", periods=T, freq="h"), "y": y})
    return with_echoes(frame, SMOKE, freq="h")


# --- one cell


@dataclass(frozen=True)
class Cell:
    """One fit of the grid."""

    set: str
    model: str
    seed: int
    share: float | None = None

    @property
    def name(self) -> str:
        size = "" if self.share is None else f"@{100 * self.share:g}"
        return f"{self.set}--{self.model}{size}--seed{self.seed}"


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
    """Bytes of the scratchpads of an item of which such a share of tokens was kept, in all layers."""
    columns = [name for names in carrier.roles.values() if isinstance(names, list) for name in names]
    tokens = carrier.rows // spec.patch_steps * len(columns)
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
    plan = replace(plan, model=replace(plan.model, **SIZES[size]))
    tail = validation_tail(panel.lengths, h=plan.h, patch_steps=spec.patch_steps, val_size=plan.val_size)
    return train_panel(panel, plan, tail=tail, verbose=False, progress=False)


def judged(trained: Trained, carrier: Carrier, spec: Set) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """Panel, test windows, and which of them each part holds, [X] bool: all that are regular, and those at events."""
    panel = to_panel(carrier.frame, schema=trained.panel.schema)
    regular = np.arange(carrier.rows - carrier.test_rows, carrier.rows - spec.h + 1, spec.stride)
    asked: list[dict[str, np.ndarray]] = []
    for item in panel.item_ids:
        own = carrier.events[carrier.events["unique_id"] == item]
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


def grid(*, core: bool) -> list[Cell]:
    """The mandatory core first, then the rest; seed by seed, so that what is there is comparable."""
    cells = [
        Cell(name, label, seed, share)
        for seed in SEEDS
        for name in SETS
        for label, model in MODELS.items()
        for share in (CONTROL_SHARES if model.sized else (None,))
    ]
    inner = [cell for cell in cells if SETS[cell.set].core and MODELS[cell.model].core]
    return inner if core else inner + [cell for cell in cells if cell not in inner]


def trial_of(cell: Cell) -> Cell:
    """The fit whose learning rate a cell takes: of seed 0, and of rivals that have a size the one at a tenth."""
    return replace(cell, seed=0, share=None if cell.share is None else TRIAL_SHARE)


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


@functools.lru_cache(maxsize=2)
def loaded(name: str) -> Carrier:
    """A process needs a set many times."""
    return load(name)


def perform(task: Task) -> str:
    """Do one task and write what came of it; what there is to say about it."""
    warnings.simplefilter("ignore")
    cell, row, spec = task.cell, task.models[task.cell.model], task.specs[task.cell.set]
    carrier = (task.load_set or loaded)(cell.set)
    how = dict(task.how)
    trial_steps = how.pop("trial_steps", None)
    budget = budget_of(cell, task.folder, carrier, spec, ModelConfig(**SIZES[how["size"]]))
    if task.rate is not None:
        how["max_steps"] = trial_steps or how.get("max_steps")
        began = time.perf_counter()
        trained = fit(carrier, spec, row, rate=task.rate, seed=0, budget=budget, **how)
        said = {
            "set": cell.set, "model": cell.model, "equal_to_share": cell.share, "rate": task.rate, "size": how["size"],
            "steps": trained.report.steps, "validation": finite(trained.report.best_score),
            "s": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        write(task.path, said)
        return f"{said['s']} s, validation {said['validation']} at rate {task.rate:g}"
    result = measure(cell, row, rate=best_rate(cell, task.folder), carrier=carrier, spec=spec, budget=budget, **how)
    write(task.path, result)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
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
        trial = trial_of(cell)
        first = [add(replace(trial, model=REFERENCE, share=None))] if cell.share is not None else []
        trials = [needed(task(cell=trial, rate=rate), first) for rate in RATES]
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
    jobs = jobs_of(cells, functools.partial(Task, folder=folder, **told), again=again)
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


# --- what it says


def read_cells(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*--seed*.json"))]


def lines_of(cells: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per set, model, memory, share and part, over seeds; intervals over seeds, then blocks of windows."""
    found: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for cell in cells:
        for point in cell["points"]:
            for part, scores in point["parts"].items():
                key = (cell["set"], cell["model"], point["memory"], point["share"], part)
                found.setdefault(key, []).append((point, scores))
    rows = []
    for (name, model, memory, share, part), seeds in found.items():
        low, high = drawn([scores for _, scores in seeds])
        costs = ("usage_share", "bytes", "scratchpad_attention", "ms_per_step")
        means = {cost: _mean([point[cost] for point, _ in seeds]) for cost in costs}
        rows.append(
            {"set": name, "model": model, "memory": memory, "share": share, "part": part, "seeds": len(seeds)}
            | {"WQL": _mean([scores["WQL"] for _, scores in seeds]), "low": low, "high": high}
            | {"MASE": _mean([scores["MASE"] for _, scores in seeds]), **means}
        )
    return pd.DataFrame(rows)


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else math.nan


def drawn(
    seeds: list[dict[str, Any]], against: list[dict[str, Any]] | None = None, *, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the score, or of its ratio to another's less 1, paired by both: seeds are drawn, then blocks."""
    rng = np.random.default_rng(0)
    loss, size = (np.array([one[name] for one in seeds]) for name in ("quantile", "size"))  # 2 x [seeds, blocks]
    place = rng.integers(len(loss), size=(DRAWS, len(loss), 1))
    block = rng.integers(loss.shape[1], size=(DRAWS, 1, loss.shape[1]))
    values = loss[place, block].sum((1, 2)) / np.maximum(size[place, block].sum((1, 2)), 1e-12)
    if against is not None:
        other = np.array([one["quantile"] for one in against])[place, block].sum((1, 2))
        values = loss[place, block].sum((1, 2)) / np.maximum(other, 1e-12) - 1
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def difference(
    cells: list[dict[str, Any]], name: str, one: tuple[str, str], two: tuple[str, str], share: float, part: str
) -> dict[str, Any] | None:
    """Relative difference of two (model, memory) at a share, paired by seed; None where a seed of either is missing."""
    sides: list[dict[int, dict[str, Any]]] = []
    for model, memory in (one, two):
        sides.append(
            {
                cell["seed"]: {**point["parts"][part], "bytes": point["bytes"]}
                for cell in cells
                if (cell["set"], cell["model"]) == (name, model)
                for point in cell["points"]
                if (point["memory"], point["share"]) == (memory, share) and part in point["parts"]
            }
        )
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        return None
    left, right = ([side[seed] for seed in seeds] for side in sides)
    low, high = drawn(left, right)
    total = [sum(map(sum, (scores["quantile"] for scores in side))) for side in (left, right)]
    apart = total[0] / max(total[1], 1e-12) - 1
    sizes = [sum(side[seed]["bytes"] for seed in seeds) for side in sides]
    ratio = sizes[0] / sizes[1]
    return {
        "set": name, "one": "/".join(one), "two": "/".join(two), "share": share, "part": part, "seeds": len(seeds),
        "difference": apart, "low": low, "high": high, "bytes_ratio": ratio,
        "verdict": verdict(apart, low, high, seeds=len(seeds), bytes_ratio=ratio),
    }  # fmt: skip


def verdict(difference: float, low: float, high: float, *, seeds: int, bytes_ratio: float = 1.0) -> str:
    """In the words of the registration; nothing is called of few seeds, nor of memories of other sizes."""
    if seeds < len(SEEDS):
        return f"{seeds} of {len(SEEDS)} seeds: nothing is called"
    if abs(bytes_ratio - 1) > SAME_SIZE:
        return "other bytes: nothing is called"
    if difference < -MARGIN and high < 0:
        return "better"
    if low > -MARGIN:
        return "no better"
    return "undecided"


def claims(cells: list[dict[str, Any]]) -> pd.DataFrame:
    """Every comparison that the registered claims need, on the core sets."""
    routers = [label for label, model in MODELS.items() if model.controls]
    rows = []
    for name in (name for name, spec in SETS.items() if spec.core):
        for share in CONTROL_SHARES:
            for part in ("events", "all"):
                pairs = [((r, "model"), (r, control)) for r in routers for control in ("shuffled", "random")]
                pairs += [
                    ((r, "model"), (rival, "model")) for r in routers for rival in ("recurrent_wide", "neighbours")
                ]
                pairs += [(("learned", "model"), ("learned-token", "model"))]
                rows += [difference(cells, name, one, two, share, part) for one, two in pairs]
    return pd.DataFrame([row for row in rows if row is not None])


def equal_time(lines: pd.DataFrame, reference: str = REFERENCE, share: float = 0.1) -> pd.DataFrame:
    """For each model the best score among its points that take no longer than a reference does."""
    rows = []
    for (name, part), own in lines[lines["memory"] == "model"].groupby(["set", "part"]):
        limit = own[(own["model"] == reference) & (own["share"] == share)]["ms_per_step"]
        if len(limit):
            usable = own[own["ms_per_step"] <= 1.02 * limit.iloc[0]]
            best = usable.sort_values("WQL").groupby("model").head(1)
            rows.append(best.assign(set=name, part=part))
    return pd.concat(rows) if rows else lines.head(0)


def table(folder: Path) -> str:
    """All that was measured, the claims, and what was not run."""
    cells, texts = read_cells(folder), []
    if cells:
        lines = lines_of(cells)
        texts += ["## Error against bytes", markdown(lines), "## At equal milliseconds", markdown(equal_time(lines))]
        if len(found := claims(cells)):
            texts += ["## Claims (negative: the first is better)", markdown(found)]
    missing = [cell.name for cell in grid(core=False) if not (folder / f"{cell.name}.json").exists()]
    core = {cell.name for cell in grid(core=True)}
    texts.append(
        f"Not run: {len(missing)} cells, of them {len([m for m in missing if m in core])} of the mandatory core."
    )
    return "\n\n".join(texts)


def describe(sets: list[str]) -> str:
    """Length of every set, and how many events its test rows hold."""
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
        )
    return markdown(pd.DataFrame(rows))


def markdown(frame: pd.DataFrame) -> str:
    rows = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in frame.itertuples(index=False)]
    lines = [list(frame.columns), ["---"] * len(frame.columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(folder: Path, path: Path) -> None:
    """One panel for each set and part: error against bytes, a line for each router, a point for each rival."""
    from matplotlib.figure import Figure

    from hamts.plot import plot_frontier

    lines = lines_of(read_cells(folder))
    lines = lines[(lines["memory"] == "model") & lines["part"].isin(["all", "events"])]
    sets = list(lines["set"].unique())
    figure = Figure(figsize=(11, 4 * len(sets)), layout="constrained")
    for row, name in zip(figure.subplots(len(sets), 2, squeeze=False), sets, strict=True):
        for axes, part in zip(row, ("all", "events"), strict=True):
            own = lines[(lines["set"] == name) & (lines["part"] == part)]
            if len(own):
                plot_frontier(own, x="bytes", y="WQL", group="model", low="low", high="high", axes=axes)
            axes.set_title(f"{name}, {part}", fontsize="medium")
    figure.savefig(path, dpi=150)


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
            how={"size": options.size, "max_steps": options.max_steps, "trial_steps": options.trial_steps},
        )  # fmt: skip
    print(table(options.folder))
    if options.plot:
        draw(options.folder, options.plot)


if __name__ == "__main__":
    main()
