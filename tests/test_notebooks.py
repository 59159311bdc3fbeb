"""The notebooks run from top to bottom on shared small models, and each is the twin of its script.

HAMTS_NOTEBOOK_OUT names a folder for the executed notebooks, outputs and all.
"""

from __future__ import annotations

import ast
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs jupytext: pip install 'hamts[notebooks]'")
nbclient = pytest.importorskip("nbclient", reason="needs nbclient: pip install 'hamts[notebooks]'")
pytest.importorskip("ipykernel", reason="needs ipykernel: pip install 'hamts[notebooks]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'hamts[viz]'")

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"
SCRIPTS = sorted(FOLDER.glob("0*.py"))
# models that a notebook reads, and whether its data are local
NEEDS: dict[str, tuple[str, ...]] = {
    "01_quickstart": ("flights",),
    "02_what_gets_kept": ("flights", "flights_scores"),
    "03_events_and_actions": ("tanks", "tep"),
    "04_budget_frontier": ("flights",),
    "05_probes": (),
    "06_streaming": ("flights",),
}
PICTURES = {"01_quickstart": 3, "02_what_gets_kept": 2, "03_events_and_actions": 4, "04_budget_frontier": 2}
MOST_DEF_LINES, MOST_CELL_LINES, MOST_PICTURE_BYTES = 5, 12, 200_000


def environment(models: Path) -> dict[str, str]:
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **one, "HAMTS_NOTEBOOK_MODELS": str(models), "PYTHONPATH": f"{ROOT}{os.pathsep}{FOLDER}"}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of fitted models for all notebooks, and for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "notebook_models"
    folder.mkdir(exist_ok=True)
    return folder


def fit_once(models: Path, name: str) -> None:
    """Fit a model unless it is there; other workers wait."""
    with (models / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code = f"import shared; shared.fitted({name!r})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment(models), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]


def cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_and_its_script_are_twins(script: Path) -> None:
    twin = script.with_suffix(".ipynb")
    assert cells(twin) == cells(script), "Run: jupytext --sync notebooks/*.py"
    assert all(not cell.get("outputs") for cell in jupytext.read(twin).cells), "Outputs are made by the tests."


def test_every_notebook_is_known_here() -> None:
    assert [path.stem for path in SCRIPTS] == list(NEEDS)
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NEEDS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_cells_are_short_and_define_nothing_long(script: Path) -> None:
    for kind, source in cells(script):
        if kind == "code":
            assert len(source.splitlines()) <= MOST_CELL_LINES, source
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    assert (node.end_lineno or 0) - node.lineno < MOST_DEF_LINES, source
    # more words than an outline: every picture and table is introduced
    kinds = [kind for kind, _ in cells(script)]
    assert kinds.count("markdown") >= 3


def marks(name: str) -> list[Any]:
    local = [pytest.mark.data] if {"tanks", "tep"} & set(NEEDS[name]) else []
    return [pytest.mark.timeout(900), *local]


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name), id=name) for name in NEEDS])
def test_a_notebook_runs_and_shows_something(name: str, models: Path, tmp_path: Path) -> None:
    for model in NEEDS[name]:
        fit_once(models, model)
    notebook = jupytext.read(FOLDER / f"{name}.py")
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment(models).items():
            patch.setenv(key, value)
        client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"], "a notebook prints no warnings"
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= PICTURES.get(name, 1)
    assert all(len(picture) < MOST_PICTURE_BYTES for picture in pictures)
    if folder := os.environ.get("HAMTS_NOTEBOOK_OUT"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        jupytext.write(notebook, Path(folder) / f"{name}.ipynb")
