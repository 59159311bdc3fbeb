"""Which training lets small probe networks solve a rung? The pilot of contract 5: validation errors, seeds of its own.

    python -m benchmarks.probe_pilot                       # the table of what is on disk
    python -m benchmarks.probe_pilot --run --device cuda   # train what is missing, with --only topo some of it

Seeds 100 and above are never those of the table; sequences are those of validation. ``hidden``: share of the sequences
of a batch whose questions do not see the state while everything is kept (HAM alone). ``early``: edges of topo are asked
about after a fifth of the steps, of few nodes still; ``shallow``: its paths of two hops are one hop long at first.
``weight``: of the auxiliary target; ``named``: layers (the first is 0) after which its parts are told, one each, none:
all after the last. ``bias``: what is added at first to the logits of HAM's entries. ``reading``: of 64
rows, and everything is kept from first to last, at the checks too: is reading learned at all?
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from probes import stacked_run, stacked_train
from probes.registry import TARGET_WEIGHT, get_probe
from probes.runner_plan import Cell, RunPlan, critical_rows
from probes.stacked import StackedNet, StackedReading
from probes.stacked_data import Decisions, Rows
from probes.train import TrainPlan

RESULTS = Path(__file__).parent / "results" / "probes" / "pilot" / "contract5.jsonl"
GRAPH = ((0.1, {"form": "graph", "hop0_share": 1.0}), (0.1, {"form": "graph"}))
CURRICULA: dict[str, Any] = {
    "": None,
    "contract 4": ((0.2, {"form": "graph", "hop0_share": 1.0}), (0.2, {"form": "graph"}), (0.6, {})),
    "early": (*GRAPH, (0.8, {})),
    "shallow": (*GRAPH, (0.4, {"shallow_share": 0.7}), (0.4, {})),
    # channel pairs: nothing but moments fires at first
    "quiet first": ((0.3, {"carrier": "none", "noise": 0.05}), (0.7, {})),
    # a flag names the moment, and a channel fires at two levels alone, so that a linear map can match it
    "flag first": (
        (0.2, {"carrier": "none", "noise": 0.05, "flag": True, "levels": 2}),
        (0.2, {"flag": True, "levels": 2}),
        (0.2, {"flag": True, "levels": 4}),
        (0.4, {}),
    ),
    "shallow first": (*GRAPH, (0.3, {"shallow_share": 1.0}), (0.2, {"shallow_share": 0.5}), (0.3, {})),
}
RATES = (0.002, 0.004)
SHORT = {"context_rows": 64, "items": 4, "queries": 4}


@dataclass(frozen=True)
class Trial:
    """Networks of one rung that read the same sequences."""

    rung: str
    lines: tuple[str, ...]  # models, HAM as ham:ROUTER
    seeds: tuple[int, ...] = (100, 101, 102)
    steps: int = 2_500
    hidden: float = 0.0
    curriculum: str = ""
    weight: float = TARGET_WEIGHT
    entry_bias: float = -4.0
    reading: bool = False
    rates: tuple[float, ...] = RATES
    short: bool = False  # 64 rows and 4 items, as ``reading`` asks of
    named: tuple[int, ...] = ()


def trials() -> Iterator[Trial]:
    """All, the most important first."""
    full = ("full",)
    for curriculum, weight, steps in (("early", 1.0, 2_500), ("early", 3.0, 2_500), ("contract 4", 1.0, 2_500),
                                      ("early", 1.0, 1_500), ("contract 4", TARGET_WEIGHT, 2_500)):  # fmt: skip
        yield Trial("topo/topo", full, curriculum=curriculum, weight=weight, steps=steps)
    for curriculum, weight, steps in (("early", 1.0, 2_500), ("shallow", 1.0, 2_500), ("shallow first", 1.0, 2_500),
                                      ("shallow first", 3.0, 3_500)):  # fmt: skip
        yield Trial("topo/topo2", full, curriculum=curriculum, weight=weight, steps=steps)
    yield from _unsolved()
    yield Trial("topo/topoG", full, (100, 101), curriculum="early", weight=1.0)
    for rung in ("xcb/xcbG", "xcb/xcbC", "xcb/xcb", "pbc/pbcS"):
        yield Trial(rung, full)
    for rung in ("xcb/xcbF", "act/actS", "rrr/rrr", "der/derD", "der/exo", "pbc/pbcA", "pbc/pbcR"):
        yield Trial(rung, full, (100, 101))
    yield Trial("act/act", full, (100, 101), rates=(0.002, 0.004, 0.01))
    for hidden in (0.5, 0.0, 1.0):
        yield Trial("pbc/pbcS", ("ham:oracle", "ham:learned", "ham:mix"), hidden=hidden)
    for rung, second in (("pbc/pbc0", "learned"), ("act/act", "learned"), ("xcb/xcb", "learned"), ("rrr/rrr", "mix")):
        for hidden in (0.5, 0.0):
            yield Trial(rung, ("ham:oracle", f"ham:{second}"), hidden=hidden)
    yield Trial(
        "topo/topo", ("ham:oracle", "ham:learned", "ham:mix"), hidden=0.5, curriculum="early", weight=1.0
    )  # fmt: skip
    for hidden in (0.5, 0.0):
        for bias in (0.0, -4.0):
            yield Trial(
                "pbc/pbc0", ("ham:surprise",), (102,), 400, hidden, entry_bias=bias, reading=True, rates=(0.002,)
            )
        yield Trial("act/act", ("ham:surprise",), (100, 102), 400, hidden, entry_bias=0.0, reading=True, rates=(0.002,))
    yield Trial("pbc/pbc0", full, (102,), 400, reading=True, rates=(0.002,))


def _unsolved() -> Iterator[Trial]:
    """After contract 5: what the two rungs need that full attention does not solve."""
    full = ("full",)
    yield Trial("xcb/xcbP", full)
    yield Trial("xcb/xcbP", full, curriculum="quiet first")
    yield Trial("topo/topo2", full, curriculum="shallow first", weight=3.0, steps=5_000)
    # each hop told where it happens
    for curriculum, named in (("shallow first", (0, 1)), ("shallow first", (1, 2)), ("early", (0, 1))):
        yield Trial("topo/topo2", full, curriculum=curriculum, weight=3.0, named=named)
    yield Trial("xcb/xcbP", full, curriculum="flag first")


def run(trial: Trial, device: str) -> list[dict[str, Any]]:
    """Train the networks of a trial; a record each."""
    probe = get_probe(trial.rung)[0]
    kind: Any = type(probe)
    before = kind.curriculum, kind.target_weight, kind.named_after
    kind.target_weight, kind.named_after = trial.weight, trial.named
    if trial.curriculum:
        kind.curriculum = CURRICULA[trial.curriculum]
    plain = stacked_run.cell_plan

    def cell_plan(cell: Cell, critical: int, device: str) -> TrainPlan:
        found = plain(cell, critical, device)
        return replace(found, hidden_share=trial.hidden, net=replace(found.net, entry_bias=trial.entry_bias))

    def read(stack: StackedNet, rows: Rows, decisions: Decisions, **options: Any) -> StackedReading:
        return read_plainly(stack, rows, replace(decisions, warm=stack.config.model == "ham"), **options)

    read_plainly, warm = stacked_train.stacked_read, stacked_train.WARM_SHARE
    if trial.reading:
        stacked_train.stacked_read, stacked_train.WARM_SHARE = read, 1.0
    stacked_run.cell_plan = cell_plan
    started = time.time()
    try:
        groups = [list(cells(trial, line)) for line in trial.lines]
        critical = critical_rows(probe, groups[0][0].config)
        pools = stacked_run.Pools(cell_plan(groups[0][0], critical, device), trial.seeds)
        try:
            stacks, _ = stacked_run._train(groups, critical, device, pools, None, lambda text: None)
        finally:
            pools.close()
    finally:
        stacked_run.cell_plan, kind.curriculum, kind.target_weight, kind.named_after = plain, *before
        stacked_train.stacked_read, stacked_train.WARM_SHARE = read_plainly, warm
    return [
        {"trial": asdict(trial), "line": line, "rate": cell.learning_rate, "seed": cell.seed, "validation": history,
         "seconds": round(time.time() - started, 1), "device": device}
        for line, stack in zip(trial.lines, stacks, strict=True)
        for cell, history in zip(stack.cells, stack.trainer.history, strict=True)
    ]  # fmt: skip


def cells(trial: Trial, line: str) -> Iterator[Cell]:
    model, _, router = line.partition(":")
    plan = RunPlan(
        probes=(trial.rung,), preset="small", models=(model,), routers=(router or "learned",), budgets=(1.0,), seeds=1,
        steps=trial.steps, overrides=SHORT if trial.reading or trial.short else {},
    )  # fmt: skip
    first = plan.trial_cells()[0]
    for rate in trial.rates:
        for seed in trial.seeds:
            yield replace(first, seed=seed, learning_rate=rate)


def table(records: list[dict[str, Any]]) -> str:
    """Validation skill at the end, of every seed and rate."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for record in records:
        trial = record["trial"]
        what = "reading, " if trial["reading"] else "64 rows, " if trial.get("short") else ""
        named = ", ".join(str(layer) for layer in trial.get("named", ()))
        key = (trial["rung"], record["line"], f"{what}{trial['steps']}", f"{trial['hidden']:g}", trial["curriculum"],
               f"{trial['weight']:g}", named, f"{trial['entry_bias']:g}" if record["line"] != "full" else "",
               f"{record['rate']:g}")  # fmt: skip
        groups.setdefault(key, []).append(1.0 - record["validation"][-1][1])
    names = ("rung", "line", "steps", "hidden", "curriculum", "weight", "named", "bias", "rate", "skill of each seed")
    lines = [names, ("---",) * len(names)]
    lines += [(*key, ", ".join(f"{skill:.2f}" for skill in skills)) for key, skills in sorted(groups.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="train what is missing first")
    parser.add_argument("--only", default="", help="part of a rung's name")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    for trial in trials() if asked.run else ():
        there = json.loads(json.dumps(asdict(trial)))
        # records from before a field was there mean its default
        known = any({**there, "short": False, "named": [], **record["trial"]} == there for record in records)
        if asked.only in trial.rung and not known:
            found = run(trial, asked.device)
            records += found
            with RESULTS.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in found)
    print(table(records))


if __name__ == "__main__":
    main()
