"""What a stream keeps does not grow, and an update touches nothing but the unfinished patch."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from model_frames import quick, sine_frame
from streams import assert_like, begin, by_item, feed, plain_model, rich_frames, rich_model

from hamts.errors import DataError
from hamts.nn import ham
from hamts.ops.pool import RowPool
from hamts.stream import Stream


def leaves(stream: Stream) -> dict[str, np.ndarray]:
    return {name: torch.as_tensor(array).numpy().copy() for name, array in stream.state()[0].items()}


def stored(stream: Stream) -> dict[str, torch.Tensor]:
    """What the memory keeps of all items, scratchpads with it, in the tensors that hold it."""
    memory = stream._items.memory
    return memory.leaves | memory.entries.leaves


def test_a_row_inside_a_patch_touches_only_its_own_cells() -> None:
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=120), 50)
    stream.update(rest.iloc[:2])
    storage = {name: (leaf.data_ptr(), leaf._version) for name, leaf in stored(stream).items()}
    before = leaves(stream)
    stream.update(rest[rest["unique_id"] == "i1"].iloc[1:2])
    # no tensor of the memory was written into, or replaced
    assert storage == {name: (leaf.data_ptr(), leaf._version) for name, leaf in stored(stream).items()}
    changed = {name: before[name] != after for name, after in leaves(stream).items()}
    changed = {
        name: where & ~(np.isnan(before[name]) & np.isnan(leaves(stream)[name]))
        if before[name].dtype.kind == "f"
        else where
        for name, where in changed.items()
    }
    cells = {name: np.argwhere(where).tolist() for name, where in changed.items() if where.any()}
    # hour 51 is the fourth of the patch that began at hour 48; the second item is row 1
    assert cells.pop("items.tail_values") == [[1, 3, 0]]
    assert cells.pop("items.lengths") == [[1]]
    assert cells.pop("items.recent_steps") == [[1, 51]]
    assert cells.pop("items.recent_hashes") == [[1, 51]]
    assert cells.pop("items.counts") == [[1, 0]]
    assert not cells


def test_a_patch_that_ends_leaves_the_other_items_alone_and_moves_no_storage() -> None:
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=240), 200)
    before = leaves(stream)
    pointers = {name: leaf.data_ptr() for name, leaf in stored(stream).items()}
    mine = rest[rest["unique_id"] == "i1"]
    assert stream.update(mine.iloc[:4]).patches == 1
    for name, after in leaves(stream).items():
        width = min(before[name].shape[1], after.shape[1]) if after.ndim > 1 else None
        one, two = (each[0] if width is None else each[0, :width] for each in (before[name], after))
        np.testing.assert_array_equal(one, two, err_msg=name)
    assert stream._items.memory.entry_leaves <= set(pointers)
    for name, leaf in stored(stream).items():
        assert leaf.data_ptr() == pointers[name], name


def test_storage_stops_growing_once_the_scratchpad_is_full() -> None:
    model = quick(sine_frame(items=1, steps=240), 6, patch_steps=4, budget_share=1.0, budget_bytes=6_000)
    stream, rest = begin(model, sine_frame(items=1, steps=900), 100)
    feed(stream, rest.iloc[:300], [60])
    policy, _ = stream._stepper.policies(1)
    cap = policy.cap_kept
    full = {name: (leaf.data_ptr(), leaf.shape) for name, leaf in stored(stream).items()}
    assert stream.usage()["entries"][0] == cap * model.config.layers
    feed(stream, rest.iloc[300:], [60])
    assert full == {name: (leaf.data_ptr(), leaf.shape) for name, leaf in stored(stream).items()}
    assert stream.usage()["entries"][0] == cap * model.config.layers
    assert stream.usage()["scratchpad_bytes"][0] <= 6_000


def test_bytes_that_are_reported_are_those_of_the_tensors() -> None:
    stream, rest = begin(rich_model(), rich_frames()["df"], 150)
    table, usage = stream.memory_bytes(), stream.usage()
    memory = stream._items.memory
    entries = memory.entries.leaves
    for row in range(len(stream)):
        fixed = sum(leaf[row].nbytes for leaf in memory.leaves.values())
        assert table["state"][row] + table["window"][row] + table["normaliser"][row] == fixed
        held = 0
        for name in (name for name in entries if name.endswith(".alive")):
            pad = [leaf for n, leaf in entries.items() if n.startswith(name.removesuffix("alive"))]
            held += int(entries[name][row].sum()) * sum(leaf[row, 0].nbytes for leaf in pad)
        assert table["scratchpad"][row] == held == usage["scratchpad_bytes"][row]
    parts = table.drop(columns=["unique_id", "total"]).sum(axis=1)
    assert (table["total"] == parts).all()


def test_idle_items_go_to_disk_and_come_back_with_their_next_row(tmp_path: Any) -> None:
    model, df = plain_model(), sine_frame(items=3, steps=120)
    stream, rest = begin(model, df, 60)
    other, _ = begin(model, df, 60)
    busy = rest[rest["unique_id"] != "i1"].iloc[:60]
    for each in (stream, other):
        each.update(busy)
    assert stream.spill(tmp_path / "idle", idle_steps=24) == 1
    assert stream._items.ids == ["i0", "i2"] and set(stream.item_ids) == {"i0", "i1", "i2"}
    assert len(list((tmp_path / "idle").iterdir())) == 1
    late = rest[rest["unique_id"] == "i1"].iloc[:10]
    for each in (stream, other):
        each.update(late)
    assert not list((tmp_path / "idle").iterdir())
    assert_like(by_item(stream.forecast(12)), by_item(other.forecast(12)), tolerance=0.0)
    stream.spill(tmp_path / "idle", items=["i0"])
    arrays, meta = stream.state()
    # the state holds it, memory still does not
    assert "i0" in meta["item_ids"] and "i0" not in stream._items.ids
    assert len(list((tmp_path / "idle").iterdir())) == 1
    assert Stream.from_state(model, arrays, meta).state_hash() == other.state_hash()
    assert stream.state_hash() == other.state_hash()


def test_a_damaged_file_of_a_spilled_item_is_refused(tmp_path: Any) -> None:
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=120), 60)
    stream.spill(tmp_path, items=["i0"])
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="E-STATE.*damaged"):
        stream.update(rest.iloc[:2])
    path.unlink()
    with pytest.raises(DataError, match="E-STATE.*gone"):
        stream.forecast(12, items=["i0"])
    assert stream.update(rest[rest["unique_id"] == "i1"].iloc[:2]).rows == 2


def test_a_state_of_another_model_or_a_newer_version_is_refused() -> None:
    stream, _ = begin(plain_model(), sine_frame(items=2, steps=120), 60)
    arrays, meta = stream.state()
    other = quick(sine_frame(items=2, steps=240), 12, patch_steps=6, seed=5)
    with pytest.raises(DataError, match="E-STATE.*belongs to model"):
        Stream.from_state(other, arrays, meta)
    with pytest.raises(DataError, match="E-STATE.*newer"):
        Stream.from_state(stream.model, arrays, {**meta, "version": [2, 0]})
    broken = {name: array for name, array in arrays.items() if name != "items.lengths"}
    with pytest.raises(DataError, match="E-STATE.*does not fit"):
        Stream.from_state(stream.model, broken, meta)
    wrong = {**arrays, "items.tail_values": torch.as_tensor(arrays["items.tail_values"])[:, :2]}
    with pytest.raises(DataError, match="E-STATE.*does not fit"):
        Stream.from_state(stream.model, wrong, meta)


@pytest.mark.parametrize("store", ["padded", "paged"])
def test_a_memory_that_is_no_number_is_refused_before_anything_is_stored(store: str, monkeypatch: Any) -> None:
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=120), 50, store=store)
    arrays, meta = stream.state()
    before = stream.state_hash()
    for name, leaf in arrays.items():
        # also of what no pass has looked at yet
        if name.startswith("memory.layers.") and leaf.is_floating_point() and leaf.numel():
            with pytest.raises(DataError, match=f"E-STATE.*values in {re.escape(name)} that are not"):
                Stream.from_state(stream.model, arrays | {name: torch.full_like(leaf, torch.nan)}, meta)
    step = type(stream._network).forward

    def broken(self: Any, chunk: Any, *args: Any, **options: Any) -> Any:
        reading = step(self, chunk, *args, **options)
        if options.get("stepwise") and float(chunk.position[0, 0]) == 10.0:
            reading.memory.layers[0].state[1].fill_(torch.nan)
        return reading

    monkeypatch.setattr(type(stream._network), "forward", broken)
    with pytest.raises(DataError, match=r"E-NUMERIC.*patch 10 .*layers.0.state") as caught:
        stream.update(rest.iloc[:50])
    assert caught.value.series == "i1"
    assert stream.state_hash() == before


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize("store", ["padded", "paged"])
@pytest.mark.parametrize("part", ["keys", "values", "marks", "bias"])
def test_an_entry_that_is_no_number_is_refused_before_anything_is_stored(
    part: str, store: str, asks: bool, monkeypatch: Any
) -> None:
    """A token that leaves the window, and is kept, of which a part is no number."""
    hold, as_entries = RowPool.hold, ham.as_entries
    stream, rest = begin(plain_model(), sine_frame(items=2, steps=240), 120, store=store)
    before, broken = stream.state_hash(), [True]

    def entries(*given: Any) -> Any:
        found = as_entries(*given)
        if not broken[0] or len(found.alive) < 2:
            return found
        leaf = getattr(found, part).clone()
        leaf[1][found.alive[1]] = torch.nan
        # what is not kept nobody reads
        leaf[~found.alive] = torch.inf
        return replace(found, **{part: leaf})

    monkeypatch.setattr(ham, "as_entries", entries)
    monkeypatch.setattr(RowPool, "hold", lambda pool, rows, alive, **_: hold(pool, rows, alive, asks=asks))
    with pytest.raises(DataError, match=rf"E-NUMERIC.*layers.0.scratchpad.{part}") as caught:
        stream.update(rest)
    assert caught.value.series == "i1"
    assert stream.state_hash() == before
    broken[0] = False
    stream.update(rest)
