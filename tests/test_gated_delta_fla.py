"""The recurrence on fla's kernels equals the step-by-step one: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from triton_on_cpu import DEVICE, INTERPRETED, RUNS, WHY_NOT, let_fla_be_interpreted

from hamts.ops import naive
from hamts.ops.types import GatedDelta

pytest.importorskip("fla", reason="needs fla-core: pip install 'hamts[gpu]'")
pytestmark = [
    pytest.mark.skipif(not RUNS, reason=WHY_NOT),
    pytest.mark.filterwarnings("ignore:Triton is not supported on current platform:UserWarning"),
]

from triton import Config  # noqa: E402

from hamts.ops import gated_delta_fla  # noqa: E402
from hamts.ops.gated_delta_trial import SHORTLIST, _tuned_kernels, problem_of, shortlisted, untuned  # noqa: E402

# float32 sums in another order; on a GPU three TF32 products stand for one of float32
TOLERANCE = 5e-6 if INTERPRETED else 3e-5
# bf16 keeps 8 bits, one rounding is 4e-3, and a chunk rounds its inputs, its inverse and its state
TOLERANCE_BF16 = 2e-2
WAYS = ("internals", "shifted query")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    let_fla_be_interpreted()
    with untuned():
        yield


def inputs(generator: torch.Generator, *, B: int, N: int, H: int, K: int, V: int) -> dict[str, torch.Tensor]:
    """Strongly correlated keys, some write gates of exactly 0, decays from none to strong, a carried state."""
    queries, keys, values = (torch.randn(B, N, H, width, generator=generator) for width in (K, K, V))
    keys = torch.nn.functional.normalize(keys + 3 * torch.randn(B, 1, H, K, generator=generator), dim=-1)
    beta = torch.rand(B, N, H, generator=generator)
    drawn = {
        "queries": queries * K**-0.5,
        "keys": keys,
        "values": values,
        "log_decay": -2 * torch.rand(B, N, H, generator=generator).square(),
        "beta": torch.where(beta < 0.2, 0.0, beta),
        "initial_state": torch.randn(B, H, K, V, generator=generator),
    }
    return {name: tensor.to(DEVICE) for name, tensor in drawn.items()}


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    value, truth = value.detach().double(), truth.detach().double()
    return float((value - truth).norm() / truth.norm().clamp_min(1e-30))


def run(op: Any, given: dict[str, torch.Tensor], **options: Any) -> GatedDelta:
    rest = {name: given.get(name) for name in ("log_decay", "beta", "initial_state")}
    return op(given["queries"], given["keys"], given["values"], **rest, **options)


def parts_and_gradients(op: Any, given: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Every result, and the gradient of every input through all results at once."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    result = run(op, leaves, **options)
    parts = {name: getattr(result, name) for name in ("output", "prediction", "error", "state")}
    # unlike weights, so that no two gradients can cancel
    loss = sum((1 + n) * part.square().sum() for n, part in enumerate(parts.values()))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return parts | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_alike(fast: dict[str, torch.Tensor], true: dict[str, torch.Tensor], tolerance: float) -> None:
    distances = {name: relative(fast[name], true[name]) for name in true}
    assert {name: d for name, d in distances.items() if not d <= tolerance} == {}


def doubled(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() for name, tensor in given.items()}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(gated_delta_fla, "error_path", lambda device, dtype: request.param)
    return request.param


@pytest.mark.parametrize("N", [1, 32, 33, 70])
def test_results_and_gradients_equal_the_naive_ones(way: str, N: int, generator: torch.Generator) -> None:
    given = inputs(generator, B=2, N=N, H=1, K=32, V=16)
    true = parts_and_gradients(naive.gated_delta, doubled(given))
    assert_alike(parts_and_gradients(gated_delta_fla.gated_delta, given), true, TOLERANCE)


@pytest.mark.skipif(not INTERPRETED, reason="chunks of 64 are inverted in TF32 on a GPU; bfloat16 has them there")
def test_chunks_of_the_other_dtype_equal_the_naive_ones_too(
    way: str, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    monkeypatch.setitem(gated_delta_fla.CHUNKS, torch.float32, gated_delta_fla.CHUNKS[torch.bfloat16])
    given = inputs(generator, B=1, N=70, H=1, K=32, V=16)
    true = parts_and_gradients(naive.gated_delta, doubled(given))
    assert_alike(parts_and_gradients(gated_delta_fla.gated_delta, given), true, TOLERANCE)


def test_without_a_carried_state_it_starts_from_zeros(way: str, generator: torch.Generator) -> None:
    given = inputs(generator, B=1, N=70, H=1, K=16, V=16)
    del given["initial_state"]
    true = parts_and_gradients(naive.gated_delta, doubled(given))
    assert_alike(parts_and_gradients(gated_delta_fla.gated_delta, given), true, TOLERANCE)


def test_the_error_is_right_where_next_to_nothing_is_written(way: str, generator: torch.Generator) -> None:
    given = inputs(generator, B=1, N=34, H=1, K=16, V=16)
    given["log_decay"] = given["log_decay"] / 20
    for beta in (0.0, 1e-30, 1e-9):
        given["beta"] = torch.full_like(given["beta"], beta)
        true = parts_and_gradients(naive.gated_delta, doubled(given))
        assert_alike(parts_and_gradients(gated_delta_fla.gated_delta, given), true, TOLERANCE)


def test_packed_sequences_do_not_see_one_another(way: str, generator: torch.Generator) -> None:
    lengths = [5, 1, 32, 40]
    apart = [inputs(generator, B=1, N=n, H=2, K=16, V=16) for n in lengths]
    packed = {name: torch.cat([part[name] for part in apart], 0 if name == "initial_state" else 1) for name in apart[0]}
    bounds = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    fast = parts_and_gradients(gated_delta_fla.gated_delta, packed, cu_seqlens=bounds)
    true = [parts_and_gradients(naive.gated_delta, doubled(part)) for part in apart]
    joined = {name: torch.cat([t[name] for t in true], 0 if "state" in name else 1) for name in true[0]}
    assert_alike(fast, joined, TOLERANCE)


def test_the_state_carries_on_over_a_split(way: str, generator: torch.Generator) -> None:
    given = inputs(generator, B=2, N=50, H=1, K=16, V=16)
    whole = run(gated_delta_fla.gated_delta, given)
    first = {name: x if name == "initial_state" else x[:, :21] for name, x in given.items()}
    second = {name: x if name == "initial_state" else x[:, 21:] for name, x in given.items()}
    begun = run(gated_delta_fla.gated_delta, first)
    second["initial_state"] = begun.state
    ended = run(gated_delta_fla.gated_delta, second)
    assert relative(torch.cat([begun.error, ended.error], 1), whole.error) < TOLERANCE
    assert relative(ended.state, whole.state) < TOLERANCE


def test_the_recurrent_kernel_of_decoding_equals_naive(generator: torch.Generator) -> None:
    given = inputs(generator, B=3, N=2, H=2, K=16, V=32)
    fast, true = run(gated_delta_fla.gated_delta_step, given), run(naive.gated_delta, doubled(given))
    for name in ("output", "prediction", "error", "state"):
        assert relative(getattr(fast, name), getattr(true, name)) < TOLERANCE, name


@pytest.mark.gpu
def test_bfloat16_stays_close_and_keeps_its_state_in_float32(way: str, generator: torch.Generator) -> None:
    given = inputs(generator, B=1, N=130, H=2, K=32, V=32)
    for name in ("queries", "keys", "values"):
        given[name] = given[name].bfloat16()
    fast = run(gated_delta_fla.gated_delta, given)
    true = run(naive.gated_delta, doubled(given))
    assert fast.output.dtype == fast.error.dtype == torch.bfloat16
    assert fast.state.dtype == torch.float32
    for name in ("output", "prediction", "error", "state"):
        assert relative(getattr(fast, name), getattr(true, name)) < TOLERANCE_BF16, name


@pytest.mark.gpu
def test_autocast_chooses_bfloat16_products_and_leaves_gates_alone(generator: torch.Generator) -> None:
    given = inputs(generator, B=1, N=65, H=1, K=16, V=16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        mixed = run(gated_delta_fla.gated_delta, given)
    half = {name: x.bfloat16() if name in ("queries", "keys", "values") else x for name, x in given.items()}
    assert mixed.output.dtype == torch.float32
    assert torch.equal(mixed.output.bfloat16(), run(gated_delta_fla.gated_delta, half).output)


def test_a_detached_error_takes_no_gradient_and_changes_none(way: str, generator: torch.Generator) -> None:
    given = inputs(generator, B=1, N=70, H=1, K=16, V=16)
    gradients = []
    for error_grad in (True, False):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        result = run(gated_delta_fla.gated_delta, leaves, error_grad=error_grad)
        assert result.error.requires_grad is result.prediction.requires_grad is error_grad
        gradients.append(torch.autograd.grad(result.output.square().sum(), list(leaves.values())))
    for with_error, without in zip(*gradients, strict=True):
        assert relative(without, with_error) < TOLERANCE


def test_what_the_kernels_do_not_have_is_refused_with_what_they_have(generator: torch.Generator) -> None:
    given = inputs(generator, B=2, N=3, H=1, K=16, V=16)
    with pytest.raises(ValueError, match="bfloat16, float16 and float32. Got queries of torch.float64"):
        run(gated_delta_fla.gated_delta, doubled(given))
    with pytest.raises(ValueError, match=r"even and at most 256. Got 258 \(queries\)"):
        run(gated_delta_fla.gated_delta, inputs(generator, B=1, N=3, H=1, K=258, V=16))
    with pytest.raises(ValueError, match="even and at most 256. Got 15"):
        run(gated_delta_fla.gated_delta_step, inputs(generator, B=1, N=3, H=1, K=16, V=15))
    with pytest.raises(ValueError, match="B = 1. Got B = 2"):
        run(gated_delta_fla.gated_delta, given, cu_seqlens=torch.tensor([0, 3], device=DEVICE))


def test_internals_that_changed_are_noticed_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from fla.ops.common import chunk_o

    assert problem_of(gated_delta_fla._from_internals, DEVICE, torch.float32) is None
    right = chunk_o.chunk_fwd_o
    monkeypatch.setattr(chunk_o, "chunk_fwd_o", lambda **options: 1.1 * right(**options))
    gated_delta_fla.error_path.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="they are off by"):
            assert gated_delta_fla.error_path(DEVICE, torch.float32) == "shifted query"
    finally:
        gated_delta_fla.error_path.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_on_a_gpu_long_streams_agree_in_both_dtypes(way: str, width: int, generator: torch.Generator) -> None:
    given = inputs(generator, B=2, N=1000, H=2, K=width, V=width)
    true = parts_and_gradients(naive.gated_delta, doubled(given))
    assert_alike(parts_and_gradients(gated_delta_fla.gated_delta, given), true, TOLERANCE)
    half = {name: x.bfloat16() if name in ("queries", "keys", "values") else x for name, x in given.items()}
    rounded = parts_and_gradients(naive.gated_delta, doubled(half))
    assert_alike(parts_and_gradients(gated_delta_fla.gated_delta, half), rounded, TOLERANCE_BF16)


def test_on_hopper_few_configurations_are_tuned_over_and_all_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [kernel for name, kernel in _tuned_kernels() if name in SHORTLIST]
    assert len(kernels) == len(SHORTLIST)
    before = [kernel.configs for kernel in kernels]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    every = [Config({"BV": v}, num_warps=w, num_stages=s) for v in (32, 64) for w in (2, 4) for s in (2, 3, 4)]
    name, kernel = next(pair for pair in _tuned_kernels() if pair[0].endswith("fwd_kernel_h_blockdim64"))
    monkeypatch.setattr(kernel, "configs", every)
    for width, dtype, few in ((64, torch.bfloat16, True), (128, torch.bfloat16, False), (64, torch.float32, False)):
        with shortlisted(width, dtype, torch.device("cuda")):
            assert len(kernel.configs) == (len(SHORTLIST[name]) if few else len(every))
        assert kernel.configs is every
    monkeypatch.undo()
    assert all(now.configs is then for now, then in zip(kernels, before, strict=True))
