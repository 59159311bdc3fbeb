"""Generations of a stream's state on disk: what their files are called, what they say, and which can be believed.

    CURRENT.json                          the generation that was committed last, and the one before it
    state-<generation>-<hash>.safetensors arrays
    state-<generation>-<hash>.json        everything else of the stream, and once more what CURRENT.json says of it

Nothing is parsed before its checksum was compared. A generation is self-contained: it names its model, its position
in the source and its files, so that each can be used without CURRENT.json.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamts.errors import StateFolderError
from hamts.storage_arrays import unpack_arrays
from hamts.storage_checks import open_sealed, read_file

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "CURRENT",
    "FORMAT",
    "FORMAT_VERSION",
    "Commit",
    "FileRecord",
    "Loaded",
    "check_reader",
    "damaged",
    "envelope",
    "generation_files",
    "read_current",
    "read_generation",
    "scan_commits",
]

FORMAT = "hamts-stream"
# minor versions only add what an older reader may leave out; min_reader in a file says which readers understand it
FORMAT_VERSION = (1, 0)
CURRENT = "CURRENT.json"
STATE_FILE = re.compile(r"state-(\d{8,12})-([0-9a-f]{16})\.(safetensors|json)")
_HASH = re.compile("[0-9a-f]{64}")
_CURRENT_LIMIT_BYTES = 1 << 22
_DOCUMENT_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class FileRecord:
    """One file of a generation."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, generation: int, kind: str, content: bytes) -> FileRecord:
        digest = hashlib.sha256(content).hexdigest()
        return cls(f"state-{generation:08d}-{digest[:16]}.{kind}", len(content), digest)


@dataclass(frozen=True)
class Commit:
    """What is known of one generation without its content.

    Args:
        position: where the source goes on, opaque JSON; None at the start, or where rows came from no source.
    """

    generation: int
    model_hash: str
    state_hash: str
    position: Any
    arrays: FileRecord
    document: FileRecord

    @classmethod
    def from_dict(cls, folder: Path, name: str, entry: Any) -> Commit:
        """Check every value, since a checksum only says that a file is as it was written."""
        try:
            # keys that a later minor version added are left out
            files = {
                key: FileRecord(**{part: entry[key][part] for part in ("name", "size", "sha256")})
                for key in ("arrays", "document")
            }
            plain = {key: entry[key] for key in ("generation", "model_hash", "state_hash", "position")}
            commit = cls(**plain, arrays=files["arrays"], document=files["document"])
            _check_record(commit)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(folder, name, f"it does not describe a generation ({error!r})") from error
        return commit

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _check_record(commit: Commit) -> None:
    if type(commit.generation) is not int or commit.generation < 0:
        raise ValueError(f"generation {commit.generation!r}")
    if not isinstance(commit.model_hash, str) or not isinstance(commit.state_hash, str):
        raise ValueError("hashes of model and state")
    for record, kind in ((commit.arrays, "safetensors"), (commit.document, "json")):
        found = STATE_FILE.fullmatch(record.name)
        # plain names in the folder itself, and only its own
        if found is None or found[3] != kind or int(found[1]) != commit.generation:
            raise ValueError(f"file name {record.name!r}")
        if type(record.size) is not int or record.size < 0 or not _HASH.fullmatch(record.sha256):
            raise ValueError(f"size or checksum of {record.name!r}")


@dataclass(frozen=True)
class Loaded:
    """One generation with its content."""

    commit: Commit
    arrays: dict[str, np.ndarray | torch.Tensor]
    meta: dict[str, Any]


def damaged(folder: Path, name: str, what: str) -> StateFolderError:
    return StateFolderError(
        "E-STATE-DAMAGED",
        f"File '{name}' of the state folder '{folder}' cannot be used: {what}.",
        fix="Restore the folder from a copy, or start a new one in another place and read the rows again.",
    )


def envelope() -> dict[str, Any]:
    """What every JSON file of the format begins with."""
    from hamts import __version__

    return {
        "format": FORMAT,
        "format_version": list(FORMAT_VERSION),
        "min_reader": [1, 0],
        # what a reader must know or refuse the file, whatever its minor version
        "required_features": [],
        "hamts_version": __version__,
    }


def check_reader(folder: Path, name: str, document: Mapping[str, Any]) -> None:
    """Refuse what is no state, and what only a newer hamts can read."""
    if document.get("format") != FORMAT:
        raise StateFolderError(
            "E-STATE-FOREIGN",
            f"'{folder / name}' must hold format '{FORMAT}'. Got {document.get('format')!r}.",
            fix="Give the folder that the stream was opened in.",
        )
    versions = [document.get("format_version"), document.get("min_reader")]
    for version in versions:
        if not (isinstance(version, list) and len(version) == 2 and all(type(part) is int for part in version)):
            raise damaged(folder, name, f"its versions must be two whole numbers each, got {versions!r}")
    written, needed = (tuple(version) for version in versions if isinstance(version, list))
    unknown = document.get("required_features")
    if written[0] != FORMAT_VERSION[0] or needed > FORMAT_VERSION or unknown:
        more = f", which needs {unknown}" if unknown else f", for readers of {needed[0]}.{needed[1]} and later"
        raise StateFolderError(
            "E-STATE-VERSION",
            f"'{folder / name}' has version {written[0]}.{written[1]} of format '{FORMAT}'{more}; this hamts reads"
            f" {FORMAT_VERSION[0]}.{FORMAT_VERSION[1]}. Nothing was changed.",
            fix=f"Use hamts {document.get('hamts_version')}, which wrote it, or a later one.",
        )


def read_current(folder: Path) -> list[Commit]:
    """The committed generation and the one before it, where there is one."""
    document = _read_document(folder, CURRENT, limit=_CURRENT_LIMIT_BYTES)
    entries = [document.get("commit"), document.get("previous")]
    return [Commit.from_dict(folder, CURRENT, entry) for entry in entries[: 1 if entries[1] is None else 2]]


def scan_commits(folder: Path) -> Iterator[Commit | StateFolderError]:
    """What the generations in a folder say of themselves, latest first; for those that cannot be read, why."""
    found = [(int(match[1]), name) for name, match in _state_files(folder) if match[3] == "json"]
    for _, name in sorted(found, reverse=True):
        try:
            content = read_file(folder, name, limit=_DOCUMENT_LIMIT_BYTES, refuse=damaged)
            document = open_sealed(folder, name, content, damaged)
            check_reader(folder, name, document)
            # a file cannot hold its own size and checksum
            itself = {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            yield Commit.from_dict(folder, name, {**document["commit"], "document": itself})
        except StateFolderError as error:
            if error.code != "E-STATE-DAMAGED":
                raise
            yield error
        except (KeyError, TypeError) as error:
            yield damaged(folder, name, f"it does not describe a generation ({error!r})")


def generation_files(folder: Path) -> dict[str, int]:
    """Generation of every state file in a folder, by name."""
    return {name: int(match[1]) for name, match in _state_files(folder)}


def _state_files(folder: Path) -> list[tuple[str, re.Match[str]]]:
    names = sorted(entry.name for entry in os.scandir(folder))
    return [(name, match) for name in names if (match := STATE_FILE.fullmatch(name))]


def read_generation(folder: Path, commit: Commit) -> Loaded:
    """Both files of a generation, after every byte was compared with its checksum."""
    document = open_sealed(folder, commit.document.name, _read_record(folder, commit.document), damaged)
    check_reader(folder, commit.document.name, document)
    content = _read_record(folder, commit.arrays)
    tensors, meta = document.get("tensors"), document.get("meta")
    if not isinstance(tensors, list) or not isinstance(meta, dict):
        raise damaged(folder, commit.document.name, "it has no 'tensors' or no 'meta'")
    arrays = unpack_arrays(folder, commit.arrays.name, content, tensors=tensors, refuse=damaged)
    return Loaded(commit, arrays, meta)


def _read_record(folder: Path, record: FileRecord) -> bytes:
    content = read_file(folder, record.name, size=record.size, refuse=damaged)
    if hashlib.sha256(content).hexdigest() != record.sha256:
        raise damaged(folder, record.name, "its content does not match its checksum")
    return content


def _read_document(folder: Path, name: str, *, limit: int) -> dict[str, Any]:
    document = open_sealed(folder, name, read_file(folder, name, limit=limit, refuse=damaged), damaged)
    check_reader(folder, name, document)
    return document
