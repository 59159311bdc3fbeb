"""Speed of the ops on one CPU thread: forward and backward, against the plainest correct way.

Run ``python -m benchmarks.ops`` from the clone. Every cell is written to ``benchmarks/results/ops`` as it is measured
and not measured again unless ``--again`` is given or the versions changed.

The rival of ``gated_delta`` is the loop of ``naive.py``. The rival of ``attend`` is one dense
``scaled_dot_product_attention`` over all patches and entries with learned biases (``dense``). Beside it stands the same
with a mask of booleans, built beforehand, and no biases (``dense-plain``): that runs as one fused kernel, the best a
dense read could do. Neither gives the masses.

B items · C channels · N patches · H heads · K key · V value · M entries (scratchpad) · W window patches
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hamts.ops import naive
from hamts.ops.attend import attend
from hamts.ops.gated_delta import gated_delta
from hamts.ops.types import ScratchKeys

RESULTS = Path(__file__).parent / "results" / "ops"
HEADS = 4
WINDOW = 2
VERSIONS = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1}

Pass = Callable[[], tuple[torch.Tensor, list[torch.Tensor]]]


def delta_pass(op: Any, *, n_items: int, n_patches: int, width: int = 32, **options: Any) -> Pass:
    """One forward of the gated delta rule, and what to take gradients of."""
    generator = torch.Generator().manual_seed(0)
    shape = (n_items, n_patches, HEADS, width)
    queries, values = (torch.randn(shape, generator=generator) for _ in range(2))
    keys = torch.nn.functional.normalize(torch.randn(shape, generator=generator), dim=-1)
    log_decay = -0.1 * torch.rand(shape[:3], generator=generator)
    beta = torch.rand(shape[:3], generator=generator)
    leaves = [x.requires_grad_() for x in (queries, keys, values, log_decay, beta)]

    def forward() -> tuple[torch.Tensor, list[torch.Tensor]]:
        result = op(queries, keys, values, log_decay=log_decay, beta=beta, **options)
        return result.output.sum() + result.error.square().sum(), leaves

    return forward


def read_pass(kind: str, *, n_items: int, n_patches: int, n_channels: int, width: int, n_entries: int) -> Pass:
    """One forward of the read by ``kind``, where entries arrive evenly over the past and the chunk."""
    generator = torch.Generator().manual_seed(0)
    local = (n_items, WINDOW + n_patches, n_channels, HEADS, width)
    queries = torch.randn(n_items, n_patches, n_channels, HEADS, width, generator=generator) * width**-0.5
    local_keys, local_values = (torch.randn(local, generator=generator) for _ in range(2))
    keys, values = (torch.randn(n_items, n_entries, HEADS, width, generator=generator) for _ in range(2))
    bias, channel_bias = torch.zeros(n_items, n_entries), torch.zeros(HEADS)
    leaves = [x.requires_grad_() for x in (queries, local_keys, local_values, keys, values, bias, channel_bias)]
    arrival = torch.randint(-n_patches, n_patches, (n_items, n_entries), generator=generator).sort(1).values  # [B, M]
    channel = torch.randint(0, n_channels, (n_items, n_entries), generator=generator)  # [B, M]
    scratch = ScratchKeys(keys, values, channel, bias, arrival, torch.full_like(arrival, 10**9))
    mask = dense_mask(n_items, n_patches, n_channels, arrival)  # [B, 1, NC, (W+N)C+M]

    def blocked() -> tuple[torch.Tensor, list[torch.Tensor]]:
        result = attend(
            queries,
            local_keys=local_keys,
            local_values=local_values,
            local_present=torch.ones(local[:3], dtype=torch.bool),
            scratch=scratch,
            readable=torch.ones(n_items, n_channels, n_channels, dtype=torch.bool),
            channel_bias=channel_bias,
            window=WINDOW,
        )
        return result.output.square().sum(), leaves

    def dense(biased: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        all_keys = torch.cat([local_keys.flatten(1, 2), keys], 1).transpose(1, 2)  # [B, H, (W+N)C+M, K]
        all_values = torch.cat([local_values.flatten(1, 2), values], 1).transpose(1, 2)  # [B, H, (W+N)C+M, V]
        asked = queries.flatten(1, 2).transpose(1, 2)  # [B, H, NC, K]
        allowed = mask
        if biased:
            source = torch.cat([torch.arange(n_channels).repeat(WINDOW + n_patches).expand(n_items, -1), channel], 1)
            own = source[:, None] == torch.arange(n_channels).repeat(n_patches)[:, None]  # [B, NC, (W+N)C+M]
            entry_bias = torch.nn.functional.pad(bias, ((WINDOW + n_patches) * n_channels, 0))  # [B, (W+N)C+M]
            added = own[:, None] * channel_bias[:, None, None] + entry_bias[:, None, None]  # [B, H, NC, (W+N)C+M]
            allowed = torch.where(mask, added, -torch.inf)  # [B, H, NC, (W+N)C+M]
        attention = torch.nn.functional.scaled_dot_product_attention
        output = attention(asked, all_keys, all_values, attn_mask=allowed, scale=1)  # [B, H, NC, V]
        return output.square().sum(), leaves if biased else leaves[:5]

    ways: dict[str, Pass] = {"blocked": blocked, "dense": partial(dense, True), "dense-plain": partial(dense, False)}
    return ways[kind]


def dense_mask(n_items: int, n_patches: int, n_channels: int, arrival: torch.Tensor) -> torch.Tensor:
    """What each query may see, all channels readable, cross span 1, bool [B, 1, NC, (W+N)C+M]."""
    query = torch.arange(n_patches)[:, None, None, None]  # [N, 1, 1, 1]
    age = query + WINDOW - torch.arange(WINDOW + n_patches)[:, None]  # [N, 1, W+N, 1]
    own = torch.eye(n_channels, dtype=torch.bool)[:, None]  # [C, 1, C]
    local = (own & (age >= 0) & (age < WINDOW)) | (age == 0)  # [N, C, W+N, C]
    local = local.flatten(2).flatten(0, 1).expand(n_items, -1, -1)  # [B, NC, (W+N)C]
    seen = arrival[:, None] <= torch.arange(n_patches).repeat_interleave(n_channels)[:, None]  # [B, NC, M]
    return torch.cat([local, seen], -1)[:, None]


def cells() -> dict[str, tuple[Callable[..., Pass], dict[str, Any], str]]:
    """Every cell: how to build it, with what, and the cell it is compared with."""
    table: dict[str, tuple[Callable[..., Pass], dict[str, Any], str]] = {}
    for name, size in {
        "n512-b8": {"n_items": 8, "n_patches": 512},
        "n32-b128": {"n_items": 128, "n_patches": 32},
    }.items():
        rival = f"delta-{name}-naive"
        table[rival] = (delta_pass, {"op": naive.gated_delta, **size}, rival)
        for chunk in (16, 32, 64):
            options = {"op": gated_delta, "chunk": chunk, **size}
            table[f"delta-{name}-chunk{chunk}"] = (delta_pass, options, rival)
    for name, size in {
        "train-small": {"n_items": 64, "n_patches": 14, "n_channels": 3, "width": 16, "n_entries": 50},
        "train-large": {"n_items": 64, "n_patches": 40, "n_channels": 7, "width": 32, "n_entries": 400},
        "stream": {"n_items": 1, "n_patches": 128, "n_channels": 7, "width": 32, "n_entries": 2000},
    }.items():
        rival = f"read-{name}-dense"
        for kind in ("dense", "dense-plain", "blocked"):
            table[f"read-{name}-{kind}"] = (read_pass, {"kind": kind, **size}, rival)
    return table


def measure(forward: Pass, repeats: int) -> dict[str, Any]:
    """Median wall seconds, after one pass that does not count."""
    forwards, backwards = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        loss, leaves = forward()
        middle = time.perf_counter()
        torch.autograd.grad(loss, leaves)
        forwards.append(middle - start)
        backwards.append(time.perf_counter() - middle)
    return {"forward_s": statistics.median(forwards[1:]), "backward_s": statistics.median(backwards[1:])}


def load_or_measure(name: str, build: Callable[..., Pass], options: dict[str, Any], args: Any) -> dict[str, Any]:
    path = args.results / f"{name}.json"
    if path.exists() and not args.again:
        cell = json.loads(path.read_text())
        if cell["versions"] == VERSIONS:
            return cell
    described = {key: getattr(value, "__module__", value) for key, value in options.items()}
    described = {key: value for key, value in described.items() if not callable(value)}
    cell = {"cell": name, "options": described, "versions": VERSIONS, "repeats": args.repeats}
    cell |= measure(build(**options), args.repeats)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell, indent=1) + "\n")
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    print(f"{'cell':28} {'forward ms':>11} {'backward ms':>12} {'times faster':>13}")
    for name, (build, options, rival) in cells().items():
        cell = load_or_measure(name, build, options, args)
        seconds[name] = cell["forward_s"] + cell["backward_s"]
        times = f"{1e3 * cell['forward_s']:11.1f} {1e3 * cell['backward_s']:12.1f}"
        print(f"{name:28} {times} {seconds[rival] / seconds[name]:13.1f}", flush=True)


if __name__ == "__main__":
    main()
