"""act: action-effect recall. An action was taken once and something followed; what would follow if it came again?

B sequences · T context rows · N actions · V visits of each · Q queries · K types
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from probes.canvas import Canvas, code_names, query_rows, take
from probes.contract import Draws, ProbeBatch, ProbeConfig
from probes.draws import TYPES, codes, fill, permutations, segments
from probes.registry import Probe, register_probe

CHANNELS = 2
EFFECT_ROWS = 6
DOSES = {
    "same": ((1.0,), (1.0,)),
    "positive": ((0.5, 1.0, 1.5), (0.5, 1.0, 1.5)),
    "signed": ((-1.0, 1.0), (-1.0, 1.0)),
    "scaled": ((-1.5, -1.0, -0.5, 0.5, 1.0, 1.5), (-1.5, -1.0, -0.5, 0.5, 1.0, 1.5)),
}


@dataclass(frozen=True, kw_only=True)
class ActConfig(ProbeConfig):
    """Axes of act; ``items`` is the number of actions.

    Attributes:
        dose: ``same``, ``positive``, ``signed`` or ``scaled``: which doses are used and asked. From scratch the last
            two are a plateau without a gradient: train them by the ladder.
        lag, lag_jitter: rows from the action to its effect, and the largest random delay on top.
        visits: times that each action is taken.
        shape: of the effect: ``impulse``, ``decay`` (0.8 a row) or ``second`` (second order).
        overlap: chance that an action waits for nothing before it and may fall into another's effect.
        saturate: effects pass through tanh.
        effect_noise: on each effect.
        placebo: share of the actions without an effect.
        gamma: how strongly the recent level drives the dose (confounding); for ``positive`` doses.
        announce: the action is announced a few rows ahead.
    """

    items: int = 16
    dose: str = "positive"
    lag: int = 2
    lag_jitter: int = 0
    visits: int = 1
    shape: str = "impulse"
    overlap: float = 0.0
    saturate: bool = False
    effect_noise: float = 0.1
    placebo: float = 0.0
    gamma: float = 0.0
    announce: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dose not in DOSES:
            raise ValueError(f"Unknown dose {self.dose!r}. Available: {sorted(DOSES)}.")
        if self.shape not in ("impulse", "decay", "second"):
            raise ValueError(f"Unknown shape {self.shape!r}. Available: ['decay', 'impulse', 'second'].")
        if self.items > TYPES:
            raise ValueError(f"There are {TYPES} actions. Got {self.items}.")
        self.need_rows(self.items * self.visits * self.slot_rows, "Actions, one a slot,")

    @property
    def slot_rows(self) -> int:
        tail = 1 if self.shape == "impulse" else EFFECT_ROWS
        return self.lag + self.lag_jitter + tail + 1


@register_probe("act", version=1, slot="control and counterfactuals")
class ActionEffectRecall(Probe):
    Config = ActConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {"act": {}, "actS": {"dose": "same"}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"items": 9, "queries": 9, "dose": "same"},
        "standard": {"items": 32},
    }
    quick = ("actS",)
    cannot: ClassVar[Mapping[str, str]] = {"act G5": "one seed of five does not read its list, the other four do"}
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "dose": ("same", "positive", "signed", "scaled"),
        "items": (4, 8, 16, 32),
        "lag": (0, 2, 8, 32),
        "lag_jitter": (0, 2),
        "overlap": (0.0, 0.3, 0.6),
        "visits": (1, 2, 4),
        "saturate": (False, True),
        "effect_noise": (0.0, 0.1, 0.3),
        "placebo": (0.0, 0.3),
        "gamma": (0.0, 1.0, 2.0, 4.0),
        "announce": (False, True),
        "shape": ("impulse", "decay", "second"),
    }
    curriculum: ClassVar[tuple[tuple[float, Mapping[str, Any]], ...]] = ((0.3, {"dose": "same"}), (0.7, {}))

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        assert isinstance(config, ActConfig)
        draws = config.draws(gen)
        N, W = config.items, config.items * config.visits
        table = codes(config.code)  # [K, G]
        item = permutations(draws("order"), n, W) % N  # [B, W], each as often as it is visited
        rows, lag = self._rows(draws, n, config)  # 2 x [B, W]
        gain = torch.randn(n, N, generator=draws("payloads"))  # [B, N]
        gain = gain * (torch.rand(n, N, generator=draws("placebo")) >= config.placebo)
        types = permutations(draws("keys"), n, TYPES)[:, :N]  # [B, N]
        asked = permutations(draws("queries"), n, N)[:, : min(N, config.queries)]  # [B, Q]
        Q = asked.shape[1]
        canvas = Canvas(
            config, draws, n, channels=CHANNELS, event_names=("ev", "q_flag", "announced", *code_names(table.shape[1])),
            action_names=("dose",), key_width=table.shape[1], value_width=1, query_rows=Q,
        )  # fmt: skip
        dose = self._doses(draws, config, (n, W), canvas.x, rows)  # [B, W]
        effect = 2.0 * take(gain, item) * dose  # [B, W]
        if config.saturate:
            effect = 2.0 * torch.tanh(effect / 2.0)
        seen = effect + config.effect_noise * torch.randn(n, W, generator=draws("effect noise"))  # [B, W]
        self._render(canvas, config, rows=rows, lag=lag, code=table[take(types, item)], dose=dose, seen=seen)
        fill(canvas.event_id, rows, take(types, item))
        canvas.mark_critical(rows, item)
        canvas.mark_critical(rows + lag, item, [0])
        menu = torch.tensor(DOSES[config.dose][1])
        new = menu[torch.randint(len(menu), (n, Q), generator=draws("query doses"))]  # [B, Q]
        y = 2.0 * take(gain, asked) * new  # [B, Q]
        if config.saturate:
            y = 2.0 * torch.tanh(y / 2.0)
        q_index = query_rows(n, canvas.T, Q)  # [B, Q]
        canvas.flag(q_index, "q_flag")
        canvas.code(q_index, table[take(types, asked)])
        fill(canvas.actions[..., 0], q_index, new)
        canvas.bind(q_index, table[take(types, asked)], torch.zeros(n, Q, 1))
        mine = item[:, None] == asked[..., None]  # [B, Q, W]
        last = torch.where(mine, rows[:, None], -1).argmax(-1)  # [B, Q]
        action_row = take(rows, last)  # [B, Q]
        need = torch.stack([action_row, action_row + take(lag, last)], -1)  # [B, Q, 2]
        size = take(effect, last).abs()  # [B, Q]
        latest = rows.argmax(1, keepdim=True)  # [B, 1]
        y = y[..., None]  # [B, Q, 1]
        mean_effect = (2.0 * gain.mean(1, keepdim=True) * new)[..., None]  # [B, Q, 1]
        return canvas.batch(
            q_index=q_index, q_item=asked, y=y, need=need, x_names=("ch_0", "ch_1"), items=N,
            need_role=("action", "effect"), key_direct=False,
            floor={
                "set_mean": seen.mean(1)[:, None, None].expand_as(y),
                "mean_gain": mean_effect,
                "last_event": take(seen, latest)[..., None].expand_as(y),
            },
            slices={"effect size": (size >= 0.86).long() + (size >= 1.94).long()},
            extra={"gain": gain, "stored_dose": take(dose, last), "query_dose": new},
        )  # fmt: skip

    @staticmethod
    def _rows(draws: Draws, n: int, config: ActConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the actions, none inside another's wait, and the lag of each effect: 2 x [B, W]."""
        W = config.items * config.visits
        # placed freely: slots of equal length would let a regular grid of rows find them
        rows = segments(draws("positions"), n, count=W, width=config.slot_rows, rows=config.context_rows)  # [B, W]
        lag = config.lag + torch.randint(0, config.lag_jitter + 1, (n, W), generator=draws("lags"))  # [B, W]
        if config.overlap > 0:
            # pull an action to the row after the one before it, into that one's effect
            close = torch.rand(n, W, generator=draws("overlap")) < config.overlap  # [B, W]
            close[:, 0] = False
            pulled = torch.cat([rows[:, :1], rows[:, :-1] + 1], 1)  # [B, W]
            rows = torch.where(close & ~close.roll(1, 1), pulled, rows)
        return rows, lag

    @staticmethod
    def _doses(
        draws: Draws, config: ActConfig, shape: tuple[int, int], x: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        menu = torch.tensor(DOSES[config.dose][0])
        dose = menu[torch.randint(len(menu), shape, generator=draws("doses"))]  # [B, W]
        if config.gamma > 0 and config.dose != "same":
            before = x[..., 0].gather(1, (rows - 1).clamp_min(0))  # [B, W]
            dose = menu.min() + (menu.max() - menu.min()) * torch.sigmoid(config.gamma * before)
        return dose

    @staticmethod
    def _render(
        canvas: Canvas,
        config: ActConfig,
        *,
        rows: torch.Tensor,
        lag: torch.Tensor,
        code: torch.Tensor,
        dose: torch.Tensor,
        seen: torch.Tensor,
    ) -> None:
        ones = torch.ones_like(rows, dtype=torch.bool)
        canvas.flag(rows, "ev")
        canvas.code(rows, code)
        fill(canvas.actions[..., 0], rows, dose)
        canvas.tagged = fill(canvas.tagged, rows, ones)
        if config.announce:
            canvas.flag((rows - 3).clamp_min(0), "announced")
        if config.shape == "impulse":
            weights = [1.0]
        elif config.shape == "decay":
            weights = [0.8**row for row in range(EFFECT_ROWS)]
        else:
            weights = [1.0, 1.3, 1.1, 0.7, 0.4, 0.2]
        batch = torch.arange(canvas.n)[:, None]
        for row, weight in enumerate(weights):
            place = (rows + lag + row).clamp_max(canvas.T - 1)
            canvas.x[batch, place, 0] += weight * seen
        zero = torch.zeros(*seen.shape, 1)
        canvas.bind(rows, code, zero)
