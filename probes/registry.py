"""Probes by name: those of this package, those of installed plug-ins, and one's own.

B sequences · Q queries · Y numbers in an answer
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from importlib import import_module
from importlib.metadata import entry_points
from itertools import accumulate
from typing import Any, ClassVar, TypeVar

import torch

from probes.contract import PRESETS, QUICK_STEPS, ProbeBatch, ProbeConfig

__all__ = ["ENTRY_POINT_GROUP", "NO_STATE", "Probe", "get_probe", "list_probes", "register_probe"]

ENTRY_POINT_GROUP = "hamts.probes"
SUITES = ("der", "xcb", "rrr", "act", "topo", "pbc", "stream", "cfr", "frontier")
SLOTS = (
    "streaming state",
    "fixed-budget hierarchy",
    "multivariate encoding",
    "control and counterfactuals",
    "benchmark hygiene",
)

# why G2 fails where it is not a matter of room
NO_STATE = "some seeds of a state never learn the question: its skill says little about room"

V = TypeVar("V")
# presets of so many rows are grown into: share of the training steps, and into how many parts sizes are divided
GROWN_ROWS = 256
# of a suite's auxiliary target in the loss
TARGET_WEIGHT = 0.2
GROWTH = ((0.4, 4), (0.25, 2), (0.35, 1))

# what an axis takes, by how it is declared
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "str": (str, "a word"),
    "bool": (bool, "True or False"),
    "int | None": ((int, type(None)), "a whole number"),
    "tuple[int, ...]": ((tuple, list), "numbers in brackets, such as (1,2)"),
    "tuple[float, ...]": ((tuple, list), "numbers in brackets, such as (0.1,0.8)"),
}


class Probe:
    """One suite: a generator with truth, floors and an oracle. Subclass it, then ``register_probe`` it.

    Attributes:
        rungs: rows of the results table, each a name and what it changes in the configuration.
        presets: what a preset changes beyond its sizes.
        axes: for each axis the values of the contract, easiest first.
        curriculum: overrides by stage, with the share of the training steps that each gets; the last is the task
            (``lessons``, where it depends on the question).
        layers: layers of a trained-small model, unless ``depth`` says otherwise.
        echo_rows: rows in which an answer is replayed in the echo readout.
        echo_decay: how an echo fades from row to row.
        matched_flags: distractors and critical rows carry equal flags; else ``flags_note`` says why not.
        trained: whether trained-small models run on it.
        grows: long sequences are grown into (``stages``); False where shorter ones are another question.
        headline: the rung that stands for the suite in a smoke run; the first one if empty.
        target_weight: of the auxiliary target in the loss.
        named_after: layers whose output names one part of the auxiliary target each; none: the last names all
            (``names_after``, where it depends on the question).
        cannot: why a rung fails a gate, by "rung gate", where that is known; said beside the gate, which stays.
        quick: rungs that take ``QUICK_STEPS``, being learned in half of the others' time.
    """

    name: ClassVar[str] = ""
    version: ClassVar[int] = 0
    slot: ClassVar[str] = ""
    Config: ClassVar[type[ProbeConfig]] = ProbeConfig
    rungs: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    axes: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    curriculum: ClassVar[tuple[tuple[float, Mapping[str, Any]], ...]] = ((1.0, {}),)
    layers: ClassVar[int] = 2
    echo_rows: ClassVar[int] = 4
    echo_decay: ClassVar[float] = 0.7
    matched_flags: ClassVar[bool] = True
    flags_note: ClassVar[str] = ""
    trained: ClassVar[bool] = True
    headline: ClassVar[str] = ""
    grows: ClassVar[bool] = True
    target_weight: ClassVar[float] = TARGET_WEIGHT
    named_after: ClassVar[tuple[int, ...]] = ()
    cannot: ClassVar[Mapping[str, str]] = {}
    quick: ClassVar[tuple[str, ...]] = ()

    def main_rung(self) -> str:
        """The rung that stands for the suite where only one is run."""
        return self.headline or next(iter(self.rungs))

    def config(self, preset: str = "smoke", rung: str | None = None, **overrides: Any) -> ProbeConfig:
        """Sizes of a preset, then what the suite, the rung and the caller change, in that order.

        Raises:
            ValueError: an unknown preset, rung or field.
        """
        if preset not in PRESETS:
            raise ValueError(f"Unknown preset {preset!r}. Available: {sorted(PRESETS)}.")
        size = PRESETS[preset]
        content: dict[str, Any] = {"context_rows": size.context_rows, "items": size.items, "queries": size.queries}
        content |= self.presets.get(preset, {})
        if rung is not None:
            if rung not in self.rungs:
                raise ValueError(f"Unknown rung {rung!r} of suite {self.name!r}. Available: {sorted(self.rungs)}.")
            content |= self.rungs[rung]
        content |= overrides
        known = {f.name for f in fields(self.Config)}
        unknown = sorted(set(content) - known)
        if unknown:
            raise ValueError(f"Suite {self.name!r} has no axis {unknown[0]!r}. Available: {sorted(known)}.")
        kinds = {f.name: str(f.type) for f in fields(self.Config)}
        for axis, value in overrides.items():
            kind, plain = _KINDS.get(kinds[axis], (None, ""))
            if kind is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
                raise ValueError(f"The axis {axis!r} of suite {self.name!r} takes {plain}. Got {value!r}.")
        return self.Config(**content)

    def changes(self, preset: str, rung: str, overrides: Mapping[str, Any], **usual: Any) -> dict[str, Any]:
        """Those of some overrides that differ from the rung's own configuration.

        Args:
            usual: what a run changes anyway, such as the noise of tags.

        Raises:
            ValueError: an unknown axis, or a value that cannot be.
        """
        plain = self.config(preset, rung, **usual)
        self.config(preset, rung, **{**usual, **overrides})
        return {name: value for name, value in overrides.items() if getattr(plain, name) != value}

    def shrunk(self, config: ProbeConfig, parts: int) -> ProbeConfig:
        """The same question of a ``parts``-th of the size: fewer rows, items and distractors, as dense as before."""
        names = ("context_rows", "items", "queries", "distractors")
        sizes = {name: getattr(config, name) for name in names if getattr(config, name, 0) > 0}
        return replace(config, **{name: max(size // parts, 1) for name, size in sizes.items()})

    def train_steps(self, preset: str, rung: str) -> int:
        """Training steps of a rung: the preset's, or fewer where it is quick."""
        steps = PRESETS[preset].train_steps
        return QUICK_STEPS.get(preset, steps) if rung in self.quick else steps

    def depth(self, config: ProbeConfig) -> int:
        """Layers of a trained-small model."""
        return self.layers

    def names_after(self, config: ProbeConfig) -> tuple[int, ...]:
        """Layers whose output names one part of the auxiliary target each; none: the last names all."""
        return self.named_after

    def entry_bias(self, config: ProbeConfig) -> float:
        """What is added at first to the logits of all kept rows, in every model (``NetConfig.entry_bias``)."""
        return 0.0

    def lessons(self, config: ProbeConfig) -> tuple[tuple[float, Mapping[str, Any]], ...]:
        """The curriculum of a question."""
        return self.curriculum

    def stages(self, config: ProbeConfig) -> list[tuple[float, ProbeConfig]]:
        """Share of the training steps of each stage, and its configuration; the last is the task.

        Long sequences are grown into, by every architecture alike: a network that has never answered sees no gradient
        that tells one of many rows from the others.
        """
        growth = GROWTH if config.context_rows >= GROWN_ROWS and self.grows else ((1.0, 1),)
        lessons = self.lessons(config)
        ends = {round(end, 9) for shares in (lessons, growth) for end in accumulate(s for s, _ in shares)}
        found, before = [], 0.0
        for end in sorted(ends):
            middle = (before + end) / 2
            changes, parts = _at(lessons, middle), _at(growth, middle)
            stage = replace(config, **changes) if changes else config
            found.append((end - before, self.shrunk(stage, parts) if parts > 1 else stage))
            before = end
        return found

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        """Draw sequences with their questions and truth."""
        raise NotImplementedError

    def floors(self, train: ProbeBatch, batch: ProbeBatch) -> dict[str, torch.Tensor]:
        """Answers without a memory of single items, each [B, Q, Y]: those of the generator and learned ones."""
        from probes.floors import learned_floors

        return {**batch.floor, **learned_floors(train, batch)}

    def oracle(self, batch: ProbeBatch) -> torch.Tensor:
        """The best possible answer, [B, Q, Y]."""
        return batch.y

    def shortcut_features(self, batch: ProbeBatch) -> torch.Tensor:
        """What must not suffice to answer, [B, Q, features]."""
        from probes.floors import shortcut_features

        return shortcut_features(batch)

    def r2_render(self, batch: ProbeBatch) -> ProbeBatch:
        """The same items, each answer the next rows of the series: the trigger row asks, the echo is forecast."""
        fade = self.echo_decay ** torch.arange(self.echo_rows, device=batch.y.device).to(batch.y)  # [h]

        def echo(y: torch.Tensor) -> torch.Tensor:
            return (fade[:, None] * y[..., None, :]).flatten(-2)  # [B, Q, h Y]

        mask = batch.y_mask[..., None, :].expand(*batch.y.shape[:2], self.echo_rows, -1).flatten(-2)
        return replace(
            batch, y=echo(batch.y), y_mask=mask, floor={name: echo(answer) for name, answer in batch.floor.items()}
        )


def _at(shares: Sequence[tuple[float, V]], place: float) -> V:
    """What holds at a place in [0, 1] of a sequence of shares."""
    total = 0.0
    for share, what in shares:
        total += share
        if place < total:
            return what
    return shares[-1][1]


P = TypeVar("P", bound=type[Probe])
_REGISTERED: dict[str, Probe] = {}


def register_probe(name: str, *, version: int, slot: str) -> Callable[[P], P]:
    """Class decorator: make a probe known by name.

    Args:
        version: raise it with every change of the generator or of what is scored.
        slot: which kind of claim it tests; one of ``SLOTS``.

    Raises:
        ValueError: the name is taken, or the slot unknown.
    """
    if slot not in SLOTS:
        raise ValueError(f"Unknown slot {slot!r}. Available: {list(SLOTS)}.")

    def register(kind: P) -> P:
        known = _REGISTERED.get(name)
        if known is not None and (type(known).__module__, type(known).__qualname__) != (
            kind.__module__,
            kind.__qualname__,
        ):
            raise ValueError(f"A probe named {name!r} is registered already, by {type(known).__module__}.")
        kind.name, kind.version, kind.slot = name, version, slot
        _REGISTERED[name] = kind()
        return kind

    return register


def _load() -> None:
    for suite in SUITES:
        import_module(f"probes.suites.{suite}")
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        # a plug-in registers itself on import
        entry.load()


def list_probes() -> dict[str, Probe]:
    """Every registered probe by name: the suites in order, then plug-ins and one's own."""
    _load()
    rest = sorted(set(_REGISTERED) - set(SUITES))
    return {name: _REGISTERED[name] for name in (*SUITES, *rest)}


def get_probe(name: str) -> tuple[Probe, str | None]:
    """A probe and one of its rungs, from ``pbc`` or ``pbc/pbcD`` (or just ``pbcD``).

    Raises:
        ValueError: no such probe or rung.
    """
    known = list_probes()
    suite, _, rung = name.partition("/")
    if suite in known:
        if rung and rung not in known[suite].rungs:
            raise ValueError(f"Suite {suite!r} has no rung {rung!r}. Available: {sorted(known[suite].rungs)}.")
        return known[suite], rung or None
    for probe in known.values():
        if name in probe.rungs:
            return probe, name
    every = [*known, *(rung for probe in known.values() for rung in probe.rungs)]
    near = difflib.get_close_matches(name, every, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown probe {name!r}. Available: {list(known)}.{hint}")
