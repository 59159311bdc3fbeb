"""Law 2: a stream gives what one pass gives.

On a network with gaps, tags and channels of every role.

B items · I items · C channels · G targets · N patches · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import (
    CAPS,
    SAME,
    assert_close,
    assert_same_memory,
    assert_same_run,
    middle_cutoffs,
    network_of,
    patch_by_patch,
    run,
)
from networks import (
    ALARM,
    CHANNELS,
    HORIZON,
    LENGTHS,
    LOAD,
    PATCH_STEPS,
    PRICE,
    ROUTER_CHOICES,
    WIND,
    cut_items,
    make_panel,
    make_store,
    policy_for,
    read_all,
    whole_chunk,
)

from hamts.nn.tokens import Policy, map_tensors
from hamts.rollout import Rollout, forecast_from


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize(
    "window, dtype", [(1, torch.float64), (2, torch.float64), (3, torch.float64), (2, torch.float32)]
)
def test_any_chunks_of_a_stream_give_the_forecasts_of_one_pass(router: str, window: int, dtype: torch.dtype) -> None:
    network, store = network_of(router, window, dtype), make_store(make_panel(seed=7))
    policy = policy_for(network, 3, **CAPS)
    wanted = run(network, store, policy)
    # one size for each window, and patch by patch for all
    for size in {1, (7, 3, 2)[window - 1]}:
        assert_same_run(run(network, store, policy, chunk_patches=size), wanted, SAME[dtype])


def test_a_long_stream_equals_one_pass_over_many_blocks() -> None:
    """Longer than the blocks and chunks in which the ops work."""
    network, panel = network_of("surprise+learned"), make_panel((420,), seed=7)
    store, policy = make_store(panel), policy_for(network, 1, cap_kept=40, cap_must=20)
    options = {"cutoffs": [np.array([420])], "keep_traces": True}
    wanted = run(network, store, policy, chunk_patches=1000, **options)
    assert len(wanted.traces) == 1
    for size in (64, 45):
        assert_same_run(run(network, store, policy, chunk_patches=size, **options), wanted, 1e-10)


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize("dtype", SAME)
def test_a_stream_that_goes_on_gives_the_forecasts_of_one_pass(router: str, dtype: torch.dtype) -> None:
    network, panel = network_of(router, 2, dtype), make_panel(seed=8)
    policy = policy_for(network, 3, **CAPS)
    store = make_store(panel)
    wanted = run(network, store, policy)
    # each item has got another way when the stream is cut: to the middle of a patch, to its edge, to its very end
    known = [31, 22, LENGTHS[2]]
    early = make_store(cut_items(panel, known))
    before = run(network, early, policy, cutoffs=[np.array([n - 1]) for n in known])
    starts = ((early.lead + early.lengths) // PATCH_STEPS).numpy()
    after = run(network, store, policy, memory=before.memory, starts=starts, chunk_patches=5)
    traces, kept, heard = before.traces + after.traces, before.kept + after.kept, before.heard + after.heard
    joined = Rollout(after.quantiles, after.scale, after.memory, traces, kept, heard)
    assert_same_run(joined, wanted, SAME[dtype])


def test_a_forecast_leaves_the_memory_as_it_was() -> None:
    network, store = network_of(), make_store(make_panel(seed=8))
    policy = policy_for(network, 3, **CAPS)
    done = run(network, store, policy)
    assert done.memory is not None
    before = map_tensors(done.memory, torch.clone)
    cutoffs = torch.tensor([c[-1] for c in middle_cutoffs()])
    got, scale = forecast_from(network, store, torch.arange(3), cutoffs, done.memory, HORIZON, policy)
    assert_same_memory(done.memory, before, 0.0)
    last = np.cumsum([len(c) for c in middle_cutoffs()]) - 1
    assert_close(got, torch.from_numpy(done.quantiles[last]), 1e-10, "forecast")
    assert_close(scale, torch.from_numpy(done.scale[last]), 1e-10, "scale")


def test_what_a_forecast_keeps_pushes_nothing_out() -> None:
    network, store = network_of(), make_store(make_panel(seed=8))
    full = {"cap_kept": 5, "cap_must": 2}
    policy = policy_for(network, 3, share=1.0, **full)
    memory = read_all(network, store, policy).memory
    assert all(layer.scratchpad.alive.sum(1).eq(7).all() for layer in memory.layers)
    items, cutoffs = torch.arange(3), store.lengths
    chunk = store.horizon(items, cutoffs, HORIZON)
    got, _ = forecast_from(network, store, items, cutoffs, memory, HORIZON, policy)
    assert chunk.horizon is not None
    asked = chunk.horizon.flatten(1)  # [B, N P]

    def forecast(rule: Policy) -> torch.Tensor:
        with torch.no_grad():
            values = network(chunk, memory, rule).unscaled().flatten(2, 3).transpose(1, 2)  # [B, N P, G, Q]
        return values[asked].view(3, HORIZON, 2, -1).transpose(1, 2)

    assert_close(got, forecast(policy_for(network, 3, share=1.0)), 1e-12, "forecast")
    assert not torch.allclose(got, forecast(policy), rtol=0, atol=1e-3)


@pytest.mark.parametrize("router", ROUTER_CHOICES)
def test_step_by_step_equals_the_parallel_pass(router: str) -> None:
    network, store = network_of(router), make_store(make_panel(seed=9))
    policy = policy_for(network, 3, **CAPS)
    parallel = read_all(network, store, policy)
    stepwise = read_all(network, store, policy, stepwise=True)
    assert_close(stepwise.quantiles, parallel.quantiles, 1e-10, "quantiles")
    assert_same_memory(stepwise.memory, parallel.memory, 1e-10)
    quantiles = torch.cat([reading.quantiles for _, reading in patch_by_patch(network, store, policy)], 2)
    assert_close(quantiles, parallel.quantiles, 1e-10, "quantiles")


def test_a_window_with_a_hidden_span_is_read_as_the_stream_reads_it() -> None:
    """Training hides spans of the past; what lies before one must look as it will in a stream."""
    network, store = network_of(), make_store(make_panel(seed=9))
    policy, chunk = policy_for(network, 3), whole_chunk(store)
    span = torch.zeros_like(chunk.observed[:, 0])
    span[:, 9:12] = True
    hidden = span[:, None] & torch.tensor([c.role in ("target", "past") for c in CHANNELS])[:, None, None]
    with torch.no_grad():
        reading = network(
            replace(chunk, observed=chunk.observed & ~hidden, horizon=span), network.empty_memory(3), policy
        )
    wanted = read_all(network, store, policy)
    assert_close(reading.quantiles[:, :, :9], wanted.quantiles[:, :, :9], 1e-12, "quantiles")
    assert not torch.allclose(reading.quantiles[:, :, 9:12], wanted.quantiles[:, :, 9:12], atol=1e-3)


def test_nothing_is_kept_of_an_unfinished_patch() -> None:
    network, panel = network_of("innovation+tags"), make_panel(seed=9)
    cutoffs = torch.tensor([n - 8 for n in LENGTHS])
    for item, cutoff in enumerate(cutoffs.tolist()):
        panel.values[panel.offsets[item] + cutoff - 2 : panel.offsets[item] + cutoff + HORIZON] = 1 + item
    store = make_store(panel)
    chunk = store.horizon(torch.arange(3), cutoffs, HORIZON)
    unfinished = chunk.observed[:, [LOAD, PRICE, WIND, ALARM], 0].any(-1)
    assert unfinished.any() and chunk.tags[:, ALARM, 0].any()
    known = torch.tensor([c.role in ("future", "action") for c in CHANNELS])
    with torch.no_grad():
        reading = network(chunk, network.empty_memory(3), policy_for(network, 3, share=1.0))
    for trace in reading.traces:
        assert not trace.routed[:, ~known].any()
        assert torch.equal(trace.routed[:, known], (reading.heard >= 0.5)[:, known])
        assert trace.routed.any()
