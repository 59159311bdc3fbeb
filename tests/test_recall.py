"""Token recall: what is asked was said, and the script runs.

B sequences · L tokens
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.recall import bias_felt, grafted, learn, rate_left, run_one, train
from benchmarks.recall_claims import claims
from benchmarks.recall_ladders import Rung
from benchmarks.recall_model import (
    FILLER,
    KEYS,
    MARKER,
    MODELS,
    OWN,
    VALUES,
    TokenModel,
    draw_needle,
    draw_recall,
    lesson_of,
    places_of_values,
    policies_of,
)
from benchmarks.recall_table import summary, table
from benchmarks.recall_teacher import asked_loss, asked_losses, asked_of, own_gradients
from benchmarks.recall_worth import judged
from hamts.config import ModelConfig
from hamts.nn.router import log_bias


@pytest.mark.parametrize(("length", "tokens_per_pair"), [(64, 16), (64, 4), (512, 16)])
def test_every_key_that_is_asked_was_stored_once_with_its_value(length: int, tokens_per_pair: int) -> None:
    ids, right = draw_recall(length, 5, torch.Generator().manual_seed(0), tokens_per_pair)
    pairs = length // tokens_per_pair
    for row, wanted in zip(ids.tolist(), right.tolist(), strict=True):
        asked = [place for place, value in enumerate(wanted) if value >= 0]
        assert len(asked) == pairs
        assert min(asked) >= 3 * length // 4
        assert len({row[place] for place in asked}) == pairs
        for place in asked:
            stored = [at for at in range(3 * length // 4) if row[at] == row[place]]
            assert len(stored) == 1
            assert row[stored[0] + 1] == wanted[place]
            assert KEYS <= wanted[place] < KEYS + VALUES


def test_a_needle_is_marked_and_asked_at_the_end() -> None:
    ids, right = draw_needle(64, 20, torch.Generator().manual_seed(0))
    for row, wanted in zip(ids.tolist(), right.tolist(), strict=True):
        marked = [place for place, token in enumerate(row) if token == MARKER]
        assert len(marked) == 2 and marked[1] == 62
        assert row[marked[0] + 1] == row[63] < KEYS
        assert row[marked[0] + 2] == wanted[63]
        assert all(value == -1 for value in wanted[:63])
        filler = [token for place, token in enumerate(row) if not marked[0] <= place <= marked[0] + 2 and place < 62]
        assert all(KEYS + VALUES <= token < KEYS + VALUES + FILLER for token in filler)


@pytest.mark.parametrize("name", ["surprise", "surprise-shared", "attention"])
def test_a_token_model_never_looks_ahead_and_sees_its_past(name: str) -> None:
    config = ModelConfig(
        width=16, layers=2, heads=2, patch_steps=1, dropout=0.0, **({"router": "learned"} | MODELS[name])
    )
    model = TokenModel(config, shared=name.endswith("-shared")).eval()
    ids, _ = draw_recall(64, 2, torch.Generator().manual_seed(1), 4)
    other = ids.clone()
    other[:, 40] = (other[:, 40] + 7) % KEYS
    with torch.no_grad():
        for layer in model.layers():
            layer.scratch_bias.zero_() if name != "attention" else layer.exact.scratch_bias.zero_()
        one, two = (model(x, policies_of(model, torch.ones(2)))[0] for x in (ids, other))
    assert torch.equal(one[:, :40], two[:, :40])
    assert not torch.allclose(one[:, 60], two[:, 60], atol=1e-6)


def test_learning_rates_fall_early_or_late() -> None:
    early, late = ([rate_left(done / 10, late=late) for done in range(11)] for late in (False, True))
    assert early == sorted(early, reverse=True) and late == sorted(late, reverse=True)
    assert early[5] < 0.6 and late[6] == 1.0 and late[10] == pytest.approx(0.1)


def test_the_place_of_a_value_is_after_its_key() -> None:
    ids, right = draw_recall(128, 4, torch.Generator().manual_seed(3), 4)
    place = places_of_values(ids, right)
    asked = right >= 0
    assert (place[~asked] == -1).all()
    assert torch.equal(ids.gather(1, place.clamp_min(0))[asked], right[asked])
    assert torch.equal(ids.gather(1, place.clamp_min(1) - 1)[asked], ids[asked])


def test_a_bias_is_felt_by_and_by_late_never_or_always() -> None:
    late, never, always = (0.6, 0.75), (math.inf, math.inf), (0.0, 0.0)
    assert [bias_felt(done, late) for done in (0.1, 0.6, 0.675, 0.75, 1.0)] == pytest.approx([0, 0, 0.5, 1, 1])
    assert bias_felt(1.0, never) == 0.0 and bias_felt(0.001, always) == 1.0


def small(router: str = "learned", seed: int = 0, **changes: Any) -> TokenModel:
    torch.manual_seed(seed)
    model = TokenModel(ModelConfig(width=16, layers=2, heads=2, patch_steps=1, dropout=0.0, router=router, **changes))
    for layer in model.layers():
        layer.scratch_bias.data.zero_()
    return model


def test_a_bias_that_is_not_felt_changes_nothing_but_learns() -> None:
    model = small()
    ids, right = draw_recall(64, 2, torch.Generator().manual_seed(1), 4)
    score = model.layers()[1].router.learned[-1]

    def logits() -> torch.Tensor:
        return model(ids, policies_of(model, torch.ones(2)))[0]

    model.bias_strength = 0.0
    silent = logits()
    silent[right >= 0].logsumexp(-1).sum().backward()
    assert float(score.weight.grad.abs().max()) > 0
    with torch.no_grad():
        score.weight.mul_(50.0)
        assert torch.allclose(logits(), silent, atol=1e-6)
        model.bias_strength = 1.0
        assert not torch.allclose(logits(), silent, atol=1e-4)


def test_entries_of_learned_weights_can_be_chosen_by_surprise_and_back() -> None:
    model = small()
    ids, _ = draw_recall(64, 2, torch.Generator().manual_seed(1), 4)
    policies = policies_of(model, torch.ones(2))
    with torch.no_grad():
        own = model(ids, policies)[1][0].scores
        with grafted(model, "by surprise"):
            surprises = model(ids, policies)[1][0].scores
        assert not torch.equal(surprises, own) and 0 <= float(surprises.min()) <= float(surprises.max()) <= 2
        assert torch.equal(model(ids, policies)[1][0].scores, own)
        with grafted(model, "unbiased"):
            assert model.bias_strength == 0.0
        assert model.bias_strength == 1.0


def test_reads_of_all_places_are_the_attention_that_entries_receive() -> None:
    model = small()
    ids, right = draw_recall(64, 3, torch.Generator().manual_seed(1), 4)
    model.asked = asked_of(torch.zeros_like(right), 64)
    with torch.no_grad():
        _, traces = model(ids, policies_of(model, torch.tensor([1.0, 0.5, 0.5])))
    for trace, read in zip(traces, model.reads, strict=True):
        received = trace.entries_mass * trace.entries_sights / 2  # of two heads
        assert torch.allclose(read, received, atol=1e-5)


def test_a_teacher_of_asked_reads_counts_no_others_and_has_a_gradient() -> None:
    place, real = asked_of(torch.tensor([[-1, 3, -1, 5], [-1, -1, 2, -1]]), 2)
    assert sorted(place[0].tolist()) == [1, 3] and real.tolist() == [[True, True], [True, False]]
    model = small()
    ids, right = draw_recall(64, 2, torch.Generator().manual_seed(1), 4)
    model.asked, model.bias_strength, model.severed = asked_of(right, 16), 0.0, True
    logits, traces = model(ids, policies_of(model, torch.ones(2)))
    assert all(float(read.sum(1).max()) <= 16 for read in model.reads)
    asked_loss(traces, model.reads).backward()
    score = model.layers()[1].router.learned[-1].weight
    taught = score.grad.clone()
    assert float(taught.abs().max()) > 0
    # the task itself does not reach a score that is severed
    score.grad = None
    model(ids, policies_of(model, torch.ones(2)))[0].sum().backward()
    assert score.grad is None or float(score.grad.abs().max()) == 0


def gradients_left(
    name: str, monkeypatch: pytest.MonkeyPatch, *, task: float = 1.0, taught: float = 1.0
) -> dict[str, float]:
    """The largest gradient at each weight after one step of training, of the task and the teacher or of one alone."""
    model, lesson = small(**{"router": "learned", **MODELS[name]}), lesson_of(name)
    model.severed, model.bare = lesson.severed, lesson.bare
    plain = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *given, **named: task * plain(*given, **named))
    lesson = replace(lesson, weight=lesson.weight * taught)
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    learn(model, torch.optim.SGD(model.parameters(), lr=0.0), Rung(64, 4, 1, 4), lesson, *generators)
    left = {weight: x.grad for weight, x in model.named_parameters()}
    return {weight: 0.0 if x is None else float(x.abs().max()) for weight, x in left.items()}


@pytest.mark.parametrize("name", OWN)
def test_a_teacher_of_the_scores_own_weights_moves_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = gradients_left(name, monkeypatch, task=0.0)
    assert all((size > 0) == (".router.learned." in weight) for weight, size in moved.items()), moved


def test_a_teacher_whose_gradient_goes_on_moves_what_is_below(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = gradients_left("learned-token-asked", monkeypatch, task=0.0)
    below = ("embedding.weight", "blocks.0.memory.to_query.weight", "blocks.0.memory.router.learned.0.weight")
    assert all(moved[weight] > 0 for weight in below)


@pytest.mark.parametrize("name", OWN)
def test_the_task_reaches_the_score_unless_it_is_severed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = gradients_left(name, monkeypatch, taught=0.0)
    score = {weight: size for weight, size in moved.items() if ".router.learned." in weight}
    assert score and all((size > 0) != lesson_of(name).severed for size in score.values()), score
    # entries' own bias is felt and learned, by all
    assert moved["embedding.weight"] > 0 and moved["blocks.1.memory.scratch_bias"] > 0


@pytest.mark.parametrize("router", ["learned", "surprise"])
def test_a_state_that_is_not_heard_says_nothing_in_those_sequences_alone(router: str) -> None:
    model = small(router=router)
    ids, _ = draw_recall(64, 2, torch.Generator().manual_seed(1), 4)
    with torch.no_grad():
        whole = model(ids, policies_of(model, torch.ones(2)))[0]
        model.deaf = torch.tensor([False, True])
        half = model(ids, policies_of(model, torch.ones(2)))[0]
        assert torch.equal(half[0], whole[0]) and not torch.allclose(half[1], whole[1], atol=1e-4)
        # nothing that stands before the window, where nothing is kept either
        for layer in model.layers():
            layer.scratch_bias.fill_(-1e4)
        other = ids.clone()
        other[:, 4] = (other[:, 4] + 7) % KEYS
        one, two = (model(x, policies_of(model, torch.ones(2)))[0] for x in (ids, other))
        assert torch.equal(one[1, 16:], two[1, 16:]) and not torch.equal(one[0, 16:], two[0, 16:])


def test_a_state_is_not_heard_in_half_of_a_deaf_lesson_and_in_all_that_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: dict[str, list[Any]] = {}
    for name in ("surprise-deaf", "surprise"):
        model, seen = small(router="surprise"), heard.setdefault(name, [])
        plain = model.forward
        monkeypatch.setattr(
            model,
            "forward",
            lambda ids, policies, m=model, f=plain, s=seen: s.append((ids, m.deaf)) or f(ids, policies),
        )
        train(
            model, (Rung(64, 8, 2, 4),), rate=1e-3, seed=0, device="cpu", late=True, lesson=lesson_of(name), quiet=True,
            after=lambda length, curve, m=model, s=seen: s.append((None, m.deaf)),
        )  # fmt: skip
    (first, half), (second, again), after = heard["surprise-deaf"]
    # as many of either task and of either usage
    assert half.tolist() == again.tolist() == [True, True, False, False] * 2
    assert after == (None, None)
    # the same sequences are learned from
    assert torch.equal(first, heard["surprise"][0][0]) and torch.equal(second, heard["surprise"][1][0])
    assert [deaf for _, deaf in heard["surprise"]] == [None] * 3


def test_a_read_feels_the_logarithm_of_a_severed_score() -> None:
    model = small()
    ids, _ = draw_recall(64, 2, torch.Generator().manual_seed(1), 4)
    with torch.no_grad():
        whole = model(ids, policies_of(model, torch.ones(2)))[0]
        model.severed = True
        assert torch.allclose(model(ids, policies_of(model, torch.ones(2)))[0], whole, atol=1e-6)
        model.bias_strength = 0.0
        assert not torch.allclose(model(ids, policies_of(model, torch.ones(2)))[0], whole, atol=1e-4)


def test_gradients_of_a_scores_own_weights_are_those_of_a_detached_input() -> None:
    model = small(learned_features="token")
    ids, right = draw_recall(64, 3, torch.Generator().manual_seed(1), 4)
    model.asked, inputs = asked_of(right, 16), []
    for layer in model.layers():
        layer.router.register_forward_pre_hook(lambda router, given: inputs.append(given[0].detach()))
    _, traces = model(ids, policies_of(model, torch.ones(3)))
    taught = own_gradients(model.layers(), asked_losses(traces, model.reads), 0.3)
    again = []
    for layer, trace, x in zip(model.layers(), traces, inputs, strict=True):
        bias = log_bias(layer.router.learned(x))[:, 0, :, 0]  # [B, L]
        entries = bias.gather(1, trace.entries_position.long().clamp(0, 63))  # [B, M]
        again.append(replace(trace, entries_bias=entries))
    (0.3 * asked_loss(again, model.reads)).backward()
    assert len(taught) == 8
    for weight, gradient in taught:
        assert torch.allclose(gradient, weight.grad, rtol=1e-4, atol=1e-8)


def test_reads_without_the_logarithm_say_the_same_whatever_the_score() -> None:
    model = small()
    ids, right = draw_recall(64, 2, torch.Generator().manual_seed(1), 4)
    model.asked, found = asked_of(right, 16), {}
    for bare in (False, True):
        for moved in (False, True):
            model.bare = bare
            with torch.no_grad():
                # of the first layer, whose entries and queries do not depend on it
                model.layers()[0].router.learned[-1].weight.mul_(-20.0 if moved else -0.05)
                logits, traces = model(ids, policies_of(model, torch.ones(2)))
            found[bare, moved] = (list(model.reads), logits)
    assert all(trace.routed.all() for trace in traces)
    assert torch.equal(found[True, False][0][0], found[True, True][0][0])
    assert not torch.allclose(found[False, False][0][0], found[False, True][0][0], atol=1e-3)
    # what the model itself reads feels it all the same
    assert torch.equal(found[True, True][1], found[False, True][1])
    assert not torch.allclose(found[True, False][1], found[True, True][1], atol=1e-3)


def test_a_model_is_trained_measured_and_written(tmp_path: Path) -> None:
    run_one("surprise", rate=1e-3, seed=0, ladder_name="smoke", folder=tmp_path)
    cell = json.loads((tmp_path / "smoke--surprise--lr0.001--seed0.json").read_text())
    assert {row["memory"] for row in cell["rows"]} == {"model", "random"}
    whole = [row for row in cell["rows"] if row["usage"] == 1.0 and row["allocation"] == "uniform"]
    assert all(row["kept_by_layer"] == [1.0, 1.0] for row in whole)
    nothing = [row for row in cell["rows"] if row["usage"] == 0.0]
    assert all(row["scratchpad_attention_by_layer"] == [0.0, 0.0] for row in nothing)
    assert "surprise" in table(tmp_path)
    assert "| smoke | surprise | 0.001 () | 1 | 0.5 at random |" in summary(tmp_path)
    assert not list(tmp_path.glob("*.rung"))


def test_a_dropped_entry_of_small_weight_is_worth_what_its_gradient_says() -> None:
    model = small().eval()
    ids, right = draw_recall(64, 1, torch.Generator().manual_seed(1), 4)
    found = judged(model, ids[0], right[0])
    alive = found["alive"]
    assert float(torch.corrcoef(torch.stack([found["worth"][alive], found["pulled"][alive]]))[0, 1]) > 0.95


def test_claims_need_cells_of_the_last_length_alone(tmp_path: Path) -> None:
    rows = [
        {"length": 4096, "task": task, "memory": memory, "usage": usage, "allocation": allocation,
         "accuracy": 0.5 + usage / 4,
         "value_kept_by_layer": [usage, usage], "right_of_kept_by_layer": [1.0, 1.0], "kept_by_layer": [usage, usage],
         "values_lost": 0.0}
        for task in ("recall", "needle")
        for usage in (0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0)
        for memory, allocation in (("model", "uniform"), ("model", "pooled"), ("random", "uniform"))
    ]  # fmt: skip
    for name, shift in (("surprise", 0.0), ("learned-token", 0.1), ("learned-token-asked-own-1", -0.05)):
        moved = [row | {"accuracy": row["accuracy"] - shift} for row in rows]
        cell = {"model": name, "seed": 0, "rate": 0.003, "rows": moved}
        (tmp_path / f"longer--{name}--lr0.003--seed0.json").write_text(json.dumps(cell))
    short = {"model": "error", "seed": 0, "rate": 0.003, "rows": [rows[0] | {"length": 256}]}
    (tmp_path / "longer--error--lr0.003--seed0.json").write_text(json.dumps(short))
    said = claims(tmp_path, "longer", 0.003)
    assert "| learned-token | -0.100 (-0.100) | -0.100 (-0.100) | -0.100 (-0.100) | -0.100 (-0.100) |" in said
    assert "| learned-token-asked-own-1 | +0.050 (+0.050) |" in said
    assert "| error |" not in said
