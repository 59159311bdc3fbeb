"""The sheet on which a suite renders its items: all tensors of a batch, empty at first.

B sequences · T context rows · L rows, queries included · C channels · F event columns · Q queries · N items
"""

from __future__ import annotations

import math
from typing import Any

import torch

from probes.contract import NO_ROW, Draws, ProbeBatch, ProbeConfig, generator
from probes.draws import carrier, clock, fill, hide_rows, noisy_tags

__all__ = ["Canvas", "code_names", "query_rows", "take"]

BACKGROUND_SEED = 912
KEY_NOISE = 0.1


class Canvas:
    """Tensors of a batch in the making; query rows follow the context.

    Args:
        channels: C, continuous channels; the carrier is drawn for all of them.
        event_names: flags first, then the columns of codes.
        key_width, value_width: of what a memory without training works with.
        query_rows: rows after the context.
    """

    def __init__(
        self,
        config: ProbeConfig,
        draws: Draws,
        n: int,
        *,
        channels: int,
        event_names: tuple[str, ...],
        action_names: tuple[str, ...] = (),
        key_width: int,
        value_width: int,
        query_rows: int,
        background: torch.Tensor | None = None,
    ) -> None:
        T = config.context_rows
        L = T + query_rows
        self.config, self.draws, self.n, self.T, self.L = config, draws, n, T, L
        self.event_names, self.action_names = event_names, action_names
        if background is None:
            background = carrier(draws("carrier"), n, T, channels, config)  # [B, T, C]
        self.x = torch.cat([background, background.new_zeros(n, query_rows, channels)], 1)  # [B, L, C]
        self.events = torch.zeros(n, L, len(event_names))  # [B, L, F]
        self.actions = torch.zeros(n, L, len(action_names))  # [B, L, A]
        self.event_id = torch.full((n, L), -1)  # [B, L]
        self.crit = torch.zeros(n, L, dtype=torch.bool)  # [B, L]
        self.crit_item = torch.full((n, L), -1)  # [B, L]
        self.crit_chan = torch.zeros(n, L, channels, dtype=torch.bool)  # [B, L, C]
        self.distract = torch.zeros(n, L, dtype=torch.bool)  # [B, L]
        self.tagged = torch.zeros(n, L, dtype=torch.bool)  # [B, L]
        self.query = torch.zeros(n, L, dtype=torch.bool)  # [B, L]
        self.query[:, T:] = True
        # rows without a key of their own nearly share one: nothing tells them apart but a little noise
        shared = torch.randn(key_width, generator=generator(BACKGROUND_SEED))  # [G]
        drift = KEY_NOISE * torch.randn(n, L, key_width, generator=draws("background keys"))  # [B, L, G]
        self.key = shared / shared.norm() + drift / math.sqrt(key_width)  # [B, L, G]
        self.value = torch.zeros(n, L, value_width)  # [B, L, V]
        self.bound = torch.zeros(n, L, dtype=torch.bool)  # [B, L] rows with a key and value of their own

    def column(self, name: str) -> int:
        return self.event_names.index(name)

    def flag(self, rows: torch.Tensor, name: str, amount: float | torch.Tensor = 1.0) -> None:
        """Set an event column at rows, [B, N]."""
        values = amount if isinstance(amount, torch.Tensor) else torch.full(rows.shape, amount)
        fill(self.events[..., self.column(name)], rows, values)

    def code(self, rows: torch.Tensor, table: torch.Tensor, first: str = "code_0") -> None:
        """Write codes, [B, N, G], into the columns that start at ``first``."""
        start = self.column(first)
        fill(self.events[..., start : start + table.shape[-1]], rows, table)

    def bind(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """What a memory without training stores at rows: keys [B, N, G] of unit length, values [B, N, V]."""
        unit = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-9)  # [B, N, G]
        fill(self.key, rows, unit)
        fill(self.value, rows, values)
        fill(self.bound, rows, torch.ones_like(rows, dtype=torch.bool))

    def mark_critical(self, rows: torch.Tensor, items: torch.Tensor, channels: Any = None) -> None:
        """Rows [B, N] that items [B, N] need; ``channels`` are those that carry it."""
        ones = torch.ones_like(rows, dtype=torch.bool)
        fill(self.crit, rows, ones)
        fill(self.crit_item, rows, items)
        if channels is not None:
            chosen = torch.zeros(*rows.shape, self.x.shape[-1], dtype=torch.bool)
            chosen[..., channels] = True
            fill(self.crit_chan, rows, chosen)

    def free_rows(self, margin: int = 0) -> torch.Tensor:
        """Context rows that nothing has claimed, [B, T] bool; the last ``margin`` rows are not offered."""
        free = ~(self.crit | self.distract | self.tagged)[:, : self.T].clone()  # [B, T]
        if margin:
            free[:, self.T - margin :] = False
        return free

    def batch(
        self,
        *,
        q_index: torch.Tensor,
        q_item: torch.Tensor,
        y: torch.Tensor,
        need: torch.Tensor,
        x_names: tuple[str, ...],
        items: int,
        y_mask: torch.Tensor | None = None,
        **rest: Any,
    ) -> ProbeBatch:
        """Add clock, gaps and tag noise, and close the sheet."""
        config = self.config
        time = clock(self.draws("clock"), self.n, self.L, config.jitter)  # [B, L]
        context = ~self.query  # [B, L]
        free = context & ~self.crit  # [B, L]
        tags = noisy_tags(self.draws("tags"), self.tagged & context, config=config, items=items, free=free)
        x = self.x
        if config.missing > 0:
            x = hide_rows(self.draws("missing"), x, config.missing, self.crit | self.query | self.distract)
        # every other row writes what it shows: that is what crowds a state
        plain = torch.nan_to_num(self.x[..., : self.value.shape[-1]])  # [B, L, V]
        value = torch.where(self.bound[..., None] | self.query[..., None], self.value, plain)  # [B, L, V]
        if y_mask is None:
            y_mask = torch.ones_like(y, dtype=torch.bool)
        y_mask = y_mask & (need.amax(-1) > NO_ROW)[..., None]  # [B, Q, Y]
        return ProbeBatch(
            x=x, events=self.events, actions=self.actions, time=time, event_id=self.event_id, query=self.query,
            q_index=q_index, q_item=q_item, y=y, y_mask=y_mask, need=need, crit=self.crit, crit_item=self.crit_item,
            crit_chan=self.crit_chan, distract=self.distract, tags=tags, key=self.key, value=value,
            context_rows=self.T, x_names=x_names, event_names=self.event_names, action_names=self.action_names,
            **rest,
        )  # fmt: skip


def code_names(width: int, stem: str = "code") -> tuple[str, ...]:
    return tuple(f"{stem}_{number}" for number in range(width))


def query_rows(n: int, first: int, count: int) -> torch.Tensor:
    """Indices of consecutive query rows, [B, Q]."""
    return (first + torch.arange(count)).expand(n, count).contiguous()


def take(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows of each sequence: table [B, N, ...], index [B, Q] -> [B, Q, ...]."""
    flat = index.reshape(*index.shape, *(1,) * (table.dim() - 2)).expand(*index.shape, *table.shape[2:])
    return table.gather(1, flat)
