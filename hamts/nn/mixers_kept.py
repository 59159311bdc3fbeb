"""Rivals that keep tokens as they are: all of them, the newest, those written hardest, a mean of every few, or blocks.

B items · C channels · N patches · H heads · K key · V value · R carried rows · M kept rows · J candidates
n some of the patches · W window · m tokens of a pool or block · G pools or blocks
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hamts.config import ModelConfig
from hamts.nn.mixers_base import MixerLayer, Parts
from hamts.nn.mixers_parts import NEVER, Kept, MixerMemory, Recent, compact, join_rows
from hamts.nn.tokens import Policy, Tokens
from hamts.ops.types import GatedDelta, compute_dtype

__all__ = ["BlockSparseLayer", "PooledLayer", "SlidingLayer", "TopWriteLayer"]

# weights of a block-sparse read that are there at once: so many queries as have no more of them
PIECE_WEIGHTS = 1 << 26


class SlidingLayer(MixerLayer):
    """Keeps every token for so many patches after it left the window."""

    def __init__(self, config: ModelConfig, parts: Parts, *, patches: int) -> None:
        super().__init__(config, parts)
        self.patches = patches

    def _until(self, kept: Kept, begin: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
        return leaves + self.patches


class TopWriteLayer(MixerLayer):
    """A bounded exact cache of the tokens that changed the state most, read beside the state, always on.

    Score: write gate times error norm, b ||e||, the size of what is written to the state; mean over heads, since all
    heads of an entry are kept or dropped together. The lowest score makes room; of equal ones the newer.

    Source: HOLA, arXiv 2607.02303; it has a cache per head, and no channels.
    """

    def __init__(self, config: ModelConfig, parts: Parts, *, entries: int) -> None:
        super().__init__(config, parts)
        self.entries = entries

    @property
    def scores(self) -> int:
        return 1

    @torch.no_grad()
    def _scores(self, result: GatedDelta, beta: torch.Tensor) -> torch.Tensor:
        return (beta * result.error.norm(dim=-1)).mean(-1, keepdim=True)  # [B, C, N, 1]

    def _until(self, kept: Kept, begin: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
        return beaten_at(kept.score[..., 0], kept.alive, begin, most=self.entries)


def beaten_at(score: torch.Tensor, alive: torch.Tensor, begin: torch.Tensor, *, most: int) -> torch.Tensor:
    """When each row of a list that holds the ``most`` highest scores is pushed out, [B, M] int64.

    Rows come in their order; a row is out from the first moment at which ``most`` others that came have higher
    scores, or equal ones and came before. Exact whatever was pushed out before, since who is out never returns.
    """
    M = score.shape[1]
    if M == 0:
        return begin
    row = torch.arange(M, device=score.device)  # [M]
    first = alive & (begin <= 0)  # [B, M] there from the start: a sort says how many of them beat each
    known = torch.where(first, score, -torch.inf)  # [B, M]
    order = torch.sort(known, dim=1, descending=True, stable=True).indices  # [B, M]
    rank = torch.zeros_like(order).scatter(1, order, row.expand_as(order))  # [B, M]
    not_lower = M - torch.searchsorted(torch.sort(known, dim=1).values, score.contiguous())  # [B, M]
    before = torch.where(first, rank, not_lower)  # [B, M]
    later = alive & ~first  # [B, M] these come one after the other
    count = int(later.sum(1).max())
    place = torch.argsort(~later, dim=1, stable=True)[:, :count]  # [B, F]
    comes, rival, there = begin.gather(1, place), score.gather(1, place)[:, :, None], later.gather(1, place)
    older = place[:, :, None] < row  # [B, F, M]
    beats = (rival > score[:, None]) | ((rival == score[:, None]) & older)  # [B, F, M]
    beaten = before[:, None] + (beats & there[:, :, None]).cumsum(1)  # [B, F, M] by how many, up to then
    full = (beaten >= most) & there[:, :, None]  # [B, F, M]
    when = torch.where(full, comes[:, :, None], NEVER)  # [B, F, M]
    when = when.amin(1) if count else torch.full_like(begin, NEVER)  # [B, M]
    return torch.maximum(torch.where(before >= most, 0, when), begin)


class PooledLayer(MixerLayer):
    """Every m tokens of a channel become one entry, which stands in their place; first in, first out.

    Tokens are read exactly until their pool is full, as the current chunk is in CAT. An entry is the mean of keys and
    of values under weights that a learned direction gives to the keys, so its logit is the mean of theirs.

    Source: Compress & Attend, arXiv 2511.05313, and latent-context compression, arXiv 2606.09659; both compress with
    an encoder of their own, which is a weighted mean here.
    """

    def __init__(self, config: ModelConfig, parts: Parts, *, entries: int) -> None:
        super().__init__(config, parts)
        self.entries, self.pool = entries, config.pool_patches
        self.weigh = nn.Parameter(torch.zeros(self.heads, self.head_width))  # [H, K]; a plain mean at first

    def _candidates(self, rows: Recent, tokens: Tokens, memory: MixerMemory) -> tuple[Kept, torch.Tensor, torch.Tensor]:
        unpooled = self._as_kept(rows, slice(0, rows.present.shape[1] - self.parts.window), tokens, memory)
        begin = self._leaves_at(unpooled, tokens, memory)  # [B, J]
        # seen until the last of its pool leaves the window
        end = begin + self.pool - 1 - unpooled.index % self.pool  # [B, J]
        pools, pool_begin = self._pools(unpooled, begin, tokens)
        seen = join_rows(memory.kept, pools)  # [B, M + G C]
        seen_begin = torch.cat([torch.full_like(memory.kept.index, -1), pool_begin], 1)  # [B, M + G C]
        seen, (seen_begin,) = compact(seen, seen.alive, seen_begin)
        seen_end = self._pushed_out(seen.alive, seen_begin)
        # those not pooled are carried as recent rows: none of them stays after the chunk
        end = end.clamp_max(tokens.heard.shape[2])
        both = join_rows(seen, unpooled)
        begin, end = torch.cat([seen_begin, begin], 1), torch.cat([seen_end, end], 1)
        every, (begin, end) = compact(both, both.alive, begin, end)
        return every, begin.clamp_min(0), end

    def _pools(self, unpooled: Kept, begin: torch.Tensor, tokens: Tokens) -> tuple[Kept, torch.Tensor]:
        """Pools that fill up in this chunk, [B, G C, ...], and the query at which each does, [B, G C]."""
        B, N = tokens.position.shape
        C, m = tokens.heard.shape[1], self.pool
        L = unpooled.alive.shape[1] // C  # patches, m - 1 before the chunk's N
        grid = {n: getattr(unpooled, n).unflatten(1, (L, C)) for n in ("keys", "values", "marks", "alive", "index")}
        # every stretch of m patches; those that end where a pool ends are pools
        stretch = {n: x.unfold(1, m, 1) for n, x in grid.items()}  # [B, L - m + 1, C, ..., m]
        last = stretch["index"][..., -1]  # [B, N, C]
        there = stretch["alive"]  # [B, N, C, m]
        filled = (last % m == m - 1) & (last >= 0) & there.any(-1)  # [B, N, C]
        G = -(-L // m)
        order = torch.argsort(~filled.any(2), dim=1, stable=True)[:, :G]  # [B, G] stretches that are pools, in time
        chosen = {n: pick(x, order) for n, x in {**stretch, "filled": filled}.items()}  # [B, G, C, ..., m]
        logits = torch.einsum("bgchkm,hk->bgchm", chosen["keys"], self.weigh)  # [B, G, C, H, m]
        mask = chosen["alive"][:, :, :, None]  # [B, G, C, 1, m]
        logits = logits.masked_fill(~mask, -torch.inf).masked_fill(~mask.any(-1, keepdim=True), 0.0)
        weight = torch.softmax(logits, -1) * mask  # [B, G, C, H, m]
        mean = weight.mean(3)  # [B, G, C, m]
        index = chosen["index"][..., -1]  # [B, G, C]
        channel = torch.arange(C, device=index.device).expand_as(index)  # [B, G, C]
        pools = Kept(
            keys=torch.einsum("bgchkm,bgchm->bgchk", chosen["keys"], weight).flatten(1, 2),
            values=torch.einsum("bgchvm,bgchm->bgchv", chosen["values"], weight).flatten(1, 2),
            marks=torch.einsum("bgcrm,bgcm->bgcr", chosen["marks"], mean).flatten(1, 2),
            score=unpooled.score.new_zeros(B, index[0].numel(), 0),
            channel=channel.flatten(1, 2),
            index=index.flatten(1, 2),
            alive=chosen["filled"].flatten(1, 2),
        )
        when = stretch_begin(begin.unflatten(1, (L, C)), m)  # [B, N, C]
        return pools, pick(when, order).flatten(1, 2)

    def _pushed_out(self, alive: torch.Tensor, begin: torch.Tensor) -> torch.Tensor:
        """First in, first out: a row ends when the one ``entries`` later appears, [B, M]."""
        later = torch.full_like(begin, NEVER)
        if begin.shape[1] > self.entries:
            coming = torch.where(alive, begin, NEVER)[:, self.entries :]
            later[:, : -self.entries] = coming
        return later


def pick(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of dimension 1, [B, L, ...] and [B, G] -> [B, G, ...]."""
    return x.gather(1, order.reshape(*order.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def stretch_begin(begin: torch.Tensor, m: int) -> torch.Tensor:
    """Of each stretch of m patches, when its last one leaves the window: [B, L, C] -> [B, L - m + 1, C]."""
    return begin[:, m - 1 :]


class BlockSparseLayer(MixerLayer):
    """Every token is kept; a query reads the window, the unfinished block, and the blocks whose mean key fits it best.

    Blocks are m tokens of one channel. It saves time, not bytes.

    Source: mixture of block attention, arXiv 2502.13189: parameter-free gating by q . mean(k), per head.
    """

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.block, self.top = config.block_patches, config.top_blocks

    def _exact(
        self, x: torch.Tensor, rows: Recent, tokens: Tokens, memory: MixerMemory, policy: Policy
    ) -> tuple[torch.Tensor, Kept, Kept, torch.Tensor | None]:
        B, C, N, _ = x.shape
        kept, begin, _ = self._candidates(rows, tokens, memory)
        queries = self.exact.queries(x, tokens)  # [B, N, C, H, K]
        blocks = self._blocks(kept, begin, tokens, memory, policy)
        local = {n: getattr(rows, n)[:, -(self.parts.window + N) :] for n in ("keys", "values", "marks")}
        near = self._near(rows.present[:, -(self.parts.window + N) :], policy, N)  # [B, N, C, W + N, C]
        kind = compute_dtype(queries, kept.keys)
        keys = torch.cat([local["keys"].flatten(1, 2), kept.keys], 1).to(kind)  # [B, J, H, K]
        values = torch.cat([local["values"].flatten(1, 2), kept.values], 1).to(kind)  # [B, J, H, V]
        marks = torch.cat([local["marks"].flatten(1, 2), kept.marks], 1).to(kind)  # [B, J, 3]
        channel = torch.arange(C, device=x.device).expand(B, self.parts.window + N, C).flatten(1, 2)
        own = torch.cat([channel, kept.channel], 1)[:, None] == torch.arange(C, device=x.device)[:, None]  # [B, C, J]
        bias = own[:, :, None] * self.exact.channel_bias[:, None]  # [B, C, H, J]
        entry = torch.cat([torch.zeros_like(channel), torch.ones_like(kept.channel)], 1)[:, None, None]  # [B, 1, 1, J]
        bias = bias + entry * self.exact.scratch_bias[:, None]  # [B, C, H, J]
        marked = own.to(kind)[..., None] * marks[:, None]  # [B, C, J, 3]
        size = max(1, PIECE_WEIGHTS // max(1, B * C * self.heads * keys.shape[1]))
        read = []
        for at in range(0, N, size):
            piece = partial(self._piece, blocks.of(slice(at, at + size)), near[:, at : at + size])
            tensors = (queries[:, at : at + size].to(kind), keys, values, marked, bias)
            # weights are many times what is read with them: they are found once more where a gradient needs them
            again = size < N and torch.is_grad_enabled()
            read.append(
                checkpoint(piece, *tensors, use_reentrant=False, preserve_rng_state=False) if again else piece(*tensors)
            )
        output, level = (torch.cat([one[part] for one in read], 1).to(x.dtype) for part in (0, 1))
        staying, _ = compact(kept, kept.alive & (begin < N))
        mass = torch.stack([one[2] for one in read]).sum(0)[:, channel.shape[1] :]  # [B, M]
        return self.exact.leveled(output, level, tokens.marks), staying, kept, mass

    def _piece(
        self,
        blocks: Blocks,
        near: torch.Tensor,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        marked: torch.Tensor,
        bias: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What n of the queries read: values, [B, n, C, H, V], levels, [B, n, C, H, 3], and mass, [B, J].

        Args:
            near: rows of the window and the chunk that each reads, [B, n, C, W + N, C].
            queries: [B, n, C, H, K].
            keys, values: of all rows, [B, J, H, K] and [B, J, H, V].
            marked: marks of rows of the own channel, [B, C, J, 3].
            bias: of the logits, [B, C, H, J].
        """
        seen = blocks.read_by(queries, self.top)  # [B, n, C, H, M]
        mask = torch.cat([near.flatten(3)[:, :, :, None].expand(-1, -1, -1, self.heads, -1), seen], -1)
        if self.exact.read_reference:
            # of the keys that are read, not of those that are there
            read = mask.sum(-1, keepdim=True).clamp_min(1)  # [B, n, C, H, 1]
            scale = (read.log() / math.log(self.exact.read_reference)).clamp_min(1.0)  # [B, n, C, H, 1]
            queries = queries * scale.to(queries.dtype)
        logits = torch.einsum("bnchk,bjhk->bnchj", queries, keys) + bias[:, None]  # [B, n, C, H, J]
        # a query that sees nothing gets 0, and no gradient that is not a number
        logits = logits.masked_fill(~mask & mask.any(-1, keepdim=True), -torch.inf)
        weight = torch.softmax(logits, -1) * mask  # [B, n, C, H, J]
        output = torch.einsum("bnchj,bjhv->bnchv", weight, values)
        level = torch.einsum("bnchj,bcjr->bnchr", weight, marked)
        return output, level, weight.detach().sum((1, 2, 3))

    def _near(self, present: torch.Tensor, policy: Policy, N: int) -> torch.Tensor:
        """Rows of the window and the chunk that each query reads, [B, N, C, W + N, C]."""
        C, W = present.shape[2], self.parts.window
        age = torch.arange(N, device=present.device)[:, None] + W - torch.arange(W + N, device=present.device)
        own = torch.eye(C, dtype=torch.bool, device=present.device)[:, None]  # [C, 1, C]
        inside = ((age >= 0) & (age < W))[:, None, :, None] & own  # [N, C, W + N, C]
        across = ((age >= 0) & (age < self.exact.cross_span))[None, :, None, :, None]
        across = across & policy.readable[:, None, :, None]  # [B, N, C, W + N, C]
        return (inside | across) & present[:, None, None]

    @torch.no_grad()
    def _blocks(self, kept: Kept, begin: torch.Tensor, tokens: Tokens, memory: MixerMemory, policy: Policy) -> Blocks:
        """The blocks of the kept rows, as each of the N queries finds them."""
        B, N = tokens.position.shape
        C, device = tokens.heard.shape[1], begin.device
        own = torch.eye(C, dtype=torch.bool, device=device)
        allowed = (policy.readable | own).gather(2, kept.channel[:, None].expand(-1, C, -1))  # [B, C, M]
        steps = torch.arange(N, device=device)[:, None]  # [N, 1]
        arrived = kept.alive[:, None] & (begin[:, None] <= steps)  # [B, N, M]
        number = kept.index.clamp_min(0) // self.block * C + kept.channel  # [B, M] of the row's block
        G = int(number.max()) + 1 if number.numel() else 0
        # not one_hot, which refuses no rows at all
        member = (number[..., None] == torch.arange(G, device=device)) & kept.alive[..., None]  # [B, M, G]
        member = member.to(kept.keys.dtype)  # [B, M, G]
        mean = torch.einsum("bmg,bmhk->bghk", member, kept.keys) / member.sum(1).clamp_min(1)[..., None, None]
        first = memory.count + tokens.present.sum(1) - N  # [B]
        ends = (torch.arange(G, device=device) // C + 1) * self.block - 1  # [G] last patch of each block
        filled_at = ends - first[:, None] + self.parts.window  # [B, G] query at which the block is whole
        whole = filled_at[:, None] <= steps  # [B, N, G]
        channel = torch.arange(G, device=device) % C  # [G]
        open_to = (policy.readable | own)[:, :, channel] & (member.sum(1) > 0)[:, None]  # [B, C, G]
        return Blocks(number, mean, whole, open_to, arrived, allowed)


@dataclass(frozen=True)
class Blocks:
    """Blocks of kept rows, as some queries find them.

    Attributes:
        number: the block of each row, [B, M].
        mean: the mean of its keys, [B, G, H, K].
        whole: whether it is whole when a query is asked, [B, N, G].
        open_to: whether a channel may read it, [B, C, G].
        arrived: whether a row is there when a query is asked, [B, N, M].
        allowed: whether a channel may read the row, [B, C, M].
    """

    number: torch.Tensor
    mean: torch.Tensor
    whole: torch.Tensor
    open_to: torch.Tensor
    arrived: torch.Tensor
    allowed: torch.Tensor

    def of(self, at: slice) -> Blocks:
        """As some of the queries find them."""
        return replace(self, whole=self.whole[:, at], arrived=self.arrived[:, at])

    @torch.no_grad()
    def read_by(self, queries: torch.Tensor, top: int) -> torch.Tensor:
        """Which rows each of n queries reads, by head: [B, n, C, H, K] -> [B, n, C, H, M]."""
        B, n, C, H, _ = queries.shape
        G = self.mean.shape[1]
        if G == 0:
            return torch.zeros(B, n, C, H, 0, dtype=torch.bool, device=queries.device)
        fit = torch.einsum("bnchk,bghk->bnchg", queries, self.mean.to(queries.dtype))  # [B, n, C, H, G]
        choice = self.whole[:, :, None] & self.open_to[:, None]  # [B, n, C, G]
        fit = fit.masked_fill(~choice[:, :, :, None], -torch.inf)
        best = fit.topk(min(top, G), -1)
        chosen = torch.zeros_like(fit, dtype=torch.bool).scatter(-1, best.indices, best.values > -torch.inf)
        row_block = self.number[:, None, None, None].expand(B, n, C, H, -1)
        unfinished = ~self.whole.gather(2, self.number[:, None].expand(-1, n, -1))  # [B, n, M]
        reads = chosen.gather(-1, row_block) | unfinished[:, :, None, None]  # [B, n, C, H, M]
        return reads & (self.arrived[:, :, None] & self.allowed[:, None])[:, :, :, None]
