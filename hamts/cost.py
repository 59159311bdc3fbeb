"""What reading one patch costs, and so how many entries a budget of operations or milliseconds allows.

The cost is counted, or timed, on this machine with scratchpads of several sizes, and taken to be straight in between:
all of a layer's work but the read is the same at any size, and the read grows with the entries. Operations lie on one
line; milliseconds bend where entries no longer fit into a cache.

C channels · M entries · L layers
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from hamts.config import TrainConfig
from hamts.data.patches import Chunk
from hamts.nn.scratchpad import Entries
from hamts.reader import HAMNetwork, StreamMemory
from hamts.windows import EMPTY_CHANCE, FULL_CHANCE, LARGEST_SHARE, SMALLEST_SHARE

__all__ = ["CostModel", "bytes_within", "fit_cost", "measure", "rising", "training_flops"]

UNITS = ("flops", "ms")
# the empty scratchpad is read by a way of its own
SIZES = (32, 128, 256, 512, 1024, 2048)
# starting kernels hides the read of a few thousand
GPU_SIZES = (1024, 8192, 16384, 32768, 65536)
WARM_RUNS, FEWEST_RUNS, SECONDS_A_SIZE, QUANTILE = 3, 10, 1.0, 0.1


@dataclass(frozen=True)
class CostModel:
    """Cost of reading one patch of every channel of ``items`` items side by side, straight between measured points.

    Attributes:
        unit: ``flops``, those of matrix products, or ``ms``, of an undisturbed machine.
        entries: of every layer of every item, rising.
        costs: at these; they do not fall.
    """

    unit: str
    items: int
    entries: tuple[int, ...]
    costs: tuple[float, ...]

    def slope(self, last: bool) -> float:
        """Of one more entry, beyond the points on this side."""
        if len(self.entries) < 2:
            return 0.0
        a, b = (-2, -1) if last else (0, 1)
        return (self.costs[b] - self.costs[a]) / (self.entries[b] - self.entries[a])

    def cost(self, entries: float) -> float:
        """Cost at so many entries in each layer of each item."""
        inside = float(np.interp(entries, self.entries, self.costs))
        below, above = min(entries - self.entries[0], 0), max(entries - self.entries[-1], 0)
        return inside + below * self.slope(last=False) + above * self.slope(last=True)

    def within(self, budget: float) -> int:
        """Most entries of a layer whose cost is within a budget.

        Raises ValueError: the budget is below the cost of one entry.
        """
        if budget < self.cost(1):
            raise ValueError(
                f"budget_{self.unit} must be at least {self.cost(1):.4g}, which one entry costs. Got {budget:g}."
                f" Choose budget_{self.unit}={self.cost(1) * 1.01:.4g} or more, or a smaller network."
            )
        # the last point that is within it, and what the line from there leaves room for
        i = int(np.searchsorted(self.costs, budget, side="right")) - 1
        if i == len(self.costs) - 1:
            slope = self.slope(last=True)
        elif i < 0:
            i, slope = 0, self.slope(last=False)
        else:
            slope = (self.costs[i + 1] - self.costs[i]) / (self.entries[i + 1] - self.entries[i])
        if slope <= 0.0:
            # entries cost nothing that could be told: no more than were tried
            return self.entries[i]
        return int(self.entries[i] + (budget - self.costs[i]) / slope + 1e-6)


def fit_cost(
    network: HAMNetwork,
    unit: str,
    *,
    items: int = 1,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    seconds: float = SECONDS_A_SIZE,
) -> CostModel:
    """Count or time a network at several sizes of scratchpad.

    Args:
        unit: ``flops`` or ``ms``.
        items: streams side by side.
        sizes: entries of each layer, rising; None: as many as tell on this device.
        seconds: of timing for each size.
    """
    if sizes is None:
        sizes = SIZES if network.head.project.weight.device.type == "cpu" else GPU_SIZES
    if unit not in UNITS:
        raise ValueError(f"Unknown unit {unit!r}. Available: {sorted(UNITS)}.")
    costs = measure(network, unit, entries=sizes, items=items, seed=seed, seconds=seconds)
    return CostModel(unit, items, tuple(sizes), tuple(rising(costs)))


def rising(costs: Sequence[float]) -> list[float]:
    """The nearest costs that do not fall: neighbours that do take their mean."""
    blocks: list[tuple[float, int]] = []
    for cost in costs:
        blocks.append((cost, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((n * a + m * b) / (n + m), n + m)]
    return [mean for mean, count in blocks for _ in range(count)]


def measure(
    network: HAMNetwork,
    unit: str,
    *,
    entries: Sequence[int],
    items: int = 1,
    seed: int = 0,
    seconds: float = SECONDS_A_SIZE,
) -> list[float]:
    """Cost of reading one patch with so many entries in each layer's scratchpad, for each number of entries.

    Operations are counted. Milliseconds are the lower tenth of many runs, what a patch takes when nothing else
    disturbs it; sizes are timed in turn, so that a machine that slows down does so for all of them.
    """
    device, was_training = network.head.project.weight.device, network.training
    network.eval()
    chunk = random_chunk(network, items, seed)
    policy = replace(network.policy(torch.full((items,), 0.1), capped=False), threshold="fixed")
    memories = [filled_memory(network, items, size, seed) for size in entries]

    def read(memory: StreamMemory) -> None:
        with torch.no_grad():
            network(chunk, memory, policy, stepwise=True, decode=False)

    if unit == "flops":
        costs = []
        for memory in memories:
            with FlopCounterMode(display=False) as counter:
                read(memory)
            costs.append(float(counter.get_total_flops()))
    else:
        costs = _undisturbed_ms([partial(read, memory) for memory in memories], device, seconds)
    network.train(was_training)
    return costs


def _undisturbed_ms(runs: Sequence[Callable[[], None]], device: torch.device, seconds: float) -> list[float]:
    """Lower tenth of the milliseconds of each call, timed in turn after a few to warm up."""

    # on one thread of a processor the time that it computed: others may have had the core in between
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter

    def once(run: Callable[[], None]) -> float:
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    for _ in range(WARM_RUNS):
        for run in runs:
            once(run)
    times: list[list[float]] = []
    began = time.perf_counter()
    while len(times) < FEWEST_RUNS or time.perf_counter() - began < seconds * len(runs):
        times.append([once(run) for run in runs])
    return (1e3 * np.quantile(np.asarray(times), QUANTILE, axis=0)).tolist()


def filled_memory(network: HAMNetwork, items: int, entries: int, seed: int) -> StreamMemory:
    """A memory whose scratchpads hold so many entries each, of random content and older than the window."""
    empty = network.empty_memory(items)
    generator = torch.Generator().manual_seed(seed)
    channels = len(network.spec.roles)

    def fill(pad: Entries) -> Entries:
        def random(like: torch.Tensor) -> torch.Tensor:
            shape = (items, entries, *like.shape[2:])
            if like.dtype == torch.bool or not like.dtype.is_floating_point:
                return torch.zeros(shape, dtype=like.dtype, device=like.device)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)

        names = [name for name, value in vars(pad).items() if value is not None]
        filled = Entries(**{name: random(getattr(pad, name)) for name in names})
        place = torch.arange(entries, device=pad.alive.device).expand(items, entries)  # [B, M]
        return replace(
            filled,
            alive=torch.ones_like(filled.alive),
            channel=place % channels,
            position=(place // channels - entries - network.config.window_patches).to(filled.position),
        )

    layers = [replace(layer, scratchpad=fill(layer.scratchpad)) for layer in empty.layers]
    return replace(empty, layers=layers)


def random_chunk(network: HAMNetwork, items: int, seed: int, patches: int = 1) -> Chunk:
    """Observed patches of every channel."""
    generator = torch.Generator().manual_seed(seed + 1)
    spec, P = network.spec, network.config.patch_steps
    N = patches
    grid = (items, len(spec.roles), N, P)
    values = torch.randn(grid, generator=generator, dtype=torch.float64)  # [B, C, N, P]
    coded = torch.tensor([n > 0 for n in spec.levels])[:, None, None]  # [C, 1, 1]
    values = torch.where(coded, 0.0, values)  # [B, C, N, P]
    nothing = torch.zeros(grid, dtype=torch.bool)
    return Chunk(
        values=values,
        observed=~nothing,
        tags=nothing,
        event_offset=torch.zeros(grid),
        calendar=torch.zeros(items, N, spec.calendar_features),
        present=torch.ones(items, N, dtype=torch.bool),
        complete=torch.ones(items, len(spec.roles), N, dtype=torch.bool),
        position=torch.arange(N, dtype=torch.float64).expand(items, N),
        elapsed=torch.ones(items, N),
        static_values=torch.zeros(items, spec.static_numeric),
        static_codes=torch.zeros(items, len(spec.static_levels), dtype=torch.int64),
        truth=values,
    )


def bytes_within(network: HAMNetwork, policy_bytes: int, *, flops: float | None, ms: float | None) -> int:
    """The smallest of a budget of bytes and what budgets of operations and milliseconds allow, in bytes.

    Raises ValueError: a budget below the cost of one entry.
    """
    allowed = policy_bytes
    for unit, budget in (("flops", flops), ("ms", ms)):
        if budget is not None:
            entries = fit_cost(network, unit).within(budget)
            allowed = min(allowed, entries * network.entry_bytes() * network.config.layers)
    return allowed


def training_flops(network: HAMNetwork, config: TrainConfig, *, horizon_steps: int, seed: int = 0) -> float:
    """Operations of matrix products in one optimiser step, in expectation.

    Counted on one stream of the mean age under the mean budget, forward and backward, for every stream of a batch; and
    forward alone for the patches that restarted streams read first.
    """
    P, C = network.config.patch_steps, len(network.spec.roles)
    share = expected_share()
    # the length of a prefix is even in its logarithm; a stream goes on for 1 / reset_share steps in the mean
    prefix = config.prefix_patches / np.log(1 + config.prefix_patches) if config.prefix_patches else 0.0
    age = prefix + config.context_patches * (1.0 / config.reset_share - 1.0 if config.reset_share else 0.0)
    policy = replace(network.policy(torch.tensor([share])), threshold="fixed")
    room = (policy.cap_kept or 0) + (policy.cap_must or 0)
    entries = int(min(room, share * C * age * network.config.entries_per_token))
    context = max(1, config.context_patches // config.origins)
    horizon = -(-horizon_steps // P) + 1
    memory, was_training = filled_memory(network, 1, entries, seed), network.training
    network.train()
    with FlopCounterMode(display=False) as learning:
        past = network(random_chunk(network, 1, seed, context), memory, policy)
        ahead = network(random_chunk(network, 1, seed, horizon), past.memory, policy, advance=False)
        (past.quantiles.sum() + ahead.quantiles.sum()).backward()
    network.zero_grad(set_to_none=True)
    with torch.no_grad(), FlopCounterMode(display=False) as reading:
        network(random_chunk(network, 1, seed, context), memory, policy, decode=False)
    network.train(was_training)
    restarts = config.reset_share * prefix / context
    each = config.origins * learning.get_total_flops() + restarts * reading.get_total_flops()
    return float(config.batch_windows * each)


def expected_share() -> float:
    """Mean of the budgets that training draws."""
    spread = np.log(LARGEST_SHARE / SMALLEST_SHARE)
    between = (LARGEST_SHARE - SMALLEST_SHARE) / spread
    return float(FULL_CHANCE + (1.0 - EMPTY_CHANCE - FULL_CHANCE) * between)
