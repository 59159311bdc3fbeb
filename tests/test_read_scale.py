"""Logits of the exact read that grow with the number of keys, and the share of a head that turns with time.

B items · C channels · N patches · M entries
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import make_config, make_network, make_panel, make_spec, make_store, policy_for, read_all

from hamts.config import MIXERS, MemoryConfig, ModelConfig
from hamts.data.panel import Panel
from hamts.nn.counts import readable_keys, sharpened
from hamts.nn.heads import angles
from hamts.ops.types import ScratchKeys
from hamts.reader import HAMNetwork

SAME = 1e-10


def network_of(mixer: str, **options: object) -> HAMNetwork:
    """Perturbed, in float64, with room for some entries."""
    panel = make_panel(seed=100)
    config = make_config(mixer=mixer, pool_patches=3, block_patches=3, top_blocks=1, neighbours=2, **options)
    roomy = make_network(config, calibrate=mixer == "ham")
    if mixer == "ham":
        return roomy
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = HAMNetwork(config, MemoryConfig(budget_bytes=60_000), make_spec(panel, make_store(panel))).double()
    same = {n: v for n, v in roomy.state_dict().items() if network.state_dict()[n].shape == v.shape}
    network.load_state_dict({**network.state_dict(), **same})
    network.unit = roomy.unit
    return network.eval()


@pytest.mark.parametrize("options", [{"read_reference": 6}, {"rotary_share": 0.0}], ids=["log", "unturned"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_streaming_is_reading_in_one_pass(mixer: str, options: dict[str, object]) -> None:
    network, store = network_of(mixer, **options), make_store(make_panel())
    policy = policy_for(network, store.n_items)
    whole = read_all(network, store, policy)
    plain = network_of(mixer)
    same = torch.allclose(read_all(plain, store, policy_for(plain, store.n_items)).quantiles, whole.quantiles)
    # a window of the patch itself knows no ages
    assert same == (mixer in ("recurrent", "recurrent_wide", "log_linear") and "rotary_share" in options)
    items = torch.arange(store.n_items)
    stop = (store.lead + store.lengths) // store.patch_steps
    patches = int(stop.max())
    memory, parts = network.empty_memory(store.n_items), []
    with torch.no_grad():
        for low in range(0, patches):
            reading = network(store.window(items, stop - patches + low, 1), memory, policy, stepwise=True)
            memory = reading.memory
            parts.append(reading.quantiles)
    torch.testing.assert_close(torch.cat(parts, 2), whole.quantiles, rtol=SAME, atol=SAME)


def test_keys_are_counted_as_they_come_and_go() -> None:
    torch.manual_seed(0)
    B, C, N, M = 3, 4, 6, 40
    scratch = ScratchKeys(
        keys=torch.zeros(B, M, 1, 1),
        values=torch.zeros(B, M, 1, 1),
        channel=torch.randint(C, (B, M)),
        bias=torch.zeros(B, M),
        visible_from=torch.where(torch.rand(B, M) < 0.1, 2**40, torch.randint(-3, N + 2, (B, M))),
        visible_until=torch.randint(-2, 2 * N, (B, M)),
    )
    readable = torch.rand(B, C, C) < 0.5
    allowed = readable | torch.eye(C, dtype=torch.bool)
    query = torch.arange(N)[:, None]
    seen = (scratch.visible_from[:, None] <= query) & (query < scratch.visible_until[:, None])  # [B, N, M]
    of = allowed.gather(2, scratch.channel[:, None].expand(-1, C, -1))  # [B, C, M]
    wanted = (seen[:, :, None] & of[:, None]).sum(-1)  # [B, N, C]
    assert torch.equal(readable_keys(scratch, readable, N), wanted.float())
    queries = torch.ones(B, N, C, 1, 1)
    scaled = sharpened(queries, scratch, readable, window=2, cross_span=1, reference=12)
    grown = (wanted + 2 + C - 1).log() / torch.tensor(12.0).log()
    torch.testing.assert_close(scaled[..., 0, 0], grown.clamp_min(1.0))
    assert (grown < 1).any() and (grown > 1).any()
    assert sharpened(queries, scratch, readable, window=2, cross_span=1, reference=0) is queries


def test_a_share_of_a_head_turns_with_time() -> None:
    position = torch.arange(5).double()[None]
    assert angles(position, 16, torch.float32)[0].shape == (1, 5, 4)
    assert angles(position, 16, torch.float32, 0.0)[0].shape == (1, 5, 0)
    assert angles(position, 16, torch.float32, 1.0)[0].shape == (1, 5, 8)


@pytest.mark.parametrize("mixer", MIXERS)
def test_queries_may_start_as_keys(mixer: str) -> None:
    config = make_config(mixer=mixer, queries_from_keys=True)
    panel = make_panel()
    network = HAMNetwork(config, MemoryConfig(budget_bytes=60_000), make_spec(panel, make_store(panel)))
    for layer in network.backbone.layers():
        queries = layer.to_query if mixer == "ham" else layer.exact.to_query
        assert torch.equal(queries.weight, layer.to_memory.weight[-2 * config.width : -config.width])


@pytest.mark.parametrize("mixer", MIXERS)
def test_gates_may_start_open(mixer: str) -> None:
    panel = make_panel()
    networks = [
        new_network(make_config(mixer=mixer, gate_start=start), MemoryConfig(budget_bytes=60_000), panel)
        for start in (0.0, 3.0)
    ]
    for half, opened in zip(*(network.backbone.layers() for network in networks), strict=True):
        if half.to_gates is not None:
            assert not half.to_gates.bias.any()
            rows = opened.to_gates.bias.view(-1, opened.heads)
            assert not rows[:3].any() and (rows[3:] == 3.0).all()
        if half.to_output_gate is not None:
            assert (opened.to_output_gate.bias == 3.0).all() and (half.to_output_gate.bias != 3.0).all()
        # nothing else starts otherwise
        changed = {
            name for name, value in half.named_parameters() if not torch.equal(value, opened.get_parameter(name))
        }
        assert changed <= {"to_gates.bias", "to_output_gate.bias"}


def new_network(config: ModelConfig, memory: MemoryConfig, panel: Panel) -> HAMNetwork:
    torch.manual_seed(0)
    return HAMNetwork(config, memory, make_spec(panel, make_store(panel)))


def test_options_that_mean_nothing_are_refused() -> None:
    for wrong in ({"read_reference": 1}, {"read_reference": -5}, {"rotary_share": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(ModelConfig(), **wrong)
