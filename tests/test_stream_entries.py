"""Scratchpads of a stream in shared rows are the padded ones, to the bit, and take less room where lengths differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from model_frames import rich_frames, sine_frame
from streams import assert_like, begin, by_item, events_of, feed, plain_model, rich_model

from hamts.errors import DataError
from hamts.ops.pool import RowPool
from hamts.stream import Stream
from hamts.stream_entries import PaddedEntries, PooledEntries

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


def assert_alike(padded: PaddedEntries, paged: PooledEntries, items: int) -> None:
    for rows in (np.arange(items), np.arange(items)[::-2], np.arange(items)[:0]):
        one, two = living(padded, rows.copy()), living(paged, rows.copy())
        assert set(one) == set(two) == set(NAMES)
        for name, leaf in one.items():
            assert torch.equal(leaf, two[name]), name
    for pad in ("a", "b"):
        pool, every = paged.pools[pad], np.arange(items)
        number = paged.lists[pad].read(every, paged.used[pad][every])
        named, free = number[number > 0].tolist(), pool.free[pool.taken :].tolist()
        # no row is two entries', or an entry's and free; row 0 is nobody's and blank
        assert len({*named, *free, 0}) == len(named) + len(free) + 1
        assert not pool.parts["alive"][0] and not pool.parts["keys"][0].any()
        lent = paged.lend(every)
        assert lent[f"{pad}.keys"].shape == (*number.shape, 0) and torch.equal(lent[f"{pad}.rows"], number)
        assert torch.equal(lent[f"{pad}.alive"], paged.read(every)[f"{pad}.alive"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("most", [None, 200])
def test_pages_give_back_what_was_stored(most: int | None, device: str, generator: torch.Generator) -> None:
    empty = {name: torch.zeros(1, 0, *((2,) if "keys" in name else ()), device=device) for name in NAMES}
    empty |= {name: leaf.bool() for name, leaf in empty.items() if "alive" in name}
    padded, paged = PaddedEntries(empty, most), PooledEntries(empty, most)
    items = 7
    for turn in range(12):
        for store in (padded, paged):
            store.reserve(items)
        rows = torch.randperm(items, generator=generator)[: 1 + turn % items].numpy()
        lengths = torch.randint(0, 20 * (turn % 5) + 1, (len(rows),), generator=generator).tolist()
        found = {name: leaf.to(device) for name, leaf in drawn_leaves(lengths, generator).items()}
        for store in (padded, paged):
            store.write(rows, found)
            store.tidy()
        assert_alike(padded, paged, items)
        if turn % 4 == 3:
            left = torch.randperm(items, generator=generator)[: items - 2].numpy()
            for store in (padded, paged):
                store.keep(left)
            items -= 2
            assert_alike(padded, paged, items)
            assert not paged.pools["a"].left and paged.pools["a"].rows == 1 + int(
                (paged.read(np.arange(items))["a.alive"]).sum()
            )
            items += 3
    alone = paged.like()
    alone.reserve(1)
    alone.write(np.array([0]), {name: leaf.to(device) for name, leaf in drawn_leaves([5], generator).items()})
    assert alone.used["a"].tolist() <= [5] and alone.row_shape("a.keys") == padded.row_shape("a.keys") == (2,)


def test_a_long_list_takes_no_room_of_short_ones(generator: torch.Generator) -> None:
    empty = {"a.alive": torch.zeros(1, 0, dtype=torch.bool), "a.keys": torch.zeros(1, 0, 64)}
    counts = [1, 3, 10, 0, 5, 2000]
    found = {"a.alive": torch.arange(2000) < torch.tensor(counts)[:, None], "a.keys": torch.zeros(6, 2000, 64)}
    padded, paged = PaddedEntries(empty, None), PooledEntries(empty, None)
    for store in (padded, paged):
        store.reserve(6)
        store.write(np.arange(6), found)
    row = 64 * 4 + 1
    assert padded.nbytes() == 6 * 2000 * row
    # what was here before, pages of 16 rows, took one begun for each of the others, and a blank one
    assert paged.nbytes() <= (2000 + 6 * 16) * row


def test_a_stream_in_pages_is_the_stream(tmp_path: Path) -> None:
    model, frames = rich_model(), rich_frames()
    padded, rest = begin(model, frames["df"], 150)
    paged, _ = begin(model, frames["df"], 150, store="paged")
    assert isinstance(paged._items.memory.entries, PooledEntries)
    for at in range(0, len(rest), 53):
        part = rest.iloc[at : at + 53]
        for stream in (padded, paged):
            stream.update(part, events=events_of(part))
        assert padded.state_hash() == paged.state_hash()
    arrays, meta = paged.state()
    again = Stream.from_state(model, arrays, json.loads(json.dumps(meta)))
    assert isinstance(again._items.memory.entries, PooledEntries) and again.state_hash() == padded.state_hash()
    one, two = (by_item(stream.forecast(24, frames["futr_df"])) for stream in (padded, paged))
    assert_like(one, two, tolerance=0.0)
    assert padded.routes().equals(paged.routes()) and padded.memory_bytes().equals(paged.memory_bytes())
    # items that were on disk come back behind the others, in both
    for stream in (padded, again):
        stream.spill(tmp_path / stream.config.store, items=stream.item_ids[:1])
    one, two = (by_item(stream.forecast(24, frames["futr_df"])) for stream in (padded, again))
    assert_like(one, two, tolerance=0.0)


def test_a_stream_that_asks_for_no_number_of_rows_is_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: every candidate takes a row, and those that nobody names come back."""
    hold = RowPool.hold
    monkeypatch.setattr(RowPool, "hold", lambda pool, rows, alive, asks=True: hold(pool, rows, alive, asks=False))
    model, df = plain_model(), sine_frame(items=2, steps=720)
    padded, rest = begin(model, df, 120)
    paged, _ = begin(model, df, 120, store="paged")
    taken, take = [0], RowPool.take

    def counted(pool: RowPool, count: int) -> torch.Tensor:
        taken[0] += count
        return take(pool, count)

    monkeypatch.setattr(RowPool, "take", counted)
    for stream in (padded, paged):
        feed(stream, rest, [36])
    assert padded.state_hash() == paged.state_hash()
    pools, used = paged._items.memory.entries.pools, paged._items.memory.entries.used
    rows, named = sum(pool.rows for pool in pools.values()), sum(int(each.sum()) for each in used.values())
    # far more was taken than is there, and what is there is not much more than is named
    assert taken[0] > 2 * rows and rows < 2 * named + 64


@pytest.fixture
def first_choices() -> Iterator[None]:
    """One configuration of every kernel: to try them all takes minutes."""
    from hamts.ops import attend_triton_tiles as tiles
    from hamts.ops.gated_delta_trial import untuned

    tiles.use({kernel: candidates[-1] for kernel, candidates in tiles.CANDIDATES.items()})
    with untuned():
        yield
    tiles.use({})


@pytest.mark.gpu
@pytest.mark.usefixtures("first_choices")
@pytest.mark.parametrize("kind", ["plain", "rich"])
def test_a_stream_on_a_gpu_is_the_stream_on_a_cpu(kind: str, tmp_path: Path) -> None:
    model, df = (
        (plain_model(), sine_frame(items=2, steps=240)) if kind == "plain" else (rich_model(), rich_frames()["df"])
    )
    futr = None if kind == "plain" else rich_frames()["futr_df"]
    options = [{}, {"device": "cuda"}, {"device": "cuda", "store": "paged"}]
    (cpu, rest), (padded, _), (paged, _) = (begin(model, df, 150, **each) for each in options)
    assert cpu.kernel == "torch" and padded.kernel == paged.kernel == "fla+triton"
    for at in range(0, len(rest), 53):
        part = rest.iloc[at : at + 53]
        for stream in (cpu, padded, paged):
            stream.update(part, events=events_of(part) if kind == "rich" else None)
        # one kernel reads both, in the same order
        assert padded.state_hash() == paged.state_hash()
    one, two, three = (
        by_item(stream.forecast(24 if futr is not None else 12, futr)) for stream in (cpu, padded, paged)
    )
    assert_like(two, three, tolerance=0.0)
    # products of float32 in three parts, through some thirty patches
    assert_like(one, three, tolerance=1e-3)
    assert cpu.usage()["entries"].tolist() == paged.usage()["entries"].tolist()
    arrays, meta = paged.state()
    assert "device" not in meta["config"] and all(not leaf.is_cuda for leaf in arrays.values() if torch.is_tensor(leaf))
    again = Stream.from_state(model, arrays, json.loads(json.dumps(meta)), device="cuda")
    assert again.state_hash() == paged.state_hash()
    paged.spill(tmp_path / "idle", items=paged.item_ids[:1])
    paged.drop(paged.item_ids[:1])
    assert len(paged) == len(cpu) - 1


@pytest.mark.gpu
@pytest.mark.usefixtures("first_choices")
@pytest.mark.parametrize("store", ["padded", "paged"])
def test_a_stream_runs_on_a_device_that_is_not_the_current_one(store: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    model, df = plain_model(), sine_frame(items=2, steps=240)
    streams = [begin(model, df, 150, device=device, store=store) for device in ("cuda:0", "cuda:1")]
    assert torch.cuda.current_device() == 0
    for stream, rest in streams:
        stream.add(df.assign(unique_id=df["unique_id"] + "b"))
        feed(stream, rest, [53])
    (one, _), (other, _) = streams
    assert_like(by_item(one.forecast(12)), by_item(other.forecast(12)), tolerance=1e-5)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match=r"device must be 'cpu', 'cuda' or 'cuda:' and a number. Got 'tpu'."):
        plain_model().stream(device="tpu")
    with pytest.raises(DataError, match=r"E-OPTION.*Got device='cuda:99'; there are \['cpu'"):
        plain_model().stream(device="cuda:99")
    for strange in (torch.device("cpu"), 0, None, "cuda:01", "cuda:" + 20 * "9", "cuda:\u0661", "cuda:", " cpu", ""):
        with pytest.raises(DataError, match="E-OPTION.*device must be 'cpu', 'cuda' or 'cuda:' and a number. Got"):
            plain_model().stream(device=strange)
    stream = plain_model().stream()
    assert stream.kernel == "torch" and "device" not in stream.state()[1]["config"]


def test_items_that_are_dropped_leave_their_rows() -> None:
    model, df = plain_model(), sine_frame(items=4, steps=160)
    streams = [begin(model, df, 120, store=store)[0] for store in ("padded", "paged")]
    for stream in streams:
        stream.drop(["i1", "i3"])
        feed(stream, df[df["unique_id"].isin(["i0", "i2"])].groupby("unique_id").tail(40), [7])
    assert streams[0].state_hash() == streams[1].state_hash()
    before = streams[1]._items.memory.entries.nbytes()
    streams[1].drop(["i0"])
    assert streams[1]._items.memory.entries.nbytes() < before


@pytest.mark.parametrize("store", ["padded", "paged"])
def test_tables_of_a_stream_whose_items_are_all_on_disk_are_empty(store: str, tmp_path: Path) -> None:
    stream, _ = begin(plain_model(), sine_frame(items=2, steps=120), 120, store=store)
    before = [stream.usage(), stream.memory_bytes(), stream.routes()]
    stream.spill(tmp_path, items=stream.item_ids)
    for table, whole in zip([stream.usage(), stream.memory_bytes(), stream.routes()], before, strict=True):
        assert len(table) == 0 and list(table.columns) == list(whole.columns)
    assert stream.stats()["rows"] == 0 and len(stream) == 2


def test_an_unknown_store_is_refused() -> None:
    with pytest.raises(DataError, match=r"store must be one of \['padded', 'paged'\]. Got 'heap'."):
        plain_model().stream(store="heap")
