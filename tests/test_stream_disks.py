"""A stream's state beside other writers and readers, on disks that fail, and in the files of earlier versions."""

from __future__ import annotations

import errno
import io
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stream_fakes import FakeStream
from stream_folders import MODEL, commit, files_of, load_marker, marker_of, two_generations

from hamts.errors import StateFolderError
from hamts.stream_store import StateStore

GOLDEN = Path(__file__).parent / "golden" / "stream-1.0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two generations: markers 1 and 2."""
    return two_generations(tmp_path / "state")


# --- one writer, many readers


def test_a_second_writer_is_refused_and_a_reader_is_not(folder: Path) -> None:
    with StateStore(folder) as store:
        with pytest.raises(StateFolderError, match=rf"E-STATE-LOCKED.*process {os.getpid()}"):
            StateStore(folder)
        assert marker_of(store) == 2
        reader = StateStore(folder, read_only=True)
        assert marker_of(reader) == 2
        commit(store, 3)
        commit(store, 4)
        assert marker_of(reader) == 4
        with pytest.raises(StateFolderError, match="E-STATE-READONLY"):
            commit(reader, 9)
    with pytest.raises(StateFolderError, match="E-STATE-READONLY"):
        commit(store, 9)
    assert load_marker(folder) == 4


def test_the_lock_of_another_process_holds_until_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from hamts.stream_store import StateStore\n"
        f"store = StateStore({str(tmp_path / 'state')!r}); print('locked', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(StateFolderError, match=f"E-STATE-LOCKED.*process {holder.pid}"):
            StateStore(tmp_path / "state")
        holder.kill()
    with StateStore(tmp_path / "state") as store:
        commit(store, 1)


def test_a_reader_sees_whole_states_while_a_writer_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer commits twice between the reader's look at CURRENT.json and its look at the files."""
    import hamts.stream_store as module

    with StateStore(tmp_path) as writer:
        commit(writer, 1)
        reader, read, times = StateStore(tmp_path, read_only=True), module.read_generation, iter((2, 4))

        def overtaken(folder: Path, wanted: Any) -> Any:
            for marker in times:
                commit(writer, marker)
                commit(writer, marker + 1)
                break
            return read(folder, wanted)

        monkeypatch.setattr(module, "read_generation", overtaken)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert marker_of(reader) == 5


# --- a disk that fails


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, nth: int, number: int = errno.ENOSPC) -> None:
    """Let the nth call of a function of ``os`` fail, and all after it."""
    real, calls = getattr(os, name), 0

    def failing(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= nth:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    monkeypatch.setattr(os, name, failing)


# a commit flushes arrays, document, folder, CURRENT.json and the folder again, and renames the three files
@pytest.mark.parametrize(("name", "nth"), [*(("fsync", n) for n in range(1, 5)), *(("replace", n) for n in (1, 2, 3))])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_commit_that_fails_changes_nothing_and_can_be_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int, number: int
) -> None:
    with StateStore(folder) as store:
        assert marker_of(store) == 2
        with monkeypatch.context() as patch:
            fail_at(patch, name, nth, number)
            with pytest.raises(StateFolderError, match="E-STATE-WRITE.*generation 1 is still the last"):
                commit(store, 3)
        assert not list(folder.glob(".*"))
        assert marker_of(StateStore(folder, read_only=True)) == 2
        commit(store, 4)
    assert load_marker(folder) == 4


def test_a_short_write_is_not_committed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = open

    def full_disk(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        file = real(path, mode, *rest, **more)
        if "x" not in mode:
            return file
        inner = file.write

        class Full:
            def __enter__(self) -> Any:
                return self

            def __exit__(self, *exception: object) -> None:
                file.close()

            def __getattr__(self, attribute: str) -> Any:
                return getattr(file, attribute)

            def write(self, content: bytes) -> int:
                inner(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return Full()

    with StateStore(folder) as store:
        store.load(MODEL)
        with monkeypatch.context() as patch:
            patch.setattr(builtins, "open", full_disk)
            with pytest.raises(StateFolderError, match="E-STATE-WRITE.*No space left"):
                commit(store, 3)
    assert not list(folder.glob(".*"))
    assert load_marker(folder) == 2


def test_a_disk_that_fails_after_the_commit_point_leaves_it_open_which_state_holds(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StateStore(folder) as store:
        store.load(MODEL)
        with monkeypatch.context() as patch:
            fail_at(patch, "fsync", 5)
            with pytest.raises(StateFolderError, match="E-STATE-UNSURE"):
                commit(store, 3)
        # another commit could hide that rows were read twice
        with pytest.raises(StateFolderError, match="E-STATE-UNSURE"):
            commit(store, 4)
    assert load_marker(folder) == 3


def test_old_files_that_cannot_be_deleted_do_not_stop_the_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StateStore(folder) as store:
        store.load(MODEL)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no")))
            commit(store, 3)
        assert len(files_of(folder, 0)) == 2
        commit(store, 4)
        assert len(files_of(folder, 0)) == 0
    assert load_marker(folder) == 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_cannot_be_written_to_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        fail_at(patch, "open", 1, number)
        with pytest.raises(StateFolderError, match="E-STATE-READONLY.*nothing can be written"):
            StateStore(tmp_path)


def test_a_disk_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StateFolderError, match="E-STATE-WRITE.*No locks available"):
        StateStore(tmp_path)


# --- files of versions that were released


def test_golden_files_of_version_1_0_are_read_for_ever(tmp_path: Path) -> None:
    assert sum(path.stat().st_size for path in GOLDEN.iterdir()) < 100_000
    shutil.copytree(GOLDEN, tmp_path / "state")
    with StateStore(tmp_path / "state") as store:
        loaded = store.load(FakeStream.model_hash)
    assert loaded is not None
    assert loaded.commit.generation == 3
    assert loaded.commit.position == {"row": 9}
    stream = FakeStream.from_state(None, loaded.arrays, loaded.meta)
    assert stream.state_hash() == loaded.commit.state_hash
    expected = FakeStream()
    expected.update(np.arange(9.0))
    assert stream.state_hash() == expected.state_hash()


def test_no_stored_file_holds_a_pickle(folder: Path) -> None:
    import pickletools

    for path in [*folder.iterdir(), *GOLDEN.iterdir()]:
        if path.name == "LOCK":
            continue
        with pytest.raises(Exception):  # noqa: B017 - whatever it says, it is no pickle
            pickletools.dis(path.read_bytes(), out=io.StringIO())
