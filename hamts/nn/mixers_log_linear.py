"""Log-linear attention: the recurrent state split by age into segments of 1, 2, 4, 8 ... tokens, each with a weight.

B items · C channels · N patches · H heads · K key · V value · L levels · T steps of a chunk
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from hamts.config import ModelConfig
from hamts.nn.mixers_base import MixerLayer, Parts
from hamts.nn.mixers_parts import MixerMemory
from hamts.nn.tokens import Tokens
from hamts.ops.types import compute_dtype

__all__ = ["LogLinearLayer", "fenwick_level", "log_linear_delta"]

CHUNK = 64
BITS = 40


def fenwick_level(now: torch.Tensor, then: torch.Tensor, levels: int) -> torch.Tensor:
    """Segment of the token read as number ``then`` as seen from number ``now``: 0 is ``now`` itself.

    Level of s at t: 1 + the highest bit in which they differ, at most ``levels`` - 1. As t grows segments only merge.
    """
    apart = torch.bitwise_xor(now, then)
    powers = 2 ** torch.arange(BITS, device=now.device)  # [bits]
    return (apart[..., None] >= powers).sum(-1).clamp_max(levels - 1)


def log_linear_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    number: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated delta rule whose state is read level by level.

    o_t = sum over levels l of w_t^l S_t^l' q_t, where the S^l add up to the state of the plain rule and each moves on
    by the same transition, a_t (I - b_t k_t k_t'). In a chunk the plain rule is linear in its values and in its first
    state: o = P v + (d q - P (d k)) S with P = (D * q k' b)(I + A)^-1 (see ``ops/gated_delta.py``), so every term
    belongs to one source and takes the weight of its level.

    Args:
        q, k: [B, C, N, H, K]. v: [B, C, N, H, V].
        log_decay, beta: [B, C, N, H].
        weight: of each level, [B, C, N, H, L].
        state: [B, C, L, H, K, V], segments as seen by the first token of the chunk; level 0 is empty.
        number: how many tokens were read before each, [B, N] int64.

    Returns:
        Output [B, C, N, H, V], and the state as the token after the last will see it.

    Source: log-linear attention, arXiv 2506.04761, with gated delta transitions.
    """
    kind = compute_dtype(q, k, v, state)
    outputs = []
    q, k, v, log_decay, beta, weight = (x.to(kind).movedim(3, 2) for x in (q, k, v, log_decay, beta, weight))
    state = state.to(kind)
    for low in range(0, q.shape[3], CHUNK):
        part = slice(low, low + CHUNK)
        output, state = _chunk(
            q[:, :, :, part], k[:, :, :, part], v[:, :, :, part], log_decay[:, :, :, part], beta[:, :, :, part],
            weight[:, :, :, part], state, number[:, part],
        )  # fmt: skip
        outputs.append(output)
    return torch.cat(outputs, 3).movedim(2, 3), state


def _chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    number: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """T tokens at once; every tensor [B, C, H, T, ...]."""
    T, L = q.shape[3], state.shape[2]
    later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)  # [T, T]
    between = torch.where(later, log_decay[..., None, :], 0.0).cumsum(-1).mT  # [B, C, H, T, T] sum over j+1 .. i
    decay = between.masked_fill(later, -torch.inf).exp()  # [B, C, H, T, T] from step j (column) to i
    since = log_decay.cumsum(-1).exp()[..., None]  # [B, C, H, T, 1]
    system = torch.eye(T, dtype=q.dtype, device=q.device) + (decay * (k @ k.mT) * beta[..., None, :]).tril(-1)
    asked = decay * (q @ k.mT) * beta[..., None, :]  # [B, C, H, T, T]
    # X (I + A) = asked
    share = torch.linalg.solve_triangular(system, asked, upper=False, left=False, unitriangular=True)
    level = fenwick_level(number[:, :, None], number[:, None], L)[:, None, None]  # [B, 1, 1, T, T]
    of_source = weight.gather(4, level.expand(*weight.shape[:3], T, T))  # [B, C, H, T, T]
    inside = (share * of_source) @ v  # [B, C, H, T, V]
    left = since * q - share @ (since * k)  # [B, C, H, T, K] how each query reads the first state
    was = first_of_segment(number[:, 0], L)  # [B, L]
    moved = fenwick_level(number[:, :, None], was[:, None], L)[:, None, None]  # [B, 1, 1, T, L]
    of_segment = weight.gather(4, moved.expand(*weight.shape[:3], T, L))  # [B, C, H, T, L]
    before = torch.einsum("bchtk,bclhkv,bchtl->bchtv", left, state, of_segment)
    return inside + before, _after(k, v, beta, since, decay, system, state, number, was)


def _after(
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    since: torch.Tensor,
    decay: torch.Tensor,
    system: torch.Tensor,
    state: torch.Tensor,
    number: torch.Tensor,
    was: torch.Tensor,
) -> torch.Tensor:
    """The segments as the next token sees them, [B, C, L, H, K, V]."""
    L = state.shape[2]
    written = k.mT * (decay[..., -1, :] * beta)[..., None, :]  # [B, C, H, K, T]
    source = torch.linalg.solve_triangular(system, written, upper=False, left=False, unitriangular=True)
    following = number[:, -1:] + 1  # [B, 1]
    to_level = F.one_hot(fenwick_level(following, number, L), L).to(k.dtype)  # [B, T, L]
    fresh = torch.einsum("bchkt,bchtv,btl->bclhkv", source, v, to_level)
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    carry = since[:, :, :, -1:] * eye - source @ (since * k)  # [B, C, H, K, K]
    moved = F.one_hot(fenwick_level(following, was, L), L).to(k.dtype)  # [B, L, L]
    old = torch.einsum("bchij,bclhjv,blm->bcmhiv", carry, state, moved)
    return fresh + old


def first_of_segment(now: torch.Tensor, levels: int) -> torch.Tensor:
    """First token of each segment as seen from token number ``now``, [B] -> [B, L]; what is empty may be anywhere."""
    bit = torch.arange(levels, device=now.device) - 1  # [L]
    kept = now[:, None] >> (bit + 1).clamp_min(0)
    first = kept << (bit + 1).clamp_min(0)  # [B, L] lower bits cleared
    # the last segment holds all that is older than the one before it
    return torch.where(torch.arange(levels, device=now.device) == levels - 1, 0, first)


class LogLinearLayer(MixerLayer):
    """As many segments as its bytes allow; the last holds everything older."""

    def __init__(self, config: ModelConfig, parts: Parts, *, levels: int) -> None:
        super().__init__(config, parts)
        self.levels = levels
        self.to_levels = nn.Linear(config.width, levels * self.heads)
        nn.init.zeros_(self.to_levels.weight)
        nn.init.zeros_(self.to_levels.bias)

    def state_shape(self) -> tuple[int, ...]:
        return (self.levels, *super().state_shape())

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
        assert self.recurrent is not None
        q, k, v, log_decay, beta, tail = self.recurrent.inputs(units, gates[..., :2, :], tokens, memory.conv_tail)
        # twice the sigmoid: every level counts once at first, which is the plain rule
        weight = 2 * self.to_levels(x).unflatten(-1, (self.heads, self.levels)).sigmoid()  # [B, C, N, H, L]
        number = (memory.count[:, None] + tokens.present.cumsum(1) - 1).clamp_min(0)  # [B, N]
        output, state = log_linear_delta(
            q, k, v, log_decay=log_decay, beta=beta, weight=weight, state=memory.state, number=number
        )
        return output.to(x.dtype), x.new_zeros(*beta.shape[:3], 0), state, tail
