"""The read's kernels where one patch is asked and no gradient is: a step of a stream, over lists of any length, in rows
of a pool, in a graph. They equal the torch ones; how and where they run, ``test_attend_triton.py`` says.
"""

from __future__ import annotations

import pytest
import torch
from test_attend_triton import PLACES, RELATIVE, WideScene, small_tiles, triton_attend, wide
from test_ops import Scene, distance

from hamts.ops.attend import attend as torch_attend
from hamts.ops.compact import bucket

# a fixture that every test of this file uses
__all__ = ["small_tiles"]


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(
    "scene",
    [
        Scene(n_items=3, n_patches=1, n_entries=150, window=3, bias_per_head=True, seed=20),
        Scene(n_items=4, n_patches=1, n_channels=1, n_entries=90, window=70, seed=21),
        Scene(n_items=2, n_patches=1, n_channels=20, n_entries=70, window=4, cross_span=2, n_marks=3, seed=22),
        Scene(n_items=2, n_patches=1, n_channels=2, n_entries=0, window=4, n_marks=0, seed=23),
    ],
    ids=str,
)
def test_one_step_without_gradients_equals_torch(scene: Scene, device: str) -> None:
    scene = wide(scene)
    mine, exact = scene.pair(torch.float32, device)
    with torch.no_grad():
        got, truth = scene.read(triton_attend, mine, device), scene.read(torch_attend, exact, device)
    for name in ("output", "marks", "scratch_mass", "local_mass"):
        value, expected = getattr(got, name), getattr(truth, name)
        assert (value is None) == (expected is None), name
        if expected is not None:
            assert value.shape == expected.shape and distance(value, expected) <= RELATIVE[torch.float32], name


@pytest.mark.parametrize("device", PLACES)
def test_one_step_of_streams_whose_lists_differ(device: str) -> None:
    """Nothing kept, one entry, one in the middle of a list, a list that ends early, one behind a FIFO's lower bound."""
    scene = WideScene(n_items=5, n_patches=1, n_channels=1, n_entries=200, window=3, bias_per_head=True, n_marks=2)
    mine, exact = scene.pair(torch.float32, device)
    first, past = torch.tensor([0, 0, 130, 0, 70]), torch.tensor([0, 1, 131, 129, 200])
    index = torch.arange(200)
    masks = {name: x.to(device) for name, x in scene.masks().items()}
    alive = ((index >= first[:, None]) & (index < past[:, None])).to(device)
    masks["visible_from"] = torch.where(alive, -5, 2**40)
    masks["visible_until"] = torch.where(alive, 2**40, 0)
    with torch.no_grad():
        got, truth = scene.run(triton_attend, mine, masks), scene.run(torch_attend, exact, masks)
    for name in ("output", "marks", "scratch_mass", "local_mass"):
        assert distance(getattr(got, name), getattr(truth, name)) <= RELATIVE[torch.float32], name


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize(("patches", "channels"), [(1, 3), (1, 1), (3, 2)])
def test_entries_in_rows_of_a_pool_are_read_as_if_side_by_side(patches: int, channels: int, device: str) -> None:
    scene = wide(Scene(n_items=3, n_patches=patches, n_channels=channels, n_entries=150, window=3, n_marks=3, seed=25))
    mine, _ = scene.pair(torch.float32, device)
    rows = (7 + torch.randperm(450, generator=torch.Generator().manual_seed(5))).view(3, 150).to(device)
    masks = {name: x.to(device) for name, x in scene.masks().items()}
    pooled = dict(mine)
    for name in ("keys", "values", "marks"):
        # what lies between is nobody's
        pooled[name] = torch.full((470, *mine[name].shape[2:]), torch.nan, device=device)
        pooled[name][rows] = mine[name].detach()
    with torch.no_grad():
        truth = scene.run(triton_attend, mine, masks)
        for op in (triton_attend, torch_attend):
            got = scene.run(op, pooled, masks | {"rows": rows})
            for name in ("output", "marks", "scratch_mass", "local_mass"):
                value, expected = getattr(got, name), getattr(truth, name)
                if op is triton_attend:
                    assert torch.equal(value, expected), name
                assert distance(value, expected.double()) <= 2 * RELATIVE[torch.float32], name


@pytest.mark.parametrize("device", PLACES)
def test_lists_of_rows_that_are_padded_at_their_beginning_are_read_to_the_same_bits(device: str) -> None:
    # on a GPU so many that parts of 128 entries would do for the list alone, and not for its bucket
    items, entries = (64, 1030) if device == "cuda" else (2, 150)
    scene = wide(Scene(n_items=items, n_patches=1, n_channels=2, n_entries=entries + 2, window=3, n_marks=3, seed=27))
    mine, _ = scene.pair(torch.float32, device)
    masks = {name: x.to(device) for name, x in scene.masks().items()}
    rows = torch.randperm(items * (entries + 2), generator=torch.Generator().manual_seed(6)).view(items, -1).to(device)
    pooled = mine | {name: torch.empty_like(mine[name].flatten(0, 1)) for name in ("keys", "values", "marks")}
    for name in ("keys", "values", "marks"):
        pooled[name][rows] = mine[name].detach()
    blank = bucket(entries) - entries

    def longer(leaf: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.cat([leaf.new_full((items, blank, *leaf.shape[2:]), fill), leaf], 1)

    never = {"visible_from": 2**40, "visible_until": 0}
    longer_masks = masks | {n: longer(masks[n], fill) for n, fill in never.items()} | {"rows": longer(rows, 0)}
    padded = pooled | {"bias": longer(pooled["bias"].detach(), 0)}
    if "channel" in masks:
        longer_masks["channel"] = longer(masks["channel"], 0)
    with torch.no_grad():
        truth = scene.run(triton_attend, pooled, masks | {"rows": rows})
        got = scene.run(triton_attend, padded, longer_masks)
    assert torch.equal(got.output, truth.output) and torch.equal(got.marks, truth.marks)


def test_parts_of_a_recorded_step_are_as_long_as_those_of_a_launched_one() -> None:
    from hamts.ops.decode_triton import _as_recorded

    for channels in (1, 3, 64):
        for entries in (1, 5, 127, 128, 129, 1000, 1030, 4095, 70_000):
            assert _as_recorded(entries + channels, channels) == _as_recorded(bucket(entries) + channels, channels)
    assert _as_recorded(3, 3) == _as_recorded(128 + 3, 3)


@pytest.mark.parametrize("device", PLACES)
def test_rows_of_a_pool_have_no_gradient(device: str) -> None:
    scene = wide(Scene(n_items=2, n_patches=1, n_channels=1, n_entries=4, window=1, seed=26))
    mine, _ = scene.pair(torch.float32, device)
    rows = torch.arange(8, device=device).view(2, 4)
    pooled = mine | {name: mine[name].flatten(0, 1) for name in ("keys", "values", "marks")}
    masks = {name: x.to(device) for name, x in scene.masks().items()} | {"rows": rows}
    with pytest.raises(ValueError, match="without gradients"):
        scene.run(triton_attend, pooled, masks)


@pytest.mark.gpu
def test_a_step_in_a_graph_follows_what_was_written_since() -> None:
    scene = wide(Scene(n_items=5, n_patches=1, n_channels=2, n_entries=300, window=4, seed=24), key_width=64)
    leaves, _ = scene.pair(torch.bfloat16, "cuda")
    leaves = {name: x.detach() for name, x in leaves.items()}
    masks = {name: x.cuda() for name, x in scene.masks().items()}
    with torch.no_grad():
        scene.run(triton_attend, leaves, masks)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = scene.run(triton_attend, leaves, masks).output
        leaves["keys"].mul_(-1)
        masks["visible_from"].fill_(0)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, scene.run(triton_attend, leaves, masks).output)
