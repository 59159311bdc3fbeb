"""Probes as tables, so that any forecaster can be asked; and one's own labelled windows as a probe.

B sequences · L rows · Q queries · Y numbers in an answer · h rows of an echo
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from hamts.errors import DataError
from probes.contract import ProbeBatch, ProbeConfig, generator
from probes.registry import Probe

__all__ = ["EchoCase", "ProbeFromFrame", "echo_cases", "to_frame", "training_frame"]


def to_frame(batch: ProbeBatch) -> pd.DataFrame:
    """One row per sequence and time: channels, events, actions, and what is known of the row.

    Columns: series_id, timestamp, the channels, ``ev_`` and ``act_`` columns, role (context or query), item (-1: none),
    critical, distract.
    """
    B, L, _ = batch.x.shape
    columns: dict[str, Any] = {
        "series_id": np.repeat(np.arange(B), L),
        "timestamp": batch.time.reshape(-1).numpy(),
    }
    for names, values, stem in (
        (batch.x_names, batch.x, ""),
        (batch.event_names, batch.events, "ev_"),
        (batch.action_names, batch.actions, "act_"),
    ):  # fmt: skip
        for place, name in enumerate(names):
            columns[stem + name] = values[..., place].reshape(-1).numpy()
    query = batch.query.reshape(-1).numpy()
    columns |= {
        "role": np.where(query, "query", "context"),
        "item": batch.crit_item.reshape(-1).numpy(),
        "critical": batch.crit.reshape(-1).numpy(),
        "distract": batch.distract.reshape(-1).numpy(),
    }
    return pd.DataFrame(columns)


@dataclass(frozen=True)
class EchoCase:
    """One question to a forecaster: a history that ends with the trigger, the rows ahead, and what they will be.

    Attributes:
        history: unique_id, ds (row numbers), channels, ``ev_`` and ``act_`` columns.
        future: unique_id, ds and the ``ev_`` and ``act_`` columns of the rows ahead.
        truth: the channels of the answer, [h, Y].
        floor: what predictors without a memory of items say, [h, Y] each.
    """

    history: pd.DataFrame
    future: pd.DataFrame
    truth: np.ndarray
    floor: dict[str, np.ndarray]
    answer_columns: tuple[str, ...]
    sequence: int
    query: int


def echo_cases(probe: Probe, batch: ProbeBatch, *, queries: int = 1) -> list[EchoCase]:
    """Questions of the echo readout, ``queries`` of each sequence; the trigger is the last row of the history.

    Raises:
        ValueError: a suite whose answers are not rows of its channels.
    """
    width = batch.y.shape[-1]
    if width > batch.x.shape[-1]:
        raise ValueError(f"Answers of {probe.name!r} are not rows of its channels: it has no echo for forecasters.")
    echo = probe.r2_render(batch)
    found = []
    for b in range(len(batch)):
        asked = [q for q in range(batch.q_index.shape[1]) if bool(batch.asked[b, q])][:queries]
        found += [_case(probe, echo, b, q, width) for q in asked]
    return found


def _rows(batch: ProbeBatch, b: int, rows: Sequence[int], start: int) -> pd.DataFrame:
    """Some rows of one sequence, numbered from ``start``."""
    index = torch.as_tensor(list(rows))
    columns: dict[str, Any] = {"unique_id": f"s{b}", "ds": np.arange(start, start + len(index))}
    for names, values, stem in (
        (batch.x_names, batch.x, ""),
        (batch.event_names, batch.events, "ev_"),
        (batch.action_names, batch.actions, "act_"),
    ):  # fmt: skip
        part = values[b, index].numpy()
        columns |= {stem + name: part[:, place] for place, name in enumerate(names)}
    return pd.DataFrame(columns)


def _case(probe: Probe, echo: ProbeBatch, b: int, q: int, width: int) -> EchoCase:
    T, h = echo.context_rows, probe.echo_rows
    trigger = int(echo.q_index[b, q])
    history = _rows(echo, b, [*range(T), trigger], 0)
    future = pd.DataFrame({"unique_id": f"s{b}", "ds": np.arange(T + 1, T + 1 + h)})
    for name in history.columns:
        if name.startswith(("ev_", "act_")):
            future[name] = 0.0
    return EchoCase(
        history=history, future=future, truth=echo.y[b, q].reshape(h, width).numpy(),
        floor={name: answer[b, q].reshape(h, width).numpy() for name, answer in echo.floor.items()},
        answer_columns=echo.x_names[:width], sequence=b, query=q,
    )  # fmt: skip


def training_frame(probe: Probe, config: ProbeConfig, *, sequences: int, seed: int = 0) -> pd.DataFrame:
    """Streams in which every question is followed by its echo: what a forecaster may be fitted on, columns as above."""
    batch = probe.sample(generator(seed), sequences, config)
    parts = []
    for case in echo_cases(probe, batch, queries=1):
        parts.append(case.history)
        ahead = case.future.copy()
        for place, name in enumerate(batch.x_names):
            ahead[name] = case.truth[:, place] if place < case.truth.shape[1] else 0.0
        parts.append(ahead[case.history.columns])
    return pd.concat(parts, ignore_index=True).sort_values(["unique_id", "ds"], ignore_index=True)


class ProbeFromFrame:
    """One's own labelled windows as a probe of tier 2: edit, drop and lead tests of a fitted forecaster.

    Args:
        df: long table ``unique_id, ds, columns``.
        critical: labelled windows, ``unique_id, start, end, label`` with both ends included: what is to be remembered.
        query: windows at which it is needed, in the same form; None: each later window of the same series and label.
        event_cols, action_cols, futr_cols: columns that a forecaster may see ahead.

    Raises:
        DataError: E-PROBE-CHANNELS (a column is missing), E-PROBE-WINDOWS (no window has an earlier one).
    """

    def __init__(
        self,
        df: pd.DataFrame,
        *,
        critical: pd.DataFrame,
        query: pd.DataFrame | None = None,
        target: Sequence[str],
        event_cols: Sequence[str] = (),
        action_cols: Sequence[str] = (),
        futr_cols: Sequence[str] = (),
    ) -> None:
        need = ["unique_id", "ds", *target, *futr_cols, *event_cols, *action_cols]
        missing = [name for name in need if name not in df.columns]
        if missing:
            raise DataError(
                "E-PROBE-CHANNELS", f"The table lacks the columns {missing}.", column=missing[0],
                fix="Pass a long table with these columns, or leave them out of the call.",
            )  # fmt: skip
        self.df = df.sort_values(["unique_id", "ds"], ignore_index=True)
        self.target, self.event_cols, self.action_cols = tuple(target), tuple(event_cols), tuple(action_cols)
        self.futr_cols = tuple(futr_cols)
        self.critical = critical
        self.pairs = self._pairs(critical, critical if query is None else query)
        if not self.pairs:
            raise DataError(
                "E-PROBE-WINDOWS", "No window has an earlier one of the same series and label.",
                fix="Give two windows or more of a label, or say in query= where each is needed.",
            )  # fmt: skip

    @staticmethod
    def _pairs(critical: pd.DataFrame, query: pd.DataFrame) -> list[tuple[pd.Series, pd.Series]]:
        """(earlier window, later window) of the same series; the latest earlier one of the same label, else any."""
        pairs = []
        for _, later in query.iterrows():
            before = critical[(critical["unique_id"] == later["unique_id"]) & (critical["end"] < later["start"])]
            same = before[before["label"] == later["label"]] if "label" in before else before
            chosen = same if len(same) else before
            if len(chosen):
                pairs.append((chosen.sort_values("end").iloc[-1], later))
        return pairs

    @property
    def known(self) -> tuple[str, ...]:
        """Columns that are known ahead."""
        return (*self.futr_cols, *self.event_cols, *self.action_cols)
