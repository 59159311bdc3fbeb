"""On a GPU: what it costs to read a long history in chunks, and a patch in streams with long scratchpads.

Run ``python -m benchmarks.long_streams [--parts rolls steps reads]`` on a machine with a CUDA device and the extra
``gpu``. A cell is written to ``benchmarks/results/long_streams`` as soon as it is measured; ``--table`` prints what is
there. Preset base, patches of 4 steps, float32; weights hardly trained.

rolls: 4 items of 4 channels and 16,384 patches, nothing capped. In every chunk the device is asked how many entries
there are, or a chunk late, or never.
steps: a patch of 256 and of 1,024 items whose scratchpads are drawn, ragged, up to 4,096 entries in each of 4 layers;
padded, and in rows that all items share; these also with steps that are recorded and replayed.
reads: the read of a step alone, in a CUDA graph: entries padded, in shared pages of 64, and in shared rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch

import hamts
from benchmarks.streaming import series
from benchmarks.training_timing import busy, versions
from hamts import rollout
from hamts.data.patches import build_store
from hamts.nn import rows, scratchpad
from hamts.nn.scratchpad import Entries
from hamts.reader import StreamMemory
from hamts.rollout_room import LateRoom
from hamts.stream import Stream
from hamts.stream_device import network_on
from hamts.stream_state import MemoryStore
from hamts.stream_step import Stepper

RESULTS = Path(__file__).parent / "results" / "long_streams"
PARTS = ("reads", "steps", "rolls")
CHANNELS = {"steps": 1, "rolls": 4}
PATCH, GIB = 4, 2**30
# entries of a scratchpad: on average, and at most
MEAN, MOST = 1_365, 4_096
# rows that an item has read before, updates that are not timed, and that are
HOURS, WARM, TURNS = 400, 3, 5


def model_of(channels: int, preset: str, folder: Path | None) -> hamts.HAMForecaster:
    """A model whose weights do not matter; one that lies in the folder is not fitted again."""
    place = None if folder is None else folder / f"{preset}-{channels}"
    if place is not None and place.is_dir():
        return hamts.load(place)
    df = pd.concat([series(item, 0, 1_200, channels) for item in "ab"])
    model = hamts.fit(
        df, 24, preset=preset, patch_steps=PATCH, budget_share=0.10, budget_bytes=40_000_000, max_steps=2, val_size=0,
        verbose=False, progress=False, seed=0, accelerator="cpu",
    )  # fmt: skip
    if place is not None:
        model.save(place)
    return model


@contextmanager
def first_choices(device: str) -> Iterator[None]:
    """One configuration of every kernel that would be tuned: what is compared differs in none of them."""
    if device == "cpu":
        yield
        return
    from hamts.ops import attend_triton_tiles as tiles
    from hamts.ops.gated_delta_trial import untuned

    tiles.use({kernel: candidates[0] for kernel, candidates in tiles.CANDIDATES.items()})
    try:
        with untuned():
            yield
    finally:
        tiles.use({})


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def peak_gib(device: str) -> float:
    return 0.0 if device == "cpu" else torch.cuda.max_memory_allocated() / GIB


def reset_peak(device: str) -> None:
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- reading a history


class Uncut(LateRoom):
    """Leaves everything the room it has."""

    def __call__(self, memory: StreamMemory, candidates: int) -> StreamMemory:
        return memory


@contextmanager
def room(way: str) -> Iterator[None]:
    """How room is found: ``asked, chunks copied`` is as it was before; ``late`` as it is."""
    with ExitStack() as stack:
        if way != "late":
            stack.enter_context(mock.patch.object(rollout, "LateRoom", Uncut))
        if way.startswith("asked"):
            asked = rows.rows_for
            stack.enter_context(
                mock.patch.object(
                    scratchpad, "rows_for", lambda alive, most=None, *, skips_padding=False: asked(alive, most)
                )
            )
        if way.endswith("copied"):
            stack.enter_context(mock.patch("hamts.reader.sent", lambda tensor, device: tensor.to(device)))
        yield


def rolls(device: str, model: hamts.HAMForecaster, *, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    network = network_on(model, device)
    items, most = (2, 200) if small else (4, 16_384)
    panel = model._panel_of(pd.concat([series(f"i{k}", k, most * PATCH, 4) for k in range(items)]), None, None)
    store = build_store(panel, patch_steps=PATCH, extra_steps=1, time_unit=1.0)
    nothing = [np.zeros(0, dtype=np.int64)] * items
    ways = ("late", "asked, chunks copied", "never", "asked")
    # so that either ends with some 16,000 entries
    for chunk, share, patches, times_each in ((512, 0.25, most, 2), (64, 0.5, most // 2, 1)):
        policy = network.policy(torch.full((items,), share), capped=False)

        def read(patches_read: int, policy: Any = policy, chunk: int = chunk) -> Any:
            ends = np.full(items, patches_read * PATCH)
            return rollout.roll(
                network, store, cutoffs=nothing, steps=1, policies=policy, ends=ends, chunk_patches=chunk
            )

        read(min(2 * chunk, patches))
        for way in ways:
            times = []
            reset_peak(device)
            with room(way):
                for _ in range(times_each):
                    wait(device)
                    began = time.perf_counter()
                    result = read(patches)
                    wait(device)
                    times.append(time.perf_counter() - began)
            alive = [int(layer.scratchpad.alive.sum(1).max()) for layer in result.memory.layers]
            cell = {"seconds": [round(t, 3) for t in times], "peak_gib": round(peak_gib(device), 3)}
            cell |= {"room": max(layer.scratchpad.alive.shape[1] for layer in result.memory.layers)}
            cell |= {"chunk": chunk, "patches": patches, "share": share, "way": way, "entries": max(alive)}
            yield f"rolls--{chunk}--{round(100 * share)}--{way.replace(', ', '-').replace(' ', '-')}", cell


# --- a step of a stream


def filled(stream: Stream, counts: np.ndarray) -> None:
    """Give every item drawn entries, so many in each layer, in place of its own."""
    memory, device = stream._items.memory, stream._network.unit.device
    generator = torch.Generator(device).manual_seed(0)
    for low in range(0, len(counts), 32):
        mine = np.arange(low, min(low + 32, len(counts)))
        width = int(counts[mine].max())
        alive = torch.arange(width, device=device) < torch.from_numpy(counts[mine]).to(device)[:, None]  # [B, M]

        def drawn(pad: Entries, alive: torch.Tensor = alive) -> Entries:
            B, M = alive.shape

            def wide(leaf: torch.Tensor) -> torch.Tensor:
                shape = (B, M, *leaf.shape[2:])
                return torch.randn(shape, generator=generator, device=leaf.device, dtype=leaf.dtype)

            fixed = {name: getattr(pad, name).new_zeros(B, M) for name in ("bias", "score", "channel", "must_keep")}
            position = torch.arange(-M, 0, device=alive.device).double().expand(B, M)
            return replace(
                pad, keys=wide(pad.keys), values=wide(pad.values), marks=wide(pad.marks), alive=alive,
                position=position, **fixed,
            )  # fmt: skip

        with torch.no_grad():
            before = memory.select(mine)
            layers = [replace(layer, scratchpad=drawn(layer.scratchpad)) for layer in before.layers]
            memory.put(mine, replace(before, layers=layers))


@contextmanager
def watched(spent: dict[str, float], device: str) -> Iterator[None]:
    """Time of the parts of an update, the device waited for before and after each."""

    def timed(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            wait(device)
            began = time.perf_counter()
            result = inner(*given, **named)
            wait(device)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return result

        return run

    parts: dict[str, tuple[Any, str]] = {"take": (MemoryStore, "lend"), "store": (MemoryStore, "put")}
    parts |= {"step": (Stepper, "step"), "ahead": (Stepper, "ahead")}
    with ExitStack() as stack:
        for name, (owner, method) in parts.items():
            stack.enter_context(mock.patch.object(owner, method, timed(name, getattr(owner, method))))
        yield


def frame_of(turn: int, names: np.ndarray) -> pd.DataFrame:
    """The rows of one patch, alike for all items."""
    patch = series("x", HOURS + turn * PATCH, PATCH)
    frame = pd.DataFrame({name: np.tile(patch[name].to_numpy(), len(names)) for name in patch})
    return frame.assign(unique_id=np.repeat(names, PATCH))


def fed(stream: Stream, names: np.ndarray, device: str) -> dict[str, Any]:
    """Milliseconds of an update by one patch of all items, and of its parts; of its kernels alone; bytes."""
    spent: dict[str, float] = {}
    took = []
    reset_peak(device)
    for turn in range(WARM + TURNS):
        frame = frame_of(turn, names)
        with watched(spent, device):
            if turn == WARM:
                spent.clear()
            began = time.perf_counter()
            stream.update(frame)
            took.append(1e3 * (time.perf_counter() - began))
    cell: dict[str, Any] = {"update_ms": float(np.median(took[WARM:])), "kernel": stream.kernel}
    cell |= {f"{name}_ms": 1e3 * spent[name] / TURNS for name in ("take", "ahead", "step", "store")}
    entries = stream._items.memory.entries
    cell |= {"store_gib": entries.nbytes() / GIB, "peak_gib": peak_gib(device)}
    cell["entries_after"] = sum(int(used.sum()) for used in entries.used.values())
    if stream._stepper.recorder is not None:
        cell["replayed"] = stream._stepper.recorder.replayed
    if device != "cpu":
        frame = frame_of(WARM + TURNS, names)
        traced = busy(lambda: stream.update(frame), 1)
        cell |= {"kernels_ms": traced["kernel_ms"], "launches": int(traced["launches"])}
        cell["slowest_kernels_ms"] = dict(list(traced["slowest_kernels_ms"].items())[:8])
    return cell


def steps(device: str, model: hamts.HAMForecaster, *, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    arrays, meta = model.stream(series("seed", 0, HOURS)).state()
    mean = 40 if small else MEAN
    for items, side in ((6, 4),) if small else ((1_024, 1_024), (256, 256)):
        draws = np.exp(0.6 * np.random.default_rng(0).normal(size=items))
        counts = np.clip(draws / draws.mean() * mean, 1, min(3 * mean, MOST)).astype(np.int64)
        many = {name: torch.as_tensor(x).repeat(items, *[1] * (x.ndim - 1)) for name, x in arrays.items()}
        names = np.array([f"item {k}" for k in range(items)], dtype=object)
        for store in ("paged, recorded", "paged", "padded"):
            recorded = store.endswith("recorded")
            if recorded and device == "cpu":
                continue
            config = {**meta["config"], "store": store.split(",")[0], "items_side_by_side": side}
            facts = {**meta, "config": config, "item_ids": names.tolist()}
            cell: dict[str, Any] = {"items": items, "store": store, "side_by_side": side, "layers": model.config.layers}
            cell |= {"entries_mean": float(counts.mean()), "entries_most": int(counts.max())}
            try:
                stream = Stream.from_state(model, many, facts, device=device, recorded=recorded)
                filled(stream, counts)
                cell |= fed(stream, names, device)
            except torch.OutOfMemoryError as problem:
                cell["does_not_fit"] = str(problem)[:120]
            stream = None  # type: ignore[assignment]
            yield f"steps--{items}--{side}--{store.replace(', ', '-')}", cell


# --- the read alone


def pool_step(counts: torch.Tensor, device: str, *, ordered: bool) -> Callable[[], torch.Tensor]:
    """The read of streams with so many entries, [S], in rows of one pool: in the order of streams, or in none."""
    from benchmarks.kernels import HEADS, MARKS, WIDTH, WINDOW
    from hamts.ops.attend_triton import attend
    from hamts.ops.types import ScratchKeys

    S, M, total = len(counts), int(counts.max()), int(counts.sum())
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    there = torch.arange(M) < counts[:, None]  # [S, M]
    order = torch.arange(total) if ordered else torch.randperm(total, generator=torch.Generator().manual_seed(1))
    number = torch.zeros(S, M, dtype=torch.int64)
    number[there] = 1 + order
    since = torch.where(there, 0, 2**40).to(device)  # [S, M]
    scratch = ScratchKeys(
        keys=drawn(total + 1, HEADS, WIDTH), values=drawn(total + 1, HEADS, WIDTH),
        marks=torch.randn(total + 1, MARKS, device=device), rows=number.to(device), visible_from=since,
        visible_until=torch.full_like(since, 2**40), channel=torch.zeros_like(since),
        bias=torch.zeros(S, M, HEADS, device=device),
    )  # fmt: skip
    local = {"keys": drawn(S, WINDOW + 1, 1, HEADS, WIDTH), "values": drawn(S, WINDOW + 1, 1, HEADS, WIDTH)}
    local["marks"] = torch.randn(S, WINDOW + 1, 1, MARKS, device=device)
    local["present"] = torch.ones(S, WINDOW + 1, 1, dtype=torch.bool, device=device)
    named: dict[str, Any] = {f"local_{name}": x for name, x in local.items()}
    named |= {"readable": torch.ones(S, 1, 1, dtype=torch.bool, device=device), "window": WINDOW, "scratch": scratch}
    queries, channel_bias = drawn(S, 1, 1, HEADS, WIDTH) * WIDTH**-0.5, torch.ones(HEADS, device=device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return attend(queries, channel_bias=channel_bias, share_mark=True, **named).output

    return step


def reads(device: str, model: None, *, small: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    if small:
        pool_step(torch.tensor([3, 0, 5]), device, ordered=False)()
        return
    from benchmarks.kernels import graph_ms
    from benchmarks.kernels_decode import Streams

    for streams, share in ((256, 0.1), (1_024, 0.02), (64, 0.25), (1, 0.1)):
        cell: dict[str, Any] = {"streams": streams, "share": share}
        for store in ("padded", "paged"):
            cell[f"{store}_ms"] = graph_ms(Streams(streams, share, True, store).read_step())
            torch.cuda.empty_cache()
        counts = Streams(streams, share, True).counts
        for ordered in (True, False):
            cell["rows_in_order_ms" if ordered else "rows_in_no_order_ms"] = graph_ms(
                pool_step(counts, device, ordered=ordered)
            )
            torch.cuda.empty_cache()
        yield f"reads--{streams}--{round(100 * share)}", cell


def table(results: Path) -> str:
    """Every cell, a table for each part."""
    lines: list[str] = []
    for part in PARTS:
        cells = [json.loads(path.read_text()) for path in sorted(results.glob(f"{part}--*.json"))]
        names = list(dict.fromkeys(name for cell in cells for name in cell))
        names = [name for name in names if name not in ("device", "date", "versions", "slowest_kernels_ms")]
        if cells:
            lines += ["", "| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
            lines += ["| " + " | ".join(_shown(cell.get(name, "-")) for name in names) + " |" for cell in cells]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return (
        ", ".join(map(_shown, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a trial of the script")
    parser.add_argument("--models", type=Path, help="where models of an earlier run lie, and are put")
    parser.add_argument("--table", action="store_true", help="run nothing, print what is there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.table:
        name = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
        about = {"device": name, "date": time.strftime("%Y-%m-%d", time.gmtime()), "versions": versions()}
        args.results.mkdir(parents=True, exist_ok=True)
        with first_choices(args.device):
            for part in args.parts:
                channels = CHANNELS.get(part)
                model = None if channels is None else model_of(channels, "tiny" if args.small else "base", args.models)
                for cell_name, cell in globals()[part](args.device, model, small=args.small):
                    (args.results / f"{cell_name}.json").write_text(json.dumps(cell | about, indent=1) + "\n")
                    print(cell_name, {k: _shown(v) for k, v in cell.items()}, flush=True)
    print(table(args.results))


if __name__ == "__main__":
    main()
