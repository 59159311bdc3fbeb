"""The recurrence with its error against the library's own, and a whole HAM layer against full attention by cuDNN.

B items · N patches · D width · H heads · K head width
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.training_timing import DEVICE, floor_ms, kernel_table, pass_times, recorded_ms
from hamts.config import ModelConfig
from hamts.nn import scratchpad
from hamts.nn.compiled import compile_parts
from hamts.nn.ham import HAMLayer
from hamts.nn.heads import HeadNorm, angles, rotate
from hamts.nn.tokens import Policy, Tokens
from hamts.ops.compact import bucket
from hamts.ops.kernels import resolve_kernels

__all__ = [
    "HEADS",
    "TOKENS",
    "WIDTH",
    "WINDOW",
    "FullAttention",
    "delta_cell",
    "ham_layer",
    "layer_cell",
    "plain_tokens",
]

KERNEL = "fla+triton"
TOKENS, WIDTH, HEADS, WINDOW = 65_536, 1024, 16, 64
HEAD = WIDTH // HEADS


def delta_cell(length: int, most: dict[str, float]) -> dict[str, Any]:
    """The recurrence with and without its error, on the same inputs."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    from hamts.ops import gated_delta_fla

    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (TOKENS // length, length, HEADS, HEAD)
    q, k, v = (torch.randn(shape, device=DEVICE, generator=generator) for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    gates = torch.rand(2, *shape[:3], device=DEVICE, generator=generator)
    leaves = [x.bfloat16().requires_grad_() for x in (q, k, v)] + [
        x.requires_grad_() for x in (-0.1 * gates[0], gates[1])
    ]
    q, k, v, g, beta = leaves

    def theirs() -> torch.Tensor:
        return chunk_gated_delta_rule(q=q, k=k, v=v, g=g, beta=beta, scale=1.0, output_final_state=True)[0]

    def ours(error_grad: bool = False) -> torch.Tensor:
        return gated_delta_fla.gated_delta(q, k, v, log_decay=g, beta=beta, error_grad=error_grad).output

    def ours_through() -> torch.Tensor:
        result = gated_delta_fla.gated_delta(q, k, v, log_decay=g, beta=beta)
        return torch.cat([result.output, result.error])

    gated_delta_fla.error_path(DEVICE)
    rows = {"fla": pass_times(theirs, leaves), "with error": pass_times(ours, leaves)}
    rows["gradient through it"] = pass_times(ours_through, leaves)
    gated_delta_fla.error_path, right = (lambda device, dtype: "shifted query"), gated_delta_fla.error_path
    rows["by shifted query"] = pass_times(ours, leaves)
    gated_delta_fla.error_path = right
    # chunks of 64: within a chunk two products of queries and keys and two with values, four with the state
    chunk = 64
    flops = 2 * TOKENS * HEADS * HEAD * (4 * chunk / 2 + 4 * HEAD)
    moved = TOKENS * HEADS * HEAD * 2 * 6
    return {
        "path": gated_delta_fla.error_path(DEVICE),
        "rows": rows,
        "floor_ms": {"forward": floor_ms(flops, moved, most), "both": floor_ms(3.5 * flops, 3 * moved, most)},
        "ratio": rows["with error"]["both_ms"] / rows["fla"]["both_ms"],
        "ratio_forward": rows["with error"]["forward_ms"] / rows["fla"]["forward_ms"],
    }


class FullAttention(nn.Module):
    """Causal attention over everything by cuDNN, with the exact branch's projections, norms, rotations and gate."""

    def __init__(self, *, fused: bool) -> None:
        """With ``fused``, norms and rotations run in the kernels that the HAM layer runs them in."""
        super().__init__()
        self.fused = fused
        self.to_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.to_output_gate, self.to_output = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.query_norm, self.key_norm, self.exact_norm = (HeadNorm(HEADS, HEAD) for _ in range(3))

    def _turned_queries(
        self, qkv: torch.Tensor, position: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = qkv.unflatten(-1, (3, HEADS, HEAD)).unbind(-3)  # 3 x [B, N, H, K]
        if self.fused:
            from hamts.ops.layer_triton import turned_queries

            turn = angles(position, HEAD, torch.float32)
            norms = (self.query_norm, self.key_norm)
            q, k = (
                turned_queries(x.flatten(-2)[:, None], gain=norm.gain, turn=turn, scale=1.0)[:, :, 0]
                for x, norm in zip((q, k), norms, strict=True)
            )  # 2 x [B, N, H, K]
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # 3 x [B, H, N, K]
        q = rotate(self.query_norm(q)[:, :, None], position)[:, :, 0]  # [B, N, H, K]
        k = rotate(self.key_norm(k)[:, :, None], position)[:, :, 0]  # [B, N, H, K]
        q, k, v = (x.to(qkv.dtype).transpose(1, 2) for x in (q, k, v))  # 3 x [B, H, N, K]
        return q, k, v

    def _mix(self, read: torch.Tensor, opened: torch.Tensor) -> torch.Tensor:
        flat = self.exact_norm(read.transpose(1, 2)).flatten(-2)  # [B, N, D]
        return (flat * opened.sigmoid()).to(opened.dtype)

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        q, k, v = self._turned_queries(self.to_qkv(x), position)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.CUDNN_ATTENTION):
            read = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # [B, H, N, K]
        return self.to_output(self._mix(read, self.to_output_gate(x)))


def plain_tokens(items: int, length: int) -> Tokens:
    """Tokens of one channel, all observed and all routable."""
    grid = (items, 1, length)

    def full(value: float, *shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.full(shape, value, dtype=kind, device=DEVICE)

    place = torch.arange(length, device=DEVICE, dtype=torch.float64).expand(items, -1)
    marks = torch.stack([full(0.0, *grid), full(0.0, *grid), full(1.0, *grid)], -1)  # [B, C, N, R]
    fields: dict[str, Any] = {
        "values": full(0.0, *grid, 1),
        "observed": full(1, *grid, 1, kind=torch.bool),
        "tags": full(0, *grid, 1, kind=torch.bool),
        "event_offset": full(0.0, *grid, 1),
        "ahead_values": full(0.0, *grid, 1),
        "ahead_observed": full(0, *grid, 1, kind=torch.bool),
        "calendar": full(0.0, items, length, 1),
        "level": full(0.0, *grid, 1),
        "marks": marks,
        "heard": full(1.0, *grid),
        "present": full(1, items, length, kind=torch.bool),
        "routable": full(1, *grid, kind=torch.bool),
        "must_keep": full(0, *grid, kind=torch.bool),
        "position": place,
        "elapsed": full(1.0, items, length),
        "static_values": full(0.0, items, 0),
        "static_codes": full(0, items, 0, kind=torch.int64),
    }
    if "markable" in Tokens.__dataclass_fields__:
        fields["markable"] = full(1, *grid, kind=torch.bool)
    return Tokens(**fields)


def ham_layer(
    length: int, share: float, mode: str, *, masses: bool = False
) -> tuple[HAMLayer, Callable[[torch.Tensor], Any]]:
    """A layer whose thresholds keep the share asked for, and the call that the network makes of it."""
    items = TOKENS // length
    config = ModelConfig(width=WIDTH, heads=HEADS, layers=1, window_patches=WINDOW, patch_steps=1)
    layer = HAMLayer(config).to(DEVICE)
    layer.kernels = resolve_kernels(KERNEL, device=DEVICE, head_width=HEAD)
    tokens = plain_tokens(items, length)
    memory = layer.empty_memory(items, 1, layer.to_output.weight)
    policy = Policy(
        share=torch.full((items,), share, device=DEVICE),
        readable=torch.ones(items, 1, 1, dtype=torch.bool, device=DEVICE),
        masses=masses,
    )

    def call(x: torch.Tensor) -> Any:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return layer(x, tokens=tokens, memory=memory, policy=policy)

    with torch.no_grad():
        first = call(torch.randn(items, 1, length, WIDTH, device=DEVICE))
        layer.thresholds.calibrate(first.trace.scores.flatten(0, 2))
    compile_parts(layer, mode)
    return layer, call


@contextmanager
def number_asked_for() -> Iterator[None]:
    """Lists get room for what they hold, which the host must ask the device for, instead of for all that may come."""

    def counted(alive: torch.Tensor, most: int | None = None, *, skips_padding: bool = False) -> int:
        return min(bucket(int(alive.sum(dim=1).max())), alive.shape[1] if most is None else most)

    room, scratchpad.rows_for = scratchpad.rows_for, counted
    try:
        yield
    finally:
        scratchpad.rows_for = room


def _output(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> torch.Tensor:
    return call(x).output


def layer_cell(length: int, share: float, most: dict[str, float], mode: str) -> dict[str, Any]:
    """A HAM layer and a full-attention layer on the same tokens."""
    items = TOKENS // length
    x = torch.randn(items, 1, length, WIDTH, device=DEVICE).requires_grad_()
    layer, call = ham_layer(length, share, mode)
    leaves = [x, *layer.parameters()]
    ham = pass_times(partial(_output, call, x), leaves)
    with torch.no_grad():
        kept = float(call(x).trace.routed.float().mean())
    kernels = kernel_table(partial(_output, call, x), leaves)
    recorded = {"ham": recorded_ms(partial(_output, call, x), leaves)} if mode == "none" else {}
    del layer, call, leaves
    rows = {"ham": ham}
    if mode == "none":
        layer, call = ham_layer(length, share, mode, masses=True)
        rows["ham with masses"] = pass_times(partial(_output, call, x), [x, *layer.parameters()])
        layer, call = ham_layer(length, share, mode)
        with number_asked_for():
            rows["ham, number of entries asked for"] = pass_times(partial(_output, call, x), [x, *layer.parameters()])
        del layer, call
    place = torch.arange(length, device=DEVICE, dtype=torch.float64).expand(items, -1)
    for name, fused in (("cudnn attention", False), ("cudnn attention, norms fused", True)):
        rival = FullAttention(fused=fused).to(DEVICE)
        compile_parts(rival, mode)

        def attend(rival: FullAttention = rival) -> torch.Tensor:
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                return rival(x[:, 0], place)

        rows[name] = pass_times(attend, [x, *rival.parameters()])
        if mode == "none":
            recorded[name] = recorded_ms(attend, [x, *rival.parameters()])
    # against the faster of both
    full = min(list(rows.values())[-2:], key=lambda row: row["both_ms"])
    dense = 2 * TOKENS * WIDTH * WIDTH
    pairs = TOKENS * (share * length / 2 + WINDOW)
    recurrence = 2 * TOKENS * HEADS * HEAD * (2 * 64 + 4 * HEAD)
    flops = 6 * dense + 4 * pairs * WIDTH + recurrence
    moved = TOKENS * WIDTH * (4 + 2 * 10)
    return {
        "kept": kept,
        "compile_mode": mode,
        "rows": rows,
        "recorded_both_ms": recorded,
        "floor_ms": {"forward": floor_ms(flops, moved, most), "both": floor_ms(3.2 * flops, 3 * moved, most)},
        "ratio": ham["both_ms"] / full["both_ms"],
        "ratio_memory": ham["peak_gib"] / full["peak_gib"],
        "slowest_kernels_ms": kernels,
    }
