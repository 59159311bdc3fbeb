"""Pilot of the frontier: what makes recall that was learned in short histories hold in long ones.

``python -m benchmarks.frontier_pilot --workers 15 --folder out`` fits each variant for as many steps with a seed that
no cell uses, and reads the histories of validation rows from their first row, as a cell reads those of the test rows.
Rivals that attend are also read with the same weights in other ways, which tells apart what fails in a long history:

    sharp    logits times log(keys) / log(128), though they were not trained so: undoes a diluted softmax, moves nothing
    near     only the last 335 patches, those of ``window`` at a tenth: no long list, and no age beyond them

``--table`` prints what is there. Losses are weighted quantile losses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.frontier_cell import LENGTHENED, SIZES, Trial, equal_bytes, finite, fit, give_back, judged, point_of
from benchmarks.frontier_grid import MODELS
from benchmarks.frontier_lines import markdown
from benchmarks.frontier_sets import SETS, Carrier, load
from benchmarks.side_by_side import Job, run_jobs
from hamts.config import ModelConfig
from hamts.fitting import Trained
from hamts.frontier import Point, measure_points

RESULTS = Path(__file__).parent / "results" / "frontier" / "pilot3"
SEED, RATE, TENTH, NEAR = 7, 3e-3, 0.1, 335
REFERENCE = 128
# so often a fit says its loss
CHECKS = 16
# for each step of a fit, and for reading all histories
FIT_SECONDS, READING_SECONDS = 0.36, 60.0
PLAIN: dict[str, Any] = {"read_reference": 0, "queries_from_keys": False}
LOG: dict[str, Any] = {"read_reference": REFERENCE, "queries_from_keys": False}
UNTURNED: dict[str, Any] = {**PLAIN, "rotary_share": 0.0}
SHORT: tuple[dict[str, Any], tuple[float, int]] = ({"batch_windows": 32, "context_patches": 128}, (1.0, 1))
LONG: tuple[dict[str, Any], tuple[float, int]] = (
    {"batch_windows": 16, "context_patches": 128, "prefix_patches": 2048}, (1.0, 1),
)  # fmt: skip
# first as short ones, then up to so many patches more
THEN_LONG: tuple[dict[str, Any], tuple[float, int]] = ({}, LENGTHENED)


@dataclass(frozen=True)
class Variant:
    """One fit: a model on a set, and what differs from the grid's protocol."""

    set: str
    model: str
    backbone: dict[str, Any]
    training: dict[str, Any]
    lengthened: tuple[float, int]
    times: float = 1  # as many steps as the grid
    kernel: str = "torch"


WAYS = {
    "log, long": (LOG, LONG), "long": (PLAIN, LONG), "log, then long": (LOG, THEN_LONG),
    "then long": (PLAIN, THEN_LONG), "log": (LOG, SHORT), "as is": (PLAIN, SHORT), "unturned": (UNTURNED, SHORT),
    "unturned, log": ({**UNTURNED, **LOG}, SHORT),
}  # fmt: skip


# the grid's protocol, and what might teach attention more
AGAIN: dict[str, tuple[dict[str, Any], float]] = {
    "grid": ({}, 1), "grid, twice": ({}, 2), "grid, half more": ({}, 1.5),
    "grid, 128 patches": ({"batch_windows": 32, "context_patches": 128}, 1),
    "grid, 128 patches, twice": ({"batch_windows": 32, "context_patches": 128}, 2),
}  # fmt: skip
OPEN: dict[str, Any] = {"gate_start": 3.0}


def _variants() -> dict[str, Variant]:
    found = {}
    for way, (training, times) in AGAIN.items():
        for model in ("attention", "recurrent", "gdn_gsa", "mix", "learned", "learned-token"):
            for name in ("epf", "household", "epf-old", "household-old"):
                found[f"{name}, {model}, {way}"] = Variant(name, model, {}, training, LENGTHENED, times)
                found[f"{name}, {model}, {way}, open"] = Variant(name, model, OPEN, training, LENGTHENED, times)
                found[f"{name}, {model}, {way}, open, kernels"] = Variant(
                    name, model, OPEN, training, LENGTHENED, times, "fla+triton"
                )
    for way, (backbone, (training, lengthened)) in WAYS.items():
        for model in ("learned", "attention", "recurrent", "window"):
            for name in ("household", "epf"):
                found[f"{name}, {model}, {way}"] = Variant(name, model, backbone, training, lengthened)
    return found


VARIANTS = _variants()


def before_test(carrier: Carrier) -> Carrier:
    """The same without its test rows: those of validation are the last."""
    rows = carrier.rows - carrier.test_rows
    seen = carrier.frame.groupby("unique_id", sort=False).head(rows)
    return replace(carrier, frame=seen, rows=rows, test_rows=carrier.test_rows // 2)


def sharp(layer: Any) -> None:
    layer.exact.read_reference = REFERENCE


def near(layer: Any) -> None:
    if hasattr(layer, "patches"):
        layer.patches = NEAR


READINGS: dict[str, tuple[Callable[[Any], None], ...]] = {
    "sharp": (sharp,),
    "near": (near,),
    "near, sharp": (near, sharp),
}


def read_otherwise(trained: Trained, how: tuple[Callable[[Any], None], ...]) -> None:
    """Change how the layers of a rival read; weights stay."""
    for layer in trained.network.backbone.layers():
        for change in how:
            change(layer)


def file_of(name: str) -> str:
    return name.replace(", ", "--").replace(" ", "-")


def seconds_of(variant: Variant) -> float:
    """What it takes at most, ten at a time on an H100."""
    return FIT_SECONDS * variant.times * SETS[variant.set].steps + READING_SECONDS


def fitted(name: str, folder: Path, how: dict[str, Any], carrier: Carrier) -> Trained:
    """Fit one variant; what its loss is goes to a file meanwhile."""
    variant, size = VARIANTS[name], how.get("size", "1M")
    spec, row = SETS[variant.set], MODELS[variant.model]
    budget = equal_bytes(carrier, spec, TENTH, ModelConfig(**SIZES[size])) if row.sized else 1 << 40
    time_limit = {"max_time_s": how["max_time_s"]} if "max_time_s" in how else {}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{file_of(name)}.log").open("w") as said_by_fit, contextlib.redirect_stdout(said_by_fit):
        return fit(
            carrier, spec, row, rate=RATE, seed=SEED, budget=budget, size=size,
            max_steps=how.get("max_steps", int(variant.times * spec.steps)),
            accelerator=how.get("accelerator", "auto"),
            trial=Trial(
                backbone=variant.backbone, training={"checks": CHECKS, **variant.training, **time_limit},
                lengthened=variant.lengthened, kernel=variant.kernel, watched=True,
            ),
        )  # fmt: skip


def read(
    trained: Trained, seen: Carrier, variant: Variant, *, gpu: bool
) -> tuple[dict[str, list[Point]], dict[str, np.ndarray]]:
    """Points of every way to read, and which windows each part of them holds."""
    panel, windows, parts = judged(trained, seen, SETS[variant.set])
    told: dict[str, Any] = {"timed": (), "device": "cuda" if gpu else "cpu", "seed": SEED}
    if "mixer" not in MODELS[variant.model].options:
        told |= {"shares": (0.0, 0.02, TENTH, 1.0), "memories": ("model", "random", "recency")}
        told |= {"control_shares": (TENTH,)}
    try:
        points = {"": measure_points(trained, panel, windows, **told)}
    except RuntimeError as error:
        # memory that ran out, or a device that failed, is no matter of thresholds
        fixed = trained.network.memory_config.threshold == "fixed"
        if fixed or isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
            raise
        # a fit is not lost for it, and what it was read with is written down
        print(f"{variant}: read with thresholds that stand still, for others failed: {error}", flush=True)
        trained.network.memory_config = replace(trained.network.memory_config, threshold="fixed")
        points = {"": measure_points(trained, panel, windows, **told)}
    if variant.model == "attention":
        scaled = trained.plan.model.read_reference > 0
        for label, changes in {"near": (near,)}.items() if scaled else READINGS.items():
            fresh = replace(trained, network=trained.network)
            before = [(layer.exact.read_reference, layer.patches) for layer in trained.network.backbone.layers()]
            read_otherwise(fresh, changes)
            points[label] = measure_points(fresh, panel, windows, **told)
            for layer, (reference, patches) in zip(trained.network.backbone.layers(), before, strict=True):
                layer.exact.read_reference, layer.patches = reference, patches
    return points, parts


def perform(task: tuple[str, Path, dict[str, Any], float]) -> str:
    """Fit one variant, read, and write what came of it."""
    name, folder, how, gpu_share = task
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("high")
    give_back()
    gpu = torch.cuda.is_available() and how.get("accelerator") != "cpu"
    if gpu and gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_share)
    variant, began = VARIANTS[name], time.monotonic()
    carrier, row = load(variant.set), MODELS[variant.model]
    trained = fitted(name, folder, how, carrier)
    fit_s = time.monotonic() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else None
    give_back(peak=False)
    points, parts = read(trained, before_test(carrier), variant, gpu=gpu)
    ham = "mixer" not in row.options
    history = trained.report.history
    said = {
        "name": name, "set": variant.set, "model": variant.model, "backbone": variant.backbone,
        "training": variant.training, "lengthened": variant.lengthened,
        "seed": SEED, "kernel": trained.report.kernel, "threshold": trained.network.memory_config.threshold,
        "losses": [{name: finite(one[name]) for name in ("step", "seconds", "train_loss")} for one in history],
        "steps": trained.report.steps, "fit_s": round(fit_s, 1),
        "s": round(time.monotonic() - began, 1), "peak_gib": peak, "validation": finite(trained.report.best_score),
        "windows": {part: int(chosen.sum()) for part, chosen in parts.items()},
        "points": [
            {"reading": label, **point_of(point, parts, TENTH if row.sized else None, rival=not ham)}
            for label, found in points.items()
            for point in found
        ],
    }  # fmt: skip
    (folder / f"{file_of(name)}.json").write_text(json.dumps(said, indent=1) + "\n")
    scores = [
        f"{p['reading'] or p['memory']} {p['share']}: {p['parts']['events']['WQL']:.4f}/{p['parts']['all']['WQL']:.4f}"
        for p in said["points"]
    ]
    return f"{said['s']} s, of them {fit_s:.0f} s of {said['steps']} steps, peak {peak}; " + ", ".join(scores)


def table(folder: Path) -> str:
    """Loss of every part, and inside events against ``recurrent`` of the same set as it is, in percent."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    base = {
        one["set"]: one["points"][0]["parts"]["events"]["WQL"]
        for one in found
        if one["name"].endswith(("recurrent, as is", "recurrent, grid"))
    }
    rows = []
    for one in found:
        for point in one["points"]:
            label = [one["name"], point["reading"], "" if point["memory"] == "model" else point["memory"]]
            share = point["share"] if one["model"] != "window" else None
            events = point["parts"]["events"]["WQL"]
            row = {"variant": ", ".join(filter(None, label)), "share": "" if share is None else share}
            row |= {part: scores["WQL"] for part, scores in point["parts"].items()}
            against = f"{100 * (events / base[one['set']] - 1):+.1f}" if one["set"] in base else ""
            rows.append(
                {
                    **row,
                    "events, against recurrent": against,
                    "attention": point["scratchpad_attention"],
                    "took": point["usage_share"],
                }
            )
    return markdown(pd.DataFrame(rows).fillna(""))


def fits(folder: Path) -> str:
    """Milliseconds a step, of short streams and of long ones, and the loss of the fit as it went."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())
        if not one.get("losses"):
            continue
        steps, seconds, losses = (
            [check[name] for check in one["losses"]] for name in ("step", "seconds", "train_loss")
        )  # fmt: skip
        turn = max(i for i, step in enumerate(steps) if step <= one["lengthened"][0] * one["steps"])
        spans = {"short": (0, turn), "long": (turn, len(steps) - 1)}
        took = {
            f"ms a step, {name}": round(1e3 * (seconds[b] - seconds[a]) / (steps[b] - steps[a]))
            for name, (a, b) in spans.items()
            if b > a
        }
        said = " ".join(f"{loss:.3f}" for loss in losses)
        rows.append({"variant": one["name"], **took, f"loss of the fit at {len(losses)} moments": said})
    return markdown(pd.DataFrame(rows).fillna(""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--workers", type=int, default=15)
    parser.add_argument("--devices", nargs="+", default=[None], help="numbers of GPUs to spread the processes over")
    parser.add_argument("--most-seconds", type=float, help="of a fit")
    parser.add_argument("--end-time", type=float, default=1e9)
    parser.add_argument("--size", default="1M", choices=list(SIZES))
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    told = parser.parse_args()
    if not told.table:
        how = {"size": told.size, "accelerator": told.accelerator, "max_time_s": told.most_seconds}
        how = {name: value for name, value in {**how, "max_steps": told.max_steps}.items() if value is not None}
        # long lists need more room than their share
        each = len(told.devices) / told.workers
        room = {name: (1.6 if "long" in name else 0.9) * each for name in told.variants}
        jobs = [
            Job(name, (name, told.folder, how, min(room[name], 1.0)), seconds=seconds_of(VARIANTS[name]))
            for name in told.variants
        ]
        run_jobs(
            jobs,
            perform,
            workers=told.workers,
            begin_within_s=told.end_time,
            end_within_s=told.end_time,
            devices=told.devices,
        )
    print(table(told.folder))
    print(fits(told.folder))


if __name__ == "__main__":
    main()
