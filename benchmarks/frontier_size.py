"""Cells of the frontier with more weights: how a fit goes, said while it goes, and then what is recalled; and what
the routers of one folder come to against rivals of another, set by set (``--against``).

``python -m benchmarks.frontier_size --model learned --seed 0`` fits 10M weights on ``epf-old`` for as many steps as 1M
has, writes the loss of the fit and its speed to ``fits/``, and then the cell, which ``benchmarks.frontier --table``
reads; ``--fit-only`` stops before. ``--table`` prints how all fits of a folder went. ``--recorded`` runs the layers of
HAM on kernels and replays recorded steps: the same fit but for rounding, in less time. A cell that exists is not
measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from benchmarks.cells import write_cell
from benchmarks.frontier import budget_of
from benchmarks.frontier_answers import everything_kept
from benchmarks.frontier_cell import BACKBONE, LENGTHENED, SIZES, TRAINING, Trial, finite, fit, give_back, scored
from benchmarks.frontier_claims import by_seed
from benchmarks.frontier_files import read_cells
from benchmarks.frontier_grid import CONTROL_SHARES, MODELS, TENTH, Cell
from benchmarks.frontier_lines import ROUTERS, difference, markdown, parts_of
from benchmarks.frontier_sets import SETS, Carrier, load
from hamts.config import ModelConfig
from hamts.fitting import Trained
from hamts.windows import StreamWindows

RESULTS = Path(__file__).parent / "results" / "frontier" / "ninth-10M-960"
# so often a fit says its loss; its speed is said every so many batches
CHECKS, SAID = 24, 20
# steps at which every fit of 480 and of 960 says it
SHOWN = (40, 80, 120, 200, 280)


class Pace:
    """When batches were drawn."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.at: list[float] = []
        self.long: list[bool] = []

    def __call__(self, windows: StreamWindows) -> None:
        self.at.append(time.perf_counter())
        self.long.append(bool(windows.prefixes))
        n = len(self.at)
        if n > SAID and n % SAID == 1 and (n < 8 * SAID or n % (6 * SAID) == 1):
            took = (self.at[-1] - self.at[-1 - SAID]) / SAID
            print(f"{self.at[-1] - self.began:6.1f} s: batch {n}, {1e3 * took:.0f} ms each", flush=True)

    def milliseconds(self) -> dict[str, float | None]:
        """Mean of a short step and of a long one, those apart that wait for compilers and recordings."""
        took = torch.tensor(self.at).double().diff() * 1e3
        long = torch.tensor(self.long[:-1], dtype=torch.bool)
        each = {"short": took[~long], "long": took[long]}
        return {name: finite(float(x[len(x) // 4 :].mean())) for name, x in each.items() if len(x) > 3}


def table(folder: Path) -> str:
    """Loss of every fit after so many steps, at the end of short streams, and over the last quarter."""
    rows = []
    for path in sorted((folder / "fits").glob("*.json")):
        one = json.loads(path.read_text())
        losses, steps = dict(one["losses"]), one["steps"]
        short = max(step for step in losses if step <= LENGTHENED[0] * steps)
        last = [loss for step, loss in losses.items() if step > 0.75 * steps]
        rows.append(
            {"set": one["set"], "model": one["model"], "seed": one["seed"], "rate": one["rate"], "steps": steps}
            | {"kernel": one["kernel"] + (", recorded" if one["recorded"] else "")}
            | {
                "ms, short and long": ", ".join(f"{ms:.0f}" for ms in one["ms_each"].values() if ms),
                "fit, s": one["fit_s"],
            }
            | {f"loss after {step}": round(losses[step], 3) if step in losses else "" for step in SHOWN}
            | {"short, last": round(losses[short], 3), "last quarter": round(sum(last) / len(last), 4)}
        )
    return markdown(pd.DataFrame(rows))


def answer(folder: Path, rivals: Path) -> str:
    """Fits of routers, each with its own weights, and their differences to what keeps as much, and to rivals of
    these bytes at each rate that they were fitted at: one folder holds routers, both hold rivals, or one holds all."""
    ours = read_cells(folder)
    others = [] if rivals.resolve() == folder.resolve() else read_cells(rivals)
    routers = [cell for cell in ours if cell["model"] in ROUTERS]
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in routers):
        for memory in ("shuffled", "random", "recency"):
            rows.append((model, memory, routers, ""))
        for where in (ours, others):
            for rival in sorted({cell["model"] for cell in where} - set(ROUTERS)):
                own = [cell for cell in where if cell["model"] == rival]
                rows.append((model, rival, [*routers, *own], f" at {own[0]['rate']:g}"))
    found = []
    for model, other, cells, rate in rows:
        two = (model, other) if other in ("shuffled", "random", "recency") else (other, "model")
        sets = dict.fromkeys(cell["set"] for cell in cells)
        for name, share, part in itertools.product(sets, CONTROL_SHARES, parts_of(cells)):
            one = difference(cells, name, (model, "model"), two, share, part)
            if one is not None:
                shown = {"set": name, "share": f"{100 * share:g} %", "router": model, "against": other + rate}
                shown |= {"part": part, "seeds": one["seeds"]}
                apart = f"{100 * one['difference']:+.1f} [{100 * one['low']:+.1f}, {100 * one['high']:+.1f}]"
                bytes_ratio = f"{one['bytes_ratio']:.3f}"
                found.append({**shown, "difference": apart, "bytes": bytes_ratio, "verdict": one["verdict"]})
    texts = [everything_kept(ours), by_seed(routers), pd.DataFrame(found)]
    return "\n\n".join(markdown(frame) for frame in texts if len(frame))


def columns_of(carrier: Carrier) -> int:
    return sum(len(names) for names in carrier.roles.values() if isinstance(names, list))


def fit_of(cell: Cell, carrier: Carrier, told: Any, pace: Pace, budget: int) -> Trained:
    """The fit, as in the grid but for what says how it goes."""
    spec = SETS[cell.set]
    ham = "mixer" not in MODELS[cell.model].options
    tokens = columns_of(carrier) * (max(spec.lengths) + TRAINING["context_patches"])
    trial = Trial(
        training={"checks": CHECKS}, watched=True, each=pace, kernel=told.kernel if ham else "torch",
        entries=tokens if told.recorded and ham else None,
    )  # fmt: skip
    return fit(
        carrier, spec, MODELS[cell.model], rate=told.rate, seed=cell.seed, budget=budget, size=told.size,
        max_steps=told.max_steps, accelerator=told.accelerator, trial=trial,
    )  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="epf-old", choices=list(SETS))
    parser.add_argument("--model", default="learned", choices=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", default="10M", choices=list(SIZES))
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--max-steps", type=int, help="optimiser steps; default those of the set")
    parser.add_argument("--kernel", default="torch", help="of the layers of HAM")
    parser.add_argument("--recorded", action="store_true", help="record steps; with --kernel fla+triton")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--fit-only", action="store_true", help="write how the fit goes, and no cell")
    parser.add_argument("--untimed", action="store_true", help="no milliseconds: those of another seed are the same")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--against", type=Path, help="only print what a folder answers, with rivals of this one, too")
    parser.add_argument("--table", action="store_true", help="only print how the fits of a folder went")
    return parser.parse_args()


def main() -> None:
    told = options()
    if told.against:
        print(answer(told.folder, told.against))
        return
    if told.table:
        print(table(told.folder))
        return
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("high")
    row = MODELS[told.model]
    cell = Cell(told.set, told.model, told.seed, TENTH if row.sized else None)
    path = told.folder / f"{cell.name}.json"
    if path.exists():
        print(f"{path.name} is there")
        return
    began, carrier = time.perf_counter(), load(told.set)
    shape = ModelConfig(**SIZES[told.size], **BACKBONE)
    budget, pace = budget_of(cell, carrier, SETS[told.set], shape), Pace()
    trained = fit_of(cell, carrier, told, pace, budget)
    fit_s, gpu = time.perf_counter() - began, torch.cuda.is_available() and told.accelerator != "cpu"
    how = {
        "kernel": trained.report.kernel, "recorded": told.recorded, "ms_each": pace.milliseconds(),
        "losses": [[int(one["step"]), finite(one["train_loss"])] for one in trained.report.history],
    }  # fmt: skip
    fits = told.folder / "fits" / f"{cell.name}--{told.rate:g}--{trained.report.steps}.json"
    write_cell(fits, {"set": cell.set, "model": cell.model, "size": told.size, "seed": cell.seed, "rate": told.rate,
                 "steps": trained.report.steps, "fit_s": round(fit_s, 1), **how})  # fmt: skip
    losses = " ".join(f"{loss:.3f}" for _, loss in how["losses"])
    print(f"{fits.name}: {fit_s:.0f} s, {how['ms_each']}, losses {losses}", flush=True)
    if told.fit_only:
        return
    give_back(peak=False)
    few = row if row.sized else replace(row, control_shares=(TENTH,))
    said = {"rate": told.rate, "budget_bytes": budget, "size": told.size, "fit_s": fit_s}
    timed = () if told.untimed else ("model",)
    result = scored(
        cell, few, trained, carrier, SETS[told.set], told=said, gpu=gpu, began=began, parted=False, timed=timed
    )
    write_cell(path, {**result, **how})
    events = [f"{p['memory']} {p['share']}: {p['parts']['events']['WQL']:.4f}" for p in result["points"]]
    print(f"{path.name}: {result['s']} s, peak {result['peak_gib']} GiB; events " + ", ".join(events), flush=True)


if __name__ == "__main__":
    main()
