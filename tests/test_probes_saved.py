"""Networks of probes on disk, asked again: longer pasts, rounded entries, worth of rows, wider states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hamts.errors import DataError
from probes.again import Revisit, asked_at, longer_config, revisit
from probes.api import load_report
from probes.cli import main
from probes.contract import CONTRACT_VERSION, generator
from probes.evaluate import evaluate
from probes.gates import GateResult, read_gates, validate
from probes.models import kept_rows
from probes.reading import PRECISIONS, answer_batch, answer_from, kept_bytes, read_context, rounded
from probes.registry import get_probe, list_probes
from probes.runner import fit_cell, run_plan
from probes.runner_plan import Cell, RunPlan
from probes.saved import load_network, network_path, save_network
from probes.train import Fitted, forward, sample
from probes.utility import Gold, gold_utility, router_scores, spearman, utility_of, without

torch.set_num_threads(1)


def cell_of(rung: str = "der", model: str = "ham", router: str = "innovation", **options: object) -> Cell:
    plan = RunPlan(probes=(rung,), models=(model,), routers=(router,), budgets=(1.0,), seeds=1, steps=3, **options)
    return plan.trial_cells()[0]


def fitted_of(**options: object) -> Fitted:
    return fit_cell(cell_of(**options), device="cpu")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three small networks."""
    root = tmp_path_factory.mktemp("run")
    plan = RunPlan(
        probes=("der",), models=("ham", "full", "recurrent"), routers=("innovation", "tags"), budgets=(1.0,), seeds=1,
        steps=3, streams=1, sequences=8,
    )  # fmt: skip
    run_plan(plan, root, progress=False)
    return root


def call(*arguments: str) -> None:
    """A command that must end well."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 0


# --- on disk


@pytest.mark.parametrize(
    ("model", "router", "width"), [("ham", "tags", 8), ("full", "none", 8), ("recurrent", "none", 16)]
)
def test_a_network_comes_back_as_it_was(tmp_path: Path, model: str, router: str, width: int) -> None:
    cell = cell_of(model=model, router=router, state_width=width) if model == "ham" else cell_of(
        model=model, state_width=width
    )  # fmt: skip
    fitted = fit_cell(cell, device="cpu")
    path = save_network(cell, tmp_path, fitted)
    assert path == network_path(cell, tmp_path)
    again, loaded = load_network(path)
    assert again == cell
    assert again.hash == cell.hash
    assert (loaded.plan.critical_rows, loaded.losses) == (fitted.plan.critical_rows, fitted.losses)
    batch = sample(fitted.plan, generator(5), 4)
    with torch.no_grad():
        assert torch.equal(forward(fitted.net, batch, 9)[0], forward(loaded.net, batch, 9)[0])


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "der").mkdir()
    path = tmp_path / "der" / "x.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError, match="E-PROBE-DAMAGED"):
        load_network(path)
    with pytest.raises(DataError, match="no run"):
        revisit(tmp_path / "gone", tmp_path / "out", Revisit(preset="long"), progress=False)


def test_a_network_of_another_version_is_refused(tmp_path: Path) -> None:
    cell = cell_of()
    fitted = fit_cell(cell, device="cpu")
    path = save_network(replace(cell, suite_version=7), tmp_path, fitted)
    with pytest.raises(DataError, match=f"der 7; this is contract {CONTRACT_VERSION}, der 1"):
        load_network(path)


def test_the_width_of_the_state_is_an_axis_that_leaves_other_names_alone() -> None:
    usual, wide = cell_of(state_width=8), cell_of(state_width=16)
    assert "state_width" not in usual.identity
    assert wide.hash != usual.hash
    assert wide.axis == "width16"
    assert wide.net(9).state_width == 16
    with pytest.raises(ValueError, match="even, and at least 2. Got 3"):
        RunPlan(probes=("der",), state_width=3)


# --- reading in chunks


@pytest.mark.parametrize("router", ["innovation", "tags", "random", "oracle", "shuffled"])
def test_a_context_in_chunks_is_the_context_at_once(router: str) -> None:
    fitted = fitted_of(router=router)
    batch = sample(fitted.plan, generator(3), 3)
    whole, context = answer_batch(fitted.net, batch, 9)
    parts = read_context(fitted.net, batch, 9, chunk_rows=7)
    again = answer_from(fitted.net, batch, parts.policies, parts.memory)
    assert torch.allclose(whole, again, atol=1e-5)
    for first, second in zip(context.memory, parts.memory, strict=True):
        assert torch.equal(kept_rows(first, 72), kept_rows(second, 72))
    for first, second in zip(context.traces, parts.traces, strict=True):
        assert torch.allclose(first.scores, second.scores, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_entries_at_a_lower_precision_are_smaller_and_nearly_the_same(precision: str) -> None:
    fitted = fitted_of(router="tags")
    batch = sample(fitted.plan, generator(3), 3)
    exact = read_context(fitted.net, batch, 9).memory
    coarse = read_context(fitted.net, batch, 9, precision=precision).memory
    for first, second in zip(exact, coarse, strict=True):
        a, b = first.scratchpad, second.scratchpad
        assert torch.equal(a.position, b.position)
        assert torch.allclose(a.keys, b.keys, atol=0.05)
        assert not torch.equal(a.keys, b.keys)
        # what was rounded once does not move again
        assert torch.equal(rounded(second, precision).scratchpad.values, b.values)
    plain, small = kept_bytes(exact, "float32")[1], kept_bytes(coarse, precision)[1]
    count = sum(float(part.scratchpad.alive.sum(1).float().mean()) for part in exact)
    # a key and a value of 32 numbers each; int8 has a scale for each
    saved = 64 * (4 - PRECISIONS[precision]) - (8 if precision == "int8" else 0)
    assert plain - small == pytest.approx(count * saved)


def test_precisions_are_refused_where_nothing_is_kept() -> None:
    fitted = fitted_of(model="recurrent")
    batch = sample(fitted.plan, generator(3), 2)
    with pytest.raises(ValueError, match="Unknown precision 'int4'"):
        read_context(fitted.net, batch, 9, precision="int4")
    with pytest.raises(ValueError, match="keeps no rows"):
        read_context(fitted.net, batch, 9, precision="int8")


# --- a longer past


# the simulator of cfr takes seconds for 8,192 rows: one of its rungs is enough
TRAINED_RUNGS = [
    (name, rung) for name, probe in list_probes().items() if probe.trained for rung in probe.rungs if rung != "cfrC"
]


@pytest.mark.parametrize(("name", "rung"), TRAINED_RUNGS)
def test_every_rung_can_be_asked_at_long(name: str, rung: str) -> None:
    cell = replace(cell_of(rung), preset="small")
    config = longer_config(cell, "long")
    assert config.context_rows == 8192
    assert config.missed_tags == 0.2
    probe = get_probe(name)[0]
    pair = [probe.sample(generator(0), 1, each) for each in (cell.config, config)]
    assert pair[0].inputs().shape[-1] == pair[1].inputs().shape[-1]
    assert pair[0].y.shape[-1] == pair[1].y.shape[-1]


def test_networks_are_asked_again_at_another_size(folder: Path, tmp_path: Path) -> None:
    plan = Revisit(preset="small", streams=1, sequences=4, positions=("kept",))
    written = revisit(folder, tmp_path / "more", plan, progress=False)
    assert len(written) == 4
    before = [path.stat().st_mtime_ns for path in written]
    assert [p.stat().st_mtime_ns for p in revisit(folder, tmp_path / "more", plan, progress=False)] == before
    report = load_report(tmp_path / "more")
    for content in report.documents:
        assert content["config"]["eval_preset"] == "small"
        assert content["identity"]["axis"] == "at small"
        assert any("extrapolation: trained at smoke (72 rows, 12 items), asked at small (256 rows" in w
                   for w in content["warnings"])  # fmt: skip
    assert "asked at another size" in report.to_markdown()
    with pytest.raises(DataError, match="holds results of other sizes"):
        revisit(folder, folder, plan, progress=False)
    with pytest.raises(ValueError, match="Nothing would change"):
        Revisit()
    with pytest.raises(ValueError, match="Unknown preset 'huge'"):
        Revisit(preset="huge")


def test_lower_precision_gives_lines_of_their_own(folder: Path, tmp_path: Path) -> None:
    written = revisit(folder, tmp_path / "coarse", Revisit(precisions=("float32", "int8"), streams=1, sequences=4),
                      progress=False)  # fmt: skip
    contents = [json.loads(path.read_text()) for path in written]
    # full attention and both routers; the recurrent model keeps nothing
    assert [c["budget"]["dtype"] for c in contents] == ["int8"] * 3
    assert {c["identity"]["axis"] for c in contents} == {"int8"}
    table = load_report(tmp_path / "coarse").compare("tags [int8]", "innovation [int8]")
    assert len(table) == 1
    with pytest.raises(DataError, match="no runs of 'tags'"):
        load_report(tmp_path / "coarse").compare("tags", "innovation")


def test_columns_that_change_with_the_size_are_refused() -> None:
    cell = cell_of()
    fitted = fit_cell(cell, device="cpu")
    other = replace(cell, overrides=(*cell.overrides, ("channels", 8)))
    with pytest.raises(DataError, match="E-PROBE-CHANNELS"):
        asked_at(replace(fitted, plan=replace(fitted.plan, config=cell.config)), _with_columns(other, cell), "small")


def _with_columns(other: Cell, cell: Cell) -> Cell:
    """A cell whose sequences have other columns at a second look than at the first."""

    class Odd(type(other)):  # type: ignore[misc]
        @property
        def config(self):  # noqa: ANN202
            return cell.config

    return Odd(**{name: getattr(other, name) for name in other.__dataclass_fields__})


# --- worth of rows


def test_leaving_a_row_out_changes_what_it_was_needed_for() -> None:
    fitted = fitted_of(model="full")
    batch = sample(fitted.plan, generator(1), 2)
    memory = read_context(fitted.net, batch, 9).memory
    T = batch.context_rows
    for row in (0, T - 1):
        edited = without(memory[0], row, T)
        gone = kept_rows(memory[0], T).sum() - kept_rows(edited, T).sum()
        hidden = memory[0].recent.present.sum() - edited.recent.present.sum()
        assert int(gone + hidden) == len(batch)
    gold = gold_utility(fitted, sequences=2)
    assert gold.utility.shape == (2, T)
    assert float(gold.utility.abs().max()) > 0
    with pytest.raises(ValueError, match="that of full attention"):
        gold_utility(fitted_of())


def test_scores_are_compared_with_the_worth_of_rows() -> None:
    fitted = fitted_of()
    batch = sample(fitted.plan, generator(1), 4)
    crit = batch.crit[:, : batch.context_rows].float()
    noise = torch.rand(crit.shape, generator=generator(0))
    gold = Gold(batch, crit + 0.01 * noise, skill=1.0)
    perfect = utility_of([gold.utility], gold)
    assert perfect["utility_auroc"] == perfect["utility_ap"] == 1.0
    assert perfect["utility_spearman"] == pytest.approx(1.0)
    assert gold.truth_auroc == 1.0
    # a router that keeps the row after each item has kept what the convolution copied there
    late = utility_of([gold.utility.roll(1, 1)], gold)
    assert late["utility_auroc_window"] > 0.75 > late["utility_auroc"]
    blind = utility_of([torch.rand(crit.shape, generator=generator(4))], gold)
    assert abs(blind["utility_auroc"] - 0.5) < 0.15
    assert blind["utility_ap_chance"] == pytest.approx(float(crit.mean()))
    assert len(router_scores(fitted, batch)) == 2
    assert router_scores(fitted_of(router="random"), batch) == []
    tags = router_scores(fitted_of(router="tags"), batch)
    assert torch.equal(tags[0].bool(), batch.tags[:, : batch.context_rows])


def test_spearman_is_the_correlation_of_ranks() -> None:
    x = torch.tensor([3.0, 1.0, 2.0, 10.0])
    assert spearman(x, x.exp()) == pytest.approx(1.0)
    assert spearman(x, -x) == pytest.approx(-1.0)
    assert spearman(x, torch.ones(4)) != spearman(x, torch.ones(4))  # NaN


def test_utility_is_added_to_documents_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call("evaluate", str(folder), "--utility", "--quiet")
    assert "utility of 2 runs added" in capsys.readouterr().out
    report = load_report(folder)
    assert {"utility_auroc", "utility_ap", "utility_spearman"} <= set(report.frame["metric"])
    assert "gold AUROC of the truth" in report.to_html()
    call("evaluate", str(folder), "--utility", "--quiet")
    assert "utility of 0 runs added" in capsys.readouterr().out


def test_a_second_look_that_asks_nothing_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder)])
    assert "Nothing was asked" in capsys.readouterr().err


# --- gates on disk


def test_gates_are_run_once_and_reported(tmp_path: Path) -> None:
    seen: list[GateResult] = []
    first = validate("der/der", gates=["contract", "G7"], folder=tmp_path, report=seen.append)
    assert seen == first
    path = next((tmp_path / "gates" / "der").glob("*G7*"))
    content = json.loads(path.read_text())
    content |= {"passed": False, "note": "as it was written down"}
    path.write_text(json.dumps(content))
    again = validate("der/der", gates=["contract", "G7"], folder=tmp_path)
    assert [result.note for result in again][1] == "as it was written down"
    assert [result.gate for result in read_gates(tmp_path) if result.passed is False] == ["G7"]
    content["suite_version"] = 0
    path.write_text(json.dumps(content))
    assert validate("der/der", gates=["G7"], folder=tmp_path)[0].passed


def test_scores_do_not_depend_on_how_a_context_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fitted_of(router="mix")
    scored = evaluate(fitted, budget_rows=9, streams=1, sequences=4)
    monkeypatch.setattr("probes.reading.CHUNK_ROWS", 16)
    again = evaluate(fitted, budget_rows=9, streams=1, sequences=4)
    assert again.metrics["mse"] == pytest.approx(scored.metrics["mse"], rel=1e-4)
    assert again.metrics["recall_any"] == scored.metrics["recall_any"]
    assert again.stages == scored.stages


@pytest.mark.parametrize("router", ["oracle", "random", "stride", "recency", "shuffled", "tags", "innovation"])
def test_queries_at_once_are_answered_as_row_by_row(router: str) -> None:
    """Whatever decides about the last rows of the context decides while queries are read, too."""
    fitted = fitted_of(router=router)
    net, batch = fitted.net, sample(fitted.plan, generator(7), 4)
    T, L = batch.context_rows, batch.x.shape[1]
    with torch.no_grad():
        at_once = forward(net, batch, 12)[0]
        context, answers = read_context(net, batch, 12), []
        memory = context.memory
        for row in range(T, L):
            step = net.read(batch, slice(row, row + 1), memory, context.policies)
            memory = step.memory
            answers.append(net.answer(step.hidden[:, 0]))
    index = (batch.q_index - T)[..., None].expand(-1, -1, 2)
    assert torch.allclose(at_once, torch.stack(answers, 1).gather(1, index), atol=1e-5)


def test_models_of_trained_gates_are_noted_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.gates_trained.steps_of", lambda suite, preset: 2)
    found = validate("der/der", gates=["G1", "G2", "G5"], folder=tmp_path)
    assert [result.gate for result in found] == ["G1", "G2", "G5"]
    assert "key width 6" in found[1].note
    fits = sorted(path.name for path in (tmp_path / "gates" / "der" / "fits").glob("*.json"))
    assert [name.split("__")[1] for name in fits] == ["full", "narrow", "oracle", "wide"]
    # a gate whose own result is gone is decided from the models that are there
    next((tmp_path / "gates" / "der").glob("*G5*")).unlink()
    monkeypatch.setattr("probes.gates_trained.train", None)
    assert validate("der/der", gates=["G5"], folder=tmp_path)[0].value == found[2].value
    with pytest.raises(ValueError, match="handed over in a folder"):
        validate("der/der", gates=["G1"], workers=2)
