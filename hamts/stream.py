"""A fitted model fed row by row: ``update`` in constant time, ``forecast`` at any moment.

An item's state is what its history left behind: the memory of every layer, the last patches, the normaliser, the rows
of the unfinished patch, and where its clock stands. Nothing older is kept, so nothing older is touched.

I items · C channels · G targets · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hamts.config import StreamConfig
from hamts.data.frame import future_frame
from hamts.errors import DataError
from hamts.forecast import Forecast
from hamts.stream_device import HERE, network_on
from hamts.stream_forecast import Scenario, forecast_stream, remembered_items, run_scenario
from hamts.stream_frames import read_rows
from hamts.stream_hash import hash_model, hash_state
from hamts.stream_history import check_streamable, history_rows, saved_rows
from hamts.stream_operator import forget_span, pin_span
from hamts.stream_pins import Pin
from hamts.stream_recorded import recorder_of
from hamts.stream_report import UpdateReport, notes_of
from hamts.stream_rows import judge_rows
from hamts.stream_spill import Spill
from hamts.stream_state import ItemTable, MemoryStore, StreamItems, item_columns
from hamts.stream_step import PatchRows, Stepper
from hamts.stream_tables import memory_table, routes_table, stats_table, surprise_table, usage_table
from hamts.stream_update import Advance, Scored, open_tail

if TYPE_CHECKING:
    from hamts.forecaster import HAMForecaster
    from hamts.stream_open import DurableStream

__all__ = ["Stream", "UpdateReport", "forecaster_stream"]

# a change of what is stored, or of what it means, raises the first number
STATE_VERSION = (1, 0)

Arrays = Mapping[str, torch.Tensor | np.ndarray]


def forecaster_stream(
    model: HAMForecaster,
    df: Any = None,
    *,
    static_df: Any = None,
    events: Any = None,
    budget_share: float | None = None,
    **options: Any,
) -> Stream:
    """Feed the model row by row from now on: a ``Stream``.

    Args:
        df: history of the items to begin with; None: the items of the fit, where its rows ended.
        static_df, events: as in ``fit``, for ``df``.
        budget_share: share asked for from now on; default the fit's. A memory that was read before stays as it is.
        options: of ``hamts.config.StreamConfig``, such as ``correction="ignore"`` or ``calibrate=True``.

    Raises DataError: E-STREAM (an irregular clock), E-OPTION, and what reading the frame raises.
    """
    try:
        config = StreamConfig(**options)
    except (TypeError, ValueError) as error:
        raise DataError("E-OPTION", str(error), fix="See hamts.config.StreamConfig for what there is.") from error
    stream = Stream(model, config, model._share(budget_share))
    if df is not None:
        stream.add(df, static_df=static_df, events=events)
    elif static_df is not None or events is not None:
        raise DataError("E-OPTION", "static_df and events belong to df, which was not given.", fix="Pass df too.")
    else:
        stream._begin(*saved_rows(model))
    return stream


class Stream:
    """Items of one model, fed as rows come. Made by ``HAMForecaster.stream``.

    Args:
        model: its weights are never changed.
        config: policies and sizes.
        share: budget share asked for from now on.
    """

    def __init__(self, model: HAMForecaster, config: StreamConfig, share: float) -> None:
        check_streamable(model)
        self.model, self.config, self.share = model, config, share
        self._network = network_on(model, config.device)
        self._stepper = Stepper(self._network, self.schema, share, recorder=recorder_of(self._network, config))
        columns = item_columns(
            self._network,
            recent_rows=max(config.recent_rows, self._network.config.patch_steps),
            score_rows=config.score_rows,
            static=len(self.schema.static),
            with_log=any(channel.from_log for channel in self.schema.channels),
        )
        policy, _ = self._stepper.policies(1)
        caps = (policy.cap_kept, policy.cap_must)
        most = caps[0] + caps[1] if isinstance(caps[0], int) and isinstance(caps[1], int) else None
        self._items = StreamItems(ItemTable(columns), MemoryStore(self._network, most, config.store))
        self._pins: list[Pin] = []
        self._spill: Spill | None = None
        self._last: tuple[Any, Any, Scored] | None = None
        self._model_hash: str | None = None

    def __repr__(self) -> str:
        return f"Stream(items={len(self)}, targets={list(self.schema.targets)}, freq={self.schema.frequency.alias!r})"

    def __len__(self) -> int:
        return len(self._items) + (len(self._spill) if self._spill else 0)

    @property
    def schema(self) -> Any:
        """Columns, roles and clock of the fit."""
        return self.model.schema

    @property
    def item_ids(self) -> list[Any]:
        """Items in memory, then those on disk."""
        return [*self._items.ids, *(self._spill.ids if self._spill else ())]

    # --- rows in

    def update(self, rows: Any, events: Any = None) -> UpdateReport:
        """Take new rows of any items, in any order: all of them, or none.

        Args:
            rows: frame with the columns of fit, or a mapping of columns (arrays or single values). Never changed.
            events: log of what happened in the steps of these rows, where the model was fitted with one.

        Raises DataError: E-SCHEMA and what else reading a frame raises, E-ITEM (an item without history), E-FREQ,
            E-LATE, E-CONFLICT, E-JUMP (by policy), E-NUMERIC. The stream is then as it was.
        """
        incoming = read_rows(rows, events, self._items, self.schema)
        if self._spill and len(self._spill) and int(incoming.slots.min()) < 0:
            self._recall([each for each in dict.fromkeys(incoming.ids) if each in self._spill])
            incoming = read_rows(rows, events, self._items, self.schema)
        P = self._network.config.patch_steps
        arrived = judge_rows(incoming, self._items, self.schema, P, self.config)
        advance = Advance(self._items, self._stepper, self.schema, self.config, self._pins)
        scored = advance.compute(arrived)
        totals = advance.store(arrived, scored)
        self._last = (incoming, arrived, scored)
        refused = {
            name: at for name, (at, _) in arrived.kinds.items() if len(at) and name not in ("reopened", "applied")
        }
        longest = int(arrived.gaps.max(initial=0))
        notes = (*incoming.notes, *notes_of(totals, longest, self.config, self._network.config))
        return UpdateReport(**totals, refused=refused, notes=notes)

    def add(self, df: Any, *, static_df: Any = None, events: Any = None) -> None:
        """Begin new items from their history, read in one pass. Raises DataError E-ITEM for known ones."""
        columns = self._items.table.columns
        self._begin(*history_rows(self.model, self._network, df, self.share, static_df, events, columns))

    def drop(self, items: Sequence[Any]) -> None:
        """Forget items altogether. Raises DataError E-ITEM for unknown ones."""
        gone = set(self._slots(items).tolist())
        self._items.keep(np.array([row for row in range(len(self._items)) if row not in gone], dtype=np.int64))
        self._last = None

    def spill(self, folder: str | os.PathLike[str], items: Sequence[Any] | None = None, idle_steps: int = 0) -> int:
        """Move items to disk; a row or a forecast of theirs brings them back.

        Args:
            items: which; None: those whose last row is at least ``idle_steps`` behind the newest of all.

        Returns: how many were moved.
        """
        if self._spill is None:
            self._spill = Spill(folder)
        slots = self._idle(idle_steps) if items is None else self._slots(items)
        self._spill.put_away(self._items, slots)
        self._last = None
        return len(slots)

    # --- answers

    def forecast(
        self,
        h: int | None = None,
        futr_df: Any = None,
        *,
        items: Sequence[Any] | None = None,
        quantiles: Sequence[float] | None = None,
        level: Sequence[float] | float | None = None,
        calibrated: bool | None = None,
    ) -> Forecast:
        """Forecast the steps after each item's last row, on a copy of its state.

        Args:
            h, futr_df, quantiles, level: as in ``HAMForecaster.predict``.
            items: which; None: all.
            calibrated: whether quantiles are shifted by what the stream learned from its errors; None: as configured.
        """
        learned = self.config.calibrate if calibrated is None else calibrated
        return forecast_stream(
            self.model, self._network, self._items, self._slots(items), h=h, futr_df=futr_df, quantiles=quantiles,
            level=level, share=self.share, calibrated=learned,
        )  # fmt: skip

    def scenario(
        self,
        actions: Mapping[str, Any],
        h: int | None = None,
        futr_df: Any = None,
        *,
        items: Sequence[Any] | None = None,
    ) -> Scenario:
        """What the model would forecast under other actions: two forecasts from one state, and their difference.

        Model-based, not causal: it tells what the fitted network does with other inputs, not what the world would do.

        Args:
            actions: action column -> one value for all steps, or one for each of the h steps.
            futr_df: the plan to compare with; without one, every action goes on as it was last seen.
        """
        return run_scenario(
            self.model, self._network, self._items, self._slots(items), actions, h=h, futr_df=futr_df, share=self.share
        )

    def future_frame(self, h: int | None = None) -> Any:
        """Ids and times of the next ``h`` steps of every item, to be filled in and passed as ``futr_df``."""
        remembered = remembered_items(self.model, self._items, self._slots(None), self.share)
        return future_frame(remembered.clock(self.schema), self.model._horizon(h))

    @property
    def surprise(self) -> Any:
        """Rows taken by the last update: score against the forecast made when their patch began, and its p-value."""
        return surprise_table(self.model, self._last)

    def routes(self) -> Any:
        """Every step that is kept exactly now, and why: a row per item, channel and patch."""
        return routes_table(self.model, self._stepper, self._items, self._pins)

    def usage(self) -> Any:
        """Written and observed tokens, entries alive, and bytes, of every item."""
        return usage_table(self.model, self._items)

    def memory_bytes(self) -> Any:
        """Bytes that are kept of each item, by part."""
        return memory_table(self.model, self._items)

    def stats(self, by: str | None = None) -> Any:
        """Rows taken, replayed, late, ... since the start, as a dict; ``by="item"`` as a frame."""
        return stats_table(self.model, self._items, by)

    # --- an operator's hand

    @property
    def pins(self) -> list[dict[str, Any]]:
        """Log of what ``pin`` and ``forget`` did."""
        return [pin.to_dict() for pin in self._pins]

    def pin(self, span: tuple[Any, Any], label: str, *, item: Any = None) -> Pin:
        """Keep what is exact of a span as long as the quota of tagged steps allows; also of steps yet to come."""
        pin = pin_span(self._items, self._stepper, self._slot(item), span, label)
        self._pins.append(pin)
        return pin

    def forget(
        self, span: tuple[Any, Any], label: str = "", *, item: Any = None, history: Any = None
    ) -> dict[str, Any]:
        """Remove a span from scratchpads, window and unfinished patch, and say what the state still holds of it.

        The recurrent state and the running statistics have read the span and cannot be read back. With ``history``,
        all rows of the item, its memory is rebuilt without the span: then nothing of it is left, and the difference
        to the state before is measured.
        """
        pin, left = forget_span(self, self._slot(item), span, label, history)
        self._pins.append(pin)
        return left

    # --- the whole of it

    @property
    def kernel(self) -> str:
        """What runs it, as ``hamts doctor`` names it; chosen for the device when the stream was made."""
        return self._network.kernels.name

    @property
    def model_hash(self) -> str:
        """SHA-256 over weights, schema and plan of the model."""
        if self._model_hash is None:
            self._model_hash = hash_model(self._network, self.schema, self.model.plan)
        return self._model_hash

    def state(self) -> tuple[dict[str, torch.Tensor | np.ndarray], dict[str, Any]]:
        """Everything that the next update, or forecast, depends on: named arrays, and facts that JSON can hold."""
        idle = list(self._spill.ids) if self._spill else []
        self._recall(idle)
        arrays = self._items.arrays()
        meta = {
            "version": list(STATE_VERSION),
            "model": self.model_hash,
            "item_ids": list(self._items.ids),
            "share": self.share,
            "config": {name: value for name, value in asdict(self.config).items() if name not in HERE},
            "pins": self.pins,
        }
        # a commit does not bring idle items back to memory for good
        if self._spill is not None and idle:
            self._spill.put_away(self._items, self._slots(idle))
        return arrays, meta

    @classmethod
    def from_state(cls, model: HAMForecaster, arrays: Arrays, meta: Mapping[str, Any], **here: Any) -> Stream:
        """The stream that ``state`` was taken of; ``here``: device, recorded.

        Raises DataError E-STATE: another model's, a newer one, damaged.
        """
        if meta["version"][0] > STATE_VERSION[0]:
            found = f"This state has version {meta['version']}, newer than {list(STATE_VERSION)}."
            raise DataError("E-STATE", found, fix="Upgrade.")
        known = {name: value for name, value in meta["config"].items() if name in StreamConfig.__dataclass_fields__}
        stream = cls(model, StreamConfig(**known, **here), float(meta["share"]))
        if meta["model"] != stream.model_hash:
            found = f"This state belongs to model {meta['model'][:16]}, not to {stream.model_hash[:16]}."
            raise DataError("E-STATE", found, fix="Load the model that the stream was started with.")
        try:
            stream._items.load(meta["item_ids"], dict(arrays))
        except DataError:
            raise
        except (KeyError, ValueError) as error:
            found = f"The state does not fit the model: {error}."
            raise DataError("E-STATE", found, fix="Use another copy.") from error
        stream._pins = [Pin(**pin) for pin in meta["pins"]]
        return stream

    @classmethod
    def open(cls, folder: str | os.PathLike[str], model: Any = None, **options: Any) -> DurableStream:
        """Go on with the stream of a folder, or start one there; see ``hamts.stream_open.open_stream``."""
        from hamts.stream_open import open_stream

        return open_stream(folder, model, **options)

    def state_hash(self) -> str:
        """SHA-256 of the state; the same for items added in another order. Counters of refused rows do not count."""
        arrays, meta = self.state()
        return hash_state(arrays, meta)

    # --- inside

    def _begin(self, ids: list[Any], rows: dict[str, np.ndarray], memory: Any) -> None:
        known = [each for each in ids if each in self._items.slot or (self._spill and each in self._spill)]
        if known:
            found = f"{len(known)} items are in the stream already."
            raise DataError("E-ITEM", found, series=known[:5], fix="Pass update their rows.")
        self._items.append(ids, rows, memory)

    def _open_rows(self, slots: np.ndarray) -> PatchRows:
        """The unfinished patch of some items as it stands."""
        table = self._items.table
        patch, begun = np.divmod(table["lead"][slots] + table["lengths"][slots], self._network.config.patch_steps)
        tail = open_tail(table["tail_values"][slots], patch, table["lead"][slots], begun, self.schema)
        return PatchRows(
            values=tail,
            offset=table["tail_offset"][slots] if "tail_offset" in table.columns else None,
            patch=patch,
            **{name: table[name][slots] for name in ("action_before", "starts", "lead", "static")},
        )

    def _idle(self, steps: int) -> np.ndarray:
        table = self._items.table
        if not len(self._items):
            return np.zeros(0, dtype=np.int64)
        last = self._stepper.step_times(table["starts"], table["lengths"] - 1)  # [I]
        limit = self._stepper.step_times(last, np.full(len(last), steps))  # [I]
        return np.flatnonzero(limit <= last.max())

    def _slot(self, item: Any) -> int:
        if item is None and len(self) > 1:
            raise DataError("E-ITEM", f"Say which of {len(self)} items.", series=self.item_ids[:5], fix="item=...")
        return int(self._slots(None if item is None else [item])[0])

    def _slots(self, items: Sequence[Any] | None) -> np.ndarray:
        """Rows of these items, brought back from disk where they lie there."""
        spilled = self._spill.ids if self._spill else []
        self._recall([each for each in spilled if items is None or each in items])
        if items is None:
            return np.arange(len(self._items))
        slots = self._items.slots(items)
        if len(slots) and int(slots.min()) < 0:
            unknown = [each for each, slot in zip(items, slots, strict=True) if slot < 0]
            raise DataError("E-ITEM", f"{len(unknown)} items are not in the stream.", series=unknown[:5], fix="add(df)")
        return slots

    def _recall(self, ids: Sequence[Any]) -> None:
        for each in ids:
            assert self._spill is not None
            self._spill.recall(self._items, each)
