"""Scratchpads of many items of different ages, padded to the longest or in shared pages: bytes, and rows a second.

A cell of ``benchmarks/streaming.py``, which runs it, writes it and prints it.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.streaming import MEBIBYTE, PATCH, series, time_model
from hamts.stream import Stream
from hamts.stream_entries import STORES

ITEMS, SEEDS, CHANNELS, LONGEST, CALLS = 1_000, 40, 8, 4_096, 2 * PATCH


def ages() -> np.ndarray:
    """Rows that each seed has a history of: most are young, few are old."""
    draws = np.exp(np.random.default_rng(0).normal(size=SEEDS))
    return np.clip(draws / draws.max() * LONGEST, 2 * PATCH, LONGEST).astype(int)


def stores() -> dict[str, Any]:
    model = time_model(CHANNELS)
    histories = [series(f"seed {k}", LONGEST - n, n, CHANNELS) for k, n in enumerate(ages())]
    arrays, meta = model.stream(pd.concat(histories)).state()
    times = ITEMS // SEEDS
    arrays = {name: torch.as_tensor(array).repeat(times, *[1] * (array.ndim - 1)) for name, array in arrays.items()}
    meta["item_ids"] = [f"item {k}" for k in range(ITEMS)]
    streams = {
        store: Stream.from_state(model, arrays, {**meta, "config": {**meta["config"], "store": store}})
        for store in STORES
    }
    names = np.array(meta["item_ids"], dtype=object)
    spent = dict.fromkeys(streams, 0.0)
    for step in range(CALLS):
        one = series("x", LONGEST + step, 1, CHANNELS)
        frame = pd.DataFrame({name: np.repeat(one[name].to_numpy(), ITEMS) for name in one}).assign(unique_id=names)
        # in turns, so that both meet the same machine
        for store in sorted(streams, reverse=bool(step % 2)):
            began = time.process_time()
            streams[store].update(frame)
            spent[store] += time.process_time() - began
    found = {}
    for store, stream in streams.items():
        usage = stream.usage()
        found[store] = {
            "live_mib": round(float(usage["scratchpad_bytes"].sum()) / MEBIBYTE, 1),
            "store_mib": round(stream._items.memory.entries.nbytes() / MEBIBYTE, 1),
            "rows_per_processor_s": round(ITEMS * CALLS / spent[store]),
            "entries_mean": round(float(usage["entries"].mean()), 1),
            "entries_most": int(usage["entries"].max()),
            "state_hash": stream.state_hash(),
        }
    return {"items": ITEMS, "channels": CHANNELS, "longest_history_rows": LONGEST, "calls": CALLS, "stores": found}


def table(found: dict[str, Any]) -> str:
    lines = [
        "| scratchpads | entries mean / most | living MiB | MiB held | rows a second of one processor |",
        "|---|---|---|---|---|",
    ]
    for name, cell in found["stores"].items():
        lines.append(
            f"| {name} | {cell['entries_mean']} / {cell['entries_most']} | {cell['live_mib']} | {cell['store_mib']}"
            f" | {cell['rows_per_processor_s']:,} |"
        )
    same = len({cell["state_hash"] for cell in found["stores"].values()}) == 1
    return "\n".join([*lines, f"\nSame state to the bit: {'yes' if same else 'NO'}."])
