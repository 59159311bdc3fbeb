"""Scratchpads of a stream in shared pages are the padded ones, to the bit, and take less room where lengths differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from model_frames import rich_frames, sine_frame
from streams import assert_like, begin, by_item, events_of, feed, plain_model, rich_model

from hamts.errors import DataError
from hamts.stream import Stream
from hamts.stream_entries import PAGE, PaddedEntries, PagedEntries

NAMES = ("a.alive", "a.keys", "b.alive", "b.keys")


def drawn_leaves(counts: list[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Two scratchpads of some items: entries, dead ones among them, and padding that holds anything."""
    found = {}
    for pad, more in (("a", 0), ("b", 3)):
        count = torch.tensor(counts) + more * (torch.tensor(counts) > 0)
        width = int(count.max()) + 2
        alive = (torch.arange(width) < count[:, None]) & (torch.rand(len(counts), width, generator=generator) < 0.9)
        found[f"{pad}.alive"] = alive
        found[f"{pad}.keys"] = torch.randn(len(counts), width, 2, generator=generator)
    return found


def living(store: PaddedEntries, rows: np.ndarray) -> dict[str, torch.Tensor]:
    found = store.read(rows)
    return {
        name: torch.where(found[f"{name[0]}.alive"].view(*leaf.shape[:2], *(1,) * (leaf.dim() - 2)), leaf, 0)
        for name, leaf in found.items()
    }


def assert_alike(padded: PaddedEntries, paged: PagedEntries, items: int) -> None:
    for rows in (np.arange(items), np.arange(items)[::-2], np.arange(items)[:0]):
        one, two = living(padded, rows.copy()), living(paged, rows.copy())
        assert set(one) == set(two) == set(NAMES)
        for name, leaf in one.items():
            assert torch.equal(leaf, two[name]), name
    for pad in ("a", "b"):
        held = paged.pages[pad][paged.pages[pad] > 0]
        pages = sorted([*held.tolist(), *paged.free[pad]])
        # every page is somebody's or free, once; page 0 is nobody's and blank
        assert pages == list(range(1, len(paged.leaves[f"{pad}.keys"]) // PAGE))
        assert not paged.leaves[f"{pad}.alive"][:PAGE].any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("most", [None, 200])
def test_pages_give_back_what_was_stored(most: int | None, device: str, generator: torch.Generator) -> None:
    empty = {name: torch.zeros(1, 0, *((2,) if "keys" in name else ()), device=device) for name in NAMES}
    empty |= {name: leaf.bool() for name, leaf in empty.items() if "alive" in name}
    padded, paged = PaddedEntries(empty, most), PagedEntries(empty, most)
    items = 7
    for turn in range(12):
        for store in (padded, paged):
            store.reserve(items)
        rows = torch.randperm(items, generator=generator)[: 1 + turn % items].numpy()
        lengths = torch.randint(0, 20 * (turn % 5) + 1, (len(rows),), generator=generator).tolist()
        found = {name: leaf.to(device) for name, leaf in drawn_leaves(lengths, generator).items()}
        for store in (padded, paged):
            store.write(rows, found)
        assert_alike(padded, paged, items)
        if turn % 4 == 3:
            left = torch.randperm(items, generator=generator)[: items - 2].numpy()
            for store in (padded, paged):
                store.keep(left)
            items -= 2
            assert_alike(padded, paged, items)
            assert not paged.free["a"]
            items += 3
    alone = paged.like()
    alone.reserve(1)
    alone.write(np.array([0]), {name: leaf.to(device) for name, leaf in drawn_leaves([5], generator).items()})
    assert alone.used["a"].tolist() <= [5] and alone.row_shape("a.keys") == padded.row_shape("a.keys") == (2,)


def test_a_long_list_takes_no_room_of_short_ones(generator: torch.Generator) -> None:
    empty = {"a.alive": torch.zeros(1, 0, dtype=torch.bool), "a.keys": torch.zeros(1, 0, 64)}
    counts = [1, 3, 10, 0, 5, 2000]
    found = {"a.alive": torch.arange(2000) < torch.tensor(counts)[:, None], "a.keys": torch.zeros(6, 2000, 64)}
    padded, paged = PaddedEntries(empty, None), PagedEntries(empty, None)
    for store in (padded, paged):
        store.reserve(6)
        store.write(np.arange(6), found)
    row = 64 * 4 + 1
    assert padded.nbytes() == 6 * 2000 * row
    # a page begun for each of the others, and the blank one
    assert paged.nbytes() <= (2000 + 6 * PAGE) * row


def test_a_stream_in_pages_is_the_stream(tmp_path: Path) -> None:
    model, frames = rich_model(), rich_frames()
    padded, rest = begin(model, frames["df"], 150)
    paged, _ = begin(model, frames["df"], 150, store="paged")
    assert isinstance(paged._items.memory.entries, PagedEntries)
    for at in range(0, len(rest), 53):
        part = rest.iloc[at : at + 53]
        for stream in (padded, paged):
            stream.update(part, events=events_of(part))
        assert padded.state_hash() == paged.state_hash()
    arrays, meta = paged.state()
    again = Stream.from_state(model, arrays, json.loads(json.dumps(meta)))
    assert isinstance(again._items.memory.entries, PagedEntries) and again.state_hash() == padded.state_hash()
    one, two = (by_item(stream.forecast(24, frames["futr_df"])) for stream in (padded, paged))
    assert_like(one, two, tolerance=0.0)
    assert padded.routes().equals(paged.routes()) and padded.memory_bytes().equals(paged.memory_bytes())
    # items that were on disk come back behind the others, in both
    for stream in (padded, again):
        stream.spill(tmp_path / stream.config.store, items=stream.item_ids[:1])
    one, two = (by_item(stream.forecast(24, frames["futr_df"])) for stream in (padded, again))
    assert_like(one, two, tolerance=0.0)


def test_items_that_are_dropped_leave_their_pages() -> None:
    model, df = plain_model(), sine_frame(items=4, steps=160)
    streams = [begin(model, df, 120, store=store)[0] for store in ("padded", "paged")]
    for stream in streams:
        stream.drop(["i1", "i3"])
        feed(stream, df[df["unique_id"].isin(["i0", "i2"])].groupby("unique_id").tail(40), [7])
    assert streams[0].state_hash() == streams[1].state_hash()
    before = streams[1]._items.memory.entries.nbytes()
    streams[1].drop(["i0"])
    assert streams[1]._items.memory.entries.nbytes() < before


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(DataError, match=r"store must be one of \['padded', 'paged'\]. Got 'heap'."):
        plain_model().stream(store="heap")
