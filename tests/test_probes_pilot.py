"""The pilot of training and the ceiling of channel pairs run, and say what their pages say."""

from __future__ import annotations

import pytest

from benchmarks.probe_ceiling import ideal_skill
from benchmarks.probe_pilot import SHORT, Trial, cells, run, table
from probes.contract import generator
from probes.registry import get_probe
from probes.suites.xcb import XcbConfig


def test_a_trial_trains_each_seed_at_each_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.stacked_run.POOL_SEQUENCES", 64)
    monkeypatch.setattr("probes.stacked_run.BATCHES", 2)
    trial = Trial("xcb/xcbP", ("full",), (100, 101), 1, rates=(0.002,), short=True)
    records = run(trial, "cpu")
    assert [(record["line"], record["seed"]) for record in records] == [("full", 100), ("full", 101)]
    assert "64 rows, 1" in table(records)


@pytest.mark.parametrize(("what", "rows"), [({}, 256), ({"short": True}, 64), ({"reading": True}, 64)])
def test_a_short_trial_asks_about_short_sequences(what: dict[str, bool], rows: int) -> None:
    for cell in cells(Trial("pbc/pbc0", ("full",), **what), "full"):
        assert cell.config.context_rows == rows
        assert (cell.config.items == SHORT["items"]) is (rows == 64)


@pytest.mark.parametrize(("rung", "low", "high"), [("xcbC", 0.85, 0.95), ("xcbP", 0.99, 1.0)])
def test_answers_beyond_the_carrier_can_be_told_from_it(rung: str, low: float, high: float) -> None:
    assert low < ideal_skill(rung, sequences=64, seed=7, carrier_known=True) <= high


def test_loud_answers_are_those_of_the_quiet_pairs_moved_outwards() -> None:
    quiet, loud = (
        get_probe(name)[0].sample(generator(3), 4, get_probe(name)[0].config("smoke", name.split("/")[1]))
        for name in ("xcb/xcbC", "xcb/xcbP")
    )
    assert (loud.y - quiet.y).abs().allclose(loud.y.new_tensor(2.0))
    assert bool((loud.y.abs() >= 2.0).all())
    with pytest.raises(ValueError, match="variant 'channels' alone are loud"):
        XcbConfig(loud=True)
