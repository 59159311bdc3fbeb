"""Networks asked about a longer past: thresholds for small shares, and the chunked form against the layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hamts.errors import DataError
from hamts.nn.budget import SHARES, ThresholdTable
from probes.again import Revisit, asked_at, revisit
from probes.contract import generator
from probes.longer import calibrate_at, calibration
from probes.models import NetConfig
from probes.reading import read_context
from probes.registry import get_probe
from probes.runner import fit_cell, run_plan
from probes.runner_plan import RunPlan, critical_rows
from probes.stacked import StackedNet
from probes.stacked_data import Decisions, Rows
from probes.stacked_long import LongStack
from probes.stacked_parts import Frame
from probes.stacked_train import stacked_read
from probes.train import TrainPlan, make_net, sample

ROUTERS = ("surprise", "mix", "tags", "random", "shuffled", "oracle")
NETWORKS = [("ham", router) for router in ROUTERS] + [(m, "none") for m in ("full", "recurrent_wide", "window")]


def plan(model: str, router: str, *, seed: int = 0, suite: str = "derD") -> TrainPlan:
    probe, rung = get_probe(suite)
    config = probe.config("smoke", rung, missed_tags=0.2, false_tags=2.0, items=6, queries=6)
    rows = critical_rows(probe, config)
    net = NetConfig(model=model, router=router if model == "ham" else "learned", layers=probe.layers, budget_rows=rows)
    return TrainPlan(probe=probe, config=config, net=net, steps=1, learning_rate=4e-3, seed=seed, critical_rows=rows)


@pytest.mark.parametrize(("model", "router"), NETWORKS)
def test_reading_in_chunks_is_reading_all_rows_at_once(
    model: str, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("probes.stacked_long.CHUNK_ROWS", 20)
    plans = [plan(model, router, seed=seed) for seed in (0, 1)]
    nets = [make_net(each) for each in plans]
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for net in nets:
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for layer in net.layers:
                layer.thresholds.values.copy_(torch.linspace(1.5, 0.1, 6).expand_as(layer.thresholds.values))
    batch = sample(plans[0], generator(5), 4)
    rows, T = Rows.of([batch]), batch.context_rows
    decisions = Decisions.plain([5, 9], networks=2, context_rows=T, device="cpu")
    whole, parts = StackedNet(nets, device="cpu"), LongStack(nets, device="cpu")
    with torch.no_grad():
        first = stacked_read(whole, rows, decisions, with_scores=True)
        second = stacked_read(parts, rows, decisions, with_scores=True)
    torch.testing.assert_close(parts.answers(second, rows)[0], whole.answers(first, rows)[0], rtol=1e-4, atol=1e-5)
    for one, other in zip(first.layers, second.layers, strict=True):
        if one.visible is None:
            continue
        kept = one.visible[:, T - 1] if model == "ham" else one.visible[:, T - 1] & one.visible[:, T]
        assert torch.equal(other.visible.kept, kept)
        paid = one.weight[:, T:, :T] * one.visible[:, T:]
        torch.testing.assert_close(other.weight, paid, rtol=1e-4, atol=1e-6)


def test_scaled_positions_turn_less() -> None:
    plain, scaled = (Frame.of(8, 12, set(), 8, torch.device("cpu"), scale=scale) for scale in (1.0, 0.5))
    torch.testing.assert_close(scaled.cosine[::2], plain.cosine[:6])
    torch.testing.assert_close(scaled.sine[::2], plain.sine[:6])
    assert torch.equal(scaled.age, plain.age)


# --- thresholds


def test_a_finer_table_gives_the_same_thresholds_until_it_is_calibrated() -> None:
    scores = torch.randn(4_000, 2, generator=generator(0))
    table = ThresholdTable(2)
    table.calibrate(scores)
    finer = table.finer(0.004)
    assert finer.shares == (0.002, *SHARES)
    asked = torch.tensor([0.003, 0.004, 0.03, 0.2, 0.6, 0.0, 1.0])
    torch.testing.assert_close(finer(asked), table(asked))
    torch.testing.assert_close(finer.rank(scores), table.rank(scores))
    on_log_scale = torch.zeros(2, dtype=torch.bool)
    torch.testing.assert_close(finer.spread(on_log_scale), table.spread(on_log_scale))
    finer.calibrate(scores)
    # each of two scores asks for its half
    share = (scores >= finer(torch.tensor([0.004]))[0]).float().mean(0)
    torch.testing.assert_close(share, torch.full((2,), 0.002), rtol=0, atol=3e-4)


def test_shares_that_do_not_rise_are_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1, rising. Got \(0.1, 0.05\)"):
        ThresholdTable(1, (0.1, 0.05))


@pytest.mark.parametrize("router", ["learned", "shuffled", "surprise+learned"])
def test_calibration_at_a_length_keeps_the_share_that_is_asked(router: str) -> None:
    cell = RunPlan(probes=("der",), models=("ham",), routers=(router,), budgets=(1.0,), seeds=1, steps=2).trial_cells()[
        0
    ]
    fitted = asked_at(fit_cell(cell, device="cpu"), cell, "small")
    batch = calibration(fitted.plan)
    calibrate_at(fitted.net, batch, 4)
    if router == "shuffled":
        return
    context = read_context(fitted.net, batch, 4)
    for layer, trace in zip(fitted.net.layers, context.traces, strict=True):
        limit = layer.thresholds(torch.tensor([4 / 256]))[0]  # [S]
        share = (trace.scores[:, 0].flatten(0, 1) >= limit).float().mean(0)  # [S]
        torch.testing.assert_close(share.sum(), torch.tensor(4 / 256), rtol=0.1, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    plan = RunPlan(
        probes=("der",), models=("ham", "full"), routers=("mix",), budgets=(0.5,), seeds=2,
        steps=2, streams=1, sequences=8,
    )  # fmt: skip
    run_plan(plan, root, progress=False)
    return root


def test_seeds_side_by_side_score_as_networks_one_by_one(folder: Path, tmp_path: Path) -> None:
    asked = Revisit(preset="small", streams=1, sequences=4)
    for name, together in (("one", False), ("side", True)):
        revisit(folder, tmp_path / name, asked, progress=False, in_step=together)
    # scaled positions are read side by side in both calls
    skills = {}
    for path in (tmp_path / "one").glob("*/*.json"):
        content = json.loads(path.read_text())
        skills.setdefault(content["identity"]["axis"], []).append(content["results"]["skill"]["value"])
        assert content["config"]["positions"] == ("scaled" if "scaled" in content["identity"]["axis"] else "kept")
    assert {axis: len(values) for axis, values in skills.items()} == {"at small": 4, "at small, scaled": 4}
    assert sorted(skills["at small"]) != sorted(skills["at small, scaled"])
    paths = sorted((tmp_path / "one").glob("*/*.json"))
    assert len(paths) == 8
    for path in paths:
        one, side = (json.loads((tmp_path / name / "der" / path.name).read_text()) for name in ("one", "side"))
        assert side["config"]["thresholds"] == "found on 8 sequences of preset small"
        assert side["results"]["skill"]["value"] == pytest.approx(one["results"]["skill"]["value"], abs=1e-4)
        for metric in ("recall_corrected", "usage_rows", "bytes_total"):
            if metric in one["results"]:
                assert side["results"][metric]["median"] == pytest.approx(one["results"][metric]["median"], abs=1e-5)
        assert side["diagnosis"]["stages"] == pytest.approx(one["diagnosis"]["stages"])
        assert "causal_use" not in side["results"]


def test_rungs_that_are_not_there_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished network of pbcD"):
        revisit(folder, tmp_path, Revisit(preset="small", rungs=("pbcD",)), progress=False)
    asked = Revisit(preset="small", rungs=("der",), streams=1, sequences=2, positions=("kept",))
    assert len(revisit(folder, tmp_path, asked, progress=False)) == 4
    with pytest.raises(ValueError, match="Unknown positions 'far'"):
        Revisit(preset="small", positions=("far",))
