"""Room of carried entries that is cut by the count of the chunk before changes no result, and stays small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import make_config, make_network, make_panel, make_store, policy_for

from hamts import rollout_room
from hamts.nn import scratchpad
from hamts.ops.kernels import resolve_kernels
from hamts.reader import HAMNetwork, StreamMemory
from hamts.rollout import Rollout, roll
from hamts.rollout_room import LateRoom, rounded

CHUNK = 16


def all_room(alive: torch.Tensor, most: int | None = None, *, skips_padding: bool = False) -> int:
    """What a read that skips padding gives on a GPU."""
    return alive.shape[1] if most is None else min(most, alive.shape[1])


def rolled(network: HAMNetwork, share: float) -> Rollout:
    store = make_store(make_panel((300, 260, 280)), patch_steps=network.config.patch_steps)
    nothing = [np.zeros(0, dtype=np.int64)] * store.n_items
    policy = policy_for(network, store.n_items, share=share)
    return roll(network, store, cutoffs=nothing, steps=1, policies=policy, chunk_patches=CHUNK)


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the largest scratchpad after each cut."""
    found: list[int] = []
    cut = LateRoom.__call__

    def watched(self: LateRoom, memory: StreamMemory, candidates: int) -> StreamMemory:
        memory = cut(self, memory, candidates)
        found.append(max(layer.scratchpad.alive.shape[1] for layer in memory.layers))
        return memory

    monkeypatch.setattr(LateRoom, "__call__", watched)
    return found


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_a_roll_whose_room_is_cut_late_is_the_roll_that_counts(
    share: float, rooms: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make_network(make_config(patch_steps=2))
    wanted = rolled(network, share)
    counted = list(rooms)
    rooms.clear()
    monkeypatch.setattr(scratchpad, "rows_for", all_room)
    rolled(network, share)
    uncut = list(rooms)
    rooms.clear()
    monkeypatch.setattr(rollout_room, "ROOM_WITHOUT_ASKING", 100)
    got = rolled(network, share)
    candidates = CHUNK * len(network.spec.roles)
    assert len(rooms) == len(counted) >= 6 and uncut == sorted(uncut) and uncut[-1] >= 100 + 3 * candidates
    for number, (room, all_of_it) in enumerate(zip(rooms, uncut, strict=True)):
        # never less than is alive, and no more than was a chunk ago with what one chunk adds, on one of few sizes
        before = counted[number - 1] if number else 0
        assert room >= counted[number]
        assert room <= max(rounded(before + candidates), min(all_of_it, 100 + 2 * candidates))
    assert rooms[-1] < uncut[-1]
    for one, two in zip(got.memory.layers, wanted.memory.layers, strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(one.state, two.state, rtol=1e-9, atol=1e-11)
        alive, other = one.scratchpad.alive, two.scratchpad.alive
        assert torch.equal(alive.sum(1), other.sum(1))
        torch.testing.assert_close(one.scratchpad.keys[alive], two.scratchpad.keys[other], rtol=1e-9, atol=1e-11)


def test_rooms_are_an_eighth_too_large_at_most() -> None:
    assert [rounded(n) for n in (0, 1, 128, 129, 1_025, 18_421, 65_536)] == [0, 128, 128, 256, 1_152, 18_432, 65_536]
    for count in range(1, 40_000, 37):
        assert count <= rounded(count) <= max(count * 1.125, count + 127)


@pytest.mark.gpu
def test_chunks_of_a_long_roll_never_wait_for_the_present_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from hamts.ops import attend_triton_tiles as tiles
    from hamts.ops.gated_delta_trial import untuned

    tiles.use({kernel: candidates[-1] for kernel, candidates in tiles.CANDIDATES.items()})
    network = make_network(make_config(width=32, patch_steps=2), dtype=torch.float32).to("cuda")
    network.use_kernels(resolve_kernels("fla+triton", device="cuda", head_width=16))
    monkeypatch.setattr(rollout_room, "ROOM_WITHOUT_ASKING", 100)
    cut, turns = LateRoom.__call__, [0]

    def watched(self: LateRoom, *given: Any) -> StreamMemory:
        turns[0] += 1
        # what is compiled and measured once, is by then; the count of the chunk before is waited for by its event
        torch.cuda.set_sync_debug_mode("error" if 3 <= turns[0] < 7 else "default")
        return cut(self, *given)

    monkeypatch.setattr(LateRoom, "__call__", watched)
    with untuned():
        try:
            rolled(network, 0.3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            tiles.use({})
    assert turns[0] > 8
