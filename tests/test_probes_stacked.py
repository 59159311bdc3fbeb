"""The stacked form of tier-1 networks against their layers: values, gradients and some steps of training."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hamts.errors import DataError
from probes.api import load_report
from probes.contract import ProbeBatch, generator
from probes.evaluate import evaluate
from probes.models import NetConfig
from probes.packed import pack_folder
from probes.registry import get_probe
from probes.runner import run_plan
from probes.runner_plan import STACKED_MODELS, STACKED_ROUTERS, RunPlan, critical_rows
from probes.stacked import StackedNet
from probes.stacked_data import Decisions, Rows
from probes.stacked_evaluate import EvaluationSet, evaluate_stacked
from probes.stacked_run import Pools
from probes.stacked_train import StackedTrainer, stacked_loss, train_stacked
from probes.summary import best_rates, score_table
from probes.train import TrainPlan, everything, forward, make_net, sample, train, training_loss

ROUTERS = ("surprise", "innovation", "learned", "tags", "mix", "random", "shuffled", "oracle")
NETWORKS = [("ham", router) for router in ROUTERS] + [
    (model, "none") for model in ("full", "recurrent", "recurrent_wide", "window")
]


def plan(
    model: str, router: str, *, seed: int = 0, steps: int = 4, suite: str = "derD", rate: float = 4e-3
) -> TrainPlan:
    probe, rung = get_probe(suite)
    config = probe.config("smoke", rung, missed_tags=0.2, false_tags=2.0, items=6, queries=6)
    rows = critical_rows(probe, config)
    net = NetConfig(
        model=model, router=router if model == "ham" else "learned", layers=probe.depth(config), budget_rows=rows
    )
    return TrainPlan(
        probe=probe, config=config, net=net, steps=steps, learning_rate=rate, seed=seed, critical_rows=rows,
        hidden_share=0.5,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps need no thousand sequences."""
    monkeypatch.setattr("probes.train.POOL_SEQUENCES", 64)


def varied(net: torch.nn.Module) -> None:
    """Parameters that start as zeros or ones take other values, so that none of them is tested at a special one."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("model", "router", "suite"),
    [(*network, "derD") for network in NETWORKS]
    + [("ham", "learned", "rrr"), ("ham", "mix", "rrr"), ("full", "none", "rrr"), ("ham", "mix", "topo")]
    + [("ham", "mix", "topo2"), ("full", "none", "topo2")],
)
@pytest.mark.parametrize("warm", [False, True])
def test_one_loss_and_its_gradients_equal_those_of_the_layers(model: str, router: str, suite: str, warm: bool) -> None:
    hidden = 3 if warm and model == "ham" else 0
    plans = [plan(model, router, seed=seed, suite=suite) for seed in (0, 1)]
    nets = [make_net(each) for each in plans]
    batches = [sample(each, generator(5 + each.seed), 8) for each in plans]
    for net in nets:
        varied(net)
        for layer in net.layers:
            layer.thresholds.values.copy_(torch.linspace(1.5, 0.1, 6).expand_as(layer.thresholds.values))
    T = batches[0].context_rows
    stack = StackedNet(nets, device="cpu")
    budgets = [4, 9]
    decisions = Decisions.plain(budgets, networks=2, context_rows=T, device="cpu")
    if warm:
        decisions = replace(decisions, warm=model == "ham", hidden=hidden)
    # each hop is named after a layer of its own
    extra = {"target_weight": 0.7, "named_after": (0, 2) if suite == "topo2" else ()}
    loss, _ = stacked_loss(stack, Rows.of(batches), decisions, **extra)
    names = list(stack.leaves)
    grads = torch.autograd.grad(loss.sum(), list(stack.leaves.values()), allow_unused=True)
    for number, (net, batch) in enumerate(zip(nets, batches, strict=True)):
        given = everything(net, batch) if warm else None
        rows = batch.context_rows if given else budgets[number]
        expected = training_loss(net, batch, rows, None, given=given, follow=False, hidden=hidden, **extra)
        assert float(loss[number].detach()) == pytest.approx(float(expected.detach()), rel=2e-5)
        expected.backward()
        own = dict(net.named_parameters())
        for name, grad in zip(names, grads, strict=True):
            if name not in own or name.endswith("channel_bias") or own[name].grad is None:
                continue
            got = torch.zeros_like(own[name]) if grad is None else grad[number]
            torch.testing.assert_close(got, own[name].grad, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
        for n in range(len(net.layers)):
            head = f"blocks.{n}.memory."
            parts = [
                own[k].grad
                for k in own
                if k.startswith(head)
                and k.endswith(("to_memory.weight", "to_query.weight", "to_gates.weight", "to_output_gate.weight"))
            ]
            got = grads[names.index(head + "project")][number]
            torch.testing.assert_close(got, torch.cat(parts), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("model", "router"), [("ham", "learned"), ("ham", "surprise"), ("ham", "tags"), ("full", "none"),
                          ("recurrent_wide", "none"), ("window", "none")],
)  # fmt: skip
def test_training_side_by_side_is_training_one_by_one(model: str, router: str) -> None:
    plans = [plan(model, router, seed=0), plan(model, router, seed=1), plan(model, router, seed=0, rate=1e-3)]
    together = train_stacked(plans)
    for each, got in zip(plans, together, strict=True):
        alone = train(each)
        assert [step for step, _ in got.losses] == [step for step, _ in alone.losses]
        for (_, first), (_, second) in zip(got.losses, alone.losses, strict=True):
            assert first == pytest.approx(second, rel=2e-3)
        for mine, other in zip(got.net.layers, alone.net.layers, strict=True):
            torch.testing.assert_close(mine.thresholds.values, other.thresholds.values, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize(
    ("model", "router", "suite"), [
        *(("ham", router, "derD") for router in ("learned", "shuffled", "random", "tags")),
        *((model, "none", "derD") for model in ("full", "window", "recurrent")), ("ham", "learned", "cfr"),
    ],
)  # fmt: skip
def test_scores_of_the_stacked_form_are_those_of_the_layers(model: str, router: str, suite: str) -> None:
    plans = [plan(model, router, seed=seed, steps=3, suite=suite) for seed in (0, 1)]
    trained = train_stacked(plans)
    for each in trained:
        varied(each.net)
    stack = StackedNet([each.net for each in trained], device="cpu")
    data = EvaluationSet.of(plans[0], seeds=(0, 1), streams=1, sequences=48)
    for budget in (2, 7):
        for each, got in zip(trained, evaluate_stacked(stack, plans, data, budget_rows=budget), strict=True):
            expected = evaluate(each, budget_rows=budget, streams=1, sequences=48)
            torch.testing.assert_close(torch.tensor(got.errors), torch.tensor(expected.errors), rtol=1e-3, atol=1e-5)
            assert set(expected.metrics) - set(got.metrics) <= {"ms_per_row"}
            for name, number in got.metrics.items():
                assert number == pytest.approx(expected.metrics[name], rel=2e-3, abs=2e-3, nan_ok=True), name
            assert got.stages == pytest.approx(expected.stages, abs=2e-3)
            assert got.by_slice.keys() == expected.by_slice.keys()
            assert [row.keys() for row in got.by_layer] == [row.keys() for row in expected.by_layer]
            for mine, other in zip(got.by_layer, expected.by_layer, strict=True):
                assert mine == pytest.approx(other, abs=2e-3)
            assert got.survival.keys() == expected.survival.keys()


@pytest.mark.parametrize(("model", "router"), [("ham", "learned"), ("full", "none")])
def test_sequences_that_grow_are_read_side_by_side_as_one_by_one(
    model: str, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("probes.registry.GROWN_ROWS", 64)
    monkeypatch.setattr("probes.registry.GROWTH", ((0.5, 2), (0.5, 1)))
    plans = [plan(model, router, seed=seed) for seed in (0, 1)]
    assert [config.context_rows for _, config in plans[0].stages] == [36, 72]
    assert plans[0].stage_rows == [3, 6]
    for each, got in zip(plans, train_stacked(plans), strict=True):
        alone = train(each)
        for (_, first), (_, second) in zip(got.losses, alone.losses, strict=True):
            assert first == pytest.approx(second, rel=2e-3)


def test_a_hidden_state_says_nothing_to_questions_and_everything_to_the_other_sequences() -> None:
    each = plan("ham", "learned")
    net, batch = make_net(each), sample(each, generator(3), 6)
    varied(net)
    given = everything(net, batch)
    plain, half = (forward(net, batch, 8, given=given, hidden=hidden)[0] for hidden in (0, 3))
    torch.testing.assert_close(half[3:], plain[3:])
    assert float((half[:3] - plain[:3]).abs().amin(2).amax(1).min()) > 1e-4
    # nothing that the last layer's state holds is left in the answers
    with torch.no_grad():
        net.layers[-1].recurrent_norm.gain.mul_(3.0)
    again = forward(net, batch, 8, given=given, hidden=3)[0]
    torch.testing.assert_close(again[:3], half[:3])
    assert not torch.allclose(again[3:], half[3:])


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "router"), [("ham", "learned"), ("ham", "shuffled"), ("full", "none")])
def test_a_captured_step_is_the_step(model: str, router: str) -> None:
    plans = [replace(plan(model, router, seed=seed), device="cuda") for seed in (0, 1)]
    rows = Rows.of([sample(each, generator(each.seed), 32) for each in plans], "cuda")
    eager, captured = StackedTrainer(plans), StackedTrainer(plans)
    for trainer in (eager, captured):
        trainer.one.explores = False
        trainer.fit(rows)
    assert captured.stream is not None
    captured.stream.wait_stream(torch.cuda.current_stream())
    for step in range(4):
        eager.one(rows, warm=step < eager.one.warm_steps)
        with torch.cuda.stream(captured.stream):
            captured.advance(rows, step)
        captured.stream.synchronize()
        torch.testing.assert_close(captured.one.losses, eager.one.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(captured.stack.flat, eager.stack.flat, rtol=1e-3, atol=1e-4)


def in_step(folder: Path, **changes: object) -> list[Path]:
    options = {"models": ("ham", "full", "window"), "routers": ("learned", "tags"), "budgets": (0.5, 1.0), "seeds": 2,
               "learning_rates": (2e-3, 1e-2), "steps": 3, "streams": 2, "sequences": 16}  # fmt: skip
    plan = RunPlan(probes=("der/der",), preset="smoke", **options)  # type: ignore[arg-type]
    return run_plan(plan, folder, in_step=True, progress=False, **changes)  # type: ignore[arg-type]


def test_pools_that_are_closed_draw_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    # a thread that still draws when the interpreter leaves aborts the process
    def slow(*args: object) -> ProbeBatch:
        time.sleep(0.2)
        return sample(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("probes.stacked_run.POOL_SEQUENCES", 64)
    monkeypatch.setattr("probes.stacked_run.sample", slow)
    Pools(plan("full", "none"), [0, 1]).close()
    assert not [thread for thread in threading.enumerate() if "_fill" in thread.name]


def test_a_rung_is_run_in_step_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    assert in_step(tmp_path, max_time_s=-1.0) == []
    with pytest.raises(DataError, match="E-PROBE-UNFINISHED"):
        load_report(tmp_path)
    written = in_step(tmp_path)
    report = load_report(tmp_path)
    # two rates for each architecture, one router and one size of it; then every line, seed and budget at the best rate
    chosen = {(d["identity"]["model"], d["config"]["learning_rate"]) for d in best_rates(report.documents)}
    assert len(chosen) == 3
    lines = score_table(report.documents)
    assert set(lines["seeds"]) == {2}
    assert len(lines) == 2 * 2 + 1 + 2
    assert len(report.documents) == len(written) == 2 * len(lines) + 2 + 1 + 1
    before = {path: path.stat().st_mtime_ns for path in written}
    written[0].unlink()
    again = in_step(tmp_path)
    assert again == written
    assert sum(path.stat().st_mtime_ns != before[path] for path in written) <= 2
    packed = pack_folder(tmp_path, tmp_path / "packed")
    assert [path.name for path in packed] == ["der.json.gz"]
    same = score_table(load_report(tmp_path / "packed").documents)
    assert same["skill"].tolist() == pytest.approx(lines["skill"].tolist())


def test_what_has_no_stacked_form_is_told_apart() -> None:
    asked = RunPlan(probes=("der",), models=("ham", "top_write", "full"), routers=("learned", "tags+surprise"))
    own, rest = asked.split(STACKED_MODELS, STACKED_ROUTERS)
    assert own is not None and rest is not None
    assert (own.models, own.routers) == (("ham", "full"), ("learned",))
    assert (rest.models, rest.routers) == (("top_write", "ham"), ("tags+surprise",))
    assert replace(asked, models=("full",)).split(STACKED_MODELS, STACKED_ROUTERS)[1] is None
