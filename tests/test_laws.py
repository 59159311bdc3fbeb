"""Law 1: causality. What is after a step changes nothing before it.

On a network with gaps, tags and channels of every role.

B items · I items · C channels · G targets · N patches · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from laws import CAPS, SAME, assert_close, edit_after, network_of, patch_bounds, run
from networks import (
    ALARM,
    FORECAST,
    LENGTHS,
    LOAD,
    MODE,
    PATCH_STEPS,
    PRICE,
    ROUTER_CHOICES,
    VALVE,
    WIND,
    leaves,
    make_future,
    make_panel,
    make_store,
    policy_for,
    read_all,
)

from hamts.data.panel import Panel
from hamts.data.patches import build_store
from hamts.reader import HAMNetwork

WINDOWS = (1, 2, 3)


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize("window", WINDOWS)
def test_edits_of_the_future_never_change_the_past(router: str, window: int) -> None:
    network, panel = network_of(router, window), make_panel(seed=3)
    store = make_store(panel)
    for seed, before_end in ((0, 5), (1, 1)):
        index, steps = patch_bounds(store, before_end)
        edited = make_store(edit_after(panel, steps, np.random.default_rng(seed)))
        policy = policy_for(network, 3, **CAPS)
        one, other = read_all(network, store, policy), read_all(network, edited, policy)
        assert not torch.equal(one.quantiles[:, :, index:], other.quantiles[:, :, index:])
        for name in ("quantiles", "mean", "scale", "heard"):
            mine, theirs = getattr(one, name)[:, :, :index], getattr(other, name)[:, :, :index]
            # entries of the future make the read's products longer, which may round otherwise
            assert_close(mine, theirs, 1e-12, name)
        for mine, theirs in zip(one.traces, other.traces, strict=True):
            assert_close(mine.scores[:, :, :index], theirs.scores[:, :, :index], 1e-10, "scores")
            assert torch.equal(mine.threshold, theirs.threshold)
            for name in ("by_score", "must_keep", "routed"):
                assert torch.equal(getattr(mine, name)[:, :, :index], getattr(theirs, name)[:, :, :index]), name


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("dtype", SAME)
def test_past_is_equal_to_the_bit_at_equal_shapes(share: float, dtype: torch.dtype) -> None:
    network, panel = network_of("learned+tags", 2, dtype), make_panel(seed=4)
    store = make_store(panel)
    index, steps = patch_bounds(store, 4)
    # where nothing is kept any edit leaves the shapes alone, elsewhere what is observed must stay so
    edited = make_store(edit_after(panel, steps, np.random.default_rng(0), same_mask=share > 0))
    policy = policy_for(network, 3, share=share, use_tags=share > 0)
    one, other = read_all(network, store, policy), read_all(network, edited, policy)
    assert one.memory.layers[0].scratchpad.alive.shape == other.memory.layers[0].scratchpad.alive.shape
    assert not torch.equal(one.quantiles[:, :, index:], other.quantiles[:, :, index:])
    for name in ("quantiles", "mean", "scale"):
        assert torch.equal(getattr(one, name)[:, :, :index], getattr(other, name)[:, :, :index]), name
    for mine, theirs in zip(one.traces, other.traces, strict=True):
        assert torch.equal(mine.scores[:, :, :index], theirs.scores[:, :, :index])
        assert torch.equal(mine.routed[:, :, :index], theirs.routed[:, :, :index])


@pytest.mark.parametrize("router", ROUTER_CHOICES)
def test_memory_at_a_step_knows_nothing_after_it(router: str) -> None:
    network, panel = network_of(router), make_panel(seed=5)
    store = make_store(panel)
    ends = store.lengths.numpy() - 10
    edited = make_store(edit_after(panel, ends.tolist(), np.random.default_rng(0)))
    none = [np.array([], dtype=int)] * 3
    policy = policy_for(network, 3, **CAPS)
    one = run(network, store, policy, cutoffs=none, ends=ends)
    other = run(network, edited, policy, cutoffs=none, ends=ends)
    assert one.memory is not None and other.memory is not None
    for (name, mine), theirs in zip(leaves(one.memory).items(), leaves(other.memory).values(), strict=True):
        assert torch.equal(mine, theirs), name


def forecasts(network: HAMNetwork, panel: Panel, future: np.ndarray, cutoffs: list[int], **options: Any) -> np.ndarray:
    store = build_store(panel, patch_steps=PATCH_STEPS, extra_steps=future.shape[1], future=future)
    asked = [np.array([cutoff]) for cutoff in cutoffs]
    return run(network, store, policy_for(network, 3), cutoffs=asked, steps=5, **options).quantiles


def test_a_forecast_reads_nothing_unknown_at_its_cutoff() -> None:
    network, panel = network_of(), make_panel(seed=6)
    cutoffs = [n - 11 for n in LENGTHS]
    future = make_future(panel)
    wanted = forecasts(network, panel, future, cutoffs)
    changed = edit_after(panel, cutoffs, np.random.default_rng(0))
    # what is known ahead stays within the horizon, and changes beyond it
    for item, cutoff in enumerate(cutoffs):
        rows = slice(panel.offsets[item] + cutoff, panel.offsets[item] + cutoff + 5)
        changed.values[rows, FORECAST] = panel.values[rows, FORECAST]
        changed.values[rows, VALVE] = panel.values[rows, VALVE]
    got = forecasts(network, changed, future + 9, cutoffs)
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("channel, reveal, matters", [
    (LOAD, False, False), (PRICE, False, False), (WIND, False, False), (MODE, True, False), (ALARM, False, False),
    (ALARM, True, True), (FORECAST, False, True), (VALVE, False, True),
])  # fmt: skip
def test_a_forecast_reads_what_is_known_ahead_and_only_that(channel: int, reveal: bool, matters: bool) -> None:
    network, panel = network_of(), make_panel(seed=6)
    cutoffs = [n - 11 for n in LENGTHS]
    future = make_future(panel)
    wanted = forecasts(network, panel, future, cutoffs, reveal_events=reveal)
    values = panel.values.copy()
    for item, cutoff in enumerate(cutoffs):
        values[panel.offsets[item] + cutoff + 4, channel] = 2.5 if channel != MODE else 1
    got = forecasts(network, replace(panel, values=values), future, cutoffs, reveal_events=reveal)
    assert np.array_equal(got, wanted) != matters


def test_a_forecast_at_the_end_reads_the_future_given_and_no_step_more() -> None:
    network, panel = network_of(), make_panel(seed=6)
    future = make_future(panel)
    later, sooner = future.copy(), future.copy()
    later[:, 5:] += 3
    sooner[:, 4] += 3
    wanted = forecasts(network, panel, future, list(LENGTHS))
    assert np.array_equal(forecasts(network, panel, later, list(LENGTHS)), wanted)
    assert not np.array_equal(forecasts(network, panel, sooner, list(LENGTHS)), wanted)
