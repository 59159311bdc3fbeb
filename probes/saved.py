"""Trained networks of tier 1 on disk: one safetensors file a cell, beside its documents, with all that rebuilds it."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hamts.errors import DataError
from hamts.files import written_whole
from probes.contract import CONTRACT_VERSION
from probes.models import NetConfig
from probes.registry import get_probe
from probes.runner_plan import Cell
from probes.train import Fitted, TrainPlan, make_net

__all__ = ["SUFFIX", "load_cell", "load_network", "network_path", "network_paths", "save_network"]

SUFFIX = ".safetensors"
NET_FORMAT = 1


def network_path(cell: Cell, root: Path) -> Path:
    """Where the network of a cell lies in a results folder."""
    name = f"{cell.rung}__{cell.model}__{cell.router}__s{cell.seed}__{cell.hash}{SUFFIX}"
    return root / cell.probe / name


def network_paths(root: Path) -> list[Path]:
    """All networks of a results folder.

    Raises:
        DataError: E-FILE, there is none.
    """
    found = sorted(root.glob(f"*/*{SUFFIX}"))
    if not found:
        raise DataError(
            "E-FILE", f"'{root}' holds no saved network (*/*{SUFFIX}).",
            fix="Run the probes into it first: hamts probes run der --out FOLDER.",
        )  # fmt: skip
    return found


def save_network(cell: Cell, root: Path, fitted: Fitted) -> Path:
    """Write the network of a cell, whole or not at all."""
    about = {
        "format": NET_FORMAT, "contract_version": CONTRACT_VERSION, "cell": asdict(cell),
        "net": asdict(fitted.net.config), "critical_rows": fitted.plan.critical_rows,
        "losses": fitted.losses, "seconds": fitted.seconds, "status": fitted.status,
    }  # fmt: skip
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in fitted.net.state_dict().items()}
    path = network_path(cell, root)
    with written_whole(path) as partial:
        save_file(tensors, partial, metadata={"probe": json.dumps(about)})
    return path


def load_network(path: Path, *, device: str = "cpu") -> tuple[Cell, Fitted]:
    """A cell and its network as it was trained.

    Raises:
        DataError: E-PROBE-DAMAGED (no network of a probe), E-PROBE-VERSION (trained under another contract or suite).
    """
    cell, about = _about(path)
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    plan = TrainPlan(
        probe=get_probe(cell.probe)[0], config=cell.config, net=NetConfig(**about["net"]), steps=cell.steps,
        learning_rate=cell.learning_rate, seed=cell.seed, critical_rows=about["critical_rows"],
        echo=cell.readout == "echo", device=device,
    )  # fmt: skip
    net = make_net(plan)
    net.load_state_dict(tensors)
    net.eval()
    with torch.no_grad():
        net.to(device)
    losses = [(int(step), float(error)) for step, error in about["losses"]]
    return cell, Fitted(net, plan, float(about["seconds"]), losses, str(about["status"]))


def load_cell(path: Path) -> Cell:
    """The cell of a network that is left on disk; errors as of ``load_network``."""
    return _about(path)[0]


def _about(path: Path) -> tuple[Cell, dict[str, Any]]:
    """What a file says of its network, if it is of this version."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["probe"])
        cell = _cell(about["cell"])
        version = about["contract_version"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            "E-PROBE-DAMAGED", f"'{path}' is not a network of a probe ({error}).", fix="Remove it and run again."
        ) from error
    probe = get_probe(cell.probe)[0]
    if (version, cell.suite_version) != (CONTRACT_VERSION, probe.version):
        raise DataError(
            "E-PROBE-VERSION",
            f"'{path}' was trained under contract {version}, {cell.probe} {cell.suite_version}; this is contract"
            f" {CONTRACT_VERSION}, {cell.probe} {probe.version}.",
            fix="Train it again: versions of a suite are never compared with each other.",
        )
    return cell, about


def _cell(content: dict[str, Any]) -> Cell:
    """A cell from JSON, whose lists were tuples."""
    known = {f.name for f in fields(Cell)}
    return Cell(**{name: _tuples(value) for name, value in content.items() if name in known})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
