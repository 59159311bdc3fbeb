"""One folder format for everything that was fitted: safetensors + JSON, checked on the way in, replaced as a whole.

    manifest.json         format, version, who wrote it, SHA-256 and size of every other file, and a checksum of itself
    <key>.safetensors     one file for each set of tensors, such as ``weights`` and ``state``
    <key>.json            one file for each document, such as ``config``

A save writes a complete sibling folder, flushes it to disk and then renames it into place, so that a reader finds the
old model or the new one. Where the machine stops between the two renames of a replacement, the old model is whole under
``.<name>.replaced``: ``load_folder`` reads it there and the next ``save_folder`` puts it back. Nothing here is pickled.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamts.errors import ModelFolderError
from hamts.storage_checks import (
    MANIFEST,
    check_format,
    check_names,
    damaged,
    parse_document,
    parse_tensors,
    read_file,
    read_manifest,
    seal,
)

if TYPE_CHECKING:
    import torch

__all__ = ["MODEL_FORMAT", "StoredFolder", "load_folder", "save_folder", "sync_folder"]

MODEL_FORMAT = "hamts-model"

_KEY = re.compile(r"[a-z][a-z0-9_-]{0,63}")


@dataclass(frozen=True)
class StoredFolder:
    """What a folder held. ``tensors`` and ``documents`` have the keys that were given to ``save_folder``."""

    tensors: dict[str, dict[str, torch.Tensor]]
    documents: dict[str, dict[str, Any]]
    manifest: dict[str, Any]


def save_folder(
    path: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
    documents: Mapping[str, Mapping[str, Any]],
    format_name: str = MODEL_FORMAT,
    format_version: tuple[int, int] = (1, 0),
) -> None:
    """Write a folder, all or nothing. A folder of the same format at ``path`` is replaced, any other is refused.

    Tensors may be on any device and share memory; they are stored apart, contiguous. Documents follow the rules of
    JSON: tuples come back as lists, and NaN and infinities are refused.
    """
    target = Path(path).resolve()
    # everything that can be refused is refused before anything is written
    payload = _payload(tensors, documents)
    payload[MANIFEST] = _manifest_bytes(payload, format_name=format_name, format_version=format_version)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(target.parent):
            _restore_interrupted(target)
            _refuse_foreign(target, format_name=format_name)
            _remove_leftovers(target)
            _write_and_swap(target, payload)
    except OSError as error:
        raise ModelFolderError(
            "E-MODEL-WRITE",
            f"The model could not be written to '{target}': {error}. What was there before is unchanged.",
            fix="Give a folder on a disk that is writable and has room.",
        ) from error


def load_folder(
    path: str | os.PathLike[str], *, format_name: str = MODEL_FORMAT, format_major: int = 1
) -> StoredFolder:
    """Read a folder and check all of it: every byte against its SHA-256 before anything is made from it."""
    asked = Path(path)
    folder = _readable_folder(asked, format_name)
    identity = _identity(folder)
    try:
        return _load_checked(folder, format_name=format_name, format_major=format_major)
    except (ModelFolderError, FileNotFoundError):
        # the old model is deleted once the new one is in place, and may have been half gone when it was first looked
        # at. This before its identity: where the place is empty again, another old model has come
        in_place = folder != asked and asked.is_dir()
        if not in_place and _identity(folder) == identity:
            raise
    # another process replaced the model while it was read: the new one is complete
    return load_folder(path, format_name=format_name, format_major=format_major)


def _readable_folder(path: Path, format_name: str) -> Path:
    """The folder to read: the one asked for, or the old model of a replacement that was cut off."""
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelFolderError(
            "E-MODEL-FOREIGN", f"A model is a folder, but '{path}' is a file.", fix="Give its folder."
        )
    # the path once more, for a replacement that was finished between the first look and the second
    for candidate in (_replaced(path.resolve()), path):
        if candidate.is_dir():
            return candidate
    raise ModelFolderError(
        "E-MODEL-MISSING", f"There is no folder '{path}' ({format_name}).", fix="Check the path, or save a model first."
    )


def _load_checked(folder: Path, *, format_name: str, format_major: int) -> StoredFolder:
    manifest = read_manifest(folder)
    check_format(folder, manifest, format_name=format_name, format_major=format_major)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    documents: dict[str, dict[str, Any]] = {}
    for name, entry in check_names(folder, manifest).items():
        content = read_file(folder, name, size=entry["size"])
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise damaged(folder, name, "its content does not match the checksum in manifest.json")
        key, _, kind = name.partition(".")
        if kind == "safetensors":
            tensors[key] = parse_tensors(folder, name, content)
        else:
            documents[key] = parse_document(folder, name, content)
    return StoredFolder(tensors, documents, manifest)


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Which folder a path leads to just now; its number alone may be that of one deleted a moment ago."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_ctime_ns


# --- writing


def _payload(
    tensors: Mapping[str, Mapping[str, torch.Tensor]], documents: Mapping[str, Mapping[str, Any]]
) -> dict[str, bytes]:
    """The bytes of every file but the manifest, by file name."""
    from safetensors.torch import save

    for key in [*tensors, *documents]:
        if not _KEY.fullmatch(key) or f"{key}.json" == MANIFEST:
            raise ValueError(f"A key must match {_KEY.pattern!r} and not be 'manifest'. Got {key!r}.")
    payload = {}
    for key, group in tensors.items():
        # cloned, since safetensors refuses tensors that share memory, as tied weights and views of a panel do
        apart = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in group.items()}
        payload[f"{key}.safetensors"] = save(apart)
    for key, document in documents.items():
        try:
            text = json.dumps(document, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Document {key!r} does not fit into JSON: {error}") from error
        payload[f"{key}.json"] = text.encode()
    return payload


def _manifest_bytes(payload: Mapping[str, bytes], *, format_name: str, format_version: tuple[int, int]) -> bytes:
    import torch

    from hamts import __version__

    files = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)} for name, content in payload.items()
    }
    manifest = {
        "format": format_name,
        "format_version": list(format_version),
        # features that a reader must know or refuse the folder, whatever its minor version
        "required_features": [],
        "hamts_version": __version__,
        "torch_version": str(torch.__version__),
        "files": files,
    }
    return seal(manifest)


def _write_and_swap(target: Path, payload: Mapping[str, bytes]) -> None:
    """Build a complete folder beside the target, then rename it into place."""
    building = target.with_name(f".{target.name}.saving-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    replaced = _replaced(target)
    committed = False
    try:
        os.mkdir(building)
        for name, content in payload.items():
            _write_durably(building / name, content)
        sync_folder(building)
        if target.exists():
            os.rename(target, replaced)
        os.rename(building, target)
        committed = True
        sync_folder(target.parent)
    except BaseException:
        if committed:
            os.rename(target, building)
        if replaced.exists() and not target.exists():
            os.rename(replaced, target)
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _only_writer(parent: Path) -> Iterator[None]:
    """Let one process at a time save into a folder; the lock goes with the process, so none is ever left behind."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(parent, os.O_RDONLY)
    try:
        # some network disks have no locks; the swap is then safe still, only two writers may disturb each other
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _restore_interrupted(target: Path) -> None:
    """Put back the old model of a replacement that was cut off between its two renames."""
    if not target.exists() and _replaced(target).is_dir():
        os.rename(_replaced(target), target)


def _remove_leftovers(target: Path) -> None:
    """Delete what killed saves of this model left: half-built folders, and an old model that has been replaced."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.saving-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if target.exists():
        shutil.rmtree(_replaced(target), ignore_errors=True)


def _refuse_foreign(target: Path, *, format_name: str) -> None:
    """Only a folder that is empty, or that holds this format and nothing else, may be replaced."""
    if not target.exists():
        return
    fix = "Choose another folder, or empty this one first."
    if target.is_file():
        raise ModelFolderError("E-MODEL-FOREIGN", f"A model is saved as a folder, but '{target}' is a file.", fix=fix)
    present = {entry.name for entry in os.scandir(target)}
    if not present:
        return
    try:
        manifest = read_manifest(target)
        known = {MANIFEST, *manifest["files"]} if manifest.get("format") == format_name else set()
    except ModelFolderError:
        known = set()
    if not known:
        raise ModelFolderError(
            "E-MODEL-FOREIGN",
            f"'{target}' is not empty and holds no {format_name} folder; it is not replaced.",
            fix=fix,
        )
    if present - known:
        raise ModelFolderError(
            "E-MODEL-FOREIGN",
            f"'{target}' holds more than a model, and replacing it would delete that.",
            rows=sorted(present - known),
            fix="Move these files elsewhere, or choose another folder.",
        )
