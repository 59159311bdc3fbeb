"""Find a data file: the folder in HAMTS_DATA, else the cache, else one checked download into the cache.

A file counts only with the SHA-256 of the catalogue (or, where everyone has to make the file, with the digest of its
values). Downloads are atomic: written beside their destination, hashed on the way, moved into
place when complete and right; whatever goes wrong, nothing half-written stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import importlib.util
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from hamts.data.forms import FileForm, Found, values_digest
from hamts.errors import DataError

__all__ = ["cache_folder", "data_folder", "find_file", "obtain_file", "package_folder", "sha256_of"]

CHUNK_BYTES = 1 << 20
TIMEOUT_SEC = 30.0

# files already hashed by this process: (path, mtime_ns, size) -> sha256
_hashed: dict[tuple[str, int, int], str] = {}
_digested: dict[tuple[str, int, int], str] = {}


def data_folder() -> Path | None:
    """The folder named by HAMTS_DATA, or None when it is unset or empty."""
    named = os.environ.get("HAMTS_DATA", "")
    return Path(named).expanduser() if named else None


def cache_folder() -> Path:
    """Where downloads go: HAMTS_CACHE, else the user's cache folder of this platform."""
    if named := os.environ.get("HAMTS_CACHE"):
        return Path(named).expanduser()
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "hamts"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "hamts"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "hamts" / "Cache"
    return Path.home() / ".cache" / "hamts"


def package_folder(package: str, *, dataset: str) -> Path:
    """Folder of an installed package, found without running any of its code."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "E-DATASET",
            f"dataset {dataset!r} is read from the package {package.replace('_', '-')!r}, which is not installed.",
            fix="pip install 'hamts[datasets]'",
        )
    return Path(spec.submodule_search_locations[0])


def sha256_of(path: Path) -> str:
    """SHA-256 of a file; remembered in this process for as long as its time and size stay the same."""
    key = _identity(path)
    if key not in _hashed:
        with path.open("rb") as stream:
            _hashed[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _hashed[key]


def _identity(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return str(path), status.st_mtime_ns, status.st_size


def is_right(found: Found) -> bool:
    """Whether a file has the bytes of its form, or, where the form says so, the same values."""
    if sha256_of(found.path) == found.form.sha256:
        return True
    if not found.form.values:
        return False
    key = _identity(found.path)
    if key not in _digested:
        try:
            _digested[key] = values_digest(found.read())
        except DataError:
            raise
        except Exception:  # a damaged file fails in as many ways as there are parsers
            _digested[key] = "unreadable"
    return _digested[key] == found.form.values


def find_file(forms: Sequence[FileForm], folders: Sequence[Path]) -> Found | None:
    """First form that lies in one of the folders, whatever its bytes are."""
    for folder in folders:
        for form in forms:
            if (folder / form.path).is_file():
                return Found(folder / form.path, form)
    return None


def obtain_file(forms: Sequence[FileForm], *, dataset: str, folder: Path | None = None, download: bool = True) -> Found:
    """A file of a dataset, checked.

    Args:
        forms: the accepted forms, preferred first.
        dataset: its name, for messages.
        folder: look here only, instead of HAMTS_DATA and the cache; nothing is downloaded then.
        download: whether the network may be asked.
    """
    own = [folder] if folder is not None else [data_folder()]
    found = find_file(forms, [place for place in own if place is not None])
    if found is not None:
        if not is_right(found):
            raise _wrong_bytes(dataset, found.path, found.form, came=sha256_of(found.path))
        return found
    if folder is not None:
        raise _absent(dataset, forms, f"it is not in {folder}", place=folder)
    return _from_cache(forms, dataset=dataset, download=download)


def _from_cache(forms: Sequence[FileForm], *, dataset: str, download: bool) -> Found:
    cache = cache_folder()
    copies = [Found(cache / form.path, form) for form in forms if (cache / form.path).is_file()]
    for copy in copies:
        if is_right(copy):
            return copy
    # a damaged copy in our own cache is replaced rather than reported, where that can be done
    public = [form for form in forms if form.url]
    if public and download:
        _download(public[0], cache / public[0].path, dataset=dataset)
        return Found(cache / public[0].path, public[0])
    if copies:
        raise _wrong_bytes(dataset, copies[0].path, copies[0].form, came=sha256_of(copies[0].path))
    why = "it is not on this machine and download=False" if public else "no public address serves it in this form"
    raise _absent(dataset, forms, why, place=data_folder() or cache)


def _download(form: FileForm, destination: Path, *, dataset: str) -> None:
    """Fetch to a temporary file in the same folder, check, make durable, then move into place."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=destination.parent, prefix=f".{destination.name}.", suffix=".part")
    except OSError as error:
        raise DataError(
            "E-DATASET",
            f"dataset {dataset!r} must be stored in {destination.parent}, which cannot be written ({error}).",
            fix="Set HAMTS_CACHE to a folder that you may write to, or HAMTS_DATA to one that holds the file.",
        ) from error
    try:
        came = _receive(form.url, handle)
        if came != form.sha256:
            raise _wrong_bytes(dataset, form.url, form, came=came)
        # temporary files are private, public data in a shared cache need not be
        os.chmod(name, 0o644)
        os.replace(name, destination)
        _sync_folder(destination.parent)
    except (OSError, http.client.HTTPException) as error:
        raise _absent(
            dataset, [form], f"fetching {form.url} failed ({error})", place=destination, exact=True
        ) from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _receive(url: str, handle: int) -> str:
    """Stream an address into an open file and make it durable; returns the SHA-256 of what came."""
    digest = hashlib.sha256()
    with os.fdopen(handle, "wb") as stream:
        request = urllib.request.Request(url, headers={"User-Agent": "hamts"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_SEC) as answer:
            expected = answer.headers.get("Content-Length")
            while chunk := answer.read(CHUNK_BYTES):
                digest.update(chunk)
                stream.write(chunk)
        if expected is not None and stream.tell() != int(expected):
            raise OSError(f"the transfer ended after {stream.tell()} of {expected} bytes")
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a rename durable where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _absent(dataset: str, forms: Sequence[FileForm], why: str, *, place: Path, exact: bool = False) -> DataError:
    target = place if exact else place / forms[0].path
    return DataError(
        "E-DATASET",
        f"dataset {dataset!r} needs a file that is not here: {why}.",
        rows=[form.describe() for form in forms],
        fix=f"Put the file at {target}, or set HAMTS_DATA to a folder that holds {forms[0].path}.",
    )


def _wrong_bytes(dataset: str, where: Path | str, form: FileForm, *, came: str) -> DataError:
    return DataError(
        "E-CHECKSUM",
        f"dataset {dataset!r}: {where} must have sha256 {form.sha256}. Got {came}.",
        fix=f"Replace it by the file meant here: {form.describe()}.",
    )
