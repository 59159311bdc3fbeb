"""Jobs side by side as processes, each on one thread; one that finds no room is tried again, and costs no other.

A GPU that mostly waits for kernels to be started is shared well by a dozen processes.
"""

from __future__ import annotations

import collections
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

__all__ = ["Job", "run_jobs"]

MOST_TRIES = 3
# of what a failing job says; how much room was taken, and how much of it lay idle, stands at the end of a long line
LAST_LINES, LAST_LENGTH = 8, 1000
# what may pass: another process had the room
NO_ROOM = ("out of memory", "its process died")
# of a GPU's memory, for all jobs; the rest is what processes take before they begin
USED_GPU = 0.92


@dataclass(frozen=True)
class Job:
    """Something to do, and the jobs that must be done before; what is not in the list counts as done.

    ``room`` is the share of a device's memory that it needs, and may take: what runs at once needs 1 at most, and where
    it is 0 nothing is counted. ``seconds`` are those that it is thought to take: what would not be done in time is not
    begun.
    """

    name: str
    payload: Any
    needs: tuple[str, ...] = ()
    room: float = 0.0
    seconds: float = 0.0


@dataclass
class _Worker:
    process: Any
    connection: Connection
    device: str | None
    job: Job | None = None


def _serve(connection: Connection, work: Callable[[Any], str], device: str | None) -> None:
    """Do what comes until nothing does."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            payload, room = connection.recv()
        except EOFError:
            return
        try:
            if room and torch.cuda.is_available():
                # PyTorch keeps what it no longer uses, and asks for more until it is told that there is none
                torch.cuda.set_per_process_memory_fraction(USED_GPU * room)
            connection.send((True, work(payload)))
        except Exception:
            lines = traceback.format_exc().splitlines()
            connection.send((False, "\n".join([*lines[-LAST_LINES:-1], lines[-1][:LAST_LENGTH]])))


def run_jobs(
    jobs: Iterable[Job],
    work: Callable[[Any], str],
    *,
    workers: int,
    begin_within_s: float,
    end_within_s: float,
    devices: Sequence[str | None] = (None,),
) -> list[str]:
    """Do all that can be done; the names of jobs that failed, and not for want of room alone.

    Args:
        work: a function of a module, given each payload in a process of its own; what it returns is printed.
        workers: processes, as many on each device.
        begin_within_s, end_within_s: seconds after which nothing is begun, and what still runs is ended.
        devices: numbers of GPUs, each process sees one of them; None: all that there are.
    """
    run = _Run(list(jobs), work, workers, devices)
    while True:
        run.drop_hopeless()
        if run.passed < begin_within_s:
            run.hand_out(end_within_s)
        if not run.busy() or run.passed > end_within_s:
            break
        run.collect()
    run.end()
    return run.failed


class _Run:
    """Who does what, what waits, and what came of the rest."""

    def __init__(
        self, jobs: list[Job], work: Callable[[Any], str], workers: int, devices: Sequence[str | None]
    ) -> None:
        self.waiting, self.work, self.devices = jobs, work, devices
        self.workers = -(-workers // len(devices))  # on a device
        self.unfinished = {job.name for job in jobs}
        self.failed: list[str] = []
        self.pool: list[_Worker] = []
        # copies of this process, which has read the modules; it must not have touched a GPU
        self.context = multiprocessing.get_context("fork")
        self.tries: collections.Counter[str] = collections.Counter()
        self.began = time.monotonic()

    @property
    def passed(self) -> float:
        return time.monotonic() - self.began

    def busy(self) -> list[_Worker]:
        return [worker for worker in self.pool if worker.job is not None]

    def drop_hopeless(self) -> None:
        """Jobs that need one which failed."""
        while hopeless := [job for job in self.waiting if set(job.needs) & set(self.failed)]:
            for job in hopeless:
                self.waiting.remove(job)
                self.failed.append(job.name)
                print(f"{job.name} is not done: it needs {', '.join(job.needs)}", flush=True)

    def hand_out(self, end_within_s: float) -> None:
        """Give jobs whose needs are met to idle processes, in their order: small ones that overtook would leave no room
        for a large one for ever."""
        ready = [job for job in self.waiting if not set(job.needs) & self.unfinished]
        for job in [job for job in ready if self.passed + job.seconds <= end_within_s]:
            worker = self._free(job.room)
            if worker is None:
                return
            self.waiting.remove(job)
            worker.job = job
            worker.connection.send((job.payload, job.room))

    def _free(self, room: float) -> _Worker | None:
        """An idle process on the emptiest device that has so much room."""
        own = {device: [worker for worker in self.pool if worker.device == device] for device in self.devices}
        taken = {device: sum(w.job.room for w in workers if w.job is not None) for device, workers in own.items()}
        number = {device: sum(w.job is not None for w in workers) for device, workers in own.items()}
        for device in sorted(self.devices, key=lambda device: (taken[device], number[device])):
            if taken[device] + room > 1 + 1e-9:
                continue
            idle = next((worker for worker in own[device] if worker.job is None), None)
            if idle is None and len(own[device]) < self.workers:
                self.pool.append(idle := self._start(device))
            if idle is not None:
                return idle
        return None

    def _start(self, device: str | None) -> _Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.work, device), daemon=True)
        process.start()
        # else its end would not be noticed here
        theirs.close()
        return _Worker(process, ours, device)

    def collect(self) -> None:
        """Wait for a moment, and note what is done."""
        busy = self.busy()
        for connection in wait([worker.connection for worker in busy], timeout=1.0):
            worker = next(worker for worker in busy if worker.connection is connection)
            try:
                done, said = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                done, said = False, "its process died"
                self.pool.remove(worker)
            assert worker.job is not None
            job, worker.job = worker.job, None
            name = job.name
            if done:
                self.unfinished.discard(name)
            elif self.tries[name] + 1 >= MOST_TRIES or not any(words in said for words in NO_ROOM):
                self.failed.append(name)
            else:
                # a device may have been full for a moment; others may wait for it
                self.tries[name] += 1
                self.waiting.insert(0, job)
            print(f"[{self.passed:6.1f} s] {name}: {said}", flush=True)

    def end(self) -> None:
        for worker in self.pool:
            if worker.job is not None:
                print(f"{worker.job.name} was not done in time and is ended", flush=True)
            worker.process.kill()
        if self.waiting:
            print(f"{len(self.waiting)} jobs were not begun; the same call goes on from here", flush=True)
