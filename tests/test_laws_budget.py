"""Laws 3, 4 and 5: the budget, what must be kept, and that missing is not surprising.

On a network with gaps, tags and channels of every role.

B items · I items · C channels · G targets · N patches · P steps in a patch · F future steps · Q quantiles
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from laws import CAPS, assert_close, entries_of, network_of, patch_by_patch
from networks import (
    ALARM,
    HORIZON,
    LOAD,
    PRICE,
    ROUTER_CHOICES,
    VALVE,
    dense_read,
    leaves,
    make_network,
    make_panel,
    make_store,
    policy_for,
    read_all,
    take_items,
    whole_chunk,
)

from hamts.nn import ham
from hamts.nn.scratchpad import LayerMemory
from hamts.ops import kernels


def places_of(memory: LayerMemory, item: int, *, must_keep: bool | None = None) -> list[tuple[float, int]]:
    """Position and channel of live entries, of both lists or one."""
    found = entries_of(memory, item)
    chosen = torch.ones_like(found[".alive"]) if must_keep is None else found[".must_keep"] == must_keep
    return list(zip(found[".position"][chosen].tolist(), found[".channel"][chosen].tolist(), strict=True))


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
