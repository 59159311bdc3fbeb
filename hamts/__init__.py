"""hamts: time-series forecasting with a memory that its user can see and set.

Every name below is imported on first use, so that ``import hamts`` loads neither torch nor pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hamts.config import ModelConfig
    from hamts.data.catalog import list_datasets, load_dataset
    from hamts.data.frame import split
    from hamts.errors import DataError, DataWarning, ModelFolderError, StateFolderError
    from hamts.forecast import Forecast
    from hamts.forecaster import HAMForecaster, fit, load
    from hamts.stream import Stream

__version__ = "0.1.0"

__all__ = [
    "DataError",
    "DataWarning",
    "Forecast",
    "HAMForecaster",
    "ModelConfig",
    "ModelFolderError",
    "StateFolderError",
    "Stream",
    "fit",
    "list_datasets",
    "load",
    "load_dataset",
    "split",
]

_HOME = {
    "DataError": "hamts.errors",
    "DataWarning": "hamts.errors",
    "Forecast": "hamts.forecast",
    "HAMForecaster": "hamts.forecaster",
    "ModelConfig": "hamts.config",
    "ModelFolderError": "hamts.errors",
    "StateFolderError": "hamts.errors",
    "Stream": "hamts.stream",
    "fit": "hamts.forecaster",
    "list_datasets": "hamts.data.catalog",
    "load": "hamts.forecaster",
    "load_dataset": "hamts.data.catalog",
    "split": "hamts.data.frame",
}


def __getattr__(name: str) -> Any:
    if name == "probes":
        # a package of its own beside this one, reached through it
        return import_module("probes")
    if name not in _HOME:
        raise AttributeError(f"module 'hamts' has no attribute {name!r}. Available: {', '.join(__all__)}.")
    value = getattr(import_module(_HOME[name]), name)
    # the next access finds it without coming here
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
