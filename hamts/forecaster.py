"""What users touch: ``fit`` a frame, ``predict`` what comes next, see what the memory was worth, ``save`` and ``load``.

I items · C channels · G targets · F future steps · Q quantiles · X windows
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from hamts.ages import forecaster_ages
from hamts.backtests import cross_validate
from hamts.config import ModelConfig
from hamts.data.clock import future_times
from hamts.data.frame import encode_future, future_frame, to_panel
from hamts.data.future import check_horizon
from hamts.data.library import answer_like, plain_frame
from hamts.data.panel import Panel, Schema
from hamts.errors import DataError, DataWarning
from hamts.fitting import Fitted, fill_static, fit_panel, refuse_extremes, validation_tail
from hamts.forecast import Forecast, resolve_levels
from hamts.forecaster_evaluate import forecaster_evaluate
from hamts.frontier import forecaster_frontier
from hamts.options import is_number
from hamts.persistence import load_fitted, save_fitted
from hamts.refusals import refuse_non_finite, refuse_rival, refuse_unseen
from hamts.remembered import Remembered, forecast_remembered, memory_parts, read_panel
from hamts.resolve import FitOptions, Plan, describe, machine_config, make_plan, with_alias
from hamts.routes import forecaster_routes
from hamts.stream import forecaster_stream
from hamts.training import FitReport
from hamts.usage import forecaster_usage

__all__ = ["HAMForecaster", "fit", "load"]


def fit(  # noqa: PLR0913 - one call, and each argument stands for itself
    df: Any,
    h: int | None = None,
    *,
    target: str | Sequence[str] | None = None,
    futr_cols: Sequence[str] | None = None,
    past_cols: Sequence[str] | None = None,
    event_cols: Sequence[str] | None = None,
    action_cols: Sequence[str] | None = None,
    events: Any = None,
    static_df: Any = None,
    freq: Any = None,
    id_col: str | None = None,
    time_col: str | None = None,
    budget_share: float = 0.10,
    budget_bytes: int | None = None,
    quantiles: Sequence[float] | None = None,
    preset: str = "small",
    router: str | None = None,
    routing: dict[str, Any] | None = None,
    mixer: str | None = None,
    patch_steps: int | None = None,
    window_patches: int | None = None,
    cross_reading: Literal["auto", "always", "never"] | None = None,
    half_life_steps: float | Sequence[float] | None = None,
    val_size: int | float | None = None,
    max_steps: int | None = None,
    max_time: float | None = None,
    batch_windows: int | None = None,
    learning_rate: float | None = None,
    accelerator: str = "auto",
    precision: str = "32-true",
    kernel: str = "auto",
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    devices: int = 1,
    machine: Mapping[str, Any] | None = None,
    seed: int = 0,
    run_dir: str | None = None,
    duplicates: Literal["error", "mean", "last"] = "error",
    on_bad: Literal["error", "skip"] = "error",
    irregular: Literal["error", "native"] = "error",
    verbose: bool = True,
    progress: bool | None = None,
    prediction_length: int | None = None,
    quantile_levels: Sequence[float] | None = None,
) -> HAMForecaster:
    """Fit one model on all items of a frame. With no options it does the sensible thing, and prints what that is.

    Args:
        df: pandas or polars; long (``unique_id, ds, y`` or ``item_id, timestamp, target``) or wide. Never changed.
        h: steps to forecast; default one season.
        target, futr_cols, past_cols, event_cols, action_cols, events, static_df, freq, id_col, time_col, duplicates,
            on_bad, irregular: what the columns are and how rows are taken, see ``hamts.data.frame.to_panel``.
        budget_share: share of the observed tokens that the scratchpad is asked to keep, in [0, 1].
        budget_bytes: most bytes of one item's scratchpads.
        quantiles: levels of an answer where ``predict`` names none; default 0.1, 0.5, 0.9.
        preset: ``tiny``, ``small`` or ``base``.
        router: which tokens ask to be kept: names of ``hamts.config.ROUTERS``, joined by "+".
        routing: further fields of ``ModelConfig``, ``MemoryConfig`` and ``TrainConfig`` about what is kept, by name:
            ``{"eviction": "reservoir", "tag_types": [{"name": "fault", "quota": 0.5}]}``.
        mixer: ``ham``, or one of its rivals for comparison, as large as HAM's memory would be: see ``hamts.nn.mixers``.
        patch_steps: steps read as one token; 1 keeps single steps.
        window_patches: last patches that are always read exactly.
        cross_reading: whether targets read one another (``auto``: covariates always, targets if validation favours it).
        half_life_steps: of the running mean and scale; one number, or the scaling one and slower ones.
        val_size: steps (int) or share (float) at the end of each item kept for validation; 0 for none.
        max_steps, max_time: limits of fitting, optimiser steps and seconds; whatever came last is usable.
        accelerator, precision, kernel, strategy, devices, machine: on what to fit, see ``hamts.config.MachineConfig``;
            ``machine`` holds the rest of it: ``accumulate``, ``checkpointing``, ``compile_mode``, ``cuda_graphs``.
        seed: of weights, windows and dropout. The same seed, data and machine give the same bytes.
        run_dir: folder in which an interrupted fit can be resumed by the same call.
        verbose, progress: print roles, defaults and checks; show a bar (None: on a terminal).
        prediction_length, quantile_levels: other words for h and quantiles.

    Raises DataError: what ``to_panel`` raises, E-HORIZON, E-QUANTILE, E-OPTION, E-ALIAS, E-KERNEL.
    """
    options = FitOptions(
        h=with_alias("h", h, "prediction_length", prediction_length),
        quantiles=with_alias("quantiles", quantiles, "quantile_levels", quantile_levels),
        budget_share=budget_share, budget_bytes=budget_bytes, preset=preset, router=router, mixer=mixer,
        routing=routing, patch_steps=patch_steps,
        window_patches=window_patches, cross_reading=cross_reading, half_life_steps=half_life_steps,
        val_size=val_size, max_steps=max_steps,
        max_time=max_time, batch_windows=batch_windows, learning_rate=learning_rate, seed=seed,
        machine=machine_config(accelerator, precision, kernel, strategy, devices, {} if machine is None else machine),
    )  # fmt: skip
    panel = to_panel(
        df, target=target, futr_cols=futr_cols, past_cols=past_cols, event_cols=event_cols, action_cols=action_cols,
        events=events, static_df=static_df, freq=freq, id_col=id_col, time_col=time_col, duplicates=duplicates,
        on_bad=on_bad, irregular=irregular,
    )  # fmt: skip
    refuse_extremes(panel.values, panel.schema)
    plan = make_plan(panel, options)
    tail = validation_tail(panel.lengths, h=plan.h, patch_steps=plan.model.patch_steps, val_size=plan.val_size)
    if verbose:
        print(f"hamts.fit: {panel.n_items} items, {len(panel.values):,} steps")
        print("\n".join(describe(panel.schema, plan, options, validation=tail.describe(panel.lengths))), flush=True)
    fitted = fit_panel(panel, plan, tail=tail, run_dir=run_dir, progress=progress, verbose=verbose)
    return HAMForecaster(fitted, panel)


def load(path: str | os.PathLike[str]) -> HAMForecaster:
    """Read a model that ``HAMForecaster.save`` wrote; every byte is checked. Raises ModelFolderError."""
    return HAMForecaster(load_fitted(path))


class HAMForecaster:
    """A fitted model, with the memory of every item it was fitted on.

    Args:
        fitted: network, plan and what is remembered of each item.
        panel: the rows of the fit, where this process still has them; they are needed to replay under another budget.
    """

    def __init__(self, fitted: Fitted, panel: Panel | None = None) -> None:
        self._fitted, self._panel = fitted, panel

    def __repr__(self) -> str:
        items = len(self._fitted.remembered.item_ids)
        targets = ", ".join(self.schema.targets)
        return (
            f"HAMForecaster(targets=[{targets}], items={items}, h={self.h}, freq={self.schema.frequency.alias!r},"
            f" usage_share={self.usage_share:.3f})"
        )

    @property
    def schema(self) -> Schema:
        """Columns, roles, clock and dialect of the fit."""
        return self._fitted.schema

    @property
    def plan(self) -> Plan:
        """Every choice of the fit, made."""
        return self._fitted.plan

    @property
    def config(self) -> ModelConfig:
        """Shape of the network."""
        return self._fitted.plan.model

    @property
    def quantiles(self) -> tuple[float, ...]:
        """Levels of an answer where none are asked for."""
        return self._fitted.plan.quantiles

    @property
    def h(self) -> int:
        """Steps the model was fitted to forecast."""
        return self._fitted.plan.h

    @property
    def report(self) -> FitReport:
        """How fitting went."""
        return self._fitted.report

    @property
    def usage_share(self) -> float:
        """Written / observed tokens over the history of the fit, tags included."""
        return self._fitted.remembered.usage_share

    def predict(
        self,
        df: Any = None,
        h: int | None = None,
        futr_df: Any = None,
        *,
        quantiles: Sequence[float] | None = None,
        level: Sequence[float] | float | None = None,
        budget_share: float | None = None,
        static_df: Any = None,
        events: Any = None,
        prediction_length: int | None = None,
        quantile_levels: Sequence[float] | None = None,
        future_df: Any = None,
    ) -> Forecast:
        """Forecast the steps after the history of each item.

        Args:
            df: history of known or new items, replayed from its start; None: the items of the fit, from their memory.
            h: steps; default those of the fit.
            futr_df: ids, times and the columns known ahead, see ``future_frame``. Its target columns are never read.
            quantiles, level: levels, or central intervals in percent; not both.
            budget_share: another share than the fit's; the history is then replayed.
            static_df, events: as in ``fit``, for ``df``.
            prediction_length, quantile_levels, future_df: other words for h, quantiles, futr_df.

        Raises DataError: E-HORIZON, E-QUANTILE, E-FUTURE and what else reading the frames raises, E-REPLAY (the rows
            of the fit are gone), E-NUMERIC (the network gave something that is not a number).
        """
        steps = self._horizon(with_alias("h", h, "prediction_length", prediction_length))
        asked = resolve_levels(
            with_alias("quantiles", quantiles, "quantile_levels", quantile_levels),
            level,
            default=self.quantiles,
            trained=self.config.quantiles,
        )
        share = self._share(budget_share)
        remembered, schema, notes = self._read(df, share, static_df, events)
        clock = remembered.clock(schema)
        future = encode_future(clock, with_alias("futr_df", futr_df, "future_df", future_df), h=steps)
        refuse_extremes(future, schema)
        answer = forecast_remembered(
            self._fitted.network, remembered, schema, future=future, share=share, time_unit=self._fitted.plan.time_unit
        )
        refuse_non_finite(answer, remembered, schema)
        return Forecast(
            quantiles=answer,
            levels=self.config.quantiles,
            item_ids=remembered.item_ids,
            times=future_times(clock, steps),
            schema=schema,
            asked=asked,
            templates=self._fitted.templates,
            notes=(*notes, *self._note_horizon(steps)),
        )

    def future_frame(self, h: int | None = None) -> Any:
        """Ids and times of the next ``h`` steps of the fitted items, to be filled in and passed as ``futr_df``."""
        return future_frame(self._fitted.remembered.clock(self.schema), self._horizon(h))

    def cross_validation(
        self,
        df: Any,
        h: int | None = None,
        n_windows: int = 1,
        step_size: int | None = None,
        refit: bool = False,
        *,
        cutoffs: Sequence[Any] | None = None,
        budget_share: float | None = None,
        memory: Literal["model", "none", "full", "random"] = "model",
        quantiles: Sequence[float] | None = None,
        level: Sequence[float] | float | None = None,
        static_df: Any = None,
        events: Any = None,
    ) -> Any:
        """Forecast at several moments of a history, each from what came before it, in one pass over the rows.

        Args:
            df: history with its outcome; columns known ahead are read from it, events only up to each cutoff.
            n_windows, step_size: the last complete windows of each item, and the steps between them (default h).
            refit: fit anew for each window on the rows before it; costs a fit each.
            cutoffs: last known times of all items, instead of ``n_windows``.
            memory: ``none`` empties the scratchpad, ``full`` keeps everything, ``random`` as many random steps.

        Returns: columns id, target_name (several targets), time, cutoff, y, HAM and the levels.
        """
        steps = self._horizon(h)
        asked = resolve_levels(quantiles, level, default=self.quantiles, trained=self.config.quantiles)
        panel = self._panel_of(df, static_df, events)
        self._note_horizon(steps)
        return cross_validate(
            self._fitted, panel, steps, n_windows=n_windows, step_size=step_size, cutoffs=cutoffs, refit=refit,
            share=self._share(budget_share), memory=memory, asked=asked,
        )  # fmt: skip

    # beside seasonal naive, and beside the same weights with another memory
    evaluate = forecaster_evaluate

    # what was asked of the scratchpads, and what they were given
    usage = forecaster_usage

    # which steps were kept, when and why; what a long history is worth
    routes, errors_by_age = forecaster_routes, forecaster_ages
    # error against bytes and time, under every budget
    frontier = forecaster_frontier
    # rows as they come, for months, without reading the history again
    stream = forecaster_stream

    def memory_bytes(self) -> Any:
        """Bytes that are kept of each fitted item: a frame of ids and parts (scratchpad, state, window, ...)."""
        remembered = self._fitted.remembered
        parts = memory_parts(remembered.memory)
        tails = (remembered.tail_values, remembered.tail_tags, remembered.tail_offset)
        parts["rows"] = np.full(len(remembered.item_ids), sum(tail[0].nbytes for tail in tails if tail is not None))
        parts["total"] = np.sum(list(parts.values()), axis=0)
        column = self.schema.dialect.id_column or "item"
        return plain_frame(self.schema.dialect, {column: remembered.item_ids.tolist(), **parts})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a folder, all or nothing: weights, roles, the memory of each item, but not its rows."""
        save_fitted(self._fitted, path)

    def _horizon(self, h: int | None) -> int:
        if h is None:
            return self.h
        check_horizon(h)
        return int(h)

    def _note_horizon(self, steps: int) -> tuple[str, ...]:
        """A horizon beyond the fitted one works, but was not trained for."""
        if steps <= self.h:
            return ()
        note = f"W-HORIZON: {steps} steps were asked for, the model was fitted to forecast {self.h}."
        warnings.warn(DataWarning(note), stacklevel=3)
        return (note,)

    def _share(self, budget_share: float | None) -> float:
        if budget_share is None:
            return self._fitted.plan.memory.budget_share
        if not is_number(budget_share) or not 0 <= budget_share <= 1:
            raise DataError("E-OPTION", f"budget_share must lie in [0, 1]. Got {budget_share!r}.", fix="0.1, say.")
        refuse_rival(self.config.mixer, "budget_share")
        return float(budget_share)

    def _panel_of(self, df: Any, static_df: Any, events: Any) -> Panel:
        panel = to_panel(df, schema=self.schema, static_df=static_df, events=events)
        refuse_extremes(panel.values, panel.schema)
        return fill_static(answer_like(panel, df), self._fitted.network)

    def _read(self, df: Any, share: float, static_df: Any, events: Any) -> tuple[Remembered, Schema, tuple[str, ...]]:
        """What is remembered of the items to forecast, in whose dialect to answer, and what was noticed."""
        fitted = self._fitted
        if df is not None:
            panel = self._panel_of(df, static_df, events)
            refuse_unseen(panel)
        elif static_df is not None or events is not None:
            raise DataError(
                "E-OPTION", "static_df and events belong to df, which was not given.", fix="Pass df too, or neither."
            )
        elif share == fitted.remembered.share:
            return fitted.remembered, self.schema, fitted.notes
        elif self._panel is None:
            raise DataError(
                "E-REPLAY",
                f"Another budget_share than {fitted.remembered.share:g} needs the history; a saved model has none.",
                fix="Pass df with the history of the items.",
            )
        else:
            panel = fill_static(self._panel, fitted.network)
        policy = fitted.network.policy(torch.tensor([share]))
        remembered, _ = read_panel(fitted.network, panel, policy, share=share, time_unit=fitted.plan.time_unit)
        return remembered, panel.schema, panel.notes
