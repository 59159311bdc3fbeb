"""Run the tests of the read's kernels on a device and record how they ended. A part of ``benchmarks/kernels.py``."""

from __future__ import annotations

import concurrent.futures
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.kernels import record

__all__ = ["parity"]


def parity(only: str, processes: int = 12) -> None:
    """The tests under the marker ``gpu``, or those of them whose name fits, dealt out to some processes."""
    files = ["tests/test_attend_triton.py", "tests/test_decode_triton.py", "tests/test_compact.py"]
    ran = pytest_on_device([*files, "--collect-only", *(["-k", only] if only else [])]).stdout.splitlines()
    tests = [line for line in ran if "::" in line]
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        outputs = [
            (run.returncode, run.stdout.strip().splitlines())
            for run in pool.map(pytest_on_device, [tests[n::processes] for n in range(min(processes, len(tests)))])
        ]
    failed = [line for _, lines in outputs for line in lines if line.startswith(("FAILED", "ERROR", "E   "))]
    print("\n".join(failed)[:3000])
    cell = {
        "passed": bool(tests) and all(code == 0 for code, _ in outputs),
        "tests": len(tests),
        "only": only,
        "summaries": [lines[-1] for _, lines in outputs if lines],
        "failed": failed,
        "files": files,
    }
    record("parity" + ("--some" if only else ""), cell)


def pytest_on_device(what: list[str]) -> subprocess.CompletedProcess[str]:
    """Run tests without the plugins and the configuration that they need elsewhere."""
    here = Path(__file__).parent.parent
    options = ["-c", os.devnull, "--rootdir", str(here), "--noconftest", "-p", "no:cacheprovider", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", *options, *what]
    return subprocess.run(command, capture_output=True, text=True, cwd=here, check=False)
