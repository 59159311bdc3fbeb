"""Laws 7 to 9 and gradients: shift and scale, the ops that are used, and the same bytes again.

On a network with gaps, tags and channels of every role.

B items · I items · C channels · G targets · N patches · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from laws import CAPS, SAME, assert_close, assert_same_memory, network_of, run
from networks import (
    HORIZON,
    LENGTHS,
    LOAD,
    PRICE,
    ROUTER_CHOICES,
    leaves,
    make_config,
    make_network,
    make_panel,
    make_store,
    policy_for,
    whole_chunk,
)

from hamts.ops import kernels, naive
from hamts.reader import Reading


def prices(rng: np.random.Generator) -> np.ndarray:
    """A target with gaps whose first patch says how much it varies: the floor of the scale does not move with it."""
    values = 40 + np.cumsum(rng.normal(size=sum(LENGTHS)))
    values[rng.random(len(values)) < 0.1] = np.nan
    for start in np.cumsum((0, *LENGTHS[:-1])):
        values[start : start + 4] = 40 + rng.normal(size=4)
    return values


@pytest.mark.parametrize("factor, shift", [(1.0, 1e6), (1e3, 0.0), (1e6, -1e6), (0.5, 3.0)])
@pytest.mark.parametrize("dtype", SAME)
def test_shift_and_scale_of_a_target_shift_and_scale_its_forecast(
    factor: float, shift: float, dtype: torch.dtype
) -> None:
    network, panel = network_of("learned+tags", 2, dtype), make_panel(seed=22)
    panel = replace(panel, starts=np.repeat(panel.starts[:1], 3))
    panel.values[:, PRICE] = prices(np.random.default_rng(22))
    values = panel.values.copy()
    values[:, PRICE] = factor * values[:, PRICE] + shift
    policy = policy_for(network, 3)
    one = run(network, make_store(panel), policy)
    two = run(network, make_store(replace(panel, values=values)), policy)
    back = two.quantiles.copy()
    back[:, 1] = (back[:, 1] - shift) / factor
    apart = np.abs(back - one.quantiles) / one.scale[:, :, None, None]
    # values near 1e6 keep ten digits of their own; where the network is float32, so are the levels it compares
    assert apart.max() <= (1e-6 if dtype == torch.float64 else 1e-4)
    assert np.allclose(two.scale[:, 1], factor * one.scale[:, 1], rtol=1e-6)
    assert np.allclose(two.scale[:, 0], one.scale[:, 0], rtol=1e-12)


def test_equivariance_ends_at_the_scale_floor() -> None:
    network, panel = network_of(), make_panel(seed=22)
    values = panel.values.copy()
    values[:, PRICE] = 5.0 + 1e-9 * values[:, PRICE]
    got = run(network, make_store(replace(panel, values=values)), policy_for(network, 3))
    floor = 1e-3 * float(network.unit[PRICE])
    assert np.allclose(got.scale[:, 1], floor)
    assert np.abs(got.quantiles[:, 1] - 5.0).max() < 30 * floor


@pytest.mark.parametrize("shift", [0.0, 37.3])
def test_a_stream_that_is_never_below_its_bound_has_no_forecast_below_it(shift: float) -> None:
    network, panel = network_of("learned+tags", 2, torch.float32), make_panel(seed=22)
    rng = np.random.default_rng(22)
    steps = len(panel.values)
    panel.values[:, LOAD] = shift + np.where(rng.random(steps) < 0.6, 0.0, rng.gamma(2.0, size=steps) * 3)
    got = run(network, make_store(panel), policy_for(network, 3)).quantiles[:, 0]
    assert (got >= shift).all()
    assert 0.05 < (got == shift).mean() < 0.95


@pytest.mark.parametrize("router", ["learned+tags", "surprise+learned"])
def test_network_on_fast_ops_equals_the_one_on_naive_ops(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, store = network_of(router, 3), make_store(make_panel((40, 25), seed=23))
    policy = policy_for(network, 2, **CAPS)

    def results() -> tuple[Reading, list[torch.Tensor | None]]:
        reading = network(whole_chunk(store), network.empty_memory(2), policy)
        # every quantile weighs differently, so that no mistake cancels
        weight = torch.linspace(-1, 1, reading.quantiles.numel(), dtype=torch.float64).view(reading.quantiles.shape)
        loss = (weight * reading.quantiles + 0.5 * weight * reading.quantiles**2).sum()
        return reading, list(torch.autograd.grad(loss, list(network.parameters()), allow_unused=True))

    fast, fast_grads = results()
    monkeypatch.setattr(kernels, "attend", naive.attend)
    monkeypatch.setattr(kernels, "gated_delta", naive.gated_delta)
    slow, slow_grads = results()
    assert_close(fast.quantiles, slow.quantiles, 1e-10, "quantiles")
    assert_same_memory(fast.memory, slow.memory, 1e-10)
    for (name, _), got, wanted in zip(network.named_parameters(), fast_grads, slow_grads, strict=True):
        assert (got is None) == (wanted is None), name
        if got is not None and wanted is not None:
            assert_close(got, wanted, 1e-10, f"gradient of {name}")
    for mine, other in zip(fast.traces, slow.traces, strict=True):
        assert torch.equal(mine.routed, other.routed)
        assert_close(mine.entries_mass, other.entries_mass, 1e-10, "mass")


def test_same_seed_gives_the_same_bytes_and_gradients() -> None:
    def results() -> list[torch.Tensor]:
        config = make_config(dropout=0.2)
        network, store = make_network(config, dtype=torch.float32).train(), make_store(make_panel(seed=24))
        torch.manual_seed(3)
        explore = torch.Generator().manual_seed(5)
        policy = policy_for(network, 3, explore_share=0.2, explore_generator=explore, **CAPS)
        reading = network(whole_chunk(store), network.empty_memory(3), policy)
        reading.quantiles.square().mean().backward()
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        return [reading.quantiles, *leaves(reading.memory).values(), *grads]

    for mine, other in zip(results(), results(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_gradients_are_finite_with_gaps_padding_and_empty_scratchpads(router: str, share: float) -> None:
    network, panel = network_of(router, 2, torch.float32), make_panel(seed=25)
    values = panel.values.copy()
    values[: LENGTHS[0]] = np.nan
    store = make_store(replace(panel, values=values))
    network.zero_grad()
    past = network(whole_chunk(store), network.empty_memory(3), policy_for(network, 3, share=share, **CAPS))
    horizon = store.horizon(torch.arange(3), store.lengths, HORIZON)
    ahead = network(horizon, past.memory, policy_for(network, 3, share=share))
    loss = past.quantiles.square().mean() + ahead.quantiles.square().mean()
    for trace in (*past.traces, *ahead.traces):
        loss = loss + trace.entries_bias.sum()
    loss.backward()
    moved = 0
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            moved += bool(parameter.grad.any())
    assert moved > 40
