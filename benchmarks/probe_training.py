"""How long a step of tier-1 training takes.

    python -m benchmarks.probe_training                 # four networks of each kind, preset small, rung der
    python -m benchmarks.probe_training --networks 5 --kinds ham/surprise full

The networks of a line train side by side (``probes.stacked``). On a CPU nothing is captured.
"""

from __future__ import annotations

import argparse
import time

import torch

from probes.contract import generator
from probes.models import NetConfig
from probes.registry import get_probe
from probes.runner_plan import critical_rows
from probes.stacked_data import Rows
from probes.stacked_train import StackedTrainer
from probes.train import BATCH_SEQUENCES, TrainPlan, sample

KINDS = ("ham/learned", "ham/surprise", "full", "recurrent", "recurrent_wide", "window")
LEARNING_RATE = 4e-3
FIRST_STEPS, STEPS = 3, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), help="models, HAM as ham/ROUTER")
    parser.add_argument("--networks", type=int, default=4)
    parser.add_argument("--rung", default="der/der")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    print("| networks | ms a step | seconds until the first is done |")
    print("|---|---|---|")
    for kind in asked.kinds:
        step, first = timed(plans_of(kind, asked))
        print(f"| {asked.networks} x {kind} | {step * 1e3:.2f} | {first:.1f} |", flush=True)


def plans_of(kind: str, asked: argparse.Namespace) -> list[TrainPlan]:
    """Networks of a kind, seeds 0, 1, ..."""
    model, _, router = kind.partition("/")
    probe, rung = get_probe(asked.rung)
    config = probe.config(asked.preset, rung, missed_tags=0.2, false_tags=4.0)
    rows = critical_rows(probe, config)
    net = NetConfig(model=model, router=router or "learned", layers=probe.layers, budget_rows=rows)
    return [
        TrainPlan(
            probe=probe, config=config, net=net, steps=100, learning_rate=LEARNING_RATE, seed=seed, critical_rows=rows,
            device=asked.device,
        )
        for seed in range(asked.networks)
    ]  # fmt: skip


def timed(plans: list[TrainPlan]) -> tuple[float, float]:
    """Seconds a step after the warm phase, and seconds until the first steps were done, recording included."""
    device = plans[0].device
    rows = Rows.of([sample(plan, generator(plan.seed), BATCH_SEQUENCES) for plan in plans], device)
    trainer = StackedTrainer(plans)
    # what is drawn on a device differs from run to run
    trainer.one.explores, trainer.one.warm_steps = False, 0
    trainer.fit(rows)
    began = time.perf_counter()
    advance(trainer, rows, range(FIRST_STEPS))
    first = time.perf_counter() - began
    began = time.perf_counter()
    advance(trainer, rows, range(FIRST_STEPS, FIRST_STEPS + STEPS))
    return (time.perf_counter() - began) / STEPS, first


def advance(trainer: StackedTrainer, rows: Rows, steps: range) -> None:
    """Some steps, finished."""
    for step in steps:
        if trainer.stream is None:
            trainer.advance(rows, step)
            continue
        with torch.cuda.stream(trainer.stream):
            trainer.advance(rows, step)
    if trainer.stream is not None:
        trainer.stream.synchronize()


if __name__ == "__main__":
    main()
