"""One patch of many items at once: raw rows to a chunk, the chunk through the network, the next patch forecast.

The same pass that reads a history, with one patch at a time: law 2 rests on it.

B items · C channels · G targets · P steps in a patch · Q quantiles · E static columns · L layers · F calendar features
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hamts.data.calendar import calendar_features
from hamts.data.clock import advance, as_numbers, as_times, effective_clock
from hamts.data.panel import Schema
from hamts.data.patches import Chunk, future_tags
from hamts.errors import DataError
from hamts.nn.tokens import Policy
from hamts.ops.kernels import launched_on
from hamts.reader import HAMNetwork, StreamMemory
from hamts.remembered import flatten_tensors
from hamts.stream_recorded import Pass, Recorder

__all__ = ["Ahead", "PatchRows", "Stepped", "Stepper"]

MOST_STAMPS = 4096


@dataclass(frozen=True)
class PatchRows:
    """Rows of one patch of each item, and what is needed to place them."""

    values: np.ndarray  # [B, P, C] float64; NaN missing
    offset: np.ndarray | None  # [B, P, C] float32
    action_before: np.ndarray  # [B, C] last observed actions before the patch
    patch: np.ndarray  # [B] int64 on each item's grid
    starts: np.ndarray  # [B] int64
    lead: np.ndarray  # [B] int64
    static: np.ndarray  # [B, E] float64


@dataclass(frozen=True)
class Stepped:
    """What one patch left behind."""

    memory: StreamMemory
    kept: np.ndarray  # [B, L] int64 tokens routed
    heard: np.ndarray  # [B] int64 tokens observed


@dataclass(frozen=True)
class Ahead:
    """Forecast of the patch that begins now."""

    quantiles: np.ndarray  # [B, G, P, Q] float64, in the user's units
    mean: np.ndarray  # [B, G] float64, level of the stream
    scale: np.ndarray  # [B, G] float64


class Stepper:
    """The network as a stream runs it."""

    def __init__(self, network: HAMNetwork, schema: Schema, share: float, *, recorder: Recorder | None = None) -> None:
        self.network, self.schema, self.share, self.recorder = network, schema, share, recorder
        self.zone = schema.dialect.time_zone
        self.clock = effective_clock(schema.frequency, self.zone)
        self.integer = schema.frequency.kind == "integer"
        kinds = np.array([column.kind == "categorical" for column in schema.static], dtype=bool)  # [E]
        self.coded = kinds
        self.with_tags = any(channel.role in ("event", "action") for channel in schema.channels)
        self._policies: dict[int, tuple[Policy, Policy]] = {}
        self._calendar: dict[int, np.ndarray] = {}

    @torch.inference_mode()
    def step(self, rows: PatchRows, memory: StreamMemory, ids: list[object]) -> Stepped:
        """Read one complete patch of each item. Raises DataError E-NUMERIC: the memory would hold no numbers."""
        policy, _ = self.policies(len(rows.patch))
        after, (sound, kept, heard) = self._run(self._stepped, self.chunk(rows, complete=True), memory, policy)
        assert after is not None
        if not bool(sound):
            self._refuse_non_finite(after, rows, ids)
        return Stepped(after, kept.cpu().numpy(), heard.cpu().numpy())

    def _stepped(self, chunk: Chunk, memory: StreamMemory, policy: Policy) -> tuple[StreamMemory, list[torch.Tensor]]:
        """The memory after a patch; also whether it holds numbers alone [], tokens routed [B, L] and observed [B]."""
        reading = self.network(chunk, memory, policy, stepwise=True, decode=False)
        heard = reading.heard > 0  # [B, C, 1]
        kept = torch.stack([(trace.routed & heard).sum((1, 2)) for trace in reading.traces], 1)  # [B, L]
        return reading.memory, [_holds_numbers(reading.memory), kept, heard.sum((1, 2))]

    def _run(
        self, what: Pass, chunk: Chunk, memory: StreamMemory, policy: Policy
    ) -> tuple[StreamMemory | None, list[torch.Tensor]]:
        with launched_on(self.network.unit.device):
            if self.recorder is not None and all(layer.pool is not None for layer in memory.layers):
                return self.recorder(what, chunk, memory, policy)
            return what(chunk, memory, policy)

    @torch.inference_mode()
    def ahead(self, rows: PatchRows, memory: StreamMemory) -> Ahead:
        """Forecast the patch that begins now from what came before it, nothing of it known."""
        _, policy = self.policies(len(rows.patch))
        _, found = self._run(self._foreseen, self.chunk(rows, complete=False), memory, policy)
        quantiles, mean, scale = (leaf.cpu().numpy() for leaf in found)
        return Ahead(quantiles=quantiles, mean=mean, scale=scale)

    def _foreseen(self, chunk: Chunk, memory: StreamMemory, policy: Policy) -> tuple[None, list[torch.Tensor]]:
        """Quantiles [B, G, P, Q] in the user's units, mean and scale [B, G] of a patch; nothing is left behind."""
        # the library's op for chunks would be compiled, and tuned, for the one patch
        stepwise = self.network.kernels.recurrence != "torch"
        reading = self.network(chunk, memory, policy, stepwise=stepwise, advance=False)
        return None, [reading.unscaled()[:, :, 0], reading.mean[:, :, 0], reading.scale[:, :, 0]]

    def policies(self, items: int) -> tuple[Policy, Policy]:
        """What scratchpads may do for so many items: in reading; in a forecast, whose tokens live outside the cap."""
        if items not in self._policies:
            policy = replace(self.network.policy(torch.full((items,), self.share)), masses=False)
            self._policies[items] = (policy, replace(policy, cap_kept=None, cap_must=None))
        return self._policies[items]

    def chunk(self, rows: PatchRows, *, complete: bool) -> Chunk:
        """One patch of each item; nothing in it is routed unless it is complete."""
        B, P, C = rows.values.shape
        values = torch.from_numpy(rows.values).permute(0, 2, 1)[:, :, None]  # [B, C, 1, P]
        observed = ~torch.isnan(values)  # [B, C, 1, P]
        tags = torch.zeros(B, C, 1, P, dtype=torch.bool)  # [B, C, 1, P]
        if self.with_tags:
            found = future_tags(rows.action_before, rows.values, self.schema)  # [B, P, C]
            tags = torch.from_numpy(found).permute(0, 2, 1)[:, :, None] & observed  # [B, C, 1, P]
        offset = torch.zeros(B, C, 1, P)  # [B, C, 1, P]
        if rows.offset is not None:
            offset = torch.where(observed, torch.from_numpy(rows.offset).permute(0, 2, 1)[:, :, None], offset)
        return Chunk(
            values=torch.where(observed, values, 0.0),
            observed=observed,
            tags=tags,
            event_offset=offset,
            calendar=torch.from_numpy(self.calendar(rows))[:, None],
            present=torch.ones(B, 1, dtype=torch.bool),
            complete=torch.full((B, C, 1), complete),
            position=torch.from_numpy(rows.patch.astype(np.float64))[:, None],
            elapsed=torch.ones(B, 1),
            static_values=torch.from_numpy(np.nan_to_num(rows.static[:, ~self.coded]).astype(np.float32)),
            static_codes=torch.from_numpy(np.nan_to_num(rows.static[:, self.coded]).astype(np.int64)),
            truth=values,
        )

    def patch_times(self, starts: np.ndarray, lead: np.ndarray, patch: np.ndarray) -> np.ndarray:
        """Time of the first step of a patch, int64 [B]."""
        P = self.network.config.patch_steps
        return advance(self.clock, starts, patch * P - lead, self.zone)

    def step_times(self, starts: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Time so many steps after each start, int64 [B]."""
        return advance(self.clock, starts, steps, self.zone)

    def calendar(self, rows: PatchRows) -> np.ndarray:
        """Calendar features of each patch, float32 [B, F]; items in step share them."""
        stamps = self.patch_times(rows.starts, rows.lead, rows.patch).tolist()
        missing = [stamp for stamp in dict.fromkeys(stamps) if stamp not in self._calendar]
        if missing:
            if len(self._calendar) + len(missing) > MOST_STAMPS:
                self._calendar.clear()
                missing = list(dict.fromkeys(stamps))
            times = as_times(as_numbers(np.array(missing)), integer=self.integer)
            found = calendar_features(times, self.schema.frequency, self.zone)
            self._calendar |= dict(zip(missing, found, strict=True))
        return np.stack([self._calendar[stamp] for stamp in stamps])

    def _refuse_non_finite(self, memory: StreamMemory, rows: PatchRows, ids: list[object]) -> None:
        """Say which of an item's values is no number."""
        leaves = _numbers(memory)
        pools = {n: layer.pool for n, layer in enumerate(memory.layers) if layer.pool is not None}
        for number, pool in pools.items():
            pad = memory.layers[number].scratchpad
            if pad.rows is not None and pad.alive.numel():
                entries = {name: part[torch.where(pad.alive, pad.rows, 0)] for name, part in pool.parts.items()}
                leaves |= {f"layers.{number}.scratchpad.{n}": x for n, x in entries.items() if x.is_floating_point()}
        for name, leaf in leaves.items():
            bad = ~torch.isfinite(leaf.flatten(1)).all(1)  # [B]
            if not bool(bad.any()):
                continue
            item = int(bad.nonzero()[0])
            raise DataError(
                "E-NUMERIC",
                f"Reading patch {int(rows.patch[item])} would leave values in {name} that are not numbers.",
                series=ids[item],
                fix="Look for values of extreme size in these rows. The state is as it was before them.",
            )


def _numbers(memory: StreamMemory) -> dict[str, torch.Tensor]:
    found = flatten_tensors(memory.layers, "layers").items()
    return {name: leaf for name, leaf in found if leaf.is_floating_point() and leaf.numel()}


def _holds_numbers(memory: StreamMemory) -> torch.Tensor:
    """Whether a memory holds nothing else, []; not asked for, so that all is waited for once."""
    # of entries in a pool the widest parts are not among the leaves: what this patch wrote of them; what was there
    # before was asked about when it came
    pools = [layer.pool for layer in memory.layers if layer.pool is not None]
    sums = [leaf.sum() for leaf in _numbers(memory).values()]
    sums += [pool.written for pool in pools if pool.written is not None]
    return torch.stack([torch.isfinite(each) for each in sums]).all()
