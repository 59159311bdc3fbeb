"""Fitting in several processes: each takes its streams of the same batch, and together they take the same step.

Lightning's strategies ``ddp`` (every process holds the weights) and ``fsdp`` (each holds a part of them). Losses are
normalised by what all processes count and thresholds follow the scores of all, so that the number of processes changes
nothing beyond rounding.

B streams side by side · n scores · S score routers
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.optim.swa_utils import AveragedModel

from hamts.nn.allocation import update_tables
from hamts.nn.tokens import map_tensors
from hamts.reader import HAMNetwork, Reading
from hamts.windows import Windows

__all__ = [
    "STRATEGIES",
    "everyone",
    "everyones",
    "follow_average",
    "follow_scores",
    "make_strategy",
    "own_streams",
    "shard",
    "total",
    "touch_all",
]

STRATEGIES = ("auto", "ddp", "fsdp")


def make_strategy(name: str, devices: int) -> Any:
    """What lightning is given. Raises ValueError for an unknown name."""
    if name not in STRATEGIES:
        raise ValueError(f"Unknown strategy {name!r}. Available: {list(STRATEGIES)}.")
    if name == "ddp" or (name == "auto" and devices > 1):
        # an empty scratchpad uses no router: which weights get a gradient depends on the batch
        return DDPStrategy(find_unused_parameters=True)
    if name == "fsdp":
        return ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
    return "auto"


def shard(step: nn.Module, mesh: Any) -> None:
    """Spread weights, gradients and what the optimiser remembers over the processes of a mesh.

    ``step`` is the module whose forward is a whole step: the weights come together before it and part after its
    gradient, all at once. What a step touches depends on its streams, so weights that came pass by pass, or block by
    block, would be waited for in different orders.
    """
    from torch.distributed.fsdp import fully_shard

    fully_shard(step, mesh=mesh, reshard_after_forward=False)


def touch_all(network: nn.Module) -> torch.Tensor:
    """Nothing, with a gradient of nothing for every weight: all processes must have one where any of them has."""
    return torch.stack([0.0 * weight.float().sum() for weight in network.parameters()]).sum()


def everyone() -> int:
    """How many processes fit together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_streams(batch: Windows) -> Windows:
    """Every n-th stream of a batch, for the n-th part of the processes."""
    world = everyone()
    if world == 1:
        return batch
    if len(batch.reset) % world:
        raise ValueError(
            f"batch_windows must divide by the number of processes. Got {len(batch.reset)} for {world}."
            " Choose a multiple."
        )
    return map_tensors(batch, lambda tensor: tensor[dist.get_rank() :: world])


def total(counts: torch.Tensor) -> torch.Tensor:
    """Sums over all processes, over their number: dividing a local sum by it gives parts whose mean is the whole's."""
    world = everyone()
    if world == 1:
        return counts
    summed = counts.detach().to(torch.float64)
    dist.all_reduce(summed)
    return summed / world


@torch.no_grad()
def follow_scores(network: HAMNetwork, reading: Reading) -> None:
    """Move every layer's thresholds towards the scores that all processes gave what was observed."""
    heard = reading.heard.flatten() >= 0.5  # [n]
    samples = [trace.scores.flatten(0, 2) for trace in reading.traces]  # each [n, S]
    counted: torch.Tensor | None = heard
    if everyone() > 1:
        samples, counted = [everyones(scores[heard]) for scores in samples], None
    update_tables(network.backbone.layers(), samples, network.config.allocation, calibrate=False, counted=counted)


def everyones(scores: torch.Tensor) -> torch.Tensor:
    """Scores of all processes, [n, S] of each -> [n of all, S]."""
    world = everyone()
    if world == 1:
        return scores
    sizes = [torch.zeros(1, dtype=torch.int64, device=scores.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(scores)], device=scores.device))
    most = max(int(size) for size in sizes)
    padded = torch.zeros(most, scores.shape[1], dtype=scores.dtype, device=scores.device)  # [n, S]
    padded[: len(scores)] = scores.detach()
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(size)] for part, size in zip(gathered, sizes, strict=True)])


@torch.no_grad()
def follow_average(averaged: AveragedModel, network: nn.Module) -> None:
    """Move the averaged weights towards the network's, which may be spread over processes."""
    current: list[torch.Tensor] = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in network.parameters()]
    mine: list[torch.Tensor] = list(averaged.module.parameters())
    # not its own method: that sends the count to the device and asks for it back, a wait in every step
    if int(averaged.n_averaged) == 0:
        torch._foreach_copy_(mine, current)
    else:
        assert averaged.multi_avg_fn is not None
        averaged.multi_avg_fn(mine, current, averaged.n_averaged)
    for buffer, now in zip(averaged.module.buffers(), network.buffers(), strict=True):
        buffer.copy_(now)
    averaged.n_averaged += 1
