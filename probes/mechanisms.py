"""How a budget is kept to, without training: a list that drops the lowest, a threshold, a threshold that moves.

A list has its size; a threshold keeps what it keeps, so that its bytes are a random number: they are reported as they
came out, and a comparison is one of skill and bytes together.

B sequences · T context rows · L rows
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from probes import t0
from probes.contract import generator

if TYPE_CHECKING:
    from probes.t0_run import Case

__all__ = ["MECHANISMS", "keep_with", "mechanism_rows"]

MECHANISMS = ("list", "threshold", "target")
# what is kept by a score that has no ties and no rows that never ask
SCORED = ("write", "innovation", "surprise", "mix")
# share of the spread of scores that a threshold moves by when a row is kept that would not be at the target
TRACK_RATE = 0.05


def keep_with(
    mechanism: str, score: torch.Tensor, *, rows: int, context_rows: int, known: torch.Tensor
) -> torch.Tensor:
    """Rows that are there after the context, [B, L] bool.

    Args:
        mechanism: ``list`` keeps the best so far; ``threshold`` what reaches the level that the wanted share of
            calibration scores reaches; ``target`` moves that level after every row, so that the share which is kept
            comes near the wanted one in each sequence.
        score: [B, L], -inf for rows that do not ask.
        known: scores of calibration sequences, [n].

    Raises:
        ValueError: an unknown mechanism, or a budget below one entry.
    """
    t0.check_budget(rows)
    if mechanism not in MECHANISMS:
        raise ValueError(f"Unknown mechanism {mechanism!r}. Available: {list(MECHANISMS)}.")
    kept = torch.zeros_like(score, dtype=torch.bool)
    here, share = score[:, :context_rows], min(rows / context_rows, 1.0)
    if mechanism == "list":
        kept[:, :context_rows] = t0._best(here, rows)
        return kept
    level = torch.quantile(known, 1.0 - share)
    if mechanism == "threshold":
        kept[:, :context_rows] = here >= level
        return kept
    spread = (torch.quantile(known, 1.0 - share / 2) - torch.quantile(known, max(1.0 - 2 * share, 0.0))).clamp_min(1e-6)
    levels = level.expand(len(score)).clone()  # [B]
    for row in range(context_rows):
        taken = here[:, row] >= levels  # [B]
        kept[:, row] = taken
        levels += TRACK_RATE * spread * (taken.float() - share)
    return kept


def mechanism_rows(case: Case, budget: int, fraction: float, seed: int) -> list[dict[str, Any]]:
    """Every scored router with a threshold at one budget: what was kept, at which bytes, and what it answers.

    The list is what the routers' own rows have.
    """
    from probes.t0_run import scored_row

    batch, train = case.batch, case.train
    before = t0.read_state(train, key_width=case.key_width)
    found = []
    for name in SCORED:
        score = t0.scores(name, batch, case.trace, gen=generator(seed + 1))
        known = t0.scores(name, train, before, gen=generator(seed + 2))[:, : train.context_rows].flatten()
        for mechanism in MECHANISMS[1:]:
            kept = keep_with(
                mechanism, score, rows=budget, context_rows=batch.context_rows, known=known[known > -torch.inf]
            )
            count = kept.sum(1).float()  # [B]
            low, high = (float(torch.quantile(count, level)) for level in (0.05, 0.95))
            wide = kept[:, None].expand(-1, batch.q_index.shape[1], -1)  # [B, Q, L]
            row = scored_row(case, f"{name}:{mechanism}", wide, budget=budget, rows=float(count.mean()))
            kept_rows = {"usage_rows": float(count.mean()), "usage_rows_low": low, "usage_rows_high": high}
            found.append({**row, **kept_rows, "budget_frac": fraction})
    return found
