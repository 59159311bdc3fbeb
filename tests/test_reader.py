"""What the network makes of raw chunks: what is heard, tagged, known ahead, and which channel may read which.

B items · C channels · N patches · P steps in a patch
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from networks import (
    ALARM,
    CHANNELS,
    FORECAST,
    HORIZON,
    LOAD,
    MODE,
    PRICE,
    VALVE,
    WIND,
    make_config,
    make_network,
    make_panel,
    make_store,
)

from hamts.nn.mixers import layer_makers


def test_what_is_heard_and_what_a_tag_asks_for() -> None:
    network, panel = make_network(calibrate=False), make_panel((12,), seed=14)
    nan = np.nan
    values = np.tile([1.0, 2.0, 3.0, 1.0, 4.0, 0.0, 5.0], (12, 1))
    values[0:2, LOAD], values[3:6, PRICE], values[6:9, LOAD] = nan, nan, nan
    values[4, ALARM], values[7:, VALVE] = 2.0, 6.0
    values[6:8, VALVE] = [nan, 6.0]
    store = make_store(replace(panel, values=values))
    chunk = store.window(torch.tensor([0]), torch.tensor([0]), 4)
    stats, _ = network.scaler.advance(chunk.values, chunk.observed, network.empty_memory(1).scale)
    tokens = network.tokens(chunk, stats)
    # a share for what was observed in part, all of a tagged patch, of events the tagged patches alone
    assert torch.allclose(tokens.heard[0, LOAD], torch.tensor([1 / 3, 1, 0, 1]).double())
    assert tokens.heard[0, PRICE].tolist() == [1, 0, 1, 1]
    assert tokens.heard[0, ALARM].tolist() == [0, 1, 0, 0]
    assert tokens.heard[0, VALVE].tolist() == [1, 1, 1, 1]
    assert tokens.routable[0, LOAD].tolist() == [False, True, False, True]
    assert tokens.routable[0, VALVE].all() and not tokens.routable[0, ALARM].any()
    # the tagged channel itself, and the targets that were observed at that moment
    assert tokens.must_keep[0].nonzero().tolist() == [[LOAD, 1], [PRICE, 2], [ALARM, 1], [VALVE, 2]]


def test_tokens_of_a_horizon_carry_what_is_known_of_the_next_patch() -> None:
    network, panel = make_network(calibrate=False), make_panel(seed=9)
    rows = panel.offsets[0] + 40 + np.arange(12)
    panel.values[rows, FORECAST] = np.arange(12.0)
    panel.values[rows[4], FORECAST] = np.nan
    store = make_store(panel)
    chunk = store.horizon(torch.tensor([0]), torch.tensor([41]), HORIZON)
    stats, _ = network.scaler.advance(chunk.values, chunk.observed, network.empty_memory(1).scale)
    tokens = network.tokens(chunk, stats)
    # steps 41 .. 47 of the patches 39 .. 41, 42 .. 44, 45 .. 47
    there = [[[True, True, False][i] if n == 0 else n == 1 for i in range(3)] for n in range(3)]
    assert tokens.ahead_observed[0, FORECAST].tolist() == there
    for n, raw in ((0, [2.0, 3.0, None]), (1, [5.0, 6.0, 7.0])):
        mean, scale = stats.mean[0, FORECAST, n, 0], stats.scale[0, FORECAST, n, 0]
        wanted = [0.0 if value is None else float((value - mean) / scale) for value in raw]
        assert tokens.ahead_values[0, FORECAST, n].tolist() == pytest.approx(wanted)
    assert not tokens.ahead_values[0, FORECAST, 2].any()
    unknown = [LOAD, PRICE, WIND, MODE, ALARM]
    assert not tokens.ahead_observed[0, unknown].any() and not tokens.ahead_values[0, unknown].any()
    assert tokens.ahead_observed[0, VALVE, :2].any()


@torch.no_grad()
def test_every_feature_of_a_token_reaches_the_network() -> None:
    network, store = make_network(calibrate=False), make_store(make_panel(seed=9))
    chunk = store.horizon(torch.arange(3), store.lengths - 12, HORIZON)
    stats, _ = network.scaler.advance(chunk.values, chunk.observed, network.empty_memory(3).scale)
    tokens = network.tokens(chunk, stats)
    embedding = network.backbone.embedding
    wanted = embedding(tokens)
    names = (
        "values", "observed", "tags", "event_offset", "ahead_values", "ahead_observed", "calendar", "level",
        "elapsed", "static_values", "static_codes",
    )  # fmt: skip
    for name in names:
        tensor = getattr(tokens, name)
        changed = (
            ~tensor if tensor.dtype == torch.bool else (tensor + 1) % 3 if name == "static_codes" else tensor + 0.5
        )
        got = embedding(replace(tokens, **{name: changed}))
        items = (got - wanted).abs().amax((1, 2, 3))
        assert (items > 1e-3).all(), name
    # the categories of a channel, by their codes
    codes = tokens.values.clone()
    codes[:, MODE] = (codes[:, MODE] + 1) % 3
    got = embedding(replace(tokens, values=codes))
    apart = (got - wanted).abs().amax((0, 2, 3)) > 1e-6
    assert apart.tolist() == [channel == MODE for channel in range(len(CHANNELS))]


def test_channels_read_covariates_always_and_other_targets_where_allowed() -> None:
    network = make_network(calibrate=False)
    allowed, apart = network.readable(torch.tensor([True, False]))
    assert allowed.all()
    wanted = torch.ones(7, 7, dtype=torch.bool)
    wanted[:, [LOAD, PRICE]] = False
    wanted[LOAD, LOAD] = wanted[PRICE, PRICE] = True
    assert torch.equal(apart, wanted)
    alone = make_network(make_config(cross_reading="never"), calibrate=False).readable(torch.tensor([True]))
    assert torch.equal(alone[0], torch.eye(7, dtype=torch.bool))


@pytest.mark.parametrize("known", [True, False])
def test_tokens_of_a_target_know_the_events_of_their_patch_from_the_start_where_asked(known: bool) -> None:
    network = make_network(make_config(event_context=known), calibrate=False)
    panel = make_panel((12,), seed=14)
    panel.values[:, ALARM] = 0.0
    panel.values[4, ALARM] = 2.0
    other = replace(panel, values=panel.values.copy())
    other.values[4, ALARM] = 3.0
    embedded = []
    for one in (panel, other):
        chunk = make_store(one).window(torch.tensor([0]), torch.tensor([0]), 4)
        stats, _ = network.scaler.advance(chunk.values, chunk.observed, network.empty_memory(1).scale)
        embedded.append(network.backbone.embedding(network.tokens(chunk, stats)))  # [1, C, 4, D]
    apart = (embedded[0] - embedded[1]).abs().amax(-1)[0] > 0  # [C, 4]
    assert apart[ALARM].tolist() == [False, True, False, False]
    assert apart[[LOAD, PRICE, WIND]].tolist() == [[False, known, False, False]] * 3
    # the one weight more is there only where it is used
    assert (network.backbone.embedding.from_moment is not None) == known


@pytest.mark.parametrize("known", [True, False])
def test_an_event_is_read_alike_while_its_patch_goes_on_where_tokens_know_events(known: bool) -> None:
    network = make_network(make_config(event_context=known), calibrate=False)
    panel = make_panel((12,), seed=14)
    panel.values[:, ALARM] = 0.0
    panel.values[4, ALARM] = 2.0
    store, embedded = make_store(panel), []
    item, cut = torch.tensor([0]), torch.tensor([5])
    for chunk in (store.window(item, torch.tensor([1]), 1), store.horizon(item, cut, 2, torch.tensor([False]))):
        assert chunk.tags[0, ALARM, 0].sum() == 1
        stats, _ = network.scaler.advance(chunk.values, chunk.observed, network.empty_memory(1).scale)
        embedded.append(network.backbone.embedding(network.tokens(chunk, stats))[0, ALARM, 0])  # [D]
    assert torch.allclose(*embedded) == known


@pytest.mark.parametrize("mixer", ["ham", "attention"])
def test_the_read_starts_as_open_and_as_sharp_as_asked(mixer: str) -> None:
    config = make_config(entry_bias=-1.0, match_gain=2.0, mixer=mixer)
    layer: Any = layer_makers(config, channels=3, budget_bytes=1 << 20)[0]()
    exact = layer if mixer == "ham" else layer.exact
    assert (exact.scratch_bias == -1.0).all()
    assert (exact.query_norm.gain == 2.0).all() and (exact.key_norm.gain == 1.0).all()
