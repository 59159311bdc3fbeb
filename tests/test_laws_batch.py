"""Law 6: an item knows nothing of the others in its batch, nor of the order of columns.

On a network with gaps, tags and channels of every role.

B items · I items · C channels · G targets · N patches · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import CAPS, SAME, assert_same_memory, middle_cutoffs, network_of, run
from networks import (
    ALARM,
    FORECAST,
    HORIZON,
    LOAD,
    MODE,
    PATCH_STEPS,
    PRICE,
    ROUTER_CHOICES,
    VALVE,
    WIND,
    make_future,
    make_panel,
    make_store,
    policy_for,
    take_items,
)

from hamts.data.patches import build_store
from hamts.reader import HAMNetwork


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize("dtype", SAME)
def test_an_item_alone_equals_the_item_in_any_batch(router: str, dtype: torch.dtype) -> None:
    network, panel = network_of(router, 2, dtype), make_panel(seed=19)
    cutoffs, options = middle_cutoffs(), {"chunk_patches": 7}
    order = [2, 0, 1, 0]
    batch = take_items(panel, order)
    store = build_store(batch, patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[order])
    policy = policy_for(network, 4, **CAPS)
    together = run(network, store, policy, cutoffs=[cutoffs[i] for i in order], **options)
    first = np.cumsum([0] + [len(cutoffs[i]) for i in order])
    for row, item in enumerate(order):
        single = build_store(
            take_items(panel, [item]), patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[[item]]
        )
        alone = run(network, single, policy_for(network, 1, **CAPS), cutoffs=[cutoffs[item]], **options)
        got = together.quantiles[first[row] : first[row + 1]]
        apart = np.abs(got - alone.quantiles) / alone.scale[:, :, None, None]
        assert apart.max() <= SAME[dtype], f"item {item} in row {row}"
        assert together.memory is not None and alone.memory is not None
        assert_same_memory(together.memory.select(torch.tensor([row])), alone.memory, SAME[dtype])


@pytest.mark.parametrize("dtype", SAME)
def test_items_and_padding_of_a_continued_batch_do_not_matter(dtype: torch.dtype) -> None:
    network, panel = network_of("innovation+tags", 2, dtype), make_panel(seed=20)
    store, policy = make_store(panel), policy_for(network, 3, **CAPS)
    none = [np.array([], dtype=int)] * 3
    ends = np.array([20, 40, 29])
    half = run(network, store, policy, cutoffs=none, ends=ends)
    assert half.memory is not None
    starts = (store.lead.numpy() + ends) // PATCH_STEPS
    later = [cuts[(lead + cuts) // PATCH_STEPS >= start] for cuts, lead, start in
             zip(middle_cutoffs(), store.lead.numpy(), starts, strict=True)]  # fmt: skip
    together = run(network, store, policy, cutoffs=later, memory=half.memory, starts=starts)
    for item in range(3):
        single = take_items(panel, [item])
        alone_store = build_store(
            single, patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[[item]]
        )
        row = torch.tensor([item])
        alone = run(network, alone_store, policy_for(network, 1, **CAPS), cutoffs=[later[item]],
                    memory=half.memory.select(row), starts=starts[[item]])  # fmt: skip
        assert together.memory is not None and alone.memory is not None
        assert_same_memory(together.memory.select(row), alone.memory, SAME[dtype])


def test_cutoffs_that_are_not_read_are_refused() -> None:
    network, panel = network_of("tags"), make_panel(seed=20)
    store, policy = make_store(panel), policy_for(network, 3, **CAPS)
    with pytest.raises(ValueError, match="first and the last step read"):
        run(network, store, policy, starts=np.array([19, 19, 19]))


def test_streams_read_from_somewhere_on_know_nothing_of_before() -> None:
    network, panel = network_of("surprise+learned"), make_panel(seed=20)
    starts, lead = np.array([12, 9, 3]), np.array([0, 5, 2])
    policy, rng = policy_for(network, 3, **CAPS), np.random.default_rng(0)
    values = panel.values.copy()
    for item, start in enumerate(starts):
        rows = slice(panel.offsets[item], panel.offsets[item] + start * PATCH_STEPS - lead[item])
        values[rows] = rng.normal(size=values[rows].shape)
        values[rows, MODE] = 2
    # a change of the action at the start is a tag that the rows before it make
    values[panel.offsets[:-1] + starts * PATCH_STEPS - lead - 1, VALVE] = panel.values[
        panel.offsets[:-1] + starts * PATCH_STEPS - lead - 1, VALVE
    ]
    one = run(network, make_store(panel), policy, starts=starts)
    two = run(network, make_store(replace(panel, values=values)), policy, starts=starts)
    assert np.array_equal(one.quantiles, two.quantiles)
    assert one.memory is not None and two.memory is not None
    assert_same_memory(two.memory, one.memory, 0.0)
    for item in range(3):
        single = build_store(
            take_items(panel, [item]), patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[[item]]
        )
        cutoffs = [middle_cutoffs()[item]]
        alone = run(network, single, policy_for(network, 1, **CAPS), cutoffs=cutoffs, starts=starts[[item]])
        assert alone.memory is not None
        assert_same_memory(one.memory.select(torch.tensor([item])), alone.memory, 1e-10)


@pytest.mark.parametrize("router", ROUTER_CHOICES)
def test_order_of_columns_does_not_matter(router: str) -> None:
    network, panel = network_of(router), make_panel(seed=21)
    order = [ALARM, PRICE, MODE, VALVE, LOAD, FORECAST, WIND]
    channels = tuple(panel.schema.channels[i] for i in order)
    assert panel.event_offset is not None
    permuted = replace(
        panel,
        values=panel.values[:, order],
        event_offset=panel.event_offset[:, order],
        schema=replace(panel.schema, channels=channels),
    )
    other = permuted_network(network, order)
    store = make_store(panel)
    moved = build_store(permuted, patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[..., order])
    policy = policy_for(network, 3)
    one = run(network, store, policy)
    two = run(other, moved, policy)
    # the price stands before the load now
    apart = np.abs(two.quantiles[:, ::-1] - one.quantiles) / one.scale[:, :, None, None]
    assert apart.max() <= 1e-10
    for mine, theirs in zip(two.traces, one.traces, strict=True):
        for layer, wanted in zip(mine.layers, theirs.layers, strict=True):
            assert torch.equal(layer.routed, wanted.routed[:, order])


def permuted_network(network: HAMNetwork, order: list[int]) -> HAMNetwork:
    """The same network for the same columns in another order."""
    spec = replace(
        network.spec,
        roles=tuple(network.spec.roles[i] for i in order),
        levels=tuple(network.spec.levels[i] for i in order),
    )
    other = HAMNetwork(network.config, network.memory_config, spec).double().eval()
    state = dict(network.state_dict())
    for name in ("backbone.embedding.channel", "unit", "adaptive"):
        state[name] = state[name][order]
    other.load_state_dict(state)
    return other
