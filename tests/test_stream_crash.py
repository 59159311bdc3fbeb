"""A stream that is killed at any moment goes on as if it had not been: nothing lost, nothing read or said twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from crash_worker import open_fake
from hypothesis import given
from hypothesis import strategies as st
from stream_fakes import PER_POLL, ROWS, CountingSource, FakeStream, uninterrupted

from hamts.errors import DataWarning
from hamts.stream_store import CRASH_AT, MOMENTS, StateStore

HERE = Path(__file__).parent
EXPECTED = uninterrupted()


def start(folder: Path, crash_at: str | None = None, pause: float = 0.0) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    environment.pop(CRASH_AT, None)
    if crash_at is not None:
        environment[CRASH_AT] = crash_at
    command = [sys.executable, str(HERE / "crash_worker.py"), str(folder / "state"), str(folder / "out"), str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, crash_at: str | None = None) -> tuple[int, list[tuple[int, int, str]]]:
    """Exit code, and generation, row and hash of every commit that the process said had returned."""
    with start(folder, crash_at) as process:
        out, err = process.communicate()
    assert process.returncode in (0, 9), err
    return process.returncode, said(out)


def said(out: str) -> list[tuple[int, int, str]]:
    whole = [line.split() for line in out.splitlines(keepends=True) if line.endswith("\n")]
    return [(int(generation), int(row), state) for generation, row, state in whole]


def check_state(folder: Path, acknowledged: list[tuple[int, int, str]]) -> None:
    """What is on disk is one of the uninterrupted run's states, and none before the last one acknowledged."""
    with warnings.catch_warnings():
        # a kill may leave strays, but never damage
        warnings.simplefilter("error")
        loaded = StateStore(folder / "state", read_only=True).load(FakeStream.model_hash)
    row = 0 if loaded is None or loaded.commit.position is None else loaded.commit.position["row"]
    if loaded is not None:
        assert loaded.commit.state_hash == EXPECTED[row]
        assert FakeStream.from_state(None, loaded.arrays, loaded.meta).state_hash() == EXPECTED[row]
    if acknowledged:
        assert loaded is not None
        assert (loaded.commit.generation, row) >= acknowledged[-1][:2]
        assert all(state == EXPECTED[seen] for _, seen, state in acknowledged)


def check_end(folder: Path) -> None:
    """The last state is that of the uninterrupted run, and each update was told of exactly once."""
    with open_fake(str(folder / "state"), str(folder / "out")) as durable:
        assert durable.position == {"row": ROWS}
        assert durable.state_hash() == EXPECTED[ROWS]
    files = sorted((folder / "out").glob("*.jsonl"))
    assert {path.suffix for path in (folder / "out").iterdir()} <= {".jsonl", ".retracted"}
    lines = [int(line) for path in files for line in path.read_text().splitlines()]
    assert lines == [*range(PER_POLL, ROWS, PER_POLL), ROWS]
    left = [path.name for path in (folder / "state").iterdir() if path.name.startswith(".")]
    assert left == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_every_step_of_a_commit(tmp_path: Path, moment: str) -> None:
    code, acknowledged = run(tmp_path, f"{moment}@4")
    assert code == 9
    check_state(tmp_path, acknowledged)
    code, acknowledged = run(tmp_path)
    assert code == 0
    assert acknowledged[-1][1] == ROWS
    check_end(tmp_path)


@pytest.mark.parametrize("moment", ["staged", "arrays-renamed", "document-half", "current-flushed", "current-renamed"])
def test_killed_in_the_first_commit(tmp_path: Path, moment: str) -> None:
    assert run(tmp_path, f"{moment}@1") == (9, [])
    check_state(tmp_path, [])
    assert run(tmp_path)[0] == 0
    check_end(tmp_path)


def test_killed_again_and_again_at_the_same_step(tmp_path: Path) -> None:
    """Each life is cut off at its fifth commit."""
    for _ in range(ROWS):
        code, acknowledged = run(tmp_path, "current-flushed@5")
        check_state(tmp_path, acknowledged)
        if code == 0:
            break
    assert code == 0
    check_end(tmp_path)


def test_killed_from_outside_at_any_moment(tmp_path: Path) -> None:
    for number, delay in enumerate((0.05, 0.12, 0.2, 0.3, 0.45)):
        folder = tmp_path / str(number)
        with start(folder, pause=0.01) as process:
            time.sleep(delay)
            process.kill()
            out, _ = process.communicate()
        if (folder / "state").is_dir():
            check_state(folder, said(out))
        assert run(folder)[0] == 0
        check_end(folder)


@given(deeds=st.lists(st.sampled_from(["read", "read", "read", "commit", "kill", "close", "damage"]), max_size=25))
def test_any_life_ends_as_the_uninterrupted_one(tmp_path_factory: pytest.TempPathFactory, deeds: list[str]) -> None:
    """Reading, committing, dying and damage in any order."""
    folder = tmp_path_factory.mktemp("life")
    state, out = folder / "state", folder / "out"
    durable, source = open_fake(str(state), str(out), commit_every=7), CountingSource()
    with warnings.catch_warnings():
        # of falling back
        warnings.simplefilter("ignore", DataWarning)
        for deed in deeds:
            rows, position = source.poll(durable.position)
            if deed == "read" and rows is not None:
                durable.update(rows, commit=False)
                durable.advance(position)
                durable.sink.add("said", [durable.stream.seen])
                durable.commit_if_due()
            elif deed == "commit":
                durable.commit()
            elif deed in ("kill", "close", "damage"):
                if deed == "close":
                    durable.close()
                durable.store.close()
                if deed == "damage":
                    damage_last(state)
                durable = open_fake(str(state), str(out), commit_every=7)
        while (polled := source.poll(durable.position))[0] is not None:
            durable.update(polled[0], commit=False)
            durable.advance(polled[1])
            durable.sink.add("said", [durable.stream.seen])
        durable.close()
        check_end(folder)


def damage_last(state: Path) -> None:
    """Cut the arrays that CURRENT.json names, where there is a generation before them."""
    current = json.loads((state / "CURRENT.json").read_text())
    if current["previous"] is not None:
        (state / current["commit"]["arrays"]["name"]).write_bytes(b"cut")


def test_the_uninterrupted_run_is_what_the_others_are_held_against(tmp_path: Path) -> None:
    code, acknowledged = run(tmp_path)
    assert code == 0
    assert list(dict.fromkeys(row for _, row, _ in acknowledged)) == sorted(EXPECTED)
    assert acknowledged[-1][2] == EXPECTED[ROWS]
    assert len(set(EXPECTED.values())) == len(EXPECTED)
    check_end(tmp_path)
