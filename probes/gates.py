"""What a probe must pass before its results mean anything: the contract, and gates G1 to G9.

G3, G4 and G6 to G9 need no trained sequence model and run in the tests; G1, G2 and G5 train small models.

B sequences · Q queries · Y numbers in an answer
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from probes import t0
from probes.contract import CONTRACT_VERSION, EVALUATION_SEED, FAMILY, ProbeBatch, ProbeConfig, generator
from probes.floors import fit_mlp, fit_ridge, ridge_answer
from probes.registry import Probe, get_probe
from probes.scores import best_floor, query_error, selection

__all__ = ["CHEAP", "GateResult", "TRAINED", "check_contract", "validate"]

CHEAP = ("contract", "G3", "G4", "G6", "G7", "G8", "G9")
TRAINED = ("G1", "G2", "G5")
SEQUENCES, STREAM_SEQUENCES = 1_024, 256
# many rungs are tested at once: an interval that each leaves by chance one time in a hundred
NORMAL_99 = 2.576
# how the note of a gate begins that has too few seeds
UNREAD = "not read: "
SHORTCUT_SHARE, SHUFFLED_SKILL, STRIDE_MARGIN = 0.95, 0.02, 0.05


@dataclass(frozen=True)
class GateResult:
    """One gate of one rung. ``passed`` is None where it was not run or does not apply; the note says why.

    Attributes:
        roomy: of G2, skill of the roomy state.
    """

    probe: str
    rung: str
    gate: str
    passed: bool | None
    value: float
    limit: float
    note: str
    roomy: float | None = None

    @property
    def unread(self) -> bool:
        """Whether some line it needs has too few seeds."""
        return self.passed is None and self.note.startswith(UNREAD)

    def __str__(self) -> str:
        word = {True: "pass", False: "FAIL", None: "----"}[self.passed]
        why = f"; {self.reason}" if self.reason else ""
        place = f"{self.probe}/{self.rung}  {self.gate:8s}"
        return f"{word}  {place} {self.value:8.3f} (limit {self.limit:.3f})  {self.note}{why}"

    @property
    def reason(self) -> str:
        """Why a rung fails it or cannot be asked, where the suite says so; nothing where it passes."""
        from probes.registry import list_probes

        probe = list_probes().get(self.probe)
        if self.passed or probe is None:
            return ""
        return probe.cannot.get(f"{self.rung} {self.gate}", "")


@dataclass(frozen=True)
class Sample:
    """Sequences to fit and to score on, of one rung."""

    probe: Probe
    rung: str
    config: ProbeConfig
    train: ProbeBatch
    batch: ProbeBatch


def validate(
    name: str,
    *,
    preset: str = "smoke",
    trained: bool = False,
    gates: Iterable[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    folder: str | Path | None = None,
    workers: int = 1,
    report: Callable[[GateResult], None] | None = None,
) -> list[GateResult]:
    """Run the gates of a probe, or of one of its rungs (``pbc``, ``pbc/pbcD``).

    Args:
        trained: also G1, G2 and G5, which train small models (minutes a rung).
        gates: only these.
        folder: of results: each gate is written there, and not run again where it is there; reports show them.
        workers: trainings side by side; with more than one, into a folder.
        report: called with each result as it comes.

    Raises:
        ValueError: an unknown probe or gate.
    """
    probe, only = get_probe(name)
    wanted = tuple(gates) if gates is not None else CHEAP + (TRAINED if trained else ())
    unknown = sorted(set(wanted) - set(CHEAP) - set(TRAINED))
    if unknown:
        raise ValueError(f"Unknown gate {unknown[0]!r}. Available: {[*CHEAP, *TRAINED]}.")
    results = []
    rungs = (only,) if only else tuple(probe.rungs)
    if workers > 1 and probe.trained and set(wanted) & set(TRAINED):
        train_ahead(probe, rungs, wanted, preset=preset, seed=seed, device=device, folder=folder, workers=workers)
    for rung in rungs:
        run = RungGates(probe, rung, preset=preset, seed=seed, device=device, folder=folder)
        for gate in wanted:
            path = None if folder is None else gate_path(Path(folder), probe, rung, gate, preset=preset, seed=seed)
            found = None if path is None else read_gate(path, probe)
            if found is None:
                found = run(gate)
                if path is not None:
                    write_gate(path, found, run.about(gate))
            results.append(found)
            if report is not None:
                report(found)
    return results


class RungGates:
    """The gates of one rung; sequences are drawn, and small models trained, once for all of them."""

    def __init__(
        self, probe: Probe, rung: str, *, preset: str, seed: int, device: str, folder: str | Path | None
    ) -> None:
        from probes.gates_trained import TrainedGates

        self.probe, self.rung, self.preset, self.seed = probe, rung, preset, seed
        self.trained = TrainedGates(probe, rung, preset, seed, device, None if folder is None else str(folder))

    @cached_property
    def sample(self) -> Sample:
        return draw(self.probe, self.rung, preset=self.preset, seed=self.seed)

    def __call__(self, gate: str) -> GateResult:
        return self.trained(gate) if gate in TRAINED else _CHEAP[gate](self.sample, self.seed)

    def about(self, gate: str) -> dict[str, Any]:
        """What a document says beside the result."""
        from probes.results import machine

        about = {
            "family": FAMILY, "contract_version": CONTRACT_VERSION, "suite_version": self.probe.version,
            "preset": self.preset, "seed": self.seed, "runtime": machine(),
        }  # fmt: skip
        return {**about, "trained": self.trained.details} if gate in TRAINED else about


def train_ahead(
    probe: Probe,
    rungs: Iterable[str],
    wanted: Iterable[str],
    *,
    preset: str,
    seed: int,
    device: str,
    folder: str | Path | None,
    workers: int,
) -> None:
    """Train what the gates of some rungs need side by side; they find it in the folder.

    Raises:
        ValueError: there is no folder.
    """
    from probes.gates_trained import FITS, GateFit, train_side_by_side

    if folder is None:
        raise ValueError("Trainings side by side are handed over in a folder. Pass folder= (--out), or workers=1.")
    fits = dict.fromkeys(fit for gate in wanted for fit in FITS.get(gate, ()))
    jobs = [GateFit(probe.name, rung, fit, preset, seed, device, str(folder)) for rung in rungs for fit in fits]
    train_side_by_side(jobs, workers)


def draw(probe: Probe, rung: str, *, preset: str, seed: int) -> Sample:
    config = probe.config(preset, rung)
    n = SEQUENCES if probe.trained else STREAM_SEQUENCES
    train = probe.sample(generator(seed), n, config)
    return Sample(probe, rung, config, train, probe.sample(generator(EVALUATION_SEED + seed), n, config))


def _result(sample: Sample, gate: str, passed: bool | None, value: float, limit: float, note: str) -> GateResult:
    return GateResult(sample.probe.name, sample.rung, gate, passed, value, limit, note)


def check_contract(probe: Probe, config: ProbeConfig, batch: ProbeBatch, *, seed: int = 0) -> list[str]:
    """What is wrong with a batch, in words; nothing if all holds."""
    first, again = (probe.sample(generator(seed), 4, config) for _ in range(2))
    other = probe.sample(generator(seed + 1), 4, config)
    asked = batch.asked  # [B, Q]
    covered = batch.crit.gather(1, batch.need.clamp_min(0).flatten(1)).reshape(batch.need.shape)
    missed = (batch.need >= 0) & ~covered & asked[..., None]  # [B, Q, R]
    frequent = batch.slices.get("regime")
    if frequent is not None:
        missed &= (frequent == 0)[..., None]  # what comes often is not critical
    rules = {
        "the same seed gives other sequences": torch.equal(first.inputs(), again.inputs())
        and torch.equal(first.y, again.y),
        "another seed gives the same answers": not torch.equal(first.y, other.y),
        "no query counts": bool(asked.any()),
        "a query comes before a row that it needs": bool((batch.need.amax(-1) < batch.q_index)[asked].all()),
        "a needed row is not marked critical": not bool(missed.any()),
        "a query row is not marked as one": bool(batch.query.gather(1, batch.q_index)[asked].all()),
        "a query row is critical or tagged": not bool(((batch.crit | batch.tags) & batch.query).any()),
        "a row is both critical and a distractor": not bool((batch.crit & batch.distract).any()),
        "inputs or answers are not finite": bool(
            torch.isfinite(batch.inputs()).all() and torch.isfinite(batch.y).all()
        ),
    }
    return [text for text, holds in rules.items() if not holds]


def _contract(sample: Sample, seed: int) -> GateResult:
    problems = check_contract(sample.probe, sample.config, sample.batch, seed=seed)
    return _result(sample, "contract", not problems, len(problems), 0, "; ".join(problems) or "shapes, seeds, order")


# --- G3, G4: shortcuts


def _shortcut_errors(sample: Sample, train_y: torch.Tensor, test_y: torch.Tensor, seed: int) -> dict[str, float]:
    """Mean squared error of ridge and MLP on cheap features."""
    probe, train, batch = sample.probe, sample.train, sample.batch
    features, test = probe.shortcut_features(train), probe.shortcut_features(batch)
    fit_x, fit_y = features[train.asked], train_y[train.asked]
    weights = fit_ridge(fit_x, fit_y)
    net = fit_mlp(fit_x, fit_y, seed=seed)
    target = replace(batch, y=test_y)
    return {
        "ridge": float(query_error(ridge_answer(test, weights), target).nanmean()),
        "mlp": float(query_error(net(test), target).nanmean()),
    }


def _g3(sample: Sample, seed: int) -> GateResult:
    batch = sample.batch
    errors = _shortcut_errors(sample, sample.train.y, batch.y, seed)
    # a summary of the set, not what a regression on the key finds: that would excuse a leak in the key
    summaries = {**batch.floor, "mean": sample.probe.floors(sample.train, batch)["mean"]}
    floor_name, floor = best_floor(summaries, batch)
    least = min(errors, key=lambda name: errors[name])
    ratio = errors[least] / float(floor.nanmean())
    return _result(sample, "G3", ratio >= SHORTCUT_SHARE, ratio, SHORTCUT_SHARE,
                   f"{least} on cheap features, against the floor {floor_name}")  # fmt: skip


def _g4(sample: Sample, seed: int) -> GateResult:
    gen = generator(seed + 77)
    shuffled = [part.y[torch.randperm(len(part), generator=gen)] for part in (sample.train, sample.batch)]
    train, batch = replace(sample.train, y=shuffled[0]), replace(sample.batch, y=shuffled[1])
    errors = _shortcut_errors(sample, shuffled[0], shuffled[1], seed)
    _, floor = best_floor(sample.probe.floors(train, batch), batch)
    reference = float(floor.nanmean())
    values = {name: 1.0 - error / reference for name, error in errors.items()}
    worst = max(values, key=lambda name: abs(values[name]))
    return _result(sample, "G4", abs(values[worst]) <= SHUFFLED_SKILL, values[worst], SHUFFLED_SKILL,
                   f"skill of {worst} on answers of other sequences")  # fmt: skip


# --- G6, G7: routers that know nothing


def _budget(sample: Sample) -> int:
    """As many rows as items: far from filling the context in every suite."""
    return max(sample.config.items, 1)


def _g6(sample: Sample, seed: int) -> GateResult:
    batch = sample.batch
    score = torch.rand(batch.crit.shape, generator=generator(seed + 5)).masked_fill(batch.query, -math.inf)
    chosen = selection(t0.keep(score, batch, _budget(sample)), batch)
    apart = (chosen.any_row.double() - chosen.chance) * batch.asked  # [B, Q]
    each = apart.sum(1) / batch.asked.sum(1).clamp_min(1)  # [B]
    error = float(each.std()) / math.sqrt(len(each))
    value = abs(float(each.mean()))
    return _result(sample, "G6", value <= NORMAL_99 * error, value, NORMAL_99 * error,
                   f"random recall against R0 = {float(chosen.chance[batch.asked].mean()):.3f}")  # fmt: skip


def _g7(sample: Sample, seed: int) -> GateResult:
    """Rows themselves, without tolerance: a regular grid hits a window more often than chance by geometry alone."""
    batch, rows = sample.batch, _budget(sample)
    T = batch.context_rows
    step = max(T // rows, 1)
    needed = (batch.need >= 0) & batch.asked[..., None]  # [B, Q, R]
    recalls = []
    for phase in range(step):
        hit = ((batch.need - phase) % step == 0) & needed
        recalls.append(float(hit.sum() / needed.sum()))
    chance = 1.0 / step
    best = max(recalls)
    return _result(sample, "G7", best <= chance + STRIDE_MARGIN, best, chance + STRIDE_MARGIN,
                   f"stride of {step} rows at its best phase, R0 = {chance:.3f}")  # fmt: skip


# --- G8, G9: flags and places


def _g8(sample: Sample, seed: int) -> GateResult:
    probe, batch = sample.probe, sample.batch
    if not probe.matched_flags:
        return _result(sample, "G8", None, math.nan, 0.0, f"the suite says otherwise: {probe.flags_note}")
    if not bool(batch.distract.any()):
        if "distractors" not in probe.axes:
            return _result(sample, "G8", None, math.nan, 0.0, "no distractors in this suite")
        config = probe.config(rung=sample.rung, distractors=sample.config.items)
        batch = probe.sample(generator(seed), 256, config)
    flagged = batch.events.abs().sum(-1) > 0  # [B, L]
    apart = abs(float(flagged[batch.distract].float().mean()) - float(flagged[batch.crit].float().mean()))
    return _result(sample, "G8", apart <= 0.05, apart, 0.05, "share flagged, distractors against critical rows")


def _g9(sample: Sample, seed: int) -> GateResult:
    moved_config = replace(sample.config, swap=(("positions", 1),))
    n = len(sample.batch)
    moved = sample.probe.sample(generator(EVALUATION_SEED + seed), n, moved_config)
    worst, note = 0.0, "floors with items at other rows"
    for name in sample.batch.floor:
        pair = [_by_sequence(query_error(part.floor[name], part), part.asked) for part in (sample.batch, moved)]
        error = math.sqrt(sum(float(each.var()) / len(each) for each in pair))
        apart = abs(float(pair[0].mean() - pair[1].mean()))
        if error > 0 and apart / error > worst:
            worst, note = apart / error, f"floor {name} with items at other rows, in standard errors"
    return _result(sample, "G9", worst <= NORMAL_99, worst, NORMAL_99, note)


def _by_sequence(error: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    return error.nan_to_num().sum(1) / asked.sum(1).clamp_min(1)


_CHEAP: dict[str, Any] = {
    "contract": _contract, "G3": _g3, "G4": _g4, "G6": _g6, "G7": _g7, "G8": _g8, "G9": _g9,
}  # fmt: skip


# --- on disk


GATE_FOLDER = "gates"


def gate_path(folder: Path, probe: Probe, rung: str, gate: str, *, preset: str, seed: int) -> Path:
    return folder / GATE_FOLDER / probe.name / f"{rung}__{gate}__{preset}__s{seed}.json"


def write_gate(path: Path, result: GateResult, about: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    from hamts.files import written_whole

    with written_whole(path) as partial:
        partial.write_text(json.dumps({**asdict(result), **about}, indent=1, allow_nan=True), encoding="utf-8")


def read_gate(path: Path, probe: Probe) -> GateResult | None:
    """A result that was written for this version of the suite; None where there is none."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if (content["contract_version"], content["suite_version"]) != (CONTRACT_VERSION, probe.version):
        return None
    return GateResult(**{f.name: content[f.name] for f in fields(GateResult)})


def read_gates(folder: str | Path) -> list[GateResult]:
    """All results of gates in a folder that hold for the suites as they are."""
    from probes.registry import list_probes

    known = list_probes()
    found = []
    for path in sorted((Path(folder) / GATE_FOLDER).glob("*/*.json")):
        result = read_gate(path, known[path.parent.name]) if path.parent.name in known else None
        if result is not None:
            found.append(result)
    return found
