"""The read's Triton kernels equal the torch ones, in outputs, gradients and masses.

On a CPU the kernels run in Triton's interpreter, in a process that ``test_interpreted.py`` starts. On a CUDA device
they are compiled (marker ``gpu``).

B items · C channels · N patches · H heads · M entries (scratchpad) · W window patches
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ops import SCENES, Scene, distance
from triton_on_cpu import INTERPRETED, WHY_NOT

import hamts.ops
from hamts.ops.attend import attend as torch_attend
from hamts.ops.types import ScratchKeys

pytest.importorskip("triton")
PLACES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason=WHY_NOT)),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# relative to the truth, float64 on the numbers as rounded to the dtype. float32 as in test_ops; one rounding is 4e-3 in
# bfloat16 and 5e-4 in float16, and a gradient passes two roundings of factors and one of the result
RELATIVE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same small tiles for every case, or each would search for its own; one test takes larger ones."""
    from hamts.ops import attend_triton_tiles as tiles

    place = 0 if "_long_" in request.node.name else -1
    tiles.use({kernel: candidates[place] for kernel, candidates in tiles.CANDIDATES.items()})
    if INTERPRETED:
        tiles.use(dict.fromkeys(tiles.CANDIDATES, tiles.SMALL))
    yield
    tiles.use({})


@dataclass(frozen=True)
class WideScene(Scene):
    """A scene whose heads are as wide as the kernels ask."""

    heads: int = 2
    key_width: int = 20
    value_width: int = 17
    level: float = 0.0

    def leaves(self, dtype: torch.dtype = torch.float64, device: str = "cpu") -> dict[str, torch.Tensor]:
        """Float64 holds exactly what ``dtype`` does; marks, biases and the channel bias stay in float32 at least."""
        generator = torch.Generator().manual_seed(self.seed)
        leaves = {}
        for name, leaf in super().leaves(torch.float64).items():
            draw = leaf.detach()
            if name in ("queries", "local_keys", "keys", "local_values", "values"):
                width = self.value_width if name.endswith("values") else self.key_width
                draw = torch.randn(*leaf.shape[:-2], self.heads, width, generator=generator)
                draw = draw * (2 * self.key_width**-0.5 if name == "queries" else 1.0)
                draw = draw.to(dtype)
            elif name == "channel_bias" or (name == "bias" and self.bias_per_head):
                draw = torch.randn(*leaf.shape[:-1], self.heads, generator=generator)
            if name.endswith("marks"):
                draw = draw.float() + self.level
            leaves[name] = draw.to(device)
        return leaves

    def pair(self, dtype: torch.dtype, device: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The same leaves twice: as the kernels take them, and in float64."""
        leaves = self.leaves(dtype, device)
        narrow = ("queries", "local_keys", "keys", "local_values", "values")
        mine = {n: x.to(dtype if n in narrow else torch.float32).requires_grad_() for n, x in leaves.items()}
        return mine, {n: x.detach().double().requires_grad_() for n, x in mine.items()}

    def read(self, op: Any, leaves: dict[str, torch.Tensor], device: str) -> Any:
        masks = {name: x.to(device) for name, x in self.masks().items()}
        if self.n_marks == 0:
            leaves = {n: x for n, x in leaves.items() if not n.endswith("marks")}
        return self.run(op, leaves, masks)


def wide(scene: Scene, **changes: Any) -> WideScene:
    return WideScene(**{**{f.name: getattr(scene, f.name) for f in fields(scene)}, **changes})


def triton_attend(*positional: Any, **named: Any) -> Any:
    from hamts.ops import attend_triton

    return attend_triton.attend(*positional, **named)


def assert_equal(scene: WideScene, dtype: torch.dtype, device: str) -> None:
    mine, exact = scene.pair(dtype, device)
    got, truth = scene.read(triton_attend, mine, device), scene.read(torch_attend, exact, device)
    for name in ("output", "marks", "scratch_mass", "local_mass"):
        value, expected = getattr(got, name), getattr(truth, name)
        assert (value is None) == (expected is None), name
        if expected is not None:
            assert torch.isfinite(value).all(), name
            assert distance(value, expected) <= RELATIVE[dtype], (name, distance(value, expected))
    expected_grads = torch.autograd.grad(gradient_of(truth), list(exact.values()), materialize_grads=True)
    grads = torch.autograd.grad(gradient_of(got), list(mine.values()), materialize_grads=True)
    # a gradient that cancels to nearly 0 is off by the rounding of its terms, which are as large as those of the values
    scale = expected_grads[list(exact).index("local_values")].norm()
    for name, expected, value in zip(exact, expected_grads, grads, strict=True):
        assert torch.isfinite(value).all(), f"gradient of {name}"
        apart = (value.double() - expected).norm() / torch.maximum(expected.norm(), 0.3 * scale)
        assert apart <= RELATIVE[dtype], (f"gradient of {name}", float(apart))


def gradient_of(result: Any) -> torch.Tensor:
    """Of output and marks; ``weighed`` would also ask for the masses."""
    total = torch.zeros((), dtype=torch.float64, device=result.output.device)
    for part in (result.output, result.marks):
        if part is not None and part.numel():
            weight = torch.linspace(-1, 1, part.numel(), dtype=torch.float64, device=part.device).view(part.shape)
            total = total + (weight * part.double()).sum()
    return total


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("scene", SCENES, ids=str)
def test_kernels_equal_torch(scene: Scene, device: str) -> None:
    assert_equal(wide(scene), torch.float32, device)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("n_patches", [1, 31, 33, 65])
def test_odd_lengths_with_unmasked_tiles_between_two_bounds(n_patches: int, device: str) -> None:
    assert_equal(
        WideScene(n_items=1, n_patches=n_patches, n_channels=1, n_entries=70, window=3, key_width=16, value_width=16),
        torch.float32,
        device,
    )


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("n_channels", [1, 3])
@pytest.mark.parametrize("n_marks", [1, 3])
def test_a_last_mark_that_is_one_may_be_said(n_marks: int, n_channels: int, device: str) -> None:
    scene = WideScene(n_patches=20, n_channels=n_channels, n_marks=n_marks)
    mine, exact = scene.pair(torch.float32, device)
    for leaves in (mine, exact):
        for name in ("local_marks", "marks"):
            given = leaves[name].detach()
            leaves[name] = torch.cat([given[..., :-1], torch.ones_like(given[..., -1:])], -1).requires_grad_()
    got = scene.read(partial(triton_attend, share_mark=True), mine, device)
    truth = scene.read(torch_attend, exact, device)
    expected = torch.autograd.grad(gradient_of(truth), list(exact.values()), materialize_grads=True)
    grads = torch.autograd.grad(gradient_of(got), list(mine.values()), materialize_grads=True)
    for name, value, true in zip(exact, grads, expected, strict=True):
        assert distance(value, true) <= RELATIVE[torch.float32], name
    with pytest.raises(ValueError, match=r"scratch.marks must be given where share_mark says"):
        scene.read(
            lambda *given, scratch, **named: triton_attend(
                *given, scratch=replace(scratch, marks=None), share_mark=True, **named
            ),
            mine,
            device,
        )


@pytest.mark.parametrize("device", PLACES)
def test_tiles_that_lie_inside_their_tensors_are_read_without_masks(device: str) -> None:
    from hamts.ops import attend_triton_tiles as tiles

    tiles.use(dict.fromkeys(tiles.CANDIDATES, tiles.SMALL))
    scene = WideScene(n_items=2, n_patches=64, n_channels=1, n_entries=48, window=16, n_marks=2, bias_per_head=True)
    assert_equal(scene, torch.float32, device)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("raised", [-400.0, 90.0, 1000.0])
@pytest.mark.parametrize("n_channels", [1, 3])
def test_entries_far_above_and_below_the_window(n_channels: int, raised: float, device: str) -> None:
    """The window's largest logit stands for all; where that overflows or hides what matters, a tile is read anew."""
    scene = WideScene(n_patches=40, n_entries=30, n_channels=n_channels, window=3)
    mine, _ = scene.pair(torch.float32, device)
    mine["bias"] = (mine["bias"].detach() + raised).requires_grad_()
    exact = {name: x.detach().double().requires_grad_() for name, x in mine.items()}
    got, truth = scene.read(triton_attend, mine, device), scene.read(torch_attend, exact, device)
    for name in ("output", "marks", "scratch_mass", "local_mass"):
        # a float32 logit of 1,000 is off by 3e-5
        assert distance(getattr(got, name), getattr(truth, name)) <= (1e-4 if raised > 100 else 1e-5), name


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_off_by_their_rounding_alone(dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no products of bfloat16")
    assert_equal(WideScene(n_patches=33, n_entries=20, n_channels=2, window=4, value_width=20), dtype, device)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_level_far_from_zero_keeps_its_differences(dtype: torch.dtype, device: str) -> None:
    """The layer reads levels of 50,000 whose differences of 1 matter; the weights' rounding must cancel."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no products of bfloat16")
    scene = WideScene(n_channels=1, level=50_000.0, n_patches=20, n_marks=3)
    mine, exact = scene.pair(dtype, device)
    for leaves in (mine, exact):
        for name in ("local_marks", "marks"):
            leaves[name] = torch.cat([leaves[name].detach()[..., :2], torch.ones_like(leaves[name][..., 2:])], -1)
    got, truth = scene.read(triton_attend, mine, device), scene.read(torch_attend, exact, device)

    def apart(read: torch.Tensor) -> torch.Tensor:
        return read.double()[..., :2] - read.double()[..., 2:] * 50_000.0

    # float32 itself rounds 50,000 at 4e-3
    off = float((apart(got.marks) - apart(truth.marks)).detach().abs().max())
    assert off < {torch.float32: 0.02, torch.float16: 0.02, torch.bfloat16: 0.04}[dtype]


@pytest.mark.parametrize("device", PLACES)
def test_a_query_that_sees_nothing_gets_zero_and_finite_gradients(device: str) -> None:
    scene = wide(Scene())
    leaves, _ = scene.pair(torch.float32, device)
    masks = {name: x.to(device) for name, x in scene.masks().items()}
    masks["local_present"] = torch.zeros_like(masks["local_present"])
    masks["visible_from"] = torch.full_like(masks["visible_from"], 4)
    masks["visible_until"] = torch.full_like(masks["visible_until"], 6)
    masks["channel"], masks["readable"] = torch.zeros_like(masks["channel"]), torch.zeros_like(masks["readable"])
    got = scene.run(triton_attend, leaves, masks)
    seeing = torch.zeros(2, 9, 3, dtype=torch.bool, device=device)
    seeing[:, 4:6, 0] = True
    assert (got.output[~seeing] == 0).all() and (got.marks[~seeing] == 0).all()
    assert (got.output[seeing] != 0).all()
    for gradient in torch.autograd.grad(gradient_of(got), list(leaves.values()), materialize_grads=True):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("device", PLACES)
def test_more_channels_than_bits_of_a_word(device: str) -> None:
    assert_equal(WideScene(n_items=1, n_patches=3, n_channels=35, n_entries=40, window=2), torch.float32, device)


@pytest.mark.parametrize("device", PLACES)
def test_two_runs_give_the_same_bits(device: str) -> None:
    scene = WideScene(n_patches=40, n_entries=50)
    mine, _ = scene.pair(torch.float32, device)
    runs = []
    for _ in range(2):
        got = scene.read(triton_attend, mine, device)
        grads = torch.autograd.grad(gradient_of(got), list(mine.values()), materialize_grads=True)
        runs.append((got.output, got.marks, got.scratch_mass, got.local_mass, *grads))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("device", PLACES)
def test_what_the_kernels_cannot_do_is_refused_with_what_they_can(device: str) -> None:
    for change, text in [
        ({"key_width": 8}, r"Keys of a head must be 16 to 128 wide for kernel 'triton'. Got 8."),
        ({"value_width": 256}, r"Values of a head must be 16 to 128 wide for kernel 'triton'. Got 256."),
    ]:
        scene = wide(Scene(), **change)
        with pytest.raises(ValueError, match=text):
            scene.read(triton_attend, scene.pair(torch.float32, device)[0], device)
    scene = wide(Scene())
    with pytest.raises(ValueError, match=r"computes in \['bfloat16', 'float16', 'float32'\]. Got float64."):
        scene.read(triton_attend, scene.pair(torch.float32, device)[1], device)
    with pytest.raises(ValueError, match=r"cross_span must lie in 0 .. window. Got cross_span=3, window=2."):
        scene = wide(Scene(window=2, cross_span=3))
        scene.read(triton_attend, scene.pair(torch.float32, device)[0], device)


@pytest.mark.skipif(not INTERPRETED, reason=WHY_NOT)
@pytest.mark.parametrize(("key_width", "value_width"), [(16, 128), (128, 16), (64, 96)])
def test_head_widths_in_the_interpreter(key_width: int, value_width: int) -> None:
    scene = WideScene(n_items=1, n_patches=7, n_channels=2, window=3, key_width=key_width, value_width=value_width)
    assert_equal(scene, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("width", "dtype"), [(w, torch.bfloat16) for w in (16, 48, 64, 96, 128)] + [(128, torch.float32)]
)
def test_head_widths_on_a_device(width: int, dtype: torch.dtype) -> None:
    scene = WideScene(n_patches=300, n_entries=333, n_channels=1, window=20, key_width=width, value_width=width)
    assert_equal(scene, dtype, "cuda")


@pytest.mark.gpu
def test_a_long_ragged_read_on_a_device() -> None:
    scene = WideScene(n_items=3, n_patches=1000, n_channels=1, n_entries=700, window=64, key_width=64, value_width=64)
    assert_equal(scene, torch.bfloat16, "cuda")


@pytest.mark.gpu
def test_a_long_read_whose_tiles_need_no_masks_on_a_device() -> None:
    scene = WideScene(n_items=2, n_patches=1024, n_channels=1, n_entries=768, window=64, key_width=64, value_width=64)
    assert_equal(scene, torch.bfloat16, "cuda")


def test_without_the_interpreter_a_cpu_is_refused() -> None:
    if INTERPRETED:
        pytest.skip("the interpreter takes a CPU")
    scene = wide(Scene())
    with pytest.raises(RuntimeError, match=r"Kernel 'triton' needs a device of type 'cuda'. Got 'cpu'."):
        scene.read(triton_attend, scene.pair(torch.float32, "cpu")[0], "cpu")


@pytest.mark.parametrize("name", ["attend_triton", "decode_triton"])
def test_without_triton_the_extra_that_brings_it_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(hamts.ops.__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location("without_triton", path)
    assert spec is not None and spec.loader is not None
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"need the package triton, 3.7.1 or later. .*pip install 'hamts\[gpu\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_scratch_keys_may_be_missing() -> None:
    if not INTERPRETED:
        pytest.skip(WHY_NOT)
    scene = wide(Scene(n_entries=0))
    leaves, _ = scene.pair(torch.float32, "cpu")
    masks = scene.masks()
    names = {f.name for f in fields(ScratchKeys)}
    local = {n: x for n, x in {**leaves, **masks}.items() if n not in names and n != "queries"}
    got = triton_attend(leaves["queries"], **local, scratch=None, window=2)
    assert got.scratch_mass is None
    assert torch.equal(got.output, scene.read(triton_attend, leaves, "cpu").output)
