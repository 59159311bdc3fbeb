"""stream: online-update consistency. A long drifting stream with rare items that are asked at several ages.

The exact tests of the same suite (batch = stream, chunks, save and load, causality, caps, independence, ...) need a
network and no training: ``probes.exact``.

B sequences · T rows · C channels · N items · Q queries (ages x items)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from probes.canvas import Canvas, code_names, take
from probes.contract import Draws, ProbeBatch, ProbeConfig
from probes.draws import TYPES, codes, fill, payloads, permutations, uniform
from probes.registry import Probe, register_probe

CHANNELS = 2
DRIFTS = ("mean", "phase", "gain", "new_channel", "none")
NEW_CHANNEL_GAIN = 0.8


@dataclass(frozen=True, kw_only=True)
class StreamConfig(ProbeConfig):
    """Axes of the prequential part; ``items`` is the number of drifts, and of rare items stored before them.

    Attributes:
        drift: what changes: ``mean``, ``phase``, ``gain``, ``new_channel`` or ``none``.
        drift_rows: rows between drifts, give or take ``drift_spread``.
        before_rows: how long before a drift its item is stored.
        ages: rows after which each item is asked.
        season_rows: of the seasonal pattern.
    """

    context_rows: int = 20_000
    items: int = 4
    drift: str = "mean"
    drift_rows: int = 4_000
    drift_spread: int = 500
    before_rows: int = 500
    ages: tuple[int, ...] = (100, 1_000, 10_000)
    season_rows: int = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drift not in DRIFTS:
            raise ValueError(f"Unknown drift {self.drift!r}. Available: {sorted(DRIFTS)}.")
        if min(self.ages, default=0) < 1 or self.before_rows + self.drift_spread >= self.drift_rows:
            raise ValueError("ages must be at least 1, and before_rows + drift_spread less than drift_rows.")
        self.need_rows(self.items * self.drift_rows + self.drift_spread, "Drifts")


@register_probe("stream", version=1, slot="streaming state")
class OnlineConsistency(Probe):
    Config = StreamConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {f"drift_{name}": {"drift": name} for name in DRIFTS}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"context_rows": rows, "items": 4, "queries": 12, "drift_rows": gap, "drift_spread": gap // 8,
               "before_rows": gap // 8, "ages": ages}
        for name, rows, gap, ages in (
            ("smoke", 2_500, 500, (50, 250, 1_000)),
            ("small", 5_000, 1_000, (100, 500, 2_500)),
            ("standard", 20_000, 4_000, (100, 1_000, 10_000)),
            ("long", 20_000, 4_000, (100, 1_000, 10_000)),
        )
    }  # fmt: skip
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {"drift": DRIFTS, "noise": (0.0, 0.2, 0.5)}
    trained = False

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        assert isinstance(config, StreamConfig)
        draws = config.draws(gen)
        N, T = config.items, config.context_rows
        spread = torch.randint(-config.drift_spread, config.drift_spread + 1, (n, N), generator=draws("positions"))
        drift_rows = config.drift_rows * torch.arange(1, N + 1) + spread  # [B, N]
        stored = drift_rows - config.before_rows  # [B, N]
        table = codes(config.code)  # [K, G]
        code = table[permutations(draws("keys"), n, TYPES)[:, :N]]  # [B, N, G]
        payload = payloads(draws("payloads"), (n, N, CHANNELS))  # [B, N, C]
        canvas = Canvas(
            config, draws, n, channels=CHANNELS, event_names=("ev", "q_flag", *code_names(table.shape[1])),
            key_width=table.shape[1], value_width=CHANNELS, query_rows=0,
            background=self._background(draws, n, config, drift_rows),
        )  # fmt: skip
        # a row of the everyday is keyed by its place in the season, which a state can learn
        season = code_of_season(config.season_rows, table.shape[1])  # [season, G]
        canvas.key = season[torch.arange(T) % config.season_rows].expand(n, T, -1).clone()  # [B, T, G]
        fill(canvas.x, stored, payload)
        canvas.flag(stored, "ev")
        canvas.code(stored, code)
        canvas.tagged = fill(canvas.tagged, stored, torch.ones_like(stored, dtype=torch.bool))
        canvas.mark_critical(stored, torch.arange(N).expand(n, N), slice(None))
        canvas.bind(stored, code, payload)
        age = torch.tensor(config.ages).repeat(N)  # [Q]
        item = torch.arange(N).repeat_interleave(len(config.ages)).expand(n, -1).contiguous()  # [B, Q]
        asked = take(stored, item) + age  # [B, Q]
        # a question never falls on a row that stores something
        asked = asked + (asked[..., None] == stored[:, None]).any(-1)  # [B, Q]
        earlier = (asked[..., None] == asked[:, None]).tril(-1).any(-1)  # [B, Q] the row asks something else already
        inside = (asked < T) & ~earlier  # [B, Q]
        q_index = torch.where(inside, asked, T - 1)  # [B, Q]
        rows = torch.where(inside, asked, -1)  # [B, Q]
        fill(canvas.query, rows, torch.ones_like(rows, dtype=torch.bool))
        canvas.flag(rows, "q_flag")
        canvas.code(rows, take(code, item))
        fill(canvas.x, rows, torch.zeros(n, len(age), CHANNELS))
        canvas.bind(rows, take(code, item), torch.zeros(n, len(age), CHANNELS))
        y = take(payload, item)  # [B, Q, C]
        return canvas.batch(
            q_index=q_index, q_item=item, y=y, need=torch.where(inside, take(stored, item), -1)[..., None],
            x_names=("ch_0", "ch_1"), items=N, floor={"set_mean": payload.mean(1, keepdim=True).expand_as(y)},
            slices={"age": age.expand_as(item).contiguous()}, extra={"drift_rows": drift_rows},
        )  # fmt: skip

    @staticmethod
    def _background(draws: Draws, n: int, config: StreamConfig, drift_rows: torch.Tensor) -> torch.Tensor:
        """A seasonal pattern whose mean, phase or gain changes at each drift, [B, T, C]."""
        T, N = config.context_rows, config.items
        gen = draws("carrier")
        regime = (torch.arange(T)[None, :, None] >= drift_rows[:, None]).sum(-1)  # [B, T] drifts so far
        phase0 = uniform(gen, (n, 1, CHANNELS), 0.0, 2 * math.pi)  # [B, 1, C]
        noise = config.noise * torch.randn(n, T, CHANNELS, generator=gen)  # [B, T, C]
        driver = torch.randn(n, T, 1, generator=gen)  # [B, T, 1] a channel that nothing depends on at first
        change = draws("drift")
        mean = torch.zeros(n, N + 1, CHANNELS)
        mean[:, 1:] = 2.0 * torch.randn(n, N, CHANNELS, generator=change)
        shift = uniform(change, (n, N + 1, CHANNELS), 0.0, 2 * math.pi)
        gain = torch.exp(0.7 * torch.randn(n, N + 1, CHANNELS, generator=change))
        angle = 2 * math.pi * torch.arange(T)[None, :, None] / config.season_rows + phase0  # [B, T, C]
        if config.drift == "phase":
            angle = angle + take(shift, regime)
        wave = 0.5 * torch.sin(angle)  # [B, T, C]
        if config.drift == "gain":
            wave = wave * take(gain, regime)
        if config.drift == "mean":
            wave = wave + take(mean, regime)
        if config.drift == "new_channel":
            wave = wave + NEW_CHANNEL_GAIN * (regime > 0)[..., None] * driver
        return wave + noise


def code_of_season(season_rows: int, width: int) -> torch.Tensor:
    """A unit key for each place in the season, near places near one another, [season, G]."""
    angle = 2 * math.pi * torch.arange(season_rows)[:, None] / season_rows * torch.arange(1, width // 2 + 1)
    key = torch.cat([angle.sin(), angle.cos()], 1)  # [season, G]
    return key / key.norm(dim=1, keepdim=True)
