"""The exact tests of ``stream``: what must hold of any memory that reads row by row, on random weights.

B sequences · N rows of a chunk · L rows · M entries
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import load, save

from hamts.nn.tokens import map_tensors
from probes.contract import ProbeBatch, generator
from probes.models import NetConfig, ProbeNet, kept_rows
from probes.registry import get_probe

__all__ = ["EXACT", "ExactResult", "exact_checks"]

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
CHUNKS = (1, 7, 64)
BUDGET_ROWS, SEQUENCES = 6, 3
ORIGIN_ROWS = 10_000
SLOPE_ROWS = 2_000


@dataclass(frozen=True)
class ExactResult:
    """One test; ``passed`` is None where it does not apply, and the note says why."""

    name: str
    passed: bool | None
    value: float
    limit: float
    note: str


@dataclass(frozen=True)
class Rig:
    """A network with random weights, sequences, and a way to read them in pieces."""

    net: ProbeNet
    batch: ProbeBatch
    rows: int
    limit: float

    def read(
        self, cuts: Sequence[int], batch: ProbeBatch | None = None, memory: Any = None
    ) -> tuple[torch.Tensor, Any]:
        """Read rows cuts[0] .. cuts[-1] in chunks, one layer memory after the other: hidden [B, rows, D]."""
        batch = batch or self.batch
        memory = memory or self.net.empty_memory(len(batch))
        policies = self.net.policies(batch, self.rows)
        hidden = []
        for low, high in zip(cuts, cuts[1:], strict=False):
            step = self.net.read(batch, slice(low, high), memory, policies, stepwise=high - low == 1)
            memory = step.memory
            hidden.append(step.hidden)
        return torch.cat(hidden, 1), memory

    def kept(self, memory: Any) -> torch.Tensor:
        """Rows held by each layer, [layers, B, L] bool."""
        L = self.batch.x.shape[1]
        found = [kept_rows(part, L) for part in memory]
        return torch.stack([rows for rows in found if rows is not None])

    def apart(self, first: torch.Tensor, second: torch.Tensor) -> float:
        """Largest difference, in units of the values' size."""
        return float((first - second).abs().max() / first.abs().max().clamp_min(1.0))


def exact_checks(
    *, router: str = "innovation", dtype: torch.dtype = torch.float32, seed: int = 0, timed: bool = False
) -> list[ExactResult]:
    """Run every test on a small network of real layers.

    Args:
        timed: also whether the time of a step grows with the rows read; only meaningful on a quiet machine.
    """
    probe, _ = get_probe("der")
    batch = probe.sample(generator(seed), SEQUENCES, probe.config("smoke", context_rows=96, missing=0.1))
    batch = batch.map(lambda t: t.to(dtype) if t.is_floating_point() and t.dtype == torch.float32 else t)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = ProbeNet(
            NetConfig(router=router, width=16, memory_width=16, heads=2, budget_rows=BUDGET_ROWS),
            inputs=batch.inputs().shape[-1], channels=batch.x.shape[-1], answers=2,
        )  # fmt: skip
    net.eval().to(dtype)
    with torch.no_grad():
        rig = Rig(net, batch, BUDGET_ROWS, TOLERANCE[dtype])
        spread_thresholds(rig)
        results = [check(rig) for check in EXACT.values()]
        return [*results, _slope(rig)] if timed else results


def spread_thresholds(rig: Rig) -> None:
    """Set thresholds from the scores themselves, so that some rows are kept."""
    policies = rig.net.policies(rig.batch, rig.rows)
    read = rig.net.read(rig.batch, slice(0, rig.batch.context_rows), rig.net.empty_memory(len(rig.batch)), policies)
    for layer, trace in zip(rig.net.layers, read.traces, strict=True):
        layer.thresholds.calibrate(trace.scores[:, 0].flatten(0, 1))


def _judge(rig: Rig, name: str, value: float, note: str, *, limit: float | None = None) -> ExactResult:
    bound = rig.limit if limit is None else limit
    return ExactResult(name, value <= bound, value, bound, note)


def _cuts(rows: int, size: int) -> list[int]:
    return [*range(0, rows, size), rows]


def _steps(rig: Rig) -> ExactResult:
    L = rig.batch.x.shape[1]
    whole, memory = rig.read([0, L])
    single, stepped = rig.read(_cuts(L, 1))
    same = torch.equal(rig.kept(memory), rig.kept(stepped))
    value = rig.apart(whole, single) if same else math.inf
    return _judge(rig, "a", value, "one pass = row by row, outputs and kept rows")


def _chunks(rig: Rig) -> ExactResult:
    L = rig.batch.x.shape[1]
    whole, memory = rig.read([0, L])
    worst = 0.0
    for size in CHUNKS:
        other, after = rig.read(_cuts(L, size))
        worst = max(worst, rig.apart(whole, other))
        if not torch.equal(rig.kept(memory), rig.kept(after)):
            worst = math.inf
    return _judge(rig, "b", worst, f"chunks of {CHUNKS} rows")


def _saved(rig: Rig) -> ExactResult:
    L, middle = rig.batch.x.shape[1], 41
    whole, _ = rig.read([0, middle, L])
    _, memory = rig.read([0, middle])
    rest, _ = rig.read([middle, L], memory=stored(memory))
    return _judge(rig, "c", rig.apart(whole[:, middle:], rest), "saved and loaded in the middle", limit=0.0)


def stored(memory: Any) -> Any:
    """A memory that went through the bytes of a file."""
    tensors = [tensor.contiguous() for tensor in tensors_of(memory)]
    loaded = load(save({str(number): tensor for number, tensor in enumerate(tensors)}))
    back = iter([loaded[str(number)] for number in range(len(tensors))])
    return map_tensors(memory, lambda _: next(back))


def _causal(rig: Rig) -> ExactResult:
    t = 50
    changed = rig.batch.x.clone()
    changed[:, t + 1 :] = 7.0
    events = rig.batch.events.clone()
    events[:, t + 1 :] = 1.0
    other = replace(rig.batch, x=changed, events=events)
    L = rig.batch.x.shape[1]
    first, second = rig.read([0, L])[0], rig.read([0, L], other)[0]
    cut = [rig.read([0, t + 1], part)[1] for part in (rig.batch, other)]
    same = torch.equal(rig.kept(cut[0]), rig.kept(cut[1]))
    value = float((first[:, : t + 1] - second[:, : t + 1]).abs().max()) if same else math.inf
    # the number of kept rows differs, and with it the order of sums: the last bits may move, decisions may not
    bits = 8 * torch.finfo(rig.batch.x.dtype).eps
    return _judge(rig, "d", value, "later rows change nothing before them", limit=bits)


def _capped(rig: Rig) -> ExactResult:
    memory = rig.net.empty_memory(len(rig.batch))
    policies = rig.net.policies(rig.batch, rig.rows)
    most = 0
    for row in range(rig.batch.context_rows):
        memory = rig.net.read(rig.batch, slice(row, row + 1), memory, policies, stepwise=True).memory
        most = max(most, *(int(part.scratchpad.alive.sum(1).max()) for part in memory))
    entry = memory[0].scratchpad
    measured = sum(t[0, 0].numel() * t.element_size() for t in tensors_of(entry))
    note = f"at most {most} entries at any row; an entry takes {measured} bytes as reported"
    if measured != entry.bytes_per_entry() or most == 0:
        return ExactResult("e", False, math.inf, rig.rows, note)
    return _judge(rig, "e", most, note, limit=rig.rows)


def tensors_of(container: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(container, note)
    return found


def _alone(rig: Rig) -> ExactResult:
    L = rig.batch.x.shape[1]
    together, memory = rig.read([0, L])
    one, own = rig.read([0, L], rig.batch.select(slice(1, 2)))
    same = torch.equal(rig.kept(memory)[:, 1:2], rig.kept(own))
    return _judge(rig, "f", rig.apart(together[1:2], one) if same else math.inf, "a sequence alone = in a batch")


def _channels(rig: Rig) -> ExactResult:
    return ExactResult("g", None, math.nan, 0.0, "not claimed: a row of all channels is one token here")


def _origin(rig: Rig) -> ExactResult:
    L = rig.batch.x.shape[1]
    first = rig.read([0, L])[0]
    rig.net.origin_rows = ORIGIN_ROWS
    second = rig.read([0, L])[0]
    rig.net.origin_rows = 0
    # angles are taken in float64 and rounded after
    return _judge(rig, "h", rig.apart(first, second), f"clock starts {ORIGIN_ROWS} rows later", limit=10 * rig.limit)


def _questions(rig: Rig) -> ExactResult:
    T, L = rig.batch.context_rows, rig.batch.x.shape[1]
    _, before = rig.read([0, T])
    _, after = rig.read([T, L], memory=before)
    value = max(float((a.state - b.state).abs().max()) for a, b in zip(before, after, strict=True))
    asked = rig.batch.query
    if bool((rig.kept(after) & asked).any()):
        value = math.inf
    return _judge(rig, "i", value, "rows that ask leave the state as it was and are never kept", limit=0.0)


def _gaps(rig: Rig) -> ExactResult:
    batch = rig.batch
    x, events = batch.x.clone(), batch.events.clone()
    x[:, 30], events[:, 30] = math.nan, 0.0
    gap = replace(batch, x=x, events=events)
    memory = rig.read([0, 30], gap)[1]
    after = rig.read([30, 31], gap, memory)[1]
    # a gap decays the state and writes nothing into it: what is left points the way it did
    worst = 0.0
    for early, late in zip(memory, after, strict=True):
        a, b = early.state.flatten(-2), late.state.flatten(-2)
        share = (a * b).sum(-1, keepdim=True) / (a * a).sum(-1, keepdim=True).clamp_min(1e-12)
        worst = max(worst, float((b - share * a).abs().max()))
    kept = rig.kept(rig.read([31, 40], gap, after)[1])[..., 30]
    return _judge(rig, "j", math.inf if bool(kept.any()) else worst, "a missing row writes nothing and is never kept")


def _flat(rig: Rig) -> ExactResult:
    T = rig.batch.context_rows
    sizes = []
    for rows in (T // 2, T):
        _, memory = rig.read([0, rows])
        sizes.append(sum(t[0].numel() * t.element_size() for part in memory for t in tensors_of(part)))
    most = BUDGET_ROWS * rig.net.entry_bytes * rig.net.config.layers
    if rig.batch.x.dtype == torch.float64:
        most *= 2
    fixed = sum(t[0].numel() * t.element_size() for part in rig.net.empty_memory(1) for t in tensors_of(part))
    grown = max(sizes) - fixed
    return _judge(rig, "k", grown, "bytes beyond an empty memory stay within the cap", limit=most)


def _streams(rig: Rig) -> ExactResult:
    L = rig.batch.x.shape[1]
    pair = [rig.batch.select(slice(n, n + 1)) for n in range(2)]
    alone = [rig.read(_cuts(L, 12), part)[0] for part in pair]
    memories: list[Any] = [None, None]
    parts: list[list[torch.Tensor]] = [[], []]
    for low, high in zip(_cuts(L, 12), _cuts(L, 12)[1:], strict=False):
        for n in range(2):
            hidden, memories[n] = rig.read([low, high], pair[n], memories[n])
            parts[n].append(hidden)
    again = rig.read(_cuts(L, 12), pair[0])[0]
    value = max(float((torch.cat(parts[n], 1) - alone[n]).abs().max()) for n in range(2))
    value = max(value, float((again - alone[0]).abs().max()))
    return _judge(rig, "l", value, "two streams in turn, and one from the start again", limit=0.0)


def _slope(rig: Rig) -> ExactResult:
    """Milliseconds per step against rows read: the slope times the rows, over the mean."""
    policies = rig.net.policies(rig.batch, rig.rows)
    memory, spent = rig.net.empty_memory(len(rig.batch)), []
    for number in range(SLOPE_ROWS):
        row = number % rig.batch.context_rows
        started = time.perf_counter()
        memory = rig.net.read(rig.batch, slice(row, row + 1), memory, policies, stepwise=True).memory
        spent.append(1000 * (time.perf_counter() - started))
    late = torch.tensor(spent[SLOPE_ROWS // 4 :], dtype=torch.float64)
    x = torch.linspace(-0.5, 0.5, len(late), dtype=torch.float64)
    slope = float((x * (late - late.median())).sum() / (x * x).sum() / late.median())
    return ExactResult("k, time", abs(slope) <= 0.1, slope, 0.1, f"median step {float(late.median()):.2f} ms")


EXACT: dict[str, Callable[[Rig], ExactResult]] = {
    "a": _steps, "b": _chunks, "c": _saved, "d": _causal, "e": _capped, "f": _alone, "g": _channels, "h": _origin,
    "i": _questions, "j": _gaps, "k": _flat, "l": _streams,
}  # fmt: skip
