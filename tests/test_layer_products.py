"""A layer's products as one operation equal its maps called one after the other, and so do their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hamts.ops.layer_products import products

D = 12


def maps(generator: torch.Generator, kind: torch.dtype) -> list[nn.Linear]:
    made = [nn.Linear(D, outputs, bias=bias, dtype=kind) for outputs, bias in ((8, True), (36, False), (12, True))]
    with torch.no_grad():
        for weight in (weight for one in made for weight in one.parameters()):
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return made


def pair(layer: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layer.weight, layer.bias


@pytest.mark.parametrize("unused", [(), (0,), (1,), (1, 2), (0, 1, 2)])
def test_gradients_add_up_as_those_of_separate_maps(unused: tuple[int, ...], generator: torch.Generator) -> None:
    layers = maps(generator, torch.float64)
    x = torch.randn(2, 3, 5, D, generator=generator, dtype=torch.float64, requires_grad=True)
    leaves = [x, *(weight for one in layers for weight in one.parameters())]
    seeds = [torch.randn(2, 3, 5, one.out_features, generator=generator, dtype=torch.float64) for one in layers]
    narrow, first, others = products(x, kind=x.dtype, precise=pair(layers[0]), maps=[pair(one) for one in layers[1:]])
    assert torch.equal(narrow, x) and not narrow.requires_grad
    plain = [one(x) for one in layers]
    used = [n for n in range(3) if n not in unused]
    found = []
    for made in ([first, *others], plain):
        loss = sum((made[n] * seeds[n]).sum() for n in used) + 0.0 * x.sum()
        found.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for mine, truth in zip([first, *others], plain, strict=True):
        assert torch.allclose(mine, truth, rtol=1e-12, atol=1e-12)
    for mine, truth in zip(*found, strict=True):
        if truth is None:
            assert mine is None or not mine.any()
        else:
            assert torch.allclose(mine, truth, rtol=1e-12, atol=1e-12)


def test_under_mixed_precision_one_map_is_taken_in_full(generator: torch.Generator) -> None:
    layers = maps(generator, torch.float32)
    x = torch.randn(4, 7, D, generator=generator, requires_grad=True)
    leaves = [x, *(weight for one in layers for weight in one.parameters())]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow, first, others = products(
            x, kind=torch.bfloat16, precise=pair(layers[0]), maps=[pair(one) for one in layers[1:]]
        )
    assert torch.equal(narrow, x.bfloat16())
    assert first.dtype == torch.float32 and all(one.dtype == torch.bfloat16 for one in others)
    assert torch.allclose(first, layers[0](x), rtol=1e-6, atol=1e-6)
    found = []
    for made in ([first, *others], [one(x) for one in layers]):
        loss = sum((one.float() * torch.arange(one.numel()).view(one.shape).sin()).sum() for one in made)
        found.append(torch.autograd.grad(loss, leaves))
    for leaf, mine, truth in zip(leaves, *found, strict=True):
        assert mine.dtype == leaf.dtype
        assert float((mine - truth).norm() / truth.norm()) < 2e-2
    # what does not pass through a narrow product has all digits
    for mine, truth in zip(found[0][1:3], found[1][1:3], strict=True):
        assert torch.allclose(mine, truth, rtol=1e-5, atol=1e-5)


def test_nothing_is_worked_out_for_what_has_no_gradient(generator: torch.Generator) -> None:
    layers = maps(generator, torch.float64)
    layers[0].requires_grad_(False)
    x = torch.randn(3, D, generator=generator, dtype=torch.float64)
    _, first, (mixed, opened) = products(
        x, kind=x.dtype, precise=pair(layers[0]), maps=[pair(one) for one in layers[1:]]
    )
    (first.sum() + mixed.sum() + opened.sum()).backward()
    assert x.grad is None and layers[0].weight.grad is None
    assert torch.allclose(layers[1].weight.grad, x.sum(0).expand(36, D))
