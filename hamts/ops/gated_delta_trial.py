"""Trying kernels out before they are trusted: the parts inside fla against the torch form, forward and gradients.

B items · N patches · H heads · K key · V value
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hamts.ops.gated_delta import gated_delta

__all__ = ["TUNED_MODULES", "precise_products", "problem_of", "shortlisted", "untuned"]

# where fla keeps the kernels of the rule
TUNED_MODULES = (
    "common.chunk_delta_h",
    "common.chunk_o",
    "common.chunk_scaled_dot_kkt",
    "gated_delta_rule.chunk_fwd",
    "gated_delta_rule.fused_recurrent",
    "gated_delta_rule.wy_fast",
    "utils.cumsum",
    "utils.solve_tril",
)
HOPPER, WIDEST_SHORTLISTED = 9, 64
# warps, stages, and what else a configuration says
SHORTLIST: dict[str, tuple[tuple[Any, ...], ...]] = {
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": ((4, 2, ("BV", 32)), (2, 3, ("BV", 32)), (4, 3, ("BV", 64))),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": ((4, 2, ("BV", 32)), (2, 3, ("BV", 32)), (4, 2, ("BV", 64))),
    "chunk_fwd_kernel_o": ((4, 3, ("BK", 64), ("BV", 64)), (8, 3, ("BK", 128), ("BV", 128))),
    "chunk_bwd_kernel_dqkwg": ((4, 2), (4, 3)),
    "chunk_bwd_kernel_dv_local": ((4, 3), (2, 3)),
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": ((4, 3, ("BK", 64)), (2, 3, ("BK", 64))),
    "recompute_w_u_fwd_kernel": ((4, 3), (2, 3)),
    "prepare_wy_repr_bwd_kernel": ((4, 2), (2, 3)),
}
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


@contextlib.contextmanager
def precise_products(dtype: torch.dtype) -> Iterator[None]:
    """Triton's float32 products round to TF32 unless told otherwise: relative errors near 1e-3."""
    name, before = "TRITON_F32_DEFAULT", os.environ.get("TRITON_F32_DEFAULT")
    if dtype != torch.float32 or before is not None:
        yield
        return
    os.environ[name] = "tf32x3"
    try:
        yield
    finally:
        del os.environ[name]


def problem_of(way: Callable[..., Any], device: str, dtype: torch.dtype) -> str | None:
    """Why a way to output, error, prediction and state cannot be used, or None if it equals the torch form."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 128, 2, 32)
    drawn = [torch.randn(shape, generator=generator) for _ in range(3)]
    drawn[1] = torch.nn.functional.normalize(drawn[1] + drawn[1][:, :1], dim=-1)  # [B, N, H, K]
    drawn += [-torch.rand(shape[:3], generator=generator), torch.rand(shape[:3], generator=generator)]
    kinds = [dtype] * 3 + [torch.float32] * 2
    leaves = [x.to(device, kind).requires_grad_() for x, kind in zip(drawn, kinds, strict=True)]
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(untuned())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(device, enabled=False))
            stack.enter_context(precise_products(dtype))
            q, k, v, g, b = leaves
            output, error, _, state = way(q, k, v, g, b, None, None, True)
            true = gated_delta(q.float(), k.float(), v.float(), log_decay=g, beta=b)
            results = [[output, error, state], [true.output, true.error, true.state]]
            losses = [torch.stack([x.float().square().sum() for x in part]).sum() for part in results]
            gradients = [torch.autograd.grad(loss, leaves) for loss in losses]
    except Exception as error:  # noqa: BLE001 - internals may be missing or changed in any way
        return f"{type(error).__name__}: {error}"
    pairs = [*zip(*results, strict=True), *zip(*gradients, strict=True)]
    worst = max(float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm()) for ours, theirs in pairs)
    return None if worst <= TOLERANCE[dtype] else f"they are off by {worst:.0e}"


@contextlib.contextmanager
def untuned() -> Iterator[None]:
    """Every kernel of the rule with the first of its configurations: for a trial, compiling one is enough."""
    with _configured(lambda name, configs: configs[:1]):
        yield


@contextlib.contextmanager
def shortlisted(width: int, dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Tune over few configurations where they are known to do: on Hopper, in half precision, heads of up to 64.

    All that the library tries take a minute and more to compile, at the first step of every fit on a new machine.
    """
    known = device.type == "cuda" and dtype != torch.float32 and width <= WIDEST_SHORTLISTED
    if not known or torch.cuda.get_device_capability(device)[0] != HOPPER:
        yield
        return

    def few(name: str, configs: list[Any]) -> list[Any]:
        chosen = SHORTLIST.get(name, ())
        return [c for c in configs if (c.num_warps, c.num_stages, *sorted(c.kwargs.items())) in chosen] or configs

    with _configured(few):
        yield


@contextlib.contextmanager
def _configured(choose: Callable[[str, list[Any]], list[Any]]) -> Iterator[None]:
    kernels = _tuned_kernels()
    before = [kernel.configs for _, kernel in kernels]
    try:
        for name, kernel in kernels:
            kernel.configs = choose(name, kernel.configs)
        yield
    finally:
        for (_, kernel), configs in zip(kernels, before, strict=True):
            kernel.configs = configs


@functools.cache
def _tuned_kernels() -> list[tuple[str, Any]]:
    """The kernels of the rule that are tuned, by name."""
    found = []
    for module in TUNED_MODULES:
        for name, kernel in vars(importlib.import_module(f"fla.ops.{module}")).items():
            while kernel is not None and not hasattr(kernel, "configs"):
                kernel = getattr(kernel, "fn", None)
            if kernel is not None:
                found.append((name, kernel))
    return found
