"""The cost model: operations are counted, costs hold between their points, and budgets become entries."""

from __future__ import annotations

import pytest
import torch
from model_frames import sine_frame
from networks import make_config, make_network
from torch.utils.flop_counter import FlopCounterMode

import hamts
from hamts.cost import CostModel, bytes_within, filled_memory, fit_cost, measure, rising, training_flops
from hamts.errors import DataError
from hamts.reader import HAMNetwork


def small() -> HAMNetwork:
    return make_network(make_config(), dtype=torch.float32)


def test_operations_asked_for_are_those_counted() -> None:
    network = small()
    model = fit_cost(network, "flops")
    assert 0 < model.cost(0) < model.cost(1)
    for asked in (model.cost(100), model.cost(700), model.cost(1800)):
        entries = model.within(asked)
        (counted,) = measure(network, "flops", entries=[entries])
        assert abs(counted - asked) <= 0.1 * asked
        # one more entry would not fit
        assert model.cost(entries + 1) > asked >= 0.999999 * model.cost(entries)


def test_operations_grow_by_the_products_of_the_read() -> None:
    network = small()
    counted = measure(network, "flops", entries=[200, 300, 900, 1000])
    more = [counted[1] - counted[0], counted[3] - counted[2]]
    assert more[0] == more[1]
    H, K, C, R, layers = 2, 8, len(network.spec.roles), 3, network.config.layers
    # keys with a bias for the entry and for each channel, values with marks for each channel
    products = 100 * layers * C * H * 2 * ((K + 1 + C) + (K + C * R))
    assert products <= more[0] <= 1.05 * products


def test_a_filled_memory_holds_what_it_says() -> None:
    network = small()
    memory = filled_memory(network, 2, 37, 0)
    for layer in memory.layers:
        assert layer.scratchpad.alive.sum(1).tolist() == [37, 37]
        assert (layer.scratchpad.position < 0).all() and layer.scratchpad.keys.isfinite().all()


def test_milliseconds_are_positive_and_do_not_fall() -> None:
    model = fit_cost(small(), "ms", sizes=(32, 2048))
    assert model.unit == "ms" and len(model.costs) == 2
    assert 0 < model.costs[0] <= model.costs[1]


def test_costs_are_straight_between_points_and_beyond() -> None:
    model = CostModel("ms", items=1, entries=(10, 20, 40), costs=(2.0, 3.0, 4.0))
    assert [model.cost(entries) for entries in (0, 10, 15, 30, 60)] == [1.0, 2.0, 2.5, 3.5, 5.0]
    assert [model.within(cost) for cost in (1.5, 2.0, 2.5, 3.5, 5.0)] == [5, 10, 15, 30, 60]
    step = CostModel("ms", items=1, entries=(10, 20, 40), costs=(2.0, 2.0, 4.0))
    # of sizes that cost the same the largest is allowed
    assert step.within(2.0) == 20 and step.cost(1) == 2.0
    assert rising([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0] and rising([3.0, 2.0, 1.0]) == [2.0] * 3


def test_budgets_become_bytes_and_the_smallest_holds() -> None:
    network = small()
    model = fit_cost(network, "flops")
    size = network.entry_bytes() * network.config.layers
    assert bytes_within(network, 10**9, flops=model.cost(50), ms=None) == pytest.approx(50 * size, abs=size)
    assert bytes_within(network, 20 * size, flops=model.cost(50), ms=None) == 20 * size
    assert bytes_within(network, 123, flops=None, ms=None) == 123


def test_a_budget_below_one_entry_says_the_smallest_that_works() -> None:
    model = CostModel("ms", items=1, entries=(0, 100), costs=(2.0, 3.0))
    with pytest.raises(ValueError, match=r"budget_ms must be at least 2.01, which one entry costs. Got 1.5"):
        model.within(1.5)
    flat = CostModel("ms", items=1, entries=(32, 2048), costs=(2.0, 2.0))
    assert flat.within(2.0) == flat.within(9.0) == 2048
    with pytest.raises(ValueError, match=r"Unknown unit 'watts'. Available: \['flops', 'ms'\]"):
        fit_cost(small(), "watts")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_takes_the_operations_that_it_was_given() -> None:
    frame = sine_frame(items=3, steps=900)
    options = {"preset": "tiny", "val_size": 0, "verbose": False, "patch_steps": 6, "batch_windows": 8}
    short = hamts.fit(frame, 12, **options, max_steps=1)
    each = training_flops(short._fitted.network, short.plan.train, horizon_steps=12)
    with FlopCounterMode(display=False) as counter:
        model = hamts.fit(frame, 12, **options, routing={"training_flops": 16.5 * each})
    assert model.plan.train.max_steps == 16
    with FlopCounterMode(display=False) as rest:
        hamts.fit(frame, 12, **options, max_steps=1)
    # without what a fit does beside its steps; ages and budgets are drawn, so the sum is near its expectation only
    assert counter.get_total_flops() - rest.get_total_flops() == pytest.approx(15 * each, rel=0.25)
    with pytest.raises(DataError, match="training_flops must be at least"):
        hamts.fit(frame, 12, **options, routing={"training_flops": 5.0})


def test_of_several_rounds_the_one_in_the_middle_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is slow for a moment costs one round, and every round is told."""
    from benchmarks import cost

    slow = iter([1.0, 1.5, 1.02])
    monkeypatch.setattr(cost, "fit_cost", lambda *_, **__: CostModel("ms", 1, (100, 2000), (1.0, 20.0)))
    monkeypatch.setattr(
        cost, "measure", lambda *_, entries, **__: [n / 100 * at for at in [next(slow)] for n in entries]
    )
    rows = cost.in_rounds(None, torch.device("cpu"), 3)  # type: ignore[arg-type]
    assert [row["measured"] / row["asked"] for row in rows] == pytest.approx([1.02] * 3)
    assert all(len(row["rounds"]) == 3 for row in rows)
