"""Gates that train small models: full attention solves it (G1), a small state cannot (G2), an oracle's cache can (G5).

They take minutes a rung and are run on demand.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hamts.files import written_whole
from probes.contract import CONTRACT_VERSION, PRESETS
from probes.evaluate import evaluate
from probes.gates import UNREAD, GateResult
from probes.models import NetConfig
from probes.registry import Probe, get_probe
from probes.runner_plan import STATE_WIDTH, critical_rows
from probes.train import TrainPlan, train

__all__ = ["FITS", "GateFit", "TrainedGates", "gates_in_runs", "gates_of_runs", "train_side_by_side"]

SOLVED, SMALL_STATE, ROOMY_STATE, ORACLE_SHARE = 0.95, 0.7, 0.65, 0.9
G1_CPU_SECONDS = 300.0
# what the contract says a suite needs beyond the preset
STEPS = {"rrr": 2_000, "topo": 2_000, "act": 1_500}
LEARNING_RATE = 4e-3
EVALUATED_SEQUENCES = 256


# the models that each gate needs
FITS = {"G1": ("full",), "G2": ("narrow", "wide"), "G5": ("full", "oracle")}
LINE_NAMES = {
    "full": "full attention", "narrow": "a small state", "wide": "a roomy state", "oracle": "the oracle's list",
}  # fmt: skip
# skill of each training seed, by fit and width of the state
Lines = dict[tuple[str, int], dict[int, float]]


def steps_of(suite: str, preset: str) -> int:
    return max(STEPS.get(suite, 1_500), PRESETS[preset].train_steps)


@dataclass(frozen=True)
class GateFit:
    """One small model of one rung, to be trained in a process of its own."""

    probe: str
    rung: str
    fit: str
    preset: str
    seed: int
    device: str
    folder: str | None = None

    @property
    def path(self) -> Path | None:
        name = f"{self.rung}__{self.fit}__{self.preset}__s{self.seed}.json"
        return None if self.folder is None else Path(self.folder) / "gates" / self.probe / "fits" / name

    @property
    def key_width(self) -> int:
        """Of the recurrent models: rho = items / (heads x key width) of at least 2, and of at most a quarter.

        The width varies, the question stays as it is: with two items instead of many, a sequence asks two questions,
        and teaches too little to tell a small state from an untrained one.
        """
        items = get_probe(self.probe)[0].config(self.preset, self.rung).items
        # rotary positions pair the numbers of a key
        return max(2 * (items // 4), 2) if self.fit == "narrow" else 4 * items

    def net(self) -> NetConfig:
        probe = get_probe(self.probe)[0]
        layers = probe.depth(probe.config(self.preset, self.rung))
        if self.fit == "full":
            return NetConfig(model="full", layers=layers)
        if self.fit == "oracle":
            return NetConfig(router="oracle", layers=layers)
        return NetConfig(model="recurrent", layers=layers, state_width=self.key_width)

    def __call__(self) -> dict[str, Any]:
        """Train and score it; what is on disk for this version of the suite is taken from there."""
        probe = get_probe(self.probe)[0]
        version = [CONTRACT_VERSION, probe.version]
        if self.path is not None and self.path.is_file():
            found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            if found["version"] == version:
                return found
        config = probe.config(self.preset, self.rung)
        steps = steps_of(self.probe, self.preset)
        rows = critical_rows(probe, config)
        plan = TrainPlan(
            probe=probe, config=config, net=self.net(), steps=steps, learning_rate=LEARNING_RATE, seed=self.seed,
            critical_rows=rows, device=self.device,
        )  # fmt: skip
        # of this process, so that a busy machine does not fail a gate
        started = time.process_time()
        fitted = train(plan)
        seconds = time.process_time() - started
        scored = evaluate(fitted, budget_rows=rows, streams=1, sequences=EVALUATED_SEQUENCES, diagnose=False)
        content = {
            "skill": scored.metrics["skill"], "steps": steps, "learning_rate": LEARNING_RATE, "cpu_seconds": seconds,
            "steps_to_solve": fitted.steps_to_solve, "status": fitted.status, "validation_nerr": fitted.losses,
            "floor": scored.floor_name, "version": version, "net": asdict(plan.net),
            **{name: value for name, value in scored.metrics.items() if name.startswith("recall")},
        }  # fmt: skip
        if self.path is not None:
            with written_whole(self.path) as partial:
                partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return content


@dataclass
class TrainedGates:
    """G1, G2 and G5 of one rung; what two of them need is trained once.

    Attributes:
        folder: where trained models are noted down, so that they are not trained again.
        details: of every model that was trained, by its name.
    """

    probe: Probe
    rung: str
    preset: str
    seed: int = 0
    device: str = "cpu"
    folder: str | None = None
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, gate: str) -> GateResult:
        """Run one of them."""
        if not self.probe.trained:
            return self._result(gate, None, math.nan, 0.0, "scored without training: see the exact tests")
        return {"G1": self._solvable, "G2": self._capacity, "G5": self._oracle}[gate]()

    def job(self, fit: str) -> GateFit:
        return GateFit(self.probe.name, self.rung, fit, self.preset, self.seed, self.device, self.folder)

    def _solvable(self) -> GateResult:
        full = self._fit("full")
        note = f"full attention, {full['steps']} steps in {full['cpu_seconds']:.0f} s of CPU time{_ended(full)}"
        if self.device == "cpu" and full["cpu_seconds"] > G1_CPU_SECONDS:
            return self._result("G1", False, full["skill"], SOLVED, note + ": more than five minutes")
        return self._result("G1", full["skill"] >= SOLVED, full["skill"], SOLVED, note)

    def _capacity(self) -> GateResult:
        """The recurrent model fails where its state is small, and is fair where it is roomy."""
        items = self.probe.config(self.preset, self.rung).items
        widths = [self.job(fit).key_width for fit in ("narrow", "wide")]
        small, roomy = self._fit("narrow")["skill"], self._fit("wide")["skill"]
        passed = small <= SMALL_STATE and roomy >= ROOMY_STATE and roomy >= small
        note = (
            f"recurrent skill at rho {items / widths[0]:.3g} (key width {widths[0]}); at rho {items / widths[1]:.3g}"
            f" (width {widths[1]}) it is {roomy:.3f} and must reach {ROOMY_STATE}"
        )
        return self._result("G2", passed, small, SMALL_STATE, note)

    def _oracle(self) -> GateResult:
        full, oracle = self._fit("full"), self._fit("oracle")
        note = f"cache of the critical rows, against full attention at {full['skill']:.3f}{_ended(oracle)}"
        limit = ORACLE_SHARE * full["skill"]
        return self._result("G5", oracle["skill"] >= limit, oracle["skill"], limit, note)

    def _fit(self, fit: str) -> dict[str, Any]:
        if fit not in self.details:
            self.details[fit] = self.job(fit)()
        return self.details[fit]

    def _result(self, gate: str, passed: bool | None, value: float, limit: float, note: str) -> GateResult:
        return GateResult(self.probe.name, self.rung, gate, passed, value, limit, note)


def _ended(fitted: dict[str, Any]) -> str:
    return "" if fitted["status"] == "ok" else f", training {fitted['status']}"


def train_side_by_side(jobs: Sequence[GateFit], workers: int) -> None:
    """Train models in processes of their own, each noted down as it ends; one that fails does not stop the others."""
    context = multiprocessing.get_context("spawn")
    failures: list[BaseException] = []
    with ProcessPoolExecutor(workers, mp_context=context, initializer=one_thread) as pool:
        for done in as_completed([pool.submit(job) for job in jobs]):
            error = done.exception()
            if error is not None:
                failures.append(error)
    if failures:
        raise RuntimeError(f"{len(failures)} of {len(jobs)} trainings failed, first: {failures[0]}") from failures[0]


def one_thread() -> None:
    torch.set_num_threads(1)


def gates_of_runs(documents: Sequence[dict[str, Any]]) -> list[GateResult]:
    """G1, G2 and G5 as the runs of a table show them: means over training seeds, at the size and rates of the runs.

    Runs on tags with noise serve too: neither full attention nor the list of the critical rows, nor a state reads tags.
    G2 needs the recurrent model with a roomy state too: ``run --models recurrent --state-width``, 4 x the items.
    A gate of which some line has fewer seeds than full attention is not read, and its note says so.
    """
    from probes.summary import best_rates, value

    rungs: dict[tuple[str, str, str], Lines] = {}
    for content in best_rates(documents):
        line = _line_of_run(content)
        if line is not None:
            identity = content["identity"]
            key = (identity["suite"], identity["rung"], str(content["config"].get("preset")))
            seeds = rungs.setdefault(key, {}).setdefault(line, {})
            seeds[int(content["data_manifest"]["train_seed"])] = value(content, "skill")
    return [gate for key, lines in sorted(rungs.items()) for gate in _gates_of_lines(*key, lines)]


def gates_in_runs(folder: str | Path | None, names: Sequence[str]) -> list[GateResult]:
    """``gates_of_runs`` of a folder for some suites or rungs; nothing without a folder."""
    from probes.results import read_documents

    if folder is None:
        return []
    asked = [get_probe(name) for name in names]
    return [
        gate
        for gate in gates_of_runs(read_documents(folder, partial=True))
        if any(gate.probe == probe.name and rung in (None, gate.rung) for probe, rung in asked)
    ]


def _gates_of_lines(suite: str, rung: str, preset: str, lines: Lines) -> list[GateResult]:
    most = max(len(skills) for skills in lines.values())
    complete = len(lines.get(("full", 0), {}))
    # one seed beside lines of several is a trial of learning rates: full attention itself is not finished
    wanted = complete if complete > 1 else most
    seeds = {fit: _seeds_of_fit(lines, fit, wanted) for fit in LINE_NAMES}
    means = {fit: math.fsum(skills.values()) / max(len(skills), 1) for fit, skills in seeds.items()}

    def short_of(*fits: str) -> str:
        """Why a gate on these lines cannot be read; empty where it can."""
        counts = [
            f"{len(seeds[fit])} of {wanted} seeds of {LINE_NAMES[fit]}" for fit in fits if len(seeds[fit]) < wanted
        ]
        return UNREAD + ", ".join(counts) if counts else ""

    def told(*fits: str) -> str:
        counts = sorted({len(seeds[fit]) for fit in fits})
        each = ", ".join(f"{skill:.2f}" for _, skill in sorted(seeds[fits[-1]].items()))
        return f"mean of {' and '.join(map(str, counts))} training seeds at {preset}, from the runs ({each})"

    found = []
    full, small, roomy, oracle = (means[fit] for fit in ("full", "narrow", "wide", "oracle"))
    if seeds["full"]:
        note = f"full attention, {told('full')}"
        gate = GateResult(suite, rung, "G1", full >= SOLVED, full, SOLVED, note)
        found.append(_unless(short_of("full"), gate))
    if seeds["narrow"] or seeds["wide"]:
        passed = small <= SMALL_STATE and roomy >= ROOMY_STATE and roomy >= small
        note = (
            f"recurrent skill at rho 2 or more; at 1/4 it is {roomy:.3f}, must be {ROOMY_STATE};"
            f" {told('narrow', 'wide')}"
        )
        gate = GateResult(suite, rung, "G2", passed, small, SMALL_STATE, note, roomy)
        found.append(_unless(short_of("narrow", "wide"), gate))
    if seeds["oracle"]:
        limit = ORACLE_SHARE * full
        note = f"cache of the critical rows, against full attention at {full:.3f}; {told('full', 'oracle')}"
        gate = GateResult(suite, rung, "G5", oracle >= limit, oracle, limit, note)
        found.append(_unless(short_of("full", "oracle"), gate))
    return found


def _unless(reason: str, gate: GateResult) -> GateResult:
    """The gate, or in its place one that was not read and says why."""
    if not reason:
        return gate
    return replace(gate, passed=None, value=math.nan, limit=math.nan, note=reason, roomy=None)


def _seeds_of_fit(lines: Lines, fit: str, wanted: int) -> dict[int, float]:
    """Skill of each seed; of several widths the finished one nearest to the limit, where a gate is hardest."""
    widths = [width for name, width in lines if name == fit]
    if not widths:
        return {}
    nearest = max if fit == "narrow" else min
    finished = [width for width in widths if len(lines[fit, width]) >= wanted]
    return lines[fit, nearest(finished or widths)]


def _line_of_run(content: dict[str, Any]) -> tuple[str, int] | None:
    """What a run is to the gates, and the width of its state (0 where that says nothing); None for all others."""
    identity, config = content["identity"], content["config"]
    if identity["tier"] != "T1" or identity["readout"] != "query" or content["budget"]["frac"] != 1.0:
        return None
    axis = identity.get("axis") or ""
    if identity["model"] == "full" and not axis:
        return "full", 0
    if identity["model"] == "ham" and identity["router"] == "oracle" and not axis:
        return "oracle", 0
    width = int(config.get("state_width", STATE_WIDTH))
    if identity["model"] != "recurrent" or axis not in ("", f"width{width}"):
        return None
    items = get_probe(identity["suite"])[0].config(str(config.get("preset")), identity["rung"]).items
    rho = items / width
    return ("narrow", width) if rho >= 2 else ("wide", width) if rho <= 0.25 else None
