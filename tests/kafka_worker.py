"""Read a Kafka topic in a process that may be killed: python kafka_worker.py SERVERS TOPIC STATE."""

from __future__ import annotations

import sys
from typing import Any

from stream_fakes import FakeItems

from hamts.feeding import feed
from hamts.sources_kafka import KafkaSource
from hamts.stream_open import DurableStream
from hamts.stream_store import StateStore


def main(servers: str, topic: str, state: str) -> None:
    store = StateStore(state)
    loaded = store.load(FakeItems.model_hash)
    stream: Any = FakeItems() if loaded is None else FakeItems.from_state(None, loaded.arrays, loaded.meta)
    source = KafkaSource(servers, topic, max_rows=7, wait_seconds=0.2, config={"fetch.wait.max.ms": 10})
    with DurableStream(stream, store, commit_every=20) as durable:
        feed(durable, source, once=True)
    source.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
