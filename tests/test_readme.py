"""The README keeps its promises: its example runs, its table is what the benchmark prints, its folders exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.timeout(300)
def test_the_example_runs(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert example is not None
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", example.group(1)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "HAM-lo-80" in done.stdout and "no_memory" in done.stdout and "HAMForecaster(" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flights_model"]


def test_the_example_has_twelve_lines_or_fewer() -> None:
    example = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert example is not None
    assert len([line for line in example.group(1).splitlines() if line.strip()]) <= 12


def test_the_table_is_what_the_benchmark_prints() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.accuracy import TASKS, table, with_table

    assert with_table(TEXT, table(list(TASKS))) == TEXT, "Run: python -m benchmarks.accuracy --readme"


def test_pictures_and_folders_exist() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", TEXT):
        assert (ROOT / path).exists(), path
    folders = TEXT.split("## Folders")[1].split("```")[1]
    for name in re.findall(r"^(\w+/)", folders, re.MULTILINE):
        assert (ROOT / name).is_dir(), name
