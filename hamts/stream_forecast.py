"""Forecasts from a stream's state: the pass that ``predict`` runs, on a copy.

I items · C channels · G targets · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hamts.data.answer import forecast_frame
from hamts.data.clock import future_times
from hamts.data.frame import encode_future
from hamts.data.library import plain_frame
from hamts.data.panel import Schema
from hamts.data.patches import future_tags
from hamts.data.scale import find_bounds
from hamts.errors import DataError
from hamts.fitting import refuse_extremes
from hamts.forecast import Forecast, resolve_levels, targets_first
from hamts.refusals import refuse_non_finite
from hamts.remembered import Remembered, forecast_remembered
from hamts.stream_calibration import shifted
from hamts.stream_rows import row_times
from hamts.stream_state import StreamItems
from hamts.stream_update import last_actions_of, open_tail

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster
    from hamts.reader import HAMNetwork

__all__ = ["Scenario", "forecast_stream", "remembered_items", "run_scenario"]


@dataclass(frozen=True)
class Scenario:
    """Two forecasts from one state. Model-based: what the network does with other actions, not what the world would.

    Attributes:
        planned: under the plan that was given, or actions as they were last seen.
        changed: under the actions asked for.
        actions: what was asked for.
    """

    planned: Forecast
    changed: Forecast
    actions: dict[str, Any]
    label: str = "model-based, not causal"

    @property
    def df(self) -> Any:
        """Long frame: id, target_name, time, planned, changed, difference (of the means), basis."""
        difference = self.changed.mean - self.planned.mean  # [I, G, F]
        columns = {"planned": self.planned.mean, "changed": self.changed.mean, "difference": difference}
        schema = self.planned.schema
        frame = targets_first(forecast_frame(schema, self.planned.item_ids, self.planned.times, columns), schema)
        basis = [self.label] * len(frame)
        return plain_frame(schema.dialect, {**{name: frame[name] for name in frame.columns}, "basis": basis})


def remembered_items(model: HAMForecaster, items: StreamItems, slots: np.ndarray, share: float) -> Remembered:
    """Some items as ``predict`` knows them. The memory is a view: it must not be written into."""
    table, schema, P = items.table, model.schema, model.config.patch_steps
    lead, lengths = table["lead"][slots], table["lengths"][slots]
    patch, begun = np.divmod(lead + lengths, P)
    before = table["action_before"][slots]
    tail = open_tail(table["tail_values"][slots], patch, lead, begun, schema)
    ids = np.array([items.ids[slot] for slot in slots])
    heard = max(int(table["heard"].sum()) * model.config.layers, 1)
    return Remembered(
        item_ids=ids.astype(object) if ids.dtype.kind == "U" else ids,
        starts=row_times(schema, table["starts"][slots]),
        lengths=lengths,
        lead=lead,
        memory=items.memory.lend(slots),
        tail_values=tail,
        tail_tags=future_tags(before, tail, schema),
        tail_offset=table["tail_offset"][slots] if "tail_offset" in table.columns else None,
        last_action=last_actions_of(tail, before, schema),
        seen=table["seen"][slots],
        static_values=table["static"][slots] if len(schema.static) else None,
        last_times=None,
        last_position=None,
        share=share,
        usage_share=float(table["kept"].sum() / heard),
    )


def forecast_stream(
    model: HAMForecaster,
    network: HAMNetwork,
    items: StreamItems,
    slots: np.ndarray,
    *,
    h: int | None,
    futr_df: Any,
    quantiles: Sequence[float] | None,
    level: Sequence[float] | float | None,
    share: float,
    calibrated: bool,
) -> Forecast:
    """What ``Stream.forecast`` does."""
    steps = model._horizon(h)
    asked = resolve_levels(quantiles, level, default=model.quantiles, trained=model.config.quantiles)
    remembered = remembered_items(model, items, slots, share)
    clock = remembered.clock(model.schema)
    future = encode_future(clock, futr_df, h=steps)
    answer = _quantiles(model, network, remembered, future, share)
    notes = model._note_horizon(steps)
    if calibrated:
        table, scale = items.table, remembered.memory.scale
        bounds, _ = find_bounds(scale.extreme, scale.atoms)  # [I, G, 2]
        width = np.nan_to_num(table["ahead_scale"][slots], nan=1.0)
        answer = shifted(answer, table["shift"][slots], width, bounds.cpu().numpy())
    return Forecast(
        quantiles=answer,
        levels=model.config.quantiles,
        item_ids=remembered.item_ids,
        times=future_times(clock, steps),
        schema=model.schema,
        asked=asked,
        templates=model._fitted.templates,
        notes=notes,
    )


def _quantiles(
    model: HAMForecaster, network: HAMNetwork, remembered: Remembered, future: np.ndarray, share: float
) -> np.ndarray:
    refuse_extremes(future, model.schema)
    answer = forecast_remembered(network, remembered, model.schema, future=future, share=share, time_unit=1.0)
    refuse_non_finite(answer, remembered, model.schema)
    return answer


def run_scenario(
    model: HAMForecaster,
    network: HAMNetwork,
    items: StreamItems,
    slots: np.ndarray,
    actions: Mapping[str, Any],
    *,
    h: int | None,
    futr_df: Any,
    share: float,
) -> Scenario:
    """What ``Stream.scenario`` does. Raises DataError E-OPTION where a name is no action, or a plan has no h values."""
    schema, steps = model.schema, model._horizon(h)
    remembered = remembered_items(model, items, slots, share)
    clock = remembered.clock(schema)
    known = [c.name for c in schema.channels if c.role == "future"]
    if futr_df is None and not known:
        planned = np.full((len(slots), steps, len(schema.channels)), np.nan)  # [I, F, C]
        for channel in schema.indices("action"):
            planned[:, :, channel] = remembered.last_action[:, channel : channel + 1]
    else:
        planned = encode_future(clock, futr_df, h=steps)
    changed = _with_actions(planned, actions, schema, steps)
    both = [_quantiles(model, network, remembered, future, share) for future in (planned, changed)]
    asked = resolve_levels(None, None, default=model.quantiles, trained=model.config.quantiles)
    first = Forecast(
        quantiles=both[0],
        levels=model.config.quantiles,
        item_ids=remembered.item_ids,
        times=future_times(clock, steps),
        schema=schema,
        asked=asked,
        templates=model._fitted.templates,
    )
    return Scenario(first, replace(first, quantiles=both[1]), dict(actions))


def _with_actions(planned: np.ndarray, actions: Mapping[str, Any], schema: Schema, steps: int) -> np.ndarray:
    """The plan with other values in some action channels, [I, F, C]."""
    names = [channel.name for channel in schema.channels]
    allowed = [names[place] for place in schema.indices("action")]
    changed = planned.copy()
    for name, values in actions.items():
        if name not in allowed:
            raise DataError(
                "E-OPTION", f"{name!r} is no action column. There are {allowed}.", column=name, fix="Use one of them."
            )
        try:
            plan = np.broadcast_to(np.asarray(values, dtype=np.float64), (steps,))
        except ValueError as error:
            raise DataError(
                "E-OPTION",
                f"{name!r} needs one value, or one for each of {steps} steps. Got {np.shape(values)}.",
                column=name,
                fix="actions={'valve': 1.0}, or a list.",
            ) from error
        if not np.isfinite(plan).all():
            raise DataError("E-OPTION", f"Values of {name!r} must be finite.", column=name, fix="Pass numbers.")
        changed[:, :, names.index(name)] = plan
    return changed
