"""Scores of the probes against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from probes.contract import ProbeBatch, generator
from probes.prequential import cache_turnover, fading_error, recovery_rows, windowed_mase
from probes.registry import get_probe
from probes.scores import (
    average_precision,
    best_floor,
    budget_area,
    bytes_at_share,
    causal_use,
    chance_any,
    corrected,
    effective_level,
    first_kept_after,
    pareto,
    query_error,
    ranks_auroc,
    selection,
    skill,
    stages,
    survival,
)
from probes.stats import holm, interquartile_mean, mean_interval, paired_difference


@pytest.fixture(scope="module")
def batch() -> ProbeBatch:
    probe, _ = get_probe("der")
    return probe.sample(generator(3), 8, probe.config("smoke"))


def test_skill_is_one_at_the_oracle_and_zero_at_the_floor() -> None:
    assert skill(0.0, floor=2.0) == 1.0
    assert skill(2.0, floor=2.0) == 0.0
    assert skill(0.75, floor=2.0, oracle=0.5) == pytest.approx(1 - 0.25 / 1.5)
    with pytest.raises(ValueError, match="must exceed the oracle's"):
        skill(1.0, floor=0.5, oracle=0.5)


def test_the_error_of_a_query_is_over_what_it_asks(batch: ProbeBatch) -> None:
    mask = batch.y_mask.clone()
    mask[0, 0] = False
    mask[1, 0, 1] = False
    part = replace(batch, y_mask=mask)
    answer = batch.y.clone()
    answer[1, 0, 0] += 3.0
    answer[1, 0, 1] += 100.0
    error = query_error(answer, part)
    assert math.isnan(float(error[0, 0]))
    assert float(error[1, 0]) == pytest.approx(9.0)
    assert float(error[2].sum()) == 0.0


def test_the_best_floor_is_the_one_with_the_least_error(batch: ProbeBatch) -> None:
    name, error = best_floor({"far": batch.y + 2.0, "near": batch.y + 1.0}, batch)
    assert name == "near"
    assert float(error.mean()) == pytest.approx(1.0)


def test_chance_is_the_hypergeometric_one() -> None:
    # 10 rows, a window of 3, 2 kept: 1 - (7 choose 2) / (10 choose 2)
    assert float(chance_any(torch.tensor(10), torch.tensor(3), torch.tensor(2))) == pytest.approx(1 - 21 / 45)
    assert float(chance_any(torch.tensor(10), torch.tensor(3), torch.tensor(8))) == 1.0
    assert float(chance_any(torch.tensor(10), torch.tensor(3), torch.tensor(0))) == pytest.approx(0.0)
    assert corrected(0.5, 0.2) == pytest.approx(0.375)
    assert math.isnan(corrected(1.0, 1.0))


def test_a_wider_window_is_easier_to_hit_and_is_corrected_for_it(batch: ProbeBatch) -> None:
    kept = torch.rand(batch.crit.shape, generator=generator(1)) < 0.2
    exact, wide = (selection(kept, batch, tolerance=n) for n in (0, 3))
    assert wide.recall(batch.asked) > exact.recall(batch.asked)
    assert float(wide.chance.mean()) > float(exact.chance.mean())
    assert abs(wide.corrected_recall(batch.asked)) < 0.25


def test_selection_by_hand(batch: ProbeBatch) -> None:
    kept = torch.zeros_like(batch.crit)
    row = int(batch.need[0, 0, 0])
    kept[0, row + 2] = True
    found = selection(kept, batch, tolerance=3)
    assert bool(found.any_row[0, 0])
    assert not bool(selection(kept, batch, tolerance=1).any_row[0, 0])
    everything = selection(batch.crit, batch)
    assert everything.recall(batch.asked) == 1.0
    assert everything.precision == 1.0
    assert everything.decoy_share == 0.0


def test_both_rows_of_a_pair_are_needed() -> None:
    probe, rung = get_probe("act/actS")
    part = probe.sample(generator(0), 4, probe.config("smoke", rung))
    kept = torch.zeros_like(part.crit)
    kept.scatter_(1, part.need[..., 0], True)
    found = selection(kept, part, tolerance=0)
    assert bool(found.by_role[..., 0].all())
    assert bool(found.any_row.all())
    assert not bool(found.all_rows.any())
    assert bool(selection(part.crit, part, tolerance=0).all_rows.all())


def test_survival_by_age(batch: ProbeBatch) -> None:
    young = batch.delay <= 16
    table = survival(young, batch, edges=(16, 64))
    assert table["<=16"] == (1.0, int(young.sum()))
    assert table["<=64"][0] == 0.0
    # two of four lives end at 5; of the rest one at 12
    life = first_kept_after(torch.tensor([True] * 4), torch.tensor([5.0, 5.0, 12.0, math.inf]), (10, 20))
    assert life == pytest.approx([0.5, 0.25])


def test_every_failed_query_is_charged_to_the_first_stage_that_failed() -> None:
    selected = torch.tensor([[True, True, True, False, False]])
    mass = torch.tensor([[0.9, 0.9, 0.1, 0.0, 0.0]])
    right = torch.tensor([[True, False, False, False, True]])
    found = stages(selected, mass, right, torch.ones(1, 5, dtype=torch.bool))
    assert vars(found) == pytest.approx(
        {"right": 0.2, "fail_decode": 0.2, "fail_read": 0.2, "fail_write": 0.2, "rescued_by_state": 0.2}
    )


def test_causal_use_is_beyond_dropping_others() -> None:
    use = causal_use(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([1.5]))
    assert float(use) == pytest.approx(1.5)


def test_ranks_against_counting_pairs() -> None:
    score = torch.tensor([0.1, 0.4, 0.4, 0.9])
    label = torch.tensor([False, True, False, True])
    # of four pairs: 0.4 beats 0.1, ties 0.4; 0.9 beats both
    assert ranks_auroc(score, label) == pytest.approx(3.5 / 4)
    assert average_precision(torch.tensor([0.9, 0.8, 0.1]), torch.tensor([1, 0, 1])) == pytest.approx((1 + 2 / 3) / 2)


def test_the_area_under_a_frontier() -> None:
    # from 1/4 to 1 of the bytes: skill 0 at -2, 1 at -1, 1 at 0
    assert budget_area(np.array([25, 50, 100]), np.array([0.0, 1.0, 1.0]), bytes_full=100) == pytest.approx(0.75)
    assert bytes_at_share(np.array([25, 50, 100]), np.array([0.2, 0.6, 0.95]), full_skill=1.0, share=0.5) == 50
    assert bytes_at_share(np.array([25, 50]), np.array([0.2, 0.6]), full_skill=1.0, share=0.9) == math.inf
    with pytest.raises(ValueError, match="two or more"):
        budget_area(np.array([25, 25]), np.array([0.0, 1.0]), bytes_full=100)
    beaten = pareto(np.array([10, 20, 20]), np.array([0.5, 0.1, 0.6]), np.array([0.6, 0.2, 0.7]))
    assert beaten.tolist() == [True, False, True]
    assert effective_level([1, 2, 4], [0.95, 0.85, 0.3]) == 2
    assert math.isnan(effective_level([1, 2], [0.5, 0.9]))


def test_the_bootstrap_knows_its_seeds_and_its_pairs() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(5, 200))
    found = mean_interval(base)
    assert found.low < 0 < found.high
    assert found.flag == ""
    assert mean_interval(base[:3]).flag == "few_seeds"
    better = paired_difference(base + 0.5, base, higher_is_better=True)
    assert better.verdict == "better"
    assert better.low == pytest.approx(0.5) and better.high == pytest.approx(0.5)
    assert better.improves == 1.0
    assert paired_difference(base + 0.001, base, higher_is_better=True).verdict == "equivalent"
    with pytest.raises(ValueError, match="same seeds and sequences"):
        paired_difference(base, base[:4], higher_is_better=True)


def test_seeds_that_differ_widen_the_interval() -> None:
    same = np.zeros((5, 100)) + np.random.default_rng(1).normal(size=(5, 100))
    apart = same + np.array([-3, -1, 0, 1, 3])[:, None]
    widths = [found.high - found.low for found in (mean_interval(same), mean_interval(apart))]
    assert widths[1] > 5 * widths[0]


def test_holm_and_the_interquartile_mean_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert interquartile_mean([0, 0, 1, 1, 1, 1, 9, 9]) == 1.0
    # of three values the outer ones count a quarter each... of the middle half, 1/3 - 1/4 on either side
    assert interquartile_mean([0, 1, 5]) == pytest.approx((1 / 12 * 0 + 1 / 3 * 1 + 1 / 12 * 5) / 0.5)


def test_prequential_scores_by_hand() -> None:
    error = torch.tensor([[1.0, 3.0]])
    assert fading_error(error, alpha=0.5)[0].tolist() == pytest.approx([1.0, 3.5 / 1.5])
    values = torch.tensor([[[0.0], [1.0], [0.0], [1.0], [0.0], [1.0]]])
    # the naive forecast of one row before errs by 1, the model by 0.5
    mase = windowed_mase(torch.full((1, 6), 0.5), values, season=1, window=5)
    assert mase.tolist() == [[0.5]]
    stream = torch.cat([torch.ones(200), torch.full((40,), 9.0), torch.ones(360)])[None]
    found = recovery_rows(stream, torch.tensor([[200]]), smooth=10)
    assert float(found) == 40.0
    before, after = torch.tensor([[True, True, False]]), torch.tensor([[True, False, True]])
    assert cache_turnover(before, after).tolist() == [0.5]
