"""load_dataset: real series by name, with the roles of their columns, labels, customary splits and a card.

Names come from ``catalog.toml``; files come from installed packages, the folder in HAMTS_DATA, the cache, or a checked
download, in that order.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from hamts.data.forms import FileForm, Found
from hamts.data.gluonts_sets import PREFIX, load_repository_set, repository_names, set_folder
from hamts.data.remote import cache_folder, data_folder, find_file, obtain_file, package_folder
from hamts.data.tables import BUILDERS, ROLE_KEYS, Parts
from hamts.errors import DataError

__all__ = ["Dataset", "list_datasets", "load_dataset"]


# what holds for every set that gluonts' repository names
_GLUONTS = {
    "card": "gluonts",
    "license": "that of each set; see its source",
    "source": "gluonts.dataset.repository",
    "citation": "Alexandrov A et al. (2020). GluonTS: Probabilistic and Neural Time Series Modeling. JMLR 21.",
}


@dataclass(frozen=True)
class Dataset:
    """A named set in the long dialect (``unique_id``, ``ds``, columns), ready for ``hamts.fit``.

    Attributes:
        df: one row per item and step, items together and sorted in time; missing values are NaN.
        events: event log (``unique_id, ds, type, value``), or None.
        labels: labelled windows (``unique_id, start, end, label``), both ends included, or None. They are ground truth
            for judging, not inputs; where an event column repeats them, the card says so.
        freq: pandas alias; 1 for an integer clock; None where rows are irregular.
        h: customary horizon in steps.
        split: customary boundaries, each the first row or time after its part: ``train_end``, ``val_end``,
            ``test_end`` (row counts within an item, or timestamps); or ``test_last`` (rows at the end of each item); or
            ``train_items`` and ``test_items``.
        graph: weights between items, square, named by ``unique_id``, or None.
        source: where the data come from; ``origin`` is where this copy was read.
    """

    name: str
    df: pd.DataFrame
    target: list[str]
    futr_cols: list[str] = field(default_factory=list)
    past_cols: list[str] = field(default_factory=list)
    event_cols: list[str] = field(default_factory=list)
    action_cols: list[str] = field(default_factory=list)
    events: pd.DataFrame | None = None
    labels: pd.DataFrame | None = None
    static_df: pd.DataFrame | None = None
    freq: str | int | None = None
    h: int | None = None
    split: dict[str, Any] = field(default_factory=dict)
    graph: pd.DataFrame | None = None
    card: str = ""
    license: str = ""
    source: str = ""
    citation: str = ""
    origin: str = ""

    def fit_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for ``hamts.fit(dataset.df, **dataset.fit_kwargs())``."""
        names = ("target", "futr_cols", "past_cols", "event_cols", "action_cols", "events", "static_df", "freq", "h")
        kwargs = {name: getattr(self, name) for name in names}
        # rows without a common step are used as they are only when that is asked for
        return kwargs if self.freq is not None else {**kwargs, "irregular": "native"}

    def __repr__(self) -> str:
        items = self.df["unique_id"].nunique()
        return f"Dataset({self.name!r}, items={items}, rows={len(self.df)}, freq={self.freq!r}, target={self.target})"


def catalog_folder() -> Path:
    """Folder of catalog.toml and the cards: inside the installed package, else beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_datasets", package.parent / "datasets"):
        if (folder / "catalog.toml").is_file():
            return folder
    raise DataError(
        "E-DATASET",
        f"catalog.toml must lie in {package / '_datasets'} or {package.parent / 'datasets'}; it is in neither.",
        fix="Install hamts again, or run it from a complete clone.",
    )


@cache
def read_catalog() -> dict[str, dict[str, Any]]:
    """Entries by name, in the order of the file; a group of series gives one entry each."""
    with (catalog_folder() / "catalog.toml").open("rb") as stream:
        tables = tomllib.load(stream)
    entries: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        members = table.pop("series", None)
        if members is None:
            entries[name] = table
        for member, own in (members or {}).items():
            entries[f"{name}/{member}"] = {**table, "item": member, **own}
    return entries


def load_dataset(name: str, *, path: str | Path | None = None, download: bool = True) -> Dataset:
    """Load a set by name.

    Args:
        name: such as ``nycflights13``, ``epf/NP`` or ``gluonts/electricity``; ``list_datasets()`` shows all.
        path: a folder laid out like HAMTS_DATA (for a gluonts set, like gluonts' own), used instead of it and of the
            cache; or, where a set is one file, that file, read as it is without a check of its bytes.
        download: whether a missing file may be fetched.
    """
    place = None if path is None else Path(path).expanduser()
    if place is not None and not place.exists():
        raise DataError("E-DATASET", f"path={str(path)!r} must exist.", fix="Give a folder or a file that is there.")
    if name.startswith(PREFIX):
        return Dataset(name=name, **_about(_GLUONTS), **load_repository_set(name, path=place, download=download))
    entry = read_catalog().get(name)
    if entry is None:
        raise _unknown(name)
    sources = _sources(name, entry, path=place, download=download)
    return _dataset(name, entry, BUILDERS[entry["builder"]](entry, sources), origin=_origin(sources))


def _sources(name: str, entry: dict[str, Any], *, path: Path | None, download: bool) -> dict[str, Found]:
    """The files of a set, by their part in it; checked unless one file was named."""
    forms = file_forms(entry)
    if path is not None and path.is_file():
        return _given_file(name, forms, path)
    if path is None and (package := entry.get("package")):
        path = package_folder(package, dataset=name)
    return {part: obtain_file(each, dataset=name, folder=path, download=download) for part, each in forms.items()}


def _given_file(name: str, forms: Mapping[str, list[FileForm]], path: Path) -> dict[str, Found]:
    """A named file takes the form that has its name, or else its suffix."""
    if len(forms) > 1:
        raise DataError(
            "E-DATASET",
            f"dataset {name!r} has {len(forms)} files; path must be a folder that holds them. Got the file {path}.",
            fix=f"Give a folder with {', '.join(each[0].path for each in forms.values())}.",
        )
    (part, accepted), *_ = forms.items()
    ranked = sorted(
        accepted, key=lambda form: (Path(form.path).name != path.name, Path(form.path).suffix != path.suffix)
    )
    return {part: Found(path, ranked[0])}


def _origin(sources: Mapping[str, Found]) -> str:
    return ", ".join(str(found.path) for found in sources.values())


def file_forms(entry: Mapping[str, Any]) -> dict[str, list[FileForm]]:
    return {part: [FileForm(**form) for form in forms] for part, forms in entry["files"].items()}


def _dataset(name: str, entry: dict[str, Any], parts: Parts, *, origin: str) -> Dataset:
    freq = entry["freq"]
    roles: dict[str, Any] = {key: list(entry.get(key, [])) for key in ROLE_KEYS}
    return Dataset(
        name=name,
        df=parts.df,
        **roles,
        labels=parts.labels,
        static_df=parts.static_df,
        freq=None if freq == "irregular" else freq,
        h=entry.get("h"),
        split={**_split(entry, parts.df), **parts.split},
        graph=parts.graph,
        origin=origin,
        **_about(entry),
    )


def _about(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Card, licence, source and citation of an entry."""
    card = (catalog_folder() / "cards" / f"{entry['card']}.md").read_text(encoding="utf-8")
    return {"card": card, **{key: entry[key] for key in ("license", "source", "citation")}}


def _split(entry: dict[str, Any], df: pd.DataFrame) -> dict[str, Any]:
    """Boundaries of the catalogue; dates become timestamps in the zone of the clock."""
    zone = getattr(df["ds"].dtype, "tz", None)
    bounds = entry.get("split", {})
    return {key: pd.Timestamp(bound, tz=zone) if isinstance(bound, str) else bound for key, bound in bounds.items()}


def _unknown(name: str) -> DataError:
    known = list(read_catalog())
    near = [each for each in known if each.split("/")[0] == name.split("/")[0]]
    near = (
        difflib.get_close_matches(name, near, n=8, cutoff=0.4)
        or near[:8]
        or difflib.get_close_matches(name, known, n=5, cutoff=0.4)
    )
    return DataError(
        "E-DATASET",
        f"unknown dataset {name!r}. Near names: {', '.join(near) or 'none'}.",
        fix="hamts.list_datasets() shows all names.",
    )


def list_datasets() -> pd.DataFrame:
    """Every known set: ``name, items, rows, freq, source, available, missing``.

    ``source`` says where it would be read from here; ``missing`` what is needed for that. Nothing is fetched or hashed.
    Items and rows of gluonts' sets are not known before they are there.
    """
    own = [_listing(name, entry) for name, entry in read_catalog().items()]
    table = pd.DataFrame([*own, *(_repository_listing(name) for name in repository_names())])
    return table.astype({"items": "Int64", "rows": "Int64"})


def _listing(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    source, missing = _whereabouts(name, entry)
    shown = {key: entry[key] for key in ("items", "rows")} | {"freq": str(entry["freq"])}
    return {"name": name, **shown, "source": source, "available": not missing, "missing": missing}


def _repository_listing(name: str) -> dict[str, Any]:
    folder = set_folder(name)
    return {
        "name": name,
        "items": None,
        "rows": None,
        "freq": "",
        "source": str(folder) if folder else "download by gluonts",
        "available": folder is not None,
        "missing": "" if folder else "network",
    }


def _whereabouts(name: str, entry: dict[str, Any]) -> tuple[str, str]:
    """Where a set would be read from here, and what is missing for that."""
    if package := entry.get("package"):
        try:
            package_folder(package, dataset=name)
        except DataError as error:
            return f"package {package}", error.fix
        return f"package {package}", ""
    folders = [folder for folder in (data_folder(), cache_folder()) if folder is not None]
    found = [(each, find_file(each, folders)) for each in file_forms(entry).values()]
    absent = [each for each, there in found if there is None]
    if not absent:
        return str(next(there.path.parent for _, there in found if there)), ""
    if all(any(form.url for form in each) for each in absent):
        return "download", "network"
    return "HAMTS_DATA", "file " + ", ".join(each[0].path for each in absent)
