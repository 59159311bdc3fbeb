"""The grid of the frontier's benchmark: its cells, its verdicts, and how they are run side by side."""

from __future__ import annotations

import functools
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hamts.config import ModelConfig
from hamts.errors import DataError


def test_what_needs_more_room_on_a_gpu_gets_it() -> None:
    from benchmarks.frontier_grid import MODELS, ROOM, ROOMS, ROUTER, Cell
    from benchmarks.frontier_sets import SETS

    assert {model for _, model in ROOMS} <= {*MODELS, ROUTER} and {name for name, _ in ROOMS} <= {*SETS, None}
    assert Cell("epf-old", "mix", 0).room == Cell("flights", "window", 0, 0.1).room == ROOM
    assert ROOM < Cell("epf-old", "recurrent_wide", 0, 0.1).room < Cell("beijing", "recurrent_wide", 0, 0.1).room
    # all routers read the many items of that set at once
    assert Cell("flights", "tags", 0).room == Cell("flights", "mix", 0).room > ROOM


def test_the_grid_has_its_core_and_every_router_and_rival() -> None:
    from benchmarks.frontier_grid import MODELS, grid
    from benchmarks.frontier_sets import NAMED_STEPS, SETS

    core, whole = grid(core=True), grid(core=False)
    assert core == whole[: len(core)]
    assert len(set(whole)) == len(whole)
    assert {cell.set for cell in core} == {"epf", "household"}
    wanted = {"surprise", "innovation", "learned", "tags", "mix", "recurrent_wide", "window", "gdn_gsa", "pooled"}
    assert wanted | {"neighbours"} <= {cell.model for cell in core}
    assert {cell.seed for cell in core} == {0, 1, 2}
    assert {cell.model for cell in whole} == set(MODELS)
    old = grid(core=True, family="old")
    assert {cell.set for cell in old} == {"epf-old", "household-old"}
    assert [replace(cell, set=cell.set.removesuffix("-old")) for cell in old] == core
    calendar = grid(core=False, family="calendar")
    assert {cell.set for cell in calendar} == {"flights", "beijing", "tep"}
    assert {cell.set for cell in [*whole, *old, *calendar]} == set(SETS)
    # a shape has room after its name
    assert all(spec.amplitude is None or spec.patch_steps > NAMED_STEPS for spec in SETS.values())


def test_verdicts_are_those_of_the_registration() -> None:
    from benchmarks.frontier_lines import verdict

    assert verdict(-0.1, -0.2, -0.01, seeds=3) == "better"
    # clear, but too small to matter; and large, but not clear
    assert verdict(-0.015, -0.018, -0.01, seeds=3) == "no better"
    assert verdict(-0.1, -0.2, 0.1, seeds=3) == "undecided"
    assert verdict(0.1, -0.01, 0.3, seeds=3) == "no better"
    assert "nothing" in verdict(-0.1, -0.2, -0.05, seeds=2)
    assert "other bytes" in verdict(-0.1, -0.2, -0.05, seeds=3, bytes_ratio=1.3)


def test_a_claim_is_supported_refuted_or_open_as_registered() -> None:
    from benchmarks.frontier_answers import judged

    def said(*words: tuple[str, str], at: float = 0.02) -> dict[tuple[float, str], list[str]]:
        return {(at, name): list(both) for name, both in zip(("one", "two"), words, strict=True)}

    sets = ["one", "two"]
    good, bad, half = ("better", "better"), ("no better", "no better"), ("better", "no better")
    both = {**said(good, good), **said(bad, bad, at=0.1)}
    assert judged("a", both, sets) == "undecided" and judged("b", both, sets) == "supported"
    assert judged("a", said(good, good), sets) == "supported"
    assert judged("a", said(half, half), sets) == "undecided" and judged("b", said(half, half), sets) == "refuted"
    assert judged("a", said(bad, bad), sets) == "refuted"
    assert judged("a", said(good, bad), sets) == "undecided"
    assert judged("c", said(good, ("not run", "better")), sets) == "not called"
    few = said(good, ("2 of 3 seeds: nothing is called", "better"))
    assert judged("a", few, sets) == "not called"


def _cell(model: str, seed: int, points: list[tuple[str, float | None, float]], name: str) -> dict[str, Any]:
    """A cell whose error inside events is as given, (memory, share, loss), with as many bytes each."""
    costs = {"usage_share": 0.1, "bytes": 100.0, "scratchpad_attention": 0.5, "ms_per_step": 1.0}
    names = ("events", "near", "middle", "far", "all")
    return {
        "registration": 9, "set": name, "model": model, "seed": seed, "size": "1M", "steps": 960, "rate": 0.003,
        "points": [
            {"memory": memory, "share": share, **costs}
            | {"parts": {part: {"size": [1.0] * 4, "quantile": [loss] * 4, "WQL": loss, "MASE": 1.0} for part in names}}
            for memory, share, loss in points
        ],
    }  # fmt: skip


def _partly(model: str) -> list[dict[str, Any]]:
    """One seed of a router, everything kept as bad as nothing."""
    return [_cell(model, 0, [("model", 0.0, 1.0), ("model", 1.0, 1.0)], name) for name in ("epf-old", "household-old")]


@pytest.mark.parametrize(
    ("attention", "everything", "expected"), [(0.5, 0.5, "abcde"), (1.0, 0.5, "acde"), (0.5, 1.0, "")]
)
def test_controls_say_which_claims_are_called(attention: float, everything: float, expected: str) -> None:
    from benchmarks.frontier_answers import answers, callable_claims, parts_against

    cells = []
    for seed in range(3):
        for name in ("epf-old", "household-old"):
            kept = [("model", 0.0, 1.0), ("model", 0.02, 0.9), ("model", 1.0, everything), ("parts", 0.02, 0.7)]
            cells.append(_cell("learned", seed, kept, name))
            cells += [_cell("attention", seed, [("model", None, attention)], name)]
            cells += [_cell("recurrent", seed, [("model", None, 1.0)], name)]
    assert "".join(sorted(callable_claims(cells))) == expected
    # parts of the budget against even ones, with the same weights
    said = answers(cells).set_index("claim").loc["e"]
    assert said["verdict"] == "supported" and "-22.2 %" in said["seen"]
    assert set(parts_against(cells)["verdict"]) == {"better"}
    # a router of which seeds are missing is named by no comparison, and takes nothing away
    assert "".join(sorted(callable_claims([*cells, *_partly("error")]))) == expected
    # two seeds call nothing
    assert callable_claims([cell for cell in cells if cell["seed"] < 2]) == ()


def test_routers_are_set_beside_rivals_set_by_set(tmp_path: Path) -> None:
    from benchmarks.cells import write_cell
    from benchmarks.frontier_size import answer

    for seed in range(3):
        for name, rival in (("flights", 1.0), ("beijing", 0.5)):
            own = [("model", 0.0, 1.0), ("model", 0.1, 0.8), ("model", 1.0, 0.7), ("shuffled", 0.1, 1.0)]
            for cell in (_cell("learned", seed, own, name), _cell("window", seed, [("model", 0.1, rival)], name)):
                write_cell(tmp_path / f"{name}--{cell['model']}--seed{seed}.json", cell)
    lines = answer(tmp_path, tmp_path).splitlines()
    events = [line for line in lines if "| 10 % | learned | " in line and "| events |" in line]
    assert [(line.split(" | ")[0], line.split(" | ")[3]) for line in events] == [
        ("| beijing", "shuffled"), ("| flights", "shuffled"), ("| beijing", "window at 0.003"),
        ("| flights", "window at 0.003"),
    ]  # fmt: skip
    assert "-20.0 [-20.0, -20.0] | 1.000 | better |" in events[3]
    assert "+60.0 [+60.0, +60.0] | 1.000 | no better |" in events[2]


def test_a_model_of_fewer_seeds_than_others_of_its_set_is_not_drawn() -> None:
    from benchmarks.frontier_claims import of_every_seed
    from benchmarks.frontier_lines import lines_of

    cells = [_cell("learned", seed, [("model", 0.1, 0.8)], "flights") for seed in range(3)]
    cells += [_cell("mix", 0, [("model", 0.1, 0.8)], "flights"), _cell("mix", 0, [("model", 0.1, 0.8)], "beijing")]
    shown = of_every_seed(lines_of(cells))
    assert set(zip(shown["set"], shown["model"], strict=True)) == {("flights", "learned"), ("beijing", "mix")}


def test_a_cell_that_lacks_a_share_is_paired_with_no_other_seeds() -> None:
    from benchmarks.frontier_answers import callable_claims, everything_kept

    cells = []
    for name in ("epf-old", "household-old"):
        cells += [_cell("learned", 0, [("model", 0.0, 1.0)], name), _cell("learned", 1, [("model", 1.0, 0.1)], name)]
        cells += [_cell("learned", 2, [("model", 0.0, 1.0), ("model", 1.0, 0.9)], name)]
    found = everything_kept(cells)
    assert found["seeds"].tolist() == [1, 1] and found["difference"].round(6).tolist() == [-0.1, -0.1]
    assert callable_claims(cells) == ()


def test_the_best_router_is_one_of_many_seeds_and_of_its_rivals_bytes() -> None:
    from benchmarks.frontier_answers import best_router

    rows = [("mix", 0.1, 3, 150), ("learned", 0.2, 3, 104), ("surprise", 0.3, 3, 100), ("error", 0.05, 1, 100)]
    here = pd.DataFrame(rows, columns=["model", "WQL", "seeds", "bytes"]).assign(memory="model")
    here = pd.concat([here, here.assign(memory="random", WQL=0.0)])
    assert best_router(here) == "mix"
    assert best_router(here, 100) == "learned"
    # where none is of its bytes the best is compared, and not called
    assert best_router(here, 1000) == "mix"


def test_rivals_get_the_bytes_of_the_share_that_is_asked_of_routers() -> None:
    from benchmarks.frontier import budget_of
    from benchmarks.frontier_cell import NO_CAP, SIZES, entry_bytes
    from benchmarks.frontier_grid import Cell
    from benchmarks.frontier_sets import SMOKE, smoke_carrier

    carrier, shape = smoke_carrier(), ModelConfig(**SIZES["tiny"])
    # every patch of the target: what an event column says is kept by no score
    tokens = carrier.rows // SMOKE.patch_steps
    even = int(0.1 * tokens) * entry_bytes(shape)
    assert budget_of(Cell("smoke", "pooled", 0, 0.1), carrier, SMOKE, shape) == even
    # a window has room for the event column of every patch, which is mostly absent: what it holds is as much
    for name in ("window", "recurrent_window"):
        assert budget_of(Cell("smoke", name, 0, 0.1), carrier, SMOKE, shape) > 1.5 * even
    # beside a state the window has no bytes of it: what is absent is all that it is allowed for
    columns = [name for names in carrier.roles.values() if isinstance(names, list) for name in names]
    patch = np.arange(len(carrier.frame)) // SMOKE.patch_steps
    there = carrier.frame[columns].notna().groupby(patch).any().to_numpy()
    allowed = budget_of(Cell("smoke", "recurrent_window", 0, 0.1), carrier, SMOKE, shape)
    assert abs(allowed * there.mean() / even - 1) < 0.01
    assert budget_of(Cell("smoke", "attention", 0), carrier, SMOKE, shape) == NO_CAP


def test_the_benchmark_runs_writes_its_cells_and_does_not_repeat_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.frontier import run, smoke
    from benchmarks.frontier_claims import draw, table
    from benchmarks.frontier_files import read_cells
    from benchmarks.frontier_grid import Cell
    from benchmarks.frontier_sets import SMOKE, smoke_carrier

    smoke(tmp_path)
    cells = read_cells(tmp_path)
    assert sorted(cell["model"] for cell in cells) == ["learned", "window"]
    router, rival = sorted(cells, key=lambda cell: cell["model"])
    kept = [point for point in router["points"] if point["memory"] == "model"]
    assert [point["share"] for point in kept] == sorted(point["share"] for point in kept)
    own, parted = {"model", "shuffled", "random", "recency"}, {"parts", "parts, recency"}
    assert {point["memory"] for point in router["points"]} == own | parted
    # the rival is about as large as the router's memory at that share
    assert rival["points"][0]["share"] == 0.1
    text = table(tmp_path)
    assert "## Error against bytes" in text and "Not run:" in text
    draw(tmp_path, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").stat().st_size > 1000
    before = (tmp_path / "smoke--window@10--seed0.json").stat().st_mtime_ns
    told = {"again": False, "most_s": 60.0, "load_set": lambda _: smoke_carrier(), "specs": {"smoke": SMOKE}}
    run([Cell("smoke", "window", 0, 0.1)], tmp_path, how={"size": "tiny", "max_steps": 2}, **told)
    # what was measured otherwise is not taken for what is asked
    for other in ({"size": "64", "max_steps": 2}, {"size": "tiny", "max_steps": 5}):
        with pytest.raises(DataError, match=r"otherwise than is asked: (size|steps) must be"):
            run([Cell("smoke", "window", 0, 0.1)], tmp_path, how=other, **told)
    # a rate was tried as often for one as for the other
    trials = [json.loads(path.read_text()) for path in tmp_path.glob("*--lr*.json")]
    assert sorted((trial["model"], trial["rate"]) for trial in trials) == [
        (name, rate) for name in ("learned", "window") for rate in (1e-3, 3e-3)
    ]
    assert (tmp_path / "smoke--window@10--seed0.json").stat().st_mtime_ns == before


# --- jobs side by side


def double(payload: int) -> str:
    """What a process does with its payload; 13 is bad luck, 14 kills the process."""
    if payload == 13:
        raise ValueError("bad luck")
    if payload == 14:
        os._exit(1)
    return str(2 * payload)


def device_of(payload: int) -> str:
    time.sleep(0.05)
    return f"device {os.environ['CUDA_VISIBLE_DEVICES']}"


TAKEN: list[float] = []


def taken(payload: int) -> str:
    return str(TAKEN)


def alone(payload: str) -> str:
    """Fails where another process has made the same folder and not yet removed it."""
    os.mkdir(payload)
    time.sleep(0.05)
    os.rmdir(payload)
    return "done"


def test_a_job_that_fails_costs_those_that_need_it_and_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.side_by_side import Job, run_jobs

    jobs = [
        Job("last", 3, ("first", "gone")), Job("never", 4, ("bad",)), Job("bad", 13), Job("dead", 14), Job("first", 1)
    ]  # fmt: skip
    failed = run_jobs(jobs, double, workers=2, begin_within_s=60.0, end_within_s=60.0)
    said = capsys.readouterr().out
    assert sorted(failed) == ["bad", "dead", "never"]
    assert "bad luck" in said and "dead: its process died" in said
    assert said.index("first: 2") < said.index("last: 6")
    # what cannot pass is not tried again
    assert said.count("bad: Traceback") == 1 and said.count("dead: its process died") == 3
    # what has no room beside others waits for them
    crowd = [Job(f"crowd {n}", str(tmp_path / "taken"), room=0.6) for n in range(3)]
    assert run_jobs(crowd, alone, workers=3, begin_within_s=60.0, end_within_s=60.0) == []
    # and each process sees its own device
    seen = [Job(f"seen {n}", n) for n in range(2)]
    assert run_jobs(seen, device_of, workers=2, begin_within_s=60.0, end_within_s=60.0, devices=("3", "5")) == []
    said = capsys.readouterr().out
    assert "device 3" in said and "device 5" in said
    assert run_jobs([Job("late", 1)], double, workers=1, begin_within_s=-1.0, end_within_s=60.0) == []
    assert "1 jobs were not begun" in capsys.readouterr().out


def test_a_job_takes_no_more_of_a_device_than_it_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.side_by_side import USED_GPU, Job, run_jobs

    # processes are copies of this one
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.set_per_process_memory_fraction", TAKEN.append)
    jobs = [Job("first", 0, room=0.5), Job("second", 0, ("first",), room=0.25), Job("third", 0, ("second",))]
    assert run_jobs(jobs, taken, workers=1, begin_within_s=60.0, end_within_s=60.0) == []
    said = capsys.readouterr().out
    assert f"first: {[0.5 * USED_GPU]}" in said and f"second: {[0.5 * USED_GPU, 0.25 * USED_GPU]}" in said
    # one that said nothing is left alone
    assert f"third: {[0.5 * USED_GPU, 0.25 * USED_GPU]}" in said


def test_cells_wait_for_their_trials(tmp_path: Path) -> None:
    from benchmarks.frontier import Task, jobs_of
    from benchmarks.frontier_cell import REGISTRATION
    from benchmarks.frontier_grid import Cell
    from benchmarks.frontier_sets import SETS

    cells = [Cell("epf", "window", 1, 0.02), Cell("epf", "tags", 0), Cell("epf", "learned", 1)]
    task = functools.partial(Task, folder=tmp_path, how={"size": "tiny"})
    jobs = {job.name: job.needs for job in jobs_of(cells, task, again=False)}
    own = {"epf--window@10--lr0.001.json", "epf--window@10--lr0.003.json"}
    assert set(jobs["epf--window@2--seed1.json"]) == own
    # all routers go by the trials of one
    assert set(jobs["epf--tags--seed0.json"]) == {"epf--learned--lr0.001.json", "epf--learned--lr0.003.json"}
    order = list(jobs)
    assert order.index("epf--learned--lr0.001.json") < order.index("epf--tags--seed0.json")
    done = {"registration": REGISTRATION, "size": "tiny", "steps": SETS["epf"].steps, "rate": 1e-3}
    (tmp_path / "epf--tags--seed0.json").write_text(json.dumps(done))
    left = jobs_of(cells, task, again=False)
    assert not any("tags" in job.name for job in left)
