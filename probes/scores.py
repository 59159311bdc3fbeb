"""What a memory is scored by: answers, selection, the stage that failed, causal use, and budgets.

B sequences · L rows · Q queries · R rows a query needs · Y numbers in an answer · P points of a frontier
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from probes.contract import ProbeBatch

__all__ = [
    "Selection",
    "Stages",
    "best_floor",
    "budget_area",
    "bytes_at_share",
    "chance_any",
    "corrected",
    "effective_level",
    "query_error",
    "ranks_auroc",
    "selection",
    "skill",
    "stages",
    "survival",
]

RECEPTIVE_ROWS = 3
READ_MASS = 0.5
CLOSE_SIGMA = 0.25
SOLVED_SKILL = 0.8
SAME_SKILL = 0.02


# --- answers


def query_error(answer: torch.Tensor, batch: ProbeBatch) -> torch.Tensor:
    """Mean squared error of each query over what is asked of it, [B, Q]; NaN where nothing is."""
    count = batch.y_mask.sum(-1)  # [B, Q]
    error = ((answer - batch.y).square() * batch.y_mask).sum(-1) / count.clamp_min(1)  # [B, Q]
    return error.masked_fill(count == 0, math.nan)


def close_share(answer: torch.Tensor, batch: ProbeBatch) -> float:
    """Share of queries whose largest error is at most a quarter of the payload's standard deviation."""
    sigma = batch.y[batch.y_mask].std()
    worst = ((answer - batch.y).abs() * batch.y_mask).amax(-1)  # [B, Q]
    return float((worst <= CLOSE_SIGMA * sigma)[batch.asked].float().mean())


def best_floor(floors: dict[str, torch.Tensor], batch: ProbeBatch) -> tuple[str, torch.Tensor]:
    """The floor with the least error, and its error by query, [B, Q]."""
    if not floors:
        raise ValueError("A probe needs at least one floor. Got none.")
    errors = {name: query_error(answer, batch) for name, answer in floors.items()}
    name = min(errors, key=lambda key: float(errors[key].nanmean()))
    return name, errors[name]


def skill(error: float, *, floor: float, oracle: float = 0.0) -> float:
    """1 - (E - E_oracle) / (E_floor - E_oracle): 1 is the oracle, 0 the best predictor without a memory of items.

    Raises:
        ValueError: the floor is no worse than the oracle, so there is nothing to gain.
    """
    if not floor > oracle:
        raise ValueError(f"The floor's error must exceed the oracle's. Got {floor} and {oracle}.")
    return 1.0 - (error - oracle) / (floor - oracle)


# --- selection


@dataclass(frozen=True)
class Selection:
    """Which needed rows are kept at query time."""

    any_row: torch.Tensor  # [B, Q] bool: at least one row of the window is kept
    all_rows: torch.Tensor  # [B, Q] bool: every needed row, each within its tolerance
    by_role: torch.Tensor  # [B, Q, R] bool
    precision: float
    decoy_share: float
    chance: torch.Tensor  # [B, Q]: of ``any_row``, for random rows of the same number and tolerance
    kept_rows: torch.Tensor  # [B, Q]

    def recall(self, asked: torch.Tensor) -> float:
        return float(self.any_row[asked].float().mean())

    def corrected_recall(self, asked: torch.Tensor) -> float:
        """(R - R0) / (1 - R0): 0 for a random router, 1 where everything needed is kept."""
        return corrected(self.recall(asked), float(self.chance[asked].mean()))


def chance_any(rows: torch.Tensor, window: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """P(at least one of ``window`` rows is among ``kept`` of ``rows`` drawn at random) = 1 - C(T-w, B) / C(T, B)."""
    rows, window, kept = (torch.as_tensor(x, dtype=torch.float64) for x in (rows, window, kept))
    kept = torch.minimum(kept, rows)

    def log_choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma((n - k).clamp_min(0) + 1)

    missed = torch.exp(log_choose((rows - window).clamp_min(0), kept) - log_choose(rows, kept))
    return torch.where(kept > rows - window, 1.0, 1.0 - missed)


def corrected(recall: float, chance: float) -> float:
    """Chance-corrected recall; NaN where chance alone keeps everything."""
    return (recall - chance) / (1.0 - chance) if chance < 1.0 else math.nan


def within(kept: torch.Tensor, rows: torch.Tensor, tolerance: int) -> torch.Tensor:
    """Is a row kept, or one of the ``tolerance`` rows after it, which its convolution copies it to?

    kept [B, Q, L] bool, rows [B, Q, R] (-1 for none) -> [B, Q, R] bool.
    """
    L = kept.shape[-1]
    found = torch.zeros_like(rows, dtype=torch.bool)
    for step in range(tolerance + 1):
        place = rows + step  # [B, Q, R]
        there = (rows >= 0) & (place < L)
        found |= kept.gather(2, place.clamp(0, L - 1)) & there
    return found


def selection(kept: torch.Tensor, batch: ProbeBatch, *, tolerance: int = RECEPTIVE_ROWS) -> Selection:
    """Score kept rows, [B, L] at the end or [B, Q, L] at each query, against the rows that queries need.

    The window of an item is its needed rows and the next ``tolerance`` ones. A wider window is easier to hit by
    chance, so recall is only quoted against ``chance``.
    """
    if kept.dim() == 2:
        kept = kept[:, None].expand(-1, batch.q_index.shape[1], -1)  # [B, Q, L]
    rows = batch.need  # [B, Q, R]
    before = torch.arange(kept.shape[-1], device=kept.device) < batch.q_index[..., None]  # [B, Q, L]
    # rows that ask are never kept
    before = before & ~batch.query[:, None]  # [B, Q, L]
    kept = kept & before
    by_role = within(kept, rows, tolerance)  # [B, Q, R]
    any_row = by_role.any(-1)  # [B, Q]
    missing = (rows >= 0) & ~by_role
    all_rows = any_row if batch.need_any else any_row & ~missing.any(-1)  # [B, Q]
    windows = torch.zeros_like(kept)
    needed = torch.zeros_like(kept)
    for step in range(tolerance + 1):
        place = (rows + step).clamp(0, kept.shape[-1] - 1)
        windows.scatter_(2, torch.where(rows >= 0, place, 0), True)
    # row 0 takes the writes of absent rows: take it back unless it is needed
    real = ((rows >= 0) & (rows == 0)).any(-1)  # [B, Q]
    windows[..., 0] = real
    needed = windows & before
    width = needed.sum(-1)  # [B, Q]
    count = kept.sum(-1)  # [B, Q]
    available = before.sum(-1)  # [B, Q]
    union = needed.any(1)  # [B, L]
    total = kept.sum().clamp_min(1)
    return Selection(
        any_row=any_row,
        all_rows=all_rows,
        by_role=by_role,
        precision=float((kept & union[:, None]).sum() / total),
        decoy_share=float((kept & batch.distract[:, None]).sum() / total),
        chance=chance_any(available, width, count).to(kept.device),
        kept_rows=count,
    )


def survival(
    kept_any: torch.Tensor, batch: ProbeBatch, *, edges: tuple[int, ...] = (16, 64, 256, 1024, 4096)
) -> dict[str, tuple[float, int]]:
    """P(item kept | age): share of queries whose item is still kept, by age in rows, and how many there were."""
    delay = batch.delay  # [B, Q]
    out: dict[str, tuple[float, int]] = {}
    low = 0
    for high in (*edges, 2**40):
        here = (delay > low) & (delay <= high) & batch.asked
        count = int(here.sum())
        if count:
            name = f"<={high}" if high < 2**40 else f">{low}"
            out[name] = (float(kept_any[here].float().mean()), count)
        low = high
    return out


def first_kept_after(written: torch.Tensor, evicted: torch.Tensor, ages: tuple[int, ...]) -> list[float]:
    """Kaplan-Meier survival of kept items: written [n] bool, evicted [n] rows after the write (inf: never)."""
    life = evicted[written]
    if len(life) == 0:
        return [math.nan for _ in ages]
    alive, out, ordered = 1.0, [], life.sort().values
    for low, high in zip((0, *ages[:-1]), ages, strict=True):
        at_risk = int((ordered > low).sum())
        died = int(((ordered > low) & (ordered <= high)).sum())
        alive *= 1.0 - died / at_risk if at_risk else 1.0
        out.append(alive)
    return out


# --- the stage that failed


@dataclass(frozen=True)
class Stages:
    """Share of queries by outcome; the parts add up to 1."""

    right: float
    fail_write: float
    fail_read: float
    fail_decode: float
    rescued_by_state: float


def stages(selected: torch.Tensor, read_mass: torch.Tensor, right: torch.Tensor, asked: torch.Tensor) -> Stages:
    """Charge each failed query to the first stage that failed: selected? read? decoded?

    Args:
        selected, right: [B, Q] bool.
        read_mass: attention on the kept rows of the item's window, [B, Q]; half of it counts as read.
    """
    read = read_mass >= READ_MASS  # [B, Q]
    total = int(asked.sum())
    if total == 0:
        raise ValueError("No query counts in this batch. Check y_mask.")

    def share(mask: torch.Tensor) -> float:
        return float((mask & asked).sum()) / total

    return Stages(
        right=share(right & selected),
        fail_write=share(~right & ~selected),
        fail_read=share(~right & selected & ~read),
        fail_decode=share(~right & selected & read),
        rescued_by_state=share(right & ~selected),
    )


def causal_use(base: torch.Tensor, without_needed: torch.Tensor, without_others: torch.Tensor) -> torch.Tensor:
    """What dropping an item's own entries costs beyond dropping as many others: errors [B, Q] -> [B, Q]."""
    return (without_needed - base) - (without_others - base)


# --- routers without a budget


def ranks_auroc(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under the ROC of a score against a label, ties at half; NaN with one class only."""
    score, positive = score.flatten().double(), positive.flatten().bool()
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if n_pos == 0 or n_neg == 0:
        return math.nan
    values, inverse, counts = score.unique(return_inverse=True, return_counts=True)
    upper = counts.cumsum(0).double()
    rank = (upper - (counts - 1) / 2.0)[inverse]  # mean rank of each value, from 1
    return float((rank[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def average_precision(score: torch.Tensor, positive: torch.Tensor) -> float:
    """Area under precision against recall, stepwise."""
    order = score.flatten().argsort(descending=True, stable=True)
    hit = positive.flatten()[order].double()  # [n]
    if hit.sum() == 0:
        return math.nan
    precision = hit.cumsum(0) / torch.arange(1, len(hit) + 1, dtype=torch.float64)
    return float((precision * hit).sum() / hit.sum())


# --- budgets


def budget_area(bytes_total: np.ndarray, skills: np.ndarray, *, bytes_full: float) -> float:
    """AUBF: area under clipped skill over log2(bytes / bytes of full attention), over the width covered.

    Points are joined by straight lines; skill is clipped to [-1, 1].

    Raises:
        ValueError: fewer than two sizes, or sizes that are not positive.
    """
    sizes = np.asarray(bytes_total, dtype=float)
    if len(np.unique(sizes)) < 2 or (sizes <= 0).any() or bytes_full <= 0:
        raise ValueError(f"A frontier needs two or more positive sizes. Got {sorted(set(sizes.tolist()))}.")
    order = np.argsort(sizes, kind="stable")
    x = np.log2(sizes[order] / bytes_full)
    y = np.clip(np.asarray(skills, dtype=float)[order], -1.0, 1.0)
    return float(np.trapezoid(y, x) / (x[-1] - x[0]))


def bytes_at_share(bytes_total: np.ndarray, skills: np.ndarray, *, full_skill: float, share: float) -> float:
    """B50, B90: fewest bytes measured that reach this share of full attention's skill; inf where none does."""
    reached = np.asarray(skills) >= share * full_skill
    return float(np.asarray(bytes_total, dtype=float)[reached].min()) if reached.any() else math.inf


def pareto(bytes_total: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Points that none beats: dominated if, at no more bytes, another's interval lies wholly above. [P] bool."""
    sizes = np.asarray(bytes_total, dtype=float)
    beaten = (sizes[None] <= sizes[:, None]) & (np.asarray(low)[None] > np.asarray(high)[:, None])  # [P, P]
    return np.asarray(~beaten.any(1))


def effective_level(levels: list[float], low_ci: list[float], *, threshold: float = SOLVED_SKILL) -> float:
    """The hardest setting up to which the lower end of skill's interval stays at or above 0.8; NaN if none."""
    best = math.nan
    for value, low in sorted(zip(levels, low_ci, strict=True)):
        if low < threshold:
            break
        best = value
    return best
