"""A stream's state on disk comes back as it was committed, or says why not."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stream_fakes import FakeStream

from hamts.errors import DataWarning, StateFolderError
from hamts.storage_arrays import KINDS
from hamts.storage_checks import seal
from hamts.stream_generations import CURRENT, envelope
from hamts.stream_store import StateStore

MODEL = "ab" * 32
GOLDEN = Path(__file__).parent / "golden" / "stream-1.0"


def commit(store: StateStore, marker: float) -> None:
    store.commit(
        {"a": np.full((3, 2), marker), "layers.0.b": torch.full((4,), marker)},
        {"marker": marker, "names": ["ä", "b"]},
        model_hash=MODEL,
        state_hash=f"{marker}",
        position={"row": int(marker)},
    )


def marker_of(store: StateStore) -> float | None:
    """The marker of what is loaded, after making sure that all of it is of one commit."""
    loaded = store.load(MODEL)
    if loaded is None:
        return None
    markers = {
        loaded.meta["marker"],
        loaded.arrays["a"][0, 0].item(),
        loaded.arrays["layers.0.b"][0].item(),
        float(loaded.commit.state_hash),
        float(loaded.commit.position["row"]),
    }
    assert len(markers) == 1
    return markers.pop()


def load_marker(folder: Path) -> float | None:
    with StateStore(folder) as store:
        return marker_of(store)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two generations: markers 1 and 2."""
    with StateStore(tmp_path / "state") as store:
        assert store.load(MODEL) is None
        commit(store, 1)
        commit(store, 2)
    return tmp_path / "state"


def files_of(folder: Path, generation: int) -> list[Path]:
    return sorted(folder.glob(f"state-{generation:08d}-*"))


def assert_refused(folder: Path, code: str, *words: str, model: str = MODEL) -> StateFolderError:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with StateStore(folder) as store, pytest.raises(StateFolderError) as caught:
        store.load(model)
    assert caught.value.code == code
    assert caught.value.fix
    for word in words:
        assert word in str(caught.value)
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {**after, "LOCK": b""} == {**before, "LOCK": b""}
    return caught.value


# --- round trip


def test_every_kind_of_array_comes_back_as_it_was(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {kind: np.arange(6).reshape(2, 3).astype(kind) for kind in KINDS.values()}
    arrays |= {"transposed": np.arange(6).reshape(2, 3).T, "empty": np.zeros((0, 3)), "scalar": np.float64(2)}
    arrays |= {"nan": np.array([np.nan, -0.0, np.inf]), "tensor": torch.arange(4.0)[::2], "flag": torch.tensor(True)}
    with StateStore(tmp_path) as store:
        store.commit(arrays, {"deep": {"list": [1, None, "x"]}}, model_hash=MODEL, state_hash="s", position=None)
    loaded = StateStore(tmp_path, read_only=True).load(MODEL)
    assert loaded is not None
    assert loaded.meta == {"deep": {"list": [1, None, "x"]}}
    assert loaded.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        back = loaded.arrays[name]
        assert isinstance(back, torch.Tensor) == isinstance(array, torch.Tensor)
        assert np.asarray(back).dtype == np.asarray(array).dtype
        assert np.asarray(back).shape == np.asarray(array).shape
        assert np.asarray(back).tobytes() == np.ascontiguousarray(array).tobytes()


def test_what_is_loaded_can_be_written_to(folder: Path) -> None:
    with StateStore(folder) as store:
        loaded = store.load(MODEL)
        loaded.arrays["a"][:] = 7
        loaded.arrays["layers.0.b"] += 1
        assert marker_of(store) == 2


@pytest.mark.parametrize(
    ("arrays", "meta", "position"),
    [
        ({"../up": np.zeros(1)}, {}, None),
        ({"/abs": np.zeros(1)}, {}, None),
        ({"a..b": np.zeros(1)}, {}, None),
        ({"text": np.array(["a"])}, {}, None),
        ({"things": np.array([object()])}, {}, None),
        ({"complex": np.zeros(1, dtype=complex)}, {}, None),
        ({"half": torch.zeros(1, dtype=torch.bfloat16)}, {}, None),
        ({"list": [1.0]}, {}, None),
        ({}, {"nan": float("nan")}, None),
        ({}, {"thing": object()}, None),
        ({}, {}, {"offset": float("inf")}),
    ],
)
def test_what_could_not_be_read_back_is_refused_and_nothing_changes(
    folder: Path, arrays: Any, meta: Any, position: Any
) -> None:
    before = sorted(path.name for path in folder.iterdir())
    with StateStore(folder) as store:
        assert marker_of(store) == 2
        with pytest.raises(ValueError):
            store.commit(arrays, meta, model_hash=MODEL, state_hash="s", position=position)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert load_marker(folder) == 2


def test_two_generations_are_kept(folder: Path) -> None:
    with StateStore(folder) as store:
        store.load(MODEL)
        for marker in (3, 4, 5):
            commit(store, marker)
    assert [len(files_of(folder, generation)) for generation in range(6)] == [0, 0, 0, 2, 2, 0]
    assert load_marker(folder) == 5


def test_equal_states_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        with StateStore(tmp_path / name) as store:
            commit(store, 1)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


# --- damage


def damage_all(path: Path) -> Iterator[None]:
    """Every way to harm a file, one after the other; the file is whole again at the end."""
    original = path.read_bytes()
    for position in {*range(0, len(original), max(1, len(original) // 40)), len(original) - 1}:
        flipped = bytearray(original)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        yield
    for length in {0, 1, 7, 8, len(original) // 2, len(original) - 1}:
        path.write_bytes(original[:length])
        yield
    path.write_bytes(original + b"x")
    yield
    path.unlink()
    yield
    path.mkdir()
    yield
    path.rmdir()
    path.write_bytes(original)


@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_damage_of_the_last_generation_falls_back_to_the_one_before(folder: Path, kind: str) -> None:
    path = next(file for file in files_of(folder, 1) if file.suffix == f".{kind}")
    for _ in damage_all(path):
        with pytest.warns(DataWarning, match=r"W-STATE-FALLBACK.*generation 0.*position \{'row': 1\}"):
            assert load_marker(folder) == 1
    assert load_marker(folder) == 2


def test_damage_of_the_commit_point_is_noticed_and_the_last_generation_speaks_for_itself(folder: Path) -> None:
    for _ in damage_all(folder / CURRENT):
        with pytest.warns(DataWarning, match=r"W-STATE-FALLBACK: File 'CURRENT.json'.*generation 1.*'row': 2"):
            assert load_marker(folder) == 2
    assert load_marker(folder) == 2


@given(data=st.data())
def test_any_flipped_bit_or_cut_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("any") / "state"
    with StateStore(folder) as store:
        commit(store, 1)
        commit(store, 2)
    path = data.draw(st.sampled_from([*files_of(folder, 1), folder / CURRENT]))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[place:]
    path.write_bytes(content)
    with pytest.warns(DataWarning, match="W-STATE-FALLBACK"):
        marker = load_marker(folder)
    assert marker == (2 if path.name == CURRENT else 1)


def test_a_stream_goes_on_after_a_fallback(folder: Path) -> None:
    files_of(folder, 1)[0].write_bytes(b"")
    with StateStore(folder) as store:
        with pytest.warns(DataWarning):
            assert marker_of(store) == 1
        commit(store, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_marker(folder) == 7
    # the one before is that which was loaded, not the damaged one
    for path in files_of(folder, 1):
        path.write_bytes(b"")
    with pytest.warns(DataWarning):
        assert load_marker(folder) == 1


def test_nothing_is_reset_where_no_generation_can_be_used(folder: Path) -> None:
    for path in folder.glob("state-*.safetensors"):
        path.write_bytes(b"")
    assert_refused(folder, "E-STATE-DAMAGED", "No generation", "state-00000001")
    (folder / CURRENT).unlink()
    assert_refused(folder, "E-STATE-DAMAGED", "No generation", "CURRENT.json")


def test_strays_of_a_killed_writer_are_removed(folder: Path) -> None:
    strays = [".CURRENT.writing-12-0123abcd", ".state-00000002-0123456789abcdef.writing-3-00000000"]
    strays += ["state-00000002-0123456789abcdef.safetensors"]
    for name in strays:
        (folder / name).write_bytes(b"x")
    (folder / "notes.txt").write_text("mine")
    assert load_marker(folder) == 2
    names = {path.name for path in folder.iterdir()}
    assert names.isdisjoint(strays)
    assert "notes.txt" in names


def test_a_first_commit_that_was_cut_off_is_no_state(tmp_path: Path) -> None:
    with StateStore(tmp_path) as store:
        commit(store, 1)
    (tmp_path / CURRENT).unlink()
    assert load_marker(tmp_path) is None
    assert [path.name for path in tmp_path.iterdir()] == ["LOCK"]


# --- forged, foreign, newer


def edit_current(folder: Path, **changes: Any) -> None:
    """Change the commit point and seal it again, as another version would, or somebody who means harm."""
    document = json.loads((folder / CURRENT).read_text())
    document.pop("checksum")
    (folder / CURRENT).write_bytes(seal(document | changes))


def forge_arrays(folder: Path, content: bytes) -> None:
    """Put other bytes in the place of the last arrays and list them as if they belonged there."""
    document = json.loads((folder / CURRENT).read_text())
    entry = document["commit"]["arrays"]
    entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / entry["name"]).write_bytes(content)
    edit_current(folder, commit=document["commit"], previous=None)


def safetensors_of(header: Any, payload: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ((1 << 60).to_bytes(8, "little") + b"{}", "header claims"),
        (safetensors_of({"../../evil": ENTRY}, b"1234"), "not allowed"),
        (safetensors_of({"/etc/passwd": ENTRY}, b"1234"), "not allowed"),
        (safetensors_of({"a": {**ENTRY, "dtype": "C64"}}, b"1234"), "C64"),
        (safetensors_of({"a": {**ENTRY, "shape": [1 << 40]}}, b"1234"), "safetensors"),
        (safetensors_of({"a": {**ENTRY, "data_offsets": [0, 1 << 40]}}, b"1234"), "safetensors"),
        (safetensors_of({"a": ENTRY}, b"1234" + b"trailing"), "safetensors"),
        (safetensors_of([1, 2]), "header cannot be read"),
        (safetensors_of({"a": 3}), "header cannot be read"),
        (safetensors_of({f"a{n}": ENTRY for n in range(100_001)}, b"1234"), "100,001 arrays"),
    ],
)  # fmt: skip
def test_forged_arrays_are_refused_although_their_checksums_match(folder: Path, content: bytes, words: str) -> None:
    forge_arrays(folder, content)
    assert words in str(assert_refused(folder, "E-STATE-DAMAGED").rows)


@pytest.mark.parametrize(
    "name", ["../state-00000001-0123456789abcdef.safetensors", "/etc/passwd", "CURRENT.json", "", 3]
)
def test_forged_file_names_are_refused(folder: Path, name: Any) -> None:
    document = json.loads((folder / CURRENT).read_text())
    document["commit"]["arrays"]["name"] = name
    edit_current(folder, commit=document["commit"])
    with pytest.warns(DataWarning, match="does not describe a generation"):
        assert load_marker(folder) == 2


def test_links_are_refused(folder: Path, tmp_path: Path) -> None:
    path = files_of(folder, 1)[0]
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.warns(DataWarning, match="not a plain file"):
        assert load_marker(folder) == 1


def test_a_later_minor_version_is_read_and_a_newer_format_is_refused(folder: Path) -> None:
    document = json.loads((folder / CURRENT).read_text())
    document["commit"] |= {"invented_later": [1]}
    document["commit"]["arrays"] |= {"compression": "none"}
    edit_current(folder, format_version=[1, 9], commit=document["commit"], invented_later={})
    assert load_marker(folder) == 2
    for changes in (
        {"format_version": [2, 0], "min_reader": [2, 0]},
        {"format_version": [1, 9], "min_reader": [1, 5]},
        {"required_features": ["levels"]},
    ):
        edit_current(folder, hamts_version="9.9.9", **{**envelope_versions(), **changes})
        assert_refused(folder, "E-STATE-VERSION", "hamts 9.9.9")


def envelope_versions() -> dict[str, Any]:
    return {name: envelope()[name] for name in ("format_version", "min_reader", "required_features")}


@pytest.mark.parametrize("versions", [{"format_version": "1.0"}, {"min_reader": None}, {"format_version": [True, 0]}])
def test_versions_that_are_none_are_damage(folder: Path, versions: dict[str, Any]) -> None:
    edit_current(folder, **versions)
    with pytest.warns(DataWarning, match="versions must be two whole numbers"):
        assert load_marker(folder) == 2


def test_the_state_of_another_model_is_refused(folder: Path) -> None:
    assert_refused(folder, "E-STATE-MODEL", "abababababababab", "cdcdcdcdcdcdcdcd", model="cd" * 32)
    assert load_marker(folder) == 2


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sales.csv").write_text("mine")
    with pytest.raises(StateFolderError, match="E-STATE-FOREIGN.*\n.*sales.csv"):
        StateStore(tmp_path)
    (tmp_path / "sales.csv").unlink()
    (tmp_path / CURRENT).write_bytes(seal({**envelope(), "format": "hamts-model"}))
    assert_refused(tmp_path, "E-STATE-FOREIGN", "hamts-model")
    with pytest.raises(StateFolderError, match="E-STATE-FOREIGN"):
        StateStore(tmp_path / "missing", read_only=True)


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
