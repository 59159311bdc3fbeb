"""Pilot of the frontier: which protocol of training teaches full attention to recall an echo, at equal seconds.

``python -m benchmarks.frontier_pilot --seconds 130 --folder out`` fits the variants side by side for so long, and says
the loss at held-out echoes and elsewhere as it goes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import frontier
from benchmarks.frontier_echoes import fresh_echoes
from benchmarks.frontier_grid import MODELS
from benchmarks.frontier_sets import SETS
from benchmarks.side_by_side import Job, run_jobs
from hamts.checks import VALIDATION_WARMUP_PATCHES, Run, validation_score
from hamts.config import MachineConfig
from hamts.data.frame import to_panel
from hamts.fitting import train_panel
from hamts.resolve import FitOptions, make_plan

# streams and patches of a step
SHORT = {"batch_windows": 64, "context_patches": 64, "prefix_patches": 1}
MIDDLE = {**SHORT, "batch_windows": 32, "context_patches": 128}
LONG = {**SHORT, "batch_windows": 16, "context_patches": 256}
OPEN, SHARP = {"entry_bias": -1.0}, {"entry_bias": -1.0, "match_gain": 2.0}
VARIANTS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "epf-attention-64": ("epf", "attention", SHORT, {}),
    "epf-attention-64-sharp": ("epf", "attention", SHORT, SHARP),
    "epf-attention-64-sharp-apart": ("epf", "attention", SHORT, {**SHARP, "event_context": False}),
    "epf-attention-128-sharp": ("epf", "attention", MIDDLE, SHARP),
    "epf-attention-256-sharp": ("epf", "attention", LONG, SHARP),
    "epf-recurrent-64": ("epf", "recurrent", SHORT, {}),
    "epf-learned-64-sharp": ("epf", "learned", SHORT, SHARP),
    "household-attention-64": ("household", "attention", SHORT, {}),
    "household-attention-64-open": ("household", "attention", SHORT, OPEN),
    "household-attention-64-sharp": ("household", "attention", SHORT, SHARP),
    "household-attention-64-sharper": ("household", "attention", SHORT, {"entry_bias": 0.0, "match_gain": 3.0}),
    "household-attention-128-sharp": ("household", "attention", MIDDLE, SHARP),
    "household-recurrent-64": ("household", "recurrent", SHORT, {}),
    "household-surprise-64-sharp": ("household", "surprise", SHORT, SHARP),
}


def perform(task: tuple[str, float, int, Path, str]) -> str:
    """Fit one variant for so many seconds."""
    name, seconds, width, folder, accelerator = task
    began = time.monotonic()
    torch.set_float32_matmul_precision("high")
    which, label, train, model = VARIANTS[name]
    spec, carrier = SETS[which], frontier.load(which)
    seen = carrier.frame.groupby("unique_id", sort=False).head(carrier.rows - carrier.test_rows)
    panel = to_panel(seen, **carrier.roles)
    options = FitOptions(
        h=spec.h, budget_bytes=frontier.NO_CAP, preset="small", **MODELS[label].options, patch_steps=spec.patch_steps,
        val_size=carrier.test_rows // 2, max_steps=1 << 20, seed=0,
        machine=MachineConfig(accelerator=accelerator, kernel="torch"),
    )  # fmt: skip
    plan = make_plan(panel, options)
    plan = replace(
        plan,
        model=replace(plan.model, width=width, layers=2, heads=width // 32, **{**frontier.BACKBONE, **model}),
        train=replace(plan.train, **{**frontier.TRAINING, "checks": 6, "patience": 99, "max_time_s": seconds, **train}),
    )
    tail = frontier.checked_tail(panel, plan, carrier, spec)
    parts: dict[str, list[np.ndarray]] = {"regular": [], "day": [], "week": [], "month": [], "year": []}
    for item, cuts in zip(panel.item_ids, tail.cutoffs, strict=True):
        own = frontier.asked_of(carrier, item)
        ages = {int(a) + 1: age for a, age in zip(own["asked"], own["age"], strict=True)}
        for part, lists in parts.items():
            lists.append(np.array([c for c in cuts if ages.get(int(c), "regular") == part], dtype=np.int64))
    lines: list[dict[str, Any]] = []

    def scored(run: Run) -> float:
        both = {
            part: validation_score(
                run.checked, run.task.store, lists, horizon=spec.h, share=0.1, warmup=VALIDATION_WARMUP_PATCHES
            )
            for part, lists in parts.items()
            if any(map(len, lists))
        }
        lines.append({"s": round(run.seconds, 1), **{k: round(v, 4) for k, v in both.items()}})
        echoes = [both[part] for part in ("day", "week", "month") if part in both]
        return float(np.mean(echoes))

    Run._score = scored  # type: ignore[method-assign]
    trained = train_panel(
        panel, plan, tail=tail, verbose=False, progress=False, augment=fresh_echoes(carrier, spec, panel, 0)
    )
    for line, check in zip(lines, trained.report.history, strict=False):
        line["step"], line["train"] = check["step"], round(check["train_loss"], 4)
    said = {
        "name": name, "steps": trained.report.steps, "fit_s": trained.report.seconds,
        "s": round(time.monotonic() - began, 1), "lines": lines,
        "count": {part: sum(map(len, lists)) for part, lists in parts.items()},
        "peak": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0,
        "reserved": torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else 0,
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(said, indent=1))
    return "\n".join(str(x) for x in ({k: v for k, v in said.items() if k != "lines"}, *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=130.0)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--end-time", type=float, default=1e9)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--folder", type=Path, default=Path("pilot"))
    told = parser.parse_args()
    told.folder.mkdir(parents=True, exist_ok=True)
    jobs = [Job(v, (v, told.seconds, told.width, told.folder, told.accelerator)) for v in told.variants]
    run_jobs(jobs, perform, workers=told.workers, begin_within_s=1e9, end_within_s=told.end_time)


if __name__ == "__main__":
    main()
