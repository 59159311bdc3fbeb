"""What a router keeps: of the tokens that store a shape, of those that echo one, and of all others, in every layer.

``python -m benchmarks.frontier_kept --set epf-old --model learned --weights FILE`` reads the first item with the
weights of a network of the grid (half precision, a ``state_dict``), thresholds set as a cell sets them, and prints for
some budgets which share of each kind of token was kept, and the error inside events of what was chosen and of the
newest in as many bytes. A shape lies in the target token of a patch with an event. ``--allocation pooled`` gives all
layers one threshold, so that one with more to keep keeps more; it stands still then, for each layer would follow its
own share.

I items · C channels · N patches
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from benchmarks.frontier_cell import NO_CAP, SIZES, Trial, asked_of, calibrate, fit, judged
from benchmarks.frontier_claims import markdown
from benchmarks.frontier_grid import CONTROL_SHARES, MODELS
from benchmarks.frontier_sets import EVENT, SETS, Carrier, Set, load
from hamts.evaluation import policies_for
from hamts.fitting import Trained
from hamts.frontier import measure_points
from hamts.frontier_read import Histories


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="epf-old", choices=list(SETS))
    parser.add_argument("--model", default="learned", choices=[name for name, row in MODELS.items() if row.controls])
    parser.add_argument("--size", default="1M", choices=list(SIZES))
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--allocation", default="uniform", choices=["uniform", "pooled"])
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    spec, whole = SETS[told.set], load(told.set)
    item = whole.frame["unique_id"].iloc[0]
    carrier = replace(whole, frame=whole.frame[whole.frame["unique_id"] == item])
    trained = fit(
        whole, spec, MODELS[told.model], rate=3e-3, seed=0, budget=NO_CAP, size=told.size, max_steps=1,
        accelerator="cpu", trial=Trial(training={"batch_windows": 2}, watched=True),
    )  # fmt: skip
    stored = torch.load(told.weights, map_location="cpu")
    trained.network.load_state_dict({k: v.float() if v.dtype == torch.float16 else v for k, v in stored.items()})
    network = trained.network
    if told.allocation == "pooled":
        network.config = replace(network.config, allocation="pooled")
        network.memory_config = replace(network.memory_config, threshold="fixed")
    calibrate(trained, np.full(trained.panel.n_items, whole.rows - whole.test_rows), gpu=False)
    once = replace(spec, stride=whole.rows)
    panel, windows, parts = judged(trained, carrier, once)
    for share in CONTROL_SHARES:
        print(f"{told.set}, {told.model}, {told.allocation}")
        print(markdown(kept(trained, carrier, once, share)), flush=True)
        found = measure_points(trained, panel, windows, shares=(share,), memories=("model", "recency"), timed=())
        for point in found:
            error = point.losses.wql(parts["events"][point.losses.rows])
            print(f"{point.memory}: {error:.4f} inside events, {point.scratchpad_bytes / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main()
