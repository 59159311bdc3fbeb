"""Token recall: a positive control of the layer on what its paper claims, with this layer code inside a token model.

Run ``python -m benchmarks.recall`` from the clone; on a GPU a model takes minutes, on a CPU use ``--smoke``. One JSON
per model, learning rate and seed goes to ``benchmarks/results/recall``; a cell that exists is not measured again
without ``--again``. ``--table`` prints what is there. ``benchmarks/README.md`` says what supports or refutes a claim.

Tasks, half of each batch: *recall*, a pair of key and value for every 16 tokens among filler, each key asked once in
the last quarter; *needle*, one marked pair, asked at the end. Models learn both up a ladder of lengths.

B sequences · L tokens · N = L · V vocabulary · n pairs · M entries
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.cells import write_cell
from benchmarks.recall_claims import claims
from benchmarks.recall_ladders import LADDERS, LATE, SMOKE, Rung
from benchmarks.recall_model import (
    KEYS,
    MODELS,
    SELECTED_BY,
    SHARED,
    TASKS,
    VALUES,
    Lesson,
    TokenModel,
    lesson_of,
    places_of_values,
    policies_of,
)  # fmt: skip
from benchmarks.recall_table import CONTROLLED, GRAFTS, SHARE, USAGES, summary, table
from benchmarks.recall_teacher import asked_loss, asked_losses, asked_of, own_gradients
from benchmarks.side_by_side import Job, run_jobs
from hamts.config import ModelConfig
from hamts.nn.allocation import update_tables
from hamts.nn.controls import Control
from hamts.training_auxiliary import score_loss

RESULTS = Path(__file__).parent / "results" / "recall"
EXPLORE = 0.1
# a value asked for is lost if fewer of its queries are right, known if more are
LOST, KNOWN = 0.2, 0.8


# --- training


def train(
    model: TokenModel,
    ladder: tuple[Rung, ...],
    *,
    rate: float,
    seed: int,
    device: str,
    late: bool,
    after: Callable[[int, list[dict[str, Any]]], None],
    lesson: Lesson | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Up the ladder; the curve of it. ``after`` is called with each length that was learned."""
    generator = torch.Generator(device=device).manual_seed(seed)
    explore = torch.Generator().manual_seed(seed + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    total, done, curve = sum(rung.steps for rung in ladder), 0, []
    began, lesson = time.perf_counter(), lesson or Lesson()
    model.severed, model.bare = lesson.severed, lesson.bare
    for rung in ladder:
        for step in range(rung.steps):
            done += 1
            for group in optimizer.param_groups:
                group["lr"] = rate * min(done / 50, 1.0) * rate_left(done / total, late=late)
            model.bias_strength = bias_felt(done / total, lesson.bias_from)
            loss = learn(model, optimizer, rung, lesson, generator, explore)
            if step == rung.steps - 1 or done % 100 == 0:
                point = {"step": done, "length": rung.length, "loss": round(float(loss), 4)}
                curve.append(point | {"s": round(time.perf_counter() - began, 1)})
                if not quiet:
                    print(json.dumps(curve[-1]), flush=True)
        model.asked = model.deaf = None
        after(rung.length, curve)
    return curve


def learn(
    model: TokenModel,
    optimizer: torch.optim.Optimizer,
    rung: Rung,
    lesson: Lesson,
    generator: torch.Generator,
    explore: torch.Generator,
) -> torch.Tensor:
    """One step, on one batch; the task's loss, []."""
    ids, right, share = draw_batch(rung, generator)
    asked = lesson.target == "asked"
    model.asked = asked_of(right, rung.length // rung.tokens_per_pair) if asked else None
    # half of either task, at the usage of the claim and at any alike, and without a draw: sequences are those of others
    model.deaf = torch.arange(len(ids), device=ids.device) // 2 % 2 == 0 if lesson.deaf else None  # [B]
    logits, traces = model(ids, policies_of(model, share, explore_share=EXPLORE, explore_generator=explore))
    loss = F.cross_entropy(logits[right >= 0], right[right >= 0] - KEYS)
    optimizer.zero_grad(set_to_none=True)
    scored, taught = torch.zeros(()), []
    if lesson.own:
        taught = own_gradients(model.layers(), asked_losses(traces, model.reads), lesson.weight)
    elif asked:
        scored = asked_loss(traces, model.reads)
    elif model.config.mixer == "ham":
        scored = score_loss(traces, loss, lesson.target)
    (loss + lesson.weight * scored).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # after the clipping, which would shorten the task's gradient below by the teacher's length
    for parameter, gradient in taught:
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
    optimizer.step()
    update_tables(model.layers(), [t.scores.flatten(0, -2) for t in traces], model.config.allocation, calibrate=False)
    return loss.detach()


def rate_left(done: float, *, late: bool) -> float:
    """Share of the learning rate: a half cosine over the whole ladder; or all of it until the last third."""
    if late:
        return min(1.0, max(0.1, (1.0 - done) * 3))
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def bias_felt(done: float, span: tuple[float, float]) -> float:
    """Of the learned score's logarithm, what is in the logits: nothing before a span of the ladder, all after it."""
    begin, end = span
    if done >= end:
        return 1.0
    return max(0.0, (done - begin) / (end - begin)) if done > begin else 0.0


def draw_batch(rung: Rung, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Half of each task; half of the streams at the usage of the claim, the others at any."""
    half = rung.sequences // 2
    parts = [draw(rung.length, half, generator, rung.tokens_per_pair) for draw in TASKS.values()]
    ids, right = (torch.cat(both) for both in zip(*parts, strict=True))
    anything = torch.rand(len(ids), generator=generator, device=ids.device)  # [B]
    share = torch.where(torch.arange(len(ids), device=ids.device) % 2 == 0, SHARE, anything)
    return ids, right, share


# --- measuring


@torch.no_grad()
def measure(
    model: TokenModel, lengths: list[int], *, sequences: int, device: str, whole: bool = True
) -> list[dict[str, Any]]:
    """Share of queries answered right, by length, task and memory; and what each layer kept.

    Args:
        whole: at the last length controls and grafts too; else the model's own choice at the usage of the claims alone.
    """
    model.eval()
    rows = []
    ham = model.config.mixer == "ham"
    for length in lengths:
        generator = torch.Generator(device=device).manual_seed(10_000)
        side = max(1, min(sequences, 2**15 // length))
        batches = {
            task: [draw(length, side, generator) for _ in range(-(-sequences // side))] for task, draw in TASKS.items()
        }
        settings: list[tuple[str, float, str]] = [("model", 1.0, "uniform")]
        if ham:
            samples = scores_of(model, batches, device)
            settings = [("model", usage, "uniform") for usage in (USAGES if whole else (SHARE, 1.0))]
            if whole:
                settings += [("random", SHARE, "uniform"), ("model", SHARE, "pooled")]
            if whole and length == lengths[-1]:
                settings += [("random", usage, "uniform") for usage in CONTROLLED if usage != SHARE]
            if whole and length == lengths[-1] and "learned" in model.config.router_names:
                settings += [(memory, usage, "uniform") for memory in GRAFTS for usage in CONTROLLED]
        for memory, usage, allocation in settings:
            with grafted(model, memory) as changed:
                if ham:
                    sample = scores_of(model, batches, device) if changed else samples
                    update_tables(model.layers(), sample, allocation, calibrate=True)
                for task, parts in batches.items():
                    rows.append(
                        {"length": length, "task": task, "memory": memory, "usage": usage, "allocation": allocation}
                        | answer(model, parts, task, usage, memory, device)
                    )
    return rows


def scores_of(model: TokenModel, batches: dict[str, list[Any]], device: str) -> list[torch.Tensor]:
    """Scores of each layer over all batches, thinned to about a million, [n, S] each."""
    scores: list[list[torch.Tensor]] = [[] for _ in model.blocks]
    for ids, _ in [part for parts in batches.values() for part in parts]:
        traces = model(ids, policies_of(model, torch.full((len(ids),), SHARE, device=device)))[1]
        for kept, trace in zip(scores, traces, strict=True):
            kept.append(trace.scores.flatten(0, -2))
    return [torch.cat(parts)[:: max(1, len(parts) * len(parts[0]) // 2**20)] for parts in scores]


@contextmanager
def grafted(model: TokenModel, memory: str) -> Iterator[bool]:
    """The same weights read without the learned logarithm in the logits, or with entries that surprise chose.

    Yields whether scores are others than before.
    """
    if memory == "unbiased":
        before, model.bias_strength = model.bias_strength, 0.0
        try:
            yield True
        finally:
            model.bias_strength = before
    elif memory == "by surprise":
        score = model.select_by("surprise")
        try:
            yield True
        finally:
            model.select_by(score)
    else:
        yield False


def answer(model: TokenModel, parts: list[Any], task: str, usage: float, memory: str, device: str) -> dict[str, Any]:
    """Accuracy over some batches, and over values; kept share of each layer; attention that goes to the scratchpad.

    Of recall also, by layer, for which share of the queries the value is kept, and how many of those are right.
    """
    right_count = asked_count = 0
    by_value = torch.zeros(2, VALUES)  # right, asked
    kept = torch.zeros(len(model.blocks))
    mass = torch.zeros(len(model.blocks))
    held = torch.zeros(len(model.blocks), 2)  # of queries whose value is kept: how many, and right
    for number, (ids, right) in enumerate(parts):
        control = None
        if memory == "random":
            control = Control("random", torch.arange(len(ids), device=device) + number * len(ids))
        share = torch.full((len(ids),), usage, device=device)
        logits, traces = model(ids, policies_of(model, share, control=control))
        asked = right >= 0
        correct = (logits[asked].argmax(-1) + KEYS == right[asked]).float().cpu()  # [n]
        right_count += int(correct.sum())
        asked_count += int(asked.sum())
        value = (right[asked] - KEYS).cpu()  # [n]
        by_value += torch.stack([torch.bincount(value, x, VALUES) for x in (correct, torch.ones_like(correct))])
        if task == "recall":
            place = places_of_values(ids, right)[asked]  # [n]
            stream = asked.nonzero()[:, 0]  # [n]
            for layer, trace in enumerate(traces):
                there = trace.routed[:, 0][stream, place].float().cpu()  # [n]
                held[layer] += torch.stack([there.sum(), (there * correct).sum()])
        kept += torch.tensor([float(t.routed.float().mean()) for t in traces]) / len(parts)
        reads = model.config.heads * ids.numel()
        mass += torch.tensor([float((t.entries_mass * t.entries_sights).sum()) / reads for t in traces]) / len(parts)
    each = (by_value[0] / by_value[1].clamp_min(1))[by_value[1] > 0]  # [values asked]
    told: dict[str, Any] = {}
    if task == "recall":
        told["value_kept_by_layer"] = [round(float(x), 4) for x in held[:, 0] / asked_count]
        told["right_of_kept_by_layer"] = [round(float(x), 4) for x in held[:, 1] / held[:, 0].clamp_min(1)]
    return told | {
        "accuracy": round(right_count / asked_count, 4),
        "queries": asked_count,
        "values_lost": round(float((each < LOST).float().mean()), 4),
        "values_known": round(float((each > KNOWN).float().mean()), 4),
        "kept_by_layer": [round(float(x), 4) for x in kept],
        "scratchpad_attention_by_layer": [round(float(x), 4) for x in mass],
    }


def run_one(
    name: str, *, rate: float, seed: int, ladder_name: str, folder: Path, quiet: bool = False
) -> dict[str, Any]:
    """Train and measure one model."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    smoke = ladder_name == "smoke"
    ladder = SMOKE if smoke else LADDERS[ladder_name]
    sizes: dict[str, Any] = {
        "width": 64,
        "layers": 2,
        "heads": 2,
        "patch_steps": 1,
        "dropout": 0.0,
        "router": "learned",
    }
    config = ModelConfig(**(sizes | MODELS[name]))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = TokenModel(config, shared=name.endswith(SHARED))
    if name in SELECTED_BY:
        model.select_by(SELECTED_BY[name])
    model.to(device)
    began = time.perf_counter()
    cell = {
        "model": name, "rate": rate, "seed": seed, "weights": sum(p.numel() for p in model.parameters()),
        "ladder_name": ladder_name, "ladder": [vars(rung) for rung in ladder],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    path = cell_path(folder, name, rate, seed, ladder_name)
    sequences = 8 if smoke else 128

    def note(length: int, curve: list[dict[str, Any]]) -> None:
        """What is known on each rung but the last, in case that is never reached."""
        if length == ladder[-1].length:
            return
        rows = measure(model, [length], sequences=sequences, device=device, whole=False)
        write_cell(path.with_suffix(".rung"), cell | {"curve": curve, "rows": rows})
        model.train()

    curve = train(
        model, ladder, rate=rate, seed=seed, device=device, late=ladder_name in LATE, after=note,
        lesson=lesson_of(name), quiet=quiet,
    )  # fmt: skip
    rows = measure(model, [rung.length for rung in ladder], sequences=sequences, device=device)
    cell |= {"s": round(time.perf_counter() - began, 1), "curve": curve, "rows": rows}
    write_cell(path, cell)
    path.with_suffix(".rung").unlink(missing_ok=True)
    return cell


def cell_path(folder: Path, name: str, rate: float, seed: int, ladder: str) -> Path:
    return folder / f"{ladder}--{name}--lr{rate:g}--seed{seed}.json"


@dataclass(frozen=True)
class Run:
    """A model to train and measure."""

    model: str
    rate: float
    seed: int
    ladder: str
    folder: Path


def perform(run: Run) -> str:
    """One run, in a process of its own."""
    cell = run_one(run.model, rate=run.rate, seed=run.seed, ladder_name=run.ladder, folder=run.folder, quiet=True)
    at = [row for row in cell["rows"] if row["task"] == "recall" and row["allocation"] == "uniform"]
    said = ", ".join(f"{r['memory']} {r['usage']:g} at {r['length']}: {r['accuracy']:.3f}" for r in at[-7:])
    return f"{cell['s']} s: {said}"


def jobs_of(
    models: list[str], seeds: list[int], rates: list[float], ladder: str, folder: Path, *, again: bool, room: float
) -> list[Job]:
    """Those that are not there yet: rate by rate, the slowest first."""
    slow = sorted(models, key=lambda name: MODELS[name].get("mixer", "ham") != "ham")
    runs = [Run(model, rate, seed, ladder, folder) for rate in rates for model in slow for seed in seeds]
    paths = {run: cell_path(folder, run.model, run.rate, run.seed, ladder) for run in runs}
    return [Job(path.stem, run, room=room) for run, path in paths.items() if again or not path.exists()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 1e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--side-by-side", type=int, default=8, help="processes on the one GPU")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which what runs is ended")
    parser.add_argument("--one", choices=list(MODELS), help="train this model here")
    parser.add_argument("--ladder", choices=list(LADDERS), default="registered")
    parser.add_argument("--smoke", action="store_true", help="a few steps at tiny lengths")
    parser.add_argument("--again", action="store_true", help="measure cells that exist, too")
    parser.add_argument("--table", action="store_true", help="only print all that was measured")
    parser.add_argument("--claims", action="store_true", help="only print what one ladder says to the claims, and why")
    parser.add_argument("--summary", action="store_true", help="only print what it comes to")
    options = parser.parse_args()
    ladder = "smoke" if options.smoke else options.ladder
    if options.one or options.smoke:
        names = [options.one] if options.one else options.models
        for name in names:
            run_one(name, rate=options.rates[0], seed=options.seeds[0], ladder_name=ladder, folder=options.folder)
    elif not (options.table or options.summary or options.claims):
        many, limit = options.side_by_side, options.limit
        jobs = jobs_of(
            options.models, options.seeds, options.rates, ladder, options.folder, again=options.again, room=1 / many
        )
        run_jobs(jobs, perform, workers=many, begin_within_s=limit, end_within_s=limit)
    if options.claims:
        print(claims(options.folder, ladder, options.rates[0]))
    elif not options.one:
        print(table(options.folder) if options.table else summary(options.folder))


if __name__ == "__main__":
    main()
