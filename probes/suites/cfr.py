"""cfr: counterfactual rollout. Each action was exercised far back; which of several plans does what from here on?

x_{t+1} = A x_t + sum_k g_k f(u_{k, t - lag_k}) + season_t + eps, with gains g_k of each sequence's own.

B sequences · T context rows · C channels · K actions · H horizon rows · M plans (queries) · N noise draws
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from probes.canvas import Canvas, code_names, query_rows, take
from probes.contract import Draws, ProbeBatch, ProbeConfig, generator
from probes.draws import TYPES, codes, fill, permutations, segments, uniform
from probes.registry import Probe, register_probe

CHANNELS = 4
LAGS = 4
EFFECT_ROWS = 8
RADIUS = 0.9
# keeps channels near unit scale
GAIN = 1.2
DYNAMICS_SEED = 4_107
SEASON_ROWS = 24
PLANS = ("none", "dose -1", "dose 0.5", "dose 1", "dose 2", "other", "shifted", "both")
DOSES = (0.0, -1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 1.0)
SHIFT_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class CfrConfig(ProbeConfig):
    """Axes of cfr; ``items`` is the number of actions K.

    Attributes:
        shots: times that each action is exercised.
        delay_rows: between the exercises and the question; half of the context if None.
        horizon: H.
        gamma: of the logging policy; 0 exercises at random doses, more lets the level decide (confounding).
        response: f, ``identity`` or ``tanh``.
        dynamics: ``shared`` (one A for all sequences) or ``own``.
        placebo: share of the actions without an effect.
        reward: a column with the momentary reward, and the plans' rewards as a part of the answer.
    """

    items: int = 6
    noise: float = 0.1
    shots: int = 1
    delay_rows: int | None = None
    horizon: int = 24
    gamma: float = 0.0
    response: str = "identity"
    dynamics: str = "shared"
    placebo: float = 0.0
    reward: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.response not in ("identity", "tanh") or self.dynamics not in ("shared", "own"):
            raise ValueError(
                "response must be identity or tanh, dynamics shared or own. Got"
                f" {self.response!r} and {self.dynamics!r}."
            )
        if not 2 <= self.items <= TYPES:
            raise ValueError(f"There are 2 to {TYPES} actions. Got {self.items}.")
        if self.items * self.shots * self.slot_rows > self.context_rows - self.delay:
            raise ValueError(
                f"{self.items} actions x {self.shots} shots need {self.items * self.shots * self.slot_rows} rows"
                f" before the delay. Got {self.context_rows - self.delay}. Ask for fewer, or a shorter delay."
            )

    @property
    def delay(self) -> int:
        return self.context_rows // 2 if self.delay_rows is None else self.delay_rows

    @property
    def slot_rows(self) -> int:
        return LAGS + 1

    @property
    def answers(self) -> int:
        return self.horizon * CHANNELS + (1 if self.reward else 0)


@dataclass(frozen=True)
class World:
    """The truth of each sequence."""

    dynamics: torch.Tensor  # [B, C, C]
    gain: torch.Tensor  # [B, K, C]
    lag: torch.Tensor  # [B, K] int64, 1 .. 4
    phase: torch.Tensor  # [B, C]
    aim: torch.Tensor  # [B, C] where the level should be
    linear: bool


@register_probe("cfr", version=1, slot="control and counterfactuals")
class CounterfactualRollout(Probe):
    Config = CfrConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {"cfr": {}, "cfrC": {"gamma": 2.0}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"items": 6, "queries": len(PLANS)} for name in ("smoke", "small", "standard", "long")
    }
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "items": (2, 6, 12),
        "shots": (1, 2, 4),
        "gamma": (0.0, 1.0, 2.0, 4.0),
        "response": ("identity", "tanh"),
        "dynamics": ("shared", "own"),
        "placebo": (0.0, 0.3),
        "delay_rows": (32, 64, 128),
        "noise": (0.0, 0.1, 0.3),
    }
    echo_rows = 1
    # with the minutes of a GPU that there were when it was first trained at small
    quick = ("cfr", "cfrC")
    cannot: ClassVar[Mapping[str, str]] = {
        "cfr G1": "seeds learn half of the effects or a tenth of them in 1,500 steps; more were not tried",
    }

    def shrunk(self, config: ProbeConfig, parts: int) -> ProbeConfig:
        """Two actions at least: one is asked, another is the other plan's."""
        assert isinstance(config, CfrConfig)
        delay = None if config.delay_rows is None else config.delay_rows // parts
        return replace(
            config, context_rows=config.context_rows // parts, items=max(config.items // parts, 2), delay_rows=delay
        )

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        assert isinstance(config, CfrConfig)
        draws = config.draws(gen)
        K, T, H = config.items, config.context_rows, config.horizon
        world = make_world(draws, n, config)
        shocks = config.noise * torch.randn(n, T + H, CHANNELS, generator=draws("carrier"))  # [B, T + H, C]
        rows, action = self._logged(draws, n, config)  # 2 x [B, K shots]
        free = simulate(world, torch.zeros(n, T + H, K), shocks)  # [B, T + H, C]
        dose = self._doses(draws, config, rows, free)  # [B, K shots]
        control = torch.zeros(n, T + H, K)  # [B, T + H, K]
        batch = torch.arange(n)[:, None]
        control[batch, rows, action] = dose
        base = simulate(world, control, shocks)  # [B, T + H, C]
        wanted, other = self._asked(draws, n, K)  # 2 x [B]
        plans = plan_controls(wanted, other, T, H, K)  # [B, M, T + H, K]
        M = plans.shape[1]
        with_plan = torch.stack([simulate(world, control + plans[:, m], shocks) for m in range(M)], 1)
        effect = (with_plan - base[:, None])[:, :, T:]  # [B, M, H, C] with the same noise: unit level
        reward = self._reward(world, with_plan[:, :, T:]) - self._reward(world, base[:, None, T:])  # [B, M]
        recent = take(action, rows.argmax(1, keepdim=True))[:, 0]  # [B]
        once = torch.zeros(n, T + H, K)
        once[torch.arange(n), T, recent] = 1.0
        again = (simulate(world, control + once, shocks) - base)[:, T:]  # [B, H, C] of the last action
        canvas = self._canvas(config, draws, base, world, M)
        self._render(canvas, config, draws, rows=rows, action=action, dose=dose, lag=take(world.lag, action))
        return self._ask(canvas, config, wanted=wanted, other=other, effect=effect, reward=reward, rows=rows,
                         action=action, base=base[:, T:], world=world, again=again)  # fmt: skip

    @staticmethod
    def _logged(draws: Draws, n: int, config: CfrConfig) -> tuple[torch.Tensor, torch.Tensor]:
        W = config.items * config.shots
        rows = segments(draws("positions"), n, count=W, width=config.slot_rows, rows=config.context_rows - config.delay)
        return rows, permutations(draws("order"), n, W) % config.items

    @staticmethod
    def _doses(draws: Draws, config: CfrConfig, rows: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """Random doses, or doses that follow the level before them."""
        if config.gamma == 0:
            return uniform(draws("doses"), tuple(rows.shape), 0.5, 1.5)
        before = take(free, (rows - 1).clamp_min(0)).mean(-1)  # [B, W]
        return 0.5 + torch.sigmoid(config.gamma * (before - free.mean((1, 2))[:, None]) * 4.0)

    @staticmethod
    def _asked(draws: Draws, n: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = permutations(draws("queries"), n, K)  # [B, K]
        return order[:, 0], order[:, 1]

    @staticmethod
    def _reward(world: World, path: torch.Tensor) -> torch.Tensor:
        """Mean over the horizon of minus the distance from the aim: path [B, M, H, C] -> [B, M]."""
        return -(path - world.aim[:, None, None]).square().mean(-1).sqrt().mean(-1)

    @staticmethod
    def _canvas(config: CfrConfig, draws: Draws, base: torch.Tensor, world: World, M: int) -> Canvas:
        T, n = config.context_rows, len(base)
        channels = CHANNELS + (1 if config.reward else 0)
        background = base[:, :T]
        if config.reward:
            now = -(background - world.aim[:, None]).square().mean(-1, keepdim=True).sqrt()  # [B, T, 1]
            background = torch.cat([background, now], -1)
        table = codes(config.code)
        names = ("ev", "q_flag", "both", *code_names(table.shape[1]), *code_names(table.shape[1], "to"))
        return Canvas(
            config, draws, n, channels=channels, event_names=names, action_names=("dose", "wait"),
            key_width=table.shape[1], value_width=CHANNELS, query_rows=M, background=background,
        )  # fmt: skip

    @staticmethod
    def _render(
        canvas: Canvas,
        config: CfrConfig,
        draws: Draws,
        *,
        rows: torch.Tensor,
        action: torch.Tensor,
        dose: torch.Tensor,
        lag: torch.Tensor,
    ) -> None:
        table = codes(config.code)
        ones = torch.ones_like(rows, dtype=torch.bool)
        canvas.flag(rows, "ev")
        canvas.code(rows, table[action])
        fill(canvas.actions[..., 0], rows, dose)
        fill(canvas.event_id, rows, action)
        canvas.tagged = fill(canvas.tagged, rows, ones)
        canvas.mark_critical(rows, action)
        for row in range(EFFECT_ROWS):
            after = (rows + lag + row).clamp_max(canvas.T - 1)
            canvas.mark_critical(after, action, slice(0, CHANNELS))
        canvas.bind(rows, table[action], torch.zeros(*rows.shape, CHANNELS))

    def _ask(
        self,
        canvas: Canvas,
        config: CfrConfig,
        *,
        wanted: torch.Tensor,
        other: torch.Tensor,
        effect: torch.Tensor,
        reward: torch.Tensor,
        rows: torch.Tensor,
        action: torch.Tensor,
        base: torch.Tensor,
        world: World,
        again: torch.Tensor,
    ) -> ProbeBatch:
        n, M = effect.shape[:2]
        table = codes(config.code)
        first = torch.where(torch.arange(M) == PLANS.index("other"), other[:, None], wanted[:, None])  # [B, M]
        q_index = query_rows(n, canvas.T, M)  # [B, M]
        canvas.flag(q_index, "q_flag")
        canvas.code(q_index, table[first])
        both = q_index[:, PLANS.index("both") :]  # [B, 1]
        canvas.flag(both, "both")
        canvas.code(both, table[other][:, None], "to_0")
        fill(canvas.actions[..., 0], q_index, torch.tensor(DOSES).expand(n, M))
        wait = torch.zeros(M)
        wait[PLANS.index("shifted")] = SHIFT_ROWS / 4.0
        fill(canvas.actions[..., 1], q_index, wait.expand(n, M))
        canvas.bind(q_index, table[first], torch.zeros(n, M, CHANNELS))
        y = effect.flatten(2)  # [B, M, H C]
        if config.reward:
            y = torch.cat([y, reward[..., None]], -1)  # [B, M, H C + 1]
        mine = action[:, None] == first[..., None]  # [B, M, W]
        choice = torch.where(mine, rows[:, None], -1).argmax(-1)  # [B, M]
        row = take(rows, choice)  # [B, M]
        need = torch.stack([row, row + take(world.lag, take(action, choice))], -1)  # [B, M, 2]
        mask = torch.ones_like(y, dtype=torch.bool)
        # doing nothing changes nothing: a plan to choose, not a question to score
        mask[:, PLANS.index("none")] = False
        names = tuple(f"ch_{number}" for number in range(CHANNELS)) + (("reward",) if config.reward else ())
        return canvas.batch(
            q_index=q_index, q_item=first, y=y, y_mask=mask, need=need, x_names=names, items=config.items,
            need_role=("action", "effect"), key_direct=False,
            floor={"zero_effect": torch.zeros_like(y), "last_action": self._recent(y, again)},
            slices={"plan": torch.arange(M).expand(n, M).contiguous()},
            extra={"baseline": base, "aim": world.aim, "gain": world.gain, "lag": world.lag,
                   "linear": torch.full((n,), world.linear)},
        )  # fmt: skip

    @staticmethod
    def _recent(y: torch.Tensor, again: torch.Tensor) -> torch.Tensor:
        """The effect of the most recent action, at each plan's dose, whatever action the plan takes."""
        scaled = torch.tensor(DOSES)[:, None] * again.flatten(1)[:, None]  # [B, M, H C]
        return torch.cat([scaled, torch.zeros_like(y[..., scaled.shape[-1] :])], -1)


def make_world(draws: Draws, n: int, config: CfrConfig) -> World:
    """Gains, lags and dynamics of each sequence."""
    K = config.items
    gen = draws("payloads")
    gain = GAIN * torch.randn(n, K, CHANNELS, generator=gen)  # [B, K, C]
    sparse = torch.rand(n, K, CHANNELS, generator=gen)
    gain = gain * (sparse >= sparse.median(-1, keepdim=True).values)  # half of the channels or more
    gain = gain * (torch.rand(n, K, 1, generator=draws("placebo")) >= config.placebo)
    source = draws("dynamics") if config.dynamics == "own" else generator(DYNAMICS_SEED)
    count = n if config.dynamics == "own" else 1
    rotation = torch.linalg.qr(torch.randn(count, CHANNELS, CHANNELS, generator=source)).Q  # [B or 1, C, C]
    # a rotation shrunk by the radius: stable, and without the transient growth of a matrix that is not normal
    dynamics = RADIUS * rotation  # [B or 1, C, C]
    lag = torch.randint(1, LAGS + 1, (n, K), generator=draws("lags"))  # [B, K]
    phase = uniform(draws("season"), (n, CHANNELS), 0.0, 2 * math.pi)
    aim = torch.randn(n, CHANNELS, generator=draws("aim"))
    return World(dynamics.expand(n, -1, -1), gain, lag, phase, aim, config.response == "identity")


def simulate(world: World, control: torch.Tensor, shocks: torch.Tensor) -> torch.Tensor:
    """Run the system from rest: control [B, L, K], shocks [B, L, C] -> [B, L, C]."""
    n, L, K = control.shape
    dose = control if world.linear else torch.tanh(control)  # [B, L, K]
    late = torch.zeros(n, L + LAGS, K)
    for lag in range(1, LAGS + 1):
        late[:, lag : lag + L] += dose * (world.lag == lag)[:, None]
    push = late[:, :L] @ world.gain  # [B, L, C]
    angle = 2 * math.pi * torch.arange(L)[:, None] / SEASON_ROWS + world.phase[:, None]  # [B, L, C]
    drive = push + 0.2 * torch.sin(angle) + shocks  # [B, L, C]
    level, out = torch.zeros(n, drive.shape[-1]), []
    for row in drive.unbind(1):
        level = torch.einsum("bij,bj->bi", world.dynamics, level) + row  # [B, C]
        out.append(level)
    return torch.stack(out, 1)


def plan_controls(wanted: torch.Tensor, other: torch.Tensor, T: int, H: int, K: int) -> torch.Tensor:
    """What each plan of ``PLANS`` adds to the control, [B, M, T + H, K]; plans start at row T."""
    n, M = len(wanted), len(PLANS)
    control = torch.zeros(n, M, T + H, K)
    batch = torch.arange(n)
    for m, (plan, dose) in enumerate(zip(PLANS, DOSES, strict=True)):
        row = T + (SHIFT_ROWS if plan == "shifted" else 0)
        control[batch, m, row, other if plan == "other" else wanted] = dose
        if plan == "both":
            control[batch, m, row, other] = dose
    return control


def plan_regret(predicted: torch.Tensor, batch: ProbeBatch, horizon: int, *, by: str = "cost") -> torch.Tensor:
    """Value lost by choosing on predicted effects, over best minus worst, [B]; 0 is the best plan, 1 the worst.

    Args:
        predicted: answers, [B, M, Y].
        by: ``cost`` (mean squared distance of the known baseline plus the predicted effect from the aim) or
            ``reward`` (the predicted change of the reward column).
    """
    size = horizon * CHANNELS
    if by == "reward":
        if batch.y.shape[-1] == size:
            raise ValueError("These sequences have no reward column. Sample them with reward=True.")
        truth = batch.y[..., size]  # [B, M]
        guess = predicted[..., size].clone()  # [B, M]
        guess[:, PLANS.index("none")] = 0.0
    else:
        truth = _value(batch.y[..., :size], batch, horizon)  # [B, M]
        change = predicted[..., :size].clone()
        change[:, PLANS.index("none")] = 0.0
        guess = _value(change, batch, horizon)
    best, worst = truth.amax(1), truth.amin(1)  # 2 x [B]
    chosen = truth.gather(1, guess.argmax(1, keepdim=True))[:, 0]  # [B]
    return (best - chosen) / (best - worst).clamp_min(1e-9)


def _value(effect: torch.Tensor, batch: ProbeBatch, horizon: int) -> torch.Tensor:
    path = batch.extra["baseline"][:, None] + effect.unflatten(-1, (horizon, CHANNELS))  # [B, M, H, C]
    return -(path - batch.extra["aim"][:, None, None]).square().mean(-1).mean(-1)


def effect_by_tau(predicted: torch.Tensor, batch: ProbeBatch, horizon: int) -> torch.Tensor:
    """Effect error at each tau = 1 .. H against the zero-effect floor (NMSE), [H]; NaN before any effect sets in."""
    size = horizon * CHANNELS
    asked = batch.asked[..., None, None]
    truth = batch.y[..., :size].unflatten(-1, (horizon, CHANNELS))  # [B, M, H, C]
    guess = predicted[..., :size].unflatten(-1, (horizon, CHANNELS))
    error = ((guess - truth).square() * asked).sum((0, 1, 3))  # [H]
    size_of = (truth.square() * asked).sum((0, 1, 3))  # [H]
    # the lag of an action is one row or more: nothing to explain before it
    return torch.where(size_of > 1e-6 * size_of.amax(), error / size_of.clamp_min(1e-12), torch.nan)
