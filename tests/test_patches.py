"""From panels to chunks: where a step lies, what is seen of it, and what counts as a tag.

B items · I items · C channels · N patches · P steps in a patch · S steps of all items · F future steps
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import (
    ALARM,
    CHANNELS,
    FORECAST,
    HORIZON,
    LENGTHS,
    LOAD,
    MODE,
    VALVE,
    WIND,
    cut_items,
    leaves,
    make_future,
    make_panel,
    make_schema,
    make_store,
)

from hamts.data.panel import Channel, Frequency, Panel
from hamts.data.patches import Chunk, PatchStore, build_store, find_tags

SEEDS = range(20)
# hours of the items' first rows; days hold a whole number of patches, so that grids begin at midnight
LEADS = (0, 5, 2)


def counting_panel(lengths: tuple[int, ...] = LENGTHS) -> Panel:
    """Step t of item i holds 1000 i + t in every channel."""
    panel = make_panel(lengths)
    values = np.concatenate([1000 * i + np.arange(n) for i, n in enumerate(lengths)])
    return replace(panel, values=np.repeat(values[:, None], len(CHANNELS), 1).astype(float))


def steps_of(chunk: Chunk, item: int, channel: int = LOAD) -> list[float]:
    return chunk.values[item, channel][chunk.observed[item, channel]].tolist()


@pytest.mark.parametrize("patch_steps", [1, 2, 3, 4, 12, 24])
def test_every_step_stands_in_its_patch_of_the_day(patch_steps: int) -> None:
    panel = counting_panel()
    store = build_store(panel, patch_steps=patch_steps, extra_steps=HORIZON)
    assert store.lead.tolist() == list(LEADS)
    for item, length in enumerate(LENGTHS):
        patches = (LEADS[item] + length) // patch_steps
        chunk = store.window(torch.tensor([item]), torch.tensor([0]), patches)
        flat = chunk.values[0, WIND].flatten().numpy()
        seen = chunk.observed[0, WIND].flatten().numpy()
        hour = np.arange(len(flat)) - LEADS[item]
        assert np.array_equal(seen, hour >= 0)
        assert np.array_equal(flat[seen], 1000 * item + hour[seen])
        assert chunk.present.all() and chunk.complete.all()
        assert chunk.position[0].tolist() == list(range(patches))
        assert (chunk.elapsed == 1).all()


def test_patches_that_do_not_fit_days_begin_with_the_stream() -> None:
    store = build_store(counting_panel(), patch_steps=5, extra_steps=0)
    assert store.lead.tolist() == [0, 0, 0]
    assert steps_of(store.window(torch.tensor([1]), torch.tensor([1]), 1), 0) == [1005, 1006, 1007, 1008, 1009]


def test_calendar_of_a_patch_is_that_of_its_first_hour() -> None:
    store = build_store(counting_panel(), patch_steps=3, extra_steps=HORIZON)
    chunk = store.window(torch.tensor([0, 1, 2]), torch.tensor([1, 1, 9]), 4)
    # hour of day comes first: patch 1 is 3 o'clock for every item, patch 9 is 3 o'clock of the next day
    for row in range(3):
        assert torch.allclose(chunk.calendar[row, 0, :2], torch.tensor([np.sin(np.pi / 4), np.cos(np.pi / 4)]).float())
    assert not torch.equal(chunk.calendar[0], chunk.calendar[1])
    assert torch.allclose(chunk.calendar[:, :, :2], chunk.calendar[:1, :, :2].expand(3, -1, -1), atol=1e-6)


def test_patches_before_and_after_an_item_are_absent_and_no_neighbour_shows() -> None:
    store = build_store(counting_panel(), patch_steps=3, extra_steps=HORIZON)
    rows = store.row_count.tolist()
    chunk = store.window(torch.tensor([1, 1]), torch.tensor([-2, rows[1] - 1]), 4)
    assert chunk.present.tolist() == [[False, False, True, True], [True, False, False, False]]
    assert not chunk.observed[0, :, :2].any() and not chunk.complete[0, :, :2].any()
    assert not chunk.observed[1].any()
    assert steps_of(chunk, 0) == [1000]
    assert (chunk.values[~chunk.observed] == 0).all()
    assert chunk.horizon is None
    # nor does the end of the last item
    beyond = store.window(torch.tensor([2]), torch.tensor([rows[2] - 1]), 3)
    assert beyond.present.tolist() == [[True, False, False]] and not beyond.observed.any()


@pytest.mark.parametrize("cutoff", [20, 21, 22, 23, 47])
def test_a_horizon_begins_with_the_unfinished_patch(cutoff: int) -> None:
    store = build_store(counting_panel(), patch_steps=3, extra_steps=HORIZON)
    chunk = store.horizon(torch.tensor([1]), torch.tensor([cutoff]), HORIZON)
    begun = (5 + cutoff) % 3
    assert chunk.horizon is not None
    asked = chunk.horizon[0].flatten()
    assert asked.nonzero().flatten().tolist() == list(range(begun, begun + HORIZON))
    # of the past, the steps of the unfinished patch alone; of what is known ahead, the horizon too
    known = [s for s in range(cutoff - begun, cutoff + HORIZON) if s < LENGTHS[1]]
    assert steps_of(chunk, 0, LOAD) == steps_of(chunk, 0, WIND) == [1000 + s for s in known if s < cutoff]
    assert steps_of(chunk, 0, MODE) == steps_of(chunk, 0, ALARM) == [1000 + s for s in known if s < cutoff]
    assert steps_of(chunk, 0, FORECAST) == steps_of(chunk, 0, VALVE) == [1000 + s for s in known]
    assert (chunk.values[~chunk.observed] == 0).all()
    truth = chunk.truth[0, LOAD].flatten()
    assert torch.isnan(truth).tolist() == [cutoff - begun + i >= LENGTHS[1] for i in range(len(truth))]
    # only what is known ahead may be kept before the forecast is over
    ahead = torch.tensor([c.role in ("future", "action") for c in CHANNELS])
    assert torch.equal(chunk.complete[0].all(-1), ahead) and torch.equal(chunk.complete[0].any(-1), ahead)
    assert chunk.present.all()
    assert chunk.position[0, 0] == (5 + cutoff) // 3


def test_events_of_a_horizon_are_seen_where_they_are_revealed() -> None:
    store = build_store(counting_panel(), patch_steps=3, extra_steps=HORIZON)
    items, cutoffs = torch.tensor([0, 0]), torch.tensor([31, 31])
    chunk = store.horizon(items, cutoffs, HORIZON, torch.tensor([True, False]))
    assert steps_of(chunk, 0, ALARM) == list(range(30, 38)) and steps_of(chunk, 1, ALARM) == [30]
    assert chunk.complete[0, ALARM].all() and not chunk.complete[1, ALARM].any()
    assert chunk.tags[0, ALARM].sum() == 8 and chunk.tags[1, ALARM].sum() == 1
    assert steps_of(chunk, 0, WIND) == [30]


def test_horizons_of_different_phase_stand_side_by_side() -> None:
    store = build_store(counting_panel(), patch_steps=3, extra_steps=HORIZON)
    cutoffs = torch.tensor([30, 26])
    chunk = store.horizon(torch.tensor([0, 1]), cutoffs, HORIZON)
    assert chunk.horizon is not None
    assert chunk.horizon.flatten(1).sum(1).tolist() == [HORIZON, HORIZON]
    for row in range(2):
        assert chunk.truth[row, LOAD].flatten()[chunk.horizon[row].flatten()].tolist() == [
            1000 * row + int(cutoffs[row]) + ahead for ahead in range(HORIZON)
        ]


def test_future_values_stand_after_each_item_and_nowhere_else() -> None:
    panel = counting_panel()
    future = make_future(panel)
    future[..., FORECAST] = 7000 + 100 * np.arange(3)[:, None] + np.arange(HORIZON)
    store = build_store(panel, patch_steps=3, extra_steps=HORIZON, future=future)
    plain = build_store(panel, patch_steps=3, extra_steps=HORIZON)
    for item, length in enumerate(LENGTHS):
        chunk = store.horizon(torch.tensor([item]), torch.tensor([length]), HORIZON)
        begun = (LEADS[item] + length) % 3
        past = [1000 * item + s for s in range(length - begun, length)]
        assert steps_of(chunk, 0, FORECAST) == past + [7000 + 100 * item + ahead for ahead in range(HORIZON)]
        assert steps_of(chunk, 0, LOAD) == past
    rows = ~torch.isnan(plain.values)
    assert torch.equal(store.values[rows], plain.values[rows])
    assert int((~torch.isnan(store.values)).sum() - rows.sum()) == 3 * HORIZON * 2


def tags_of(values: np.ndarray, offsets: list[int]) -> list[list[int]]:
    """Steps with a tag, of the event and of the action column."""
    schema = make_schema((Channel("y", "target"), Channel("e", "event"), Channel("a", "action")), static=False)
    tags = find_tags(values, np.array(offsets), schema)
    assert not tags[:, 0].any()
    return [tags[:, 1].nonzero()[0].tolist(), tags[:, 2].nonzero()[0].tolist()]


def test_events_tag_steps_other_than_zero_and_actions_their_changes() -> None:
    nan = np.nan
    y = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])
    event = np.array([0, 1, nan, -2, 0, 0, 3, nan])
    action = np.array([5, 5, nan, 5, 6, nan, 7, 7])
    values = np.stack([y, event, action], 1)
    assert tags_of(values, [0, 8]) == [[1, 3, 6], [4, 6]]
    # the first known action of an item is no change, whatever stood in the item before
    assert tags_of(values, [0, 4, 8]) == [[1, 3, 6], [6]]
    assert tags_of(values, [0, 6, 8]) == [[1, 3, 6], [4]]
    assert tags_of(values[:0], [0, 0]) == [[], []]


@pytest.mark.parametrize("seed", SEEDS)
def test_tags_of_a_stream_do_not_depend_on_what_follows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, size=(40, 3)).astype(float)
    values[rng.random(values.shape) < 0.3] = np.nan
    here = int(rng.integers(1, 40))
    whole, part = tags_of(values, [0, 40]), tags_of(values[:here], [0, here])
    assert part == [[step for step in steps if step < here] for steps in whole]


def test_planned_actions_are_tagged_against_the_last_known_value() -> None:
    panel = make_panel()
    values = panel.values.copy()
    values[:, VALVE] = 1.0
    values[panel.offsets[1] + 40 : panel.offsets[2], VALVE] = np.nan
    values[panel.offsets[2] :, VALVE] = np.nan
    future = np.full((3, HORIZON, len(CHANNELS)), np.nan)
    future[..., VALVE] = [1, 1, 2, 2, np.nan, 2, 1]
    future[1, 0, VALVE] = 3
    store = build_store(replace(panel, values=values), patch_steps=3, extra_steps=HORIZON, future=future)
    chunk = store.horizon(torch.arange(3), torch.tensor(LENGTHS), HORIZON)
    assert chunk.horizon is not None
    tagged = [chunk.tags[i, VALVE].flatten()[chunk.horizon[i].flatten()].nonzero().flatten() for i in range(3)]
    # the second item was at 1 before its gap; the third has no last value
    assert [steps.tolist() for steps in tagged] == [[2, 6], [0, 1, 2, 6], [2, 6]]


def test_tags_and_offsets_show_only_where_something_was_observed() -> None:
    panel = make_panel()
    store = make_store(panel)
    chunk = store.window(torch.arange(3), torch.tensor([0, 0, 0]), 10)
    assert chunk.tags.any() and (chunk.event_offset > 0).any()
    assert not (chunk.tags & ~chunk.observed).any() and (chunk.event_offset[~chunk.observed] == 0).all()
    tags = find_tags(panel.values, panel.offsets, panel.schema)
    rows = slice(panel.offsets[1], panel.offsets[1] + 25)
    flat = chunk.tags[1].flatten(1)[:, 5:30]
    assert np.array_equal(flat.numpy().T, tags[rows])
    assert panel.event_offset is not None
    assert np.array_equal(chunk.event_offset[1].flatten(1)[:, 5:30].numpy().T, panel.event_offset[rows])


def test_a_stream_that_grows_is_cut_the_same_way_for_ever() -> None:
    panel = make_panel()
    short = cut_items(panel, [40, 30, 17])
    late = make_store(panel)
    early = build_store(short, patch_steps=3, extra_steps=HORIZON)
    items = torch.arange(3)
    stop = (early.lead + early.lengths) // 3
    for part in (early, late):
        assert torch.equal(part.lead, early.lead)
    one, two = (store.window(items, stop - 12, 12) for store in (early, late))
    for (name, mine), other in zip(leaves(one).items(), leaves(two).values(), strict=True):
        assert torch.equal(mine.nan_to_num(), other.nan_to_num()), name


def irregular_store(times: list[int]) -> PatchStore:
    panel = counting_panel((len(times),))
    schema = replace(panel.schema, frequency=Frequency("irregular", "", 1))
    stamps = np.datetime64("2024-01-01", "ns") + 60_000_000_000 * np.array(times)
    panel = replace(panel, schema=schema, times=stamps, starts=stamps[:1])
    return build_store(panel, patch_steps=1, extra_steps=3, time_unit=60e9)


def test_irregular_rows_stand_at_their_true_time() -> None:
    store = irregular_store([0, 1, 2, 10, 11, 11])
    chunk = store.window(torch.tensor([0]), torch.tensor([0]), 6)
    assert chunk.position[0].tolist() == [0, 1, 2, 10, 11, 11]
    assert chunk.elapsed[0, :5].tolist() == [1, 1, 1, 8, 1]
    assert 0 < chunk.elapsed[0, 5] < 1e-5
    ahead = store.horizon(torch.tensor([0]), torch.tensor([6]), 3)
    # on by the median of the gaps
    assert ahead.position[0].tolist() == [12, 13, 14]


def test_static_columns_stand_beside_every_chunk() -> None:
    panel = make_panel()
    values = np.array([[0.5, 1.0], [np.nan, 2.0], [-1.5, np.nan]])
    store = make_store(replace(panel, static_values=values))
    chunk = store.window(torch.tensor([2, 1]), torch.tensor([0, 0]), 1)
    assert chunk.static_values.tolist() == [[-1.5], [0.0]]
    assert chunk.static_codes.tolist() == [[0], [2]]
