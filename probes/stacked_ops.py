"""The arithmetic of stacked layers between their decisions, as functions of tensors.

S networks · B sequences · N rows · T context rows · D width · E memory width · K state width
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hamts.nn.ham import CONV_WIDTH
from hamts.nn.scores import kept_probability, surprise

__all__ = ["EAGER", "Ops"]

HEAD_EPS = 1e-6
# rows of a chunk of the recurrence: few long chunks cost fewer launches than many short ones
CHUNK_ROWS = 80
Tensor = torch.Tensor


def product(x: Tensor, weight: Tensor) -> Tensor:
    """A linear map without a constant: x [S, B, N, in], weight [S, out, in].

    Sequence by sequence, so that the gradient of the weights is a sum of products of some hundred rows: one product
    over all rows of a network would keep a GPU waiting for a handful of its processors.
    """
    return x @ weight.mT[:, None]


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return product(x, weight) + bias[:, None, None]


def norm(x: Tensor, gain: Tensor) -> Tensor:
    """RMS norm of the residual stream; gain [S, D]."""
    return F.rms_norm(x, x.shape[-1:]) * gain[:, None, None]


def headed(x: Tensor, gain: Tensor) -> Tensor:
    """``HeadNorm`` of the one head; gain [S, 1, K]."""
    return F.rms_norm(x, x.shape[-1:], eps=HEAD_EPS) * gain[:, None]


def turned(x: Tensor, gain: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Normed and turned by age: x [S, B, N, E], cosine and sine [N, pairs] -> [S B, N, E]."""
    x, pairs = headed(x, gain).flatten(0, 1), cosine.shape[1]
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine, rest], -1)


def enter(x: Tensor, gain: Tensor, weight: Tensor, bias: Tensor, project: Tensor) -> tuple[Tensor, Tensor]:
    """What a memory layer sees, [S, B, N, E], and all that it asks of it, [S, B, N, sum of widths]."""
    below = linear(norm(x, gain), weight, bias)
    return below, product(below, project)


def ask(
    keys: Tensor, queries: Tensor, key_gain: Tensor, query_gain: Tensor, cosine: Tensor, sine: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and scaled queries of the read, [S B, N, E] each."""
    scale = keys.shape[-1] ** -0.5
    return turned(keys, key_gain, cosine, sine), turned(queries, query_gain, cosine, sine) * scale


def write(
    units: Tensor, gates: Tensor, gate_bias: Tensor, taps: Tensor, decay_rate: Tensor, heard: Tensor, elapsed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Short convolution and gates: q, k, v [S, B, N, K], write gate and log decay [S, B, N], gates [S, B, N, G]."""
    N = units.shape[2]
    gates = gates + gate_bias[:, None, None]
    padded = F.pad(units, (0, 0, CONV_WIDTH - 1, 0))  # [S, B, taps - 1 + N, 3 K]
    convolved = padded[:, :, :N] * taps[:, None, None, :, 0]
    for tap in range(1, CONV_WIDTH):
        convolved = torch.addcmul(convolved, padded[:, :, tap : tap + N], taps[:, None, None, :, tap])
    q, k, v = F.silu(convolved).chunk(3, -1)  # 3 x [S, B, N, K]
    beta = gates[..., 1].sigmoid() * heard
    log_decay = -F.softplus(gates[..., 0] + decay_rate[:, None]) * elapsed
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, log_decay, gates


def delta(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """``ops.gated_delta`` from an empty state without its gradient through the error: output and error.

    q, k, v [S, B, N, K]; beta, log_decay [S, B, N].
    """
    S, B, N, K = q.shape
    chunks = -(-N // CHUNK_ROWS)
    steps = -(-N // chunks)
    spare = chunks * steps - N

    def fold(x: Tensor) -> Tensor:
        """[S, B, N, K] -> [L, S B, T, K], the last chunk padded by rows that neither decay nor write."""
        return F.pad(x, (0, 0, 0, spare)).reshape(S * B, chunks, steps, -1).transpose(0, 1)

    q, k, v = fold(q), fold(k), fold(v)
    beta, log_decay = fold(beta[..., None])[..., 0], fold(log_decay[..., None])[..., 0]  # [L, S B, T]
    later = torch.ones(steps, steps, dtype=torch.bool, device=q.device).triu(1)  # [T, T]
    between = torch.where(later, log_decay[..., None, :], 0.0).cumsum(-1).mT  # [L, S B, T, T]
    between = between.masked_fill(later, -torch.inf).exp()
    since = log_decay.cumsum(-1).exp()  # [L, S B, T]
    written = k * beta[..., None]  # [L, S B, T, K]
    system = ((k @ written.mT) * between).tril(-1)  # [L, S B, T, T]
    decayed = k * since[..., None]  # [L, S B, T, K]
    solved = torch.linalg.solve_triangular(system, torch.cat([v, decayed], -1), upper=False, unitriangular=True)
    stateless, response = solved.split([K, K], -1)  # 2 x [L, S B, T, K]
    kept = (written * between[..., -1, :, None]).mT  # [L, S B, K, T]
    added, removed = (kept @ solved).split([K, K], -1)  # 2 x [L, S B, K, K]
    whole = torch.eye(K, device=q.device, dtype=q.dtype) * since[..., -1, None, None]  # [L, S B, K, K]
    carry = whole - removed
    states = [torch.zeros_like(added[0])]
    for number in range(chunks - 1):
        states.append(torch.baddbmm(added[number], carry[number], states[-1]))
    before = torch.stack(states)  # [L, S B, K, K]
    error = stateless - response @ before  # [L, S B, T, K]
    output = (q * since[..., None]) @ before + ((q @ written.mT) * between) @ error

    def unfold(x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(S, B, chunks * steps, K)[:, :, :N]

    return unfold(output), unfold(error)


def survivors(order: Tensor, cap: Tensor, left_sum: Tensor, left: Tensor) -> Tensor:
    """Entries still there when each row is read: fewer than ``cap`` that stand above them have appeared.

    order [S B, T] (-1 for rows that are not kept), cap [S B], left [N, T] bool and as numbers -> [S B, N, T] bool.
    """
    above = (order[:, :, None] > order[:, None, :]).to(left_sum.dtype)  # [S B, T others, T]
    count = torch.matmul(left_sum, above)  # [S B, N, T]
    return (count < cap[:, None, None]) & left & (order >= 0)[:, None]


def read(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, bias: Tensor, band: Tensor
) -> tuple[Tensor, Tensor]:
    """One softmax over window and scratchpad: output [S B, N, E] and probabilities [S B, N, N].

    visible [S B, N, T] bool; bias [S B, T] of entries; band [N, N], 0 in the window, else -inf.
    """
    spare = band.shape[1] - bias.shape[1]
    visible, bias = F.pad(visible, (0, spare)), F.pad(bias, (0, spare))  # [S B, N, N], [S B, N]
    logits = queries @ keys.mT + torch.where(visible, bias[:, None], band)  # [S B, N, N]
    weight = logits.softmax(-1)
    return weight @ values, weight


def mix(past: Tensor, got: Tensor, gates: Tensor, exact_gain: Tensor) -> Tensor:
    """Both branches under their gates: past and got [S, B, N, E]."""
    return gates[..., 2, None].sigmoid() * past + gates[..., 3, None].sigmoid() * headed(got, exact_gain)


def leave(
    x: Tensor, both: Tensor, opened: Tensor | None, opened_bias: Tensor | None, out: Tensor, up: Tensor
) -> Tensor:
    """Back into the residual stream."""
    if opened is not None and opened_bias is not None:
        both = both * (opened + opened_bias[:, None, None]).sigmoid()
    return x + product(product(both, out), up)


def mlp(x: Tensor, gain: Tensor, grow: Tensor, grow_bias: Tensor, shrink: Tensor, shrink_bias: Tensor) -> Tensor:
    gate, content = linear(norm(x, gain), grow, grow_bias).chunk(2, -1)
    return x + linear(F.silu(gate) * content, shrink, shrink_bias)


def router_loss(bias: Tensor, mass: Tensor, sights: Tensor) -> Tensor:
    """``train.router_loss`` of every network, [S]; bias, attention and how many queries saw each row, [S, B, T]."""
    judged = (sights > 0).to(bias.dtype)
    mass = mass / sights.clamp_min(1)
    even = (mass * judged).sum(-1, keepdim=True) / judged.sum(-1, keepdim=True).clamp_min(1)  # [S, B, 1]
    wanted = mass / (mass + even).clamp_min(1e-12)  # [S, B, T]
    given = kept_probability(bias)  # [S, B, T]
    losses = -(wanted * given.log() + (1 - wanted) * torch.log1p(-given)) * judged
    return losses.sum((1, 2)) / judged.sum((1, 2)).clamp_min(1)


@dataclass(frozen=True)
class Ops:
    """The functions above; a reading may put others in their place."""

    norm: Callable[..., Tensor] = norm
    enter: Callable[..., tuple[Tensor, Tensor]] = enter
    ask: Callable[..., tuple[Tensor, Tensor]] = ask
    write: Callable[..., tuple[Tensor, ...]] = write
    delta: Callable[..., tuple[Tensor, Tensor]] = delta
    survivors: Callable[..., Tensor] = survivors
    read: Callable[..., tuple[Tensor, Tensor]] = read
    headed: Callable[..., Tensor] = headed
    mix: Callable[..., Tensor] = mix
    leave: Callable[..., Tensor] = leave
    mlp: Callable[..., Tensor] = mlp
    surprise: Callable[..., Tensor] = surprise
    router_loss: Callable[..., Tensor] = router_loss


EAGER = Ops()
