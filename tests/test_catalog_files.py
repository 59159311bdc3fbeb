"""Where a data file comes from: HAMTS_DATA, the cache, one checked download; and what gluonts downloads itself."""

from __future__ import annotations

import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hamts.data import gluonts_sets, remote
from hamts.data.catalog import list_datasets, load_dataset
from hamts.data.forms import FileForm, values_digest
from hamts.data.remote import obtain_file
from hamts.errors import DataError

CONTENT = b"date,price\n2020-01-01 00:00:00,1.5\n2020-01-01 01:00:00,2.5\n"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test reads the user's folders or writes into them."""
    monkeypatch.delenv("HAMTS_DATA", raising=False)
    monkeypatch.setenv("HAMTS_CACHE", str(tmp_path / "cache"))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def form_at(url: str = "", path: str = "set/file.csv", **more) -> FileForm:
    return FileForm(path=path, sha256=SHA256, url=url, **more)


def put(folder: Path, content: bytes = CONTENT, path: str = "set/file.csv") -> Path:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
    return folder / path


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT whole, changed, cut off, or not at all, by the path asked for."""

    asked: list[str] = []

    def do_GET(self):
        self.asked.append(self.path)
        if self.path == "/absent":
            self.send_error(404)
            return
        body = CONTENT.replace(b"1.5", b"9.9") if self.path == "/changed" else CONTENT
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:20] if self.path == "/cut" else body)

    def log_message(self, *arguments):
        """Say nothing on the terminal."""


@pytest.fixture
def server():
    Handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_download_is_checked_kept_and_not_repeated(server, tmp_path):
    forms = [form_at(path="set/file.parquet", made_from="a CSV"), form_at(f"{server}/good")]
    found = obtain_file(forms, dataset="set")
    assert found.path == tmp_path / "cache" / "set" / "file.csv"
    assert found.path.read_bytes() == CONTENT and found.form is forms[1]
    assert obtain_file(forms, dataset="set", download=False).path == found.path
    assert Handler.asked == ["/good"]
    assert files_below(tmp_path) == ["cache/set/file.csv"]


def test_a_file_address_is_fetched_too(tmp_path):
    source = put(tmp_path / "elsewhere")
    found = obtain_file([form_at(source.as_uri())], dataset="set")
    assert found.path.read_bytes() == CONTENT and found.path != source


@pytest.mark.parametrize(
    ("page", "code", "words"),
    [("changed", "E-CHECKSUM", SHA256), ("cut", "E-DATASET", "20 of|IncompleteRead"), ("absent", "E-DATASET", "404")],
)
def test_a_bad_download_leaves_nothing_behind(server, tmp_path, page, code, words):
    with pytest.raises(DataError, match=words) as caught:
        obtain_file([form_at(f"{server}/{page}")], dataset="set")
    assert caught.value.code == code
    assert files_below(tmp_path) == []


def test_an_interruption_leaves_nothing_behind(server, tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(remote.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        obtain_file([form_at(f"{server}/good")], dataset="set")
    assert files_below(tmp_path) == []


def test_without_a_network_the_error_says_which_file_to_put_where(tmp_path):
    # nothing listens on a port that was just given back
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_port}/good"
    with pytest.raises(DataError) as caught:
        obtain_file([form_at(url)], dataset="set")
    text = str(caught.value)
    assert caught.value.code == "E-DATASET"
    for part in (url, SHA256, str(tmp_path / "cache" / "set" / "file.csv"), "HAMTS_DATA"):
        assert part in text
    with pytest.raises(DataError, match="download=False"):
        obtain_file([form_at(url)], dataset="set", download=False)


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path, monkeypatch):
    # a file in the place of a folder refuses every user, root included
    (tmp_path / "flat").write_text("")
    monkeypatch.setenv("HAMTS_CACHE", str(tmp_path / "flat"))
    with pytest.raises(DataError, match="cannot be written") as caught:
        obtain_file([form_at(f"{server}/good")], dataset="set")
    assert "HAMTS_CACHE" in caught.value.fix and Handler.asked == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_named(server, tmp_path, monkeypatch):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    monkeypatch.setenv("HAMTS_CACHE", str(folder))
    with pytest.raises(DataError, match="cannot be written"):
        obtain_file([form_at(f"{server}/good")], dataset="set")


def test_a_damaged_copy_in_the_cache_is_replaced_or_reported(server, tmp_path):
    damaged = put(tmp_path / "cache", CONTENT[:-3])
    with pytest.raises(DataError) as caught:
        obtain_file([form_at(f"{server}/good")], dataset="set", download=False)
    assert caught.value.code == "E-CHECKSUM"
    assert obtain_file([form_at(f"{server}/good")], dataset="set").path == damaged
    assert damaged.read_bytes() == CONTENT


def test_hamts_data_comes_before_the_cache_and_is_checked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HAMTS_DATA", str(tmp_path / "data"))
    put(tmp_path / "cache")
    own = put(tmp_path / "data")
    assert obtain_file([form_at(f"{server}/good")], dataset="set").path == own
    put(tmp_path / "data", CONTENT + b"2020-01-01 02:00:00,3.5\n")
    with pytest.raises(DataError) as caught:
        obtain_file([form_at(f"{server}/good")], dataset="set")
    assert caught.value.code == "E-CHECKSUM" and str(own) in str(caught.value)
    assert Handler.asked == []


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    path = put(tmp_path)
    assert remote.sha256_of(path) == SHA256
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", lambda *arguments: pytest.fail("hashed again"))
        assert remote.sha256_of(path) == SHA256
    path.write_bytes(CONTENT + b"\n")
    assert remote.sha256_of(path) != SHA256


def test_a_conversion_with_the_same_values_is_accepted(tmp_path, monkeypatch):
    table = pd.DataFrame({"date": pd.to_datetime(["2020-01-01"]), "price": [1.5]})
    form = FileForm("set/file.parquet", "0" * 64, made_from="a CSV", values=values_digest(table))
    monkeypatch.setenv("HAMTS_DATA", str(tmp_path))
    (tmp_path / "set").mkdir()
    table.to_parquet(tmp_path / "set" / "file.parquet", compression="gzip")
    assert obtain_file([form], dataset="set").read()["price"].tolist() == [1.5]
    table.assign(price=2.5).to_parquet(tmp_path / "set" / "file.parquet")
    with pytest.raises(DataError, match="sha256"):
        obtain_file([form], dataset="set")
    (tmp_path / "set" / "file.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="sha256"):
        obtain_file([form], dataset="set")
    (tmp_path / "set" / "file.parquet").unlink()
    with pytest.raises(DataError, match="no public address"):
        obtain_file([form], dataset="set")


def test_a_digest_sees_values_and_not_how_they_are_stored():
    table = pd.DataFrame({"when": pd.to_datetime(["2020-01-01", "2020-01-02"]), "who": ["a", "b"], "n": [1, 0]})
    same = table.astype({"when": "datetime64[s]", "who": "category", "n": "float32"})
    assert values_digest(same) == values_digest(table)
    assert values_digest(table.rename(columns={"n": "m"})) != values_digest(table)
    assert values_digest(table.assign(n=[1, np.nan])) != values_digest(table)
    assert values_digest(table[::-1]) != values_digest(table)


def test_the_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("HAMTS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert remote.cache_folder() == tmp_path / "hamts"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(remote.sys, "platform", "linux")
    assert remote.cache_folder() == Path.home() / ".cache" / "hamts"
    monkeypatch.setattr(remote.sys, "platform", "darwin")
    assert remote.cache_folder().parts[-3:] == ("Library", "Caches", "hamts")


# --- gluonts' repository


def write_repository_set(folder: Path, *, freq: str = "h", windows: int = 1, static: bool = False) -> None:
    """Two short series in gluonts' own on-disk format, with a rolling test part."""
    from gluonts.dataset import jsonl
    from gluonts.dataset.common import MetaData, TrainDatasets

    def entry(item: int, length: int) -> dict:
        start = pd.Period("2020-01-01", freq="M" if freq == "ME" else freq)
        fields = {"item_id": f"i{item}", "start": start, "target": np.arange(length) + 100.0 * item}
        # as in the repository, known values go on where the target ends
        return fields | {
            "feat_dynamic_real": np.ones((1, length + 2)),
            "feat_static_cat": [item, 7 if static else item],
        }

    train = [entry(item, 6 + item) for item in range(3)]
    test = [entry(item, 6 + item + 2 * (window + 1)) for window in range(windows) for item in range(3)]
    metadata = MetaData(freq="M" if freq == "ME" else freq, prediction_length=2)
    TrainDatasets(metadata, train, test).save(str(folder), writer=jsonl.JsonLinesWriter(), overwrite=True)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("windows", [1, 3])
def test_a_repository_set_is_read_from_a_folder(tmp_path, windows):
    write_repository_set(tmp_path / "electricity", windows=windows)
    electricity = load_dataset("gluonts/electricity", path=tmp_path, download=False)
    df = electricity.df
    assert df.groupby("unique_id").size().to_dict() == {f"i{item}": 6 + item + 2 * windows for item in range(3)}
    assert electricity.split == {"test_last": 2 * windows} and electricity.h == 2 and electricity.freq == "h"
    assert df["ds"].iloc[:2].tolist() == [pd.Timestamp("2020-01-01 00:00"), pd.Timestamp("2020-01-01 01:00")]
    assert electricity.target == ["y"] and electricity.futr_cols == ["feat_dynamic_real_0"]
    assert df.loc[df["unique_id"] == "i1", "y"].iloc[0] == 100.0
    assert electricity.static_df is None and "gluonts" in electricity.card


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_a_monthly_repository_set_is_stamped_on_the_first(tmp_path, monkeypatch):
    write_repository_set(tmp_path / "gluonts" / "m4_monthly", freq="ME")
    monkeypatch.setenv("HAMTS_DATA", str(tmp_path))
    monthly = load_dataset("gluonts/m4_monthly", download=False)
    assert monthly.freq == "MS"
    assert monthly.df["ds"].iloc[:2].tolist() == [pd.Timestamp("2020-01-01"), pd.Timestamp("2020-02-01")]
    assert list_datasets().set_index("name").loc["gluonts/m4_monthly", "available"]


def test_a_repository_set_that_is_absent_says_where_to_put_it(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="download=False") as caught:
        load_dataset("gluonts/electricity", path=tmp_path, download=False)
    assert caught.value.code == "E-DATASET" and str(tmp_path / "electricity") in caught.value.fix

    def half(name, path, regenerate):
        (path / name).mkdir(parents=True)
        (path / name / "metadata.json").write_text("{")
        raise OSError("Name or service not known")

    monkeypatch.setattr(gluonts_sets._repository(), "get_dataset", half)
    with pytest.raises(DataError, match="Name or service not known"):
        load_dataset("gluonts/electricity")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    ("freq", "alias"),
    [
        ("H", "h"),
        ("1D", "D"),
        ("30min", "30min"),
        ("M", "MS"),
        ("Q-DEC", "QS"),
        ("Q-NOV", "QS-DEC"),
        ("A", "YS"),
        ("W-SUN", "W-MON"),
    ],
)
def test_periods_are_stamped_on_the_clock_of_their_starts(freq, alias):
    assert gluonts_sets._start_alias(freq) == alias
    period = {"H": "h", "A": "Y", "30min": "min"}.get(freq, freq.removeprefix("1"))
    first = pd.period_range("2020-01-01", periods=3, freq=period)[0]
    stamps = gluonts_sets._timestamps([first, first + 1], np.array([3, 2]))
    offset = pd.tseries.frequencies.to_offset(alias)
    assert all(offset.is_on_offset(stamp) for stamp in stamps)
    assert stamps[1] == stamps[3] and len(stamps) == 5
