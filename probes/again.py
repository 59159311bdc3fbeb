"""Saved networks asked again: about a longer past, with less exact entries, or against what each row was worth.

Nothing is trained here. A network that is asked at another size than it was trained at extrapolates, and its results
say so; they go to a folder of their own. Its thresholds are found anew for the share and the length that are asked
(``longer.py``). On a GPU the seeds of a line are read side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from hamts.errors import DataError
from probes.contract import PRESETS, ProbeConfig
from probes.evaluate import Evaluation, evaluate
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
from probes.utility import Gold, describe, gold_utility, router_scores, utility_of

__all__ = ["Revisit", "folder_name", "longer_config", "revisit", "score_utility", "utility_table"]

# routers whose score a threshold or a list can go by
SCORED_ROUTERS = ("surprise", "innovation", "error", "write", "learned", "mix")
# sizes that a preset may change under a network; everything else decides what its columns mean
SIZES = ("context_rows", "items", "queries", "counts")


@dataclass(frozen=True, kw_only=True)
class Revisit:
    """What saved networks are asked.

    Attributes:
        preset: of the sequences; None: the one they were trained at.
        precisions: of the keys and values of kept rows.
        mechanisms: how HAM's scored routers keep to a budget, of ``MECHANISMS``; none: as they were trained.
        budgets: multiples of the critical rows; none: those of each network.
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

    def __post_init__(self) -> None:
        for what, names, known in (
            ("preset", [self.preset or "long"], PRESETS), ("precision", self.precisions, PRECISIONS),
            ("mechanism", self.mechanisms, MECHANISMS),
        ):  # fmt: skip
            unknown = sorted(set(names) - set(known))
            if unknown:
                raise ValueError(f"Unknown {what} {unknown[0]!r}. Available: {sorted(known)}.")
        if self.mechanisms and (self.preset is not None or tuple(self.precisions) != ("float32",)):
            raise ValueError(
                "A mechanism is asked about at the size and precision of training. Ask one thing at a time."
            )
        if self.preset is None and tuple(self.precisions) == ("float32",) and not self.mechanisms:
            raise ValueError("Nothing would change: name another preset, such as 'long', or a precision, such as int8.")


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
    # other mechanisms are there in the stacked form alone
    together = bool(plan.mechanisms) or (device.startswith("cuda") if in_step is None else in_step)
    side, rest = _side_by_side(jobs, plan) if together else ([], jobs)
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


def _jobs(cell: Cell, plan: Revisit) -> Iterator[Job]:
    if cell.model == "ham" and cell.router in SCORED_ROUTERS:
        for mechanism in plan.mechanisms:
            told = replace(
                cell, axis=", ".join(word for word in (cell.axis, mechanism) if word),
                streams=plan.streams or cell.streams, sequences=plan.sequences or cell.sequences,
            )  # fmt: skip
            yield from (Job(told, budget, mechanism=mechanism) for budget in plan.budgets or cell.budgets)
    size = PRESETS[plan.preset or cell.preset]
    keeps_rows = cell.model not in STATE_ONLY
    for precision in plan.precisions:
        exact = precision == "float32"
        # what has been run already, or has nothing to round
        if (exact and plan.preset is None) or not (exact or keeps_rows):
            continue
        words = [f"at {plan.preset}" if plan.preset else "", "" if exact else precision]
        told = replace(
            cell, axis=", ".join(word for word in (cell.axis, *words) if word),
            streams=plan.streams or size.eval_streams, sequences=plan.sequences or size.eval_sequences,
        )  # fmt: skip
        # a rival has the size it was trained at
        budgets = plan.budgets if plan.budgets and cell.model == "ham" else cell.budgets
        yield from (Job(told, budget, precision) for budget in budgets)


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
            )  # fmt: skip
            _write(written, cell, job, fitted, scored, plan, device)
        report.finish(f"{cell.name} {job.precision}")


def _write(path: Path, cell: Cell, job: Job, fitted: Fitted, scored: Evaluation, plan: Revisit, device: str) -> None:
    content = document(job.cell, fitted, scored, budget=job.budget, device=device)
    content["budget"]["dtype"] = job.precision
    # the cell's own identity stays as it is: its name is made of it
    content["config"] = {**content["config"], "eval_preset": plan.preset or cell.preset}
    if job.mechanism:
        content["config"]["mechanism"] = job.mechanism
    if plan.preset is not None:
        content["config"]["thresholds"] = f"found on {CALIBRATION_SEQUENCES} sequences of preset {plan.preset}"
        content["warnings"].append(_extrapolated(cell, fitted, plan.preset))
    write_document(path, content, scored.errors)


Asked = tuple[Path, Cell, Job]


def _side_by_side(jobs: Sequence[Asked], plan: Revisit) -> tuple[list[list[Asked]], list[Asked]]:
    """Jobs that can be read side by side, rung by rung and seeds of a line together, and the others."""
    groups: dict[Any, list[Asked]] = {}
    rest: list[Asked] = []
    for asked in jobs:
        _, cell, job = asked
        known = cell.router in STACKED_ROUTERS if cell.model == "ham" else cell.model in STACKED_MODELS
        if (plan.preset is None and not job.mechanism) or job.precision != "float32" or not known:
            rest.append(asked)
        else:
            # the sequences are those of the first part, the line is told by the whole
            line = (cell.probe, cell.rung, cell.readout, str(cell.overrides), replace(cell, seed=0, learning_rate=0.0))
            groups.setdefault((*line, job.mechanism, job.budget), []).append(asked)
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
            scores = evaluate_long(fitted, data, settled_on, rows=rows, device=sequences.device)
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


# --- utility


def score_utility(folder: str | Path, *, device: str = "cpu", sequences: int = 32, progress: bool = True) -> list[Path]:
    """Add to the documents of a folder how well each router orders rows by what they are worth to full attention.

    Of each rung, the full-attention network of the same training seed is the teacher, else the first there is.
    Documents that have it already are left as they are.

    Raises:
        DataError: E-FILE, a folder without networks, or without one of full attention.
    """
    check_device(device)
    root = Path(folder)
    cells = list(chosen_cells(root))
    teachers = {(cell.rung, cell.readout, cell.seed): path for path, cell in cells if cell.model == "full"}
    if not teachers:
        raise DataError(
            "E-FILE", f"'{root}' holds no network of full attention, which utility is measured by.",
            fix="Run the same probes with --models full into it.",
        )  # fmt: skip
    documents: dict[str, list[dict[str, Any]]] = {}
    for content in read_documents(root, partial=True):
        documents.setdefault(content["identity"]["config_hash"], []).append(content)
    gold: dict[Path, Gold] = {}
    changed = []
    with bars(len(cells), progress) as report:
        for path, cell in cells:
            teacher = _teacher(teachers, cell)
            todo = [c for c in documents.get(cell.hash, []) if "utility" not in c["diagnosis"]]
            if teacher is not None and todo and cell.model == "ham":
                if teacher not in gold:
                    gold[teacher] = gold_utility(load_network(teacher, device=device)[1], sequences=sequences)
                changed += _note(load_network(path, device=device)[1], gold[teacher], todo)
            report.finish(cell.name)
    return changed


def _teacher(teachers: dict[tuple[str, str, int], Path], cell: Cell) -> Path | None:
    same = teachers.get((cell.rung, cell.readout, cell.seed))
    others = [path for key, path in sorted(teachers.items()) if key[:2] == (cell.rung, cell.readout)]
    return same or (others[0] if others else None)


def _note(fitted: Fitted, gold: Gold, documents: Sequence[dict[str, Any]]) -> list[Path]:
    """Write the scores of one network into its documents."""
    scores = router_scores(fitted, gold.batch)
    if not scores:
        return []
    found, about = utility_of(scores, gold), describe(gold, scores)
    written = []
    for content in documents:
        path = Path(content.pop("path"))
        for name, value in found.items():
            content["results"][name] = {"values": [value], "median": value, "std": 0.0, "n": len(gold.batch)}
        content["diagnosis"]["utility"] = about
        write_document(path, content)
        written.append(path)
    return written


def utility_table(documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each rung and line that has a utility, mean over training seeds."""
    from probes.summary import label

    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for content in best_rates(documents):
        if "utility" in content["diagnosis"]:
            key = (content["identity"]["rung"], label(content["identity"]))
            rows.setdefault(key, []).append(content)
    names = ("utility_auroc", "utility_auroc_window", "utility_ap", "utility_ap_chance", "utility_spearman")
    return [
        {"rung": rung, "line": line,
         **{name: _mean([c["results"][name]["median"] for c in group if name in c["results"]]) for name in names},
         "gold AUROC of the truth": _mean([c["diagnosis"]["utility"]["gold_auroc_of_truth"] for c in group]),
         "seeds": len({c["data_manifest"]["train_seed"] for c in group})}
        for (rung, line), group in rows.items()
    ]  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def folder_name(folder: Path, plan: Revisit) -> Path:
    """Where results go if nobody says so."""
    if plan.mechanisms:
        return folder.with_name(f"{folder.name}_mechanisms")
    return folder if plan.preset is None else folder.with_name(f"{folder.name}_{plan.preset}")
