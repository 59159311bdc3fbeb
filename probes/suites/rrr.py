"""rrr: rare-regime replay. A waveform was seen a few times; its onset comes back and the rest is to be forecast.

B sequences · T context rows · C channels · R rare regimes · F frequent regimes · m rows of a waveform · Q queries
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from probes.canvas import Canvas, take
from probes.contract import Draws, ProbeBatch, ProbeConfig
from probes.draws import carrier, fill, permutations, segments
from probes.registry import Probe, register_probe

CHANNELS = 2
CUE_NOISE = 0.05
AMPLITUDE = 1.5


@dataclass(frozen=True, kw_only=True)
class RrrConfig(ProbeConfig):
    """Axes of rrr; ``items`` is the number of rare regimes.

    Attributes:
        wave_rows: m, rows of a waveform.
        visits: times that each rare regime occurs before it is asked.
        frequent, frequent_visits: regimes that come often.
        cue_rows: rows of the onset that a query shows.
        smooth: length scale of the waveforms in rows; 0 draws rows independently.
        warp: how much slower the asked visit runs.
        scale: amplitude of the asked visit against the stored ones.
        ambiguous_rows: further regimes, never asked, that share so many first rows with a rare one each.
        cue_flag: whether visits and queries carry the regime's number (a warm-up, or an axis).
    """

    items: int = 6
    wave_rows: int = 6
    visits: int = 1
    frequent: int = 2
    frequent_visits: int = 8
    cue_rows: int = 3
    smooth: float = 0.0
    warp: float = 1.0
    scale: float = 1.0
    ambiguous_rows: int = 0
    cue_flag: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.cue_rows < self.wave_rows:
            raise ValueError(f"cue_rows must lie in 1..wave_rows - 1. Got {self.cue_rows} of {self.wave_rows}.")
        if self.ambiguous_rows >= self.cue_rows:
            raise ValueError(f"ambiguous_rows must be less than cue_rows. Got {self.ambiguous_rows}.")
        self.need_rows(self.visit_count * self.wave_rows, "Regimes")

    @property
    def visit_count(self) -> int:
        shadows = self.items if self.ambiguous_rows else 0
        return self.items * self.visits + shadows + self.frequent * self.frequent_visits


@register_probe("rrr", version=2, slot="streaming state")
class RareRegimeReplay(Probe):
    Config = RrrConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {"rrr": {}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # frequent regimes (2 x 8 visits of 6 rows) do not fit into 72 rows
        "smoke": {"items": 5, "frequent": 0, "queries": 5},
        "small": {"items": 6, "queries": 8},
        "standard": {"items": 6, "wave_rows": 16, "smooth": 2.0, "queries": 8},
        "long": {"items": 6, "wave_rows": 16, "smooth": 2.0, "queries": 8},
    }
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "items": (3, 6, 12),
        "visits": (1, 2, 4, 8),
        "wave_rows": (6, 16),
        "noise": (0.0, 0.2, 0.5),
        "warp": (0.8, 1.0, 1.25),
        "scale": (1.0, 0.7, 1.5),
        "ambiguous_rows": (0, 1, 2),
        "cue_flag": (False, True),
    }
    # induction over three rows is learned late; numbers on the visits first make it start
    curriculum: ClassVar[tuple[tuple[float, Mapping[str, Any]], ...]] = ((0.25, {"cue_flag": True}), (0.75, {}))
    echo_rows = 1
    cannot: ClassVar[Mapping[str, str]] = {
        "rrr G2": "with six rare regimes a small state would be one of keys of 2",
        "rrr G5": "frequent regimes are asked too, and are not critical: the list of critical rows lacks them",
    }

    def shrunk(self, config: ProbeConfig, parts: int) -> ProbeConfig:
        """Two rare regimes at least, and frequent ones that come as many times less often: they fill most rows."""
        assert isinstance(config, RrrConfig)
        return replace(
            config,
            context_rows=config.context_rows // parts,
            items=max(config.items // parts, 2),
            frequent_visits=max(config.frequent_visits // parts, 1),
        )

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        assert isinstance(config, RrrConfig)
        draws = config.draws(gen)
        R, F, m = config.items, config.frequent, config.wave_rows
        shadows = R if config.ambiguous_rows else 0
        waves = self._waves(draws, n, R + F + shadows, config)  # [B, R + F + shadows, m, C]
        if shadows:
            waves[:, R + F :, : config.ambiguous_rows] = waves[:, :R, : config.ambiguous_rows]
        starts = segments(draws("positions"), n, count=config.visit_count, width=m, rows=config.context_rows)
        counts = torch.tensor([config.visits] * R + [config.frequent_visits] * F + [1] * shadows)
        regime = torch.repeat_interleave(torch.arange(len(counts)), counts)  # [visits]
        order = permutations(draws("order"), n, config.visit_count)  # [B, visits]
        starts = starts.gather(1, order)  # [B, visits]; regime k's visits are consecutive columns
        asked = permutations(draws("queries"), n, R + F)  # [B, R + F]
        canvas = Canvas(
            config, draws, n, channels=CHANNELS, event_names=("q_flag", "regime"), key_width=CHANNELS * config.cue_rows,
            value_width=CHANNELS, query_rows=(R + F) * m,
        )  # fmt: skip
        rows = starts[..., None] + torch.arange(m)  # [B, visits, m]
        fill(canvas.x, rows.flatten(1), waves[:, regime].flatten(1, 2))
        owner = torch.where(regime < R + F, regime, -1)[:, None].expand(-1, m).flatten().expand(n, -1)  # [B, visits m]
        genuine = torch.where(owner >= 0, rows.flatten(1), -1)  # [B, visits m]
        # frequent regimes are what a state should hold: only rare rows are critical
        rare = torch.where(owner < R, genuine, -1)  # [B, visits m]
        canvas.mark_critical(rare, owner, slice(None))
        if config.cue_flag:
            number = (regime[:, None].expand(-1, m).flatten() + 1) / len(counts)  # [visits m]
            canvas.flag(rows.flatten(1), "regime", number.expand(n, -1))
        if shadows:
            fill(canvas.distract, rows[:, -shadows:].flatten(1), torch.ones(n, shadows * m, dtype=torch.bool))
        return self._asked(canvas, config, draws, waves=waves, asked=asked, starts=starts)

    @staticmethod
    def _waves(draws: Draws, n: int, count: int, config: RrrConfig) -> torch.Tensor:
        m = config.wave_rows
        white = torch.randn(n, count, m, CHANNELS, generator=draws("payloads"))  # [B, R, m, C]
        if config.smooth > 0:
            apart = torch.arange(m)[:, None] - torch.arange(m)  # [m, m]
            kernel = torch.exp(-0.5 * (apart / config.smooth) ** 2) + 1e-4 * torch.eye(m)
            white = torch.einsum("ij,brjc->bric", torch.linalg.cholesky(kernel), white)
        return AMPLITUDE * white

    def _asked(
        self,
        canvas: Canvas,
        config: RrrConfig,
        draws: Draws,
        *,
        waves: torch.Tensor,
        asked: torch.Tensor,
        starts: torch.Tensor,
    ) -> ProbeBatch:
        """Replay each regime in query rows: the input of row j is the waveform, the answer its row j + 1."""
        n, m, cue, R = canvas.n, config.wave_rows, config.cue_rows, config.items
        shown = take(waves, asked)  # [B, A, m, C]
        if config.warp != 1.0:
            shown = _warped(shown, config.warp)
        shown = config.scale * shown
        A = asked.shape[1]
        first = canvas.T + m * torch.arange(A)  # [A]
        rows = (first[:, None] + torch.arange(m)).flatten().expand(n, -1)  # [B, A m]
        noise = CUE_NOISE * torch.randn(n, A * m, CHANNELS, generator=draws("query noise"))
        fill(canvas.x, rows, shown.flatten(1, 2) + noise)
        canvas.flag(rows, "q_flag")
        if config.cue_flag:
            number = (asked + 1) / waves.shape[1]  # [B, A]
            canvas.flag(rows, "regime", number[..., None].expand(n, A, m).flatten(1).float())
        steps = torch.arange(cue - 1, m - 1)  # rows after which the next is to be given
        Q = A * len(steps)
        q_index = (first[:, None] + steps).flatten().expand(n, Q).contiguous()  # [B, Q]
        item = asked[..., None].expand(n, A, len(steps)).flatten(1)  # [B, Q]
        y = shown[:, :, cue:].flatten(1, 2)  # [B, Q, C]
        visits = torch.full((n, waves.shape[1], max(config.visits, config.frequent_visits)), -1)
        place = 0
        for regime, count in enumerate([config.visits] * R + [config.frequent_visits] * config.frequent):
            visits[:, regime, :count] = starts[:, place : place + count]
            place += count
        # the row after the cue and the row asked, of the latest visit
        latest = take(visits.amax(-1), item)  # [B, Q]
        offset = steps.repeat(A).expand(n, Q)  # [B, Q]
        need = torch.stack([latest + offset, latest + offset + 1], -1)  # [B, Q, 2]
        offsets = steps + 1
        mean = waves[:, :R, offsets].mean(1)  # [B, steps, C]
        set_mean = mean.repeat(1, A, 1)  # [B, Q, C]
        last_rare = take(waves, starts[:, : R * config.visits].argmax(1, keepdim=True) // config.visits)  # [B, 1, m, C]
        plain = carrier(draws("floor carrier"), n, 1, CHANNELS, config).expand(n, Q, CHANNELS)
        return canvas.batch(
            q_index=q_index, q_item=item, y=y, need=need, x_names=("ch_0", "ch_1"), items=config.items,
            need_role=("row before", "row asked"), key_direct=False, queries_follow=True,
            floor={
                "set_mean": set_mean,
                "last_rare": last_rare[:, 0, offsets].repeat(1, A, 1),
                "last_value": canvas.x[torch.arange(n)[:, None], q_index],
                "carrier": plain,
            },
            slices={"regime": torch.where(item < R, 0, 1), "wave row": offset - cue + 1},
            extra={"visit_starts": visits},
        )  # fmt: skip


def _warped(waves: torch.Tensor, factor: float) -> torch.Tensor:
    """Waveforms read at another speed, [B, A, m, C], linear between rows."""
    m = waves.shape[2]
    place = (torch.arange(m) / factor).clamp_max(m - 1)  # [m]
    low = place.floor().long()  # [m]
    share = (place - low)[:, None]  # [m, 1]
    high = (low + 1).clamp_max(m - 1)  # [m]
    return (1 - share) * waves[:, :, low] + share * waves[:, :, high] if math.isfinite(factor) else waves
