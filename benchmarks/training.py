"""Speed on a GPU of the recurrence with its error, of a whole layer, and of training: each beside its rival.

Run ``python -m benchmarks.training`` from the clone on a machine with a CUDA device and the extra ``gpu``. Every cell
is written to ``benchmarks/results/training`` as it is measured and not measured again unless ``--again`` is given.
``--cells delta,layer`` measures some of them, ``--table`` prints what is there.

delta   the gated delta rule with its prediction error, against the library's own op without it
layer   a whole HAM layer, forward and backward, against full attention by cuDNN with the same projections, gate,
        norms and rotations, these by hamts' own kernels too; ``compiled``: by torch's compiler instead, in both
fit     steps of training of the preset ``base`` on contexts of 512 patches of seven channels: on kernels, the same
        recorded as a CUDA graph, on plain torch, and a full-attention network of the same size that sees the same
        patches (PatchTST-like)

Times are medians by device events after warming up. Beside each stand the floating-point operations it must do and the
bytes it must move, over what the device did of each in the same run: no version runs faster than that floor.

B items · N patches · D width · H heads · K head width
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hamts.config import PRESETS, MachineConfig, ModelConfig
from hamts.nn.compiled import compile_parts
from hamts.nn.ham import HAMLayer
from hamts.nn.heads import HeadNorm, angles, rotate
from hamts.nn.tokens import Policy, Tokens
from hamts.ops.kernels import resolve_kernels

RESULTS = Path(__file__).parent / "results" / "training"
DEVICE, KERNEL = "cuda", "fla+triton"
TOKENS, WIDTH, HEADS, WINDOW = 65_536, 1024, 16, 64
HEAD = WIDTH // HEADS
DELTA_LENGTHS, LAYER_LENGTHS, LAYER_SHARES = (4_096, 16_384, 65_536), (8_192, 16_384, 65_536), (0.25, 0.10)
CONTEXT_PATCHES, CHANNELS, WINDOWS, PATCH_STEPS, HORIZON_STEPS = 512, 7, 32, 12, 96
FITS = ("kernels-graphs", "kernels", "torch-bf16", "torch-fp32", "patchtst")
REPEATS, FIT_STEPS, FIT_REPEATS, WARM_STEPS, FIT_SECONDS = 12, 12, 3, 5, 8.0

LAYER_BOUNDS = {"layer-n8192-share25": 1.0, "layer-n16384-share25": 0.75, "layer-n65536-share25": 0.45}

Timed = dict[str, float]


# --- how things are measured


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "fla-core"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def median_ms(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Median milliseconds by device events, after two runs that do not count."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def pass_times(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Timed:
    """Milliseconds of forward alone and of forward and backward, and the peak of memory above what was there."""

    def both() -> None:
        output = forward()
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    def alone() -> None:
        with torch.no_grad():
            forward()

    both()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    both()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"forward_ms": median_ms(alone), "both_ms": median_ms(both), "peak_gib": peak / 2**30}


def recorded_ms(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> float:
    """Milliseconds of forward and backward replayed as a CUDA graph: what is left when the host launches nothing."""

    def both() -> Any:
        output = forward()
        return torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        both()
    return median_ms(graph.replay)


def ceilings() -> dict[str, float]:
    """What the device does: bf16 products in FLOP/s, a copy in bytes/s, read and written counted."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / (median_ms(lambda: a @ b) / 1e3)
    source = torch.randn(2**30, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return {"flops": flops, "bytes": 2 * source.nbytes / (median_ms(lambda: target.copy_(source)) / 1e3)}


def floor_ms(flops: float, moved: float, most: dict[str, float]) -> float:
    return 1e3 * max(flops / most["flops"], moved / most["bytes"])


# --- delta


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


# --- layer


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


def kernel_table(forward: Callable[[], torch.Tensor], leaves: list[torch.Tensor], rows: int = 24) -> dict[str, float]:
    """Milliseconds of device time by kernel in one forward and backward pass, the slowest first, and their sum."""

    def both() -> None:
        output = forward()
        torch.autograd.grad(output, leaves, torch.ones_like(output), allow_unused=True)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        both()
        torch.cuda.synchronize()
    spent: dict[str, float] = {}
    for event in profile.key_averages():
        spent[event.key[:90]] = spent.get(event.key[:90], 0.0) + event.self_device_time_total / 1e3
    ordered = dict(sorted(spent.items(), key=lambda pair: -pair[1]))
    return {"sum": sum(ordered.values()), **dict(list(ordered.items())[:rows])}


# --- fit


def synthetic_store() -> Any:
    """Seven channels of noisy seasons in eight items, as patches."""
    import pandas as pd

    from hamts.data.frame import to_panel
    from hamts.data.patches import build_store

    steps, rng = 1600 * PATCH_STEPS, np.random.default_rng(0)
    clock = np.arange(steps)
    frames = []
    for item in range(8):
        columns = {f"y{c}": np.sin(np.arange(steps) * 2 * np.pi / 24 + c + item) for c in range(CHANNELS)}
        frame = pd.DataFrame(columns) + 0.3 * rng.normal(size=(steps, CHANNELS))
        frames.append(frame.assign(unique_id=str(item), ds=clock))
    panel = to_panel(pd.concat(frames), target=[f"y{c}" for c in range(CHANNELS)])
    return panel, build_store(panel, patch_steps=PATCH_STEPS, extra_steps=HORIZON_STEPS)


def fit_steps(machine: MachineConfig) -> Callable[[], Any]:
    """One training step of the preset ``base``, as ``fit`` takes it: windows, passes, gradients, optimiser, average."""
    from hamts.checks import FitState, FitTask, Run
    from hamts.fitting import new_network
    from hamts.resolve import FitOptions, make_plan
    from hamts.training import HAMTrainer, planned_kernels
    from hamts.training_parallel import follow_average
    from hamts.windows import StreamWindows, scale_history

    panel, store = synthetic_store()
    options = FitOptions(
        h=HORIZON_STEPS, preset="base", patch_steps=PATCH_STEPS, batch_windows=WINDOWS, machine=machine
    )
    plan = make_plan(panel, options)
    ends = panel.lengths - HORIZON_STEPS
    network = new_network(panel, plan, ends)
    history = scale_history(network, store)
    network.to(DEVICE).use_kernels(planned_kernels(plan.model, machine))
    train = replace(plan.train, context_patches=CONTEXT_PATCHES)
    task = FitTask(network, store, [], HORIZON_STEPS, plan.memory.budget_share, train, 1000, None, machine)
    run = Run(task, quiet=True)
    windows = StreamWindows(
        store, history, ends=ends, horizon=HORIZON_STEPS, config=train, cross_chance=0.5, device=DEVICE,
        same_sizes=machine.cuda_graphs, few_prefixes=True,
    )  # fmt: skip
    module = HAMTrainer(task, run, FitState(windows, torch.Generator(DEVICE).manual_seed(1)))
    network.train()
    network.backbone.checkpointing = machine.checkpointing
    compile_parts(network, machine.compile_mode)
    optimizer = module.configure_optimizers()
    half = machine.precision == "bf16-mixed"

    def step() -> None:
        batch = module.transfer_batch_to_device(windows.draw(), torch.device(DEVICE), 0)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=half):
            loss = module.training_step(batch, 0)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), train.gradient_clip)
        optimizer.step()
        follow_average(run.averaged, network)

    step.network = network  # type: ignore[attr-defined]
    return step


class PatchAttention(nn.Module):
    """Channel by channel, patches in, attention over all of them, patches out: the shape of PatchTST, in our sizes."""

    def __init__(self, config: ModelConfig, quantiles: int) -> None:
        super().__init__()
        D, inner = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.quantiles = config.heads, quantiles
        self.embed = nn.Linear(config.patch_steps, D)
        self.place = nn.Parameter(torch.randn(CONTEXT_PATCHES, D) * 0.02)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "before": nn.RMSNorm(D), "qkv": nn.Linear(D, 3 * D, bias=False), "out": nn.Linear(D, D, bias=False),
                "gate": nn.Linear(D, D), "query": nn.Linear(D, D, bias=False), "after": nn.RMSNorm(D),
                "grow": nn.Linear(D, 2 * inner), "shrink": nn.Linear(inner, D),
            })
            for _ in range(config.layers)
        )  # fmt: skip
        self.head = nn.Linear(D, config.patch_steps * quantiles)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[S, N, P] -> [S, N, P Q]."""
        x = self.embed(values) + self.place  # [S, N, D]
        for block in self.blocks:
            y = block["before"](x)
            q, k, v = block["qkv"](y).unflatten(-1, (3, self.heads, -1)).unbind(2)
            q = q + block["query"](y).unflatten(-1, (self.heads, -1))
            read = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
            x = x + block["out"](read.transpose(1, 2).flatten(-2) * block["gate"](y).sigmoid())
            gate, content = block["grow"](block["after"](x)).chunk(2, -1)
            x = x + block["shrink"](F.silu(gate) * content)
        return self.head(x)


def patchtst_steps() -> Callable[[], Any]:
    """The same number of patches through a full-attention network of the same size."""
    config = ModelConfig(**PRESETS["base"].model, patch_steps=PATCH_STEPS)
    levels = torch.tensor(config.quantiles, device=DEVICE)  # [Q]
    network = PatchAttention(config, len(levels)).to(DEVICE)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    values = torch.randn(WINDOWS * CHANNELS, CONTEXT_PATCHES, PATCH_STEPS, device=DEVICE)

    def step() -> None:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            answer = network(values).float().unflatten(-1, (PATCH_STEPS, -1))  # [S, N, P, Q]
        short = values.roll(-1, 1)[..., None] - answer
        loss = torch.maximum(levels * short, (levels - 1) * short).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()

    step.network = network  # type: ignore[attr-defined]
    return step


def fit_cell(kind: str, most: dict[str, float]) -> dict[str, Any]:
    """Steps per second, and what share of the time the device was busy with kernels."""
    machines = {
        "kernels": MachineConfig(accelerator="gpu", precision="bf16-mixed", kernel="fla+triton"),
        "kernels-graphs": MachineConfig(
            accelerator="gpu", precision="bf16-mixed", kernel="fla+triton", cuda_graphs=True
        ),
        "torch-bf16": MachineConfig(accelerator="gpu", precision="bf16-mixed", kernel="torch"),
        "torch-fp32": MachineConfig(accelerator="gpu", precision="32-true", kernel="torch"),
    }
    step = patchtst_steps() if kind == "patchtst" else fit_steps(machines[kind])
    begun = time.perf_counter()
    for _ in range(WARM_STEPS):
        step()
    torch.cuda.synchronize()
    warm = time.perf_counter() - begun
    begun = time.perf_counter()
    step()
    torch.cuda.synchronize()
    # a slow step need not be repeated as often
    steps = max(2, min(FIT_STEPS, int(FIT_SECONDS / (time.perf_counter() - begun) / FIT_REPEATS)))
    torch.cuda.reset_peak_memory_stats()
    times = []
    # as a fit does, nothing waits between steps
    for _ in range(FIT_REPEATS):
        begun = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / steps)
    weights = sum(p.numel() for p in step.network.parameters())  # type: ignore[attr-defined]
    patches = WINDOWS * CHANNELS * CONTEXT_PATCHES
    cell: dict[str, Any] = {
        "median_s": statistics.median(times),
        "steps_per_s": 1 / statistics.median(times),
        "patches_per_s": patches / statistics.median(times),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "steps_a_repeat": steps,
        "first_steps_s": warm,
        "weights": weights,
        "floor_ms": {"both": 1e3 * 6 * weights * patches / most["flops"]},
    }
    return cell | busy(step, max(2, steps // 2))


def busy(step: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Kernel time over wall time in a trace of some steps, without a wait between them; and the slowest kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    spent: dict[str, float] = {}
    calls = 0
    for event in profile.key_averages():
        spent[event.key[:90]] = spent.get(event.key[:90], 0.0) + event.self_device_time_total / 1e3 / steps
        calls += event.count
    ordered = dict(sorted(spent.items(), key=lambda pair: -pair[1]))
    return {
        "kernel_ms": sum(ordered.values()),
        "wall_ms": 1e3 * wall / steps,
        "kernel_share": sum(ordered.values()) / (1e3 * wall / steps),
        "launches": calls / steps,
        "slowest_kernels_ms": dict(list(ordered.items())[:24]),
    }


# --- cells and table


def cells() -> dict[str, Callable[[dict[str, float]], dict[str, Any]]]:
    table: dict[str, Callable[[dict[str, float]], dict[str, Any]]] = {}
    for length in DELTA_LENGTHS:
        table[f"delta-n{length}"] = lambda most, n=length: delta_cell(n, most)  # type: ignore[misc]
    for share in LAYER_SHARES:
        for length in LAYER_LENGTHS:
            name = f"layer-n{length}-share{round(100 * share)}"
            table[name] = lambda most, n=length, s=share: layer_cell(n, s, most, "none")  # type: ignore[misc]
            table[f"{name}-compiled"] = lambda most, n=length, s=share: layer_cell(n, s, most, "default")  # type: ignore[misc]
    for kind in FITS:
        table[f"fit-{kind}"] = lambda most, k=kind: fit_cell(k, most)  # type: ignore[misc]
    return table


def chosen(part: str, names: Iterable[str]) -> list[str]:
    """The cell of that name, or those whose names begin so."""
    return [part] if part in names else [name for name in names if name.startswith(part)]


def measure(args: argparse.Namespace) -> None:
    most: dict[str, float] | None = None
    known = cells()
    asked = [name for part in args.cells.split(",") for name in chosen(part, known)]
    for name in dict.fromkeys(asked):
        build, path = known[name], args.results / f"{name}.json"
        if path.exists() and not args.again:
            continue
        most = most or ceilings()
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        began = time.perf_counter()
        try:
            found = build(most)
        except Exception as error:  # noqa: BLE001 - one cell that fails must not cost the others
            traceback.print_exc()
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        about = {
            "cell": name, "device": torch.cuda.get_device_name(), "versions": versions(), "ceilings": most, "seed": 0,
            "sizes": {"tokens": TOKENS, "width": WIDTH, "heads": HEADS, "window": WINDOW, "repeats": REPEATS},
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | found, indent=1) + "\n")
        print(f"# {name}: {time.perf_counter() - began:.0f} s", flush=True)


def table(results: Path) -> str:
    """Every cell that was measured, as Markdown."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    lines = [
        "| cell | rows: forward / both ms, peak GiB | floor both ms | ratio | memory | recorded, ham / full ms |",
        "|---|---|---|---|---|---|",
    ]
    for name in cells():
        cell = found.get(name)
        if cell is None or "rows" not in cell:
            continue
        rows = "; ".join(
            f"{row} {t['forward_ms']:.2f} / {t['both_ms']:.2f}, {t['peak_gib']:.2f}" for row, t in cell["rows"].items()
        )
        memory = f"{cell['ratio_memory']:.2f}" if "ratio_memory" in cell else ""
        replayed = cell.get("recorded_both_ms")
        memory += f" | {replayed['ham']:.2f} / {min(list(replayed.values())[1:]):.2f}" if replayed else " | "
        lines.append(f"| {name} | {rows} | {cell['floor_ms']['both']:.2f} | {cell['ratio']:.2f} | {memory} |")
    lines += ["", *ratios(found)]
    lines += [
        "",
        "| fit | steps/s | patches/s | kernels / wall | events of a trace | peak GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in cells():
        cell = found.get(name)
        if cell is None or "steps_per_s" not in cell:
            continue
        lines.append(
            f"| {name} | {cell['steps_per_s']:.2f} | {cell['patches_per_s']:,.0f} | {cell['kernel_share']:.0%}"
            f" | {cell['launches']:,.0f} | {cell['peak_gib']:.1f} |"
        )
    missing = [name for name in cells() if name not in found]
    return "\n".join([*lines, *([f"\nNot run: {', '.join(missing)}."] if missing else [])])


def ratios(found: dict[str, Any]) -> list[str]:
    """The layer against both rivals, recorded and launched."""
    lines = [
        "| layer | recorded, against norms fused | against plain norms | launched, fused | launched, plain | at most |",
        "|---|---|---|---|---|---|",
    ]
    plain, fused = "cudnn attention", "cudnn attention, norms fused"
    for name in cells():
        cell = found.get(name)
        if cell is None or not cell.get("recorded_both_ms"):
            continue
        replayed, rows = cell["recorded_both_ms"], cell["rows"]
        every = [replayed["ham"] / replayed[rival] for rival in (fused, plain)]
        every += [rows["ham"]["both_ms"] / rows[rival]["both_ms"] for rival in (fused, plain)]
        bound = LAYER_BOUNDS.get(name)
        numbers = " | ".join(f"{ratio:.2f}" for ratio in every)
        lines.append(f"| {name} | {numbers} | {'-' if bound is None else f'{bound:.2f}'} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument(
        "--cells", default="", help="cells of these names, or whose names begin so, by commas, in this order"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.table:
        measure(args)
    print(table(args.results))


if __name__ == "__main__":
    main()
