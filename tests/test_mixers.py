"""The laws and bytes of every rival of HAM."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import (
    FORECAST,
    LENGTHS,
    LOAD,
    leaves,
    make_config,
    make_network,
    make_spec,
    make_store,
    policy_for,
    read_all,
    take_items,
    whole_chunk,
)
from rivals import RIVALS, SAME, config_of, network_of, panel_and_store

from hamts.config import MemoryConfig
from hamts.nn.mixers import MOST_LEVELS, layer_makers
from hamts.nn.mixers_parts import row_bytes
from hamts.reader import HAMNetwork, StreamMemory
from hamts.remembered import memory_parts

SIZED = ("recurrent_wide", "window", "recurrent_window", "top_write", "log_linear", "pooled", "neighbours")


def live_rows(memory: StreamMemory, item: int) -> list[torch.Tensor]:
    """Every tensor of one item's memory, rows that are padding left out."""
    found = []
    for layer in memory.layers:
        values = leaves(layer)
        for name, tensor in values.items():
            parent = name.rpartition(".")[0]
            alive = values.get(f"{parent}.alive")
            found.append(tensor[item] if alive is None else tensor[item][alive[item]])
    return found


@pytest.mark.parametrize("mixer", RIVALS)
def test_nothing_before_an_edit_changes(mixer: str) -> None:
    network, (panel, store) = network_of(mixer), panel_and_store()
    policy = policy_for(network, store.n_items)
    edited = panel.values.copy()
    stop = panel.offsets[1] - 17
    edited[stop : panel.offsets[1], LOAD] += 100.0
    edited[stop : panel.offsets[1], FORECAST] = -5.0
    other = make_store(replace(panel, values=edited))
    before = (int(store.lead[0]) + LENGTHS[0] - 17) // store.patch_steps
    last = (int(store.lead[0]) + LENGTHS[0]) // store.patch_steps
    one, two = read_all(network, store, policy), read_all(network, other, policy)
    untouched = one.quantiles.shape[2] - (last - before)
    assert torch.equal(one.quantiles[0, :, :untouched], two.quantiles[0, :, :untouched])
    assert not torch.allclose(one.quantiles[0, :, untouched:], two.quantiles[0, :, untouched:])


@pytest.mark.parametrize("mixer", RIVALS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_streaming_is_reading_in_one_pass(mixer: str, size: int) -> None:
    network, (_, store) = network_of(mixer), panel_and_store()
    policy = policy_for(network, store.n_items)
    whole = read_all(network, store, policy)
    items = torch.arange(store.n_items)
    stop = (store.lead + store.lengths) // store.patch_steps
    patches = int(stop.max())
    memory, parts = network.empty_memory(store.n_items), []
    with torch.no_grad():
        for low in range(0, patches, size):
            chunk = store.window(items, stop - patches + low, min(size, patches - low))
            reading = network(chunk, memory, policy, stepwise=size == 1)
            memory = reading.memory
            parts.append(reading.quantiles)
    torch.testing.assert_close(torch.cat(parts, 2), whole.quantiles, rtol=SAME, atol=SAME)
    for item in range(store.n_items):
        for got, wanted in zip(live_rows(memory, item), live_rows(whole.memory, item), strict=True):
            if got.is_floating_point():
                torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixer", RIVALS)
def test_an_item_alone_is_the_item_among_others(mixer: str) -> None:
    network, (panel, store) = network_of(mixer), panel_and_store()
    together = read_all(network, store, policy_for(network, store.n_items))
    for item in range(panel.n_items):
        alone_store = make_store(take_items(panel, [item]))
        alone = read_all(network, alone_store, policy_for(network, 1))
        length = alone.quantiles.shape[2]
        torch.testing.assert_close(alone.quantiles[0], together.quantiles[item, :, -length:], rtol=SAME, atol=SAME)


@pytest.mark.parametrize("mixer", RIVALS)
def test_a_forecast_leaves_the_memory_as_it_was(mixer: str) -> None:
    network, (_, store) = network_of(mixer), panel_and_store()
    policy = policy_for(network, store.n_items)
    memory = read_all(network, store, policy).memory
    before = {name: tensor.clone() for name, tensor in leaves(memory.layers).items()}
    horizon = store.horizon(torch.arange(store.n_items), store.lengths, 5, torch.zeros(store.n_items).bool())
    with torch.no_grad():
        reading = network(horizon, memory, policy, advance=False)
    assert reading.memory is memory
    assert all(torch.equal(tensor, before[name]) for name, tensor in leaves(memory.layers).items())


@pytest.mark.parametrize("mixer", RIVALS)
def test_attention_to_kept_rows_is_told(mixer: str) -> None:
    network, (_, store) = network_of(mixer), panel_and_store()
    reading = read_all(network, store, policy_for(network, store.n_items))
    chunk = whole_chunk(store)
    asked = int(chunk.present.sum()) * len(network.spec.roles) * network.config.heads
    spent = [float((trace.entries_mass * trace.entries_sights).sum()) for trace in reading.traces]
    keeps = [bool(trace.entries_sights.any()) for trace in reading.traces]
    assert any(keeps) == (mixer not in ("recurrent", "recurrent_wide", "log_linear", "neighbours"))
    for part, there in zip(spent, keeps, strict=True):
        assert 0 < part < asked if there else part == 0


@pytest.mark.parametrize("mixer", RIVALS)
def test_bytes_are_those_of_the_live_tensors(mixer: str) -> None:
    network, (_, store) = network_of(mixer), panel_and_store()
    memory = read_all(network, store, policy_for(network, store.n_items)).memory
    parts = memory_parts(memory)
    for item in range(store.n_items):
        counted = sum(tensor.numel() * tensor.element_size() for tensor in live_rows(memory, item))
        assert counted == sum(int(parts[name][item]) for name in ("scratchpad", "state", "window"))


@pytest.mark.parametrize("mixer", SIZED)
@pytest.mark.parametrize("budget", [60_000, 400_000])
def test_a_rival_takes_what_ham_would_and_no_more(mixer: str, budget: int) -> None:
    panel, store = panel_and_store()
    spec = make_spec(panel, store)
    ham = HAMNetwork(make_config(), MemoryConfig(budget_bytes=budget), spec)
    allowed = budget + sum(
        int(memory_parts(ham.empty_memory(1))[name][0]) for name in ("scratchpad", "state", "window")
    )
    network = HAMNetwork(config_of(mixer), MemoryConfig(budget_bytes=budget), spec)
    layers = network.backbone.layers()
    empty = memory_parts(network.empty_memory(1))
    taken = sum(int(empty[name][0]) for name in ("scratchpad", "state", "window"))
    kept = getattr(network.empty_memory(1).layers[0], "kept", None)
    row = 0 if kept is None else row_bytes(kept)
    channels = len(spec.roles)
    if mixer in ("window", "recurrent_window"):
        taken += sum(layer.patches for layer in layers) * channels * row
        slack = 2 * channels * row
    elif mixer in ("top_write", "pooled"):
        taken += sum(layer.entries for layer in layers) * row
        slack = 2 * row
    elif mixer == "log_linear" and layers[0].levels == MOST_LEVELS:
        # segments beyond these would never fill up
        slack = allowed
    else:
        # one step of its size: a level, a unit of width, a stored patch
        slack = 0.25 * allowed
    assert allowed - slack <= taken <= allowed


@pytest.mark.parametrize("mixer", ["window", "recurrent_window", "top_write", "pooled"])
def test_what_is_kept_never_exceeds_its_size(mixer: str) -> None:
    network, (_, store) = network_of(mixer), panel_and_store()
    items, policy = torch.arange(store.n_items), policy_for(network, store.n_items)
    stop = (store.lead + store.lengths) // store.patch_steps
    memory, oldest, channels = network.empty_memory(store.n_items), 0, len(network.spec.roles)
    with torch.no_grad():
        for low in range(int(stop.max())):
            memory = network(store.window(items, stop - int(stop.max()) + low, 1), memory, policy).memory
            for layer, state in zip(network.backbone.layers(), memory.layers, strict=True):
                size = layer.entries if hasattr(layer, "entries") else layer.patches * channels
                assert int(state.kept.alive.sum(1).max()) <= size
                kept = state.kept.index[0][state.kept.alive[0]]
                oldest = int(kept.min()) if len(kept) else 0
    assert oldest > 0 or mixer == "top_write", "nothing was ever evicted, so nothing was tested"
    if mixer == "top_write":
        assert int(state.kept.alive[0].sum()) == size


@pytest.mark.parametrize("mixer", SIZED)
def test_too_few_bytes_are_answered_with_the_fewest_that_work(mixer: str) -> None:
    config = make_config(mixer=mixer)
    channels = 3
    # a rival that fits where HAM's scratchpads have nothing has no smallest size
    try:
        layer_makers(config, channels=channels, budget_bytes=0)
    except ValueError as error:
        assert f"mixer {mixer!r} with 3 channels needs budget_bytes of at least" in str(error)
        fewest = int(str(error).split("at least ")[1].split(".")[0].replace(",", ""))
        layer_makers(config, channels=channels, budget_bytes=fewest)
        with pytest.raises(ValueError, match="needs budget_bytes"):
            layer_makers(config, channels=channels, budget_bytes=fewest - 1)
    else:
        # HAM carries more beside each token of the window than these do
        assert mixer in ("window", "log_linear", "neighbours", "recurrent_wide")


def test_stacked_layers_need_two_of_them() -> None:
    with pytest.raises(ValueError, match="gdn_gsa.*layers of at least 2. Got 1"):
        layer_makers(make_config(mixer="gdn_gsa", layers=1), channels=1, budget_bytes=1 << 20)


def test_no_rival_is_a_copy_of_another() -> None:
    panel, store = panel_and_store()
    answers = {}
    for mixer in RIVALS:
        network = make_network(config_of(mixer), calibrate=False)
        answers[mixer] = read_all(network, store, policy_for(network, store.n_items)).quantiles
    for one in RIVALS:
        for two in RIVALS:
            if one < two:
                assert not torch.allclose(answers[one], answers[two]), (one, two)
