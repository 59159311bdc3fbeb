"""Tier 0: routers, budgets and scores without training, on the exact arithmetic of the real ops.

Keys are fixed random unit vectors, the state is the closed-form delta rule of ``hamts.ops``, kept rows are read
exactly by an ideal reader. It says what a router keeps and what that is worth at best, not what a network learns.

B sequences · L rows · Q queries · K key · V value · D resamples
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hamts.nn.router import causal_error_mean, innovation, surprise
from hamts.ops.gated_delta import gated_delta
from probes.contract import ProbeBatch, generator

__all__ = ["ROUTERS_T0", "Trace", "answer", "keep", "keep_online", "read_state", "row_bytes", "scores", "state_bytes"]

KEY_SEED = 7_331
KEY_SPREAD = 3.0
WRITE_GATE = 0.9
DECAY_ROWS = 4_096.0
TAG_WEIGHT = 4.0
CLIP_FACTOR = 2.0
CHUNK_ROWS = 512
FLOAT_BYTES, INDEX_BYTES, SCORE_BYTES, TIME_BYTES = 4, 4, 4, 8
ROUTERS_T0 = ("surprise", "innovation", "write", "tags", "mix", "random", "stride", "recency", "oracle")


@dataclass(frozen=True)
class Trace:
    """What the state made of every row."""

    prediction: torch.Tensor  # [B, L, V] before the row was written
    error: torch.Tensor  # [B, L, V]
    output: torch.Tensor  # [B, L, V] what the state says to this row's key


def random_keys(raw: torch.Tensor, width: int) -> torch.Tensor:
    """Fixed random unit keys: equal raw keys get equal keys, others nearly orthogonal ones. [..., G] -> [..., K]."""
    gen = generator(KEY_SEED + raw.shape[-1])
    weight = KEY_SPREAD * torch.randn(raw.shape[-1], width, generator=gen)  # [G, K]
    phase = 2 * math.pi * torch.rand(width, generator=gen)  # [K]
    lengths = raw.norm(dim=-1, keepdim=True)
    features = torch.cos((raw / lengths.clamp_min(1e-9)) @ weight + phase)  # [..., K]
    return features / features.norm(dim=-1, keepdim=True).clamp_min(1e-9)


def read_state(batch: ProbeBatch, *, key_width: int = 8, write_clip: bool = False) -> Trace:
    """Run the delta rule over all rows; rows that ask neither write nor decay.

    Args:
        write_clip: clip what is written to twice the running median of the error's size; scores see it unclipped.
    """
    keys = random_keys(batch.key, key_width)  # [B, L, K]
    beta = torch.where(batch.query, 0.0, WRITE_GATE)  # [B, L]
    log_decay = torch.where(batch.query, 0.0, -1.0 / DECAY_ROWS)  # [B, L]
    if write_clip:
        return _clipped(keys, batch.value, beta, log_decay.exp())
    result = gated_delta(
        keys[:, :, None],
        keys[:, :, None],
        batch.value[:, :, None],
        log_decay=log_decay[..., None],
        beta=beta[..., None],
    )
    return Trace(result.prediction[:, :, 0], result.error[:, :, 0], result.output[:, :, 0])


def _clipped(keys: torch.Tensor, values: torch.Tensor, beta: torch.Tensor, decay: torch.Tensor) -> Trace:
    """The same rule row by row, with bounded writes; the running median is followed by its sign gradient."""
    B, L, V = values.shape
    state = values.new_zeros(B, keys.shape[-1], V)  # [B, K, V]
    median = values.new_full((B,), 0.5)
    predictions, errors, outputs = [], [], []
    for n in range(L):
        state = state * decay[:, n, None, None]
        prediction = torch.einsum("bkv,bk->bv", state, keys[:, n])  # [B, V]
        error = values[:, n] - prediction  # [B, V]
        size = error.norm(dim=-1)  # [B]
        bounded = error * (CLIP_FACTOR * median / size.clamp_min(1e-9)).clamp_max(1.0)[:, None]  # [B, V]
        state = state + torch.einsum("bk,bv->bkv", keys[:, n], beta[:, n, None] * bounded)
        moving = (beta[:, n] > 0).to(size)
        median = median * torch.exp(0.1 * torch.sign(size - median) * moving)
        predictions.append(prediction)
        errors.append(error)
        outputs.append(torch.einsum("bkv,bk->bv", state, keys[:, n]))
    return Trace(*(torch.stack(part, 1) for part in (predictions, errors, outputs)))


# --- scores of rows


def row_innovation(trace: Trace, batch: ProbeBatch) -> torch.Tensor:
    """Squared error over its own causal mean, chunk by chunk, [B, L]."""
    squared = trace.error.square().sum(-1)[:, None, :, None]  # [B, 1, L, 1]
    heard = ~batch.query[:, None]  # [B, 1, L]
    carried = squared.new_zeros(len(batch), 1, 1, 2)
    parts = []
    for low in range(0, squared.shape[2], CHUNK_ROWS):
        piece = slice(low, low + CHUNK_ROWS)
        mean, carried = causal_error_mean(squared[:, :, piece], heard[:, :, piece], carried)
        parts.append(innovation(squared[:, :, piece], mean))
    return torch.cat(parts, 2)[:, 0, :, 0]


def scores(
    name: str, batch: ProbeBatch, trace: Trace, *, gen: torch.Generator, phase: int = 0, rows: int = 1
) -> torch.Tensor:
    """How much each row asks to be kept, [B, L]; -inf for rows that do not ask, and for those that put a question.

    Args:
        phase, rows: of ``stride``: first row, and the budget that sets the step.

    Raises:
        ValueError: an unknown router.
    """
    if name not in ROUTERS_T0:
        raise ValueError(f"Unknown router {name!r} of tier 0. Available: {list(ROUTERS_T0)}.")
    L = batch.x.shape[1]
    step = torch.arange(L, dtype=torch.float32).expand(len(batch), L)  # [B, L]
    size = trace.error.norm(dim=-1)  # [B, L]
    never = torch.full_like(size, -math.inf)
    table: dict[str, Callable[[], torch.Tensor]] = {
        "surprise": lambda: surprise(trace.prediction, batch.value),
        "innovation": lambda: row_innovation(trace, batch),
        "write": lambda: WRITE_GATE * size,
        # among equals the newest stays: first in, first out
        "tags": lambda: torch.where(batch.tags, step, never),
        "mix": lambda: torch.log1p(row_innovation(trace, batch)) + TAG_WEIGHT * batch.tags,
        "random": lambda: torch.rand(size.shape, generator=gen),
        "stride": lambda: torch.where((step - phase) % max(round(batch.context_rows / rows), 1) == 0, step, never),
        "recency": lambda: step,
        "oracle": lambda: torch.where(batch.crit, step, never),
    }
    return table[name]().masked_fill(batch.query, -math.inf)


def keep(score: torch.Tensor, batch: ProbeBatch, rows: int) -> torch.Tensor:
    """Rows in the cache when each query is asked, under online eviction of the lowest score: [B, Q, L] bool.

    A row that once falls out of the best ``rows`` so far never returns, so the cache at row t is the best of the rows
    before t: nothing later is read. ``keep_online`` is the same rule row by row.

    Raises:
        ValueError: a budget below one entry.
    """
    check_budget(rows)
    B, L = score.shape
    Q = batch.q_index.shape[1]
    if int(batch.q_index.min()) >= batch.context_rows:
        kept = _best(score[:, None, : batch.context_rows], rows)  # [B, 1, T]
        padded = torch.zeros(B, 1, L, dtype=torch.bool)
        padded[..., : batch.context_rows] = kept
        return padded.expand(B, Q, L)
    before = torch.arange(L) < batch.q_index[..., None]  # [B, Q, L]
    return _best(torch.where(before, score[:, None], -math.inf), rows)


def _best(score: torch.Tensor, rows: int) -> torch.Tensor:
    """The best ``rows`` of the last axis, earlier ones first among equals; -inf is never chosen."""
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :rows]
    kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)
    return kept & (score > -math.inf)


def keep_online(score: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One sequence, row by row: score [L] -> cache after each row, [L, L] bool, and when each row left, [L]."""
    check_budget(rows)
    cache: list[int] = []
    left = torch.full(score.shape, math.inf)
    history = torch.zeros(len(score), len(score), dtype=torch.bool)
    for row in range(len(score)):
        if score[row] > -math.inf:
            cache.append(row)
        if len(cache) > rows:
            # among equals the newest goes, as it does in a stable sort
            worst = min(cache, key=lambda kept: (float(score[kept]), -kept))
            cache.remove(worst)
            left[worst] = row
        history[row, cache] = True
    return history, left


def check_budget(rows: int) -> None:
    if rows < 1:
        raise ValueError(f"A budget must hold one entry at least. Got {rows} rows. Raise the budget, or leave it out.")


# --- answers


def answer(
    batch: ProbeBatch, trace: Trace, selected: torch.Tensor, floor: torch.Tensor, *, blend: torch.Tensor | None = None
) -> torch.Tensor:
    """The ideal reader: the truth where everything needed is kept, else the state, blended with the floor.

    Args:
        selected: [B, Q] bool.
        floor: answer of the best floor, [B, Q, Y].
        blend: of ``fit_blend``; None where the state cannot answer (it takes more than one lookup).
    """
    fallback = floor
    if batch.key_direct and blend is not None:
        fallback = torch.stack([state_answer(batch, trace), floor], -1) @ blend  # [B, Q, Y]
    return torch.where(selected[..., None], batch.y, fallback)


def state_answer(batch: ProbeBatch, trace: Trace) -> torch.Tensor:
    """What the state says to each query's key, [B, Q, Y]."""
    index = batch.q_index[..., None].expand(-1, -1, trace.output.shape[-1])
    return trace.output.gather(1, index)


def fit_blend(batch: ProbeBatch, trace: Trace, floor: torch.Tensor) -> torch.Tensor | None:
    """Weights of state and floor with the least squared error on training sequences, [2]."""
    if not batch.key_direct:
        return None
    both = torch.stack([state_answer(batch, trace), floor], -1)[batch.y_mask].double()  # [n, 2]
    target = batch.y[batch.y_mask].double()
    gram = both.T @ both + 1e-6 * torch.eye(2, dtype=torch.float64)
    return torch.linalg.solve(gram, both.T @ target).float()


# --- bytes


def row_bytes(key_width: int, value_width: int) -> int:
    """Bytes of one kept row: key, value, index, score, time."""
    return FLOAT_BYTES * (key_width + value_width) + INDEX_BYTES + SCORE_BYTES + TIME_BYTES


def state_bytes(key_width: int, value_width: int) -> int:
    return FLOAT_BYTES * key_width * value_width


def widened_key(rows: int, *, key_width: int, value_width: int) -> int:
    """Key width at which a state alone has the bytes of a state and so many kept rows."""
    total = state_bytes(key_width, value_width) + rows * row_bytes(key_width, value_width)
    return max(round(total / (FLOAT_BYTES * value_width)), key_width)
