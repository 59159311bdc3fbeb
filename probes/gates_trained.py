"""Gates that train small models: full attention solves it (G1), a small state cannot (G2), an oracle's cache can (G5).

They take minutes a rung and are run on demand.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

from probes.contract import PRESETS
from probes.evaluate import evaluate
from probes.gates import GateResult
from probes.models import NetConfig
from probes.registry import Probe
from probes.runner_plan import critical_rows
from probes.train import TrainPlan, train

__all__ = ["TrainedGates"]

SOLVED, SMALL_STATE, ROOMY_STATE, ORACLE_SHARE = 0.95, 0.7, 0.65, 0.9
G1_CPU_SECONDS = 300.0
# what the contract says a suite needs beyond the preset
STEPS = {"rrr": 2_000, "topo": 2_000, "act": 1_500}
LEARNING_RATE = 4e-3
EVALUATED_SEQUENCES = 256


@dataclass(frozen=True)
class Trained:
    """Skill of one small model, and what it took."""

    skill: float
    steps: int
    cpu_seconds: float
    steps_to_solve: int | None
    status: str


@dataclass
class TrainedGates:
    """G1, G2 and G5 of one rung; what two of them need is trained once.

    Attributes:
        details: of every model that was trained, by its name.
    """

    probe: Probe
    rung: str
    preset: str
    seed: int = 0
    device: str = "cpu"
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    _full: Trained | None = None

    def __call__(self, gate: str) -> GateResult:
        """Run one of them."""
        if not self.probe.trained:
            return self._result(gate, None, math.nan, 0.0, "scored without training: see the exact tests")
        return {"G1": self._solvable, "G2": self._capacity, "G5": self._oracle}[gate]()

    def _solvable(self) -> GateResult:
        full = self._full_attention()
        note = f"full attention, {full.steps} steps in {full.cpu_seconds:.0f} s of CPU time{_ended(full)}"
        if self.device == "cpu" and full.cpu_seconds > G1_CPU_SECONDS:
            return self._result("G1", False, full.skill, SOLVED, note + ": more than five minutes")
        return self._result("G1", full.skill >= SOLVED, full.skill, SOLVED, note)

    def _capacity(self) -> GateResult:
        """The recurrent model at rho = items / (heads x key width): failing at 2 and more, fair at a quarter."""
        net = NetConfig(model="recurrent", layers=self.probe.layers)
        # heads x key width
        keys = net.memory_width
        crowded, sparse = 2 * keys, max(keys // 4, 2)
        rows = max(PRESETS[self.preset].context_rows, 6 * crowded)
        many = self._fit("recurrent, rho 2", net, items=crowded, queries=16, context_rows=rows)
        few = self._fit(f"recurrent, rho {sparse / keys:g}", net, items=sparse, queries=sparse)
        passed = many.skill <= SMALL_STATE and few.skill >= ROOMY_STATE
        note = (
            f"recurrent skill at rho 2 must be small; at rho {sparse / keys:g} it is {few.skill:.3f} and must reach"
            f" {ROOMY_STATE}"
        )
        return self._result("G2", passed, many.skill, SMALL_STATE, note)

    def _oracle(self) -> GateResult:
        full = self._full_attention()
        oracle = self._fit("ham, oracle", NetConfig(router="oracle", layers=self.probe.layers))
        note = f"cache of the critical rows, against full attention at {full.skill:.3f}{_ended(oracle)}"
        limit = ORACLE_SHARE * full.skill
        return self._result("G5", oracle.skill >= limit, oracle.skill, limit, note)

    def _full_attention(self) -> Trained:
        if self._full is None:
            self._full = self._fit("full attention", NetConfig(model="full", layers=self.probe.layers))
        return self._full

    def _fit(self, name: str, net: NetConfig, **overrides: int) -> Trained:
        config = self.probe.config(self.preset, self.rung, **overrides)
        steps = max(STEPS.get(self.probe.name, 1_500), PRESETS[self.preset].train_steps)
        rows = critical_rows(self.probe, config)
        plan = TrainPlan(
            probe=self.probe, config=config, net=net, steps=steps, learning_rate=LEARNING_RATE, seed=self.seed,
            critical_rows=rows, device=self.device,
        )  # fmt: skip
        # of this process, so that a busy machine does not fail a gate
        started = time.process_time()
        fitted = train(plan)
        seconds = time.process_time() - started
        scored = evaluate(fitted, budget_rows=rows, streams=1, sequences=EVALUATED_SEQUENCES, diagnose=False)
        skill = scored.metrics["skill"]
        self.details[name] = {
            "skill": skill, "steps": steps, "learning_rate": LEARNING_RATE, "cpu_seconds": seconds,
            "steps_to_solve": fitted.steps_to_solve, "status": fitted.status, "validation_nerr": fitted.losses,
            "floor": scored.floor_name, **{n: v for n, v in scored.metrics.items() if n.startswith("recall")},
        }  # fmt: skip
        return Trained(skill, steps, seconds, fitted.steps_to_solve, fitted.status)

    def _result(self, gate: str, passed: bool | None, value: float, limit: float, note: str) -> GateResult:
        return GateResult(self.probe.name, self.rung, gate, passed, value, limit, note)


def _ended(trained: Trained) -> str:
    return "" if trained.status == "ok" else f", training {trained.status}"
