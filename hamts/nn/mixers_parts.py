"""What the rivals of the HAM layer are put together from: two branches, what they carry, and what they report.

The branches are those of ``ham.py`` (short convolution, gated delta rule, rotary keys, one softmax over window and
entries, level features), so that a rival differs from HAM in its memory and in nothing else.

B items · C channels · N patches · D width · H heads · K key · V value · R carried rows · M kept rows · S scores
W window patches
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from hamts.config import ModelConfig
from hamts.nn.counts import sharpened
from hamts.nn.ham import CONV_WIDTH, FASTEST_TOKENS, MARKS, SLOWEST_TOKENS, HeadNorm, LayerTrace, rotate
from hamts.nn.tokens import Policy, Tokens
from hamts.ops.kernels import Kernels
from hamts.ops.types import Attended, GatedDelta, ScratchKeys

__all__ = [
    "NEVER",
    "ExactBranch",
    "Kept",
    "MixerMemory",
    "Recent",
    "RecurrentBranch",
    "compact",
    "fixed_bytes",
    "join_rows",
    "quiet_trace",
    "row_bytes",
    "short_convolution",
]

NEVER = 2**40
T = TypeVar("T")


# --- what is carried


@dataclass(frozen=True)
class Recent:
    """The last R patches of every channel: read exactly."""

    keys: torch.Tensor  # [B, R, C, H, K]
    values: torch.Tensor  # [B, R, C, H, V]
    marks: torch.Tensor  # [B, R, C, 3]
    score: torch.Tensor  # [B, R, C, S] what decides about keeping; S = 0 where nothing does
    present: torch.Tensor  # [B, R, C] bool
    writable: torch.Tensor  # [B, R, C] bool: may be kept once it leaves the window


@dataclass(frozen=True)
class Kept:
    """Rows that stay readable after the window, oldest first; rows that are not alive are padding."""

    keys: torch.Tensor  # [B, M, H, K]
    values: torch.Tensor  # [B, M, H, V]
    marks: torch.Tensor  # [B, M, 3]
    score: torch.Tensor  # [B, M, S]
    channel: torch.Tensor  # [B, M] int64
    index: torch.Tensor  # [B, M] int64, patches of the item read before this one
    alive: torch.Tensor  # [B, M] bool


@dataclass(frozen=True)
class MixerMemory:
    """All that a layer of a rival knows of the past of B items. Parts that a rival has not are empty."""

    state: torch.Tensor  # [B, C, H, K, V], or [B, C, levels, H, K, V]
    conv_tail: torch.Tensor  # [B, C, taps, ...] inputs of the short convolution
    count: torch.Tensor  # [B] int64, patches read
    recent: Recent
    kept: Kept


def join_rows(first: T, second: T) -> T:
    """Two containers of rows, one after the other."""
    names = [f.name for f in fields(first)]  # type: ignore[arg-type]
    return type(first)(**{n: torch.cat([getattr(first, n), getattr(second, n)], dim=1) for n in names})


def compact(rows: Kept, alive: torch.Tensor, *also: torch.Tensor) -> tuple[Kept, list[torch.Tensor]]:
    """The rows that are alive, without gaps, in their order; as many as the item with most of them has.

    Args:
        alive: which rows stay, [B, J] bool.
        also: more values of the rows, [B, J] each, gathered along.
    """
    count = int(alive.sum(dim=1).max()) if alive.shape[1] else 0
    # a stable sort puts the rows that stay first, in their order
    order = torch.argsort(~alive, dim=1, stable=True)[:, :count] if count else alive.new_zeros(len(alive), 0).long()

    def pick(x: torch.Tensor) -> torch.Tensor:
        return x.gather(1, order.reshape(*order.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))

    picked: dict[str, torch.Tensor] = {f.name: pick(getattr(rows, f.name)) for f in fields(Kept)}
    picked["alive"] = pick(alive)
    return Kept(**picked), [pick(x) for x in also]


def fixed_bytes(memory: Any) -> int:
    """Bytes of one item's tensors in a memory that has read nothing, so without kept rows."""
    if memory is None:
        return 0
    if isinstance(memory, torch.Tensor):
        return memory[0].numel() * memory.element_size()
    return sum(fixed_bytes(getattr(memory, f.name)) for f in fields(memory))


def row_bytes(kept: Kept) -> int:
    """Bytes of one kept row, summed over its tensors."""
    return sum(math.prod(getattr(kept, f.name).shape[2:]) * getattr(kept, f.name).element_size() for f in fields(Kept))


def quiet_trace(tokens: Tokens, routed: torch.Tensor, kept: Kept, mass: torch.Tensor | None) -> LayerTrace:
    """The trace of a layer whose memory decides nothing by a score that is learned or reported.

    Args:
        routed: tokens that stay readable on leaving the window, [B, C, N] bool.
        kept: rows that were readable in this chunk, [B, M], and
        mass: the attention each received, summed over queries and heads, [B, M].
    """
    B, C, N = tokens.heard.shape
    like = tokens.heard
    return LayerTrace(
        scores=like.new_zeros(B, C, N, 0),
        threshold=like.new_zeros(B, 0),
        by_score=torch.zeros(B, C, N, 0, dtype=torch.bool, device=like.device),
        must_keep=torch.zeros(B, C, N, dtype=torch.bool, device=like.device),
        routed=routed,
        entries_bias=like.new_zeros(kept.alive.shape),
        entries_mass=like.new_zeros(kept.alive.shape) if mass is None else mass,
        entries_judged=torch.zeros_like(kept.alive),
        # the mass is a sum: as if each had been seen once
        entries_sights=kept.alive.long(),
        entries_position=kept.index.double(),
        entries_channel=kept.channel,
    )


# --- the recurrent branch


def short_convolution(mixed: torch.Tensor, taps: torch.Tensor, tail: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal convolution of each unit with SiLU: mixed [B, C, N, I], taps [I, taps] -> the same, and the new tail."""
    N = mixed.shape[2]
    padded = torch.cat([tail.to(mixed.dtype), mixed], dim=2)  # [B, C, taps - 1 + N, I]
    convolved = padded[:, :, :N] * taps[:, 0]  # [B, C, N, I]
    for tap in range(1, taps.shape[1]):
        convolved = convolved + padded[:, :, tap : tap + N] * taps[:, tap]  # [B, C, N, I]
    return F.silu(convolved), padded[:, :, N:]


class RecurrentBranch(nn.Module):
    """Short convolution and decay rates around the gated delta rule, with keys and values of any width."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.units = 3 * heads * head_width
        self.conv = nn.Parameter(torch.empty(self.units, CONV_WIDTH))  # [3 H K, taps]
        self.decay_rate = nn.Parameter(torch.empty(heads))  # [H] log of the decay per patch
        with torch.no_grad():
            nn.init.uniform_(self.conv, -0.3, 0.3)
            # start as a pass-through: the newest tap dominates
            self.conv[:, -1] += 1.0
            tau = torch.logspace(math.log10(FASTEST_TOKENS), math.log10(SLOWEST_TOKENS), heads)  # [H]
            self.decay_rate.copy_(torch.log(torch.expm1(1.0 / tau)))

    def inputs(
        self, mixed: torch.Tensor, gates: torch.Tensor, tokens: Tokens, tail: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v [B, C, N, H, K], log decay and write gate [B, C, N, H], and the new tail.

        Args:
            mixed: [B, C, N, 3 H K].
            gates: logits of decay and write gate, [B, C, N, 2, H].
        """
        B, C, N, _ = mixed.shape
        convolved, after = short_convolution(mixed, self.conv, tail)
        q, k, v = convolved.reshape(B, C, N, 3, self.heads, self.head_width).unbind(3)  # 3 x [B, C, N, H, K]
        beta = gates[..., 1, :].sigmoid() * tokens.heard[..., None]  # [B, C, N, H]
        elapsed = (tokens.elapsed * tokens.present)[:, None, :, None].to(mixed.dtype)  # [B, 1, N, 1]
        log_decay = -F.softplus(gates[..., 0, :] + self.decay_rate) * elapsed  # [B, C, N, H]
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, log_decay, beta, after

    def forward(
        self,
        mixed: torch.Tensor,
        gates: torch.Tensor,
        tokens: Tokens,
        *,
        state: torch.Tensor,
        tail: torch.Tensor,
        rule: Callable[..., GatedDelta],
    ) -> tuple[GatedDelta, torch.Tensor, torch.Tensor]:
        """The gated delta ``rule`` over a chunk, every tensor [B, C, N, ...]; the write gates and the new tail."""
        B, C, N, _ = mixed.shape
        q, k, v, log_decay, beta, after = self.inputs(mixed, gates, tokens, tail)
        result = rule(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), log_decay=log_decay.flatten(0, 1),
            beta=beta.flatten(0, 1), initial_state=state.flatten(0, 1),
        )  # fmt: skip
        grid = (B, C, N, self.heads, self.head_width)
        result = GatedDelta(
            output=result.output.reshape(grid),
            prediction=result.prediction.reshape(grid),
            error=result.error.reshape(grid),
            state=result.state.reshape(state.shape),
        )
        return result, beta, after


# --- the exact branch


class ExactBranch(nn.Module):
    """Keys, queries and the read over the window and whatever rows are kept."""

    def __init__(self, config: ModelConfig, *, window: int, rows: int) -> None:
        super().__init__()
        D, H = config.width, config.heads
        K = D // H
        self.heads, self.head_width = H, K
        self.window, self.rows = window, rows
        self.cross_span = min(config.cross_span_patches, window)
        self.rotary_share, self.read_reference = config.rotary_share, config.read_reference
        self.to_query = nn.Linear(D, D, bias=False)
        self.query_norm, self.key_norm = HeadNorm(H, K, gain=config.match_gain), HeadNorm(H, K)
        self.from_marks = nn.Parameter(torch.zeros(H, 2, K))  # [H, 2, K]
        self.channel_bias = nn.Parameter(torch.ones(H))  # [H]
        self.scratch_bias = nn.Parameter(torch.full((H,), config.entry_bias))  # [H]

    def empty(self, items: int, channels: int, like: torch.Tensor, *, scores: int) -> tuple[Recent, Kept]:
        """Nothing recent, nothing kept."""
        H, K, R = self.heads, self.head_width, self.rows

        def zeros(*shape: int, kind: torch.dtype = like.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=kind, device=like.device)

        recent = Recent(
            keys=zeros(items, R, channels, H, K),
            values=zeros(items, R, channels, H, K),
            marks=zeros(items, R, channels, MARKS),
            score=zeros(items, R, channels, scores),
            present=zeros(items, R, channels, kind=torch.bool),
            writable=zeros(items, R, channels, kind=torch.bool),
        )
        kept = Kept(
            keys=zeros(items, 0, H, K),
            values=zeros(items, 0, H, K),
            marks=zeros(items, 0, MARKS),
            score=zeros(items, 0, scores),
            channel=zeros(items, 0, kind=torch.int64),
            index=zeros(items, 0, kind=torch.int64),
            alive=zeros(items, 0, kind=torch.bool),
        )
        return recent, kept

    def rows_of(self, pair: torch.Tensor, score: torch.Tensor, tokens: Tokens, recent: Recent) -> Recent:
        """The carried rows followed by the chunk's own, [B, R + N, C, ...]; pair [B, C, N, 2, H, K]."""
        keys, values = pair.unbind(3)  # 2 x [B, C, N, H, K]
        C = keys.shape[1]
        chunk = Recent(
            keys=rotate(self.key_norm(keys).transpose(1, 2), tokens.position, self.rotary_share),
            values=values.transpose(1, 2),
            marks=tokens.marks.transpose(1, 2),
            score=score.transpose(1, 2),
            present=tokens.present[:, :, None].expand(-1, -1, C),
            writable=(tokens.routable | tokens.must_keep).transpose(1, 2),
        )
        return join_rows(recent, chunk)

    def queries(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """Scaled and rotated queries, [B, N, C, H, K]."""
        B, C, N, _ = x.shape
        raw = self.to_query(x).reshape(B, C, N, self.heads, self.head_width).transpose(1, 2)  # [B, N, C, H, K]
        return rotate(self.query_norm(raw), tokens.position, self.rotary_share) * self.head_width**-0.5

    def forward(
        self,
        queries: torch.Tensor,
        rows: Recent,
        kept: Kept,
        span: tuple[torch.Tensor, torch.Tensor],
        policy: Policy,
        kernels: Kernels,
    ) -> Attended:
        """One softmax over the window, the other channels and the kept rows, seen by queries ``span`` = [from, to)."""
        N = queries.shape[1]
        scratch = ScratchKeys(
            keys=kept.keys,
            values=kept.values,
            channel=kept.channel,
            bias=self.scratch_bias.expand(*kept.alive.shape, -1),
            visible_from=torch.where(kept.alive, span[0], NEVER),
            visible_until=span[1],
            marks=kept.marks,
        )
        local = {name: last_rows(getattr(rows, name), self.window + N) for name in ("keys", "values", "marks")}
        spans = {"window": self.window, "cross_span": self.cross_span}
        return kernels.attend(
            sharpened(queries, scratch, policy.readable, **spans, reference=self.read_reference),
            local_keys=local["keys"],
            local_values=local["values"],
            local_present=last_rows(rows.present, self.window + N),
            scratch=scratch,
            readable=policy.readable,
            channel_bias=self.channel_bias,
            local_marks=local["marks"],
            **spans,
        )

    def leveled(self, output: torch.Tensor, marks: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """What was read with its level and scale against now: [B, N, C, H, V] -> [B, C, N, H, V].

        The marks are (level, log scale, 1), so the last column of what was read is the share read from the own channel.
        """
        read = marks.transpose(1, 2)  # [B, C, N, H, 3]
        apart = read[..., :2] - read[..., 2:] * now[..., None, :2]  # [B, C, N, H, 2]
        level = torch.asinh(apart[..., :1] * torch.exp(-now[..., None, 1:2]))  # [B, C, N, H, 1]
        pair = torch.cat([level, apart[..., 1:].clamp(-5, 5)], -1)  # [B, C, N, H, 2]
        return output.transpose(1, 2) + torch.einsum("bcnhr,hrv->bcnhv", pair, self.from_marks)


def last_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The last rows along dimension 1; where there are fewer, zeros before them."""
    missing = rows - x.shape[1]
    if missing <= 0:
        return x[:, -missing:]
    return torch.cat([x.new_zeros(x.shape[0], missing, *x.shape[2:]), x], 1)
