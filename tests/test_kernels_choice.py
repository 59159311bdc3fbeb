"""Which kernels run is decided once, said, and never changed in silence."""

from __future__ import annotations

import copy
import importlib.util
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from networks import make_network

from hamts.errors import DataError
from hamts.forecaster import fit, load
from hamts.nn import scores
from hamts.nn.compiled import COMPILED, compile_parts
from hamts.ops import kernels, naive
from hamts.ops.attend import attend
from hamts.ops.gated_delta import gated_delta
from hamts.ops.kernels import KernelError, Kernels, fla_problem, launched_on, resolve_kernels, triton_problem
from hamts.resolve import Plan


class Machine:
    """A machine with a CUDA device, as far as resolving can see."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.versions = {"fla-core": "0.6.0", "triton": "3.7.1"}
        self.capability = (9, 0)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)
        patch.setattr(importlib.util, "find_spec", self._spec)
        patch.setattr(metadata, "version", lambda name: self.versions[name])

    def _spec(self, name: str) -> Any:
        package = {"fla": "fla-core"}.get(name, name)
        return object() if package in self.versions or name.startswith("hamts.") else None


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_auto_takes_torch_on_a_cpu_and_says_why() -> None:
    chosen = resolve_kernels("auto", device="cpu", head_width=32)
    assert chosen == Kernels("torch", "no CUDA device is used")
    assert (chosen.gated_delta, chosen.gated_delta_step, chosen.attend) == (gated_delta, naive.gated_delta, attend)


def test_auto_takes_both_where_both_can_run(machine: Machine) -> None:
    chosen = resolve_kernels("auto", device="cuda", head_width=32)
    assert (chosen.name, chosen.recurrence, chosen.read) == ("fla+triton", "fla", "triton")


@pytest.mark.parametrize("version", ["3.4.0", "3.6.0", "3.7.0"])
def test_wrong_gradients_are_refused_with_the_version_to_install(machine: Machine, version: str) -> None:
    machine.versions["triton"] = version
    with pytest.raises(KernelError, match=rf"triton {version} gives wrong gradients .*issue 640.*triton>=3.7.1"):
        resolve_kernels("fla+triton", device="cuda", head_width=32)
    chosen = resolve_kernels("auto", device="cuda", head_width=32)
    assert chosen.name == "triton"
    assert "not fla: triton" in chosen.why and "3.7.1" in chosen.why


@pytest.mark.parametrize(("capability", "version"), [((9, 0), "3.3.1"), ((9, 0), "3.7.1"), ((8, 0), "3.6.0")])
def test_other_devices_and_versions_are_not_refused(
    machine: Machine, capability: tuple[int, int], version: str
) -> None:
    machine.capability, machine.versions["triton"] = capability, version
    assert fla_problem("cuda", head_width=32) is None


@pytest.mark.parametrize(("package", "kernel"), [("fla-core", "fla"), ("triton", "triton"), ("triton", "fla")])
def test_a_missing_package_says_how_to_install_it(machine: Machine, package: str, kernel: str) -> None:
    del machine.versions[package]
    with pytest.raises(KernelError, match=rf"{package} is not installed: pip install 'hamts\[gpu\]'"):
        resolve_kernels(kernel, device="cuda", head_width=32)


def test_an_old_package_says_which_is_needed(machine: Machine) -> None:
    machine.versions["fla-core"] = "0.3.2"
    assert "fla-core 0.4 or newer is needed. Got 0.3.2" in str(fla_problem("cuda", head_width=32))


@pytest.mark.parametrize(
    ("kernel", "width", "message"),
    [
        ("fla", 258, "even head widths from 2 to 256. Got 258"),
        ("triton", 8, "even head widths from 16 to 128. Got 8"),
        ("triton", 256, "even head widths from 16 to 128. Got 256"),
    ],
)
def test_widths_say_which_there_are(machine: Machine, kernel: str, width: int, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        resolve_kernels(kernel, device="cuda", head_width=width)


def test_dtypes_and_old_devices_say_which_there_are(machine: Machine) -> None:
    for problem in (fla_problem, triton_problem):
        said = problem("cuda", head_width=32, dtype=torch.float64)
        assert "float32, bfloat16 and float16. Got torch.float64" in str(said)
    machine.capability = (7, 5)
    assert "compute capability 8.0 or newer. Got 7.5" in str(triton_problem("cuda", head_width=32))
    assert resolve_kernels("auto", device="cuda", head_width=32, dtype=torch.float64).name == "torch"


def test_unknown_kernels_list_the_known() -> None:
    with pytest.raises(KernelError, match=r"Unknown kernel 'cuda'. Available: \['auto', 'torch', 'fla'"):
        resolve_kernels("cuda", device="cpu", head_width=32)


def frame() -> pd.DataFrame:
    steps = 240
    wave = np.sin(np.arange(steps) * 2 * np.pi / 24) + 0.1 * np.random.default_rng(0).normal(size=steps)
    return pd.DataFrame({"unique_id": "a", "ds": pd.date_range("2024", periods=steps, freq="h"), "y": wave})


def test_a_kernel_that_cannot_run_stops_a_fit_before_it_begins() -> None:
    for kernel in ("fla", "triton", "fla+triton"):
        with pytest.raises(DataError, match="cannot run: it needs a CUDA device. Got device='cpu'") as caught:
            fit(frame(), kernel=kernel, accelerator="cpu", verbose=False)
        assert caught.value.code == "E-KERNEL"
    with pytest.raises(DataError, match="Unknown kernel 'cuda'"):
        fit(frame(), kernel="cuda", accelerator="cpu", verbose=False)
    with pytest.raises(DataError, match="Unknown compile_mode 'fast'"):
        fit(frame(), machine={"compile_mode": "fast"}, accelerator="cpu", verbose=False)
    with pytest.raises(DataError, match="Unknown field 'speed' of machine"):
        fit(frame(), machine={"speed": 2}, accelerator="cpu", verbose=False)


def test_what_ran_is_said_recorded_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"preset": "tiny", "h": 6, "max_steps": 2, "accelerator": "cpu", "progress": False}
    model = fit(frame(), **options)
    assert "kernel = 'torch' (no CUDA device is used; change with kernel=)" in capsys.readouterr().out
    assert (model.report.kernel, model.report.device) == ("torch", "cpu")
    assert model.plan.machine.kernel == "auto"
    model.save(tmp_path / "model")
    again = load(tmp_path / "model")
    assert (again.report.kernel, again.report.kernel_why) == ("torch", "no CUDA device is used")
    assert again.plan.machine == model.plan.machine


def test_layers_run_what_the_network_was_told() -> None:
    network = make_network(calibrate=False)
    network.use_kernels(Kernels("torch", "for a test"))
    twin = copy.deepcopy(network)
    assert {layer.kernels.why for layer in twin.backbone.layers()} == {"for a test"}
    network.use_kernels(kernels.TORCH)
    assert {layer.kernels.why for layer in twin.backbone.layers()} == {"for a test"}


def test_checkpointing_accumulation_and_mixed_precision_change_no_more_than_rounding() -> None:
    options = {"preset": "tiny", "h": 6, "max_steps": 4, "accelerator": "cpu", "progress": False, "verbose": False}
    plain = fit(frame(), **options).report.best_score
    assert fit(frame(), **options, machine={"checkpointing": True}).report.best_score == plain
    assert fit(frame(), **options, machine={"accumulate": 2}).report.steps == 4
    mixed = fit(frame(), **options, precision="bf16-mixed").report.best_score
    assert mixed != plain
    assert mixed == pytest.approx(plain, rel=0.02)


def test_every_part_that_would_be_compiled_exists_and_keeps_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make_network(calibrate=False)
    before, seen = set(network.state_dict()), set()
    monkeypatch.setattr(torch, "compile", lambda method, options: seen.add(method.__name__) or method)
    compile_parts(network, "none")
    assert seen == set()
    compile_parts(network, "default")
    assert seen == set(COMPILED)
    assert set(network.state_dict()) == before
    with pytest.raises(ValueError, match="Unknown compile mode 'fast'"):
        compile_parts(network, "fast")


def test_sums_over_many_tokens_do_not_depend_on_blocks(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    terms = torch.rand(2, 3, 70, 2, 2, generator=generator, dtype=torch.float64)
    carried = torch.rand(2, 3, 2, 2, generator=generator, dtype=torch.float64)
    whole = scores.causal_sums(terms, carried, 16.0)
    for block in (2, 8, 70):
        monkeypatch.setattr(scores, "SUMMED_AT_ONCE", block)
        for parts, true in zip(scores.causal_sums(terms, carried, 16.0), whole, strict=True):
            assert torch.allclose(parts, true, rtol=1e-12, atol=1e-12)


def test_plans_of_earlier_versions_load() -> None:
    options = {"preset": "tiny", "h": 6, "max_steps": 1, "accelerator": "cpu", "progress": False, "verbose": False}
    plan = fit(frame(), **options, precision="bf16-mixed").plan
    content = plan.to_dict()
    machine = content.pop("machine")
    earlier = Plan.from_dict({**content, "accelerator": machine["accelerator"], "precision": machine["precision"]})
    assert earlier == plan


def test_kernels_are_launched_where_the_tensors_are() -> None:
    assert isinstance(launched_on(torch.device("cuda", 1)), torch.cuda.device)
    assert isinstance(launched_on(torch.device("cpu")), nullcontext)
