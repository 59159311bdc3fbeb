"""Axes of suites by name, and budgets of single layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from probes.again import Revisit, revisit
from probes.allocation import NODE_SCHEMES, allocate_nodes
from probes.api import load_report, run_probes
from probes.axes import parse_axes
from probes.contract import generator
from probes.gates import check_contract
from probes.layer_rows import concentrated, layer_rows
from probes.models import kept_rows
from probes.reading import read_context
from probes.registry import get_probe, list_probes
from probes.runner import fit_cell, run_plan
from probes.runner_plan import RunPlan
from probes.summary import score_table
from probes.train import sample

torch.set_num_threads(1)


def test_values_of_an_axis_are_lines_of_their_own_and_the_usual_one_is_the_usual_line(tmp_path: Path) -> None:
    assert parse_axes(["items=4,8", "flag=True", "variant=grid,sphere"]) == {
        "items": (4, 8), "flag": (True,), "variant": ("grid", "sphere")
    }  # fmt: skip
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
    score = torch.rand(batch.crit.shape, generator=generator(1)).masked_fill(batch.query, -torch.inf)
    for scheme in NODE_SCHEMES:
        kept = allocate_nodes(scheme, batch, score, 32)
        assert int(kept.sum(1).max()) <= 32
        if scheme != "global":
            assert not bool(kept[batch.extra["node"] < 0].any())
    uniform = allocate_nodes("uniform", batch, score, 32)
    # every node has an edge and a reading, and room for two rows
    assert torch.equal(uniform, batch.extra["node"] >= 0)
    with pytest.raises(ValueError, match="Unknown scheme 'lot'"):
        allocate_nodes("lot", batch, score, 32)
