"""What it costs to feed a model row by row, and what its memory does through storms.

Run ``python -m benchmarks.streaming [--cells latency ...] [--again]`` from the clone. A cell is written to
``benchmarks/results/streaming`` as soon as it is measured and not measured again; ``--table`` prints what is there.
Preset small, patches of 16 steps, a budget of 10 %; weights hardly trained where only time is measured.

| cell | what |
|---|---|
| latency | one item, one row a call: rows 10,000 to 20,000 and 90,000 to 100,000, scratchpad full |
| throughput | 1,000 items of 8 channels, one row of each a call, scratchpads full |
| memory | resident memory over 200,000 calls |
| alternatives | the same forecasts by reading the whole history again, and by fitting again |
| stores | 1,000 items of different ages: scratchpads padded, and in shared pages |
| flights | three airports, hour by hour through the storms of December 2013 |
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import hamts
from benchmarks.cells import write_cell
from hamts.stream import Stream

RESULTS = Path(__file__).parent / "results" / "streaming"
DECILES = tuple(round(0.1 * k, 1) for k in range(1, 10))
PATCH = 16
HISTORY = 20_000
MEBIBYTE = 2**20
THREADS = torch.get_num_threads()


def facts() -> dict[str, Any]:
    return {
        "hamts": hamts.__version__, "torch": torch.__version__, "numpy": np.__version__, "pandas": pd.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def series(item: str, first: int, steps: int, channels: int = 1) -> pd.DataFrame:
    """Hourly waves with noise and jumps, the same whatever part of them is asked for."""
    hours = np.arange(first, first + steps)
    frame: dict[str, Any] = {
        "unique_id": item,
        "ds": np.datetime64("2000-01-01", "ns") + hours * np.timedelta64(1, "h"),
    }
    for channel in range(channels):
        noise = np.sin(hours * 12.9898 + channel * 78.233) * 43758.5453 % 1.0
        jump = np.where(hours // 997 % 2, 4.0, 0.0)
        wave = 3 * np.sin(2 * np.pi * hours / 24 + channel)
        frame["y" if channel == 0 else f"x{channel}"] = 20 + wave + jump + noise
    return pd.DataFrame(frame)


def time_model(channels: int = 1, *, steps: int = 2) -> hamts.HAMForecaster:
    """The network whose time is measured; what it has learned does not matter for that."""
    df = pd.concat([series(item, 0, 2_000, channels) for item in "ab"])
    return hamts.fit(
        df, 24, preset="small", patch_steps=PATCH, budget_share=0.10, max_steps=steps, val_size=0, verbose=False,
        progress=False, seed=0,
    )  # fmt: skip


def rows_of(df: pd.DataFrame, *, frames: bool) -> Iterator[Any]:
    """One row at a time, as frames or as mappings."""
    if frames:
        yield from (df.iloc[k : k + 1] for k in range(len(df)))
        return
    columns = {name: df[name].to_numpy() for name in df}
    yield from ({name: column[k] for name, column in columns.items()} for k in range(len(df)))


def timed(stream: Stream, rows: Iterator[Any]) -> dict[str, np.ndarray]:
    """Milliseconds of each call, on the clock and of the processor, [n, 2], by what the row does to its patch.

    On a machine that others share the clock counts their work too, the processor's time hardly.
    """
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "begins": [], "completes": [], "all": []}
    previous = True
    gc.disable()
    for row in rows:
        began, spent = time.perf_counter(), time.process_time()
        report = stream.update(row)
        took = (1e3 * (time.perf_counter() - began), 1e3 * (time.process_time() - spent))
        found["completes" if report.patches else "begins" if previous else "plain"].append(took)
        found["all"].append(took)
        previous = bool(report.patches)
    gc.enable()
    return {name: np.array(times) for name, times in found.items()}


def percentiles(times: np.ndarray) -> dict[str, float]:
    """Of [n, 2] clock and processor."""
    found: dict[str, float] = {"n": len(times)}
    for name, column in zip(("", "cpu_"), times.T, strict=True):
        p50, p99 = np.percentile(column, [50, 99])
        found |= {f"{name}p50_ms": round(p50, 3), f"{name}p99_ms": round(p99, 3)}
        found[f"{name}mean_ms"] = round(column.mean(), 3)
    return found


def latency() -> dict[str, Any]:
    """Windows of rows, timed one by one on one thread; what lies between them is fed in frames of 160 rows."""
    torch.set_num_threads(1)
    model = time_model()
    stream = model.stream(series("a", 0, HISTORY))
    cell: dict[str, Any] = {"history_rows": HISTORY, "channels": 1, "patch_steps": PATCH, "windows": {}}
    cell["entries_before"] = int(stream.usage()["entries"][0])
    at = 0
    for low, high in ((0, 200), (10_000, 20_000), (90_000, 100_000)):
        for first in range(at, low, 160):
            stream.update(series("a", HISTORY + first, min(160, low - first)))
        part = series("a", HISTORY + low, high - low)
        half = len(part) // 2
        if low == 0:
            timed(stream, rows_of(part, frames=True))
            at = high
            continue
        both = {"frame": part.iloc[:half], "mapping": part.iloc[half:]}
        found = {kind: timed(stream, rows_of(df, frames=kind == "frame")) for kind, df in both.items()}
        cell["windows"][f"{low}-{high}"] = {
            kind: {name: percentiles(times) for name, times in parts.items()} for kind, parts in found.items()
        }
        at = high
    cell["entries_after"] = int(stream.usage()["entries"][0])
    one, two = (window["frame"]["all"] for window in cell["windows"].values())
    cell["late_over_early"] = {name: round(two[name] / one[name], 3) for name in one if name != "n"}
    return cell


def many_items(model: hamts.HAMForecaster, items: int, channels: int, history: int) -> Stream:
    """A stream of many items: the states of a few, under new names."""
    few = 20
    stream = model.stream(pd.concat([series(f"seed {k}", 31 * k, history, channels) for k in range(few)]))
    arrays, meta = stream.state()
    times = items // few
    arrays = {name: torch.as_tensor(array).repeat(times, *[1] * (array.ndim - 1)) for name, array in arrays.items()}
    # one clock for all, so that patches end together, as in a plant with one sampling clock
    for name in ("starts", "lead"):
        arrays[f"items.{name}"] = arrays[f"items.{name}"][:1].repeat(items)
    del stream
    gc.collect()
    return Stream.from_state(model, arrays, {**meta, "item_ids": [f"item {k}" for k in range(items)]})


def throughput(items: int = 1_000, channels: int = 8, history: int = 4_096, cycles: int = 3) -> dict[str, Any]:
    """Calls of one row of each item, over whole patches."""
    torch.set_num_threads(THREADS)
    model = time_model(channels)
    stream = many_items(model, items, channels, history)
    names = np.array(stream.item_ids, dtype=object)
    entries = float(stream.usage()["entries"].mean())
    times, spent = [], []
    for step in range(PATCH * (cycles + 1)):
        one = series("x", history + step, 1, channels)
        frame = pd.DataFrame({name: np.repeat(one[name].to_numpy(), items) for name in one}).assign(unique_id=names)
        for name in ("y", *(f"x{c}" for c in range(1, channels))):
            frame[name] += np.arange(items) % 7
        began, busy = time.perf_counter(), time.process_time()
        stream.update(frame)
        times.append(time.perf_counter() - began)
        spent.append(time.process_time() - busy)
    measured, processor = np.array(times[PATCH:]), np.array(spent[PATCH:])
    return {
        "items": items, "channels": channels, "history_rows": history, "entries_per_item": round(entries, 1),
        "calls": len(measured), "rows_per_s": round(items * len(measured) / measured.sum()),
        "rows_per_processor_s": round(items * len(measured) / processor.sum()),
        "plain_call_ms": round(1e3 * float(np.median(measured)), 1), "slowest_call_ms": round(1e3 * measured.max(), 1),
        "state_mib": round(float(stream.memory_bytes()["total"].sum()) / MEBIBYTE, 1),
        "resident_mib": round(resident() / MEBIBYTE, 1),
    }  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory(calls: int = 200_000) -> dict[str, Any]:
    """Resident memory while one item is fed, its scratchpad full from the start."""
    torch.set_num_threads(1)
    model = time_model()
    stream = model.stream(series("a", 0, HISTORY))
    sizes = []
    for first in range(0, calls, 10_000):
        for row in rows_of(series("a", HISTORY + first, 10_000), frames=False):
            stream.update(row)
        gc.collect()
        sizes.append((first + 10_000, resident()))
    x, y = np.array(sizes, dtype=np.float64).T
    # the first windows still fill caches of the libraries
    late = x > calls // 4
    slope = np.polyfit(x[late], y[late], 1)[0]
    return {
        "calls": calls, "entries": int(stream.usage()["entries"][0]),
        "resident_mib": [[int(n), round(size / MEBIBYTE, 3)] for n, size in sizes],
        "slope_mib_per_100000": round(slope * 1e5 / MEBIBYTE, 4),
    }  # fmt: skip


def alternatives() -> dict[str, Any]:
    """Seconds for one more row and a forecast: by update, by reading all rows again, by fitting again."""
    model = time_model()
    cell: dict[str, Any] = {"horizon": 24, "rows": {}}
    for rows in (1_000, 10_000, 50_000):
        df = series("a", 0, rows)
        stream = model.stream(df)
        added = series("a", rows, 4 * PATCH)
        began = time.perf_counter()
        for row in rows_of(added, frames=True):
            stream.update(row)
            stream.forecast(24)
        update_s = (time.perf_counter() - began) / len(added)
        began = time.perf_counter()
        for _ in range(3):
            model.predict(df, 24)
        reread_s = (time.perf_counter() - began) / 3
        cell["rows"][str(rows)] = {
            "update_and_forecast_s": round(update_s, 5), "reread_s": round(reread_s, 4),
            "reread_over_update": round(reread_s / update_s, 1),
        }  # fmt: skip
    began = time.perf_counter()
    hamts.fit(
        series("a", 0, 10_000), 24, preset="small", patch_steps=PATCH, max_steps=60, val_size=0, verbose=False,
        progress=False,
    )  # fmt: skip
    refit_s = time.perf_counter() - began
    cell |= {
        "refit_steps": 60, "refit_s": round(refit_s, 2),
        "refit_over_update": round(refit_s / cell["rows"]["10000"]["update_and_forecast_s"]),
    }  # fmt: skip
    return cell


def flights(seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """Fit up to 6 November, then feed every hour of the rest of the year."""
    from benchmarks.streaming_flights import replay

    return replay(seed, steps)


def stores() -> dict[str, Any]:
    """The same items in both stores of scratchpads."""
    from benchmarks.streaming_stores import stores as measured

    return measured()


CELLS: dict[str, Callable[..., dict[str, Any]]] = {
    "latency": latency, "throughput": throughput, "memory": memory, "alternatives": alternatives, "stores": stores,
    "flights": flights,
}  # fmt: skip


def run(names: list[str], *, again: bool) -> None:
    for name in names:
        torch.set_num_threads(THREADS)
        path = RESULTS / f"{name}.json"
        if path.exists() and not again:
            continue
        before = facts()
        began = time.perf_counter()
        cell = CELLS[name]()
        seconds = round(time.perf_counter() - began, 1)
        cell = {"cell": name, "seconds": seconds, **cell, "threads": torch.get_num_threads(), "facts": before}
        write_cell(path, cell)
        print(f"{path.name}: {cell['seconds']} s", flush=True)


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table() -> str:
    """What was measured, as Markdown; what was not run says so."""
    lines = ["| question | asked | measured |", "|---|---|---|"]
    found = load("latency")
    if found:
        early, late = (w["frame"] for w in found["windows"].values())
        kinds = {"all": "any row", "plain": "inside a patch", "begins": "begins one", "completes": "completes one"}
        for name, text in kinds.items():
            asked = "p50 <= 3, p99 <= 15" if name == "all" else ""
            for kind, label in (("", "ms"), ("cpu_", "ms of processor")):
                shown = " and ".join(f"{w[name][f'{kind}p50_ms']}, {w[name][f'{kind}p99_ms']}" for w in (early, late))
                lines.append(f"| one row of one item, {text}, {label}: p50, p99 (early and late) | {asked} | {shown} |")
        ratio = found["late_over_early"]
        shown = f"p50 {ratio['p50_ms']}, mean {ratio['mean_ms']}; processor {ratio['cpu_p50_ms']},"
        shown += f" {ratio['cpu_mean_ms']} ({found['entries_after']} entries, load {found['facts']['load_before']})"
        lines.append(f"| rows 90,000 to 100,000 over rows 10,000 to 20,000 | 0.9 to 1.1 | {shown} |")
    found = load("throughput")
    if found:
        shown = f"{found['rows_per_s']:,} ({found['entries_per_item']} entries an item, load"
        shown += f" {found['facts']['load_before']}); {found['rows_per_processor_s']:,} a second of one processor"
        lines.append(
            f"| items' rows/s, {found['items']:,} items x {found['channels']} channels | >= 15,000 | {shown} |"
        )
    found = load("memory")
    if found:
        lines.append(
            f"| resident MiB per 100,000 calls, over {found['calls']:,} | < 1 | {found['slope_mib_per_100000']} |"
        )
    found = load("alternatives")
    if found:
        for rows, cell in found["rows"].items():
            lines.append(
                f"| reading {int(rows):,} rows again, over update and forecast | | {cell['reread_over_update']} |"
            )
        lines.append(
            f"| fitting again ({found['refit_steps']} steps), over update | | {found['refit_over_update']:,} |"
        )
    missing = [name for name in CELLS if load(name) is None]
    if missing:
        lines.append(f"| not run | | {', '.join(missing)} |")
    return "\n".join(lines + more_tables())


def more_tables() -> list[str]:
    """Cells that have a table of their own."""
    from benchmarks.streaming_flights import table as flights_table
    from benchmarks.streaming_stores import table as stores_table

    lines = []
    for name, shown in (("flights", flights_table), ("stores", stores_table)):
        found = load(name)
        if found:
            lines += ["", shown(found)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--again", action="store_true", help="measure cells that exist, too")
    parser.add_argument("--table", action="store_true", help="only print the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if not options.table:
        run(options.cells, again=options.again)
    print(table())


if __name__ == "__main__":
    main()
