"""Steps of training of the preset ``base``, and of a full-attention network of the same size on the same patches.

S streams · N patches · D width · P steps in a patch · Q quantiles
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.training_timing import DEVICE, busy
from hamts.config import PRESETS, MachineConfig, ModelConfig
from hamts.nn.compiled import compile_parts

__all__ = ["fit_cell", "fit_steps", "patchtst_steps"]

CONTEXT_PATCHES, CHANNELS, WINDOWS, PATCH_STEPS, HORIZON_STEPS = 512, 7, 32, 12, 96
FIT_STEPS, FIT_REPEATS, FIT_SECONDS, TRACED_STEPS = 24, 3, 12.0, 6
# a recorded fit has met every length of prefix twice by then
WARM_STEPS = {"kernels-graphs": 60}
FEWEST_WARM_STEPS = 5


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
    for _ in range(WARM_STEPS.get(kind, FEWEST_WARM_STEPS)):
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
        # also what recorded graphs hold for themselves
        "reserved_gib": torch.cuda.memory_reserved() / 2**30,
        "steps_a_repeat": steps,
        "first_steps_s": warm,
        "weights": weights,
        "floor_ms": {"both": 1e3 * 6 * weights * patches / most["flops"]},
    }
    return cell | busy(step, max(2, min(TRACED_STEPS, steps // 2)))
