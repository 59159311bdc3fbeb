"""How a budget is kept to: a list that drops the lowest, a threshold, a threshold that moves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from probes import t0
from probes.again import Revisit, folder_name, revisit
from probes.again_table import again_markdown, asked_again
from probes.api import load_report
from probes.contract import generator
from probes.mechanisms import MECHANISMS, keep_with
from probes.registry import get_probe
from probes.runner import run_plan
from probes.runner_plan import RunPlan
from probes.stacked_data import Decisions
from probes.t0_run import run_t0_suite

torch.set_num_threads(1)


def drawn(level: float = 0.0) -> torch.Tensor:
    """Scores of 64 sequences whose level differs, two rows that ask."""
    gen = generator(1)
    score = torch.randn(64, 402, generator=gen) + level * torch.randn(64, 1, generator=gen)
    score[:, 400:] = -torch.inf
    return score


def test_a_list_is_the_cache_of_online_eviction() -> None:
    score = drawn()[:3, :60]
    kept = keep_with("list", score, rows=7, context_rows=58, known=torch.zeros(1))
    for one, rows in zip(score, kept, strict=True):
        assert torch.equal(t0.keep_online(one[:58], 7)[0][-1], rows[:58])
        assert not rows[58:].any()


def test_a_threshold_keeps_what_is_wanted_on_average_and_a_moving_one_in_each_sequence() -> None:
    score = drawn(level=0.7)
    known = drawn(level=0.7)[:, :400].flatten()
    count = {name: keep_with(name, score, rows=40, context_rows=400, known=known).sum(1).float() for name in MECHANISMS}
    assert bool((count["list"] == 40).all())
    assert float(count["threshold"].mean()) == pytest.approx(40, rel=0.1)
    assert float(count["target"].mean()) == pytest.approx(40, rel=0.15)
    assert float(count["target"].std()) < 0.5 * float(count["threshold"].std())


@pytest.mark.parametrize("mechanism", MECHANISMS[1:])
def test_no_threshold_reads_what_is_later(mechanism: str) -> None:
    score = drawn()[:4]
    known = score[:, :400].flatten()
    changed = score.clone()
    changed[:, 300:400] += 5.0
    first, second = (keep_with(mechanism, each, rows=20, context_rows=400, known=known) for each in (score, changed))
    assert torch.equal(first[:, :300], second[:, :300])


def test_mechanisms_are_rows_of_tier_0_at_the_bytes_that_came_out() -> None:
    rows = run_t0_suite(get_probe("der")[0], preset="smoke", rungs=("der",))
    found = {row["router"]: row for row in rows if row.get("budget_frac") == 1.0 and ":" in row["router"]}
    assert set(found) == {
        f"{name}:{how}" for name in ("write", "innovation", "surprise", "mix") for how in MECHANISMS[1:]
    }
    one = found["mix:threshold"]
    assert one["usage_rows_low"] <= one["usage_rows"] <= one["usage_rows_high"]
    assert one["bytes_kv"] == pytest.approx(one["usage_rows"] * t0.row_bytes(8, 2))
    with pytest.raises(ValueError, match="Unknown mechanism 'lru'"):
        keep_with("lru", drawn(), rows=3, context_rows=400, known=torch.zeros(1))


def test_decisions_of_a_list_ask_for_all_rows_and_those_of_a_threshold_have_no_cap() -> None:
    options = {"networks": 2, "context_rows": 100, "device": "cpu"}
    plain = Decisions.plain(10, **options)
    listed, free = (Decisions.plain(10, mechanism=name, **options) for name in ("list", "threshold"))
    assert torch.equal(listed.cap, plain.cap) and bool((listed.beyond == -torch.inf).all())
    assert torch.equal(free.nodes, plain.nodes) and bool((free.cap == 100).all())
    with pytest.raises(ValueError, match="Available: .'list', 'threshold'"):
        Decisions.plain(10, mechanism="lru", **options)


def test_saved_networks_are_asked_with_other_mechanisms(tmp_path: Path) -> None:
    plan = RunPlan(
        probes=("der",), models=("ham", "full"), routers=("surprise", "tags"), budgets=(1.0,), seeds=1, steps=2,
        streams=1, sequences=16,
    )  # fmt: skip
    run_plan(plan, tmp_path / "run", progress=False)
    asked = Revisit(mechanisms=("list", "threshold"))
    assert folder_name(tmp_path / "run", asked).name == "run_mechanisms"
    paths = revisit(tmp_path / "run", tmp_path / "out", asked, progress=False)
    contents = {json.loads(path.read_text())["identity"]["axis"]: json.loads(path.read_text()) for path in paths}
    assert set(contents) == {"list", "threshold"}
    # a list is always full
    assert contents["list"]["results"]["usage_rows"]["median"] == 12
    assert contents["threshold"]["config"]["mechanism"] == "threshold"
    found = load_report(tmp_path / "out").documents
    assert asked_again(found) and not asked_again(load_report(tmp_path / "run").documents)
    table = again_markdown(found).splitlines()
    assert table[0] == "|  | der |"
    assert [row.split(" | ")[0] for row in table[2:4]] == ["| ham · surprise [list]", "| ham · surprise [threshold]"]
    assert " r " in table[2] and table[2].endswith(" kB |")
    with pytest.raises(ValueError, match="one thing at a time"):
        Revisit(mechanisms=("list",), preset="long")
