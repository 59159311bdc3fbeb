"""What a router keeps: of the tokens that store a shape, of those that echo one, and of all others, in every layer.

``python -m benchmarks.frontier_kept --set epf-old --model learned --weights FILE --folder DIR`` reads the first item
with the weights of a network of the grid (half precision, a ``state_dict``), thresholds set as a cell sets them, and
writes for some budgets which share of each kind of token was kept, and the error inside events of what was chosen and
of the newest in as many bytes. A shape lies in the target token of a patch with an event. ``--allocation pooled`` gives
all layers one threshold, so that one with more to keep keeps more; it stands still then, for each layer would follow
its own share. ``--table`` prints what is there.

I items · C channels · N patches
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import hamts
from benchmarks.frontier_cell import NO_CAP, SIZES, Trial, asked_of, calibrate, checked_tail, finite, fit, judged
from benchmarks.frontier_grid import CONTROL_SHARES, MODELS
from benchmarks.frontier_lines import markdown
from benchmarks.frontier_sets import EVENT, SETS, Carrier, Set, load
from hamts.errors import DataError
from hamts.evaluation import policies_for
from hamts.fitting import Trained
from hamts.frontier import measure_points
from hamts.frontier_read import Histories

RESULTS = Path(__file__).parent / "results" / "frontier" / "kept"


def patches_of(carrier: Carrier, spec: Set, item: str, lead: int) -> dict[str, np.ndarray]:
    """Patches of an item's target tokens by what they hold."""
    own = carrier.frame[carrier.frame["unique_id"] == item].reset_index(drop=True)
    named = np.unique((np.flatnonzero(own[EVENT].notna()) + lead) // spec.patch_steps)
    echo = np.unique((asked_of(carrier, item)["asked"].to_numpy(int) + lead) // spec.patch_steps)
    return {"stored": np.setdiff1d(named, echo), "echo": echo}


def kept(trained: Trained, carrier: Carrier, spec: Set, share: float) -> pd.DataFrame:
    """A row for each layer: share kept of each kind of token, and of what is kept the part that stores a shape."""
    panel, windows, _ = judged(trained, carrier, spec)
    reader = Histories(trained.network, panel, windows, trained.plan.time_unit)
    (result,) = reader.read([policies_for(trained.network, "model", share)])
    lead = int(reader._store().lead[0])
    places = patches_of(carrier, spec, str(panel.item_ids[0]), lead)
    target = panel.schema.indices("target")[0]
    event = panel.schema.indices("event")[0]
    rows = []
    for layer in range(trained.plan.model.layers):
        routed: dict[int, torch.Tensor] = {}
        for chunk in result.rollout.traces:
            first = int(chunk.first_patch[0])
            own = chunk.layers[layer].routed[0]  # [C, N]
            routed |= {first + n: own[:, n] for n in range(own.shape[1]) if first + n >= 0}
        grid = torch.stack([routed[n] for n in sorted(routed)], 1).numpy()  # [C, N]
        scored = np.delete(grid, event, 0)  # what an event column says is kept by no score
        hits = {name: grid[target, at[at < grid.shape[1]]] for name, at in places.items()}
        inside = sum(int(found.sum()) for found in hits.values())
        others = scored.size - sum(map(len, hits.values()))
        rows.append(
            {"layer": layer, "asked": share, "kept of all": float(scored.mean())}
            | {f"kept of {name}": float(found.mean()) for name, found in hits.items()}
            | {"kept of others": (int(scored.sum()) - inside) / others}
            | {"stored, of what is kept": float(hits["stored"].sum() / max(scored.sum(), 1))}
        )
    return pd.DataFrame(rows)


def measured(name: str, model: str, weights: Path, *, allocation: str, size: str) -> dict[str, Any]:
    """What one network keeps of the first item of a set, and the error that comes of it."""
    began, spec, whole = time.monotonic(), SETS[name], load(name)
    item = whole.frame["unique_id"].iloc[0]
    carrier = replace(whole, frame=whole.frame[whole.frame["unique_id"] == item])
    trained = fit(
        whole, spec, MODELS[model], rate=3e-3, seed=0, budget=NO_CAP, size=size, max_steps=1,
        accelerator="cpu", trial=Trial(training={"batch_windows": 2}, watched=True),
    )  # fmt: skip
    stored = torch.load(weights, map_location="cpu")
    trained.network.load_state_dict({k: v.float() if v.dtype == torch.float16 else v for k, v in stored.items()})
    network = trained.network
    if allocation == "pooled":
        network.config = replace(network.config, allocation="pooled")
        network.memory_config = replace(network.memory_config, threshold="fixed")
    # as a cell does: on what lies before the validation rows
    ends = checked_tail(trained.panel, trained.plan, whole, spec).ends
    calibrate(trained, ends, gpu=False)
    once = replace(spec, stride=whole.rows)
    panel, windows, parts = judged(trained, carrier, once)
    layers, points = [], []
    for share in CONTROL_SHARES:
        layers += kept(trained, carrier, once, share).to_dict("records")
        found = measure_points(trained, panel, windows, shares=(share,), memories=("model", "recency"), timed=())
        points += [
            {"memory": point.memory, "asked": share, "took": finite(point.usage_share)}
            | {"events": finite(point.losses.wql(parts["events"][point.losses.rows]))}
            | {"MB": finite(point.scratchpad_bytes / 1e6)}
            for point in found
        ]
    return {
        "set": name, "model": model, "allocation": allocation, "size": size, "weights": weights.name,
        "threshold": network.memory_config.threshold, "item": str(item), "calibrated_rows": int(ends.max()),
        "versions": {"hamts": hamts.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "s": round(time.monotonic() - began, 1), "layers": layers, "points": points,
    }  # fmt: skip


def table(folder: Path) -> str:
    """What every layer kept, and the error inside events with the megabytes of scratchpad, of all that is there."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise DataError(
            "E-NO-CELLS", f"{folder} must hold what this script wrote, and has no JSON", fix="Name another --folder."
        )
    frames = []
    for part in ("layers", "points"):
        rows = [
            {"set": one["set"], "model": one["model"], "allocation": one["allocation"], **row}
            for one in found
            for row in one[part]
        ]
        frames.append(markdown(pd.DataFrame(rows)))
    return "\n\n".join(frames)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="epf-old", choices=list(SETS))
    parser.add_argument("--model", default="learned", choices=[name for name, row in MODELS.items() if row.controls])
    parser.add_argument("--size", default="1M", choices=list(SIZES))
    parser.add_argument("--weights", type=Path, help="a state_dict of a network of the grid")
    parser.add_argument("--allocation", default="uniform", choices=["uniform", "pooled"])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    if not told.table:
        if told.weights is None:
            parser.error("--weights must name a state_dict of a network of the grid, or --table be given")
        said = measured(told.set, told.model, told.weights, allocation=told.allocation, size=told.size)
        told.folder.mkdir(parents=True, exist_ok=True)
        path = told.folder / f"{told.set}--{told.model}--{told.allocation}.json"
        path.write_text(json.dumps(said, indent=1) + "\n")
    print(table(told.folder))


if __name__ == "__main__":
    main()
