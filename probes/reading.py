"""Reading a trained network beyond how it was trained: long contexts in chunks, entries kept at a lower precision.

B sequences · T context rows · L rows · Q queries · H heads · K key · V value · M entries · S scores
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hamts.nn.tokens import Policy
from probes.contract import ProbeBatch
from probes.models import ProbeNet, memory_bytes

__all__ = [
    "CHUNK_ROWS",
    "PRECISIONS",
    "STATE_ONLY",
    "Context",
    "answer_batch",
    "answer_from",
    "kept_bytes",
    "read_context",
]

# bytes of a number of a key or value
PRECISIONS = {"float32": 4, "bfloat16": 2, "int8": 1}
SCALE_BYTES = 4
# models that keep no rows
STATE_ONLY = ("recurrent", "recurrent_wide")
CHUNK_ROWS = 512
# entries are rounded after so many rows: what enters meanwhile is read unrounded until then
ROUNDING_ROWS = 8
INT8_LARGEST = 127.0


@dataclass(frozen=True)
class LayerScores:
    """What a layer thought of the rows of a context."""

    scores: torch.Tensor  # [B, 1, T, S]
    routed: torch.Tensor  # [B, 1, T] bool


@dataclass(frozen=True)
class Context:
    """A context that was read: what every layer holds at its end, its scores of all rows, and how to read on.

    The last rows of a context are still in the window when the first query comes: what decided about rows before them
    decides about them too.
    """

    memory: list[Any]
    traces: list[LayerScores]
    policies: list[Policy]
    hidden: torch.Tensor  # [B, T, D]


@torch.no_grad()
def answer_batch(
    net: ProbeNet, batch: ProbeBatch, rows: int | tuple[int, ...], *, precision: str = "float32"
) -> tuple[torch.Tensor, Context]:
    """Answers to all queries, [B, Q, Y], and the context."""
    context = read_context(net, batch, rows, precision=precision)
    return answer_from(net, batch, context.policies, context.memory), context


@torch.no_grad()
def answer_from(net: ProbeNet, batch: ProbeBatch, policies: Sequence[Policy], memory: Sequence[Any]) -> torch.Tensor:
    """Answers to all queries on a memory, which stays as it is: [B, Q, Y]."""
    T = batch.context_rows
    asked = net.read(batch, slice(T, batch.x.shape[1]), memory, policies)
    index = (batch.q_index - T)[..., None].expand(-1, -1, asked.hidden.shape[-1])  # [B, Q, D]
    return net.answer(asked.hidden.gather(1, index))


@torch.no_grad()
def read_context(
    net: ProbeNet,
    batch: ProbeBatch,
    rows: int | tuple[int, ...],
    *,
    precision: str = "float32",
    chunk_rows: int | None = None,
) -> Context:
    """Read the context in chunks, one memory after the other; the result does not depend on their size.

    Args:
        precision: of the keys and values of kept rows, one of ``PRECISIONS``; they are rounded every few rows.
    """
    check_precision(net, precision)
    size = chunk_rows or (CHUNK_ROWS if precision == "float32" else ROUNDING_ROWS)
    given = _others_rows(net, batch, rows, size) if net.config.control == "shuffled" else None
    policies = net.policies(batch, rows, given=given)
    memory: list[Any] = net.empty_memory(len(batch))
    hidden: list[torch.Tensor] = []
    parts: list[list[LayerScores]] = [[] for _ in memory]
    for low in range(0, batch.context_rows, size):
        step = net.read(batch, slice(low, min(low + size, batch.context_rows)), memory, policies)
        memory = [rounded(part, precision) for part in step.memory]
        hidden.append(step.hidden)
        for place, trace in enumerate(step.traces):
            parts[place].append(LayerScores(trace.scores, trace.routed))
    joined = [
        LayerScores(torch.cat([p.scores for p in part], 2), torch.cat([p.routed for p in part], 2)) for part in parts
    ]
    return Context(memory, joined, policies, torch.cat(hidden, 1))


def _others_rows(net: ProbeNet, batch: ProbeBatch, rows: int | tuple[int, ...], size: int) -> list[torch.Tensor]:
    """What the learned router keeps of the sequence before, L of [B, T] bool; see ``train.shuffled_rows``."""
    own, net.config = net.config, replace(net.config, router="learned")
    try:
        context = read_context(net, batch, rows, chunk_rows=size)
    finally:
        net.config = own
    return [trace.routed[:, 0].roll(1, 0) for trace in context.traces]


# --- precision


def check_precision(net: ProbeNet, precision: str) -> None:
    """Refuse a precision that is not there, or a model that keeps no rows to round.

    Raises:
        ValueError: either.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}. Available: {list(PRECISIONS)}.")
    if precision != "float32" and net.config.model in STATE_ONLY:
        raise ValueError(f"{net.config.model!r} keeps no rows: there is nothing to hold as {precision}.")


def rounded(memory: Any, precision: str) -> Any:
    """A layer's memory with the keys and values of its kept rows at another precision.

    bfloat16 rounds each number; int8 takes one scale for the key and one for the value of each row and head, so that
    the largest of them is 127. Rounding twice is rounding once.
    """
    name = "scratchpad" if hasattr(memory, "scratchpad") else "kept"
    entries = getattr(memory, name, None)
    if precision == "float32" or entries is None or not hasattr(entries, "keys"):
        return memory
    if precision == "bfloat16":
        changed = {part: getattr(entries, part).bfloat16().to(getattr(entries, part)) for part in ("keys", "values")}
    else:
        changed = {part: _int8(getattr(entries, part)) for part in ("keys", "values")}
    return replace(memory, **{name: replace(entries, **changed)})


def _int8(x: torch.Tensor) -> torch.Tensor:
    """[B, M, H, K] through 8 bits and a scale for each row and head."""
    scale = x.abs().amax(-1, keepdim=True) / INT8_LARGEST  # [B, M, H, 1]
    return torch.where(scale > 0, (x / scale.clamp_min(1e-30)).round() * scale, x)


def kept_bytes(memories: Sequence[Any], precision: str) -> tuple[float, float]:
    """Bytes of one sequence, mean: what is fixed, and what is kept exactly with keys and values at a precision."""
    fixed, exact = memory_bytes(memories)
    if precision == "float32":
        return fixed, exact
    saved = 0.0
    for memory in memories:
        entries = getattr(memory, "scratchpad", None) or getattr(memory, "kept", None)
        if entries is None or not hasattr(entries, "keys"):
            continue
        count = float(entries.alive.sum(1).float().mean())
        for part in (entries.keys, entries.values):
            H, K = part.shape[2:]
            scales = H * SCALE_BYTES if precision == "int8" else 0
            saved += count * (H * K * (part.element_size() - PRECISIONS[precision]) - scales)
    return fixed, exact - saved
