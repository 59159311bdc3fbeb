"""What tests of rivals share: a small network of each, with memories that fill up."""

from __future__ import annotations

import functools

from networks import (
    make_config,
    make_network,
    make_panel,
    make_spec,
    make_store,
)

from hamts.config import MIXERS, MemoryConfig, ModelConfig
from hamts.reader import HAMNetwork

RIVALS = tuple(name for name in MIXERS if name != "ham")

SAME = 1e-10

# small enough for every bounded memory to be full before the longest item ends
BUDGETS = {"log_linear": 60_000, "recurrent_wide": 20_000, "neighbours": 2_000, "pooled": 40_000}

SMALL_BUDGET = 12_000


def config_of(mixer: str) -> ModelConfig:
    return make_config(mixer=mixer, pool_patches=3, block_patches=3, top_blocks=1, neighbours=2)


@functools.cache
def network_of(mixer: str) -> HAMNetwork:
    """Perturbed, in float64, with memories that fill up."""
    panel = make_panel(seed=100)
    roomy = make_network(config_of(mixer), calibrate=False)
    memory = MemoryConfig(budget_bytes=BUDGETS.get(mixer, SMALL_BUDGET))
    small = HAMNetwork(config_of(mixer), memory, make_spec(panel, make_store(panel))).double()
    same = {name: value for name, value in roomy.state_dict().items() if small.state_dict()[name].shape == value.shape}
    small.load_state_dict({**small.state_dict(), **same})
    small.unit = roomy.unit
    return small.eval()


@functools.cache
def panel_and_store():
    panel = make_panel()
    return panel, make_store(panel)
