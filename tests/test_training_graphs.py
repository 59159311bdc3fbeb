"""A step recorded as a CUDA graph: what it needs, what it refuses, and on a GPU that it is the same step."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from networks import HORIZON, leaves, make_network, make_panel, make_store, policy_for, whole_chunk
from torch.optim.swa_utils import AveragedModel

from hamts import training, training_graphs
from hamts import windows as windows_module
from hamts.checks import moving_average
from hamts.config import MachineConfig, TrainConfig
from hamts.errors import DataError
from hamts.forecaster import fit
from hamts.nn.tokens import map_tensors
from hamts.ops.kernels import KernelError, Kernels
from hamts.reader import StreamMemory
from hamts.resolve import Plan
from hamts.training import fit_network
from hamts.training_graphs import Restarted, Restarts, check_graphs, filled_up, restarted, roomy, side_by_side
from hamts.training_parallel import follow_average
from hamts.windows import StreamWindows, scale_history

STEPS = 40
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


def test_prefixes_of_few_lengths_are_those_nearest_to_any() -> None:
    store = make_store(make_panel((200, 160, 180)))
    network = make_network(calibrate=False)
    config = TrainConfig(batch_windows=4, context_patches=6, prefix_patches=512)
    drawn = []
    for few in (False, True):
        windows = StreamWindows(
            store, scale_history(network, store), ends=np.array([190, 150, 170]), horizon=HORIZON, config=config,
            cross_chance=0.5, few_prefixes=few,
        )  # fmt: skip
        drawn.append([windows.draw().prefix for _ in range(60)])
    assert set(drawn[1]) == {0, 8, 32, 128, 512}
    for any_length, few_length in zip(*drawn, strict=True):
        assert abs(np.log(1 + any_length) - np.log(1 + few_length)) <= np.log(9) / 2 + np.log(2)


def test_streams_to_read_again_fill_up_to_one_of_two_numbers() -> None:
    reset = torch.zeros(8, dtype=torch.bool)
    reset[[6, 2]] = True
    rows, taken = filled_up(reset)
    assert rows.tolist() == [2, 6] and taken[[2, 6]].tolist() == [0, 1]
    reset[[1, 3]] = True
    rows, taken = filled_up(reset)
    assert rows.tolist() == [1, 2, 3, 6, 1, 1, 1, 1] and rows[taken[reset]].tolist() == [1, 2, 3, 6]


@pytest.mark.parametrize("prefix", [0, 5])
@pytest.mark.parametrize("restarting", [[1], [0, 2, 3]])
def test_streams_restart_where_their_memory_lies(
    prefix: int, restarting: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Launched, recorded, replayed: each stream has the memory that it would have been given."""
    store = make_store(make_panel())
    network = make_network(calibrate=False)
    config = TrainConfig(batch_windows=4, context_patches=6, prefix_patches=8)
    windows = StreamWindows(
        store, scale_history(network, store), ends=store.lengths.numpy(), horizon=HORIZON, config=config,
        cross_chance=0.5,
    )  # fmt: skip
    read: list[int] = []

    def read_prefix(streams: Restarted, patches: int) -> StreamMemory:
        read.append(len(streams.items))
        memory = replace(network.empty_memory(len(streams.items)), scale=streams.scale)
        if patches == 0:
            return memory
        policy = policy_for(network, len(streams.items), cap_kept=5, cap_must=3)
        chunk = store.window(streams.items, streams.first - patches, patches)
        return network(chunk, memory, policy, decode=False).memory

    monkeypatch.setattr(training_graphs, "recorded", lambda run, _: SimpleNamespace(replay=run))
    restarts = Restarts(read_prefix, rows=12, generators=[])
    everyone, held = torch.arange(4), None
    with torch.no_grad():
        for _ in range(3):
            batch = replace(windows.draw(), prefix=prefix, reset=torch.zeros(4, dtype=torch.bool))
            batch.reset[restarting] = True
            held = held or roomy(read_prefix(restarted(batch, everyone, everyone), 5), 12)
            before = map_tensors(held, lambda tensor: tensor.clone())
            rows, taken = filled_up(batch.reset)
            restarts(held, restarted(batch, rows, taken), prefix)
            assert read[-1] == (1 if len(restarting) == 1 else 4)
            alone = roomy(read_prefix(restarted(batch, torch.tensor(restarting), taken), prefix), 12)
            for b in range(4):
                wanted = before.select(torch.tensor([b]))
                if b in restarting:
                    wanted = alone.select(torch.tensor([restarting.index(b)]))
                found = leaves(held.select(torch.tensor([b])))
                for name, truth in leaves(wanted).items():
                    assert torch.allclose(found[name].double(), truth.double(), rtol=1e-5, atol=1e-5), name
    assert list(restarts.known) == [(1 if len(restarting) == 1 else 4, prefix)]


def test_a_fit_whose_memory_stays_in_its_place_is_the_plain_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the recording itself, on a CPU: what would be recorded is run instead."""
    ran = []

    def record(run: Any, generators: Any) -> Any:
        ran.append(run)
        return SimpleNamespace(replay=run)

    monkeypatch.setattr(training_graphs, "recorded", record)
    monkeypatch.setattr(training, "check_graphs", lambda *_: None)
    # a longer forecast is another loss of the scores
    monkeypatch.setattr(training, "StreamWindows", lambda *a, **k: StreamWindows(*a, **{**k, "same_sizes": True}))
    options = {"preset": "tiny", "h": 6, "max_steps": 8, "accelerator": "cpu", "batch_windows": 8}
    options["routing"] = {"explore_share": 0.0}
    plain, in_graphs = (
        fit(frame(), **options, verbose=False, progress=False, machine={"cuda_graphs": graphs}).report
        for graphs in (False, True)
    )
    assert len(ran) > 1
    for before, after in zip(plain.history, in_graphs.history, strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-3)
    assert in_graphs.best_score == pytest.approx(plain.best_score, rel=1e-3)


def test_a_fit_that_goes_on_with_fewer_streams_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same fit, also with no more room than its streams can fill."""
    recordings: list[int] = []
    monkeypatch.setattr(training_graphs, "recorded", lambda run, _: recordings.append(1) or SimpleNamespace(replay=run))
    monkeypatch.setattr(training, "check_graphs", lambda *_: None)
    monkeypatch.setattr(training, "StreamWindows", lambda *a, **k: StreamWindows(*a, **{**k, "same_sizes": True}))
    store = make_store(make_panel((200, 160, 180)))
    columns, context, prefix, steps = len(store.roles), 4, 8, 14
    config = TrainConfig(
        max_steps=steps, batch_windows=6, context_patches=context, prefix_patches=prefix, reset_share=1.0, checks=steps
    )
    found = []
    for graphs, room in ((False, None), (True, None), (True, columns * (prefix + context))):
        drawn: list[int] = []

        def fewer(windows: StreamWindows, drawn: list[int] = drawn, room: int | None = room) -> None:
            if len(drawn) == steps // 2:
                windows.keep_streams(3)
            windows.room = room
            drawn.append(len(windows.items))

        network = make_network(dtype=torch.float32, calibrate=False)
        network.memory_config = replace(network.memory_config, explore_share=0.0, must_keep_share=0.0)
        report = fit_network(
            network, store, ends=np.array([190, 150, 170]), cutoffs=[np.zeros(0, dtype=np.int64)] * 3, horizon=HORIZON,
            config=config, share=0.2, machine=MachineConfig(accelerator="cpu", cuda_graphs=graphs), verbose=False,
            progress=False, augment=fewer,
        )  # fmt: skip
        found.append([one["train_loss"] for one in report.history])
        # one batch is drawn beyond the last step
        assert drawn == [6] * (steps // 2) + [3] * (steps // 2 + 1)
    assert len(recordings) >= 4
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_no_step_waits_for_the_device(graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait in every step leaves the device idle for as long as the host takes to go on."""
    watched = []

    class Watching(training.Checks):
        def on_train_batch_end(self, *given: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")
            super().on_train_batch_end(*given)
            # what is made or recorded once, is by now: from here to the next call a wait is an error
            if given[-1] == STEPS - 2:
                watched.append(given[-1])
                torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(training, "Checks", Watching)
    options = {"h": 6, "preset": "base", "max_steps": STEPS, "accelerator": "gpu", "precision": "bf16-mixed"}
    options["kernel"] = "fla+triton"
    monkeypatch.setattr(windows_module, "PREFIX_LENGTHS", 1)
    try:
        fit(frame(), **options, verbose=False, progress=False, machine={"cuda_graphs": graphs})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watched == [STEPS - 2]
    network = torch.nn.Linear(3, 3).to("cuda")
    averaged = AveragedModel(network, multi_avg_fn=moving_average(0.9))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            follow_average(averaged, network)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_recorded_fit_is_the_plain_fit(precision: str) -> None:
    options = {"h": 6, "preset": "base", "max_steps": 12, "accelerator": "gpu", "precision": precision}
    options["kernel"] = "fla+triton"
    from hamts.ops.gated_delta_trial import untuned

    # what tuning chooses changes how fast it is, and takes minutes in float32
    with untuned():
        plain, in_graphs = (
            fit(frame(), **options, verbose=False, progress=False, machine={"cuda_graphs": graphs}).report
            for graphs in (False, True)
        )
    assert in_graphs.steps == plain.steps == 12
    assert in_graphs.best_score == pytest.approx(plain.best_score, rel=0.02)


def test_a_plan_says_that_steps_are_recorded_and_otherwise_is_what_it_always_was() -> None:
    options = {"preset": "tiny", "h": 6, "max_steps": 1, "accelerator": "cpu", "progress": False, "verbose": False}
    plan = fit(frame(), **options).plan
    assert "cuda_graphs" not in plan.to_dict()["machine"]
    recorded = replace(plan, machine=replace(plan.machine, cuda_graphs=True))
    assert Plan.from_dict(recorded.to_dict()) == recorded
    assert Plan.from_dict(plan.to_dict()) == plan
