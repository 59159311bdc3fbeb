"""What a patch costs to read, and whether a budget of operations or milliseconds is kept.

The cost is measured at a few sizes of the scratchpad; then budgets are asked for that allow other sizes, and the cost
at the size that is allowed is measured anew. The first sizes are measured once more beside it: by how much they differ
is what the machine became slower or faster meanwhile, and is said and taken out in a column of its own. One JSON file a
cell; what is there is not run again.

``--rounds 7`` takes costs in a second or two, asks at once, measures at once, and does so seven times: machines that
others share change their speed within seconds. Of each budget the round in the middle counts; nothing is taken out.

    python -m benchmarks.cost --results benchmarks/results/cost
    python -m benchmarks.cost --results benchmarks/results/cost --table
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cells import write_cell
from hamts.config import PRESETS, MemoryConfig, ModelConfig
from hamts.cost import fit_cost, measure
from hamts.nn.backbone import ChannelSpec
from hamts.reader import HAMNetwork

PRESET_NAMES = ("tiny", "small", "base")
CHANNELS = (1, 7)
# entries whose cost is asked for: none of them is a point of the fit
ASKED_ENTRIES = {"cpu": (300, 700, 1500), "cuda": (4000, 20000, 50000)}
SEED, WITHIN = 0, 0.1
# of timing for each size, in one of several rounds
ROUND_SECONDS = 0.2


def network_of(preset: str, channels: int, device: torch.device) -> HAMNetwork:
    """An untrained network: what it costs does not depend on what it learned."""
    config = replace(ModelConfig(), **PRESETS[preset].model)
    spec = ChannelSpec(roles=("target",) * channels, levels=(0,) * channels, calendar_features=4)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        return HAMNetwork(config, MemoryConfig(), spec).to(device).eval()


def cell(preset: str, channels: int, device: torch.device, rounds: int) -> dict[str, Any]:
    """Measure both costs, ask for budgets, measure what came of them."""
    network = network_of(preset, channels, device)
    found: dict[str, Any] = {
        "preset": preset,
        "channels": channels,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "versions": {name: metadata.version(name) for name in ("torch", "numpy")},
        "budgets": [],
    }
    if rounds > 1:
        found |= {"rounds": rounds, "ms": {}, "budgets": in_rounds(network, device, rounds)}
        return found
    for unit in ("flops", "ms"):
        model = fit_cost(network, unit, seed=SEED)
        budgets = [model.cost(wanted) for wanted in ASKED_ENTRIES[device.type]]
        allowed = [model.within(asked) for asked in budgets]
        measured = measure(network, unit, entries=[*allowed, *model.entries], seed=SEED + 1)
        again = measured[len(allowed) :]
        speed = float(np.median(np.asarray(again) / np.asarray(model.costs)))
        found[unit] = {"entries": model.entries, "costs": model.costs, "again": again, "slower by": speed - 1}
        for asked, entries, cost in zip(budgets, allowed, measured[: len(allowed)], strict=True):
            found["budgets"].append({"unit": unit, "asked": asked, "entries": entries, "measured": cost})
    return found


def in_rounds(network: HAMNetwork, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds asked for right after costs were taken, and measured right after that; all rounds, and the middle
    one by its miss."""
    tried: list[list[dict[str, Any]]] = [[] for _ in ASKED_ENTRIES[device.type]]
    for number in range(rounds):
        model = fit_cost(network, "ms", seed=SEED + number, seconds=ROUND_SECONDS)
        budgets = [model.cost(wanted) for wanted in ASKED_ENTRIES[device.type]]
        allowed = [model.within(asked) for asked in budgets]
        costs = measure(network, "ms", entries=allowed, seed=SEED + rounds + number, seconds=ROUND_SECONDS)
        for own, asked, entries, cost in zip(tried, budgets, allowed, costs, strict=True):
            own.append({"asked": asked, "entries": entries, "measured": cost})
    middle = [sorted(own, key=lambda one: one["measured"] / one["asked"])[rounds // 2] for own in tried]
    return [{"unit": "ms", **one, "rounds": own} for one, own in zip(middle, tried, strict=True)]


def table(results: Path) -> str:
    """Asked against measured, from the files alone."""
    lines = [
        "| device | preset | channels | unit | asked | entries | measured | off by | slower by | without that |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        for row in found["budgets"]:
            off = row["measured"] / row["asked"] - 1
            slower = found[row["unit"]].get("slower by")
            cells = (
                "| |" if slower is None else f"{100 * slower:+.1f} % | {100 * ((1 + off) / (1 + slower) - 1):+.1f} % |"
            )
            lines.append(
                f"| {found['device']} | {found['preset']} | {found['channels']} | {row['unit']} | {row['asked']:.4g} |"
                f" {row['entries']} | {row['measured']:.4g} | {100 * off:+.1f} % | {cells}"
            )
    return "\n".join(lines)


def summary(results: Path) -> str:
    """How many budgets of milliseconds were met within a tenth, and the worst; also without what the machine did."""
    raw: list[float] = []
    steady: list[float] = []
    single: list[float] = []
    for path in sorted(results.glob("*.json")):
        found = json.loads(path.read_text())
        off = [row["measured"] / row["asked"] - 1 for row in found["budgets"] if row["unit"] == "ms"]
        raw += off
        single += [one["measured"] / one["asked"] - 1 for row in found["budgets"] for one in row.get("rounds", ())]
        if "slower by" in found["ms"]:
            steady += [(1 + one) / (1 + found["ms"]["slower by"]) - 1 for one in off]
    said = {"milliseconds": raw, "the same, at the speed at which the costs were taken": steady, "every round": single}
    return "\n".join(
        f"{name}: {sum(abs(one) <= WITHIN for one in off)} of {len(off)} within {100 * WITHIN:g} %,"
        f" worst {100 * max(off, key=abs):+.1f} %"
        for name, off in said.items()
        if off
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/cost"))
    parser.add_argument("--table", action="store_true", help="print the table, measure nothing")
    parser.add_argument("--rounds", type=int, default=1, help="an odd number; of more than one, milliseconds alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.rounds < 1 or args.rounds % 2 == 0:
        parser.error(f"--rounds must be odd, so that one is in the middle. Got {args.rounds}.")
    args.results.mkdir(parents=True, exist_ok=True)
    if not args.table:
        for preset in PRESET_NAMES:
            for channels in CHANNELS:
                path = args.results / f"{args.device}--{preset}--{channels}.json"
                if path.exists():
                    continue
                write_cell(path, cell(preset, channels, torch.device(args.device), args.rounds))
    print(table(args.results))
    print(summary(args.results))


if __name__ == "__main__":
    main()
