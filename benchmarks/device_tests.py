"""Run tests of kernels on a device, side by side, and record how each of them ended, with date and device.

Run ``python -m benchmarks.device_tests`` from the clone on a machine with a CUDA device and the extra ``gpu``. The
result is written to ``benchmarks/results/tests`` when the tests of a file have ended or their time is up; ``--table``
prints what is there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.training_timing import versions

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "tests"
FILES = (
    "tests/test_layer_triton.py",
    "tests/test_training_graphs.py",
    "tests/test_gated_delta_fla.py",
    "tests/test_attend_triton.py",
    "tests/test_decode_triton.py",
    "tests/test_stores.py",
    "tests/test_stream_entries.py",
    "tests/test_stream_recorded.py",
    "tests/test_pool.py",
    "tests/test_rollout_room.py",
    "tests/test_no_waits.py",
    "tests/test_compact.py",
    "tests/test_kernels_choice.py",
    "tests/test_probes_stacked.py",
    "tests/test_probes_transfer.py",
)
# without the configuration that needs plugins
OPTIONS = (
    "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "-rfE",
)  # fmt: skip
ENDED = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b", re.MULTILINE)


def pytest_command(*what: str) -> list[str]:
    return [sys.executable, "-m", "pytest", *OPTIONS, *what]


def collected(file: str, only: str) -> list[str]:
    """Tests of a file whose name fits."""
    command = pytest_command("--collect-only", "-q", *(["-k", only] if only else []), file)
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    tests = [line for line in ran.stdout.splitlines() if line.startswith(f"{file}::")]
    if not tests:
        raise RuntimeError(f"No test of {file} could be found: {(ran.stdout + ran.stderr)[-1500:]}")
    return tests


def run(file: str, only: str, processes: int, seconds: float) -> dict[str, Any]:
    """The tests of a file, dealt out to some processes, and what became of each in the time given."""
    began = time.perf_counter()  # to find the tests takes seconds of the time given too
    tests = collected(file, only)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(n) for n in range(min(processes, len(tests)))]
        started = []
        for n, log in enumerate(logs):
            with log.open("w") as out:
                command = pytest_command("-v", *tests[n :: len(logs)])
                started.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT))
        for process in started:
            try:
                process.wait(max(0.1, began + seconds - time.perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
        texts = [log.read_text(errors="replace") for log in logs]
    ended = {name: outcome.lower() for text in texts for name, outcome in ENDED.findall(text)}
    wrong = [line for text in texts for line in text.splitlines() if line.startswith(("E  ", "FAILED", "ERROR"))]
    return {
        "file": file, "only": only, "counts": dict(Counter(ended.get(test, "not ended") for test in tests)),
        "outcomes": {test: ended.get(test, "not ended") for test in tests}, "wrong": wrong[:60],
        "seconds": round(time.perf_counter() - began, 1), "processes": len(logs),
    }  # fmt: skip


def table(results: Path) -> str:
    lines = ["| tests | passed | skipped | failed | not ended | device | date |", "|---|---|---|---|---|---|---|"]
    for path in sorted(results.glob("*.json")):
        cell = json.loads(path.read_text())
        count = cell["counts"]
        numbers = [count.get(kind, 0) for kind in ("passed", "skipped", "failed", "not ended")]
        numbers[2] += count.get("error", 0)
        of = f"{cell['file']}" + (f" ({cell['only']})" if cell["only"] else "")
        lines.append(f"| {of} | {' | '.join(map(str, numbers))} | {cell['device']} | {cell['date']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", nargs="*", default=FILES)
    parser.add_argument("--only", default="", help="tests whose name fits this, as pytest's -k")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=600.0, help="most time for each file")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.table:
        import torch

        about = {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"}
        about |= {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "versions": versions()}
        args.results.mkdir(parents=True, exist_ok=True)
        for file in args.files:
            cell = run(file, args.only, args.processes, args.seconds)
            (args.results / f"{Path(file).stem}.json").write_text(json.dumps(about | cell, indent=1) + "\n")
            print(cell["file"], cell["counts"], f"{cell['seconds']:.0f} s", flush=True)
            print("\n".join(cell["wrong"][:12]), flush=True)
    print(table(args.results))


if __name__ == "__main__":
    main()
