"""Stacked networks over a long past: layer by layer, and the scratchpad chunk by chunk.

``StackedNet`` compares every row with every other, which is fast for some hundred rows and impossible for thousands.
Here a chunk of rows reads the entries that are alive before it and those that enter during it. Of these alone it can
be said which are there at each row: whatever stands above an entry that is alive is alive too. Tests hold this form
against the layers.

S networks · B sequences · N rows (context and queries) · T context rows · E memory width · Q queries
n rows of a chunk · M entries that a chunk may read · A shares of a threshold table
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.nn import functional as F

from hamts.nn.eviction import whole_numbers
from probes.models import ProbeNet
from probes.stacked import LayerRead, StackedNet
from probes.stacked_data import Decisions, Rows
from probes.stacked_ops import EAGER, Ops
from probes.stacked_parts import Frame, LayerKind
from probes.stacked_scores import LayerScores

__all__ = ["LongStack", "Past"]

CHUNK_ROWS = 256
Tensor = torch.Tensor


@dataclass
class Past:
    """Which entries each row may read, and which were there after the context."""

    order: Tensor  # [S B, T] how entries stand, -1 for rows that are not kept
    cap: Tensor  # [S B]
    context_rows: int
    window: int
    # rows for which everything stays, whatever the order; None: a router decided
    keeps_rows: float | None
    kept: Tensor  # [S B, T] bool, known when the context was read


class LongStack(StackedNet):
    """Networks side by side over sequences that are too long to compare every row with every other.

    Nothing is trained here. ``read`` gives, for each layer, a ``Past`` in the place of ``visible``, and in the place
    of ``weight`` what each query row pays to each context row, [S B, N - T, T].

    Args:
        scale: multiplies the positions that keys and queries are turned by: ages beyond those of training turn them
            to where no training has been (position interpolation, arXiv 2306.15595).
    """

    def __init__(self, nets: Sequence[ProbeNet], *, device: str | torch.device, scale: float = 1.0) -> None:
        super().__init__(nets, device=device)
        self.scale, self._setting = scale, False

    def calibrate(self, rows: Rows, decisions: Decisions) -> None:
        """Set the threshold of every layer that keeps rows by a score: the share asked for of these very rows.

        A table goes by the share that is asked; here one share is, so that all its columns are the same. Thresholds of
        a layer depend on what the layer below read, so they are set from the bottom up, in one reading.
        """
        own = self.config
        if own.control == "shuffled":
            self.config = replace(own, router="learned")
        self._setting = True
        try:
            if self.config.model == "ham" and self.config.control is None and self.config.router != "tags":
                self.read(rows, decisions)
        finally:
            self._setting, self.config = False, own

    def _fit(self, rows: Rows) -> None:
        size = (rows.context_rows, rows.inputs.shape[2])
        if size not in self.frames:
            # masks between all rows are what this form does without
            plain = Frame.of(*size, set(), self.config.memory_width, self.device, scale=self.scale)
            none = torch.zeros(0, device=self.device)
            windows = {kind.window for kind in self.kind}
            self.frames[size] = replace(plain, band=dict.fromkeys(windows, none), age=none)
        self.frame = self.frames[size]

    def _layer(
        self,
        x: Tensor,
        number: int,
        kind: LayerKind,
        rows: Rows,
        decisions: Decisions,
        ops: Ops,
        with_scores: bool,
        training: bool,
    ) -> tuple[Tensor, LayerRead]:
        ops = replace(EAGER, read=_read)
        return super()._layer(x, number, kind, rows, decisions, ops, with_scores, training)

    def _entries(
        self, number: int, kind: LayerKind, rows: Rows, decisions: Decisions, ops: Ops, scores: LayerScores | None
    ) -> tuple[Any, Tensor | None]:
        """A ``Past`` of the layer (None where it keeps nothing), and what was asked to be kept, [S, B, T] bool."""
        if not kind.keeps:
            return None, None
        S, T = self.S, self.T
        routable = (rows.heard[:, :, :T] > 0).expand(S, -1, -1)  # [S, B, T]
        order = self.frame.order.expand(routable.shape)  # [S, B, T]
        cap = decisions.cap[:, None].expand(S, routable.shape[1]).flatten()  # [S B]
        if kind.keeps_rows is not None:
            routed = routable | rows.tags  # [S, B, T]
        else:
            if self._setting and scores is not None and scores.scores is not None:
                self.tables[number][:, 0] = _thresholds(scores.scores, decisions.share)[:, None]
            routed, rank = self._routed(number, routable, rows, decisions, scores)
            if rank is not None:
                # of equal ones the newer stands above
                ascending = whole_numbers(rank).argsort(dim=-1, stable=True)
                order = torch.empty_like(rank).scatter(-1, ascending, order.to(rank.dtype))
        order = torch.where(routed, order, -1.0).flatten(0, 1)  # [S B, T]
        kept = torch.zeros_like(order, dtype=torch.bool)
        return Past(order, cap, T, kind.window, kind.keeps_rows, kept), routed


def _thresholds(scores: Tensor, share: Tensor) -> Tensor:
    """Of each network's scores, [S, B, T], the one that a share of them, [S], reaches: [S]."""
    found = [torch.quantile(own.flatten().cpu(), 1.0 - float(part)) for own, part in zip(scores, share, strict=True)]
    return torch.stack(found).to(scores)


# --- the read


def _read(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Any, bias: Tensor, band: Tensor
) -> tuple[Tensor, Tensor]:
    """``stacked_ops.read`` chunk by chunk; ``visible`` is a ``Past``, whose ``kept`` is filled."""
    past, N = cast(Past, visible), queries.shape[1]
    T, out = past.context_rows, torch.empty_like(queries)
    paid = queries.new_zeros(len(queries), N - T, T)  # [S B, N - T, T]
    steps = _everything(past, N) if past.keeps_rows is not None else _scratchpad(past, N)
    for low, high, entries, seen in steps:
        first = max(low - past.window + 1, 0)
        direct = _band(torch.arange(low, high), torch.arange(first, high), past.window).to(queries.device)
        place = entries.clamp_min(0)  # [S B, M]
        asked = queries[:, low:high]  # [S B, n, E]
        logits = asked @ _rows(keys, place).mT + bias.gather(1, place)[:, None]  # [S B, n, M]
        near = asked @ keys[:, first:high].mT + direct  # [S B, n, rows of the window]
        both = torch.cat([logits.masked_fill(~seen, -torch.inf), near], -1).softmax(-1)
        weight, around = both.split([place.shape[1], high - first], -1)
        out[:, low:high] = weight @ _rows(values, place) + around @ values[:, first:high]
        if low >= T:
            paid[:, low - T : high - T].scatter_add_(2, place[:, None].expand(weight.shape), weight)
    return out, paid


def _rows(x: Tensor, place: Tensor) -> Tensor:
    """Some rows of each sequence: x [S B, N, E], place [S B, M] -> [S B, M, E]."""
    return x.gather(1, place[..., None].expand(-1, -1, x.shape[-1]))


def _band(row: Tensor, other: Tensor, window: int) -> Tensor:
    """0 where the other row is in the window of a row, else -inf: [n], [m] -> [n, m]."""
    age = row[:, None] - other[None]
    return torch.where((age >= 0) & (age < window), 0.0, -torch.inf)


def _chunks(T: int, N: int) -> Iterator[tuple[int, int]]:
    """Rows of each chunk; queries begin one of their own."""
    for begin, end in ((0, T), (T, N)):
        for low in range(begin, end, CHUNK_ROWS):
            yield low, min(low + CHUNK_ROWS, end)


def _everything(past: Past, N: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Of each chunk: its rows, the entries that it may read, [S B, M], and which each row sees, [S B, n, M] bool."""
    order, T, reach = past.order, past.context_rows, past.window + (past.keeps_rows or 0)
    for low, high in _chunks(T, N):
        begin, end = int(max(low - reach + 1, 0)), max(min(high - past.window, T), 0)
        place = torch.arange(begin, max(end, begin), device=order.device)  # [M]
        age = torch.arange(low, high, device=order.device)[:, None] - place[None]  # [n, M]
        seen = (age >= past.window) & (age < reach) & (order[:, place] >= 0)[:, None]  # [S B, n, M]
        yield low, high, place.expand(len(order), -1), seen
        if high == T:
            # what is there after the context and still there when the first query is read
            past.kept[:, place] = seen[:, -1] & (age[-1] + 1 < reach)


def _scratchpad(past: Past, N: int) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """The same for a list that drops what stands lowest."""
    order, T, window = past.order, past.context_rows, past.window
    room = int(past.cap.max())
    alive = order.new_full((len(order), room), -1, dtype=torch.int64)  # [S B, room]; -1: nothing there
    for low, high in _chunks(T, N):
        entering = torch.arange(max(low - window, 0), max(min(high - window, T), 0), device=order.device)
        entries = torch.cat([alive, entering.expand(len(order), -1)], 1)  # [S B, M]
        stands = torch.where(entries >= 0, order.gather(1, entries.clamp_min(0)), -1.0)  # [S B, M]
        rows = torch.arange(low, high, device=order.device)[:, None]
        left = F.pad(rows - entering[None] >= window, (room, 0), value=True)  # [n, M]
        above = (stands[:, :, None] > stands[:, None, :]).to(order.dtype)  # [S B, M others, M]
        count = torch.matmul(left.to(order.dtype), above)  # [S B, n, M]
        seen = (count < past.cap[:, None, None]) & left & (stands >= 0)[:, None]  # [S B, n, M]
        yield low, high, entries, seen
        standing = torch.where(seen[:, -1], stands, -1.0)  # [S B, M]
        best = standing.topk(min(room, standing.shape[1]), dim=1)
        alive = torch.where(best.values >= 0, entries.gather(1, best.indices), -1)
        alive = F.pad(alive, (0, room - alive.shape[1]), value=-1)
        if high == T:
            spare = torch.where(alive >= 0, alive, T)  # [S B, room]
            past.kept = F.pad(past.kept, (0, 1)).scatter(1, spare, True)[:, :T]
