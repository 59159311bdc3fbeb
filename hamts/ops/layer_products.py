"""The products of a layer's tokens with its weights, as one operation.

Taken one by one, each of them gives a gradient of the tokens that is written out, and added to the others in passes
over memory of their own. Here each is added inside the product that makes it. In this form on a GPU only; elsewhere a
layer calls its maps one after the other.

T tokens, any dimensions · D width · O outputs of a map
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

__all__ = ["Map", "products"]

# weight [O, D] and bias [O] or None
Map = tuple[torch.Tensor, torch.Tensor | None]


def products(
    x: torch.Tensor, *, kind: torch.dtype, precise: Map, maps: Sequence[Map], fused: bool = False
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What every map makes of the tokens.

    Args:
        x: [T, D] in the dtype of the weights.
        kind: dtype that products run in.
        precise: the map that is taken of ``x`` in full precision.
        maps: the others, taken of ``x`` in that dtype.
        fused: whether kernels take the precise map where ``kind`` is narrower than ``x``: one pass over the tokens
            instead of two, in ``layer_triton_gates.py``.

    Returns:
        The tokens in that dtype, without a gradient; [T, O] of the precise map, and of each of the others.
    """
    narrow, first, *others = _Products.apply(x, kind, fused, *precise, *(part for pair in maps for part in pair))
    return narrow, first, others


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        kind: torch.dtype,
        fused: bool,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *parts: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        maps = list(zip(parts[::2], parts[1::2], strict=True))
        cast = [_as(part, kind) for part, _ in maps]  # each [O, D]
        ctx.fused = fused and _suits(x, kind, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            if ctx.fused:
                from hamts.ops.layer_triton_gates import cast_and_map

                assert bias is not None
                narrow, first = cast_and_map(x.flatten(0, -2).contiguous(), weight.contiguous(), bias, kind)
                narrow, first = narrow.view(x.shape), first.view(*x.shape[:-1], -1)
            else:
                narrow, first = x.to(kind, copy=True), F.linear(x.to(weight.dtype), weight, bias)
            made = [narrow, first]
            for used, (_, added) in zip(cast, maps, strict=True):
                assert used is not None
                made.append(F.linear(narrow, used, _as(added, kind)))
        ctx.save_for_backward(x, narrow, weight, *cast)
        ctx.kinds = [None if part is None else part.dtype for part in (weight, bias, *parts)]
        ctx.mark_non_differentiable(narrow)
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        x, narrow, weight, *cast = ctx.saved_tensors
        rows, wide = narrow.flatten(0, -2), x.flatten(0, -2)  # 2 x [T, D]
        flat = [None if grad is None else grad.flatten(0, -2) for grad in grads[1:]]  # each [T, O]
        asked = ctx.needs_input_grad
        of_parts: list[torch.Tensor | None] = []
        with torch.autocast(x.device.type, enabled=False):
            dx = _of_tokens(flat, x, weight, cast, fused=ctx.fused) if asked[0] else None  # [T, D]
            seen = [wide.to(weight.dtype), *[rows] * len(cast)]  # each [T, D]
            for number, (grad, tokens) in enumerate(zip(flat, seen, strict=True)):
                of_weight, of_bias = asked[3 + 2 * number : 5 + 2 * number]
                kind, bias_kind = ctx.kinds[2 * number : 2 * number + 2]
                of_parts.append(None if grad is None or not of_weight else (grad.mT @ tokens).to(kind))
                of_parts.append(None if grad is None or not of_bias else grad.sum(0, dtype=bias_kind))
        return (None if dx is None else dx.view(x.shape), None, None, *of_parts)


def _of_tokens(
    grads: list[torch.Tensor | None],
    x: torch.Tensor,
    weight: torch.Tensor,
    cast: list[torch.Tensor],
    *,
    fused: bool,
) -> torch.Tensor | None:
    """Gradient of the tokens, [T, D]: every product is added to what is there as it is made."""
    dx: torch.Tensor | None = None
    for grad, used in zip(grads[1:], cast, strict=True):
        if grad is not None:
            dx = grad @ used if dx is None else dx.addmm_(grad, used)  # [T, D]
    if fused and dx is not None and grads[0] is not None:
        from hamts.ops.layer_triton_gates import widened_sum

        return widened_sum(dx, grads[0].contiguous(), weight.contiguous())
    dx = None if dx is None else dx.to(x.dtype)
    if grads[0] is None:
        return dx
    if dx is None or dx.dtype != weight.dtype:
        more = (grads[0] @ weight).to(x.dtype)  # [T, D]
        return more if dx is None else dx + more
    return dx.addmm_(grads[0], weight)


def _suits(x: torch.Tensor, kind: torch.dtype, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the kernels of the precise map do what is to be done."""
    from hamts.ops.layer_triton_gates import MOST_OUTPUTS

    wide = x.dtype == weight.dtype == torch.float32 and kind != torch.float32
    return wide and bias is not None and len(weight) <= MOST_OUTPUTS


def _as(tensor: torch.Tensor | None, kind: torch.dtype) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(kind)
