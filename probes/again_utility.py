"""How well routers order rows by what each is worth to full attention, of the saved networks of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hamts.errors import DataError
from probes.again import chosen_cells
from probes.results import read_documents, write_document
from probes.runner import bars, check_device
from probes.runner_plan import Cell
from probes.saved import load_network
from probes.summary import best_rates
from probes.train import Fitted
from probes.utility import Gold, describe, gold_utility, router_scores, utility_of

__all__ = ["score_utility", "utility_table"]


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
