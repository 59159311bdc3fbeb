"""What a step of a fit of the frontier takes, of one process that has a GPU to itself, and of which kernels.

``python -m benchmarks.frontier_speed --set epf-old --model mix --kernel torch`` fits for a few steps, short streams
first and long ones then, as a cell of the grid does, and prints milliseconds a step, and how many kernels a step runs
for how long.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch

from benchmarks.frontier_cell import LENGTHENED, NO_CAP, SIZES, Trial, fit
from benchmarks.frontier_grid import MODELS
from benchmarks.frontier_sets import SETS, load
from hamts.windows import StreamWindows

# steps before anything is counted; steps that are profiled
WARM, PROFILED = 8, 4


class Clock:
    """When each batch was drawn; profiles some of the short steps."""

    def __init__(self, steps: int, *, gpu: bool) -> None:
        self.gpu = gpu
        self.at: list[float] = []
        self.long: list[bool] = []
        self.begin = int(LENGTHENED[0] * steps) - PROFILED - 1
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.profile = torch.profiler.profile(activities=kinds[: 1 + gpu])

    def __call__(self, windows: StreamWindows) -> None:
        if self.gpu:
            torch.cuda.synchronize()
        if len(self.at) == self.begin:
            self.profile.start()
        if len(self.at) == self.begin + PROFILED:
            self.profile.stop()
        self.at.append(time.perf_counter())
        self.long.append(bool(windows.prefixes))

    def milliseconds(self) -> dict[str, float]:
        """Median of short steps, mean of long ones, whose lengths differ."""
        took = torch.tensor(self.at).double().diff() * 1e3
        long = torch.tensor(self.long[:-1])
        counted = torch.arange(len(took)) >= WARM
        counted &= (torch.arange(len(took)) < self.begin) | long
        # the first batch that is long is drawn as one
        later = took[long][min(WARM, int(long.sum()) // 2) :]
        return {
            "short": round(float(took[counted & ~long].median()), 1),
            "long": round(float(later.mean()), 1),
        }

    def kernels(self) -> dict[str, Any]:
        """Of a step: how many run on the device, for how long, and what the host starts."""
        events = self.profile.key_averages()
        on_device = [one for one in events if one.device_type == torch.autograd.DeviceType.CUDA]
        most = sorted(on_device, key=lambda one: -one.self_device_time_total)[:12]
        return {
            "kernels a step": round(sum(one.count for one in on_device) / PROFILED),
            "device ms a step": round(sum(one.self_device_time_total for one in on_device) / PROFILED / 1e3, 1),
            "host ms a step": round(sum(one.self_cpu_time_total for one in events) / PROFILED / 1e3, 1),
            "most time": [
                (one.key[:90], one.count // PROFILED, round(one.self_device_time_total / PROFILED / 1e3, 2))
                for one in most
            ],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="epf-old", choices=list(SETS))
    parser.add_argument("--model", default="mix", choices=list(MODELS))
    parser.add_argument("--size", default="1M", choices=list(SIZES))
    parser.add_argument("--kernel", default="torch")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--steps", type=int, default=60)
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_float32_matmul_precision("high")
    clock = Clock(told.steps, gpu=torch.cuda.is_available() and told.accelerator != "cpu")
    began = time.perf_counter()
    fit(
        load(told.set), SETS[told.set], MODELS[told.model], rate=3e-3, seed=7, budget=NO_CAP, size=told.size,
        max_steps=told.steps, accelerator=told.accelerator, trial=Trial(kernel=told.kernel, watched=True, each=clock),
    )  # fmt: skip
    print(f"{told.set}, {told.model}, {told.size}, {told.kernel}: ms a step {clock.milliseconds()},"
          f" {clock.at[0] - began:.1f} s before the first step, {clock.at[WARM] - clock.at[0]:.1f} s for {WARM} steps,"
          f" {time.perf_counter() - clock.at[-1]:.1f} s after the last")  # fmt: skip
    found = clock.kernels()
    most = found.pop("most time")
    print(found)
    for key, count, ms in most:
        print(f"  {ms:8.2f} ms  {count:5d}  {key}")


if __name__ == "__main__":
    main()
