"""``hamts report``: what a model forecast, how good that was, and what its memory kept, as one page in one file.

The page asks the network for nothing: script, style and data are in it, and its policy forbids everything else.

X windows · G targets · F future steps · Q quantiles
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hamts.data.clock import show_times
from hamts.data.cutoffs import truncate
from hamts.data.panel import Panel
from hamts.errors import DataError, DataWarning
from hamts.files import OFFSET, check_output, written_whole
from hamts.forecast import quantile_at
from hamts.forecaster import HAMForecaster
from hamts.refusals import refuse_rival
from hamts.report_accuracy import Accuracy, measure_accuracy
from hamts.report_memory import Memory, item_times, pack, pack_items, read_memory
from hamts.report_page import Facts, page
from hamts.routes_summary import time_numbers

__all__ = ["write_report"]

LEVELS = (0.025, 0.1, 0.5, 0.9, 0.975)
# what one page holds: values of the series, and numbers of the forecasts
MOST_VALUES = 2_000_000
MOST_FORECAST_NUMBERS = 400_000
ROLE_ORDER = ("target", "event", "action", "future", "past")


@dataclass
class Gathered:
    """What the page is made of; a part that could not be made has its message in ``gaps``."""

    accuracy: Accuracy | None = None
    memory: Memory | None = None
    future: dict[str, Any] | None = None
    gaps: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_report(  # noqa: PLR0913 - one call, and each argument stands for itself
    model: HAMForecaster,
    df: Any,
    path: str | os.PathLike[str],
    *,
    futr_df: Any = None,
    labels: Any = None,
    items: Sequence[Any] | None = None,
    n_windows: int = 8,
    worth: int = 300,
    budget_share: float | None = None,
    static_df: Any = None,
    events: Any = None,
    title: str | None = None,
    command: str | None = None,
    force: bool = False,
    seed: int = 0,
) -> Path:
    """Write the report of a model on a history to one HTML file.

    Args:
        df: the history, in the dialect of the fit.
        futr_df: what is known ahead of its end; without it, a model that needs it shows past forecasts alone.
        labels: windows of your own to compare with what was kept: ``unique_id, start, end`` and perhaps ``label``.
        items: ids to report on; default all.
        n_windows: the last windows of each item are forecast, ``model.h`` steps apart.
        worth: kept steps of each item whose worth is measured, those that asked most.
        command: how to make this page again, as shown on it.
        force: replace a file that is there.

    Returns: the path written.
    Raises DataError: E-EXISTS, E-FILE, E-ITEM (no such item), E-COLUMNS, E-OPTION (a model without a scratchpad, say),
        and what reading the frames raises.
    """
    path = Path(path)
    refuse_rival(model.config.mixer, "A report")
    check_output(path, force=force)
    began, share = time.perf_counter(), model._share(budget_share)
    for name, value in (("n_windows", n_windows), ("worth", worth)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise DataError("E-OPTION", f"{name} must be a whole number, at least 1. Got {value!r}.", fix="8, say.")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        panel = _chosen(model._panel_of(df, static_df, events), items)
        windows_of_user = None if labels is None else _labels(labels, panel)
        found = _gather(model, panel, share, n_windows, worth, windows_of_user, seed)
        found.future = _future(model, df, panel, futr_df, budget_share, static_df, events, found)
    found.notes += [str(each.message) for each in caught if issubclass(each.category, DataWarning)]
    found.notes = list(dict.fromkeys([*panel.notes, *found.notes]))
    data = _page_data(model, panel, found, windows_of_user)
    facts = Facts(
        title=title or f"Report of a HAM model on {', '.join(map(str, model.schema.targets[:3]))}",
        data=_data_facts(model, panel),
        notes=found.notes,
        accuracy=found.accuracy,
        memory=found.memory,
        gaps=found.gaps,
        run=_run_facts(
            model, panel, share, seed, command or f"hamts.report.write_report(model, df, {str(path)!r})", began
        ),
    )
    text = page(facts, data)
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path


# --- what is asked for


def _chosen(panel: Panel, items: Sequence[Any] | None) -> Panel:
    """The panel with some of its items. Raises DataError E-ITEM."""
    if items is None:
        return panel
    known = {str(name): number for number, name in enumerate(panel.item_ids)}
    unknown = [name for name in items if str(name) not in known]
    if unknown or not len(items):
        shown = list(known)[:5]
        raise DataError(
            "E-ITEM", f"The data has no item {unknown}. It has {len(known)}, such as {shown}.", series=unknown[:5],
            fix="Name items of the data, or leave them out for all.",
        )  # fmt: skip
    ends = np.zeros(panel.n_items, dtype=np.int64)
    for name in items:
        ends[known[str(name)]] = panel.lengths[known[str(name)]]
    return truncate(panel, ends)


def _labels(labels: Any, panel: Panel) -> pd.DataFrame:
    """Windows of the user, checked."""
    frame = labels if isinstance(labels, pd.DataFrame) else labels.to_pandas()
    missing = [name for name in ("unique_id", "start", "end") if name not in frame]
    if missing:
        raise DataError("E-COLUMNS", f"labels need unique_id, start and end. Missing: {missing}.", fix="Rename them.")
    known = {str(name): name for name in panel.item_ids}
    frame = frame[frame["unique_id"].astype(str).isin(set(known))]
    ids = pd.Series([known[str(name)] for name in frame["unique_id"]], index=frame.index, dtype=object)
    frame = frame.assign(unique_id=ids, label=frame.get("label", "label"))
    if panel.starts.dtype.kind != "M":
        return frame
    zone = panel.schema.dialect.time_zone
    return frame.assign(start=_times(frame["start"], zone), end=_times(frame["end"], zone))


def _times(column: pd.Series, zone: str | None) -> pd.Series:
    """Times of a label, also where a CSV wrote them with the two offsets of one zone."""
    if pd.api.types.is_datetime64_any_dtype(column):
        return column
    if zone is not None and column.astype(str).str.contains(OFFSET, regex=True).all():
        return pd.to_datetime(column, utc=True, format="ISO8601").dt.tz_convert(zone)
    return pd.to_datetime(column, format="ISO8601")


def _gather(
    model: HAMForecaster,
    panel: Panel,
    share: float,
    n_windows: int,
    worth: int,
    labels: pd.DataFrame | None,
    seed: int,
) -> Gathered:
    found = Gathered()
    try:
        found.accuracy = measure_accuracy(model, panel, n_windows=n_windows, share=share, seed=seed)
    except DataError as error:
        if error.code != "E-SHORT":
            raise
        found.gaps["accuracy"] = error.message
    found.memory = read_memory(
        model, panel, share=share, windows=found.accuracy.windows if found.accuracy else None, worth_rows=worth,
        labels=labels, seed=seed,
    )  # fmt: skip
    P = model.config.patch_steps
    if found.memory is None:
        longest = int(panel.lengths.max(initial=0))
        found.gaps["memory"] = (
            f"Nothing could be kept: a patch of {P} steps must be complete first, and no item has one"
            f" (the longest has {longest} step{'' if longest == 1 else 's'})."
        )
    elif not found.memory.table["status"].isin(["kept", "evicted", "quota_full"]).any():
        found.gaps["kept"] = f"No step was ever kept: the budget share is {share:.0%}, and no tag asked for one."
    return found


def _future(
    model: HAMForecaster,
    df: Any,
    panel: Panel,
    futr_df: Any,
    budget_share: float | None,
    static_df: Any,
    events: Any,
    found: Gathered,
) -> dict[str, Any] | None:
    """Forecasts after the end of the history, by item number; None where what is known ahead was not given."""
    try:
        forecast = model.predict(
            df, None, futr_df, budget_share=budget_share, static_df=static_df, events=events
        )  # fmt: skip
    except DataError as error:
        if futr_df is not None or error.code not in ("E-FUTURE", "E-ALLNAN"):
            raise
        found.gaps["future"] = f"No forecast beyond the end: {error.message}"
        return None
    place = {str(name): row for row, name in enumerate(forecast.item_ids)}
    return {"quantiles": forecast.quantiles, "rows": [place.get(str(name)) for name in panel.item_ids]}


# --- what the script of the page needs


def _page_data(model: HAMForecaster, panel: Panel, found: Gathered, labels: pd.DataFrame | None) -> dict[str, Any]:
    schema, integer = panel.schema, panel.starts.dtype.kind != "M"
    order = sorted(range(len(schema.channels)), key=lambda c: ROLE_ORDER.index(schema.channels[c].role))
    room = max(MOST_VALUES // max(int(panel.lengths.sum()), 1), 1)
    shown, left_out = order[:room], order[room:]
    items = list(range(panel.n_items))
    steps = np.cumsum(panel.lengths)
    if steps[-1] > MOST_VALUES:
        items = items[: max(int(np.searchsorted(steps, MOST_VALUES)), 1)]
        found.notes.append(f"W-PAGE: the page shows {len(items)} of {panel.n_items} items; --items names others.")
    if left_out:
        names = ", ".join(schema.channels[c].name for c in left_out[:8])
        found.notes.append(f"W-PAGE: the page is too small for the values of {len(left_out)} columns: {names}.")
    return {
        "zone": schema.dialect.time_zone, "integer": integer, "patchSteps": model.config.patch_steps, "h": model.h,
        "layers": model.config.layers, "window": model.config.window_patches,
        "entryBytes": found.memory.entry_bytes if found.memory else 0,
        "worthCutoffs": found.memory.worth_cutoffs if found.memory else 0,
        "channels": [
            {"name": c.name, "role": c.role, "levels": list(c.levels), "shown": number in shown}
            for number, c in enumerate(schema.channels)
        ],
        "targets": schema.indices("target"),
        "items": pack_items(found.memory, panel, items=items, channels=shown),
        "labels": _packed_labels(labels, panel, items),
        "forecasts": _packed_forecasts(model, panel, found, items),
    }  # fmt: skip


def _packed_labels(labels: pd.DataFrame | None, panel: Panel, items: list[int]) -> list[list[Any]]:
    """[item number, first step, last step, text] of each window of the user."""
    if labels is None:
        return []
    zone, integer = panel.schema.dialect.time_zone, panel.starts.dtype.kind != "M"
    answer = []
    for number, item in enumerate(items):
        own = labels[labels["unique_id"].astype(str) == str(panel.item_ids[item])]
        clock = item_times(panel, item)
        first, last = (
            own[name].to_numpy(np.int64) if integer else time_numbers(own[name], zone) for name in ("start", "end")
        )
        for a, b, text in zip(first, last, own["label"], strict=True):
            low, high = int(np.searchsorted(clock, a)), int(np.searchsorted(clock, b, side="right")) - 1
            if high >= low:
                answer.append([number, low, high, str(text)])
    return answer


def _packed_forecasts(model: HAMForecaster, panel: Panel, found: Gathered, items: list[int]) -> list[dict[str, Any]]:
    """Of each cutoff of each item: the quantiles ``LEVELS`` and the truth of every target."""
    G, h, levels = len(panel.schema.targets), model.h, model.config.quantiles
    answer: list[dict[str, Any]] = []
    used = 0
    size = G * h * (len(LEVELS) + 1)
    if found.future is not None:
        for number, item in enumerate(items):
            row = found.future["rows"][item]
            if row is not None and used + size <= MOST_FORECAST_NUMBERS:
                values = np.stack([quantile_at(found.future["quantiles"][row], levels, q) for q in LEVELS], -1)
                answer.append({"item": number, "cut": int(panel.lengths[item]), "q": pack(values, "f4"), "y": None})
                used += size
    if found.accuracy is not None:
        windows, place = found.accuracy.windows, {item: number for number, item in enumerate(items)}
        # the last window of every item before the earlier ones of any
        newest = np.lexsort((windows.items, -windows.cuts))
        for x in newest:
            if int(windows.items[x]) not in place or used + size > MOST_FORECAST_NUMBERS:
                continue
            values = np.stack([quantile_at(found.accuracy.quantiles[x], levels, q) for q in LEVELS], -1)  # [G, F, 5]
            answer.append({
                "item": place[int(windows.items[x])], "cut": int(windows.cuts[x]), "q": pack(values, "f4"),
                "y": pack(windows.actual[x], "f4"),
            })  # fmt: skip
            used += size
    return answer


# --- facts for readers


def _data_facts(model: HAMForecaster, panel: Panel) -> dict[str, Any]:
    """What the rows are: counts, clock, and a line for each column."""
    integer, zone = panel.starts.dtype.kind != "M", panel.schema.dialect.time_zone
    known = set(map(str, model._fitted.remembered.item_ids))
    new = [str(name) for name in panel.item_ids if str(name) not in known]
    firsts, lasts = [], []
    for item in range(panel.n_items):
        clock = item_times(panel, item)
        firsts.append(clock[0])
        lasts.append(clock[-1])
    show = lambda number: show_times(np.array([number]), integer=integer, zone=zone)[0]  # noqa: E731
    columns = []
    for number, channel in enumerate(panel.schema.channels):
        values = panel.values[:, number]
        seen = values[~np.isnan(values)]
        plain = channel.kind != "categorical" and len(seen) > 0
        columns.append({
            "name": channel.name, "role": channel.role, "kind": channel.kind,
            "observed": len(seen) / max(len(values), 1), "min": float(seen.min()) if plain else None,
            "mean": float(seen.mean()) if plain else None,
            "max": float(seen.max()) if plain else None,
        })  # fmt: skip
    return {
        "items": panel.n_items, "steps": int(panel.lengths.sum()), "first": show(min(firsts)), "last": show(max(lasts)),
        "frequency": panel.schema.frequency.alias or panel.schema.frequency.kind, "zone": zone, "new": new,
        "season": panel.schema.frequency.season_steps, "columns": columns, "shortest": int(panel.lengths.min()),
        "longest": int(panel.lengths.max()),
    }  # fmt: skip


def _run_facts(
    model: HAMForecaster, panel: Panel, share: float, seed: int, command: str, began: float
) -> dict[str, Any]:
    """What made the page, and how to make it again."""
    import torch

    from hamts import __version__

    plan, report = model.plan, model.report
    weights = hashlib.sha256()
    for name, tensor in sorted(model._fitted.network.state_dict().items()):
        weights.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    rows = hashlib.sha256(np.ascontiguousarray(panel.values).tobytes())
    return {
        "command": command, "hamts": __version__, "python": platform.python_version(), "torch": torch.__version__,
        "numpy": np.__version__, "pandas": pd.__version__, "platform": f"{platform.system()} {platform.machine()}",
        "weights sha256": weights.hexdigest()[:16], "values sha256": rows.hexdigest()[:16],
        "router": plan.model.router, "budget share": f"{share:g}", "budget bytes": f"{plan.memory.budget_bytes:,}",
        "width, layers, heads": f"{plan.model.width}, {plan.model.layers}, {plan.model.heads}",
        "patch, window": f"{plan.model.patch_steps} steps, {plan.model.window_patches} patches",
        "horizon": f"{plan.h} steps", "seed of the fit": plan.train.seed, "seed of this page": seed,
        "fit": f"{report.steps} steps in {report.seconds:.0f} s", "made in": f"{time.perf_counter() - began:.0f} s",
    }  # fmt: skip


def _python_command(path: str | os.PathLike[str]) -> str:
    return f"import hamts.report; hamts.report.write_report(model, df, {os.fspath(path)!r})"
