"""From a panel and a plan to a fitted network: validation tail, units, weights, and the memory of every item.

I items · C channels · G targets · F future steps · R residual windows · X cutoffs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from hamts.cost import bytes_within, training_flops
from hamts.data.calendar import calendar_features, supported_phases
from hamts.data.clock import step_times
from hamts.data.panel import Panel, Schema
from hamts.data.patches import build_store
from hamts.errors import DataError
from hamts.nn.backbone import ChannelSpec
from hamts.reader import HAMNetwork
from hamts.remembered import Remembered, read_panel
from hamts.resolve import Plan
from hamts.training import FitReport, fit_network
from hamts.windows import StreamWindows

__all__ = [
    "Fitted",
    "Trained",
    "ValidationTail",
    "fill_static",
    "fit_panel",
    "new_network",
    "panel_spec",
    "refuse_extremes",
    "train_panel",
    "validation_tail",
]

VALIDATION_SHARE = 0.10
VALIDATION_CUTOFFS = 48
# an item must leave this many horizons, and this many patches, for training
FEWEST_TRAINING_HORIZONS, FEWEST_TRAINING_PATCHES = 2, 4
TEMPLATES, FEWEST_TEMPLATES = 128, 32
LARGEST_VALUE = 1e100


@dataclass(frozen=True)
class Trained:
    """A network after training, before it has read what it will remember."""

    network: HAMNetwork
    panel: Panel
    plan: Plan
    report: FitReport


@dataclass(frozen=True)
class Fitted:
    """All that a fit leaves behind."""

    network: HAMNetwork
    schema: Schema
    plan: Plan
    report: FitReport
    remembered: Remembered
    templates: np.ndarray  # [R, G, F] float32: where the truth fell in each residual window's forecast, in [0, 1]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ValidationTail:
    """Where training ends and validation happens."""

    ends: np.ndarray  # [I] observed steps that may be used for training
    cutoffs: list[np.ndarray]  # [I] arrays of observed steps, at which validation forecasts

    def describe(self, lengths: np.ndarray) -> str:
        """``60 steps at the end of 3 items``."""
        tails = (lengths - self.ends)[self.ends < lengths]
        if not len(tails):
            return "none: every item is too short to keep some"
        size = f"{tails[0]}" if (tails == tails[0]).all() else f"{tails.min()} to {tails.max()}"
        return f"the last {size} steps of {len(tails)} of {len(lengths)} items"


def validation_tail(
    lengths: np.ndarray, *, h: int, patch_steps: int, val_size: int | float | None, most: int = VALIDATION_CUTOFFS
) -> ValidationTail:
    """Keep the end of each item that is long enough, and spread cutoffs evenly over it.

    Args:
        lengths: observed steps, [I].
        val_size: steps (int) or share (float) to keep; None: one horizon or a tenth, whichever is longer; 0: nothing.
        most: cutoffs over all items together.
    """
    nothing = [np.zeros(0, dtype=np.int64)] * len(lengths)
    if val_size is not None and val_size == 0:
        return ValidationTail(lengths.copy(), nothing)
    if isinstance(val_size, int | np.integer):
        tails = np.full(len(lengths), max(h, int(val_size)))
    else:
        tails = np.maximum(h, np.round((val_size or VALIDATION_SHARE) * lengths).astype(np.int64))  # [I]
    fewest = max(FEWEST_TRAINING_HORIZONS * h, FEWEST_TRAINING_PATCHES * patch_steps)
    enough = lengths - tails >= fewest  # [I]
    ends = np.where(enough, lengths - tails, lengths)
    return ValidationTail(ends, spread_cutoffs(ends, lengths - h, enough, most))


def spread_cutoffs(first: np.ndarray, last: np.ndarray, usable: np.ndarray, most: int) -> list[np.ndarray]:
    """At most ``most`` cutoffs in ``first[i]..last[i]`` of the usable items, spread evenly over items and time."""
    cutoffs = [np.zeros(0, dtype=np.int64)] * len(first)
    items = np.flatnonzero(usable & (last >= first) & (first >= 1))
    if not len(items):
        return cutoffs
    chosen = items[np.unique(np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int))]
    each = max(1, most // len(chosen))
    for place, item in enumerate(chosen):
        # where it is one each, every item has it at another place of its tail
        where = np.linspace(0, 1, each) if each > 1 else np.array([(place + 0.5) / len(chosen)])
        span = last[item] - first[item]
        cutoffs[item] = np.unique(first[item] + np.round(where * span).astype(np.int64))
    return cutoffs


def panel_spec(panel: Panel) -> ChannelSpec:
    """What the network must know of the columns."""
    schema = panel.schema
    features = calendar_features(panel.starts[:1], schema.frequency, schema.dialect.time_zone).shape[1]
    categories = [column for column in schema.static if column.kind == "categorical"]
    return ChannelSpec(
        roles=tuple(channel.role for channel in schema.channels),
        levels=tuple(len(channel.levels) if channel.kind == "categorical" else 0 for channel in schema.channels),
        calendar_features=features,
        static_numeric=len(schema.static) - len(categories),
        static_levels=tuple(len(column.levels) for column in categories),
        names=tuple(channel.name for channel in schema.channels),
    )


def new_network(panel: Panel, plan: Plan, ends: np.ndarray) -> HAMNetwork:
    """A network with fresh weights drawn from the seed, and the units of the training rows. The caller's random
    numbers go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.train.seed)
        try:
            network = HAMNetwork(plan.model, plan.memory, panel_spec(panel))
        except ValueError as error:
            raise DataError("E-OPTION", str(error), fix="Change that argument of fit, or leave it out.") from error
    network.calendar_used.copy_(torch.from_numpy(supported_phases(panel.schema.frequency, training_days(panel, ends))))
    network.unit.copy_(torch.from_numpy(channel_units(panel, ends)))
    numeric = [i for i, column in enumerate(panel.schema.static) if column.kind != "categorical"]
    if panel.static_values is not None and numeric:
        mean, scale = _column_statistics(panel.static_values[:, numeric])
        network.static_mean.copy_(torch.from_numpy(mean))
        network.static_scale.copy_(torch.from_numpy(scale))
    return network


def within_cost(panel: Panel, plan: Plan, ends: np.ndarray) -> Plan:
    """A plan whose bytes also keep its budgets of operations and milliseconds, as counted and timed on this machine.

    Raises DataError E-OPTION: a budget below the cost of one entry.
    """
    memory, train = plan.memory, plan.train
    asked = (memory.budget_flops, memory.budget_ms, train.budget_flops)
    if all(budget is None for budget in asked) or plan.model.mixer != "ham":
        return plan
    network = new_network(panel, plan, ends)
    if train.budget_flops is not None:
        each = training_flops(network, train, horizon_steps=plan.h)
        steps = int(train.budget_flops / each)
        if steps < 1:
            what = f"training_flops must be at least {each:.4g}, one step of training. Got {train.budget_flops:g}."
            raise DataError("E-OPTION", what, fix="Raise it, or choose a smaller preset.")
        most = steps if train.max_steps is None else min(steps, train.max_steps)
        plan = replace(plan, train=replace(train, max_steps=most))
    try:
        room = bytes_within(network, memory.budget_bytes, flops=memory.budget_flops, ms=memory.budget_ms)
    except ValueError as error:
        raise DataError("E-OPTION", str(error), fix="Raise the budget, or choose a smaller preset.") from error
    return replace(plan, memory=replace(memory, budget_bytes=room))


def training_days(panel: Panel, ends: np.ndarray) -> float:
    """Days from the first training row of all items to the last; 0 on an integer clock."""
    if panel.schema.frequency.kind == "integer":
        return 0.0
    if panel.times is not None:
        stamps = np.concatenate([panel.times[o : o + n] for o, n in zip(panel.offsets, ends, strict=False)])
    else:
        stamps = np.concatenate([panel.starts, step_times(panel.schema, panel.starts, np.asarray(ends))])
    return float((stamps.max() - stamps.min()) / np.timedelta64(1, "D"))


def channel_units(panel: Panel, ends: np.ndarray) -> np.ndarray:
    """Typical scale of every channel: the median over items of the deviation in their training rows, [C]; 1 without."""
    categorical = np.array([channel.kind == "categorical" for channel in panel.schema.channels])
    deviations = np.stack([_deviation(panel.item(i)[: ends[i]]) for i in range(panel.n_items)])  # [I, C]
    units = np.ones(deviations.shape[1])  # [C]
    for channel in np.flatnonzero(~categorical):
        moving = deviations[:, channel][deviations[:, channel] > 0]
        units[channel] = np.median(moving) if len(moving) else 1.0
    return units


def _deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation of what was observed, [T, C] -> [C]; 0 where nothing was."""
    seen = ~np.isnan(values)  # [T, C]
    count = np.maximum(seen.sum(0), 1)  # [C]
    # about the first observed value: a large level costs no digits
    start = values[seen.argmax(0), np.arange(values.shape[1])] if len(values) else np.zeros(values.shape[1])
    centred = np.where(seen, values - np.nan_to_num(start), 0.0)  # [T, C]
    mean = centred.sum(0) / count  # [C]
    return np.sqrt(np.where(seen, (centred - mean) ** 2, 0.0).sum(0) / count)


def _column_statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation over items of what is known, [E] each; 0 and 1 where that says nothing."""
    known = ~np.isnan(values)  # [I, E]
    count = np.maximum(known.sum(0), 1)  # [E]
    mean = np.where(known, values, 0.0).sum(0) / count
    scale = np.sqrt(np.where(known, (values - mean) ** 2, 0.0).sum(0) / count)
    return mean, np.where(scale > 0, scale, 1.0)


def refuse_extremes(values: np.ndarray, schema: Schema) -> None:
    """Values [..., C] whose squares would leave the range of float64. Raises DataError E-RANGE."""
    rows = values.reshape(-1, values.shape[-1])  # [S, C]
    highest, lowest = np.fmax.reduce(rows, axis=0, initial=0.0), np.fmin.reduce(rows, axis=0, initial=0.0)  # 2 x [C]
    largest = np.maximum(highest, -lowest)  # [C]
    worst = int(largest.argmax())
    if largest[worst] > LARGEST_VALUE:
        name = schema.channels[worst].name
        raise DataError(
            "E-RANGE",
            f"Values must be smaller than {LARGEST_VALUE:g}. Column {name!r} has {largest[worst]:g}.",
            column=name,
            fix="Use a larger unit of measurement, or treat such values as missing.",
        )


def fill_static(panel: Panel, network: HAMNetwork) -> Panel:
    """Missing static numbers become the mean of the fitted items, which the network reads as nothing special."""
    if panel.static_values is None or not np.isnan(panel.static_values).any():
        return panel
    filled = panel.static_values.copy()
    numeric = [i for i, column in enumerate(panel.schema.static) if column.kind != "categorical"]
    mean = network.static_mean.numpy().astype(np.float64)  # [E]
    filled[:, numeric] = np.where(np.isnan(filled[:, numeric]), mean, filled[:, numeric])
    return replace(panel, static_values=filled)


# a caller may be in torch.no_grad() or torch.inference_mode(); a fit needs gradients, and what it makes outlives both
@torch.inference_mode(False)
@torch.enable_grad()
def train_panel(
    panel: Panel,
    plan: Plan,
    *,
    tail: ValidationTail,
    run_dir: str | None = None,
    progress: bool | None = None,
    verbose: bool = True,
    augment: Callable[[StreamWindows], None] | None = None,
) -> Trained:
    """Train, and read nothing afterwards: all that an evaluation under many budgets needs.

    ``augment`` changes the training rows before each batch, see ``StreamWindows``.
    """
    plan = within_cost(panel, plan, tail.ends)
    network = new_network(panel, plan, tail.ends)
    panel = fill_static(panel, network)
    store = build_store(panel, patch_steps=plan.model.patch_steps, extra_steps=plan.h, time_unit=plan.time_unit)
    report = fit_network(
        network,
        store,
        ends=tail.ends,
        cutoffs=tail.cutoffs,
        horizon=plan.h,
        config=plan.train,
        share=plan.memory.budget_share,
        machine=plan.machine,
        run_dir=run_dir,
        progress=progress,
        verbose=verbose,
        augment=augment,
    )
    network.eval()
    return Trained(network, panel, plan, report)


@torch.inference_mode(False)
def fit_panel(
    panel: Panel,
    plan: Plan,
    *,
    tail: ValidationTail,
    run_dir: str | None = None,
    progress: bool | None = None,
    verbose: bool = True,
) -> Fitted:
    """Train, then read every item to its end and rank the residuals of its last windows."""
    trained = train_panel(panel, plan, tail=tail, run_dir=run_dir, progress=progress, verbose=verbose)
    network, panel, plan, h = trained.network, trained.panel, trained.plan, plan.h
    share = plan.memory.budget_share
    policy = network.policy(torch.tensor([share]))
    cutoffs = template_cutoffs(panel.lengths, tail, h)
    remembered, rollout = read_panel(
        network, panel, policy, share=share, time_unit=plan.time_unit, cutoffs=cutoffs, steps=h
    )
    templates = residual_ranks(panel, cutoffs, rollout.quantiles, plan.model.quantiles)
    return Fitted(network, panel.schema, plan, trained.report, remembered, templates, panel.notes)


def template_cutoffs(lengths: np.ndarray, tail: ValidationTail, h: int) -> list[np.ndarray]:
    """Cutoffs whose residuals show how errors go together: in the validation tail, or in the second half of all."""
    last = lengths - h
    cutoffs = spread_cutoffs(tail.ends, last, tail.ends < lengths, TEMPLATES)
    if sum(map(len, cutoffs)) >= FEWEST_TEMPLATES:
        return cutoffs
    return spread_cutoffs(np.maximum(lengths // 2, 1), last, np.ones(len(lengths), dtype=bool), TEMPLATES)


def residual_ranks(
    panel: Panel, cutoffs: Sequence[np.ndarray], quantiles: np.ndarray, levels: Sequence[float]
) -> np.ndarray:
    """Level of each forecast at which the truth fell, [R, G, F] float32; NaN where nothing was observed.

    Args:
        quantiles: forecasts at the cutoffs, [R, G, F, Q].
    """
    h = quantiles.shape[2]
    targets = panel.schema.indices("target")
    truth = [panel.item(i)[cut : cut + h, targets].T for i, cuts in enumerate(cutoffs) for cut in cuts]  # R x [G, F]
    if not truth:
        return np.zeros((0, len(targets), h), dtype=np.float32)
    return probability_levels(quantiles, np.stack(truth), levels).astype(np.float32)


def probability_levels(quantiles: np.ndarray, truth: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Piecewise linear distribution function of each forecast at the truth: [..., Q], [...] -> [...].

    Beyond the outermost levels: halfway to 0 or 1. NaN stays NaN.
    """
    grid = np.asarray(levels)  # [Q]
    below = (quantiles <= truth[..., None]).sum(-1)  # [...]
    left = np.clip(below - 1, 0, len(grid) - 2)  # [...]
    low = np.take_along_axis(quantiles, left[..., None], -1)[..., 0]  # [...]
    high = np.take_along_axis(quantiles, left[..., None] + 1, -1)[..., 0]  # [...]
    share = np.clip((truth - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    inside = grid[left] + share * (grid[left + 1] - grid[left])
    level = np.where(below == 0, grid[0] / 2, np.where(below == len(grid), (1 + grid[-1]) / 2, inside))
    return np.where(np.isnan(truth), np.nan, level)
