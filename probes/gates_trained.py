"""Gates that train small models: full attention solves it (G1), a small state cannot (G2), an oracle's cache can (G5).

They take minutes a rung and are run on demand.
"""

from __future__ import annotations

import math

from probes.contract import PRESETS
from probes.evaluate import evaluate
from probes.gates import GateResult
from probes.models import NetConfig
from probes.registry import Probe
from probes.runner_plan import critical_rows
from probes.train import Fitted, TrainPlan, train

__all__ = ["trained_gate"]

SOLVED, SMALL_STATE, ROOMY_STATE, ORACLE_SHARE = 0.95, 0.7, 0.65, 0.9
G1_CPU_SECONDS = 300.0
# what the contract says a suite needs beyond the preset
STEPS = {"rrr": 2_000, "topo": 2_000, "act": 1_500}
LEARNING_RATE = 4e-3


def trained_gate(
    gate: str, probe: Probe, rung: str, *, preset: str, seed: int = 0, device: str = "cpu", progress: bool = False
) -> GateResult:
    """Run G1, G2 or G5 of one rung."""
    if not probe.trained:
        return GateResult(probe.name, rung, gate, None, math.nan, 0.0, "scored without training: see the exact tests")
    if gate == "G1":
        fitted = _fit(probe, rung, preset, NetConfig(model="full", layers=probe.layers), seed, device)
        value = _skill(fitted)
        note = f"full attention, {fitted.plan.steps} steps in {fitted.seconds:.0f} s"
        if device == "cpu" and fitted.seconds > G1_CPU_SECONDS:
            return GateResult(probe.name, rung, gate, False, value, SOLVED, note + ": more than five minutes")
        return GateResult(probe.name, rung, gate, value >= SOLVED, value, SOLVED, note)
    if gate == "G2":
        return _capacity(probe, rung, preset, seed, device)
    full = _skill(_fit(probe, rung, preset, NetConfig(model="full", layers=probe.layers), seed, device))
    oracle = _skill(_fit(probe, rung, preset, NetConfig(router="oracle", layers=probe.layers), seed, device))
    return GateResult(
        probe.name, rung, gate, oracle >= ORACLE_SHARE * full, oracle, ORACLE_SHARE * full,
        f"cache of the critical rows, against full attention at {full:.3f}",
    )  # fmt: skip


def _capacity(probe: Probe, rung: str, preset: str, seed: int, device: str) -> GateResult:
    """The recurrent model at rho = items / (heads x key width): failing at 2 and more, fair at a quarter and less."""
    net = NetConfig(model="recurrent", layers=probe.layers)
    # heads x key width
    keys = net.memory_width
    crowded = 2 * keys
    rows = PRESETS[preset].context_rows
    many = _fit(probe, rung, preset, net, seed, device, items=crowded, queries=16, context_rows=max(rows, 6 * crowded))
    few = _fit(probe, rung, preset, net, seed, device, items=max(keys // 4, 2), queries=max(keys // 4, 2))
    high, low = _skill(few), _skill(many)
    passed = low <= SMALL_STATE and high >= ROOMY_STATE
    note = f"recurrent skill at rho 2; at rho 0.25 it is {high:.3f} and must reach {ROOMY_STATE}"
    return GateResult(probe.name, rung, "G2", passed, low, SMALL_STATE, note)


def _fit(probe: Probe, rung: str, preset: str, net: NetConfig, seed: int, device: str, **overrides: int) -> Fitted:
    config = probe.config(preset, rung, **overrides)
    steps = max(STEPS.get(probe.name, 1_500), PRESETS[preset].train_steps)
    plan = TrainPlan(
        probe=probe, config=config, net=net, steps=steps, learning_rate=LEARNING_RATE, seed=seed,
        critical_rows=critical_rows(probe, config), device=device,
    )  # fmt: skip
    return train(plan)


def _skill(fitted: Fitted) -> float:
    rows = fitted.plan.critical_rows
    return evaluate(fitted, budget_rows=rows, streams=1, sequences=256, diagnose=False).metrics["skill"]
