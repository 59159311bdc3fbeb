"""Jobs side by side as processes, each on one thread: those that others wait for first; one that fails costs no other.

A GPU that mostly waits for kernels to be started is shared well by a dozen processes.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["Job", "run_jobs"]


@dataclass(frozen=True)
class Job:
    """Something to do, and the jobs that must be done before; what is not in the list counts as done."""

    name: str
    payload: Any
    needs: tuple[str, ...] = ()


@dataclass
class _Worker:
    process: Any
    connection: Connection
    job: Job | None = None


def _serve(connection: Connection, work: Callable[[Any], str]) -> None:
    """Do what comes until nothing does."""
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            payload = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, work(payload)))
        except Exception:
            connection.send((False, traceback.format_exc()))


def run_jobs(
    jobs: Iterable[Job], work: Callable[[Any], str], *, workers: int, begin_within_s: float, end_within_s: float
) -> list[str]:
    """Do all that can be done; the names of jobs that failed.

    Args:
        work: a function of a module, given each payload in a process of its own; what it returns is printed.
        workers: processes.
        begin_within_s, end_within_s: seconds after which nothing is begun, and what still runs is ended.
    """
    waiting, failed, began = list(jobs), [], time.monotonic()
    unfinished = {job.name for job in waiting}
    context = multiprocessing.get_context("spawn")
    pool: list[_Worker] = []

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def settle(worker: _Worker, done: bool, said: str) -> None:
        assert worker.job is not None
        name, worker.job = worker.job.name, None
        if done:
            unfinished.discard(name)
        else:
            failed.append(name)
        print(f"[{time.monotonic() - began:6.1f} s] {name}: {said}", flush=True)

    while True:
        passed = time.monotonic() - began
        for job in [job for job in waiting if set(job.needs) & set(failed)]:
            waiting.remove(job)
            failed.append(job.name)
            print(f"{job.name} is not done: it needs {', '.join(job.needs)}", flush=True)
        ready = [job for job in waiting if not set(job.needs) & unfinished] if passed < begin_within_s else []
        for job in ready:
            free = next((worker for worker in pool if worker.job is None), None)
            if free is None and len(pool) < workers:
                pool.append(free := start())
            if free is None:
                break
            waiting.remove(job)
            free.job = job
            free.connection.send(job.payload)
        busy = [worker for worker in pool if worker.job is not None]
        if not busy or passed > end_within_s:
            break
        for connection in wait([worker.connection for worker in busy], timeout=1.0):
            worker = next(worker for worker in busy if worker.connection is connection)
            try:
                settle(worker, *worker.connection.recv())
            except (EOFError, ConnectionResetError):
                settle(worker, False, "its process died")
                pool.remove(worker)
    for worker in pool:
        if worker.job is not None:
            print(f"{worker.job.name} was not done in time and is ended", flush=True)
        worker.process.kill()
    if waiting:
        print(f"{len(waiting)} jobs were not begun; the same call goes on from here", flush=True)
    return failed
