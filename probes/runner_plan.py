"""What is to be run: cells, each one training and its evaluations, named by a hash of all that decides the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from hamts.errors import DataError
from probes.contract import CONTRACT_VERSION, PRESETS, ProbeConfig, generator, hashed
from probes.models import MODELS, ROUTERS_T1, SIZELESS, NetConfig
from probes.registry import Probe, get_probe

__all__ = ["Cell", "RunPlan", "axis_words", "budget_rows", "critical_rows", "model_cells"]

# 2: learning rates are tried once for an architecture, and controls decide about the last rows of the context too
RUN_VERSION = 2
CRITICAL_SEQUENCES = 64
STATE_WIDTH = NetConfig().state_width
DEFAULT_MODELS = ("ham", "full", "recurrent", "recurrent_wide", "window")
DEFAULT_ROUTERS = ("surprise", "innovation", "learned", "tags", "mix", "random", "shuffled", "oracle")
DEFAULT_BUDGETS = (0.5, 1.0, 2.0)
# HAM's learning rates are tried with it: it trains all that any router of HAM trains, and knows nothing of the truth
# what can be trained side by side (``stacked.can_stack``)
STACKED_MODELS = ("ham", "full", "recurrent", "recurrent_wide", "window")
STACKED_ROUTERS = (
    "surprise", "innovation", "error", "write", "learned", "mix", "tags", "random", "stride", "recency", "shuffled",
    "oracle",
)  # fmt: skip
TRIAL_ROUTER, TRIAL_BUDGET = "learned", 1.0
SMOKE_MODELS, SMOKE_ROUTERS, SMOKE_BUDGETS, SMOKE_SEEDS = (
    ("ham", "full", "recurrent"),
    ("surprise", "oracle"),
    (1.0,),
    1,
)


def critical_rows(probe: Probe, config: ProbeConfig) -> int:
    """Rows that must be kept: the most of any of some sequences."""
    batch = probe.sample(generator(0), CRITICAL_SEQUENCES, config)
    return max(int(batch.crit.sum(1).max()), 1)


def budget_rows(budget: float, critical: int) -> int:
    """Entries of a layer at a multiple of the critical rows.

    Raises:
        DataError: E-PROBE-BUDGET, it is less than one entry.
    """
    rows = round(budget * critical)
    if rows < 1:
        raise DataError(
            "E-PROBE-BUDGET",
            f"A budget of {budget:g} x {critical} critical rows is less than one entry.",
            fix=f"Ask for {1 / critical:.3g} or more, or for the model 'recurrent', which keeps none.",
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network, trained once and scored at some budgets.

    Attributes:
        probe: name of the suite; ``rung`` of its table row.
        budgets: as multiples of the critical rows.
        overrides: axes that differ from the preset's.
        axis: what else differs, in a word; part of the line's name.
        state_width: of the recurrent state: heads x key width, so how many items it can hold apart.
    """

    probe: str
    rung: str
    preset: str
    model: str
    router: str
    budgets: tuple[float, ...]
    seed: int
    learning_rate: float
    steps: int
    streams: int
    sequences: int
    layers: int
    readout: str = "query"
    overrides: tuple[tuple[str, Any], ...] = ()
    axis: str = ""
    suite_version: int = 1
    state_width: int = STATE_WIDTH

    @property
    def config(self) -> ProbeConfig:
        return get_probe(self.probe)[0].config(self.preset, self.rung, **dict(self.overrides))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that decides the numbers."""
        content = asdict(self)
        if self.state_width == STATE_WIDTH:
            # the name of a run is that from before there was this axis
            del content["state_width"]
        return {**content, "contract_version": CONTRACT_VERSION, "run_version": RUN_VERSION}

    @property
    def hash(self) -> str:
        return hashed(self.identity)

    @property
    def name(self) -> str:
        axis = "" if not self.axis else "__" + self.axis
        readout = "" if self.readout == "query" else "__echo"
        rate = f"__lr{self.learning_rate:g}"
        return f"{self.rung}__{self.model}__{self.router}__s{self.seed}{rate}{axis}{readout}"

    def file_name(self, budget: float) -> str:
        return f"{self.rung}__{self.model}__{self.router}__b{budget:g}__s{self.seed}__{self.hash}.json"

    def net(self, rows: int) -> NetConfig:
        router = self.router if self.model == "ham" else "learned"
        return NetConfig(
            model=self.model, router=router, layers=self.layers, budget_rows=rows, state_width=self.state_width,
            entry_bias=get_probe(self.probe)[0].entry_bias(self.config),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A grid of cells.

    Attributes:
        probes: names such as ``der``, ``pbc`` or ``pbc/pbcD``; a suite stands for all its rungs, in a smoke run for its
            main one.
        seeds: training seeds 0, 1, ...
        tags: tag noise of the headline table: 20 % of the tagged rows untagged, 4 false tags an item.
        learning_rates: tried with the first seed, as many for every architecture and rung: with one router of HAM
            (``TRIAL_ROUTER``) and one size of a sized rival. The best on validation serves all seeds, routers and
            sizes of the architecture, and all trials are kept.
        overrides: axes of the suites and their values, such as ``{"items": 8}``; what differs from a rung's own makes
            lines of their own, ``full [items=8]``.
        state_width: of the recurrent state; other widths than the usual one are lines of their own.
    """

    probes: tuple[str, ...]
    preset: str = "smoke"
    models: tuple[str, ...] = DEFAULT_MODELS
    routers: tuple[str, ...] = DEFAULT_ROUTERS
    budgets: tuple[float, ...] = DEFAULT_BUDGETS
    seeds: int = 3
    learning_rates: tuple[float, ...] = ()
    readout: str = "query"
    missed_tags: float = 0.2
    false_tags: float = 4.0
    steps: int | None = None
    streams: int | None = None
    sequences: int | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    state_width: int = STATE_WIDTH

    def __post_init__(self) -> None:
        if self.state_width < 2 or self.state_width % 2:
            raise ValueError(f"state_width must be even, and at least 2. Got {self.state_width}.")
        if self.preset not in PRESETS:
            raise ValueError(f"Unknown preset {self.preset!r}. Available: {sorted(PRESETS)}.")
        if PRESETS[self.preset].train_steps == 0:
            raise ValueError(
                f"Preset {self.preset!r} is for evaluation only. Train at another, such as 'standard', then ask its"
                f" networks again: hamts probes evaluate DIR --preset {self.preset}."
            )
        for what, names, known in (("model", self.models, MODELS), ("router", self.routers, ROUTERS_T1)):
            unknown = sorted({part for name in names for part in name.split("+")} - set(known))
            if unknown:
                raise ValueError(f"Unknown {what} {unknown[0]!r}. Available: {sorted(known)}.")
        if not self.budgets or min(self.budgets) <= 0:
            raise ValueError(f"budgets are multiples of the critical rows, above 0. Got {list(self.budgets)}.")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1. Got {self.seeds}.")
        if self.readout not in ("query", "echo"):
            raise ValueError(f"Unknown readout {self.readout!r}. Available: ['echo', 'query'].")

    def changes(self, probe: Probe, rung: str) -> dict[str, Any]:
        """The axes that differ from the rung's own values."""
        return probe.changes(
            self.preset, rung, self.overrides, missed_tags=self.missed_tags, false_tags=self.false_tags
        )

    def axis(self, probe: Probe, rung: str) -> str:
        """What makes these lines others than the usual ones."""
        width = "" if self.state_width == STATE_WIDTH else f"width{self.state_width}"
        return ", ".join(word for word in (width, axis_words(self.changes(probe, rung))) if word)

    def trial_cells(self) -> list[Cell]:
        """The first seed at every learning rate: the same trials for every architecture."""
        rates = self.learning_rates or PRESETS[self.preset].learning_rates
        found: dict[tuple[str, str], tuple[Probe, str, str, str, tuple[float, ...]]] = {}
        for place in self._places():
            _, rung, model, router, budgets = place
            if (rung, model) not in found or router == TRIAL_ROUTER or budgets == (TRIAL_BUDGET,):
                found[rung, model] = place
        return [self._cell(*place, 0, rate) for rate in rates for place in found.values()]

    def only_rates(self) -> dict[tuple[str, ...], float]:
        """What trials would choose where there is one learning rate; nothing where there are several."""
        rates = self.learning_rates or PRESETS[self.preset].learning_rates
        if len(rates) > 1:
            return {}
        return {
            ("T1", rung, model, self.readout, self.axis(probe, rung)): rates[0]
            for probe, rung, model, _, _ in self._places()
        }

    def main_cells(self, rates: Mapping[tuple[str, ...], float]) -> list[Cell]:
        """All seeds, each architecture at the rate that was best on validation (``summary.chosen_rates``).

        Rungs without rates are left out.
        """
        found = []
        for seed in range(self.seeds):
            for place in self._places():
                probe, rung, model, _, _ = place
                rate = rates.get(("T1", rung, model, self.readout, self.axis(probe, rung)))
                if rate is not None:
                    found.append(self._cell(*place, seed, rate))
        return found

    def split(self, models: Sequence[str], routers: Sequence[str]) -> tuple[RunPlan | None, RunPlan | None]:
        """The part of these models and routers, and the rest; None for a part of nothing."""
        inside, outside = [m for m in self.models if m in models], [m for m in self.models if m not in models]
        own, rest = [r for r in self.routers if r in routers], [r for r in self.routers if r not in routers]
        if "ham" in inside and rest:
            outside.append("ham")
        if not own:
            inside = [model for model in inside if model != "ham"]
        first = replace(self, models=tuple(inside), routers=tuple(own)) if inside else None
        return first, replace(self, models=tuple(outside), routers=tuple(rest)) if outside else None

    def _places(self) -> Iterator[tuple[Probe, str, str, str, tuple[float, ...]]]:
        for probe, rung in self._rungs():
            for model, router, budgets in model_cells(self.models, self.routers, self.budgets):
                yield probe, rung, model, router, budgets

    def _rungs(self) -> Iterator[tuple[Probe, str]]:
        for name in self.probes:
            probe, rung = get_probe(name)
            if not probe.trained:
                continue
            # a smoke run asks each suite its main question only
            every = (probe.main_rung(),) if self.preset == "smoke" else tuple(probe.rungs)
            for each in (rung,) if rung else every:
                yield probe, each

    def _cell(
        self, probe: Probe, rung: str, model: str, router: str, budgets: tuple[float, ...], seed: int, rate: float
    ) -> Cell:
        size = PRESETS[self.preset]
        overrides = {"missed_tags": self.missed_tags, "false_tags": self.false_tags, **self.changes(probe, rung)}
        depth = probe.depth(probe.config(self.preset, rung, **overrides))
        return Cell(
            probe=probe.name, rung=rung, preset=self.preset, model=model, router=router, budgets=budgets, seed=seed,
            learning_rate=rate, steps=self.steps or probe.train_steps(self.preset, rung),
            streams=self.streams or size.eval_streams,
            sequences=self.sequences or size.eval_sequences, layers=depth, readout=self.readout,
            overrides=tuple(sorted(overrides.items())), suite_version=probe.version, state_width=self.state_width,
            axis=self.axis(probe, rung),
        )  # fmt: skip


def axis_words(changes: Mapping[str, Any]) -> str:
    """How lines are named whose suite has other values on some axes."""
    return ", ".join(f"{name}={value}" for name, value in sorted(changes.items()))


def model_cells(
    models: Sequence[str], routers: Sequence[str], budgets: tuple[float, ...]
) -> Iterator[tuple[str, str, tuple[float, ...]]]:
    """(model, router, budgets) of each training: HAM serves all budgets, a sized rival is trained for each."""
    for model in models:
        if model == "ham":
            yield from ((model, router, budgets) for router in routers)
        elif model in SIZELESS:
            yield model, "none", (1.0,)
        else:
            yield from ((model, "none", (budget,)) for budget in budgets)
