"""Tier 0 over suites: every router at every budget, the state alone, the state widened to equal bytes, full memory.

B sequences · Q queries · L rows
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from probes import t0
from probes.allocation import NODE_SCHEMES, SCHEMES, allocate, allocate_nodes, recalls
from probes.contract import EVALUATION_SEED, ProbeBatch, ProbeConfig, generator
from probes.mechanisms import mechanism_rows
from probes.prequential import (
    CONTROLS,
    cache_turnover,
    control_errors,
    fading_error,
    rate_limited,
    recovery_rows,
    windowed_mase,
)
from probes.registry import Probe, list_probes
from probes.scores import best_floor, query_error, ranks_auroc, selection, skill, stages, survival

__all__ = ["BUDGET_FRACTIONS", "run_t0", "run_t0_suite"]

BUDGET_FRACTIONS = (0.5, 1.0, 2.0)
SEQUENCES = 32
STREAM_SEQUENCES = 4
KEY_WIDTH = 8
# share of the floor's error from which on a state does not answer a query
FREE_NERR = 0.8
# a state that is to know a season needs a key for each of its places
STREAM_KEY_WIDTH = 64
# fits between two drifts of the control that is fitted anew from time to time
REFITS = 4
# routers of which one row of each season is kept at most
LIMIT = ":limited"
LIMITED = ("innovation:limited", "surprise:limited")


@dataclass(frozen=True)
class Case:
    """One rung, drawn: sequences to fit the few numbers that are fitted, and sequences to score on."""

    probe: Probe
    rung: str
    train: ProbeBatch
    batch: ProbeBatch
    floor_name: str
    floor: torch.Tensor  # [B, Q, Y]
    floor_error: float
    trace: t0.Trace
    blend: torch.Tensor | None
    train_floor: torch.Tensor  # [B, Q, Y]
    key_width: int
    config: ProbeConfig

    @property
    def critical(self) -> int:
        """Rows that must be kept: the most of any sequence."""
        return int(self.batch.crit.sum(1).max())


def draw_case(probe: Probe, rung: str, *, preset: str, seed: int, overrides: dict[str, Any] | None = None) -> Case:
    """Draw a rung and fit what tier 0 fits."""
    config = probe.config(preset, rung, **(overrides or {}))
    n = SEQUENCES if probe.trained else STREAM_SEQUENCES
    train = probe.sample(generator(seed), n, config)
    batch = probe.sample(generator(EVALUATION_SEED + seed), n, config)
    floors = probe.floors(train, batch)
    name, error = best_floor(floors, batch)
    width = KEY_WIDTH if probe.trained else STREAM_KEY_WIDTH
    trace = t0.read_state(batch, key_width=width)
    train_floor = probe.floors(train, train)[name]
    blend = t0.fit_blend(train, t0.read_state(train, key_width=width), train_floor)
    mse = float(error.nanmean())
    return Case(probe, rung, train, batch, name, floors[name], mse, trace, blend, train_floor, width, config)


def run_t0_suite(
    probe: Probe,
    *,
    preset: str = "small",
    seed: int = 0,
    rungs: tuple[str, ...] | None = None,
    overrides: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """All rows of one suite: one dictionary per rung, model, router and budget.

    Args:
        overrides: values of axes that differ from the preset's.
    """
    rows: list[dict[str, Any]] = []
    for rung in rungs or tuple(probe.rungs):
        case = draw_case(probe, rung, preset=preset, seed=seed, overrides=overrides)
        for fraction in BUDGET_FRACTIONS:
            budget = max(round(fraction * case.critical), 1)
            wide, free = _wide_row(case, budget, fraction)
            rows += [_router_row(case, name, budget, fraction, seed, free) for name in t0.ROUTERS_T0]
            rows.append(wide)
            if probe.trained:
                rows += mechanism_rows(case, budget, fraction, seed)
        rows += _anchors(case)
        if "drift_rows" in case.batch.extra:
            rows += _prequential(case, case.critical, seed)
        if "reporter" in case.batch.extra:
            rows += _allocation(case)
        if "node" in case.batch.extra:
            rows += _nodes(case, seed)
    return rows


def run_t0(*, preset: str = "small", seed: int = 0) -> list[dict[str, Any]]:
    """Every registered suite. Deterministic for a seed."""
    return [row for probe in list_probes().values() for row in run_t0_suite(probe, preset=preset, seed=seed)]


def _row(case: Case, model: str, router: str, **content: Any) -> dict[str, Any]:
    return {
        "suite": case.probe.name, "suite_version": case.probe.version, "rung": case.rung, "tier": "T0",
        "model": model, "router": router, "floor_name": case.floor_name, **content,
    }  # fmt: skip


def _answered(case: Case, answer: torch.Tensor) -> dict[str, float]:
    error = query_error(answer, case.batch)  # [B, Q]
    mse = float(error.nanmean())
    return {"mse": mse, "skill": skill(mse, floor=case.floor_error), "nerr": mse / case.floor_error}


def _router_row(
    case: Case, name: str, budget: int, fraction: float, seed: int, free: torch.Tensor | None
) -> dict[str, Any]:
    row = scored_row(case, name, keep_by(case, name, budget, seed), budget=budget, rows=budget, free=free)
    return {**row, "budget_frac": fraction}


def scored_row(
    case: Case, name: str, kept: torch.Tensor, *, budget: int, rows: float, free: torch.Tensor | None = None
) -> dict[str, Any]:
    """What rows kept at each query, [B, Q, L] bool, are worth; ``rows`` of them is what the bytes are counted by.

    Args:
        free: queries that a state of as many bytes answers anyway, [B, Q] bool; the others have a skill of their own.
    """
    batch = case.batch
    chosen = selection(kept, batch)
    exact = selection(kept, batch, tolerance=0)
    answer = t0.answer(batch, case.trace, exact.all_rows, case.floor, blend=case.blend)
    right = (answer - batch.y).abs().mul(batch.y_mask).amax(-1) <= 0.25 * float(batch.y[batch.y_mask].std())
    outcome = stages(exact.all_rows, torch.ones_like(batch.delay, dtype=torch.float32), right, batch.asked)
    width, value = case.key_width, batch.value.shape[-1]
    exact_bytes = rows * t0.row_bytes(width, value)
    return _row(
        case, "kv", name, budget_rows=budget, bytes_kv=exact_bytes,
        bytes_state=t0.state_bytes(width, value), bytes_total=exact_bytes + t0.state_bytes(width, value),
        **_answered(case, answer), **_not_free(case, answer, free), recall_any=chosen.recall(batch.asked),
        recall_exact=exact.recall(batch.asked), chance=float(chosen.chance[batch.asked].mean()),
        recall_corrected=chosen.corrected_recall(batch.asked),
        recall_all=float(chosen.all_rows[batch.asked].float().mean()),
        precision=chosen.precision, decoy_share=chosen.decoy_share, fail_write=outcome.fail_write,
        rescued_by_state=outcome.rescued_by_state, survival=survival(chosen.any_row, batch),
        by_role={role: float(chosen.by_role[..., place][batch.asked].float().mean())
                 for place, role in enumerate(batch.need_role)},
    )  # fmt: skip


def keep_by(case: Case, name: str, budget: int, seed: int) -> torch.Tensor:
    """What a router keeps, [B, Q, L]; ``stride`` at its best phase."""
    gen = generator(seed + 1)
    if name != "stride":
        return t0.keep(t0.scores(name, case.batch, case.trace, gen=gen), case.batch, budget)
    best, found = -1.0, None
    for phase in range(max(round(case.batch.context_rows / budget), 1)):
        score = t0.scores(name, case.batch, case.trace, gen=gen, phase=phase, rows=budget)
        kept = t0.keep(score, case.batch, budget)
        recall = selection(kept, case.batch).recall(case.batch.asked)
        if recall > best:
            best, found = recall, kept
        if phase >= 15:
            break
    assert found is not None
    return found


def _not_free(case: Case, answer: torch.Tensor, free: torch.Tensor | None) -> dict[str, float]:
    """Skill on what no state of as many bytes answers, how many queries that are, and how much it leaves out.

    The floor's error is that on the same queries: they are not as hard for it as all of them are.
    """
    if free is None:
        return {}
    asked = case.batch.asked
    hard = asked & ~free  # [B, Q]
    told = {"free_share": float((asked & free).sum()) / float(asked.sum()), "not_free": float(hard.sum())}
    if not bool(hard.any()):
        return told
    error, floor = (float(query_error(a, case.batch)[hard].mean()) for a in (answer, case.floor))
    return {**told, "skill_not_free": 1.0 - error / floor}


def _wide_row(case: Case, budget: int, fraction: float) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The state alone, widened until it takes the bytes of the small state and the kept rows; what it answers, [B, Q].

    A query is free if the error of that state is below ``FREE_NERR`` of the floor's: what it asks for need not be kept.
    """
    value = case.batch.value.shape[-1]
    width = t0.widened_key(budget, key_width=case.key_width, value_width=value)
    content: dict[str, Any] = {}
    free = None
    if case.batch.key_direct:
        blend = t0.fit_blend(case.train, t0.read_state(case.train, key_width=width), case.train_floor)
        trace = t0.read_state(case.batch, key_width=width)
        nothing = torch.zeros_like(case.batch.asked)
        told = t0.answer(case.batch, trace, nothing, case.floor, blend=blend)
        free = query_error(told, case.batch) < FREE_NERR * case.floor_error  # [B, Q]
        content = _answered(case, told)
    total = t0.state_bytes(width, value)
    row = _row(case, "state_wide", "none", budget_rows=budget, budget_frac=fraction, key_width=width, bytes_kv=0,
               bytes_state=total, bytes_total=total, **content)  # fmt: skip
    return row, free


def _anchors(case: Case) -> list[dict[str, Any]]:
    """The state alone, everything kept, and how surprising the critical rows are."""
    batch = case.batch
    nothing = torch.zeros_like(batch.asked)
    width, value = case.key_width, batch.value.shape[-1]
    state = t0.answer(batch, case.trace, nothing, case.floor, blend=case.blend)
    full = t0.answer(batch, case.trace, batch.asked, case.floor, blend=case.blend)
    context = ~batch.query
    state_size = case.trace.error.norm(dim=-1)  # [B, L]
    auroc = {
        name: ranks_auroc(
            t0.scores(name, batch, case.trace, gen=generator(0))[context], batch.crit[context]
        )
        for name in ("surprise", "innovation", "write", "mix")
    }  # fmt: skip
    anchors = [
        _row(case, "state", "none", bytes_total=t0.state_bytes(width, value), **_answered(case, state)),
        _row(case, "full", "all", bytes_total=batch.context_rows * t0.row_bytes(width, value),
             budget_rows=batch.context_rows, **_answered(case, full)),
        _row(case, "rows", "none", utility_auroc=auroc,
             residual_percentile=_percentile(value_residual(batch), batch, context),
             state_residual_percentile=_percentile(state_size, batch, context)),
    ]  # fmt: skip
    if int(batch.distract.sum()) and batch.key_direct:
        for router in ("write", "mix"):
            anchors.append(_clipped_row(case, router))
    return anchors


def _clipped_row(case: Case, router: str) -> dict[str, Any]:
    """The same router over a state whose writes are clipped; it scores the unclipped error."""
    batch = case.batch
    trace = t0.read_state(batch, key_width=case.key_width, write_clip=True)
    clipped = t0.read_state(case.train, key_width=case.key_width, write_clip=True)
    blend = t0.fit_blend(case.train, clipped, case.train_floor)
    budget = case.critical
    kept = t0.keep(t0.scores(router, batch, trace, gen=generator(1)), batch, budget)
    chosen = selection(kept, batch, tolerance=0)
    answer = t0.answer(batch, trace, chosen.all_rows, case.floor, blend=blend)
    return _row(case, "kv", router, budget_rows=budget, budget_frac=1.0, write_clip=True,
                recall_exact=chosen.recall(batch.asked), **_answered(case, answer))  # fmt: skip


def value_residual(batch: ProbeBatch) -> torch.Tensor:
    """How far each row is from the straight line through the two rows before it, [B, L]: predictable when written?"""
    x = torch.nan_to_num(batch.x)  # [B, L, C]
    residual = torch.zeros(x.shape[:2])
    residual[:, 2:] = (x[:, 2:] - 2 * x[:, 1:-1] + x[:, :-2]).norm(dim=-1)
    return residual


def _percentile(size: torch.Tensor, batch: ProbeBatch, context: torch.Tensor) -> float:
    """Mean percentile of the critical rows' residuals among the rows of their context."""
    shares = []
    for errors, critical, there in zip(size, batch.crit, context, strict=True):
        if bool(critical.any()):
            shares.append((errors[there][None] <= errors[critical][:, None]).float().mean())
    return 100.0 * float(torch.stack(shares).mean()) if shares else math.nan


def _prequential(case: Case, budget: int, seed: int) -> list[dict[str, Any]]:
    """Errors before each row is read, recovery after drifts, what the drift storm did to each router's cache."""
    batch = case.batch
    season = getattr(case.config, "season_rows", 1)
    drifts = batch.extra["drift_rows"]
    rows = [_error_row(case, "state, learning", case.trace.error, drifts, season)]
    keys = t0.random_keys(batch.key, case.key_width)  # [B, L, K]
    for kind in CONTROLS:
        # a fit of so many rows, as often
        refit = max(int(drifts.diff(dim=1).float().mean()) // REFITS, 2 * season)
        error = control_errors(kind, keys, batch.value, batch.query, drifts, refit=refit)
        rows.append(_error_row(case, f"state, {kind}", error, drifts, season))
    naive = torch.zeros_like(batch.value)
    naive[:, season:] = batch.value[:, season:] - batch.value[:, :-season]
    rows.append(_error_row(case, "seasonal naive", naive, drifts, season))
    for name in ("surprise", "innovation", "write", "tags", "mix", "recency", *LIMITED):
        score = t0.scores(name.removesuffix(LIMIT), batch, case.trace, gen=generator(seed + 1))
        rows.append(_storm_row(case, name, score, drifts, budget, season))
    return rows


def _error_row(case: Case, model: str, error: torch.Tensor, drifts: torch.Tensor, season: int) -> dict[str, Any]:
    """Errors before each row is read, [B, L, V], and how soon after drifts they are those of a state that learns."""
    squared, learning = (e.square().mean(-1) for e in (error, case.trace.error))  # 2 x [B, L]
    mase = windowed_mase(error.abs().mean(-1), case.batch.value, season=season, window=10 * season)
    recovered = recovery_rows(squared, drifts, steady=learning)
    return _row(case, model, "none", fading_error=float(fading_error(squared)[:, -1].mean()),
                windowed_mase=float(mase.mean()), recovery_rows=float(recovered.nanmedian()),
                recovered_share=float((~recovered.isnan()).float().mean()))  # fmt: skip


def _storm_row(
    case: Case, name: str, score: torch.Tensor, drifts: torch.Tensor, budget: int, season: int
) -> dict[str, Any]:
    """What a drift does to a cache: how much of it is replaced within some seasons, and is its item still there?"""
    batch = case.batch
    turnover, held = [], []
    for number in range(drifts.shape[1]):
        row = drifts[:, number : number + 1]
        pair = torch.cat([row, (row + 4 * season).clamp_max(batch.x.shape[1])], 1)  # [B, 2]
        before = torch.arange(batch.x.shape[1]) < pair[..., None]  # [B, 2, L]
        known = torch.where(before, score[:, None], -math.inf)  # [B, 2, L]
        if name.endswith(LIMIT):
            # of what was there then: a later row of the window silences none before it comes
            known = rate_limited(known.flatten(0, 1), window=season).view(known.shape)
        kept = t0._best(known, budget)  # [B, 2, L]
        turnover.append(cache_turnover(kept[:, 0], kept[:, 1]))
        # the item that was stored shortly before this drift
        held.append((kept[:, 1] & (batch.crit_item == number)).any(1).float())
    return _row(case, "kv", name, budget_rows=budget, drift_turnover=float(torch.stack(turnover).mean()),
                recall_after_drift=float(torch.stack(held).mean()))  # fmt: skip


def _allocation(case: Case) -> list[dict[str, Any]]:
    total = int(case.batch.crit.sum(1)[0])
    return [
        _row(case, "kv", f"alloc:{scheme}", budget_rows=total,
             **{f"recall_{name}": value
                for name, value in recalls(allocate(scheme, case.batch, case.train, total), case.batch).items()})
        for scheme in SCHEMES
    ]  # fmt: skip


def _nodes(case: Case, seed: int) -> list[dict[str, Any]]:
    """A total of as many rows as are critical, with budgets of nodes.

    The score of ``random`` says what is had by knowing which rows belong to a node, and by how many they are.
    """
    batch, rows = case.batch, []
    for router in ("write", "mix", "random"):
        score = t0.scores(router, batch, case.trace, gen=generator(seed + 1))
        for scheme in NODE_SCHEMES:
            kept = allocate_nodes(scheme, batch, score, case.critical)  # [B, L]
            every = kept[:, None].expand(-1, batch.q_index.shape[1], -1)
            held = float(kept.sum(1).float().mean())
            row = scored_row(case, f"nodes:{scheme}:{router}", every, budget=case.critical, rows=held)
            rows.append({**row, "budget_frac": 1.0, "kept_rows": held})
    return rows
