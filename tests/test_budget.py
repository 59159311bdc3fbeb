"""Budgets that hold: eviction under every rule, thresholds that follow, tags with quotas, and what is refused.

B items · C channels · N patches · M entries · S score routers
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import CAPS, assert_same_memory, assert_same_run, edit_after, patch_bounds, patch_by_patch, run
from networks import (
    ALARM,
    CHANNELS,
    LOAD,
    PRICE,
    VALVE,
    make_config,
    make_network,
    make_panel,
    make_spec,
    make_store,
    policy_for,
    read_all,
    take_items,
)
from test_layer_parts import make_entries

from hamts.config import EVICTIONS, THRESHOLDS, MemoryConfig, TagType
from hamts.nn.controllers import Tracked, track_thresholds
from hamts.nn.controls import counted_uniform
from hamts.nn.eviction import end_times, whole_numbers
from hamts.nn.scratchpad import Entries
from hamts.nn.tokens import Policy
from hamts.reader import HAMNetwork

TRACKING = THRESHOLDS[1:]


def network_with(memory: MemoryConfig, router: str = "surprise+tags", **changes: Any) -> HAMNetwork:
    """A calibrated network under another memory configuration."""
    network = make_network(make_config(router=router, **changes))
    other = HAMNetwork(network.config, memory, network.spec).double().eval()
    other.load_state_dict(network.state_dict())
    return other


# ---- eviction


def loop_alive(
    entries: Entries, visible_from: torch.Tensor, policy: Policy, item: int, query: int
) -> tuple[set[int], set[int]]:
    """Entries of one item that a query sees, and those on the must-keep list: one arrival after the other."""
    must: list[int] = []
    rest: list[int] = []
    chance = counted_uniform(
        0, 0, torch.zeros(len(entries.alive), dtype=torch.int64), entries.position, entries.channel
    )
    assert policy.cap_must is not None and policy.cap_kept is not None
    for m in range(entries.alive.shape[1]):
        if not entries.alive[item, m] or visible_from[item, m] > query:
            continue
        (must if entries.must_keep[item, m] else rest).append(m)
        if len(must) > policy.cap_must:
            must.pop(0)
        room = policy.cap_kept + (policy.cap_must - len(must) if policy.eviction == "must_last" else 0)
        while len(rest) > room:
            if policy.eviction == "lowest":
                rest.remove(min(rest, key=lambda m: (int(whole_numbers(entries.score)[item, m]), m)))
            elif policy.eviction == "reservoir":
                rest.remove(min(rest, key=lambda m: (float(chance[item, m]), m)))
            else:
                rest.pop(0)
    return set(rest) | set(must), set(must)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), rule=st.sampled_from(EVICTIONS), kept=st.integers(0, 5), must=st.integers(0, 3))
def test_end_times_are_those_of_one_arrival_after_the_other(seed: int, rule: str, kept: int, must: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    B, M = 2, 16
    alive, tagged = torch.rand(B, M, generator=generator) < 0.85, torch.rand(B, M, generator=generator) < 0.3
    entries = make_entries(alive.tolist(), tagged.tolist())
    # few different scores, so that ties are common
    entries = replace(entries, score=torch.randint(0, 4, (B, M), generator=generator).double())
    visible_from = torch.randint(0, 9, (B, M), generator=generator).sort(1).values
    policy = Policy(
        share=torch.ones(B), readable=torch.ones(B, 3, 3).bool(), cap_kept=kept, cap_must=must, eviction=rule
    )
    until = end_times(entries, visible_from, policy)
    for item in range(B):
        for query in range(11):
            there = (entries.alive & (visible_from <= query) & (until > query))[item]
            seen = set(there.nonzero()[:, 0].tolist())
            wanted, wanted_must = loop_alive(entries, visible_from, policy, item, query)
            assert seen == wanted, f"{rule}, item {item}, query {query}"
            assert len(seen) <= kept + must and wanted_must <= seen


@pytest.mark.parametrize("rule", EVICTIONS)
def test_a_stream_evicts_as_one_pass_and_never_exceeds_its_cap(rule: str) -> None:
    network, store = network_with(MemoryConfig(eviction=rule)), make_store(make_panel(seed=7))
    policy = policy_for(network, 3, share=0.6, eviction=rule, **CAPS)
    wanted = run(network, store, policy)
    for size in (1, 4):
        assert_same_run(run(network, store, policy, chunk_patches=size), wanted, 1e-10)
    parallel, steps = read_all(network, store, policy), patch_by_patch(network, store, policy)
    quantiles = torch.cat([reading.quantiles for _, reading in steps], 2)
    assert torch.allclose(quantiles, parallel.quantiles, rtol=0, atol=1e-10)
    assert_same_memory(steps[-1][1].memory, parallel.memory, 1e-10)
    most = 0
    for _, reading in steps:
        for layer in reading.memory.layers:
            held, must = layer.scratchpad.alive.sum(1), (layer.scratchpad.alive & layer.scratchpad.must_keep).sum(1)
            assert (held <= sum(CAPS.values())).all() and (must <= CAPS["cap_must"]).all()
            if rule != "must_last":
                assert (held - must <= CAPS["cap_kept"]).all()
            most = max(most, int(held.max()))
    assert most == sum(CAPS.values())


@pytest.mark.parametrize("rule", EVICTIONS)
def test_no_eviction_looks_ahead(rule: str) -> None:
    network, panel = network_with(MemoryConfig(eviction=rule)), make_panel(seed=3)
    store = make_store(panel)
    index, steps = patch_bounds(store, 5)
    edited = make_store(edit_after(panel, steps, np.random.default_rng(0)))
    policy = policy_for(network, 3, share=0.6, eviction=rule, **CAPS)
    one, other = read_all(network, store, policy), read_all(network, edited, policy)
    assert not torch.equal(one.quantiles[:, :, index:], other.quantiles[:, :, index:])
    assert torch.allclose(one.quantiles[:, :, :index], other.quantiles[:, :, :index], rtol=0, atol=1e-12)


def test_rules_differ_in_what_they_keep() -> None:
    store = make_store(make_panel((300,), seed=7))
    held = {}
    for rule in EVICTIONS:
        network = network_with(MemoryConfig(eviction=rule))
        pad = read_all(network, store, policy_for(network, 1, share=0.6, eviction=rule, **CAPS)).memory.layers[0]
        rest = pad.scratchpad.alive & ~pad.scratchpad.must_keep
        held[rule] = (pad.scratchpad.position[rest], pad.scratchpad.score[rest])
    newest = held["fifo"][0]
    assert held["lowest"][0].mean() < newest.mean() and held["reservoir"][0].mean() < newest.mean()
    assert held["lowest"][1].min() > held["reservoir"][1].min()
    # tags are few, and leave their room to the rest
    assert len(held["must_last"][0]) >= len(newest)


def test_a_reservoir_is_an_even_sample_of_all_that_was_written() -> None:
    M, cap, B = 60, 6, 400
    entries = make_entries([[True] * M] * B)
    entries = replace(entries, channel=torch.zeros_like(entries.channel))
    policy = Policy(
        share=torch.ones(B), readable=torch.ones(B, 1, 1).bool(), cap_kept=cap, cap_must=0, eviction="reservoir",
        key=torch.arange(B),
    )  # fmt: skip
    until = end_times(entries, torch.arange(M).expand(B, M), policy)
    held = (until > M).double()
    assert (held.sum(1) == cap).all()
    # each of ten sixths of the stream holds a tenth: four standard deviations
    sixths = held.view(B, 10, M // 10).sum(2).mean(0)
    assert torch.allclose(sixths, torch.full((10,), cap / 10).double(), atol=4 * math.sqrt(0.6 / B))


# ---- thresholds that follow


def stream(rule: str, scores: torch.Tensor, share: float, *, chunks: list[int] | None = None) -> Tracked:
    """Track one stream per item; scores [B, N, C, S], at thresholds that are right for |normal| scores."""
    B, N, _, S = scores.shape
    kind = scores.dtype
    normal = torch.distributions.Normal(0.0, 1.0)

    def quantile(asked: float) -> float:
        return float(normal.icdf(torch.tensor(1 - asked / 2, dtype=torch.float64)))

    spread = math.log(quantile(0.02) / quantile(0.75))
    state, block = torch.zeros(B, S, 3, dtype=kind), torch.full((B,), -1)
    done, at = [], 0
    for size in chunks or [N]:
        part = slice(at, at + size)
        result = track_thresholds(
            scores[:, part],
            able=torch.ones(scores.shape[:3], dtype=torch.bool)[:, part],
            position=torch.arange(N, dtype=torch.float64).expand(B, N)[:, part],
            threshold=torch.full((B, S), quantile(share), dtype=kind),
            spread=torch.full((S,), spread, dtype=kind),
            on_log_scale=torch.ones(S, dtype=torch.bool),
            share=torch.full((B,), share, dtype=kind),
            state=state,
            block=block,
            rule=rule,
        )
        state, block, at = result.state, result.block, at + size
        done.append(result)
    return Tracked(torch.cat([r.asked for r in done], 1), torch.cat([r.threshold for r in done], 1), state, block)


@pytest.mark.parametrize("rule", TRACKING)
@pytest.mark.parametrize("channels", [1, 5])
def test_usage_returns_to_its_target_after_scores_triple(rule: str, channels: int) -> None:
    """Within 10 % of the target from 1,024 steps on; 58 % for ever without tracking."""
    generator = torch.Generator().manual_seed(0)
    share, half = 0.10, 2048
    scores = torch.randn(48, 2 * half + 1024, channels, 1, generator=generator, dtype=torch.float64).abs()
    scores[:, half:] *= 3
    asked = stream(rule, scores, share).asked.double().mean((0, 2, 3))  # [N]
    fixed = (scores >= 1.6449).double().mean((0, 2, 3))
    before, burst, after = asked[1024:half].mean(), asked[half : half + 512].mean(), asked[half + 1024 :].mean()
    print(f"{rule}, {channels} channels: {before:.3f} before, {burst:.3f} in the first 512 steps, {after:.3f} after")
    assert abs(before - share) < 0.1 * share and abs(after - share) < 0.1 * share
    for low in range(half + 1024, 2 * half + 1024, 512):
        assert abs(asked[low : low + 512].mean() - share) < 0.1 * share
    assert burst < fixed[half:].mean() and fixed[half:].mean() > 0.5


@pytest.mark.parametrize("rule", TRACKING)
def test_a_threshold_moves_alike_in_any_chunks_and_never_ahead(rule: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 400, 2, 2, generator=generator, dtype=torch.float64).abs()
    whole = stream(rule, scores, 0.2)
    parts = stream(rule, scores, 0.2, chunks=[1, 63, 1, 135, 200])
    assert torch.equal(parts.asked, whole.asked) and torch.equal(parts.state, whole.state)
    assert (whole.threshold.std(1) > 0).all()
    changed = scores.clone()
    changed[:, 250:] *= 7
    other = stream(rule, changed, 0.2)
    # the step itself is decided before it moves the threshold
    assert torch.equal(other.threshold[:, :251], whole.threshold[:, :251])
    assert not torch.equal(other.threshold[:, 350:], whole.threshold[:, 350:])


@pytest.mark.parametrize("rule", TRACKING)
@pytest.mark.parametrize("router", ["surprise+tags", "learned+error"])
def test_a_network_tracks_in_a_stream_as_in_one_pass(rule: str, router: str) -> None:
    network = network_with(MemoryConfig(threshold=rule), router)
    store = make_store(make_panel((260, 230, 90), seed=7))
    policy = replace(network.policy(torch.full((3,), 0.2, dtype=torch.float64)), cap_kept=9, cap_must=4)
    wanted = run(network, store, policy, cutoffs=[np.array([n - 9]) for n in (260, 230, 90)])
    for size in (1, 31):
        got = run(network, store, policy, cutoffs=[np.array([n - 9]) for n in (260, 230, 90)], chunk_patches=size)
        assert_same_run(got, wanted, 1e-10)
    moved = [trace.layers[0].online for trace in wanted.traces]
    assert all(one is not None for one in moved) and max(float(one.std(1).max()) for one in moved) > 0  # type: ignore[union-attr]
    # and an item alone as in the batch
    alone = make_store(take_items(make_panel((260, 230, 90), seed=7), [1]))
    one = replace(network.policy(torch.full((1,), 0.2, dtype=torch.float64)), cap_kept=9, cap_must=4)
    single = run(network, alone, one, cutoffs=[np.array([221])])
    assert single.memory is not None and wanted.memory is not None
    assert_same_memory(wanted.memory.select(torch.tensor([1])), single.memory, 1e-10)


@pytest.mark.parametrize("rule", TRACKING)
def test_tracking_holds_the_share_on_streams_that_the_table_does_not_know(rule: str) -> None:
    store = make_store(make_panel((3000,), seed=7))
    usage = {}
    for threshold in ("fixed", rule):
        network = network_with(MemoryConfig(threshold=threshold), "write")
        for layer in network.backbone.layers():
            # as if every score of training had been a third
            layer.thresholds.values.div_(3.0)
        reading = read_all(network, store, network.policy(torch.tensor([0.1], dtype=torch.float64), capped=False))
        event = torch.tensor([c.role == "event" for c in CHANNELS])[:, None]
        able = (reading.heard >= 0.5) & ~event
        late = torch.arange(able.shape[2]) >= 500
        usage[threshold] = [float((t.routed & able & late).sum() / (able & late).sum()) for t in reading.traces]
    assert all(abs(share - 0.1) > 0.05 for share in usage["fixed"])
    assert all(abs(share - 0.1) < 0.01 for share in usage[rule])


@pytest.mark.parametrize("rule", TRACKING)
def test_a_forecast_moves_no_threshold(rule: str) -> None:
    network, store = network_with(MemoryConfig(threshold=rule)), make_store(make_panel(seed=8))
    policy = network.policy(torch.full((3,), 0.3, dtype=torch.float64))
    memory = read_all(network, store, policy).memory
    with torch.no_grad():
        reading = network(store.horizon(torch.arange(3), store.lengths, 7), memory, policy, advance=False)
    assert reading.memory is memory
    for trace in reading.traces:
        assert trace.online is not None and torch.equal(trace.online, trace.online[:, :1].expand_as(trace.online))


# ---- tags


def tag_network(*types: TagType, **changes: Any) -> HAMNetwork:
    return network_with(MemoryConfig(tag_types=types, **changes), window_patches=3)


def tagged_panel(alarms: list[int], valves: list[int] | None = None, steps: int = 90) -> Any:
    """Everything observed; alarms at some steps, and the valve turned at others."""
    panel = make_panel((steps,), seed=14)
    values = np.nan_to_num(panel.values, nan=1.0)
    values[:, ALARM], values[:, VALVE] = 0.0, 0.0
    values[alarms, ALARM] = 1.0
    for step in valves or []:
        values[step:, VALVE] += 1.0
    return replace(panel, values=values)


def held(network: HAMNetwork, panel: Any, **changes: Any) -> set[tuple[int, int, int]]:
    """(patch, channel, type) on the must-keep list of the first layer."""
    policy = replace(network.policy(torch.tensor([0.05], dtype=torch.float64)), **changes)
    pad = read_all(network, make_store(panel), policy).memory.layers[0].scratchpad
    rows = pad.alive[0] & pad.must_keep[0]
    assert pad.tag_type is not None
    return set(zip(*(x[0][rows].long().tolist() for x in (pad.position, pad.channel, pad.tag_type)), strict=True))


def test_a_tag_keeps_what_came_before_and_comes_after() -> None:
    network = tag_network(TagType(name="alarm", before_patches=1, after_patches=2))
    found = held(network, tagged_panel([31]))
    # step 31 is in patch 10; targets are kept around it, the alarm at its own moment
    expected = {(patch, channel, 0) for patch in (9, 10, 11, 12) for channel in (LOAD, PRICE)} | {(10, ALARM, 0)}
    assert found == expected
    plain = held(tag_network(TagType(name="alarm")), tagged_panel([31]))
    assert plain == {(10, LOAD, 0), (10, PRICE, 0), (10, ALARM, 0)}


def test_typed_tags_are_alike_in_any_chunks_and_told_in_the_trace() -> None:
    network = tag_network(
        TagType(name="alarm", before_patches=2, after_patches=3, priority=2.0, quota=0.3),
        TagType(name="valve", after_patches=4), tag_half_life_patches=20.0,
    )  # fmt: skip
    store = make_store(make_panel(seed=7))
    policy = replace(network.policy(torch.full((3,), 0.2, dtype=torch.float64)), cap_kept=6, cap_must=7)
    wanted = run(network, store, policy)
    for size in (1, 2, 5):
        got = run(network, store, policy, chunk_patches=size)
        assert got.memory is not None and wanted.memory is not None
        assert_same_memory(got.memory, wanted.memory, 1e-10)
        apart = np.abs(got.quantiles - wanted.quantiles) / wanted.scale[:, :, None, None]
        assert apart.max() <= 1e-10
        # tags that reach back over the border of a chunk are told as a revision
        assert (got.kept, got.heard) == (wanted.kept, wanted.heard)
    steps = patch_by_patch(network, store, policy)
    assert wanted.memory is not None
    assert any(bool(trace.revised.any()) for _, reading in steps for trace in reading.traces)  # type: ignore[union-attr]


def test_a_tag_on_every_step_does_not_take_the_whole_budget() -> None:
    network = tag_network(TagType(name="alarm", quota=0.5, priority=8.0), TagType(name="valve", quota=0.25))
    panel = tagged_panel(list(range(90)), [6, 7, 66])
    found = held(network, panel, cap_kept=10, cap_must=12)
    assert sum(kind == 0 for _, _, kind in found) == 6
    # turned at steps 6 and 7: the flood of alarms did not push it out
    assert {(patch, channel) for patch, channel, kind in found if kind == 1} == {(2, VALVE), (22, VALVE)}
    policy = replace(network.policy(torch.tensor([0.5], dtype=torch.float64)), cap_kept=10, cap_must=12)
    for _, reading in patch_by_patch(network, make_store(panel), policy):
        for layer in reading.memory.layers:
            pad = layer.scratchpad
            assert int((pad.alive & pad.must_keep).sum()) <= 12
    assert int((pad.alive & ~pad.must_keep).sum()) == 10


def test_a_higher_priority_stays_until_it_has_faded() -> None:
    panel = tagged_panel([9, 21, 33, 45, 57, 69, 81], [10])
    lasting = held(tag_network(TagType(name="valve", priority=4.0)), panel, cap_must=6, cap_kept=2)
    assert {patch for patch, _, kind in lasting if kind == 1} == {3}
    # two halvings of 6 patches, and newer tags of priority 1 stand above it
    fading = held(
        tag_network(TagType(name="valve", priority=4.0), tag_half_life_patches=6.0), panel, cap_must=6, cap_kept=2
    )
    assert not any(kind == 1 for _, _, kind in fading) and len(fading) == 6


# ---- what is refused


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown eviction 'oldest'. Available: \['fifo', 'lowest', 'must"):
        MemoryConfig(eviction="oldest")
    with pytest.raises(ValueError, match=r"Unknown threshold 'pid'. Available: \['block', 'feedback', 'fixed', 'quan"):
        MemoryConfig(threshold="pid")
    with pytest.raises(ValueError, match=r"Unknown tag type 'fire'. Available: \['alarm', 'valve'\]"):
        tag_network(TagType(name="fire"))


def test_a_window_before_a_tag_must_still_be_there() -> None:
    with pytest.raises(ValueError, match=r"before_patches=2 at most, or window_patches=4"):
        tag_network(TagType(name="alarm", before_patches=3))


def test_quotas_beyond_the_budget_say_the_smallest_that_works() -> None:
    types = (TagType(name="alarm", quota=0.8), TagType(name="valve", quota=0.7))
    with pytest.raises(ValueError, match=r"add up to 1 at most.*Got 1.5. Divide each by 1.5.*at least 0.6"):
        MemoryConfig(tag_types=types, must_keep_share=0.4)


def test_a_cap_too_small_for_one_entry_says_the_smallest_that_works() -> None:
    panel = make_panel(seed=0)
    spec = make_spec(panel, make_store(panel))
    need = make_network().float().entry_bytes() * 2
    HAMNetwork(make_config(), MemoryConfig(budget_bytes=need), spec)
    HAMNetwork(make_config(), MemoryConfig(budget_bytes=0), spec)
    with pytest.raises(ValueError, match=rf"budget_bytes must be 0 or at least {need}.*Got {need - 1}"):
        HAMNetwork(make_config(), MemoryConfig(budget_bytes=need - 1), spec)
