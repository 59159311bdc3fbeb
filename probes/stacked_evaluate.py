"""Scores of stacked networks: what ``evaluate.py`` measures, for all seeds of a cell in a few passes.

S networks · E evaluation streams · B sequences of a stream · L rows · T context rows · Q queries
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from probes.contract import EVALUATION_SEED, ProbeBatch, generator
from probes.effects import effect_scores, placebo_batch, placebo_score
from probes.evaluate import (
    DIAGNOSED_SEQUENCES,
    FLAG_SEED,
    Evaluation,
    _slices,
    _windows,
    factual_error,
    permute_flags,
)
from probes.models import ProbeNet, _tensors
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
from probes.stacked import StackedNet, StackedReading
from probes.stacked_data import Decisions, Rows
from probes.stacked_train import stacked_read
from probes.train import TrainPlan, sample

__all__ = ["EvaluationSet", "evaluate_stacked"]

USED_QUERIES = 4
# streams on which flags are permuted: a second reading of all would cost as much as the first
PERMUTED_STREAMS = 2
# what the floors are fitted on
FLOOR_SEQUENCES = 256


@dataclass(frozen=True)
class EvaluationSet:
    """The evaluation streams of a rung, the same for every model, router and budget, and their floors by seed."""

    batches: list[ProbeBatch]  # E of B sequences
    whole: ProbeBatch  # all of them, on the device
    rows: list[Rows]
    permuted: list[Rows]
    floors: dict[int, tuple[str, torch.Tensor]]  # seed -> name, [E B, Q]
    oracle: float
    placebo: ProbeBatch | None = None

    @classmethod
    def of(cls, plan: TrainPlan, *, seeds: Sequence[int], streams: int, sequences: int) -> EvaluationSet:
        batches = [sample(plan, generator(EVALUATION_SEED + stream), sequences) for stream in range(streams)]
        floors = {}
        for seed in seeds:
            train = sample(plan, generator(seed), min(sequences, FLOOR_SEQUENCES))
            found = [best_floor(plan.probe.floors(train, batch), batch) for batch in batches]
            floors[seed] = (found[0][0], torch.cat([error for _, error in found]))
        oracle = float(np.nanmean([float(query_error(plan.probe.oracle(b), b).nanmean()) for b in batches]))
        return cls(
            batches, joined(batches), [Rows.of([batch]) for batch in batches],
            [Rows.of([permute_flags(batch)]) for batch in batches[:PERMUTED_STREAMS]], floors, oracle,
            placebo_batch(plan, sequences),
        )  # fmt: skip

    def to(self, device: str | torch.device) -> EvaluationSet:
        """Where selections are scored."""
        return replace(self, whole=self.whole.to(device), rows=[rows.to(device) for rows in self.rows],
                       permuted=[rows.to(device) for rows in self.permuted],
                       placebo=None if self.placebo is None else self.placebo.to(device))  # fmt: skip


def joined(batches: Sequence[ProbeBatch]) -> ProbeBatch:
    """Several batches as one."""
    first = batches[0]
    changed: dict[str, Any] = {}
    for f in fields(first):
        content = getattr(first, f.name)
        if isinstance(content, torch.Tensor):
            changed[f.name] = torch.cat([getattr(batch, f.name) for batch in batches])
        elif isinstance(content, dict):
            changed[f.name] = {k: torch.cat([getattr(batch, f.name)[k] for batch in batches]) for k in content}
    return replace(first, **changed)


@torch.no_grad()
def evaluate_stacked(
    stack: StackedNet,
    plans: Sequence[TrainPlan],
    data: EvaluationSet,
    *,
    budget_rows: int,
    diagnose: bool = True,
    mechanism: str = "",
) -> list[Evaluation]:
    """Score every network at one budget, kept to as the networks were trained or by one of ``MECHANISMS``."""
    T = data.rows[0].context_rows
    plain = Decisions.plain(budget_rows, networks=stack.S, context_rows=T, device=stack.device, mechanism=mechanism)
    streams = [_read_stream(stack, rows, plain) for rows in data.rows]
    answers = torch.cat([part["answer"] for part in streams], 1)  # [S, E B, Q, Y]
    kept = [torch.cat(parts, 1) for parts in zip(*(part["kept"] for part in streams), strict=True)]
    scores = [torch.cat(parts, 1) for parts in zip(*(part["scores"] for part in streams), strict=True)]
    ahead = torch.cat([part["ahead"] for part in streams], 1)  # [S, E B, T - 1, C]
    permuted = []
    for rows in data.permuted:
        permuted.append(stack.answers(stacked_read(stack, rows, plain), rows)[0])
    flags = torch.cat(permuted, 1)  # [S, B of some streams, Q, Y]
    found = []
    for number, plan in enumerate(plans):
        out = Evaluation(budget_rows)
        _score(
            out, stack.nets[number], data, plan.seed, answers[number], flags[number],
            [rows[number] for rows in kept], [score[number] for score in scores],
        )  # fmt: skip
        out.metrics["factual_nmse"] = factual_error(ahead[number], data.whole.x[:, 1:T])
        found.append(out)
    if data.placebo is not None and diagnose:
        rows = Rows.of([data.placebo], stack.device)
        told = stack.answers(stacked_read(stack, rows, plain), rows)[0]  # [S, B, M, Y]
        for out, answer in zip(found, told, strict=True):
            out.metrics |= placebo_score(answer, data.placebo)
    if diagnose and stack.config.model == "ham":
        for out, (outcome, use) in zip(found, _diagnose(stack, data, plain), strict=True):
            out.stages, out.metrics["causal_use"] = outcome, use
    return found


def _read_stream(stack: StackedNet, rows: Rows, plain: Decisions) -> dict[str, Any]:
    """Answers, kept rows of each layer and scores of one stream."""
    reading = stacked_read(stack, rows, plain, with_scores=True)
    kept, scores = [], []
    for layer in reading.layers:
        if layer.visible is not None:
            # what is there after the context: seen by its last row, and for rivals still there afterwards
            rows_kept = layer.visible[:, stack.T - 1]
            if stack.config.model != "ham":
                rows_kept = rows_kept & layer.visible[:, stack.T]
            kept.append(rows_kept.unflatten(0, (stack.S, -1)))  # [S, B, T]
        if layer.scores is not None:
            scores.append(layer.scores.expand(stack.S, -1, -1))
    ahead = stack.next_rows(reading)
    return {"answer": stack.answers(reading, rows)[0], "kept": kept, "scores": scores, "ahead": ahead}


def _score(
    out: Evaluation,
    net: ProbeNet,
    data: EvaluationSet,
    seed: int,
    answer: torch.Tensor,
    flags: torch.Tensor,
    kept: list[torch.Tensor],
    scores: list[torch.Tensor],
) -> None:
    """All metrics of one network: answer [E B, Q, Y], kept L of [E B, T] bool."""
    batch, E = data.whole, len(data.batches)
    first = batch.select(slice(0, len(flags)))
    floor_name, floor = data.floors[seed]
    error = query_error(answer, batch)  # [E B, Q]
    out.errors = np.nanmean(error.cpu().numpy(), axis=1).reshape(E, -1)
    out.floor_errors = np.nanmean(floor.numpy(), axis=1).reshape(E, -1)
    out.floor_name, out.oracle_error = floor_name, data.oracle
    mse, below = float(np.nanmean(out.errors)), float(np.nanmean(out.floor_errors))
    fixed, exact = layer_bytes(net, kept)
    skills = skill(mse, floor=below, oracle=data.oracle)
    out.metrics |= {
        "close_share": close_share(answer, batch), "bytes_state": fixed, "bytes_kv": exact,
        "bytes_total": fixed + exact, "mse": mse, "nmse": mse / float(batch.y[batch.y_mask].var()), "skill": skills,
        "skill_clipped": max(-1.0, min(1.0, skills)),
        "skill_flags_permuted": 1.0 - float(query_error(flags, first).nanmean()) / float(floor[: len(flags)].nanmean()),
    }  # fmt: skip
    if "baseline" in batch.extra:
        out.metrics |= effect_scores(answer, batch)
    found = None
    if kept and net.config.model == "ham":
        found = _selection_metrics(out, batch, kept, scores)
        out.survival = survival(found, batch)
    out.by_slice = _slices(batch, error.cpu(), floor, None if found is None else found.cpu())


def _selection_metrics(
    out: Evaluation, batch: ProbeBatch, kept: list[torch.Tensor], scores: list[torch.Tensor]
) -> torch.Tensor:
    """Selection over all layers and by layer; whether each query's item is kept, [E B, Q]."""
    T, asked = batch.context_rows, batch.asked
    wide = [torch.nn.functional.pad(rows, (0, batch.x.shape[1] - T)) for rows in kept]  # L of [E B, L rows]
    chosen = selection(torch.stack(wide).any(0), batch)
    out.metrics |= {
        "recall_any": chosen.recall(asked), "recall_all": float(chosen.all_rows[asked].float().mean()),
        "recall_chance": float(chosen.chance[asked].mean()), "recall_corrected": chosen.corrected_recall(asked),
        "precision": chosen.precision, "decoy_share": chosen.decoy_share,
        "usage_rows": float(torch.stack(wide).float().sum(-1).mean()),
    }  # fmt: skip
    for place, role in enumerate(batch.need_role):
        name = f"recall_{place}_{role.replace(' ', '_')}"
        out.metrics[name] = float(chosen.by_role[..., place][asked].float().mean())
    for number, rows in enumerate(wide):
        # one stream says enough about a layer
        part = slice(0, len(batch) // len(out.errors))
        one = selection(rows[part], batch.select(part))
        row = {"recall_corrected": one.corrected_recall(asked[part]), "rows": float(rows.sum(1).float().mean())}
        if number < len(scores):
            row["auroc"] = ranks_auroc(scores[number][part], batch.crit[part, :T])
        out.by_layer.append(row)
    return chosen.any_row


def layer_bytes(net: ProbeNet, kept: list[torch.Tensor]) -> tuple[float, float]:
    """``models.memory_bytes`` of a sequence, from how many rows each layer keeps (L of [B, T] bool)."""
    fixed, exact = float(net.tail_bytes), 0.0
    for number, memory in enumerate(net.empty_memory(1)):
        rows = getattr(memory, "scratchpad", None) or getattr(memory, "kept", None)
        fixed += sum(t[0].numel() * t.element_size() for t in _tensors(memory))
        if number < len(kept):
            each = sum(math.prod(t.shape[2:]) * t.element_size() for t in _tensors(rows))
            exact += float(kept[number].sum(1).float().mean()) * each
    return fixed, exact


# --- the stage that failed


def _diagnose(stack: StackedNet, data: EvaluationSet, plain: Decisions) -> list[tuple[dict[str, float], float]]:
    """``evaluate.diagnose_queries`` of every network: the outcome of each query, and causal use."""
    part = slice(0, DIAGNOSED_SEQUENCES)
    batch = data.batches[0].select(part)
    rows = data.rows[0].select(part)
    if stack.config.control == "shuffled":
        # as one batch reads: the same sequences before each
        plain = replace(plain, given=_given(stack, rows, plain))
    reading = stacked_read(stack, rows, plain)
    answers = stack.answers(reading, rows)[0].cpu()  # [S, B, Q, Y]
    windows = _windows(batch)[..., : stack.T]  # [B, Q, T]
    kept = _union(stack, reading)  # [S, B, T]
    mass = _mass(stack, reading, rows, windows).cpu()  # [S, B, Q]
    uses = _uses(stack, rows, batch, plain, windows, kept, answers)
    found = []
    for number in range(stack.S):
        wide = torch.nn.functional.pad(kept[number], (0, batch.x.shape[1] - stack.T))
        chosen = selection(wide, batch)
        apart = ((answers[number] - batch.y).abs() * batch.y_mask).amax(-1)
        right = apart <= 0.25 * batch.y[batch.y_mask].std()
        outcome = stages(chosen.any_row, mass[number], right, batch.asked)
        found.append((vars(outcome), uses[number]))
    return found


def _given(stack: StackedNet, rows: Rows, plain: Decisions) -> list[torch.Tensor]:
    own, stack.config = stack.config, replace(stack.config, router="learned")
    try:
        first = stack.read(rows, plain)
    finally:
        stack.config = own
    return [layer.routed.roll(1, 1) for layer in first.layers if layer.routed is not None]


def _union(stack: StackedNet, reading: StackedReading) -> torch.Tensor:
    """Rows kept by any layer after the context, [S, B, T] bool on the CPU."""
    kept = [layer.visible[:, stack.T - 1] for layer in reading.layers if layer.visible is not None]
    return torch.stack(kept).any(0).unflatten(0, (stack.S, -1)).cpu()


def _mass(stack: StackedNet, reading: StackedReading, rows: Rows, windows: torch.Tensor) -> torch.Tensor:
    """Most attention that a layer pays to each query's own window among kept rows, [S, B, Q]."""
    index = rows.q_index.expand(stack.S, -1, -1)[..., None].expand(-1, -1, -1, stack.T)  # [S, B, Q, T]
    mine = windows.to(stack.device)
    best = torch.zeros(index.shape[:3], device=stack.device)
    for layer in reading.layers:
        if layer.visible is None or layer.weight is None:
            continue
        paid = (layer.weight[..., : stack.T] * layer.visible).unflatten(0, (stack.S, -1))  # [S, B, N, T]
        best = torch.maximum(best, (paid.gather(2, index) * mine).sum(-1))
    return best


def _uses(
    stack: StackedNet,
    rows: Rows,
    batch: ProbeBatch,
    plain: Decisions,
    windows: torch.Tensor,
    kept: torch.Tensor,
    answers: torch.Tensor,
) -> list[float]:
    """``evaluate._use`` of every network."""
    gen = generator(FLAG_SEED)

    def errors(drop: torch.Tensor) -> torch.Tensor:
        reading = stacked_read(stack, rows, replace(plain, drop=drop.to(stack.device)))
        return torch.stack([query_error(answer, batch) for answer in stack.answers(reading, rows)[0].cpu()])

    base = torch.stack([query_error(answer, batch) for answer in answers])  # [S, B, Q]
    found: list[list[torch.Tensor]] = [[] for _ in range(stack.S)]
    for number in range(min(USED_QUERIES, batch.q_index.shape[1])):
        needed = windows[:, number] & kept  # [S, B, T]
        others = kept & ~windows[:, number]  # [S, B, T]
        count = needed.sum(-1, keepdim=True)  # [S, B, 1]
        chance = torch.rand(batch.crit.shape, generator=gen)[:, : stack.T]  # [B, T]
        chance = chance.expand(kept.shape).masked_fill(~others, -1.0)  # [S, B, T]
        rank = chance.argsort(dim=-1, descending=True).argsort(dim=-1)  # [S, B, T]
        as_many = others & (rank < count)
        able = (count[..., 0] > 0) & (as_many.sum(-1) == count[..., 0]) & batch.asked[:, number]  # [S, B]
        if not bool(able.any()):
            continue
        use = causal_use(base, errors(needed), errors(as_many))[..., number]  # [S, B]
        for place in range(stack.S):
            found[place].append(use[place][able[place]])
    return [float(torch.cat(parts).mean()) if parts and len(torch.cat(parts)) else math.nan for parts in found]
