"""Fitting in two processes takes the steps that one process takes on the same batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hamts.config import MachineConfig
from hamts.errors import DataError
from hamts.training_parallel import STRATEGIES, everyones, make_strategy, total

# sums over streams in another order
TOLERANCE = 5e-6
PROCESSES = 2


def frame() -> pd.DataFrame:
    rng, steps = np.random.default_rng(0), 240
    clock = pd.date_range("2024-01-01", periods=steps, freq="h")
    waves = [np.sin(np.arange(steps) * 2 * np.pi / 24 + item) + 0.1 * rng.normal(size=steps) for item in range(3)]
    return pd.concat([pd.DataFrame({"unique_id": f"i{n}", "ds": clock, "y": y}) for n, y in enumerate(waves)])


def fitted(strategy: str, devices: int) -> dict[str, torch.Tensor]:
    """Weights and first gradients of a short fit in which nothing is random but the batches, which are the same."""
    from dataclasses import replace

    from hamts.data.frame import to_panel
    from hamts.data.patches import build_store
    from hamts.fitting import new_network, validation_tail
    from hamts.resolve import FitOptions, make_plan
    from hamts.training import Checks, fit_network

    panel = to_panel(frame())
    machine = MachineConfig(accelerator="cpu", strategy=strategy, devices=devices)
    options = FitOptions(h=6, preset="tiny", patch_steps=6, batch_windows=8, max_steps=3, machine=machine)
    plan = make_plan(panel, options)
    plan = replace(
        plan,
        model=replace(plan.model, dropout=0.0),
        memory=replace(plan.memory, explore_share=0.0),
        train=replace(plan.train, prefix_patches=16, reset_share=0.3, checks=1, average_decay=0.0),
    )
    tail = validation_tail(panel.lengths, h=6, patch_steps=6, val_size=None)
    network = new_network(panel, plan, tail.ends)
    store = build_store(panel, patch_steps=6, extra_steps=6)
    gradients: dict[str, torch.Tensor] = {}

    def note(self: Any, trainer: Any, module: Any, optimizer: Any) -> None:
        for name, weight in module.network.named_parameters():
            if weight.grad is not None and name not in gradients:
                whole = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
                gradients[name] = whole.detach().clone()

    Checks.on_before_optimizer_step = note  # type: ignore[method-assign]
    report = fit_network(
        network, store, ends=tail.ends, cutoffs=tail.cutoffs, horizon=6, config=plan.train, share=0.1,
        machine=machine, progress=False, verbose=False,
    )  # fmt: skip
    assert report.steps == 3
    weights = {f"weight {name}": value for name, value in network.state_dict().items() if value.is_floating_point()}
    return weights | {f"gradient {name}": value for name, value in gradients.items()}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def in_processes(strategy: str, folder: Path) -> dict[str, torch.Tensor]:
    """The same fit in two processes that find each other as a launcher would let them; what the first one has."""
    here = Path(__file__).resolve()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(here.parent.parent), os.environ.get("PYTHONPATH", "")]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, str(here), strategy, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * PROCESSES, "\n".join(outputs)
    results = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), f"the processes disagree about {name}"
    return results[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    here = Path(__file__).resolve()
    result = subprocess.run(
        [sys.executable, str(here), "auto", "-"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent.parent)},
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr.decode()
    return torch.load(Path(result.stdout.decode().strip().splitlines()[-1]), weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(strategy: str, alone: dict[str, torch.Tensor], tmp_path: Path) -> None:
    together = in_processes(strategy, tmp_path)
    assert sorted(together) == sorted(alone)
    assert sum(name.startswith("gradient") for name in alone) > 30
    apart = {
        name: float((together[name] - value).norm() / value.norm().clamp_min(1e-3)) for name, value in alone.items()
    }
    assert {name: distance for name, distance in apart.items() if not distance <= TOLERANCE} == {}


def test_one_process_counts_for_itself() -> None:
    scores = torch.arange(6.0).view(3, 2)
    assert everyones(scores) is scores
    assert total(scores) is scores
    assert make_strategy("auto", 1) == "auto"


def test_unknown_ways_to_share_a_fit_are_refused() -> None:
    from hamts.forecaster import fit

    with pytest.raises(ValueError, match=f"Unknown strategy 'dp'. Available: {list(STRATEGIES)}".replace("[", r"\[")):
        make_strategy("dp", 2)
    with pytest.raises(DataError, match="Unknown strategy 'dp'"):
        fit(frame(), strategy="dp", verbose=False)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="devices must be a whole number, at least 1. Got 0"):
        fit(frame(), devices=0, verbose=False)
    with pytest.raises(ValueError, match="run_dir resumes fits of one process"):
        fit(frame(), devices=2, accelerator="cpu", run_dir="x", verbose=False)


def main() -> None:
    """What each of the processes runs."""
    import tempfile

    torch.set_num_threads(1)
    strategy, folder = sys.argv[1:]
    result = fitted(strategy, PROCESSES if strategy != "auto" else 1)
    where = Path(tempfile.mkdtemp()) if folder == "-" else Path(folder)
    path = where / f"{os.environ.get('RANK', '0')}.pt"
    torch.save(result, path)
    print(path, flush=True)


if __name__ == "__main__":
    main()
