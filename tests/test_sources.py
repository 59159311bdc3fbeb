"""A folder of drops as a source: every row once, in order, whatever happens in between."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hamts.errors import DataError, DataWarning
from hamts.sources import FolderSource, Position, Source, open_source


def drop(folder: Path, name: str, first: int, rows: int) -> pd.DataFrame:
    frame = pd.DataFrame({"unique_id": "a", "ds": range(first, first + rows), "y": [n / 8 for n in range(rows)]})
    if name.endswith(".parquet"):
        frame.to_parquet(folder / name)
    else:
        frame.to_csv(folder / name, index=False)
    return frame


def folder_source(folder: Path, **options: Any) -> FolderSource:
    return FolderSource(folder, **{"settle_seconds": 0, **options})


def read_all(source: Source, position: Position = None) -> tuple[list[int], Position, list[Position]]:
    """Clock of every row that comes, the last position, and those on the way."""
    seen, positions = [], []
    while True:
        rows, following = source.poll(position)
        # what is kept is JSON
        following = json.loads(json.dumps(following))
        if rows is None and following == position:
            return seen, position, positions
        seen += [] if rows is None else rows["ds"].tolist()
        position = following
        positions.append(position)


@pytest.fixture
def drops(tmp_path: Path) -> Path:
    """Rows 0 to 25 in four files of both kinds."""
    folder = tmp_path / "drops"
    folder.mkdir()
    first = 0
    for name, rows in (("01.csv", 7), ("02.parquet", 10), ("03.csv.gz", 1), ("04.parquet", 8)):
        drop(folder, name, first, rows)
        first += rows
    return folder


# --- rows and positions


def test_every_row_comes_once_and_in_order(drops: Path) -> None:
    for max_rows in (1, 3, 7, 100):
        seen, position, _ = read_all(folder_source(drops, max_rows=max_rows))
        assert seen == list(range(26))
        assert position["file"] == "04.parquet"
        assert (position["done"], position["files"], position["skipped"]) == (True, 4, 0)


@given(max_rows=st.integers(1, 12), data=st.data())
def test_reading_goes_on_from_any_position_in_another_process(
    tmp_path_factory: pytest.TempPathFactory, max_rows: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("drops")
    for number in range(3):
        drop(folder, f"{number}.csv", 5 * number, 5)
    seen, _, positions = read_all(folder_source(folder, max_rows=max_rows))
    cut = data.draw(st.integers(0, len(positions) - 1))
    rest, _, later = read_all(folder_source(folder, max_rows=max_rows), positions[cut])
    before = sum(rows for _, rows in _rows_until(positions[: cut + 1]))
    assert seen[before:] == rest
    assert later == positions[cut + 1 :]


def _rows_until(positions: list[Position]) -> list[tuple[str, int]]:
    last = {position["file"]: position["rows"] for position in positions}
    return list(last.items())


def test_values_come_as_they_were_written(drops: Path) -> None:
    rows, _ = folder_source(drops).poll(None)
    pd.testing.assert_frame_equal(rows, pd.read_csv(drops / "01.csv"))


def test_files_that_come_later_are_read_when_they_are_there(drops: Path) -> None:
    source = folder_source(drops)
    _, position, _ = read_all(source)
    assert source.poll(position) == (None, position)
    drop(drops, "05.csv", 26, 4)
    assert read_all(source, position)[0] == [26, 27, 28, 29]


def test_empty_tables_are_passed_over(tmp_path: Path) -> None:
    drop(tmp_path, "1.csv", 0, 0)
    drop(tmp_path, "2.csv", 0, 2)
    drop(tmp_path, "3.csv", 2, 0)
    seen, position, _ = read_all(folder_source(tmp_path))
    assert seen == [0, 1]
    assert (position["file"], position["files"]) == ("3.csv", 3)


# --- what is not complete


@pytest.mark.parametrize("name", [".05.csv", "_05.csv", "05.csv.tmp", "05.parquet.part", "notes.txt"])
def test_names_of_unfinished_files_are_left_alone(drops: Path, name: str) -> None:
    (drops / name).write_text("ds,y\n1,")
    (drops / "folder.csv").mkdir()
    assert read_all(folder_source(drops))[0] == list(range(26))


def test_a_file_that_was_just_written_is_waited_for_and_holds_back_later_ones(drops: Path) -> None:
    source = folder_source(drops, settle_seconds=60)
    long_ago = time.time() - 100
    for name in ("01.csv", "03.csv.gz", "04.parquet"):
        os.utime(drops / name, (long_ago, long_ago))
    seen, position, _ = read_all(source)
    assert seen == list(range(7))
    assert not source.at_end
    os.utime(drops / "02.parquet", (long_ago, long_ago))
    assert read_all(source, position)[0] == list(range(7, 26))
    assert source.at_end


# --- what is wrong


CORRUPT = {
    "05.csv": b"",
    "05.parquet": b"PAR1 and then nothing of the kind",
    "06.csv.gz": b"\x1f\x8b cut",
    "07.csv": b'a,b\n1,2\n"3',
    "08.csv": b"\xff\xfe\x00bad\xff",
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_file_is_refused_and_stops_at_it(drops: Path, name: str) -> None:
    (drops / name).write_bytes(CORRUPT[name])
    drop(drops, "09.csv", 26, 3)
    source = folder_source(drops)
    position = None
    for _ in range(4):
        _, position = source.poll(position)
    for _ in range(2):
        with pytest.raises(DataError, match=f"E-SOURCE-CORRUPT.*{name}"):
            source.poll(position)


def test_corrupt_files_are_passed_over_where_that_was_asked_for_and_counted(drops: Path) -> None:
    for name, content in CORRUPT.items():
        (drops / name).write_bytes(content)
    drop(drops, "09.csv", 26, 3)
    source = folder_source(drops, on_corrupt="quarantine")
    seen, position, _ = read_all(source)
    assert seen == list(range(29))
    assert (position["skipped"], position["files"]) == (5, 10)
    assert position["skipped_files"] == sorted(CORRUPT)
    rejected = source.rejected.take()
    assert [entry["file"] for entry in rejected] == sorted(CORRUPT)
    assert all(entry["error"] for entry in rejected)
    assert source.rejected.take() == []


def test_a_truncated_parquet_file_is_corrupt(drops: Path) -> None:
    content = (drops / "04.parquet").read_bytes()
    (drops / "04.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="E-SOURCE-CORRUPT.*04.parquet"):
        read_all(folder_source(drops))


def test_a_disk_that_fails_is_not_a_corrupt_file(drops: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pd, "read_csv", failing)
    with pytest.raises(DataError, match="E-FILE.*Input/output"):
        folder_source(drops, on_corrupt="quarantine").poll(None)


def test_a_file_that_was_begun_must_stay_as_it_is(drops: Path) -> None:
    source = folder_source(drops, max_rows=3)
    _, position = source.poll(None)
    content = (drops / "01.csv").read_bytes()
    (drops / "01.csv").write_bytes(content + b"a,99,1\n")
    with pytest.raises(DataError, match="E-SOURCE-CHANGED.*01.csv"):
        folder_source(drops).poll(position)
    (drops / "01.csv").unlink()
    with pytest.raises(DataError, match="E-SOURCE-GONE.*01.csv.*row 3"):
        folder_source(drops).poll(position)
    (drops / "01.csv").write_bytes(content)
    assert read_all(folder_source(drops), position)[0] == list(range(3, 26))


def test_files_that_are_done_may_be_removed_but_not_grow(drops: Path) -> None:
    _, position = folder_source(drops).poll(None)
    assert position["done"]
    with open(drops / "01.csv", "a") as file:
        file.write("a,99,1\n")
    with pytest.raises(DataError, match="E-SOURCE-CHANGED"):
        folder_source(drops).poll(position)
    (drops / "01.csv").unlink()
    assert read_all(folder_source(drops), position)[0] == list(range(7, 26))


def test_a_file_that_comes_too_late_is_noticed(drops: Path) -> None:
    source = folder_source(drops)
    _, position, _ = read_all(source)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source.poll(position)[0] is None
    drop(drops, "02b.csv", 90, 2)
    with pytest.warns(DataWarning, match="W-SOURCE-LATE: 02b.csv"):
        assert source.poll(position) == (None, position)
    # once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.poll(position)
    # by its number, where nobody looked when it came
    with pytest.warns(DataWarning, match="W-SOURCE-LATE: 1 files"):
        folder_source(drops).poll(position)


@pytest.mark.parametrize(
    "position",
    [{"source": "kafka", "topic": "t", "offsets": {}}, {"row": 3}, {"source": "folder", "file": "01.csv"}, [1]],
)
def test_positions_of_other_sources_are_refused(drops: Path, position: Any) -> None:
    with pytest.raises(DataError, match="E-SOURCE-POSITION"):
        folder_source(drops).poll(position)


def test_addresses(drops: Path, tmp_path: Path) -> None:
    source = open_source(str(drops), max_rows=5, zone=None)
    assert isinstance(source, FolderSource)
    assert isinstance(source, Source)
    with pytest.raises(DataError, match="E-SOURCE.*no folder"):
        open_source(str(tmp_path / "none"))
    for text in ("kafka://", "kafka://host:9092", "kafka://host:9092/", "kafka:///topic", "kafka://h:1/a/b"):
        with pytest.raises(DataError, match="E-SOURCE.*kafka://host:port/topic"):
            open_source(text)
    with pytest.raises(ValueError, match="max_rows"):
        FolderSource(drops, max_rows=0)
