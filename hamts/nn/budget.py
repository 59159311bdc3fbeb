"""From a budget to a decision: thresholds per layer as a table over shares, and caps in entries from bytes.

B items · S score routers · A shares of the table
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from hamts.data.constants import constant
from hamts.nn.scores import as_level

__all__ = ["SHARES", "ThresholdTable", "check_room", "entry_caps"]

SHARES = (0.02, 0.05, 0.10, 0.25, 0.50, 0.75)
# margins of several scores are compared from the threshold for this share
MIDDLE_SHARE = 0.10
# the first batches come from an untrained network: they are followed exactly, later ones slowly
FOLLOW_EXACTLY_STEPS = 25
FOLLOW_RATE = 0.05
# scores that hardly differ still leave a step to go
SMALLEST_SPREAD = 0.1


class ThresholdTable(nn.Module):
    """For each score router of a layer, the threshold that routes a given share of the observed tokens.

    threshold(s) = (1 - s) quantile of the scores, tracked by an exponential moving average while training
    (as Expert Threshold routing, arXiv 2603.11535, does per expert) and frozen after ``calibrate``. A union of S
    score routers gives each of them s / S, so that together they keep at most s.

    Args:
        shares: of the table's columns, rising. Beyond them thresholds are extrapolated; a network that is asked for a
            smaller share takes a ``finer`` table and calibrates it.
    """

    values: torch.Tensor
    seen_steps: torch.Tensor

    def __init__(self, scores: int, shares: Sequence[float] = SHARES) -> None:
        super().__init__()
        if len(shares) < 2 or not shares[0] > 0 or not shares[-1] < 1 or sorted(set(shares)) != list(shares):
            raise ValueError(f"shares must be two or more between 0 and 1, rising. Got {tuple(shares)}.")
        self.shares = tuple(shares)
        # what margins and spreads are measured by stays where it is in a finer table
        self.low, self.middle, self.high = (self._nearest(mark) for mark in (SHARES[0], MIDDLE_SHARE, SHARES[-1]))
        self.register_buffer("values", torch.zeros(scores, len(shares)))  # [S, A]
        self.register_buffer("seen_steps", torch.zeros((), dtype=torch.int64))  # []

    @torch.no_grad()
    def finer(self, share: float) -> ThresholdTable:
        """This table with a column for one share more, asked of all scores together; it gives the same thresholds."""
        scores = max(self.values.shape[0], 1)
        shares = sorted({*self.shares, share / scores})
        found = ThresholdTable(self.values.shape[0], shares).to(self.values)
        found.values.copy_(self._at(torch.tensor(shares, dtype=self.values.dtype, device=self.values.device)))
        found.seen_steps.copy_(self.seen_steps)
        return found

    @torch.no_grad()
    def quantiles(self, scores: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        """Thresholds of a sample of scores, [n, S] -> [S, A]; of those that are counted, [n] bool, at least one."""
        levels = constant([1.0 - share for share in self.shares], scores.dtype, scores.device)  # [A]
        if counted is None:
            return torch.quantile(scores, levels, dim=0).T.to(self.values.dtype)  # [S, A]
        # the same for a part of the rows without asking how many they are: all others are sorted behind them
        ordered = torch.where(counted[:, None], scores, torch.inf).sort(0).values  # [n, S]
        last = (counted.sum() - 1).clamp_min(0)  # []
        rank = levels * last.to(scores.dtype)  # [A]
        below = rank.floor()  # [A]
        low, high = ordered[below.long()], ordered[rank.ceil().long()]  # 2 x [A, S]
        return torch.lerp(low, high, (rank - below)[:, None]).T.to(self.values.dtype)  # [S, A]

    @torch.no_grad()
    def follow(self, scores: torch.Tensor, counted: torch.Tensor | None = None) -> None:
        """Move towards the quantiles of one training batch's scores, [n, S], of all or of those counted, [n]."""
        if scores.shape[0] == 0 or scores.shape[1] == 0:
            return
        # decided where the numbers are: asking for them would wait for the device at every step
        rate = torch.where(self.seen_steps < FOLLOW_EXACTLY_STEPS, 1.0, FOLLOW_RATE).to(self.values.dtype)  # []
        step, found = torch.ones_like(self.seen_steps), self.quantiles(scores, counted)  # [], [S, A]
        if counted is not None:
            some = counted.any()  # []
            rate, step = rate * some, step * some  # [], []
            found = torch.where(some, found, self.values)  # [S, A]
        self.values.lerp_(found, rate)
        self.seen_steps += step

    @torch.no_grad()
    def calibrate(self, scores: torch.Tensor) -> None:
        """Set the table from a large sample of scores, [n, S], of the finished network."""
        if scores.shape[0] and scores.shape[1]:
            self.values.copy_(self.quantiles(scores))

    def rank(self, scores: torch.Tensor) -> torch.Tensor:
        """What eviction by score compares, [..., S] -> [...]: the score; of several, the largest margin in spreads."""
        if scores.shape[-1] <= 1:
            return scores[..., 0] if scores.shape[-1] else scores.sum(-1)
        middle = self.values[:, self.middle].to(scores.dtype)  # [S]
        spread = (self.values[:, self.low] - self.values[:, self.high]).to(scores.dtype)  # [S]
        return ((scores - middle) / torch.where(spread > 0, spread, 1.0)).amax(-1)

    def spread(self, on_log_scale: torch.Tensor) -> torch.Tensor:
        """Distance of the thresholds for the smallest and the largest of ``SHARES``, on the level scale, [S]."""
        ends = as_level(self.values[:, [self.low, self.high]].T, on_log_scale)  # [2, S]
        return (ends[0] - ends[1]).clamp_min(SMALLEST_SPREAD)

    def forward(self, share: torch.Tensor) -> torch.Tensor:
        """Thresholds for the share asked of each item, [B] -> [B, S]; interpolated in log-odds of the share."""
        scores = max(self.values.shape[0], 1)
        asked = (share / scores).clamp(1e-6, 1 - 1e-6).to(self.values.dtype)  # [B]
        threshold = self._at(asked).T  # [B, S]
        threshold = torch.where((share <= 0)[:, None], math.inf, threshold)  # [B, S]
        return torch.where((share >= 1)[:, None], -math.inf, threshold)  # [B, S]

    def _nearest(self, share: float) -> int:
        """Column of the share next to this one."""
        return min(range(len(self.shares)), key=lambda place: abs(self.shares[place] - share))

    def _at(self, share: torch.Tensor) -> torch.Tensor:
        """Thresholds of every score for its own share, [B] -> [S, B]."""
        nodes = constant([math.log(s / (1 - s)) for s in self.shares], share.dtype, share.device)  # [A]
        odds = torch.logit(share)  # [B]
        right = torch.searchsorted(nodes, odds).clamp(1, len(self.shares) - 1)  # [B]
        weight = (odds - nodes[right - 1]) / (nodes[right] - nodes[right - 1])  # [B]; beyond [0, 1] it extrapolates
        low, high = self.values[:, right - 1], self.values[:, right]  # [S, B]
        return low + weight * (high - low)


def check_room(budget_bytes: int, smallest: int) -> None:
    """A budget that holds not one entry in each layer is a mistake, unless it is nothing. Raises ValueError."""
    if 0 < budget_bytes < smallest:
        raise ValueError(
            f"budget_bytes must be 0 or at least {smallest}, one kept token in each layer. Got {budget_bytes}."
            f" Choose budget_bytes={smallest} or more, or 0 for no scratchpad."
        )


def entry_caps(*, budget_bytes: int, bytes_per_entry: int, layers: int, must_keep_share: float) -> tuple[int, int]:
    """Most entries per layer (kept by score, must-keep) whose tensors fit the budget of one item."""
    total = budget_bytes // (bytes_per_entry * layers)
    must = int(total * must_keep_share)
    return total - must, must
