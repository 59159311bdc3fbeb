"""One writer for each folder: a lock that belongs to a process and ends with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from hamts.errors import StateFolderError
from hamts.storage import sync_folder

__all__ = ["LOCK", "lock_folder"]

LOCK = "LOCK"
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


def lock_folder(folder: Path) -> int:
    """Hold the folder for this process; the lock goes with the process, so a killed one never leaves it behind."""
    try:
        import fcntl
    except ImportError as error:
        raise StateFolderError(
            "E-STATE-LOCKED", "A stream's state needs file locks, which this system lacks.", fix="Use Linux or macOS."
        ) from error
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise _not_opened(folder, error) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
    except OSError as error:
        holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise _not_opened(folder, error) from error
        raise StateFolderError(
            "E-STATE-LOCKED",
            f"Another writer has '{folder}' open" + (f", process {holder}." if holder else "."),
            fix="Stop it, or give this stream a folder of its own; read_only=True looks at it without writing.",
        ) from error
    return handle


def _not_opened(folder: Path, error: OSError) -> StateFolderError:
    if error.errno in _READ_ONLY:
        return StateFolderError(
            "E-STATE-READONLY",
            f"A stream's state must be writable, but nothing can be written into '{folder}': {error}.",
            fix="Give a folder that this user may write to; read_only=True looks at a state without writing.",
        )
    return StateFolderError(
        "E-STATE-WRITE", f"'{folder}' cannot be opened to hold a stream's state: {error}.", fix="Give another folder."
    )
