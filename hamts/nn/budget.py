"""From a budget to a decision: thresholds per layer as a table over shares, and caps in entries from bytes.

B items · S score routers · A shares of the table
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hamts.data.constants import constant
from hamts.nn.scores import as_level

__all__ = ["POOLED", "SHARES", "ThresholdTable", "check_room", "entry_caps"]

# allocations under which all layers share one threshold, so that a layer with more to say keeps more
POOLED = ("pooled", "learned")

SHARES = (0.02, 0.05, 0.10, 0.25, 0.50, 0.75)
# margins of several scores are compared from the threshold for this share
MIDDLE_SHARE = 0.10
# the first batches come from an untrained network: they are followed exactly, later ones slowly
FOLLOW_EXACTLY_STEPS = 25
FOLLOW_RATE = 0.05
# scores that hardly differ still leave a step to go
SMALLEST_SPREAD = 0.1
# a layer that keeps nothing of a sample may still be asked for so much
SMALLEST_PART = 1e-5


class ThresholdTable(nn.Module):
    """For each score router of a layer, the threshold that routes a given share of the observed tokens.

    threshold(s) = (1 - s) quantile of the scores, tracked by an exponential moving average while training
    (as Expert Threshold routing, arXiv 2603.11535, does per expert) and frozen after ``calibrate``. A union of S
    score routers gives each of them s / S, so that together they keep at most s.

    Where one threshold is set for all layers, each layer has ``parts``: the share of its own tokens that it routes at
    each share of the whole. Thresholds that follow the scores follow these; without parts, the share itself.

    Args:
        allocation: of ``ModelConfig``; tables of ``POOLED`` ones have parts.
        shares: of the table's columns, rising. Beyond them thresholds are extrapolated; a network that is asked for a
            smaller share takes a ``finer`` table and calibrates it.
    """

    values: torch.Tensor
    seen_steps: torch.Tensor
    parts: torch.Tensor | None

    def __init__(self, scores: int, shares: Sequence[float] = SHARES, *, allocation: str = "uniform") -> None:
        super().__init__()
        if len(shares) < 2 or not shares[0] > 0 or not shares[-1] < 1 or sorted(set(shares)) != list(shares):
            raise ValueError(f"shares must be two or more between 0 and 1, rising. Got {tuple(shares)}.")
        self.shares = tuple(shares)
        # what margins and spreads are measured by stays where it is in a finer table
        self.low, self.middle, self.high = (self._nearest(mark) for mark in (SHARES[0], MIDDLE_SHARE, SHARES[-1]))
        self.register_buffer("values", torch.zeros(scores, len(shares)))  # [S, A]
        self.register_buffer("seen_steps", torch.zeros((), dtype=torch.int64))  # []
        own = torch.tensor(self.shares).expand(scores, -1).clone() if allocation in POOLED else None  # [S, A]
        self.register_buffer("parts", own)

    @torch.no_grad()
    def finer(self, share: float) -> ThresholdTable:
        """This table with a column for one share more, asked of all scores together; it gives the same thresholds."""
        scores = max(self.values.shape[0], 1)
        shares = sorted({*self.shares, share / scores})
        found = ThresholdTable(self.values.shape[0], shares).to(self.values)
        found.values.copy_(self._at(torch.tensor(shares, dtype=self.values.dtype, device=self.values.device)))
        found.seen_steps.copy_(self.seen_steps)
        if self.parts is not None:
            at = torch.tensor(shares, dtype=self.parts.dtype, device=self.parts.device)  # [A]
            found.register_buffer("parts", self._part_at(at))
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
    def shares_above(
        self, own: torch.Tensor, values: torch.Tensor, counted: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Share of a layer's scores, [n, S], at or above each threshold, [S, A], of all or of those counted, [n]."""
        found = []
        for column in values.to(own.dtype).T:  # [S], one at a time: samples are large
            above = own >= column  # [n, S]
            if counted is None:
                found.append(above.to(values.dtype).mean(0))
            else:
                found.append((above & counted[:, None]).sum(0) / counted.sum().clamp_min(1).to(values.dtype))
        return torch.stack(found, 1)  # [S, A]

    @torch.no_grad()
    def follow(
        self,
        scores: torch.Tensor,
        counted: torch.Tensor | None = None,
        *,
        own: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    ) -> None:
        """Move towards the quantiles of one training batch's scores, [n, S], of all or of those counted, [n].

        Args:
            own: of a pooled table, the scores of this layer among those, and which are counted.
        """
        if scores.shape[0] == 0 or scores.shape[1] == 0:
            return
        # decided where the numbers are: asking for them would wait for the device at every step
        rate = torch.where(self.seen_steps < FOLLOW_EXACTLY_STEPS, 1.0, FOLLOW_RATE).to(self.values.dtype)  # []
        step, found = torch.ones_like(self.seen_steps), self.quantiles(scores, counted)  # [], [S, A]
        if counted is not None:
            some = counted.any()  # []
            rate, step = rate * some, step * some  # [], []
            found = torch.where(some, found, self.values)  # [S, A]
        if self.parts is not None and own is not None and len(own[0]):
            self.parts.lerp_(self.shares_above(own[0], found, own[1]).to(self.parts.dtype), rate.to(self.parts.dtype))
        self.values.lerp_(found, rate)
        self.seen_steps += step

    @torch.no_grad()
    def calibrate(self, scores: torch.Tensor, *, own: torch.Tensor | None = None) -> None:
        """Set the table from a large sample of scores, [n, S], of the finished network; ``own``: as in ``follow``."""
        if scores.shape[0] and scores.shape[1]:
            self.values.copy_(self.quantiles(scores))
            if self.parts is not None and own is not None and len(own):
                self.parts.copy_(self.shares_above(own, self.values))

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

    def part(self, share: torch.Tensor) -> torch.Tensor:
        """What each score router of this layer is to keep where all layers together are asked for [B] -> [B, S]."""
        scores = self.values.shape[0]
        even = (share / max(scores, 1))[:, None].expand(-1, scores)  # [B, S]
        if self.parts is None:
            return even
        asked = (share / max(scores, 1)).clamp(1e-6, 1 - 1e-6).to(self.parts.dtype)  # [B]
        inside = ((share > 0) & (share < 1))[:, None]  # [B, 1]
        return torch.where(inside, self._part_at(asked).T.to(share.dtype), even)  # [B, S]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A table of before there were parts follows the share itself, as it did."""
        if self.parts is not None:
            state_dict.setdefault(prefix + "parts", self.values.new_tensor(self.shares).expand_as(self.parts).clone())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _nearest(self, share: float) -> int:
        """Column of the share next to this one."""
        return min(range(len(self.shares)), key=lambda place: abs(self.shares[place] - share))

    def _at(self, share: torch.Tensor) -> torch.Tensor:
        """Thresholds of every score for its own share, [B] -> [S, B]."""
        return self._between(self.values, share)

    def _part_at(self, share: torch.Tensor) -> torch.Tensor:
        """Parts of every score for a share of the whole, [B] -> [S, B]; interpolated in log-odds of both."""
        assert self.parts is not None
        odds = torch.logit(self.parts.clamp(SMALLEST_PART, 1 - SMALLEST_PART))  # [S, A]
        return torch.sigmoid(self._between(odds, share))  # [S, B]

    def _between(self, table: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """What a table says of shares, [S, A] at [B] -> [S, B]."""
        nodes = constant([math.log(s / (1 - s)) for s in self.shares], share.dtype, share.device)  # [A]
        odds = torch.logit(share)  # [B]
        right = torch.searchsorted(nodes, odds).clamp(1, len(self.shares) - 1)  # [B]
        weight = (odds - nodes[right - 1]) / (nodes[right] - nodes[right - 1])  # [B]; beyond [0, 1] it extrapolates
        low, high = table[:, right - 1], table[:, right]  # [S, B]
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
