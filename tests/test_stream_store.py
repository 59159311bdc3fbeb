"""A stream's state on disk comes back as it was committed, or says why not."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stream_folders import MODEL, assert_refused, commit, files_of, load_marker, marker_of, two_generations

from hamts.errors import DataWarning, StateFolderError
from hamts.storage_arrays import KINDS
from hamts.storage_checks import seal
from hamts.stream_generations import CURRENT, envelope
from hamts.stream_store import StateStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two generations: markers 1 and 2."""
    return two_generations(tmp_path / "state")


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
