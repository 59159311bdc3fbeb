"""Speed on a GPU of the recurrence with its error, of a whole layer, and of training: each beside its rival.

Run ``python -m benchmarks.training`` from the clone on a machine with a CUDA device and the extra ``gpu``. Every cell
is written to ``benchmarks/results/training`` as it is measured and not measured again unless ``--again`` is given.
``--cells delta,layer`` measures some of them, ``--table`` prints what is there.

delta   the gated delta rule with its prediction error, against the library's own op without it
layer   a whole HAM layer, forward and backward, against full attention by cuDNN with the same projections, gate,
        norms and rotations, these by hamts' own kernels too; ``compiled``: by torch's compiler instead, in both
fit     steps of training of the preset ``base`` on contexts of 512 patches of seven channels: on kernels, the same
        recorded as a CUDA graph, on plain torch, and a full-attention network of the same size that sees the same
        patches (PatchTST-like)

Times are medians by device events after warming up. Beside each stand the floating-point operations it must do and the
bytes it must move, over what the device did of each in the same run: no version runs faster than that floor.

B items · N patches · D width · H heads · K head width
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.training_fit import fit_cell
from benchmarks.training_layer import HEADS, TOKENS, WIDTH, WINDOW, delta_cell, layer_cell
from benchmarks.training_timing import REPEATS, ceilings, versions

RESULTS = Path(__file__).parent / "results" / "training"
DELTA_LENGTHS, LAYER_LENGTHS, LAYER_SHARES = (4_096, 16_384, 65_536), (8_192, 16_384, 65_536), (0.25, 0.10)
FITS = ("kernels-graphs", "kernels", "torch-bf16", "torch-fp32", "patchtst")

# folders of earlier measured versions
EARLIER = ("first", "second")
LAYER_BOUNDS = {"layer-n8192-share25": 1.0, "layer-n16384-share25": 0.75, "layer-n65536-share25": 0.45}


def cells() -> dict[str, Callable[[dict[str, float]], dict[str, Any]]]:
    table: dict[str, Callable[[dict[str, float]], dict[str, Any]]] = {}
    for length in DELTA_LENGTHS:
        table[f"delta-n{length}"] = lambda most, n=length: delta_cell(n, most)  # type: ignore[misc]
    for share in LAYER_SHARES:
        for length in LAYER_LENGTHS:
            name = f"layer-n{length}-share{round(100 * share)}"
            table[name] = lambda most, n=length, s=share: layer_cell(n, s, most, "none")  # type: ignore[misc]
            table[f"{name}-compiled"] = lambda most, n=length, s=share: layer_cell(n, s, most, "default")  # type: ignore[misc]
    for kind in FITS:
        table[f"fit-{kind}"] = lambda most, k=kind: fit_cell(k, most)  # type: ignore[misc]
    return table


def chosen(part: str, names: Iterable[str]) -> list[str]:
    """The cell of that name, or those whose names begin so."""
    return [part] if part in names else [name for name in names if name.startswith(part)]


def measure(args: argparse.Namespace) -> None:
    most: dict[str, float] | None = None
    known = cells()
    asked = [name for part in args.cells.split(",") for name in chosen(part, known)]
    for name in dict.fromkeys(asked):
        build, path = known[name], args.results / f"{name}.json"
        if path.exists() and not args.again:
            continue
        most = most or ceilings()
        gc.collect()
        torch.cuda.empty_cache()
        torch._dynamo.reset()
        began = time.perf_counter()
        try:
            found = build(most)
        except Exception as error:  # noqa: BLE001 - one cell that fails must not cost the others
            traceback.print_exc()
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        about = {
            "cell": name, "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "device": torch.cuda.get_device_name(), "versions": versions(), "ceilings": most, "seed": 0,
            "sizes": {"tokens": TOKENS, "width": WIDTH, "heads": HEADS, "window": WINDOW, "repeats": REPEATS},
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about | found, indent=1) + "\n")
        print(f"# {name}: {time.perf_counter() - began:.0f} s", flush=True)


def table(results: Path) -> str:
    """Every cell that was measured, as Markdown."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}
    lines = [
        "| cell | rows: forward / both ms, peak GiB | floor both ms | ratio | memory | recorded, ham / full ms |",
        "|---|---|---|---|---|---|",
    ]
    for name in cells():
        cell = found.get(name)
        if cell is None or "rows" not in cell:
            continue
        rows = "; ".join(
            f"{row} {t['forward_ms']:.2f} / {t['both_ms']:.2f}, {t['peak_gib']:.2f}" for row, t in cell["rows"].items()
        )
        memory = f"{cell['ratio_memory']:.2f}" if "ratio_memory" in cell else ""
        replayed = cell.get("recorded_both_ms")
        memory += f" | {replayed['ham']:.2f} / {min(list(replayed.values())[1:]):.2f}" if replayed else " | "
        lines.append(f"| {name} | {rows} | {cell['floor_ms']['both']:.2f} | {cell['ratio']:.2f} | {memory} |")
    lines += ["", *ratios(found)]
    lines += [
        "",
        "| fit | steps/s | patches/s | kernels / wall | kernels, wall, host ms | ran"
        " | idle under 5, to 100, above us: ms | peak GiB | reserved GiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in cells():
        cell = found.get(name)
        if cell is None or "steps_per_s" not in cell:
            continue
        times = [cell.get(name) for name in ("kernel_ms", "wall_ms", "host_ms")]
        spent = ", ".join("-" if ms is None else f"{ms:.0f}" for ms in times)
        ran = f"{cell['ran']:,.0f}" if "ran" in cell else "-"
        idle = ", ".join(f"{ms:.1f}" for ms in cell["idle_ms"].values()) if "idle_ms" in cell else "-"
        reserved = f"{cell['reserved_gib']:.1f}" if "reserved_gib" in cell else "-"
        lines.append(
            f"| {name} | {cell['steps_per_s']:.2f} | {cell['patches_per_s']:,.0f} | {cell['kernel_share']:.0%}"
            f" | {spent} | {ran} | {idle} | {cell['peak_gib']:.1f} | {reserved} |"
        )
    missing = [name for name in cells() if name not in found]
    return "\n".join([*lines, *([f"\nNot run: {', '.join(missing)}."] if missing else [])])


def ratios(found: dict[str, Any]) -> list[str]:
    """The layer against both rivals, recorded and launched."""
    lines = [
        "| layer | recorded, against norms fused | against plain norms | against a compiled rival, of another run"
        " | launched, fused | launched, plain | at most |",
        "|---|---|---|---|---|---|---|",
    ]
    plain, fused = "cudnn attention", "cudnn attention, norms fused"
    for name in cells():
        cell = found.get(name)
        if cell is None or not cell.get("recorded_both_ms"):
            continue
        replayed, rows = cell["recorded_both_ms"], cell["rows"]
        every = [replayed["ham"] / replayed[rival] for rival in (fused, plain)]
        compiled = found.get(f"{name}-compiled")
        # a compiled layer launches few kernels and is not recorded
        rival = min(compiled["rows"][row]["both_ms"] for row in (fused, plain)) if compiled else math.nan
        every.append(replayed["ham"] / rival)
        every += [rows["ham"]["both_ms"] / rows[rival]["both_ms"] for rival in (fused, plain)]
        bound = LAYER_BOUNDS.get(name)
        numbers = " | ".join("-" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in every)
        lines.append(f"| {name} | {numbers} | {'-' if bound is None else f'{bound:.2f}'} |")
    return lines


def attempts(results: Path) -> str:
    """Every measured version of the layer and of a recorded fit, the last one in the folder itself."""
    folders = [results / name for name in EARLIER if (results / name).is_dir()] + [results]
    plain, fused = "cudnn attention", "cudnn attention, norms fused"
    lines = [
        "| version | " + " | ".join(f"{name}, against plain / fused norms" for name in LAYER_BOUNDS)
        + " | kernels / wall | steps/s |",
        "|" + "---|" * (len(LAYER_BOUNDS) + 3),
    ]  # fmt: skip
    for folder in folders:
        found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
        row = [folder.name if folder != results else "last"]
        for name in LAYER_BOUNDS:
            replayed = found[name]["recorded_both_ms"]
            row.append(f"{replayed['ham'] / replayed[plain]:.3f} / {replayed['ham'] / replayed[fused]:.3f}")
        fit = found["fit-kernels-graphs"]
        lines.append(f"| {' | '.join(row)} | {fit['kernel_share']:.1%} | {fit['steps_per_s']:.2f} |")
    bounds = " | ".join(f"{bound:.2f}" for bound in LAYER_BOUNDS.values())
    return "\n".join([*lines, f"| asked | {bounds} | 85% | |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument(
        "--cells", default="", help="cells of these names, or whose names begin so, by commas, in this order"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.table:
        measure(args)
    print(table(args.results))
    print(f"\n{attempts(args.results)}")


if __name__ == "__main__":
    main()
