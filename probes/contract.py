"""What every probe produces and how it is seeded. A change of meaning here is a new ``CONTRACT_VERSION``.

B sequences · T context rows · L rows, queries included · C channels · F event columns · A action columns
Q queries · R rows that one query needs · Y numbers in an answer · G numbers in a key
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

__all__ = [
    "CONTRACT_VERSION",
    "EVALUATION_SEED",
    "FAMILY",
    "PRESETS",
    "QUICK_STEPS",
    "VALIDATION_SEED",
    "Draws",
    "Preset",
    "ProbeBatch",
    "ProbeConfig",
    "generator",
]

FAMILY = "hamts_probes/v1"
# 2: networks of the preset small take 1,500 steps (3,000 before); 3: long sequences are grown into; 4: entries are 32
# wide beside a state of 8, an embedding sees four rows, HAM keeps everything for longer; 5: 2,500 steps but for quick
# rungs, entries are read without a handicap, half of the questions do not see the state while everything is kept
CONTRACT_VERSION = 5
# training draws from its own seed (0, 1, ...); these offsets keep the three kinds of streams apart
VALIDATION_SEED = 5_000
EVALUATION_SEED = 10_000


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A size of the whole exercise: of the sequences, and of how many are trained and scored on."""

    context_rows: int
    items: int
    queries: int
    train_steps: int
    eval_streams: int
    eval_sequences: int
    train_seeds: int
    learning_rates: tuple[float, ...]


PRESETS: dict[str, Preset] = {
    "smoke": Preset(
        context_rows=72, items=12, queries=12, train_steps=700, eval_streams=2, eval_sequences=128, train_seeds=3,
        learning_rates=(4e-3,),
    ),
    "small": Preset(
        context_rows=256, items=16, queries=16, train_steps=2500, eval_streams=10, eval_sequences=256, train_seeds=5,
        learning_rates=(1e-3, 2e-3, 4e-3, 1e-2),
    ),
    "standard": Preset(
        context_rows=1024, items=32, queries=16, train_steps=6000, eval_streams=10, eval_sequences=256, train_seeds=5,
        learning_rates=(1e-3, 2e-3, 4e-3, 1e-2),
    ),
    # evaluation only: a model trained at another preset is asked about a longer past
    "long": Preset(
        context_rows=8192, items=64, queries=16, train_steps=0, eval_streams=10, eval_sequences=16, train_seeds=0,
        learning_rates=(),
    ),
}  # fmt: skip

# of rungs that are learned in half of the steps of the others (``Probe.quick``)
QUICK_STEPS = {"small": 1_500}


def generator(seed: int) -> torch.Generator:
    """A generator on the CPU, so that a seed gives the same sequences on every machine."""
    return torch.Generator().manual_seed(seed)


class Draws:
    """Randomness split by component, so that changing one axis does not move the others.

    Args:
        parent: one number is taken from it for each ``Draws``, whatever is drawn afterwards.
        swap: components that take another stream (a control moves positions alone, say).
    """

    def __init__(self, parent: torch.Generator, *, swap: Mapping[str, int] | None = None) -> None:
        self.base = int(torch.randint(2**62, (), generator=parent))
        self.swap = dict(swap or {})

    def __call__(self, component: str) -> torch.Generator:
        text = f"{self.base}/{component}/{self.swap.get(component, 0)}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return generator(int.from_bytes(digest, "big") >> 2)


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What all suites share. Suites add their own axes.

    Attributes:
        context_rows: T.
        items: N, things to remember.
        queries: Q asked at the end.
        noise: standard deviation of the white part of the carrier.
        carrier: ``season``, ``ar``, ``walk``, ``gp``, ``chaos`` or ``none``; real ones come through ``SemiSynthetic``.
        missing: share of rows without an item whose channels are missing.
        jitter: spread of the time between rows; 0 is a regular clock.
        code: how types are coded: ``random`` unit vectors times 2, ``onehot``, or ``int`` (one number).
        missed_tags: share of the tagged rows whose tag is lost.
        false_tags: tags on other rows, for each item.
        swap: components of randomness that take another stream; for controls.
    """

    context_rows: int = 256
    items: int = 16
    queries: int = 16
    noise: float = 0.2
    carrier: str = "season"
    missing: float = 0.0
    jitter: float = 0.0
    code: str = "random"
    missed_tags: float = 0.0
    false_tags: float = 0.0
    swap: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("context_rows", "items", "queries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1. Got {getattr(self, name)}.")
        if not 0 <= self.missed_tags <= 1 or self.false_tags < 0:
            raise ValueError(
                f"missed_tags must lie in [0, 1] and false_tags be 0 or more. Got {self.missed_tags} and"
                f" {self.false_tags}."
            )
        if not 0 <= self.missing < 1 or self.noise < 0 or self.jitter < 0:
            raise ValueError(
                "missing must lie in [0, 1), noise and jitter be 0 or more. Got"
                f" missing={self.missing}, noise={self.noise}, jitter={self.jitter}."
            )
        if self.code not in ("random", "onehot", "int"):
            raise ValueError(f"Unknown code {self.code!r}. Available: ['int', 'onehot', 'random'].")

    def draws(self, parent: torch.Generator) -> Draws:
        """Split a generator by component."""
        return Draws(parent, swap=dict(self.swap))

    def need_rows(self, rows: int, what: str) -> None:
        """Refuse sizes that do not fit the context."""
        if rows > self.context_rows:
            raise ValueError(
                f"{what} need {rows} rows, the context has {self.context_rows}. Ask for fewer, or a longer context."
            )


T = TypeVar("T")
NO_ROW = -1


@dataclass(frozen=True, kw_only=True)
class ProbeBatch:
    """Sequences with questions at their end, and the truth about what each question needs.

    The truth (``need``, ``y``, ``crit`` and the rest) is fixed before anything is rendered into ``x``.

    Attributes:
        x: unit scale; NaN where missing.
        query: rows that ask. They are never stored: no memory may change by reading one.
        need: rows without which a query cannot be answered, -1 for none.
        need_role: what each of the R rows is to its query, such as ("action", "effect").
        need_any: one of the rows is enough (a value shown twice); else all are needed.
        tags: rows that carry a tag, with the configured tag noise; what a tag router sees.
        key, value: what a memory without training works with: the key of each row and what was bound to it.
        key_direct: the answer is the value of the one row whose key is the query's.
        queries_follow: query rows go on from one another, as a replayed waveform does; else each stands alone.
        aux: a training target that is never scored.
        floor: answers of predictors without a memory of single items.
        slices: labels of queries, -1 for none; results are also reported by label.
    """

    x: torch.Tensor  # [B, L, C]
    events: torch.Tensor  # [B, L, F]
    actions: torch.Tensor  # [B, L, A]
    time: torch.Tensor  # [B, L] float64 seconds
    event_id: torch.Tensor  # [B, L] int64, -1 for none
    query: torch.Tensor  # [B, L] bool
    q_index: torch.Tensor  # [B, Q] int64
    q_item: torch.Tensor  # [B, Q] int64
    y: torch.Tensor  # [B, Q, Y]
    y_mask: torch.Tensor  # [B, Q, Y] bool
    need: torch.Tensor  # [B, Q, R] int64
    crit: torch.Tensor  # [B, L] bool
    crit_item: torch.Tensor  # [B, L] int64, -1 for none
    crit_chan: torch.Tensor  # [B, L, C] bool
    distract: torch.Tensor  # [B, L] bool
    tags: torch.Tensor  # [B, L] bool
    key: torch.Tensor  # [B, L, G]
    value: torch.Tensor  # [B, L, Y']
    context_rows: int
    x_names: tuple[str, ...]
    event_names: tuple[str, ...]
    action_names: tuple[str, ...] = ()
    need_role: tuple[str, ...] = ("item",)
    need_any: bool = False
    key_direct: bool = True
    queries_follow: bool = False
    aux: torch.Tensor | None = None  # [B, Q, X]
    edge_index: torch.Tensor | None = None  # [B, E, 2] int64
    edge_time: torch.Tensor | None = None  # [B, E] float64
    floor: dict[str, torch.Tensor] = field(default_factory=dict)  # each [B, Q, Y]
    slices: dict[str, torch.Tensor] = field(default_factory=dict)  # each [B, Q] int64
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        B, L, C = self.x.shape
        Q = self.q_index.shape[1]
        for name in ("time", "event_id", "query", "crit", "crit_item", "distract", "tags"):
            self._shape(name, (B, L))
        for name, width in (
            ("events", len(self.event_names)),
            ("actions", len(self.action_names)),
            ("crit_chan", C),
            ("key", self.key.shape[-1]),
            ("value", self.value.shape[-1]),
        ):
            self._shape(name, (B, L, width))
        for name in ("q_item",):
            self._shape(name, (B, Q))
        self._shape("y", (B, Q, self.y.shape[-1]))
        self._shape("y_mask", tuple(self.y.shape))
        self._shape("need", (B, Q, len(self.need_role)))
        if len(self.x_names) != C:
            raise ValueError(f"x_names must name {C} channels. Got {len(self.x_names)}.")

    def _shape(self, name: str, expected: tuple[int, ...]) -> None:
        got = tuple(getattr(self, name).shape)
        if got != expected:
            raise ValueError(f"{name} must have shape {expected}. Got {got}.")

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def asked(self) -> torch.Tensor:
        """Queries that count, [B, Q] bool."""
        return self.y_mask.any(-1)

    @property
    def unseen(self) -> torch.Tensor:
        """Rows that the embedding of later rows does not see, [B, L] bool: other questions."""
        return torch.zeros_like(self.query) if self.queries_follow else self.query

    @property
    def delay(self) -> torch.Tensor:
        """Rows between a query and the last row it needs, [B, Q]."""
        return self.q_index - self.need.amax(-1)

    def inputs(self) -> torch.Tensor:
        """All that a model may see of a row: values, which are there, events, actions, log elapsed. [B, L, I]."""
        there = ~self.x.isnan()  # [B, L, C]
        elapsed = torch.diff(self.time, dim=1, prepend=self.time[:, :1] - 1.0)  # [B, L]
        gap = torch.log(elapsed.clamp_min(1e-3)).to(self.x.dtype)[..., None]  # [B, L, 1]
        return torch.cat([torch.nan_to_num(self.x), there.to(self.x.dtype), self.events, self.actions, gap], -1)

    def select(self, rows: torch.Tensor | slice) -> ProbeBatch:
        """Some of the sequences."""
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: str | torch.device) -> ProbeBatch:
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Any) -> ProbeBatch:
        """Apply a function to every tensor."""
        changed: dict[str, Any] = {}
        for f in fields(self):
            content = getattr(self, f.name)
            if isinstance(content, torch.Tensor):
                changed[f.name] = function(content)
            elif isinstance(content, dict):
                changed[f.name] = {name: function(tensor) for name, tensor in content.items()}
        return replace(self, **changed)


def hashed(content: Any, *, digits: int = 12) -> str:
    """A short name of a configuration: equal for equal content, whatever the order of its keys."""
    import json

    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=digits // 2).hexdigest()
