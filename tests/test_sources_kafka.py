"""A Kafka topic as a source, on the broker that the client library has built in.

It is a broker in memory: it stands in for the protocol, not for a cluster's restarts and elections.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from model_frames import quick, sine_frame
from stream_fakes import FakeItems

from hamts.errors import DataError, DataWarning
from hamts.feeding import feed
from hamts.sources import Position, open_source
from hamts.sources_kafka import KafkaSource
from hamts.stream import Stream
from hamts.stream_store import CRASH_AT, StateStore

kafka = pytest.importorskip("confluent_kafka", reason="needs the extra kafka")

PARTITIONS = 4  # what the broker gives a topic that it makes


class Broker:
    """A broker in this process, and a producer to it."""

    def __init__(self) -> None:
        self.producer = kafka.Producer({"bootstrap.servers": "none", "test.mock.num.brokers": 1, "log_level": 0})
        (broker,) = self.producer.list_topics(timeout=10).brokers.values()
        self.address = f"{broker.host}:{broker.port}"

    def send(self, topic: str, messages: list[Any], partition: int = 0) -> None:
        for message in messages:
            value = message if isinstance(message, bytes | None) else json.dumps(message).encode()
            self.producer.produce(topic, value, partition=partition)
        assert self.producer.flush(10) == 0


@pytest.fixture(scope="module")
def broker() -> Broker:
    return Broker()


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in request.node.name)


@pytest.fixture
def source(broker: Broker, topic: str) -> Iterator[KafkaSource]:
    broker.send(topic, [{"row": n} for n in range(10)])
    broker.send(topic, [{"row": n} for n in range(10, 13)], partition=2)
    made = open_kafka(broker, topic)
    yield made
    made.close()


def open_kafka(broker: Broker, topic: str, **options: Any) -> KafkaSource:
    config = {"fetch.wait.max.ms": 10}
    return KafkaSource(broker.address, topic, **{"wait_seconds": 0.2, "config": config, **options})


def read_all(source: KafkaSource, position: Position = None) -> tuple[list[int], Position]:
    seen: list[int] = []
    while True:
        rows, following = source.poll(position)
        following = json.loads(json.dumps(following))
        if rows is None and following == position and source.at_end:
            return sorted(seen), position
        seen += [] if rows is None else rows["row"].tolist()
        position = following


def test_every_message_comes_once_and_in_its_partitions_order(source: KafkaSource, broker: Broker, topic: str) -> None:
    seen, position = read_all(source)
    assert seen == list(range(13))
    assert position["offsets"] == {"0": 10, "1": 0, "2": 3, "3": 0}
    broker.send(topic, [{"row": 13}], partition=3)
    assert read_all(source, position)[0] == [13]


def test_reading_goes_on_from_a_position_whatever_the_broker_thinks(
    source: KafkaSource, broker: Broker, topic: str
) -> None:
    _, position = read_all(source)
    for low in (0, 4, 10):
        again = open_kafka(broker, topic, max_rows=3)
        moved = {**position, "offsets": {**position["offsets"], "0": low}}
        assert read_all(again, moved)[0] == list(range(low, 10))
        # the same consumer goes back where it is told to
        assert read_all(again, moved)[0] == list(range(low, 10))
        again.close()


def test_at_most_so_many_messages_come_at_once(broker: Broker, topic: str) -> None:
    broker.send(topic, [{"row": n} for n in range(20)])
    made = open_kafka(broker, topic, max_rows=7, wait_seconds=10)
    rows, position = made.poll(None)
    assert rows["row"].tolist() == list(range(7))
    assert position["offsets"]["0"] == 7
    made.close()


def test_a_message_may_hold_several_rows(broker: Broker, topic: str) -> None:
    broker.send(topic, [[{"row": 1, "y": 0.5}, {"row": 2}], {"row": 3}, []])
    made = open_kafka(broker, topic, wait_seconds=10)
    rows, position = made.poll(None)
    assert rows["row"].tolist() == [1, 2, 3]
    assert rows["y"].isna().tolist() == [False, True, True]
    assert position["offsets"]["0"] == 3
    made.close()


BAD = [b"no json", b"\xff\xfe", None, 3, "text", [{"row": 1}, 2], b"NaN,"]


@pytest.mark.parametrize("bad", BAD)
def test_a_message_that_is_no_row_stops_at_it(broker: Broker, topic: str, bad: Any) -> None:
    broker.send(topic, [{"row": 0}, bad])
    made = open_kafka(broker, topic, max_rows=1)
    position = None
    while position is None or position["offsets"]["0"] == 0:
        rows, position = made.poll(position)
    assert rows["row"].tolist() == [0]
    for _ in range(2):
        with pytest.raises(DataError, match="E-SOURCE-CORRUPT.*offset 1 of partition 0"):
            read_all(made, position)
    made.close()


def test_messages_that_are_no_rows_are_passed_over_where_that_was_asked_for(broker: Broker, topic: str) -> None:
    broker.send(topic, [{"row": 0}, *BAD, {"row": 1}])
    made = open_kafka(broker, topic, on_corrupt="quarantine")
    seen, position = read_all(made)
    assert seen == [0, 1]
    assert (position["skipped"], position["offsets"]["0"]) == (len(BAD), len(BAD) + 2)
    rejected = made.rejected.take()
    assert [entry["offset"] for entry in rejected] == list(range(1, len(BAD) + 1))
    assert rejected[0]["value"] == "no json"
    made.close()


def test_messages_that_are_gone_are_not_passed_over_in_silence(
    source: KafkaSource, broker: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, position = read_all(source)
    beyond = {**position, "offsets": {**position["offsets"], "0": 11}}
    with pytest.raises(DataError, match="E-SOURCE-CHANGED.*ends at offset 10 of partition 0"):
        source.poll(beyond)
    more = {**position, "offsets": {**position["offsets"], "9": 0}}
    with pytest.raises(DataError, match="E-SOURCE-CHANGED.*no partition 9"):
        source.poll(more)
    # retention has deleted what was not read: the broker begins later than the stream has come

    class Later:
        def __init__(self, consumer: Any) -> None:
            self.consumer = consumer

        def __getattr__(self, name: str) -> Any:
            return getattr(self.consumer, name)

        def get_watermark_offsets(self, partition: Any, **_: Any) -> tuple[int, int]:
            return 5, 10

    monkeypatch.setattr(source, "_consumer", Later(source._consumer))
    begun = {**position, "offsets": {str(number): 4 for number in range(PARTITIONS)}}
    with pytest.raises(DataError, match="E-SOURCE-GONE.*begins at offset 5.*up to 4.*1 messages"):
        source.poll(begun)


def test_new_partitions_are_looked_for_and_a_broker_that_is_away_is_waited_for(
    source: KafkaSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hamts.sources_kafka as module

    _, position = read_all(source)
    looks = []
    monkeypatch.setattr(module, "RELIST_SECONDS", -1.0)
    monkeypatch.setattr(source, "_partitions", lambda: looks.append(1) or set(range(PARTITIONS)))
    assert source.poll(position) == (None, position)
    assert looks == [1]

    def away() -> None:
        raise DataError("E-SOURCE", "Kafka cannot be reached", fix="wait")

    monkeypatch.setattr(source, "_partitions", away)
    with pytest.warns(DataWarning, match="W-SOURCE-KAFKA: Kafka cannot be reached"):
        assert source.poll(position) == (None, position)
    # at the start it must be there
    source._at = None
    with pytest.raises(DataError, match="E-SOURCE"):
        source.poll(position)


def test_positions_of_others_are_refused(source: KafkaSource) -> None:
    other = {"source": "kafka", "topic": "other", "offsets": {"0": 1}, "skipped": 0}
    with pytest.raises(DataError, match="E-SOURCE-POSITION.*'other'"):
        source.poll(other)
    with pytest.raises(DataError, match="E-SOURCE-POSITION"):
        source.poll({"source": "folder", "file": "a.csv", "rows": 1, "bytes": 1, "done": True, "files": 1})


def test_what_is_not_there_says_so(broker: Broker) -> None:
    with pytest.raises(DataError, match="E-SOURCE.*127.0.0.1:1 cannot be reached"):
        KafkaSource("127.0.0.1:1", "t", timeout_seconds=0.5).poll(None)
    with pytest.raises(ValueError, match="max_rows"):
        open_kafka(broker, "t", max_rows=0)
    made = open_source(f"kafka://{broker.address}/some-topic")
    assert isinstance(made, KafkaSource)
    assert (made.servers, made.topic) == (broker.address, "some-topic")
    made.close()


# --- a consumer that is killed


def send_items(broker: Broker, topic: str, df: pd.DataFrame) -> None:
    """Rows of each item to a partition of its own."""
    rows = df.assign(ds=df["ds"].astype(str)).to_dict("records")
    for number, item in enumerate(df["unique_id"].unique()):
        broker.send(topic, [row for row in rows if row["unique_id"] == item], partition=3 * number)


def consume(broker: Broker, topic: str, state: Path, crash_at: str | None) -> int:
    """Exit code of a consumer in a process of its own."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    environment |= {} if crash_at is None else {CRASH_AT: crash_at}
    command = [sys.executable, str(here / "kafka_worker.py"), broker.address, topic, str(state)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode in (0, 9), ran.stderr
    return ran.returncode


def test_a_consumer_that_is_killed_and_started_again_ends_with_the_same_hash(
    broker: Broker, topic: str, tmp_path: Path
) -> None:
    df = sine_frame(steps=70)
    send_items(broker, topic, df)
    for crash_at in ("updated@5", "current-flushed@3", "current-renamed@2", "arrays-half@2"):
        assert consume(broker, topic, tmp_path, crash_at) == 9
    assert consume(broker, topic, tmp_path, None) == 0
    expected = FakeItems()
    expected.update(df)
    loaded = StateStore(tmp_path, read_only=True).load(FakeItems.model_hash)
    assert loaded is not None
    # each row once: one that is lost or read twice gives another hash
    assert loaded.commit.state_hash == expected.state_hash()
    assert loaded.meta == {"seen": {"i0": 70, "i1": 70}}
    assert loaded.commit.position["offsets"] == {"0": 70, "1": 0, "2": 0, "3": 70}


def test_a_fitted_models_stream_goes_on_from_the_offsets_of_its_commit(
    broker: Broker, topic: str, tmp_path: Path
) -> None:
    df = sine_frame(steps=170)
    model = quick(df[df["ds"] < df["ds"].iloc[120]], 6)
    ahead = df[df["ds"] >= df["ds"].iloc[120]]
    send_items(broker, topic, ahead)
    source = open_kafka(broker, topic, max_rows=9)
    stream = Stream.open(tmp_path, model, commit_every=30, items_side_by_side=1)
    while stream.last_commit.generation < 2 or stream.pending_rows == 0:
        rows, position = source.poll(stream.position)
        if rows is not None:
            stream.update(rows, position=position)
    # as a kill would: what was read since is not committed, though the broker has given it
    stream.store.close()
    with Stream.open(tmp_path) as stream:
        feed(stream, source, once=True)
    source.close()
    expected = model.stream(items_side_by_side=1)
    expected.update(ahead)
    with Stream.open(tmp_path) as stream:
        assert stream.state_hash() == expected.state_hash()
        assert (stream.stats()["rows"], stream.stats()["replayed"]) == (100, 0)
