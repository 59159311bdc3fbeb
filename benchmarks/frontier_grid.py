"""The grid of the frontier: every router, control and rival, on every carrier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.frontier_sets import SETS
from hamts.config import MIXERS

__all__ = ["CONTROL", "CONTROLS", "CONTROL_SHARES", "MODELS", "REFERENCE", "SEEDS", "SHARES", "Cell", "Model", "grid"]

SHARES = (0.0, 0.02, 0.1, 1.0)
TENTH = 0.1
CONTROL_SHARES = (0.02, TENTH)
CONTROLS = ("shuffled", "random", "recency")
SEEDS = (0, 1, 2)
# whose milliseconds at a tenth are those of a comparison at equal time, and whose learning rate all routers take
REFERENCE = "learned"
# everything kept against nothing kept: where the first is no better, nothing is learned of what is kept
CONTROL = ("attention", "recurrent")
# routers that did best with the first seed, what two of the claims need besides, and the rivals of the other
CLAIMED = ("mix", "learned", "learned-token", "recurrent_wide", "neighbours")
# share of a GPU's memory that a cell needs: a fourteenth was too little for histories that are read side by side, which
# leave blocks of many sizes behind
ROOM = 1 / 12
# what needs more on a set, or on any: wide states and stored patches grow with the tokens of an item, and histories of
# all items are read side by side under each memory of a router
ROUTER = "router"
ROOMS: dict[tuple[str | None, str], float] = {
    (None, "recurrent_wide"): 1 / 10,
    (None, "neighbours"): 1 / 10,
    (None, "log_linear"): 1 / 10,
    ("beijing", "recurrent_wide"): 1 / 7,
    ("tep", "recurrent_wide"): 1 / 3,
    ("flights", ROUTER): 1 / 6,
    ("flights", "recurrent_window"): 1 / 6,
    ("flights", "attention"): 1 / 6,
}
HAM_SECONDS, RIVAL_SECONDS = 0.42, 0.4  # for each step of the fit
HAM_READING, READING = 90.0, 20.0  # for all histories


@dataclass(frozen=True)
class Model:
    """One row of the grid: options of ``fit``, and what is measured with its weights."""

    options: dict[str, Any]
    shares: tuple[float, ...] = SHARES
    controls: tuple[str, ...] = ()
    control_shares: tuple[float, ...] = CONTROL_SHARES
    sized: bool = False  # fitted once for each budget
    core: bool = False


def _router(name: str, *, core: bool, controls: tuple[str, ...] = CONTROLS, **options: Any) -> Model:
    return Model({"router": name, **options}, controls=controls, core=core)


MODELS: dict[str, Model] = {
    "surprise": _router("surprise", core=True),
    "innovation": _router("innovation", core=True),
    "learned": _router("learned", core=True),
    "tags": _router("learned+tags", core=True),
    "mix": _router("mix", core=True),
    "error": _router("error", core=False),
    "write": _router("write", core=False),
    "uncertainty": _router("uncertainty", core=False),
    "residual": _router("residual", core=False),
    "learned-token": _router("learned", core=True, routing={"learned_features": "token"}),
} | {
    name: Model(
        {"mixer": name},
        shares=CONTROL_SHARES,
        sized=name not in ("attention", "recurrent", "gdn_gsa", "block_sparse"),
        core=name in ("recurrent_wide", "window", "gdn_gsa", "pooled", "neighbours"),
    )
    for name in MIXERS
    if name != "ham"
}


@dataclass(frozen=True)
class Cell:
    """One fit of the grid."""

    set: str
    model: str
    seed: int
    share: float | None = None

    @property
    def room(self) -> float:
        """Share of a GPU's memory that it needs."""
        kind = ROUTER if MODELS[self.model].controls else self.model
        return ROOMS.get((self.set, kind), ROOMS.get((None, kind), ROOM))

    @property
    def seconds(self) -> float:
        """What it takes, a dozen at a time on an H100."""
        steps = SETS[self.set].steps if self.set in SETS else 1
        if MODELS[self.model].controls:
            return steps * HAM_SECONDS + HAM_READING
        return steps * RIVAL_SECONDS + READING

    @property
    def name(self) -> str:
        size = "" if self.share is None else f"@{100 * self.share:g}"
        return f"{self.set}--{self.model}{size}--seed{self.seed}"


def _place(cell: Cell) -> tuple[Any, ...]:
    """The positive control with all its seeds; what the claims rest on, routers first; the rest, routers first again,
    for they take longest, seed by seed."""
    if cell.model in CONTROL:
        return (0, cell.seed)
    if cell.model in CLAIMED:
        return (1, (None, cell.model) in ROOMS, cell.share == CONTROL_SHARES[0], cell.seed)
    return (2, MODELS[cell.model].controls == (), cell.seed, cell.share != TENTH)


def grid(*, core: bool, family: str = "recent") -> list[Cell]:
    """The positive control and the mandatory core of a family of sets first, then the rest of these and other sets."""
    cells = [
        Cell(name, label, seed, share)
        for label, model in MODELS.items()
        for share in (CONTROL_SHARES if model.sized else (None,))
        for seed in SEEDS
        for name, spec in SETS.items()
        if spec.family == family
    ]
    inner = [cell for cell in cells if SETS[cell.set].core and (MODELS[cell.model].core or cell.model in CONTROL)]
    inner.sort(key=_place)
    return inner if core else inner + [cell for cell in cells if cell not in inner]
