"""der: delayed event recall. An event of some type carried a payload once; later its type is asked.

The slice ``exo``: an exogenous driver, not a target channel, makes a step that is seen once and needed later.

B sequences · T context rows · C channels · N items · W writes · Q queries · K types
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

MARGIN = 5
EXO_HOLD_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class DerConfig(ProbeConfig):
    """Axes of der.

    Attributes:
        delay: None draws rows uniformly; a number puts all items at about that age.
        distractors, decoy_amplitude: rows with a burst that is never asked about.
        decoy_flag: ``on`` (a flag of its own), ``off``, or ``same`` (the items' own flag, with types never asked).
        updates: how many items get a second payload.
        visits: payloads per type; ``ask``: ``last``, ``first`` or ``mean`` of them, or ``ordinal``: the one whose
            number the query names.
        payload_width, channels: more than two channels carry the payload on a random pair, named in the key.
        render: ``replace`` the carrier, ``add`` to it, or ``kernel`` (spread over ``kernel_rows``).
        exo: the payload is the step of an exogenous driver.
    """

    delay: int | None = None
    distractors: int = 0
    decoy_amplitude: float = 4.0
    decoy_flag: str = "on"
    updates: int = 0
    visits: int = 1
    ask: str = "last"
    payload_width: int = 2
    channels: int = 2
    render: str = "replace"
    kernel_rows: int = 3
    exo: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("decoy_flag", ("on", "off", "same")),
            ("ask", ("last", "first", "mean", "ordinal")),
            ("render", ("replace", "add", "kernel")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"Unknown {name} {getattr(self, name)!r}. Available: {list(known)}.")
        if self.payload_width > self.channels:
            raise ValueError(f"payload_width must not exceed channels. Got {self.payload_width} > {self.channels}.")
        if self.items + (self.distractors if self.decoy_flag == "same" else 0) > TYPES:
            raise ValueError(f"There are {TYPES} types. Got {self.items} items with {self.distractors} distractors.")
        rows = self.items * self.visits + self.updates + self.distractors
        self.need_rows(rows * (EXO_HOLD_ROWS + 1 if self.exo else 1) + MARGIN, "Items and distractors")


@dataclass(frozen=True)
class Plan:
    """What happens when, fixed before anything is rendered."""

    rows: torch.Tensor  # [B, W]
    item: torch.Tensor  # [B, W]
    payload: torch.Tensor  # [B, W, p]
    types: torch.Tensor  # [B, N]
    asked: torch.Tensor  # [B, Q] items
    answer: torch.Tensor  # [B, N, p]
    need: torch.Tensor  # [B, N, R]
    number: torch.Tensor  # [B, N] which of an item's payloads is asked, where it is asked by its number


@register_probe("der", version=1, slot="streaming state")
class DelayedEventRecall(Probe):
    Config = DerConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "der": {},
        "derD": {"distractors": 12},
        "exo": {"exo": True, "channels": 4},
    }
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"smoke": {}}
    quick = ("der", "derD", "exo")
    cannot: ClassVar[Mapping[str, str]] = {
        "derD G2": "two seeds of five of a state do not answer, the other three have 0.82 to 0.88",
        "derD G5": "one seed of five does not read its list, the other four have 0.86 or more",
    }
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "delay": (16, 64, 256, 1024, 4096),
        "items": (4, 8, 16, 32, 64),
        "distractors": (0, 8, 16, 64),
        "decoy_amplitude": (4.0, 2.0, 8.0),
        "decoy_flag": ("on", "off", "same"),
        "noise": (0.0, 0.1, 0.2, 0.5, 1.0),
        "updates": (0, 8, 32),
        "visits": (1, 2, 4),
        "ask": ("last", "first", "mean", "ordinal"),
        "render": ("replace", "add", "kernel"),
        "payload_width": (1, 2, 8),
        "channels": (2, 8, 32),
        "jitter": (0.0, 0.3),
        "missing": (0.0, 0.1, 0.3),
        "carrier": ("season", "ar", "walk", "gp", "chaos"),
    }
    matched_flags = False
    flags_note = "decoys carry a flag of their own (decoy_flag='same' matches the flags)"

    def config(self, preset: str = "smoke", rung: str | None = None, **overrides: Any) -> ProbeConfig:
        if rung == "derD" and "distractors" not in overrides:
            # as many decoys as items, whatever the size
            overrides["distractors"] = overrides.get("items", super().config(preset).items)
        # a payload needs as many channels as it has numbers
        if overrides.get("payload_width", 0) > 2:
            overrides.setdefault("channels", overrides["payload_width"])
        return super().config(preset, rung, **overrides)

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        assert isinstance(config, DerConfig)
        draws = config.draws(gen)
        plan = self._plan(draws, n, config)
        table = codes(config.code)  # [K, G]
        pairs = config.channels // 2 if config.channels > 2 and not config.exo else 0
        ordinal = ("ordinal",) if config.ask == "ordinal" else ()
        names = ("ev", "q_flag", "decoy_flag", *ordinal, *code_names(table.shape[1]), *code_names(pairs, "pair"))
        Q = plan.asked.shape[1]
        canvas = Canvas(
            config, draws, n, channels=config.channels, event_names=names, key_width=table.shape[1],
            value_width=config.payload_width, query_rows=Q,
        )  # fmt: skip
        pair = torch.zeros(n, config.items, dtype=torch.int64)  # [B, N]
        if pairs:
            pair = torch.randint(pairs, pair.shape, generator=draws("pairs"))
        self._render(canvas, config, plan, table, pair)
        self._decoys(canvas, draws, config, plan, table)
        q_index = query_rows(n, canvas.T, Q)  # [B, Q]
        asked = table[take(plan.types, plan.asked)]  # [B, Q, G]
        canvas.flag(q_index, "q_flag")
        canvas.code(q_index, asked)
        canvas.bind(q_index, asked, torch.zeros(n, Q, config.payload_width))
        if ordinal:
            canvas.flag(q_index, "ordinal", (take(plan.number, plan.asked) + 1.0) / config.visits)
        if pairs:
            chosen = torch.nn.functional.one_hot(take(pair, plan.asked), pairs).float()  # [B, Q, pairs]
            canvas.code(q_index, chosen, "pair_0")
        y = take(plan.answer, plan.asked)  # [B, Q, p]
        need = take(plan.need, plan.asked)  # [B, Q, R]
        return canvas.batch(
            q_index=q_index, q_item=plan.asked, y=y, need=need, items=config.items, key_direct=config.ask == "last",
            x_names=self._channel_names(config), need_role=("item",) * need.shape[-1],
            floor=self._floors(canvas, plan, y),
        )  # fmt: skip

    @staticmethod
    def _channel_names(config: DerConfig) -> tuple[str, ...]:
        if config.exo:
            return tuple(f"ch_{number}" for number in range(2)) + tuple(
                f"exo_{number}" for number in range(config.channels - 2)
            )
        return tuple(f"ch_{number}" for number in range(config.channels))

    @staticmethod
    def _plan(draws: Draws, n: int, config: DerConfig) -> Plan:
        N, p, T = config.items, config.payload_width, config.context_rows
        repeats = N * config.visits
        W = repeats + config.updates
        allowed = torch.ones(n, T, dtype=torch.bool)
        allowed[:, T - MARGIN :] = False
        hold = EXO_HOLD_ROWS + 1 if config.exo else 1
        if config.delay is not None:
            low, high = max(T - 2 * config.delay, 0), max(T - config.delay // 2, W * hold + 1)
            allowed[:, :low] = False
            allowed[:, high:] = False
        if hold > 1:
            # steps of a driver must not run into one another
            grid = torch.zeros_like(allowed)
            offset = torch.randint(hold, (n, 1), generator=draws("grid"))  # [B, 1]
            grid[(torch.arange(T)[None] % hold) == offset] = True
            allowed &= grid
        rows = choose_rows(draws("positions"), allowed, W)  # [B, W]
        item = torch.arange(N).repeat(config.visits).expand(n, repeats)  # [B, N m]
        second = permutations(draws("updates"), n, N).repeat(1, -(-config.updates // N) or 1)[:, : config.updates]
        item = torch.cat([item, second], 1)  # [B, W]
        payload = payloads(draws("payloads"), (n, W, p))  # [B, W, p]
        number = torch.randint(config.visits, (n, N), generator=draws("ordinals"))  # [B, N]
        answer, need = answers(rows, item, payload, items=N, ask=config.ask, number=number)
        types = permutations(draws("keys"), n, TYPES)[:, :N]  # [B, N]
        asked = permutations(draws("queries"), n, N)[:, : min(N, config.queries)]  # [B, Q]
        return Plan(rows, item, payload, types, asked, answer, need, number)

    @staticmethod
    def _render(canvas: Canvas, config: DerConfig, plan: Plan, table: torch.Tensor, pair: torch.Tensor) -> None:
        p = config.payload_width
        code = table[take(plan.types, plan.item)]  # [B, W, G]
        place = pair if config.channels > 2 and not config.exo else torch.zeros_like(pair)
        first = 2 if config.exo else 0
        columns = first + 2 * take(place, plan.item)[..., None] + torch.arange(p)  # [B, W, p]
        if p > 2:
            columns = torch.arange(p).expand_as(columns)  # a wide payload takes the first p channels
        spread = EXO_HOLD_ROWS if config.exo else config.kernel_rows if config.render == "kernel" else 1
        batch = torch.arange(canvas.n)[:, None, None]
        if config.exo:
            # a driver at rest is known to be 0: only the step shows
            canvas.x[:, : canvas.T, 2:] = 0.0
        for row in range(spread):
            rows = (plan.rows + row)[..., None]  # [B, W, 1]
            size = plan.payload * (math.exp(-row / 2) if config.render == "kernel" and not config.exo else 1.0)
            old = canvas.x[batch, rows, columns] if config.render != "replace" and not config.exo else 0.0
            canvas.x[batch, rows, columns] = old + size
        if not config.exo:
            canvas.flag(plan.rows, "ev")
            canvas.tagged = fill(canvas.tagged, plan.rows, torch.ones_like(plan.rows, dtype=torch.bool))
        canvas.code(plan.rows, code)
        if config.channels > 2 and not config.exo:
            canvas.code(plan.rows, torch.nn.functional.one_hot(take(pair, plan.item), config.channels // 2), "pair_0")
        fill(canvas.event_id, plan.rows, take(plan.types, plan.item))
        canvas.bind(plan.rows, code, plan.payload)
        needed = plan.need.flatten(1)  # [B, N R]
        owner = torch.arange(config.items)[:, None].expand(plan.need.shape[1:]).reshape(1, -1).expand_as(needed)
        canvas.mark_critical(needed, owner, slice(first, first + p))

    @staticmethod
    def _decoys(canvas: Canvas, draws: Draws, config: DerConfig, plan: Plan, table: torch.Tensor) -> None:
        D, p = config.distractors, config.payload_width
        if D == 0:
            return
        free = canvas.free_rows(MARGIN)  # [B, T]
        taken = fill(torch.zeros_like(canvas.crit), plan.rows, torch.ones_like(plan.rows, dtype=torch.bool))
        rows = choose_rows(draws("distractor rows"), free & ~taken[:, : canvas.T], D)  # [B, D]
        sign = torch.where(torch.rand(canvas.n, D, p, generator=draws("distractors")) < 0.5, -1.0, 1.0)
        size = config.decoy_amplitude * uniform(draws("distractor sizes"), (canvas.n, D, p), 0.875, 1.125)
        burst = sign * size  # [B, D, p]
        fill(canvas.x[..., :p], rows, burst)
        fill(canvas.distract, rows, torch.ones_like(rows, dtype=torch.bool))
        key = canvas.key.gather(1, rows[..., None].expand(-1, -1, canvas.key.shape[-1]))  # [B, D, G]
        if config.decoy_flag == "same":
            unused = permutations(draws("keys"), canvas.n, TYPES)[:, config.items : config.items + D]  # [B, D]
            canvas.flag(rows, "ev")
            canvas.code(rows, table[unused])
            canvas.tagged = fill(canvas.tagged, rows, torch.ones_like(rows, dtype=torch.bool))
            key = table[unused]
        elif config.decoy_flag == "on":
            canvas.flag(rows, "decoy_flag")
        canvas.bind(rows, key, burst)

    @staticmethod
    def _floors(canvas: Canvas, plan: Plan, y: torch.Tensor) -> dict[str, torch.Tensor]:
        latest = plan.rows.argmax(1, keepdim=True)  # [B, 1]
        p = y.shape[-1]
        last_value = canvas.x[:, canvas.T - 1, None, :p].nan_to_num()  # [B, 1, p]
        return {
            "set_mean": plan.answer.mean(1, keepdim=True).expand_as(y),
            "last_event": take(plan.payload, latest).expand_as(y),
            "last_value": last_value.expand_as(y),
        }


def answers(
    rows: torch.Tensor, item: torch.Tensor, payload: torch.Tensor, *, items: int, ask: str, number: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each item's question is answered by, [B, N, p], and the rows it needs, [B, N, R] (-1 for none).

    Args:
        number: of the payload that ``ordinal`` asks for, the oldest first, [B, N].
    """
    mine = item[:, None] == torch.arange(items)[None, :, None]  # [B, N, W]
    when = torch.where(mine, rows[:, None], -1)  # [B, N, W]
    if ask == "mean":
        weight = mine.to(payload) / mine.sum(-1, keepdim=True)  # [B, N, W]
        order = when.sort(-1, descending=True).values  # [B, N, W]
        return weight @ payload, order[..., : int(mine.sum(-1).max())]
    ahead = torch.where(mine, rows[:, None], 2**40)  # [B, N, W]
    if ask == "ordinal":
        choice = ahead.argsort(-1).gather(-1, number[..., None])[..., 0]  # [B, N]
    else:
        choice = when.argmax(-1) if ask == "last" else ahead.argmin(-1)  # [B, N]
    return take(payload, choice), take(rows, choice)[..., None]
