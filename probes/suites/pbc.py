"""pbc: predictable but operationally critical. Nothing jumps at a scheduled marker, and its level is needed later.

Rungs: pbc0 no decoys · pbcD decoys · pbcS silent schedule (no flag) · pbcA a setpoint announced and reached exactly ·
pbcR rare but regular (every fourth marker has a payload of its own, the same at each visit).

B sequences · T context rows · C channels (2) · N markers · D decoys · Q queries · G numbers in a code
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from probes.canvas import Canvas, code_names, query_rows, take
from probes.contract import Draws, ProbeBatch, ProbeConfig
from probes.draws import TYPES, choose_rows, codes, fill, payloads, permutations, uniform
from probes.registry import Probe, register_probe

CHANNELS = 2
MARGIN = 5
LEVEL_NOISE = 0.05
RARE_EVERY = 4
KINDS = ("flagged", "silent", "action", "rare")


@dataclass(frozen=True, kw_only=True)
class PbcConfig(ProbeConfig):
    """Axes of pbc; ``items`` is the number of scheduled markers.

    Attributes:
        kind: ``flagged``, ``silent``, ``action`` or ``rare``.
        distractors: bursts elsewhere, flagged ``alarm``; -1 for as many as markers.
        announce: a column says how far away the next marker is.
        row_jitter: largest shift of a marker against its schedule.
        ahead_rows: of an announcement before its setpoint is reached.
        fade: factor of the level, and of a silent schedule's calendar, on rows that are not critical; less than 1 in
            training's first stages alone, since everything that is read beside a marker hides at first that reading it
            helps.
    """

    items: int = 9
    noise: float = LEVEL_NOISE
    kind: str = "flagged"
    distractors: int = -1
    announce: bool = False
    row_jitter: int = 1
    ahead_rows: int = 4
    fade: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"Unknown kind {self.kind!r}. Available: {sorted(KINDS)}.")
        if self.items > TYPES:
            raise ValueError(f"There are {TYPES} marker types. Got {self.items}.")
        self.need_rows(self.items * 4 + self.decoys + MARGIN, "Markers and decoys")

    @property
    def decoys(self) -> int:
        return self.items if self.distractors < 0 else self.distractors


@register_probe("pbc", version=3, slot="benchmark hygiene")
class PredictableButCritical(Probe):
    Config = PbcConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "pbc0": {"distractors": 0},
        "pbcD": {},
        "pbcS": {"kind": "silent"},
        "pbcA": {"kind": "action"},
        "pbcR": {"kind": "rare"},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"items": 9, "queries": 9},
        "small": {"items": 16},
        "standard": {"items": 32},
        "long": {"items": 64},
    }
    quick = ("pbc0", "pbcD", "pbcA", "pbcR")
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "kind": KINDS,
        "items": (4, 9, 16, 32),
        "distractors": (0, 16, 64),
        "announce": (False, True),
        "row_jitter": (0, 1, 3),
    }
    # levels beside the markers, and alarms, hide at first that reading a marker helps
    curriculum: ClassVar[tuple[tuple[float, Mapping[str, Any]], ...]] = (
        (0.3, {"fade": 0.0, "distractors": 0}), (0.2, {"fade": 0.3}), (0.5, {}),
    )  # fmt: skip
    matched_flags = False
    flags_note = "decoys are alarms: flagged as such, as critical rows are flagged as markers"
    echo_decay = 1.0
    headline = "pbcD"

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        assert isinstance(config, PbcConfig)
        draws = config.draws(gen)
        rows, period = self._schedule(draws, n, config)  # [B, N] (-1: after the context), [B, 1]
        table = codes(config.code)  # [K, G]
        types = permutations(draws("keys"), n, TYPES)[:, : config.items]  # [B, N]
        level = self._level(draws, n, config, rows)  # [B, T, C]
        asked = permutations(draws("queries"), n, config.items)[:, : min(config.items, config.queries)]  # [B, Q]
        names = ("marker", "alarm", "announced", "due_in", "q_flag", "phase_sin", "phase_cos")
        canvas = Canvas(
            config, draws, n, channels=CHANNELS, event_names=(*names, *code_names(table.shape[1])),
            action_names=("setpoint_0", "setpoint_1"), key_width=table.shape[1], value_width=CHANNELS,
            query_rows=asked.shape[1], background=level,
        )  # fmt: skip
        clean = level.clone()
        if config.noise:
            canvas.x[:, : canvas.T] += config.noise * torch.randn(level.shape, generator=draws("level noise"))
        if config.kind == "action":
            # reached exactly as announced
            at = rows.clamp_min(0)
            fill(canvas.x, rows, take(clean, at))
        answer = take(canvas.x, rows.clamp_min(0))  # [B, N, C]: what the row itself says
        if config.fade < 1:
            canvas.x[:, : canvas.T] *= config.fade
            fill(canvas.x, rows, answer)
        self._mark(canvas, config, rows=rows, code=table[types], answer=answer, period=period)
        self._decoys(canvas, draws, config)
        return self._ask(canvas, config, rows=rows, code=table[types], answer=answer, asked=asked)

    @staticmethod
    def _schedule(draws: Draws, n: int, config: PbcConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the markers: a period of its own, a random phase, and jitter, in each sequence."""
        T, N = config.context_rows, config.items
        gen = draws("positions")
        period = T / N * uniform(gen, (n, 1), 0.7, 1.3)  # [B, 1]
        slack = torch.maximum(period, T - MARGIN - (N - 1) * period)  # [B, 1]
        start = torch.rand(n, 1, generator=gen) * slack  # [B, 1]
        jitter = torch.randint(-config.row_jitter, config.row_jitter + 1, (n, N), generator=gen)  # [B, N]
        rows = (start + period * torch.arange(N)).round().long() + jitter  # [B, N]
        first = config.ahead_rows if config.kind == "action" else 0
        return torch.where((rows < T - MARGIN) & (rows >= first), rows, -1), period

    @staticmethod
    def _level(draws: Draws, n: int, config: PbcConfig, rows: torch.Tensor) -> torch.Tensor:
        """A smooth level, [B, T, C], that the last few rows predict and a row two periods ago does not."""
        T = config.context_rows
        step = torch.arange(T, dtype=torch.float32)[None, :, None]  # [1, T, 1]
        if config.kind == "action":
            return _setpoints(payloads(draws("payloads"), (n, config.items + 1, CHANNELS)), rows, T)
        gen = draws("payloads")
        period = uniform(gen, (n, 1, CHANNELS, 3), 25.0, 70.0)  # [B, 1, C, 3]
        phase = uniform(gen, (n, 1, CHANNELS, 3), 0.0, 2 * math.pi)
        level = 0.8 * torch.sin(2 * math.pi * step[..., None] / period + phase).sum(-1)  # [B, T, C]
        if config.kind == "rare":
            own = payloads(draws("rare payload"), (n, 1, CHANNELS))  # [B, 1, C]: the same at each visit
            first = torch.randint(RARE_EVERY, (n, 1), generator=draws("rare phase"))  # [B, 1]
            rare = torch.arange(config.items) % RARE_EVERY == first  # [B, N]
            at = torch.where(rare, rows, -1)  # [B, N]
            level = fill(level.clone(), at, take(level, at.clamp_min(0)) + own)
        return level

    @staticmethod
    def _mark(
        canvas: Canvas,
        config: PbcConfig,
        *,
        rows: torch.Tensor,
        code: torch.Tensor,
        answer: torch.Tensor,
        period: torch.Tensor,
    ) -> None:
        n, T, N = canvas.n, canvas.T, config.items
        items = torch.arange(N).expand(n, N)
        canvas.mark_critical(rows, items, slice(None))
        canvas.bind(rows, code, answer)
        fill(canvas.event_id, rows, items)
        ahead = torch.where(rows >= 0, rows, 2**40)[:, None] - torch.arange(T)[None, :, None]  # [B, T, N]
        if config.kind == "silent":
            # only the calendar tells: which cycle a row is in, and how far into it
            since = torch.where(rows[:, None] >= 0, -ahead, -1)  # [B, T, N] rows since each marker
            current = torch.where(since >= 0, torch.arange(N), -1).amax(-1)  # [B, T]
            at = take(rows, current.clamp_min(0))  # [B, T]
            angle = 2 * math.pi * (torch.arange(T) - at).clamp_min(0) / period  # [B, T]
            inside = current >= 0  # [B, T]
            every = torch.where(inside, torch.arange(T), -1)  # [B, T]
            canvas.flag(every, "phase_sin", angle.sin())
            canvas.flag(every, "phase_cos", angle.cos())
            canvas.code(every, take(code, current.clamp_min(0)))
            if config.fade < 1:
                beside = ~canvas.crit & ~canvas.query  # [B, L]
                canvas.events = torch.where(beside[..., None], config.fade * canvas.events, canvas.events)
            return
        ones = torch.ones_like(rows, dtype=torch.bool)
        canvas.flag(rows, "marker")
        canvas.code(rows, code)
        canvas.tagged = fill(canvas.tagged, rows, ones)
        if config.announce:
            due = torch.where(ahead >= 0, ahead, 2**40).amin(-1).clamp_max(T) / period  # [B, T]
            canvas.events[:, :T, canvas.column("due_in")] = due.clamp_max(2.0)
        if config.kind == "action":
            early = torch.where(rows >= 0, rows - config.ahead_rows, -1)  # [B, N]
            canvas.flag(early, "announced")
            canvas.code(early, code)
            fill(canvas.actions, early, answer)
            canvas.bind(early, code, answer)
            canvas.mark_critical(early, items)
            canvas.tagged = fill(canvas.tagged, early, ones)

    @staticmethod
    def _decoys(canvas: Canvas, draws: Draws, config: PbcConfig) -> None:
        D = config.decoys
        if D == 0:
            return
        free = canvas.free_rows(MARGIN)  # [B, T]
        rows = choose_rows(draws("distractor rows"), free, D)  # [B, D]
        size = uniform(draws("distractor sizes"), (canvas.n, D, CHANNELS), 3.5, 6.0)  # [B, D, C]
        sign = torch.where(torch.rand(size.shape, generator=draws("distractors")) < 0.5, -1.0, 1.0)
        fill(canvas.x, rows, sign * size)
        canvas.flag(rows, "alarm")
        fill(canvas.distract, rows, torch.ones_like(rows, dtype=torch.bool))
        key = canvas.key.gather(1, rows[..., None].expand(-1, -1, canvas.key.shape[-1]))  # [B, D, G]
        canvas.bind(rows, key, sign * size)

    @staticmethod
    def _ask(
        canvas: Canvas,
        config: PbcConfig,
        *,
        rows: torch.Tensor,
        code: torch.Tensor,
        answer: torch.Tensor,
        asked: torch.Tensor,
    ) -> ProbeBatch:
        n, Q = asked.shape
        q_index = query_rows(n, canvas.T, Q)  # [B, Q]
        canvas.flag(q_index, "q_flag")
        canvas.code(q_index, take(code, asked))
        if config.kind == "silent":
            canvas.flag(q_index, "phase_cos")
        canvas.bind(q_index, take(code, asked), torch.zeros(n, Q, CHANNELS))
        row = take(rows, asked)  # [B, Q]
        need = row[..., None]  # [B, Q, 1]
        roles: tuple[str, ...] = ("marker",)
        if config.kind == "action":
            need = torch.stack([torch.where(row >= 0, row - config.ahead_rows, -1), row], -1)  # [B, Q, 2]
            roles = ("announcement", "marker")
        y = take(answer, asked)  # [B, Q, C]
        there = (rows >= 0).float()[..., None]  # [B, N, 1]
        mean = (answer * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp_min(1)  # [B, 1, C]
        last = take(answer, rows.argmax(1, keepdim=True))  # [B, 1, C]
        slices = {}
        if config.kind == "rare":
            first = torch.randint(RARE_EVERY, (n, 1), generator=canvas.draws("rare phase"))  # [B, 1], as rendered
            slices["rare"] = (asked % RARE_EVERY == first).long()
        return canvas.batch(
            q_index=q_index, q_item=asked, y=y, need=need, x_names=("ch_0", "ch_1"), items=config.items,
            need_role=roles, need_any=config.kind == "action", slices=slices,
            floor={
                "set_mean": mean.expand_as(y),
                "context_mean": canvas.x[:, : canvas.T].mean(1, keepdim=True).expand_as(y),
                "last_event": last.expand_as(y),
                "last_value": canvas.x[:, canvas.T - 1, None].expand_as(y),
            },
        )  # fmt: skip


def _setpoints(levels: torch.Tensor, rows: torch.Tensor, T: int) -> torch.Tensor:
    """A level that moves smoothly from setpoint to setpoint and holds none longer: [B, N + 1, C] -> [B, T, C]."""
    n, N = rows.shape
    nodes = torch.cat([torch.zeros(n, 1), torch.where(rows >= 0, rows, T + torch.arange(N)).float()], 1)  # [B, N + 1]
    nodes, order = nodes.sort(1)
    levels = take(torch.cat([levels[:, -1:], levels[:, :-1]], 1), order)  # [B, N + 1, C]; marker k keeps its own
    step = torch.arange(T, dtype=torch.float32).expand(n, T).contiguous()  # [B, T]
    right = torch.searchsorted(nodes.contiguous(), step).clamp(1, N)  # [B, T]
    low, high = take(nodes, right - 1), take(nodes, right)  # 2 x [B, T]
    share = ((step - low) / (high - low).clamp_min(1e-6)).clamp(0, 1)  # [B, T]
    share = (0.5 - 0.5 * torch.cos(math.pi * share))[..., None]  # [B, T, 1]
    return (1 - share) * take(levels, right - 1) + share * take(levels, right)
