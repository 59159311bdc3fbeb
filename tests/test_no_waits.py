"""What spares a GPU waiting for the host changes no result: room instead of counts, masks instead of picked rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from networks import make_config, open_scratchpad, perturb, random_tokens

from hamts.data.constants import constant
from hamts.nn import scratchpad
from hamts.nn.budget import FOLLOW_EXACTLY_STEPS, FOLLOW_RATE, SHARES, ThresholdTable
from hamts.nn.ham import HAMLayer
from hamts.nn.head import outward
from hamts.nn.rows import RowMove, _gathered, _of_words, pays_to_ask, rows_for
from hamts.nn.tokens import Policy, map_tensors


def room(alive: torch.Tensor, most: int | None = None, *, skips_padding: bool = False) -> int:
    """What a GPU gives short lists, and all lists of a training pass."""
    return alive.shape[1] if most is None else min(most, alive.shape[1])


def test_moved_rows_and_their_gradient_are_those_picked_by_hand(generator: torch.Generator) -> None:
    alive = torch.rand(3, 17, generator=generator) < 0.4
    alive[1] = False
    rows = torch.randn(3, 17, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    for size in (17, rows_for(alive), 3, 0):
        moved = RowMove.closing(alive, size)
        got = moved(rows)
        weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
        wanted = torch.zeros(rows.shape, dtype=torch.float64)
        for b in range(3):
            for place, source in enumerate(alive[b].nonzero().flatten().tolist()[:size]):
                assert torch.equal(got[b, place], rows[b, source])
                wanted[b, source] = weight[b, place]
            assert int(moved.filled[b].sum()) == min(int(alive[b].sum()), size)
        # padding has no gradient, whatever comes for it
        (grad,) = torch.autograd.grad((got * weight).sum(), rows)
        assert torch.equal(grad, wanted)


def test_only_a_read_that_computes_with_padding_asks_how_long_lists_are() -> None:
    for recorded in (False, True):
        assert not pays_to_ask(1_000_000, recorded=recorded, skips_padding=True)
    assert pays_to_ask(8_193, recorded=False, skips_padding=False)
    assert not pays_to_ask(8_192, recorded=False, skips_padding=False)
    assert not pays_to_ask(8_193, recorded=True, skips_padding=False)


@pytest.mark.parametrize("fused", [True, False])
def test_rows_are_asked_for_by_who_reads_them(
    fused: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    told = []

    def rows(alive: torch.Tensor, most: int | None = None, *, skips_padding: bool = False) -> int:
        told.append(skips_padding)
        raise InterruptedError

    monkeypatch.setattr(scratchpad, "rows_for", rows)
    entries = HAMLayer(make_config()).empty_memory(2, 3, torch.zeros(())).scratchpad
    for name in ("merge_candidates", "append_candidates"):
        with pytest.raises(InterruptedError):
            getattr(scratchpad, name)(entries, entries, fused=fused)
    with pytest.raises(InterruptedError):
        scratchpad.append_shared(entries, entries)
    assert told == [fused, fused, True]


@pytest.mark.gpu
@pytest.mark.parametrize("gradients", [True, False])
def test_a_gpu_gives_long_lists_all_they_may_hold_where_padding_is_skipped(gradients: bool) -> None:
    alive = torch.arange(20_000, device="cuda").expand(2, -1) < 400
    with torch.set_grad_enabled(gradients):
        assert rows_for(alive, skips_padding=True) == 20_000 and rows_for(alive, 9_000, skips_padding=True) == 9_000
        assert rows_for(alive) == 512 and rows_for(alive, 9_000) == 512 and rows_for(alive, 8_192) == 8_192


def test_moved_rows_pass_a_check_of_their_gradient(generator: torch.Generator) -> None:
    alive = torch.tensor([[True, False, True, True], [False, True, False, False]])
    rows = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    moved = RowMove.closing(alive, 3)
    mask = moved.filled[..., None]
    assert torch.autograd.gradcheck(lambda x: torch.where(mask, moved(x), 0.0), (rows,))
    batched = torch.func.vmap(lambda x: torch.where(mask, moved(x), 0.0))(torch.stack([rows, 2 * rows]))
    assert torch.equal(batched[1], 2 * batched[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.bool])
def test_rows_read_as_words_are_the_rows(dtype: torch.dtype, generator: torch.Generator) -> None:
    rows = (10 * torch.randn(2, 9, 3, 8, generator=generator)).to(dtype)
    index = torch.randint(0, 9, (2, 5), generator=generator)
    wanted = torch.stack([rows[b, index[b]] for b in range(2)])
    assert torch.equal(_gathered(rows, index), wanted)
    assert _of_words(rows) == (dtype != torch.float64)
    if _of_words(rows):
        assert torch.equal(_gathered(rows.view(torch.int64), index).view(dtype), wanted)
    assert (
        not _of_words(rows[..., :0])
        and not _of_words(rows[..., :1])
        and not _of_words(rows.transpose(2, 3))
        and not _of_words(rows[:, :, 0, 0])
    )


@pytest.mark.parametrize("eviction", ["fifo", "lowest", "reservoir"])
@pytest.mark.parametrize("caps", [(None, None), (4, 2)])
def test_a_layer_with_room_for_all_is_the_layer_that_counts(
    eviction: str, caps: tuple[int | None, int | None], monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    layer = HAMLayer(make_config(router="learned+surprise+tags"))
    perturb(layer, generator)
    open_scratchpad(layer)
    layer = layer.double()
    tokens = [random_tokens(generator, patches=n) for n in (9, 6, 1)]
    inputs = [torch.randn(2, 3, n, 16, generator=generator, dtype=torch.float64) for n in (9, 6, 1)]
    policy = Policy(
        share=torch.tensor([0.4, 0.7], dtype=torch.float64), readable=torch.ones(2, 3, 3, dtype=torch.bool),
        cap_kept=caps[0], cap_must=caps[1], eviction=eviction,
    )  # fmt: skip

    def read() -> tuple[list[torch.Tensor], list[torch.Tensor], list[int]]:
        memory, outputs, rows = layer.empty_memory(2, 3, inputs[0]), [], []
        for part, x in zip(tokens, inputs, strict=True):
            result = layer(x, tokens=part, memory=memory, policy=policy)
            memory = result.memory
            outputs.append(result.output)
            rows.append(memory.scratchpad.alive.shape[1])
        gradients = torch.autograd.grad(torch.cat([x.flatten() for x in outputs]).square().sum(), list(_used(layer)))
        return outputs, list(gradients), rows

    plain, slopes, counted = read()
    monkeypatch.setattr(scratchpad, "rows_for", room)
    roomy, slopes_too, rows = read()
    assert rows != counted if caps[0] is None else rows == [6, 6, 6]
    for a, b in zip([*plain, *slopes], [*roomy, *slopes_too], strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def _used(layer: HAMLayer) -> list[torch.nn.Parameter]:
    return [weight for name, weight in layer.named_parameters() if "router" not in name]


def test_quantiles_of_the_rows_that_count_are_those_of_the_rows_picked(generator: torch.Generator) -> None:
    table = ThresholdTable(2)
    scores = torch.randn(211, 2, generator=generator)
    for share in (1.0, 0.5, 0.02):
        counted = torch.rand(211, generator=generator) < share
        assert torch.allclose(table.quantiles(scores, counted), table.quantiles(scores[counted]), rtol=1e-6, atol=1e-6)


def test_thresholds_follow_what_counts_and_stand_still_where_nothing_does(generator: torch.Generator) -> None:
    table = ThresholdTable(1)
    scores = torch.randn(50, 1, generator=generator)
    table.follow(scores, torch.zeros(50, dtype=torch.bool))
    assert int(table.seen_steps) == 0 and torch.equal(table.values, torch.zeros(1, len(SHARES)))
    counted = torch.arange(50) < 30
    for step in range(FOLLOW_EXACTLY_STEPS + 1):
        before = table.values.clone()
        table.follow(scores + step, counted)
        now = table.quantiles((scores + step)[:30])
        rate = 1.0 if step < FOLLOW_EXACTLY_STEPS else FOLLOW_RATE
        assert torch.allclose(table.values, before + rate * (now - before), atol=1e-5)
    assert int(table.seen_steps) == FOLLOW_EXACTLY_STEPS + 1


def test_constants_are_kept_where_asked_and_never_from_inference(generator: torch.Generator) -> None:
    with torch.inference_mode():
        first = constant((1.0, math.pi), torch.float32, "cpu", kept=True)
    assert first is constant([1.0, math.pi], torch.float32, "cpu", kept=True)
    assert not first.is_inference()
    assert first is not constant((1.0, math.pi), torch.float32, "cpu")
    weight = torch.ones(2, requires_grad=True)
    (weight * first).sum().backward()
    assert torch.equal(weight.grad, first)  # type: ignore[arg-type]


def test_mixed_precision_keeps_scores_gates_and_state_in_float32(generator: torch.Generator) -> None:
    layer = HAMLayer(make_config(router="learned+surprise+tags", width=32))
    perturb(layer, generator)
    open_scratchpad(layer)
    tokens = map_tensors(random_tokens(generator), lambda x: x.float() if x.dtype == torch.float64 else x)
    tokens = replace(tokens, position=tokens.position.double())
    seen: dict[str, torch.dtype] = {}

    def watch(name: str) -> Any:
        return lambda module, given, result: seen.__setitem__(name, result.dtype)

    for name in ("to_gates", "to_memory", "to_query", "to_output"):
        getattr(layer, name).register_forward_hook(watch(name))
    x = torch.randn(2, 3, 12, 32, generator=generator)
    policy = Policy(share=torch.tensor([0.5, 0.5]), readable=torch.ones(2, 3, 3, dtype=torch.bool))
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x, tokens=tokens, memory=layer.empty_memory(2, 3, x), policy=policy)
    assert seen.pop("to_gates") == torch.float32
    assert set(seen.values()) == {torch.bfloat16}
    trace, memory = result.trace, result.memory
    exact = (trace.scores, trace.threshold, trace.entries_bias, memory.state, memory.error_mean)
    assert {tensor.dtype for tensor in exact} == {torch.float32}


def test_masses_are_told_where_the_policy_asks(generator: torch.Generator) -> None:
    layer = HAMLayer(make_config()).double()
    tokens = random_tokens(generator)
    x = torch.randn(2, 3, 12, 16, generator=generator, dtype=torch.float64)
    policy = Policy(share=torch.ones(2, dtype=torch.float64), readable=torch.ones(2, 3, 3, dtype=torch.bool))
    told, silent = (
        layer(x, tokens=tokens, memory=layer.empty_memory(2, 3, x), policy=replace(policy, masses=masses))
        for masses in (True, False)
    )
    assert told.trace.entries_mass is not None and silent.trace.entries_mass is None
    assert torch.equal(told.output, silent.output)


def test_running_sums_with_levels_first_are_the_same(generator: torch.Generator) -> None:
    gaps = torch.rand(2, 3, 5, 7, generator=generator, requires_grad=True)
    plain, moved = (outward(gaps, levels_first=first) for first in (False, True))
    assert torch.equal(plain, moved)
    weight = torch.randn(plain.shape, generator=generator)
    slopes = [torch.autograd.grad((x * weight).sum(), gaps)[0] for x in (plain, moved)]
    assert torch.allclose(*slopes, rtol=1e-6, atol=1e-6)
