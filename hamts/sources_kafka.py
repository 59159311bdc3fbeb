"""A Kafka topic of JSON rows as a source. Where reading goes on is committed with the stream, never to the broker.

Every partition is assigned by hand at the offset that the position names; the broker's groups, their rebalancing and
their stored offsets play no part. One stream reads all partitions of a topic.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hamts.errors import DataError, DataWarning
from hamts.sources import OnCorrupt, Position, Rejected, check_position

if TYPE_CHECKING:
    import pandas as pd
    from confluent_kafka import Consumer, KafkaError, Message

__all__ = ["KafkaSource"]

RELIST_SECONDS = 30.0
# once the first message is there, how long to wait for those that came with it
GATHER_SECONDS = 0.05


class KafkaSource:
    """Rows from a topic whose messages are JSON objects, or lists of them, with the columns of a frame.

    Args:
        servers: ``host:port``, several joined by commas.
        max_rows: most messages of one poll.
        wait_seconds: how long a poll waits for a first message.
        timeout_seconds: how long it waits for the broker to describe itself.
        on_corrupt: ``error``, or ``quarantine``: pass over a message that is no row, and count it in the position.
        config: more settings of librdkafka, such as those of SASL and TLS.

    Raises DataError: E-SOURCE (library, broker or topic is missing), E-SOURCE-CORRUPT, E-SOURCE-GONE (the broker has
        deleted rows that were not read yet), E-SOURCE-CHANGED (the topic was made anew), E-SOURCE-POSITION.
    """

    def __init__(
        self,
        servers: str,
        topic: str,
        *,
        max_rows: int = 10_000,
        wait_seconds: float = 1.0,
        timeout_seconds: float = 30.0,
        on_corrupt: OnCorrupt = "error",
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1. Got {max_rows}.")
        self.servers, self.topic, self.max_rows, self.on_corrupt = servers, topic, max_rows, on_corrupt
        self.wait_seconds, self.timeout_seconds = wait_seconds, timeout_seconds
        self.rejected = Rejected()
        self._at: Position = None
        self._ended: set[int] = set()
        self._listed = 0.0
        self._complaint = ""
        self._consumer = self._connect(config or {})

    # a poll waits by itself where there is nothing
    waits = True

    @property
    def at_end(self) -> bool:
        """Whether the last poll saw the end of every partition."""
        return self._at is not None and self._ended >= {int(number) for number in self._at["offsets"]}

    def poll(self, position: Position) -> tuple[pd.DataFrame | None, Position]:
        """The messages that are there, at most ``max_rows``, and the offsets after them."""
        if self._at is None or position != self._at:
            position = self._seek(position)
        elif self._listed + RELIST_SECONDS < time.monotonic():
            position = self._look_again(position)
        assert position is not None
        # whatever goes wrong from here on, the consumer must be told anew where to read
        self._at = None
        offsets, rows, skipped = dict(position["offsets"]), [], 0
        for message in self._messages():
            found = self._rows(message)
            skipped += found is None
            rows += found or []
            number, offset = _place(message)
            offsets[str(number)] = offset + 1
        self._at = {**position, "offsets": offsets, "skipped": position["skipped"] + skipped}
        if not rows:
            return None, self._at
        import pandas as pd

        return pd.DataFrame(rows), self._at

    def close(self) -> None:
        """Leave the broker. Nothing is committed to it."""
        self._consumer.close()

    # --- the broker

    def _connect(self, config: Mapping[str, Any]) -> Consumer:
        try:
            from confluent_kafka import Consumer
        except ImportError as error:
            raise DataError(
                "E-SOURCE", "Reading Kafka needs the package confluent-kafka.", fix="pip install 'hamts[kafka]'"
            ) from error
        return Consumer(
            {
                "group.id": "hamts",
                "log_level": 2,
                # the broker holds back an answer for so long where there is nothing, and with it other partitions'
                "fetch.wait.max.ms": 100,
                **config,
                "bootstrap.servers": self.servers,
                # neither the place to go on from nor the place to begin is the broker's to say
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                "auto.offset.reset": "error",
                "enable.partition.eof": True,
                "error_cb": self._complain,
            }
        )

    def _complain(self, error: KafkaError) -> None:
        """Say once what the client is trying to get over."""
        if error.str() != self._complaint:
            self._complaint = error.str()
            warnings.warn(DataWarning(f"W-SOURCE-KAFKA: {self.servers}: {error.str()}"), stacklevel=2)

    def _seek(self, position: Position) -> dict[str, Any]:
        """Assign every partition at its offset, after making sure that the broker still has what follows it."""
        from confluent_kafka import TopicPartition

        check_position(position, "kafka", {"topic": str, "offsets": dict, "skipped": int})
        if position is not None and position["topic"] != self.topic:
            raise DataError(
                "E-SOURCE-POSITION",
                f"The stream was fed from topic {position['topic']!r}, not from {self.topic!r}.",
                fix="Feed it from the same topic, or start another state folder.",
            )
        offsets = {} if position is None else {int(key): value for key, value in position["offsets"].items()}
        numbers = self._partitions()
        if not numbers >= offsets.keys():
            raise self._changed(f"has no partition {min(offsets.keys() - numbers)} any more")
        for number in sorted(numbers):
            offsets[number] = self._checked(number, offsets.get(number))
        self._consumer.assign([TopicPartition(self.topic, number, offset) for number, offset in offsets.items()])
        self._ended.clear()
        self._listed = time.monotonic()
        kept = {"source": "kafka", "topic": self.topic, "skipped": 0, **(position or {})}
        return {**kept, "offsets": {str(number): offsets[number] for number in sorted(offsets)}}

    def _look_again(self, position: Position) -> Position:
        """Look for new partitions. A broker that is away for a while is waited for, as it is between two looks."""
        try:
            return self._seek(position)
        except DataError as error:
            if error.code != "E-SOURCE":
                raise
            warnings.warn(DataWarning(f"W-SOURCE-KAFKA: {error.message}"), stacklevel=3)
            self._listed = time.monotonic()
            return position

    def _partitions(self) -> set[int]:
        from confluent_kafka import KafkaException

        try:
            topic = self._consumer.list_topics(self.topic, timeout=self.timeout_seconds).topics[self.topic]
        except KafkaException as error:
            raise DataError(
                "E-SOURCE",
                f"Kafka at {self.servers} cannot be reached: {error.args[0].str()}",
                fix="Check the address.",
            ) from error
        if topic.error is not None or not topic.partitions:
            what = "it has no partitions" if topic.error is None else topic.error.str()
            raise DataError("E-SOURCE", f"Topic {self.topic!r} cannot be read: {what}.", fix="Check its name.")
        return set(topic.partitions)

    def _checked(self, number: int, offset: int | None) -> int:
        """The offset to read from: the first one there is, where none was read."""
        from confluent_kafka import KafkaException, TopicPartition

        try:
            low, high = self._consumer.get_watermark_offsets(
                TopicPartition(self.topic, number), timeout=self.timeout_seconds
            )
        except KafkaException as error:
            raise DataError(
                "E-SOURCE",
                f"Partition {number} of {self.topic!r} cannot be read: {error.args[0].str()}",
                fix="Try again when the broker has recovered.",
            ) from error
        if offset is None:
            return low
        if offset < low:
            raise DataError(
                "E-SOURCE-GONE",
                f"Partition {number} of {self.topic!r} begins at offset {low}; the stream has read up to {offset}, so"
                f" {low - offset} messages were deleted unread.",
                fix="Keep messages for longer; to accept the loss, start another state folder from a history.",
            )
        if offset > high:
            raise self._changed(f"ends at offset {high} of partition {number}; the stream has read up to {offset}")
        return offset

    def _changed(self, what: str) -> DataError:
        return DataError(
            "E-SOURCE-CHANGED",
            f"Topic {self.topic!r} {what}: it is not the one that the stream was fed from.",
            fix="Feed the stream from that topic, or start another state folder.",
        )

    # --- messages

    def _messages(self) -> list[Message]:
        """What is there, in the order of partitions and offsets. Waits for a first message, not for more."""
        until = time.monotonic() + self.wait_seconds
        found: list[Message] = []
        while len(found) < self.max_rows:
            wait = GATHER_SECONDS if found else max(0.0, until - time.monotonic())
            batch = self._consumer.consume(self.max_rows - len(found), timeout=min(wait, GATHER_SECONDS))
            found += [message for message in batch if self._is_row(message)]
            if not batch and (found or time.monotonic() >= until):
                break
        return sorted(found, key=_place)

    def _is_row(self, message: Message) -> bool:
        from confluent_kafka import KafkaError

        error = message.error()
        if error is None:
            self._ended.discard(_place(message)[0])
            return True
        if error.code() == KafkaError._PARTITION_EOF:
            self._ended.add(_place(message)[0])
            return False
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
            raise DataError(
                "E-SOURCE-GONE",
                f"Partition {message.partition()} of {self.topic!r}: {error.str()}. Messages were deleted unread.",
                fix="Keep messages for longer; to accept the loss, start another state folder from a history.",
            )
        raise DataError("E-SOURCE", f"Topic {self.topic!r} cannot be read: {error.str()}.", fix="Look at the broker.")

    def _rows(self, message: Message) -> list[dict[str, Any]] | None:
        """Rows of one message; None where it is passed over."""
        value = message.value()
        try:
            if value is None:
                raise ValueError("it has no value")
            parsed = json.loads(value)
            rows = parsed if isinstance(parsed, list) else [parsed]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("it is neither an object nor a list of objects")
            return rows
        except (ValueError, RecursionError) as error:
            number, offset = _place(message)
            where = {"topic": self.topic, "partition": number, "offset": offset}
            if self.on_corrupt == "error":
                raise DataError(
                    "E-SOURCE-CORRUPT",
                    f"A message must hold rows as JSON. That at offset {offset} of partition {number}"
                    f" does not: {error}.",
                    fix="Let the source pass over such messages (quarantine), or mend what writes them.",
                ) from error
            text = "" if value is None else value[:1000].decode("utf-8", errors="replace")
            self.rejected.add(**where, error=str(error), value=text)
            return None


def _place(message: Message) -> tuple[int, int]:
    """Partition and offset."""
    number, offset = message.partition(), message.offset()
    assert number is not None and offset is not None
    return number, offset
