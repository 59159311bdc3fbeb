"""The runner, its documents, the report, the commands, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hamts
import probes
from hamts.errors import DataError
from probes import t0
from probes.api import load_report, run_probes
from probes.cli import main
from probes.contract import generator
from probes.models import NetConfig
from probes.packed import pack_folder
from probes.registry import get_probe
from probes.results import refuse_mixed
from probes.runner_plan import RunPlan
from probes.summary import score_table

torch.set_num_threads(1)


# --- runner, report, command line


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:  # noqa: ANN001
    root = tmp_path_factory.mktemp("results")
    run(root)
    return root


def run(root: Path, **changes: object) -> object:
    options = {"models": ("ham", "full"), "routers": ("tags", "random"), "budgets": (0.5, 1.0), "seeds": 1,
               "steps": 3, "streams": 2, "sequences": 8, "progress": False, **changes}  # fmt: skip
    return run_probes("der/der", out=root, **options)


def test_a_run_writes_one_document_a_budget_and_a_tidy_table(folder: Path) -> None:
    report = load_report(folder)
    assert len(report.documents) == 5
    frame = report.frame
    skills = frame[(frame["metric"] == "skill") & (frame["eval_stream"] == "all") & (frame["slice"] == "all")]
    assert sorted(zip(skills["router"], skills["budget_frac"], strict=True)) == [
        ("none", 1.0), ("random", 0.5), ("random", 1.0), ("tags", 0.5), ("tags", 1.0),
    ]  # fmt: skip
    assert {"floor/set_mean", "floor/mean", "floor/key_regression"} & set(frame["model"])
    assert (frame["schema_version"] == 1).all()
    assert (folder / "probe_results.parquet").is_file()
    ham = next(d for d in report.documents if d["identity"]["router"] == "tags")
    assert sum(ham["diagnosis"]["stages"].values()) == pytest.approx(1.0)


def test_a_run_goes_on_where_it_stopped(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("der/*.json")}
    removed = sorted(before)[0]
    removed.unlink()
    with pytest.raises(DataError, match="E-PROBE-UNFINISHED") as refusal:
        load_report(folder)
    assert "goes on where it stopped" in refusal.value.fix
    assert len(load_report(folder, partial=True).documents) == 4
    run(folder)
    after = {path: path.stat().st_mtime_ns for path in folder.glob("der/*.json")}
    assert set(after) == set(before)
    # one cell has both budgets, the others were left alone
    assert sum(after[path] != before[path] for path in before) <= 2


def test_a_run_that_lies_in_two_folders_is_told_once(folder: Path, tmp_path: Path) -> None:
    own = load_report(folder)
    shutil.copytree(folder, tmp_path / "copy")
    pack_folder(folder, tmp_path / "packed")
    twice = load_report(folder, also=[folder, tmp_path / "copy", tmp_path / "packed"])
    assert len(twice.documents) == len(own.documents) and len(twice.gates) == len(own.gates)
    path = next((tmp_path / "copy").glob("der/*.json"))
    content = json.loads(path.read_text())
    content["results"]["skill"]["value"] += 0.5
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="E-PROBE-TWICE"):
        load_report(folder, also=[tmp_path / "copy"])


def test_networks_that_were_trained_again_are_a_line_of_their_own(folder: Path, tmp_path: Path) -> None:
    for path in sorted(folder.glob("der/*.json")):
        content = json.loads(path.read_text())
        if content["identity"]["model"] == "ham":
            # asked at another size, so of another name, from the same seed
            content["identity"]["config_hash"] = "other"
            content["config"]["budgets"] = [1.0, 2.0]
        (tmp_path / "again" / "der").mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / "der" / path.name).write_text(json.dumps(content))
    shutil.copy(folder / "run.json", tmp_path / "again" / "run.json")
    own, both = load_report(folder).documents, load_report(folder, also=[tmp_path / "again"]).documents
    added = [content["identity"] for content in both[len(own) :]]
    assert {identity["model"] for identity in added} == {"ham"}
    assert {identity["axis"] for identity in added} == {"trained again"}


def test_a_further_folder_that_holds_nothing_to_report_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real" / "sets").mkdir(parents=True)
    (tmp_path / "real" / "sets" / "one__tiny__s0.json").write_text('{"set": "one"}')
    assert load_report(folder, also=[tmp_path]).real == [{"set": "one"}]
    # one folder too deep: nothing would be found there, and nothing would be said
    with pytest.raises(DataError, match="holds neither runs nor gates nor labelled sets") as refusal:
        load_report(folder, also=[tmp_path / "real"])
    assert "'real/sets' in it" in refusal.value.fix


def test_mixed_versions_are_refused(folder: Path) -> None:
    path = sorted(folder.glob("der/*.json"))[0]
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    content["identity"]["suite_version"] = 2
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match="E-PROBE-VERSION"):
        load_report(folder)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="E-PROBE-DAMAGED"):
        load_report(folder)
    path.write_text(text, encoding="utf-8")
    run_file = folder / "run.json"
    kept = run_file.read_text(encoding="utf-8")
    run_file.write_text(kept.replace('"der": 1', '"der": 7'), encoding="utf-8")
    with pytest.raises(DataError, match="holds results of der version 7"):
        run(folder)
    run_file.write_text(json.dumps({**json.loads(kept), "contract_version": 1}), encoding="utf-8")
    with pytest.raises(DataError, match="holds results of contract 1"):
        run(folder)
    run_file.write_text(kept, encoding="utf-8")


def test_results_of_two_contracts_are_refused_though_their_suites_differ() -> None:
    first = {"identity": {"suite": "der", "suite_version": 1, "contract_version": 4}}
    other = {"identity": {"suite": "pbc", "suite_version": 3, "contract_version": 5}}
    refuse_mixed([first, first], "here")
    with pytest.raises(DataError, match=r"version 3 \(contract 5\)"):
        refuse_mixed([first, other], "here")


def test_routers_are_compared_on_the_same_sequences(folder: Path) -> None:
    table = load_report(folder).compare("tags", "random")
    assert list(table["budget_frac"]) == [0.5, 1.0]
    assert (table["flag"] == "few_seeds").all()
    same = load_report(folder).compare("tags", "tags")
    assert (same["value"] == 0.0).all()
    with pytest.raises(DataError, match="no runs of 'nobody'"):
        load_report(folder).compare("tags", "nobody")


def test_documents_without_the_errors_of_their_sequences_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.npz"))
    with pytest.raises(DataError, match="have lost the errors of their sequences"):
        load_report(bare, partial=True).compare("tags", "random")


def test_the_page_holds_ten_panels_and_needs_no_other_file(folder: Path, tmp_path: Path) -> None:
    page = load_report(folder).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert [f"<h2>{n} ·" in page for n in range(1, 11)] == [True] * 10
    assert "src=" not in page
    assert "Fewer than five training seeds" in page
    assert "| line |" in load_report(folder).to_markdown()


def test_tier_0_goes_the_same_way(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    report = run_probes(["act"], tier="T0", preset="smoke", out=tmp_path / "t0", progress=False)
    assert torch.get_num_threads() == threads
    assert set(report.frame["tier"]) == {"T0"}
    with pytest.raises(DataError, match="Run tier T1 first"):
        report.compare("tags", "surprise")
    assert "AUROC" in report.to_html()
    assert not math.isnan(report.frame[report.frame["metric"] == "recall_corrected"]["value"].iloc[0])


def test_tier_0_run_again_holds_what_it_writes_and_nothing_older(tmp_path: Path) -> None:
    report = run_probes("act/act", tier="T0", preset="smoke", out=tmp_path, progress=False)
    paths = sorted((tmp_path / "act").glob("*.json"))
    assert len(paths) == len(report.documents)
    # of an older form of the suite, or of another hand
    paths[0].rename(paths[0].with_name("t0__act__kv__write__smoke__s0__7.json"))
    with pytest.raises(DataError, match="E-PROBE-UNFINISHED"):
        load_report(tmp_path)
    again = run_probes("act/act", tier="T0", preset="smoke", out=tmp_path, progress=False)
    assert sorted((tmp_path / "act").glob("*.json")) == paths
    assert score_table(again.documents).equals(score_table(report.documents))
    # lines of an axis stand beside them
    more = run_probes("act/act", tier="T0", preset="smoke", out=tmp_path, progress=False, axes={"items": (4,)})
    assert len([d for d in more.documents if not d["identity"]["axis"]]) == len(paths) < len(more.documents)
    old = json.loads(paths[0].read_text())
    del old["config"]["t0_version"]
    paths[0].write_text(json.dumps(old))
    with pytest.raises(DataError, match="E-PROBE-VERSION.*tier 0 in version"):
        load_report(tmp_path)


def test_a_comparison_has_a_line_for_each_row(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        main(("compare", str(folder), "tags", "random"))
    head, *rows = capsys.readouterr().out.strip().splitlines()
    assert {"rung", "value", "verdict", "p_holm"} <= set(head.split())
    assert len(rows) == len(load_report(folder).compare("tags", "random"))


def test_the_commands(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        return int(ended.value.code or 0), " ".join(capsys.readouterr().out.split())

    code, text = call("list")
    assert code == 0
    assert all(name in text for name in ("der", "pbcA", "frontier"))
    code, text = call("report", str(folder))
    assert code == 0
    assert (folder / "report.html").is_file()
    assert (folder / "report.md").is_file()
    code, text = call("compare", str(folder), "tags", "random")
    assert code == 0
    assert "few_seeds" in text
    code, text = call("validate", "rrr", "--gates", "contract,G6")
    assert code == 0
    assert text.count("pass") == 2
    assert call("run", "der", "--preset", "nope")[0] == 2
    assert call("run", "--tier", "T0")[0] == 2
    # what tier 0 would not heed
    assert call("run", "der", "--tier", "T0", "--budgets", "0.01", "--out", str(folder / "none"))[0] == 2
    assert not (folder / "none").exists()
    assert call("validate", "nope")[0] == 2
    assert call("report", str(folder / "absent"))[0] == 2
    assert call("run", "der", "--tier", "T0", "--axis", "items=abc", "--out", str(folder / "none"))[0] == 2
    code, text = call("validate", "der", "--runs", str(folder / "absent"))
    assert code == 2 and "pass" not in text
    code, text = call("table", str(folder), "--lines")
    assert code == 0 and "| ham · tags |" in text and "kB" in text


def test_probes_are_reached_through_hamts() -> None:
    assert hamts.probes is probes
    # modules too: loaded twice, suites would be registered twice
    code = (
        "import hamts.probes.api, probes.api, hamts.probes.suites.der as one\nfrom probes.suites import der\n"
        "assert hamts.probes.api is probes.api and one is der and der.__spec__.name == 'probes.suites.der'\n"
        "from hamts.probes.registry import list_probes\nassert len(list_probes()) >= 9\n"
        "try:\n    import hamts.probes.nothing\nexcept ModuleNotFoundError as error:\n"
        "    assert 'hamts.probes.nothing' in str(error)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root_folder())
    for name in probes.__all__:
        assert getattr(probes, name) is not None
    with pytest.raises(AttributeError, match="Available: .*run_probes"):
        _ = probes.nothing


def test_a_budget_below_one_entry_is_refused(tmp_path: Path) -> None:
    probe, _ = get_probe("der")
    batch = probe.sample(generator(2), 2, probe.config("smoke"))
    with pytest.raises(ValueError, match="one entry at least. Got 0 rows"):
        t0.keep(torch.rand(batch.crit.shape), batch, 0)
    with pytest.raises(ValueError, match="one entry at least. Got 0 rows"):
        NetConfig(budget_rows=0)
    with pytest.raises(DataError, match="0.01 x 12 critical rows is less than one entry"):
        run(tmp_path / "small", budgets=(0.01,))
    assert not (tmp_path / "small").exists()
    with pytest.raises(ValueError, match="above 0"):
        RunPlan(probes=("der",), budgets=(0.0,))


# --- the package


def test_the_package_keeps_the_rules_of_the_repository() -> None:
    root = Path(probes.__file__).parent
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, path
        for forbidden in ("torch.manual_seed", "np.random.seed", "import pickle", "torch.load", "torch.save", "eval("):
            assert forbidden not in text.replace("net.eval(", "").replace("network.eval(", ""), (path, forbidden)
    assert (root / "py.typed").is_file()


def test_importing_probes_loads_no_heavy_library() -> None:
    code = "import probes, sys; print([n for n in ('torch', 'pandas', 'typer', 'matplotlib') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root_folder())
    assert ran.stdout.strip() == "[]"


def root_folder() -> Path:
    return Path(probes.__file__).resolve().parent.parent


def test_learning_rates_are_tried_with_the_first_seed_and_the_best_serves_the_others(tmp_path: Path) -> None:
    report = run(
        tmp_path / "rates", models=("recurrent",), budgets=(1.0,), seeds=3, learning_rates=(1e-3, 1e-2), streams=1
    )
    rates = {}
    for content in report.documents:
        rates.setdefault(content["data_manifest"]["train_seed"], {})[content["config"]["learning_rate"]] = content[
            "runtime"
        ]["validation"][-1][1]
    assert set(rates[0]) == {1e-3, 1e-2}
    best = min(rates[0], key=rates[0].__getitem__)
    assert set(rates[1]) == set(rates[2]) == {best}
    line = score_table(report.documents)
    assert line["seeds"].tolist() == [3]


def test_one_learning_rate_needs_no_trials() -> None:
    plan = RunPlan(probes=("der/der",), models=("ham", "full"), routers=("tags", "learned"), seeds=2)
    # what trials would have run is among the others, to the last number
    cells = plan.main_cells(plan.only_rates())
    assert len(cells) == 6 and {cell.hash for cell in plan.trial_cells()} < {cell.hash for cell in cells}
    assert replace(plan, learning_rates=(1e-3, 2e-3)).only_rates() == {}
