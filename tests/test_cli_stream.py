"""``hamts stream``: drops in, forecasts and alerts out, and an end that loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from model_frames import quick, sine_frame

import hamts
from hamts.cli import main
from hamts.cli_stream import stopped_by_signals
from hamts.stream import Stream

STEPS = 120
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and 48 further hours in two drops, with one row that nobody would expect."""
    folder = tmp_path_factory.mktemp("stream")
    quick(sine_frame(steps=STEPS), 6).save(folder / "model")
    (folder / "drops").mkdir()
    df = sine_frame(steps=STEPS + 48)
    df.loc[df.index[STEPS + 30], "y"] += 500.0
    ahead = df[df["ds"] > df["ds"].iloc[STEPS - 1]].sort_values(["ds", "unique_id"], ignore_index=True)
    ahead[:50].to_csv(folder / "drops" / "1.csv", index=False)
    ahead[50:].to_parquet(folder / "drops" / "2.parquet", index=False)
    old = time.time() - 60
    for path in (folder / "drops").iterdir():
        os.utime(path, (old, old))
    return folder


def run(*arguments: object) -> int:
    """Exit code of a command."""
    with pytest.raises(SystemExit) as stopped:
        main(["stream", *(str(argument) for argument in arguments)])
    return int(stopped.value.code or 0)


def read(folder: Path, kind: str, format: str = "jsonl") -> pd.DataFrame:
    parts = [
        pd.read_parquet(path) if format == "parquet" else pd.DataFrame(map(json.loads, path.open()))
        for path in sorted(folder.glob(f"{kind}-*.{format}"))
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_every_drop_is_read_and_what_follows_is_written(place: Path, tmp_path: Path, format: str) -> None:
    given = ("--model", place / "model", "--source", place / "drops", "--state", tmp_path / "state", "--every", "50")
    assert run(*given, "--once", "--format", format, "--alert", "0.05", "--h", "3", "--max-rows", "25") == 0
    out = tmp_path / "state" / "outputs"
    assert [path.name for path in sorted(out.glob("forecasts-*"))] == [
        f"forecasts-{n:08d}.{format}" for n in range(1, 3)
    ]
    with Stream.open(tmp_path / "state") as stream:
        assert stream.stats()["rows"] == 96
        expected = stream.forecast(3).df
        assert stream.last_commit.generation == 2
    last = read(out, "forecasts", format)[-6:].reset_index(drop=True)
    assert last["unique_id"].tolist() == expected["unique_id"].tolist()
    assert pd.to_datetime(last["ds"]).tolist() == expected["ds"].tolist()
    assert np.allclose(last["HAM"], expected["HAM"], rtol=1e-12)
    alerts = read(out, "alerts", format)
    assert (alerts["p_value"] <= 0.05).all()
    assert ("i0", pd.Timestamp("2024-01-01") + pd.Timedelta(hours=STEPS + 30)) in zip(
        alerts["unique_id"], pd.to_datetime(alerts["ds"]), strict=True
    )
    # nothing new: nothing is read and nothing written
    before = sorted(path.name for path in out.iterdir())
    assert run(*given, "--once", "--format", format, "--h", "3") == 0
    assert sorted(path.name for path in out.iterdir()) == before


def test_an_interrupted_run_ends_as_one_run_does(place: Path, tmp_path: Path) -> None:
    """Between two runs a drop is put in; what is written together is what one run writes."""
    drops = tmp_path / "drops"
    drops.mkdir()
    source = ("--source", drops, "--once", "--every", "1", "--h", "0", "--alert", "1", "--max-rows", "25")
    for name in ("1.csv", "2.parquet"):
        (drops / name).write_bytes((place / "drops" / name).read_bytes())
        os.utime(drops / name, (1, 1))
        assert run("--model", place / "model", "--state", tmp_path / "two", *source) == 0
    assert run("--model", place / "model", "--state", tmp_path / "one", *source) == 0
    one, two = (read(tmp_path / name / "outputs", "alerts") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two)
    hashes = {Stream.open(tmp_path / name, read_only=True).state_hash() for name in ("one", "two")}
    assert len(hashes) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_for_an_end_and_are_given_back(number: signal.Signals) -> None:
    before, stop = signal.getsignal(number), threading.Event()
    with stopped_by_signals(stop):
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.wait(5)
    assert signal.getsignal(number) == before


@pytest.mark.slow
def test_a_signal_ends_it_with_a_commit(place: Path, tmp_path: Path) -> None:
    drops = tmp_path / "drops"
    drops.mkdir()
    arguments = ["stream", "-m", str(place / "model"), "-s", str(drops), "--state", str(tmp_path / "state")]
    arguments += ["--every", "1h", "--h", "2", "--poll", "0.05"]
    code = "import sys; from hamts.cli import main; main(sys.argv[1:])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "240"}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "reading" in process.stdout.readline()
        (drops / "1.csv").write_bytes((place / "drops" / "1.csv").read_bytes())
        os.utime(drops / "1.csv", (1, 1))
        # it opened the drop; an hour has not passed, so nothing was committed by time
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert "50 rows read" in rest
    assert "generation 1" in rest
    with Stream.open(tmp_path / "state") as stream:
        assert stream.position["rows"] == 50
        assert stream.stats()["rows"] == 50
    assert len(read(tmp_path / "state" / "outputs", "forecasts")) == 4


# --- what is refused


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--every": "soon"}, "commit_every"),
        ({"--format": "csv"}, "--format must be one of"),
        ({"--on-bad": "ignore"}, "--on-bad must be one of"),
        ({"--source": "nowhere"}, "no folder 'nowhere'"),
        ({"--source": "kafka://only-a-host"}, "kafka://host:port/topic"),
        ({"--correction": "maybe"}, "correction must be one of"),
        ({"--device": "tpu"}, "device must be 'cpu', 'cuda'"),
        ({"--device": "cuda:01"}, "device must be 'cpu', 'cuda'"),
        ({"--device": "cuda:99"}, "The device of a stream must be there"),
        ({"--model": "nowhere"}, "nowhere"),
        ({"--source": None}, "--state and --source are needed"),
        ({"--state": None}, "--state and --source are needed"),
        ({"--model": None}, "holds no stream yet"),
    ],
)
def test_bad_options_are_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], words: str
) -> None:
    options: dict[str, Any] = {"--model": place / "model", "--source": place / "drops", "--state": tmp_path / "state"}
    options |= changed
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    assert words in refused(capsys, *given, "--once", "--quiet")


def test_rows_that_are_refused_stop_it_with_what_came_before_committed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drops = tmp_path / "drops"
    drops.mkdir()
    (drops / "1.csv").write_bytes((place / "drops" / "1.csv").read_bytes())
    (drops / "2.csv").write_text("unique_id,ds,z\ni0,2024-01-08,1\n")
    for path in drops.iterdir():
        os.utime(path, (1, 1))
    given = ("--model", place / "model", "--source", drops, "--state", tmp_path / "state", "--once", "--quiet")
    text = refused(capsys, *given)
    assert "'y'" in text
    assert Stream.open(tmp_path / "state", read_only=True).position["file"] == "1.csv"
    assert run(*given, "--on-bad", "quarantine") == 0
    assert Stream.open(tmp_path / "state", read_only=True).position["file"] == "2.csv"
    (rejected,) = read(tmp_path / "state" / "outputs", "rejected").to_dict("records")
    assert rejected["z"] == 1


def test_a_second_process_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Stream.open(tmp_path / "state", hamts.load(place / "model")):
        text = refused(capsys, "--source", place / "drops", "--state", tmp_path / "state", "--once")
    assert "Another writer" in text
    assert str(os.getpid()) in text
