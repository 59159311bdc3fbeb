"""Saved networks asked again: about a longer past, with less exact entries, or against what each row was worth.

Nothing is trained here. A network that is asked at another size than it was trained at extrapolates, and its results
say so; they go to a folder of their own. Its thresholds are found anew for the share and the length that are asked
(``longer.py``). On a GPU the seeds of a line are read side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hamts.errors import DataError
from probes.contract import PRESETS, ProbeConfig
from probes.evaluate import Evaluation, evaluate
from probes.layer_rows import LAYER_SPLITS, layer_rows
from probes.longer import CALIBRATION_SEQUENCES, AskedSequences, calibrate_at, calibration, evaluate_long
from probes.reading import PRECISIONS, STATE_ONLY
from probes.registry import Probe, get_probe
from probes.results import document, read_documents, start_folder, write_document
from probes.runner import Bars, bars, check_device
from probes.runner_plan import STACKED_MODELS, STACKED_ROUTERS, Cell, budget_rows, critical_rows
from probes.saved import load_cell, load_network, network_path, network_paths
from probes.stacked import StackedNet
from probes.stacked_data import MECHANISMS
from probes.stacked_evaluate import evaluate_stacked
from probes.summary import best_rates
from probes.train import Fitted

__all__ = ["POSITIONS", "Revisit", "chosen_cells", "folder_name", "longer_config", "revisit"]

# routers whose score a threshold or a list can go by
SCORED_ROUTERS = ("surprise", "innovation", "error", "write", "learned", "mix")
# of rows beyond those of training
POSITIONS = ("kept", "scaled")
# sizes that a preset may change under a network; everything else decides what its columns mean
SIZES = ("context_rows", "items", "queries", "counts")


@dataclass(frozen=True, kw_only=True)
class Revisit:
    """What saved networks are asked.

    Attributes:
        preset: of the sequences; None: the one they were trained at.
        precisions: of the keys and values of kept rows.
        layers: how HAM's total of entries is shared by its layers, of ``LAYER_SPLITS``; none: alike, as trained.
        mechanisms: how HAM's scored routers keep to a budget, of ``MECHANISMS``; none: as they were trained.
        budgets: multiples of the critical rows; none: those of each network.
        positions: of another preset's rows, of ``POSITIONS``: as they are, or scaled to the ages of training.
        streams, sequences: None: the preset's.
        rungs: of the folder; none: all.
    """

    preset: str | None = None
    precisions: tuple[str, ...] = ("float32",)
    mechanisms: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()
    streams: int | None = None
    sequences: int | None = None
    rungs: tuple[str, ...] = ()
    positions: tuple[str, ...] = POSITIONS
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what, names, known in (
            ("preset", [self.preset or "long"], PRESETS), ("precision", self.precisions, PRECISIONS),
            ("mechanism", self.mechanisms, MECHANISMS), ("positions", self.positions, POSITIONS),
            ("split of layers", self.layers, LAYER_SPLITS),
        ):  # fmt: skip
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise ValueError(f"Unknown {what} {unknown[0]!r}. Available: {sorted(known)}.")
        plain = self.preset is None and tuple(self.precisions) == ("float32",)
        if (self.mechanisms or self.layers) and not (plain and not (self.mechanisms and self.layers)):
            raise ValueError(
                "A mechanism, or a split of layers, is asked about at the size and precision of training. Ask one"
                " thing at a time."
            )
        if plain and not self.mechanisms and not self.layers:
            raise ValueError(
                "Nothing would change: name another preset, such as 'long', a precision, such as int8, or a split of"
                " the layers, such as first."
            )


def longer_config(cell: Cell, preset: str) -> ProbeConfig:
    """The question a network was trained on, at the sizes of another preset.

    Only sizes change (rows, items, queries): a preset's other settings would change what is asked.
    """
    probe = get_probe(cell.probe)[0]
    target = probe.config(preset, cell.rung)
    changes = {name: getattr(target, name) for name in SIZES if hasattr(target, name)}
    return probe.config(cell.preset, cell.rung, **{**dict(cell.overrides), **changes})


def revisit(
    folder: str | Path,
    out: str | Path,
    plan: Revisit,
    *,
    device: str = "cpu",
    progress: bool = True,
    in_step: bool | None = None,
) -> list[Path]:
    """Ask every saved network of a folder, at the learning rate that was chosen for it, and write documents.

    Args:
        in_step: read the seeds of a line side by side, where another preset is asked; None: on a GPU.

    Raises:
        DataError: E-FILE (no networks), E-PROBE-VERSION, E-PROBE-DAMAGED, E-OPTION (sizes would be mixed in a folder).
    """
    check_device(device)
    root, target = Path(folder), Path(out)
    if plan.preset is not None and target.resolve() == root.resolve():
        raise DataError(
            "E-OPTION", f"'{root}' holds results of other sizes than preset {plan.preset!r}.",
            fix="Write to another folder with --out.",
        )  # fmt: skip
    cells = list(chosen_cells(root, plan.rungs))
    if not cells:
        raise DataError(
            "E-FILE", f"'{root}' holds no finished network of {', '.join(plan.rungs)}.",
            fix="Run these rungs first, or name those that are there (--rungs).",
        )  # fmt: skip
    jobs = [(path, cell, job) for path, cell in cells for job in _jobs(cell, plan)]
    names = [str(_path(target, job).relative_to(target)) for _, _, job in jobs]
    versions = {cell.probe: cell.suite_version for _, cell in cells}
    start_folder(target, names, versions, done=False)
    together = device.startswith("cuda") if in_step is None else in_step
    side, rest = _side_by_side(jobs, plan, together)
    with bars(len(jobs), progress) as report:
        sequences = AskedSequences(sorted({cell.seed for _, cell in cells}), device)
        for group in side:
            _ask_together(group, target, plan, sequences, report)
        for path, cell in cells:
            mine = [job for other, _, job in rest if other == path]
            _ask(path, cell, mine, target, plan, device, report)
    start_folder(target, names, versions, done=True)
    return [_path(target, job) for _, _, job in jobs]


@dataclass(frozen=True)
class Job:
    """One network at one budget and precision; ``cell`` is as it is written down."""

    cell: Cell
    budget: float
    precision: str = "float32"
    mechanism: str = ""
    positions: str = "kept"
    layers: str = ""


def _jobs(cell: Cell, plan: Revisit) -> Iterator[Job]:
    if cell.model == "ham" and cell.router in SCORED_ROUTERS:
        for mechanism in plan.mechanisms:
            told = replace(
                cell, axis=", ".join(word for word in (cell.axis, mechanism) if word),
                streams=plan.streams or cell.streams, sequences=plan.sequences or cell.sequences,
            )  # fmt: skip
            yield from (Job(told, budget, mechanism=mechanism) for budget in plan.budgets or cell.budgets)
    for split in plan.layers if cell.model == "ham" else ():
        told = replace(
            cell, axis=", ".join(word for word in (cell.axis, f"layers {split}") if word),
            streams=plan.streams or cell.streams, sequences=plan.sequences or cell.sequences,
        )  # fmt: skip
        yield from (Job(told, budget, layers=split) for budget in plan.budgets or cell.budgets)
    size = PRESETS[plan.preset or cell.preset]
    stacked = cell.router in STACKED_ROUTERS if cell.model == "ham" else cell.model in STACKED_MODELS
    keeps_rows = cell.model not in STATE_ONLY
    for precision in plan.precisions:
        exact = precision == "float32"
        # what has been run already, or has nothing to round
        if (exact and plan.preset is None) or not (exact or keeps_rows):
            continue
        for positions in plan.positions if plan.preset else POSITIONS[:1]:
            scaled = positions == "scaled"
            # scaled in the stacked form alone; what keeps no rows turns none
            if scaled and not (stacked and exact and keeps_rows):
                continue
            words = [f"at {plan.preset}" if plan.preset else "", "scaled" * scaled, "" if exact else precision]
            told = replace(
                cell, axis=", ".join(word for word in (cell.axis, *words) if word),
                streams=plan.streams or size.eval_streams, sequences=plan.sequences or size.eval_sequences,
            )  # fmt: skip
            # a rival has the size it was trained at
            budgets = plan.budgets if plan.budgets and cell.model == "ham" else cell.budgets
            yield from (Job(told, budget, precision, positions=positions) for budget in budgets)


def _path(target: Path, job: Job) -> Path:
    return target / job.cell.probe / job.cell.file_name(job.budget)


def _ask(path: Path, cell: Cell, jobs: Sequence[Job], target: Path, plan: Revisit, device: str, report: Bars) -> None:
    fitted: Fitted | None = None
    for job in jobs:
        written = _path(target, job)
        if not written.is_file():
            fitted = fitted or asked_at(load_network(path, device=device)[1], cell, plan.preset)
            rows = budget_rows(job.budget, fitted.plan.critical_rows)
            if plan.preset is not None:
                calibrate_at(fitted.net, calibration(fitted.plan).to(device), rows)
            scored = evaluate(
                fitted, budget_rows=rows, streams=job.cell.streams, sequences=job.cell.sequences,
                precision=job.precision,
                layer_rows=layer_rows(job.layers, fitted, rows=rows) if job.layers else (),
            )  # fmt: skip
            _write(written, cell, job, fitted, scored, plan, device)
        report.finish(f"{cell.name} {job.precision}")


def _write(path: Path, cell: Cell, job: Job, fitted: Fitted, scored: Evaluation, plan: Revisit, device: str) -> None:
    content = document(job.cell, fitted, scored, budget=job.budget, device=device)
    content["budget"]["dtype"] = job.precision
    # the cell's own identity stays as it is: its name is made of it
    content["config"] = {**content["config"], "eval_preset": plan.preset or cell.preset}
    if job.layers:
        content["budget"]["layer_rows"] = list(scored.layer_rows)
    if job.mechanism:
        content["config"]["mechanism"] = job.mechanism
    if plan.preset is not None:
        content["config"]["positions"] = job.positions
        content["config"]["thresholds"] = f"found on {CALIBRATION_SEQUENCES} sequences of preset {plan.preset}"
        content["warnings"].append(_extrapolated(cell, fitted, plan.preset))
    write_document(path, content, scored.errors)


Asked = tuple[Path, Cell, Job]


def _side_by_side(jobs: Sequence[Asked], plan: Revisit, together: bool) -> tuple[list[list[Asked]], list[Asked]]:
    """Jobs that are read side by side, rung by rung and seeds of a line together, and the others."""
    groups: dict[Any, list[Asked]] = {}
    rest: list[Asked] = []
    for asked in jobs:
        _, cell, job = asked
        stacked = cell.router in STACKED_ROUTERS if cell.model == "ham" else cell.model in STACKED_MODELS
        # what is there in the stacked form alone, and what may as well be read in it
        only = bool(job.mechanism) or job.positions == "scaled"
        if not only and not (together and stacked and plan.preset is not None and job.precision == "float32"):
            rest.append(asked)
            continue
        # the sequences are those of the first part, the line is told by the whole
        line = (cell.probe, cell.rung, cell.readout, str(cell.overrides), replace(cell, seed=0, learning_rate=0.0))
        groups.setdefault((*line, job.mechanism, job.positions, job.budget), []).append(asked)
    return [groups[key] for key in sorted(groups, key=lambda key: key[:4])], rest


def _ask_together(group: Sequence[Asked], target: Path, plan: Revisit, sequences: AskedSequences, report: Bars) -> None:
    """Ask the networks of a line that differ in seed alone, at one budget."""
    todo = [(path, cell, job) for path, cell, job in group if not _path(target, job).is_file()]
    if todo:
        # the budgets of a line come one after another
        loaded = {path: sequences.loaded.get(path) or load_network(path)[1] for path, _, _ in todo}
        sequences.loaded = loaded
        fitted = [asked_at(loaded[path], cell, plan.preset) for path, cell, _ in todo]
        first = todo[0][2]
        data, settled_on = sequences.of(fitted[0].plan, streams=first.cell.streams, sequences=first.cell.sequences)
        rows = budget_rows(first.budget, fitted[0].plan.critical_rows)
        if first.mechanism:
            stack, plans = StackedNet([one.net for one in fitted], device=sequences.device), [o.plan for o in fitted]
            scores = evaluate_stacked(stack, plans, data, budget_rows=rows, mechanism=first.mechanism, diagnose=False)
        else:
            scale = first.cell.config.context_rows / fitted[0].plan.config.context_rows
            scores = evaluate_long(
                fitted, data, settled_on, rows=rows, device=sequences.device,
                scale=scale if first.positions == "scaled" else 1.0,
            )  # fmt: skip
        for (_, cell, job), one, scored in zip(todo, fitted, scores, strict=True):
            _write(_path(target, job), cell, job, one, scored, plan, sequences.device)
    for _, cell, _ in group:
        report.finish(cell.name)


def _extrapolated(cell: Cell, fitted: Fitted, preset: str) -> str:
    trained = cell.config
    asked = fitted.plan.config
    return (
        f"extrapolation: trained at {cell.preset} ({trained.context_rows:,} rows, {trained.items} items), asked at"
        f" {preset} ({asked.context_rows:,} rows, {asked.items} items)"
    )


def asked_at(fitted: Fitted, cell: Cell, preset: str | None) -> Fitted:
    """The network with sequences of another preset.

    Raises:
        DataError: E-PROBE-CHANNELS, rows of that preset have other columns than it was trained on.
    """
    if preset is None:
        return fitted
    from probes.contract import generator

    config = longer_config(cell, preset)
    probe = fitted.plan.probe
    pair = [probe.sample(generator(0), 1, each) for each in (cell.config, config)]
    widths = [(part.inputs().shape[-1], part.y.shape[-1]) for part in pair]
    if widths[0] != widths[1]:
        raise DataError(
            "E-PROBE-CHANNELS",
            f"{cell.rung} at {preset} has {widths[1][0]} columns and {widths[1][1]} numbers in an answer; the network"
            f" was trained on {widths[0][0]} and {widths[0][1]}.",
            fix="Train it at a preset whose columns are the same.",
        )
    plan = replace(fitted.plan, config=config, critical_rows=_critical_rows(probe, config))
    return replace(fitted, plan=plan)


@lru_cache
def _critical_rows(probe: Probe, config: ProbeConfig) -> int:
    """Drawn once for all networks of a rung: 64 long sequences."""
    return critical_rows(probe, config)


def chosen_cells(root: Path, rungs: Sequence[str] = ()) -> Iterator[tuple[Path, Cell]]:
    """The saved networks of a folder, or of some rungs, at the learning rates that its documents say are best."""
    documents = read_documents(root, partial=True)
    hashes = {content["identity"]["config_hash"] for content in best_rates(documents)}
    for path in network_paths(root):
        if rungs and path.name.partition("__")[0] not in rungs:
            continue
        cell = load_cell(path)
        if path != network_path(cell, root):
            raise DataError(
                "E-PROBE-VERSION", f"'{path}' was trained by another version of the runner, or was renamed.",
                fix="Remove it, and run its cell again: the same call goes on where it stopped.",
            )  # fmt: skip
        if cell.hash in hashes:
            yield path, cell


def folder_name(folder: Path, plan: Revisit) -> Path:
    """Where results go if nobody says so."""
    if plan.mechanisms:
        return folder.with_name(f"{folder.name}_mechanisms")
    return folder if plan.preset is None else folder.with_name(f"{folder.name}_{plan.preset}")
