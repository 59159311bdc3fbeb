"""Folders of states that tests write and damage."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hamts.errors import StateFolderError
from hamts.stream_store import StateStore

MODEL = "ab" * 32


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


def two_generations(folder: Path) -> Path:
    """Markers 1 and 2."""
    with StateStore(folder) as store:
        assert store.load(MODEL) is None
        commit(store, 1)
        commit(store, 2)
    return folder
