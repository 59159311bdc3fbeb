"""The gated delta rule in chunks: a few batched products instead of one step after the other.

Inside a chunk that starts from state S, with D_ij = a_{j+1} ... a_i the decay from step j to i and d_i = a_1 ... a_i:

    e_i = v_i - d_i S^T k_i - sum_{j<i} D_ij (k_i . k_j) b_j e_j

which is a unit triangular system in the *ungated* error, (I + A) e = v - d k S with A_ij = D_ij (k_i . k_j) b_j. So the
error needs no division by b, and is right where b is 0. The system is solved by substitution: the popular product
(I - A)(I + A^2)(I + A^4) ... loses every digit on strongly correlated keys, and slow series have those.
Eliminating e makes the chunk an affine map of its state, S' = M S + F, so one small product a chunk is sequential.

B items · N patches · H heads · K key · V value · G items x heads · L chunks · T steps in a chunk
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hamts.ops.types import GatedDelta, compute_dtype

__all__ = ["gated_delta"]


def gated_delta(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk: int = 32,
) -> GatedDelta:
    """Write every value into a recurrent state after predicting it from the key; see the twin in ``naive.py``.

    Args:
        queries: [B, N, H, K], already scaled.
        keys: [B, N, H, K].
        values: [B, N, H, V].
        log_decay: log a, at most 0, [B, N, H].
        beta: write gate b; 0 leaves the state unwritten, prediction and error are right all the same, [B, N, H].
        initial_state: state carried from before the first step, [B, H, K, V]; None: zeros.
        chunk: most steps solved at once; the result does not depend on it beyond rounding.

    The gradient can be taken once.

    Source: chunked form of arXiv 2412.06464; solving for the ungated error is ours.
    """
    dtype = compute_dtype(queries, keys, values, log_decay, beta, initial_state)
    n_items, n_patches, n_heads, key_width = keys.shape
    n_chunks = -(-n_patches // chunk)
    steps = -(-n_patches // n_chunks)

    def fold(x: torch.Tensor) -> torch.Tensor:
        """[B, N, H, ...] -> [L, G, T, ...], the last chunk padded by steps that neither decay nor write."""
        x = x.to(dtype)
        if n_chunks * steps > n_patches:
            x = torch.cat([x, x.new_zeros(n_items, n_chunks * steps - n_patches, *x.shape[2:])], 1)
        x = x.unflatten(1, (n_chunks, steps)).movedim(3, 1).movedim(2, 0)  # [L, B, H, T, ...]
        return x.flatten(1, 2)

    def unfold(x: torch.Tensor) -> torch.Tensor:
        """[L, G, T, V] -> [B, N, H, V]."""
        x = x.unflatten(1, (n_items, n_heads)).movedim(0, 2).flatten(2, 3)  # [B, H, LT, V]
        return x[:, :, :n_patches].transpose(1, 2).to(values.dtype)

    state = None if initial_state is None else initial_state.to(dtype).flatten(0, 1)  # [G, K, V]
    with torch.autocast(values.device.type, enabled=False):
        v = fold(values)  # [L, G, T, V]
        output, error, state = _chunks(fold(queries), fold(keys), v, fold(log_decay), fold(beta), state)
        prediction = v - error  # [L, G, T, V]
    return GatedDelta(
        output=unfold(output),
        prediction=unfold(prediction),
        error=unfold(error),
        state=state.unflatten(0, (n_items, n_heads)),
    )


def _chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and error, [L, G, T, V], and the last state, [G, K, V]."""
    since_start, between = _decays(log_decay)  # [L, G, T], [L, G, T, T]
    written = k * beta[..., None]  # [L, G, T, K]
    system = (k @ written.mT * between).tril(-1)  # [L, G, T, T]
    read = (q @ written.mT) * between  # [L, G, T, T]
    # what each write is worth at the end of the chunk
    kept = (written * between[..., -1, :, None]).mT  # [L, G, K, T]
    if len(k) == 1:
        target = v if state is None else v - (k * since_start[..., None]) @ state  # [1, G, T, V]
        error = torch.linalg.solve_triangular(system, target, upper=False, unitriangular=True)  # [1, G, T, V]
        output, after = read @ error, (kept @ error)[0]  # [1, G, T, V], [G, K, V]
        if state is not None:
            output = output + (q * since_start[..., None]) @ state  # [1, G, T, V]
            after = after + since_start[0, :, -1, None, None] * state  # [G, K, V]
        return output, error, after
    decayed = k * since_start[..., None]  # [L, G, T, K]
    solved = torch.linalg.solve_triangular(
        system, torch.cat([v, decayed], -1), upper=False, unitriangular=True
    )  # [L, G, T, V+K]
    stateless, response = solved.split([v.shape[-1], k.shape[-1]], -1)  # [L, G, T, V], [L, G, T, K]
    added, removed = (kept @ solved).split([v.shape[-1], k.shape[-1]], -1)  # [L, G, K, V], [L, G, K, K]
    carry = torch.diag_embed(since_start[..., -1, None].expand(*k.shape[:2], k.shape[-1])) - removed  # [L, G, K, K]
    if state is None:
        state = added.new_zeros(added.shape[1:])  # [G, K, V]
    before, after = _LinearScan.apply(carry, added, state)  # [L, G, K, V], [G, K, V]
    error = stateless - response @ before  # [L, G, T, V]
    output = (q * since_start[..., None]) @ before + read @ error  # [L, G, T, V]
    return output, error, after


def _decays(log_decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decay since the chunk's start, [L, G, T], and from step j (column) to i (row), 0 for j > i, [L, G, T, T].

    Sums run over the steps between j and i only: a difference of two running sums would lose the small decays
    that follow a very large one.
    """
    steps = log_decay.shape[-1]
    later = torch.ones(steps, steps, dtype=torch.bool, device=log_decay.device).triu(1)  # [T, T]
    between = torch.where(later, log_decay[..., None, :], 0.0).cumsum(-1).mT  # [L, G, T, T]
    # masked before exp, not after: a sum that overflows would leave inf * 0
    return log_decay.cumsum(-1).exp(), between.masked_fill(later, -torch.inf).exp()


class _LinearScan(torch.autograd.Function):
    """S_{l+1} = M_l S_l + F_l: the states before every chunk and after the last, with the exact adjoint.

    Written out because autograd through the loop keeps a graph node and a copy per chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, carry: torch.Tensor, added: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = torch.empty_like(added)  # [L, G, K, V]
        for n in range(len(added)):
            before[n] = state
            state = torch.baddbmm(added[n], carry[n], state)  # [G, K, V]
        ctx.save_for_backward(carry, before)
        return before, state

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_before: torch.Tensor, grad_after: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        carry, before = ctx.saved_tensors
        grad_added = torch.empty_like(grad_before)  # [L, G, K, V]
        grad = grad_after  # [G, K, V]
        for n in reversed(range(len(carry))):
            grad_added[n] = grad
            grad = torch.baddbmm(grad_before[n], carry[n].mT, grad)  # [G, K, V]
        return grad_added @ before.mT, grad_added, grad
