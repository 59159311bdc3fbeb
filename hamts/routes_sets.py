"""What several kept steps are worth together, against as many random others of the same item.

Effects of single entries do not add up: two entries that say the same are each worth nothing while the other is there.

S tokens of a set · E tokens held by one item · D random draws
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from hamts.data.cutoffs import cutoff_steps
from hamts.data.panel import Panel
from hamts.data.patches import PatchStore, build_store
from hamts.errors import DataError
from hamts.nn.tokens import Policy
from hamts.reader import HAMNetwork
from hamts.routes_worth import CHANGE, LOSS, Dropper, Effects, Held, held_entries, locate_rows, memories_at

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster

__all__ = ["SetWorth", "worth_by_reason", "worth_of_rows", "worth_together"]


@dataclass(frozen=True)
class SetWorth:
    """Worth of a set of entries, mean over items and cutoffs.

    Attributes:
        worth: change of the mean quantile loss, in units of the stream's scale, when all of them are dropped at once
            (positive: they help); without an outcome the mean absolute change of the median forecast.
        random: mean of the same for sets of random other entries of the item, as many in as many layers.
        random_low, random_high: 5 % and 95 % of those.
        of: ``quantile loss``, ``median change``, or empty where none of the entries was held at any cutoff.
        entries: entries dropped, mean over the forecasts.
        forecasts: item and cutoff pairs at which some of the entries were held.
    """

    worth: float
    random: float
    random_low: float
    random_high: float
    of: str
    entries: float
    forecasts: int

    @property
    def words(self) -> str:
        """What the numbers say."""
        if not self.of:
            return "none of them was held"
        if self.of == CHANGE:
            return "move the forecast more than random entries" if self.worth > self.random_high else "as any other"
        if self.worth > max(0.0, self.random_high):
            return "help more than random entries"
        return "hurt" if self.worth < min(0.0, self.random_low) else "as any other"


def worth_together(
    model: HAMForecaster,
    df: Any,
    rows: pd.DataFrame,
    *,
    cutoffs: Sequence[Any],
    random_draws: int = 20,
    budget_share: float | None = None,
    static_df: Any = None,
    events: Any = None,
    seed: int = 0,
) -> SetWorth:
    """What some rows of ``model.routes(df)`` are worth together to the forecasts of ``model.h`` steps.

    Args:
        df: the history and, where it goes on after a cutoff, the outcome; known-ahead columns are read from it.
        rows: the entries to drop; those that are not held at a cutoff are left out there.
        cutoffs: last known times of all items.
        random_draws: sets of random other entries to compare with.

    Raises DataError: E-EMPTY (no rows), E-OPTION, and what reading the frame raises.
    """
    if rows.empty:
        raise DataError("E-EMPTY", "There is no row whose worth could be told.", fix="Pass rows of model.routes(df).")
    network, plan = model._fitted.network, model._fitted.plan
    panel = model._panel_of(df, static_df, events)
    store = build_store(panel, patch_steps=plan.model.patch_steps, extra_steps=plan.h, time_unit=plan.time_unit)
    cuts = zip(cutoff_steps(panel, list(cutoffs)), panel.lengths, strict=True)
    steps = [np.unique(np.minimum(own, length)) for own, length in cuts]
    return worth_of_rows(
        rows, network, store, panel, cutoffs=steps, steps=plan.h,
        policies=network.policy(torch.tensor([model._share(budget_share)])), seed=seed, random_draws=random_draws,
    )  # fmt: skip


def worth_by_reason(model: HAMForecaster, df: Any, rows: pd.DataFrame, **options: Any) -> pd.DataFrame:
    """``worth_together`` of the rows of each reason, one line each.

    Args:
        options: arguments of ``worth_together``, ``cutoffs`` among them.
    """
    if rows.empty:
        raise DataError("E-EMPTY", "There is no row whose worth could be told.", fix="Pass rows of model.routes(df).")
    lines = []
    for reason, own in rows.groupby("reason", sort=True):
        found = worth_together(model, df, own, **options)
        lines.append({"reason": reason, **asdict(found), "words": found.words})
    return pd.DataFrame(lines)


def worth_of_rows(
    rows: pd.DataFrame,
    network: HAMNetwork,
    store: PatchStore,
    panel: Panel,
    *,
    cutoffs: Sequence[np.ndarray],
    steps: int,
    policies: Policy | Sequence[Policy],
    seed: int,
    random_draws: int = 20,
    reveal_events: bool = False,
) -> SetWorth:
    """The same on the parts of a model; arguments as for ``add_worth``, ``rows`` as for ``worth_together``."""
    where = locate_rows(rows, store, panel)
    policies = [policies] * network.config.layers if isinstance(policies, Policy) else list(policies)
    rng = np.random.default_rng(seed)
    found: list[Effects] = []
    sizes = []
    for item, cutoff, memory in memories_at(network, store, cutoffs, policies):
        held = held_entries(store, item, memory)
        chosen = _numbers(held, where[where["item"] == item])  # [S]
        if len(chosen) == 0:
            continue
        sets = np.stack([chosen, *_random_sets(held, chosen, rng, random_draws)])  # [1 + D, S]
        dropper = Dropper(network, store, item, cutoff, memory, steps, policies, reveal_events)
        effects, of = dropper(held, sets)
        found.append(Effects(float(effects[0]), effects[1:], of))
        sizes.append(len(chosen))
    if not found:
        return SetWorth(np.nan, np.nan, np.nan, np.nan, "", 0.0, 0)
    # a change of the loss says more than a change of the forecast
    of = LOSS if any(each.of == LOSS for each in found) else CHANGE
    chosen_effects = [each for each in found if each.of == of]
    random = np.mean([each.others for each in chosen_effects], axis=0)  # [D]
    low, high = np.quantile(random, [0.05, 0.95]) if len(random) else (np.nan, np.nan)
    return SetWorth(
        worth=float(np.mean([each.own for each in chosen_effects])),
        random=float(random.mean()) if len(random) else np.nan,
        random_low=float(low),
        random_high=float(high),
        of=of,
        entries=float(np.mean(sizes)),
        forecasts=len(chosen_effects),
    )


def _numbers(held: Held, where: pd.DataFrame) -> np.ndarray:
    """Which of the held tokens the rows are, [S]."""
    number = pd.Series(np.arange(len(held.patch)), index=pd.MultiIndex.from_arrays([held.channel, held.patch]))
    wanted = number.reindex(pd.MultiIndex.from_frame(where[["channel", "patch"]])).dropna()
    return np.unique(wanted.to_numpy(dtype=np.int64))


def _random_sets(held: Held, chosen: np.ndarray, rng: np.random.Generator, draws: int) -> list[np.ndarray]:
    """Sets of other tokens, as many with as many copies; from all tokens where there are too few others. D of [S]."""
    parts: list[tuple[np.ndarray, int]] = []
    for copies in np.unique(held.copies[chosen]):
        pool = np.flatnonzero(held.copies == copies)
        size = int((held.copies[chosen] == copies).sum())
        others = np.setdiff1d(pool, chosen)
        parts.append((others if len(others) >= size else pool, size))
    return [np.concatenate([rng.choice(pool, size=size, replace=False) for pool, size in parts]) for _ in range(draws)]
