"""What stacked networks read, and what their scratchpads may do.

S networks · B sequences · N rows (context and queries) · T context rows · I inputs · A shares of a threshold table
Q queries · Y numbers in an answer · X of an auxiliary target
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hamts.nn.budget import SHARES, ThresholdTable
from probes.contract import ProbeBatch

__all__ = ["MECHANISMS", "Decisions", "Rows", "joined_rows", "table_weights"]


# how a budget is kept to other than by both together: a list that drops the lowest, or a threshold without a cap
MECHANISMS = ("list", "threshold")


@dataclass(frozen=True)
class Rows:
    """Sequences of every network, ready to be read. A leading 1 stands for the same sequences in all networks."""

    inputs: torch.Tensor  # [S, B, N, I]
    heard: torch.Tensor  # [S, B, N] 1 where a row may be written, else 0
    asks: torch.Tensor  # [S, B, N] bool
    unseen: torch.Tensor  # [S, B, N] bool
    tags: torch.Tensor  # [S, B, T] bool
    crit: torch.Tensor  # [S, B, T] bool
    q_index: torch.Tensor  # [S, B, Q]
    y: torch.Tensor  # [S, B, Q, Y]
    y_mask: torch.Tensor  # [S, B, Q, Y] bool
    aux: torch.Tensor | None  # [S, B, Q, X]

    @property
    def context_rows(self) -> int:
        return self.tags.shape[2]

    @classmethod
    def of(cls, batches: Sequence[ProbeBatch], device: str | torch.device = "cpu") -> Rows:
        """One batch a network, or one for all."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in cls.__dataclass_fields__}
        for batch in batches:
            asks, T = batch.query, batch.context_rows
            told = (~batch.x.isnan()).any(-1) | (batch.events.abs().sum(-1) > 0) | (batch.actions.abs().sum(-1) > 0)
            found["inputs"].append(batch.inputs())
            found["heard"].append((told & ~asks).float())
            found["asks"].append(asks)
            found["unseen"].append(batch.unseen)
            found["tags"].append((batch.tags & ~asks)[:, :T])
            found["crit"].append(batch.crit[:, :T])
            for name in ("q_index", "y", "y_mask"):
                found[name].append(getattr(batch, name))
            if batch.aux is not None:
                found["aux"].append(batch.aux)
        stacked = {name: torch.stack(parts).to(device) if parts else None for name, parts in found.items()}
        return cls(**stacked)  # type: ignore[arg-type]

    def select(self, sequences: slice) -> Rows:
        return self.map(lambda tensor: tensor[:, sequences])

    def to(self, device: str | torch.device) -> Rows:
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
        """Apply a function to every tensor."""
        found: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        changed: dict[str, Any] = {name: None if part is None else function(part) for name, part in found.items()}
        return Rows(**changed)


@dataclass(frozen=True)
class Decisions:
    """What scratchpads may do in one pass.

    Attributes:
        cap: most entries of a layer, [S].
        share: of the context rows asked for, [S]; what ``random`` keeps.
        nodes: weights of the threshold tables' columns, [S, A], and
        beyond: what is added to their sum, [S] (``table_weights``).
        warm: keep everything.
        explore: chance of every row and layer to be kept beyond the router's choice, L of [S, B, T]; None for none.
        given: rows kept in the router's place, L of [S, B, T] bool.
        drop: rows that queries do not see, [S, B, T] bool.
        hidden: in so many of the sequences, the first, query rows do not see the state.
    """

    cap: torch.Tensor
    share: torch.Tensor
    nodes: torch.Tensor
    beyond: torch.Tensor
    warm: bool = False
    explore: Sequence[torch.Tensor] | None = None
    given: Sequence[torch.Tensor] | None = None
    drop: torch.Tensor | None = None
    hidden: int = 0

    @classmethod
    def plain(
        cls,
        rows: int | Sequence[int],
        *,
        networks: int,
        context_rows: int,
        device: str | torch.device,
        mechanism: str = "",
    ) -> Decisions:
        """A budget of so many rows a layer, the same for all networks or one for each.

        Args:
            mechanism: one of ``MECHANISMS``; empty: a threshold under a cap.
        """
        if mechanism not in ("", *MECHANISMS):
            raise ValueError(f"Unknown mechanism {mechanism!r}. Available: {list(MECHANISMS)}.")
        if mechanism:
            plain = cls.plain(rows, networks=networks, context_rows=context_rows, device=device)
            if mechanism == "threshold":
                return replace(plain, cap=torch.full_like(plain.cap, context_rows))
            # every row asks, and the cap alone decides
            return replace(
                cls.plain(context_rows, networks=networks, context_rows=context_rows, device=device), cap=plain.cap
            )
        budgets = [rows] * networks if isinstance(rows, int) else list(rows)
        shares = [min(budget / context_rows, 1.0) for budget in budgets]
        nodes, beyond = table_weights(torch.tensor(shares))
        cap = torch.tensor(budgets, dtype=torch.float32, device=device)
        return cls(cap, torch.tensor(shares, device=device), nodes.to(device), beyond.to(device))


def table_weights(share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``ThresholdTable.forward`` of one score as a sum over the table's columns: [...] -> [..., A] and [...]."""
    table = ThresholdTable(1)
    flat, columns = share.flatten(), []
    for place in range(len(SHARES)):
        # linear in the table, so that unit tables give the weights
        table.values.zero_()
        table.values[0, place] = 1.0
        columns.append(table(flat)[:, 0])
    weights = torch.stack(columns, -1)  # [n, A]
    everything = ~weights.isfinite().all(-1)  # [n] a share of 1 or more keeps all
    weights = weights.masked_fill(everything[:, None], 0.0)
    beyond = torch.where(everything, -math.inf, 0.0)
    return weights.reshape(*share.shape, len(SHARES)), beyond.reshape(share.shape)


def joined_rows(parts: Sequence[Rows]) -> Rows:
    """Rows of some networks as those of all."""
    found: dict[str, Any] = {name: [getattr(part, name) for part in parts] for name in Rows.__dataclass_fields__}
    whole: dict[str, Any] = {name: None if every[0] is None else torch.cat(every) for name, every in found.items()}
    return Rows(**whole)
