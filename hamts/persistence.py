"""A fitted model as tensors and documents, and back. Folders, checksums and atomic replacement are in ``storage``."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from hamts.data.clock import as_numbers
from hamts.data.library import as_starts
from hamts.data.panel import Dialect, Schema
from hamts.errors import ModelFolderError
from hamts.fitting import Fitted
from hamts.nn.backbone import ChannelSpec
from hamts.reader import HAMNetwork
from hamts.remembered import Remembered, flatten_tensors, unflatten_tensors
from hamts.resolve import Plan
from hamts.storage import load_folder, save_folder
from hamts.training import FitReport

__all__ = ["load_fitted", "save_fitted"]

OPTIONAL = ("tail_offset", "static_values", "last_position")


def save_fitted(fitted: Fitted, path: str | os.PathLike[str]) -> None:
    """Write a model folder: weights, what is remembered of each item (not its rows), and how it was fitted."""
    remembered = fitted.remembered
    state = {f"memory.{name}": tensor for name, tensor in flatten_tensors(remembered.memory).items()}
    state |= {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in _arrays(remembered).items()}
    spec = fitted.network.spec
    save_folder(
        path,
        tensors={
            "weights": fitted.network.state_dict(),
            "state": state,
            "residuals": {"templates": torch.from_numpy(fitted.templates)},
        },
        documents={
            "config": {
                "plan": fitted.plan.to_dict(),
                "spec": asdict(spec),
                "schema": fitted.schema.to_dict(),
                "notes": list(fitted.notes),
            },
            "items": {
                "item_ids": remembered.item_ids.tolist(),
                "share": remembered.share,
                "usage_share": remembered.usage_share,
            },
            # apart from the rest, since seconds differ from run to run
            "report": _report_document(fitted.report),
        },
    )


def _arrays(remembered: Remembered) -> dict[str, np.ndarray]:
    names = ("lengths", "lead", "tail_values", "tail_tags", "last_action", "seen", *OPTIONAL)
    arrays = {name: getattr(remembered, name) for name in names if getattr(remembered, name) is not None}
    arrays["starts"] = as_numbers(remembered.starts)
    if remembered.last_times is not None:
        arrays["last_times"] = as_numbers(remembered.last_times)
    return arrays


def _report_document(report: FitReport) -> dict[str, Any]:
    """JSON has no NaN: a score that does not exist is null."""
    document = asdict(report)
    document["best_score"] = _finite(report.best_score)
    document["history"] = [{name: _finite(value) for name, value in row.items()} for row in report.history]
    return document


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


# weights that are made in a caller's inference mode could never be trained on
@torch.inference_mode(False)
def load_fitted(path: str | os.PathLike[str]) -> Fitted:
    """Read what ``save_fitted`` wrote. Raises ModelFolderError: missing, foreign, damaged, or unreadable."""
    folder = load_folder(path)
    try:
        return _rebuild(folder.tensors, folder.documents)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ModelFolderError(
            "E-MODEL-CONTENT",
            f"'{path}' is whole, but this version of hamts cannot read what is in it: {error!r}.",
            fix="Use the version named in manifest.json, or fit again.",
        ) from error


def _rebuild(tensors: dict[str, dict[str, torch.Tensor]], documents: dict[str, dict[str, Any]]) -> Fitted:
    config, items = documents["config"], documents["items"]
    schema, plan = Schema.from_dict(config["schema"]), Plan.from_dict(config["plan"])
    described: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config["spec"].items()
    }
    spec = ChannelSpec(**described)
    with torch.random.fork_rng(devices=[]):
        network = HAMNetwork(plan.model, plan.memory, spec)
    network.load_state_dict(tensors["weights"])
    network.eval()
    report = documents["report"]
    best = report["best_score"]
    return Fitted(
        network=network,
        schema=schema,
        plan=plan,
        report=FitReport(
            **{**report, "best_score": float("nan") if best is None else best, "history": tuple(report["history"])}
        ),
        remembered=_remembered(network, schema.dialect, tensors["state"], items),
        templates=tensors["residuals"]["templates"].numpy(),
        notes=tuple(config["notes"]),
    )


def _remembered(
    network: HAMNetwork, dialect: Dialect, state: dict[str, torch.Tensor], items: dict[str, Any]
) -> Remembered:
    memory = {name.removeprefix("memory."): tensor for name, tensor in state.items() if name.startswith("memory.")}
    arrays = {name: tensor.numpy() for name, tensor in state.items() if not name.startswith("memory.")}
    ids = np.asarray(items["item_ids"])
    last_times = arrays.pop("last_times", None)
    missing: dict[str, Any] = {name: None for name in OPTIONAL if name not in arrays}
    return Remembered(
        item_ids=ids.astype(object) if ids.dtype.kind == "U" else ids,
        starts=as_starts(arrays.pop("starts"), dialect),
        memory=unflatten_tensors(network.empty_memory(1), memory),
        last_times=None if last_times is None else as_starts(last_times, dialect),
        share=items["share"],
        usage_share=items["usage_share"],
        **missing,
        **arrays,
    )
