"""How the benchmarks of training measure: medians of device events, floors, kernels of a trace.

Every time stands beside the floating-point operations it must do and the bytes it must move, over what the device did
of each in the same run: no version runs faster than that floor.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch

__all__ = [
    "DEVICE",
    "REPEATS",
    "Timed",
    "busy",
    "ceilings",
    "floor_ms",
    "kernel_table",
    "median_ms",
    "pass_times",
    "recorded_ms",
    "versions",
]

DEVICE = "cuda"
REPEATS = 12
# between two kernels of a graph lie one or two microseconds; more means that something was waited for
SHORT_GAP_US, LONG_GAP_US = 5.0, 100.0

Timed = dict[str, float]


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
    return {"sum": sum(ordered.values()), "ran": idle(profile, 1)["ran"], **dict(list(ordered.items())[:rows])}


def idle(profile: Any, steps: int) -> dict[str, Any]:
    """How many kernels and copies the device ran in a step, and how long nothing ran, by how long at once."""
    device = torch.autograd.DeviceType.CUDA
    ran = sorted(
        (event.time_range.start, event.time_range.end) for event in profile.events() if event.device_type == device
    )
    gaps, until = {"short": 0.0, "middle": 0.0, "long": 0.0}, ran[0][1] if ran else 0.0
    for begin, end in ran:
        gap = begin - until
        if gap > 0:
            length = "short" if gap < SHORT_GAP_US else "middle" if gap < LONG_GAP_US else "long"
            gaps[length] += gap / 1e3 / steps
        until = max(until, end)
    return {"ran": len(ran) / steps, "idle_ms": gaps, "gap_bounds_us": [SHORT_GAP_US, LONG_GAP_US]}


def busy(step: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Kernel time over wall time in a trace of some steps, without a wait between them; and the slowest kernels."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        host = time.perf_counter() - begin
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
        "host_ms": 1e3 * host / steps,
        **idle(profile, steps),
        "slowest_kernels_ms": dict(list(ordered.items())[:24]),
    }
