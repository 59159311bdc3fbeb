"""A recurrent state with a width of its own beside wider entries: the laws of the layer hold, and bytes are counted."""

from __future__ import annotations

import pytest
import torch

from hamts.config import ModelConfig
from hamts.nn.ham import HAMLayer
from hamts.nn.mixers import layer_makers
from hamts.nn.mixers_parts import fixed_bytes
from probes.contract import generator
from probes.models import NetConfig, ProbeNet
from probes.registry import get_probe

MODELS = ("ham", "recurrent", "recurrent_wide", "recurrent_window", "gdn_gsa", "top_write", "log_linear", "pooled")
BUDGET_ROWS = 6


def wide_entries(model: str, router: str = "mix") -> tuple[ProbeNet, object]:
    """A network in float64 whose entries are 16 wide and whose states 4 a head, and sequences to read."""
    probe, _ = get_probe("der")
    batch = probe.sample(generator(0), 3, probe.config("smoke", context_rows=48, items=6, queries=6, missing=0.1))
    batch = batch.map(lambda t: t.double() if t.is_floating_point() else t)
    rows = 200 if model == "log_linear" else 20 if model == "pooled" else BUDGET_ROWS
    config = NetConfig(model=model, router=router, width=16, memory_width=16, heads=2, state_width=4, budget_rows=rows)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ProbeNet(
            config, inputs=batch.inputs().shape[-1], channels=batch.x.shape[-1], answers=batch.y.shape[-1]
        ).double()
    return net.eval(), batch


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size", [1, 5])
def test_a_stream_with_a_narrow_state_is_read_as_in_one_pass(model: str, size: int) -> None:
    net, batch = wide_entries(model)
    policies = net.policies(batch, BUDGET_ROWS)
    L = batch.x.shape[1]
    with torch.no_grad():
        whole = net.read(batch, slice(0, L), net.empty_memory(len(batch)), policies)
        memory, parts = net.empty_memory(len(batch)), []
        for low in range(0, L, size):
            part = slice(low, min(low + size, L))
            step = net.read(batch, part, memory, policies, stepwise=part.stop - low == 1)
            memory = step.memory
            parts.append(step.hidden)
    torch.testing.assert_close(torch.cat(parts, 1), whole.hidden, rtol=1e-9, atol=1e-9)
    for got, wanted in zip(memory, whole.memory, strict=True):
        torch.testing.assert_close(got.state, wanted.state, rtol=1e-9, atol=1e-9)


def test_states_and_entries_have_the_widths_that_were_asked_for() -> None:
    config = ModelConfig(width=32, heads=2, state_width=6, patch_steps=2)
    layer = HAMLayer(config)
    memory = layer.empty_memory(1, 1, torch.zeros(1))
    assert memory.state.shape[2:] == (2, 6, 6)
    assert memory.conv_tail.shape[-1] == 3 * 2 * 6
    assert memory.scratchpad.keys.shape[2:] == (2, 16)
    shared = HAMLayer(ModelConfig(width=32, heads=2, patch_steps=2))
    assert shared.narrow is None
    assert shared.to_memory.out_features == 3 * 32
    # as wide as a head is what it is without being asked
    assert HAMLayer(ModelConfig(width=32, heads=2, state_width=16, patch_steps=2)).shared


def test_a_rival_of_a_narrow_state_is_sized_by_its_bytes() -> None:
    config = ModelConfig(width=32, heads=1, state_width=8, patch_steps=2, mixer="recurrent_wide")
    like = torch.zeros(1)
    ham = fixed_bytes(HAMLayer(config).empty_memory(1, 1, like))
    entry = HAMLayer(config).empty_memory(1, 1, like).scratchpad.bytes_per_entry()
    layer = layer_makers(config, channels=1, budget_bytes=2 * 16 * entry)[0]()
    taken, allowed = fixed_bytes(layer.empty_memory(1, 1, like)), ham + 16 * entry
    step = 4 * (2 * layer.recurrent.head_width + 1 + 9)
    assert allowed - step < taken <= allowed
    assert layer.recurrent.head_width > 8
    plain = layer_makers(ModelConfig(width=32, heads=1, state_width=8, mixer="recurrent"), channels=1, budget_bytes=1)
    assert plain[0]().recurrent.head_width == 8


def test_a_state_without_width_is_refused() -> None:
    with pytest.raises(ValueError, match="state_width must be 0"):
        ModelConfig(state_width=-1)
