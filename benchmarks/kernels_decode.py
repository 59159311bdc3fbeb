"""Speed of decoding: one step of many streams whose scratchpads differ in length, each step in a CUDA graph.

A part of ``benchmarks/kernels.py``, which runs it, writes its cells and prints its tables. Two steps are timed: the
read alone, what leaves the window appended first, and all that a layer does with a token, from its input to its output.

Entries lie padded to the longest list, or in pages that all streams share: each cell for both, in one run.

S streams · D width · H heads · K key · W window patches · L places, W + 1 · R marks
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import HEADS, MARKS, RESULTS, WIDTH, WINDOW, graph_ms, record
from hamts.ops.compact import bucket
from hamts.ops.kernels import Kernels
from hamts.ops.pages import PagedStore
from hamts.ops.stores import STORES, EntryKind, PaddedStore, Store

HISTORY, TAPS = 65_536, 4
KIND = EntryKind(HEADS, WIDTH, WIDTH, marks=MARKS, dtype=torch.bfloat16)
# streams, share of the history kept, ragged?; the most telling first
CELLS = [(streams, share, True) for share in (0.1, 0.25, 0.02) for streams in (256, 1024, 64, 1)]
CELLS += [(256, 0.1, False), *((streams, share, True) for streams in (1, 64) for share in (0.0, 0.5, 1.0))]
CELLS += [(1024, share, True) for share in (0.0, 0.05)]


def decode_cells(rates: dict[str, float]) -> list[str]:
    """Measures and records all cells; the names of those that failed, whose result of before is gone too."""
    failed: list[str] = []
    full = full_decode_ms()
    torch.cuda.empty_cache()
    for streams, share, ragged in CELLS:
        for store in STORES:
            suffix = f"{'--ragged' if ragged else ''}{'--paged' if store == 'paged' else ''}"
            name = f"decode--S{streams}--{round(100 * share)}{suffix}"
            try:
                record(name, Streams(streams, share, ragged, store).measured(rates, full if streams == 256 else {}))
            except RuntimeError:
                # one cell that fails must not cost the others, nor may what an earlier run found pass for this one's
                traceback.print_exc()
                (RESULTS / f"{name}.json").unlink(missing_ok=True)
                failed.append(name)
            torch.cuda.empty_cache()
    return failed


def normal(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()


@dataclass(frozen=True)
class Streams:
    """Streams with their scratchpads, windows and states."""

    streams: int
    share: float
    ragged: bool
    store: str = "padded"

    def measured(self, rates: dict[str, float], full: dict[str, Any]) -> dict[str, Any]:
        """What the streams hold and need; milliseconds only where their entries fit the card."""
        about: dict[str, Any] = {
            "streams": self.streams,
            "ragged": self.ragged,
            "history": HISTORY,
            "share": self.share,
            "heads": HEADS,
            "width": WIDTH,
            "window": WINDOW,
            "store": self.store,
            "mean_entries": float(self.counts.float().mean()),
            "most_entries": int(self.counts.max()),
            "live_gib": float(self.counts.sum()) * KIND.entry_bytes() / 2**30,
            "store_gib": self.rows * KIND.entry_bytes() / 2**30,
        }
        try:
            return about | self.cell(rates, full)
        except torch.OutOfMemoryError as problem:
            return about | {"does_not_fit": str(problem)[:120]}

    def cell(self, rates: dict[str, float], full: dict[str, Any]) -> dict[str, Any]:
        torch.cuda.reset_peak_memory_stats()
        read, layer = self.read_step(), self.layer_step()
        with torch.no_grad():
            read()
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.empty_cache()
        step_ms, layer_ms = graph_ms(read), graph_ms(layer)
        moved = 4 * WIDTH * HEADS * float(self.counts.sum() + self.streams * WINDOW)
        cell: dict[str, Any] = {
            "peak_gib": peak,
            "step_ms": step_ms,
            "layer_ms": layer_ms,
            "tokens_per_s": self.streams / step_ms * 1e3,
            "layer_tokens_per_s": self.streams / layer_ms * 1e3,
            "floor_bytes_ms": moved / rates["bytes_per_s"] * 1e3,
        }
        if full:
            cell |= full
            cell["times_as_many_tokens_per_s"] = min(full["full_ms"].values()) / step_ms
        return cell

    @cached_property
    def counts(self) -> torch.Tensor:
        """Entries of each stream: the share on average; where ragged, a few streams have three times as many."""
        mean = self.share * HISTORY
        if not self.ragged:
            return torch.full((self.streams,), int(mean))
        draws = torch.randn(self.streams, generator=torch.Generator().manual_seed(0)).mul(0.6).exp()  # [S]
        return (draws / draws.mean() * mean).clamp(max=min(3 * mean, HISTORY)).long()

    @property
    def rows(self) -> int:
        """Rows that the store has room for, and 64 more entries of every stream."""
        if self.store == "padded":
            return self.streams * bucket(int(self.counts.max()) + 64)
        return 64 * (1 + int((-(-(self.counts + 64) // 64)).sum()))

    @cached_property
    def kept(self) -> Store:
        """The store, full of numbers; pages lie in no order, as after many steps."""
        most = int(self.counts.max()) + 64
        if self.store == "padded":
            store: Store = PaddedStore(KIND, self.streams, device="cuda", room=most)
            store.past.copy_(self.counts)
        else:
            pages = self.rows // 64 - 1
            paged = PagedStore(
                KIND, self.streams, device="cuda", room=bucket(most), pages=pages, kernel="triton"
            )  # fmt: skip
            paged.allot(self.counts)
            order = torch.randperm(paged.pages, generator=torch.Generator().manual_seed(1))
            order = torch.cat([order, torch.tensor([paged.pages])]).to("cuda", torch.int32)  # [P + 1]
            paged.table, paged.free = order[paged.table.long()], order[paged.free.long()]
            store = paged
        for buffer in store.buffers.values():
            buffer.normal_()
        return store

    @cached_property
    def local(self) -> dict[str, torch.Tensor]:
        places = (self.streams, WINDOW + 1, 1)
        marks = torch.randn(*places, MARKS, device="cuda")
        return {"keys": normal(*places, HEADS, WIDTH), "values": normal(*places, HEADS, WIDTH), "marks": marks}

    def read_step(self) -> Callable[..., torch.Tensor]:
        """What leaves the window is appended; then one patch reads."""
        S, store, local = self.streams, self.kept, self.local
        queries = normal(S, 1, 1, HEADS, WIDTH) * WIDTH**-0.5
        accepted = torch.ones(S, 1, dtype=torch.bool, device="cuda")
        scale, bias = torch.randn(HEADS, device="cuda"), torch.zeros(S, 1, device="cuda")
        present = torch.ones(S, WINDOW + 1, 1, dtype=torch.bool, device="cuda")
        readable, channel_bias = torch.ones(S, 1, 1, dtype=torch.bool, device="cuda"), torch.ones(HEADS, device="cuda")
        before = {name: getattr(store, name) for name in ("past", "n_free") if hasattr(store, name)}
        before = {name: tensor.clone() for name, tensor in before.items()}

        def step(asked: torch.Tensor = queries) -> torch.Tensor:
            # so that every repeat appends and reads as much
            for name, tensor in before.items():
                getattr(store, name).copy_(tensor)
            store.append_({name: x[:, 0] for name, x in local.items()} | {"bias": bias}, accepted)
            return store.read(
                asked,
                **{f"local_{name}": x for name, x in local.items()},
                local_present=present,
                readable=readable,
                channel_bias=channel_bias,
                head_bias=scale,
                window=WINDOW,
                kernels=Kernels("triton"),
            ).output

        return step

    def layer_step(self) -> Callable[[], torch.Tensor]:
        """Projections, convolution, recurrence, append, read, gates: what a layer computes for one token."""
        from hamts.ops.gated_delta_fla import gated_delta_step

        S, D = self.streams, HEADS * WIDTH
        x, tail, taps = normal(S, D), normal(S, TAPS - 1, 3 * D), normal(TAPS, 3 * D)
        to_memory, to_query, to_opened, to_output = (normal(n * D, D) * D**-0.5 for n in (3, 1, 1, 1))
        to_gates = normal(4 * HEADS, D) * D**-0.5
        state, local, read = torch.zeros(S, HEADS, WIDTH, WIDTH, device="cuda"), self.local, self.read_step()

        def step() -> torch.Tensor:
            mixed = F.linear(x, to_memory)  # [S, 3 D]
            padded = torch.cat([tail, mixed[:, None]], 1)  # [S, taps, 3 D]
            q, k, v = F.silu((padded * taps).sum(1)).view(S, 1, 3, HEADS, WIDTH).unbind(2)  # 3 x [S, 1, H, K]
            gates = F.linear(x, to_gates).float().view(S, 1, 4, HEADS)  # [S, 1, 4, H]
            got = gated_delta_step(
                F.normalize(q, dim=-1),
                F.normalize(k, dim=-1),
                v,
                log_decay=-F.softplus(gates[:, :, 0]),
                beta=gates[:, :, 1].sigmoid(),
                initial_state=state,
            )
            state.copy_(got.state)
            tail.copy_(padded[:, 1:])
            raw = dict(zip(("keys", "values"), mixed.view(S, 3, HEADS, WIDTH)[:, 1:].unbind(1), strict=True))
            raw["keys"] = F.rms_norm(raw["keys"], (WIDTH,))
            for name, new in raw.items():
                local[name].copy_(torch.cat([local[name][:, 1:], new[:, None, None]], 1))
            asked = F.rms_norm(F.linear(x, to_query).view(S, 1, 1, HEADS, WIDTH), (WIDTH,)) * WIDTH**-0.5
            exact = F.rms_norm(read(asked)[:, 0], (WIDTH,))  # [S, 1, H, K]
            both = gates[:, :, 2, :, None].sigmoid() * F.rms_norm(got.output, (WIDTH,)).float()
            both = both + gates[:, :, 3, :, None].sigmoid() * exact.float()  # [S, 1, H, K]
            return F.linear(both.flatten(1).to(x.dtype) * F.linear(x, to_opened).sigmoid(), to_output)

        return step


def full_decode_ms() -> dict[str, Any]:
    """Attention of one query of 256 streams over the whole history by the ways PyTorch has, each in a graph.

    Where their keys and values leave no room, half as many streams, counted twice: their bytes bound the time.
    """
    for streams in (256, 128):
        try:
            keys, values = normal(streams, HEADS, HISTORY, WIDTH), normal(streams, HEADS, HISTORY, WIDTH)
            found = _full_ms(keys, values)
        except torch.OutOfMemoryError:
            found = {}
        keys = values = torch.empty(0)
        torch.cuda.empty_cache()
        if found:
            return {"full_ms": {name: ms * 256 / streams for name, ms in found.items()}, "full_streams": streams}
    return {}


def _full_ms(keys: torch.Tensor, values: torch.Tensor) -> dict[str, float]:
    streams = keys.shape[0]
    query, new = normal(streams, HEADS, 1, WIDTH), normal(streams, HEADS, 1, WIDTH)
    found = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def step(backend: SDPBackend = backend) -> torch.Tensor:
            keys[:, :, -1:] = new
            values[:, :, -1:] = new
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, keys, values)

        try:
            found[backend.name.split("_")[0].lower()] = graph_ms(step)
        except RuntimeError as problem:
            print("full decode", streams, backend.name, "fails:", str(problem)[:100], flush=True)
    return found
