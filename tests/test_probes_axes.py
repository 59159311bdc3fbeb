"""Axes of suites by name, and budgets of single layers."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hamts.errors import DataError
from probes import registry
from probes.again import Revisit, revisit
from probes.again_table import told_by
from probes.allocation import NODE_SCHEMES, allocate_nodes
from probes.api import load_report, run_probes
from probes.axes import parse_axes
from probes.contract import generator
from probes.gates import check_contract, validate
from probes.layer_rows import concentrated, layer_rows
from probes.models import kept_rows
from probes.prequential import CONTROLS, control_errors, rate_limited
from probes.reading import read_context
from probes.registry import get_probe, list_probes
from probes.report_axes import axis_table
from probes.report_frontier import area, area_differences
from probes.report_ranks import profile_table, runs_of, win_rates
from probes.results import axis_of
from probes.results_t0 import t0_documents
from probes.runner import fit_cell, run_plan
from probes.runner_plan import RunPlan
from probes.summary import score_table
from probes.t0 import ROUTERS_T0
from probes.t0_run import run_t0_suite
from probes.train import sample

torch.set_num_threads(1)


def test_values_of_an_axis_are_lines_of_their_own_and_the_usual_one_is_the_usual_line(tmp_path: Path) -> None:
    assert parse_axes(["items=4,8", "flag=True", "variant=grid,sphere"]) == {
        "items": (4, 8), "flag": (True,), "variant": ("grid", "sphere")
    }  # fmt: skip
    # a value of several numbers stands in brackets
    assert parse_axes(["noises=(0.05, 0.8),(0.1,0.4)"]) == {"noises": ((0.05, 0.8), (0.1, 0.4))}
    for wrong, text in ((["items"], "Got 'items'"), (["=3"], "Got '=3'"), (["a=1", "a=2"], "named twice")):
        with pytest.raises(ValueError, match=text):
            parse_axes(wrong)
    report = run_probes("der/der", tier="T0", preset="smoke", out=tmp_path, progress=False, axes={"items": (4, 12)})
    frame = report.frame
    assert set(zip(frame["axis"], frame["axis_value"], strict=True)) == {("items", "4"), ("", "")}
    assert any(line.endswith("[items=4]") for line in score_table(report.documents)["line"])
    with pytest.raises(ValueError, match="has no axis 'widgets'"):
        run_probes("der", tier="T0", out=tmp_path, progress=False, axes={"widgets": (3,)})
    plan = RunPlan(probes=("der/der",), models=("full",), overrides={"items": 4, "missed_tags": 0.0})
    (cell,) = plan.trial_cells()
    assert (cell.axis, dict(cell.overrides)["items"]) == ("items=4, missed_tags=0.0", 4)
    usual = RunPlan(probes=("der/der",), models=("full",), overrides={"items": 12}).trial_cells()
    assert usual == RunPlan(probes=("der/der",), models=("full",)).trial_cells()


def test_lines_that_differ_in_several_things_are_told_apart() -> None:
    told = {
        "": ("", ""), "items=8": ("items", "8"), "int8": ("int8", ""), "noises=(0.05, 0.8)": ("noises", "(0.05, 0.8)"),
        "items=8, noise=0.1": ("items, noise", "8, 0.1"), "items=4, noise=0.1": ("items, noise", "4, 0.1"),
        "width16, items=8": ("width16, items", "8"),
    }  # fmt: skip
    assert {word: axis_of({"axis": word}) for word in told} == told
    rows = run_t0_suite(get_probe("der")[0], preset="smoke", rungs=("der",))
    documents = [
        content
        for axis in ("", "items=8, noise=0.1", "items=4, noise=0.1")
        for content in t0_documents("der", rows, preset="smoke", seed=0, axis=axis)
    ]
    assert set(axis_table(documents)["value"]) == {"8, 0.1", "4, 0.1"}


def test_noises_of_services_are_an_axis(tmp_path: Path) -> None:
    noises = ", ".join(["0.1", "0.9"] * 4)
    found = parse_axes([f"noises=({noises})"])
    report = run_probes("frontier", tier="T0", preset="smoke", out=tmp_path, progress=False, axes=found)
    assert set(report.frame["axis_value"]) == {f"({noises})"}


def test_what_is_trained_is_not_asked_of_other_tiers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="budgets: of tier 1. Tier 0 runs every router"):
        run_probes("der", tier="T0", out=tmp_path / "out", progress=False, budgets=(0.01,))
    with pytest.raises(DataError, match="routers, steps: of tier 1"):
        run_probes("der", tier="T0", out=tmp_path / "out", progress=False, routers=("mix",), steps=3)
    with pytest.raises(DataError, match="seeds: of tier 1. Tier 2 trains nothing"):
        run_probes("der", tier="T2", out=tmp_path / "out", progress=False, seeds=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tier", ["T0", "T1"])
def test_axes_are_read_before_anything_is_run(tmp_path: Path, tier: str) -> None:
    def run(*names: str, **axes: tuple[object, ...]) -> None:
        run_probes(names, tier=tier, preset="smoke", out=tmp_path / "out", progress=False, axes=axes)

    for value in ("abc", 4.5, True):
        with pytest.raises(ValueError, match="'items' of suite 'der' takes a whole number. Got "):
            run("der", items=(4, value))
    with pytest.raises(ValueError, match="'noise' of suite 'der' takes a number. Got 'loud'"):
        run("der", noise=("loud",))
    # the second suite has no such axis
    with pytest.raises(ValueError, match="'rrr' has no axis 'updates'"):
        run("der", "rrr", updates=(4,))
    assert not (tmp_path / "out").exists()


# --- budgets of layers


def test_a_total_of_entries_is_shared_by_layers_as_asked() -> None:
    assert concentrated(24, 2, 0) == (23, 1)
    assert concentrated(24, 2, 1, 0.75) == (6, 18)
    assert concentrated(24, 3, 1) == (1, 22, 1)
    cell = RunPlan(probes=("der/der",), models=("ham",), routers=("random",), seeds=1, steps=1).trial_cells()[0]
    fitted = fit_cell(cell, device="cpu")
    batch = sample(fitted.plan, generator(3), 4)
    for split, most in (("first", (23, 1)), ("last", (1, 23))):
        rows = layer_rows(split, fitted, rows=12)
        assert rows == most
        kept = [kept_rows(memory, 72) for memory in read_context(fitted.net, batch, rows).memory]
        assert [int(layer.sum(1).max()) for layer in kept if layer is not None] == list(most)
    assert sum(layer_rows("learned", fitted, rows=12)) == 24
    # half way from the even split to all in one layer, however many layers there are
    assert [concentrated(24, n, 0, (1 + 1 / n) / 2) for n in (2, 3, 4)] == [(18, 6), (16, 4, 4), (15, 3, 3, 3)]
    with pytest.raises(ValueError, match="Unknown split of layers 'even'"):
        layer_rows("even", fitted, rows=12)


def test_saved_networks_are_asked_with_other_budgets_of_their_layers(tmp_path: Path) -> None:
    plan = RunPlan(probes=("der/der",), models=("ham", "full"), routers=("learned",), budgets=(1.0,), seeds=1, steps=2,
                   streams=1, sequences=8)  # fmt: skip
    run_plan(plan, tmp_path, progress=False)
    written = revisit(tmp_path, tmp_path, Revisit(layers=("first", "learned")), progress=False)
    assert len(written) == 2
    found = {d["identity"]["axis"]: d["budget"].get("layer_rows") for d in load_report(tmp_path).documents}
    assert found["layers first"] == [23, 1]
    assert sum(found["layers learned"]) == 24
    table = told_by(load_report(tmp_path).documents, lines=False, splits=True).splitlines()
    assert [line.split(" | ")[2:6:3] for line in table[2:]] == [
        ["all in the first", "1 x 23+1"], ["best on validation", f"1 x {'+'.join(map(str, found['layers learned']))}"]
    ]  # fmt: skip
    with pytest.raises(DataError, match="shared alike and otherwise"):
        told_by([d for d in load_report(tmp_path).documents if not d["identity"]["axis"]], lines=False, splits=True)
    with pytest.raises(ValueError, match="Ask one thing at a time"):
        Revisit(layers=("first",), mechanisms=("list",))


# --- values of the contract


@pytest.mark.parametrize("name", list(list_probes()))
def test_every_value_of_every_axis_gives_sequences_that_keep_the_contract(name: str) -> None:
    probe = list_probes()[name]
    rung = probe.main_rung()
    for axis, values in probe.axes.items():
        for told in values:
            rows = {"context_rows": 1024} if name in ("rrr", "act", "topo") else {}
            config = probe.config("small", rung, **{**rows, axis: told})
            batch = probe.sample(generator(0), 4, config)
            assert check_contract(probe, config, batch) == [], (axis, told)


def test_one_of_several_payloads_is_asked_by_its_number() -> None:
    probe, rung = get_probe("der/der")
    batch = probe.sample(generator(0), 16, probe.config("small", rung, ask="ordinal", visits=4))
    number = (batch.events[..., batch.event_names.index("ordinal")] * 4 - 1).round().long()  # [B, L]
    asked = number.gather(1, batch.q_index)  # [B, Q]
    for b in range(16):
        for q in range(16):
            kind = batch.event_id[b, batch.need[b, q, 0]]
            rows = (batch.event_id[b] == kind).nonzero()[:, 0]
            assert len(rows) == 4
            assert int(rows[asked[b, q]]) == int(batch.need[b, q, 0])
            torch.testing.assert_close(batch.x[b, rows[asked[b, q]]], batch.y[b, q])
    assert set(asked.flatten().tolist()) == {0, 1, 2, 3}


def test_edges_of_other_relations_and_undirected_graphs_are_what_they_say() -> None:
    probe, rung = get_probe("topo/topo")
    code, to = 5, 13
    plain = probe.sample(generator(0), 16, probe.config("small", rung, distractors=8))
    assert plain.event_names[code] == "code_0" and plain.event_names[to] == "to_0"
    names = {}
    for relation in ("reverse", "sibling"):
        batch = probe.sample(generator(0), 16, probe.config("small", rung, distractors=8, relation=relation))
        torch.testing.assert_close(batch.y, plain.y)
        names[relation] = [
            (tuple(row[code:to].tolist()), tuple(row[to:].tolist())) for row in batch.events[0][batch.distract[0]]
        ]
    edges = {(tuple(r[code:to].tolist()), tuple(r[to:].tolist())) for r in plain.events[0] if float(r[0]) == 1.0}
    assert all((second, first) in edges for first, second in names["reverse"])
    parent = dict(edges)
    with_sibling = [(a, b) for a, b in names["sibling"] if list(parent.values()).count(parent[a]) > 1]
    assert with_sibling and all(parent[a] == parent[b] for a, b in with_sibling)
    turned = probe.sample(generator(0), 64, probe.config("small", rung, control="undirected"))
    usual = probe.sample(generator(0), 64, probe.config("small", rung))
    edge = usual.events[..., 0] == 1.0
    share = (turned.events != usual.events).any(-1)[edge].float().mean()
    assert 0.4 < float(share) < 0.6


def test_nodes_share_a_total_of_rows_by_their_budgets() -> None:
    probe, rung = get_probe("topo/topo")
    batch = probe.sample(generator(0), 8, probe.config("small", rung))
    owner = batch.extra["node"]
    score = torch.rand(batch.crit.shape, generator=generator(1)).masked_fill(batch.query, -torch.inf)
    tied = torch.zeros_like(score).masked_fill(batch.query, -torch.inf)
    # an edge and a reading of each of 16 nodes: a total that not all of them fit in
    for scheme, total, given in itertools.product(NODE_SCHEMES, (7, 16, 26, 32), (score, tied)):
        kept = allocate_nodes(scheme, batch, given, total)
        assert kept.sum(1).tolist() == [total] * 8, (scheme, total)
        if scheme != "global":
            assert not bool(kept[owner < 0].any())
    assert torch.equal(allocate_nodes("uniform", batch, score, 40), owner >= 0)
    with pytest.raises(ValueError, match="Unknown scheme 'lot'"):
        allocate_nodes("lot", batch, score, 32)


def test_the_better_row_of_a_node_stays_and_what_a_node_cannot_use_goes_to_others() -> None:
    probe, rung = get_probe("topo/topo")
    batch = probe.sample(generator(0), 8, probe.config("small", rung))
    owner, row = batch.extra["node"], torch.arange(batch.crit.shape[1])
    score = torch.rand(batch.crit.shape, generator=generator(1)).masked_fill(batch.query, -torch.inf)
    uniform = allocate_nodes("uniform", batch, score, 16)
    tied = allocate_nodes("uniform", batch, torch.zeros_like(score).masked_fill(batch.query, -torch.inf), 16)
    owned = allocate_nodes("owned", batch, score, 16)
    degree = allocate_nodes("degree", batch, score, 26)
    for b in range(8):
        assert set(row[owned[b]].tolist()) == set(score[b].masked_fill(owner[b] < 0, -1).topk(16).indices.tolist())
        children = batch.edge_index[b, :, 1].bincount(minlength=16)
        for node in range(16):
            mine = row[owner[b] == node]
            assert row[uniform[b] & (owner[b] == node)].tolist() == [int(mine[score[b, mine].argmax()])]
            assert row[tied[b] & (owner[b] == node)].tolist() == [int(mine[0])]
            # a parent's two rows both stay; 26 rows are more than parents alone have
            held = int(degree[b, mine].sum())
            assert held == 2 if children[node] > 1 else 0 <= held <= 2


# --- streams


def test_controls_of_a_stream_learn_when_they_are_said_to() -> None:
    gen = generator(0)
    keys = torch.nn.functional.normalize(torch.randn(1, 400, 8, generator=gen), dim=-1)
    values = (keys @ torch.randn(8, 2, generator=gen)) * torch.where(torch.arange(400) < 200, 1.0, -1.0)[None, :, None]
    quiet, drifts = torch.zeros(1, 400, dtype=torch.bool), torch.tensor([[200]])
    error = {k: control_errors(k, keys, values, quiet, drifts, refit=100).norm(dim=-1)[0] for k in CONTROLS}
    # all but the one that is fitted block by block know the same before the drift
    torch.testing.assert_close(error["frozen"][:200], error["restart at drifts"][:200])
    assert float(error["frozen"][350:].mean()) > 10 * float(error["restart at drifts"][350:].mean())
    # at the drift an empty state says nothing, an old one the opposite
    assert float(error["restart at drifts"][200]) == pytest.approx(float(values[0, 200].norm()), rel=1e-4)
    assert float(error["refit"][210:290].mean()) > 10 * float(error["refit"][310:390].mean())
    with pytest.raises(ValueError, match="Unknown control 'hope'"):
        control_errors("hope", keys, values, quiet, drifts, refit=100)


def test_a_limited_router_asks_for_one_row_of_each_window() -> None:
    score = torch.rand(3, 25, generator=generator(1))
    limited = rate_limited(score, window=10)
    kept = limited > -torch.inf
    assert kept[:, :10].sum(1).tolist() == kept[:, 10:20].sum(1).tolist() == kept[:, 20:].sum(1).tolist() == [1] * 3
    torch.testing.assert_close(limited[kept].view(3, 3)[:, 0], score[:, :10].amax(1))
    # of a window that goes on it is the best row so far: one that comes later silences none before
    score[:, 3], score[:, 7] = 2.0, 3.0
    early = score.masked_fill(torch.arange(25) > 5, -torch.inf)
    assert (rate_limited(early, window=10) > -torch.inf).nonzero().tolist() == [[b, 3] for b in range(3)]


def test_a_state_that_learns_nothing_is_not_recovered_at_once() -> None:
    rows = {r["model"]: r for r in run_t0_suite(get_probe("stream")[0], preset="smoke", rungs=("drift_mean",))}
    assert rows["state, frozen"]["recovered_share"] == 0.0 and math.isnan(rows["state, frozen"]["recovery_rows"])
    assert rows["state, learning"]["recovered_share"] > 0.5


# --- how often a line does better


def test_win_rates_and_profiles_count_runs() -> None:
    runs = {"good": {"a": [0.9, 1.0], "b": [0.8, 0.81]}, "bad": {"a": [0.1, 0.2], "b": [0.8, 0.8]}}
    wins = win_rates(runs)
    assert wins["good"] == pytest.approx((1.0 + 0.5) / 2)
    assert wins["good"] + wins["bad"] == pytest.approx(1.0)
    table = profile_table(runs).set_index("line")
    assert list(table.index) == ["good", "bad"]
    assert table.loc["good", "runs of 0.8 and more"] == 1.0
    assert table.loc["bad", "runs of 0.8 and more"] == 0.5
    assert table.loc["good", "runs"] == 4


def test_lines_of_one_size_stand_at_every_budget() -> None:
    def run(model: str, axis: str, frac: float) -> dict[str, Any]:
        return {
            "identity": {"tier": "T1", "suite": "der", "rung": "der", "model": model, "router": "none", "axis": axis,
                         "readout": "query"},
            "config": {"learning_rate": 0.001}, "runtime": {"validation": [[1, 0.5]]}, "budget": {"frac": frac},
            "data_manifest": {"train_seed": 0}, "results": {"skill": {"median": 0.5}},
        }  # fmt: skip

    documents = [run("full", "", 1.0), run("recurrent", "width64", 1.0), run("block_sparse", "", 1.0)]
    documents += [run("window", "", frac) for frac in (1.0, 2.0)]
    lines = [set(runs_of(documents, budget=budget)["der"]) for budget in (1.0, 2.0)]
    assert lines == [{"full", "recurrent [width64]", "block_sparse", "window"}] * 2


def test_areas_of_frontiers_are_compared_seed_by_seed() -> None:
    def run(model: str, seed: int, frac: float, skill: float) -> dict[str, Any]:
        return {
            "identity": {"tier": "T1", "suite": "der", "rung": "der", "model": model, "router": "none", "axis": "",
                         "readout": "query"},
            "config": {"learning_rate": 0.001}, "runtime": {"validation": [[1, 0.5]]},
            "budget": {"frac": frac, "bytes_total": 1_000 * frac},
            "data_manifest": {"train_seed": seed}, "results": {"skill": {"median": skill}},
        }  # fmt: skip

    base = [run("recurrent_wide", s, f, 0.1 * s) for s in range(6) for f in (0.5, 1.0, 2.0)]
    better = [run("window", s, f, 0.1 * s + 0.2) for s in range(6) for f in (0.5, 1.0, 2.0)]
    mixed = [run("gdn_gsa", s, f, 0.1 * s + 0.2 * (f - 1)) for s in range(6) for f in (0.5, 1.0, 2.0)]
    few = [run("kda", s, f, 0.0) for s in range(2) for f in (0.5, 2.0)]
    table = area_differences([*base, *better, *mixed, *few]).set_index("line")
    # whatever a seed adds to both is not in the difference
    assert table.loc["window", ["difference of area", "low", "high"]].tolist() == pytest.approx([0.2] * 3)
    assert table.loc["window", "verdict"] == "beats it"
    # -.1 at half, 0 at once, .2 at twice: straight between, over log bytes; seed by seed the same
    assert table.loc["gdn_gsa", "difference of area"] == pytest.approx((-0.05 + 0.1) / 2, abs=1e-3)
    assert table.loc["kda", "verdict"] == "too few seeds"
    assert "recurrent_wide" not in table.index


def test_a_report_shows_axes_in_a_panel_of_their_own(tmp_path: Path) -> None:
    report = run_probes("der/der", tier="T0", preset="smoke", out=tmp_path, progress=False, axes={"items": (4, 12)})
    page = report.to_html()
    assert "Skill against the axes of the suites" in page
    scorecard = page.partition("2 · Budget frontier")[0]
    assert "[items=4]" not in scorecard
    table = axis_table(report.documents)
    assert set(table[table["line"] == "kv · write"]["value"]) == {"4", "12"}


# --- what networks grow into


@pytest.mark.parametrize(("name", "rung"), [(n, r) for n, p in list_probes().items() if p.trained for r in p.rungs])
def test_every_trained_rung_can_be_grown_into(name: str, rung: str) -> None:
    probe = list_probes()[name]
    stages = probe.stages(probe.config("small", rung, missed_tags=0.2, false_tags=4.0))
    assert sum(share for share, _ in stages) == pytest.approx(1.0)
    drawn = [probe.sample(generator(0), 2, config) for _, config in stages]
    assert len({(batch.inputs().shape[-1], batch.y.shape[-1]) for batch in drawn}) == 1
    assert drawn[0].context_rows < drawn[-1].context_rows


def test_a_plug_in_registers_itself_through_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    (tmp_path / "my_suites.py").write_text(
        "from probes.registry import register_probe\nfrom probes.suites.der import DelayedEventRecall\n\n\n"
        "@register_probe('plugged', version=1, slot='streaming state')\nclass Plugged(DelayedEventRecall):\n"
        "    rungs = {'plugged': {'distractors': 4}}\n    quick = ()\n",
        encoding="utf-8",
    )
    about = tmp_path / "my_suites-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-suites\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text("[hamts.probes]\nplugged = my_suites\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    assert list(list_probes())[-1] == "plugged"
    report = run_probes("plugged", tier="T0", preset="smoke", out=tmp_path / "out", progress=False)
    assert set(report.frame["rung"]) == {"plugged"}
    assert all(result.passed is not False for result in validate("plugged", gates=("contract", "G6")))


def test_probes_are_imported_under_both_names() -> None:
    from hamts.probes import run_probes as same

    assert same is run_probes


# --- tier 0 of the suites that no other test runs


@pytest.mark.parametrize("name", ["xcb", "rrr", "topo", "pbc", "cfr"])
def test_tier_0_of_a_suite_says_what_each_router_keeps(name: str) -> None:
    probe = list_probes()[name]
    rows = run_t0_suite(probe, preset="smoke", rungs=(probe.main_rung(),))
    skill = {(row["model"], row["router"], row.get("budget_frac")): row["skill"] for row in rows if "skill" in row}
    assert skill["full", "all", None] == 1.0
    assert skill["kv", "oracle", 1.0] == 1.0
    assert skill["kv", "random", 1.0] < 0.6
    assert {router for model, router, _ in skill if model == "kv"} >= set(ROUTERS_T0)


def test_areas_are_compared_where_both_have_been_measured() -> None:
    line = [(100.0, 0.5), (400.0, 0.9)]
    assert area(line, [(100.0, 0.4), (400.0, 0.8)]) == pytest.approx(0.1)
    # from 200 on: halfway up the line, so that it leads by 0 at first and by 0.2 at the end
    assert area(line, [(200.0, 0.7), (800.0, 0.7)]) == pytest.approx(0.1)
    assert math.isnan(area(line, [(500.0, 0.1), (900.0, 0.2)]))
