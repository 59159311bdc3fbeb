"""A training step as CUDA graphs: its passes, its loss and all gradients are recorded once, and replayed.

Launching thousands of small kernels takes the host longer than they run. What is decided on the host stays outside:
drawing windows, the optimiser. For that every batch and every memory has the same sizes,
``StreamWindows(same_sizes=True)`` and scratchpads of as many rows as their caps allow. What streams that restart read
first is recorded once for each of a few lengths and numbers of streams, ``StreamWindows(few_prefixes=True)``.

The memory lies in the same place from the first step on; a step and a restart change it there.

B streams side by side · M entries · R streams that restart, some repeated to fill up
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from hamts.config import MachineConfig
from hamts.data.constants import sent
from hamts.data.patches import Chunk
from hamts.data.scale import ScaleState
from hamts.nn.tokens import Policy, map_tensors
from hamts.ops.kernels import KernelError, Kernels
from hamts.reader import StreamMemory
from hamts.rollout import stack_memories, stack_trees
from hamts.windows import Windows

__all__ = [
    "Passes",
    "Restarted",
    "Restarts",
    "StepGraph",
    "StepInputs",
    "check_graphs",
    "filled_up",
    "recorders",
    "restarted",
    "roomy",
    "side_by_side",
]

# steps before recording: kernels are compiled and tuned, the memory has all its parts
PLAIN_STEPS = 3
# where fewer than one stream in so many restarts, only so many are read
FEW_RESTART = 4


def check_graphs(machine: MachineConfig, kernels: Kernels, device: torch.device) -> None:
    """Refuse what a graph cannot record. Raises KernelError; it says what must hold, what came, and what to do."""
    if not machine.cuda_graphs:
        return
    wanted = (
        (device.type == "cuda", "a CUDA device", f"device={device.type!r}", "accelerator='gpu' on a machine with one"),
        (kernels.name == "fla+triton", "kernel='fla+triton'", f"kernel={kernels.name!r}", "that kernel"),
        (machine.devices == 1 and machine.strategy == "auto", "one process",
         f"devices={machine.devices}, strategy={machine.strategy!r}", "devices=1"),
        (not machine.checkpointing, "checkpointing=False", "checkpointing=True", "one of the two"),
        (machine.compile_mode == "none", "compile_mode='none'", f"compile_mode={machine.compile_mode!r}",
         "one of the two"),
        (machine.precision in ("32-true", "bf16-mixed"), "precision '32-true' or 'bf16-mixed'",
         f"precision={machine.precision!r}", "one of them"),
    )  # fmt: skip
    for holds, needed, got, do in wanted:
        if not holds:
            raise KernelError(f"cuda_graphs=True needs {needed}. Got {got}. Use {do}, or cuda_graphs=False.")


@dataclass(frozen=True)
class StepInputs:
    """All that the passes of a step read, on the device."""

    parts: list[tuple[Chunk, Chunk]]
    share: torch.Tensor  # [B]
    cross: torch.Tensor  # [B] bool


@dataclass(frozen=True)
class Passes:
    """Result of the passes of a step."""

    loss: torch.Tensor  # [] with gradient
    task: torch.Tensor  # [] of the task alone
    memory: StreamMemory  # after the step, detached


def roomy(memory: StreamMemory, rows: int) -> StreamMemory:
    """The same memory with scratchpads of at least so many rows; what is added is not alive."""

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        missing = rows - tensor.shape[1]
        return (
            tensor
            if missing <= 0
            else torch.cat([tensor, tensor.new_zeros(len(tensor), missing, *tensor.shape[2:])], 1)
        )

    layers = [replace(layer, scratchpad=map_tensors(layer.scratchpad, padded)) for layer in memory.layers]
    return replace(memory, layers=layers)


def side_by_side(origins: Sequence[tuple[StreamMemory, Chunk]]) -> list[tuple[StreamMemory, Chunk]]:
    """Forecasts to be made, each from its memory: in one pass, of [origins x B], where they have the same length."""
    if len(origins) < 2 or len({chunk.values.shape for _, chunk in origins}) > 1:
        return list(origins)
    memories, chunks = zip(*origins, strict=True)
    return [(stack_memories(list(memories)), stack_trees(list(chunks)))]


def _leaves(tree: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(tree, note)
    return found


@torch.no_grad()
def _overwrite(target: Any, source: Any) -> None:
    """Copy every tensor of one tree into those of another of the same sizes."""
    mine, theirs = _leaves(target), _leaves(source)
    for a, b in zip(mine, theirs, strict=True):
        if a.shape != b.shape:
            raise RuntimeError(
                f"A step of a CUDA graph must have the sizes it was recorded with, {a.shape}. Got {b.shape}."
            )
        if a is not b:
            a.copy_(b, non_blocking=True)


def recorded(run: Callable[[], None], generators: Sequence[torch.Generator]) -> torch.cuda.CUDAGraph:
    """What ``run`` launches, as a graph; it is not run yet. Raises KernelError where it cannot be recorded."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    # weights cast before the graph would be those of this step for ever
    torch.clear_autocast_cache()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        raise KernelError(f"cuda_graphs=True cannot record this step: {error}. Use cuda_graphs=False.") from error
    finally:
        torch.clear_autocast_cache()
    return graph


class StepGraph:
    """Runs the passes of a step: plainly at first, then recorded, then replayed."""

    def __init__(
        self,
        passes: Callable[[StepInputs, StreamMemory], Passes],
        parameters: Sequence[nn.Parameter],
        *,
        rows: int,
        streams: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        """The passes decide nothing on the host.

        Args:
            rows: most entries of a scratchpad.
            streams: B of every batch; others are recorded anew.
            generators: of random numbers, on the device, that the passes draw from beside the default one.
        """
        self.passes, self.rows, self.streams, self.generators = passes, rows, streams, list(generators)
        self.parameters = [weight for weight in parameters if weight.requires_grad]
        self.plain_steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: StepInputs
        self.memory: StreamMemory | None = None
        self.loss: torch.Tensor
        self.task: torch.Tensor
        self.gradients: tuple[torch.Tensor | None, ...]

    def __call__(self, inputs: StepInputs, memory: StreamMemory) -> Passes:
        """Loss of a step whose gradient reaches the parameters, and the memory after it, which lies in its place."""
        if self.plain_steps < PLAIN_STEPS:
            self.plain_steps += 1
            if memory is self.memory:
                # a copy: its gradient comes when the memory has changed already
                memory = map_tensors(memory, lambda tensor: tensor.clone())
            result = self.passes(inputs, roomy(memory, self.rows))
            return replace(result, memory=self._hold(result.memory))
        held = self._hold(memory)
        if self.graph is None:
            self.graph = self._record(inputs)
        else:
            _overwrite(self.inputs, inputs)
        self.graph.replay()
        loss: torch.Tensor = _Replayed.apply(self.loss, self.gradients, *self.parameters)
        return Passes(loss, self.task, held)

    def _hold(self, memory: StreamMemory) -> StreamMemory:
        """The memory in its place; it stays there."""
        if memory is self.memory:
            return memory
        memory = roomy(memory, self.rows)
        if self.memory is None:
            # as the passes make it: under mixed precision narrower than an empty one
            self.memory = map_tensors(memory, lambda tensor: tensor.detach().clone())
        else:
            _overwrite(self.memory, memory)
        return self.memory

    def _record(self, inputs: StepInputs) -> torch.cuda.CUDAGraph:
        memory = self.memory
        assert memory is not None
        self.inputs = map_tensors(inputs, lambda tensor: tensor.clone())

        def step() -> None:
            result = self.passes(self.inputs, memory)
            self.gradients = torch.autograd.grad(result.loss, self.parameters, allow_unused=True)
            self.loss, self.task = result.loss.detach(), result.task.detach()
            _overwrite(memory, roomy(result.memory, self.rows))

        return recorded(step, self.generators)


@dataclass(frozen=True)
class Restarted:
    """Streams that restart, on the device."""

    items: torch.Tensor  # [R] int64
    first: torch.Tensor  # [R] int64: first patch of the context
    scale: ScaleState  # of R streams
    share: torch.Tensor  # [R]
    cross: torch.Tensor  # [R] bool
    taken: torch.Tensor  # [B] int64: which of the R each stream is
    anew: torch.Tensor  # [B] bool: whether it is any


def restarted(batch: Windows, rows: torch.Tensor, taken: torch.Tensor) -> Restarted:
    """What is read of some streams of a batch, sent to the device; rows [R], taken [B], both on the CPU."""
    device = batch.share.device
    chosen = sent(rows, device)  # [R]
    return Restarted(
        items=sent(batch.items[rows], device),
        first=sent(batch.first[rows], device),
        scale=map_tensors(batch.scale, lambda tensor: tensor[chosen]),
        share=batch.share[chosen],
        cross=batch.cross[chosen],
        taken=sent(taken, device),
        anew=sent(batch.reset, device),
    )


def filled_up(reset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which streams to read a prefix of, in one of two numbers, and which of them each stream is: [R], [B].

    reset [B] bool, some of them. Those that restart come first; to fill up, the first of them is read again.
    """
    B, rows = len(reset), torch.nonzero(reset).squeeze(1)  # [], [b]
    few = max(1, B // FEW_RESTART)
    padded = rows[:1].repeat(few if len(rows) <= few else B)  # [R]
    padded[: len(rows)] = rows
    taken = torch.zeros(B, dtype=torch.int64)  # [B]
    taken[rows] = torch.arange(len(rows))
    return padded, taken


class Restarts:
    """Gives streams a new memory where the old one lies: launched the first time, then recorded, then replayed."""

    def __init__(
        self,
        read: Callable[[Restarted, int], StreamMemory],
        *,
        rows: int,
        generators: Sequence[torch.Generator],
    ) -> None:
        """Read the patches before a context, by items and by how many, into memories of R streams.

        Args:
            rows: most entries of a scratchpad.
            generators: of random numbers, on the device, that reading draws from beside the default one.
        """
        self.read, self.rows, self.generators = read, rows, list(generators)
        self.known: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Restarted] | None] = {}

    def __call__(self, memory: StreamMemory, streams: Restarted, prefix: int) -> None:
        key = (len(streams.items), prefix)
        if key not in self.known:
            # kernels are compiled and tuned
            self.known[key] = None
            self._renew(memory, streams, prefix)
            return
        found = self.known[key]
        if found is None:
            inputs = map_tensors(streams, lambda tensor: tensor.clone())
            found = recorded(lambda: self._renew(memory, inputs, prefix), self.generators), inputs
            self.known[key] = found
        graph, inputs = found
        _overwrite(inputs, streams)
        graph.replay()

    @torch.no_grad()
    def _renew(self, memory: StreamMemory, streams: Restarted, prefix: int) -> None:
        fresh = roomy(self.read(streams, prefix), self.rows)
        for mine, new in zip(_leaves(memory), _leaves(fresh), strict=True):
            new = new.index_select(0, streams.taken).to(mine.dtype)  # [B, ...]
            mine.copy_(torch.where(streams.anew.view(-1, *(1,) * (mine.dim() - 1)), new, mine))


def recorders(
    passes: Callable[[StepInputs, StreamMemory], Passes],
    read: Callable[[Restarted, int], StreamMemory],
    network: nn.Module,
    policy: Policy,
    generators: Sequence[torch.Generator],
) -> tuple[StepGraph, Restarts]:
    """What records steps and restarts of as many streams as the policy is for, with room for all that it lets stay."""
    rows = (policy.cap_kept or 0) + (policy.cap_must or 0)
    weights, streams = list(network.parameters()), len(policy.share)
    steps = StepGraph(passes, weights, rows=rows, streams=streams, generators=generators)
    return steps, Restarts(read, rows=rows, generators=generators)


class _Replayed(torch.autograd.Function):
    """A loss whose gradients are there already."""

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, gradients: tuple[torch.Tensor | None, ...], *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        there = [x for x in ctx.gradients if x is not None]
        # new tensors: the next replay overwrites these
        scaled = iter(torch._foreach_mul(there, grad))
        return (None, None, *(None if x is None else next(scaled) for x in ctx.gradients))
