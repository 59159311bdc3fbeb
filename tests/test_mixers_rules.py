"""The rule of each rival against the plainest way to say it, and rivals as users meet them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from model_frames import quick, sine_frame
from networks import (
    LENGTHS,
    make_config,
    make_network,
    policy_for,
    read_all,
    whole_chunk,
)
from rivals import RIVALS, SAME, network_of, panel_and_store

import hamts
from hamts.errors import DataError
from hamts.nn import mixers_kept
from hamts.nn.mixers import layer_makers
from hamts.nn.mixers_base import MixerLayer
from hamts.nn.mixers_kept import beaten_at
from hamts.nn.mixers_log_linear import fenwick_level, log_linear_delta
from hamts.nn.mixers_neighbours import follow_neighbours
from hamts.ops import naive
from hamts.rollout import roll


def test_segments_are_those_of_a_fenwick_tree() -> None:
    for now in range(70):
        levels = [int(fenwick_level(torch.tensor(now), torch.tensor(then), 30)) for then in range(now + 1)]
        assert levels[now] == 0
        # the set bits of ``now``, highest first, are the sizes of the segments, oldest first
        wanted = [bit + 1 for bit in reversed(range(7)) if now >> bit & 1 for _ in range(2**bit)]
        assert levels[:now] == wanted


def random_rule(seed: int, items: int = 2, channels: int = 1, patches: int = 75, heads: int = 2, width: int = 4):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    grid = (items, channels, patches, heads)
    q, k, v = draw(*grid, width), torch.nn.functional.normalize(draw(*grid, width), dim=-1), draw(*grid, width)
    return {"q": q, "k": k, "v": v, "log_decay": -draw(*grid).abs() / 20, "beta": draw(*grid).sigmoid()}


@pytest.mark.parametrize("levels", [3, 9])
def test_log_linear_equals_states_moved_one_by_one(levels: int) -> None:
    rule = random_rule(levels)
    q, k, v = rule["q"], rule["k"], rule["v"]
    B, C, N, H, K = q.shape
    weight = torch.rand(B, C, N, H, levels, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    empty = torch.zeros(B, C, levels, H, K, K, dtype=torch.float64)
    number = torch.arange(N).expand(B, N)
    # the plain rule's error says what each token adds; every token's part is then moved on by itself
    plain = naive.gated_delta(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), log_decay=rule["log_decay"].flatten(0, 1),
        beta=rule["beta"].flatten(0, 1),
    )  # fmt: skip
    wanted = torch.zeros_like(v)
    states: list[torch.Tensor] = []
    eye = torch.eye(K, dtype=torch.float64)
    for n in range(N):
        b, key = rule["beta"][:, :, n, :, None, None], k[:, :, n]
        move = rule["log_decay"][:, :, n, :, None, None].exp() * (eye - b * key[..., :, None] * key[..., None, :])
        states = [move @ state for state in states] + [b * key[..., :, None] * v[:, :, n][..., None, :]]
        for then, state in enumerate(states):
            level = min((n ^ then).bit_length(), levels - 1)
            said = torch.einsum("bchkv,bchk->bchv", state, q[:, :, n])
            wanted[:, :, n] += weight[:, :, n, :, level, None] * said
    got, last = log_linear_delta(**rule, weight=weight, state=empty, number=number)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last.sum(2), plain.state.view(B, C, H, K, K), rtol=1e-10, atol=1e-10)
    evenly, _ = log_linear_delta(**rule, weight=torch.ones_like(weight), state=empty, number=number)
    torch.testing.assert_close(evenly, plain.output.view(B, C, N, H, K), rtol=1e-10, atol=1e-10)
    # the same in two parts
    first = {name: x[:, :, :41] for name, x in rule.items()}
    rest = {name: x[:, :, 41:] for name, x in rule.items()}
    one, state = log_linear_delta(**first, weight=weight[:, :, :41], state=empty, number=number[:, :41])
    two, state = log_linear_delta(**rest, weight=weight[:, :, 41:], state=state, number=number[:, 41:])
    torch.testing.assert_close(torch.cat([one, two], 2), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_the_lowest_score_makes_room(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    M, most = 12, 4
    # few values, so that some are equal
    score = torch.randint(0, 6, (1, M), generator=generator).double()
    alive = torch.rand(1, M, generator=generator) < 0.8
    begin = torch.sort(torch.randint(0, 8, (1, M), generator=generator)).values
    # what stands in padding is not to be looked at
    begin = torch.where(alive, begin, 0)
    until = beaten_at(score, alive, begin, most=most)
    for query in range(9):
        came = [j for j in range(M) if alive[0, j] and begin[0, j] <= query]
        wanted = sorted(came, key=lambda j: (-float(score[0, j]), j))[:most]
        got = [j for j in came if until[0, j] > query]
        assert sorted(wanted) == got


def test_neighbours_continue_a_stream_that_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    period, P, stored = 7, 3, 40
    pattern = torch.randn(period, P, generator=generator, dtype=torch.float64)
    values = pattern[torch.arange(stored + 4) % period][None, None]  # [1, 1, M + N, P]
    observed = torch.ones_like(values, dtype=torch.bool)
    observed[:, :, -3:] = False
    got, share = follow_neighbours(
        torch.where(observed, values, 0.0), observed, stored=stored, stretch=2, neighbours=3,
        sharpness=torch.tensor(5.0, dtype=torch.float64),
    )  # fmt: skip
    assert torch.allclose(share, torch.ones_like(share))
    # the patch of the query itself and the one after it, also where the query was not observed
    torch.testing.assert_close(got[0, 0, :, 0], values[0, 0, stored:])
    torch.testing.assert_close(got[0, 0, :-1, 1], values[0, 0, stored + 1 :])


def test_neighbours_see_no_more_than_is_stored() -> None:
    values = torch.randn(1, 1, 30, 2, generator=torch.Generator().manual_seed(0))
    observed = torch.ones_like(values, dtype=torch.bool)
    options = {"stored": 20, "stretch": 2, "neighbours": 4, "sharpness": torch.tensor(1.0)}
    one = follow_neighbours(values, observed, **options)[0]
    edited = values.clone()
    edited[:, :, :9] += 5.0
    two = follow_neighbours(edited, observed, **options)[0]
    # the last query has 20 patches, numbers 10 to 29
    assert torch.equal(one[:, :, -1], two[:, :, -1])
    assert not torch.equal(one[:, :, 0], two[:, :, 0])


@pytest.mark.parametrize("mixer", ["pooled", "block_sparse"])
def test_with_pools_of_one_and_blocks_enough_everything_is_read(mixer: str) -> None:
    """A pool of one token is the token; all blocks together are the whole past."""
    changes = {"pooled": {"pool_patches": 1}, "block_sparse": {"block_patches": 2, "top_blocks": 500}}[mixer]
    twin = {"pooled": "recurrent_window", "block_sparse": "attention"}[mixer]
    _, store = panel_and_store()
    one = make_network(make_config(mixer=mixer, **changes), calibrate=False)
    two = make_network(make_config(mixer=twin), calibrate=False)
    if mixer == "block_sparse":
        # the rest of both: plain attention has no gate
        for layer in one.backbone.layers():
            layer.to_output_gate = None
    shared = {name: value for name, value in one.state_dict().items() if name in two.state_dict()}
    two.load_state_dict({**two.state_dict(), **shared})
    answers = [read_all(net, store, policy_for(net, store.n_items)).quantiles for net in (one, two)]
    torch.testing.assert_close(*answers, rtol=SAME, atol=SAME)


def test_a_block_sparse_read_in_pieces_is_the_whole_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so are its gradients, and the weights that are there at once are as few as was said."""
    _, store = panel_and_store()
    config = make_config(mixer="block_sparse", block_patches=2, top_blocks=1, read_reference=4)
    network = make_network(config, calibrate=False)
    chunk, policy = whole_chunk(store), policy_for(network, store.n_items)
    most: list[int] = []
    plain = torch.softmax

    def watched(logits: torch.Tensor, dim: int) -> torch.Tensor:
        most.append(logits.numel())
        return plain(logits, dim)

    monkeypatch.setattr(mixers_kept.torch, "softmax", watched)
    found = []
    for weights in (1 << 26, 20_000):
        monkeypatch.setattr(mixers_kept, "PIECE_WEIGHTS", weights)
        network.zero_grad()
        most.clear()
        reading = network(chunk, network.empty_memory(store.n_items), policy)
        pieces = len(most)
        (reading.quantiles.square().mean() + reading.traces[0].entries_mass.sum()).backward()
        # weights that are not kept are found once more
        assert len(most) == (pieces if pieces == config.layers else 2 * pieces)
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        found.append((reading.quantiles, [t.entries_mass for t in reading.traces], gradients, pieces, max(most)))
    whole, cut = found
    assert whole[3] == config.layers
    assert cut[3] > 3 * config.layers
    assert cut[4] <= 20_000 < whole[4]
    torch.testing.assert_close(cut[:3], whole[:3], rtol=SAME, atol=SAME)


@pytest.mark.parametrize("mixer", ["attention", "recurrent_window"])
def test_a_long_enough_window_reads_everything(mixer: str) -> None:
    """Against a read of the whole past as one window, channel by channel."""
    network, (_, store) = (
        make_network(make_config(mixer=mixer, cross_reading="never"), calibrate=False),
        panel_and_store(),
    )
    wide = make_network(make_config(mixer=mixer, cross_reading="never", window_patches=40), calibrate=False)
    with torch.no_grad():
        for net in (network, wide):
            for layer in net.backbone.layers():
                layer.exact.scratch_bias.zero_()
    wide.load_state_dict(network.state_dict())
    chunk = whole_chunk(store)
    # everything may be kept, as everything is in a window
    chunk = replace(chunk, complete=torch.ones_like(chunk.complete) & chunk.present[:, None])
    answers = []
    for net in (network, wide):
        memory = net.empty_memory(store.n_items)
        seen = replace(chunk, observed=chunk.observed | chunk.present[:, None, :, None])
        with torch.no_grad():
            answers.append(net(seen, memory, policy_for(net, store.n_items)).quantiles)
    events = [i for i, role in enumerate(network.spec.roles) if role == "event"]
    assert events
    targets = slice(None)
    torch.testing.assert_close(answers[0][:, targets], answers[1][:, targets], rtol=SAME, atol=SAME)


def test_an_unknown_mixer_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"Unknown mixer 'lstm'. Available: \['attention', .*'window'\]"):
        make_config(mixer="lstm")
    with pytest.raises(DataError, match="Unknown mixer 'lstm'. Available"):
        quick(sine_frame(steps=100), 4, mixer="lstm")


@pytest.mark.parametrize("mixer", RIVALS)
def test_fit_forecast_and_judge_with_every_rival(mixer: str, tmp_path) -> None:
    frame = sine_frame(items=2, steps=150)
    options = {"preset": "small", "batch_windows": 8} if mixer == "gdn_gsa" else {}
    model = quick(frame, 6, mixer=mixer, patch_steps=6, budget_bytes=30_000, **options)
    assert model.config.mixer == mixer
    forecast = model.predict()
    assert np.isfinite(forecast.df.filter(like="HAM").to_numpy()).all()
    table = model.evaluate(frame, n_windows=2, against=["seasonal_naive"])
    assert np.isfinite(table.loc[0, "MASE"])
    parts = model.memory_bytes()
    assert table.loc[0, "bytes"] == pytest.approx((parts["total"] - parts["rows"]).mean(), rel=0.2)
    model.save(tmp_path / "model")
    again = hamts.load(tmp_path / "model").predict()
    np.testing.assert_array_equal(again.df["HAM"].to_numpy(), forecast.df["HAM"].to_numpy())


def test_controls_of_the_scratchpad_are_refused_where_there_is_none() -> None:
    frame = sine_frame(items=1, steps=150)
    model = quick(frame, 6, mixer="window", patch_steps=6)
    with pytest.raises(DataError, match="mixer 'window' has no scratchpad"):
        model.evaluate(frame, n_windows=2, against=["random_memory"])
    with pytest.raises(DataError, match="mixer 'window' has no scratchpad"):
        model.predict(frame, budget_share=0.5)
    with pytest.raises(DataError, match="mixer 'window' has no scratchpad"):
        model.routes(frame)


def test_streams_of_rivals_stop_where_they_are_told() -> None:
    """Cutoffs in the middle give what reading up to them gives."""
    network, (_, store) = network_of("top_write"), panel_and_store()
    cuts = [np.array([n - 9, n]) for n in LENGTHS]
    policy = network.policy(torch.tensor([0.3]))
    both = roll(network, store, cutoffs=cuts, steps=4, policies=policy)
    for item, length in enumerate(LENGTHS):
        nothing = [np.zeros(0, dtype=np.int64) if i != item else np.array([length - 9]) for i in range(len(LENGTHS))]
        ends = np.array([length - 9 if i == item else 0 for i in range(len(LENGTHS))])
        alone = roll(network, store, cutoffs=nothing, steps=4, policies=policy, ends=ends)
        np.testing.assert_allclose(alone.quantiles[0], both.quantiles[2 * item], rtol=1e-8, atol=1e-8)


def test_every_rival_is_a_layer_of_the_same_kind() -> None:
    for mixer in RIVALS:
        layers = [make() for make in layer_makers(make_config(mixer=mixer), channels=2, budget_bytes=1 << 18)]
        assert all(isinstance(layer, MixerLayer) for layer in layers)
        assert len(layers) == 2
