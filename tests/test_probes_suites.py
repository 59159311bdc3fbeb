"""Generators of the probes: seeds, truth, gates that need no training, and what must not move what."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from probes import registry
from probes.contract import PRESETS, Draws, ProbeConfig, generator
from probes.draws import carrier, choose_rows, codes, segments
from probes.effects import effect_scores, placebo_score
from probes.gates import CHEAP, check_contract, validate
from probes.registry import Probe, get_probe, list_probes, register_probe
from probes.scores import query_error
from probes.suites.cfr import CHANNELS, PLANS, effect_by_tau, plan_regret

RUNGS = [(name, rung) for name, probe in list_probes().items() for rung in probe.rungs]


@pytest.mark.parametrize(("name", "rung"), RUNGS)
def test_every_rung_keeps_the_contract_at_every_trained_size(name: str, rung: str) -> None:
    probe, _ = get_probe(name)
    for preset in ("smoke", "small"):
        config = probe.config(preset, rung)
        batch = probe.sample(generator(1), 4, config)
        assert check_contract(probe, config, batch) == []
        assert torch.equal(probe.oracle(batch), batch.y)
        echo = probe.r2_render(batch)
        assert echo.y.shape[-1] == probe.echo_rows * batch.y.shape[-1]
        assert torch.allclose(echo.y[..., : batch.y.shape[-1]], batch.y)


@pytest.mark.parametrize("name", [name for name, probe in list_probes().items() if name != "stream"])
def test_gates_that_need_no_training_pass(name: str) -> None:
    failed = [str(result) for result in validate(name, gates=CHEAP) if result.passed is False]
    assert failed == []


@pytest.mark.parametrize("rung", ["drift_mean", "drift_none"])
def test_gates_of_the_stream_pass(rung: str) -> None:
    assert [str(r) for r in validate(f"stream/{rung}", gates=CHEAP) if r.passed is False] == []


def test_a_gate_can_fail() -> None:
    @register_probe("leaky", version=1, slot="benchmark hygiene")
    class Leaky(Probe):
        rungs = {"leaky": {}}

        def sample(self, gen: torch.Generator, n: int, config: ProbeConfig):  # noqa: ANN202
            probe, _ = get_probe("der")
            batch = probe.sample(gen, n, probe.config("smoke"))
            x = batch.x.clone()
            # the answer stands in the question
            x.scatter_(1, batch.q_index[..., None].expand(-1, -1, 2), batch.y)
            return replace(batch, x=x)

    results = {result.gate: result for result in validate("leaky", gates=("contract", "G3"))}
    assert results["G3"].passed is False
    assert results["G3"].value < 0.1
    assert "FAIL" in str(results["G3"])
    registry._REGISTERED.pop("leaky")


def test_axes_change_one_thing_at_a_time() -> None:
    probe, _ = get_probe("der")
    plain = probe.sample(generator(5), 4, probe.config("small"))
    for axis in ({"noise": 1.0}, {"missing": 0.3}, {"distractors": 16}, {"jitter": 0.3}, {"carrier": "gp"}):
        other = probe.sample(generator(5), 4, probe.config("small", **axis))
        assert torch.equal(plain.y, other.y), axis
        assert torch.equal(plain.need, other.need), axis


def test_tag_noise_leaves_the_sequence_alone() -> None:
    probe, _ = get_probe("der")
    plain = probe.sample(generator(5), 64, probe.config("small"))
    noisy = probe.sample(generator(5), 64, probe.config("small", missed_tags=0.2, false_tags=4))
    assert torch.equal(plain.inputs(), noisy.inputs())
    assert torch.equal(plain.tags, plain.crit)
    kept = (noisy.tags & noisy.crit).sum() / noisy.crit.sum()
    assert float(kept) == pytest.approx(0.8, abs=0.04)
    assert ((noisy.tags & ~noisy.crit).sum(1) == 4 * 16).all()


def test_critical_rows_of_pbc_are_predictable_and_decoys_are_not() -> None:
    from probes.t0_run import value_residual

    probe, rung = get_probe("pbc/pbcD")
    batch = probe.sample(generator(0), 64, probe.config("small", rung))
    size, context = value_residual(batch), ~batch.query
    rank = torch.stack(
        [(s[c][None] <= s[k][:, None]).float().mean() for s, c, k in zip(size, context, batch.crit, strict=True)]
    )
    assert float(rank.mean()) < 0.6
    assert float(size[batch.distract].mean()) > 4 * float(size[batch.crit].mean())


def test_a_planned_setpoint_is_reached_exactly_as_announced() -> None:
    probe, rung = get_probe("pbc/pbcA")
    batch = probe.sample(generator(0), 16, probe.config("small", rung, noise=0.3))
    asked = batch.asked
    early, late = batch.need[..., 0][asked], batch.need[..., 1][asked]
    row = torch.arange(len(batch))[:, None].expand_as(asked)[asked]
    assert torch.allclose(batch.actions[row, early], batch.y[asked])
    assert torch.allclose(batch.x[row, late], batch.y[asked])


def test_the_last_payload_counts_after_an_update() -> None:
    probe, _ = get_probe("der")
    batch = probe.sample(generator(0), 16, probe.config("small", updates=16))
    row = torch.arange(16)[:, None].expand_as(batch.q_item)
    assert torch.allclose(batch.x[row, batch.need[..., 0]], batch.y)
    first = probe.sample(generator(0), 16, probe.config("small", updates=16, ask="first"))
    assert (first.need[..., 0] < batch.need[..., 0]).all()


def test_parents_are_found_through_the_latest_edge() -> None:
    probe, rung = get_probe("topo/topo")
    batch = probe.sample(generator(0), 32, probe.config("small", rung, rewires=16, updates=16))
    hop1 = batch.slices["hop"] == 1
    row = torch.arange(32)[:, None].expand_as(hop1)[hop1]
    edge, reading = batch.need[..., 0][hop1], batch.need[..., 1][hop1]
    to = batch.event_names.index("to_0")
    code = batch.event_names.index("code_0")
    # the edge row names the node whose reading row is needed, and that row holds the answer
    assert torch.allclose(batch.events[row, edge, to:], batch.events[row, reading, code:to])
    assert torch.allclose(batch.x[row, reading], batch.y[hop1])
    assert (batch.need[..., 0][~hop1] == -1).all()


def test_counterfactual_truth_answers_itself() -> None:
    probe, rung = get_probe("cfr/cfr")
    config = probe.config("smoke", rung)
    batch = probe.sample(generator(0), 32, config)
    horizon = batch.extra["baseline"].shape[1]
    assert float(plan_regret(batch.y, batch, horizon).max()) == 0.0
    assert float(plan_regret(batch.y, batch, horizon, by="reward").max()) == 0.0
    own = effect_by_tau(batch.y, batch, horizon)
    # nothing is explained before the first effect sets in
    assert bool(own[0].isnan())
    assert float(own[LAGS:].max()) == 0.0
    zero = effect_by_tau(torch.zeros_like(batch.y), batch, horizon)
    assert torch.allclose(zero[LAGS:], torch.ones(horizon - LAGS))
    # linear effects scale with the dose
    effect = batch.y[..., : horizon * CHANNELS]
    assert torch.allclose(effect[:, PLANS.index("dose 2")], 2 * effect[:, PLANS.index("dose 1")], atol=1e-4)
    assert torch.allclose(effect[:, PLANS.index("dose -1")], -effect[:, PLANS.index("dose 1")], atol=1e-4)
    assert float(batch.y[:, PLANS.index("none")].abs().max()) < 1e-4
    # effects that are all half as large, and what doing nothing is said to do
    truth, half, none = (effect_scores(answer, batch) for answer in (batch.y, 0.5 * batch.y, torch.zeros_like(batch.y)))
    for scores, pehe, slope, sign in ((truth, 0.0, 1.0, 1.0), (half, 0.5, 0.5, 1.0), (none, 1.0, 0.0, 0.0)):
        assert (scores["pehe"], scores["effect_slope"]) == pytest.approx((pehe, slope), abs=1e-5)
        assert scores["sign_accuracy"] == sign
        assert (scores["consistency"], scores["additivity"]) == pytest.approx((0.0, 0.0), abs=1e-4)
    wrong = batch.y + 1.0
    assert effect_scores(wrong, batch)["consistency"] > 0.5
    assert effect_scores(wrong, batch)["additivity"] == pytest.approx(effect_scores(wrong, batch)["consistency"])


LAGS = 4


def test_placebo_actions_do_nothing() -> None:
    probe, rung = get_probe("cfr/cfr")
    batch = probe.sample(generator(0), 8, probe.config("smoke", rung, placebo=1.0))
    assert float(batch.y.abs().max()) < 1e-5
    some = probe.sample(generator(0), 64, probe.config("smoke", rung, placebo=0.5))
    assert placebo_score(some.y, some)["placebo_effect"] < 1e-4
    assert placebo_score(some.y + 1.0, some)["placebo_effect"] > 0.3


def test_sizes_and_names_that_cannot_be_are_refused() -> None:
    probe, _ = get_probe("der")
    for wrong, text in (
        ({"items": 65}, "There are 64 types"),
        ({"items": 0}, "items must be at least 1"),
        ({"missed_tags": 2.0}, "missed_tags must lie"),
        ({"decoy_flag": "maybe"}, "Unknown decoy_flag"),
        ({"widgets": 3}, "has no axis 'widgets'"),
        ({"carrier": "sawtooth"}, "Unknown carrier"),
    ):
        with pytest.raises(ValueError, match=text):
            probe.sample(generator(0), 1, probe.config("smoke", **wrong))
    with pytest.raises(ValueError, match="Unknown preset"):
        probe.config("huge")
    with pytest.raises(ValueError, match="Did you mean 'topo2'"):
        get_probe("topo22")
    with pytest.raises(ValueError, match="Unknown slot"):
        register_probe("x", version=1, slot="none")


def test_topo_names_every_node_of_a_path_and_has_a_layer_for_each_hop() -> None:
    probe, rung = get_probe("topo/topo2")
    config = probe.config("smoke", rung)
    assert [probe.depth(probe.config("smoke", name)) for name in ("topoG", "topo", "topo2")] == [3, 3, 4]
    plain, shallow = (
        probe.sample(generator(0), 16, replace(config, hop0_share=0.0, shallow_share=share)) for share in (0.0, 1.0)
    )
    assert plain.aux is not None and shallow.aux is not None
    first, second = plain.aux.chunk(2, -1)  # 2 x [B, Q, G]
    torch.testing.assert_close(first, shallow.aux.chunk(2, -1)[0])
    # one hop ends where the path of two begins
    torch.testing.assert_close(shallow.aux.chunk(2, -1)[1], first)
    assert not torch.allclose(second, first)
    assert shallow.slices["hop"].unique().tolist() == [1]
    assert (shallow.need[..., 1] == -1).all() and (plain.need >= 0).all()


def test_quick_rungs_take_fewer_steps() -> None:
    steps = {name: get_probe(name)[0].train_steps("small", name.split("/")[1]) for name in ("der/der", "pbc/pbcS")}
    assert steps == {"der/der": 1_500, "pbc/pbcS": 2_500}
    assert get_probe("der/der")[0].train_steps("smoke", "der") == PRESETS["smoke"].train_steps


def test_the_presets_are_those_of_the_contract() -> None:
    sizes = {name: (p.context_rows, p.items) for name, p in PRESETS.items()}
    assert sizes == {"smoke": (72, 12), "small": (256, 16), "standard": (1024, 32), "long": (8192, 64)}
    assert PRESETS["small"].train_seeds >= 5


@pytest.mark.parametrize("kind", ["season", "ar", "walk", "gp", "chaos"])
def test_carriers_are_finite_and_of_unit_scale(kind: str) -> None:
    config = ProbeConfig(carrier=kind)
    x = carrier(generator(0), 32, 256, 5, config)
    assert x.shape == (32, 256, 5)
    assert bool(torch.isfinite(x).all())
    assert 0.2 < float(x.std()) < 1.2


def test_draws_are_distinct_and_split_by_component() -> None:
    rows = choose_rows(generator(0), torch.ones(50, 40, dtype=torch.bool), 12)
    assert all(len(set(row.tolist())) == 12 for row in rows)
    with pytest.raises(ValueError, match="distinct rows are needed"):
        choose_rows(generator(0), torch.ones(2, 5, dtype=torch.bool), 6)
    starts = segments(generator(0), 50, count=5, width=7, rows=40)
    assert int(starts.diff(dim=1).min()) >= 7
    assert int(starts.max()) <= 33
    one, two = Draws(generator(0)), Draws(generator(0), swap={"keys": 1})
    assert one("keys").initial_seed() != two("keys").initial_seed()
    assert one("rows").initial_seed() == two("rows").initial_seed()
    assert torch.allclose(codes("random").norm(dim=1), torch.full((64,), 2.0))


def test_a_second_probe_of_the_same_name_is_refused() -> None:
    with pytest.raises(ValueError, match="registered already"):

        @register_probe("der", version=2, slot="streaming state")
        class Other(Probe):
            pass


def test_floors_carry_the_error_that_the_arithmetic_says() -> None:
    # knowing the mean of N payloads of unit variance leaves 1 - 1/N of it
    probe, _ = get_probe("der")
    batch = probe.sample(generator(0), 2_000, probe.config("smoke"))
    nmse = float(query_error(batch.floor["set_mean"], batch).mean()) / float(batch.y.var())
    assert nmse == pytest.approx(1 - 1 / 12, abs=0.01)
