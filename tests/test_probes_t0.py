"""Tier 0: what routers keep without a trained network, how budgets are shared, and the cache row by row."""

from __future__ import annotations

import json

import pytest
import torch

from probes import t0
from probes.contract import generator
from probes.registry import get_probe
from probes.scores import query_error
from probes.t0_run import draw_case, keep_by, run_t0_suite, scored_row

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def der_rows() -> list[dict]:
    return run_t0_suite(get_probe("der")[0], preset="small")


def value(rows: list[dict], rung: str, router: str, name: str, fraction: float = 1.0) -> float:
    found = [
        r for r in rows
        if (r["rung"], r["router"], r.get("budget_frac"), r["model"]) == (rung, router, fraction, "kv")
        and not r.get("write_clip")
    ]  # fmt: skip
    return found[0][name]


def test_tier_0_is_deterministic(der_rows: list[dict]) -> None:
    again = run_t0_suite(get_probe("der")[0], preset="small")
    assert json.dumps(again, sort_keys=True) == json.dumps(der_rows, sort_keys=True)


def test_tier_0_shows_that_decoys_take_the_place_of_items(der_rows: list[dict]) -> None:
    assert value(der_rows, "der", "write", "recall_exact") > 0.6
    # with as many decoys as items, error routing keeps the decoys; a tag does not
    assert value(der_rows, "derD", "write", "recall_exact") < 0.1
    assert value(der_rows, "derD", "write", "decoy_share") > 0.6
    assert value(der_rows, "derD", "tags", "recall_exact") == 1.0
    assert value(der_rows, "derD", "mix", "skill") > 0.9


def test_tier_0_controls_lie_where_they_must(der_rows: list[dict]) -> None:
    assert value(der_rows, "der", "oracle", "skill") == pytest.approx(1.0)
    assert abs(value(der_rows, "der", "random", "recall_corrected")) < 0.05
    assert value(der_rows, "der", "recency", "recall_exact") < 0.1
    full = next(r for r in der_rows if r["model"] == "full")
    assert full["skill"] == pytest.approx(1.0)


def test_what_no_state_answers_is_told_against_the_floor_on_the_same_queries() -> None:
    probe, rung = get_probe("pbc/pbc0")
    case = draw_case(probe, rung, preset="smoke", seed=0)
    kept = keep_by(case, "write", case.critical, 0)
    hard = torch.zeros_like(case.batch.asked)
    # the queries that the floor answers best: against the floor of all of them nobody would do badly there
    error = query_error(case.floor, case.batch)
    hard[:, 0] = error[:, 0] < error.nanmean()
    row, nobody = (
        scored_row(case, "write", which, budget=4, rows=4, free=~hard) for which in (kept, torch.zeros_like(kept))
    )
    answer = t0.answer(case.batch, case.trace, torch.zeros_like(hard), case.floor, blend=case.blend)
    own = 1 - float(query_error(answer, case.batch)[hard].mean() / error[hard].mean())
    assert nobody["skill_not_free"] == pytest.approx(own) and nobody["not_free"] == int(hard.sum()) > 0
    assert row["skill_not_free"] >= nobody["skill_not_free"]
    assert row["free_share"] == pytest.approx(1 - int(hard.sum()) / int(case.batch.asked.sum()))
    assert "skill_not_free" not in scored_row(case, "write", kept, budget=4, rows=4, free=torch.ones_like(hard))


def test_services_of_different_noise_share_a_budget() -> None:
    rows = run_t0_suite(get_probe("frontier")[0], preset="smoke")
    schemes = {r["router"]: r for r in rows if r["router"].startswith("alloc:")}
    assert schemes["alloc:oracle"]["recall_worst"] == 1.0
    for scheme in ("uniform", "raw", "z", "floor+z", "greedy", "learned"):
        assert schemes[f"alloc:{scheme}"]["recall_micro"] < 1.0


def test_a_drift_flushes_caches_that_follow_the_error() -> None:
    rows = run_t0_suite(get_probe("stream")[0], preset="smoke", rungs=("drift_mean", "drift_none"))
    turnover = {(r["rung"], r["router"]): r["drift_turnover"] for r in rows if "drift_turnover" in r}
    assert turnover["drift_mean", "write"] > turnover["drift_none", "write"]
    assert turnover["drift_mean", "tags"] == 0.0


@pytest.mark.parametrize("router", ["write", "tags", "recency", "random", "oracle"])
def test_the_cache_at_once_is_the_cache_row_by_row(router: str) -> None:
    probe, _ = get_probe("der")
    batch = probe.sample(generator(2), 3, probe.config("smoke", distractors=6))
    score = t0.scores(router, batch, t0.read_state(batch), gen=generator(1))
    kept = t0.keep(score, batch, 5)
    for b in range(3):
        history, left = t0.keep_online(score[b], 5)
        assert int(history.sum(1).max()) <= 5
        assert torch.equal(history[batch.context_rows - 1], kept[b, 0])
        assert not bool((kept[b, 0] & ~torch.isinf(left)).any())
