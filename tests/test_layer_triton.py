"""The fused layer equals the plain one, forward and gradients: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import random_tokens
from triton_on_cpu import DEVICE, INTERPRETED, RUNS, WHY_NOT

from hamts.config import ModelConfig
from hamts.nn.eviction import end_times
from hamts.nn.ham import HAMLayer
from hamts.nn.heads import Turn
from hamts.nn.rows import RowMove
from hamts.nn.scores import surprise
from hamts.nn.scratchpad import Entries
from hamts.nn.tokens import Policy, map_tensors
from hamts.ops.kernels import Kernels, resolve_kernels
from hamts.ops.layer_products import products
from hamts.ops.types import UnreadDelta

pytest.importorskip("triton", reason="needs triton: pip install 'hamts[gpu]'")
pytestmark = pytest.mark.skipif(not RUNS, reason=WHY_NOT)

from hamts.ops import layer_triton  # noqa: E402

# float32 sums in another order
TOLERANCE = 2e-5
B, C, W = 2, 3, 2


def drawn_layer(config: ModelConfig) -> HAMLayer:
    """The same weights in every run: a draw whose gradient nearly vanishes makes any rounding look large."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HAMLayer(config)


def make_layer(heads: int, head_width: int, generator: torch.Generator) -> HAMLayer:
    layer = drawn_layer(ModelConfig(width=heads * head_width, heads=heads, layers=1, window_patches=W, patch_steps=1))
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    return layer.to(DEVICE)


def draw(generator: torch.Generator, *shape: int, learns: bool = True) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(DEVICE).requires_grad_(learns)


def agree(ours: Callable[[], Any], theirs: Callable[[], Any], leaves: dict[str, torch.Tensor], seed: int = 3) -> None:
    """Outputs and the gradients of a random projection of them."""
    found = []
    for run in (ours, theirs):
        outputs = run()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(seed)
        loss = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
        found.append((outputs, torch.autograd.grad(loss, list(leaves.values()))))
    for number, (mine, truth) in enumerate(zip(found[0][0], found[1][0], strict=True)):
        assert torch.allclose(mine, truth, rtol=TOLERANCE, atol=TOLERANCE), f"output {number}"
    for name, mine, truth in zip(leaves, found[0][1], found[1][1], strict=True):
        error = float((mine - truth).norm() / truth.norm().clamp_min(1e-12))
        assert error < TOLERANCE, f"gradient of {name}: {error:.1e}"


def turn_of(layer: HAMLayer, N: int) -> Turn:
    return layer.turn_of(torch.linspace(0, 40, B * N, dtype=torch.float64, device=DEVICE).view(B, N))


@pytest.mark.parametrize(("heads", "head_width", "N"), [(2, 16, 9), (1, 24, 70), (2, 64, 5), (3, 32, 1)])
def test_inputs_of_both_branches(heads: int, head_width: int, N: int, generator: torch.Generator) -> None:
    layer = make_layer(heads, head_width, generator)
    D = heads * head_width
    turn = turn_of(layer, N)
    present = torch.rand(B, N, generator=generator).to(DEVICE) > 0.2
    leaves = {
        "mixed": draw(generator, B, C, N, 3 * D),
        "tail": draw(generator, B, C, 3, 3 * D),
        "pending_keys": draw(generator, B, W, C, heads, head_width),
        "pending_values": draw(generator, B, W, C, heads, head_width),
        "conv": layer.conv,
        "gain": layer.key_norm.gain,
    }

    def fused() -> tuple[torch.Tensor, ...]:
        return layer_triton.layer_inputs(**leaves, present=present, turn=turn)

    def plain() -> tuple[torch.Tensor, ...]:
        masked = leaves["mixed"] * present[:, None, :, None]
        padded = torch.cat([leaves["tail"], masked], 2)
        raw_keys, raw_values = masked.reshape(B, C, N, 3, heads, head_width)[:, :, :, 1:].unbind(3)
        keys = torch.cat([leaves["pending_keys"], layer._turned_keys(raw_keys, turn)], 1)
        values = torch.cat([leaves["pending_values"], raw_values.transpose(1, 2)], 1)
        return (*layer._convolved(padded), keys, values)

    agree(fused, plain, leaves)


@pytest.mark.parametrize(("heads", "head_width", "N"), [(2, 16, 9), (1, 24, 70), (3, 32, 1)])
def test_queries(heads: int, head_width: int, N: int, generator: torch.Generator) -> None:
    layer = make_layer(heads, head_width, generator)
    turn = turn_of(layer, N)
    leaves = {"raw": draw(generator, B, C, N, heads * head_width), "gain": layer.query_norm.gain}
    agree(
        lambda: layer_triton.turned_queries(**leaves, turn=turn, scale=head_width**-0.5),
        lambda: layer._turned_queries(leaves["raw"], turn),
        leaves,
    )


@pytest.mark.parametrize(("heads", "head_width", "N"), [(2, 16, 9), (1, 24, 70), (3, 32, 1)])
def test_mix_of_both_branches(heads: int, head_width: int, N: int, generator: torch.Generator) -> None:
    layer = make_layer(heads, head_width, generator)
    # beyond its bounds too
    marks = 4 * torch.randn(B, N, C, heads, 3, generator=generator)
    leaves = {
        "recurrent": draw(generator, B, C, N, heads, head_width),
        "exact": draw(generator, B, N, C, heads, head_width),
        "marks": marks.to(DEVICE).requires_grad_(),
        "gates": draw(generator, B, C, N, 4, heads),
        "opened": draw(generator, B, C, N, heads * head_width),
        "recurrent_gain": layer.recurrent_norm.gain,
        "exact_gain": layer.exact_norm.gain,
        "from_marks": layer.from_marks,
    }
    now = draw(generator, B, C, N, 3, learns=False)
    agree(
        lambda: layer_triton.mixed_branches(**leaves, now=now),
        lambda: layer._mix(
            leaves["recurrent"], leaves["exact"], leaves["marks"], now, leaves["gates"], leaves["opened"]
        ),
        leaves,
    )


def test_errors_and_surprise(generator: torch.Generator) -> None:
    values, error = draw(generator, 5, 7, 24, learns=False), draw(generator, 5, 7, 24, learns=False)
    values[0, 0], error[0, 1] = 0.0, values[0, 1]
    squared, unlike = layer_triton.compared(error, values)
    assert torch.allclose(squared, error.square().sum(-1), rtol=1e-5)
    assert torch.allclose(unlike, surprise(values - error, values), atol=1e-5)
    # what was written is the gate's part of the error
    beta = 0.1 + torch.rand(5, 7, generator=generator).to(DEVICE)
    again = layer_triton.compared(beta[..., None] * error, values, beta)
    for mine, truth in zip(again, (squared, unlike), strict=True):
        assert torch.allclose(mine, truth, rtol=1e-4, atol=1e-5)
    delta = UnreadDelta(values, values, values, beta[..., None] * error, beta)
    assert torch.allclose(delta.error, error, atol=1e-6) and torch.allclose(delta.prediction, values - error, atol=1e-6)


@pytest.mark.parametrize(("rows", "shape"), [(9, (3, 8)), (70, (2, 600)), (5, (3,)), (1, (1, 1030))])
def test_rows_closed_up_by_a_kernel(rows: int, shape: tuple[int, ...], generator: torch.Generator) -> None:
    alive = (torch.rand(B, rows, generator=generator) < 0.4).to(DEVICE)
    alive[0] = False
    wide = draw(generator, B, rows, *shape)
    for places in (rows, max(1, rows // 3)):
        results = []
        for fused in (False, True):
            move = RowMove.closing(alive, places, fused=fused)
            got = torch.where(move.filled.view(B, places, *(1,) * len(shape)), move(wide), 0.0)
            weight = torch.arange(got.numel(), device=DEVICE).view(got.shape).sin()
            results.append((got, *torch.autograd.grad((got * weight).sum(), wide)))
        for mine, truth in zip(*results, strict=True):
            assert torch.equal(mine, truth)


@pytest.mark.parametrize(("n_tokens", "width", "outputs"), [(70, 96, 24), (5, 16, 8), (64, 128, 128)])
def test_the_precise_map_beside_a_cast(n_tokens: int, width: int, outputs: int, generator: torch.Generator) -> None:
    x, weight = draw(generator, 2, n_tokens, width), draw(generator, outputs, width)
    leaves = [x, weight, draw(generator, outputs), draw(generator, 32, width)]
    found = []
    for fused in (True, False):
        narrow, first, (other,) = products(
            x, kind=torch.float16, precise=(weight, leaves[2]), maps=[(leaves[3], None)], fused=fused
        )
        seed = torch.arange(first.numel(), device=DEVICE).view(first.shape).sin()
        grads = torch.autograd.grad((first * seed).sum() + other.float().square().sum(), leaves)
        found.append((narrow, first, *grads))
    for mine, truth in zip(*found, strict=True):
        assert mine.dtype == truth.dtype
        mine, truth = mine.detach().float(), truth.detach().float()
        assert float((mine - truth).norm() / truth.norm()) < 1e-5


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 40, 1100])
def test_places_and_ends_of_entries(rows: int, share: float, generator: torch.Generator) -> None:
    alive, must = (torch.rand(2, B, rows, generator=generator) < torch.tensor([share, 0.3])[:, None, None]).to(DEVICE)
    for places in (rows, max(1, rows // 5), rows + 3):
        ours, theirs = (RowMove.closing(alive, places, fused=fused) for fused in (True, False))
        for name in ("source", "filled", "place", "kept"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    appears = torch.arange(rows, device=DEVICE).expand(B, -1) // 3
    nothing = {name: torch.zeros(B, rows, 1, device=DEVICE) for name in Entries.__dataclass_fields__}
    entries = Entries(**{**nothing, "alive": alive, "must_keep": must})
    for caps in ((None, None), (7, None), (0, 2), (40, 5)):
        policy = Policy(torch.ones(B), torch.ones(B, 1, 1, dtype=torch.bool), cap_kept=caps[0], cap_must=caps[1])
        ours, theirs = (end_times(entries, appears, policy, fused=fused) for fused in (True, False))
        assert torch.equal(ours, theirs), caps


def test_rows_that_stay_and_move_share_a_gradient(generator: torch.Generator) -> None:
    alive = (torch.rand(B, 30, generator=generator) < 0.4).to(DEVICE)
    rows = draw(generator, B, 30, 2, 40)
    move = RowMove.closing(alive, 30, fused=True)
    weights = [torch.randn(B, 30, 2, 40, generator=generator).to(DEVICE) for _ in range(2)]
    mask = move.filled[..., None, None]
    for used in ((0,), (1,), (0, 1)):
        results = []
        for same, moved in (move.shared(rows), (rows, move(rows))):
            parts = [same * weights[0], torch.where(mask, moved, 0.0) * weights[1]]
            results.append(torch.autograd.grad(sum(parts[n].sum() for n in used), rows)[0])
        assert torch.allclose(*results, rtol=1e-6, atol=1e-6)


def test_half_precision_comes_near_to_single(generator: torch.Generator) -> None:
    if INTERPRETED:
        pytest.skip("the interpreter truncates bfloat16")
    layer = make_layer(2, 64, generator)
    turn = turn_of(layer, 50)
    raw = draw(generator, B, C, 50, 128, learns=False)
    results = [
        layer_triton.turned_queries(x, gain=layer.query_norm.gain, turn=turn, scale=0.125).float()
        for x in (raw, raw.bfloat16())
    ]
    assert float((results[0] - results[1]).norm() / results[0].norm()) < 5e-3


def two_chunks(layer: HAMLayer, tokens: list[Any], inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """A layer over two chunks, its memory carried: outputs, state and masses."""
    memory = layer.empty_memory(2, 3, layer.conv)
    policy = Policy(
        share=torch.tensor([0.5, 0.3], device=DEVICE),
        readable=torch.ones(2, 3, 3, dtype=torch.bool, device=DEVICE),
        cap_kept=6,
        cap_must=3,
    )
    outputs = []
    for part, x in zip(tokens, inputs, strict=True):
        result = layer(x, tokens=part, memory=memory, policy=policy)
        memory = result.memory
        assert result.trace.entries_mass is not None
        outputs += [result.output, result.trace.entries_bias[result.trace.entries_judged].sum()]
        outputs.append(result.trace.entries_mass.sum())
    return (*outputs, memory.state, memory.pending.keys, memory.conv_tail)


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("surprise+tags", {}),
        ("learned+innovation+tags", {}),
        ("surprise+tags", {"read_reference": 4, "rotary_share": 0.25}),
        ("surprise+tags", {"rotary_share": 0.0}),
    ],
)
def test_a_whole_layer(router: str, options: dict[str, Any], generator: torch.Generator) -> None:
    config = ModelConfig(width=32, heads=2, layers=1, window_patches=W, patch_steps=2, router=router, **options)
    layer = drawn_layer(config)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
        layer.thresholds.values.fill_(0.6)
    layer = layer.to(DEVICE)
    tokens = [
        map_tensors(random_tokens(generator, patches=n, dtype=torch.float32), lambda t: t.to(DEVICE)) for n in (12, 7)
    ]
    inputs = [draw(generator, 2, 3, n, 32) for n in (12, 7)]
    leaves = {f"input {n}": x for n, x in enumerate(inputs)}
    leaves |= {name: weight for name, weight in layer.named_parameters() if "router" not in name}

    def on(kernels: Kernels) -> Callable[[], tuple[torch.Tensor, ...]]:
        def run() -> tuple[torch.Tensor, ...]:
            layer.kernels = kernels
            return two_chunks(layer, tokens, inputs)

        return run

    agree(on(Kernels("triton")), on(Kernels("torch")), leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [None, 9_000])
def test_no_launched_pass_waits_for_the_device(cap: int | None, generator: torch.Generator) -> None:
    """Training, of 12,288 tokens a chunk: forward, backward and the memory they leave never ask how many are kept."""
    from hamts.ops.gated_delta_trial import untuned

    config = ModelConfig(width=128, heads=2, layers=1, window_patches=16, patch_steps=2, router="surprise+tags")
    layer = drawn_layer(config).to("cuda")
    layer.kernels = resolve_kernels("fla+triton", device="cuda", head_width=64)
    length = 4_096
    tokens = map_tensors(
        random_tokens(generator, patches=length, dtype=torch.float32), lambda tensor: tensor.to("cuda")
    )
    x = draw(generator, 2, 3, length, 128).to("cuda")
    policy = Policy(
        share=torch.tensor([0.5, 0.9], device="cuda"), cap_kept=cap, cap_must=cap,
        readable=torch.ones(2, 3, 3, dtype=torch.bool, device="cuda"),
    )  # fmt: skip
    leaves = [weight for name, weight in layer.named_parameters() if "router" not in name]

    def passes() -> tuple[torch.Tensor, torch.Tensor]:
        # without gradients lists of so many rows are asked for
        assert torch.is_grad_enabled()
        memory = layer.empty_memory(2, 3, layer.conv)
        with torch.autocast("cuda", torch.bfloat16):
            first = layer(x, tokens=tokens, memory=memory, policy=policy)
            second = layer(x, tokens=tokens, memory=first.memory, policy=policy)
        torch.autograd.grad(second.output.sum(), leaves, allow_unused=True)
        return second.output, second.memory.scratchpad.alive.sum(1)

    with untuned():
        # what is compiled and measured once, is by now
        output, alive = passes()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again, _ = passes()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output, again)
    wanted = 2 * 3 * length if cap is None else 2 * cap
    assert int(alive.max()) > 8_192 and int(alive.max()) <= wanted
