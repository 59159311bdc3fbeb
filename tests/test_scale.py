"""The causal normaliser against plain loops.

B items · C channels · G targets · N patches · P steps in a patch · L half-lives
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from networks import leaves

from hamts.data.scale import CausalScale, ScaleState, ScaleStats

SEEDS = range(20)
HALF_LIVES = (5.0, 20.0)
PATCH_STEPS = 3


def make_rule(channels: int = 2, *, unit: float = 1.0, adaptive: bool = True) -> CausalScale:
    return CausalScale(
        half_lives=HALF_LIVES,
        unit=torch.full((channels,), unit, dtype=torch.float64),
        adaptive=torch.full((channels,), adaptive),
    )


def make_stream(seed: int, *, patches: int = 14, missing: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [B, C, N, P] about a level of 50, and which are observed; the last channel of item 0 never is."""
    generator = torch.Generator().manual_seed(seed)
    values = 50 + torch.randn(2, 2, patches, PATCH_STEPS, generator=generator, dtype=torch.float64).cumsum(2)
    observed = torch.rand(values.shape, generator=generator) >= missing
    observed[0, 1] = False
    observed[1, 1, :5] = False
    return values, observed


def make_demand(seed: int, *, patches: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets that keep lying at their least value, at their greatest, at both, or at none; [2, 2, N, P]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 2, patches, PATCH_STEPS, generator=generator, dtype=torch.float64)
    values[0, 0].clamp_(min=0.3)
    values[0, 1].clamp_(max=0.0)
    values[1, 0].clamp_(min=-0.1, max=0.1)
    return values, torch.rand(values.shape, generator=generator) >= 0.3


def loop_bounds(series: np.ndarray, half_life: float) -> tuple[list[float], list[float], list[float], list[float]]:
    """Bounds and the shares at them at every patch's end, from all values so far."""
    decay = 0.5 ** (1 / half_life)
    found: tuple[list[float], ...] = ([], [], [], [])
    for end in range(PATCH_STEPS, len(series) + 1, PATCH_STEPS):
        seen = series[:end][~np.isnan(series[:end])]
        weights = decay ** np.arange(len(seen))[::-1]
        for number, sign in ((0, 1.0), (1, -1.0)):
            at = weights[sign * seen == (sign * seen).min()].sum() if len(seen) else 0.0
            share = at / weights.sum() if len(seen) else 0.0
            touches = 0
            for patch in series[:end].reshape(-1, PATCH_STEPS):
                here = sign * patch[~np.isnan(patch)]
                touches += len(here) > 0 and here.min() == (sign * seen).min() and here.max() > here.min()
            holds = at >= 8 and share >= 0.05 and seen.max() > seen.min() and touches >= 3
            found[number].append(sign * (sign * seen).min() if holds else -sign * math.inf)
            found[2 + number].append(share if holds else 0.0)
    return found  # type: ignore[return-value]


def read(rule: CausalScale, values: torch.Tensor, observed: torch.Tensor) -> tuple[ScaleStats, ScaleState]:
    return rule.advance(values, observed, rule.empty(len(values)))


def loop(series: np.ndarray, half_life: float) -> tuple[list[float], list[float]]:
    """Mean and deviation at every patch's end, one step after the other; NaN before the first value."""
    decay = 0.5 ** (1 / half_life)
    weights = np.zeros(0)
    seen: list[float] = []
    means, deviations = [], []
    for step, value in enumerate(series):
        weights = weights * decay
        if not math.isnan(value):
            seen.append(value)
            weights = np.append(weights, 1.0)
        if step % PATCH_STEPS == PATCH_STEPS - 1:
            if not seen:
                means.append(math.nan)
                deviations.append(math.nan)
                continue
            mean = float(np.average(seen, weights=weights))
            means.append(mean)
            deviations.append(float(np.sqrt(np.average((np.array(seen) - mean) ** 2, weights=weights))))
    return means, deviations


@pytest.mark.parametrize("seed", SEEDS)
def test_statistics_equal_a_plain_loop(seed: int) -> None:
    rule = make_rule()
    values, observed = make_stream(seed)
    stats, _ = read(rule, values, observed)
    for b in range(2):
        for c in range(2):
            series = torch.where(observed[b, c], values[b, c], torch.nan).flatten().numpy()
            for number, half_life in enumerate(HALF_LIVES):
                means, deviations = (np.array(x) for x in loop(series, half_life))
                unseen = np.isnan(means)
                got_mean, got_scale = stats.mean[b, c, :, number].numpy(), stats.scale[b, c, :, number].numpy()
                assert np.allclose(got_mean[~unseen], means[~unseen], rtol=1e-12)
                assert np.allclose(got_scale[~unseen], np.maximum(deviations[~unseen], 1e-3), rtol=1e-9)
                # nothing is known before the first value, not even the value itself
                assert (got_mean[unseen] == 0).all() and (got_scale[unseen] == 1e-3).all()


def test_statistics_equal_those_of_pandas() -> None:
    rule = make_rule()
    values, observed = make_stream(3)
    stats, _ = read(rule, values, observed)
    series = pd.Series(torch.where(observed[1, 0], values[1, 0], torch.nan).flatten().numpy())
    for number, half_life in enumerate(HALF_LIVES):
        window = series.ewm(halflife=half_life, adjust=True, ignore_na=False)
        ends = slice(PATCH_STEPS - 1, None, PATCH_STEPS)
        assert np.allclose(stats.mean[1, 0, :, number], window.mean()[ends], rtol=1e-12)
        assert np.allclose(stats.scale[1, 0, :, number], window.std(bias=True)[ends], rtol=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_chunks_give_the_statistics_of_one(seed: int) -> None:
    rule = make_rule()
    values, observed = make_stream(seed)
    whole, after = read(rule, values, observed)
    state, means, scales, offsets = rule.empty(2), [], [], []
    for low, high in ((0, 1), (1, 4), (4, 13), (13, 14)):
        stats, state = rule.advance(values[:, :, low:high], observed[:, :, low:high], state)
        means.append(stats.mean)
        scales.append(stats.scale)
        offsets.append(stats.offset)
    assert torch.allclose(torch.cat(means, 2), whole.mean, rtol=1e-13)
    assert torch.allclose(torch.cat(scales, 2), whole.scale, rtol=1e-11)
    assert torch.allclose(torch.cat(offsets, 2), whole.offset, rtol=1e-12, atol=1e-12)
    assert torch.equal(state.reference, after.reference) and torch.equal(state.known, after.known)
    assert torch.allclose(state.sums, after.sums, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_statistics_know_nothing_of_what_comes_later(seed: int) -> None:
    rule = make_rule()
    values, observed = make_stream(seed)
    here = 1 + seed % 13
    other_values, other_observed = values.clone(), observed.clone()
    other_values[:, :, here:] = -1e6
    other_observed[:, :, here:] = ~observed[:, :, here:]
    one, two = read(rule, values, observed)[0], read(rule, other_values, other_observed)[0]
    for name in ("mean", "scale", "offset"):
        assert torch.equal(getattr(one, name)[:, :, :here], getattr(two, name)[:, :, :here]), name


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_steps_are_ignored_whatever_stands_there(seed: int) -> None:
    rule = make_rule()
    values, observed = make_stream(seed)
    dirty = torch.where(observed, values, torch.tensor([torch.nan, 1e300, -7.0], dtype=torch.float64))
    got, wanted = (leaves(read(rule, each, observed)) for each in (dirty, values))
    for name, tensor in wanted.items():
        assert torch.equal(got[name], tensor), name


def test_a_gap_of_any_length_changes_no_statistic() -> None:
    rule = make_rule()
    values, observed = make_stream(1, missing=0.0)
    stats, state = read(rule, values, observed)
    gap = torch.zeros(2, 2, 64, PATCH_STEPS, dtype=torch.float64)
    # as long as 7000 half-lives: weights of 2**-7000 are no numbers
    for _ in range(190):
        during, state = rule.advance(gap, gap.bool(), state)
        assert torch.allclose(during.mean, stats.mean[:, :, -1:].expand_as(during.mean), rtol=1e-9)
        assert torch.allclose(during.scale, stats.scale[:, :, -1:].expand_as(during.scale), rtol=1e-6)
    assert state.known.tolist() == [[True, False], [True, True]]
    later, _ = rule.advance(values[:, :, :1] + 500, observed[:, :, :1], state)
    assert (later.mean[:, 0, 0, 0] > 540).all() and (later.mean[:, 0, 0, 0] < 560).all()


@pytest.mark.parametrize("shift", [0.0, 1e6, -1e9])
@pytest.mark.parametrize("factor", [1.0, 1e3, 1e6])
def test_statistics_move_with_shift_and_scale(factor: float, shift: float) -> None:
    rule = make_rule()
    values, observed = make_stream(5)
    plain, moved = read(rule, values, observed)[0], read(rule, factor * values + shift, observed)[0]
    # the first patches of a stream may hold one value, which says nothing of its scale
    wide = plain.scale > 1e-2
    assert int(wide.sum()) > 70
    assert torch.allclose(moved.scale[wide], factor * plain.scale[wide], rtol=1e-6)
    assert torch.allclose(moved.offset / factor, plain.offset, atol=1e-6)
    heard = observed.flatten(2).cumsum(-1)[..., PATCH_STEPS - 1 :: PATCH_STEPS] > 0
    assert torch.allclose(moved.mean[heard], factor * plain.mean[heard] + shift, rtol=1e-12)


def test_scale_of_a_constant_is_the_floor() -> None:
    rule = make_rule(unit=40.0)
    values = torch.full((1, 2, 5, PATCH_STEPS), 7.25, dtype=torch.float64)
    stats, _ = read(rule, values, torch.ones_like(values, dtype=torch.bool))
    assert (stats.mean == 7.25).all() and (stats.offset == 0).all()
    assert torch.allclose(stats.scale, torch.tensor(40.0 * 1e-3, dtype=torch.float64))


def test_a_channel_that_is_only_divided_ignores_its_history() -> None:
    rule = make_rule(unit=4.0, adaptive=False)
    values, observed = make_stream(6)
    stats, _ = read(rule, values, observed)
    assert (stats.mean == 0).all() and (stats.scale == 4.0).all() and (stats.offset == 0).all()


def test_large_offset_costs_no_digits() -> None:
    rule = make_rule()
    values, observed = make_stream(7, missing=0.0)
    far = values + 2.0**40
    stats, other = read(rule, values, observed)[0], read(rule, far, observed)[0]
    # the values themselves keep 13 bits below the point
    assert torch.allclose(other.scale[:, 0], stats.scale[:, 0], rtol=1e-3)
    assert torch.allclose(other.offset, stats.offset, atol=1e-3)


def bounded_rule() -> CausalScale:
    return replace(make_rule(), targets=(0, 1))


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_are_the_extremes_at_which_a_stream_keeps_lying(seed: int) -> None:
    values, observed = make_demand(seed)
    stats, _ = read(bounded_rule(), values, observed)
    for b in range(2):
        for c in range(2):
            series = torch.where(observed[b, c], values[b, c], torch.nan).flatten().numpy()
            low, high, low_share, high_share = loop_bounds(series, HALF_LIVES[-1])
            assert stats.bounds[b, c].T.tolist() == [low, high]
            assert np.allclose(stats.bound_share[b, c].T, [low_share, high_share], rtol=1e-12)
    # as they were made: below, above, both, none
    shown = stats.bounds.isfinite().any(2).flatten(0, 1).tolist()
    assert shown == [[True, False], [False, True], [True, True], [False, False]]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_chunks_give_the_same_bounds_and_later_values_none(seed: int) -> None:
    rule = bounded_rule()
    values, observed = make_demand(seed)
    whole, after = read(rule, values, observed)
    state, parts = rule.empty(2), []
    for low, high in ((0, 1), (1, 13), (13, 14), (14, 30)):
        stats, state = rule.advance(values[:, :, low:high], observed[:, :, low:high], state)
        parts.append(stats)
    assert torch.equal(torch.cat([part.bounds for part in parts], 2), whole.bounds)
    shares = torch.cat([part.bound_share for part in parts], 2)
    assert torch.allclose(shares, whole.bound_share, rtol=1e-12)
    assert torch.equal(state.extreme, after.extreme) and torch.allclose(state.atoms, after.atoms, rtol=1e-12)
    changed = values.clone()
    changed[:, :, 17:] *= -3
    assert torch.equal(read(rule, changed, observed)[0].bounds[:, :, :17], whole.bounds[:, :, :17])


def test_a_staircase_has_no_bound_at_its_present_step() -> None:
    rule = bounded_rule()
    patches = 60
    steps = torch.arange(patches * PATCH_STEPS).view(patches, PATCH_STEPS)
    climbing = (steps // (10 * PATCH_STEPS + 1)).double()  # a record that holds for ten patches, then the next
    values = torch.stack([climbing, -climbing])[:, None].expand(2, 2, -1, -1)
    stats, _ = read(rule, values, torch.ones_like(values, dtype=torch.bool))
    assert not stats.bounds.isfinite().any()


def test_a_gap_wears_no_bound_away() -> None:
    rule = bounded_rule()
    values, observed = make_demand(2)
    stats, state = read(rule, values, observed)
    gap = torch.zeros(2, 2, 400, PATCH_STEPS, dtype=torch.float64)
    during, after = rule.advance(gap, gap.bool(), state)
    assert torch.equal(during.bounds, stats.bounds[:, :, -1:].expand_as(during.bounds))
    assert torch.allclose(during.bound_share, stats.bound_share[:, :, -1:].expand_as(during.bound_share))
    assert torch.equal(after.atoms, state.atoms)


def test_a_stream_that_never_moved_shows_no_bound() -> None:
    values = torch.full((1, 2, 20, PATCH_STEPS), 7.25, dtype=torch.float64)
    stats, _ = read(bounded_rule(), values, torch.ones_like(values, dtype=torch.bool))
    assert not stats.bounds.isfinite().any() and not stats.bound_share.any()
