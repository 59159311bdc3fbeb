"""Exact tests of streams on random weights, and the networks of tier 1: routers, rivals, controls."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probes.contract import generator
from probes.evaluate import permute_flags
from probes.exact import exact_checks
from probes.models import MODELS, ROUTERS_T1, NetConfig, ProbeNet, kept_rows, memory_bytes, without_rows
from probes.registry import get_probe
from probes.scores import selection
from probes.train import forward, shuffled_rows

torch.set_num_threads(1)


# --- exact tests of streams


@pytest.mark.parametrize("router", ["innovation", "tags"])
def test_streams_are_exact_on_random_weights(router: str) -> None:
    failed = [str(result) for result in exact_checks(router=router, dtype=torch.float64) if result.passed is False]
    assert failed == []


# --- networks


def make_net(batch, **config: object) -> ProbeNet:  # noqa: ANN001
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return ProbeNet(
            NetConfig(budget_rows=12, **config), inputs=batch.inputs().shape[-1], channels=batch.x.shape[-1],
            answers=batch.y.shape[-1],
        )  # fmt: skip


@pytest.fixture(scope="module")
def batch():  # noqa: ANN201
    probe, _ = get_probe("der")
    return probe.sample(generator(0), 4, probe.config("smoke", missed_tags=0.2, false_tags=1))


@pytest.mark.parametrize("router", sorted(ROUTERS_T1))
def test_every_router_reads_and_keeps_within_its_budget(batch, router: str) -> None:  # noqa: ANN001
    net = make_net(batch, router=router).eval()
    with torch.no_grad():
        for rows in (1, 6):
            answer, context, _ = forward(net, batch, rows)
            assert answer.shape == batch.y.shape
            assert bool(torch.isfinite(answer).all())
            for memory in context.memory:
                kept = kept_rows(memory, batch.x.shape[1])
                assert kept is not None
                assert int(kept.sum(1).max()) <= rows
                assert not bool((kept & batch.query).any())


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"ham"}))
def test_every_rival_reads_and_stays_within_the_same_bytes(batch, model: str) -> None:  # noqa: ANN001
    net, ham = make_net(batch, model=model), make_net(batch, router="oracle")
    with torch.no_grad():
        answer, context, _ = forward(net, batch, 12)
        assert answer.shape == batch.y.shape
        if model in ("full", "gdn_gsa", "block_sparse", "recurrent"):
            return
        limit = sum(memory_bytes(forward(ham, batch, 12)[1].memory))
        assert sum(memory_bytes(context.memory)) <= limit * 1.05


def test_the_oracle_keeps_the_critical_rows_and_the_shuffled_control_does_not(batch) -> None:  # noqa: ANN001
    net = make_net(batch, router="oracle")
    with torch.no_grad():
        memory = forward(net, batch, 12)[1].memory[0]
    kept = kept_rows(memory, batch.x.shape[1])
    assert selection(kept, batch).recall(batch.asked) == 1.0
    nothing = kept_rows(without_rows(memory, batch.crit), batch.x.shape[1])
    assert not bool(nothing.any())
    other = make_net(batch, router="shuffled")
    given = shuffled_rows(other, batch, 12)
    assert other.config.router == "shuffled"
    with torch.no_grad():
        plain = replace(other.config, router="learned")
        other.config = plain
        own = forward(other, batch, 12)[1].traces[0].routed[:, 0]
    assert torch.equal(given[0], own.roll(1, 0))


def test_flags_are_permuted_and_codes_are_not(batch) -> None:  # noqa: ANN001
    other = permute_flags(batch)
    assert not torch.equal(other.events[..., :3], batch.events[..., :3])
    assert torch.equal(other.events[..., :3].sum(-1), batch.events[..., :3].sum(-1))
    assert torch.equal(other.events[..., 3:], batch.events[..., 3:])
