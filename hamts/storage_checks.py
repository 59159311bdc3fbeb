"""What a stored folder must be before anything in it is believed.

Every check that fails is a ``ModelFolderError`` that names the file. Names and sizes are checked before anything is
read, checksums before anything is parsed, and nothing that is parsed can name code.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamts.errors import DataError, ModelFolderError

if TYPE_CHECKING:
    import torch

__all__ = [
    "BLANK_CHECKSUM",
    "MANIFEST",
    "check_format",
    "check_names",
    "damaged",
    "open_sealed",
    "parse_document",
    "parse_tensors",
    "read_file",
    "read_manifest",
    "seal",
]

MANIFEST = "manifest.json"
# stands in the place of the manifest's own checksum while that is computed
BLANK_CHECKSUM = "0" * 64

_FILE = re.compile(r"[a-z][a-z0-9_-]{0,63}\.(safetensors|json)")
_MANIFEST_LIMIT_BYTES = 1 << 20
_DOCUMENT_LIMIT_BYTES = 1 << 28
_HEADER_LIMIT_BYTES = 1 << 25

# makes the error of a file that cannot be used, from its folder, its name and what is wrong
Refusal = Callable[[Path, str, str], DataError]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after its own checksum and the shape of its entries were checked."""
    if not os.path.lexists(folder / MANIFEST):
        raise ModelFolderError(
            "E-MODEL-FOREIGN",
            f"'{folder}' is not a model folder: it has no {MANIFEST}.",
            fix="Give the folder that was passed to save.",
        )
    manifest = open_sealed(folder, MANIFEST, read_file(folder, MANIFEST, limit=_MANIFEST_LIMIT_BYTES))
    if not isinstance(manifest.get("files"), dict):
        raise damaged(folder, MANIFEST, "it lists no files")
    return manifest


def seal(document: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON document that begins with a checksum of itself. NaN and infinities are refused."""
    text = json.dumps({"checksum": BLANK_CHECKSUM, **document}, indent=1, allow_nan=False)
    # of the text with a blank in its own place, so that every byte of the file is covered
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return text.replace(BLANK_CHECKSUM, checksum, 1).encode()


def open_sealed(folder: Path, name: str, content: bytes, refuse: Refusal | None = None) -> dict[str, Any]:
    """The document that ``seal`` made, after its checksum was checked."""
    refuse = refuse or damaged
    document = parse_document(folder, name, content, refuse)
    checksum = document.get("checksum")
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        raise refuse(folder, name, "it has no checksum of its own")
    if hashlib.sha256(content.replace(checksum.encode(), BLANK_CHECKSUM.encode(), 1)).hexdigest() != checksum:
        raise refuse(folder, name, "its content does not match its own checksum")
    return document


def check_format(folder: Path, manifest: Mapping[str, Any], *, format_name: str, format_major: int) -> None:
    if manifest.get("format") != format_name:
        raise ModelFolderError(
            "E-MODEL-FOREIGN",
            f"'{folder}' must hold format '{format_name}'. Got {manifest.get('format')!r} in {MANIFEST}.",
            fix="Load it with the function that matches what was saved.",
        )
    version, required = manifest.get("format_version"), manifest.get("required_features", [])
    if not (isinstance(version, list) and len(version) == 2 and all(type(part) is int for part in version)):
        raise damaged(folder, MANIFEST, f"format_version must be two whole numbers, got {version!r}")
    # a higher minor version only adds what an old reader may leave out
    if version[0] != format_major or required:
        wanted = f"version {version[0]}.{version[1]}" + (f" with {required}" if required else "")
        raise ModelFolderError(
            "E-MODEL-VERSION",
            f"'{folder}' has {wanted} of format '{format_name}'; this hamts reads version {format_major}.",
            fix=f"Use hamts {manifest.get('hamts_version')}, which wrote it, or a later one.",
        )


def check_names(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that the manifest lists, after checking that they stay inside the folder and that there are no more."""
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, entry in files.items():
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise damaged(folder, MANIFEST, f"it lists a file with a name that is not allowed, {name!r}")
        size = entry.get("size") if isinstance(entry, dict) else None
        limit = _DOCUMENT_LIMIT_BYTES if name.endswith(".json") else None
        if type(size) is not int or size < 0 or (limit is not None and size > limit):
            raise damaged(folder, MANIFEST, f"the size that it gives for {name!r} is not usable, {size!r}")
        if not isinstance(entry.get("sha256"), str):
            raise damaged(folder, MANIFEST, f"it gives no checksum for {name!r}")
    extra = sorted({entry.name for entry in os.scandir(folder)} - {MANIFEST, *files})
    if extra:
        raise ModelFolderError(
            "E-MODEL-EXTRA",
            f"The model folder '{folder}' holds something that its {MANIFEST} does not list.",
            rows=extra,
            fix="Move it elsewhere; a model folder holds the model and nothing else.",
        )
    return files


def read_file(
    folder: Path, name: str, *, size: int | None = None, limit: int | None = None, refuse: Refusal | None = None
) -> bytes:
    """All bytes of a plain file; links are refused, since they lead out of the folder."""
    refuse = refuse or damaged
    try:
        status = os.lstat(folder / name)
    except FileNotFoundError:
        raise refuse(folder, name, "it is missing") from None
    except OSError as error:
        raise refuse(folder, name, f"it cannot be read ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise refuse(folder, name, "it is not a plain file (links and folders are refused)")
    if size is not None and status.st_size != size:
        raise refuse(folder, name, f"it has {status.st_size:,} bytes where {size:,} were written")
    if limit is not None and status.st_size > limit:
        raise refuse(folder, name, f"it has {status.st_size:,} bytes where at most {limit:,} are expected")
    try:
        return (folder / name).read_bytes()
    except OSError as error:
        raise refuse(folder, name, f"it cannot be read ({error})") from error


def parse_document(folder: Path, name: str, content: bytes, refuse: Refusal | None = None) -> dict[str, Any]:
    refuse = refuse or damaged

    def refuse_constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        document = json.loads(content.decode("utf-8"), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise refuse(folder, name, f"it is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise refuse(folder, name, f"it must hold a JSON object, got {type(document).__name__}")
    return document


def parse_tensors(folder: Path, name: str, content: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    header_bytes = int.from_bytes(content[:8], "little")
    if header_bytes > min(_HEADER_LIMIT_BYTES, len(content) - 8):
        raise damaged(folder, name, f"its header claims {header_bytes:,} bytes of {len(content):,}")
    try:
        return load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise damaged(folder, name, f"it is not a safetensors file ({error})") from error


def damaged(folder: Path, name: str, what: str) -> ModelFolderError:
    return ModelFolderError(
        "E-MODEL-DAMAGED",
        f"File '{name}' of the model folder '{folder}' cannot be used: {what}.",
        fix="Copy the folder again from where it was saved, or fit and save the model anew.",
    )
