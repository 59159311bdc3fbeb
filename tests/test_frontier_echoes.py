"""Echoes of the frontier's benchmark: what is written where, and how long the streams of a fit are."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hamts.config import MemoryConfig, ModelConfig, TrainConfig
from hamts.data.frame import to_panel
from hamts.data.patches import build_store
from hamts.fitting import panel_spec
from hamts.reader import HAMNetwork
from hamts.windows import StreamWindows, patches_since, scale_history


@pytest.mark.parametrize("name", ["epf", "epf-old", "flights", "beijing"])
def test_an_echo_is_the_shape_that_was_stored_at_its_age(name: str) -> None:
    from benchmarks.frontier_sets import EVENT, NAMED_STEPS, SETS, with_echoes

    spec = replace(SETS[name], target=("y",), futr=(), copies=2)
    P, T = spec.patch_steps, 24 * 1200
    flat = pd.DataFrame({"unique_id": "a", "ds": pd.date_range("2020-01-01", periods=T, freq="h")})
    flat["y"] = np.random.default_rng(0).normal(size=T)
    carrier = with_echoes(flat, spec, freq="h")
    plain = with_echoes(flat, replace(spec, amplitude=0.0), freq="h")
    np.testing.assert_array_equal(plain.frame["y"].to_numpy(), np.tile(flat["y"].to_numpy(), 2))
    shapes, places = {}, []
    for item, own in carrier.frame.groupby("unique_id"):
        added, column = own["y"].to_numpy() - flat["y"].to_numpy(), own[EVENT].to_numpy()
        rows = np.flatnonzero([isinstance(letter, str) for letter in column])
        # two letters in the first two steps of a patch
        starts = rows[::NAMED_STEPS]
        np.testing.assert_array_equal(rows.reshape(-1, NAMED_STEPS), starts[:, None] + np.arange(NAMED_STEPS))
        assert (starts % P == 0).all()
        places.append(starts.tolist())
        names: dict[str, list[int]] = {}
        for start in starts:
            names.setdefault("".join(column[start : start + NAMED_STEPS]), []).append(int(start))
        listed = carrier.events[carrier.events["unique_id"] == item]
        ages = dict(zip(listed["asked"], listed["age"], strict=True))
        assert 0.15 < len(starts) / (T // P) < 0.25
        # a name is reported once, or twice and then the second time is asked
        assert sorted(ages) == sorted(twice[1] + NAMED_STEPS - 1 for twice in names.values() if len(twice) == 2)
        assert max(map(len, names.values())) == 2
        for stored, *asked in names.values():
            one = added[stored + NAMED_STEPS : stored + P]
            assert len(np.unique(one.round(9))) == min(5, P - NAMED_STEPS)
            shapes[item, stored] = one
            for again in asked:
                np.testing.assert_allclose(added[again + NAMED_STEPS : again + P], one, atol=1e-12)
                days = dict(spec.ages)[ages[again + NAMED_STEPS - 1]] * spec.day
                # later by some patches where another event has the place
                assert 0.8 * days - P <= again - stored <= 1.2 * days + 20 * P
        changed = np.zeros(T, dtype=bool)
        for start in starts:
            changed[start + NAMED_STEPS : start + P] = True
        np.testing.assert_array_equal(added != 0, changed)
    # at the same times, but no two shapes are alike
    assert places[0] == places[1]
    together = np.stack(list(shapes.values()))
    assert len(np.unique(together.round(9), axis=0)) == len(together)
    assert set(ages.values()) == {age for age, _ in spec.ages}


def test_what_follows_an_event_is_hidden_where_the_stream_has_read_it_before() -> None:
    from benchmarks.frontier_sets import EVENT, NAMED_STEPS, SMOKE, smoke_carrier

    carrier = smoke_carrier()
    panel = to_panel(carrier.frame, **carrier.roles)
    P = SMOKE.patch_steps
    store = build_store(panel, patch_steps=P, extra_steps=P)
    since = patches_since(store)
    for item, (_, own) in enumerate(carrier.frame.groupby("unique_id", sort=False)):
        column = own[EVENT].to_numpy()
        last: dict[str, int] = {}
        for patch in range(len(own) // P):
            letters = column[patch * P : patch * P + NAMED_STEPS]
            row = int(since[int(store.first_row[item]) + patch])
            if not isinstance(letters[0], str) or "".join(letters) not in last:
                assert row > 10**9
            else:
                assert row == patch - last["".join(letters)]
            if isinstance(letters[0], str):
                last["".join(letters)] = patch
    config = TrainConfig(batch_windows=4, context_patches=40, origins=1, span_share=0.0, recall_share=1.0,
                         prefix_patches=1, reset_share=1.0)  # fmt: skip
    spec = panel_spec(panel)
    network = HAMNetwork(ModelConfig(width=32, layers=1, heads=2, patch_steps=P), MemoryConfig(), spec)
    windows = StreamWindows(store, scale_history(network, store), ends=panel.lengths, horizon=P, config=config,
                            cross_chance=1.0)  # fmt: skip
    seen, event = 0, panel.schema.indices("event")[0]
    for _ in range(4):
        batch = windows.draw()
        context, _ = batch.parts[0]
        assert context.horizon is not None
        for stream in range(4):
            item, first = int(batch.items[stream]), int(batch.first[stream])
            for n in range(40):
                row = int(store.first_row[item]) + first + n
                inside = 0 <= first + n < int(store.row_count[item])
                asked = inside and int(since[row]) <= batch.prefix + n
                expected = torch.zeros(P, dtype=torch.bool)
                expected[NAMED_STEPS:] = asked
                assert torch.equal(context.horizon[stream, n], expected)
                assert not (context.observed[stream, 0, n] & expected).any()
                # as in a forecast, nothing says that no other event follows
                assert not (context.observed[stream, event, n] & expected).any()
                seen += int(asked)
    assert seen > 10


def test_streams_become_longer_after_so_many_batches() -> None:
    from benchmarks.frontier_echoes import fresh_echoes
    from benchmarks.frontier_sets import SMOKE, smoke_carrier

    carrier = smoke_carrier()
    rows = carrier.rows - carrier.test_rows
    panel = to_panel(carrier.frame.groupby("unique_id", sort=False).head(rows), **carrier.roles)
    store = build_store(panel, patch_steps=SMOKE.patch_steps, extra_steps=SMOKE.h)
    network = HAMNetwork(ModelConfig(width=32, layers=1, heads=2, patch_steps=8), MemoryConfig(), panel_spec(panel))
    config = TrainConfig(
        batch_windows=4, context_patches=8, origins=1, prefix_patches=1, recall_share=0.7, reset_share=1.0
    )
    windows = StreamWindows(
        store, scale_history(network, store), ends=panel.lengths, horizon=8, config=config, cross_chance=1.0,
        augment=fresh_echoes(carrier, SMOKE, panel, 0, lengthen=(5, 40)),
    )  # fmt: skip
    prefixes = [windows.draw().prefix for _ in range(60)]
    # a column of events says where nothing happens, as in the rows that are judged
    event = panel.schema.indices("event")[0]
    told, plain = windows.store.values[:, :, event], store.values[:, :, event]
    assert not told[~plain.isnan()].isnan().any()
    assert ((told == 0) | windows.store.tags[:, :, event])[~plain.isnan()].all()
    assert max(prefixes[:5]) <= 1
    assert 8 < max(prefixes[5:]) <= 40
    # where a set says so, of lengths that it names, in fewer streams
    spec = replace(SMOKE, lengths=(3, 30), streams=2, warm=True)
    windows.augment = fresh_echoes(carrier, spec, panel, 0, lengthen=(5, 40))
    drawn = [windows.draw() for _ in range(25)]
    assert [len(batch.items) for batch in drawn] == [4] * 5 + [2] * 20
    assert {batch.prefix for batch in drawn[5:]} == {3, 30}
    # and everything is kept at first
    assert all((batch.share == 1).all() for batch in drawn[:5])
    assert not all((batch.share == 1).all() for batch in drawn[5:])
    assert all(part.values.shape[0] == 2 for batch in drawn[5:] for part in batch.parts[0])
    # memories that are carried on are those of all streams
    windows.config = replace(windows.config, reset_share=0.5)
    with pytest.raises(ValueError, match=r"reset_share=1\.0.*Got reset_share=0\.5"):
        windows.keep_streams(1)


def test_streams_without_echoes_become_longer_too() -> None:
    from benchmarks.frontier_echoes import fresh_echoes
    from benchmarks.frontier_sets import SETS, Carrier

    spec = SETS["tep"]
    carrier = Carrier(pd.DataFrame(), {}, 100, 10)
    assert fresh_echoes(carrier, spec, None, 0) is None
    longer = fresh_echoes(carrier, spec, None, 0, lengthen=(2, 768))
    assert longer is not None
    left: list[int] = []
    windows: Any = SimpleNamespace(
        config=TrainConfig(prefix_patches=1), prefixes=(), share=torch.zeros(4), keep_streams=left.append
    )
    for batch in range(3):
        windows.share = torch.zeros(4)
        longer(windows)
        # everything is kept in the first part, and no stream is long there
        assert (windows.share == (1.0 if batch < 2 else 0.0)).all()
        assert windows.prefixes == (() if batch < 2 else spec.lengths)
    assert windows.config.prefix_patches == 768
    assert left == [spec.streams]
