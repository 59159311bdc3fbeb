"""Scores of a trained network at one budget: answers, selection, the failed stage, causal use, bytes.

B sequences · L rows · Q queries · R rows a query needs · M entries
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from probes.contract import EVALUATION_SEED, ProbeBatch, generator
from probes.effects import effect_scores, placebo_batch, placebo_score
from probes.models import ProbeNet, kept_rows, without_rows
from probes.reading import answer_batch, kept_bytes, read_context
from probes.scores import (
    best_floor,
    causal_use,
    close_share,
    query_error,
    ranks_auroc,
    selection,
    skill,
    stages,
    survival,
)
from probes.train import Fitted, sample

__all__ = ["Evaluation", "evaluate", "permute_flags"]

DIAGNOSED_SEQUENCES = 64
FLAG_SEED = 88
# slices by rows since the last row that a query needs: up to each of these
DELAY, DELAY_EDGES = "delay<=", (16, 64, 256, 1_024, 4_096, 16_384)
# models that choose which rows to keep
SELECTIVE = ("ham", "top_write")


@dataclass
class Evaluation:
    """All that is measured at one budget."""

    budget_rows: int
    metrics: dict[str, float] = field(default_factory=dict)
    by_slice: dict[str, dict[str, float]] = field(default_factory=dict)  # label of a slice -> metrics
    by_layer: list[dict[str, float]] = field(default_factory=list)
    survival: dict[str, tuple[float, int]] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    errors: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [streams, B] mean error of a sequence
    floor_errors: np.ndarray = field(default_factory=lambda: np.zeros(0))  # [streams, B]
    floor_name: str = ""
    oracle_error: float = 0.0
    precision: str = "float32"
    layer_rows: tuple[int, ...] = ()  # where layers have budgets of their own

    @property
    def rows(self) -> int | tuple[int, ...]:
        return self.layer_rows or self.budget_rows


@torch.no_grad()
def evaluate(
    fitted: Fitted,
    *,
    budget_rows: int,
    streams: int,
    sequences: int,
    diagnose: bool = True,
    precision: str = "float32",
    layer_rows: tuple[int, ...] = (),
) -> Evaluation:
    """Score a network on evaluation streams 10_000, 10_001, ...: the same for every model, router and budget.

    Args:
        precision: of the keys and values of kept rows: ``float32``, ``bfloat16`` or ``int8``.
        layer_rows: a budget for each layer instead of ``budget_rows`` for all.
    """
    out = Evaluation(budget_rows, precision=precision, layer_rows=layer_rows)
    parts = []
    for stream in range(streams):
        parts.append(_score_stream(fitted, stream, sequences, out, diagnosed=stream == 0 and diagnose))
    out.errors = np.stack([part["errors"] for part in parts])
    out.floor_errors = np.stack([part["floor"] for part in parts])
    out.floor_name = parts[0]["floor_name"]
    for name in parts[0]["metrics"]:
        known = [part["metrics"][name] for part in parts if not math.isnan(part["metrics"][name])]
        out.metrics[name] = float(np.mean(known)) if known else math.nan
    mse, floor = float(np.nanmean(out.errors)), float(np.nanmean(out.floor_errors))
    out.oracle_error = float(np.nanmean([part["oracle"] for part in parts]))
    out.metrics["mse"] = mse
    out.metrics["nmse"] = mse / parts[0]["variance"]
    out.metrics["skill"] = skill(mse, floor=floor, oracle=out.oracle_error)
    out.metrics["skill_clipped"] = max(-1.0, min(1.0, out.metrics["skill"]))
    out.survival = parts[0]["survival"]
    out.by_layer = parts[0]["by_layer"]
    out.by_slice = parts[0]["by_slice"]
    return out


def _score_stream(fitted: Fitted, stream: int, sequences: int, out: Evaluation, *, diagnosed: bool) -> dict[str, Any]:
    net, plan, rows = fitted.net, fitted.plan, out.rows
    batch = sample(plan, generator(EVALUATION_SEED + stream), sequences)
    train = sample(plan, generator(plan.seed), min(sequences, 256))
    # floors are learned on answers rendered as they are asked
    name, floor = best_floor(plan.probe.floors(train, batch), batch)
    oracle = query_error(plan.probe.oracle(batch), batch)
    batch = batch.to(plan.device)
    started = time.perf_counter()
    answer, context = answer_batch(net, batch, rows, precision=out.precision)
    seconds = time.perf_counter() - started
    error = query_error(answer, batch).cpu()  # [B, Q]
    metrics = {
        "close_share": close_share(answer, batch), "ms_per_row": 1000 * seconds / (len(batch) * batch.x.shape[1]),
    }  # fmt: skip
    fixed, exact = kept_bytes(context.memory, out.precision)
    fixed += fitted.net.tail_bytes
    metrics |= {"bytes_state": fixed, "bytes_kv": exact, "bytes_total": fixed + exact}
    metrics["factual_nmse"] = _factual(net, context.hidden, batch)
    if "baseline" in batch.extra:
        metrics |= effect_scores(answer, batch)
        if diagnosed and (placebo := placebo_batch(plan, sequences)) is not None:
            placebo = placebo.to(plan.device)
            out.metrics |= placebo_score(answer_batch(net, placebo, rows, precision=out.precision)[0], placebo)
    chosen, layers = _selected(net, batch, context, metrics)
    metrics["skill_flags_permuted"] = _permuted_skill(net, batch, out, float(floor.nanmean()))
    kept_any = chosen.any_row if chosen is not None else torch.zeros_like(batch.asked)
    if diagnosed and chosen is not None and net.config.model == "ham":
        part = batch.select(slice(0, DIAGNOSED_SEQUENCES))
        out.stages, out.metrics["causal_use"] = diagnose_queries(net, part, rows, precision=out.precision)
    return {
        "errors": np.nanmean(error.numpy(), axis=1), "floor": np.nanmean(floor.cpu().numpy(), axis=1),
        "floor_name": name, "oracle": float(oracle.nanmean()), "metrics": metrics,
        "variance": float(batch.y[batch.y_mask].var()), "by_layer": layers,
        "survival": survival(kept_any, batch) if chosen is not None else {},
        "by_slice": _slices(batch, error, floor.cpu(), kept_any.cpu() if chosen is not None else None),
    }  # fmt: skip


def _selected(
    net: ProbeNet, batch: ProbeBatch, context: Any, metrics: dict[str, float]
) -> tuple[Any, list[dict[str, float]]]:
    """Selection over all layers together, and by layer; nothing for models that choose no rows."""
    L = batch.x.shape[1]
    kept = [kept_rows(memory, L) for memory in context.memory]
    found = [rows for rows in kept if rows is not None]
    if not found or net.config.model not in SELECTIVE:
        return None, []
    union = torch.stack(found).any(0)  # [B, L]
    chosen = selection(union, batch)
    asked = batch.asked
    metrics |= {
        "recall_any": chosen.recall(asked),
        "recall_all": float(chosen.all_rows[asked].float().mean()),
        "recall_chance": float(chosen.chance[asked].mean()),
        "recall_corrected": chosen.corrected_recall(asked),
        "precision": chosen.precision,
        "decoy_share": chosen.decoy_share,
        "usage_rows": float(torch.stack(found).float().sum(-1).mean()),
    }
    for place, role in enumerate(batch.need_role):
        metrics[f"recall_{place}_{role.replace(' ', '_')}"] = float(chosen.by_role[..., place][asked].float().mean())
    layers = []
    for rows, trace in zip(found, context.traces, strict=False):
        one = selection(rows, batch)
        row = {"recall_corrected": one.corrected_recall(asked), "rows": float(rows.sum(1).float().mean())}
        if trace.scores.shape[-1]:
            T = batch.context_rows
            row["auroc"] = ranks_auroc(trace.scores[:, 0, :, 0], batch.crit[:, :T])
        layers.append(row)
    return chosen, layers


def _factual(net: ProbeNet, hidden: torch.Tensor, batch: ProbeBatch) -> float:
    return factual_error(net.next_row(hidden[:, :-1]), batch.x[:, 1 : batch.context_rows])


def factual_error(guess: torch.Tensor, ahead: torch.Tensor) -> float:
    """Squared error of the row after each over that of its mean, [B, T - 1, C]: is what comes next known as well?"""
    there = ~ahead.isnan()
    values = torch.nan_to_num(ahead)
    mean = values.sum((0, 1)) / there.sum((0, 1)).clamp_min(1)  # [C]
    spread = ((values - mean).square() * there).sum()
    return float(((guess - values).square() * there).sum() / spread.clamp_min(1e-9))


def _slices(
    batch: ProbeBatch, error: torch.Tensor, floor: torch.Tensor, kept: torch.Tensor | None
) -> dict[str, dict[str, float]]:
    """Skill and recall by label of each slice."""
    asked = batch.asked.cpu()
    parts = {
        f"{name}={label}": asked & (labels.cpu() == label)
        for name, labels in batch.slices.items()
        for label in labels.unique().tolist()
        if label >= 0
    }
    low, delay = 0, batch.delay.cpu()
    for high in DELAY_EDGES:
        parts[f"{DELAY}{high}"] = asked & (delay > low) & (delay <= high)
        low = high
    out: dict[str, dict[str, float]] = {}
    for name, here in parts.items():
        if not bool(here.any()):
            continue
        below = float(floor[here].mean())
        row = {"skill": 1.0 - float(error[here].mean()) / below if below > 0 else math.nan}
        if kept is not None:
            row["recall_any"] = float(kept[here].float().mean())
        out[name] = row
    return out


def permute_flags(batch: ProbeBatch) -> ProbeBatch:
    """The same sequences with the flag columns (those before the codes) in another order, the question's too."""
    flags = [place for place, name in enumerate(batch.event_names) if not name[-1].isdigit()]
    if len(flags) < 2:
        return batch
    order = list(range(len(batch.event_names)))
    for place, source in zip(flags, [*flags[1:], flags[0]], strict=True):
        order[place] = source
    return replace(batch, events=batch.events[..., order])


def _permuted_skill(net: ProbeNet, batch: ProbeBatch, out: Evaluation, floor: float) -> float:
    answer = answer_batch(net, permute_flags(batch), out.rows, precision=out.precision)[0]
    return 1.0 - float(query_error(answer, batch).nanmean()) / floor


@torch.no_grad()
def diagnose_queries(
    net: ProbeNet, batch: ProbeBatch, rows: int | tuple[int, ...], *, precision: str = "float32"
) -> tuple[dict[str, float], float]:
    """Selected, read, decoded? And what dropping an item's entries costs beyond dropping as many others.

    Queries are read one row at a time, so that the attention each of them pays is known.
    """
    T, L = batch.context_rows, batch.x.shape[1]
    context = read_context(net, batch, rows, precision=precision)
    policies = context.policies
    kept = torch.stack([k for k in (kept_rows(memory, L) for memory in context.memory) if k is not None]).any(0)
    chosen = selection(kept, batch)
    windows = _windows(batch)  # [B, Q, L]
    answers, mass = [], []
    memory: Sequence[Any] = context.memory
    for row in range(T, L):
        step = net.read(batch, slice(row, row + 1), memory, policies)
        memory = step.memory
        here = (batch.q_index == row).float()  # [B, Q]
        answers.append(here[..., None] * net.answer(step.hidden))  # [B, Q, Y]
        mass.append(here * _mass_on(step.traces, windows, net.config.heads))
    answer, read = torch.stack(answers).sum(0), torch.stack(mass).sum(0)  # [B, Q, Y], [B, Q]
    right = ((answer - batch.y).abs() * batch.y_mask).amax(-1) <= 0.25 * batch.y[batch.y_mask].std()
    outcome = stages(chosen.any_row, read, right, batch.asked)
    use = _use(net, batch, context.memory, policies, windows, kept)
    return vars(outcome), use


def _windows(batch: ProbeBatch) -> torch.Tensor:
    """Rows that each query needs, with the rows after them that a convolution copies them to, [B, Q, L] bool."""
    out = torch.zeros(*batch.q_index.shape, batch.x.shape[1] + 1, dtype=torch.bool, device=batch.x.device)
    L = batch.x.shape[1]
    for step in range(4):
        place = torch.where(batch.need >= 0, (batch.need + step).clamp(0, L - 1), L)  # [B, Q, R]
        out.scatter_(2, place, True)
    return out[..., :L]


def _mass_on(traces: Sequence[Any], windows: torch.Tensor, heads: int) -> torch.Tensor:
    """Most attention that a layer pays to each query's own window, mean over heads, [B, Q]."""
    best = torch.zeros(windows.shape[:2], device=windows.device)
    for trace in traces:
        if trace.entries_mass.shape[1] == 0:
            continue
        place = trace.entries_position.round().long().clamp(0, windows.shape[-1] - 1)  # [B, M]
        mine = windows.gather(2, place[:, None].expand(-1, windows.shape[1], -1))  # [B, Q, M]
        best = torch.maximum(best, (mine * trace.entries_mass[:, None] / heads).sum(-1))
    return best


def _use(
    net: ProbeNet,
    batch: ProbeBatch,
    memory: Sequence[Any],
    policies: Sequence[Any],
    windows: torch.Tensor,
    kept: torch.Tensor,
) -> float:
    """Mean causal use over a few queries of each sequence; NaN where nothing that is needed is kept."""
    T, L = batch.context_rows, batch.x.shape[1]
    gen = generator(FLAG_SEED)
    found = []

    def errors(drop: torch.Tensor) -> torch.Tensor:
        edited = [without_rows(part, drop) for part in memory]
        step = net.read(batch, slice(T, L), edited, policies)
        index = (batch.q_index - T)[..., None].expand(-1, -1, step.hidden.shape[-1])
        return query_error(net.answer(step.hidden.gather(1, index)), batch)

    nothing = torch.zeros_like(kept)
    base = errors(nothing)  # [B, Q]
    for number in range(min(4, batch.q_index.shape[1])):
        needed = windows[:, number] & kept  # [B, L]
        others = kept & ~windows[:, number]  # [B, L]
        count = needed.sum(1, keepdim=True)  # [B, 1]
        chance = torch.rand(kept.shape, generator=gen).to(kept.device).masked_fill(~others, -1.0)
        rank = chance.argsort(dim=1, descending=True).argsort(dim=1)  # [B, L]
        as_many = others & (rank < count)
        able = (count[:, 0] > 0) & (as_many.sum(1) == count[:, 0]) & batch.asked[:, number]
        if bool(able.any()):
            use = causal_use(base, errors(needed), errors(as_many))[:, number]
            found.append(use[able])
    return float(torch.cat(found).mean()) if found else math.nan
