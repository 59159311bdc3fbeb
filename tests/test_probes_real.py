"""Probes for fitted forecasters: echo questions, injected items, labelled windows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import hamts
from hamts.errors import DataError
from probes.adapter import HamtsAdapter
from probes.api import run_probes
from probes.cli import main
from probes.contract import generator
from probes.detection import detection, detection_test
from probes.frames import ProbeFromFrame, echo_cases, to_frame, training_frame
from probes.inject import SemiSynthetic, from_catalog, random_phases
from probes.real import LABELLED_SETS, drop_test, edit_test, labelled_probe, lead_test
from probes.registry import get_probe


class Last:
    """The last row again."""

    def forecast(self, history: pd.DataFrame, future: pd.DataFrame) -> pd.DataFrame:
        answer = future[["unique_id", "ds"]].copy()
        for name in [c for c in history if c not in ("unique_id", "ds") and not c.startswith(("ev_", "act_"))]:
            answer[name] = history[name].iloc[-1]
        return answer


class Lookup:
    """Finds the row that carries the trigger's code, and replays it with the known decay."""

    def forecast(self, history: pd.DataFrame, future: pd.DataFrame) -> pd.DataFrame:
        codes = [c for c in history if c.startswith("ev_code")]
        asked = history[codes].iloc[-1].to_numpy()
        apart = np.abs(history[codes].iloc[:-1].to_numpy() - asked).sum(1)
        row = history.iloc[int(apart.argmin())]
        answer = future[["unique_id", "ds"]].copy()
        for name in ("ch_0", "ch_1"):
            answer[name] = float(row[name]) * 0.7 ** np.arange(len(future))
        return answer


class Recall:
    """Replays what came after the last onset like the present one: rows of level 5 or more mark an onset."""

    def forecast(self, history: pd.DataFrame, future: pd.DataFrame) -> pd.DataFrame:
        y = history["y"].to_numpy()
        onsets = np.flatnonzero((y[:-3] >= 5) & (np.r_[0, y[:-4]] < 5))
        answer = future[["unique_id", "ds"]].copy()
        known = future["alarm"].to_numpy()
        answer["y"] = y[onsets[-1]] if len(onsets) and known.any() else np.median(y)
        return answer


def test_the_table_view_holds_every_row_and_what_is_known_of_it() -> None:
    probe, _ = get_probe("der")
    batch = probe.sample(generator(0), 3, probe.config("smoke"))
    frame = to_frame(batch)
    assert len(frame) == batch.x.shape[0] * batch.x.shape[1]
    assert frame["critical"].sum() == int(batch.crit.sum())
    assert set(frame["role"]) == {"context", "query"}
    assert frame[frame["series_id"] == 1]["ch_0"].to_numpy() == pytest.approx(batch.x[1, :, 0].numpy())


def test_echo_questions_end_with_the_trigger_and_are_answered_by_a_lookup() -> None:
    probe, _ = get_probe("der")
    batch = probe.sample(generator(0), 4, probe.config("smoke"))
    cases = echo_cases(probe, batch, queries=2)
    assert len(cases) == 8
    for case in cases:
        assert case.history["ev_q_flag"].iloc[-1] == 1.0
        answer = Lookup().forecast(case.history, case.future)
        assert answer[list(case.answer_columns)].to_numpy() == pytest.approx(case.truth, abs=1e-5)
    with pytest.raises(ValueError, match="no echo for forecasters"):
        cfr, rung = get_probe("cfr/cfr")
        echo_cases(cfr, cfr.sample(generator(0), 1, cfr.config("smoke", rung)))


def test_forecasters_are_scored_apart_from_trained_models(tmp_path) -> None:  # noqa: ANN001
    report = run_probes(
        ["der/der"], tier="T2", external={"last": Last(), "lookup": Lookup()}, out=tmp_path / "t2", progress=False,
        sequences=8,
    )  # fmt: skip
    skills = report.frame[report.frame["metric"] == "skill"].set_index("model")["value"]
    assert skills["lookup"] == pytest.approx(1.0, abs=1e-6)
    assert skills["last"] < 0.2
    assert set(report.frame["tier"]) == {"T2"}

    class Deaf:
        def forecast(self, history: pd.DataFrame, future: pd.DataFrame) -> pd.DataFrame:
            return future[["unique_id", "ds"]]

    with pytest.raises(DataError, match="E-PROBE-CHANNELS"):
        run_probes(["der/der"], tier="T2", external={"deaf": Deaf()}, out=tmp_path / "t3", progress=False, sequences=2)


def test_training_streams_hold_questions_and_their_echoes() -> None:
    probe, _ = get_probe("der")
    frame = training_frame(probe, probe.config("smoke"), sequences=2)
    assert frame.groupby("unique_id").size().tolist() == [72 + 1 + probe.echo_rows] * 2
    assert not frame.isna().any().any()


# --- real carriers


@pytest.fixture(scope="module")
def carrier() -> pd.DataFrame:
    step = np.arange(4_000)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(4_000, 3)) * 0.3
    return pd.DataFrame({f"c{n}": 10 + 3 * np.sin(2 * np.pi * step / 24 + n) + noise[:, n] for n in range(3)})


def test_items_are_added_and_nothing_is_replaced(carrier: pd.DataFrame) -> None:
    made = SemiSynthetic("der", carrier, amplitude=4.0)
    config = made.probe.config("smoke")
    with_items = made.sample(generator(0), 16, config)
    without = made.sample(generator(0), 16, config, amplitude=0.0)
    apart = (with_items.x - without.x)[:, : config.context_rows].abs().amax(-1) > 1e-6
    assert torch.equal(apart, with_items.crit[:, : config.context_rows])
    row = torch.arange(16)[:, None].expand_as(with_items.q_item)
    added = (with_items.x - without.x)[row, with_items.need[..., 0]]
    assert torch.allclose(added, with_items.y * made.unit[:2] * 4.0, atol=1e-4)


def test_the_controls_of_a_carrier_pass_and_parts_do_not_meet(carrier: pd.DataFrame) -> None:
    made = SemiSynthetic("der", carrier)
    found = made.controls(made.probe.config("small"), sequences=256)
    assert found.passed, found
    # louder items in every sixth row are not innocent any more
    loud = SemiSynthetic("der", carrier, amplitude=8.0)
    spoiled = loud.controls(loud.probe.config("smoke"), sequences=64)
    assert spoiled.carrier_change > 0.02
    assert not spoiled.passed
    train, test = made.part("train", 72), made.part("test", 72)
    assert train.stop + 72 <= test.start
    turned = random_phases(torch.randn(2, 64, 3), generator(0))
    assert turned.shape == (2, 64, 3)


def test_carriers_that_cannot_carry_are_refused(carrier: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="needs 10 channels, the carrier has 3"):
        made = SemiSynthetic("xcb", carrier)
        made.sample(generator(0), 1, made.probe.config("smoke"))
    with pytest.raises(DataError, match="E-PROBE-CHANNELS"):
        SemiSynthetic("der", carrier, columns=["nothing"])
    with pytest.raises(DataError, match="E-PROBE-ROWS"):
        made = SemiSynthetic("der", carrier.iloc[:200])
        made.sample(generator(0), 1, made.probe.config("smoke"), part="test")


def test_rows_to_avoid_are_not_asked_about(carrier: pd.DataFrame) -> None:
    made = SemiSynthetic("der", carrier, avoid=np.ones(len(carrier), dtype=bool))
    assert not bool(made.sample(generator(0), 4, made.probe.config("smoke")).asked.any())


@pytest.mark.data
@pytest.mark.skipif("HAMTS_DATA" not in os.environ, reason="HAMTS_DATA names no folder")
@pytest.mark.parametrize(
    ("name", "passes"), [("ett/ETTh1", True), ("epf/NP", False), ("bike_sharing", True), ("household_power", True)]
)
def test_items_are_laid_into_sets_of_the_catalogue(name: str, passes: bool) -> None:
    made = from_catalog("der", name)
    found = made.controls(made.probe.config("small"), sequences=256)
    assert max(found.leak_skill, found.phase_skill) <= 0.02, found
    # the plans among the columns of NP are almost known in advance: any item is much beside what is left to forecast
    assert found.passed == passes, found


# --- labelled windows


@pytest.fixture(scope="module")
def labelled() -> ProbeFromFrame:
    rng = np.random.default_rng(0)
    y = np.sin(2 * np.pi * np.arange(1_200) / 24) + 0.1 * rng.normal(size=1_200)
    alarm = np.zeros(1_200)
    windows = []
    for start in (240, 500, 900):
        y[start : start + 12] = 6.0
        alarm[start : start + 12] = 1.0
        windows.append({"unique_id": "a", "start": start, "end": start + 11, "label": "storm"})
    df = pd.DataFrame({"unique_id": "a", "ds": np.arange(1_200), "y": y, "alarm": alarm})
    return ProbeFromFrame(df, critical=pd.DataFrame(windows), target=["y"], event_cols=["alarm"])


def test_a_forecaster_that_remembers_is_found_by_edit_and_lead(labelled: ProbeFromFrame) -> None:
    assert len(labelled.pairs) == 2
    found = edit_test(labelled, Recall(), horizon=6, period_rows=24)
    assert found.value > 0.5
    assert "case study" in found.note
    blind = edit_test(labelled, Last1(), horizon=6, period_rows=24)
    assert blind.value == 0.0
    lead = lead_test(labelled, Recall(), horizon=6, ages=(24, 72))
    assert set(lead.rows["age_rows"]) == {24, 72}
    assert lead.value >= 0.0
    assert "edit:" in str(found)


class Last1(Last):
    """The median of the history: no memory of windows."""

    def forecast(self, history: pd.DataFrame, future: pd.DataFrame) -> pd.DataFrame:
        answer = future[["unique_id", "ds"]].copy()
        answer["y"] = 0.0
        return answer


def test_windows_and_forecasters_that_cannot_be_used_are_refused(labelled: ProbeFromFrame) -> None:
    with pytest.raises(DataError, match="E-PROBE-MEMORY"):
        drop_test(labelled, Recall(), horizon=6)
    with pytest.raises(DataError, match="lacks the columns"):
        ProbeFromFrame(labelled.df, critical=labelled.critical, target=["z"])
    with pytest.raises(DataError, match="No window has an earlier one"):
        ProbeFromFrame(labelled.df, critical=labelled.critical.iloc[:1], target=["y"])
    outside = labelled.critical.assign(start=9_000, end=9_010)
    probe = ProbeFromFrame(labelled.df, critical=labelled.critical, query=outside, target=["y"])
    with pytest.raises(DataError, match="outside of its series"):
        edit_test(probe, Recall(), horizon=6, period_rows=24)


@pytest.mark.data
@pytest.mark.skipif("HAMTS_DATA" not in os.environ, reason="HAMTS_DATA names no folder")
@pytest.mark.parametrize("name", LABELLED_SETS)
def test_labelled_sets_of_the_catalogue_become_probes(name: str) -> None:
    probe = labelled_probe(name)
    assert len(probe.pairs) >= 2
    for earlier, later in probe.pairs:
        assert earlier["end"] < later["start"]
    if name == "tep":
        assert len(probe.pairs) == 21
        found = edit_test(probe, Zeros(probe.target), horizon=4, period_rows=480, most=2)
        assert found.value == 0.0


class Zeros:
    """Answers 0 for every target."""

    def __init__(self, target: tuple[str, ...]) -> None:
        self.target = target

    def forecast(self, history: pd.DataFrame, future: pd.DataFrame) -> pd.DataFrame:
        return future[["unique_id", "ds"]].assign(**dict.fromkeys(self.target, 0.0))


# --- a fitted model of ours


@pytest.fixture(scope="module")
def fitted() -> HamtsAdapter:
    probe, _ = get_probe("der")
    frame = training_frame(probe, probe.config("smoke"), sequences=6)
    model = hamts.fit(
        frame, h=4, target=["ch_0", "ch_1"], preset="tiny", patch_steps=1, max_steps=3, freq=1, verbose=False,
        progress=False, val_size=0,
    )  # fmt: skip
    return HamtsAdapter(model)


def test_a_fitted_model_answers_probes(fitted: HamtsAdapter, tmp_path) -> None:  # noqa: ANN001
    report = run_probes(
        ["der/der"], tier="T2", external={"ham": fitted}, out=tmp_path / "t2", progress=False, sequences=2
    )
    skill = report.frame[report.frame["metric"] == "skill"]["value"].iloc[0]
    assert np.isfinite(skill)
    probe, _ = get_probe("der")
    case = echo_cases(probe, probe.sample(generator(0), 1, probe.config("smoke")))[0]
    with pytest.raises(DataError, match="fitted on columns that this probe has not"):
        fitted.forecast(case.history.drop(columns=["ev_ev"]), case.future)


def test_a_saved_model_is_asked_by_a_command(fitted: HamtsAdapter, tmp_path: Path, capsys) -> None:  # noqa: ANN001
    fitted.model.save(tmp_path / "mine")
    with pytest.raises(SystemExit) as end:
        main(["ask", str(tmp_path / "mine"), "der/der", "--shares", "0.1,1", "--sequences", "4", "--quiet", "-o",
              str(tmp_path / "out")])  # fmt: skip
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "mine@0.1" in shown and "mine@1" in shown
    with pytest.raises(SystemExit) as end:
        main(["ask", str(tmp_path / "mine"), "xcb/xcb", "--quiet", "-o", str(tmp_path / "out")])
    assert end.value.code == 2


def test_entries_can_be_dropped_from_a_fitted_model(fitted: HamtsAdapter) -> None:
    probe, _ = get_probe("der")
    case = echo_cases(probe, probe.sample(generator(0), 1, probe.config("smoke")))[0]
    everything = HamtsAdapter(fitted.model, budget_share=1.0)
    plain = everything.forecast(case.history, case.future)
    found = everything.forecast_without(case.history, case.future, [(10, 40)])
    assert found["full"]["ch_0"].to_numpy() == pytest.approx(plain["ch_0"].to_numpy(), rel=1e-5, abs=1e-6)
    assert set(found) == {"full", "without", "others"}
    assert not np.allclose(found["without"]["ch_0"], found["full"]["ch_0"], atol=1e-9)
    nothing = HamtsAdapter(fitted.model, budget_share=0.0).forecast_without(case.history, case.future, [(10, 40)])
    assert set(nothing) == {"full"}


# --- labelled windows and kept rows


def test_kept_rows_in_windows_are_near_and_far_ones_are_not() -> None:
    kept = np.zeros(1_000, dtype=bool)
    windows = [np.arange(start, start + 10) for start in (100, 400, 700)]
    kept[[105, 403, 708]] = True
    near = detection(kept, windows)
    assert (near.recall, near.kept, near.windows) == (1.0, 3, 3)
    assert near.chance < 0.1 and near.corrected > 0.99
    assert near.reach < 0.05 and near.precision_distance == 0.0
    far = np.zeros_like(kept)
    far[[250, 550, 900]] = True
    away = detection(far, windows)
    assert away.recall == 0.0 and away.precision_distance > 0.8
    # by lot: as near as chance has it, in the mean of forty draws
    reach = []
    for seed in range(40):
        lot = np.zeros_like(kept)
        lot[np.random.default_rng(seed).choice(1_000, size=100, replace=False)] = True
        reach.append(detection(lot, windows).reach)
    assert np.mean(reach) == pytest.approx(1.0, abs=0.1)
    # whole patches are drawn where whole patches are kept: two of a hundred touch a window by chance, but not often
    patch = np.arange(1_000) // 10
    held = detection(np.isin(patch, [10, 40]), windows, patch=patch)
    assert (held.kept, held.patches, held.recall) == (2, 100, pytest.approx(2 / 3))
    assert held.chance < 0.1
    with pytest.raises(ValueError, match="Got 0 rows"):
        detection(np.zeros(10, dtype=bool), windows)


def test_a_fitted_model_tells_the_rows_that_it_keeps(fitted: HamtsAdapter) -> None:
    probe, _ = get_probe("der")
    history = echo_cases(probe, probe.sample(generator(0), 1, probe.config("smoke")))[0].history
    shares = [HamtsAdapter(fitted.model, budget_share=share).kept_rows(history)[0] for share in (0.0, 0.3, 1.0)]
    assert [len(rows) for rows in shares] == [len(history)] * 3
    none, some, most = (int(rows.sum()) for rows in shares)
    assert none == 0 < some <= most
    windows = pd.DataFrame({"unique_id": history["unique_id"].iloc[0], "start": [10, 40], "end": [12, 44]})
    own = ProbeFromFrame(history, critical=windows, target=["ch_0", "ch_1"])
    (found,) = detection_test(own, HamtsAdapter(fitted.model, budget_share=0.3))
    assert found["windows"] == 2 and found["rows"] == len(history)
    assert detection_test(own, HamtsAdapter(fitted.model, budget_share=0.0)) == []
