"""Make the converted files of catalog.toml from what their sources publish.

    python datasets/build.py tep path/to/clone path/to/data/folder

The second word is a set, the third the folder (or the one file) that its card names as source, the last the folder
that HAMTS_DATA will name. The values of the result are compared with the catalogue before anything is written.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from hamts.data.catalog import file_forms, read_catalog
from hamts.data.forms import values_digest

# the set holds five of the seven series with a known cause
LEFT_OUT_OF_NAB = (
    "realKnownCause/ambient_temperature_system_failure",
    "realKnownCause/machine_temperature_system_failure",
)


def read(path: Path, **options: object) -> pd.DataFrame:
    return pd.read_csv(path, float_precision="round_trip", **options)


def build_tep(source: Path) -> pd.DataFrame:
    """Runs one after the other. Faults are on from the first row of training runs and from row 160 of test runs."""
    names = [f"XMEAS_{i}" for i in range(1, 42)] + [f"XMV_{i}" for i in range(1, 12)]
    runs = []
    for path in sorted(source.glob("d??*.dat")):
        values = np.loadtxt(path)
        # d00.dat alone has one line per variable
        values = values.T if values.shape[0] == len(names) else values
        fault, is_test = int(path.stem[1:3]), path.stem.endswith("_te")
        step = np.arange(len(values))
        active = (fault > 0) & (step >= (160 if is_test else 0))
        head = {"run": path.stem, "split": "test" if is_test else "train", "fault": fault, "step": step}
        run = pd.DataFrame(head | {"fault_active": active.astype("int8")})
        runs.append(pd.concat([run, pd.DataFrame(values.astype("float32"), columns=names)], axis=1))
    return pd.concat(runs, ignore_index=True)


def build_skab(source: Path) -> pd.DataFrame:
    """Experiments one after the other; the run without anomalies has no label columns."""
    runs = []
    for path in sorted((source / "data").glob("*/*.csv"), key=lambda path: (path.parent.name, path.stem)):
        run = read(path, sep=";", parse_dates=["datetime"])
        run.insert(0, "group", path.parent.name)
        run.insert(1, "run", f"{path.parent.name}_{path.stem}")
        for label in ("anomaly", "changepoint"):
            run[label] = run[label].astype("int8") if label in run else np.int8(0)
        runs.append(run)
    return pd.concat(runs, ignore_index=True)


def build_nab(source: Path) -> pd.DataFrame:
    """The real series with the benchmark's windows and points as flags."""
    windows = json.loads((source / "labels" / "combined_windows.json").read_text())
    points = json.loads((source / "labels" / "combined_labels.json").read_text())
    series = []
    for path in sorted((source / "data").glob("real*/*.csv")):
        name = f"{path.parent.name}/{path.stem}"
        if name in LEFT_OUT_OF_NAB:
            continue
        table = read(path, parse_dates=["timestamp"])
        table.insert(0, "series", name)
        inside = [table["timestamp"].between(start, end) for start, end in windows[f"{name}.csv"]]
        table["anomaly_window"] = np.any([np.zeros(len(table), bool), *inside], axis=0).astype("int8")
        table["anomaly_point"] = table["timestamp"].isin(pd.to_datetime(points[f"{name}.csv"])).astype("int8")
        series.append(table)
    return pd.concat(series, ignore_index=True)


def build_beijing_air_multisite(source: Path) -> pd.DataFrame:
    """Stations one after the other, with one time column."""
    stations = []
    for path in sorted(source.glob("PRSA_Data_*.csv")):
        table = read(path)
        table["date"] = pd.to_datetime(table[["year", "month", "day", "hour"]])
        numbers = ["PM2.5", "PM10", "SO2", "NO2", "CO", "O3", "TEMP", "PRES", "DEWP", "RAIN", "WSPM"]
        table[numbers] = table[numbers].astype("float32")
        stations.append(table[["station", "date", *numbers[:-1], "wd", "WSPM"]])
    return pd.concat(stations, ignore_index=True)


def build_household_power(source: Path) -> pd.DataFrame:
    """Minutes to quarters of an hour: means of the valid minutes, sums for the sub-meters, and how many were valid."""
    table = read(source, na_values=["?"])
    table.index = pd.to_datetime(table.pop("Date") + " " + table.pop("Time"), format="%d/%m/%Y %H:%M:%S").rename("date")
    quarters = table.astype("float32").resample("15min")
    means = quarters[["Global_active_power", "Global_reactive_power", "Voltage", "Global_intensity"]].mean()
    sums = quarters[["Sub_metering_1", "Sub_metering_2", "Sub_metering_3"]].sum(min_count=1)
    valid = quarters["Global_active_power"].count().astype("int8").rename("n_minutes")
    return pd.concat([means, sums, valid], axis=1).reset_index()


def build_online_retail_daily(source: Path) -> pd.DataFrame:
    """Sales per trading day of the 60 articles with a numeric code that are sold on most days."""
    table = read(source, dtype={"Invoice": str, "StockCode": str}).drop_duplicates()
    # the same article is written with a capital or a small letter
    table["StockCode"] = table["StockCode"].str.upper()
    table = table[~table["Invoice"].str.startswith("C") & (table["Quantity"] > 0) & (table["Price"] > 0)]
    table["date"] = pd.to_datetime(table["InvoiceDate"], format="%m/%d/%Y %H:%M").dt.normalize()
    table["paid"] = table["Quantity"] * table["Price"]
    days = pd.Index(sorted(table["date"].unique()), name="date")
    table = table[table["StockCode"].str.match(r"^\d{5}[A-Z]?$")]
    sold_on = table.groupby("StockCode")["date"].nunique().sort_values(ascending=False, kind="stable")
    grouped = table[table["StockCode"].isin(sold_on.index[:60])].groupby(["StockCode", "date"])
    daily = pd.DataFrame(
        {
            "quantity": grouped["Quantity"].sum(),
            "price_min": grouped["Price"].min().astype("float32"),
            "price_max": grouped["Price"].max().astype("float32"),
            "invoices": grouped["Invoice"].nunique(),
            "price_mean": (grouped["paid"].sum() / grouped["Quantity"].sum()).astype("float32"),
        }
    )
    items = sorted(sold_on.index[:60])
    daily = daily.reindex(pd.MultiIndex.from_product([items, days], names=["item", "date"])).reset_index()
    return daily.fillna({"quantity": 0, "invoices": 0})


def build_walmart_weekly(source: Path) -> pd.DataFrame:
    return read(source, parse_dates=["Date"])


def main(name: str, source: Path, folder: Path) -> None:
    entry = next(entry for key, entry in read_catalog().items() if key.split("/")[0] == name)
    form = file_forms(entry)["data"][0]
    table = globals()[f"build_{name}"](source)
    if values_digest(table) != form.values:
        raise SystemExit(f"The values differ from those of the catalogue ({form.values}). Got {values_digest(table)}.")
    path = folder / form.path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.part")
    table.to_parquet(partial, compression="zstd", index=False)
    partial.replace(path)
    print(f"{path}: {table.shape[0]:,} rows x {table.shape[1]} columns")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
