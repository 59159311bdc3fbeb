"""What a fit does where its caller left the choice: defaults that depend on the data, and the lines that say so.

I items · P steps in a patch
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hamts.config import PRESETS, QUANTILES, MachineConfig, MemoryConfig, ModelConfig, TrainConfig, with_preset
from hamts.data.panel import Frequency, Panel, Schema
from hamts.data.patches import irregular_unit
from hamts.errors import DataError
from hamts.nn.mixers import layer_makers
from hamts.ops.kernels import KernelError, Kernels
from hamts.options import LARGEST_PATCH, check_machine, check_options, check_sizes, rising_levels, routing_fields
from hamts.training import planned_kernels

__all__ = ["FitOptions", "Plan", "describe", "machine_config", "make_plan", "with_alias"]

# options since format 1.0, by part of a plan, and what was done before they were there
LATER_FIELDS: dict[str, dict[str, Any]] = {
    "machine": {"cuda_graphs": False},
    "model": {
        "event_context": False,
        "entry_bias": -4.0,
        "match_gain": 1.0,
        "state_width": 0,
        "read_reference": 0,
        "rotary_share": 0.5,
        "queries_from_keys": False,
        "gate_start": 0.0,
    },
    "train": {"recall_share": 0.0},
}

HORIZON_WITHOUT_SEASON = 12
PATCH_WITHOUT_SEASON = 8
FAR_SEASONS = 2
SMALLEST_PATCH = 4
# below this many patches a series is cut finer
FEW_PATCHES = 40
HALF_LIFE_SEASONS = 2.0
SLOWER_HALF_LIVES = (1.0, 4.0, 16.0)
FEWEST_CONTEXT_PATCHES, MOST_CONTEXT_PATCHES = 14, 48
BATCH_TOKENS = 4000
# with fewer patches to learn from, steps are shorter
MANY_PATCHES, FEW_DATA_RATE = 2500, 1 / 3
FEWEST_WINDOWS, MOST_WINDOWS = 8, 128
ANSWER_LEVELS = (0.1, 0.5, 0.9)


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What the caller of ``fit`` chose; None where hamts chooses."""

    h: int | None = None
    budget_share: float = 0.10
    budget_bytes: int | None = None
    quantiles: Sequence[float] | None = None
    preset: str = "small"
    router: str | None = None
    routing: Mapping[str, Any] | None = None
    mixer: str | None = None
    patch_steps: int | None = None
    window_patches: int | None = None
    cross_reading: str | None = None
    half_life_steps: float | Sequence[float] | None = None
    val_size: int | float | None = None
    max_steps: int | None = None
    max_time: float | None = None
    batch_windows: int | None = None
    learning_rate: float | None = None
    machine: MachineConfig = MachineConfig()
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every choice of a fit, made; enough to repeat it on other rows.

    Attributes:
        h: steps to forecast.
        quantiles: levels of an answer where none are asked for.
        val_size: steps (int) or share (float) at the end of each item kept for validation; None: chosen per item.
        time_unit: on an irregular clock, the time that counts as one patch.
    """

    h: int
    model: ModelConfig
    memory: MemoryConfig
    train: TrainConfig
    quantiles: tuple[float, ...]
    val_size: int | float | None
    time_unit: float
    machine: MachineConfig = MachineConfig()

    def to_dict(self) -> dict[str, Any]:
        content = asdict(self)
        # what came later is said where it is not as it always was: streams know their model by a hash of this
        for part, fields in LATER_FIELDS.items():
            for name, earlier in fields.items():
                if content[part][name] == earlier:
                    del content[part][name]
        return content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Plan:
        """Rebuild from ``to_dict``, also after a trip through JSON."""
        parts = {
            "model": ModelConfig.from_dict(content["model"]),
            "memory": MemoryConfig.from_dict(content["memory"]),
            "train": TrainConfig(**content["train"]),
            "quantiles": tuple(content["quantiles"]),
        }
        # plans of earlier versions say no more of the machine than these two
        earlier = {name: content[name] for name in ("accelerator", "precision") if name in content}
        parts["machine"] = MachineConfig(**content.get("machine", earlier))
        return cls(**{**{name: value for name, value in content.items() if name not in earlier}, **parts})


def make_plan(panel: Panel, options: FitOptions) -> Plan:
    """Resolve every default on this panel.

    Raises DataError: E-HORIZON, E-QUANTILE, E-OPTION (an option out of its range).
    """
    check_options(options)
    frequency = panel.schema.frequency
    lengths = panel.lengths
    h = int(options.h) if options.h is not None else choose_horizon(frequency, lengths)
    patch_steps = options.patch_steps or choose_patch_steps(frequency, lengths, h)
    check_sizes(h, patch_steps, int(lengths.max()))
    answer = ANSWER_LEVELS if options.quantiles is None else rising_levels(options.quantiles)
    model = ModelConfig(
        patch_steps=patch_steps,
        half_life_steps=_half_lives(options.half_life_steps, frequency, patch_steps),
        quantiles=tuple(sorted({*QUANTILES, *answer})),
    )
    context = choose_context_patches(frequency, lengths, h, patch_steps)
    tokens = len(panel.schema.channels) * (context + -(-h // patch_steps))
    windows = int(np.clip(BATCH_TOKENS // tokens, FEWEST_WINDOWS, MOST_WINDOWS))
    patches = int((lengths // patch_steps).sum())
    train = TrainConfig(
        context_patches=context,
        batch_windows=windows,
        learning_rate=TrainConfig.learning_rate * (1.0 if patches >= MANY_PATCHES else FEW_DATA_RATE),
        max_time_s=options.max_time,
        seed=options.seed,
    )
    try:
        model, train = with_preset(options.preset, model, train)
        shape = {name: getattr(options, name) for name in ("router", "mixer", "window_patches", "cross_reading")}
        further = routing_fields(options.routing or {})
        model = replace(model, **{**further["model"], **_given(**shape)})
        train = replace(
            train,
            **further["train"],
            **_given(
                max_steps=options.max_steps, batch_windows=options.batch_windows, learning_rate=options.learning_rate
            ),
        )
        given = _given(budget_share=options.budget_share, budget_bytes=options.budget_bytes)
        memory = MemoryConfig.from_dict({**further["memory"], **given})
        # a rival that does not fit its bytes is refused before anything is built
        layer_makers(model, channels=len(panel.schema.channels), budget_bytes=memory.budget_bytes)
    except ValueError as error:
        raise DataError("E-OPTION", str(error), fix="Change that argument of fit, or leave it out.") from error
    check_kernel(model, options.machine)
    return Plan(
        h=h,
        model=model,
        memory=memory,
        train=train,
        quantiles=answer,
        val_size=options.val_size,
        time_unit=irregular_unit(panel) if frequency.kind == "irregular" else 1.0,
        machine=options.machine,
    )


def machine_config(
    accelerator: str, precision: str, kernel: str, strategy: str, devices: int, rest: Mapping[str, Any]
) -> MachineConfig:
    """On what to fit. Raises DataError E-OPTION."""
    check_machine(accelerator, rest)
    named: dict[str, Any] = {"accelerator": accelerator, "precision": precision, "kernel": kernel}
    try:
        return MachineConfig(**named, strategy=strategy, devices=devices, **rest)
    except (TypeError, ValueError) as error:
        raise DataError("E-OPTION", str(error), fix="Change that argument of fit, or leave it out.") from error


def check_kernel(model: ModelConfig, machine: MachineConfig) -> Kernels:
    """What will run the layers. Raises DataError E-KERNEL: what was asked for cannot run here."""
    try:
        return planned_kernels(model, machine)
    except KernelError as error:
        raise DataError("E-KERNEL", str(error), fix="kernel='auto' takes what can run.") from error


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def with_alias(name: str, value: Any, alias: str, other: Any) -> Any:
    """The one of two spellings of an argument that was given. Raises DataError E-ALIAS where both were."""
    if value is not None and other is not None:
        raise DataError("E-ALIAS", f"{alias} is another word for {name}. Got both.", fix=f"Pass {name}= alone.")
    return other if value is None else value


# --- defaults that depend on the data


def choose_horizon(frequency: Frequency, lengths: np.ndarray) -> int:
    """One season; where there is none, 12 steps or a quarter of the typical item."""
    if frequency.season_steps > 1:
        return frequency.season_steps
    return max(1, min(HORIZON_WITHOUT_SEASON, int(np.median(lengths)) // 4))


def choose_patch_steps(frequency: Frequency, lengths: np.ndarray, h: int) -> int:
    """About half a season, or a whole one for far horizons; a divisor of it in 4..24; finer for short items.

    Irregular rows are read one by one.
    """
    if frequency.kind == "irregular":
        return 1
    season = frequency.season_steps
    # a far horizon is better told in whole seasons than in many halves
    near = season / 2 if h < FAR_SEASONS * season else season
    wanted = near if season > 1 else PATCH_WITHOUT_SEASON
    whole = season if season > 1 else PATCH_WITHOUT_SEASON
    divisors = [p for p in range(1, LARGEST_PATCH + 1) if whole % p == 0]
    usual = [p for p in divisors if p >= SMALLEST_PATCH] or divisors[-1:]
    # the horizon, rounded up to a patch that fits the season
    most = next((p for p in usual if p >= h), usual[-1])
    best = min((p for p in usual if p <= most), key=lambda p: (abs(p - wanted), p))
    typical = float(np.median(lengths))
    return next((p for p in reversed(divisors) if p <= best and typical / p >= FEW_PATCHES), divisors[0])


def choose_context_patches(frequency: Frequency, lengths: np.ndarray, h: int, patch_steps: int) -> int:
    """Patches of a training window: two seasons or two horizons, within 14..48 and three quarters of a typical item."""
    wanted = -(-max(2 * frequency.season_steps, 2 * h) // patch_steps)
    patches = int(np.clip(wanted, FEWEST_CONTEXT_PATCHES, MOST_CONTEXT_PATCHES))
    return max(2, min(patches, int(0.75 * np.median(lengths)) // patch_steps))


def _half_lives(given: float | Sequence[float] | None, frequency: Frequency, patch_steps: int) -> tuple[float, ...]:
    if given is not None:
        lives = tuple(float(x) for x in given) if isinstance(given, Sequence) else (float(given),)
        return lives if len(lives) > 1 else tuple(lives[0] * slower for slower in SLOWER_HALF_LIVES)
    first = max(HALF_LIFE_SEASONS * frequency.season_steps, 4.0 * patch_steps)
    return tuple(first * slower for slower in SLOWER_HALF_LIVES)


# --- saying so


def describe(schema: Schema, plan: Plan, options: FitOptions, *, validation: str) -> list[str]:
    """One line for each role and each default, with the argument that changes it."""
    frequency, dialect = schema.frequency, schema.dialect
    season = frequency.season_steps
    at = f"at {frequency.alias!r}" if frequency.alias else "of rows"
    lines = [f"  {name} = {names} (change with {name}=)" for name, names in _roles(schema).items()]
    if dialect.id_column:
        lines.append(f"  id_col = {dialect.id_column!r}, time_col = {dialect.time_column!r} (change with these)")
    clock = repr(frequency.alias) if frequency.kind != "irregular" else "none, rows are taken as they are"
    note = f"{season} steps a season" if season > 1 else "no season known"
    why_h = f"one season of {season} steps {at}" if season > 1 else "no season is known"
    why_patch = "rows one by one" if frequency.kind == "irregular" else "steps read as one token"
    sizes = f"{plan.model.layers} layers of width {plan.model.width}; {', '.join(PRESETS)}"
    lives = ", ".join(f"{life:g}" for life in plan.model.half_life_steps)
    kernels = check_kernel(plan.model, plan.machine)
    named = {
        "freq": (clock, note, None),
        "h": (plan.h, why_h, options.h),
        "patch_steps": (plan.model.patch_steps, why_patch, options.patch_steps),
        "half_life_steps": (f"({lives})", "of the running mean and scale", options.half_life_steps),
        "val_size": (validation, "rows kept from training", options.val_size),
        "budget_share": (f"{plan.memory.budget_share:g}", "of the tokens kept exactly", None),
        "preset": (repr(options.preset), sizes, None),
        "kernel": (repr(kernels.name), kernels.why, None),
    }
    for name, (value, why, given) in named.items():
        reason = why if given is None else "as asked"
        lines.append(f"  {name} = {value} ({reason}; change with {name}=)")
    return lines


def _roles(schema: Schema) -> dict[str, list[str]]:
    arguments = {
        "target": "target",
        "past": "past_cols",
        "future": "futr_cols",
        "event": "event_cols",
        "action": "action_cols",
    }
    roles: dict[str, list[str]] = {}
    for channel in schema.channels:
        roles.setdefault("events" if channel.from_log else arguments[channel.role], []).append(channel.name)
    if schema.static:
        roles["static_df"] = [column.name for column in schema.static]
    return roles
