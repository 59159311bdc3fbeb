"""Axes of suites by name, and budgets of single layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from probes.again import Revisit, revisit
from probes.api import load_report, run_probes
from probes.axes import parse_axes
from probes.contract import generator
from probes.layer_rows import concentrated, layer_rows
from probes.models import kept_rows
from probes.reading import read_context
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
