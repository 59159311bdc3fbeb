"""Saving and loading a fitted model, its memory included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from model_frames import ROLES, irregular_frame, quick, rich_frames, sine_frame

import hamts
from hamts.errors import DataError, ModelFolderError


@pytest.fixture(scope="module")
def model() -> hamts.HAMForecaster:
    return hamts.fit(sine_frame(), 12, preset="tiny", max_steps=3, verbose=False)


def test_a_loaded_model_forecasts_from_memory_with_the_same_bits(model: hamts.HAMForecaster, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = hamts.load(tmp_path / "model")
    assert np.array_equal(loaded.predict().quantiles, model.predict().quantiles)
    pd.testing.assert_frame_equal(loaded.predict(level=[80]).df, model.predict(level=[80]).df)
    pd.testing.assert_frame_equal(loaded.predict().samples(5), model.predict().samples(5))
    pd.testing.assert_frame_equal(loaded.memory_bytes(), model.memory_bytes())
    assert repr(loaded) == repr(model)
    assert loaded.report == model.report


def test_a_loaded_model_reads_new_rows_and_scores_them(model: hamts.HAMForecaster, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = hamts.load(tmp_path / "model")
    df = sine_frame(steps=430)
    pd.testing.assert_frame_equal(loaded.cross_validation(df, n_windows=2), model.cross_validation(df, n_windows=2))
    assert np.array_equal(loaded.predict(df, budget_share=0.5).quantiles, model.predict(df, budget_share=0.5).quantiles)


def rich_model() -> tuple[hamts.HAMForecaster, dict[str, Any]]:
    given = rich_frames(steps=160)
    return quick(given["df"], 6, events=given["events"], static_df=given["static_df"], **ROLES), given


@pytest.mark.filterwarnings("ignore::hamts.DataWarning")
def test_every_role_survives(tmp_path: Path) -> None:
    model, given = rich_model()
    model.save(tmp_path / "model")
    loaded = hamts.load(tmp_path / "model")
    assert loaded.schema == model.schema
    assert np.array_equal(
        loaded.predict(futr_df=given["futr_df"]).quantiles, model.predict(futr_df=given["futr_df"]).quantiles
    )
    pd.testing.assert_frame_equal(loaded.future_frame(3), model.future_frame(3))


def test_irregular_and_integer_clocks_survive(tmp_path: Path) -> None:
    counted = pd.DataFrame({"unique_id": 7, "ds": np.arange(150), "y": np.sin(np.arange(150.0))})
    for name, model in (
        ("irregular", quick(irregular_frame(), 4, irregular="native")),
        ("integer", quick(counted, 4)),
    ):
        model.save(tmp_path / name)
        loaded = hamts.load(tmp_path / name)
        pd.testing.assert_frame_equal(loaded.predict().df, model.predict().df)


def test_the_rows_of_the_history_are_not_saved(tmp_path: Path) -> None:
    sizes = []
    for steps in (300, 3000):
        model = quick(sine_frame(items=1, steps=steps), 6, budget_share=0.0)
        model.save(tmp_path / "model")
        sizes.append(sum(path.stat().st_size for path in (tmp_path / "model").iterdir()))
    # a few digits of the documents differ
    assert abs(sizes[1] - sizes[0]) < 200


def test_another_budget_after_loading_asks_for_the_history(model: hamts.HAMForecaster, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    loaded = hamts.load(tmp_path / "model")
    with pytest.raises(DataError, match="Another budget_share than 0.1 needs the history") as caught:
        loaded.predict(budget_share=0.5)
    assert caught.value.code == "E-REPLAY"


def test_the_same_seed_and_data_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        hamts.fit(sine_frame(steps=200), 6, preset="tiny", max_steps=4, verbose=False, seed=5).save(tmp_path / name)
    other = hamts.fit(sine_frame(steps=200), 6, preset="tiny", max_steps=4, verbose=False, seed=6)
    other.save(tmp_path / "other")
    # report.json holds seconds, and manifest.json the checksum of report.json
    names = ["weights.safetensors", "state.safetensors", "residuals.safetensors", "config.json", "items.json"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert (tmp_path / "one" / names[0]).read_bytes() != (tmp_path / "other" / names[0]).read_bytes()


def test_damaged_foreign_and_missing_folders_are_refused(model: hamts.HAMForecaster, tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="There is no folder"):
        hamts.load(tmp_path / "nothing")
    path = tmp_path / "model"
    model.save(path)
    content = bytearray((path / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (path / "weights.safetensors").write_bytes(bytes(content))
    with pytest.raises(ModelFolderError, match="does not match the checksum"):
        hamts.load(path)


def test_a_whole_folder_with_other_content_is_refused(
    model: hamts.HAMForecaster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hamts.storage import save_folder

    save_folder(tmp_path / "model", tensors={"weights": model._fitted.network.state_dict()}, documents={"config": {}})
    with pytest.raises(ModelFolderError, match="cannot read what is in it") as caught:
        hamts.load(tmp_path / "model")
    assert caught.value.code == "E-MODEL-CONTENT"


def test_the_documents_can_be_read_by_people(model: hamts.HAMForecaster, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["plan"]["h"] == 12
    assert config["schema"]["frequency"]["alias"] == "h"
    assert json.loads((tmp_path / "model" / "items.json").read_text())["item_ids"] == ["i0", "i1"]
