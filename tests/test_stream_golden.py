"""A stream of a real model, written by format 1.0, is read for ever: same state, same forecast, and it goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

import hamts

GOLDEN = Path(__file__).parent / "golden" / "stream-model-1.0"


def test_a_stream_and_its_model_of_version_1_0_are_read_for_ever(tmp_path: Path) -> None:
    said = json.loads(GOLDEN.with_name("stream-model-1.0.json").read_text(encoding="utf-8"))
    folder = Path(shutil.copytree(GOLDEN, tmp_path / "stream"))
    with hamts.Stream.open(folder, read_only=True) as stream:
        assert stream.state_hash() == said["state_hash"]
        np.testing.assert_allclose(stream.forecast(6).df["HAM"], said["forecast"], rtol=1e-5)
    row = pd.DataFrame({"unique_id": ["a"], "ds": [pd.Timestamp("2024-01-06 06:00")], "y": [0.5]})
    with hamts.Stream.open(folder) as stream:
        assert stream.update(row).rows == 1
        assert stream.state_hash() != said["state_hash"]


def test_golden_files_stay_small() -> None:
    assert max(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 100_000
