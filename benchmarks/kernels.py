"""Speed of the read's GPU kernels: the call the layer makes, against full attention in the same run.

Run ``python -m benchmarks.kernels`` from the clone on a machine with a CUDA device. Every cell is written to
``benchmarks/results/kernels`` as it is measured; ``--table`` prints what is there and needs no device.

    attention   window and scratchpad in one softmax, forward and backward, 65,536 tokens in all
    tiles       milliseconds of every tile in TRIAL; the fastest are used by the parts after it
    flex        FlexAttention on compacted keys, a rival
    decode      one step of many streams with ragged scratchpads, the read alone and a whole layer
    parity      the tests under the marker ``gpu``
    compile     fill the caches of compiled kernels, on all cores, so that no part waits for a compiler

Times are medians of device events. Beside each stands its floor: the larger of operations over the measured rate of
matrix products and of bytes, each input read and each output written once, over the measured bandwidth of copies.

B items · T patches · H heads · K key · M entries (scratchpad) · W window patches · R marks
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hamts.ops.compact import bucket, compact
from hamts.ops.types import ScratchKeys

RESULTS = Path(__file__).parent / "results" / "kernels"
TOKENS, HEADS, WIDTH, WINDOW, MARKS = 65_536, 16, 64, 64, 3
SIZES = [(16_384, 0.25), (16_384, 0.1), (65_536, 0.1), (4_096, 0.25), (16_384, 0.5), (65_536, 0.25)]
# share of cuDNN's full attention that a read of (patches, share of them kept) may take, forward and backward
BOUNDS = {(16_384, 0.25): 0.40, (16_384, 0.1): 0.20, (65_536, 0.1): 0.13}
REPEATS_MS = 150
# folders of RESULTS with what earlier versions of the kernels took
ATTEMPTS = ("first", "second", "third", "fourth", "fifth")
# tiles worth trying on Hopper: rows, columns, warps, stages, registers; the table of ``attend_triton_tiles`` holds the
# fastest
TRIAL: dict[str, list[tuple[int, ...]]] = {
    "forward": [(64, 64, 4, 2, 128), (128, 64, 4, 3), (64, 64, 4, 3, 168), (128, 64, 8, 3, 128)],
    "query_grad": [(64, 64, 4, 2, 168), (64, 64, 4, 3, 168), (64, 64, 4, 2, 128), (128, 64, 4, 2)],
    "entry_grad": [(64, 64, 4, 3, 168), (64, 64, 4, 2, 168), (64, 64, 4, 3), (64, 128, 8, 3)],
    "local_grad": [(64, 64, 4, 3, 168), (64, 64, 4, 2, 168), (64, 64, 4, 2, 128)],
    "mass": [(128, 64, 4, 3), (64, 64, 4, 3, 168), (64, 128, 4, 3)],
}


def measure(run: Callable[[], Any]) -> float:
    """Median milliseconds."""
    import triton

    return float(triton.testing.do_bench(run, warmup=30, rep=REPEATS_MS, return_mode="median"))


def setting() -> dict[str, Any]:
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
        "seed": 0,
    }


def record(name: str, cell: dict[str, Any]) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**cell, **setting()}, indent=1) + "\n", encoding="utf-8")
    print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in cell.items()}, flush=True)


def ceilings() -> dict[str, float]:
    """Operations and bytes a second that this device reaches on a large product and a large copy."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = measure(lambda: a @ b)
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source))
    return {"flops_per_s": 2 * 8192**3 / product * 1e3, "bytes_per_s": 2 * source.numel() * 4 / copy * 1e3}


@dataclass(frozen=True)
class Read:
    """A read as the layer asks for it: one channel, marks, a bias for each entry and head."""

    n_patches: int
    share: float
    tokens: int = TOKENS

    @property
    def items(self) -> int:
        return self.tokens // self.n_patches

    def tensors(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator("cuda").manual_seed(0)
        B, T = self.items, self.n_patches

        def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.randn(shape, device="cuda", generator=generator, dtype=torch.float32).to(dtype)

        places = (B, WINDOW + T, 1, HEADS, WIDTH)
        kept = torch.rand(B, WINDOW + T, device="cuda", generator=generator) < self.share  # [B, L]
        kept[:, :WINDOW] = False
        ones = torch.ones(B, WINDOW + T, 1, 1, device="cuda")  # the layer's last mark
        return {
            "queries": normal(B, T, 1, HEADS, WIDTH) * WIDTH**-0.5 * 2,
            "local_keys": normal(*places),
            "local_values": normal(*places),
            "local_marks": torch.cat([normal(B, WINDOW + T, 1, MARKS - 1, dtype=torch.float32), ones], -1),
            "bias": -normal(B, WINDOW + T, HEADS, dtype=torch.float32).abs(),
            "channel_bias": torch.ones(HEADS, device="cuda"),
            "kept": kept,
        }

    def scratch(self, x: dict[str, torch.Tensor]) -> ScratchKeys:
        """The kept places, compacted into a capacity that the expected number fixes."""
        capacity = bucket(int(self.share * self.n_patches + 4 * (self.share * self.n_patches) ** 0.5))
        packed = compact(x["kept"], capacity)
        since = torch.where(packed.filled, packed.source, 2**40)  # [B, M]: a place leaves the window at its own index
        return ScratchKeys(
            keys=packed.gather(x["local_keys"][:, :, 0]),
            values=packed.gather(x["local_values"][:, :, 0]),
            channel=torch.zeros_like(packed.source),
            bias=packed.gather(x["bias"]),
            visible_from=since,
            visible_until=torch.full_like(since, 2**40),
            marks=packed.gather(x["local_marks"][:, :, 0]),
        )

    def call(self, x: dict[str, torch.Tensor], scratch: ScratchKeys) -> Any:
        from hamts.ops.attend_triton import attend

        return attend(
            x["queries"],
            local_keys=x["local_keys"],
            local_values=x["local_values"],
            local_present=torch.ones(x["local_keys"].shape[:3], dtype=torch.bool, device="cuda"),
            scratch=scratch,
            readable=torch.ones(self.items, 1, 1, dtype=torch.bool, device="cuda"),
            channel_bias=x["channel_bias"],
            window=WINDOW,
            local_marks=x["local_marks"],
            share_mark=True,
        )

    def runs(self) -> dict[str, Callable[[], Any]]:
        """What is timed."""
        x = self.tensors()
        scratch = self.scratch(x)
        leaves = [x["queries"], x["local_keys"], x["local_values"], x["channel_bias"]]
        leaves += [scratch.keys, scratch.values, scratch.bias]
        pushed = [torch.randn_like(x["queries"]), torch.randn(*x["queries"].shape[:-1], MARKS, device="cuda")]

        def forward() -> Any:
            with torch.no_grad():
                return self.call(x, scratch).output

        def both(masses: bool = False) -> Any:
            for leaf in leaves:
                leaf.requires_grad_()
            got = self.call(x, scratch)
            if masses:
                got.scratch_mass  # noqa: B018
            return torch.autograd.grad([got.output, got.marks], leaves, pushed)

        def gathered() -> Any:
            with torch.no_grad():
                return self.scratch(x)

        return {"forward": forward, "both": both, "both_with_masses": lambda: both(True), "compaction": gathered}

    def floor_ms(self, rates: dict[str, float], *, backward: bool) -> dict[str, float]:
        """Least milliseconds for the operations and for the bytes."""
        T, B = self.n_patches, self.items
        pairs = B * HEADS * (self.share * T * (T - WINDOW) / 2 + T * WINDOW)
        operations = pairs * WIDTH * (14 if backward else 4)
        rows = B * T * HEADS * WIDTH * 2
        keys = 2 * rows * (1 + self.share)
        moved = (2 * rows + keys) * (2.5 if backward else 1)
        return {
            "floor_operations_ms": operations / rates["flops_per_s"] * 1e3,
            "floor_bytes_ms": moved / rates["bytes_per_s"] * 1e3,
        }


def full_attention(n_patches: int, backend: SDPBackend) -> dict[str, float]:
    """Causal attention over all patches, its tensors laid out as the backend likes best."""
    shape = (TOKENS // n_patches, HEADS, n_patches, WIDTH)
    q, k, v, pushed = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    for leaf in (q, k, v):
        leaf.requires_grad_()

    def forward() -> torch.Tensor:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    def inference() -> torch.Tensor:
        with torch.no_grad():
            return forward()

    return {
        "forward_ms": measure(inference),
        "both_ms": measure(lambda: torch.autograd.grad(forward(), (q, k, v), pushed)),
    }


def attention_cells(rates: dict[str, float], sizes: list[tuple[int, float]]) -> None:
    chosen = use_fastest()
    rivals: dict[int, dict[str, float]] = {}
    for n_patches, share in sizes:
        if n_patches not in rivals:
            rivals[n_patches] = full_attention(n_patches, SDPBackend.CUDNN_ATTENTION)
        read = Read(n_patches, share)
        times = {f"{name}_ms": measure(run) for name, run in read.runs().items()}
        full = rivals[n_patches]
        cell: dict[str, Any] = {**asdict(read), "heads": HEADS, "width": WIDTH, "window": WINDOW, **times}
        cell |= {f"full_{name}": value for name, value in full.items()}
        cell["ratio"] = times["both_ms"] / full["both_ms"]
        cell["bound"] = BOUNDS.get((n_patches, share))
        cell |= read.floor_ms(rates, backward=True)
        cell["tiles"] = chosen or "of the table"
        record(f"attention--T{n_patches}--{round(100 * share)}", cell)


def flex_cells(sizes: list[tuple[int, float]], *, only_compile: bool = False) -> None:
    """FlexAttention on compacted keys: no window, no biases, no marks; the gather of keys and values is timed."""
    from torch.nn.attention.flex_attention import flex_attention

    from hamts.ops.attend_flex import attend_entries, prefix_mask

    compiled = torch.compile(flex_attention, dynamic=False)
    for n_patches, share in sizes:
        read = Read(n_patches, share)
        x = read.tensors()
        # every query sees an entry, as every query of the layer sees its own patch
        x["kept"][:, :1] = True
        queries = x["queries"][:, :, 0].requires_grad_()  # [B, T, H, K]
        sources = [x["local_keys"].requires_grad_(), x["local_values"].requires_grad_()]
        pushed = torch.randn_like(queries)

        def forward(read: Read = read, x: dict[str, torch.Tensor] = x, queries: torch.Tensor = queries) -> torch.Tensor:
            scratch = read.scratch(x)
            mask = prefix_mask(scratch.visible_from, read.n_patches)
            return attend_entries(queries, keys=scratch.keys, values=scratch.values, mask=mask, compiled=compiled)

        def both(
            leaves: list[torch.Tensor] = [queries, *sources],  # noqa: B006
            forward: Callable[[], torch.Tensor] = forward,
            pushed: torch.Tensor = pushed,
        ) -> Any:
            return torch.autograd.grad(forward(), leaves, pushed)

        if only_compile:
            both()
            continue
        times = {"forward_ms": measure(forward), "both_ms": measure(both)}
        record(f"flex--T{n_patches}--{round(100 * share)}", {**asdict(read), **times})


def search_cells(sizes: list[tuple[int, float]]) -> None:
    """Time every tile of TRIAL at each size."""
    from hamts.ops import attend_triton_tiles as tiles

    tiles.CANDIDATES.update(trial())
    for n_patches, share in sizes:
        tiles.forget(measured=True)
        runs = Read(n_patches, share).runs()
        runs["both_with_masses"]()
        found = {
            place[0]: {str(t): round(ms, 4) for t, ms in sorted(times.items(), key=lambda pair: pair[1])}
            for place, times in tiles.timings.items()
        }
        record(f"tiles--T{n_patches}--{round(100 * share)}", {"milliseconds": found})
        del runs


def use_fastest() -> dict[str, str]:
    """Use the tiles that this device took the least time with, over all sizes tried together; none tried: the table."""
    from hamts.ops import attend_triton_tiles as tiles

    total: dict[str, dict[str, list[float]]] = {}
    for cell in cells_of("tiles--*.json").values():
        if cell["device"] == torch.cuda.get_device_name():
            for kernel, times in cell["milliseconds"].items():
                for tile, ms in times.items():
                    total.setdefault(kernel, {}).setdefault(tile, []).append(ms)
    best, sizes = {}, {}
    for kernel, times_of in total.items():
        most = max(len(times) for times in times_of.values())
        # p1: a variant that was tried and dropped
        full = {name: sum(ms) for name, ms in times_of.items() if len(ms) == most and not name.endswith("p1")}
        best[kernel] = min(full, key=lambda name: full[name])
        sizes[kernel] = tiles.Tiles(*[int(number) for number in re.findall(r"\d+", best[kernel])[:5]])
    tiles.use(sizes)
    return best


def trial() -> dict[str, Any]:
    from hamts.ops.attend_triton_tiles import Tiles

    return {kernel: tuple(Tiles(*sizes) for sizes in several) for kernel, several in TRIAL.items()}


def _compile(number: int) -> None:
    """Compile every kernel's tile of one number into the cache on disk; -1: FlexAttention, -2: decoding."""
    from hamts.ops import attend_triton_tiles as tiles

    try:
        if number == -1:
            flex_cells(list(BOUNDS), only_compile=True)
        elif number == -2:
            from benchmarks.kernels_decode import STORES, Streams

            for store in STORES:
                Streams(1, 0.02, ragged=True, store=store).layer_step()()
        else:
            tiles.use({kernel: several[min(number, len(several) - 1)] for kernel, several in trial().items()})
            Read(16_384, 0.1).runs()["both_with_masses"]()
    except Exception as problem:  # noqa: BLE001
        print("compiling", number, "fails:", repr(problem)[:200], flush=True)


def compile_ahead(parts: list[str]) -> None:
    """All tiles of TRIAL at once, and what other parts need, one process each."""
    numbers = [*range(max(len(several) for several in TRIAL.values())), *([-1] if "flex" in parts else []), -2]
    with concurrent.futures.ProcessPoolExecutor(len(numbers), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, numbers))


def graph_ms(step: Callable[[], Any]) -> float:
    """Median milliseconds of a step that is replayed from a CUDA graph."""
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return measure(graph.replay)


def cells_of(pattern: str, folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=["parity", "attention"])
    parser.add_argument("--only", default="", help="run those parity tests whose name fits this, as pytest's -k")
    parser.add_argument("--sizes", default="all", choices=["all", "bounds", "others"], help="all, with bounds, others")
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    options = parser.parse_args()
    failed: list[str] = []
    if not options.table:
        if "compile" in options.parts:
            compile_ahead(options.parts)
        if "parity" in options.parts:
            from benchmarks.kernels_parity import parity

            parity(options.only)
        rates: dict[str, float] = {}
        if {"attention", "decode"} & set(options.parts):
            rates = ceilings()
        if "tiles" in options.parts:
            search_cells([(16_384, 0.25), (16_384, 0.1), (65_536, 0.1)])
        if "attention" in options.parts:
            record("ceilings", rates)
            sizes = [size for size in SIZES if options.sizes != ("others" if size in BOUNDS else "bounds")]
            attention_cells(rates, sizes)
        if "flex" in options.parts:
            flex_cells(list(BOUNDS))
        if "decode" in options.parts:
            from benchmarks.kernels_decode import decode_cells

            failed = decode_cells(rates)
    from benchmarks.kernels_table import table

    table()
    if failed:
        raise SystemExit(f"These cells failed and have no result: {failed}.")


if __name__ == "__main__":
    main()
