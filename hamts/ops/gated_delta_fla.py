"""The gated delta rule on the kernels of flash-linear-attention, with the prediction error they do not give away.

Two ways to the error, chosen once per process by ``error_path``:

    internals       inside a chunk fla solves for b_n e_n, what is written; divided by b_n it is the error, at no cost.
                    Its parts are not public, so they are used only where they agree with the torch form on a trial.
    shifted query   S_n read at the key of the next step and decayed once more is the prediction of that step: public
                    calls alone, at the price of a second pass.

The division is safe: what is written is rounded relative to b_n, and a b_n of 0 is taken as ``LEAST_BETA``, which
leaves float32 states as they are. Gradients through the error do not divide by b_n at all.

B items · N patches · H heads · K key · V value · L sequences packed into one row
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from hamts.ops.gated_delta_trial import precise_products, problem_of, shortlisted
from hamts.ops.types import GatedDelta, UnreadDelta

__all__ = ["error_path", "gated_delta", "gated_delta_step"]

# by dtype of the products; larger chunks are faster, but fla inverts those of 64 in TF32 whatever it is asked for
CHUNKS = {torch.bfloat16: 64, torch.float32: 32}
LARGEST_WIDTH = 256
LEAST_BETA = 2.0**-80


@torch.compiler.disable
def gated_delta(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk: int = 64,
    cu_seqlens: torch.Tensor | None = None,
    error_grad: bool = True,
) -> GatedDelta:
    """Write every value into a recurrent state after predicting it from the key; see the twin in ``naive.py``.

    Products run in bfloat16 where the values, or autocast, say so, else in float32 (three TF32 products each, near
    float32's own precision); gates and state are float32 always.

    Args:
        queries: [B, N, H, K], already scaled; K at most 256, and even.
        keys: [B, N, H, K].
        values: [B, N, H, V], V even.
        log_decay: log a, at most 0, [B, N, H].
        beta: write gate b; 0 leaves the state unwritten, prediction and error are right all the same, [B, N, H].
        initial_state: state carried from before the first step, [B, H, K, V], or [L, H, K, V] of packed sequences.
        chunk: unused here: the kernels have their own, ``CHUNKS``.
        cu_seqlens: where packed sequences begin, and the end of the last, [L + 1] int64; B is then 1.
        error_grad: whether gradients may be asked through prediction and error.

    Raises:
        ValueError: a dtype, width or packing that the kernels do not have.

    Source: arXiv 2412.06464; kernels of flash-linear-attention.
    """
    del chunk
    _check(queries, keys, values, cu_seqlens)
    dtype = _dtype_of(values)
    q, k, v = queries.to(dtype), keys.to(dtype), values.to(dtype)  # [B, N, H, K], [B, N, H, K], [B, N, H, V]
    g, b = log_decay.float(), beta.float()  # 2 x [B, N, H]
    state = None if initial_state is None else initial_state.float()  # [B, H, K, V]
    way = _from_internals if error_path(values.device.type, dtype) == "internals" else _from_shifted_query
    with torch.autocast(values.device.type, enabled=False), precise_products(dtype):
        kind = values.dtype
        if way is _from_internals and not error_grad:
            tensors = [x if x is None else x.contiguous() for x in (q, k, v, g, b, state)]
            output, written, after = _ChunksWithError.apply(*tensors, cu_seqlens, False)
            return UnreadDelta(output.to(kind), after, values, written, b.detach().clamp_min(LEAST_BETA))
        output, error, prediction, after = way(q, k, v, g, b, state, cu_seqlens, error_grad)
    return GatedDelta(output=output.to(kind), prediction=prediction.to(kind), error=error.to(kind), state=after)


@torch.compiler.disable
def gated_delta_step(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    chunk: int = 64,
) -> GatedDelta:
    """The same for a few steps of many streams, in one launch and without gradients: what decoding runs.

    Every step is two for the kernel: one that decays and reads the state at the key, which is the prediction, and one
    that writes and reads it at the query.
    """
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    del chunk
    _check(queries, keys, values, None)
    zeros = torch.zeros_like(log_decay, dtype=torch.float32)  # [B, N, H]
    with torch.no_grad(), torch.autocast(values.device.type, enabled=False):
        both, after = fused_recurrent_gated_delta_rule(
            q=_interleave(keys.float(), queries.float()),
            k=_interleave(keys.float(), keys.float()),
            v=_interleave(values.float(), values.float()),
            g=_interleave(log_decay.float(), zeros),
            beta=_interleave(zeros, beta.float()),
            scale=1.0,
            initial_state=None if initial_state is None else initial_state.float().contiguous(),
            output_final_state=True,
        )  # [B, 2 N, H, V], [B, H, K, V]
        prediction, output = both.unflatten(1, (-1, 2)).unbind(2)  # 2 x [B, N, H, V]
        error = values.float() - prediction  # [B, N, H, V]
    kind = values.dtype
    return GatedDelta(output=output.to(kind), prediction=prediction.to(kind), error=error.to(kind), state=after)


def _interleave(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """2 x [B, N, ...] -> [B, 2 N, ...]."""
    return torch.stack([first, second], 2).flatten(1, 2).contiguous()


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
    for name, tensor in (("queries", q), ("keys", k), ("values", v)):
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(
                f"The fla kernels take bfloat16, float16 and float32. Got {name} of {tensor.dtype}."
                " Use kernel='torch' for other dtypes."
            )
        width = tensor.shape[-1]
        if width > LARGEST_WIDTH or width % 2:
            raise ValueError(
                f"The fla kernels take head widths that are even and at most {LARGEST_WIDTH}. Got {width} ({name})."
                " Choose another number of heads, or kernel='torch'."
            )
    if cu_seqlens is not None and v.shape[0] != 1:
        raise ValueError(f"Packed sequences lie in one row, B = 1. Got B = {v.shape[0]}.")


def _dtype_of(values: torch.Tensor) -> torch.dtype:
    """What the products run in. float16 runs as float32: its exponents are too short for small write gates."""
    kind = values.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16:
        return torch.bfloat16
    return torch.bfloat16 if values.dtype == torch.bfloat16 else torch.float32


# --- which way


@functools.cache
def error_path(device: str, dtype: torch.dtype = torch.bfloat16) -> str:
    """``internals`` or ``shifted query``: how the error is had on this kind of device; tried out at the first call."""
    why = problem_of(_from_internals, device, dtype)
    if why is None:
        return "internals"
    warnings.warn(
        f"flash-linear-attention keeps its prediction error to itself here ({why}); it is read by a second pass."
        " Versions 0.6.* give it at no cost.",
        RuntimeWarning,
        stacklevel=3,
    )
    return "shifted query"


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _from_internals(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    error_grad: bool,
) -> Parts:
    """Output, error and prediction, [B, N, H, V], and the last state, [B, H, K, V]."""
    tensors = [x if x is None else x.contiguous() for x in (q, k, v, g, beta, state)]
    output, error, after = _ChunksWithError.apply(*tensors, cu_seqlens, error_grad)
    return output, error, v - error, after


def _from_shifted_query(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    error_grad: bool,
) -> Parts:
    """The same by public calls: the state is read at the key of the next step, and decayed once more."""
    output, after = _PublicChunks.apply(q, k, v, g, beta, state, cu_seqlens)
    with contextlib.nullcontext() if error_grad else torch.no_grad():
        ahead = torch.nn.functional.pad(k[:, 1:], (0, 0, 0, 0, 0, 1))  # [B, N, H, K]
        read, _ = _PublicChunks.apply(ahead, k, v, g, beta, state, cu_seqlens)
        prediction = torch.nn.functional.pad(read[:, :-1].float(), (0, 0, 0, 0, 1, 0))  # [B, N, H, V]
        prediction = prediction * g.exp()[..., None]
        # the first step of a sequence is predicted by what was carried, and by nothing else
        rows, firsts = _first_steps(k, cu_seqlens)  # [L], [L]
        begun = torch.zeros_like(prediction[rows, firsts])  # [L, H, V]
        if state is not None:
            decayed = g[rows, firsts].exp()[..., None, None] * state  # [L, H, K, V]
            begun = torch.einsum("lhk,lhkv->lhv", k[rows, firsts].float(), decayed)  # [L, H, V]
        prediction = prediction.index_put((rows, firsts), begun).to(v.dtype)  # [B, N, H, V]
        error = v - prediction  # [B, N, H, V]
    return output, error, prediction, after


def _first_steps(k: torch.Tensor, cu_seqlens: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and step at which each sequence begins, 2 x [L]."""
    if cu_seqlens is not None:
        firsts = cu_seqlens[:-1].long()  # [L]
        return torch.zeros_like(firsts), firsts
    rows = torch.arange(k.shape[0], device=k.device)  # [B]
    return rows, torch.zeros_like(rows)


class _PublicChunks(torch.autograd.Function):
    """The library's own call, with a gradient as precise as its result: that is worked out when the caller is gone."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        named = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state}
        asked = ctx.needs_input_grad[: len(named)]
        pairs = zip(named.items(), asked, strict=True)
        leaves = {name: x if x is None else x.detach().requires_grad_(needed) for (name, x), needed in pairs}
        options: dict[str, Any] = {"scale": 1.0, "output_final_state": True, "cu_seqlens": cu_seqlens}
        if v.dtype == torch.float32:
            options["chunk_size"] = CHUNKS[v.dtype]
        with torch.set_grad_enabled(any(asked)):
            results = chunk_gated_delta_rule(**leaves, **options)
        ctx.given, ctx.results = list(leaves.values()), results
        ctx.set_materialize_grads(False)
        return results[0].detach(), results[1].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        asked = [x for x in ctx.given if x is not None and x.requires_grad]
        pairs = [(result, grad) for result, grad in zip(ctx.results, grads, strict=True) if grad is not None]
        if not pairs:
            return (None,) * (len(ctx.given) + 1)
        results, given = zip(*pairs, strict=True)
        with precise_products(ctx.given[2].dtype):
            # held for as long as the caller's graph is: whether it is asked again is for the caller to say
            found = iter(torch.autograd.grad(results, asked, given, retain_graph=True, allow_unused=True))
        return *(next(found) if x is not None and x.requires_grad else None for x in ctx.given), None


class _ChunksWithError(torch.autograd.Function):
    """fla's chunked forward and backward, put together again so that the error comes out and its gradient goes in.

    Without ``error_grad`` what was written comes out instead of the error: a division is not worth a pass over memory.

    Follows ``ChunkGatedDeltaRuleFunction`` of fla-core 0.6.0 (MIT).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        state: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        error_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
        from fla.ops.common.chunk_o import chunk_fwd_o
        from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
        from fla.ops.utils.constant import RCP_LN2
        from fla.ops.utils.index import prepare_chunk_indices

        chunk = CHUNKS[v.dtype]
        indices = None if cu_seqlens is None else prepare_chunk_indices(cu_seqlens, chunk)
        common: dict[str, Any] = {"cu_seqlens": cu_seqlens, "chunk_indices": indices, "chunk_size": chunk}
        beta = beta.clamp_min(LEAST_BETA)  # [B, N, H]
        with _device_of(v), shortlisted(v.shape[-1], v.dtype, v.device):
            decay = _sums(g, common, scale=RCP_LN2)  # [B, N, H] in base 2, within chunks
            w, u, solved = chunk_gated_delta_rule_fwd_intra(k=k, v=v, g=decay, beta=beta, **common)
            before, written, after = chunk_gated_delta_rule_fwd_h(
                k=k, w=w, u=u, g=decay, initial_state=state, output_final_state=True, **common
            )
            output = chunk_fwd_o(q=q, k=k, v=written, h=before, g=decay, scale=1.0, **common)  # [B, N, H, V]
            # without a gradient the division is left to whoever reads the error
            error = torch.div(written, beta[..., None], out=torch.empty_like(v)) if error_grad else written
        kept = error if error_grad else None
        ctx.save_for_backward(q, k, v, decay, beta, solved, state, kept, cu_seqlens, indices)
        ctx.set_materialize_grads(False)
        if not error_grad:
            ctx.mark_non_differentiable(error)
        return output, error, after

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_output: torch.Tensor | None, grad_error: torch.Tensor | None, grad_state: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu, chunk_gated_delta_rule_fwd_h
        from fla.ops.common.chunk_o import chunk_bwd_dqkwg, chunk_bwd_dv_local
        from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd, recompute_w_u_fwd

        q, k, v, decay, beta, solved, state, error, cu_seqlens, indices = ctx.saved_tensors
        packed: dict[str, Any] = {"cu_seqlens": cu_seqlens, "chunk_indices": indices}
        common: dict[str, Any] = {**packed, "chunk_size": CHUNKS[v.dtype]}
        do = torch.zeros_like(v) if grad_output is None else grad_output.contiguous()  # [B, N, H, V]
        dht = None if grad_state is None else grad_state.float().contiguous()  # [B, H, K, V]
        with _device_of(v), precise_products(v.dtype), shortlisted(v.shape[-1], v.dtype, v.device):
            w, u = recompute_w_u_fwd(k=k, v=v, beta=beta, A=solved, g=decay, **packed)
            before, written, _ = chunk_gated_delta_rule_fwd_h(
                k=k, w=w, u=u, g=decay, initial_state=state, output_final_state=False, **common
            )
            dwritten = chunk_bwd_dv_local(q=q, k=k, g=decay, do=do, scale=1.0, **common)  # [B, N, H, V]
            if grad_error is not None:
                dwritten = dwritten + grad_error / beta[..., None].to(v.dtype)  # [B, N, H, V]
            dbefore, dstate, dwritten = chunk_gated_delta_rule_bwd_dhu(
                q=q, k=k, w=w, g=decay, h0=state, dht=dht, do=do, dv=dwritten, scale=1.0, **common
            )
            dq, dk, dw, dg = chunk_bwd_dqkwg(
                q=q, k=k, v=written, w=w, g=decay, h=before, dv=dwritten, do=do, dh=dbefore, scale=1.0, **common
            )
            dk_wy, dv, dbeta, dg_wy = prepare_wy_repr_bwd(
                k=k, v=v, beta=beta, g=decay, A=solved, dw=dw, du=dwritten, **packed
            )
            if grad_error is not None:
                dbeta = _grad_beta(q, k, decay, do, dbefore, dv, error, common)  # [B, N, H]
            dg = _sums(dg.add_(dg_wy), common, reverse=True)  # [B, N, H]
        return dq.to(q), dk.add_(dk_wy).to(k), dv.to(v), dg, dbeta.to(beta), dstate, None, None


def _sums(g: torch.Tensor, common: dict[str, Any], *, scale: float = 1.0, reverse: bool = False) -> torch.Tensor:
    """Running sums within chunks, [B, N, H], from the end where ``reverse``.

    The library's own kernel is compiled and tuned anew for every B, which differs from step to step where streams
    restart; it is left for packed sequences.
    """
    if common["cu_seqlens"] is not None:
        from fla.ops.utils import chunk_local_cumsum

        return chunk_local_cumsum(g, scale=None if scale == 1.0 else scale, reverse=reverse, **common)
    N, chunk = g.shape[1], common["chunk_size"]
    blocks = torch.nn.functional.pad(g, (0, 0, 0, -N % chunk)).unflatten(1, (-1, chunk))  # [B, L, T, H]
    sums = blocks.cumsum(2)  # [B, L, T, H]
    if reverse:
        sums = sums[:, :, -1:] - sums + blocks  # [B, L, T, H]
    return (sums if scale == 1.0 else sums * scale).flatten(1, 2)[:, :N].contiguous()


def _grad_beta(
    q: torch.Tensor,
    k: torch.Tensor,
    decay: torch.Tensor,
    do: torch.Tensor,
    dbefore: torch.Tensor,
    derror: torch.Tensor,
    error: torch.Tensor,
    common: dict[str, Any],
) -> torch.Tensor:
    """Gradient of the write gates, e_n times the adjoint of what n wrote, without a division by the gate, [B, N, H].

    That adjoint is the outputs' and the later states', less what later errors of the chunk lose by it. The adjoint of
    an error is that of its value, ``derror`` [B, N, H, V].
    """
    from fla.ops.common.chunk_o import chunk_bwd_dv, chunk_bwd_dv_local

    read = chunk_bwd_dv(q=q, k=k, do=do, dh=dbefore, g=decay, scale=1.0, **common)  # [B, N, H, V]
    derror = derror.to(do.dtype)
    lost = chunk_bwd_dv_local(q=k, k=k, g=decay, do=derror, scale=1.0, **common).float()  # [B, N, H, V]
    own = k.float().square().sum(-1, keepdim=True) * derror.float()  # [B, N, H, V]
    return (error.float() * (read.float() - lost + own)).sum(-1)


def _device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
