"""frontier: what a byte of memory buys, and how one budget is shared by services of different noise.

The grid (budgets x routers x suites) is run by the runner over the other suites; this probe adds the allocation task:
services report in turn, some are noisy, and the total budget equals the number of items.

B sequences · T context rows · S services · N items · Q queries
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from probes.canvas import Canvas, code_names, query_rows, take
from probes.contract import ProbeBatch, ProbeConfig
from probes.draws import TYPES, choose_rows, codes, fill, payloads, permutations
from probes.registry import Probe, register_probe

BUDGET_FRACTIONS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
GRID_SUITES = ("der", "derD", "xcb", "rrr", "act", "pbcD")
STATE_WIDTHS = (4, 8, 16)
VALUE_WIDTH = 2


@dataclass(frozen=True, kw_only=True)
class FrontierConfig(ProbeConfig):
    """Axes of the allocation task.

    Attributes:
        counts: items of each service; they add up to ``items``.
        noises: standard deviation of each service's rows.
    """

    items: int = 32
    counts: tuple[int, ...] = (1, 1, 2, 2, 4, 6, 8, 8)
    noises: tuple[float, ...] = (0.05, 0.8, 0.05, 0.8, 0.05, 0.8, 0.05, 0.8)

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.counts) != self.items or len(self.counts) != len(self.noises):
            raise ValueError(
                f"counts must add up to items, one noise each. Got {sum(self.counts)} items of {self.items}, "
                f"{len(self.counts)} counts and {len(self.noises)} noises."
            )
        self.need_rows(2 * self.items, "Items")


@register_probe("frontier", version=1, slot="fixed-budget hierarchy")
class BudgetFrontier(Probe):
    Config = FrontierConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {"alloc": {}}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "smoke": {"items": 16, "counts": (1, 1, 1, 1, 2, 2, 4, 4), "queries": 16},
        "small": {"items": 32, "queries": 32, "context_rows": 1024},
        "standard": {"items": 32, "queries": 32},
        "long": {"items": 32, "queries": 32},
    }
    cannot: ClassVar[Mapping[str, str]] = {"alloc G5": "one seed of five does not read its list, the other four do"}
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {"noises": ((0.05,) * 8, (0.05, 0.8) * 4, (0.8,) * 8)}

    def shrunk(self, config: ProbeConfig, parts: int) -> ProbeConfig:
        """The same services, each with fewer items, one at least."""
        assert isinstance(config, FrontierConfig)
        counts = tuple(max(count // parts, 1) for count in config.counts)
        return replace(
            config, context_rows=config.context_rows // parts, items=sum(counts), counts=counts,
            queries=max(config.queries // parts, 1),
        )  # fmt: skip

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        assert isinstance(config, FrontierConfig)
        draws = config.draws(gen)
        N, T, S = config.items, config.context_rows, len(config.counts)
        table = codes(config.code)  # [K, G]
        service = torch.repeat_interleave(torch.arange(S), torch.tensor(config.counts))  # [N]
        reporter = (torch.arange(T) + torch.randint(S, (n, 1), generator=draws("reporters"))) % S  # [B, T]
        rows = torch.zeros(n, N, dtype=torch.int64)
        positions = draws("positions")
        for number, count in enumerate(config.counts):
            mine = service == number  # [N]
            rows[:, mine] = choose_rows(positions, reporter == number, count)
        noise = torch.tensor(config.noises)[reporter]  # [B, T]
        background = noise[..., None] * torch.randn(n, T, VALUE_WIDTH, generator=draws("carrier"))  # [B, T, 2]
        payload = payloads(draws("payloads"), (n, N, VALUE_WIDTH))  # [B, N, 2]
        types = permutations(draws("keys"), n, TYPES)[:, :N]  # [B, N]
        asked = permutations(draws("queries"), n, N)[:, : min(N, config.queries)]  # [B, Q]
        Q = asked.shape[1]
        names = ("ev", "q_flag", *code_names(table.shape[1]), *code_names(S, "service"))
        canvas = Canvas(
            config, draws, n, channels=VALUE_WIDTH, event_names=names, key_width=table.shape[1],
            value_width=VALUE_WIDTH, query_rows=Q, background=background,
        )  # fmt: skip
        every = torch.arange(T).expand(n, T)
        canvas.code(every, torch.nn.functional.one_hot(reporter, S).float(), "service_0")
        # a state that knows who reports: rows of a service share a key
        canvas.bind(every, torch.eye(S)[reporter] @ torch.eye(S, table.shape[1]), background)
        fill(canvas.x, rows, payload)
        canvas.flag(rows, "ev")
        canvas.code(rows, table[types])
        fill(canvas.event_id, rows, types)
        canvas.tagged = fill(canvas.tagged, rows, torch.ones_like(rows, dtype=torch.bool))
        canvas.bind(rows, table[types], payload)
        canvas.mark_critical(rows, torch.arange(N).expand(n, N), slice(None))
        q_index = query_rows(n, T, Q)  # [B, Q]
        canvas.flag(q_index, "q_flag")
        canvas.code(q_index, table[take(types, asked)])
        canvas.bind(q_index, table[take(types, asked)], torch.zeros(n, Q, VALUE_WIDTH))
        y = take(payload, asked)  # [B, Q, 2]
        latest = rows.argmax(1, keepdim=True)  # [B, 1]
        return canvas.batch(
            q_index=q_index, q_item=asked, y=y, need=take(rows, asked)[..., None], x_names=("ch_0", "ch_1"), items=N,
            floor={
                "set_mean": payload.mean(1, keepdim=True).expand_as(y),
                "last_event": take(payload, latest).expand_as(y),
            },
            slices={"service": service[asked]}, extra={"reporter": reporter},
        )  # fmt: skip
