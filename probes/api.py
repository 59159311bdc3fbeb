"""``run_probes``: from names to a report, in a notebook or a script."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hamts.errors import DataError
from probes.axes import each_axis
from probes.packed import sequence_errors
from probes.registry import list_probes
from probes.results import RUN_FILE, TABLE_FILE, read_documents, refuse_mixed, tidy, unseen
from probes.runner import check_plan, run_plan, run_t0_folder, t0_rungs, write_table
from probes.runner_plan import DEFAULT_BUDGETS, DEFAULT_ROUTERS, RunPlan
from probes.stats import holm, paired_difference
from probes.summary import best_rates

if TYPE_CHECKING:
    from probes.gates import GateResult

__all__ = ["ProbeReport", "load_report", "run_probes"]

# of tier 1, where nothing else is said
TRAINED = ("ham", "full", "recurrent")


@dataclass(frozen=True)
class ProbeReport:
    """Results of a folder.

    Attributes:
        documents: one per run and budget.
        frame: the tidy table, one row per run, slice, stream and metric.
        also: other folders whose gates and labelled sets are shown too.
    """

    folder: Path
    documents: list[dict[str, Any]]
    frame: pd.DataFrame
    also: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        suites = ", ".join(sorted(self.frame["suite"].unique())) if len(self.frame) else "nothing"
        return f"ProbeReport({len(self.documents)} runs of {suites}, in '{self.folder}')"

    @cached_property
    def gates(self) -> list[GateResult]:
        """Results of gates that lie in the folder (``hamts probes validate --out``), and what its runs say.

        Where both do, the runs decide, unless they have too few seeds to be read.
        """
        from probes.gates import read_gates
        from probes.gates_trained import gates_of_runs

        of_folders = [gate for folder in (*self.also, self.folder) for gate in read_gates(folder)]
        found = {(gate.probe, gate.rung, gate.gate): gate for gate in of_folders}
        for gate in gates_of_runs(self.documents):
            key = (gate.probe, gate.rung, gate.gate)
            if not gate.unread or key not in found:
                found[key] = gate
        return list(found.values())

    @cached_property
    def real(self) -> list[dict[str, Any]]:
        """Documents of labelled sets that lie in the folder (``hamts probes real --out``)."""
        from probes.real_run import read_real

        return [content for folder in (self.folder, *self.also) for content in read_real(folder)]

    def to_json(self) -> list[dict[str, Any]]:
        """The documents."""
        return self.documents

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page; also written where a path is given."""
        from hamts.files import written_whole
        from probes.report import html_report

        page = html_report(self.documents, gates=self.gates, real=self.real)
        if path is not None:
            with written_whole(path) as partial:
                partial.write_text(page, encoding="utf-8")
        return page

    def to_markdown(self) -> str:
        """The same tables as text."""
        from probes.report import markdown_report

        return markdown_report(self.documents, gates=self.gates, real=self.real)

    def compare(self, first: str, second: str) -> pd.DataFrame:
        """Paired differences in skill of two routers or models, one row per rung and budget.

        Both are compared on the same training seeds and evaluation sequences; p values are Holm-adjusted over the rows.

        Args:
            first, second: names of routers or models (``tags``, ``surprise``, ``recurrent_wide``); what else differs
                stands in brackets, as in the report's lines (``tags [int8]``).

        Raises:
            DataError: E-PROBE-COMPARE, there are no runs of one of them on the same seeds.
        """
        tables = {name: self._errors(name) for name in (first, second)}
        for name, table in tables.items():
            if not table:
                trained = self.frame[self.frame["tier"] == "T1"]
                names = {*trained["router"], *trained["model"]} - {"none", "ham"}
                known = sorted(part for part in names if not part.startswith("floor/"))
                if self._runs(name):
                    raise DataError(
                        "E-PROBE-COMPARE", f"The runs of {name!r} have lost the errors of their sequences.",
                        fix="Copy the .npz files that lie beside their documents, or run them again.",
                    )  # fmt: skip
                raise DataError(
                    "E-PROBE-COMPARE", f"There are no runs of {name!r} in tier 1.",
                    fix=f"Name one of {known}." if known else "Run tier T1 first: other tiers have no seeds to pair.",
                )  # fmt: skip
        shared = sorted(set(tables[first]) & set(tables[second]), key=str)
        rows = []
        for key in shared:
            rung, budget = key
            a, b = tables[first][key], tables[second][key]
            seeds = sorted(set(a) & set(b))
            if not seeds:
                continue
            floor = self._floor(rung)
            pair = [1.0 - np.stack([part[s] for s in seeds]) / floor for part in (a, b)]
            found = paired_difference(pair[0], pair[1], higher_is_better=True)
            rows.append({"rung": rung, "budget_frac": budget, "first": first, "second": second, **vars(found),
                         "seeds": len(seeds)})  # fmt: skip
        if not rows:
            raise DataError(
                "E-PROBE-COMPARE", f"{first!r} and {second!r} share no rung, budget and seed.",
                fix="Run both with the same probes, budgets and seeds.",
            )  # fmt: skip
        adjusted = holm({str(place): row["p_value"] for place, row in enumerate(rows)})
        for place, row in enumerate(rows):
            row["p_holm"] = adjusted[str(place)]
        return pd.DataFrame(rows)

    def _errors(self, name: str) -> dict[tuple[str, float], dict[int, np.ndarray]]:
        """Errors of single sequences by rung and budget, then by training seed; the best learning rate of each."""
        found: dict[tuple[str, float], dict[int, np.ndarray]] = {}
        for content in self._runs(name):
            identity = content["identity"]
            errors = sequence_errors(content)
            if errors is None:
                continue
            key = (identity["rung"], float(content["budget"]["frac"]))
            found.setdefault(key, {})[int(content["data_manifest"]["train_seed"])] = errors
        return found

    def _runs(self, name: str) -> list[dict[str, Any]]:
        """Trained runs of a router or model; what else differs stands in brackets."""
        plain, _, axis = name.partition(" [")
        found = []
        for content in best_rates(self.documents):
            identity = content["identity"]
            if identity["tier"] != "T1" or plain not in (identity["router"], identity["model"]):
                continue
            if axis.rstrip("]") != identity.get("axis", ""):
                continue
            if plain == identity["model"] == "ham":
                raise DataError(
                    "E-PROBE-COMPARE", "'ham' has several routers.", fix="Name a router, such as 'learned'."
                )
            found.append(content)
        return found

    def _floor(self, rung: str) -> float:
        return float(np.mean([d["floor"]["mse"] for d in self.documents if d["identity"]["rung"] == rung]))


def run_probes(
    probes: Sequence[str] | str = ("der",),
    *,
    models: Sequence[str] | None = None,
    routers: Sequence[str] | None = None,
    budgets: Sequence[float] | None = None,
    preset: str = "smoke",
    seeds: int | None = None,
    tier: str = "T1",
    out: str | Path | None = None,
    device: str = "cpu",
    workers: int = 1,
    progress: bool = True,
    external: Mapping[str, Any] | None = None,
    **options: Any,
) -> ProbeReport:
    """Run probes and report on them.

    Args:
        probes: suites or rungs (``der``, ``pbc``, ``pbc/pbcD``); ``all`` for every suite.
        models: tier-1 architectures, None: HAM, full attention and a state; ``ham`` once for each router.
        routers, seeds: of tier 1; None: the mandatory ones, and 3.
        budgets: of tier 1, entries of a layer as multiples of the critical rows; None: 0.5, 1 and 2, as tier 0 has.
        tier: ``T0`` (no training), ``T1`` (small models, trained), ``T2`` (fitted forecasters, see ``external``).
        out: folder of results; runs that are there already are not run again. None: a temporary one.
        external: of tier 2: objects with ``forecast``, by name; see ``probes.adapter``.
        options: further fields of ``RunPlan``, such as ``steps``, ``streams``, ``sequences``, ``readout``;
            ``max_time_s``: stop cleanly after so long, report what is there, and go on with the next call;
            ``axes``: values of axes of the suites (``hamts probes list``), ``{"items": (4, 8, 16)}``: one value of one
            axis at a time, each a line of its own (``full [items=8]``).

    Raises:
        ValueError: an unknown name.
        DataError: E-PROBE-VERSION, E-PROBE-BUDGET (less than one entry), E-OPTION (what another tier takes).
    """
    of_training = {"models": models, "routers": routers, "budgets": budgets, "seeds": seeds}
    _refuse_other_tiers(tier, of_training if tier != "T0" else {**of_training, **options, "axes": None})
    max_time_s, axes = options.pop("max_time_s", None), options.pop("axes", None)
    names = (probes,) if isinstance(probes, str) else tuple(probes)
    names = tuple(list_probes()) if names == ("all",) else names
    folder = Path(tempfile.mkdtemp(prefix="hamts_probes_")) if out is None else Path(out)
    if axes and tier == "T2":
        raise ValueError("Axes are varied in tiers 0 and 1. Pass overrides={name: value} to tier 2.")
    if tier == "T0":
        for changes in each_axis(axes):
            # every suite, before anything is run
            t0_rungs(names, preset=preset, overrides=changes)
        for changes in each_axis(axes):
            run_t0_folder(names, folder, preset=preset, progress=progress, overrides=changes)
    elif tier == "T1":
        plan = RunPlan(
            probes=names, preset=preset, models=TRAINED if models is None else tuple(models),
            routers=DEFAULT_ROUTERS if routers is None else tuple(routers),
            budgets=DEFAULT_BUDGETS if budgets is None else tuple(budgets), seeds=3 if seeds is None else seeds,
            **options,
        )  # fmt: skip
        until = None if max_time_s is None else time.monotonic() + max_time_s
        plans = [replace(plan, overrides={**plan.overrides, **changes}) for changes in each_axis(axes)]
        for each in plans:
            check_plan(each)
        for each in plans:
            left = None if until is None else until - time.monotonic()
            run_plan(each, folder, device=device, workers=workers, progress=progress, max_time_s=left)
    elif tier == "T2":
        from probes.adapter import run_external

        if not external:
            raise ValueError("Tier 2 needs external={name: forecaster}. Got none.")
        run_external(names, folder, external, preset=preset, progress=progress, **options)
    else:
        raise ValueError(f"Unknown tier {tier!r}. Available: ['T0', 'T1', 'T2'].")
    return load_report(folder, partial=max_time_s is not None)


def _refuse_other_tiers(tier: str, given: Mapping[str, Any]) -> None:
    """Refuse what would say nothing: tier 0 runs every router at its own budgets, tier 2 what it is given."""
    useless = sorted(name for name, value in given.items() if value is not None)
    if tier in ("T0", "T2") and useless:
        does = "runs every router at 0.5, 1 and 2 times the critical rows" if tier == "T0" else "trains nothing"
        raise DataError(
            "E-OPTION", f"{', '.join(useless)}: of tier 1. Tier {tier[1]} {does}.",
            fix=f"Leave {'it' if len(useless) == 1 else 'them'} out, or run tier T1.",
        )  # fmt: skip


def load_report(folder: str | Path, *, partial: bool = False, also: Sequence[str | Path] = ()) -> ProbeReport:
    """Read a folder of results, and write its table beside them.

    Args:
        also: further folders: their runs, gates and labelled sets are reported with those of the first. A run that
            lies in two of them, a packed copy say, is told once.

    Raises:
        DataError: E-FILE, a further folder that holds nothing to report among others, E-PROBE-UNFINISHED,
            E-PROBE-VERSION, E-PROBE-DAMAGED; E-PROBE-TWICE, a run has one result in
            one folder and another in the next.
    """
    from probes.gates import GATE_FOLDER
    from probes.real_run import REAL_FOLDER

    own = read_documents(folder, partial=partial)
    documents = list(own)
    named = {Path(other).resolve(): Path(other) for other in also}
    others = tuple(other for place, other in named.items() if place != Path(folder).resolve())
    for other in others:
        if not other.is_dir():
            raise DataError("E-FILE", f"'{other}' is no folder.", fix="Name folders of results.")
        if (other / RUN_FILE).is_file():
            documents += unseen(read_documents(other, partial=partial), documents)
        elif not any(other.glob(f"{GATE_FOLDER}/*/*.json")) and not any(other.glob(f"{REAL_FOLDER}/*.json")):
            raise DataError(
                "E-FILE", f"'{other}' holds neither runs nor gates nor labelled sets.",
                fix=f"Name a folder that has a {RUN_FILE}, a folder '{GATE_FOLDER}' or a folder '{REAL_FOLDER}' in it.",
            )  # fmt: skip
    refuse_mixed(documents, ", ".join(str(each) for each in (folder, *others)))
    report = ProbeReport(Path(folder), documents, tidy(documents), others)
    if own:
        write_table(own, Path(folder) / TABLE_FILE)
    return report
