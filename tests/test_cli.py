"""The command line: what it reads and writes, what it refuses, and how soon it answers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import hamts
from hamts.cli import main, names, numbers
from hamts.doctor import Finding, Section, examine, is_healthy
from hamts.errors import DataError
from hamts.files import check_output, read_frame, write_frame, written_whole

ROOT = Path(__file__).resolve().parent.parent
FIT = ["--preset", "tiny", "--max-steps", "3", "--h", "12", "--quiet"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


def run(*arguments: object) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def series(zone: str | None = "Europe/Berlin") -> pd.DataFrame:
    rng = np.random.default_rng(1)
    clock = pd.date_range("2024-03-20", periods=300, freq="h", tz=zone)
    parts = [
        pd.DataFrame({"unique_id": name, "ds": clock, "y": np.sin(np.arange(300) / 4) + rng.normal(0, 0.1, 300)})
        for name in ("01", "02")
    ]
    frame = pd.concat(parts, ignore_index=True)
    frame["ahead"] = np.tile(np.arange(300) % 24, 2)
    frame["event"] = (rng.random(600) < 0.02).astype(int)
    return frame


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table in three forms, and a model fitted on it."""
    place = tmp_path_factory.mktemp("cli")
    series().to_csv(place / "data.csv", index=False)
    series().to_csv(place / "data.csv.gz", index=False)
    series().to_parquet(place / "data.parquet", index=False)
    code = run("fit", place / "data.csv", "--out", place / "model", "--futr-cols", "ahead", "--event-cols", "event",
               "--tz", "Europe/Berlin", *FIT)  # fmt: skip
    assert code == 0
    return place


# --- help


def test_help_answers_within_a_second_and_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom hamts.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = [n for n in ('torch', 'pandas', 'numpy', 'lightning', 'gluonts', 'matplotlib') if n in sys.modules]\n"
        "print('HEAVY', heavy)"
    )
    began = time.perf_counter()
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    # 0.15 s where nothing else runs
    assert time.perf_counter() - began < 1.0
    assert "HEAVY []" in ran.stdout
    for command in ("demo", "fit", "predict", "routes", "datasets", "doctor"):
        assert command in ran.stdout


@pytest.mark.parametrize("command", ["demo", "fit", "predict", "routes", "datasets", "doctor"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    assert "Usage: hamts" in capsys.readouterr().out


# --- fit, predict, routes


def test_a_model_is_fitted_saved_and_forecasts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("predict", folder / "model", "--make-futr", tmp_path / "futr.csv") == 0
    futr = pd.read_csv(tmp_path / "futr.csv", dtype={"unique_id": str})
    assert len(futr) == 24
    futr.assign(ahead=3).to_csv(tmp_path / "filled.csv", index=False)
    capsys.readouterr()
    assert run("predict", folder / "model", "--futr", tmp_path / "filled.csv", "--level", "80,95") == 0
    printed = pd.read_csv(pd.io.common.StringIO(capsys.readouterr().out), dtype={"unique_id": str})
    assert run("predict", folder / "model", "--futr", tmp_path / "filled.csv", "--level", "80,95",
               "--out", tmp_path / "forecast.parquet") == 0  # fmt: skip
    written = pd.read_parquet(tmp_path / "forecast.parquet")
    model = hamts.load(folder / "model")
    expected = model.predict(futr_df=model.future_frame().assign(ahead=3), level=[80, 95]).df
    assert str(written["ds"].dt.tz) == "Europe/Berlin"
    assert written["unique_id"].tolist() == printed["unique_id"].tolist() == expected["unique_id"].tolist()
    for column in ("HAM", "HAM-lo-95", "HAM-lo-80", "HAM-hi-80", "HAM-hi-95"):
        np.testing.assert_allclose(written[column], expected[column], rtol=1e-12)
        np.testing.assert_allclose(printed[column], expected[column], rtol=1e-12)


@pytest.mark.parametrize("form", ["data.csv", "data.csv.gz", "data.parquet"])
def test_routes_of_every_form_of_table_are_those_of_python(folder: Path, tmp_path: Path, form: str) -> None:
    out = tmp_path / "routes.parquet"
    assert run("routes", folder / "model", "--data", folder / form, "--kept", "--out", out) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = hamts.load(folder / "model").routes(series(), refused=False)
    pd.testing.assert_frame_equal(pd.read_parquet(out), expected, check_dtype=False)


def test_routes_can_be_counted_and_weighed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["routes", folder / "model", "--data", folder / "data.parquet"]
    assert run(*arguments, "--by", "channel") == 0
    assert capsys.readouterr().out.startswith("channel,tokens,kept,")
    out = tmp_path / "worth.csv"
    assert run(*arguments, "--worth", "2", "--at", "2024-03-30 12:00", "--out", out) == 0
    worth = pd.read_csv(out)["worth"]
    assert worth.notna().sum() == 4


def test_columns_and_levels_are_lists() -> None:
    assert names("a, b,") == ["a", "b"]
    assert names("") == [] and names(None) is None
    assert numbers("0.1,0.9", "--quantiles") == [0.1, 0.9]
    with pytest.raises(DataError, match="--level"):
        numbers("a", "--level")


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["fit", "{}/nothing.csv", "--out", "{}/new"], "E-FILE", "nothing.csv"),
        (["fit", "{}/model", "--out", "{}/new"], "E-FILE", ".csv"),
        (["fit", "{}/data.csv", "--out", "{}/new", "--target", "z"], "E-COLUMNS", "'z'"),
        (["fit", "{}/data.parquet", "--out", "{}/new", "--h", "0"], "E-HORIZON", "h=24"),
        (["fit", "{}/data.csv", "--out", "{}/new"], "E-TZ", "--tz"),
        (["fit", "{}/data.csv", "--out", "{}/new", "--tz", "Mars/Base"], "E-TZ", "Mars"),
        (["fit", "{}/data.csv", "--out", "{}/model"], "E-EXISTS", "--force"),
        (["predict", "{}/model", "--out", "{}/data.csv"], "E-EXISTS", "--force"),
        (["predict", "{}/model", "--out", "{}/forecast.xlsx"], "E-FILE", ".parquet"),
        (["predict", "{}/model"], "E-FUTURE", "--make-futr"),
        (["predict", "{}/nothing"], "E-MODEL-MISSING", "nothing"),
        (["routes", "{}/model", "--data", "{}/data.parquet", "--by", "month"], "E-OPTION", "weekday"),
        (["datasets", "nycflights14"], "E-DATASET", "nycflights13"),
        (["datasets", "--out", "{}/all.csv"], "E-OPTION", "name"),
    ],
)
def test_bad_input_is_a_panel_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: str, text: str
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    assert run(*[argument.replace("{}", str(folder)) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert code in printed.err and text in printed.err and "fix:" in printed.err
    assert "Traceback" not in printed.err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_force_replaces(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "routes.csv"
    out.write_text("precious")
    arguments = ["routes", folder / "model", "--data", folder / "data.parquet", "--by", "reason", "--out", out]
    assert run(*arguments) == 2
    assert out.read_text() == "precious"
    assert run(*arguments, "--force") == 0
    assert out.read_text().startswith("reason,")


def test_notes_about_the_data_are_lines_not_python_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    series().drop(index=[50, 51]).to_parquet(tmp_path / "gap.parquet")
    assert run("fit", tmp_path / "gap.parquet", "--out", tmp_path / "model", *FIT) == 0
    error = capsys.readouterr().err
    assert "note  W-GAP: 2 of 600 steps have no row" in error
    assert ".py:" not in error


# --- files


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "table.csv"
    target.write_text("old")
    with pytest.raises(RuntimeError, match="on purpose"), written_whole(target) as partial:
        partial.write_text("half")
        raise RuntimeError("on purpose")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]
    with written_whole(target) as partial:
        partial.write_text("new")
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet"])
def test_tables_come_back_as_they_were(tmp_path: Path, name: str) -> None:
    frame = series(zone=None)
    write_frame(frame, tmp_path / "deep" / name)
    back = read_frame(tmp_path / "deep" / name)
    back["ds"] = pd.to_datetime(back["ds"])
    pd.testing.assert_frame_equal(back, frame, check_dtype=False)
    assert back["unique_id"].iloc[0] == "01"


def test_numbers_as_ids_stay_numbers(tmp_path: Path) -> None:
    pd.DataFrame({"unique_id": [1, 20], "ds": [0, 0], "y": [1.0, 2.0]}).to_csv(tmp_path / "t.csv", index=False)
    assert read_frame(tmp_path / "t.csv")["unique_id"].tolist() == [1, 20]


def test_wall_clock_times_take_the_zone_too(tmp_path: Path) -> None:
    series(zone=None).to_csv(tmp_path / "t.csv", index=False)
    back = read_frame(tmp_path / "t.csv", zone="Asia/Tokyo")
    assert back["ds"].iloc[0] == pd.Timestamp("2024-03-20", tz="Asia/Tokyo")


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"t\.parquet"):
        read_frame(tmp_path / "t.parquet")
    check_output("-", force=False)
    check_output(tmp_path / "free.csv", force=False)


# --- datasets and doctor


def test_datasets_are_listed_described_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("datasets") == 0
    assert "nycflights13" in capsys.readouterr().out
    assert run("datasets", "seattle_weather", "--out", tmp_path / "seattle.csv") == 0
    assert "temp_max" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "seattle.csv")) == 1461
    assert run("datasets", "seattle_weather", "--out", "-") == 0
    assert capsys.readouterr().out.startswith("unique_id,ds,")
    assert run("datasets", "seattle_weather", "--card") == 0
    assert "NOAA" in capsys.readouterr().out


def test_doctor_finds_this_machine_healthy_and_says_which_op_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    text = capsys.readouterr().out
    assert re.search(rf"hamts +{re.escape(hamts.__version__)}", text)
    assert "gated_delta" in text and "torch, chunked (" in text
    assert "differs from the step-by-step form by" in text
    assert "!!" not in text


def test_the_self_test_is_quick_and_sees_a_wrong_op(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = {section.title: section for section in examine()}
    assert is_healthy(list(sections.values()))
    from hamts import doctor
    from hamts.ops import naive

    began = time.perf_counter()
    doctor.self_test()
    assert time.perf_counter() - began < 1.0
    right = naive.attend
    monkeypatch.setattr(naive, "attend", lambda *a, **k: right(*a, **{**k, "channel_bias": k["channel_bias"] + 1}))
    assert [finding.good for finding in doctor.self_test() if "attend" in finding.name] == [False]
    monkeypatch.setattr(naive, "attend", lambda *a, **k: 1 / 0)
    failed = next(finding for finding in doctor.self_test() if "attend" in finding.name)
    assert not failed.good and "ZeroDivisionError" in failed.value
    assert not is_healthy([Section("x", [Finding("a", "b", good=False)])])


# --- the demo


@pytest.mark.slow
def test_the_demo_tells_its_story_and_leaves_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hamts import demo

    # enough days to reach the storm evening
    monkeypatch.setattr(demo, "TEST_DAYS", 40)
    monkeypatch.setattr(demo, "SIZES", {True: ("tiny", 1.0)})
    out = tmp_path / "demo"
    assert run("demo", "--fast", "--out", out) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 55
    for words in ("nycflights13", "emptied", "seasonal naive", "verdict", "14 December 2013", "worth", "routes.png"):
        assert words in text
    report = json.loads((out / "demo.json").read_text())
    assert [line["method"] for line in report["lines"]][0] == "HAM at 10%"
    assert len(report["lines"]) == 5 and len(report["worst_days"]) == 4
    for verdict in report["verdicts"]:
        assert verdict["low"] <= verdict["difference"] <= verdict["high"]
    for name in report["files"]:
        assert (out / name).exists()
    table = pd.read_csv(out / "routes.csv")
    assert {"kept", "below", "pending"} <= set(table["status"])
    own = table[(table["unique_id"] == "EWR") & (table["status"] == "kept")]
    assert own["worth"].notna().all() and table["worth"].notna().sum() == len(own)
    assert len(pd.read_csv(out / "forecast.csv")) == 3 * 2 * 24
    assert hamts.load(out / "model").schema.targets == ("dep_delay_mean", "cancelled_share")
    assert sorted(path.name for path in out.iterdir()) == [
        "demo.json", "forecast.csv", "model", "routes.csv", "routes.png"
    ]  # fmt: skip


def test_the_demo_leaves_other_folders_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    assert run("demo", "--out", tmp_path) == 2
    assert "not the folder of a demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
