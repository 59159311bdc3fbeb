"""The changing side of a fit: its clock, its checks on validation data, its best weights, and what a resumed fit needs.

C channels · G targets · F future steps · Q quantiles
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

from hamts.config import MachineConfig, TrainConfig
from hamts.data.patches import PatchStore
from hamts.nn.allocation import update_tables
from hamts.nn.head import pinball
from hamts.nn.tokens import map_tensors
from hamts.reader import HAMNetwork, StreamMemory
from hamts.rollout import roll
from hamts.windows import StreamWindows

__all__ = ["FitReport", "FitTask", "Run", "calibrate_thresholds", "resume_fit", "save_fit", "validation_score"]

VALIDATION_WARMUP_PATCHES = 256
RESUME_FILE = "fit.ckpt"


@dataclass(frozen=True)
class FitReport:
    """How fitting went."""

    steps: int
    seconds: float
    best_step: int
    best_score: float
    history: tuple[dict[str, float], ...]
    stopped_by: str
    kernel: str = "torch"  # what ran the recurrence and the read
    kernel_why: str = ""
    device: str = "cpu"


@dataclass(frozen=True)
class FitTask:
    """What is fitted on what."""

    network: HAMNetwork
    store: PatchStore
    cutoffs: list[np.ndarray]
    horizon: int
    share: float
    config: TrainConfig
    max_steps: int
    folder: Path | None
    machine: MachineConfig

    @property
    def chooses_reading(self) -> bool:
        """Whether there are several targets, and validation decides if they read one another."""
        return self.network.config.cross_reading == "auto" and len(self.network.spec.targets) > 1


@dataclass
class FitState:
    """What moves with every step and must be restored to go on exactly."""

    windows: StreamWindows
    explore: torch.Generator
    carried: StreamMemory | None = None
    optimizer: dict[str, Any] | None = None
    steps: int = 0


def moving_average(decay: float) -> Callable[..., None]:
    """Exponential moving average of weights whose first steps count less: decay_n = min(decay, (1 + n) / (10 + n))."""

    @torch.no_grad()
    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], count: torch.Tensor) -> None:
        n = float(count)
        torch._foreach_lerp_(averaged, current, 1.0 - min(decay, (1.0 + n) / (10.0 + n)))

    return update


class Run:
    """Clock, history and best weights of one fit."""

    RESUMED = ("history", "best", "best_score", "best_step", "next_check", "bad_checks")

    def __init__(self, task: FitTask, *, quiet: bool) -> None:
        self.task, self.quiet = task, quiet
        self.began, self.earlier = time.monotonic(), 0.0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, torch.Tensor] | None = None
        self.best_score, self.best_step = math.inf, 0
        self.averaged = AveragedModel(task.network, multi_avg_fn=moving_average(task.config.average_decay))
        self.next_check = 1.0 / task.config.checks
        self.stopped_by = "max_steps"
        self.bad_checks = 0
        # where several processes fit together they go by one clock
        self.agreed_seconds: float | None = None

    @property
    def checked(self) -> HAMNetwork:
        """The network with averaged weights."""
        assert isinstance(self.averaged.module, HAMNetwork)
        return self.averaged.module

    @property
    def seconds(self) -> float:
        if self.agreed_seconds is not None:
            return self.agreed_seconds
        return self.earlier + time.monotonic() - self.began

    def progress(self, step: int) -> float:
        """Share of the fit that is over, by steps or by the clock, whichever is further."""
        limit = self.task.config.max_time_s
        return max(step / self.task.max_steps, self.seconds / limit if limit else 0.0)

    def out_of_time(self) -> bool:
        limit = self.task.config.max_time_s
        return limit is not None and self.seconds >= limit

    def check(self, step: int, training_loss: float) -> None:
        """Validate, remember the best weights, decide whether targets read one another."""
        # the averaged weights are what is checked and kept; before the first step they are the plain ones
        network, task = self.checked, self.task
        options = [True, False] if task.chooses_reading else [True]
        scores = {}
        for cross in options:
            network.cross_targets.fill_(cross)
            scores[cross] = self._score()
        cross = min(options, key=lambda option: scores[option])
        network.cross_targets.fill_(cross)
        score = scores[cross]
        better = score < self.best_score or self.best is None or math.isnan(score)
        self.bad_checks = 0 if better else self.bad_checks + 1
        if better:
            self.best_score, self.best_step = score, step
            self.best = {name: value.detach().clone() for name, value in network.state_dict().items()}
        self.history.append(
            {
                "step": step,
                "seconds": self.seconds,
                "train_loss": training_loss,
                "validation_loss": score,
                "cross": cross,
            }
        )
        if not self.quiet:
            print(
                f"step {step}/{task.max_steps}  {self.seconds:.0f} s  train {training_loss:.4f}  validation {score:.4f}"
                + ("  best so far" if better else ""),
                flush=True,
            )
        if self.bad_checks >= task.config.patience and self.progress(step) < 1.0:
            self.stopped_by = "patience"

    def _score(self) -> float:
        task = self.task
        return validation_score(
            self.checked, task.store, task.cutoffs, horizon=task.horizon, share=task.share,
            warmup=VALIDATION_WARMUP_PATCHES,
        )  # fmt: skip


def validation_score(
    network: HAMNetwork, store: PatchStore, cutoffs: list[np.ndarray], *, horizon: int, share: float, warmup: int
) -> float:
    """Mean quantile loss at the cutoffs, in units of each item's deviation before them; NaN without any.

    Reading starts ``warmup`` patches before the first cutoff: long enough for the memory to have an age.
    """
    policy = network.policy(torch.tensor([share]))
    opened = [int(store.lead[i]) + int(c[0]) if len(c) else 0 for i, c in enumerate(cutoffs)]  # [I] steps
    starts = np.maximum(np.array(opened) // store.patch_steps - warmup, 0)  # [I]
    # items without a cutoff are not read at all
    ends = np.array([int(c[-1]) if len(c) else 0 for c in cutoffs])  # [I]
    result = roll(network, store, cutoffs=cutoffs, steps=horizon, policies=policy, starts=starts, ends=ends)
    losses = []
    levels = torch.tensor(network.config.quantiles, dtype=torch.float64)  # [Q]
    place = 0
    for item, cuts in enumerate(cutoffs):
        values = item_targets(network, store, item)  # [T, G]
        for cut in cuts:
            truth = values[cut : cut + horizon].T  # [G, F]
            unit = deviation(values[: cuts[0]], network.unit[network.spec.targets])[:, None]  # [G, 1]
            forecast = torch.from_numpy(result.quantiles[place][:, : truth.shape[1]])  # [G, F, Q]
            loss = pinball(forecast / unit[..., None], truth / unit, levels)  # [G, F]
            losses.append(loss[~torch.isnan(loss)])
            place += 1
    joined = torch.cat(losses) if losses else torch.zeros(0)
    return float(joined.mean()) if len(joined) else math.nan


def item_targets(network: HAMNetwork, store: PatchStore, item: int) -> torch.Tensor:
    """Targets of one item from its first row on, [T, G]."""
    rows = slice(int(store.first_row[item]), int(store.first_row[item] + store.row_count[item]))
    return store.values[rows].flatten(0, 1)[int(store.lead[item]) :][:, network.spec.targets]


def deviation(values: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Standard deviation of what was observed, [T, G] -> [G]; ``otherwise`` where that is 0 or nothing was."""
    known = ~torch.isnan(values)  # [T, G]
    count = known.sum(0).clamp_min(1)  # [G]
    mean = torch.where(known, values, 0.0).sum(0) / count  # [G]
    spread = (torch.where(known, values - mean, 0.0).square().sum(0) / count).sqrt()  # [G]
    return torch.where(spread > 0, spread, otherwise.cpu())


@torch.no_grad()
def calibrate_thresholds(
    network: HAMNetwork, store: PatchStore, ends: np.ndarray, *, share: float, items: int = 16, patches: int = 384
) -> None:
    """Set every layer's thresholds from the scores of the finished network on the last part of the training rows."""
    chosen = np.unique(np.linspace(0, store.n_items - 1, min(items, store.n_items)).astype(int))
    stops = np.asarray(ends, dtype=np.int64).copy()
    starts = np.maximum((store.lead.numpy() + stops) // store.patch_steps - patches, 0)
    other = np.setdiff1d(np.arange(store.n_items), chosen)
    stops[other] = 0
    starts[other] = 0
    nothing = [np.zeros(0, dtype=np.int64)] * store.n_items
    result = roll(
        network, store, cutoffs=nothing, steps=1, policies=network.policy(torch.tensor([share])),
        starts=starts, ends=stops, keep_traces=True,
    )  # fmt: skip
    if result.traces:
        scores = [
            torch.cat([chunk.layers[number].scores[chunk.heard >= 0.5] for chunk in result.traces])
            for number in range(network.config.layers)
        ]
        update_tables(network.backbone.layers(), scores, network.config.allocation, calibrate=True)


def resume_identity(task: FitTask) -> str:
    """What must agree for a fit to go on where another stopped."""
    weights = sum(p.numel() for p in task.network.parameters())
    return f"{task.config} weights={weights} steps={task.max_steps} rows={tuple(task.store.values.shape)}"


def save_fit(task: FitTask, run: Run, state: FitState) -> None:
    """Write everything an interrupted fit needs, in one atomic replacement."""
    assert task.folder is not None
    carried: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        carried.append(tensor)
        return tensor

    map_tensors(state.carried, note)
    windows = state.windows
    content = {
        "identity": resume_identity(task),
        "network": task.network.state_dict(),
        "averaged": run.averaged.state_dict(),
        "optimizer": state.optimizer,
        "carried": carried,
        "windows": {name: getattr(windows, name) for name in ("items", "at", "share", "cross", "reset")},
        "generators": [windows.generator.get_state(), state.explore.get_state(), torch.get_rng_state()],
        "steps": state.steps,
        "seconds": run.seconds,
        "run": {name: getattr(run, name) for name in Run.RESUMED},
    }
    task.folder.mkdir(parents=True, exist_ok=True)
    partial = task.folder / (RESUME_FILE + ".partial")
    torch.save(content, partial)
    partial.replace(task.folder / RESUME_FILE)


def resume_fit(task: FitTask, run: Run, state: FitState) -> None:
    """Go on where the same fit stopped, if its folder holds one: data order, random numbers and memory included.

    Raises:
        ValueError: the folder holds another fit.
    """
    assert task.folder is not None
    path = task.folder / RESUME_FILE
    if not path.exists():
        return
    content = torch.load(path, weights_only=True)
    if content["identity"] != resume_identity(task):
        raise ValueError(
            f"run_dir must hold the same fit or none. {str(path)!r} is from another configuration or other data."
            " Give another run_dir, or delete that file to start anew."
        )
    task.network.load_state_dict(content["network"])
    run.averaged.load_state_dict(content["averaged"])
    parts = iter(content["carried"])
    state.carried = map_tensors(task.network.empty_memory(1), lambda _: next(parts))
    state.optimizer, state.steps = content["optimizer"], content["steps"]
    for name, value in content["windows"].items():
        setattr(state.windows, name, value)
    for generator, numbers in zip((state.windows.generator, state.explore), content["generators"][:2], strict=True):
        generator.set_state(numbers)
    torch.set_rng_state(content["generators"][2])
    run.earlier = content["seconds"]
    for name, value in content["run"].items():
        setattr(run, name, value)
