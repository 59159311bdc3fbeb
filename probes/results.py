"""Result documents: one JSON a run, a tidy table of all, and what may not be mixed.

A results folder has ``run.json`` (what was asked for, and whether it is finished) and one folder a suite.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import hamts
from hamts.errors import DataError
from hamts.files import written_whole
from probes.axes import parts_of
from probes.contract import CONTRACT_VERSION, EVALUATION_SEED, FAMILY
from probes.evaluate import Evaluation
from probes.packed import packed_documents
from probes.registry import list_probes
from probes.runner_plan import Cell
from probes.stats import mean_interval
from probes.train import Fitted

__all__ = [
    "SCHEMA_VERSION",
    "document",
    "of_rungs",
    "read_documents",
    "read_together",
    "start_folder",
    "tidy",
    "unseen",
    "write_document",
]

SCHEMA_VERSION = 1
RUN_FILE, TABLE_FILE = "run.json", "probe_results.parquet"
LOWER_IS_BETTER = ("mse", "nmse")
TRAINED_AGAIN = "trained again"


@cache
def machine() -> dict[str, str]:
    """Versions and device names for every document."""
    folder = Path(__file__).resolve().parent
    ran = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)  # noqa: S607
    return {
        "version": hamts.__version__, "git": ran.stdout.strip() if ran.returncode == 0 else "",
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }  # fmt: skip


def document(cell: Cell, fitted: Fitted, scored: Evaluation, *, budget: float, device: str) -> dict[str, Any]:
    """All that is known of one run at one budget, ready for JSON."""
    probe = list_probes()[cell.probe]
    skills = 1.0 - scored.errors.mean(1) / scored.floor_errors.mean(1)  # [streams]
    interval = mean_interval(1.0 - scored.errors / scored.floor_errors.mean(), resamples=500)
    results: dict[str, Any] = {
        name: {"values": [value], "median": value, "std": 0.0, "n": scored.errors.size}
        for name, value in scored.metrics.items()
    }
    results["skill"] = {
        "values": [float(v) for v in skills], "median": float(np.median(skills)),
        "std": float(np.std(skills, ddof=1)) if len(skills) > 1 else 0.0, "n": scored.errors.size,
        "value": scored.metrics["skill"], "ci": [interval.low, interval.high],
    }  # fmt: skip
    return {
        "schema_version": SCHEMA_VERSION,
        "identity": {
            "family": FAMILY, "contract_version": CONTRACT_VERSION, "suite": cell.probe,
            "suite_version": cell.suite_version, "rung": cell.rung, "agenda_slot": probe.slot, "tier": "T1",
            "readout": cell.readout, "model": cell.model, "router": cell.router, "config_hash": cell.hash,
            "axis": cell.axis,
        },
        "config": cell.identity,
        "data_manifest": {
            "train_seed": cell.seed, "eval_streams": [EVALUATION_SEED + s for s in range(len(scored.errors))],
            "sequences": int(scored.errors.shape[1]), "leak_status": "clean",
        },
        "budget": {
            "frac": budget, "rows": scored.budget_rows,
            **{name: scored.metrics[name] for name in ("bytes_state", "bytes_kv", "bytes_total")},
            "dtype": "float32",
        },
        "results": results,
        "floor": {"name": scored.floor_name, "mse": float(scored.floor_errors.mean())},
        "oracle": {"mse": scored.oracle_error},
        "diagnosis": {"stages": scored.stages, "by_layer": scored.by_layer, "survival": scored.survival,
                      "slices": scored.by_slice},
        "checks": {},
        "runtime": {
            "train_s": fitted.seconds, "steps": cell.steps, "steps_to_solve": fitted.steps_to_solve,
            "validation": fitted.losses, "status": fitted.status, "device": device, **machine(),
        },
        "warnings": _warnings(fitted, scored),
    }  # fmt: skip


def _warnings(fitted: Fitted, scored: Evaluation) -> list[str]:
    notes = []
    if fitted.status != "ok":
        notes.append(f"training {fitted.status}")
    if fitted.steps_to_solve is None:
        notes.append("never reached skill 0.8 on validation: ranks may show speed of learning")
    if scored.metrics["skill"] < -1:
        notes.append("skill below -1 is clipped in aggregates")
    return notes


# --- folders


def write_document(path: Path, content: dict[str, Any], errors: np.ndarray | None = None) -> None:
    """Write a document, and the errors of single sequences beside it, whole or not at all."""
    if errors is not None:
        with written_whole(path.with_suffix(".npz")) as partial, partial.open("wb") as file:
            np.savez_compressed(file, errors=errors.astype(np.float32))
    with written_whole(path) as partial:
        partial.write_text(json.dumps(_plain(content), indent=1, allow_nan=True), encoding="utf-8")


def _plain(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    if isinstance(content, (np.floating, np.integer)):
        return content.item()
    return content


def start_folder(
    folder: Path, asked: Sequence[str], versions: dict[str, int], *, done: bool, gone: Sequence[str] = ()
) -> None:
    """Note what a folder is to hold, and whether all of it is there.

    Args:
        gone: documents that it no longer holds.

    Raises:
        DataError: E-PROBE-VERSION, the folder holds results of another contract or of another version of a suite.
    """
    path = folder / RUN_FILE
    before = _asked(path) if path.exists() else {"suite_versions": {}, "documents": []}
    contract = before.get("contract_version", CONTRACT_VERSION)
    if contract != CONTRACT_VERSION:
        raise DataError(
            "E-PROBE-VERSION", f"'{folder}' holds results of contract {contract}; this is contract {CONTRACT_VERSION}.",
            fix="Write to another folder: results of two contracts are never compared with each other.",
        )  # fmt: skip
    for suite, version in versions.items():
        known = before["suite_versions"].get(suite, version)
        if known != version:
            raise DataError(
                "E-PROBE-VERSION",
                f"'{folder}' holds results of {suite} version {known}; this is version {version}.",
                fix="Write to another folder: versions of a suite are never compared with each other.",
            )
    content = {
        "family": FAMILY, "contract_version": CONTRACT_VERSION,
        "suite_versions": {**before["suite_versions"], **versions},
        "documents": sorted({*before["documents"], *asked} - set(gone)), "complete": done,
    }  # fmt: skip
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_documents(folder: str | Path, *, partial: bool = False) -> list[dict[str, Any]]:
    """All documents of a folder.

    Args:
        partial: take what is there of an unfinished run.

    Raises:
        DataError: E-FILE (no results there), E-PROBE-UNFINISHED, E-PROBE-VERSION (versions of a suite are mixed),
            E-PROBE-DAMAGED (a file that is not a document).
    """
    root = Path(folder)
    run = root / RUN_FILE
    if not run.is_file():
        raise DataError(
            "E-FILE", f"'{root}' has no {RUN_FILE}: it is no results folder.", fix="hamts probes run der --out FOLDER"
        )
    asked = _asked(run)
    missing = [name for name in asked["documents"] if not (root / name).is_file()]
    if (missing or not asked["complete"]) and not partial:
        raise DataError(
            "E-PROBE-UNFINISHED",
            f"The run in '{root}' is unfinished: {len(missing)} of {len(asked['documents'])} documents are missing"
            + (f", '{missing[0]}' first." if missing else "; its last part was not begun."),
            fix="Call the same run again, it goes on where it stopped; or report what is there with --partial.",
        )
    documents = [read_one(path) for path in sorted(root.glob("*/*.json"))] + list(packed_documents(root))
    refuse_mixed(documents, str(root))
    return documents


def read_together(folders: Sequence[str | Path], *, partial: bool = False) -> list[dict[str, Any]]:
    """All documents of some folders; a run that lies in two of them once.

    Raises:
        DataError: as ``read_documents`` and ``unseen``.
    """
    found: list[dict[str, Any]] = []
    for folder in folders:
        found += unseen(read_documents(folder, partial=partial), found)
    refuse_mixed(found, ", ".join(str(folder) for folder in folders))
    return found


def of_rungs(documents: Sequence[dict[str, Any]], rungs: Sequence[str]) -> list[dict[str, Any]]:
    """The documents of some rungs; of all where none are named."""
    there = {content["identity"]["rung"] for content in documents}
    if unknown := sorted(set(rungs) - there):
        raise ValueError(f"No results of {unknown[0]!r} are there. Available: {sorted(there)}.")
    return [content for content in documents if not rungs or content["identity"]["rung"] in rungs]


def _asked(path: Path) -> dict[str, Any]:
    """What a folder is to hold."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = content["documents"], content["complete"], content["suite_versions"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "E-PROBE-DAMAGED", f"'{path}' does not say what the folder is to hold ({error}).",
            fix="Remove it, and call the same run again: the documents that are there are not run again.",
        ) from error  # fmt: skip
    return content


def read_one(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        _ = content["identity"]["suite_version"], content["results"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "E-PROBE-DAMAGED", f"'{path}' is not a result document ({error}).", fix="Remove it and run again."
        ) from error
    # written beside it, for paired comparisons
    content["path"] = str(path)
    return content


def refuse_mixed(documents: Sequence[dict[str, Any]], where: str) -> None:
    """Refuse results of different versions of a suite, of the contract or of tier 0."""
    seen: dict[str, int] = {}
    for content in documents:
        identity = content["identity"]
        if identity.get("tier") == "T0":
            own = content["config"].get("t0_version", 1)
            if seen.setdefault("T0", own) != own:
                raise DataError(
                    "E-PROBE-VERSION",
                    f"'{where}' mixes results of tier 0 in version {seen['T0']} and version {own}, as in"
                    f" '{content.get('path', '')}'.",
                    fix="Keep one version a folder: run tier 0 again into another folder.",
                )
        version, contract = identity["suite_version"], identity["contract_version"]
        first = seen.setdefault(identity["suite"], version), seen.setdefault("", contract)
        if first != (version, contract):
            raise DataError(
                "E-PROBE-VERSION",
                f"'{where}' mixes results of {identity['suite']}: version {first[0]} (contract {first[1]}) and version"
                f" {version} (contract {contract}), as in '{content.get('path', '')}'.",
                fix="Keep one version a folder: move the older documents away, and run their cells again.",
            )


def unseen(documents: Sequence[dict[str, Any]], before: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of some documents whose run is not among those before.

    A line whose networks were trained before, at the same seeds and rates for other sizes, say, becomes a line of its
    own: as more seeds of the first it would make intervals too narrow.

    Raises:
        DataError: E-PROBE-TWICE, a run is there with other results.
    """

    def key(content: dict[str, Any]) -> str:
        # a size in brackets is a list once it is read
        return json.dumps([content["identity"], content["config"], content["budget"]], sort_keys=True, default=list)

    known = {key(content): content for content in before}
    found = []
    for content in documents:
        same = known.get(key(content))
        if same is None:
            found.append(content)
        elif json.dumps(same["results"], sort_keys=True) != json.dumps(content["results"], sort_keys=True):
            raise DataError(
                "E-PROBE-TWICE", f"'{same['path']}' and '{content['path']}' are the same run with different results.",
                fix="Report them apart, or remove one of the two.",
            )  # fmt: skip
    trained = {_trained(content) for content in before}
    anew = {_trained(content)[:-2] for content in found if _trained(content) in trained}
    return [_told_apart(content) if _trained(content)[:-2] in anew else content for content in found]


def _trained(content: dict[str, Any]) -> tuple[Any, ...]:
    """The line of a document, then its training seed and learning rate; tier 0 trains nothing."""
    identity, rate = content["identity"], content["config"].get("learning_rate")
    if identity["tier"] != "T1":
        return ("", identity["config_hash"], 0, 0)
    names = ("suite", "rung", "model", "router", "readout", "axis")
    line = tuple(str(identity.get(name, "")) for name in names)
    # a rival of another size is another network, HAM's is asked at all of them
    size = "" if identity["model"] == "ham" else content["budget"]["frac"]
    return (*line, size, content["data_manifest"].get("train_seed", 0), rate)


def _told_apart(content: dict[str, Any]) -> dict[str, Any]:
    axis = ", ".join(word for word in (content["identity"].get("axis", ""), TRAINED_AGAIN) if word)
    return {**content, "identity": {**content["identity"], "axis": axis}}


# --- the table


def tidy(documents: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """One row per run, slice, evaluation stream and metric; floors are rows too."""
    rows = [row for content in documents for row in _rows(content)]
    frame = pd.DataFrame(rows)
    if len(frame):
        frame = frame.drop_duplicates().reset_index(drop=True)
    return frame


def axis_of(identity: dict[str, Any]) -> tuple[str, str]:
    """Names and values of what a line differs in from its rung, in two lists; what has no value is a name alone."""
    pairs = [part.partition("=") for part in parts_of(str(identity.get("axis", "")))]
    return ", ".join(name for name, _, _ in pairs), ", ".join(value for _, equals, value in pairs if equals)


def _rows(content: dict[str, Any]) -> Iterable[dict[str, Any]]:
    identity, config, budget, runtime = (content[name] for name in ("identity", "config", "budget", "runtime"))
    seeds = content["data_manifest"].get("train_seed", 0)
    base = {
        "schema_version": content["schema_version"], "suite": identity["suite"], "rung": identity["rung"],
        "suite_version": identity["suite_version"], "agenda_slot": identity["agenda_slot"], "tier": identity["tier"],
        "readout": identity["readout"], "preset": config.get("preset", ""), "config_hash": identity["config_hash"],
        "axis": axis_of(identity)[0], "axis_value": axis_of(identity)[1],
        "model": identity["model"], "router": identity["router"],
        "allocation": "uniform", "budget_rows": budget["rows"], "budget_frac": budget["frac"],
        "bytes_total_peak": budget["bytes_total"], "bytes_state": budget["bytes_state"],
        "bytes_kv": budget["bytes_kv"], "dtype": budget.get("dtype", "float32"), "train_seed": seeds,
        "floor": content["floor"].get("mse", math.nan), "oracle": content["oracle"].get("mse", math.nan),
        "status": runtime["status"], "lr": config.get("learning_rate", math.nan), "steps": runtime.get("steps", 0),
        "train_s": runtime.get("train_s", math.nan), "device": runtime["device"], "version": runtime["version"],
        "git": runtime["git"], "leak_status": content["data_manifest"]["leak_status"],
    }  # fmt: skip
    blank = {"slice": "all", "eval_stream": "all", "ci_low": math.nan, "ci_high": math.nan, "ci_flag": ""}
    for metric, result in content["results"].items():
        low, high = result.get("ci", (math.nan, math.nan))
        value = result.get("value", result["median"])
        yield {**base, **blank, "metric": metric, "value": value, "n": result["n"], "ci_low": low, "ci_high": high,
               "ci_flag": "few_seeds"}  # fmt: skip
        if len(result["values"]) > 1:
            for stream, one in zip(content["data_manifest"]["eval_streams"], result["values"], strict=True):
                yield {**base, **blank, "eval_stream": str(stream), "metric": metric, "value": one, "n": result["n"]}
    for label, numbers in content["diagnosis"].get("slices", {}).items():
        for metric, value in numbers.items():
            yield {**base, **blank, "slice": label, "metric": metric, "value": value, "n": 0}
    for stage, value in content["diagnosis"].get("stages", {}).items():
        yield {**base, **blank, "metric": f"stage_{stage}", "value": value, "n": 0}
    for age, (value, count) in content["diagnosis"].get("survival", {}).items():
        yield {**base, **blank, "slice": f"age {age}", "metric": "survival", "value": value, "n": count}
    if identity["tier"] == "T1":
        floor = {**base, "model": f"floor/{content['floor']['name']}", "router": "none", "budget_rows": 0,
                 "budget_frac": 0.0, "bytes_total_peak": 0.0, "bytes_state": 0.0, "bytes_kv": 0.0, "steps": 0,
                 "train_s": 0.0, "config_hash": "", "lr": math.nan, "train_seed": 0}  # fmt: skip
        yield {**floor, **blank, "metric": "mse", "value": content["floor"]["mse"], "n": 0}
