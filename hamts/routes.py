"""The routed-steps table: which tokens the scratchpads kept or refused, when, why, and what became of them.

Everything is read off the decisions of one pass over the past, so the table holds for any earlier moment too: a
decision uses nothing that came after it.

I items · T tokens with something observed, in order of item, patch, channel · C channels · P steps in a patch
L layers · S score routers · W window patches
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import pandas as pd
import torch

from hamts.data.cutoffs import cutoff_steps
from hamts.data.library import plain_frame
from hamts.data.panel import Panel
from hamts.data.patches import PatchStore, build_store
from hamts.errors import DataError
from hamts.nn.ham import HAMLayer
from hamts.nn.tokens import Policy
from hamts.nn.trace import LayerTrace
from hamts.reader import HAMNetwork
from hamts.refusals import refuse_rival
from hamts.rollout import Rollout, roll
from hamts.routes_columns import Times, layer_names, observed_values, tags_of
from hamts.routes_fates import arrivals_of, eviction_patches, with_later_tags
from hamts.routes_reads import add_reads
from hamts.routes_sets import SetWorth, worth_by_reason, worth_together
from hamts.routes_summary import (
    Overlap,
    check_group,
    inside_share,
    judge_worth,
    overlap,
    overlap_by_reason,
    summarise,
    tagged_not_kept,
    worth_nothing,
)  # fmt: skip
from hamts.routes_worth import add_worth

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster

__all__ = [
    "By", "Overlap", "SetWorth", "add_reads", "add_worth", "forecaster_routes", "inside_share", "judge_worth",
    "overlap", "overlap_by_reason", "routes_table", "tagged_not_kept", "worth_by_reason", "worth_nothing",
    "worth_together",
]  # fmt: skip

By = Literal["entry", "channel", "hour", "weekday", "tag", "layer", "reason"]

NEVER = 2**40


@dataclass(frozen=True)
class Ledger:
    """Decisions about every token of which something was observed, flat."""

    item: np.ndarray  # [T] int64
    patch: np.ndarray  # [T] int64, on the item's grid
    channel: np.ndarray  # [T] int64
    row: np.ndarray  # [T] int64, row of the store
    scores: np.ndarray  # [T, L, S] float64
    threshold: np.ndarray  # [T, L, S] float64
    asked: np.ndarray  # [T, L, S] bool: at or above the threshold, and allowed to be kept by score
    routed: np.ndarray  # [T, L] bool
    must_keep: np.ndarray  # [T] bool
    rank: np.ndarray  # [T, L] float64, what eviction by score compares
    tag_type: np.ndarray  # [T] int64 of typed tags, -1: none
    tag_level: np.ndarray  # [T] float64
    position: np.ndarray  # [T] float64, in patches since the stream's origin
    read_patches: np.ndarray  # [I] int64, patches of each item that were read


@dataclass(frozen=True)
class Fate:
    """What became of every token up to the query time."""

    held: np.ndarray  # [T, L] bool: in the scratchpad of this layer
    gone: np.ndarray  # [T, L] bool: was in it, and was evicted
    pending: np.ndarray  # [T] bool
    written_patch: np.ndarray  # [T] int64, patch whose reading moved the token out of the window
    evicted_patch: np.ndarray  # [T] int64, patch whose reading evicted it from the last layer that held it


def routes_table(
    network: HAMNetwork,
    store: PatchStore,
    panel: Panel,
    *,
    rollout: Rollout,
    at: Any = None,
    by: By = "entry",
    refused: bool = True,
    policies: Policy | Sequence[Policy] | None = None,
) -> pd.DataFrame:
    """One row per item, channel and patch of which something was observed, or a summary of these rows.

    =============== ===============================================================================================
    unique_id       the item
    channel         name of the column
    ds_start ds_end first and last step of the patch
    n_steps, value  observed steps, and the mean of their values in the user's units (NaN for categories)
    reason          ``event`` or ``action`` where a tag asks for the token, else the router that does, else empty
    tag             event and action channels tagged in this patch, joined by ","
    score threshold of the layer and router with the largest margin: score - threshold, in units of the distance
                    between that router's thresholds for the shares 2 % and 75 %
    status          ``kept`` in at least one layer; ``pending``: among the last W patches, which are read exactly and
                    not yet decided; ``below``: refused; ``evicted``: kept by score, pushed out by newer ones;
                    ``quota_full``: the same for one kept because of its tag
    written_at      last step of the patch whose reading moved the token from the window to the scratchpad
    evicted_at      the same for its eviction from the last layer that held it
    age             steps from ``ds_end`` to the last step observed at the query time
    layers          layers that hold it; that held it, if evicted; that will take it, if pending
    bytes           of its entries in the scratchpads at the query time, over layers
    =============== ===============================================================================================

    Args:
        rollout: of ``roll(..., keep_traces=True)`` over this store.
        at: query time; steps at or before it were observed. None: the end of what was read.
        by: ``entry`` for the rows themselves, else counts by channel, hour or weekday of ``ds_start``, tag, layer or
            reason.
        refused: whether rows that are ``below`` are wanted.
        policies: what ``roll`` was given, where it was not ``network.policy(...)``; only the caps are used.
    """
    ledger = read_ledger(network, store, rollout)
    observed = observed_steps(panel, store, ledger, at)  # [I]
    stop = np.minimum((store.lead.numpy() + observed) // store.patch_steps, ledger.read_patches)  # [I]
    ledger = _chosen(ledger, ledger.patch < stop[ledger.item])
    window = network.config.window_patches
    fate = follow(ledger, stop, window=window, policies=_per_layer(network, policies))
    table = _entry_rows(network, store, panel, ledger, fate, observed)
    if by != "entry":
        return summarise(table, by)
    return table if refused else table[table["status"] != "below"].reset_index(drop=True)


def forecaster_routes(
    model: HAMForecaster,
    df: Any = None,
    *,
    by: By = "entry",
    at: Any = None,
    worth: bool | int = False,
    refused: bool = True,
    budget_share: float | None = None,
    static_df: Any = None,
    events: Any = None,
    seed: int = 0,
) -> Any:
    """Which steps the memory kept or refused, when and why: ``routes_table`` and ``add_reads``, as the caller's frame.

    Args:
        df: rows to read; None: those of the fit, where this process still has them.
        by, at, refused: see ``routes_table``.
        worth: add what entries are worth to the forecast of ``model.h`` steps from ``at``, see ``add_worth``: so many
            of each item; True: 50.

    Raises DataError: E-REPLAY, E-OPTION, E-SHORT (no complete patch), and what reading the frame raises.
    """
    check_group(by)
    refuse_rival(model.config.mixer, "routes")
    if df is not None:
        panel = model._panel_of(df, static_df, events)
    elif model._panel is None:
        raise DataError(
            "E-REPLAY", "Which steps were kept is read off the rows; a saved model has none.", fix="Pass df."
        )
    else:
        panel = model._panel
    if worth and by != "entry":
        raise DataError("E-OPTION", f"worth is of single entries. Got by={by!r}.", fix="by='entry', or worth=False.")
    network, plan = model._fitted.network, model._fitted.plan
    store = build_store(panel, patch_steps=plan.model.patch_steps, extra_steps=plan.h, time_unit=plan.time_unit)
    policy = network.policy(torch.tensor([model._share(budget_share)]))
    cutoffs, ends = [np.zeros(0, dtype=np.int64)] * panel.n_items, steps_at(panel, at)
    rollout = roll(network, store, cutoffs=cutoffs, steps=1, policies=policy, ends=ends, keep_traces=True)
    if not rollout.traces:
        raise DataError("E-SHORT", f"No item has a complete patch of {store.patch_steps} steps.", fix="Longer items.")
    table = routes_table(
        network, store, panel, rollout=rollout, at=at, by=by, refused=refused, policies=policy
    )  # fmt: skip
    if by == "entry":
        table = add_reads(table, network, store, panel, rollout=rollout)
    if worth:
        cutoffs = [np.array([end]) if end else cutoffs[0] for end in ends]
        table = add_worth(
            table, network, store, panel, cutoffs=cutoffs, steps=plan.h, policies=policy, seed=seed,
            rows=50 if worth is True else worth,
        )  # fmt: skip
    return plain_frame(panel.schema.dialect, {name: table[name] for name in table})


def _per_layer(network: HAMNetwork, policies: Policy | Sequence[Policy] | None) -> list[Policy]:
    """One policy for each layer."""
    if policies is None:
        policies = network.policy(torch.zeros(1))
    policies = [policies] * network.config.layers if isinstance(policies, Policy) else list(policies)
    return [_of_tokens(policy) for policy in policies]


def _of_tokens(policy: Policy) -> Policy:
    """A policy whose caps count tokens, where a token is several entries."""
    each = policy.entries_per_token
    kept, must = (None if cap is None else cap // each for cap in (policy.cap_kept, policy.cap_must))
    return replace(policy, cap_kept=kept, cap_must=must, entries_per_token=1)


def read_ledger(network: HAMNetwork, store: PatchStore, rollout: Rollout) -> Ledger:
    """Flatten the traces of a rollout, in order of item, patch, channel."""
    if not rollout.traces:
        raise ValueError("rollout must hold traces. Got none. Call roll(..., keep_traces=True) on at least one patch.")
    layers, routers = network.config.layers, len(memory_layers(network)[0].router.names)
    read = np.zeros(store.n_items, dtype=np.int64)  # [I]
    parts: list[list[np.ndarray]] = []
    for chunk in rollout.traces:
        N = chunk.heard.shape[2]
        patch = chunk.first_patch[:, None] + torch.arange(N)  # [B, N]
        items = chunk.items.numpy()
        read[items] = np.maximum(read[items], patch[:, -1].numpy() + 1)
        b, c, n = (chunk.heard > 0).cpu().nonzero(as_tuple=True)  # 3 x [T']
        columns = [chunk.items[b], patch[b, n], c, torch.stack([t.must_keep.cpu()[b, c, n] for t in chunk.layers], 1)]
        columns += [torch.stack([t.routed.cpu()[b, c, n] for t in chunk.layers], 1)]  # [T', L]
        columns += [torch.stack([t.scores.cpu().double()[b, c, n] for t in chunk.layers], 1)]  # [T', L, S]
        columns += [torch.stack([_threshold(t, b, n) for t in chunk.layers], 1)]  # [T', L, S]
        columns += [torch.stack([t.by_score.cpu()[b, c, n] for t in chunk.layers], 1)]  # [T', L, S]
        columns += [torch.stack([_or_zero(t.rank, t.routed)[b, c, n].double() for t in chunk.layers], 1)]  # [T', L]
        columns += [_or_zero(chunk.layers[0].tag_type, chunk.layers[0].routed, -1)[b, c, n]]  # [T']
        columns += [_or_zero(chunk.layers[0].tag_level, chunk.layers[0].routed)[b, c, n].double()]  # [T']
        parts.append([column.numpy() for column in columns])
    item, place, channel, must, routed, scores, threshold, asked, rank, tag_type, tag_level = (
        np.concatenate([part[i] for part in parts]) for i in range(11)
    )
    order = np.lexsort((channel, place, item))  # [T]
    item, place, channel = item[order], place[order], channel[order]
    shape = (len(order), layers, routers)
    row = store.first_row.numpy()[item] + place - store.first_patch.numpy()[item]  # [T]
    ledger = Ledger(
        item=item,
        patch=place,
        channel=channel,
        row=row,
        scores=scores[order].reshape(shape),
        threshold=threshold[order].reshape(shape),
        asked=asked[order].reshape(shape),
        routed=routed[order],
        must_keep=np.any(must[order], axis=1),
        rank=rank[order],
        tag_type=tag_type[order],
        tag_level=tag_level[order],
        position=store.position.numpy()[row],
        read_patches=read,
    )
    return with_later_tags(ledger, rollout, channels=len(store.roles))


def _threshold(trace: LayerTrace, b: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """Thresholds in force at some tokens, [T', S]: those of the table, or those that had moved."""
    return trace.threshold.cpu()[b].double() if trace.online is None else trace.online.cpu()[b, n].double()


def _or_zero(told: torch.Tensor | None, like: torch.Tensor, otherwise: int = 0) -> torch.Tensor:
    """A part of a trace that only some configurations have, [B, C, N]."""
    return torch.full(like.shape, otherwise) if told is None else told.cpu()


def memory_layers(network: HAMNetwork) -> list[HAMLayer]:
    return [cast(HAMLayer, block.memory) for block in network.backbone.blocks]


def _chosen(ledger: Ledger, which: np.ndarray) -> Ledger:
    """Some tokens of a ledger, [T] bool."""
    names = [name for name in Ledger.__dataclass_fields__ if name != "read_patches"]
    return Ledger(**{name: getattr(ledger, name)[which] for name in names}, read_patches=ledger.read_patches)


def observed_steps(panel: Panel, store: PatchStore, ledger: Ledger, at: Any) -> np.ndarray:
    """Steps of each item at or before ``at``, [I]; None: all that were read."""
    if at is not None:
        return steps_at(panel, at)
    lengths, read = panel.lengths, ledger.read_patches  # 2 x [I]
    complete = (store.lead.numpy() + lengths) // store.patch_steps  # [I]
    short = np.maximum(read * store.patch_steps - store.lead.numpy(), 0)  # [I]
    return np.where(read >= complete, lengths, short)


def steps_at(panel: Panel, at: Any) -> np.ndarray:
    """Steps of each item at or before a time, [I]; None: all."""
    if at is None:
        return panel.lengths
    steps = np.array([cuts[0] if len(cuts) else 0 for cuts in cutoff_steps(panel, [at])], dtype=np.int64)  # [I]
    return np.minimum(steps, panel.lengths)


def follow(ledger: Ledger, stop: np.ndarray, *, window: int, policies: Sequence[Policy]) -> Fate:
    """Who is in the scratchpads after ``stop`` patches of each item, [I].

    A token of patch p enters when patch p + W is read. First in, first out: the entry of rank r on its list leaves when
    that of rank r + cap enters, the rule of ``hamts.nn.scratchpad.lifetimes``; for others see ``routes_fates``.
    """
    last_read = stop[ledger.item] - 1  # [T]
    written = ledger.patch + window  # [T]
    entered = ledger.routed & (written <= last_read)[:, None]  # [T, L]
    until = np.full(ledger.routed.shape, NEVER)  # [T, L]
    for layer, policy in enumerate(policies):
        if policy.eviction != "fifo" or policy.tags is not None:
            told = np.flatnonzero(ledger.routed[:, layer])  # [M]
            until[told, layer] = eviction_patches(arrivals_of(ledger, told, layer, window), policy)
            continue
        for members, cap in ((~ledger.must_keep, policy.cap_kept), (ledger.must_keep, policy.cap_must)):
            if cap is None:
                continue
            chosen = np.flatnonzero(members & ledger.routed[:, layer])  # [M] in order of time within each item
            successor = chosen[cap:]  # [M - cap]
            pushed = chosen[: len(successor)]  # [M - cap]
            same = ledger.item[pushed] == ledger.item[successor]
            until[pushed[same], layer] = written[successor[same]]
    gone = entered & (until <= last_read[:, None])  # [T, L]
    return Fate(
        held=entered & ~gone,
        gone=gone,
        pending=written > last_read,
        written_patch=written,
        evicted_patch=np.where(gone, until, written[:, None]).max(1),
    )


def _entry_rows(
    network: HAMNetwork, store: PatchStore, panel: Panel, ledger: Ledger, fate: Fate, observed: np.ndarray
) -> pd.DataFrame:
    """The table; ``observed`` are the steps of each item at the query time, [I]."""
    P, channels = store.patch_steps, panel.schema.channels
    names = np.array([c.name for c in channels], dtype=object)
    grid = ledger.patch * P - store.lead.numpy()[ledger.item]  # [T] step of the patch's first step; may be negative
    first, last = np.maximum(grid, 0), grid + P - 1  # 2 x [T]
    held = np.any(fate.held, axis=1)  # [T]
    dropped = np.any(fate.gone, axis=1) & ~held  # [T]
    status = np.select(
        [held, fate.pending, dropped & ledger.must_keep, dropped], ["kept", "pending", "quota_full", "evicted"], "below"
    ).astype(object)
    n_steps, value = observed_values(
        store, ledger.row, ledger.channel, np.array([c.kind == "categorical" for c in channels])
    )
    tag, is_event = tags_of(store, panel, ledger.row)
    best = _best(network, ledger)
    reason = np.where(ledger.must_keep, np.where(is_event, "event", "action"), best["reason"]).astype(object)
    own = np.where(held[:, None], fate.held, np.where(dropped[:, None], fate.gone, False))  # [T, L]
    own = np.where(fate.pending[:, None], ledger.routed, own)  # [T, L]
    entry_bytes = network.entry_bytes() * network.config.entries_per_token
    step = Times(panel, ledger.item)
    return pd.DataFrame(
        {
            "unique_id": pd.Series(panel.item_ids).iloc[ledger.item].reset_index(drop=True),
            "channel": names[ledger.channel],
            "ds_start": step(first),
            "ds_end": step(last),
            "n_steps": n_steps,
            "value": value,
            "reason": reason,
            "tag": tag,
            "score": best["score"],
            "threshold": best["threshold"],
            "status": status,
            "written_at": step(last + (fate.written_patch - ledger.patch) * P, known=held | dropped),
            "evicted_at": step(last + (fate.evicted_patch - ledger.patch) * P, known=dropped),
            "age": observed[ledger.item] - 1 - last,
            "layers": layer_names(own),
            "bytes": fate.held.sum(1) * entry_bytes,
        }
    )


def _best(network: HAMNetwork, ledger: Ledger) -> dict[str, np.ndarray]:
    """Score, threshold and name of the layer and router with the largest margin, each [T]."""
    T, layers, routers = ledger.scores.shape
    if layers * routers == 0:
        empty = np.full(T, np.nan)
        return {"score": empty, "threshold": empty, "reason": np.full(T, "", dtype=object)}
    blocks = memory_layers(network)
    tables = [layer.thresholds.values.cpu().double().numpy() for layer in blocks]  # L of [S, shares]
    spread = np.stack([table[:, 0] - table[:, -1] for table in tables])  # [L, S]
    margin = (ledger.scores - ledger.threshold) / np.where(spread > 0, spread, 1.0)  # [T, L, S]
    # a router that asks for the token comes before one that does not
    margin = np.clip(np.nan_to_num(margin, nan=-np.inf), -1e300, 1e300) + np.where(ledger.asked, 0.0, -1e305)
    place = margin.reshape(T, -1).argmax(1)  # [T]
    flat = (np.arange(T), place)
    names = np.array(blocks[0].router.names, dtype=object)
    return {
        "score": ledger.scores.reshape(T, -1)[flat],
        "threshold": ledger.threshold.reshape(T, -1)[flat],
        "reason": np.where(ledger.asked.reshape(T, -1)[flat], names[place % routers], ""),
    }
