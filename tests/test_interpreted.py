"""The files of kernels, each run in a process of its own in which Triton interprets instead of compiling."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_on_cpu import INTERPRETED

pytest.importorskip("triton")
TESTS = Path(__file__).parent


@pytest.mark.skipif(INTERPRETED, reason="this is such a process")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "fewest"),
    [
        ("test_attend_triton.py", 20),
        ("test_decode_triton.py", 11),
        ("test_gated_delta_fla.py", 20),
        ("test_layer_triton.py", 28),
        ("test_stores.py", 60),
        ("test_pool.py", 5),
    ],
)
def test_kernels_equal_their_twins_in_the_interpreter(name: str, fewest: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        str(TESTS / name),
    ]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent, check=False)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
    assert int(ran.stdout.split(" passed")[0].split()[-1]) >= fewest, ran.stdout[-1000:]
