"""A step recorded as a CUDA graph: what it needs, what it refuses, and on a GPU that it is the same step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from networks import HORIZON, make_network, make_panel, make_store, policy_for, whole_chunk

from hamts.config import MachineConfig, TrainConfig
from hamts.errors import DataError
from hamts.forecaster import fit
from hamts.nn.tokens import map_tensors
from hamts.ops.kernels import KernelError, Kernels
from hamts.resolve import Plan
from hamts.training_graphs import check_graphs, roomy, side_by_side
from hamts.windows import StreamWindows, scale_history

BOTH, CUDA = Kernels("fla+triton"), torch.device("cuda")


@pytest.mark.parametrize(
    ("changes", "kernels", "device", "message"),
    [
        ({}, BOTH, torch.device("cpu"), "needs a CUDA device. Got device='cpu'"),
        ({}, Kernels("torch"), CUDA, r"needs kernel='fla\+triton'. Got kernel='torch'"),
        ({"devices": 2}, BOTH, CUDA, "needs one process. Got devices=2"),
        ({"strategy": "fsdp"}, BOTH, CUDA, "needs one process. Got devices=1, strategy='fsdp'"),
        ({"checkpointing": True}, BOTH, CUDA, "needs checkpointing=False. Got checkpointing=True"),
        ({"compile_mode": "default"}, BOTH, CUDA, "needs compile_mode='none'. Got compile_mode='default'"),
        ({"precision": "16-mixed"}, BOTH, CUDA, "needs precision '32-true' or 'bf16-mixed'. Got precision='16-mixed'"),
    ],
)
def test_what_a_graph_cannot_record_is_refused(
    changes: dict[str, Any], kernels: Kernels, device: torch.device, message: str
) -> None:
    machine = MachineConfig(cuda_graphs=True, **changes)
    with pytest.raises(KernelError, match=f"cuda_graphs=True {message}.*or cuda_graphs=False"):
        check_graphs(machine, kernels, device)
    check_graphs(replace(machine, cuda_graphs=False), kernels, device)


def test_what_can_be_recorded_is_not_refused() -> None:
    for precision in ("32-true", "bf16-mixed"):
        check_graphs(MachineConfig(cuda_graphs=True, precision=precision), BOTH, CUDA)


def frame() -> pd.DataFrame:
    steps = 400
    wave = np.sin(np.arange(steps) * 2 * np.pi / 24) + 0.1 * np.random.default_rng(0).normal(size=steps)
    return pd.DataFrame({"unique_id": "a", "ds": pd.date_range("2024", periods=steps, freq="h"), "y": wave})


def test_a_fit_on_a_cpu_says_so_before_it_begins() -> None:
    with pytest.raises(DataError, match="cuda_graphs=True needs a CUDA device. Got device='cpu'"):
        fit(frame(), machine={"cuda_graphs": True}, accelerator="cpu", verbose=False)


def test_batches_have_the_same_sizes_where_a_graph_needs_it() -> None:
    store = make_store(make_panel((200, 160, 180)))
    network = make_network(calibrate=False)
    config = TrainConfig(batch_windows=4, context_patches=6, prefix_patches=8)
    windows = StreamWindows(
        store, scale_history(network, store), ends=np.array([190, 150, 170]), horizon=HORIZON, config=config,
        cross_chance=0.5, same_sizes=True,
    )  # fmt: skip
    sizes = set()
    for _ in range(12):
        shapes: list[torch.Size] = []
        map_tensors(windows.draw().parts, lambda tensor: shapes.append(tensor.shape) or tensor)  # noqa: B023
        sizes.add(tuple(shapes))
    assert len(sizes) == 1


def test_room_that_is_not_alive_changes_nothing_but_rounding() -> None:
    store = make_store(make_panel())
    network = make_network(calibrate=False)
    chunk, policy = whole_chunk(store), policy_for(network, store.n_items, cap_kept=5, cap_must=3)
    memory = network(chunk, network.empty_memory(store.n_items), policy).memory
    padded = roomy(memory, 40)
    assert all(layer.scratchpad.keys.shape[1] == 40 for layer in padded.layers)
    plain, with_room = (network(chunk, start, policy) for start in (memory, padded))
    assert torch.allclose(plain.quantiles, with_room.quantiles, rtol=1e-5, atol=1e-5)


def test_forecasts_side_by_side_are_those_made_one_by_one() -> None:
    store = make_store(make_panel())
    network = make_network(calibrate=False)
    items = torch.arange(store.n_items)
    policy = policy_for(network, store.n_items)
    memory, origins = network.empty_memory(store.n_items), []
    for first in (0, 4):
        memory = network(store.window(items, torch.full_like(items, first), 4), memory, policy).memory
        cutoffs = torch.full_like(items, (first + 4) * store.patch_steps) - store.lead
        origins.append((memory, store.horizon(items, cutoffs, HORIZON)))
    ((start, chunk),) = side_by_side(origins)
    twice = replace(policy, share=policy.share.repeat(2), readable=policy.readable.repeat(2, 1, 1))
    together = network(chunk, start, twice, advance=False).quantiles
    alone = [network(part, begun, policy, advance=False).quantiles for begun, part in origins]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_recorded_fit_is_the_plain_fit(precision: str) -> None:
    options = {"h": 6, "max_steps": 12, "accelerator": "gpu", "precision": precision, "kernel": "fla+triton"}
    plain, recorded = (
        fit(frame(), **options, verbose=False, progress=False, machine={"cuda_graphs": graphs}).report
        for graphs in (False, True)
    )
    assert recorded.steps == plain.steps == 12
    assert recorded.best_score == pytest.approx(plain.best_score, rel=0.02)


def test_a_plan_says_that_steps_are_recorded_and_otherwise_is_what_it_always_was() -> None:
    options = {"preset": "tiny", "h": 6, "max_steps": 1, "accelerator": "cpu", "progress": False, "verbose": False}
    plan = fit(frame(), **options).plan
    assert "cuda_graphs" not in plan.to_dict()["machine"]
    recorded = replace(plan, machine=replace(plan.machine, cuda_graphs=True))
    assert Plan.from_dict(recorded.to_dict()) == recorded
    assert Plan.from_dict(plan.to_dict()) == plan
