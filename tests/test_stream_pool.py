"""Rows that the items of a stream share: forecasts leave them alone, and what nobody names any longer is used again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from model_frames import sine_frame
from streams import begin, plain_model

from hamts.ops.pool import RowPool
from hamts.stream import Stream

# a patch is open whose end has a token leave the window that is kept
OPEN_STEPS = 126


@pytest.fixture(params=["asking", "not asking"])
def asks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the number of rows is asked for; on a GPU it is not, and every candidate takes a row."""
    hold = RowPool.hold
    if request.param == "not asking":
        monkeypatch.setattr(RowPool, "hold", lambda pool, rows, alive, asks=True: hold(pool, rows, alive, asks=False))
    return request.param == "asking"


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
