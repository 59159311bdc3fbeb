"""Preservation probes: what a memory must still know after a delay, under a byte budget.

Every name below is imported on first use. ``hamts.probes`` is this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.adapter import Forecaster, HamtsAdapter
    from probes.again import Revisit, revisit
    from probes.again_utility import score_utility
    from probes.api import ProbeReport, load_report, run_probes
    from probes.contract import ProbeBatch, ProbeConfig
    from probes.frames import ProbeFromFrame
    from probes.gates import validate
    from probes.inject import SemiSynthetic
    from probes.real_run import RealPlan, run_real
    from probes.registry import Probe, get_probe, list_probes, register_probe

_HOME = {
    "Forecaster": "probes.adapter",
    "HamtsAdapter": "probes.adapter",
    "ProbeReport": "probes.api",
    "load_report": "probes.api",
    "run_probes": "probes.api",
    "ProbeBatch": "probes.contract",
    "ProbeConfig": "probes.contract",
    "ProbeFromFrame": "probes.frames",
    "validate": "probes.gates",
    "SemiSynthetic": "probes.inject",
    "RealPlan": "probes.real_run",
    "run_real": "probes.real_run",
    "Revisit": "probes.again",
    "revisit": "probes.again",
    "score_utility": "probes.again_utility",
    "Probe": "probes.registry",
    "get_probe": "probes.registry",
    "list_probes": "probes.registry",
    "register_probe": "probes.registry",
}

__all__ = [
    "Forecaster",
    "HamtsAdapter",
    "Probe",
    "ProbeBatch",
    "ProbeConfig",
    "ProbeFromFrame",
    "ProbeReport",
    "RealPlan",
    "Revisit",
    "SemiSynthetic",
    "get_probe",
    "list_probes",
    "load_report",
    "register_probe",
    "revisit",
    "run_probes",
    "run_real",
    "score_utility",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'probes' has no attribute {name!r}. Available: {', '.join(__all__)}.")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
