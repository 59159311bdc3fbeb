"""Every score by hand, and every router under the laws: causal, the same in a stream, the same in any batch.

B items · C channels · N patches · H heads · V value · P steps in a patch · Q quantiles · S score routers
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from laws import CAPS, assert_same_memory, assert_same_run, edit_after, patch_bounds, patch_by_patch, run
from networks import (
    make_config,
    make_network,
    make_panel,
    make_store,
    policy_for,
    random_tokens,
    read_all,
    take_items,
)
from test_layer_parts import make_entries

from hamts.config import ModelConfig
from hamts.nn.allocation import update_tables
from hamts.nn.budget import ThresholdTable
from hamts.nn.clipped import clipped_delta
from hamts.nn.ham import HAMLayer
from hamts.nn.router import loudest_channel
from hamts.nn.scores import as_level, causal_sums, from_level, normalised_error, residual, uncertainty, write_size
from hamts.nn.steps import StepEntries, step_features
from hamts.ops import naive
from hamts.reader import HAMNetwork
from hamts.training_auxiliary import _gains, score_loss

CHOICES: dict[str, dict[str, Any]] = {
    "error+tags": {},
    "write": {},
    "uncertainty": {},
    "residual+tags": {},
    "mix+tags": {},
    "learned": {"learned_features": "token"},
    "surprise+tags": {"decision": "step", "head_reduction": "min"},
    "error": {"allocation": "normalised", "head_reduction": "max"},
    "innovation+tags": {"allocation": "learned"},
    "learned+tags": {"allocation": "pooled"},
    "mix": {"write_clip": 2.0},
    "write+tags": {"resolution": "step"},
}


def network_of(router: str, **changes: Any) -> HAMNetwork:
    return make_network(make_config(router=router, **{**CHOICES.get(router, {}), **changes}))


# ---- scores


def test_error_and_write_by_hand() -> None:
    error = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    values = torch.tensor([[6.0, 8.0], [1.0, 0.0], [0.0, 0.0]])
    assert normalised_error(error, values).tolist() == [0.5, 0.0, 1.0]
    assert write_size(error, torch.tensor([0.5, 1.0, 0.25])).tolist() == [2.5, 0.0, 0.25]


def test_doubt_and_its_outcome_by_hand() -> None:
    quantiles = torch.tensor([[[-1.0, 0.0, 3.0], [0.0, 2.0, 4.0]]])
    assert uncertainty(quantiles).tolist() == [4.0]
    values, observed = torch.tensor([[1.5, 90.0]]), torch.tensor([[True, True]])
    # 90 counts as 8, the most that a value can say
    assert residual(quantiles, values, observed).tolist() == [(1.5 + 6.0) / 2]
    assert residual(quantiles, values, torch.tensor([[True, False]])).tolist() == [1.5]
    assert residual(quantiles, values, torch.tensor([[False, False]])).tolist() == [0.0]


def test_levels_are_logarithms_where_scores_are_never_negative() -> None:
    on_log_scale = torch.tensor([True, False])
    scores = torch.tensor([[2.0, -3.0], [0.5, 4.0]])
    levels = as_level(scores, on_log_scale)
    assert torch.allclose(levels[:, 0], scores[:, 0].log()) and torch.equal(levels[:, 1], scores[:, 1])
    assert torch.allclose(from_level(levels, on_log_scale), scores)


def test_forgetting_sums_equal_a_loop_in_any_chunks() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(2, 3, 30, 2, 3, generator=generator, dtype=torch.float64)
    total, wanted = torch.zeros(2, 3, 2, 3, dtype=torch.float64), []
    for n in range(30):
        wanted.append(total)
        total = 0.5 ** (1 / 7) * total + terms[:, :, n]
    carried, parts = torch.zeros(2, 3, 2, 3, dtype=torch.float64), []
    for low, high in ((0, 1), (1, 12), (12, 30)):
        before, carried = causal_sums(terms[:, :, low:high], carried, 7.0)
        parts.append(before)
    assert torch.allclose(torch.cat(parts, 2), torch.stack(wanted, 2), rtol=1e-12)
    assert torch.allclose(carried, total, rtol=1e-12)


def test_a_moment_has_the_score_of_its_loudest_channel_that_may_be_kept() -> None:
    scores = torch.tensor([[[1.0], [5.0]], [[3.0], [9.0]], [[7.0], [8.0]]])[None]  # [1, 3, 2, 1]
    routable = torch.tensor([[[True, True], [True, False], [False, False]]])
    assert loudest_channel(scores, routable)[0, :, :, 0].T.tolist() == [[3.0] * 3, [5.0] * 3]
    nothing = loudest_channel(scores, torch.zeros_like(routable))
    assert torch.equal(nothing, scores)


# ---- laws


@pytest.mark.parametrize("router", CHOICES)
def test_no_router_looks_ahead(router: str) -> None:
    network, panel = network_of(router), make_panel(seed=3)
    store = make_store(panel)
    index, steps = patch_bounds(store, 5)
    edited = make_store(edit_after(panel, steps, np.random.default_rng(0)))
    policy = policy_for(network, 3, **CAPS)
    one, other = read_all(network, store, policy), read_all(network, edited, policy)
    assert not torch.equal(one.quantiles[:, :, index:], other.quantiles[:, :, index:])
    assert torch.allclose(one.quantiles[:, :, :index], other.quantiles[:, :, :index], rtol=0, atol=1e-12)
    for mine, theirs in zip(one.traces, other.traces, strict=True):
        assert torch.allclose(mine.scores[:, :, :index], theirs.scores[:, :, :index], rtol=0, atol=1e-10)
        assert torch.equal(mine.routed[:, :, :index], theirs.routed[:, :, :index])
        assert mine.routed[:, :, :index].any()


@pytest.mark.parametrize("router", CHOICES)
def test_a_stream_scores_as_one_pass(router: str) -> None:
    network, store = network_of(router), make_store(make_panel(seed=7))
    policy = policy_for(network, 3, **CAPS)
    wanted = run(network, store, policy)
    assert_same_run(run(network, store, policy, chunk_patches=5), wanted, 1e-10)
    parallel = read_all(network, store, policy)
    steps = patch_by_patch(network, store, policy)
    quantiles = torch.cat([reading.quantiles for _, reading in steps], 2)
    assert torch.allclose(quantiles, parallel.quantiles, rtol=0, atol=1e-10)
    assert_same_memory(steps[-1][1].memory, parallel.memory, 1e-10)


@pytest.mark.parametrize("router", CHOICES)
def test_an_item_alone_scores_as_in_a_batch(router: str) -> None:
    network, panel = network_of(router), make_panel(seed=19)
    together = run(network, make_store(panel), policy_for(network, 3, **CAPS), chunk_patches=7)
    assert together.memory is not None
    for item in (0, 2):
        alone = run(
            network, make_store(take_items(panel, [item])), policy_for(network, 1, **CAPS),
            cutoffs=[np.array([], dtype=int)], chunk_patches=7,
        )  # fmt: skip
        assert alone.memory is not None
        assert_same_memory(together.memory.select(torch.tensor([item])), alone.memory, 1e-10)


@pytest.mark.parametrize("router", ["uncertainty", "residual+tags", "mix+tags"])
def test_the_inner_head_learns_and_nothing_else_does_from_it(router: str) -> None:
    network, store = network_of(router), make_store(make_panel(seed=7))
    network.train()
    reading = network(read_chunk(store), network.empty_memory(3), policy_for(network, 3))
    losses = [trace.inner_loss for trace in reading.traces]
    assert all(loss is not None and loss > 0 for loss in losses)
    sum(losses).backward()  # type: ignore[union-attr]
    moved = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all(".router.inner." in name for name in moved)


def read_chunk(store: Any) -> Any:
    items = torch.arange(store.n_items)
    stop = (store.lead + store.lengths) // store.patch_steps
    return store.window(items, stop - int(stop.max()), int(stop.max()))


def test_a_learned_score_of_the_token_alone_does_not_see_the_state() -> None:
    for features, moves in (("token", False), ("state", True)):
        network = make_network(make_config(router="learned", learned_features=features, layers=1))
        store, layer = make_store(make_panel(seed=7)), network.backbone.layers()[0]
        policy = policy_for(network, 3)
        one = read_all(network, store, policy).traces[0].scores
        with torch.no_grad():
            layer.conv.mul_(0.5)
        assert torch.equal(read_all(network, store, policy).traces[0].scores, one) != moves


# ---- allocation


def usage_by_layer(network: HAMNetwork, store: Any, share: float) -> list[float]:
    reading = read_all(network, store, policy_for(network, 3, share=share, use_tags=False))
    able = (reading.heard >= 0.5)[:, :, :]
    return [float((trace.routed & able).sum() / able.sum()) for trace in reading.traces]


@pytest.mark.parametrize("allocation", ["uniform", "pooled", "learned"])
def test_a_pooled_threshold_lets_layers_differ_and_keeps_the_whole(allocation: str) -> None:
    network, store = network_of("surprise", allocation=allocation), make_store(make_panel((300, 200, 100), seed=5))
    for _ in range(3):
        # what a layer is told depends on the one below
        scores = read_all(network, store, policy_for(network, 3, share=0.25, use_tags=False))
        samples = [trace.scores[scores.heard >= 0.5] for trace in scores.traces]
        update_tables(network.backbone.layers(), samples, allocation, calibrate=True)
    tables = [layer.thresholds.values for layer in network.backbone.layers()]
    assert torch.equal(tables[0], tables[1]) == (allocation != "uniform")
    usage = usage_by_layer(network, store, 0.25)
    # events cannot be kept by their score
    assert np.mean(usage) == pytest.approx(0.25, abs=0.03)
    assert (abs(usage[0] - usage[1]) > 0.03) == (allocation != "uniform")


@pytest.mark.parametrize("rule", ["quantile", "feedback", "block"])
def test_thresholds_that_follow_the_scores_keep_to_each_layer_s_part(rule: str) -> None:
    """One threshold for all layers gives the first more; the rules that move thresholds must not even that out."""
    network, store = network_of("surprise", allocation="pooled"), make_store(make_panel((900, 700, 500), seed=5))
    reading = read_all(network, store, policy_for(network, 3, share=0.25, use_tags=False))
    samples = [trace.scores[reading.heard >= 0.5] for trace in reading.traces]
    # where the second layer has less to say, nearly all is the first one's
    samples[1] = samples[1] - float(samples[0].amax())
    update_tables(network.backbone.layers(), samples, "pooled", calibrate=True)
    first, second = (float(layer.thresholds.part(torch.tensor([0.25]))) for layer in network.backbone.layers())
    assert (first + second) / 2 == pytest.approx(0.25, abs=0.01) and first > 10 * second
    tracked = read_all(network, store, policy_for(network, 3, share=0.25, use_tags=False, threshold=rule))
    able = tracked.heard >= 0.5
    usage = [float((trace.routed & able).sum() / able.sum()) for trace in tracked.traces]
    assert usage[0] == pytest.approx(first, abs=0.06)
    # its scores are not those of the sample: the second layer's threshold comes down to them
    assert usage[1] < 0.3 * usage[0]


def test_parts_are_followed_in_a_fit_and_kept_by_a_finer_table() -> None:
    one, two = (ThresholdTable(1, allocation="pooled") for _ in range(2))
    scores = torch.linspace(0, 1, 1000)[:, None]
    halves = scores[500:], scores[:500]
    counted = torch.ones(500, dtype=torch.bool)
    for table, own in zip((one, two), halves, strict=True):
        table.follow(scores, torch.ones(1000, dtype=torch.bool), own=(own, counted))
    asked = torch.tensor([0.0, 0.1, 0.25, 1.0])
    assert one.part(asked)[:, 0].tolist() == pytest.approx([0.0, 0.2, 0.5, 1.0], abs=0.01)
    assert two.part(asked)[:3, 0].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=0.01)
    finer = one.finer(0.01)
    assert finer.part(asked)[:, 0].tolist() == pytest.approx(one.part(asked)[:, 0].tolist(), abs=1e-6)


def test_tables_of_before_there_were_parts_follow_the_share_itself() -> None:
    plain, pooled = ThresholdTable(1), ThresholdTable(1, allocation="pooled")
    assert "parts" in pooled.state_dict() and "parts" not in plain.state_dict()
    earlier = {name: value for name, value in pooled.state_dict().items() if name != "parts"}
    pooled.parts.fill_(0.5)  # type: ignore[union-attr]
    pooled.load_state_dict(earlier)
    asked = torch.tensor([0.02, 0.1, 0.6])
    assert torch.allclose(pooled.part(asked), plain.part(asked), atol=1e-6)


def test_streams_against_their_own_past_get_alike_shares() -> None:
    """One channel is always surprising, another never: against one threshold the first takes it all."""
    spread = {}
    for allocation in ("uniform", "normalised"):
        network, store = network_of("error", allocation=allocation), make_store(make_panel((300, 200, 100), seed=5))
        reading = read_all(network, store, policy_for(network, 3, share=0.25, use_tags=False))
        samples = [trace.scores[reading.heard >= 0.5] for trace in reading.traces]
        update_tables(network.backbone.layers(), samples, allocation, calibrate=True)
        reading = read_all(network, store, policy_for(network, 3, share=0.25, use_tags=False))
        able = (reading.heard >= 0.5).sum((0, 2)).clamp_min(1)
        used = torch.stack([trace.routed.sum((0, 2)) / able for trace in reading.traces])[:, [0, 1, 2, 3, 4]]
        spread[allocation] = float(used.std(1).mean())
    assert spread["normalised"] < 0.5 * spread["uniform"]


# ---- steps as entries


def test_a_kept_token_is_an_entry_for_each_step() -> None:
    network, store = network_of("write+tags"), make_store(make_panel(seed=7))
    P, W = network.config.patch_steps, network.config.window_patches
    reading = read_all(network, store, policy_for(network, 3, share=0.4))
    for layer, trace in zip(reading.memory.layers, reading.traces, strict=True):
        # what is still in the window is no entry yet
        tokens = trace.routed[:, :, :-W].sum((1, 2))
        assert tokens.min() > 0 and torch.equal(layer.scratchpad.alive.sum(1), P * tokens)
    pad = reading.memory.layers[0].scratchpad
    place = pad.position[0][pad.alive[0]].view(-1, P)
    assert torch.equal(place, place[:, :1].expand_as(place))
    keys = pad.keys[0][pad.alive[0]].unflatten(0, (-1, P))
    assert all(not torch.allclose(keys[:, 0], keys[:, step]) for step in range(1, P))
    # caps hold whole tokens
    policy = network.policy(torch.ones(3, dtype=torch.float64))
    assert policy.cap_kept is not None and policy.cap_kept % P == 0 and policy.cap_kept > 0


def test_editing_one_step_changes_its_entry_alone() -> None:
    config = make_config(resolution="step")
    module = StepEntries(config).double()
    tokens = random_tokens(torch.Generator().manual_seed(0), patch_steps=config.patch_steps)
    features = step_features(tokens, torch.float64)
    B, N, C = features.shape[:3]
    flat = torch.randn(B, N * C, config.heads, config.width // config.heads, dtype=torch.float64)
    entries = replace(make_entries([[True] * (N * C)] * B), keys=flat, values=flat)
    changed = features.clone()
    changed[0, 2, 1, 1, 0] += 1.0
    one, other = module(entries, features), module(entries, changed)
    apart = (one.keys != other.keys).any(-1).any(-1)
    assert apart.nonzero().tolist() == [[0, (2 * C + 1) * config.patch_steps + 1]]
    assert torch.equal(apart, (one.values != other.values).any(-1).any(-1))


# ---- clipped writes


def delta_inputs(seed: int, length: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grid = (2, length, 2)
    return {
        "queries": torch.nn.functional.normalize(normal(*grid, 4), dim=-1),
        "keys": torch.nn.functional.normalize(normal(*grid, 4), dim=-1),
        "values": normal(*grid, 3),
        "log_decay": -0.01 * normal(*grid).abs(),
        "beta": normal(*grid).sigmoid(),
        "initial_state": torch.zeros(2, 2, 4, 3, dtype=torch.float64),
    }


def clipped(given: dict[str, torch.Tensor], limit: float, scale: torch.Tensor | None = None) -> Any:
    start = torch.zeros(2, 2, 2, dtype=torch.float64) if scale is None else scale
    rest = {name: value for name, value in given.items() if name not in ("queries", "keys", "values")}
    return clipped_delta(given["queries"], given["keys"], given["values"], **rest, scale=start, limit=limit)


def test_a_limit_that_nothing_reaches_is_the_plain_rule() -> None:
    given = delta_inputs(0)
    result, _ = clipped(given, 1e9)
    wanted = naive.gated_delta(**given)
    for name in ("output", "prediction", "error", "state"):
        assert torch.equal(getattr(result, name), getattr(wanted, name)), name


def test_one_absurd_value_does_not_wipe_the_state_and_its_score_sees_all_of_it() -> None:
    given = delta_inputs(1)
    calm, _ = clipped(given, 3.0)
    absurd = {**given, "values": given["values"].clone()}
    absurd["values"][:, 20] *= 1e6
    result, _ = clipped(absurd, 3.0)
    plain = naive.gated_delta(**absurd)
    assert (result.error[:, 20].norm(dim=-1) > 1e5).all()
    assert torch.equal(result.error[:, 20], absurd["values"][:, 20] - result.prediction[:, 20])
    moved = (result.state - calm.state).flatten(1).norm(dim=1)
    assert (moved < 3 * calm.state.flatten(1).norm(dim=1)).all()
    assert (plain.state.flatten(1).norm(dim=1) > 1e3 * moved).all()


def test_a_clipped_stream_is_the_clipped_whole() -> None:
    given = delta_inputs(2)
    given["values"][:, 11] *= 100
    whole, scale = clipped(given, 2.0)
    state, running, outputs = given["initial_state"], None, []
    for low, high in ((0, 1), (1, 12), (12, 40)):
        part = {name: value if name == "initial_state" else value[:, low:high] for name, value in given.items()}
        result, running = clipped({**part, "initial_state": state}, 2.0, running)
        state = result.state
        outputs.append(result.output)
    assert torch.equal(torch.cat(outputs, 1), whole.output) and torch.equal(state, whole.state)
    assert torch.equal(running, scale)


# ---- what teaches a learned score


def traces_of(network: HAMNetwork) -> tuple[Any, torch.Tensor]:
    store = make_store(make_panel(seed=7))
    reading = network(read_chunk(store), network.empty_memory(3), policy_for(network, 3))
    weight = torch.linspace(-1, 1, reading.quantiles.numel(), dtype=torch.float64).view(reading.quantiles.shape)
    return reading.traces, (weight * reading.quantiles).sum()


def test_the_gain_of_an_entry_is_what_leaving_it_out_costs() -> None:
    """To first order: against forwards in which one entry's probability is made smaller by a known factor."""
    network = make_network(make_config(router="learned", layers=1))
    traces, task = traces_of(network)
    (gain,) = _gains(traces, task)
    assert gain is not None
    entries = traces[0]
    read = HAMLayer._read
    step = 1e-5
    chosen = [(0, 3), (1, 5), (2, 1)]
    for item, place in chosen:

        def nudged(layer: Any, queries: Any, decision: Any, *rest: Any, at: tuple[int, int] = (item, place)) -> Any:
            where = (decision.local.position[at[0]] == entries.entries_position[at]).nonzero()[0, 0]
            bias = decision.local.bias.clone()
            bias[at[0], where, entries.entries_channel[at]] -= step
            return read(layer, queries, replace(decision, local=replace(decision.local, bias=bias)), *rest)

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(HAMLayer, "_read", nudged)
            _, changed = traces_of(network)
        assert float((changed - task).detach()) / step == pytest.approx(float(gain[item, place]), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("target", ["attention", "gain", "none"])
def test_every_target_of_the_learned_score_can_be_chosen(target: str) -> None:
    network = make_network(make_config(router="learned+tags"))
    traces, task = traces_of(network)
    loss = score_loss(traces, task, target)
    assert loss.isfinite() and bool(loss > 0) == (target != "none")
    if target == "none":
        return
    loss.backward(retain_graph=True)
    moved = {name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(".router.learned." in name for name in moved)
    task.backward()


# ---- bad input


@pytest.mark.parametrize("changes, known", [
    ({"router": "suprise"}, "surprise"), ({"allocation": "even"}, "uniform"), ({"decision": "both"}, "channel"),
    ({"learned_features": "all"}, "token"), ({"head_reduction": "sum"}, "mean"),
])  # fmt: skip
def test_an_unknown_choice_lists_the_known_ones(changes: dict[str, str], known: str) -> None:
    with pytest.raises(ValueError, match=rf"Unknown .*Available: .*'{known}'"):
        ModelConfig(**changes)
