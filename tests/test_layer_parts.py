"""The parts of the HAM layer by hand.

B items · C channels · N patches · H heads · K key · M entries · S score routers · A shares of the table · Q quantiles
"""

from __future__ import annotations

import math

import pytest
import torch
from networks import leaves, perturb

from hamts.nn.budget import FOLLOW_EXACTLY_STEPS, SHARES, ThresholdTable, entry_caps
from hamts.nn.ham import rotate
from hamts.nn.head import QuantileHead, interpolate_quantiles, pinball, quantile_mean
from hamts.nn.router import (
    BIAS_FLOOR,
    ERROR_HALF_LIFE_TOKENS,
    causal_error_mean,
    innovation,
    kept_probability,
    log_bias,
    surprise,
)
from hamts.nn.scratchpad import NEVER, Entries, append_candidates, lifetimes, merge_candidates

SEEDS = range(20)


def make_entries(alive: list[list[bool]], must_keep: list[list[bool]] | None = None, *, first: float = 0.0) -> Entries:
    """Entries that carry their number, counted from ``first``, in every field."""
    there = torch.tensor(alive, dtype=torch.bool)
    B, M = there.shape
    number = (first + torch.arange(M, dtype=torch.float64)).expand(B, M)
    return Entries(
        keys=number[..., None, None].expand(B, M, 2, 3),
        values=-number[..., None, None].expand(B, M, 2, 3),
        marks=number[..., None].expand(B, M, 3),
        bias=number / 10,
        score=number / 100,
        channel=number.long() % 3,
        position=number,
        must_keep=torch.zeros_like(there) if must_keep is None else torch.tensor(must_keep, dtype=torch.bool),
        alive=there,
    )


# ---- the scratchpad


def test_first_in_first_out_ends_an_entry_when_its_list_is_full() -> None:
    entries = make_entries(
        [[True, True, True, True, True, True, False]], [[False, True, False, True, False, False, False]]
    )
    visible_from = torch.tensor([[0, 0, 2, 3, 3, 7, 0]])
    until = lifetimes(entries, visible_from, cap_kept=2, cap_must=1)
    # kept by score are 0, 2, 4, 5: the third ends the first, the fourth the second; tagged are 1, 3
    assert until[0, :6].tolist() == [3, 3, 7, NEVER, NEVER, NEVER]


def test_lifetimes_at_the_ends_of_the_caps() -> None:
    entries = make_entries([[True, True, True]], [[False, True, False]])
    visible_from = torch.tensor([[0, 1, 4]])
    assert lifetimes(entries, visible_from, cap_kept=None, cap_must=None).tolist() == [[NEVER] * 3]
    # a cap of nothing: ends as it begins
    assert lifetimes(entries, visible_from, cap_kept=0, cap_must=0).tolist() == [[0, 1, 4]]
    assert lifetimes(entries, visible_from, cap_kept=9, cap_must=9).tolist() == [[NEVER] * 3]
    nothing = make_entries([[], []])
    assert lifetimes(nothing, torch.zeros(2, 0, dtype=torch.int64), cap_kept=1, cap_must=1).shape == (2, 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_list_ever_exceeds_its_cap_and_none_is_left_unfilled(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B, M = 3, 17
    alive = torch.rand(B, M, generator=generator) < 0.8
    must = torch.rand(B, M, generator=generator) < 0.4
    entries = make_entries(alive.tolist(), must.tolist())
    visible_from = torch.randint(0, 9, (B, M), generator=generator).sort(1).values
    caps = {False: int(torch.randint(0, 5, (1,), generator=generator)), True: seed % 4}
    until = lifetimes(entries, visible_from, cap_kept=caps[False], cap_must=caps[True])
    for b in range(B):
        for query in range(12):
            for kind, cap in caps.items():
                appeared = [m for m in range(M) if alive[b, m] and must[b, m] == kind and visible_from[b, m] <= query]
                seen = [m for m in appeared if until[b, m] > query]
                assert seen == (appeared[-cap:] if cap else []), f"item {b}, query {query}"


def test_merging_closes_the_gaps_and_keeps_the_order() -> None:
    kept = make_entries([[True, False, True], [False, False, True]], first=0)
    local = make_entries([[False, True, True, False], [True, False, False, False]], first=10)
    merged, origin = merge_candidates(kept, local)
    assert merged.alive.tolist() == [[True] * 4, [True, True, False, False]]
    assert merged.position[0].tolist() == [0, 2, 11, 12]
    assert merged.position[1, :2].tolist() == [2, 10]
    assert origin.tolist() == [[-1, -1, 1, 2], [-1, 0, -1, -1]]
    for name, scale in (("bias", 0.1), ("score", 0.01)):
        assert torch.allclose(getattr(merged, name)[0], merged.position[0] * scale)
    assert torch.equal(merged.keys[0, :, 1, 2], merged.position[0])
    assert torch.equal(merged.values[0, :, 0, 1], -merged.position[0])
    assert torch.equal(merged.channel[0], merged.position[0].long() % 3)


def test_appending_leaves_the_kept_where_they_are() -> None:
    kept = make_entries([[True, False, True], [False, False, True]], first=0)
    local = make_entries([[False, True, True, False], [True, False, False, False]], first=10)
    joined, origin = append_candidates(kept, local)
    assert joined.alive.tolist() == [[True, False, True, True, True], [False, False, True, True, False]]
    assert joined.position[joined.alive].tolist() == [0, 2, 11, 12, 2, 10]
    assert origin.tolist() == [[-1, -1, -1, 1, 2], [-1, -1, -1, 0, -1]]


@pytest.mark.parametrize("alive", [[[False, False]], [[]]])
def test_merging_nothing_gives_nothing(alive: list[list[bool]]) -> None:
    merged, origin = merge_candidates(make_entries(alive), make_entries([[False, False, False]]))
    assert merged.keys.shape == (1, 0, 2, 3)
    assert origin.shape == (1, 0)


def test_bytes_of_an_entry_are_those_of_its_tensors() -> None:
    full = make_entries([[True] * 5, [True] * 5])
    stored = sum(leaf.contiguous().numel() * leaf.element_size() for leaf in leaves(full).values())
    assert full.bytes_per_entry() * 10 == stored
    assert make_entries([[]]).bytes_per_entry() == full.bytes_per_entry()


def test_caps_fit_the_budget_in_every_layer() -> None:
    assert entry_caps(budget_bytes=1000, bytes_per_entry=10, layers=4, must_keep_share=0.4) == (15, 10)
    assert entry_caps(budget_bytes=39, bytes_per_entry=10, layers=4, must_keep_share=0.4) == (0, 0)
    assert entry_caps(budget_bytes=400, bytes_per_entry=10, layers=4, must_keep_share=1.0) == (0, 10)


# ---- thresholds


def table_of(values: list[list[float]]) -> ThresholdTable:
    table = ThresholdTable(len(values)).double()
    table.values.copy_(torch.tensor(values, dtype=torch.float64))
    return table


def test_thresholds_are_those_of_the_table_at_its_shares_and_between_them() -> None:
    row = [9.0, 7.0, 6.0, 4.0, 1.0, -2.0]
    table = table_of([row])
    got = table(torch.tensor(SHARES, dtype=torch.float64))
    assert torch.allclose(got[:, 0], torch.tensor(row, dtype=torch.float64))
    # half way in log-odds between 25 % and 50 %
    odds = math.sqrt(1 / 3)
    middle = table(torch.tensor([odds / (1 + odds)], dtype=torch.float64))
    assert middle.item() == pytest.approx(2.5)
    # beyond the table it goes on as between its last two
    odds = 9.0
    beyond = table(torch.tensor([odds / (1 + odds)], dtype=torch.float64))
    assert beyond.item() == pytest.approx(-5.0)


def test_share_nothing_keeps_nothing_and_share_one_keeps_all() -> None:
    for scores in (1, 2):
        table = table_of([[9.0, 7.0, 6.0, 4.0, 1.0, -2.0]] * scores)
        got = table(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
        assert got.shape == (3, scores)
        assert (got[0] == math.inf).all() and (got[2] == -math.inf).all() and got[1].isfinite().all()


def test_each_of_two_routers_gets_half_of_the_share() -> None:
    one, two = table_of([[9.0, 7.0, 6.0, 4.0, 1.0, -2.0]]), table_of([[9.0, 7.0, 6.0, 4.0, 1.0, -2.0]] * 2)
    half, whole = (torch.tensor([share], dtype=torch.float64) for share in (0.25, 0.5))
    assert torch.allclose(two(whole), one(half).expand(1, 2))


@pytest.mark.parametrize("seed", SEEDS)
def test_a_higher_share_never_has_a_higher_threshold(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = ThresholdTable(2).double()
    table.calibrate(torch.randn(300, 2, generator=generator, dtype=torch.float64).exp())
    got = table(torch.linspace(0, 1, 101, dtype=torch.float64))
    assert (got[1:] <= got[:-1]).all()


@pytest.mark.parametrize("share", SHARES)
def test_a_calibrated_threshold_keeps_the_share_asked_for(share: float) -> None:
    scores = torch.randn(4001, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    table = ThresholdTable(1).double()
    table.calibrate(scores)
    kept = (scores >= table(torch.tensor([share], dtype=torch.float64))).double().mean()
    assert float(kept) == pytest.approx(share, abs=1e-3)


def test_thresholds_follow_the_first_batches_exactly_and_later_ones_slowly() -> None:
    table, scores = ThresholdTable(1).double(), torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
    for shift in range(FOLLOW_EXACTLY_STEPS):
        table.follow(scores + shift)
    exact = torch.tensor([[1.0 - share for share in SHARES]], dtype=torch.float64) + FOLLOW_EXACTLY_STEPS - 1
    assert torch.allclose(table.values, exact)
    table.follow(scores + FOLLOW_EXACTLY_STEPS + 19)
    assert torch.allclose(table.values, exact + 0.05 * 20)
    before = table.values.clone()
    table.follow(scores[:0])
    table.calibrate(scores[:0])
    assert torch.equal(table.values, before)


# ---- scores


def test_surprise_by_hand() -> None:
    came = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [0.0, 0.0]])
    predicted = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [0.0, 3.0], [1e-4, 0.0], [1.0, 0.0]])
    # right, opposite, unrelated; 1 where nothing was predicted, or nothing came
    assert torch.allclose(surprise(predicted, came), torch.tensor([0.0, 2.0, 1.0, 1.0, 1.0]))


def test_innovation_by_hand() -> None:
    squared, mean = torch.tensor([8.0, 8.0, 0.0]), torch.tensor([2.0, 0.0, 4.0])
    assert innovation(squared, mean).tolist() == [4.0, 1.0, 0.0]


def loop_error_mean(
    squared: torch.Tensor, observed: torch.Tensor, carried: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The running mean before each token, one token after the other."""
    decay = 0.5 ** (1 / ERROR_HALF_LIFE_TOKENS)
    total, weight = carried[..., 0].clone(), carried[..., 1].clone()
    means = []
    for n in range(squared.shape[2]):
        means.append(torch.where(weight > 0, total / weight.clamp_min(1e-300), 0.0))
        there = observed[:, :, n, None].double()
        total, weight = decay * total + there * squared[:, :, n], decay * weight + there
    return torch.stack(means, 2), torch.stack([total, weight], -1)


@pytest.mark.parametrize("seed", SEEDS)
def test_running_error_equals_a_loop_in_any_chunks(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    squared = torch.rand(2, 3, 40, 2, generator=generator, dtype=torch.float64)
    observed = torch.rand(2, 3, 40, generator=generator) < 0.6
    wanted, after = loop_error_mean(squared, observed, torch.zeros(2, 3, 2, 2, dtype=torch.float64))
    carried, parts = torch.zeros(2, 3, 2, 2, dtype=torch.float64), []
    for low, high in ((0, 1), (1, 18), (18, 40)):
        mean, carried = causal_error_mean(squared[:, :, low:high], observed[:, :, low:high], carried)
        parts.append(mean)
    assert torch.allclose(torch.cat(parts, 2), wanted, rtol=1e-12)
    assert torch.allclose(carried, after, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_error_outlasts_any_gap(dtype: torch.dtype) -> None:
    squared = torch.full((1, 1, 64, 1), 3.0, dtype=dtype)
    heard, gap = torch.ones(1, 1, 64, dtype=torch.bool), torch.zeros(1, 1, 64, dtype=torch.bool)
    _, carried = causal_error_mean(squared, heard, torch.zeros(1, 1, 1, 2, dtype=dtype))
    for _ in range(400):
        mean, carried = causal_error_mean(squared * 100, gap, carried)
        assert torch.allclose(mean, squared)
    after, _ = causal_error_mean(squared * 2, heard, carried)
    assert after[0, 0, 0, 0] == pytest.approx(3.0)
    assert after[0, 0, -1, 0] == pytest.approx(6.0)


def test_bias_is_the_log_of_the_kept_probability_down_to_a_floor() -> None:
    logits = torch.tensor([-50.0, -2.0, 0.0, 3.0, 50.0], dtype=torch.float64)
    bias = log_bias(logits)
    assert bias[0] == pytest.approx(BIAS_FLOOR) and bias[-1] == pytest.approx(0.0)
    assert (bias.diff() > 0).all()
    assert torch.allclose(kept_probability(bias)[1:4], logits[1:4].sigmoid())


# ---- rotary time


def test_only_differences_of_time_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 1, 2, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    products = []
    for start in (0.0, 3.25, 1e6, 123_456_789.5):
        moved = [rotate(x, torch.tensor([[start + t]], dtype=torch.float64)) for x, t in ((query, 0.0), (key, 7.5))]
        products.append((moved[0] * moved[1]).sum(-1))
    for product in products[1:]:
        assert torch.allclose(product, products[0], atol=1e-6)
    apart = rotate(key, torch.tensor([[8.5]], dtype=torch.float64))
    assert not torch.allclose((query * apart).sum(-1), products[0], atol=1e-3)


def test_large_times_are_as_exact_as_small_ones_in_float32() -> None:
    x = torch.ones(1, 1, 1, 1, 16)
    # the fastest pair turns once in four patches, so a million of them is a whole number of turns
    far = rotate(x, torch.tensor([[1_000_000.25]], dtype=torch.float64))
    near = rotate(x, torch.tensor([[0.25]], dtype=torch.float64))
    assert torch.allclose(far[..., [0, 4]], near[..., [0, 4]], atol=1e-6)


def test_rotation_keeps_lengths_and_half_of_each_head() -> None:
    x = torch.randn(2, 5, 3, 2, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    turned = rotate(x, torch.arange(10, dtype=torch.float64).view(2, 5) * 17.5)
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[..., 8:], x[..., 8:])
    assert not torch.allclose(turned[..., :8], x[..., :8])
    narrow = x[..., :2]
    assert torch.equal(rotate(narrow, torch.ones(2, 5, dtype=torch.float64)), narrow)


# ---- the head


LEVELS = (0.05, 0.2, 0.5, 0.7, 0.99)


@pytest.mark.parametrize("seed", SEEDS)
def test_quantiles_never_cross_and_the_middle_one_is_the_median(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = QuantileHead(6, 3, LEVELS).double()
    perturb(head, generator, size=3.0)
    hidden = 10 * torch.randn(4, 6, generator=generator, dtype=torch.float64)
    quantiles = head(hidden)
    assert quantiles.shape == (4, 3, 5)
    assert (quantiles.diff(dim=-1) >= 0).all()
    raw = head.project(hidden).unflatten(-1, (3, 5))
    assert torch.equal(quantiles[..., 2], raw[..., 2])
    gap = torch.nn.functional.softplus(raw)
    assert torch.allclose(quantiles[..., 4], raw[..., 2] + gap[..., 3] + gap[..., 4])
    assert torch.allclose(quantiles[..., 0], raw[..., 2] - gap[..., 1] - gap[..., 0])


def test_mean_of_the_quantile_function_by_hand_and_by_integration() -> None:
    quantiles = torch.tensor([-3.0, -1.0, 0.5, 2.0, 7.0], dtype=torch.float64)
    grid = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    right = torch.searchsorted(torch.tensor(LEVELS, dtype=torch.float64), grid).clamp(1, 4)
    level = torch.tensor(LEVELS, dtype=torch.float64)
    weight = ((grid - level[right - 1]) / (level[right] - level[right - 1])).clamp(0, 1)
    function = quantiles[right - 1] + weight * (quantiles[right] - quantiles[right - 1])
    assert quantile_mean(quantiles, LEVELS).item() == pytest.approx(function.mean().item(), abs=1e-6)
    assert quantile_mean(torch.full((2, 5), 4.0), LEVELS).tolist() == pytest.approx([4.0, 4.0])


def test_other_levels_are_interpolated_and_none_beyond_the_trained_ones() -> None:
    quantiles = torch.tensor([[-3.0, -1.0, 0.5, 2.0, 7.0]], dtype=torch.float64)
    got = interpolate_quantiles(quantiles, LEVELS, (0.05, 0.125, 0.5, 0.6, 0.99))
    assert got[0].tolist() == pytest.approx([-3.0, -2.0, 0.5, 1.25, 7.0])
    with pytest.raises(ValueError, match=r"within the trained levels 0.05 to 0.99. Got \[0.04\]"):
        interpolate_quantiles(quantiles, LEVELS, (0.5, 0.04))


def test_quantile_loss_by_hand() -> None:
    levels = torch.tensor([0.1, 0.5], dtype=torch.float64)
    quantiles = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    # 2 x mean of .9 x (1 - 0) and .5 x (2 - 0), then of .1 x 3 and .5 x 2
    assert pinball(quantiles, torch.tensor([0.0]).double(), levels).item() == pytest.approx(0.9 + 1.0)
    assert pinball(quantiles, torch.tensor([4.0]).double(), levels).item() == pytest.approx(0.3 + 1.0)
