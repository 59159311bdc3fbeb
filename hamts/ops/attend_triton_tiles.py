"""Sizes of tiles: a table for the devices they were measured on, a search at first use on others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

__all__ = ["CANDIDATES", "Tiles", "forget", "launch", "timings", "use"]


@dataclass(frozen=True)
class Tiles:
    """How a kernel is cut up: rows and columns of a tile, warps of a program, stages of its pipeline of loads.

    ``registers`` bounds those of a thread, so that more programs fit a multiprocessor; 0 leaves it to the compiler.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, int]:
        chosen = {"BM": self.rows, "BN": self.columns, "num_warps": self.warps, "num_stages": self.stages}
        return chosen | ({"maxnreg": self.registers} if self.registers else {})

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}w{self.warps}s{self.stages}r{self.registers}"


CANDIDATES: dict[str, tuple[Tiles, ...]] = {
    "forward": (
        Tiles(64, 64, 4, 2, 128),
        Tiles(128, 64, 4, 3),
        Tiles(64, 64, 4, 3, 168),
        Tiles(64, 32, 4, 2),
    ),
    "query_grad": (
        Tiles(64, 64, 4, 2, 168),
        Tiles(64, 64, 4, 3, 168),
        Tiles(128, 64, 4, 2),
        Tiles(64, 32, 4, 2),
    ),
    "entry_grad": (
        Tiles(64, 64, 4, 3, 168),
        Tiles(64, 64, 4, 3),
        Tiles(64, 128, 8, 3),
        Tiles(32, 64, 4, 2),
    ),
    "local_grad": (Tiles(64, 64, 4, 3, 168), Tiles(64, 64, 4, 2), Tiles(32, 32, 4, 2)),
    "mass": (Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(32, 32, 4, 2)),
}
SMALL = Tiles(32, 16, 4, 2)
# by compute capability, kernel, padded head width and bytes of a number: the fastest on one H100, over the three sizes
# of benchmarks/results/kernels/fifth/tiles--*.json together
MEASURED: dict[tuple[tuple[int, int], str, int, int], Tiles] = {
    ((9, 0), "forward", 64, 2): Tiles(64, 64, 4, 2, 128),
    ((9, 0), "query_grad", 64, 2): Tiles(64, 64, 4, 2, 168),
    ((9, 0), "entry_grad", 64, 2): Tiles(64, 64, 4, 3, 168),
    ((9, 0), "local_grad", 64, 2): Tiles(64, 64, 4, 3, 168),
    ((9, 0), "mass", 64, 2): Tiles(128, 64, 4, 3),
}

_chosen: dict[tuple[Any, ...], Tiles] = {}
_fixed: dict[str, Tiles] = {}
# milliseconds of every candidate that a search has tried
timings: dict[tuple[Any, ...], dict[Tiles, float]] = {}


def launch(kernel: str, run: Callable[[Tiles], None], key: tuple[Any, ...]) -> None:
    """Run a kernel with the best tiles known for a (head width, bytes, several channels?, device)."""
    if kernel in _fixed:
        return run(_fixed[kernel])
    place = (kernel, *key)
    if place not in _chosen:
        width, size, _, device = key
        if device.type != "cuda":
            _chosen[place] = SMALL
        else:
            known = MEASURED.get((torch.cuda.get_device_capability(device), kernel, width, size))
            _chosen[place] = known or _search(kernel, run, place)
    run(_chosen[place])


def use(tiles: dict[str, Tiles]) -> None:
    """Take these tiles for these kernels, whatever the table or a search says; an empty dict ends that."""
    _fixed.clear()
    _fixed.update(tiles)


def forget(*, measured: bool = False) -> None:
    """Search anew at the next use; with ``measured``, do not trust the table either."""
    _chosen.clear()
    timings.clear()
    if measured:
        MEASURED.clear()


def _search(kernel: str, run: Callable[[Tiles], None], place: tuple[Any, ...]) -> Tiles:
    """The fastest candidate on these very inputs, by the device's clock."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"Kernel {kernel!r} has not run at this size yet. Run it once before a CUDA graph is captured."
        )
    found: dict[Tiles, float] = {}
    for tiles in CANDIDATES[kernel]:
        try:
            found[tiles] = triton.testing.do_bench(lambda: run(tiles), warmup=5, rep=30, return_mode="median")  # noqa: B023
        except OutOfResources:
            continue
    if not found:
        raise RuntimeError(f"No tiles of kernel {kernel!r} fit this device.")
    timings[place] = found
    return min(found, key=lambda tiles: found[tiles])


# heads of 32 were not measured, and a search compiles for a minute: they take the tiles of 64
MEASURED.update({(gpu, name, 32, size): tiles for (gpu, name, width, size), tiles in MEASURED.items() if width == 64})
