"""Compaction: the kept candidates, in order, without gaps."""

from __future__ import annotations

import pytest
import torch

from hamts.ops.compact import append_, bucket, compact


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("n_candidates", [1, 63, 200])
def test_the_kept_come_first_in_order_and_the_rest_is_empty(n_candidates: int, share: float) -> None:
    generator = torch.Generator().manual_seed(n_candidates)
    kept = torch.rand(3, n_candidates, generator=generator) < share
    rows = torch.randn(3, n_candidates, 2, 4, generator=generator)
    capacity = bucket(n_candidates)
    got = compact(kept, capacity)
    packed = got.gather(rows)
    for b in range(3):
        mine = rows[b][kept[b]]
        assert int(got.count[b]) == len(mine) == int(got.filled[b].sum())
        assert torch.equal(packed[b, : len(mine)], mine)
        assert (packed[b, len(mine) :] == 0).all()


def test_candidates_beyond_the_capacity_have_no_slot_and_are_counted() -> None:
    kept = torch.tensor([[True, False, True, True, True], [False, False, True, False, False]])
    got = compact(kept, 2)
    assert got.source.tolist() == [[0, 2], [2, 0]]
    assert got.filled.tolist() == [[True, True], [True, False]]
    assert got.count.tolist() == [4, 1]


def test_the_gradient_goes_back_to_the_candidates_that_were_kept() -> None:
    kept = torch.tensor([[True, False, True]])
    rows = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    weight = torch.tensor([[2.0, 5.0, 7.0, 7.0]])
    (compact(kept, 4).gather(rows) * weight).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[2.0, 0.0, 5.0]]


def test_an_empty_list_and_no_room() -> None:
    got = compact(torch.zeros(2, 0, dtype=torch.bool), 0)
    assert got.source.shape == (2, 0)
    assert got.count.tolist() == [0, 0]
    assert compact(torch.ones(2, 3, dtype=torch.bool), 0).filled.shape == (2, 0)


def test_buckets_are_few_and_not_much_too_large() -> None:
    sizes = [bucket(count) for count in range(1, 70_000)]
    assert all(size >= count and size % 128 == 0 for count, size in enumerate(sizes, 1))
    assert all(size <= 2**0.5 * count + 128 for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 20
    assert all(bucket(size) == size for size in sizes) and bucket(363) == bucket(384) == 384
    assert bucket(0) == 0 and bucket(1) == bucket(128) == 128 and bucket(4096) == 4096


@pytest.mark.parametrize("call", [lambda: bucket(-1), lambda: compact(torch.ones(1, 1, dtype=torch.bool), -1)])
def test_a_negative_size_is_refused(call) -> None:
    with pytest.raises(ValueError, match=r"must be 0 or more. Got -1."):
        call()


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    kept = torch.rand(4, 1000, device="cuda") < 0.3
    rows = torch.randn(4, 1000, 3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        compact(kept, 512).gather(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_rows_are_appended_in_order_and_streams_stay_apart() -> None:
    generator = torch.Generator().manual_seed(1)
    buffers = {"rows": torch.zeros(3, 40, 2), "tags": torch.zeros(3, 40, dtype=torch.int64)}
    count = torch.zeros(3, dtype=torch.int64)
    expected: list[list[int]] = [[], [], []]
    for step in range(10):
        tags = torch.arange(4).expand(3, 4) + 100 * step
        accepted = torch.rand(3, 4, generator=generator) < torch.tensor([[0.0], [0.4], [1.0]])
        append_(buffers, {"rows": tags[..., None].expand(3, 4, 2).float(), "tags": tags}, accepted, count)
        for b in range(3):
            expected[b] += tags[b][accepted[b]].tolist()
    assert count.tolist() == [len(tags) for tags in expected] and count[0] == 0
    for b in range(3):
        assert buffers["tags"][b, : count[b]].tolist() == expected[b]
        assert buffers["rows"][b, : count[b], 1].tolist() == expected[b]


def test_appending_without_room_or_under_other_names_is_refused() -> None:
    buffers = {"rows": torch.zeros(1, 4, 2)}
    with pytest.raises(ValueError, match=r"rows must have the names of buffers, \['rows'\]. Got \['keys'\]."):
        append_(buffers, {"keys": torch.zeros(1, 1, 2)}, torch.ones(1, 1, dtype=torch.bool), torch.tensor([0]))
    with pytest.raises(IndexError):
        append_(buffers, {"rows": torch.zeros(1, 1, 2)}, torch.ones(1, 1, dtype=torch.bool), torch.tensor([4]))


@pytest.mark.gpu
def test_a_graph_appends_at_every_replay() -> None:
    buffers, count = {"rows": torch.zeros(2, 20, device="cuda")}, torch.zeros(2, dtype=torch.int64, device="cuda")
    rows, accepted = torch.ones(2, 2, device="cuda"), torch.tensor([[True, True], [False, True]], device="cuda")
    append_(buffers, {"rows": rows}, accepted, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append_(buffers, {"rows": rows}, accepted, count)
    for value in (2.0, 3.0):
        rows.fill_(value)
        graph.replay()
    assert count.tolist() == [6, 3]
    assert buffers["rows"][0, :6].tolist() == [1, 1, 2, 2, 3, 3]
    assert buffers["rows"][1, :3].tolist() == [1, 2, 3]
