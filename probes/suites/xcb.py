"""xcb: cross-channel binding. Some channels fired together once; one part comes back, the other is asked.

B sequences · T context rows · C channels · S signature channels · N moments · Q queries
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from probes.canvas import Canvas, query_rows, take
from probes.contract import Draws, ProbeBatch, ProbeConfig
from probes.draws import choose_rows, fill, payloads, permutations
from probes.registry import NO_STATE, Probe, register_probe

SIGNATURE = 8
RESPONSE = 2
RADIUS = 2.0
MARGIN = 5
LEVELS = 16
LOUD = 2.0


@dataclass(frozen=True, kw_only=True)
class XcbConfig(ProbeConfig):
    """Axes of xcb.

    Attributes:
        variant: ``sphere`` (a signature is a point on a sphere), ``grid`` (two halves of ``grid_side`` values each, so
            that neither half decides), or ``channels`` (one channel at a level stands for another at a level).
        kappa: noise on the signature of the query, in units of its radius.
        lag: rows between signature and response.
        distractors: firings without a partner, or pairs never asked.
        flag: whether a moment carries an event flag.
        channels: C of the variant ``channels``.
        loud: of the variant ``channels``: answers lie beyond the carrier too, as what stands for them does. Else no
            reader can always tell which channel fired (``benchmarks/probe_ceiling.py``).
        levels: of the variant ``channels``: at how many a channel fires; fewer in training's first stages alone.
    """

    variant: str = "sphere"
    kappa: float = 0.0
    lag: int = 0
    distractors: int = 0
    flag: bool = False
    channels: int = 10
    loud: bool = False
    levels: int = LEVELS
    grid_side: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("sphere", "grid", "channels"):
            raise ValueError(f"Unknown variant {self.variant!r}. Available: ['channels', 'grid', 'sphere'].")
        if self.variant == "grid" and self.items > self.grid_side**2:
            raise ValueError(f"The grid has {self.grid_side**2} cells. Got {self.items} items. Raise grid_side.")
        if self.variant == "channels" and self.channels < 2:
            raise ValueError(f"channels must be at least 2. Got {self.channels}.")
        if not 2 <= self.levels <= LEVELS:
            raise ValueError(f"levels must be 2..{LEVELS}. Got {self.levels}.")
        if self.loud and self.variant != "channels":
            raise ValueError(f"Answers of the variant 'channels' alone are loud. Got {self.variant!r}.")
        self.need_rows((self.items + self.distractors) * (self.lag + 1) + MARGIN, "Moments and distractors")


@register_probe("xcb", version=1, slot="multivariate encoding")
class CrossChannelBinding(Probe):
    Config = XcbConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "xcb": {},
        "xcbF": {"flag": True},
        "xcbG": {"variant": "grid"},
        "xcbC": {"variant": "channels"},
        "xcbP": {"variant": "channels", "loud": True},
    }
    quick = ("xcbF",)
    cannot: ClassVar[Mapping[str, str]] = {
        "xcb G1": "one seed of five never begins at the rate of the table; at 0.002 all five answer (results/rates)",
        "xcbG G1": "two seeds of five fail at the rate of the table; at 0.002 all five answer (results/rates)",
        "xcbC G1": "an ideal reader has 0.935: answers within the carrier do not show their channel (probe_ceiling.py)",
        "xcbP G1": "not learned in three pilots, 0.33 at best (probe_pilot.py)",
        **{f"{rung} G2": NO_STATE for rung in ("xcb", "xcbF", "xcbG")},
    }
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "items": (4, 8, 16, 32),
        "variant": ("sphere", "grid", "channels"),
        "kappa": (0.0, 0.1, 0.3),
        "lag": (0, 1, 3, 8),
        "distractors": (0, 8, 16),
        "flag": (False, True),
        "channels": (10, 32, 128),
    }

    def config(self, preset: str = "smoke", rung: str | None = None, **overrides: Any) -> ProbeConfig:
        if rung == "xcbG" or overrides.get("variant") == "grid":
            items = overrides.get("items", super().config(preset).items)
            overrides.setdefault("grid_side", math.ceil(math.sqrt(items)))
        return super().config(preset, rung, **overrides)

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        assert isinstance(config, XcbConfig)
        draws = config.draws(gen)
        N, M = config.items, config.items + config.distractors
        keys, cue, answer, full = self._moments(draws, n, config)  # [B, M, G], [B, M, C], [B, M, Y], [B, M, C]
        allowed = torch.ones(n, config.context_rows, dtype=torch.bool)
        allowed[:, config.context_rows - MARGIN - config.lag :] = False
        if config.lag:
            grid = torch.zeros_like(allowed)
            grid[:, :: config.lag + 1] = True
            allowed &= grid
        rows = choose_rows(draws("positions"), allowed, M)  # [B, M]
        asked = permutations(draws("queries"), n, N)[:, : min(N, config.queries)]  # [B, Q]
        Q = asked.shape[1]
        C = cue.shape[-1]
        canvas = Canvas(
            config, draws, n, channels=C, event_names=("q_flag", "ev"), key_width=keys.shape[-1],
            value_width=answer.shape[-1], query_rows=Q,
        )  # fmt: skip
        self._render(canvas, config, draws, rows=rows, cue=cue, full=full)
        canvas.bind(rows, keys, answer)
        items = torch.arange(N).expand(n, N)
        active = ~full[:, :N].isnan()  # [B, N, C]
        canvas.mark_critical(rows[:, :N], items)
        fill(canvas.crit_chan, rows[:, :N], active)
        need = [rows[:, :N]]
        if config.lag:
            canvas.mark_critical(rows[:, :N] + config.lag, items)
            need.append(rows[:, :N] + config.lag)
        if config.distractors:
            fill(canvas.distract, rows[:, N:], torch.ones_like(rows[:, N:], dtype=torch.bool))
        q_index = query_rows(n, canvas.T, Q)  # [B, Q]
        self._ask(canvas, config, draws, q_index=q_index, cue=take(cue, asked), keys=take(keys, asked))
        y = take(answer, asked)  # [B, Q, Y]
        latest = rows[:, :N].argmax(1, keepdim=True)  # [B, 1]
        return canvas.batch(
            q_index=q_index, q_item=asked, y=y, need=take(torch.stack(need, -1), asked), items=N,
            x_names=tuple(f"ch_{number}" for number in range(C)),
            need_role=("signature", "response") if config.lag else ("moment",), key_direct=config.lag == 0,
            floor={
                "set_mean": answer[:, :N].mean(1, keepdim=True).expand_as(y),
                "last_event": take(answer, latest).expand_as(y),
            },
        )  # fmt: skip

    @staticmethod
    def _moments(
        draws: Draws, n: int, config: XcbConfig
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, what a query shows (NaN: masked), answers, and all that fires; for items, then distractors."""
        M, N = config.items + config.distractors, config.items
        if config.variant == "channels":
            return CrossChannelBinding._channel_moments(draws, n, config)
        signature = torch.randn(n, M, SIGNATURE, generator=draws("keys"))  # [B, M, S]
        if config.variant == "grid":
            side, half = config.grid_side, SIGNATURE // 2
            parts = torch.randn(n, 2, side, half, generator=draws("keys"))  # [B, 2, side, S / 2]
            parts = parts / parts.norm(dim=-1, keepdim=True)
            cell = permutations(draws("cells"), n, side * side)[:, :N]  # [B, N]
            first, second = take(parts[:, 0], cell // side), take(parts[:, 1], cell % side)
            signature[:, :N] = torch.cat([first, second], -1)
        signature = RADIUS * signature / signature.norm(dim=-1, keepdim=True)  # [B, M, S]
        answer = payloads(draws("payloads"), (n, M, RESPONSE))  # [B, M, 2]
        cue = torch.cat([signature, torch.full((n, M, RESPONSE), math.nan)], -1)  # [B, M, C]
        full = torch.cat([signature, answer], -1)  # [B, M, C]
        if M > N:
            # half of the distractors are a response without a signature
            full[:, N::2, :SIGNATURE] = math.nan
        return signature, cue, answer, full

    @staticmethod
    def _channel_moments(
        draws: Draws, n: int, config: XcbConfig
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        M, C = config.items + config.distractors, config.channels
        gen = draws("keys")
        # (channel, level) pairs that differ, so that every question has one answer
        K = config.levels
        cells = permutations(gen, n, C * K)
        if M > C * K:
            raise ValueError(f"{C} channels at {K} levels give {C * K} keys. Got {M} moments.")
        source, level = cells[:, :M] // K, cells[:, :M] % K  # 2 x [B, M]
        other = (source + torch.randint(1, C, source.shape, generator=gen)) % C  # [B, M]
        amount = (LOUD + level / (K - 1)) * torch.where(level % 2 == 0, 1.0, -1.0)  # [B, M]
        answer = payloads(draws("payloads"), (n, M, 1))  # [B, M, 1]
        if config.loud:
            answer = answer + LOUD * answer.sign()
        cue = torch.full((n, M, C), math.nan).scatter(2, source[..., None], amount[..., None])  # [B, M, C]
        full = cue.scatter(2, other[..., None], answer)  # [B, M, C]
        hot = torch.nn.functional.one_hot(source * LEVELS + level, C * LEVELS).float()  # [B, M, C levels]
        return hot, cue, answer, full

    @staticmethod
    def _render(
        canvas: Canvas, config: XcbConfig, draws: Draws, *, rows: torch.Tensor, cue: torch.Tensor, full: torch.Tensor
    ) -> None:
        parts = [(rows, full)]
        if config.lag:
            late = full.masked_fill(~cue.isnan(), math.nan)
            parts = [(rows, cue), (rows + config.lag, late)]
        batch = torch.arange(canvas.n)[:, None]
        for place, content in parts:
            under = canvas.x[batch, place]  # [B, M, C] carrier where nothing fires
            fill(canvas.x, place, torch.where(content.isnan(), under, content))
        if config.flag:
            canvas.flag(rows, "ev")
            canvas.tagged = fill(canvas.tagged, rows, torch.ones_like(rows, dtype=torch.bool))

    @staticmethod
    def _ask(
        canvas: Canvas, config: XcbConfig, draws: Draws, *, q_index: torch.Tensor, cue: torch.Tensor, keys: torch.Tensor
    ) -> None:
        noise = torch.randn(cue.shape, generator=draws("query noise")) * config.kappa * RADIUS  # [B, Q, C]
        fill(canvas.x, q_index, cue + noise / math.sqrt(SIGNATURE))
        canvas.flag(q_index, "q_flag")
        canvas.bind(q_index, keys, torch.zeros(*keys.shape[:2], canvas.value.shape[-1]))
