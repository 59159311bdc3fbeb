"""Is an echo recalled as well in a forecast as where training asks for it? The same events, memory and weights.

``python -m benchmarks.frontier_asked --set epf --model attention --weights FILE`` reads some patches before each of
some test echoes with the weights of a network of the grid (half precision, a ``state_dict``), and asks four times for
what follows the name: as training does, in its own code; hidden in a patch whose event column is complete; as a
forecast does; and as a forecast that is told that no other event will follow in this patch, as a complete patch tells.
Loss in deviations of the stream. With ``--before 30 900`` memories of 30 and of 900 patches are asked for the same
echoes: the first does not hold what is asked for, where an echo is older.

B echoes · C channels · P steps in a patch · G targets
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.frontier_cell import LENGTHENED, NO_CAP, SIZES, Trial, asked_of, fit
from benchmarks.frontier_echoes import keep_all
from benchmarks.frontier_grid import MODELS
from benchmarks.frontier_sets import NAMED_STEPS, SETS, Carrier, Set, load
from hamts.config import TrainConfig
from hamts.data.frame import to_panel
from hamts.data.patches import Chunk, PatchStore, build_store
from hamts.data.scale import ScaleState
from hamts.nn.head import pinball
from hamts.nn.tokens import map_tensors
from hamts.reader import HAMNetwork, Reading
from hamts.windows import StreamWindows, scale_history

EACH, AT_ONCE, LONG_AGO = 14, 50, 1 << 30


def echoes(
    carrier: Carrier, spec: Set, panel: Any, store: PatchStore, items_wanted: int | None, each: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Item, patch and age of some echoes among the test rows, [B] each."""
    rng, found = np.random.default_rng(0), []
    for item, name in enumerate(panel.item_ids[:items_wanted]):
        own = asked_of(carrier, name)
        own = own[own["asked"] >= carrier.rows - carrier.test_rows]
        for age, _ in spec.ages:
            at = (own.loc[own["age"] == age, "asked"].to_numpy(int) + int(store.lead[item])) // spec.patch_steps
            at = at[at < int(store.row_count[item]) - 2]
            found += [(item, int(patch), age) for patch in rng.permutation(at)[:each]]
    items = torch.tensor([item for item, _, _ in found])
    return items, torch.tensor([p for _, p, _ in found]) + store.first_patch[items], np.array([a for *_, a in found])


def asked(
    store: PatchStore, spec: Set, items: torch.Tensor, patch: torch.Tensor
) -> tuple[torch.Tensor, dict[str, Chunk]]:
    """The truth, [B, C, 1, P], and the questions."""
    B, P = len(items), spec.patch_steps
    whole = store.window(items, patch, 1)
    later = torch.arange(P) >= NAMED_STEPS  # [P]
    unknown = torch.tensor([role in ("target", "past") for role in store.roles])[:, None, None]  # [C, 1, 1]
    observed = whole.observed & ~(unknown & later)  # [B, C, 1, P]
    hidden = replace(
        whole, values=torch.where(observed, whole.values, 0.0), observed=observed, horizon=later.expand(B, 1, P)
    )  # fmt: skip
    cuts = patch * P - store.lead[items] + NAMED_STEPS
    ahead = store.horizon(items, cuts, spec.h, torch.zeros(B, dtype=torch.bool), 2)
    event = torch.tensor([role == "event" for role in store.roles])  # [C]
    seen, values = ahead.observed.clone(), ahead.values.clone()
    seen[:, event, 0], values[:, event, 0] = hidden.observed[:, event, 0], hidden.values[:, event, 0]
    told = replace(ahead, observed=seen, values=values)
    return whole.truth, {
        "as training asks": asked_in_training(store, whole, items, patch),
        "hidden in a complete patch": hidden, "forecast": ahead, "forecast, told of no other": told,
    }  # fmt: skip


def asked_in_training(store: PatchStore, whole: Chunk, items: torch.Tensor, patch: torch.Tensor) -> Chunk:
    """The question as ``StreamWindows`` puts it, where every echo is asked."""
    config = TrainConfig(batch_windows=len(items), recall_share=1.0, span_share=0.0)
    nothing = ScaleState(*(torch.zeros(1) for _ in range(5)))
    windows = StreamWindows(
        store, nothing, ends=store.row_count.numpy() * store.patch_steps, horizon=1, config=config, cross_chance=0.0
    )
    windows.items = items
    return windows._hide_spans(whole, windows._recalled(whole, patch, torch.full_like(patch, LONG_AGO)))


def loss_of(network: HAMNetwork, reading: Reading, truth: torch.Tensor) -> torch.Tensor:
    """Quantile loss of the steps after the name, mean over targets and steps, [B]."""
    scaled = (truth[:, network.spec.targets, 0] - reading.mean[:, :, 0, None]) / reading.scale[:, :, 0, None]
    levels = torch.tensor(network.config.quantiles)
    return pinball(reading.quantiles[:, :, 0], scaled.to(levels.dtype), levels)[..., NAMED_STEPS:].nanmean((1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", default="epf", choices=list(SETS))
    parser.add_argument("--model", default="attention", choices=list(MODELS))
    parser.add_argument("--size", default="1M", choices=list(SIZES))
    parser.add_argument("--weights", type=Path, help="of such a network; default: fitted here")
    parser.add_argument("--max-steps", type=int, help="of a fit; default those of the set")
    parser.add_argument("--short", action="store_true", help="a fit whose streams stay short: a pilot for a CPU")
    parser.add_argument("--streams", type=int, help="of a fit; default those of the grid")
    parser.add_argument("--seed", type=int, default=0, help="of a fit")
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--random-budgets", action="store_true", help="from the first step of a fit on")
    budgets.add_argument("--whole", action="store_true", help="everything is kept to the last step of a fit")
    parser.add_argument("--before", type=int, nargs="+", default=[200], help="patches that are read before an echo")
    parser.add_argument("--items", type=int, help="so many of them; default all")
    parser.add_argument("--each", type=int, default=EACH, help="echoes of an age and item")
    told = parser.parse_args()
    warnings.simplefilter("ignore")
    spec, carrier = SETS[told.set], load(told.set)
    steps, training = told.max_steps, {"batch_windows": told.streams} if told.streams else {}
    if told.weights:
        steps, training = 1, {"batch_windows": 2}
    trial = Trial(
        training=training, lengthened=(1.0, 1) if told.short else LENGTHENED, each=keep_all if told.whole else None
    )
    if told.random_budgets:
        spec = replace(spec, warm=False)
    trained = fit(
        carrier, spec, MODELS[told.model], rate=3e-3, seed=told.seed, budget=NO_CAP, size=told.size,
        accelerator="cpu", max_steps=steps, trial=trial,
    )  # fmt: skip
    network = trained.network
    if told.weights:
        stored = torch.load(told.weights, map_location="cpu")
        network.load_state_dict({k: v.float() if v.dtype == torch.float16 else v for k, v in stored.items()})
    panel = to_panel(carrier.frame, schema=trained.panel.schema)
    store = build_store(panel, patch_steps=spec.patch_steps, extra_steps=spec.h, time_unit=trained.plan.time_unit)
    items, patch, ages = echoes(carrier, spec, panel, store, told.items, told.each)
    history = scale_history(network, store)
    for before in told.before:
        ask(network, store, spec, (items, patch, ages), before, history, f"{told.set}, {told.model}")


def ask(
    network: HAMNetwork, store: PatchStore, spec: Set, wanted: tuple[torch.Tensor, torch.Tensor, np.ndarray],
    before: int, history: ScaleState, label: str,
) -> None:  # fmt: skip
    """Read so many patches before each echo, ask, and print."""
    items, patch, ages = wanted
    first = patch - before
    rows = store.first_row[items] + (first - store.first_patch[items]).clamp_min(0)
    warm = map_tensors(history, lambda tensor: tensor[rows])
    memory = replace(network.empty_memory(len(items)), scale=warm)
    policy = replace(network.policy(torch.ones(len(items))), masses=False)
    truth, questions = asked(store, spec, items, patch)
    with torch.no_grad():
        for low in range(0, before, AT_ONCE):
            chunk = store.window(items, first + low, min(AT_ONCE, before - low))
            memory = network(chunk, memory, policy, decode=False).memory
        for question, chunk in questions.items():
            losses = loss_of(network, network(chunk, memory, policy, advance=False), truth).numpy()
            means = {age: round(float(np.nanmean(losses[ages == age])), 3) for age, _ in spec.ages}
            print(f"{label}, {before} patches, {question}: {means}", flush=True)


if __name__ == "__main__":
    main()
