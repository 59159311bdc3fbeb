"""Options and words of a user that are wrong: each is told what must hold, what came, and what to do."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from model_frames import quick, sine_frame
from streams import plain_model, rows_of
from typer.testing import CliRunner

from hamts import training
from hamts.cli import app
from hamts.errors import DataError


def test_a_field_of_machine_that_there_is_not_is_answered_with_those_there_are() -> None:
    with pytest.raises(DataError, match=r"Unknown field 'zz' of machine\. Available: \[.*'checkpointing'") as caught:
        quick(sine_frame(items=1, steps=60), 6, machine={"zz": 1})
    assert caught.value.code == "E-OPTION"


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_a_gpu_that_is_not_there_is_said_to_be_missing(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DataError, match=f"accelerator='{accelerator}' needs a CUDA device.*There is none") as caught:
        quick(sine_frame(items=1, steps=60), 6, accelerator=accelerator)
    assert caught.value.code == "E-OPTION"


@pytest.mark.parametrize("level", ["x", ["wide"], [None]])
def test_a_level_that_is_no_number_is_named(level: Any) -> None:
    with pytest.raises(DataError, match="level must be a number in percent, or several. Got ") as caught:
        plain_model().predict(level=level)
    assert caught.value.code == "E-QUANTILE"


@pytest.mark.parametrize("at", ["soon", pd.NaT, 10**30])
def test_a_moment_that_is_no_date_is_named(at: Any) -> None:
    model = plain_model()
    with pytest.raises(DataError, match=f"A moment in the history must be a date. Got {at!r}") as caught:
        model.routes(rows_of(model), at=at)
    assert caught.value.code == "E-DATE"


def test_whole_numbers_of_numpy_are_taken_and_can_be_saved() -> None:
    stream = plain_model().stream(recent_rows=np.int64(64), drift_scales=np.float32(4))
    _, meta = stream.state()
    assert json.loads(json.dumps(meta))["config"]["recent_rows"] == 64
    with pytest.raises(DataError, match="drift_scales must be a number above 0. Got True"):
        plain_model().stream(drift_scales=True)


def test_a_zone_that_there_is_not_is_no_fault_of_the_file(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    sine_frame(items=1, steps=60).to_csv(table, index=False)
    said = CliRunner().invoke(app, ["fit", str(table), "--out", str(tmp_path / "model"), "--tz", "Mars"])
    # the command line itself draws it; run by a test, the error comes as it is
    assert isinstance(said.exception, DataError) and said.exception.code == "E-TZ"
    assert "could not be read" not in str(said.exception)


def test_every_says_what_came(tmp_path: Path) -> None:
    words = ["--model", "m", "--source", str(tmp_path), "--state", str(tmp_path / "state"), "--every", "soon"]
    said = CliRunner().invoke(app, ["stream", *words])
    assert isinstance(said.exception, DataError) and "Got 'soon'" in str(said.exception)


@pytest.mark.parametrize("name", ["budget_share", "budget_bytes", "max_time", "learning_rate", "seed"])
@pytest.mark.parametrize("value", ["ten", True])
def test_an_option_that_is_no_number_is_named(name: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"{name} must be a (whole )?number\. Got {value!r}") as caught:
        quick(sine_frame(items=1, steps=60), 6, **{name: value})
    assert caught.value.code == "E-OPTION"


def test_a_horizon_of_many_times_the_history_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(DataError, match=r"Got h=100,000, .* the longest item has 60 steps") as caught:
        quick(sine_frame(items=1, steps=60), 100_000)
    assert caught.value.code == "E-HORIZON" and "h=" in str(caught.value.fix)


def test_patches_longer_than_every_item_are_refused() -> None:
    with pytest.raises(
        DataError, match="patch_steps must be at most the longest item, 60 steps. Got 1000000"
    ) as caught:
        quick(sine_frame(items=1, steps=60), 6, patch_steps=10**6)
    assert caught.value.code == "E-OPTION"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_bytes": math.nan}, "budget_bytes must be a whole number. Got nan"),
        ({"budget_bytes": 1_000_000.5}, "budget_bytes must be a whole number. Got 1000000.5"),
        ({"learning_rate": math.inf}, "learning_rate must be above 0, and finite. Got inf"),
        ({"max_time": math.inf}, "max_time must be above 0, and finite. Got inf"),
        ({"seed": 2**70}, "seed must be a number of 64 bits. Got "),
        ({"val_size": "x"}, "val_size must be a whole number of steps, or a share .* Got 'x'"),
        ({"val_size": True}, "val_size must be .* Got True"),
        ({"val_size": math.nan}, "val_size must be .* Got nan"),
        ({"val_size": 24.0}, "val_size must be .* Got 24.0"),
        ({"val_size": -1}, "val_size must be .* Got -1"),
        ({"half_life_steps": math.nan}, "half_life_steps must be .* Got nan"),
        ({"half_life_steps": [24, math.inf]}, r"half_life_steps must be .* Got \[24, inf\]"),
        ({"half_life_steps": "x"}, "half_life_steps must be .* Got 'x'"),
        ({"half_life_steps": []}, r"half_life_steps must be .* Got \[\]"),
        ({"router": 5}, "router must be the name of a router, .* Got 5"),
        ({"routing": 5}, "routing must be a mapping of names to values. Got 5"),
        ({"routing": {"must_keep_share": "x"}}, "must_keep_share must be a number .* Got 'x'"),
        ({"routing": {"write_clip": math.nan}}, "write_clip must be a number .* Got nan"),
        ({"routing": {"auxiliary_weight": math.nan}}, "auxiliary_weight must be a number .* Got nan"),
        ({"routing": {"inner_weight": -1}}, "inner_weight must be a number .* Got -1"),
        ({"routing": {"budget_flops": math.inf}}, "budget_flops must be a number .* Got inf"),
        ({"machine": 5}, "machine must be a mapping of names to values. Got 5"),
        ({"machine": {"devices": 2}}, "Unknown field 'devices' of machine"),
        ({"accelerator": "mps"}, r"accelerator must be one of \['auto', 'cpu', 'cuda', 'gpu'\]. Got 'mps'"),
    ],
)
def test_an_option_out_of_its_range_is_named_before_anything_is_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        quick(sine_frame(items=1, steps=60), 6, **options)
    assert caught.value.code == "E-OPTION"


@pytest.mark.parametrize("levels", [["x"], 0.5, [None]])
def test_quantiles_that_are_no_list_of_numbers_are_named(levels: Any) -> None:
    with pytest.raises(DataError, match="quantiles must be a list of numbers. Got ") as caught:
        quick(sine_frame(items=1, steps=60), 6, quantiles=levels)
    assert caught.value.code == "E-QUANTILE"


def test_auto_fits_where_the_kernels_were_chosen_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    trainer = training.L.Trainer

    def noted(**options: Any) -> Any:
        asked.append(options["accelerator"])
        return trainer(**options)

    # lightning's own 'auto' would take mps on a Mac, without a word of it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(training.L, "Trainer", noted)
    assert quick(sine_frame(items=1, steps=60), 6, max_steps=1).report.device == "cpu"
    assert asked == ["cpu"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_rows": 1.5}, "score_rows must be a whole number, at least 1. Got 1.5"),
        ({"recent_rows": math.nan}, "recent_rows must be a whole number, at least 1. Got nan"),
        ({"drift_scales": "x"}, "drift_scales must be a number above 0. Got 'x'"),
        ({"calibration_rate": math.nan}, "calibration_rate must be a number above 0. Got nan"),
        ({"budget_share": "x"}, r"budget_share must lie in \[0, 1\]. Got 'x'"),
    ],
)
def test_an_option_of_a_stream_that_is_no_number_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        plain_model().stream(**options)
    assert caught.value.code == "E-OPTION"
