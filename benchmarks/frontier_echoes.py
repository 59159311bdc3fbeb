"""Events drawn anew for every batch of a fit, so that there is nothing to learn by heart but the carrier.

I items · R rows (patches) of all items · n events · P steps in a patch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.frontier_sets import LETTERS, LEVELS, NAMED_STEPS, Carrier, Set, places_of, shape_size
from hamts.data.frame import to_panel
from hamts.data.patches import build_store
from hamts.windows import NEVER, StreamWindows

__all__ = ["fresh_echoes", "keep_all"]

# of times of events, that are then moved along the item as a whole: some as they are where a model is judged, others
# with more events, of ages that a window holds
NATURAL, DENSE, DENSE_APART = 4, 12, 4


def fresh_echoes(
    carrier: Carrier, spec: Set, panel: Any, seed: int, *, lengthen: tuple[int, int] | None = None
) -> Callable[[StreamWindows], None] | None:
    """An augmentation for ``train_panel``: every batch has times, names and shapes of its own, in every item, under the
    rules of ``with_echoes``. Of a carrier without injected events nothing is written, and ``lengthen`` is all; None
    without that.

    ``lengthen``: from which batch on streams read up to how many patches before their window: what is looked up is
    learned in short histories, and then in longer ones, of lengths and of as many streams as the set says.
    """
    if carrier.flat is None:
        return None if lengthen is None else _Longer(spec, lengthen)
    plain = carrier.frame.assign(**{spec.target[0]: carrier.flat})
    seen = plain.groupby("unique_id", sort=False).head(carrier.rows - carrier.test_rows)
    flat = replace(to_panel(seen, schema=panel.schema), starts=panel.starts)
    store = build_store(flat, patch_steps=spec.patch_steps, extra_steps=spec.h)
    target, event = panel.schema.indices("target")[0], panel.schema.indices("event")[0]
    levels = panel.schema.channels[event].levels
    # the code of each letter; letters that never occurred are read as unknown
    codes = torch.tensor([float(levels.index(x) + 1) if x in levels else 0.0 for x in LETTERS], dtype=torch.float64)
    sizes = [shape_size(flat.item(i)[:, target], spec) for i in range(flat.n_items)]
    return _Echoes(store.values[:, :, target], store, spec, codes, sizes, (target, event), seed, lengthen)


def keep_all(windows: StreamWindows) -> None:
    """No stream of a batch has a budget."""
    windows.share = torch.ones_like(windows.share)  # [B]


class _Longer:
    """Streams of the first part of a fit are short, and keep everything where the set says so; later ones are long."""

    def __init__(self, spec: Set, lengthen: tuple[int, int] | None) -> None:
        self.lengthen, self.batches = lengthen, 0
        self.lengths, self.streams, self.warm = spec.lengths, spec.streams, spec.warm

    def longer(self, windows: StreamWindows) -> None:
        """What changes from the batch on that is drawn next."""

    def __call__(self, windows: StreamWindows) -> None:
        if self.lengthen is not None and self.batches == self.lengthen[0]:
            windows.config = replace(windows.config, prefix_patches=self.lengthen[1])
            windows.prefixes = self.lengths
            self.longer(windows)
            if self.streams is not None:
                windows.keep_streams(self.streams)
        if self.warm and self.lengthen is not None and self.batches < self.lengthen[0]:
            keep_all(windows)
        self.batches += 1


class _Echoes(_Longer):
    """Writes fresh events over those of the training rows."""

    def __init__(
        self,
        flat: torch.Tensor,
        store: Any,
        spec: Set,
        codes: torch.Tensor,
        sizes: list[float],
        channels: tuple[int, int],
        seed: int,
        lengthen: tuple[int, int] | None,
    ) -> None:
        """flat: the target without events, [R, P]."""
        super().__init__(spec, lengthen)
        self.flat, self.codes, self.sizes, self.P = flat, codes, sizes, spec.patch_steps
        self.target, self.event = channels
        said = store.values[:, :, self.event]  # [R, P]
        self.quiet = torch.where(torch.isnan(said), said, 0.0)  # [R, P] no event, or beyond the rows
        self.generator = torch.Generator().manual_seed(seed)
        self.first, self.rows = store.first_row.tolist(), int(store.row_count.min())
        rng = np.random.default_rng(seed)
        self.schedules, self.later = (self._schedules(spec, reach, rng) for reach in (spec.early, spec.reach))
        self.level = torch.arange(self.P - NAMED_STEPS) * LEVELS // (self.P - NAMED_STEPS)

    def _schedules(self, spec: Set, reach: tuple[int, int], rng: np.random.Generator) -> list[torch.Tensor]:
        """Patches of events and their echoes, [n, 2] each."""
        dense: dict[str, int] = {"apart": DENSE_APART, "least": reach[0], "longest": reach[1]}
        natural: dict[str, int] = {}
        return [
            torch.tensor(
                [(at // self.P, echo // self.P) for at, echo, _ in places_of(self.rows * self.P, 0, spec, rng, **how)]
            )
            for how in [natural] * NATURAL + [dense] * DENSE
        ]

    def longer(self, windows: StreamWindows) -> None:
        self.schedules = self.later

    def _drawn(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows of events and their echoes, [n, 2]; whether there is an echo, [n]; which item, [n]."""
        rows, whole, items = [], [], []
        for item, first in enumerate(self.first):
            which, shift = (
                int(torch.randint(most, (), generator=self.generator)) for most in (len(self.schedules), self.rows)
            )
            pairs = self.schedules[which] + shift
            # what was moved beyond the end comes in at the beginning; a pair may be torn by it
            inside = (self.schedules[which][:, 1] < self.rows) & (pairs[:, 0] // self.rows == pairs[:, 1] // self.rows)
            rows.append(first + pairs % self.rows)
            whole.append(inside)
            items.append(torch.full((len(pairs),), item))
        return torch.cat(rows), torch.cat(whole), torch.cat(items)

    def __call__(self, windows: StreamWindows) -> None:
        super().__call__(windows)
        store, device = windows.store, windows.device
        if self.flat.device != device:
            self.flat, self.quiet, self.codes, self.level = (
                x.to(device) for x in (self.flat, self.quiet, self.codes, self.level)
            )
        pairs, whole, items = self._drawn()  # [n, 2], [n], [n]
        n = len(pairs)
        letters = len(LETTERS)
        # no name twice among so many pairs in a row
        names = letters**NAMED_STEPS
        order = torch.rand(len(self.first), names, generator=self.generator).argsort(1)
        place = torch.cat([torch.arange(int((items == i).sum())) for i in range(len(self.first))])
        name = order[items, place % names]  # [n]
        name = torch.stack([name // letters, name % letters], 1)  # [n, 2]
        size = torch.tensor(self.sizes, dtype=torch.float64)[items]  # [n]
        shape = size[:, None] * (2 * torch.rand(n, LEVELS, generator=self.generator, dtype=torch.float64) - 1)
        assert windows.since is not None
        windows.since.fill_(NEVER)
        windows.since[pairs[whole, 1]] = pairs[whole, 1] - pairs[whole, 0]
        # an echo is written where there is one, else the event once more
        rows = torch.cat([pairs[:, 0], torch.where(whole, pairs[:, 1], pairs[:, 0])]).to(device)  # [2 n]
        name, shape = name.to(device).repeat(2, 1), shape.to(device).repeat(2, 1)[:, self.level]
        store.values[:, :, self.target] = self.flat
        # where nothing happens the column says so, as in the rows that are judged
        store.values[:, :, self.event] = self.quiet
        store.tags[:, :, self.event] = False
        store.values[rows, :NAMED_STEPS, self.event] = self.codes[name]
        store.tags[rows, :NAMED_STEPS, self.event] = True
        store.values[rows, NAMED_STEPS:, self.target] = self.flat[rows, NAMED_STEPS:] + shape
