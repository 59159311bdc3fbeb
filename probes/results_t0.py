"""Documents of tier 0: its rows in the schema of all results, named by what they are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from probes.contract import CONTRACT_VERSION, FAMILY
from probes.registry import list_probes
from probes.results import SCHEMA_VERSION, machine, read_one

__all__ = ["T0_VERSION", "remove_stale", "t0_documents", "t0_name"]

# of what tier 0 scores, apart from the suites. 2: what no state answers is told against the floor on the same queries,
# budgets of nodes are spent, recovery is that of a state that learns, limited routers see no later row
T0_VERSION = 2


def t0_documents(
    suite: str, rows: Iterable[dict[str, Any]], *, preset: str, seed: int, axis: str = ""
) -> list[dict[str, Any]]:
    """Tier-0 rows as documents of the same schema."""
    probe = list_probes()[suite]
    found = []
    for row in rows:
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        for nested in ("utility_auroc", "by_role"):
            numbers |= {f"{nested}_{k}": v for k, v in row.get(nested, {}).items()}
        known = ("budget_rows", "budget_frac", "bytes_kv", "bytes_state", "bytes_total", "suite_version")
        found.append({
            "schema_version": SCHEMA_VERSION,
            "identity": {
                "family": FAMILY, "contract_version": CONTRACT_VERSION, "suite": suite,
                "suite_version": probe.version, "rung": row["rung"], "agenda_slot": probe.slot, "tier": "T0",
                "readout": "query", "model": row["model"] + ("_clipped" if row.get("write_clip") else ""),
                "router": row["router"], "config_hash": "", "axis": axis,
            },
            "config": {"preset": preset, "seed": seed, "axis": axis, "t0_version": T0_VERSION},
            "data_manifest": {"train_seed": seed, "leak_status": "clean"},
            "budget": {"frac": row.get("budget_frac", math.nan), "rows": row.get("budget_rows", 0),
                       **{name: row.get(name, math.nan) for name in ("bytes_state", "bytes_kv", "bytes_total")}},
            "results": {k: {"values": [v], "median": v, "n": 1} for k, v in numbers.items() if k not in known},
            "floor": {"name": row.get("floor_name", "")}, "oracle": {"mse": 0.0},
            "diagnosis": {"survival": row.get("survival", {})}, "checks": {},
            "runtime": {"device": "cpu", "status": "ok", **machine()}, "warnings": [],
        })  # fmt: skip
    return found


def t0_name(content: dict[str, Any]) -> str:
    """File name of a document of tier 0: all that tells it from the others of its suite."""
    identity, config, budget = content["identity"], content["config"], content["budget"]["frac"]
    sized = "" if math.isnan(budget) else f"b{budget:g}"
    words = (identity["rung"], identity["model"], identity["router"].replace(":", "-"), sized, config["axis"])
    return "__".join(("t0", *(word for word in words if word), config["preset"], f"s{config['seed']}.json"))


def remove_stale(folder: Path, own: dict[Path, dict[str, Any]]) -> list[Path]:
    """Remove documents of tier 0 of the same rung, preset, seed and axis that are none of one's own."""

    def kind(content: dict[str, Any]) -> tuple[Any, ...]:
        identity, config = content["identity"], content["config"]
        return identity["tier"], identity["rung"], *(config.get(name, "") for name in ("preset", "seed", "axis"))

    written = {kind(content) for content in own.values()}
    stale = [path for path in sorted(folder.glob("*.json")) if path not in own and kind(read_one(path)) in written]
    for path in stale:
        path.unlink()
    return stale
