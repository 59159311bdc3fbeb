"""``HAMForecaster.evaluate``: scores of a model, and beside it of the same weights with another memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from hamts.backtests import evaluate_methods

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster

__all__ = ["forecaster_evaluate"]


def forecaster_evaluate(  # noqa: PLR0913 - one call, and each argument stands for itself
    model: HAMForecaster,
    df: Any,
    h: int | None = None,
    n_windows: int = 8,
    step_size: int | None = None,
    *,
    against: Sequence[str] = ("seasonal_naive", "no_memory", "full_memory", "random_memory"),
    by: Literal["target", "item", "group"] | None = None,
    group_col: str | None = None,
    cutoffs: Sequence[Any] | None = None,
    budget_share: float | None = None,
    static_df: Any = None,
    events: Any = None,
    oracle: Any = None,
    graft: HAMForecaster | str | None = None,
    seed: int = 0,
) -> Any:
    """Score the model, and beside it the same weights with another memory.

    Args:
        df, n_windows, step_size, cutoffs: as in ``cross_validation``.
        against: ``seasonal_naive``; ``no_memory``, scratchpad emptied; ``full_memory``, everything kept;
            ``random_memory``, as many random steps in each layer; ``shuffled_memory``, the model's own decisions
            at random times; ``stride_memory``, as many on a schedule, a row for each phase;
            ``recency_memory``, the newest, as many entries as the model holds; ``oracle_memory``, the steps of
            ``oracle``; ``grafted_memory``, those that another router keeps.
        by: a row for each ``target``, ``item`` or ``group`` of the static column ``group_col`` instead of all
            together; of groups, the worst is marked.
        oracle: frame of ids and times (and channels) of the steps to keep.
        graft: another fitted model of the same columns, or the name of a router without weights of its own.

    Returns: one row per method with MASE, MSE, MAE, WQL (mean weighted quantile loss), MSIS, coverage_80,
        coverage_95, usage_share, and bytes (of an item's memory after the last cutoff, on average).
    """
    steps = model._horizon(h)
    panel = model._panel_of(df, static_df, events)
    model._note_horizon(steps)
    return evaluate_methods(
        model._fitted, panel, steps, n_windows=n_windows,
        step_size=step_size, cutoffs=cutoffs, against=against, by=by, share=model._share(budget_share), seed=seed,
        oracle=oracle, graft=graft._fitted.network if not isinstance(graft, str | None) else graft,
        group_col=group_col,
    )  # fmt: skip
