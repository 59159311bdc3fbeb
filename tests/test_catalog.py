"""The catalogue: complete entries and cards, builders on small files, and every set of a local data folder."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from hamts.data import catalog, tables
from hamts.data.catalog import list_datasets, load_dataset, read_catalog
from hamts.errors import DataError

LOCAL_DATA = os.environ.get("HAMTS_DATA", "")
ROLES = ("target", "futr_cols", "past_cols", "event_cols", "action_cols")


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """No test reads the user's folders or writes into them."""
    monkeypatch.delenv("HAMTS_DATA", raising=False)
    monkeypatch.setenv("HAMTS_CACHE", str(tmp_path / "cache"))


def test_every_entry_is_complete():
    for name, entry in read_catalog().items():
        assert {"builder", "card", "items", "rows", "freq", "target", "license", "source", "citation"} <= set(entry), (
            name
        )
        assert entry["builder"] in tables.BUILDERS, name
        for forms in catalog.file_forms(entry).values():
            for form in forms:
                assert len(form.sha256) == 64 and int(form.sha256, 16), name
                assert form.url.startswith("https://") or form.made_from or "package" in entry, name
                assert not Path(form.path).is_absolute() and ".." not in form.path, name


CARDS = sorted({entry["card"] for entry in read_catalog().values()} | {"gluonts"})


@pytest.mark.parametrize("card", CARDS)
def test_every_card_names_source_licence_columns_events_splits_and_citation(card):
    text = (catalog.catalog_folder() / "cards" / f"{card}.md").read_text(encoding="utf-8")
    sections = {part.split("\n", 1)[0].strip(): part.split("\n", 1)[1].strip() for part in text.split("\n## ")[1:]}
    for title in ("Source", "Licence", "Columns", "Events", "Splits", "Citation"):
        assert len(sections.get(title, "")) >= 5, f"{card}: section {title!r}"
    for entry in read_catalog().values():
        if entry["card"] == card and len(entry["target"]) < 4:
            assert all(f"`{name}`" in text for role in ROLES[:4] for name in entry.get(role, [])[:2]), card


def test_no_card_is_without_an_entry():
    cards = {path.stem for path in (catalog.catalog_folder() / "cards").glob("*.md")}
    assert cards == set(CARDS)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("nycflight", "nycflights13"),
        ("epf", "epf/NP"),
        ("nab/taxi", "nyc_taxi"),
        ("gluonts/electricty", "gluonts/electricity"),
    ],
)
def test_an_unknown_name_lists_near_ones(name, near):
    with pytest.raises(DataError, match=near) as caught:
        load_dataset(name)
    assert caught.value.code == "E-DATASET" and "list_datasets" in caught.value.fix


def test_the_list_says_what_is_here_and_what_is_missing(monkeypatch, tmp_path):
    table = list_datasets().set_index("name")
    assert table.loc["nycflights13", "available"] and table.loc["nycflights13", "rows"] == 26280
    assert table.loc["ett/ETTm1", ["source", "missing"]].tolist() == ["download", "network"]
    assert table.loc["tep", ["source", "missing"]].tolist() == ["HAMTS_DATA", "file tep/tep.parquet"]
    assert not table.loc["gluonts/electricity", "available"]
    (tmp_path / "tep").mkdir()
    (tmp_path / "tep" / "tep.parquet").write_bytes(b"")
    monkeypatch.setenv("HAMTS_DATA", str(tmp_path))
    assert list_datasets().set_index("name").loc["tep", "available"]


def test_the_catalogue_of_an_installed_package_comes_first(monkeypatch, tmp_path):
    module = tmp_path / "hamts" / "data" / "catalog.py"
    monkeypatch.setattr(catalog, "__file__", str(module))
    with pytest.raises(DataError, match=r"catalog\.toml"):
        catalog.catalog_folder()
    for folder in (tmp_path / "datasets", tmp_path / "hamts" / "_datasets"):
        folder.mkdir(parents=True)
        (folder / "catalog.toml").write_text("")
        assert catalog.catalog_folder() == folder


# --- builders on small files in the published formats


def test_a_named_file_is_read_as_published(tmp_path):
    path = tmp_path / "ETTm1.csv"
    path.write_text(
        "date,HUFL,HULL,MUFL,MULL,LUFL,LULL,OT\n"
        "2016-07-01 00:00:00,5.827,2.009,1.599,0.462,4.203,1.340,30.531\n"
        "2016-07-01 00:15:00,5.760,2.076,1.492,0.426,4.264,1.401,30.460\n"
    )
    ett = load_dataset("ett/ETTm1", path=path)
    assert ett.freq == "15min" and ett.df["OT"].tolist() == [30.531, 30.46]
    assert ett.origin == str(path) and ett.df["ds"].dtype == "datetime64[ns]"
    path.write_text("date,HUFL\n2016-07-01 00:00:00,5.827\n")
    with pytest.raises(DataError, match="HULL") as caught:
        load_dataset("ett/ETTm1", path=path)
    assert caught.value.code == "E-COLUMNS"


def test_a_published_market_gets_tidy_names(tmp_path):
    path = tmp_path / "DE.csv"
    path.write_text(",Price,Ampirion Load Forecast,PV+Wind Forecast\n2012-01-09 00:00:00,34.97,16382.0,3569.5275\n")
    market = load_dataset("epf/DE", path=path)
    assert market.target == ["price"] and market.df.iloc[0, 2:].tolist() == [34.97, 16382.0, 3569.5275]
    path = tmp_path / "PJM.csv"
    path.write_text(
        "Date, Zonal COMED price, System load forecast, Zonal COMED load foecast,temperature\n"
        "2013/1/1 0:00,25.4,85049,11509,36.4\n"
    )
    market = load_dataset("epf/PJM", path=path)
    assert list(market.df.columns[2:]) == ["zonal_comed_price", "system_load_forecast", "zonal_comed_load_forecast"]
    assert market.df["ds"].tolist() == [pd.Timestamp("2013-01-01")]


def test_victoria_is_told_in_local_time(tmp_path):
    path = tmp_path / "vic_electricity.csv"
    path.write_text("Time,Demand,Temperature,Date,Holiday\n2011-12-31T13:00:00Z,4382.8,21.4,2012-01-01,TRUE\n")
    row = load_dataset("vic_electricity", path=path).df.iloc[0]
    assert row["ds"] == pd.Timestamp("2012-01-01", tz="Australia/Melbourne") and row["holiday"]


def test_a_set_of_several_files_wants_a_folder(tmp_path):
    path = tmp_path / "file.csv"
    path.write_text("DATETIME\n")
    with pytest.raises(DataError, match="dataset03"):
        load_dataset("batadal", path=path)
    with pytest.raises(DataError, match="must exist"):
        load_dataset("batadal", path=tmp_path / "nowhere")
    with pytest.raises(DataError, match="it is not in"):
        load_dataset("batadal", path=tmp_path)


def test_flags_become_windows_within_items():
    table = pd.DataFrame({"unique_id": list("aaaabb"), "ds": [0, 1, 2, 3, 0, 1], "flag": [1, 0, 1, 1, 1, 0]})
    windows = tables.flag_windows(table, "flag", "fault")
    assert windows.to_numpy().tolist() == [["a", 0, 0, "fault"], ["a", 2, 3, "fault"], ["b", 0, 0, "fault"]]
    assert tables.flag_windows(table.assign(flag=0), "flag", "fault").empty


def test_rows_with_an_impossible_time_are_left_out_of_nab(tmp_path):
    name = "realKnownCause/ec2_request_latency_system_failure"
    times = pd.to_datetime(
        ["2014-03-09 01:49", "2014-03-09 01:54", "2014-03-09 03:00", "2014-03-09 03:04", "2014-03-09 03:04"]
    )
    table = pd.DataFrame({"series": name, "timestamp": times, "value": range(5), "anomaly_window": [0, 1, 1, 1, 0]})
    table["anomaly_point"] = [0, 0, 0, 1, 0]
    table.to_parquet(tmp_path / "nab.parquet")
    series = load_dataset(f"nab/{name}", path=tmp_path / "nab.parquet")
    assert series.df["y"].tolist() == [0.0, 1.0, 3.0]
    assert series.labels["label"].tolist() == ["anomaly window", "anomaly"]


def build_script():
    spec = importlib.util.spec_from_file_location("build_datasets", catalog.catalog_folder() / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_script_knows_every_conversion_and_writes_nothing_wrong(tmp_path):
    build = build_script()
    made = {name.split("/")[0] for name, entry in read_catalog().items() if "build.py" in str(entry["files"])}
    assert made and all(hasattr(build, f"build_{name}") for name in made)
    np.savetxt(tmp_path / "d04.dat", np.arange(3 * 52).reshape(3, 52))
    np.savetxt(tmp_path / "d04_te.dat", np.zeros((161, 52)))
    table = build.build_tep(tmp_path)
    assert table.groupby("run")["fault_active"].sum().to_dict() == {"d04": 3, "d04_te": 1}
    with pytest.raises(SystemExit, match="differ"):
        build.main("tep", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the sets of a local data folder


@pytest.mark.data
@pytest.mark.parametrize("name", [name for name in read_catalog() if not name.startswith(("nab/", "nycflights13"))])
def test_a_local_set_is_as_the_catalogue_says(monkeypatch, name):
    monkeypatch.setenv("HAMTS_DATA", LOCAL_DATA)
    entry = read_catalog()[name]
    try:
        dataset = load_dataset(name, download=False)
    except DataError as error:
        if error.code == "E-DATASET":
            pytest.skip(f"not in this HAMTS_DATA: {error.message}")
        raise
    check_dataset(dataset, entry)


def check_dataset(dataset, entry):
    df = dataset.df
    assert (len(df), df["unique_id"].nunique()) == (entry["rows"], entry["items"])
    assert list(df.columns) == ["unique_id", "ds", *[column for role in ROLES for column in getattr(dataset, role)]]
    assert not df.duplicated(["unique_id", "ds"]).any()
    assert df.groupby("unique_id", sort=False)["ds"].is_monotonic_increasing.all()
    assert all(df[column].dtype == "float64" and df[column].notna().any() for column in dataset.target)
    assert df["unique_id"].map(type).eq(str).all()
    step = pd.tseries.frequencies.to_offset(dataset.freq) if isinstance(dataset.freq, str) else None
    if step is not None:
        start = df.groupby("unique_id")["ds"].min()
        for item, rows in df.groupby("unique_id"):
            assert rows["ds"].isin(pd.date_range(start[item], rows["ds"].max(), freq=step)).all(), item
    if dataset.labels is not None:
        assert list(dataset.labels.columns) == ["unique_id", "start", "end", "label"]
        assert (dataset.labels["start"] <= dataset.labels["end"]).all()
        assert set(dataset.labels["unique_id"]) <= set(df["unique_id"])
    assert dataset.card and dataset.license and dataset.source and dataset.citation


@pytest.mark.data
def test_every_nab_series_has_one_clock(monkeypatch):
    monkeypatch.setenv("HAMTS_DATA", LOCAL_DATA)
    names = [name for name in read_catalog() if name.startswith("nab/")]
    assert len(names) == 45
    for name in names[::6]:
        check_dataset(load_dataset(name, download=False), read_catalog()[name])
    taxi = load_dataset("nab/realKnownCause/nyc_taxi", download=False)
    assert (taxi.labels["label"] == "anomaly window").sum() == 5
    irregular = load_dataset("nab/realTraffic/speed_6005", download=False)
    assert irregular.freq is None and irregular.fit_kwargs()["irregular"] == "native"


@pytest.mark.data
def test_local_sets_keep_their_labels_actions_and_graph(monkeypatch):
    monkeypatch.setenv("HAMTS_DATA", LOCAL_DATA)
    tep = load_dataset("tep", download=False)
    assert len(tep.action_cols) == 11 and len(tep.labels) == 42 and tep.freq == 1
    assert len(tep.split["train_items"]) == len(tep.split["test_items"]) == 22
    fault = tep.labels.set_index("unique_id").loc["d04_te"]
    assert (fault["start"], fault["end"], fault["label"]) == (160, 959, "fault 4")
    batadal = load_dataset("batadal", download=False)
    assert len(batadal.labels) == 7 and set(batadal.labels["unique_id"]) == {"dataset04"}
    hours = (batadal.labels["end"] - batadal.labels["start"]) / pd.Timedelta("1h") + 1
    assert hours.sum() == 492 and batadal.df["S_PU2"].dtype == bool
    traffic = load_dataset("metr_la_week", download=False)
    assert traffic.graph.shape == (207, 207) and (traffic.graph.index == traffic.df["unique_id"].unique()).all()
    assert np.allclose(traffic.graph, traffic.graph.T) and len(traffic.static_df) == 207
    assert load_dataset("gas_turbine", download=False).df["ds"].tolist()[:3] == [0, 1, 2]


@pytest.mark.data
def test_a_changed_local_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "epf").mkdir()
    content = bytearray((Path(LOCAL_DATA) / "epf" / "NP.parquet").read_bytes())
    content[1000] ^= 1
    (tmp_path / "epf" / "NP.parquet").write_bytes(content)
    monkeypatch.setenv("HAMTS_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_dataset("epf/NP", download=False)
    assert caught.value.code == "E-CHECKSUM"
