"""Cells of the frontier as files: those of other settings are refused, and tables are those of what is there."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import frontier_kept, frontier_pilot, frontier_size
from benchmarks.frontier import RESULTS, Task, jobs_of, trial_path
from benchmarks.frontier_cell import REGISTRATION, entry_bytes, roomy
from benchmarks.frontier_files import read_cells
from benchmarks.frontier_grid import Cell
from benchmarks.frontier_short import tables
from hamts.config import MemoryConfig, ModelConfig, TrainConfig
from hamts.errors import DataError
from hamts.nn.budget import entry_caps
from hamts.resolve import Plan


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"size": "10M"}, "size must be '10M' and is 'tiny'"),
        ({"max_steps": 5}, "steps must be 5 and is 960"),
        ({"rate": 0.1}, "rate must be 0.1 and is 0.003"),
    ],
)
def test_cells_of_other_settings_are_not_taken_for_those_asked(tmp_path: Path, asked: dict, message: str) -> None:
    cell, path = Cell("epf-old", "mix", 0), tmp_path / "epf-old--mix--seed0.json"
    done = {"registration": REGISTRATION, "size": "tiny", "steps": 960, "rate": 0.003}
    path.write_text(json.dumps(done))

    def left(**how: object) -> list:
        task = functools.partial(Task, folder=tmp_path, how={"size": "tiny", "rate": 0.003, **how})
        return jobs_of([cell], task, again=bool(how.get("again")))

    assert left() == []
    with pytest.raises(DataError, match=message):
        left(**asked)
    assert [job.name for job in left(**asked, again=True)] == [path.name]
    path.write_text(json.dumps({**done, "registration": REGISTRATION - 1}))
    with pytest.raises(DataError, match=f"registration must be {REGISTRATION} and is {REGISTRATION - 1}"):
        left()
    # where trials decide the rate, what they say counts
    path.write_text(json.dumps(done))
    for rate, validation in ((1e-3, 0.1), (3e-3, 0.2)):
        trial_path(tmp_path, Cell("epf", "learned", 0), rate).write_text(json.dumps({"validation": validation}))
    assert left() == []
    with pytest.raises(DataError, match=r"rate must be 0.001 and is 0.003"):
        left(rate=None)


def made_up_cell(model: str, seed: int, points: list[tuple[str, float | None, float]], **said: object) -> dict:
    """A cell of ``epf-old`` with so large an error at each (memory, share)."""
    costs = {"usage_share": 0.1, "bytes": 1000.0, "scratchpad_attention": 0.5, "ms_per_step": 1.0}
    parts = ("all", "near", "middle", "far", "events")

    def scores(error: float) -> dict:
        return {"WQL": error, "MASE": error, "quantile": [error, error], "size": [1.0, 1.0]}

    return {
        "registration": 8, "set": "epf-old", "model": model, "seed": seed, "size": "1M", "steps": 640, "rate": 0.003,
        "points": [
            {"memory": memory, "share": share, **costs, "parts": {part: scores(error) for part in parts}}
            for memory, share, error in points
        ],
        **said,
    }  # fmt: skip


def test_tables_in_short_are_those_of_their_cells(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must hold cells of the frontier"):
        tables(tmp_path / "nothing")
    learned = [("model", 0.0, 0.09), ("model", 0.1, 0.06), ("recency", 0.1, 0.08), ("model", 1.0, 0.05)]
    for cell in (
        made_up_cell("learned", 0, [*learned, ("parts", 0.1, 0.04)]),
        made_up_cell("recurrent", 0, [("model", None, 0.1)]),
        made_up_cell("window", 0, [("model", 0.1, 0.08)]),
    ):
        (tmp_path / f"{cell['set']}--{cell['model']}--seed0.json").write_text(json.dumps(cell))
    lines = tables(tmp_path).splitlines()
    assert "| epf-old | learned | 1 | 0.0900 |  | 0.0600 | 0.0500 |  |  |  |  |  | 0.0800 | 0.100 |" in lines
    assert "| epf-old | window | 10 % | 1 | 0.0800 | 0.0800 | 0.00 | 1.00 | 0: 0.0800 |" in lines
    few = "1 of 3 seeds: nothing is called"
    assert f"| epf-old | 0.1 | learned | window | 1 | -25.0 [-25, -25] | 1.00 | 1.00 | {few} |" in lines
    apart = " | ".join(["-40.0 [-40, -40]"] * 5)
    assert f"| epf-old | learned | 1 | {apart} |" in lines
    rest = "0.0600, -33.3 [-33, -33] | 0.0800, -50.0 [-50, -50] | 0.0800, -50.0 [-50, -50] |"
    assert f"| epf-old | 0.1 | learned | 0.0400 | 0.50 | 0.100 | {rest}" in lines


def test_cells_of_two_kinds_are_in_no_table(tmp_path: Path) -> None:
    points: list[tuple[str, float | None, float]] = [("model", None, 0.1)]
    one, path = made_up_cell("recurrent", 0, points), tmp_path / "b--seed1.json"
    (tmp_path / "a--seed0.json").write_text(json.dumps(one))
    for name, value in (("registration", 7), ("size", "10M"), ("steps", 5)):
        path.write_text(json.dumps({**one, name: value}))
        with pytest.raises(DataError, match=f"must be of one {name}"):
            read_cells(tmp_path)
    # of each set's own steps, and of each model's own rate
    path.write_text(json.dumps({**one, "set": "household-old", "steps": 5, "rate": 0.001}))
    assert len(read_cells(tmp_path)) == 2


def test_committed_cells_are_of_one_kind_in_every_folder() -> None:
    for folder in RESULTS.iterdir():
        read_cells(folder)


def test_how_a_fit_of_a_larger_network_went_is_told(tmp_path: Path) -> None:
    one = {"set": "epf-old", "model": "learned", "seed": 0, "rate": 0.001, "steps": 100, "kernel": "torch"}
    one |= {"recorded": True, "ms_each": {"short": 70.4, "long": None}, "fit_s": 9.5}
    one |= {"losses": [[40, 0.5], [60, 0.4], [80, 0.7], [100, 0.8]]}
    (tmp_path / "fits").mkdir()
    (tmp_path / "fits" / "one.json").write_text(json.dumps(one))
    line = frontier_size.table(tmp_path).splitlines()[-1]
    # the short streams end at step 60, the last quarter begins after 75
    assert (
        line == "| epf-old | learned | 0 | 0.001 | 100 | torch, recorded | 70 | 9.5 | 0.5 | 0.7 |  |  |  | 0.4 | 0.75 |"
    )


def test_what_is_recorded_has_room_for_all_that_a_stream_keeps() -> None:
    model = ModelConfig(width=24, heads=2, layers=3)
    plan = Plan(
        h=2, model=model, memory=MemoryConfig(), train=TrainConfig(), quantiles=(0.5,), val_size=None, time_unit=1.0
    )
    room = roomy(plan, 40).memory
    asked = {"budget_bytes": room.budget_bytes, "must_keep_share": room.must_keep_share}
    assert entry_caps(**asked, bytes_per_entry=entry_bytes(model), layers=3) == (40, 0)


def test_what_is_kept_is_printed_of_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no JSON"):
        frontier_kept.table(tmp_path)
    said = {"set": "epf-old", "model": "mix", "allocation": "pooled"}
    rows = {"layers": [{"layer": 0, "asked": 0.1}], "points": [{"memory": "model", "asked": 0.1, "events": 0.5}]}
    (tmp_path / "epf-old--mix--pooled.json").write_text(json.dumps({**said, **rows}))
    lines = frontier_kept.table(tmp_path).splitlines()
    assert "| epf-old | mix | pooled | 0 | 0.1 |" in lines
    assert "| epf-old | mix | pooled | model | 0.1 | 0.5 |" in lines


@pytest.mark.parametrize(("error", "again"), [(RuntimeError, True), (torch.OutOfMemoryError, False)])
def test_a_pilot_is_read_again_for_thresholds_alone(
    monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError], again: bool
) -> None:
    def points(trained: SimpleNamespace, *_: object, **__: object) -> list:
        if trained.network.memory_config.threshold != "fixed":
            raise error("no")
        return []

    monkeypatch.setattr(frontier_pilot, "judged", lambda *_: (None, None, {}))
    monkeypatch.setattr(frontier_pilot, "measure_points", points)
    trained = SimpleNamespace(network=SimpleNamespace(memory_config=MemoryConfig(threshold="quantile")))
    variant = next(one for one in frontier_pilot.VARIANTS.values() if one.model == "learned")
    if again:
        assert frontier_pilot.read(trained, None, variant, gpu=False) == ({"": []}, {})
        assert trained.network.memory_config.threshold == "fixed"
    else:
        with pytest.raises(torch.OutOfMemoryError):
            frontier_pilot.read(trained, None, variant, gpu=False)
