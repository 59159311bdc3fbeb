"""Speed of the read's GPU kernels: the call the layer makes, against full attention in the same run.

Run ``python -m benchmarks.kernels`` from the clone on a machine with a CUDA device. Every cell is written to
``benchmarks/results/kernels`` as it is measured; ``--table`` prints what is there and needs no device.

    attention   window and scratchpad in one softmax, forward and backward, 65,536 tokens in all
    tiles       milliseconds of every candidate that the search for tiles tried
    flex        FlexAttention on compacted keys, a rival
    decode      one step of many streams with ragged scratchpads
    parity      the tests under the marker ``gpu``

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
import subprocess
import sys
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
SIZES = [(4_096, 0.25), (16_384, 0.5), (16_384, 0.25), (16_384, 0.1), (65_536, 0.25), (65_536, 0.1)]
# share of cuDNN's full attention that a read of (patches, share of them kept) may take, forward and backward
BOUNDS = {(16_384, 0.25): 0.40, (16_384, 0.1): 0.20, (65_536, 0.1): 0.13}
REPEATS_MS = 150


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
        return {
            "queries": normal(B, T, 1, HEADS, WIDTH) * WIDTH**-0.5 * 2,
            "local_keys": normal(*places),
            "local_values": normal(*places),
            "local_marks": normal(B, WINDOW + T, 1, MARKS, dtype=torch.float32),
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
        record(f"attention--T{n_patches}--{round(100 * share)}", cell)


def flex_cells(sizes: list[tuple[int, float]]) -> None:
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

        times = {"forward_ms": measure(forward), "both_ms": measure(both)}
        record(f"flex--T{n_patches}--{round(100 * share)}", {**asdict(read), **times})


def search_cells(sizes: list[tuple[int, float]]) -> None:
    """Time every candidate of every kernel at each size; the table of ``attend_triton_tiles`` comes from here."""
    from hamts.ops import attend_triton_tiles as tiles

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


def _compile(number: int) -> None:
    """Compile the candidates of one number into the cache on disk."""
    from hamts.ops import attend_triton_tiles as tiles

    for kernel, candidates in tiles.CANDIDATES.items():
        if number < len(candidates):
            tiles.use({kernel: candidates[number]} | {k: c[-1] for k, c in tiles.CANDIDATES.items() if k != kernel})
            try:
                Read(1024, 0.25, tokens=1024).runs()["both_with_masses"]()
            except Exception as problem:  # noqa: BLE001
                print("candidate", kernel, candidates[number], "fails:", repr(problem)[:200], flush=True)


def compile_ahead() -> None:
    """All candidates at once, on all cores: one process each."""
    from hamts.ops import attend_triton_tiles as tiles

    most = max(len(candidates) for candidates in tiles.CANDIDATES.values())
    with concurrent.futures.ProcessPoolExecutor(most, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, range(most)))


def decode_cells(rates: dict[str, float]) -> None:
    """One step: append what leaves the window, read; in a CUDA graph."""
    full_ms = {}
    for streams, ragged in [(256, False), (256, True), (1, True), (64, True), (1024, True)]:
        counts = entry_counts(streams, ragged)
        step_ms = graph_ms(decode_step(streams, counts))
        cell: dict[str, Any] = {"streams": streams, "ragged": ragged, "history": 65_536, "share": 0.1}
        cell |= {"heads": HEADS, "width": WIDTH, "window": WINDOW, "step_ms": step_ms}
        cell |= {"mean_entries": float(counts.float().mean()), "most_entries": int(counts.max())}
        moved = 4 * WIDTH * HEADS * float(counts.sum() + streams * WINDOW)
        cell["floor_bytes_ms"] = moved / rates["bytes_per_s"] * 1e3
        cell["tokens_per_s"] = streams / step_ms * 1e3
        if streams == 256:
            full_ms = full_ms or full_decode_ms(streams)
            cell |= {f"full_{name}_ms": ms for name, ms in full_ms.items()}
            cell["times_as_many_tokens_per_s"] = min(full_ms.values()) / step_ms
        record(f"decode--S{streams}{'--ragged' if ragged else ''}", cell)
        torch.cuda.empty_cache()


def entry_counts(streams: int, ragged: bool) -> torch.Tensor:
    """Entries of each stream: a tenth of the history on average, a few streams many times as much."""
    mean = 0.1 * 65_536
    if not ragged:
        return torch.full((streams,), int(mean))
    draws = torch.randn(streams, generator=torch.Generator().manual_seed(0)).mul(0.6).exp()  # [S]
    return (draws / draws.mean() * mean).clamp(max=3 * mean).long()


def decode_step(streams: int, counts: torch.Tensor) -> Callable[[], Any]:
    from hamts.ops.attend_triton import attend

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()

    S, M, L = streams, bucket(int(counts.max()) + 64), WINDOW + 1
    pad = {"keys": normal(S, M, HEADS, WIDTH), "values": normal(S, M, HEADS, WIDTH)}
    bias, marks = torch.randn(S, M, device="cuda"), torch.randn(S, M, MARKS, device="cuda")
    local = {"local_keys": normal(S, L, 1, HEADS, WIDTH), "local_values": normal(S, L, 1, HEADS, WIDTH)}
    queries = normal(S, 1, 1, HEADS, WIDTH) * WIDTH**-0.5
    count, index = counts.cuda(), torch.arange(M, device="cuda")
    stream, channel = torch.arange(S, device="cuda"), torch.zeros(S, M, dtype=torch.int64, device="cuda")
    scale, local_marks = torch.randn(HEADS, device="cuda"), torch.randn(S, L, 1, MARKS, device="cuda")
    present = torch.ones(S, L, 1, dtype=torch.bool, device="cuda")
    readable, channel_bias = torch.ones(S, 1, 1, dtype=torch.bool, device="cuda"), torch.ones(HEADS, device="cuda")

    def step() -> torch.Tensor:
        # the count is not raised, so that every repeat reads as much
        for name in ("keys", "values"):
            pad[name][stream, count] = local[f"local_{name}"][:, 0, 0]
        since = torch.where(index < count[:, None] + 1, 0, 2**40)  # [S, M]
        scratch = ScratchKeys(
            **pad,
            channel=channel,
            bias=bias[..., None] + scale,
            visible_from=since,
            visible_until=torch.full_like(since, 2**40),
            marks=marks,
        )
        return attend(
            queries,
            **local,
            local_present=present,
            scratch=scratch,
            readable=readable,
            channel_bias=channel_bias,
            window=WINDOW,
            local_marks=local_marks,
        ).output

    return step


def full_decode_ms(streams: int) -> dict[str, float]:
    """Attention of one query over the whole history by the ways PyTorch has, each in a graph."""
    shape = (streams, HEADS, 65_536, WIDTH)
    keys, values = (torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    query, new = (torch.randn(streams, HEADS, 1, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def step(backend: SDPBackend = backend) -> torch.Tensor:
            keys[:, :, -1:] = new
            values[:, :, -1:] = new
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(query, keys, values)

        try:
            found[backend.name.split("_")[0].lower()] = graph_ms(step)
        except RuntimeError as problem:
            print("full decode", backend.name, "fails:", str(problem)[:100])
    return found


def graph_ms(step: Callable[[], Any]) -> float:
    """Median milliseconds of a step that is replayed from a CUDA graph."""
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return measure(graph.replay)


def parity() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        "-n",
        "12",
        "--durations=4",
        "--tb=short",
    ]
    files = ["tests/test_attend_triton.py", "tests/test_compact.py"]
    here = Path(__file__).parent.parent
    ran = subprocess.run(command + files, capture_output=True, text=True, cwd=here, check=False)
    print(ran.stdout[-3000:], ran.stderr[-500:])
    lines = ran.stdout.strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    record("parity", {"passed": ran.returncode == 0, "summary": lines[-1], "failed": failed, "files": files})


def cells_of(pattern: str, folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(pattern))}


def table() -> None:
    """What has been measured, as tables."""
    first, flex = cells_of("attention--*.json", RESULTS / "first"), cells_of("flex--*.json")
    cells = sorted(cells_of("attention--*.json").items(), key=lambda cell: (cell[1]["n_patches"], -cell[1]["share"]))
    print(
        "| patches | kept | read fwd / fwd+bwd ms | with masses | cuDNN full fwd / fwd+bwd ms | ratio | at most |",
        end="",
    )
    print(" ratio of the first version | Flex, no window | floor ops / bytes ms |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, c in cells:
        bound = "-" if c["bound"] is None else f"{c['bound']:.2f}"
        before = f"{first[name]['ratio']:.3f}" if name in first else "-"
        rival = flex.get(name.replace("attention", "flex"))
        flexed = "not run" if rival is None else f"{rival['both_ms']:.2f}"
        print(
            f"| {c['n_patches']:,} | {c['share']:.0%} | {c['forward_ms']:.2f} / {c['both_ms']:.2f} |"
            f" {c['both_with_masses_ms']:.2f} | {c['full_forward_ms']:.2f} / {c['full_both_ms']:.2f} |"
            f" {c['ratio']:.3f} | {bound} | {before} | {flexed} |"
            f" {c['floor_operations_ms']:.2f} / {c['floor_bytes_ms']:.2f} |"
        )
    print("\n| best tiles at | forward | query_grad | entry_grad | local_grad | sum | mass |")
    print("|---|---|---|---|---|---|---|")
    for folder in (RESULTS / "first", RESULTS):
        for name, cell in cells_of("tiles--*.json", folder).items():
            best = {kernel: min(times.values()) for kernel, times in cell["milliseconds"].items()}
            parts = [best[kernel] for kernel in ("forward", "query_grad", "entry_grad", "local_grad")]
            label = name.removeprefix("tiles--") + (" first version" if folder.name == "first" else "")
            print(f"| {label} | {' | '.join(f'{ms:.2f}' for ms in [*parts, sum(parts), best['mass']])} |")
    print("\n| streams | entries mean / most | ms a step | floor bytes ms | tokens/s | best full ms | times |")
    print("|---|---|---|---|---|---|---|")
    steps = sorted(cells_of("decode--*.json").values(), key=lambda cell: (cell["streams"], cell["ragged"]))
    for c in steps:
        full = [c[name] for name in c if name.startswith("full_")]
        rival = f"{min(full):.2f} | {c['times_as_many_tokens_per_s']:.1f}" if full else "- | -"
        print(
            f"| {c['streams']:,} | {c['mean_entries']:,.0f} / {c['most_entries']:,} | {c['step_ms']:.3f} |"
            f" {c['floor_bytes_ms']:.3f} | {c['tokens_per_s']:,.0f} | {rival} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=["parity", "attention"])
    parser.add_argument("--table", action="store_true", help="print what is there, measure nothing")
    options = parser.parse_args()
    if not options.table:
        if "compile" in options.parts:
            compile_ahead()
        if "parity" in options.parts:
            parity()
        rates: dict[str, float] = {}
        if {"attention", "decode"} & set(options.parts):
            rates = ceilings()
            record("ceilings", rates)
        if "tiles" in options.parts:
            search_cells([(16_384, 0.25), (65_536, 0.1)])
        if "attention" in options.parts:
            attention_cells(rates, SIZES)
        if "flex" in options.parts:
            flex_cells(list(BOUNDS))
        if "decode" in options.parts:
            decode_cells(rates)
    table()


if __name__ == "__main__":
    main()
