"""The state of a stream on disk: one writer, one atomic commit point, two generations, never half of anything.

A commit writes the arrays and the document of a new generation beside the old ones, each to a temporary name, flushed
and renamed, flushes the folder, and then replaces CURRENT.json in the same way. That one rename is the commit: state,
watermarks and the position in the source change together or not at all. What is older than the generation before is
deleted last. A power cut at any moment leaves CURRENT.json naming a generation that is whole.

On the way in every byte is compared with its SHA-256. Where the last generation cannot be used, the one before it is,
with a warning that names the position from which rows must be given again; where none can, nothing is reset.
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hamts.errors import DataWarning, StateFolderError
from hamts.storage import sync_folder
from hamts.storage_arrays import pack_arrays
from hamts.storage_checks import seal
from hamts.stream_generations import (
    CURRENT,
    STATE_FILE,
    Commit,
    FileRecord,
    Loaded,
    envelope,
    generation_files,
    read_current,
    read_generation,
    scan_commits,
)
from hamts.stream_lock import LOCK, lock_folder

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["CRASH_AT", "MOMENTS", "STEPS", "StateStore", "reached"]

MODEL = "model"
_TEMPORARY = re.compile(r"\.(CURRENT|state-.*)\.writing-\d+-[0-9a-f]{8}")
# what a killed save of the model's copy left; the next one removes it
_MODEL_SAVING = re.compile(rf"\.{MODEL}\.(saving-.*|replaced)")
# no file of ours, but no reason to refuse a folder either
_HARMLESS = {LOCK, MODEL, "outputs", ".DS_Store", "lost+found"}

# the moments of a commit at which a process may be killed, in their order
STEPS = (
    "begun",
    *(f"{what}-{step}" for what in ("arrays", "document") for step in ("half", "written", "flushed", "renamed")),
    "folder-flushed",
    *(f"current-{step}" for step in ("half", "written", "flushed", "renamed")),
    "committed",
    "removed",
)
# the moments around it, where a stream brings out what it has to say
MOMENTS = ("updated", "staged", *STEPS, "published")
# environment variable of the crash tests: "<step>" or "<step>@<how many times it must be reached>"
CRASH_AT = "HAMTS_CRASH_AT"
_times_reached: dict[str, int] = {}


def reached(step: str) -> None:
    """Where the crash tests asked for it, end this process here as ``kill -9`` would."""
    asked = os.environ.get(CRASH_AT)
    if asked is None:
        return
    name, _, times = asked.partition("@")
    _times_reached[step] = _times_reached.get(step, 0) + 1
    if name == step and _times_reached[step] >= int(times or 1):
        os._exit(9)


class StateStore:
    """A folder that holds one stream's state. One store at a time may write to it; any number may read.

    Args:
        folder: made if it is not there.
        read_only: look at the last commit without taking the lock and without changing anything.

    Raises StateFolderError: E-STATE-LOCKED (another writer), E-STATE-READONLY, E-STATE-FOREIGN.
    """

    def __init__(self, folder: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.folder = Path(folder).resolve()
        self.read_only = read_only
        self._lock: int | None = None
        self._last: Commit | None = None
        self._unsure = False
        if read_only:
            if not self.folder.is_dir():
                raise _foreign(self.folder, f"There is no folder '{self.folder}'.")
            return
        self._lock = lock_folder(self.folder)
        try:
            self._refuse_foreign()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def last(self) -> Commit | None:
        """The generation that was loaded or committed last."""
        return self._last

    def load(self, model_hash: str) -> Loaded | None:
        """The last generation that can be believed; None where nothing was ever committed.

        Warns W-STATE-FALLBACK where that is not the last one. Raises StateFolderError: E-STATE-MODEL (the state of
        another model), E-STATE-VERSION, E-STATE-DAMAGED (no generation can be used).
        """
        while True:
            seen = self._current_bytes()
            try:
                loaded = self._load_once(model_hash)
            except StateFolderError as error:
                # a writer may have replaced what a reader was about to read
                if error.code == "E-STATE-DAMAGED" and self.read_only and seen != self._current_bytes():
                    continue
                raise
            self._last = None if loaded is None else loaded.commit
            if not self.read_only:
                self._remove_strays(loaded)
            return loaded

    def commit(
        self,
        arrays: Mapping[str, np.ndarray | torch.Tensor],
        meta: Mapping[str, Any],
        *,
        model_hash: str,
        state_hash: str,
        position: Any,
    ) -> Commit:
        """Make a state the current one, durably. When this returns, no crash can lose it.

        Raises ValueError where something cannot be stored, and StateFolderError: E-STATE-WRITE (nothing changed; try
        again), E-STATE-UNSURE (the disk failed at the last step; open the folder again to see which state holds).
        """
        self._require_writer()
        generation = self.next_generation
        content, tensors = pack_arrays(arrays)
        arrays_file = FileRecord.of(generation, "safetensors", content)
        described = {
            "generation": generation,
            "model_hash": model_hash,
            "state_hash": state_hash,
            "position": position,
            "arrays": asdict(arrays_file),
        }
        try:
            document = seal({**envelope(), "commit": described, "tensors": tensors, "meta": meta})
        except (TypeError, ValueError) as error:
            raise ValueError(f"The state or its position does not fit into JSON: {error}") from error
        document_file = FileRecord.of(generation, "json", document)
        commit = Commit(generation, model_hash, state_hash, position, arrays_file, document_file)
        previous = None if self._last is None else self._last.to_dict()
        current = seal({**envelope(), "commit": commit.to_dict(), "previous": previous})
        self._write_commit({arrays_file.name: content, document_file.name: document}, current)
        old, self._last = self._last, commit
        self._keep([commit] if old is None else [commit, old])
        reached("removed")
        return commit

    @property
    def next_generation(self) -> int:
        """Number of the generation that the next commit makes."""
        return 0 if self._last is None else self._last.generation + 1

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._lock is None

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # --- writing

    def _require_writer(self) -> None:
        if self._unsure:
            raise _unsure(self.folder, "an earlier commit was cut off")
        if self._lock is None:
            raise StateFolderError(
                "E-STATE-READONLY",
                f"'{self.folder}' was opened to be read, or was closed; nothing can be committed.",
                fix="Open it again, without read_only.",
            )

    def _write_commit(self, files: Mapping[str, bytes], current: bytes) -> None:
        reached("begun")
        try:
            for (name, content), what in zip(files.items(), ("arrays", "document"), strict=True):
                self._write(name, content, what)
            sync_folder(self.folder)
            reached("folder-flushed")
            self._write(CURRENT, current, "current")
        except OSError as error:
            raise _not_written(self.folder, error, self._last) from error
        try:
            sync_folder(self.folder)
        except OSError as error:
            # the new CURRENT.json is there, but nobody knows whether it would survive a power cut
            self._unsure = True
            raise _unsure(self.folder, str(error)) from error
        reached("committed")

    def _write(self, name: str, content: bytes, what: str) -> None:
        """A file under its own name, whole and flushed, or not at all."""
        temporary = self.folder / f".{Path(name).stem}.writing-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        half = len(content) // 2
        try:
            with open(temporary, "xb") as file:
                file.write(content[:half])
                file.flush()
                reached(f"{what}-half")
                file.write(content[half:])
                reached(f"{what}-written")
                file.flush()
                os.fsync(file.fileno())
            reached(f"{what}-flushed")
            os.replace(temporary, self.folder / name)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        reached(f"{what}-renamed")

    def _keep(self, commits: Iterable[Commit]) -> None:
        """Delete every state file that belongs to none of these. One that cannot be deleted is left for next time."""
        kept = {record.name for commit in commits for record in (commit.arrays, commit.document)}
        for name in generation_files(self.folder).keys() - kept:
            _delete(self.folder / name)

    def _remove_strays(self, loaded: Loaded | None) -> None:
        """Delete what a killed writer left: temporary files, and generations that were never committed."""
        for entry in list(os.scandir(self.folder)):
            if _TEMPORARY.fullmatch(entry.name):
                _delete(self.folder / entry.name)
        if loaded is None:
            self._keep(())
            return
        try:
            commits = read_current(self.folder)
        except StateFolderError:
            # what remains is all there is to recover from, until the next commit
            return
        self._keep(commits)

    # --- reading

    def _current_bytes(self) -> bytes | None:
        try:
            return (self.folder / CURRENT).read_bytes()
        except OSError:
            return None

    def _load_once(self, model_hash: str) -> Loaded | None:
        if not os.path.lexists(self.folder / CURRENT) and not any(generation_files(self.folder).values()):
            # at most a first commit that was cut off: nothing was ever promised
            return None
        problems: list[StateFolderError] = []
        for commit in self._candidates(problems):
            if commit.model_hash != model_hash:
                raise _other_model(self.folder, commit.model_hash, model_hash)
            try:
                loaded = read_generation(self.folder, commit)
            except StateFolderError as error:
                if error.code != "E-STATE-DAMAGED":
                    raise
                problems.append(error)
                continue
            if problems:
                _warn_of_fallback(self.folder, problems, commit)
            return loaded
        raise StateFolderError(
            "E-STATE-DAMAGED",
            f"No generation of the state in '{self.folder}' can be used. Nothing was changed.",
            rows=[error.message for error in problems],
            fix="Restore the folder from a copy, or start a new one in another place and read the rows again.",
        )

    def _candidates(self, problems: list[StateFolderError]) -> Iterable[Commit]:
        """Generations to try, best first. Without a CURRENT.json, those that the folder holds speak for themselves."""
        try:
            return read_current(self.folder)
        except StateFolderError as error:
            if error.code != "E-STATE-DAMAGED":
                raise
            problems.append(error)
        found = list(scan_commits(self.folder))
        problems += [one for one in found if isinstance(one, StateFolderError)]
        return [one for one in found if isinstance(one, Commit)]

    def _refuse_foreign(self) -> None:
        names = {entry.name for entry in os.scandir(self.folder)}
        patterns = (STATE_FILE, _TEMPORARY, _MODEL_SAVING)
        ours = {name for name in names if any(pattern.fullmatch(name) for pattern in patterns)}
        others = sorted(names - ours - _HARMLESS)
        if CURRENT not in names and others:
            raise _foreign(self.folder, f"'{self.folder}' holds no state of a stream, but other things.", rows=others)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


# --- what is said when something is wrong


def _foreign(folder: Path, message: str, **more: Any) -> StateFolderError:
    return StateFolderError("E-STATE-FOREIGN", message, fix="Give the folder of a stream, or a new one.", **more)


def _not_written(folder: Path, error: OSError, last: Commit | None) -> StateFolderError:
    kept = "nothing was committed before" if last is None else f"generation {last.generation} is still the last one"
    return StateFolderError(
        "E-STATE-WRITE",
        f"The state could not be written to '{folder}': {error}. It was not committed; {kept}.",
        fix="Make the disk writable and give it room, then commit again: the stream itself is unharmed.",
    )


def _unsure(folder: Path, what: str) -> StateFolderError:
    return StateFolderError(
        "E-STATE-UNSURE",
        f"The disk failed at the last step of a commit to '{folder}' ({what}); it may or may not hold.",
        fix="Close the stream, look at the disk, and open the folder again: it says which position to go on from.",
    )


def _other_model(folder: Path, found: str, wanted: str) -> StateFolderError:
    return StateFolderError(
        "E-STATE-MODEL",
        f"The state in '{folder}' belongs to the model {found[:16]}, not to the one given, {wanted[:16]}.",
        fix=(
            "Leave the model out: the folder keeps a copy of its own. For this model, start another folder."
            if (folder / MODEL).is_dir()
            else "Open it with the model it was started with, or start another folder for this model."
        ),
    )


def _warn_of_fallback(folder: Path, problems: list[StateFolderError], commit: Commit) -> None:
    what = " ".join(error.message for error in problems)
    warnings.warn(
        DataWarning(
            f"W-STATE-FALLBACK: {what} Going on from generation {commit.generation} in '{folder}'. Rows after position"
            f" {commit.position!r} must be given again."
        ),
        stacklevel=4,
    )
