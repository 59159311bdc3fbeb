"""What ``benchmarks/kernels.py`` has measured, as tables. Needs no device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.kernels import ATTEMPTS, HEADS, RESULTS, TOKENS, WIDTH, WINDOW, cells_of

RECALL = Path(__file__).parent / "results" / "recall"
# products of 64 wide rows that a kernel needs for a pair of query and key
PRODUCTS = {"forward": 2, "query_grad": 3, "entry_grad": 4, "local_grad": 4}


def table() -> None:
    read_table()
    attempts_table()
    tiles_table()
    flex_table()
    decode_table()
    budget_table()


def of_attempts(pattern: str) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    """Cells of every version, oldest first; an attempt without any is left out."""
    folders = [(name, RESULTS / name) for name in ATTEMPTS] + [("this", RESULTS)]
    return [(name, found) for name, folder in folders if (found := cells_of(pattern, folder))]


def by_size(cells: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(cells.items(), key=lambda cell: (cell[1]["n_patches"], -cell[1]["share"]))


def read_table() -> None:
    cells = by_size(cells_of("attention--*.json"))
    if not cells:
        return
    print(f"\n{cells[0][1]['device']}, {cells[0][1]['date']}\n")
    print(
        "| patches | kept | read fwd / fwd+bwd ms | with masses | cuDNN full fwd / fwd+bwd ms | ratio | at most |",
        end="",
    )
    print(" floor ops / bytes ms |")
    print("|---|---|---|---|---|---|---|---|")
    for _, c in cells:
        bound = "-" if c["bound"] is None else f"{c['bound']:.2f}"
        print(
            f"| {c['n_patches']:,} | {c['share']:.0%} | {c['forward_ms']:.2f} / {c['both_ms']:.2f} |"
            f" {c['both_with_masses_ms']:.2f} | {c['full_forward_ms']:.2f} / {c['full_both_ms']:.2f} |"
            f" {c['ratio']:.3f} | {bound} | {c['floor_operations_ms']:.2f} / {c['floor_bytes_ms']:.2f} |"
        )


def attempts_table() -> None:
    attempts = of_attempts("attention--*.json")
    names = [name for name, c in by_size(attempts[-1][1]) if c["bound"] is not None]
    print("\n| version | card | " + " | ".join(name.removeprefix("attention--") for name in names) + " |")
    print("|---|---|" + "---|" * len(names))
    for version, cells in attempts:
        ratios = [f"{cells[name]['ratio']:.3f}" if name in cells else "-" for name in names]
        print(f"| {version} | {next(iter(cells.values()))['device']} | {' | '.join(ratios)} |")


def pairs(n_patches: int, share: float, kernel: str) -> float:
    of_window = TOKENS * WINDOW
    of_entries = TOKENS * share * (n_patches - WINDOW) / 2
    return HEADS * {"entry_grad": of_entries, "local_grad": of_window}.get(kernel, of_entries + of_window)


def tiles_table() -> None:
    """Milliseconds of each kernel with its best tiles, and what share of the rate of matrix products it reaches."""
    print("\n| version, size | forward | query_grad | entry_grad | local_grad | sum | mass |")
    print("|---|---|---|---|---|---|---|")
    for version, cells in of_attempts("tiles--*.json"):
        folder = RESULTS if version == "this" else RESULTS / version
        rates = cells_of("ceilings.json", folder)
        rate = rates["ceilings"]["flops_per_s"] if rates else None
        for name, cell in cells.items():
            n_patches, percent = (int(part.strip("T")) for part in name.split("--")[1:])
            best = {kernel: min(times.values()) for kernel, times in cell["milliseconds"].items()}
            shown = []
            for kernel, products in PRODUCTS.items():
                done = 2 * WIDTH * products * pairs(n_patches, percent / 100, kernel)
                reached = "" if rate is None else f" ({done / best[kernel] * 1e3 / rate:.0%})"
                shown.append(f"{best[kernel]:.2f}{reached}")
            total = sum(best[kernel] for kernel in PRODUCTS)
            print(f"| {version}, {n_patches:,} / {percent}% | {' | '.join(shown)} | {total:.2f} | {best['mass']:.2f} |")


def flex_table() -> None:
    """FlexAttention beside the read of the same run."""
    print("\n| version, size | Flex fwd / fwd+bwd ms, no window, biases or marks | read fwd / fwd+bwd ms |")
    print("|---|---|---|")
    for version, cells in of_attempts("flex--*.json"):
        reads = cells_of("attention--*.json", RESULTS if version == "this" else RESULTS / version)
        for name, c in by_size(cells):
            read = reads.get(name.replace("flex", "attention"))
            ours = "-" if read is None else f"{read['forward_ms']:.2f} / {read['both_ms']:.2f}"
            size = f"{c['n_patches']:,} / {c['share']:.0%}"
            print(f"| {version}, {size} | {c['forward_ms']:.2f} / {c['both_ms']:.2f} | {ours} |")


def steps(folder: Path = RESULTS) -> list[dict[str, Any]]:
    cells = cells_of("decode--*.json", folder).values()
    return sorted(cells, key=lambda cell: (cell["streams"], cell["share"], cell["ragged"]))


def decode_table() -> None:
    """Steps at the size that has a bound, and those of the version before."""
    print("\n| version | streams | entries mean / most | read ms | floor bytes ms | tokens/s | full ms | times |")
    print("|---|---|---|---|---|---|---|---|")
    for version, folder in (("second", RESULTS / "second"), ("this", RESULTS)):
        for c in steps(folder):
            if c["share"] != 0.1:
                continue
            full = "-"
            if "full_ms" in c:
                full = f"{min(c['full_ms'].values()):.2f}"
            elif "full_cudnn_ms" in c:
                full = f"{min(c[name] for name in c if name.startswith('full_')):.2f}"
            times = f"{c['times_as_many_tokens_per_s']:.1f}" if "times_as_many_tokens_per_s" in c else "-"
            print(
                f"| {version} | {c['streams']:,} | {c['mean_entries']:,.0f} / {c['most_entries']:,} |"
                f" {c['step_ms']:.3f} | {c['floor_bytes_ms']:.3f} | {c['tokens_per_s']:,.0f} | {full} | {times} |"
            )


def right(model: str) -> dict[float, float]:
    """Share of queries right on recall over 4,096 tokens, by usage, of a model that ``recall.py`` trained."""
    path = RECALL / f"dense--{model}--lr0.003--seed0.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    return {
        row["usage"]: row["accuracy"]
        for row in rows
        if row["length"] == 4096 and row["task"] == "recall" and row["memory"] == "model"
    }


def budget_table() -> None:
    """Milliseconds a step of a layer at each share, beside what a trained model of other size recalls at that share."""
    models = {name: right(name) for name in ("surprise-shared", "learned")}
    by_share: dict[float, dict[int, dict[str, Any]]] = {}
    for c in steps():
        if c["ragged"]:
            by_share.setdefault(c["share"], {})[c["streams"]] = c
    counts = (1, 64, 1024)
    print("\n| kept | " + " | ".join(f"layer (read) ms, {n:,} streams" for n in counts) + " |", end="")
    print(" " + " | ".join(f"recall right, `{name}`" for name in models) + " |")
    print("|---|" + "---|" * (len(counts) + len(models)))
    for share, found in sorted(by_share.items()):
        times = [f"{found[n]['layer_ms']:.3f} ({found[n]['step_ms']:.3f})" if n in found else "-" for n in counts]
        recalled = [f"{known[share]:.3f}" if share in known else "-" for known in models.values()]
        print(f"| {share:.0%} | {' | '.join(times + recalled)} |")
