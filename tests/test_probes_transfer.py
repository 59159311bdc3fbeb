"""Routers taught by some suites and tested on another: who learns what from whose sequences."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hamts.errors import DataError
from probes.contract import generator
from probes.stacked_data import Rows, joined_rows
from probes.train import Stream
from probes.transfer import (
    TransferPlan,
    read_transfers,
    run_transfers,
    score_transfer,
    train_transfer,
    transfer_plans,
    transfer_table,
)
from probes.transfer_train import TransferTrainer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps need no thousand sequences."""
    monkeypatch.setattr("probes.train.POOL_SEQUENCES", 64)
    monkeypatch.setattr("probes.stacked_run.POOL_SEQUENCES", 64)
    monkeypatch.setattr("probes.stacked_run.BATCHES", 2)
    monkeypatch.setattr("probes.transfer_train.BATCHES", 2)


def taught(router: str) -> tuple[TransferTrainer, list[Rows]]:
    """A trainer of two seeds, and a batch of each suite."""
    plans = [TransferPlan(steps=9, router=router, seed=seed) for seed in (0, 1)]
    trainer = TransferTrainer(plans)
    batches = []
    for place in range(trainer.turns):
        rows = joined_rows([Rows.of([Stream(own[place]).next(0)]) for own in trainer.parts])
        trainer.take(place, rows)
        batches.append(rows)
    return trainer, batches


@pytest.mark.parametrize("router", ["learned", "mix"])
def test_the_tested_suite_moves_no_router_and_no_threshold(router: str) -> None:
    trainer, _ = taught(router)
    stack = trainer.stack
    mask = trainer.one.of_router

    def state() -> tuple[torch.Tensor, ...]:
        return stack.flat[:, mask].clone(), stack.flat[:, ~mask].clone(), *(table.clone() for table in stack.tables)

    assert 0 < int(mask.sum()) < len(mask)
    for step in range(6):
        before = state()
        trainer.turn(step)
        after = state()
        moved = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        # router, everything else, tables of two layers
        assert moved == ([False, True, False, False] if step % 3 == 2 else [True] * 4), step
    assert trainer.one.alive.all()


def test_nothing_flows_through_the_score_of_a_router_that_is_not_taught() -> None:
    trainer, batches = taught("learned")
    stack = trainer.stack
    gains = {}
    for known in (True, False):
        stack.taught = known
        reading = stack.read(batches[2], trainer.one.decisions(warm=True), training=True)
        loss = stack.answers(reading, batches[2])[0].square().sum()
        leaf = stack.leaves["blocks.0.memory.router.learned.0.weight"]
        gains[known] = torch.autograd.grad(loss, leaf, allow_unused=True)[0]
        assert all((layer.bias is None) != known for layer in reading.layers)
    assert gains[True] is not None and bool(gains[True].abs().sum() > 0)
    assert gains[False] is None


def test_routers_side_by_side_are_written_once_and_told(tmp_path: Path) -> None:
    plans = transfer_plans(routers=("learned", "full"), seeds=2, steps=3)
    paths = run_transfers(plans, tmp_path, budgets=(1.0,), streams=1, sequences=16)
    assert len({path.name for path in paths}) == 4
    for plan, path in zip(plans, paths, strict=True):
        content = json.loads(path.read_text())
        assert content["plan"]["router"] == plan.router
        row = content["scores"]["pbc/pbcD"][0]
        assert len(row["errors"]) == len(row["floor_errors"]) == 2
        assert ("recall_corrected" in row) == (plan.model == "ham")
    before = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for path in run_transfers(plans, tmp_path)] == before
    rows = transfer_table(read_transfers(tmp_path)).splitlines()
    assert [row.split(" | ")[3] for row in rows[2:]] == ["full", "learned"]
    assert rows[3].startswith("| pbc/pbcD | smoke | 3 | learned | 1 | ") and rows[3].endswith(" | 2 |")
    with pytest.raises(ValueError, match="differ in router, model and seed alone"):
        run_transfers([plans[0], TransferPlan(test="pbc/pbcS")], tmp_path)
    with pytest.raises(ValueError, match="'long' to train at"):
        transfer_plans(preset="long")
    with pytest.raises(DataError, match="was made with learning_rate 0.004; asked is 0.002"):
        run_transfers(transfer_plans(routers=("full",), seeds=1, steps=3, learning_rate=0.002), tmp_path)
    content = json.loads(paths[0].read_text())
    paths[0].write_text(json.dumps({**content, "contract_version": 4}))
    with pytest.raises(DataError, match="contract 4; this is contract"):
        run_transfers(plans, tmp_path)
    with pytest.raises(DataError, match="mixes transfers of the contract"):
        read_transfers(tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("router", ["learned", "mix"])
def test_turns_that_were_captured_are_the_turns(router: str) -> None:
    plans = [TransferPlan(steps=9, router=router, seed=seed, device="cuda") for seed in (0, 1)]
    launched, captured = TransferTrainer(plans), TransferTrainer(plans)
    for trainer in (launched, captured):
        trainer.one.explores = False
    for place in range(captured.turns):
        rows = joined_rows([Rows.of([Stream(replace(own[place], device="cpu")).next(0)]) for own in captured.parts])
        for trainer in (launched, captured):
            trainer.take(place, rows.to("cuda"))
    launched.stream, stream = None, captured.stream
    assert stream is not None
    for step in range(9):
        launched.turn(step)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            captured.turn(step)
        stream.synchronize()
        torch.testing.assert_close(captured.one.losses, launched.one.losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(captured.stack.flat, launched.stack.flat, rtol=1e-3, atol=1e-4)


def test_suites_share_a_layout_and_the_tested_one_teaches_no_router() -> None:
    plan = TransferPlan(steps=6, teach=("der/derD", "act/actS"), test="pbc/pbcD")
    plans = plan.plans()
    widths = {part.probe.sample(generator(0), 1, part.config).inputs().shape[-1] for part in plans}
    assert len(widths) == 1
    aligned = plans[1].probe.sample(generator(0), 2, plans[1].config)
    assert aligned.y.shape[-1] == 2
    assert not bool(aligned.y_mask[..., 1].any())
    fitted = train_transfer(plan)
    scored = score_transfer(fitted, budget=1.0, streams=1, sequences=8)
    assert math.isfinite(scored.metrics["skill"])
    assert fitted.plan is not None and fitted.plan.critical_rows == plans[-1].critical_rows
