"""Rows that the items of a stream share: forecasts leave them alone, and what nobody names any longer is used again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from model_frames import sine_frame
from streams import begin, plain_model

from hamts.errors import DataError
from hamts.ops.pool import RowPool
from hamts.stream import Stream

# a patch is open whose end has a token leave the window that is kept
OPEN_STEPS = 126


@pytest.fixture(params=["asking", "not asking"])
def asks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the number of rows is asked for; on a GPU it is not, and every candidate takes a row."""
    hold = RowPool.hold
    if request.param == "not asking":
        monkeypatch.setattr(RowPool, "hold", lambda pool, rows, alive, asks=True: hold(pool, rows, alive, asks=False))


def room(stream: Stream) -> tuple[int, list[int], list[int]]:
    """Bytes of all entries, and of every pool the rows and how often each of its parts was written to."""
    entries = stream._items.memory.entries
    pools = entries.pools.values()
    written = [part._version for pool in pools for part in pool.parts.values()]
    return entries.nbytes(), [pool.rows for pool in pools], written


@pytest.mark.usefixtures("asks")
def test_forecasts_write_into_no_row() -> None:
    stream, _ = begin(plain_model(), sine_frame(items=2, steps=240), OPEN_STEPS, store="paged")
    before = room(stream)
    one = stream.forecast(1).quantiles
    for _ in range(30):
        assert np.array_equal(stream.forecast(1).quantiles, one)
    stream.forecast(12)
    assert room(stream) == before


def test_forecasts_at_once_are_those_of_one_alone() -> None:
    stream, _ = begin(plain_model(), sine_frame(items=2, steps=240), OPEN_STEPS, store="paged")
    one = stream.forecast(1).quantiles
    with ThreadPoolExecutor(4) as workers:
        for answer in workers.map(lambda _: stream.forecast(1).quantiles, range(60)):
            assert np.array_equal(answer, one)


@pytest.mark.usefixtures("asks")
def test_one_large_update_takes_rows_for_what_is_kept() -> None:
    """Not for what was kept on the way; in two blocks, of which the first waits to be stored while the second runs."""
    model, df = plain_model(), sine_frame(items=2, steps=720)
    padded, rest = begin(model, df, 120, items_side_by_side=1, surprise=False)
    paged, _ = begin(model, df, 120, store="paged", items_side_by_side=1, surprise=False)
    for stream in (padded, paged):
        stream.update(rest)
    assert padded.state_hash() == paged.state_hash()
    for pad, pool in paged._items.memory.entries.pools.items():
        named = int(paged._items.memory.entries.used[pad].sum())
        assert named > 60 and pool.rows < 2 * named


@pytest.mark.usefixtures("asks")
def test_an_update_that_fails_after_rows_were_looked_for_leaves_the_stream_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=720), 240, store="paged", items_side_by_side=1)
    before, forecast = stream.state_hash(), stream.forecast(12).quantiles
    sweep, swept, step = RowPool.sweep, [0], type(stream._stepper).step

    def counted(pool: RowPool, named: torch.Tensor, coming: int = 0) -> None:
        swept[0] += 1
        sweep(pool, named, coming)

    monkeypatch.setattr(RowPool, "sweep", counted)

    def late(self: Any, rows: Any, memory: Any, ids: Any) -> Any:
        # while the first item's memory waits to be stored
        if ids == ["i1"] and swept[0]:
            raise DataError("E-NUMERIC", "It is late.", fix="Come earlier.")
        return step(self, rows, memory, ids)

    monkeypatch.setattr(type(stream._stepper), "step", late)
    with pytest.raises(DataError, match="late"):
        stream.update(rest)
    assert stream.state_hash() == before
    assert np.array_equal(stream.forecast(12).quantiles, forecast)


def test_rows_are_given_up_where_few_of_many_are_named() -> None:
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=240), 120, store="paged")
    entries = stream._items.memory.entries
    before, hashed = entries.nbytes(), stream.state_hash()
    for pool in entries.pools.values():
        # what was taken by an update that failed
        pool.take(1000)
        pool.latest = 1
    assert entries.nbytes() > 20 * before
    entries.tidy()
    assert entries.nbytes() < 2 * before and stream.state_hash() == hashed
    stream.update(rest)


@pytest.mark.usefixtures("asks")
def test_looks_ahead_take_no_rows_for_good() -> None:
    """The patch that is open is forecast again and again, as its item is one that never ends it."""
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=240), OPEN_STEPS, store="paged")
    sizes = []
    for _ in range(12):
        stream._items.table["ahead_patch"][:] = -1
        stream._items.table["lengths"][:] = OPEN_STEPS
        stream._items.table["recent_steps"][:] = -1
        stream.update(rest.iloc[:2])
        sizes.append(room(stream)[:2])
    assert sizes[1:] == sizes[:-1]
