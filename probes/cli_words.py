"""How what is written behind ``hamts probes`` is read, and refused."""

from __future__ import annotations

from typing import Any

from hamts.errors import DataError

__all__ = ["chosen", "numbers", "of_training", "usage", "words"]


def words(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def numbers(text: str | None) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        ValueError: one of them is none.
    """
    try:
        return tuple(float(part) for part in words(text))
    except ValueError as error:
        raise ValueError(f"Numbers between commas are needed, such as 0.5,1,2. Got {text!r}.") from error


def chosen(names: list[str] | None, everything: bool) -> tuple[str, ...]:
    """The probes asked for; all of them with --all."""
    from probes.registry import get_probe, list_probes

    if everything:
        return tuple(list_probes())
    if not names:
        raise DataError("E-OPTION", "No probe was named.", fix="Name one, such as der, or pass --all.")
    with usage():
        for name in names:
            get_probe(name)
    return tuple(names)


class usage:
    """Configuration errors as panels, like every other bad input."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError) and not isinstance(error, DataError):
            raise DataError("E-OPTION", str(error)) from error


def of_training(tier: str, preset: str, **given: Any) -> dict[str, Any]:
    """What a run asks of trainings: in tier 1 the preset's own where nothing is given, elsewhere what was given."""
    from probes.contract import PRESETS
    from probes.runner_plan import (
        DEFAULT_BUDGETS,
        DEFAULT_MODELS,
        DEFAULT_ROUTERS,
        SMOKE_BUDGETS,
        SMOKE_MODELS,
        SMOKE_ROUTERS,
        SMOKE_SEEDS,
        STATE_WIDTH,
    )

    smoke = preset == "smoke"
    usual = {
        "models": SMOKE_MODELS if smoke else DEFAULT_MODELS, "routers": SMOKE_ROUTERS if smoke else DEFAULT_ROUTERS,
        "budgets": SMOKE_BUDGETS if smoke else DEFAULT_BUDGETS,
        "seeds": SMOKE_SEEDS if smoke else PRESETS[preset].train_seeds,
    }  # fmt: skip
    if tier == "T1":
        return given | {name: given[name] or value for name, value in usual.items()}
    # what stands at its default was not asked for
    defaults = {"readout": "query", "state_width": STATE_WIDTH}
    return {name: value for name, value in given.items() if value and value != defaults.get(name)}
