"""Results small enough for a repository: one compressed file a rung, and errors as means over eight sequences.

Sequences are independent, so intervals that resample means of eight of them are right, and a little wider.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hamts.errors import DataError
from hamts.files import written_whole

__all__ = ["pack_folder", "packed_documents", "sequence_errors"]

SEQUENCES_TOGETHER = 8
SUFFIX = ".json.gz"


def sequence_errors(content: dict[str, Any]) -> np.ndarray | None:
    """Errors of the sequences a document was scored on, [n], or means of a few of them; None where none are kept."""
    if not content.get("path"):
        return None
    path, name = Path(content["path"]), content.get("packed", "errors")
    table = path.with_name(path.name.removesuffix(SUFFIX) + ".npz") if "packed" in content else path.with_suffix(".npz")
    if not table.is_file():
        return None
    with np.load(table, allow_pickle=False) as archive:
        return archive[name].reshape(-1) if name in archive else None


def packed_documents(root: Path) -> Iterator[dict[str, Any]]:
    """Documents of the packed rungs of a folder."""
    for path in sorted(root.glob(f"*/*{SUFFIX}")):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                documents = json.load(file)
        except (ValueError, OSError) as error:
            raise DataError(
                "E-PROBE-DAMAGED", f"'{path}' is no packed rung ({error}).", fix="Remove it and pack again."
            ) from error
        for content in documents:
            content["path"] = str(path)
            yield content


def pack_folder(folder: str | Path, target: str | Path) -> list[Path]:
    """Pack a folder of results, finished or not, one file a rung; rungs that are there already are written anew."""
    from probes.results import RUN_FILE, read_documents

    root, written = Path(target), []
    rungs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for content in read_documents(folder, partial=True):
        identity = content["identity"]
        rungs.setdefault((identity["suite"], identity["rung"]), []).append(content)
    for (suite, rung), documents in rungs.items():
        path = root / suite / f"{rung}{SUFFIX}"
        errors: dict[str, Any] = {}
        for content in documents:
            found = sequence_errors(content)
            again = "packed" in content
            content["packed"] = content.get("packed") or Path(content["path"]).stem
            if found is not None:
                errors[content["packed"]] = found if again else _together(found)
            del content["path"]
        with written_whole(path) as partial, gzip.GzipFile(partial, "wb", mtime=0) as file:
            file.write(json.dumps(documents, separators=(",", ":"), allow_nan=True).encode())
        with written_whole(path.with_name(f"{rung}.npz")) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **errors)
        written.append(path)
    run = json.loads((Path(folder) / RUN_FILE).read_text(encoding="utf-8"))
    with written_whole(root / RUN_FILE) as partial:
        partial.write_text(json.dumps({**run, "documents": []}, indent=1), encoding="utf-8")
    return written


def _together(errors: np.ndarray) -> np.ndarray:
    """Means of sequences, eight at a time; a rest keeps its own mean."""
    if len(errors) % SEQUENCES_TOGETHER:
        return errors.astype(np.float32)
    return errors.reshape(-1, SEQUENCES_TOGETHER).mean(1).astype(np.float32)
