"""Kill a stream at every named step of its commit and at random moments, and compare with a run that nobody killed.

Run ``python -m benchmarks.crash`` from the clone: prints a table and writes ``benchmarks/results/crash/<cell>.json``.
Every trial is a process that reads drops (or a Kafka topic of the client library's own broker), commits, and writes
what surprised it; it is ended with exit code 9 at a named step, or by SIGKILL at a random moment, then started again
until it has read everything. Checked after each kill: the state loads without a warning, its hash is that of the
uninterrupted run at the same position, and it is no older than the last commit that had returned. Checked at the end:
the same hash, every row read once and written once. ``damage`` flips bits of a committed state and cuts its files;
``cost`` says how long a commit and a start take (medians; whoever else uses the machine makes them longer).

SIGKILL leaves what was written in the system's cache: it shows that the order of writes is right, not that the disk
obeys fsync. The tests let fsync, rename and write fail instead.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors
import torch

import hamts
from benchmarks.crash_trials import (
    COMMIT_ROWS,
    POLL,
    Ended,
    Place,
    after_kill,
    at_end,
    drops_of,
    in_process,
    key_of,
    last_commit_of,
    read_everything,
    trial,
    written,
)
from hamts.errors import DataError, DataWarning
from hamts.sources import Source
from hamts.stream import Stream
from hamts.stream_open import DurableStream
from hamts.stream_store import MOMENTS, StateStore

RESULTS = Path(__file__).parent / "results" / "crash"
ITEMS, STEPS, NEW, DROPS = 4, 240, 120, 6
KAFKA_KILLS = 8
COST_REPEATS = 5

BROKER = """
import json, sys
import confluent_kafka as kafka
producer = kafka.Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
(broker,) = producer.list_topics(timeout=10).brokers.values()
for line in open(sys.argv[1]):
    row = json.loads(line)
    producer.produce("rows", json.dumps(row).encode(), partition=int(row["unique_id"][1:]) % 4)
assert producer.flush(30) == 0
print(f"{broker.host}:{broker.port}", flush=True)
sys.stdin.read()
"""


# --- cells


def steps_cell(place: Place, _: int) -> list[dict[str, Any]]:
    first = [f"{moment}@1" for moment in MOMENTS if moment != "updated"]
    return [trial(place, moment, crash_at=moment) for moment in [f"{moment}@4" for moment in MOMENTS] + first]


def random_cell(place: Place, kills: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = []
    while len(found) < kills:
        delay = float(rng.uniform(0, place.seconds))
        facts = trial(place, f"{1000 * delay:.0f} ms", kill_after=delay)
        # a process that was faster than the one that was timed had ended before
        if facts["code"]:
            found.append(facts)
    return found


def kafka_cell(place: Place, _: int) -> list[dict[str, Any]]:
    """One topic, one state; the consumer is killed again and again on its way."""
    rng, state, found = np.random.default_rng(1), place.folder / "kafka", []
    with broker(place) as address:

        def work(say: Callable[[Any], None]) -> None:
            from hamts.sources_kafka import KafkaSource

            def make() -> Source:
                return KafkaSource(address, "rows", max_rows=POLL, wait_seconds=0.5)

            read_everything(place, state, make, COMMIT_ROWS, say, items_side_by_side=1)

        for number in range(KAFKA_KILLS):
            moment = MOMENTS[int(rng.integers(len(MOMENTS)))] + "@2"
            ended = in_process(work, crash_at=moment, kill_after=None)
            facts = after_kill(place, state, ended, by_position=False)
            found.append({"killed_at": f"{number}: {moment}", "code": ended.code, **facts})
        again = in_process(work, crash_at=None, kill_after=None)
    whole = place.model.stream(items_side_by_side=1)
    whole.update(place.ahead)
    found.append({"killed_at": "end", "code_again": again.code, **at_end(place, state, whole.state_hash())})
    return found


def damage_cell(place: Place, _: int) -> list[dict[str, Any]]:
    """Bits and ends of every file of a committed state; those of the generation before, where it is needed."""
    state, rng = place.folder / "whole", np.random.default_rng(2)
    last = last_commit_of(Stream.open(state, read_only=True))
    found = []
    for path in sorted([*state.glob("state-*"), state / "CURRENT.json"]):
        newest = state / last.arrays.name
        whole, content = newest.read_bytes(), path.read_bytes()
        before = f"-{last.generation - 1:08d}-" in path.name
        if before:
            newest.write_bytes(b"")
        harms = [("flip", int(n)) for n in rng.integers(0, len(content), 40)]
        harms += [("cut", length) for length in sorted({0, len(content) - 1, *range(0, len(content), 1024)})]
        asked, noticed = {"flip": 0, "cut": 0}, {"flip": 0, "cut": 0}
        for kind, at in harms:
            changed = bytearray(content)
            if kind == "flip":
                changed[at] ^= 1 << int(rng.integers(8))
            else:
                del changed[at:]
            path.write_bytes(changed)
            asked[kind] += 1
            noticed[kind] += is_noticed(place, state, none_left=before)
        path.write_bytes(content)
        newest.write_bytes(whole)
        found.append({"killed_at": path.name, "asked": asked, "noticed": noticed, "all_noticed": asked == noticed})
    return found


def is_noticed(place: Place, state: Path, *, none_left: bool) -> bool:
    """Whether opening warns and gives the state of some commit; or refuses, where both generations are damaged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = Stream.open(state, place.model, read_only=True)
        except DataError as error:
            return none_left and error.code == "E-STATE-DAMAGED"
    warned = any(issubclass(one.category, DataWarning) and "W-STATE-FALLBACK" in str(one.message) for one in caught)
    return not none_left and warned and place.hashes[key_of(last_commit_of(found).position)] == found.state_hash()


def cost_cell(place: Place, _: int) -> list[dict[str, Any]]:
    """Milliseconds of a commit and of a start, by the size of the state."""
    found = []
    for items in (1, 100, 1000):
        names = [f"n{k}" for k in range(items)]
        one = waves(STEPS).query("unique_id == 'i0'")
        stream = place.model.stream(pd.concat([one.assign(unique_id=name) for name in names], ignore_index=True))
        state = place.folder / f"cost-{items}"
        after = one["ds"].max()
        commits, starts, size = [], [], 0
        with DurableStream(stream, StateStore(state), commit_every=None) as durable:
            for step in range(1, 1 + COST_REPEATS):
                durable.update(
                    {"unique_id": names, "ds": [after + pd.Timedelta(hours=step)] * items, "y": [0.5] * items}
                )
                start = time.perf_counter()
                durable.commit()
                commits.append(1000 * (time.perf_counter() - start))
        for _ in range(COST_REPEATS):
            start = time.perf_counter()
            loaded = StateStore(state, read_only=True).load(stream.model_hash)
            if loaded is None:
                raise RuntimeError(f"The state that was just written must be there. {state} has none.")
            Stream.from_state(place.model, loaded.arrays, loaded.meta)
            starts.append(1000 * (time.perf_counter() - start))
            size = loaded.commit.arrays.size + loaded.commit.document.size
        facts = {"bytes": size, "commit_ms": float(np.median(commits)), "start_ms": float(np.median(starts))}
        found.append({"killed_at": f"{items} items", **facts})
    return found


CELLS: dict[str, Callable[[Place, int], list[dict[str, Any]]]] = {
    "steps": steps_cell,
    "random": random_cell,
    "kafka": kafka_cell,
    "damage": damage_cell,
    "cost": cost_cell,
}


# --- setting up


@contextmanager
def broker(place: Place) -> Iterator[str]:
    """A broker in a process of its own, with all rows in it."""
    path = place.folder / "rows.jsonl"
    rows = place.ahead.assign(ds=place.ahead["ds"].astype(str))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows.to_dict("records")))
    command = [sys.executable, "-c", BROKER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        yield process.stdout.readline().strip()
        process.stdin.close()


def waves(steps: int) -> pd.DataFrame:
    """Daily waves of several items, with noise."""
    rng, hours = np.random.default_rng(0), np.arange(steps)
    clock = pd.date_range("2024-01-01", periods=steps, freq="h")
    noise = rng.normal(0, 0.2, (ITEMS, STEPS + NEW))
    return pd.concat(
        pd.DataFrame(
            {"unique_id": f"i{k}", "ds": clock, "y": 3 * np.sin(hours / 24 * 2 * np.pi + k) + noise[k, :steps]}
        )
        for k in range(ITEMS)
    )


def prepare(folder: Path) -> Place:
    """A model, drops of rows, and the run that nobody kills."""
    model = hamts.fit(waves(STEPS), 12, preset="tiny", max_steps=30, verbose=False, progress=False)
    df = waves(STEPS + NEW)
    ahead = df[df["ds"] >= df["ds"].min() + pd.Timedelta(hours=STEPS)]
    ahead = ahead.sort_values(["ds", "unique_id"], ignore_index=True)
    (folder / "drops").mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(ahead)), DROPS)):
        ahead.iloc[part].to_csv(folder / "drops" / f"{number}.csv", index=False)
    place = Place(folder, model, ahead)

    def work_at(name: str, every: int) -> Ended:
        def work(say: Callable[[Any], None]) -> None:
            read_everything(place, folder / name, lambda: drops_of(place), every, say)

        return in_process(work, crash_at=None, kill_after=None)

    each = work_at("each", 1)
    place.hashes = {key_of(entry["position"]): entry["hash"] for entry in each.commits}
    place.hashes[key_of(None)] = model.stream().state_hash()
    place.alerts = written(folder / "each")
    ended = work_at("whole", COMMIT_ROWS)
    place.seconds = ended.seconds
    place.hashes["end"] = ended.commits[-1]["hash"]
    assert place.hashes["end"] == each.commits[-1]["hash"]
    return place


# --- what is printed


HOLDS = ("loads", "right_hash", "nothing_lost", "same_hash", "rows_read_once", "rows_written_once", "all_noticed")


def summary(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Trials in which each thing held, of those in which it was looked at."""
    counts = {name: [bool(row[name]) for row in rows if name in row] for name in HOLDS}
    return {name: f"{sum(held)}/{len(held)}" for name, held in counts.items() if held}


def show(name: str, cell: dict[str, Any]) -> None:
    print(f"\n{name}: {len(cell['trials'])} trials, {cell['seconds']:.0f} s")
    if cell["summary"]:
        print("  " + ", ".join(f"{key} {value}" for key, value in cell["summary"].items()))
    for row in cell["trials"]:
        broken = [key for key in HOLDS if row.get(key) is False]
        verdict = "BROKEN " + ", ".join(broken) if broken else "holds"
        facts = "" if "generation" not in row else f"generation {row['generation']}"
        if "noticed" in row:
            facts = ", ".join(f"{row['noticed'][kind]}/{asked} {kind}s" for kind, asked in row["asked"].items())
        if "bytes" in row:
            facts = f"{row['bytes'] / 2**20:.1f} MiB, commit {row['commit_ms']:.0f} ms, start {row['start_ms']:.0f} ms"
            verdict = ""
        print(f"  {row['killed_at']:44s} {facts:24s} {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="random moments")
    parser.add_argument("--only", choices=CELLS, help="one cell")
    parser.add_argument("--again", action="store_true", help="measure cells that exist")
    arguments = parser.parse_args()
    # a fork may not inherit threads
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    wanted = [arguments.only] if arguments.only else list(CELLS)
    todo = [name for name in wanted if arguments.again or not (RESULTS / f"{name}.json").exists()]
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(Path(folder)) if todo else None
        for name in todo:
            assert place is not None
            start = time.perf_counter()
            trials = CELLS[name](place, arguments.kills)
            cell = {
                "versions": versions(),
                "rows": len(place.ahead),
                "uninterrupted_seconds": place.seconds,
                "seconds": time.perf_counter() - start,
                "summary": summary(trials),
                "trials": trials,
            }
            (RESULTS / f"{name}.json").write_text(json.dumps(cell, indent=1) + "\n")
    for name in wanted:
        show(name, json.loads((RESULTS / f"{name}.json").read_text()))


def versions() -> dict[str, str]:
    found = {module.__name__: module.__version__ for module in (hamts, np, pd, safetensors, torch)}
    return {**found, "python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}


if __name__ == "__main__":
    main()
