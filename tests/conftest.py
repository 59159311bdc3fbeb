"""What all tests share: one thread each, seeded randomness, and the folder of local data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

try:
    import hypothesis
except ImportError:
    # tests of laws need it; those that are run on a machine with a device do not
    hypothesis = None  # type: ignore[assignment]

# two workers share two cores; sums are also the same from run to run
torch.set_num_threads(1)

if hypothesis is not None:
    hypothesis.settings.register_profile("hamts", derandomize=True, deadline=None, max_examples=50, print_blob=True)
    hypothesis.settings.load_profile("hamts")

SEED = 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_device = pytest.mark.skip(reason="needs a CUDA device")
    no_data = pytest.mark.skip(reason="needs local data: set HAMTS_DATA to its folder")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_device)
        if item.get_closest_marker("data") and not os.environ.get("HAMTS_DATA"):
            item.add_marker(no_data)


@pytest.fixture(autouse=True)
def _drawn_alike() -> None:
    """The weights of layers that a test makes are the same in every run."""
    torch.manual_seed(SEED)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(SEED)


@pytest.fixture
def hamts_data() -> Path:
    """The folder of local data sets; without it the test is skipped."""
    folder = os.environ.get("HAMTS_DATA")
    if not folder:
        pytest.skip("needs local data: set HAMTS_DATA to its folder")
    if not Path(folder).is_dir():
        pytest.fail(f"HAMTS_DATA must name a folder. Got {folder!r}.")
    return Path(folder)


# --- of the tests of a fitted forecaster, whose files share two fits


@pytest.fixture(scope="session")
def sine() -> Any:
    from fitted import fit_sine

    return fit_sine()


@pytest.fixture(scope="session")
def rich() -> Any:
    from fitted import fit_rich

    return fit_rich()


@pytest.fixture(scope="module")
def rich_data() -> dict[str, Any]:
    from model_frames import rich_frames

    return rich_frames()
