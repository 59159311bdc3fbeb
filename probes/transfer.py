"""A router trained on some suites and tested on another: does it know what matters, or the suite's flag?

The network is trained on all suites together. Of the tested suite it only learns to answer: its sequences are read with
everything kept, and teach the router and its thresholds nothing. Nor does anything flow through the router's score to
what stands before it, so that no row is shaped to be chosen.

B sequences · L rows · F event columns · Q queries · Y numbers in an answer
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hamts.errors import DataError
from hamts.files import written_whole
from probes.contract import CONTRACT_VERSION, FAMILY, PRESETS, ProbeBatch, ProbeConfig, generator
from probes.evaluate import Evaluation, evaluate
from probes.models import NetConfig
from probes.registry import Probe, get_probe
from probes.results import machine
from probes.runner import check_device
from probes.runner_plan import critical_rows
from probes.stacked_evaluate import EvaluationSet, evaluate_stacked
from probes.stats import mean_interval
from probes.train import Fitted, TrainPlan
from probes.transfer_train import TransferTrainer, train_side_by_side

__all__ = [
    "Aligned",
    "Layout",
    "TransferPlan",
    "read_transfers",
    "run_transfer",
    "run_transfers",
    "score_transfer",
    "train_transfer",
    "transfer_path",
    "transfer_plans",
    "transfer_table",
]


@dataclass(frozen=True)
class Layout:
    """Columns that suites share; what a suite has not is 0."""

    events: tuple[str, ...]
    actions: tuple[str, ...]
    channels: int
    answers: int

    @classmethod
    def of(cls, batches: Sequence[ProbeBatch]) -> Layout:
        """The columns of all these batches, in order of appearance."""
        events = dict.fromkeys(name for batch in batches for name in batch.event_names)
        actions = dict.fromkeys(name for batch in batches for name in batch.action_names)
        channels = max(batch.x.shape[-1] for batch in batches)
        return cls(tuple(events), tuple(actions), channels, max(batch.y.shape[-1] for batch in batches))

    def align(self, batch: ProbeBatch) -> ProbeBatch:
        """The same sequences in this layout; answers beyond the suite's own are not asked."""
        B, L, C = batch.x.shape
        short = self.answers - batch.y.shape[-1]

        def columns(values: torch.Tensor, own: tuple[str, ...], names: tuple[str, ...]) -> torch.Tensor:
            blank = values.new_zeros(B, L)
            return torch.stack([values[..., own.index(n)] if n in own else blank for n in names], -1)

        def wide(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, short))

        x = torch.nn.functional.pad(batch.x, (0, self.channels - C))  # [B, L, C']
        chan = torch.nn.functional.pad(batch.crit_chan, (0, self.channels - C))
        names = batch.x_names + tuple(f"none_{number}" for number in range(self.channels - C))
        return replace(
            batch, x=x, x_names=names, crit_chan=chan, event_names=self.events, action_names=self.actions,
            events=columns(batch.events, batch.event_names, self.events), y=wide(batch.y), y_mask=wide(batch.y_mask),
            actions=columns(batch.actions, batch.action_names, self.actions) if self.actions else batch.actions,
            aux=None,
            floor={name: wide(answer) for name, answer in batch.floor.items()},
        )  # fmt: skip


class Aligned(Probe):
    """A suite in another layout."""

    def __init__(self, probe: Probe, layout: Layout) -> None:
        self.inner, self.layout = probe, layout
        self.curriculum, self.grows = probe.curriculum, probe.grows  # type: ignore[misc]

    def shrunk(self, config: ProbeConfig, parts: int) -> ProbeConfig:
        return self.inner.shrunk(config, parts)

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        return self.layout.align(self.inner.sample(gen, n, config))


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """Which suites teach the router, and which one it is tested on."""

    teach: tuple[str, ...] = ("der/derD", "act/actS")
    test: str = "pbc/pbcD"
    preset: str = "smoke"
    router: str = "learned"
    steps: int = 2_100
    learning_rate: float = 4e-3
    seed: int = 0
    model: str = "ham"
    device: str = "cpu"
    overrides: tuple[tuple[str, Any], ...] = ()

    def plans(self) -> list[TrainPlan]:
        """A plan for each suite over one layout, the tested suite last."""
        found = [(probe, probe.config(self.preset, rung, **dict(self.overrides))) for probe, rung in
                 (get_probe(name) for name in (*self.teach, self.test))]  # fmt: skip
        layout = Layout.of([probe.sample(generator(0), 1, config) for probe, config in found])
        return [
            TrainPlan(
                probe=Aligned(probe, layout), config=config, net=NetConfig(model=self.model, router=self.router),
                steps=self.steps, learning_rate=self.learning_rate, seed=self.seed + place, device=self.device,
                critical_rows=critical_rows(probe, config),
            )
            for place, (probe, config) in enumerate(found)
        ]  # fmt: skip


def transfer_plans(
    *,
    teach: Sequence[str] = TransferPlan.teach,
    test: str = TransferPlan.test,
    routers: Sequence[str] = ("learned",),
    preset: str = "smoke",
    seeds: int = 3,
    steps: int | None = None,
    learning_rate: float = TransferPlan.learning_rate,
    device: str = "cpu",
) -> list[TransferPlan]:
    """Transfers with the tag noise of the headline table.

    Args:
        routers: of HAM; ``full`` stands for full attention.
        steps: over all suites; None: for each of them as many as the tested rung takes.
    """
    check_device(device)
    if preset not in PRESETS or not PRESETS[preset].train_steps:
        raise ValueError(f"Unknown preset {preset!r} to train at. Available: ['small', 'smoke', 'standard'].")
    tested, rung = get_probe(test)
    each = tested.train_steps(preset, rung or tested.main_rung())
    return [
        TransferPlan(
            teach=tuple(teach), test=test, preset=preset, router="learned" if router == "full" else router,
            model="full" if router == "full" else "ham", steps=steps or each * (len(teach) + 1), seed=seed,
            learning_rate=learning_rate, device=device, overrides=(("false_tags", 4.0), ("missed_tags", 0.2)),
        )
        for router in routers
        for seed in range(seeds)
    ]  # fmt: skip


def train_transfer(plan: TransferPlan) -> Fitted:
    """Train on all suites in turn; the fitted network is that of the tested suite."""
    return train_side_by_side([[plan]], device=plan.device)[0][1][0]


def score_transfer(fitted: Fitted, *, budget: float, streams: int, sequences: int) -> Evaluation:
    """Score a suite at a multiple of its critical rows."""
    rows = max(round(budget * fitted.plan.critical_rows), 1)
    return evaluate(fitted, budget_rows=rows, streams=streams, sequences=sequences)


# --- on disk


TRANSFER_FOLDER = "transfer"
BUDGETS = (0.5, 1.0, 2.0)
# means of so many sequences are written down
TOGETHER = 8


def transfer_path(plan: TransferPlan, folder: str | Path) -> Path:
    """Where the document of a transfer lies."""
    rung = plan.test.partition("/")[2] or plan.test
    line = plan.router if plan.model == "ham" else plan.model
    return Path(folder) / TRANSFER_FOLDER / rung / f"{line}__{plan.preset}__{plan.steps}__s{plan.seed}.json"


def run_transfers(
    plans: Sequence[TransferPlan],
    folder: str | Path,
    *,
    budgets: Sequence[float] = BUDGETS,
    streams: int = 2,
    sequences: int = 128,
) -> list[Path]:
    """Train side by side, score the tested suite and those that taught, and write documents; what is there stays.

    Of the tested suite a document says what the router kept of it (recall above chance is transfer), and what was
    answered with it.

    Args:
        plans: that differ in router, model and seed alone.
    """
    if len({replace(plan, model="ham", router="learned", seed=0) for plan in plans}) > 1:
        raise ValueError("Transfers side by side must differ in router, model and seed alone. Run the others apart.")
    paths = [transfer_path(plan, folder) for plan in plans]
    for plan, path in zip(plans, paths, strict=True):
        _refuse_other(plan, path)
    todo: dict[tuple[str, str], list[TransferPlan]] = {}
    for plan, path in zip(plans, paths, strict=True):
        if not path.is_file():
            todo.setdefault((plan.model, plan.router), []).append(plan)
    by_seeds: dict[tuple[int, ...], list[list[TransferPlan]]] = {}
    for group in todo.values():
        # stacks side by side read the same sequences
        by_seeds.setdefault(tuple(plan.seed for plan in group), []).append(group)
    for groups in by_seeds.values():
        trained = train_side_by_side(groups, device=plans[0].device)
        scores = _scores(trained, groups, budgets, streams, sequences)
        for (_, fitted), group in zip(trained, groups, strict=True):
            for plan, one in zip(group, fitted, strict=True):
                _write(transfer_path(plan, folder), plan, one, scores[plan])
    return paths


Scores = dict[str, list[dict[str, Any]]]


def _scores(
    trained: Sequence[tuple[TransferTrainer, list[Fitted]]],
    groups: Sequence[Sequence[TransferPlan]],
    budgets: Sequence[float],
    streams: int,
    sequences: int,
) -> dict[TransferPlan, Scores]:
    """Of each transfer and suite, numbers at every budget of the tested one, and at the critical rows of the others."""
    found: dict[TransferPlan, Scores] = {plan: {} for group in groups for plan in group}
    names = (*groups[0][0].teach, groups[0][0].test)
    for place, name in enumerate(names):
        parts = [own[place] for own in trained[0][0].parts]
        data = EvaluationSet.of(
            replace(parts[0], device="cpu"), seeds=[part.seed for part in parts], streams=streams, sequences=sequences
        ).to(parts[0].device)  # fmt: skip
        for (trainer, _), group in zip(trained, groups, strict=True):
            own = [each[place] for each in trainer.parts]
            for budget in budgets if place == len(names) - 1 else (1.0,):
                rows = max(round(budget * own[0].critical_rows), 1)
                scored = evaluate_stacked(trainer.stack, own, data, budget_rows=rows)
                for plan, one in zip(group, scored, strict=True):
                    found[plan].setdefault(name, []).append(_numbers(budget, one))
    return found


def run_transfer(
    plan: TransferPlan,
    folder: str | Path,
    *,
    budgets: Sequence[float] = BUDGETS,
    streams: int = 2,
    sequences: int = 128,
) -> Path:
    """``run_transfers`` of one."""
    return run_transfers([plan], folder, budgets=budgets, streams=streams, sequences=sequences)[0]


def _write(path: Path, plan: TransferPlan, fitted: Fitted, scores: Scores) -> None:
    content = {
        "family": FAMILY, "contract_version": CONTRACT_VERSION,
        "suite_versions": {probe.name: probe.version for probe, _ in map(get_probe, (*plan.teach, plan.test))},
        "plan": asdict(plan), "train_s": fitted.seconds, "status": fitted.status, "validation": fitted.losses,
        "scores": scores, "runtime": machine(),
    }  # fmt: skip
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=True), encoding="utf-8")


def _numbers(budget: float, scored: Evaluation) -> dict[str, Any]:
    return {
        "budget": budget, "rows": scored.budget_rows, "floor": scored.floor_name, **scored.metrics,
        "oracle_mse": scored.oracle_error, "stages": scored.stages, "by_layer": scored.by_layer,
        "errors": _together(scored.errors), "floor_errors": _together(scored.floor_errors),
    }  # fmt: skip


def _together(errors: np.ndarray) -> list[float]:
    """Means of a few sequences, which are independent: [streams, B] -> [streams x B / 8]."""
    flat = errors.reshape(-1)
    return [round(float(part.mean()), 6) for part in np.array_split(flat, max(len(flat) // TOGETHER, 1))]


def _refuse_other(plan: TransferPlan, path: Path) -> None:
    """Refuse to go on beside a document of the same name that was made in another way."""
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["contract_version"] != CONTRACT_VERSION:
        what = f"contract {content['contract_version']}; this is contract {CONTRACT_VERSION}"
    else:
        there = {name: value for name, value in content["plan"].items() if name != "device"}
        asked = json.loads(json.dumps({name: value for name, value in asdict(plan).items() if name != "device"}))
        other = [name for name in asked if there.get(name) != asked[name]]
        if not other:
            return
        what = f"{other[0]} {there.get(other[0])}; asked is {asked[other[0]]}"
    raise DataError("E-PROBE-VERSION", f"'{path}' was made with {what}.", fix="Write to another folder with --out.")


def read_transfers(folder: str | Path) -> list[dict[str, Any]]:
    """All documents of transfers in a results folder.

    Raises:
        DataError: E-PROBE-VERSION, they are of different contracts or versions of a suite.
    """
    found: list[dict[str, Any]] = []
    seen: dict[str, tuple[int, Path]] = {}
    for path in sorted((Path(folder) / TRANSFER_FOLDER).glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        for name, version in {"the contract": content["contract_version"], **content["suite_versions"]}.items():
            first, where = seen.setdefault(name, (version, path))
            if first != version:
                raise DataError(
                    "E-PROBE-VERSION",
                    f"'{folder}' mixes transfers of {name} {first} and {version}, as in '{where}' and '{path}'.",
                    fix="Keep one version a folder: move the older documents away.",
                )
        found.append(content)
    return found


def transfer_table(documents: Sequence[dict[str, Any]]) -> str:
    """Markdown: of each tested rung, router and budget, skill and recall above chance over the training seeds.

    Intervals resample seeds, and of skill also sequences.
    """
    groups: dict[tuple[str, str, int, str, float], list[dict[str, Any]]] = {}
    for content in documents:
        plan = content["plan"]
        line = plan["router"] if plan.get("model", "ham") == "ham" else plan["model"]
        for row in content["scores"][plan["test"]]:
            # the first form of these documents held no errors of sequences
            if "errors" in row:
                groups.setdefault((plan["test"], plan["preset"], plan["steps"], line, row["budget"]), []).append(row)
    lines = ["| tested on | preset | steps | line | budget | skill | recall above chance | of each seed | seeds |"]
    lines.append("| --- " * 9 + "|")
    for (test, preset, steps, line, budget), rows in sorted(groups.items()):
        skill = _interval([_skills(row) for row in rows])
        kept = [row["recall_corrected"] for row in rows if "recall_corrected" in row]
        told = _interval([np.array([value]) for value in kept]) if kept else ""
        each = ", ".join(f"{value:.2f}" for value in kept)
        lines.append(
            f"| {test} | {preset} | {steps:,} | {line} | {budget:g} | {skill} | {told} | {each} | {len(rows)} |"
        )
    return "\n".join(lines)


def _skills(row: dict[str, Any]) -> np.ndarray:
    """Skill of each few sequences; their mean is that of all."""
    floor = float(np.mean(row["floor_errors"]))
    return np.asarray((floor - np.array(row["errors"])) / (floor - row["oracle_mse"]))


def _interval(tables: Sequence[np.ndarray]) -> str:
    found = mean_interval(np.stack(tables))
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
