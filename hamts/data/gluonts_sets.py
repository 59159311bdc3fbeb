"""The sets that ``gluonts.dataset.repository`` names, as long frames.

gluonts downloads and converts them itself, without checksums; its folder of one set is moved into place only when
complete. The only file that imports gluonts' repository, and only when such a set is asked for.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hamts.data.frequency import normalize_alias
from hamts.data.remote import cache_folder, data_folder
from hamts.errors import DataError

__all__ = ["load_repository_set", "repository_names", "set_folder"]

PREFIX = "gluonts/"
WEEKDAYS = ("MON", "TUE", "WED", "THU", "FRI", "SAT", "SUN")
MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")


def repository_names() -> list[str]:
    """Names as load_dataset takes them, such as ``gluonts/electricity``."""
    return [PREFIX + name for name in _repository().dataset_names]


def _repository() -> Any:
    """The module, without its advice to install a faster JSON library."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using `json`-module", category=UserWarning)
        from gluonts.dataset import repository

        return repository


def set_folder(name: str, path: Path | None = None) -> Path | None:
    """Folder with a set in gluonts' own format: path, else HAMTS_DATA/gluonts, the cache or gluonts' own; or None."""
    places = [path] if path is not None else [cache_folder() / "gluonts", _repository().default_dataset_path]
    if path is None and (data := data_folder()) is not None:
        places.insert(0, data / "gluonts")
    short = name.removeprefix(PREFIX)
    for place in places:
        if (place / short / "metadata.json").is_file():
            return place
    return None


def load_repository_set(name: str, *, path: Path | None, download: bool) -> dict[str, Any]:
    """Fields of a Dataset: the frame, roles, frequency, horizon and split of a repository set."""
    known = repository_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4)
        raise DataError(
            "E-DATASET",
            f"unknown dataset {name!r}: gluonts has no such set. Near names: {', '.join(near) or 'none'}.",
            fix="hamts.list_datasets() shows all names.",
        )
    folder = set_folder(name, path) or _fetch(name, path=path, download=download)
    loaded = _repository().get_dataset(name.removeprefix(PREFIX), path=folder, regenerate=False)
    entries, windows = _longest_entries(list(loaded.train), list(loaded.test or []))
    horizon = loaded.metadata.prediction_length
    df, futr_cols = _long_frame(entries)
    return {
        "df": df,
        "target": [name for name in df.columns[2:] if name not in futr_cols],
        "futr_cols": futr_cols,
        "static_df": _static_frame(entries),
        "freq": _start_alias(loaded.metadata.freq),
        "h": horizon,
        "split": {"test_last": horizon * windows} if horizon else {},
        "origin": str(folder / name.removeprefix(PREFIX)),
    }


def _fetch(name: str, *, path: Path | None, download: bool) -> Path:
    """Let gluonts download a set into a folder beside its place, then move it there."""
    short = name.removeprefix(PREFIX)
    root = path or cache_folder() / "gluonts"
    if not download:
        raise _absent(name, root, "it is not on this machine and download=False")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{short}.") as beside:
            _repository().get_dataset(short, path=Path(beside), regenerate=False)
            os.replace(Path(beside) / short, root / short)
    except (OSError, RuntimeError, ValueError) as error:
        raise _absent(name, root, str(error)) from error
    return root


def _absent(name: str, root: Path, why: str) -> DataError:
    short = name.removeprefix(PREFIX)
    return DataError(
        "E-DATASET",
        f"dataset {name!r} is made by gluonts from a download, which failed: {why}.",
        fix=f"With a network run gluonts.dataset.repository.get_dataset({short!r}), then copy its folder to "
        f"{root / short}, or to gluonts/{short} in the folder named by HAMTS_DATA.",
    )


def _longest_entries(train: Sequence[dict], test: Sequence[dict]) -> tuple[list[dict], int]:
    """One entry per item, test steps included, and how many test windows follow its training part.

    A rolling test set lists every item once per window, each time one horizon longer.
    """
    if not test:
        return list(train), 0
    items = max(1, len(train))
    windows = max(1, len(test) // items)
    ids = {entry["item_id"] for entry in test if "item_id" in entry}
    longest: dict[Any, dict] = {}
    for position, entry in enumerate(test):
        # ids that differ from window to window say nothing; the order of the items does
        key = entry["item_id"] if len(ids) <= items and "item_id" in entry else position % items
        if key not in longest or entry["target"].shape[-1] > longest[key]["target"].shape[-1]:
            longest[key] = entry
    return list(longest.values()), windows


def _long_frame(entries: Sequence[dict]) -> tuple[pd.DataFrame, list[str]]:
    """Entries one after the other; a target of several rows becomes y0, y1, ...; reals become future columns."""
    lengths = np.array([entry["target"].shape[-1] for entry in entries])
    targets = [np.atleast_2d(entry["target"]) for entry in entries]
    names = ["y"] if len(targets[0]) == 1 else [f"y{row}" for row in range(len(targets[0]))]
    columns: dict[str, Any] = {
        "unique_id": np.repeat(np.asarray(_item_ids(entries), dtype=object), lengths),
        "ds": _timestamps([entry["start"] for entry in entries], lengths),
    }
    values = np.concatenate(targets, axis=1)  # [C, S]
    columns |= {name: values[row].astype("float64") for row, name in enumerate(names)}
    futr_cols = []
    if all("feat_dynamic_real" in entry for entry in entries):
        reals = [
            np.atleast_2d(entry["feat_dynamic_real"])[:, :length]
            for entry, length in zip(entries, lengths, strict=True)
        ]
        futr_cols = [f"feat_dynamic_real_{row}" for row in range(len(reals[0]))]
        joined = np.concatenate(reals, axis=1)  # [C, S]
        columns |= {name: joined[row].astype("float64") for row, name in enumerate(futr_cols)}
    return pd.DataFrame(columns), futr_cols


def _item_ids(entries: Sequence[dict]) -> list[str]:
    return [str(entry.get("item_id", position)) for position, entry in enumerate(entries)]


def _timestamps(starts: Sequence[pd.Period], lengths: np.ndarray) -> pd.DatetimeIndex:
    """Start of every period of every item, without a loop over steps."""
    step = np.concatenate([np.arange(length) for length in lengths]) * starts[0].freq.n
    first = np.repeat([start.ordinal for start in starts], lengths)
    return pd.PeriodIndex.from_ordinals(first + step, freq=starts[0].freq).to_timestamp().as_unit("ns")


def _start_alias(freq: str) -> str:
    """Alias of the first days of periods: months, quarters and years start where the one before ends; so do weeks."""
    alias = normalize_alias(freq)
    count, base, anchor = re.fullmatch(r"(\d*)([A-Za-z]+)(?:-(\w+))?", alias).groups()  # type: ignore[union-attr]
    if base == "W":
        return f"{count}W-{WEEKDAYS[(WEEKDAYS.index(anchor or 'SUN') + 1) % 7]}"
    if base in ("ME", "QE", "YE"):
        # the period Q-NOV ends with November and starts with December
        following = MONTHS[(MONTHS.index(anchor or "DEC") + 1) % 12]
        return f"{count}{base[0]}S" + ("" if following == "JAN" else f"-{following}")
    return alias


def _static_frame(entries: Sequence[dict]) -> pd.DataFrame | None:
    """Static categories that are shared by items; a category of one's own says no more than the id."""
    if not all("feat_static_cat" in entry for entry in entries):
        return None
    codes = np.array([np.ravel(entry["feat_static_cat"]) for entry in entries])
    static = {
        f"feat_static_cat_{column}": codes[:, column].astype(int).astype(str)
        for column in range(codes.shape[1])
        if 1 < len(np.unique(codes[:, column])) < len(entries)
    }
    return pd.DataFrame({"unique_id": _item_ids(entries), **static}) if static else None
