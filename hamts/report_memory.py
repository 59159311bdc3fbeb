"""What the explorer of the report shows of each item: its series, its tokens and what is known of each of them.

Everything becomes plain lists and packed arrays, ready for JSON. No text is made into HTML here.

T steps of an item · K tokens of an item · C channels · L layers
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from hamts.data.clock import as_numbers
from hamts.data.cutoffs import times_of
from hamts.data.panel import Panel
from hamts.data.patches import PatchStore, build_store
from hamts.evaluation import Windows
from hamts.forecaster import HAMForecaster
from hamts.nn.tokens import Policy
from hamts.rollout import roll
from hamts.routes import Overlap, overlap, routes_table
from hamts.routes_reads import add_reads, forecast_reads, read_table
from hamts.routes_summary import judge_worth, tagged_not_kept
from hamts.routes_worth import WORTH_COLUMNS, add_worth, locate_rows, memories_at

__all__ = ["Memory", "pack", "pack_items", "read_memory"]

STATUSES = ("below", "pending", "kept", "evicted", "quota_full")
JUDGEMENTS = ("", "nothing", "helps", "hurts", "moves")
# a read is told apart from the next by so many patches
READ_PATCHES = 16
MOST_READS = 6
MOST_WORTH_CUTOFFS = 3


@dataclass(frozen=True)
class Memory:
    """The routed-steps table at the end of the history, with worth, and who read what."""

    table: pd.DataFrame  # of ``routes``, with read_mass, worth and judgement
    where: pd.DataFrame  # item, channel, patch of each row, by number
    reads: pd.DataFrame  # of ``read_table``
    ahead: pd.DataFrame  # of ``forecast_reads``, all items and some cutoffs
    missed: pd.DataFrame  # of ``tagged_not_kept``
    meeting: Overlap | None  # with the user's labelled windows
    store: PatchStore
    entry_bytes: int
    worth_cutoffs: int


def read_memory(
    model: HAMForecaster,
    panel: Panel,
    *,
    share: float,
    windows: Windows | None,
    worth_rows: int,
    labels: pd.DataFrame | None,
    seed: int,
) -> Memory | None:
    """Read every item once; None where no item has a complete patch.

    Args:
        windows: their last cutoffs are where worth is measured; None: at the end, without an outcome.
        worth_rows: entries of each item whose worth is measured, those with the largest margin.
    """
    network, plan = model._fitted.network, model._fitted.plan
    store = build_store(panel, patch_steps=plan.model.patch_steps, extra_steps=plan.h, time_unit=plan.time_unit)
    policy = network.policy(torch.tensor([share]))
    nothing = [np.zeros(0, dtype=np.int64)] * panel.n_items
    rollout = roll(
        network, store, cutoffs=nothing, steps=1, policies=policy, keep_traces=True, chunk_patches=READ_PATCHES
    )
    if not rollout.traces:
        return None
    table = routes_table(network, store, panel, rollout=rollout, policies=policy)
    table = add_reads(table, network, store, panel, rollout=rollout)
    cutoffs = _worth_cutoffs(panel, windows)
    table = _with_worth(model, table, store, panel, cutoffs=cutoffs, policy=policy, rows=worth_rows, seed=seed)
    table["judgement"] = judge_worth(table)
    where = locate_rows(table, store, panel)
    return Memory(
        table=table,
        where=where,
        reads=read_table(network, store, rollout),
        ahead=_forecast_reads(model, panel, store, cutoffs, policy),
        missed=tagged_not_kept(table),
        meeting=None if labels is None else overlap(table, labels, seed=seed),
        store=store,
        entry_bytes=network.entry_bytes(),
        worth_cutoffs=max(len(cuts) for cuts in cutoffs),
    )


def _with_worth(
    model: HAMForecaster,
    table: pd.DataFrame,
    store: PatchStore,
    panel: Panel,
    *,
    cutoffs: list[np.ndarray],
    policy: Policy,
    rows: int,
    seed: int,
) -> pd.DataFrame:
    """Worth by the outcome; for what came too late for one, by the change of the forecast at the end."""
    chosen = _worth_rows(table, rows)
    network, h = model._fitted.network, model.h
    done = add_worth(
        table, network, store, panel, cutoffs=cutoffs, steps=h, policies=policy, seed=seed, rows=chosen
    )  # fmt: skip
    late = [label for label in chosen if np.isnan(done.at[label, "worth"])]
    if not late:
        return done
    ends = [np.array([length]) for length in panel.lengths]
    again = add_worth(table, network, store, panel, cutoffs=ends, steps=h, policies=policy, seed=seed, rows=late)
    done.loc[late, list(WORTH_COLUMNS)] = again.loc[late, list(WORTH_COLUMNS)]
    return done


def _worth_rows(table: pd.DataFrame, most: int) -> list[int]:
    """Labels of the kept rows to measure: of each item the tagged ones, then those with the largest margin."""
    kept = table[table["status"].eq("kept")]
    order = pd.DataFrame({
        "item": kept["unique_id"], "tagged": kept["reason"].isin(["event", "action"]),
        "margin": kept["score"] - kept["threshold"],
    }).sort_values(["tagged", "margin"], ascending=False, kind="stable")  # fmt: skip
    return order.groupby("item", sort=False).head(most).index.tolist()


def _worth_cutoffs(panel: Panel, windows: Windows | None) -> list[np.ndarray]:
    if windows is None:
        return [np.array([length]) for length in panel.lengths]
    own = [cuts[-MOST_WORTH_CUTOFFS:] for cuts in windows.steps]
    return [cuts if len(cuts) else np.array([length]) for cuts, length in zip(own, panel.lengths, strict=True)]


def _forecast_reads(
    model: HAMForecaster, panel: Panel, store: PatchStore, cutoffs: list[np.ndarray], policy: Policy
) -> pd.DataFrame:
    """What the forecasts of each item at some cutoffs and after its last row read, ``cutoff`` in a column."""
    network = model._fitted.network
    every = [np.unique([*own, length]) for own, length in zip(cutoffs, panel.lengths, strict=True)]
    policies = [policy] * network.config.layers
    parts = []
    for item, cutoff, memory in memories_at(network, store, every, policies):
        reads = forecast_reads(
            network, store, item=item, cutoff=cutoff, memory=memory, steps=model.h, policies=policies
        )  # fmt: skip
        parts.append(reads.assign(cutoff=cutoff))
    return pd.concat(parts, ignore_index=True)


# --- arrays as text


def pack(values: np.ndarray, kind: str) -> str:
    """An array as base64 of its little-endian bytes; ``kind`` is numpy's, such as ``f4``."""
    return base64.b64encode(np.ascontiguousarray(values, dtype=f"<{kind}").tobytes()).decode("ascii")


def item_times(panel: Panel, item: int) -> np.ndarray:
    """Times of an item's steps, [T] int64: nanoseconds of UTC, or whole numbers."""
    steps = np.arange(panel.lengths[item])
    return as_numbers(times_of(panel, np.full(len(steps), item), steps))


def packed_clock(numbers: np.ndarray, *, integer: bool) -> dict[str, Any]:
    """Milliseconds (or numbers) of each step, as start and step where that is all there is to say."""
    stamps = numbers.astype(np.float64) if integer else numbers / 1e6
    apart = np.diff(stamps)
    if len(apart) == 0 or np.all(apart == apart[0]):
        return {"t0": float(stamps[0]) if len(stamps) else 0.0, "dt": float(apart[0]) if len(apart) else 1.0}
    return {"t": pack(stamps, "f8")}


def pack_items(memory: Memory | None, panel: Panel, *, items: list[int], channels: list[int]) -> list[dict[str, Any]]:
    """What the page needs of each of some items; ``channels`` are those whose values are shown."""
    integer = panel.starts.dtype.kind != "M"
    answer = []
    for item in items:
        numbers, values = item_times(panel, item), panel.item(item)
        packed: dict[str, Any] = {
            "id": str(panel.item_ids[item]),
            "n": len(numbers),
            "clock": packed_clock(numbers, integer=integer),
            "values": {str(c): pack(values[:, c], "f4") for c in channels},
        }
        if memory is not None:
            packed |= _packed_tokens(memory, item, numbers, panel.schema.dialect.time_zone)
        answer.append(packed)
    return answer


def _packed_tokens(memory: Memory, item: int, numbers: np.ndarray, zone: str | None) -> dict[str, Any]:
    """The rows of one item, in columns."""
    chosen = np.flatnonzero(memory.where["item"].to_numpy() == item)  # [K]
    rows, where = memory.table.iloc[chosen], memory.where.iloc[chosen]
    lead, P = int(memory.store.lead[item]), memory.store.patch_steps
    first = np.maximum(where["patch"].to_numpy() * P - lead, 0)
    margin = (rows["score"] - rows["threshold"]).to_numpy(float)
    decided = rows["status"].ne("pending").to_numpy()
    rank = np.full(len(rows), -1, dtype=np.int64)
    rank[decided] = pd.Series(-margin[decided]).rank(method="min", na_option="bottom").to_numpy().astype(np.int64)
    codes, layers = pd.factorize(rows["layers"])
    tags, tag_names = pd.factorize(rows["tag"])
    reasons, reason_names = pd.factorize(rows["reason"])
    written, evicted = (_steps(rows[name], numbers, zone) for name in ("written_at", "evicted_at"))  # 2 x [K]
    columns = {
        "start": pack(first, "i4"), "channel": pack(where["channel"].to_numpy(), "u2"),
        "score": pack(rows["score"].to_numpy(float), "f4"), "threshold": pack(rows["threshold"].to_numpy(float), "f4"),
        "status": pack(rows["status"].map({name: i for i, name in enumerate(STATUSES)}).to_numpy(int), "u1"),
        "reason": pack(reasons, "u1"), "tag": pack(tags, "u2"), "layers": pack(codes, "u2"), "rank": pack(rank, "i4"),
        "observed": pack(rows["n_steps"].to_numpy(), "u2"), "read": pack(rows["read_mass"].to_numpy(float), "f4"),
        "written": pack(written, "i4"), "evicted": pack(evicted, "i4"),
        "worth": pack(rows["worth"].to_numpy(float), "f4"), "bytes": pack(rows["bytes"].to_numpy(), "i4"),
        "random": pack(rows["worth_random"].to_numpy(float), "f4"),
        "low": pack(rows["worth_random_low"].to_numpy(float), "f4"),
        "high": pack(rows["worth_random_high"].to_numpy(float), "f4"),
        "judgement": pack(rows["judgement"].map({name: i for i, name in enumerate(JUDGEMENTS)}).to_numpy(int), "u1"),
        "change": pack(rows["worth_of"].eq("median change").to_numpy(), "u1"),
    }  # fmt: skip
    return {
        "tokens": columns,
        "tags": list(tag_names),
        "reasons": list(reason_names),
        "layerSets": [[int(part) for part in text.split(",") if part] for text in layers],
        "held": _held(written, evicted),
        "reads": _packed_reads(memory, item, rows, where, len(numbers)),
    }


def _held(written: np.ndarray, evicted: np.ndarray) -> dict[str, Any]:
    """Steps at which a token entered the scratchpads or left the last of them, and how many are held after each."""
    entered, left = written[written >= 0], evicted[evicted >= 0]
    moments = np.concatenate([entered, left])
    change = np.concatenate([np.ones(len(entered)), -np.ones(len(left))])
    order = np.argsort(moments, kind="stable")
    held = np.cumsum(change[order])
    last = np.append(np.diff(moments[order]) > 0, True)[: len(order)]
    return {"step": pack(moments[order][last], "i4"), "count": pack(held[last], "i4")}


def _steps(times: pd.Series, numbers: np.ndarray, zone: str | None) -> np.ndarray:
    """Step of each time, -1 where there is none."""
    known = times.notna().to_numpy()
    stamps = times[known]
    if pd.api.types.is_integer_dtype(times.dtype):
        wanted = stamps.to_numpy(np.int64)
    else:
        index = pd.DatetimeIndex(stamps)
        wanted = (index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index).as_unit("ns").asi8
    answer = np.full(len(times), -1, dtype=np.int64)
    answer[known] = np.minimum(np.searchsorted(numbers, wanted), len(numbers) - 1)
    return answer


def _packed_reads(
    memory: Memory, item: int, rows: pd.DataFrame, where: pd.DataFrame, length: int
) -> dict[str, dict[str, Any]]:
    """By number of the token among the item's: the stretches that read it most, and what forecasts read of it."""
    lead, P = int(memory.store.lead[item]), memory.store.patch_steps
    number = pd.Series(np.arange(len(rows)), index=pd.MultiIndex.from_frame(where[["channel", "patch"]]))
    kept = set(np.flatnonzero(rows["status"].eq("kept").to_numpy()).tolist())
    answer: dict[str, dict[str, Any]] = {}
    mine = memory.reads[memory.reads["item"] == item].copy()
    mine["token"] = number.reindex(pd.MultiIndex.from_frame(mine[["channel", "patch"]])).to_numpy()
    mine["share"] = mine["mass"] / mine["sights"]
    mine = mine[mine["token"].isin(kept)].sort_values("share", ascending=False, kind="stable")
    for row in mine.groupby("token", sort=False).head(MOST_READS).itertuples():
        stretch = [
            max(row.first_patch * P - lead, 0), min((row.last_patch + 1) * P - lead - 1, length - 1),
            float(f"{row.share:.3g}"),
        ]  # fmt: skip
        answer.setdefault(str(int(row.token)), {"by": []})["by"].append(stretch)
    ahead = memory.ahead[memory.ahead["item"] == item]
    ahead = ahead.assign(token=number.reindex(pd.MultiIndex.from_frame(ahead[["channel", "patch"]])).to_numpy())
    for row in ahead[ahead["token"].isin(kept)].sort_values("cutoff").itertuples():
        found = answer.setdefault(str(int(row.token)), {"by": []})
        found.setdefault("forecasts", []).append([int(row.cutoff), float(f"{row.forecast_mass:.3g}")])
    return answer
