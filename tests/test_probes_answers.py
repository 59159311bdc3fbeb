"""The tables of a results folder, on documents made up so that the answers are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from probes.answers import Results, answers_markdown, write_between
from probes.api import ProbeReport
from probes.contract import CONTRACT_VERSION
from probes.gates import TRAINED, GateResult, write_gate
from probes.gates_trained import gates_of_runs
from probes.registry import get_probe, list_probes
from probes.report import limits, markdown_report
from probes.report_panels import gates_first
from probes.results import of_rungs

SKILLS = {"full": 1.0, "learned": 0.97, "surprise": 0.2, "oracle": 1.0, "random": 0.1, "recurrent_wide": 0.6}


def made_up(folder: Path, *, full: float = 1.0) -> list[dict[str, Any]]:
    found = []
    for line, level in {**SKILLS, "full": full}.items():
        rival = line in ("full", "recurrent_wide")
        for budget in (1.0,) if line == "full" else (1.0, 2.0):
            for seed in range(5):
                path = folder / f"{line}_{budget}_{seed}.json"
                errors = (1.0 - level) * np.ones((2, 8)) + 0.001 * np.arange(8)
                np.savez(path.with_suffix(".npz"), errors=errors)
                found.append({
                    "identity": {"tier": "T1", "suite": "pbc", "rung": "pbcD", "model": line if rival else "ham",
                                 "router": "none" if rival else line, "readout": "query"},
                    "config": {"learning_rate": 1e-3}, "data_manifest": {"train_seed": seed},
                    "budget": {"frac": budget, "bytes_total": 1000.0 * budget}, "floor": {"mse": 1.0},
                    "results": {name: {"median": number} for name, number in (
                        ("skill", level), ("recall_corrected", level), ("decoy_share", 0.5), ("bytes_total", 1000.0))},
                    "diagnosis": {"stages": {"fail_write": 0.02, "fail_read": 0.01, "fail_decode": 0.0}},
                    "runtime": {"steps": 1500, "status": "ok", "validation": [[1500, 1.0 - level]]}, "path": str(path),
                })  # fmt: skip
    return found


def test_known_answers_come_back(tmp_path: Path) -> None:
    documents = made_up(tmp_path)
    found = Results.of(documents)
    assert found.best("pbcD", 2.0) == "learned"
    assert found.solved("pbcD")
    text = answers_markdown(documents)
    assert "| pbcD | learned | 0.97 | 1.00 | 0.97 [0.97, 0.97] | met | write 0.02, read 0.01, decode 0.00 |" in text
    assert "| pbcD | surprise | 2 | 0.20 | 0.50 | +0.10 [+0.10, +0.10] | -0.80 [-0.80, -0.80] |" in text
    assert "| pbcD | 2 | 1.0 / 1.0 | learned | +0.37 [+0.37, +0.37] | better | +0.40 [+0.40, +0.40] |" in text
    assert "gate G1" not in text
    assert "| pbcD | 1.00 |  | 1.00 |" in text
    assert "`learned`, the best router on average" in text
    assert "+0.77 [+0.77, +0.77] better" in text


def test_a_rung_that_full_attention_fails_says_nothing_about_memories(tmp_path: Path) -> None:
    text = answers_markdown(made_up(tmp_path, full=0.5))
    assert "Full attention does not solve pbcD (gate G1" in text
    assert "full attention fails (G1)" in text
    assert "Over the rungs that full attention solves" not in text


def test_the_worst_of_services_that_share_a_budget_is_told(tmp_path: Path) -> None:
    documents = made_up(tmp_path)
    assert "Services that share a budget" not in answers_markdown(documents)
    for content in documents:
        seed = content["data_manifest"]["train_seed"]
        skills = {"service=0": 0.9, "service=1": 0.5 + 0.1 * (seed % 2), "delay<=16": 0.0}
        content["diagnosis"]["slices"] = {name: {"skill": skill} for name, skill in skills.items()}
    text = answers_markdown(documents)
    # seeds 1 and 3 of five have .6 in the worst service, and intervals lie between
    assert "| pbcD | learned | 2 | 0.72 [0.70, 0.74] | 0.54 [0.50, 0.58] (1) | 0.18 [0.16, 0.20] |" in text
    assert "| pbcD | full |  | 0.72 [" in text


def test_tables_are_written_between_the_marks_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table:begin -->\nold\n<!-- table:end -->\nafter\n", encoding="utf-8")
    write_between(page, "new\n")
    assert page.read_text(encoding="utf-8") == ("before\n<!-- table:begin -->\n\nnew\n\n<!-- table:end -->\nafter\n")
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold the lines"):
        write_between(page, "new")


def test_a_gate_is_not_read_off_trials_beside_finished_lines(tmp_path: Path) -> None:
    documents = made_up(tmp_path)
    assert {gate.gate for gate in gates_of_runs(documents)} == {"G1", "G5"}
    trial = [d for d in documents if d["identity"]["router"] != "oracle" or d["data_manifest"]["train_seed"] == 0]
    found = {gate.gate: gate for gate in gates_of_runs(trial)}
    assert found["G1"].passed
    assert found["G5"].passed is None and math.isnan(found["G5"].value)
    assert found["G5"].note == "not read: 1 of 5 seeds of the oracle's list"
    assert "----  pbc/pbcD  G5" in str(found["G5"])


def test_a_seed_more_of_one_line_hides_no_gate(tmp_path: Path) -> None:
    documents = made_up(tmp_path)
    oracle = next(d for d in documents if d["identity"]["router"] == "oracle" and d["budget"]["frac"] == 1.0)
    more = {**oracle, "data_manifest": {"train_seed": 5}}
    found = {gate.gate: gate for gate in gates_of_runs([*documents, more])}
    assert found["G1"].passed and found["G5"].passed
    assert "mean of 5 and 6 training seeds" in found["G5"].note
    results = Results.of([*documents, more])
    assert [results.seeds("pbcD", line, 1.0) for line in ("full", "oracle")] == [[*range(5)], [*range(6)]]
    # differences are of the seeds that both have
    difference = results.difference("pbcD", "oracle", "random", 1.0)
    assert difference is not None and difference.value == pytest.approx(0.9)


def test_full_attention_that_is_a_trial_of_rates_is_told_as_such(tmp_path: Path) -> None:
    documents = made_up(tmp_path)
    trial = [d for d in documents if d["identity"]["model"] != "full" or d["data_manifest"]["train_seed"] == 0]
    assert {gate.gate: gate.note for gate in gates_of_runs(trial)} == dict.fromkeys(
        ("G1", "G5"), "not read: 1 of 5 seeds of full attention"
    )
    text = answers_markdown(trial)
    assert "| pbcD | not read: 1 of 5 seeds of full attention |  | not read: 1 of 5 seeds of full attention |" in text
    # of two seeds a line that is not finished, yet no trial
    some = [d for d in documents if d["identity"]["model"] != "full" or d["data_manifest"]["train_seed"] < 2]
    assert all(gate.passed for gate in gates_of_runs(some))


def test_widths_of_a_state_are_lines_of_their_own(tmp_path: Path) -> None:
    documents = made_up(tmp_path)
    for content in documents:
        content["config"]["preset"] = "small"
    plain = next(content for content in documents if content["identity"]["model"] == "full")

    def state(width: int, level: float, seeds: int, axis: str | None = None) -> list[dict[str, Any]]:
        axis = ("" if width == 8 else f"width{width}") if axis is None else axis
        return [{
            **plain, "identity": {**plain["identity"], "model": "recurrent", "axis": axis},
            "config": {"learning_rate": 1e-3, "preset": "small", "state_width": width},
            "results": {"skill": {"median": level}}, "data_manifest": {"train_seed": seed},
        } for seed in range(seeds)]  # fmt: skip

    def gate(*states: list[dict[str, Any]]) -> GateResult:
        found = {gate.gate: gate for gate in gates_of_runs([*documents, *sum(states, [])])}
        assert found["G1"].passed and found["G5"].passed
        return found["G2"]

    # the widths nearest to the limits decide: the widest small one, the narrowest roomy one
    both = gate(state(4, 0.1, 5), state(8, 0.3, 5), state(64, 0.9, 5), state(128, 0.95, 5))
    assert both.passed and (both.value, both.roomy) == pytest.approx((0.3, 0.9))
    assert gate(state(8, 0.3, 5), state(64, 0.9, 1)).note == "not read: 1 of 5 seeds of a roomy state"
    assert gate(state(8, 0.3, 5)).note == "not read: 0 of 5 seeds of a roomy state"
    # states asked again another way are none of it
    assert gate(state(8, 0.3, 5), state(64, 0.9, 5), state(64, 0.1, 5, axis="width64, int8")).passed


def test_reports_tell_gates_that_were_not_read(tmp_path: Path) -> None:
    documents = made_up(tmp_path)
    read = GateResult("pbc", "pbcD", "G1", True, 1.0, 0.95, "one seed")
    unread = GateResult("pbc", "pbcS", "G1", None, math.nan, math.nan, "not read: 1 of 5 seeds of full attention")
    assert "pbc/pbcS G1: not read: 1 of 5 seeds of full attention." in gates_first([read, unread])
    assert "1 passed, 0 failed, 1 not read, 0 do not apply" in gates_first([read, unread])
    assert any("gates that train models have too few seeds to be read" in line for line in limits([], [read, unread]))
    assert "## Gates not read\n\n- pbc/pbcS G1: not read" in markdown_report([], gates=[read, unread])
    # what lies on disk is not hidden by runs that say nothing
    trial = [d for d in documents if d["identity"]["model"] != "full" or d["data_manifest"]["train_seed"] == 0]
    about = {"contract_version": CONTRACT_VERSION, "suite_version": get_probe("pbc")[0].version}
    path = tmp_path / "gates" / "pbc" / "pbcD__G1__small__s0.json"
    path.parent.mkdir(parents=True)
    write_gate(path, read, about)
    found = {gate.gate: gate for gate in ProbeReport(tmp_path, trial, pd.DataFrame()).gates}
    assert found["G1"] == read and found["G5"].unread


def test_a_table_of_some_rungs_holds_these_alone(tmp_path: Path) -> None:
    documents = made_up(tmp_path, full=0.5)
    rung = documents[0]["identity"]["rung"]
    assert of_rungs(documents, [rung]) == [one for one in documents if one["identity"]["rung"] == rung]
    assert of_rungs(documents, []) == documents
    with pytest.raises(ValueError, match="No results of 'nothing'"):
        of_rungs(documents, ["nothing"])


def test_gates_are_read_off_the_runs_of_a_table(tmp_path: Path) -> None:
    documents = made_up(tmp_path)
    for content in documents:
        content["config"]["preset"] = "small"
    found = {gate.gate: gate for gate in gates_of_runs(documents)}
    assert set(found) == {"G1", "G5"}
    assert found["G1"].passed and found["G5"].passed
    # a state of 8 for 16 items, and one of 64, whose lines leave those of the table alone
    plain = next(content for content in documents if content["identity"]["model"] == "full")
    for width, axis, level in ((8, "", 0.3), (64, "width64", 0.9)):
        path = tmp_path / f"recurrent_{width}.json"
        np.savez(path.with_suffix(".npz"), errors=np.ones((2, 8)))
        documents += [{
            **plain, "identity": {**plain["identity"], "model": "recurrent", "axis": axis}, "path": str(path),
            "config": {"learning_rate": 1e-3, "preset": "small", "state_width": width},
            "results": {"skill": {"median": level}}, "data_manifest": {"train_seed": seed},
        } for seed in range(5)]  # fmt: skip
    gate = {gate.gate: gate for gate in gates_of_runs(documents)}["G2"]
    assert gate.passed and gate.value == pytest.approx(0.3)
    assert "0.900" in gate.note
    lines = Results.of(documents).groups["pbcD", "recurrent", 1.0]
    assert [content["identity"]["axis"] for content in lines] == [""] * 5


def test_rungs_that_are_not_ranked_are_told_with_the_reason(tmp_path: Path) -> None:
    documents = made_up(tmp_path)
    assert "ranked" not in answers_markdown(documents)
    # a line of one rung alone
    other = [{**d, "identity": {**d["identity"], "rung": "pbcS"}} for d in documents]
    alone = [d for d in other if d["identity"]["router"] != "surprise"]
    text = answers_markdown([*documents, *alone])
    assert "Over the rungs that full attention solves (pbcD)" in text
    assert "Not ranked: pbcS (`surprise`: not run)." in text
    # one that is not finished, at one size, leaves out the other too where the lines do not meet
    some = [d for d in other if d["budget"]["frac"] != 2.0 or d["identity"]["router"] != "surprise"]
    trial = [d for d in other if d not in some][:1]
    text = answers_markdown([*documents, *some, *trial])
    assert "Not ranked: pbcS (`surprise` at 2x: 1 of 5 seeds)." in text
    gone = [d for d in documents if d["identity"]["router"] != "random"]
    text = answers_markdown([*gone, *alone])
    assert "No rung is ranked: pbcD (`random`: not run); pbcS (`surprise`: not run)." in text
    assert "No rung is ranked: pbcD (not solved by full attention)." in answers_markdown(made_up(tmp_path, full=0.5))


def test_a_gate_that_fails_says_which_seeds_and_why() -> None:
    gate = GateResult("xcb", "xcbC", "G1", False, 0.04, 0.95, "full attention")
    assert "an ideal reader has 0.935" in str(gate)
    assert GateResult("xcb", "xcbC", "G1", True, 0.99, 0.95, "full attention").reason == ""
    # whatever the suites say of gates names a rung and a gate that there are
    for probe in list_probes().values():
        for name in probe.cannot:
            rung, place = name.split()
            assert rung in probe.rungs and place in TRAINED
