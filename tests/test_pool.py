"""Entries in rows of a shared pool are the entries side by side, in a layer; rows are taken, and found again."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from networks import make_config, open_scratchpad, perturb, random_tokens
from triton_on_cpu import INTERPRETED, WHY_NOT

from hamts.nn.ham import HAMLayer
from hamts.nn.scratchpad import Entries, LayerMemory
from hamts.nn.tokens import Policy, map_tensors
from hamts.ops.kernels import Kernels
from hamts.ops.pool import RowPool

PLACES = [
    pytest.param("torch", "cpu", marks=pytest.mark.skipif(INTERPRETED, reason="runs in the other process")),
    pytest.param("triton", "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason=WHY_NOT)),
    pytest.param("torch", "cuda", marks=pytest.mark.gpu),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu),
]


def in_pool(memory: LayerMemory) -> LayerMemory:
    """The same memory, its entries in a pool of their own."""
    pad = memory.scratchpad
    present = {f.name: getattr(pad, f.name) for f in fields(Entries) if getattr(pad, f.name) is not None}
    pool = RowPool({name: leaf.new_zeros(1, *leaf.shape[2:]) for name, leaf in present.items()})
    return replace(memory, scratchpad=pad.held(pool), pool=pool)


def assert_same_entries(pooled: LayerMemory, plain: LayerMemory) -> None:
    alive = plain.scratchpad.alive
    assert torch.equal(pooled.scratchpad.alive, alive)
    assert pooled.pool is not None and pooled.scratchpad.rows is not None
    for name, part in pooled.pool.parts.items():
        assert torch.equal(part[pooled.scratchpad.rows][alive], getattr(plain.scratchpad, name)[alive]), name


@pytest.mark.parametrize(("kernel", "device"), PLACES)
@pytest.mark.parametrize(
    ("eviction", "caps"),
    [("fifo", (None, None)), ("fifo", (5, 2)), ("lowest", (4, 3)), ("reservoir", (4, 3)), ("must_last", (3, 3))],
)
def test_a_layer_that_reads_a_pool_is_the_layer(
    eviction: str, caps: tuple[int | None, int | None], kernel: str, device: str, generator: torch.Generator
) -> None:
    if INTERPRETED and caps != (5, 2):
        pytest.skip("the kernel knows nothing of these rules, and is slow here")
    layer = HAMLayer(make_config(router="learned+surprise+tags", width=32))
    perturb(layer, generator)
    open_scratchpad(layer)
    layer = layer.to(device)
    policy = Policy(
        share=torch.tensor([0.5, 0.8], device=device), readable=torch.ones(2, 3, 3, dtype=torch.bool, device=device),
        cap_kept=caps[0], cap_must=caps[1], eviction=eviction,
    )  # fmt: skip
    history = map_tensors(random_tokens(generator, patches=9, dtype=torch.float32), lambda leaf: leaf.to(device))
    x = torch.randn(2, 3, 9, 32, generator=generator).to(device)
    with torch.no_grad():
        plain = layer(x, tokens=history, memory=layer.empty_memory(2, 3, layer.conv), policy=policy).memory
        layer.kernels = Kernels(kernel)
        pooled = in_pool(plain)
        for step in range(9, 10 if INTERPRETED else 18):
            tokens = random_tokens(generator, patches=1, dtype=torch.float32)
            tokens = map_tensors(replace(tokens, position=tokens.position + step), lambda leaf: leaf.to(device))
            x = torch.randn(2, 3, 1, 32, generator=generator).to(device)
            ahead, one, two = (
                layer(x, tokens=tokens, memory=memory, policy=policy, stepwise=True, advance=advance)
                for memory, advance in ((pooled, False), (plain, True), (pooled, True))
            )
            # a look ahead leaves the memory as it was, and what it wrote is nobody's
            assert_same_entries(ahead.memory, plain)
            assert torch.equal(one.output, two.output) and torch.equal(one.output, ahead.output)
            plain, pooled = one.memory, two.memory
            assert_same_entries(pooled, plain)
    assert int(plain.scratchpad.alive.sum()) > 4


@torch.inference_mode()
def taken_in_a_step(pool: RowPool, count: int) -> torch.Tensor:
    return pool.take(count)


def test_rows_that_came_in_a_step_are_written_into_later() -> None:
    pool = RowPool({"keys": torch.zeros(1, 1)})
    taken_in_a_step(pool, 3)
    rows = pool.hold({"keys": torch.ones(1, 5, 1)}, torch.ones(1, 5, dtype=torch.bool))
    assert rows.tolist() == [[4, 5, 6, 7, 8]] and pool.parts["keys"].sum() == 5


def test_where_nothing_is_asked_every_row_is_taken_and_the_living_are_named() -> None:
    alive = torch.tensor([[True, False], [True, True]])
    given = {"keys": torch.arange(12.0).view(2, 2, 3), "alive": alive}
    pool = RowPool({"keys": torch.zeros(1, 3), "alive": torch.zeros(1, dtype=torch.bool)})
    rows = pool.hold(given, alive, asks=False)
    assert rows.tolist() == [[1, 0], [3, 4]] and pool.rows == 5
    assert torch.equal(pool.parts["keys"][rows][alive], given["keys"][alive]) and not pool.parts["keys"][0].any()
    pool.sweep(rows)
    assert pool.free.tolist() == [2]


def test_rows_that_no_list_names_are_found_again() -> None:
    pool = RowPool({"keys": torch.zeros(1, 3), "alive": torch.zeros(1, dtype=torch.bool)})
    alive = torch.tensor([[True, False], [True, True]])
    first = pool.hold({"keys": torch.arange(12.0).view(2, 2, 3), "alive": alive}, alive)
    assert first.tolist() == [[1, 0], [2, 3]] and pool.rows == 4 and pool.left == 0
    assert torch.equal(pool.parts["keys"][first][alive], torch.arange(12.0).view(2, 2, 3)[alive])
    assert not pool.parts["keys"][0].any() and not pool.parts["alive"][0]
    assert pool.short() is False  # of four rows a sixteenth is none
    pool.take(36)
    # nobody names what was taken
    pool.sweep(first.flatten())
    assert pool.left == 36 and sorted(pool.free.tolist()) == list(range(4, 40))
    before = pool.parts["keys"][first].clone()
    pool.keep(first[first > 0])
    assert pool.rows == 4 and torch.equal(pool.parts["keys"][torch.tensor([[1, 0], [2, 3]])], before)


def test_a_pool_whose_rows_are_all_named_grows_before_they_run_out() -> None:
    pool = RowPool({"keys": torch.zeros(1, 1)})
    named = pool.take(320)
    assert pool.short()
    pool.sweep(named)
    assert pool.left >= pool.rows // 8 and not pool.short()


def sizes(pool: RowPool) -> dict[str, Any]:
    return {name: tuple(part.shape) for name, part in pool.parts.items()}


@pytest.mark.gpu
def test_a_step_of_a_pool_never_waits_for_the_device(generator: torch.Generator) -> None:
    layer = HAMLayer(make_config(router="surprise+tags", width=32)).to("cuda")
    layer.kernels = Kernels("triton")
    policy = Policy(
        share=torch.tensor([0.5, 0.8], device="cuda"), readable=torch.ones(2, 3, 3, dtype=torch.bool, device="cuda"),
        cap_kept=20, cap_must=10,
    )  # fmt: skip
    memory = in_pool(layer.empty_memory(2, 3, layer.conv))
    assert memory.pool is not None
    memory.pool.grow(200)
    before = sizes(memory.pool)
    tokens = map_tensors(random_tokens(generator, patches=1, dtype=torch.float32), lambda leaf: leaf.cuda())
    x = torch.randn(2, 3, 1, 32, generator=generator).cuda()
    with torch.no_grad():
        for step in range(6):
            if step == 2:
                # what is compiled once, is by now
                torch.cuda.set_sync_debug_mode("error")
            try:
                memory = layer(x, tokens=tokens, memory=memory, policy=policy).memory
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert sizes(memory.pool) == before
