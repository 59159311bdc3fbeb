"""One cell of the frontier: a model fitted on a carrier, and judged under every budget.

I items · X windows · T steps
"""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

import hamts
from benchmarks.frontier_echoes import fresh_echoes
from benchmarks.frontier_grid import TENTH, Cell, Model
from benchmarks.frontier_sets import Carrier, Set, patch_lead
from hamts.checks import calibrate_thresholds
from hamts.config import PRESETS, MachineConfig, ModelConfig
from hamts.data.frame import to_panel
from hamts.data.patches import build_store
from hamts.fitting import Trained, ValidationTail, train_panel, validation_tail
from hamts.frontier import Point, measure_points, windows_at
from hamts.nn.budget import ThresholdTable
from hamts.nn.ham import HAMLayer
from hamts.nn.mixers_parts import fixed_bytes
from hamts.resolve import FitOptions, Plan, make_plan
from hamts.windows import StreamWindows

__all__ = [
    "BACKBONE", "LENGTHENED", "NO_CAP", "SIZES", "TRAINING", "Trial", "asked_of", "blocks_of", "by_parts",
    "checked_tail", "entry_bytes", "equal_bytes", "finite", "fit", "give_back", "judged", "live_window_bytes",
    "measure", "point_of", "scored",
]  # fmt: skip

# presets, one that a CPU can fit, and two sizes of about so many weights
SIZES: dict[str, dict[str, Any]] = {name: preset.model for name, preset in PRESETS.items()} | {
    "64": {"width": 64, "layers": 2, "heads": 2},
    "1M": {"width": 192, "layers": 2, "heads": 6},
    "10M": {"width": 384, "layers": 4, "heads": 12},
}
# of every model here: tokens know the events of their patch, the exact read starts open, sharp and with what is like
# the query at whatever age, and stays sharp in long histories
BACKBONE = {
    "event_context": True, "entry_bias": -1.0, "match_gain": 2.0, "queries_from_keys": True, "read_reference": 128,
    "rotary_share": 0.0,
}  # fmt: skip
# of every fit here: each stream is read once, in one pass, and asked at all echoes of what it has seen
TRAINING = {
    "batch_windows": 64, "context_patches": 64, "origins": 1, "prefix_patches": 1, "reset_share": 1.0,
    "recall_share": 1.0, "span_share": 0.0, "checks": 1,
}  # fmt: skip
# while histories are read thresholds follow the scores: the share asked for is the share that is kept
SERVED: dict[str, Any] = {"threshold": "quantile"}
# from which share of the steps on streams read up to how many patches before their window
LENGTHENED = (0.6, 768)
# validation forecasts of an item: at so many moments evenly apart, and at so many echoes
REGULAR_CHECKS, ECHO_CHECKS = 8, 16
BLOCKS = 20
# by which a cell was fitted and judged; those of others are not compared with it
REGISTRATION = 9
NO_CAP = 1 << 40
# memories of a network that is served by parts of the budget
PARTED = {"model": "parts", "recency": "parts, recency"}


def entry_bytes(config: ModelConfig) -> int:
    """Bytes of one scratchpad entry of this shape."""
    with torch.device("meta"):
        return HAMLayer(config).empty_memory(1, 1, torch.zeros(1)).scratchpad.bytes_per_entry()


def equal_bytes(carrier: Carrier, spec: Set, share: float, config: ModelConfig) -> int:
    """Bytes of the scratchpads of an item of which such a share of tokens was kept, in all layers.

    Of all tokens that a score can keep: those of event columns it cannot.
    """
    scored = [names for role, names in carrier.roles.items() if isinstance(names, list) and role != "event_cols"]
    tokens = carrier.rows // spec.patch_steps * sum(map(len, scored))
    return int(share * tokens) * config.layers * entry_bytes(config)


def live_window_bytes(carrier: Carrier, spec: Set, budget: int, config: ModelConfig, *, state: bool) -> int:
    """Bytes that a window is built for so that what it holds takes those of HAM: it has room for a token of every
    column in every patch, and some are absent.

    Args:
        state: whether a state of HAM's size stands beside the window; else the window has its bytes, too.
    """
    columns = [name for names in carrier.roles.values() if isinstance(names, list) for name in names]
    present = total = 0
    for _, own in carrier.frame.groupby("unique_id", sort=False):
        patch = (np.arange(len(own)) + patch_lead(own, spec)) // spec.patch_steps
        there = own[columns].notna().groupby(patch).any()
        present, total = present + int(there.to_numpy().sum()), total + there.size
    if state:
        return int(budget * total / present)
    with torch.device("meta"):
        fixed = config.layers * fixed_bytes(HAMLayer(config).empty_memory(1, len(columns), torch.zeros(1)))
    return int((budget + fixed) * total / present - fixed)


@dataclass(frozen=True)
class Trial:
    """What a pilot changes in a fit.

    Attributes:
        watched: the loss of the fit is said at every check, and nothing else is checked; the last weights stay, as they
            do where there is one check.
        each: called before every batch.
        entries: steps are recorded as CUDA graphs, with room for so many entries a layer, no fewer than a stream can
            keep, so that none is thrown out; with kernel ``fla+triton``.
    """

    backbone: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    lengthened: tuple[float, int] = LENGTHENED
    kernel: str = "torch"
    watched: bool = False
    each: Callable[[StreamWindows], None] | None = None
    entries: int | None = None


def fit(
    carrier: Carrier, spec: Set, model: Model, *, rate: float, seed: int, budget: int, size: str = "small",
    max_steps: int | None = None, accelerator: str = "auto", trial: Trial | None = None,
) -> Trained:  # fmt: skip
    """Fit on everything before the test rows; nothing is read afterwards."""
    trial = trial or Trial()
    seen = carrier.frame.groupby("unique_id", sort=False).head(carrier.rows - carrier.test_rows)
    panel = to_panel(seen, **carrier.roles)
    options = FitOptions(
        h=spec.h, budget_bytes=budget, preset=size if size in PRESETS else "small", **model.options,
        patch_steps=spec.patch_steps, val_size=carrier.test_rows // 2, max_steps=max_steps or spec.steps,
        learning_rate=rate, seed=seed,
        machine=MachineConfig(accelerator=accelerator, kernel=trial.kernel, cuda_graphs=trial.entries is not None),
    )  # fmt: skip
    plan = make_plan(panel, options)
    plan = replace(
        plan,
        model=replace(plan.model, **{**SIZES[size], **BACKBONE, **trial.backbone}),
        train=replace(plan.train, **{**TRAINING, **trial.training}),
        memory=replace(plan.memory, **SERVED),
    )
    tail = checked_tail(panel, plan, carrier, spec)
    longer = (int(trial.lengthened[0] * (max_steps or spec.steps)), trial.lengthened[1])
    echoes = fresh_echoes(carrier, spec, panel, seed, lengthen=longer)
    if trial.each is not None and echoes is not None:
        echoes = _both(trial.each, echoes)
    if trial.entries is not None and echoes is not None:
        echoes = _both(echoes, _give_room)
    if trial.watched:
        tail = replace(tail, cutoffs=[cuts[:0] for cuts in tail.cutoffs])
    fitted_by = plan if trial.entries is None else roomy(plan, trial.entries)
    with one_choice_of_kernels() if "fla" in trial.kernel else contextlib.nullcontext():
        trained = train_panel(panel, fitted_by, tail=tail, verbose=trial.watched, progress=False, augment=echoes)
    trained.network.memory_config = plan.memory
    trained = replace(trained, plan=plan)
    if "mixer" not in model.options:
        calibrate(trained, tail.ends, gpu=torch.cuda.is_available() and accelerator != "cpu")
    return trained


def _give_room(windows: StreamWindows) -> None:
    """As many entries as the streams of the next batch can keep: fewer where they are short."""
    before = max(windows.prefixes or (windows.config.prefix_patches,))
    windows.room = len(windows.store.roles) * (before + windows.config.context_patches)


def roomy(plan: Plan, entries: int) -> Plan:
    """The same plan with room for so many entries a layer, all of them kept by score: a graph has a fixed size."""
    room = entries * plan.model.layers * entry_bytes(plan.model)
    return replace(plan, memory=replace(plan.memory, budget_bytes=room, must_keep_share=0.0))


def one_choice_of_kernels() -> contextlib.AbstractContextManager[None]:
    """Nothing of the recurrence is tuned: in float32 that takes longer than such a fit."""
    from hamts.ops.gated_delta_trial import untuned

    return untuned()


def _both(
    one: Callable[[StreamWindows], None], other: Callable[[StreamWindows], None]
) -> Callable[[StreamWindows], None]:
    def run(windows: StreamWindows) -> None:
        one(windows)
        other(windows)

    return run


def calibrate(trained: Trained, ends: np.ndarray, *, gpu: bool) -> None:
    """Set thresholds from whole histories, as long as those judged: routers then take about the bytes asked for."""
    network, plan = trained.network, trained.plan
    store = build_store(trained.panel, patch_steps=plan.model.patch_steps, extra_steps=0, time_unit=plan.time_unit)
    network.to("cuda" if gpu else "cpu")
    calibrate_thresholds(network, store, ends, share=TENTH, patches=int(store.row_count.max()))
    network.cpu()


def by_parts(trained: Trained, carrier: Carrier, spec: Set, *, gpu: bool) -> Trained:
    """The same weights with one threshold for all layers, and parts of the budget that come of it."""
    network = copy.deepcopy(trained.network)
    network.config = replace(network.config, allocation="pooled")
    for layer in network.backbone.layers():
        layer.thresholds = ThresholdTable(len(layer.router.names), allocation="pooled")
    served = replace(trained, network=network)
    calibrate(served, checked_tail(trained.panel, trained.plan, carrier, spec).ends, gpu=gpu)
    return served


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
    began = time.perf_counter()
    gpu = torch.cuda.is_available() and how.get("accelerator") != "cpu"
    trained = fit(carrier, spec, row, rate=rate, seed=cell.seed, budget=budget, size=size, **how)
    fit_s = time.perf_counter() - began
    give_back(peak=False)
    told = {"rate": rate, "budget_bytes": budget, "size": size, "fit_s": fit_s}
    return scored(cell, row, trained, carrier, spec, told=told, gpu=gpu, began=began)


def scored(
    cell: Cell, row: Model, trained: Trained, carrier: Carrier, spec: Set, *, told: dict[str, Any], gpu: bool,
    began: float, parted: bool = True, timed: tuple[str, ...] = ("model",),
) -> dict[str, Any]:  # fmt: skip
    """One fitted model under every budget, ``parted`` also served by parts of it; of which memories steps are timed."""
    seed, share, device = cell.seed, cell.share, "cuda" if gpu else "cpu"
    panel, windows, parts = judged(trained, carrier, spec)
    points = measure_points(
        trained, panel, windows, shares=row.shares, memories=("model", *row.controls),
        control_shares=row.control_shares, seed=seed, timed=timed, device=device,
    )  # fmt: skip
    if parted and "mixer" not in row.options and row.controls:
        found = measure_points(
            by_parts(trained, carrier, spec, gpu=gpu), panel, windows, shares=row.control_shares,
            memories=("model", "recency"), seed=seed, timed=("model",), device=device,
        )  # fmt: skip
        points = [*points, *(replace(point, memory=PARTED[point.memory]) for point in found)]
    return {
        "registration": REGISTRATION, "set": cell.set, "model": cell.model, "size": told["size"],
        "seed": seed, "rate": told["rate"], "equal_to_share": share,
        "budget_bytes": told["budget_bytes"],
        "fit_s": round(told["fit_s"], 1), "steps": trained.report.steps,
        "validation": finite(trained.report.best_score), "best_step": trained.report.best_step,
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


def give_back(*, peak: bool = True) -> None:
    """Memory of a GPU that others need; and the count of it starts anew."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        if peak:
            torch.cuda.reset_peak_memory_stats()
