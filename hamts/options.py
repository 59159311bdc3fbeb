"""What a caller may ask of a fit: numbers that are numbers, in their ranges, before anything is built of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hamts.config import MachineConfig
from hamts.data.future import check_horizon
from hamts.errors import DataError

if TYPE_CHECKING:
    from hamts.resolve import FitOptions

__all__ = [
    "LARGEST_PATCH", "bad_option", "check_machine", "check_options", "check_sizes", "is_number", "rising_levels",
    "routing_fields",
]  # fmt: skip

LARGEST_PATCH = 24
MOST_PATCHES_UNSEEN = 512  # of a horizon beyond all history; a fit of 1,000 took 6 GB
# of lightning's accelerators those that hamts was made for; mps has no float64, in which scales are kept
ACCELERATORS = ("auto", "cpu", "cuda", "gpu")
# what routing= of fit may set; what has an argument of its own is not here
ROUTING_FIELDS = {
    "model": ("head_reduction", "learned_features", "decision", "allocation", "write_clip", "resolution"),
    "memory": (
        "must_keep_share", "explore_share", "threshold", "eviction", "tag_types", "tag_half_life_patches",
        "budget_flops", "budget_ms",
    ),
    "train": ("auxiliary_weight", "auxiliary_target", "inner_weight", "training_flops"),
}  # fmt: skip
ROUTING_NUMBERS = (
    "write_clip", "must_keep_share", "explore_share", "tag_half_life_patches", "budget_flops", "budget_ms",
    "auxiliary_weight", "inner_weight", "training_flops",
)  # fmt: skip
# routing fields of which None says that there is none
MAY_BE_NONE = ("tag_half_life_patches", "budget_flops", "budget_ms", "training_flops")


def check_machine(accelerator: str, rest: Mapping[str, Any]) -> None:
    """Raises DataError E-OPTION: an accelerator that cannot be had here, or a ``machine`` that is none."""
    if not isinstance(rest, Mapping):
        raise bad_option("machine", "a mapping of names to values", rest)
    known = set(MachineConfig.__dataclass_fields__) - {"accelerator", "precision", "kernel", "strategy", "devices"}
    unknown = [name for name in rest if name not in known]
    if unknown:
        own = unknown[0] in MachineConfig.__dataclass_fields__
        raise DataError(
            "E-OPTION",
            f"Unknown field {unknown[0]!r} of machine. Available: {sorted(known)}.",
            fix=f"{unknown[0]} is an argument of fit itself." if own else "Change that field, or leave it out.",
        )
    if accelerator not in ACCELERATORS:
        raise bad_option("accelerator", f"one of {list(ACCELERATORS)}", accelerator)
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise DataError(
            "E-OPTION",
            f"accelerator={accelerator!r} needs a CUDA device that torch {torch.__version__} can use. There is none.",
            fix="accelerator='auto' takes what there is; hamts doctor says what that is.",
        )


def check_options(options: FitOptions) -> None:
    """Raises DataError: E-HORIZON, or E-OPTION for a number that is none or out of its range."""
    if options.h is not None:
        check_horizon(options.h)
    rules = [
        (("patch_steps", "window_patches", "max_steps", "batch_windows"), _counts, "a whole number, at least 1"),
        (("seed", "budget_bytes"), _whole, "a whole number"),
        (("seed",), _fits_64_bits, "a number of 64 bits"),
        (("max_time", "learning_rate", "budget_share"), is_number, "a number"),
        (("max_time", "learning_rate"), _positive, "above 0, and finite"),
        (("half_life_steps",), _half_lives, "above 0, and finite: a number of steps, or several"),
        (("val_size",), _part_of_an_item, "a whole number of steps, or a share from 0 up to below 1"),
        (("router",), _is_text, "the name of a router, or several joined by '+'"),
        (("routing",), _is_mapping, "a mapping of names to values"),
    ]
    for names, holds, rule in rules:
        for name in names:
            value = getattr(options, name)
            if value is not None and not holds(value):
                raise bad_option(name, rule, value)


def _counts(value: Any) -> bool:
    return _whole(value) and value >= 1


def _fits_64_bits(value: int) -> bool:
    return -(2**63) <= value < 2**63


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _half_lives(value: Any) -> bool:
    each = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return bool(each) and all(is_number(one) and _positive(one) for one in each)


def _part_of_an_item(value: Any) -> bool:
    return is_number(value) and 0 <= value < (math.inf if _whole(value) else 1)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def check_sizes(h: int, patch_steps: int, longest: int) -> None:
    """Refuse what would fill the memory of the machine with steps that no item has."""
    if patch_steps > max(longest, LARGEST_PATCH):
        raise bad_option("patch_steps", f"at most the longest item, {longest} steps", patch_steps)
    patches = -(-h // patch_steps)
    if h > longest and patches > MOST_PATCHES_UNSEEN:
        raise DataError(
            "E-HORIZON",
            f"A horizon of more than {MOST_PATCHES_UNSEEN} patches must not be longer than the longest item."
            f" Got h={h:,}, {patches:,} patches of {patch_steps} steps; the longest item has {longest:,} steps.",
            fix=f"Ask for at most h={max(longest, MOST_PATCHES_UNSEEN * patch_steps)}, or pass a longer history.",
        )


def bad_option(name: str, rule: str, value: Any) -> DataError:
    return DataError("E-OPTION", f"{name} must be {rule}. Got {value!r}.", fix=f"Change {name}=, or leave it out.")


def routing_fields(routing: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Fields of ``fit(routing=)`` by the configuration they belong to.

    Raises ValueError for an unknown one, or a number that is none.
    """
    homes = {name: home for home, names in ROUTING_FIELDS.items() for name in names}
    unknown = [name for name in routing if name not in homes]
    if unknown:
        raise ValueError(f"Unknown field {unknown[0]!r} of routing. Available: {sorted(homes)}.")
    for name in ROUTING_NUMBERS:
        value = routing.get(name, 0.0)
        if value is None and name in MAY_BE_NONE:
            continue
        if not is_number(value) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of 0 or more, and finite. Got {value!r}.")
    fields = {
        home: {name: routing[name] for name in names if name in routing} for home, names in ROUTING_FIELDS.items()
    }
    if "training_flops" in fields["train"]:
        fields["train"]["budget_flops"] = fields["train"].pop("training_flops")
    return fields


def rising_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Quantile levels, sorted. Raises DataError E-QUANTILE unless they are distinct and in (0, 1)."""
    try:
        rising = tuple(sorted(float(level) for level in levels))
    except (TypeError, ValueError) as error:
        raise DataError(
            "E-QUANTILE", f"quantiles must be a list of numbers. Got {levels!r}.", fix="quantiles=[0.1, 0.5, 0.9], say."
        ) from error
    if not rising or not all(0 < level < 1 for level in rising) or len(set(rising)) < len(rising):
        raise DataError(
            "E-QUANTILE",
            f"quantiles must be distinct and lie between 0 and 1. Got {list(levels)}.",
            fix="quantiles=[0.1, 0.5, 0.9]; percent are for level=[80].",
        )
    return rising
