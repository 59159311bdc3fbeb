"""Writes ``stream-model-1.0``: a stream folder of a real, tiny model, and what it must say for ever after.

Run once at a new format version (``python tests/golden/make_stream_model.py``), never to mend a failing test.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import hamts

FOLDER = Path(__file__).parent / "stream-model-1.0"


def main() -> None:
    torch.set_num_threads(1)
    t = np.arange(96)
    history = pd.DataFrame(
        {
            "unique_id": "a",
            "ds": pd.date_range("2024-01-01", periods=len(t), freq="h"),
            "y": np.sin(2 * np.pi * t / 24) + 0.01 * (t * 7 % 13),
        }
    )
    later = pd.DataFrame(
        {
            "unique_id": "a",
            "ds": pd.date_range("2024-01-05", periods=30, freq="h"),
            "y": np.cos(np.arange(30) / 3),
        }
    )
    model = hamts.fit(
        history, h=6, preset="tiny", max_steps=2, budget_bytes=8192, verbose=False, progress=False
    )  # fmt: skip
    shutil.rmtree(FOLDER, ignore_errors=True)
    with hamts.Stream.open(FOLDER, model) as stream:
        stream.update(later)
        said = {"state_hash": stream.state_hash(), "forecast": stream.forecast(6).df["HAM"].tolist()}
    (FOLDER / "LOCK").unlink()
    (FOLDER.parent / "stream-model-1.0.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
