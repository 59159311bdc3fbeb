"""All networks of a rung in step: every cell is a stack of its seeds, all stacks read the same sequences.

Sequences of a seed are drawn once for all models and routers, by threads ahead of the device. On a GPU the step of
each stack is captured once and replayed on a stream of its own.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from probes.registry import get_probe
from probes.results import document, write_document
from probes.runner_plan import Cell, RunPlan, budget_rows, critical_rows
from probes.saved import save_network
from probes.stacked_data import Rows, joined_rows
from probes.stacked_evaluate import EvaluationSet, evaluate_stacked
from probes.stacked_train import StackedTrainer, Validation
from probes.summary import chosen_rates
from probes.train import BATCH_SEQUENCES, CHECKS, POOL_SEQUENCES, Stream, TrainPlan, sample

__all__ = ["OutOfTime", "run_rung"]

Say = Callable[[str], None]
POOLS_AHEAD = 2
SWITCH_S = 2e-4
LOG_FILE = "log.txt"
BATCHES = POOL_SEQUENCES // BATCH_SEQUENCES


class OutOfTime(Exception):
    """The time that was given is over; what is not finished is not written."""


def run_rung(
    plan: RunPlan, probe: str, rung: str, root: Path, *, device: str, deadline: float | None = None
) -> list[Path]:
    """Train and score every cell of a rung that is not there yet: first the learning rates, then all seeds.

    Args:
        deadline: of ``time.time``; OutOfTime is raised when it has passed.

    How it goes is noted in ``LOG_FILE``.

    Returns: the documents of the rung.
    """
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        # the thread that feeds a device must not wait for those that draw sequences
        sys.setswitchinterval(SWITCH_S)

    def say(text: str) -> None:
        with (root / LOG_FILE).open("a", encoding="utf-8") as log:
            log.write(f"{time.strftime('%H:%M:%S')} {rung} {text}\n")

    trials = [cell for cell in plan.trial_cells() if (cell.probe, cell.rung) == (probe, rung)]
    written = _run_in_step(trials, root, device, deadline, say)
    rates = chosen_rates([json.loads(path.read_text(encoding="utf-8")) for path in written])
    cells = [cell for cell in plan.main_cells(rates) if (cell.probe, cell.rung) == (probe, rung)]
    return sorted({*written, *_run_in_step(cells, root, device, deadline, say)})


def cell_plan(cell: Cell, critical: int, device: str) -> TrainPlan:
    """How the network of a cell is trained; a rival is as large as HAM at the budget it is compared at."""
    return TrainPlan(
        probe=get_probe(cell.probe)[0], config=cell.config, net=cell.net(budget_rows(cell.budgets[0], critical)),
        steps=cell.steps, learning_rate=cell.learning_rate, seed=cell.seed, critical_rows=critical,
        echo=cell.readout == "echo", device=device,
    )  # fmt: skip


@dataclass
class _Stack:
    """Cells that differ in seed or learning rate alone."""

    cells: list[Cell]
    plans: list[TrainPlan]
    static: Rows
    trainer: StackedTrainer


def _run_in_step(cells: Sequence[Cell], root: Path, device: str, deadline: float | None, say: Say) -> list[Path]:
    """Train what is missing of some cells of one rung, step by step together, then score and write each stack."""
    wanted = {cell: [root / cell.probe / cell.file_name(budget) for budget in cell.budgets] for cell in cells}
    every = [path for paths in wanted.values() for path in paths]
    todo = [cell for cell, paths in wanted.items() if not all(path.is_file() for path in paths)]
    if not todo:
        return every
    started, first = time.time(), todo[0]
    critical = critical_rows(get_probe(first.probe)[0], first.config)
    groups: dict[tuple[str, str, tuple[float, ...]], list[Cell]] = {}
    for cell in todo:
        groups.setdefault((cell.model, cell.router, cell.budgets), []).append(cell)
    seeds = sorted({cell.seed for cell in todo})
    plan = cell_plan(first, critical, device)
    with ThreadPoolExecutor(1) as background:
        ready: Future[EvaluationSet] = background.submit(
            EvaluationSet.of, plan, seeds=seeds, streams=first.streams, sequences=first.sequences
        )
        pools = Pools(plan, seeds)
        try:
            stacks, last = _train(list(groups.values()), critical, device, pools, deadline, say)
        finally:
            pools.close()
        seconds = (time.time() - started) / len(todo)
        say(f"{len(todo)} networks trained in {time.time() - started:.0f} s")
        data = ready.result().to(device)
    for stack in stacks:
        stack.trainer.graphs, stack.trainer.stream = {}, None
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    for stack in stacks:
        _score(stack, last, data, wanted, root, critical, device, seconds)
    say(f"scored after {time.time() - started:.0f} s")
    return every


def _train(
    groups: list[list[Cell]],
    critical: int,
    device: str,
    pools: Pools,
    deadline: float | None,
    say: Say,
) -> tuple[list[_Stack], dict[int, Rows]]:
    """Train stacks in step; also the batch after the last, by seed, which thresholds are calibrated on."""
    steps = groups[0][0].steps
    plan = cell_plan(groups[0][0], critical, device)
    check = Validation.of(plan)
    stacks: list[_Stack] = []
    batch: dict[int, Rows] = {}
    seeds = list(pools.queues)
    for step, batch in enumerate(pools.batches(device)):  # noqa: B007 - the last one is returned
        if step == steps:
            break
        if deadline is not None and step % BATCHES == 0 and time.time() > deadline:
            raise OutOfTime(f"{groups[0][0].rung} stopped at step {step} of {steps}.")
        if not stacks:
            stacks = _stacks(groups, critical, device, batch)
        elif stacks[0].static.inputs.shape[2] != batch[seeds[0]].inputs.shape[2]:
            _resize(stacks, batch)
        for static, own in {id(s.static): (s.static, _seeds(s.plans)) for s in stacks}.values():
            _copy(static, [batch[seed] for seed in own])
        _advance(stacks, step)
        if (step + 1) % max(steps // CHECKS, 1) == 0 or step + 1 == steps:
            for stack in stacks:
                stack.trainer.check(check, step + 1)
            done = ", ".join(f"{_short(s.cells[0])} {s.trainer.history[0][-1][1]:.2f}" for s in stacks)
            say(f"{step + 1}/{steps}: {done}")
    return stacks, {seed: rows.map(torch.clone) for seed, rows in batch.items()}


def _seeds(plans: Sequence[TrainPlan]) -> tuple[int, ...]:
    """Whose sequences a stack reads: one seed's for all networks, or one for each."""
    seeds = tuple(plan.seed for plan in plans)
    return seeds[:1] if len(set(seeds)) == 1 else seeds


def _short(cell: Cell) -> str:
    return cell.router if cell.model == "ham" else f"{cell.model}@{cell.budgets[0]:g}"


def _stacks(groups: list[list[Cell]], critical: int, device: str, batch: dict[int, Rows]) -> list[_Stack]:
    found: list[_Stack] = []
    for cells in groups:
        plans = [cell_plan(cell, critical, device) for cell in cells]
        trainer = StackedTrainer(plans)
        found.append(_Stack(cells, plans, joined_rows([batch[seed] for seed in _seeds(plans)]), trainer))
    _resize(found, batch)
    return found


def _resize(stacks: list[_Stack], batch: dict[int, Rows]) -> None:
    """Rows of the size of this stage of the curriculum, shared by stacks that read the same seeds."""
    statics: dict[tuple[int, ...], Rows] = {}
    for stack in stacks:
        seeds = _seeds(stack.plans)
        if seeds not in statics:
            statics[seeds] = joined_rows([batch[seed] for seed in seeds])
        stack.static = statics[seeds]
        stack.trainer.fit(stack.static)


def _copy(static: Rows, parts: Sequence[Rows]) -> None:
    for name in Rows.__dataclass_fields__:
        target = getattr(static, name)
        if target is not None:
            for number, part in enumerate(parts):
                target[number].copy_(getattr(part, name)[0])


def _advance(stacks: list[_Stack], step: int) -> None:
    """One step of every stack; on a GPU side by side."""
    for stack in stacks:
        stream = stack.trainer.stream
        if stream is None:
            stack.trainer.advance(stack.static, step)
            continue
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            stack.trainer.advance(stack.static, step)
    for stack in stacks:
        if stack.trainer.stream is not None:
            torch.cuda.current_stream().wait_stream(stack.trainer.stream)


def _score(
    stack: _Stack,
    last: dict[int, Rows],
    data: EvaluationSet,
    wanted: dict[Cell, list[Path]],
    root: Path,
    critical: int,
    device: str,
    seconds: float,
) -> None:
    """Calibrate, keep and score the networks of a stack, and write a document for each budget."""
    _copy(stack.static, [last[seed] for seed in _seeds(stack.plans)])
    fitted = stack.trainer.finish(stack.static, seconds=seconds)
    for cell, one in zip(stack.cells, fitted, strict=True):
        save_network(cell, root, one)
    for place, budget in enumerate(stack.cells[0].budgets):
        rows = budget_rows(budget, critical)
        scored = evaluate_stacked(stack.trainer.stack, stack.plans, data, budget_rows=rows)
        for cell, one, result in zip(stack.cells, fitted, scored, strict=True):
            path = wanted[cell][place]
            if not path.is_file():
                write_document(path, document(cell, one, result, budget=budget, device=device), result.errors)


# --- sequences


class Pools:
    """Training batches of some seeds, drawn by a thread each, as ``Stream`` draws them."""

    def __init__(self, plan: TrainPlan, seeds: Sequence[int]) -> None:
        self.plan, self.closed = plan, threading.Event()
        self.queues: dict[int, queue.Queue[tuple[Rows, int] | BaseException]] = {}
        self.threads: list[threading.Thread] = []
        for seed in seeds:
            self.queues[seed] = queue.Queue(POOLS_AHEAD)
            self.threads.append(threading.Thread(target=self._fill, args=(seed,), daemon=True))
            self.threads[-1].start()

    def close(self) -> None:
        """Let the threads end, and wait for it: one that still draws when the interpreter leaves aborts the process."""
        self.closed.set()
        for waiting in self.queues.values():
            while not waiting.empty():
                waiting.get_nowait()
        for thread in self.threads:
            thread.join()

    def batches(self, device: str) -> Iterator[dict[int, Rows]]:
        """Of every step, and one more: a batch of each seed."""
        while True:
            pools, count = {}, 0
            for seed, waiting in self.queues.items():
                found = waiting.get()
                if isinstance(found, BaseException):
                    raise found
                pools[seed], count = found[0].to(device), found[1]
            for number in range(count):
                place = slice(number * BATCH_SEQUENCES, (number + 1) * BATCH_SEQUENCES)
                yield {seed: rows.select(place) for seed, rows in pools.items()}

    def _fill(self, seed: int) -> None:
        plan = replace(self.plan, seed=seed, device="cpu")
        stream, waiting = Stream(plan), self.queues[seed]
        try:
            for stage, count in self._schedule(stream):
                if self.closed.is_set():
                    return
                pool = sample(plan, stream.gen, POOL_SEQUENCES, plan.stages[stage][1])
                waiting.put((Rows.of([pool]), count))
        except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
            waiting.put(error)

    @staticmethod
    def _schedule(stream: Stream) -> list[tuple[int, int]]:
        """Stage of each pool, and how many batches are taken of it."""
        found: list[list[int]] = []
        for step in range(stream.plan.steps + 1):
            stage = stream.plan.stage(step)
            if not found or found[-1][0] != stage or found[-1][1] == BATCHES:
                found.append([stage, 0])
            found[-1][1] += 1
        return [(stage, count) for stage, count in found]
