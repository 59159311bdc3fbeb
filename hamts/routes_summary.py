"""What a routed-steps table says as a whole: counts by group, and how well kept steps meet labelled windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from hamts.errors import DataError

__all__ = [
    "Overlap",
    "check_group",
    "inside_share",
    "judge_worth",
    "overlap",
    "overlap_by_reason",
    "summarise",
    "tagged_not_kept",
    "time_numbers",
    "worth_nothing",
]

STATUSES = ("kept", "pending", "below", "quota_full", "evicted")
GROUPS = ("channel", "hour", "weekday", "tag", "layer", "reason")


def summarise(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Counts of a table of entries, refused ones included.

    Columns: the group, ``tokens`` observed, one count for each status, ``kept_share`` (kept / decided tokens),
    ``steps`` kept, mean ``score``, ``bytes``; where the table has them, the means of ``worth`` and ``read_mass``. A
    token with several tags, or several layers, counts in each of them.
    """
    check_group(by)
    rows = _with_group(table, by)
    counts = pd.crosstab(rows[by], rows["status"]).reindex(columns=list(STATUSES), fill_value=0)
    counts.columns.name = None
    if by == "layer":
        # all layers await the pending ones; a layer refuses what it does not hold, also what another layer keeps
        counts["pending"] = table["status"].eq("pending").sum()
        counts["below"] = len(table) - counts.drop(columns="below").sum(axis=1)
    tokens = counts.sum(axis=1)
    counts.insert(0, "tokens", tokens)
    decided = tokens - counts["pending"]
    counts["kept_share"] = counts["kept"] / decided.where(decided > 0)
    kept = rows[rows["status"] == "kept"]
    counts["steps"] = kept.groupby(by)["n_steps"].sum().reindex(counts.index, fill_value=0)
    counts["score"] = rows.groupby(by)["score"].mean()
    counts["bytes"] = rows.groupby(by)["bytes"].sum()
    for name in ("worth", "read_mass"):
        if name in rows:
            counts[name] = kept.groupby(by)[name].mean()
    return counts.reset_index()


def check_group(by: str) -> None:
    """Raises DataError E-OPTION."""
    if by not in ("entry", *GROUPS):
        raise DataError("E-OPTION", f"Unknown by={by!r}. Available: {['entry', *GROUPS]}.", fix="by='channel', say.")


def tagged_not_kept(table: pd.DataFrame) -> pd.DataFrame:
    """Tagged patches of which something is in no scratchpad, one row each, in order of item and time.

    Columns: ``unique_id, ds_start, ds_end, tag``; ``status``: ``quota_full``, ``evicted`` or ``below``, the first of
    them that happened; ``channels`` that are gone, joined by ","; ``kept``: how many channels are still kept.

    What counts are the tokens that the tag asked for (reason ``event`` or ``action``); all tokens of the patch where it
    asked for none, as under a router without tags.
    """
    tagged = table[table["tag"].ne("") & table["status"].ne("pending")]
    keys = ["unique_id", "ds_start", "ds_end", "tag"]
    asked = tagged["reason"].isin(["event", "action"])
    any_asked = asked.groupby([tagged[key] for key in keys], observed=True).transform("any")
    rows = tagged[asked | ~any_asked]
    rows = rows.assign(
        gone=np.where(rows["status"].eq("kept"), "", rows["channel"]),
        rank=rows["status"].map({"quota_full": 0, "evicted": 1, "below": 2, "kept": 3}).astype(int),
    )
    patches = rows.groupby(keys, sort=False, observed=True).agg(
        rank=("rank", "min"),
        channels=("gone", lambda names: ",".join(name for name in names if name)),
        kept=("status", lambda states: int((states == "kept").sum())),
    )
    patches = patches[patches["channels"].ne("")].reset_index()
    patches.insert(4, "status", patches.pop("rank").map({0: "quota_full", 1: "evicted", 2: "below"}).astype(object))
    return patches


def judge_worth(table: pd.DataFrame) -> pd.Series:
    """``helps``, ``nothing`` or ``hurts`` for every row whose worth was measured, else empty.

    ``helps``: dropping it costs more than dropping 19 of 20 random others, and costs at all; where the change of the
    forecast was measured, without an outcome, it is ``moves``. ``hurts``: the reverse. ``nothing``: as any other.
    """
    if "worth" not in table:
        raise DataError("E-OPTION", "The table has no worth.", fix="model.routes(df, worth=True)")
    worth = table["worth"].astype(float)
    high = table["worth_random_high"].astype(float).fillna(0.0)
    low = table["worth_random_low"].astype(float).fillna(0.0)
    change = table["worth_of"].eq("median change")
    words = np.select(
        [worth.isna(), change & (worth > high), change, worth > high.clip(lower=0), worth < low.clip(upper=0)],
        ["", "moves", "nothing", "helps", "hurts"],
        "nothing",
    )
    return pd.Series(words, index=table.index, name="judgement")


def worth_nothing(table: pd.DataFrame) -> pd.DataFrame:
    """Kept rows whose loss changed nothing that dropping a random other entry would not change."""
    idle = table["status"].eq("kept") & judge_worth(table).eq("nothing")
    return table[idle].reset_index(drop=True)


def _with_group(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """The rows with the group they count in as column ``by``."""
    if by in ("channel", "reason"):
        return table
    if by in ("hour", "weekday"):
        if not hasattr(table["ds_start"], "dt"):
            raise DataError("E-OPTION", f"by={by!r} needs a calendar. Got an integer clock.", fix="by='channel', say.")
        clock = table["ds_start"].dt
        return table.assign(**{by: clock.hour if by == "hour" else clock.weekday})
    if by == "tag":
        return table.assign(tag=table["tag"].str.split(",")).explode("tag")
    holders = table["layers"].str.split(",")
    rows = table.assign(layer=holders, bytes=table["bytes"] // holders.str.len()).explode("layer")
    return rows[rows["layer"] != ""]


@dataclass(frozen=True)
class Overlap:
    """How well kept steps meet labelled windows, over items.

    Attributes:
        kept_steps: observed steps of the kept patches.
        precision: share of the kept steps that lie inside a window.
        recall: share of the steps inside windows that were kept.
        chance: mean precision when each item's kept patches are shifted along its time by random amounts (circular).
        chance_low, chance_high: 5 % and 95 % of those.
        score: (precision - chance) / (1 - chance); 1 is perfect, 0 is chance.
        score_low, score_high: the same for a precision at the two ends of chance; chance goes beyond ``score_high``
            once in twenty times.
    """

    kept_steps: int
    precision: float
    recall: float
    chance: float
    chance_low: float
    chance_high: float
    score: float
    score_low: float
    score_high: float


def overlap(
    table: pd.DataFrame,
    windows: pd.DataFrame,
    *,
    seed: int,
    statuses: Sequence[str] = ("kept",),
    channels: Sequence[str] | None = None,
    draws: int = 1000,
) -> Overlap:
    """Compare kept steps with labelled windows, and with chance.

    Keeping a patch of any channel keeps its steps. Chance keeps the lengths of kept stretches and the gaps between
    them: the marks of each item are shifted as a whole.

    Args:
        table: of ``routes_table`` with refused rows.
        windows: ``unique_id, start, end``, both ends included, in the units of ``ds_start``.
        statuses: which rows count as kept; ("kept", "evicted", "quota_full") for all that ever were.
        channels: only what was kept of these.
    """
    marks = table["status"].isin(list(statuses))
    rows = table.assign(marked=marks if channels is None else marks & table["channel"].isin(list(channels)))
    keys = ["unique_id", "ds_start", "ds_end"]
    patches = rows.groupby(keys, observed=True, sort=True).agg(marked=("marked", "any"), n_steps=("n_steps", "max"))
    patches = patches.reset_index()
    inside = _share_inside(patches, windows)  # [patches]
    weight = patches["n_steps"].to_numpy(float)
    marked = patches["marked"].to_numpy()
    starts = np.flatnonzero(patches["unique_id"].ne(patches["unique_id"].shift()).to_numpy())
    bounds = [*starts.tolist(), len(patches)]
    rng = np.random.default_rng(seed)
    kept, hits = np.zeros(draws + 1), np.zeros(draws + 1)
    for low, high in zip(bounds[:-1], bounds[1:], strict=True):
        length = high - low
        shift = np.concatenate([[0], rng.integers(0, length, draws)])  # [1 + draws]
        index = (np.arange(length) - shift[:, None]) % length + low  # [1 + draws, patches of the item]
        moved = marked[index] * weight[low:high]  # [1 + draws, patches of the item]
        kept += moved.sum(1)
        hits += moved @ inside[low:high]
    precision = hits / np.where(kept > 0, kept, np.nan)
    total = float((weight * inside).sum())
    recall = hits[0] / total if total > 0 else np.nan
    return _corrected(int(kept[0]), float(precision[0]), float(recall), precision[1:])


def overlap_by_reason(table: pd.DataFrame, windows: pd.DataFrame, *, seed: int, **options: Any) -> pd.DataFrame:
    """``overlap`` of what each router or kind of tag kept: one row per reason, and one for all of them together.

    Args:
        options: further arguments of ``overlap``; ``statuses`` says which rows count as kept.
    """
    statuses = options.get("statuses", ("kept",))
    kept = table["status"].isin(list(statuses))
    lines = []
    for reason in [*sorted(set(table.loc[kept, "reason"])), "all"]:
        own = (
            table
            if reason == "all"
            else table.assign(status=table["status"].where(table["reason"].eq(reason), "below"))
        )
        lines.append({"reason": reason, **asdict(overlap(own, windows, seed=seed, **options))})
    return pd.DataFrame(lines)


def inside_share(table: pd.DataFrame, windows: pd.DataFrame) -> pd.Series:
    """Share of the steps of each row that lie in a labelled window of its item, in the order of the table."""
    order = table.sort_values(["unique_id", "ds_start"], kind="stable")
    keys = order[["unique_id", "ds_start", "ds_end"]].drop_duplicates()
    share = keys.assign(inside=_share_inside(keys.reset_index(drop=True), windows))
    merged = table[["unique_id", "ds_start", "ds_end"]].merge(share, how="left")
    return pd.Series(merged["inside"].to_numpy(), index=table.index, name="inside")


def _corrected(kept_steps: int, precision: float, recall: float, shifted: np.ndarray) -> Overlap:
    chance, low, high = np.nan, np.nan, np.nan
    if len(shifted) and not np.isnan(shifted).all():
        chance = float(np.nanmean(shifted))
        low, high = (float(q) for q in np.nanquantile(shifted, [0.05, 0.95]))
    room = 1 - chance if chance < 1 else np.nan
    return Overlap(
        kept_steps=kept_steps,
        precision=precision,
        recall=recall,
        chance=chance,
        chance_low=low,
        chance_high=high,
        score=(precision - chance) / room,
        score_low=(low - chance) / room,
        score_high=(high - chance) / room,
    )


def _share_inside(patches: pd.DataFrame, windows: pd.DataFrame) -> np.ndarray:
    """Share of each patch's steps that lie in a window of its item, [patches]."""
    zone = getattr(patches["ds_start"].dtype, "tz", None)
    start, end = time_numbers(patches["ds_start"], zone), time_numbers(patches["ds_end"], zone)  # 2 x [patches]
    # one step lies between a patch and the next
    between = start[1:] - end[:-1]
    step = between[between > 0].min(initial=2**62) if len(between) else 1  # []
    share = np.zeros(len(patches))
    first, last = time_numbers(windows["start"], zone), time_numbers(windows["end"], zone)  # 2 x [windows]
    for item, low, high in zip(windows["unique_id"], first, last, strict=True):
        here = patches["unique_id"].eq(item).to_numpy()
        common = np.minimum(end, high) - np.maximum(start, low)  # [patches]
        share += np.where(here & (common >= 0), (common + step) / (end - start + step), 0.0)
    return np.minimum(share, 1.0)


def time_numbers(times: pd.Series, zone: str | None) -> np.ndarray:
    """Times as int64: nanoseconds of UTC, or the numbers of an integer clock."""
    if pd.api.types.is_integer_dtype(times):
        return times.to_numpy(np.int64)
    index = pd.DatetimeIndex(times)
    if index.tz is None and zone is not None:
        index = index.tz_localize(zone, ambiguous=np.ones(len(index), dtype=bool), nonexistent="shift_forward")
    if index.tz is not None:
        index = index.tz_convert("UTC").tz_localize(None)
    return index.as_unit("ns").asi8
