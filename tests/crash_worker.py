"""Feed a stream without a network in a process that may be killed: python crash_worker.py STATE OUTPUTS [seconds].

Prints a line for each commit that has returned: its generation, its position and the hash of its state.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from stream_fakes import CountingSource, FakeStream

from hamts.feeding import feed
from hamts.sinks import FolderSink
from hamts.stream_open import DurableStream
from hamts.stream_store import StateStore


class LinesSink(FolderSink):
    """Writes without pandas, which takes a second to import."""

    def add(self, kind: str, rows: Any) -> None:
        if len(rows):
            self._waiting.setdefault(kind, []).extend(rows)

    def stage(self, generation: int) -> None:
        import os

        self.folder.mkdir(parents=True, exist_ok=True)
        for kind, rows in self._waiting.items():
            with open(self.folder / f".{kind}-{generation:08d}.jsonl.staged", "w") as file:
                file.writelines(f"{row}\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())


def open_fake(state: str, outputs: str, commit_every: int = 3) -> DurableStream:
    store = StateStore(state)
    loaded = store.load(FakeStream.model_hash)
    stream: Any = FakeStream() if loaded is None else FakeStream.from_state(None, loaded.arrays, loaded.meta)
    return DurableStream(stream, store, commit_every=commit_every, sink=LinesSink(outputs))


def main(state: str, outputs: str, pause: float = 0.0) -> None:
    def say(durable: DurableStream, _: Any = None) -> None:
        durable.sink.add("said", [durable.stream.seen])
        time.sleep(pause)
        acknowledge(durable)

    def acknowledge(durable: DurableStream) -> None:
        last = durable.last_commit
        row = 0 if last.position is None else last.position["row"]
        print(last.generation, row, last.state_hash, flush=True)

    with open_fake(state, outputs) as durable:
        acknowledge(durable)
        feed(durable, CountingSource(), once=True, poll_seconds=0.01, after_update=say)
        acknowledge(durable)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]) if len(sys.argv) > 3 else 0.0)
