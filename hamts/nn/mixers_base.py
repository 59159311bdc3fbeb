"""One layer of a rival: a recurrent branch, an exact branch, or both, and a rule for what is kept.

B items · C channels · N patches · D width · H heads · K key · V value · R carried rows · M kept rows · S scores
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from hamts.config import ModelConfig
from hamts.nn.budget import ThresholdTable
from hamts.nn.ham import CONV_WIDTH, HeadNorm, LayerOutput
from hamts.nn.heads import start_gates, start_queries
from hamts.nn.mixers_parts import (
    NEVER,
    ExactBranch,
    Kept,
    MixerMemory,
    Recent,
    RecurrentBranch,
    compact,
    join_rows,
    quiet_trace,
)
from hamts.nn.tokens import Policy, Tokens
from hamts.ops.kernels import TORCH, Kernels
from hamts.ops.types import GatedDelta

__all__ = ["MixerLayer", "Parts"]


@dataclass(frozen=True)
class Parts:
    """What a layer is made of.

    Attributes:
        recurrent: whether it has a recurrent state.
        window: patches of the own channel that are read exactly, this one included.
        keeps: whether tokens that leave the window stay readable.
        branch_gates: whether both branches are mixed by gates of their own, as in HAM.
        output_gate: whether the output is gated.
        state_width: K and V of the state; 0: as wide as HAM's.
        carried: patches carried from chunk to chunk; 0: those of the window.
    """

    recurrent: bool
    window: int
    keeps: bool
    branch_gates: bool = True
    output_gate: bool = True
    state_width: int = 0
    carried: int = 0


class MixerLayer(nn.Module):
    """Base of the rivals. A subclass says what is kept: for how long a token that left the window is seen."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__()
        D, H = config.width, config.heads
        K = D // H
        self.parts, self.heads, self.head_width = parts, H, K
        state_width = parts.state_width or config.head_state_width
        # keys and values are shared by both branches, as in HAM, unless the state has another width than a head
        self.shared = parts.recurrent and state_width == K
        self.recurrent = RecurrentBranch(H, state_width) if parts.recurrent else None
        self.to_memory = nn.Linear(D, self.memory_units(D), bias=False)
        rows = parts.carried or (parts.window if parts.keeps else parts.window - 1)
        self.exact = ExactBranch(config, window=parts.window, rows=rows)
        self.exact_norm = HeadNorm(H, K)
        count = (2 + 2 * parts.branch_gates) if parts.recurrent else 0
        self.to_gates = nn.Linear(D, count * H) if count else None
        self.recurrent_norm = HeadNorm(H, state_width) if parts.recurrent else None
        self.narrow = nn.Linear(H * state_width, D, bias=False) if parts.recurrent and not self.shared else None
        self.to_output_gate = nn.Linear(D, D) if parts.output_gate else None
        self.to_output = nn.Linear(D, D, bias=False)
        # what runs the recurrence and the read; decided for the whole network by ``HAMNetwork.use_kernels``
        self.kernels: Kernels = TORCH
        # there is nothing to calibrate, which a table of no scores says
        self.thresholds = ThresholdTable(0)
        start_gates(config, self.to_gates, self.to_output_gate)
        start_queries(config, self.exact.to_query, self.to_memory)

    def memory_units(self, D: int) -> int:
        """Width of the projection that feeds both branches; the last 2 D are keys and values of the exact one."""
        if self.recurrent is None:
            return 2 * D
        return 3 * D if self.shared else self.recurrent.units + 2 * D

    @property
    def scores(self) -> int:
        """How many numbers a row carries that decide about keeping it."""
        return 0

    @property
    def scratch_bias(self) -> torch.Tensor:
        """Added to the logits of kept rows, [H]; where ``HAMLayer`` has it."""
        return self.exact.scratch_bias

    def state_shape(self) -> tuple[int, ...]:
        """Shape of one channel's state."""
        if self.recurrent is None:
            return (0,)
        return (self.heads, self.recurrent.head_width, self.recurrent.head_width)

    def empty_memory(self, items: int, channels: int, like: torch.Tensor) -> Any:
        """A memory that has read nothing, for so many items of so many channels."""
        recent, kept = self.exact.empty(items, channels, like, scores=self.scores)
        units = 0 if self.recurrent is None else self.recurrent.units
        return MixerMemory(
            state=like.new_zeros(items, channels, *self.state_shape()),
            conv_tail=like.new_zeros(items, channels, CONV_WIDTH - 1, units),
            count=torch.zeros(items, dtype=torch.int64, device=like.device),
            recent=recent,
            kept=kept,
        )

    def forward(
        self,
        x: torch.Tensor,
        *,
        tokens: Tokens,
        memory: Any,
        policy: Policy,
        stepwise: bool = False,
        advance: bool = True,
    ) -> LayerOutput:
        """Read and write a chunk of N patches; arguments as for ``HAMLayer``. Budgets of the policy are not used:
        a rival has the size it was built with."""
        B, C, N, D = x.shape
        # an absent token is as if it had never been: no trace in the convolution either
        present = tokens.present[:, None, :, None].to(x.dtype)  # [B, 1, N, 1]
        mixed = self.to_memory(x) * present  # [B, C, N, I]
        pair = mixed[..., -2 * D :].reshape(B, C, N, 2, self.heads, self.head_width)  # [B, C, N, 2, H, K]
        gates = None if self.to_gates is None else self.to_gates(x).reshape(B, C, N, -1, self.heads)
        state, tail = memory.state, memory.conv_tail
        carried, score = None, x.new_zeros(B, C, N, 0)
        if self.recurrent is not None and gates is not None:
            units = mixed[..., : self.recurrent.units]  # [B, C, N, 3 H K]
            carried, score, state, tail = self._recurrent(units, gates, x, tokens, memory, stepwise=stepwise)
        rows = self.exact.rows_of(pair, score, tokens, memory.recent)
        read, kept, seen, mass = self._exact(x, rows, tokens, memory, policy)
        output = self._mix(x, carried, read, gates)
        after = memory
        if advance:
            after = MixerMemory(state, tail, memory.count + tokens.present.sum(1), self._recent_after(rows), kept)
        written = (tokens.routable | tokens.must_keep) & self.parts.keeps  # [B, C, N]
        return LayerOutput(output, after, quiet_trace(tokens, written, seen, mass))

    def step(self, x: torch.Tensor, *, tokens: Tokens, memory: Any, policy: Policy) -> LayerOutput:
        """One patch, [B, C, 1, D], through the step-by-step recurrence: what a stream runs."""
        return self.forward(x, tokens=tokens, memory=memory, policy=policy, stepwise=True)

    def _recurrent(
        self,
        units: torch.Tensor,
        gates: torch.Tensor,
        x: torch.Tensor,
        tokens: Tokens,
        memory: MixerMemory,
        *,
        stepwise: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the state says, [B, C, N, H, V], the scores of the tokens, [B, C, N, S], the new state and tail."""
        assert self.recurrent is not None
        # other widths than a head's were not asked about when kernels were chosen
        kernels = self.kernels if self.shared else TORCH
        rule = kernels.gated_delta_step if stepwise else kernels.gated_delta
        result, beta, tail = self.recurrent(
            units, gates[..., :2, :], tokens, state=memory.state, tail=memory.conv_tail, rule=rule
        )
        return result.output, self._scores(result, beta), result.state, tail

    def _scores(self, result: GatedDelta, beta: torch.Tensor) -> torch.Tensor:
        """Scores that decide about keeping, [B, C, N, S]."""
        return beta.new_zeros(*beta.shape[:3], 0)

    def _exact(
        self, x: torch.Tensor, rows: Recent, tokens: Tokens, memory: MixerMemory, policy: Policy
    ) -> tuple[torch.Tensor, Kept, Kept, torch.Tensor | None]:
        """What was read exactly, [B, C, N, H, V]; the rows kept after it; those seen in it, and their mass, [B, M]."""
        N = x.shape[2]
        kept, begin, end = self._candidates(rows, tokens, memory)
        read = self.exact(self.exact.queries(x, tokens), rows, kept, (begin, end), policy, self.kernels)
        assert read.marks is not None
        staying, _ = compact(kept, kept.alive & (begin < N) & (end > N))
        return self.exact.leveled(read.output, read.marks, tokens.marks), staying, kept, read.scratch_mass

    def _candidates(self, rows: Recent, tokens: Tokens, memory: MixerMemory) -> tuple[Kept, torch.Tensor, torch.Tensor]:
        """Kept rows and tokens that leave the window in this chunk, and the queries [from, to) that see each."""
        if not self.parts.keeps:
            nothing = torch.zeros_like(memory.kept.index)
            return memory.kept, nothing, nothing
        leaving = self._leaving(rows, tokens, memory)
        both = join_rows(memory.kept, leaving)  # [B, M + N C]
        begin = self._leaves_at(both, tokens, memory)  # [B, M + N C]
        kept, (begin,) = compact(both, both.alive, begin.clamp_min(0))
        return kept, begin, self._until(kept, begin, self._leaves_at(kept, tokens, memory))

    def _leaving(self, rows: Recent, tokens: Tokens, memory: MixerMemory) -> Kept:
        """Tokens that leave the window in this chunk, time first, then channel: [B, N C, ...]."""
        N, W = tokens.heard.shape[2], self.parts.window
        first = rows.present.shape[1] - W - N
        return self._as_kept(rows, slice(first, first + N), tokens, memory)

    def _as_kept(self, rows: Recent, chosen: slice, tokens: Tokens, memory: MixerMemory) -> Kept:
        """Some rows as candidates for keeping, time first, then channel."""
        B, total, C = rows.present.shape
        after = memory.count + tokens.present.sum(1)  # [B]
        index = after[:, None] - total + torch.arange(total, device=after.device)  # [B, R + N]
        channel = torch.arange(C, device=after.device).expand(B, total, C)  # [B, R + N, C]
        part = {name: getattr(rows, name)[:, chosen].flatten(1, 2) for name in ("keys", "values", "marks", "score")}
        alive = rows.writable & (index >= 0)[..., None]  # [B, R + N, C]
        return Kept(
            **part,
            channel=channel[:, chosen].flatten(1, 2),
            index=index[:, chosen, None].expand(-1, -1, C).flatten(1, 2),
            alive=alive[:, chosen].flatten(1, 2),
        )

    def _leaves_at(self, kept: Kept, tokens: Tokens, memory: MixerMemory) -> torch.Tensor:
        """Query of this chunk that is the first to see each row as kept, [B, M]; negative for those from before."""
        N = tokens.heard.shape[2]
        first = memory.count + tokens.present.sum(1) - N  # [B] patches read before query 0
        return kept.index - first[:, None] + self.parts.window

    def _until(self, kept: Kept, begin: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
        """First query that no longer sees each row, [B, M]."""
        return torch.full_like(begin, NEVER)

    def _recent_after(self, rows: Recent) -> Recent:
        R = self.exact.rows
        first = rows.present.shape[1] - R
        return replace(rows, **{name: getattr(rows, name)[:, first:] for name in Recent.__dataclass_fields__})

    def _mix(
        self, x: torch.Tensor, carried: torch.Tensor | None, read: torch.Tensor, gates: torch.Tensor | None
    ) -> torch.Tensor:
        """Both branches normed, gated as asked and projected: [B, C, N, D]."""
        both = self.exact_norm(read)  # [B, C, N, H, V]
        if carried is not None and gates is not None and self.recurrent_norm is not None:
            past = self.recurrent_norm(carried)  # [B, C, N, H, V]
            if self.narrow is not None:
                past = self.narrow(past.flatten(-2)).reshape(both.shape)  # [B, C, N, H, V]
            if self.parts.branch_gates:
                past, both = gates[..., 2, :, None].sigmoid() * past, gates[..., 3, :, None].sigmoid() * both
            both = past + both
        flat = both.flatten(-2)  # [B, C, N, D]
        if self.to_output_gate is not None:
            flat = flat * self.to_output_gate(x).sigmoid()
        return self.to_output(flat)
