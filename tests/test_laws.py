"""The nine laws, on a network with gaps, tags and channels of every role.

B items · I items · C channels · G targets · N patches · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

import functools
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
    LENGTHS,
    LOAD,
    MODE,
    PATCH_STEPS,
    PRICE,
    ROUTER_CHOICES,
    VALVE,
    WIND,
    cut_items,
    dense_read,
    leaves,
    make_config,
    make_future,
    make_network,
    make_panel,
    make_store,
    policy_for,
    read_all,
    take_items,
    whole_chunk,
)

from hamts.data.panel import Panel
from hamts.data.patches import Chunk, PatchStore, build_store
from hamts.nn import ham
from hamts.nn.scratchpad import LayerMemory
from hamts.nn.tokens import Policy, map_tensors
from hamts.ops import kernels, naive
from hamts.reader import HAMNetwork, Reading, StreamMemory
from hamts.rollout import ChunkTrace, Rollout, forecast_from, roll

# sums in another order: float64 keeps 16 digits and float32 7, and two layers with norms and a softmax cost one or two
SAME = {torch.float64: 1e-10, torch.float32: 1e-5}
WINDOWS = (1, 2, 3)
CAPS = {"cap_kept": 6, "cap_must": 4}


@functools.cache
def network_of(router: str = "learned+tags", window: int = 2, dtype: torch.dtype = torch.float64) -> HAMNetwork:
    config = make_config(router=router, window_patches=window, cross_span_patches=min(2, window))
    return make_network(config, dtype=dtype)


def middle_cutoffs(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
    """In the middle of a patch, at its edge and at the very end; the last item has one only."""
    return [np.array([n - 17, n - 9, n - 8, n]) for n in lengths[:-1]] + [np.array([lengths[-1] - 1])]


def entries_of(memory: LayerMemory, item: int) -> dict[str, torch.Tensor]:
    """The live entries of one item, without padding."""
    alive = memory.scratchpad.alive[item]
    return {name: tensor[item][alive] for name, tensor in leaves(memory.scratchpad).items()}


def places_of(memory: LayerMemory, item: int, *, must_keep: bool | None = None) -> list[tuple[float, int]]:
    """Position and channel of live entries, of both lists or one."""
    found = entries_of(memory, item)
    chosen = torch.ones_like(found[".alive"]) if must_keep is None else found[".must_keep"] == must_keep
    return list(zip(found[".position"][chosen].tolist(), found[".channel"][chosen].tolist(), strict=True))


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    """Apart by no more than ``tolerance`` times the size of what is compared."""
    assert got.shape == wanted.shape, f"{what}: {tuple(got.shape)} is not {tuple(wanted.shape)}"
    if not got.numel():
        return
    if not got.is_floating_point():
        assert torch.equal(got, wanted), what
        return
    assert torch.equal(got.isnan(), wanted.isnan()), what
    size = max(float(wanted.detach().nan_to_num().abs().max()), 1.0)
    apart = float((got - wanted).detach().nan_to_num().abs().max())
    assert apart <= tolerance * size, f"{what}: {apart:.1e} apart, of {size:.1e}"


def assert_same_memory(got: StreamMemory, wanted: StreamMemory, tolerance: float) -> None:
    for name, tensor in leaves(wanted.scale).items():
        assert_close(leaves(got.scale)[name], tensor, 1e-12, f"scale{name}")
    for number, (mine, other) in enumerate(zip(got.layers, wanted.layers, strict=True)):
        for name in ("state", "conv_tail", "error_mean"):
            assert_close(getattr(mine, name), getattr(other, name), tolerance, f"layer {number}.{name}")
        # what stands in the place of an absent patch is never read
        absent = ~other.pending.present[..., 0]  # [B, W]
        values = leaves(mine.pending)
        for name, tensor in leaves(other.pending).items():
            hidden = absent[(...,) + (None,) * (tensor.dim() - 2)]
            value, tensor = values[name].masked_fill(hidden, 0), tensor.masked_fill(hidden, 0)
            assert_close(value, tensor, tolerance, f"layer {number}.pending{name}")
        for item in range(len(other.state)):
            for name, tensor in entries_of(other, item).items():
                assert_close(entries_of(mine, item)[name], tensor, tolerance, f"layer {number}, item {item}{name}")


def decisions(traces: list[ChunkTrace], layer: int) -> dict[tuple[int, int, int], tuple[bool, float]]:
    """By item, channel and patch: whether it was routed, and how far its nearest score lies from the threshold."""
    found: dict[tuple[int, int, int], tuple[bool, float]] = {}
    for trace in traces:
        part = trace.layers[layer]
        distance = (part.scores - part.threshold[:, None, None]).abs()  # [B, C, N, S]
        nearest = distance.amin(-1) if distance.shape[-1] else torch.full(part.routed.shape, torch.inf)
        for row, item in enumerate(trace.items.tolist()):
            for n in range(part.routed.shape[2]):
                patch = int(trace.first_patch[row]) + n
                for c in range(part.routed.shape[1]):
                    if patch >= 0:
                        # a stream that goes on shows what it has read already as absent
                        found.setdefault((item, c, patch), (bool(part.routed[row, c, n]), float(nearest[row, c, n])))
    return found


def run(network: HAMNetwork, store: PatchStore, policy: Policy, **options: Any) -> Rollout:
    options = {"cutoffs": middle_cutoffs(), "steps": HORIZON, "keep_traces": True, **options}
    return roll(network, store, policies=policy, **options)


def assert_same_run(got: Rollout, wanted: Rollout, tolerance: float) -> None:
    """The same decisions, but for scores within 1e-5 of the threshold, and the same forecasts and memories."""
    for layer in range(len(wanted.traces[0].layers)):
        mine, other = decisions(got.traces, layer), decisions(wanted.traces, layer)
        assert mine.keys() == other.keys()
        changed = [place for place in other if mine[place][0] != other[place][0]]
        assert all(other[place][1] < 1e-5 for place in changed), f"layer {layer} decides otherwise at {changed}"
        if changed:
            assert tolerance == SAME[torch.float32], "float64 knows which side of the threshold a score is on"
            return
    apart = np.abs(got.quantiles - wanted.quantiles) / wanted.scale[:, :, None, None]
    assert np.isfinite(apart).all()
    assert apart.max() <= tolerance
    assert (got.kept, got.heard) == (wanted.kept, wanted.heard)
    assert got.memory is not None and wanted.memory is not None
    assert_same_memory(got.memory, wanted.memory, tolerance)


# ---- 1 causality


def edit_after(panel: Panel, steps: list[int], rng: np.random.Generator, *, same_mask: bool = False) -> Panel:
    """Everything from these steps of each item on becomes something else: values, gaps, tags, offsets."""
    values, offset = panel.values.copy(), np.zeros(panel.values.shape, dtype=np.float32)
    if panel.event_offset is not None:
        offset = panel.event_offset.copy()
    for item, step in enumerate(steps):
        rows = slice(panel.offsets[item] + step, panel.offsets[item + 1])
        old = values[rows]
        new = rng.normal(size=old.shape) * 50 + 20
        new[:, MODE] = rng.integers(0, 3, size=len(new))
        new[:, ALARM] = rng.integers(0, 2, size=len(new))
        new[:, VALVE] = rng.integers(0, 5, size=len(new))
        if same_mask:
            new[:, (ALARM, VALVE)] = old[:, (ALARM, VALVE)]
            new[np.isnan(old)] = np.nan
        else:
            new[rng.random(new.shape) < 0.4] = np.nan
        values[rows] = new
        offset[rows, ALARM] = rng.random(len(new))
    return replace(panel, values=values, event_offset=offset)


def patch_bounds(store: PatchStore, before_end: int) -> tuple[int, list[int]]:
    """An aligned patch index, and the first step of each item that belongs to it or to later ones."""
    stop = (store.lead + store.lengths) // store.patch_steps
    index = int(stop.max()) - before_end
    steps = (stop - before_end) * store.patch_steps - store.lead
    return index, steps.clamp_min(0).tolist()


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize("window", WINDOWS)
def test_edits_of_the_future_never_change_the_past(router: str, window: int) -> None:
    network, panel = network_of(router, window), make_panel(seed=3)
    store = make_store(panel)
    for seed, before_end in ((0, 5), (1, 1)):
        index, steps = patch_bounds(store, before_end)
        edited = make_store(edit_after(panel, steps, np.random.default_rng(seed)))
        policy = policy_for(network, 3, **CAPS)
        one, other = read_all(network, store, policy), read_all(network, edited, policy)
        assert not torch.equal(one.quantiles[:, :, index:], other.quantiles[:, :, index:])
        for name in ("quantiles", "mean", "scale", "heard"):
            mine, theirs = getattr(one, name)[:, :, :index], getattr(other, name)[:, :, :index]
            # entries of the future make the read's products longer, which may round otherwise
            assert_close(mine, theirs, 1e-12, name)
        for mine, theirs in zip(one.traces, other.traces, strict=True):
            assert_close(mine.scores[:, :, :index], theirs.scores[:, :, :index], 1e-10, "scores")
            assert torch.equal(mine.threshold, theirs.threshold)
            for name in ("by_score", "must_keep", "routed"):
                assert torch.equal(getattr(mine, name)[:, :, :index], getattr(theirs, name)[:, :, :index]), name


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("dtype", SAME)
def test_past_is_equal_to_the_bit_at_equal_shapes(share: float, dtype: torch.dtype) -> None:
    network, panel = network_of("learned+tags", 2, dtype), make_panel(seed=4)
    store = make_store(panel)
    index, steps = patch_bounds(store, 4)
    # where nothing is kept any edit leaves the shapes alone, elsewhere what is observed must stay so
    edited = make_store(edit_after(panel, steps, np.random.default_rng(0), same_mask=share > 0))
    policy = policy_for(network, 3, share=share, use_tags=share > 0)
    one, other = read_all(network, store, policy), read_all(network, edited, policy)
    assert one.memory.layers[0].scratchpad.alive.shape == other.memory.layers[0].scratchpad.alive.shape
    assert not torch.equal(one.quantiles[:, :, index:], other.quantiles[:, :, index:])
    for name in ("quantiles", "mean", "scale"):
        assert torch.equal(getattr(one, name)[:, :, :index], getattr(other, name)[:, :, :index]), name
    for mine, theirs in zip(one.traces, other.traces, strict=True):
        assert torch.equal(mine.scores[:, :, :index], theirs.scores[:, :, :index])
        assert torch.equal(mine.routed[:, :, :index], theirs.routed[:, :, :index])


@pytest.mark.parametrize("router", ROUTER_CHOICES)
def test_memory_at_a_step_knows_nothing_after_it(router: str) -> None:
    network, panel = network_of(router), make_panel(seed=5)
    store = make_store(panel)
    ends = store.lengths.numpy() - 10
    edited = make_store(edit_after(panel, ends.tolist(), np.random.default_rng(0)))
    none = [np.array([], dtype=int)] * 3
    policy = policy_for(network, 3, **CAPS)
    one = run(network, store, policy, cutoffs=none, ends=ends)
    other = run(network, edited, policy, cutoffs=none, ends=ends)
    assert one.memory is not None and other.memory is not None
    for (name, mine), theirs in zip(leaves(one.memory).items(), leaves(other.memory).values(), strict=True):
        assert torch.equal(mine, theirs), name


def forecasts(network: HAMNetwork, panel: Panel, future: np.ndarray, cutoffs: list[int], **options: Any) -> np.ndarray:
    store = build_store(panel, patch_steps=PATCH_STEPS, extra_steps=future.shape[1], future=future)
    asked = [np.array([cutoff]) for cutoff in cutoffs]
    return run(network, store, policy_for(network, 3), cutoffs=asked, steps=5, **options).quantiles


def test_a_forecast_reads_nothing_unknown_at_its_cutoff() -> None:
    network, panel = network_of(), make_panel(seed=6)
    cutoffs = [n - 11 for n in LENGTHS]
    future = make_future(panel)
    wanted = forecasts(network, panel, future, cutoffs)
    changed = edit_after(panel, cutoffs, np.random.default_rng(0))
    # what is known ahead stays within the horizon, and changes beyond it
    for item, cutoff in enumerate(cutoffs):
        rows = slice(panel.offsets[item] + cutoff, panel.offsets[item] + cutoff + 5)
        changed.values[rows, FORECAST] = panel.values[rows, FORECAST]
        changed.values[rows, VALVE] = panel.values[rows, VALVE]
    got = forecasts(network, changed, future + 9, cutoffs)
    assert np.array_equal(got, wanted)


@pytest.mark.parametrize("channel, reveal, matters", [
    (LOAD, False, False), (PRICE, False, False), (WIND, False, False), (MODE, True, False), (ALARM, False, False),
    (ALARM, True, True), (FORECAST, False, True), (VALVE, False, True),
])  # fmt: skip
def test_a_forecast_reads_what_is_known_ahead_and_only_that(channel: int, reveal: bool, matters: bool) -> None:
    network, panel = network_of(), make_panel(seed=6)
    cutoffs = [n - 11 for n in LENGTHS]
    future = make_future(panel)
    wanted = forecasts(network, panel, future, cutoffs, reveal_events=reveal)
    values = panel.values.copy()
    for item, cutoff in enumerate(cutoffs):
        values[panel.offsets[item] + cutoff + 4, channel] = 2.5 if channel != MODE else 1
    got = forecasts(network, replace(panel, values=values), future, cutoffs, reveal_events=reveal)
    assert np.array_equal(got, wanted) != matters


def test_a_forecast_at_the_end_reads_the_future_given_and_no_step_more() -> None:
    network, panel = network_of(), make_panel(seed=6)
    future = make_future(panel)
    later, sooner = future.copy(), future.copy()
    later[:, 5:] += 3
    sooner[:, 4] += 3
    wanted = forecasts(network, panel, future, list(LENGTHS))
    assert np.array_equal(forecasts(network, panel, later, list(LENGTHS)), wanted)
    assert not np.array_equal(forecasts(network, panel, sooner, list(LENGTHS)), wanted)


# ---- 2 streaming = batch


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize(
    "window, dtype", [(1, torch.float64), (2, torch.float64), (3, torch.float64), (2, torch.float32)]
)
def test_any_chunks_of_a_stream_give_the_forecasts_of_one_pass(router: str, window: int, dtype: torch.dtype) -> None:
    network, store = network_of(router, window, dtype), make_store(make_panel(seed=7))
    policy = policy_for(network, 3, **CAPS)
    wanted = run(network, store, policy)
    # one size for each window, and patch by patch for all
    for size in {1, (7, 3, 2)[window - 1]}:
        assert_same_run(run(network, store, policy, chunk_patches=size), wanted, SAME[dtype])


def test_a_long_stream_equals_one_pass_over_many_blocks() -> None:
    """Longer than the blocks and chunks in which the ops work."""
    network, panel = network_of("surprise+learned"), make_panel((420,), seed=7)
    store, policy = make_store(panel), policy_for(network, 1, cap_kept=40, cap_must=20)
    options = {"cutoffs": [np.array([420])], "keep_traces": True}
    wanted = run(network, store, policy, chunk_patches=1000, **options)
    assert len(wanted.traces) == 1
    for size in (64, 45):
        assert_same_run(run(network, store, policy, chunk_patches=size, **options), wanted, 1e-10)


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize("dtype", SAME)
def test_a_stream_that_goes_on_gives_the_forecasts_of_one_pass(router: str, dtype: torch.dtype) -> None:
    network, panel = network_of(router, 2, dtype), make_panel(seed=8)
    policy = policy_for(network, 3, **CAPS)
    store = make_store(panel)
    wanted = run(network, store, policy)
    # each item has got another way when the stream is cut: to the middle of a patch, to its edge, to its very end
    known = [31, 22, LENGTHS[2]]
    early = make_store(cut_items(panel, known))
    before = run(network, early, policy, cutoffs=[np.array([n - 1]) for n in known])
    starts = ((early.lead + early.lengths) // PATCH_STEPS).numpy()
    after = run(network, store, policy, memory=before.memory, starts=starts, chunk_patches=5)
    traces, kept, heard = before.traces + after.traces, before.kept + after.kept, before.heard + after.heard
    joined = Rollout(after.quantiles, after.scale, after.memory, traces, kept, heard)
    assert_same_run(joined, wanted, SAME[dtype])


def test_a_forecast_leaves_the_memory_as_it_was() -> None:
    network, store = network_of(), make_store(make_panel(seed=8))
    policy = policy_for(network, 3, **CAPS)
    done = run(network, store, policy)
    assert done.memory is not None
    before = map_tensors(done.memory, torch.clone)
    cutoffs = torch.tensor([c[-1] for c in middle_cutoffs()])
    got, scale = forecast_from(network, store, torch.arange(3), cutoffs, done.memory, HORIZON, policy)
    assert_same_memory(done.memory, before, 0.0)
    last = np.cumsum([len(c) for c in middle_cutoffs()]) - 1
    assert_close(got, torch.from_numpy(done.quantiles[last]), 1e-10, "forecast")
    assert_close(scale, torch.from_numpy(done.scale[last]), 1e-10, "scale")


def test_what_a_forecast_keeps_pushes_nothing_out() -> None:
    network, store = network_of(), make_store(make_panel(seed=8))
    full = {"cap_kept": 5, "cap_must": 2}
    policy = policy_for(network, 3, share=1.0, **full)
    memory = read_all(network, store, policy).memory
    assert all(layer.scratchpad.alive.sum(1).eq(7).all() for layer in memory.layers)
    items, cutoffs = torch.arange(3), store.lengths
    chunk = store.horizon(items, cutoffs, HORIZON)
    got, _ = forecast_from(network, store, items, cutoffs, memory, HORIZON, policy)
    assert chunk.horizon is not None
    asked = chunk.horizon.flatten(1)  # [B, N P]

    def forecast(rule: Policy) -> torch.Tensor:
        with torch.no_grad():
            values = network(chunk, memory, rule).unscaled().flatten(2, 3).transpose(1, 2)  # [B, N P, G, Q]
        return values[asked].view(3, HORIZON, 2, -1).transpose(1, 2)

    assert_close(got, forecast(policy_for(network, 3, share=1.0)), 1e-12, "forecast")
    assert not torch.allclose(got, forecast(policy), rtol=0, atol=1e-3)


@pytest.mark.parametrize("router", ROUTER_CHOICES)
def test_step_by_step_equals_the_parallel_pass(router: str) -> None:
    network, store = network_of(router), make_store(make_panel(seed=9))
    policy = policy_for(network, 3, **CAPS)
    parallel = read_all(network, store, policy)
    stepwise = read_all(network, store, policy, stepwise=True)
    assert_close(stepwise.quantiles, parallel.quantiles, 1e-10, "quantiles")
    assert_same_memory(stepwise.memory, parallel.memory, 1e-10)
    quantiles = torch.cat([reading.quantiles for _, reading in patch_by_patch(network, store, policy)], 2)
    assert_close(quantiles, parallel.quantiles, 1e-10, "quantiles")


@torch.no_grad()
def patch_by_patch(network: HAMNetwork, store: PatchStore, policy: Policy) -> list[tuple[Chunk, Reading]]:
    """A stream that is read one patch at a time."""
    items = torch.arange(store.n_items)
    stop = (store.lead + store.lengths) // store.patch_steps
    memory, found = network.empty_memory(store.n_items), []
    for n in range(int(stop.max())):
        chunk = store.window(items, stop - int(stop.max()) + n, 1)
        reading = network(chunk, memory, policy, stepwise=True)
        memory = reading.memory
        found.append((chunk, reading))
    return found


def test_a_window_with_a_hidden_span_is_read_as_the_stream_reads_it() -> None:
    """Training hides spans of the past; what lies before one must look as it will in a stream."""
    network, store = network_of(), make_store(make_panel(seed=9))
    policy, chunk = policy_for(network, 3), whole_chunk(store)
    span = torch.zeros_like(chunk.observed[:, 0])
    span[:, 9:12] = True
    hidden = span[:, None] & torch.tensor([c.role in ("target", "past") for c in CHANNELS])[:, None, None]
    with torch.no_grad():
        reading = network(
            replace(chunk, observed=chunk.observed & ~hidden, horizon=span), network.empty_memory(3), policy
        )
    wanted = read_all(network, store, policy)
    assert_close(reading.quantiles[:, :, :9], wanted.quantiles[:, :, :9], 1e-12, "quantiles")
    assert not torch.allclose(reading.quantiles[:, :, 9:12], wanted.quantiles[:, :, 9:12], atol=1e-3)


def test_nothing_is_kept_of_an_unfinished_patch() -> None:
    network, panel = network_of("innovation+tags"), make_panel(seed=9)
    cutoffs = torch.tensor([n - 8 for n in LENGTHS])
    for item, cutoff in enumerate(cutoffs.tolist()):
        panel.values[panel.offsets[item] + cutoff - 2 : panel.offsets[item] + cutoff + HORIZON] = 1 + item
    store = make_store(panel)
    chunk = store.horizon(torch.arange(3), cutoffs, HORIZON)
    unfinished = chunk.observed[:, [LOAD, PRICE, WIND, ALARM], 0].any(-1)
    assert unfinished.any() and chunk.tags[:, ALARM, 0].any()
    known = torch.tensor([c.role in ("future", "action") for c in CHANNELS])
    with torch.no_grad():
        reading = network(chunk, network.empty_memory(3), policy_for(network, 3, share=1.0))
    for trace in reading.traces:
        assert not trace.routed[:, ~known].any()
        assert torch.equal(trace.routed[:, known], (reading.heard >= 0.5)[:, known])
        assert trace.routed.any()


# ---- 3 budget and 4 must-keep


@pytest.mark.parametrize("router, window", [*zip(ROUTER_CHOICES, (1, 2, 3, 1, 2), strict=True), ("learned+tags", 3)])
def test_each_list_holds_its_newest_tokens_at_every_step(router: str, window: int) -> None:
    network, store = network_of(router, window), make_store(make_panel(seed=10))
    policy = policy_for(network, 3, **CAPS)
    evicted = {"kept": 0, "must": 0}
    asked: dict[tuple[int, int, str], list[tuple[float, int]]] = {}
    for step, (chunk, reading) in enumerate(patch_by_patch(network, store, policy)):
        for layer, trace in enumerate(reading.traces):
            for b, c, _ in trace.routed.nonzero().tolist():
                kind = "must" if trace.must_keep[b, c, 0] else "kept"
                asked.setdefault((layer, b, kind), []).append((float(chunk.position[b, 0]), c))
            for item in range(store.n_items):
                position = float(chunk.position[item, 0])
                for kind in ("kept", "must"):
                    left = [place for place in asked.get((layer, item, kind), []) if place[0] <= position - window]
                    cap = CAPS[f"cap_{kind}"]
                    evicted[kind] += len(left) > cap
                    places = places_of(reading.memory.layers[layer], item, must_keep=kind == "must")
                    assert places == left[-cap:], f"step {step}, layer {layer}, item {item}, {kind}"
    tags, scores = "tags" in router, router != "tags"
    assert bool(evicted["must"]) == tags and bool(evicted["kept"]) == scores


def test_bytes_are_those_of_the_live_tensors_and_within_the_budget() -> None:
    network = make_network()
    store = make_store(take_items(make_panel(seed=11), [0]))
    for budget in (0, 7000):
        network.memory_config = replace(network.memory_config, budget_bytes=budget, must_keep_share=0.2)
        policy = network.policy(torch.tensor([1.0]))
        assert policy.cap_kept is not None and policy.cap_must is not None
        room = (policy.cap_kept + policy.cap_must) * network.config.layers * network.entry_bytes()
        assert budget - network.config.layers * network.entry_bytes() < room <= budget
        most = 0
        for _, reading in patch_by_patch(network, store, policy):
            pads = [layer.scratchpad for layer in reading.memory.layers]
            stored = sum(tensor.nbytes for pad in pads for tensor in leaves(pad).values())
            assert stored == sum(int(pad.alive.sum()) for pad in pads) * network.entry_bytes()
            most = max(most, stored)
        assert most == room


@pytest.mark.parametrize("router", ["surprise+learned", "learned+tags"])
def test_budget_zero_is_state_and_window_alone(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, store = network_of(router), make_store(make_panel(seed=12))
    reading = read_all(network, store, policy_for(network, 3, share=0.0))
    full = read_all(network, store, policy_for(network, 3, share=1.0))
    assert all(not trace.routed.any() and not trace.must_keep.any() for trace in reading.traces)
    assert all(layer.scratchpad.alive.shape[1] == 0 for layer in reading.memory.layers)
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda queries, **given: attend(queries, **{**given, "scratch": None}))
    alone = read_all(network, store, policy_for(network, 3, share=1.0))
    assert_close(reading.quantiles, alone.quantiles, 1e-12, "quantiles")
    assert not torch.allclose(full.quantiles, alone.quantiles, atol=1e-3)


@pytest.mark.parametrize("router", ["learned+tags", "surprise+tags"])
@pytest.mark.parametrize("share, caps", [(1.0, {}), (0.3, {}), (0.3, CAPS)])
@pytest.mark.parametrize("cross", [True, False])
def test_read_is_a_dense_softmax_over_what_may_be_seen(
    router: str, share: float, caps: dict[str, int], cross: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, store = network_of(router, 3), make_store(make_panel(seed=13))
    policy = replace(policy_for(network, 3, share=share, **caps), readable=network.readable(torch.full((3,), cross)))
    reads: list[tuple[Any, ...]] = []
    original = ham.HAMLayer._read

    def spy(layer: ham.HAMLayer, queries: torch.Tensor, decision: Any, *rest: Any) -> Any:
        result = original(layer, queries, decision, *rest)
        reads.append((layer, queries, decision.local, decision.routed, result[0]))
        return result

    monkeypatch.setattr(ham.HAMLayer, "_read", spy)
    read_all(network, store, policy)
    assert len(reads) == network.config.layers
    for layer, queries, local, routed, result in reads:
        if share == 1.0:
            assert torch.equal(routed, local.routable | local.must_keep)
        output, marks = dense_read(layer, queries, local, routed, policy)
        assert_close(result.output, output, 1e-10, "output")
        assert_close(result.marks, marks, 1e-10, "marks")


def test_a_tagged_step_is_kept_at_query_time_while_its_quota_allows() -> None:
    network, panel = network_of("learned+tags"), make_panel(seed=14)
    values = panel.values.copy()
    values[:, ALARM], values[:, VALVE] = 0.0, 1.0
    tagged_at = [4, 13, 25]
    values[tagged_at, ALARM] = 1.0
    store = make_store(replace(panel, values=values))
    # the alarm itself and, where they were observed, both targets at the same moment
    observed = whole_chunk(store).observed[0].any(-1)
    expected = [[(t // 3, c) for c in (LOAD, PRICE, ALARM) if observed[c, t // 3]] for t in tagged_at]
    quota = len(expected[1]) + len(expected[2])
    done = read_all(network, store, policy_for(network, 3, share=0.9, cap_kept=3, cap_must=quota))
    newest = [(float(patch), channel) for patch, channel in expected[1] + expected[2]]
    for layer in done.memory.layers:
        assert places_of(layer, 0, must_keep=True) == newest
        assert len(places_of(layer, 0, must_keep=False)) == 3
        assert not places_of(layer, 1, must_keep=True)


@pytest.mark.parametrize("router", ["learned", "surprise"])
def test_tags_keep_nothing_where_the_router_leaves_them_out(router: str) -> None:
    network, store = network_of(router), make_store(make_panel(seed=14))
    reading = read_all(network, store, policy_for(network, 3, share=0.5))
    assert whole_chunk(store).tags.any()
    for layer, trace in zip(reading.memory.layers, reading.traces, strict=True):
        assert not trace.must_keep.any() and not layer.scratchpad.must_keep.any()
        assert torch.equal(trace.routed, trace.by_score.any(-1))


# ---- 5 missing is not surprising


@pytest.mark.parametrize("router", ["surprise", "innovation+tags", "surprise+learned"])
def test_what_was_not_observed_is_never_kept_for_its_score(router: str) -> None:
    network, store = network_of(router), make_store(make_panel(seed=15))
    chunk = whole_chunk(store)
    share = chunk.observed.double().mean(-1)
    reading = read_all(network, store, policy_for(network, 3, share=1.0))
    tagged = chunk.tags.any(-1)
    event = torch.arange(7)[:, None] == ALARM
    for trace in reading.traces:
        assert torch.equal(trace.by_score.any(-1), ~event & (tagged | (share >= 0.5)))
        assert not (trace.routed & ~tagged & (share == 0)).any()


def test_a_gap_writes_nothing() -> None:
    network, panel = network_of(), make_panel((60,), seed=16)
    values = panel.values.copy()
    values[36:54] = np.nan
    store = make_store(replace(panel, values=values))
    policy = policy_for(network, 1)
    steps = patch_by_patch(network, store, policy)
    before, after = steps[11][1].memory, steps[17][1].memory
    for mine, other in zip(after.layers, before.layers, strict=True):
        # the same state, smaller
        ratio = (mine.state * other.state).sum((-2, -1)) / other.state.square().sum((-2, -1))  # [B, C, H]
        assert ((ratio > 0) & (ratio < 1)).all()
        assert_close(mine.state, other.state * ratio[..., None, None], 1e-12, "state")
        mean, earlier = (part.error_mean[..., 0] / part.error_mean[..., 1] for part in (mine, other))
        assert_close(mean.nan_to_num(), earlier.nan_to_num(), 1e-12, "running error")
        # what was in the window may have moved to the scratchpad, nothing later
        assert entries_of(mine, 0)[".position"].max() <= 11
    assert_close(steps[17][1].scale, steps[11][1].scale, 1e-12, "scale")
    assert_close(steps[17][1].mean, steps[11][1].mean, 1e-12, "mean")


def test_a_stream_of_gaps_leaves_nothing() -> None:
    network, panel = network_of("surprise+learned"), make_panel((30,), seed=16)
    store = make_store(replace(panel, values=np.full_like(panel.values, np.nan)))
    reading = read_all(network, store, policy_for(network, 1, share=1.0))
    for layer in reading.memory.layers:
        assert not layer.state.any() and not layer.error_mean.any() and not layer.scratchpad.alive.any()
    assert reading.quantiles.isfinite().all()


@pytest.mark.parametrize("garbage", [1e12, -3.0, np.nan])
def test_what_stands_where_nothing_was_observed_is_never_read(garbage: float) -> None:
    network, store = network_of(), make_store(make_panel(seed=17))
    policy, chunk = policy_for(network, 3), whole_chunk(store)
    horizon = store.horizon(torch.arange(3), store.lengths - 4, HORIZON)
    for part in (chunk, horizon):
        dirty = replace(
            part,
            values=torch.where(part.observed, part.values, garbage),
            truth=torch.full_like(part.truth, garbage),
        )
        wanted = network(part, network.empty_memory(3), policy)
        got = network(dirty, network.empty_memory(3), policy)
        assert torch.equal(got.quantiles, wanted.quantiles)
        for (name, mine), other in zip(leaves(got.memory).items(), leaves(wanted.memory).values(), strict=True):
            assert torch.equal(mine, other), name


# ---- 6 independence


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize("dtype", SAME)
def test_an_item_alone_equals_the_item_in_any_batch(router: str, dtype: torch.dtype) -> None:
    network, panel = network_of(router, 2, dtype), make_panel(seed=19)
    cutoffs, options = middle_cutoffs(), {"chunk_patches": 7}
    order = [2, 0, 1, 0]
    batch = take_items(panel, order)
    store = build_store(batch, patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[order])
    policy = policy_for(network, 4, **CAPS)
    together = run(network, store, policy, cutoffs=[cutoffs[i] for i in order], **options)
    first = np.cumsum([0] + [len(cutoffs[i]) for i in order])
    for row, item in enumerate(order):
        single = build_store(
            take_items(panel, [item]), patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[[item]]
        )
        alone = run(network, single, policy_for(network, 1, **CAPS), cutoffs=[cutoffs[item]], **options)
        got = together.quantiles[first[row] : first[row + 1]]
        apart = np.abs(got - alone.quantiles) / alone.scale[:, :, None, None]
        assert apart.max() <= SAME[dtype], f"item {item} in row {row}"
        assert together.memory is not None and alone.memory is not None
        assert_same_memory(together.memory.select(torch.tensor([row])), alone.memory, SAME[dtype])


@pytest.mark.parametrize("dtype", SAME)
def test_items_and_padding_of_a_continued_batch_do_not_matter(dtype: torch.dtype) -> None:
    network, panel = network_of("innovation+tags", 2, dtype), make_panel(seed=20)
    store, policy = make_store(panel), policy_for(network, 3, **CAPS)
    none = [np.array([], dtype=int)] * 3
    ends = np.array([20, 40, 29])
    half = run(network, store, policy, cutoffs=none, ends=ends)
    assert half.memory is not None
    starts = (store.lead.numpy() + ends) // PATCH_STEPS
    later = [cuts[(lead + cuts) // PATCH_STEPS >= start] for cuts, lead, start in
             zip(middle_cutoffs(), store.lead.numpy(), starts, strict=True)]  # fmt: skip
    together = run(network, store, policy, cutoffs=later, memory=half.memory, starts=starts)
    for item in range(3):
        single = take_items(panel, [item])
        alone_store = build_store(
            single, patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[[item]]
        )
        row = torch.tensor([item])
        alone = run(network, alone_store, policy_for(network, 1, **CAPS), cutoffs=[later[item]],
                    memory=half.memory.select(row), starts=starts[[item]])  # fmt: skip
        assert together.memory is not None and alone.memory is not None
        assert_same_memory(together.memory.select(row), alone.memory, SAME[dtype])


def test_cutoffs_that_are_not_read_are_refused() -> None:
    network, panel = network_of("tags"), make_panel(seed=20)
    store, policy = make_store(panel), policy_for(network, 3, **CAPS)
    with pytest.raises(ValueError, match="first and the last step read"):
        run(network, store, policy, starts=np.array([19, 19, 19]))


def test_streams_read_from_somewhere_on_know_nothing_of_before() -> None:
    network, panel = network_of("surprise+learned"), make_panel(seed=20)
    starts, lead = np.array([12, 9, 3]), np.array([0, 5, 2])
    policy, rng = policy_for(network, 3, **CAPS), np.random.default_rng(0)
    values = panel.values.copy()
    for item, start in enumerate(starts):
        rows = slice(panel.offsets[item], panel.offsets[item] + start * PATCH_STEPS - lead[item])
        values[rows] = rng.normal(size=values[rows].shape)
        values[rows, MODE] = 2
    # a change of the action at the start is a tag that the rows before it make
    values[panel.offsets[:-1] + starts * PATCH_STEPS - lead - 1, VALVE] = panel.values[
        panel.offsets[:-1] + starts * PATCH_STEPS - lead - 1, VALVE
    ]
    one = run(network, make_store(panel), policy, starts=starts)
    two = run(network, make_store(replace(panel, values=values)), policy, starts=starts)
    assert np.array_equal(one.quantiles, two.quantiles)
    assert one.memory is not None and two.memory is not None
    assert_same_memory(two.memory, one.memory, 0.0)
    for item in range(3):
        single = build_store(
            take_items(panel, [item]), patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[[item]]
        )
        cutoffs = [middle_cutoffs()[item]]
        alone = run(network, single, policy_for(network, 1, **CAPS), cutoffs=cutoffs, starts=starts[[item]])
        assert alone.memory is not None
        assert_same_memory(one.memory.select(torch.tensor([item])), alone.memory, 1e-10)


@pytest.mark.parametrize("router", ROUTER_CHOICES)
def test_order_of_columns_does_not_matter(router: str) -> None:
    network, panel = network_of(router), make_panel(seed=21)
    order = [ALARM, PRICE, MODE, VALVE, LOAD, FORECAST, WIND]
    channels = tuple(panel.schema.channels[i] for i in order)
    assert panel.event_offset is not None
    permuted = replace(
        panel,
        values=panel.values[:, order],
        event_offset=panel.event_offset[:, order],
        schema=replace(panel.schema, channels=channels),
    )
    other = permuted_network(network, order)
    store = make_store(panel)
    moved = build_store(permuted, patch_steps=PATCH_STEPS, extra_steps=HORIZON, future=make_future(panel)[..., order])
    policy = policy_for(network, 3)
    one = run(network, store, policy)
    two = run(other, moved, policy)
    # the price stands before the load now
    apart = np.abs(two.quantiles[:, ::-1] - one.quantiles) / one.scale[:, :, None, None]
    assert apart.max() <= 1e-10
    for mine, theirs in zip(two.traces, one.traces, strict=True):
        for layer, wanted in zip(mine.layers, theirs.layers, strict=True):
            assert torch.equal(layer.routed, wanted.routed[:, order])


def permuted_network(network: HAMNetwork, order: list[int]) -> HAMNetwork:
    """The same network for the same columns in another order."""
    spec = replace(
        network.spec,
        roles=tuple(network.spec.roles[i] for i in order),
        levels=tuple(network.spec.levels[i] for i in order),
    )
    other = HAMNetwork(network.config, network.memory_config, spec).double().eval()
    state = dict(network.state_dict())
    for name in ("backbone.embedding.channel", "unit", "adaptive"):
        state[name] = state[name][order]
    other.load_state_dict(state)
    return other


# ---- 7 equivariance


def prices(rng: np.random.Generator) -> np.ndarray:
    """A target with gaps whose first patch says how much it varies: the floor of the scale does not move with it."""
    values = 40 + np.cumsum(rng.normal(size=sum(LENGTHS)))
    values[rng.random(len(values)) < 0.1] = np.nan
    for start in np.cumsum((0, *LENGTHS[:-1])):
        values[start : start + 4] = 40 + rng.normal(size=4)
    return values


@pytest.mark.parametrize("factor, shift", [(1.0, 1e6), (1e3, 0.0), (1e6, -1e6), (0.5, 3.0)])
@pytest.mark.parametrize("dtype", SAME)
def test_shift_and_scale_of_a_target_shift_and_scale_its_forecast(
    factor: float, shift: float, dtype: torch.dtype
) -> None:
    network, panel = network_of("learned+tags", 2, dtype), make_panel(seed=22)
    panel = replace(panel, starts=np.repeat(panel.starts[:1], 3))
    panel.values[:, PRICE] = prices(np.random.default_rng(22))
    values = panel.values.copy()
    values[:, PRICE] = factor * values[:, PRICE] + shift
    policy = policy_for(network, 3)
    one = run(network, make_store(panel), policy)
    two = run(network, make_store(replace(panel, values=values)), policy)
    back = two.quantiles.copy()
    back[:, 1] = (back[:, 1] - shift) / factor
    apart = np.abs(back - one.quantiles) / one.scale[:, :, None, None]
    # values near 1e6 keep ten digits of their own; where the network is float32, so are the levels it compares
    assert apart.max() <= (1e-6 if dtype == torch.float64 else 1e-4)
    assert np.allclose(two.scale[:, 1], factor * one.scale[:, 1], rtol=1e-6)
    assert np.allclose(two.scale[:, 0], one.scale[:, 0], rtol=1e-12)


def test_equivariance_ends_at_the_scale_floor() -> None:
    network, panel = network_of(), make_panel(seed=22)
    values = panel.values.copy()
    values[:, PRICE] = 5.0 + 1e-9 * values[:, PRICE]
    got = run(network, make_store(replace(panel, values=values)), policy_for(network, 3))
    floor = 1e-3 * float(network.unit[PRICE])
    assert np.allclose(got.scale[:, 1], floor)
    assert np.abs(got.quantiles[:, 1] - 5.0).max() < 30 * floor


@pytest.mark.parametrize("shift", [0.0, 37.3])
def test_a_stream_that_is_never_below_its_bound_has_no_forecast_below_it(shift: float) -> None:
    network, panel = network_of("learned+tags", 2, torch.float32), make_panel(seed=22)
    rng = np.random.default_rng(22)
    steps = len(panel.values)
    panel.values[:, LOAD] = shift + np.where(rng.random(steps) < 0.6, 0.0, rng.gamma(2.0, size=steps) * 3)
    got = run(network, make_store(panel), policy_for(network, 3)).quantiles[:, 0]
    assert (got >= shift).all()
    assert 0.05 < (got == shift).mean() < 0.95


# ---- 8 parity: the ops have their own tests


@pytest.mark.parametrize("router", ["learned+tags", "surprise+learned"])
def test_network_on_fast_ops_equals_the_one_on_naive_ops(router: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, store = network_of(router, 3), make_store(make_panel((40, 25), seed=23))
    policy = policy_for(network, 2, **CAPS)

    def results() -> tuple[Reading, list[torch.Tensor | None]]:
        reading = network(whole_chunk(store), network.empty_memory(2), policy)
        # every quantile weighs differently, so that no mistake cancels
        weight = torch.linspace(-1, 1, reading.quantiles.numel(), dtype=torch.float64).view(reading.quantiles.shape)
        loss = (weight * reading.quantiles + 0.5 * weight * reading.quantiles**2).sum()
        return reading, list(torch.autograd.grad(loss, list(network.parameters()), allow_unused=True))

    fast, fast_grads = results()
    monkeypatch.setattr(kernels, "attend", naive.attend)
    monkeypatch.setattr(kernels, "gated_delta", naive.gated_delta)
    slow, slow_grads = results()
    assert_close(fast.quantiles, slow.quantiles, 1e-10, "quantiles")
    assert_same_memory(fast.memory, slow.memory, 1e-10)
    for (name, _), got, wanted in zip(network.named_parameters(), fast_grads, slow_grads, strict=True):
        assert (got is None) == (wanted is None), name
        if got is not None and wanted is not None:
            assert_close(got, wanted, 1e-10, f"gradient of {name}")
    for mine, other in zip(fast.traces, slow.traces, strict=True):
        assert torch.equal(mine.routed, other.routed)
        assert_close(mine.entries_mass, other.entries_mass, 1e-10, "mass")


# ---- 9 determinism


def test_same_seed_gives_the_same_bytes_and_gradients() -> None:
    def results() -> list[torch.Tensor]:
        config = make_config(dropout=0.2)
        network, store = make_network(config, dtype=torch.float32).train(), make_store(make_panel(seed=24))
        torch.manual_seed(3)
        explore = torch.Generator().manual_seed(5)
        policy = policy_for(network, 3, explore_share=0.2, explore_generator=explore, **CAPS)
        reading = network(whole_chunk(store), network.empty_memory(3), policy)
        reading.quantiles.square().mean().backward()
        grads = [p.grad for p in network.parameters() if p.grad is not None]
        return [reading.quantiles, *leaves(reading.memory).values(), *grads]

    for mine, other in zip(results(), results(), strict=True):
        assert torch.equal(mine, other)


# ---- gradients


@pytest.mark.parametrize("router", ROUTER_CHOICES)
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_gradients_are_finite_with_gaps_padding_and_empty_scratchpads(router: str, share: float) -> None:
    network, panel = network_of(router, 2, torch.float32), make_panel(seed=25)
    values = panel.values.copy()
    values[: LENGTHS[0]] = np.nan
    store = make_store(replace(panel, values=values))
    network.zero_grad()
    past = network(whole_chunk(store), network.empty_memory(3), policy_for(network, 3, share=share, **CAPS))
    horizon = store.horizon(torch.arange(3), store.lengths, HORIZON)
    ahead = network(horizon, past.memory, policy_for(network, 3, share=share))
    loss = past.quantiles.square().mean() + ahead.quantiles.square().mean()
    for trace in (*past.traces, *ahead.traces):
        loss = loss + trace.entries_bias.sum()
    loss.backward()
    moved = 0
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            moved += bool(parameter.grad.any())
    assert moved > 40
