"""A stored folder comes back bit for bit, or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hamts import storage
from hamts.errors import ModelFolderError
from hamts.storage import load_folder, save_folder

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.complex64,
]  # fmt: skip
FILES = ("manifest.json", "weights.safetensors", "state.safetensors", "config.json")


def save_small(path: Path, marker: float = 1.0) -> None:
    tensors = {
        "weights": {"a": torch.full((3, 2), marker), "b": torch.arange(4)},
        "state": {"s": torch.full((5,), marker, dtype=torch.float64)},
    }
    save_folder(path, tensors=tensors, documents={"config": {"marker": marker, "names": ["ä", "b"]}})


def marker_of(path: Path) -> float:
    """The marker of a saved folder, after making sure that all its files are of one save."""
    stored = load_folder(path)
    markers = {
        stored.documents["config"]["marker"],
        stored.tensors["weights"]["a"][0, 0].item(),
        stored.tensors["state"]["s"][0].item(),
    }
    assert len(markers) == 1
    return markers.pop()


def edit_manifest(path: Path, **changes: object) -> None:
    """Change the manifest and sign it again, as somebody who means harm would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest |= changes | {"checksum": "0" * 64}
    text = json.dumps(manifest)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(text.replace("0" * 64, checksum, 1))


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Put other content into a file and list it as if it belonged there."""
    (path / name).write_bytes(content)
    files = json.loads((path / "manifest.json").read_text())["files"]
    files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit_manifest(path, files=files)


def assert_refused(path: Path, code: str, *words: str) -> None:
    with pytest.raises(ModelFolderError) as caught:
        load_folder(path)
    assert caught.value.code == code
    assert caught.value.fix
    for word in words:
        assert word in str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_small(tmp_path / "model")
    return tmp_path / "model"


# --- round trip


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path: Path, generator: torch.Generator) -> None:
    raw = torch.randint(0, 2, (6, 16), dtype=torch.uint8, generator=generator)
    group = {str(dtype).removeprefix("torch."): raw.view(dtype) for dtype in DTYPES}
    group |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "nan": torch.tensor([float("nan"), -0.0])}
    group |= {"transposed": torch.arange(6).reshape(2, 3).T, "parameter": torch.nn.Parameter(torch.ones(2))}
    group["tied"] = group["scalar"]
    save_folder(tmp_path / "m", tensors={"weights": group}, documents={})
    stored = load_folder(tmp_path / "m").tensors["weights"]
    assert stored.keys() == group.keys()
    for name, tensor in group.items():
        assert stored[name].dtype == tensor.dtype
        assert stored[name].shape == tensor.shape
        assert stored[name].flatten().view(torch.uint8).equal(tensor.detach().contiguous().flatten().view(torch.uint8))


def test_loaded_tensors_can_be_written_to_and_share_nothing(model: Path) -> None:
    first, second = load_folder(model).tensors["weights"], load_folder(model).tensors["weights"]
    first["a"] += 1
    assert first["a"][0, 0] == 2
    assert second["a"][0, 0] == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(document=st.dictionaries(st.text(), json_values, max_size=4))
def test_documents_come_back_equal(tmp_path_factory: pytest.TempPathFactory, document: dict) -> None:
    path = tmp_path_factory.mktemp("document") / "m"
    save_folder(path, tensors={}, documents={"config": document})
    assert load_folder(path).documents == {"config": document}


def test_manifest_says_what_wrote_the_folder(model: Path) -> None:
    manifest = load_folder(model).manifest
    assert manifest["format"] == "hamts-model"
    assert manifest["format_version"] == [1, 0]
    assert manifest["torch_version"] == torch.__version__
    assert sorted(manifest["files"]) == sorted(FILES[1:])


@pytest.mark.parametrize("key", ["manifest", "../up", "/abs", "Upper", "", "a.b", "a/b"])
def test_keys_that_are_no_plain_names_are_refused_before_writing(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        save_folder(tmp_path / "m", tensors={}, documents={key: {}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_a_document_that_is_not_json_writes_nothing(tmp_path: Path, value: object) -> None:
    with pytest.raises(ValueError, match="config"):
        save_folder(tmp_path / "m", tensors={}, documents={"config": {"value": value}})
    assert list(tmp_path.iterdir()) == []


# --- damage


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_noticed(model: Path, name: str) -> None:
    original = (model / name).read_bytes()
    for position in sorted({*range(0, len(original), 7), len(original) - 1}):
        damaged = bytearray(original)
        damaged[position] ^= 1 << (position % 8)
        (model / name).write_bytes(damaged)
        assert_refused(model, "E-MODEL-DAMAGED", name)
    (model / name).write_bytes(original)
    assert marker_of(model) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_longer_file_is_noticed(model: Path, name: str) -> None:
    original = (model / name).read_bytes()
    for content in (b"", original[:1], original[: len(original) // 2], original[:-1], original + b"\n"):
        (model / name).write_bytes(content)
        assert_refused(model, "E-MODEL-DAMAGED", name)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    assert_refused(model, "E-MODEL-DAMAGED", name, "missing")


def test_other_folders_files_and_nothing_are_told_apart(model: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent", "E-MODEL-MISSING", "absent")
    (tmp_path / "file").write_text("x")
    assert_refused(tmp_path / "file", "E-MODEL-FOREIGN", "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "weights.ckpt").write_bytes(b"x")
    assert_refused(tmp_path / "folder", "E-MODEL-FOREIGN", "manifest.json")
    (model / "notes.txt").write_text("mine")
    assert_refused(model, "E-MODEL-EXTRA", "notes.txt")


def test_a_folder_of_another_format_is_refused(tmp_path: Path) -> None:
    save_folder(tmp_path / "s", tensors={}, documents={}, format_name="hamts-stream")
    assert_refused(tmp_path / "s", "E-MODEL-FOREIGN", "hamts-stream", "hamts-model")
    assert load_folder(tmp_path / "s", format_name="hamts-stream").tensors == {}


def test_a_newer_minor_version_is_read_and_a_newer_major_refused(model: Path) -> None:
    edit_manifest(model, format_version=[1, 9], something_new=3)
    assert marker_of(model) == 1
    edit_manifest(model, format_version=[1, 9], required_features=["compressed"])
    assert_refused(model, "E-MODEL-VERSION", "compressed")
    edit_manifest(model, format_version=[2, 0], required_features=[], hamts_version="9.9")
    assert_refused(model, "E-MODEL-VERSION", "2.0", "9.9")
    edit_manifest(model, format_version="2")
    assert_refused(model, "E-MODEL-DAMAGED", "format_version")


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/passwd", "a/b.json", "x.pkl", "manifest.json", "", "c:\\x.json"]
)
def test_a_listed_name_that_leads_out_of_the_folder_is_refused(model: Path, name: str) -> None:
    files = json.loads((model / "manifest.json").read_text())["files"]
    edit_manifest(model, files=files | {name: {"sha256": "0" * 64, "size": 1}})
    assert_refused(model, "E-MODEL-DAMAGED", "manifest.json")


@pytest.mark.parametrize("entry", [None, 3, {}, {"size": -1, "sha256": ""}, {"size": 2**80, "sha256": ""}, {"size": 1}])
def test_a_manifest_entry_of_another_shape_is_refused(model: Path, entry: object) -> None:
    edit_manifest(model, files={"config.json": entry})
    assert_refused(model, "E-MODEL-DAMAGED", "manifest.json")


def test_links_are_refused(model: Path, tmp_path: Path) -> None:
    for name in FILES:
        moved = tmp_path / f"moved-{name}"
        shutil.move(model / name, moved)
        (model / name).symlink_to(moved)
        assert_refused(model, "E-MODEL-DAMAGED", name, "plain file")
        (model / name).unlink()
        shutil.move(moved, model / name)
    assert marker_of(model) == 1


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b'{"a": ' * 100_000],
    ids=["empty", "list", "open", "not text", "nan", "deep list", "deep object"],
)
def test_a_document_that_is_not_a_json_object_is_refused_though_signed(model: Path, content: bytes) -> None:
    replace_file(model, "config.json", content)
    assert_refused(model, "E-MODEL-DAMAGED", "config.json")


def safetensors_bytes(header: object, payload: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        (2**63).to_bytes(8, "little") + b"{}",
        (1 << 26).to_bytes(8, "little") + b" " * (1 << 26),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}, b"1234"),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000]}}, b"1234"),
        safetensors_bytes({"a": {"dtype": "EVIL", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345678"),
        b"\x80\x04\x95\x00",
    ],
    ids=["empty", "short", "huge header", "giant header", "shape", "offsets", "dtype", "spare bytes", "pickle"],
)
def test_tensors_that_lie_about_themselves_are_refused_though_signed(model: Path, content: bytes) -> None:
    replace_file(model, "weights.safetensors", content)
    assert_refused(model, "E-MODEL-DAMAGED", "weights.safetensors")


# --- replacing, failing, dying


def test_a_model_is_replaced_as_a_whole_and_nothing_stays_behind(model: Path) -> None:
    save_folder(model, tensors={}, documents={"config": {"marker": 2}})
    assert sorted(entry.name for entry in model.iterdir()) == ["config.json", "manifest.json"]
    assert [entry.name for entry in model.parent.iterdir()] == ["model"]


def test_an_empty_folder_and_a_link_to_a_model_may_be_saved_to(model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_small(tmp_path / "empty", 3.0)
    assert marker_of(tmp_path / "empty") == 3
    (tmp_path / "link").symlink_to(model)
    save_small(tmp_path / "link", 4.0)
    assert (tmp_path / "link").is_symlink()
    assert marker_of(model) == 4


def test_a_folder_that_is_not_a_model_is_never_replaced(model: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> None:
        before = sorted(str(entry) for entry in tmp_path.rglob("*"))
        with pytest.raises(ModelFolderError) as caught:
            save_small(path)
        assert caught.value.code == "E-MODEL-FOREIGN"
        assert sorted(str(entry) for entry in tmp_path.rglob("*")) == before

    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    refused(tmp_path / "work")
    (tmp_path / "work" / "manifest.json").write_text('{"format": "hamts-model"}')
    refused(tmp_path / "work")
    refused(tmp_path / "work" / "thesis.tex")
    (model / "notes.txt").write_text("mine")
    refused(model)
    (model / "notes.txt").unlink()
    edit_manifest(model, format="hamts-stream")
    refused(model)


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    """Let the n-th call of a function of ``os`` fail as a full disk does."""
    real, calls = getattr(os, name), iter(range(10_000))

    def failing(*args: object, **kwargs: object) -> object:
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("name", "calls"),
    # the first mkdir asks for the parent folder, which is there; a first save renames once
    [("mkdir", [1]), ("fsync", range(6)), ("rename", [0, 1]), ("open", range(3))],
)
def test_a_full_disk_at_any_step_leaves_the_old_model_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, calls: Sequence[int], existing: bool
) -> None:
    if existing:
        save_small(tmp_path / "m", 1.0)
    for nth in calls if existing or name != "rename" else [0]:
        with monkeypatch.context() as patch:
            fail_at(patch, name, nth)
            with pytest.raises(ModelFolderError) as caught:
                save_small(tmp_path / "m", 2.0)
        assert caught.value.code == "E-MODEL-WRITE"
        assert "No space left" in str(caught.value)
        assert [entry.name for entry in tmp_path.iterdir()] == (["m"] if existing else [])
        if existing:
            assert marker_of(tmp_path / "m") == 1


def test_a_folder_without_permission_is_reported_and_left_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        # chmod does not stop root, who runs many test machines
        patch.setattr(os, "mkdir", refuse)
        with pytest.raises(ModelFolderError, match="Permission denied"):
            save_small(model, 2.0)
    assert marker_of(model) == 1


def test_a_read_only_folder_can_be_loaded(model: Path) -> None:
    for path in (*model.iterdir(), model, model.parent):
        path.chmod(0o500 if path.is_dir() else 0o400)
    try:
        assert marker_of(model) == 1
        if os.geteuid() != 0:
            with pytest.raises(ModelFolderError, match="could not be written"):
                save_small(model, 2.0)
    finally:
        model.parent.chmod(0o700)
        model.chmod(0o700)


KILL = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_storage import save_small

folder, steps = Path(sys.argv[1]), ("mkdir", "open", "fsync", "rename", "rmdir", "unlink")
save_small(folder / "0" / "m", 1.0)
for moment in range(1, 100):
    child = os.fork()
    if child == 0:
        left = [moment]
        def watch(real):
            def step(*args, **kwargs):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            return step
        (folder / str(moment)).mkdir()
        save_small(folder / str(moment) / "m", 1.0)
        for name in steps:
            setattr(os, name, watch(getattr(os, name)))
        save_small(folder / str(moment) / "m", 2.0)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(moment)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
def test_a_kill_at_any_step_leaves_one_whole_model_and_the_next_save_cleans_up(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILL, str(tmp_path), str(Path(__file__).parent)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    moments = int(ran.stdout)
    # a folder, four files, their flushes, two renames and the removal of the old model at the least
    assert moments > 12
    found = [marker_of(tmp_path / str(moment) / "m") for moment in range(1, moments)]
    assert found == sorted(found)
    assert set(found) == {1.0, 2.0}
    for moment in range(1, moments):
        save_small(tmp_path / str(moment) / "m", 3.0)
        assert [entry.name for entry in (tmp_path / str(moment)).iterdir()] == ["m"]
        assert marker_of(tmp_path / str(moment) / "m") == 3


def test_a_reader_of_an_old_model_that_is_being_deleted_finds_the_new_one(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = model.with_name(f".{model.name}.replaced"), model.with_name("new")
    os.rename(model, old)
    save_small(new, 2.0)
    # as a deletion begins it, between a reader's first look and its second
    (old / "manifest.json").unlink()
    with pytest.raises(ModelFolderError, match="E-MODEL-FOREIGN"):
        load_folder(model)
    plain = storage.read_manifest

    def replaced(folder: Path) -> dict[str, Any]:
        if new.exists():
            os.rename(new, model)
        return plain(folder)

    monkeypatch.setattr(storage, "read_manifest", replaced)
    assert marker_of(model) == 2.0


def test_two_writers_and_a_reader_never_meet_half_a_model(model: Path) -> None:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_save_often, args=(model, float(marker))) for marker in (2, 3)]
    for writer in writers:
        writer.start()
    seen = {marker_of(model) for _ in range(60)}
    for writer in writers:
        writer.join(timeout=30)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {1.0, 2.0, 3.0}
    assert [entry.name for entry in model.parent.iterdir()] == ["model"]


def _save_often(path: Path, marker: float) -> None:
    for _ in range(15):
        save_small(path, marker)
