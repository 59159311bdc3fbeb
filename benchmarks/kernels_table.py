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
    store_table()
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
    return sorted(cells, key=lambda c: (c["streams"], c["share"], c["ragged"], c.get("store", "padded")))


def card(cell: dict[str, Any]) -> str:
    """Of which kind the device was, in short."""
    return str(cell["device"].split()[1])


def decode_table() -> None:
    """Steps at the size that has a bound, and those of the versions before."""
    print("\n| version, card | store | streams | entries mean / most | read ms | floor bytes ms | tokens/s |", end="")
    print(" full ms | times |\n|---|---|---|---|---|---|---|---|---|")
    for version, place in (("second", "second"), ("fifth", "fifth"), ("this", "h200"), ("this", ".")):
        for c in steps(RESULTS / place):
            if c["share"] != 0.1 or "step_ms" not in c:
                continue
            full = "-"
            if "full_ms" in c:
                full = f"{min(c['full_ms'].values()):.2f}"
            elif "full_cudnn_ms" in c:
                full = f"{min(c[name] for name in c if name.startswith('full_')):.2f}"
            times = f"{c['times_as_many_tokens_per_s']:.1f}" if "times_as_many_tokens_per_s" in c else "-"
            print(
                f"| {version}, {card(c)} | {c.get('store', 'padded')} | {c['streams']:,} |"
                f" {c['mean_entries']:,.0f} / {c['most_entries']:,} | {c['step_ms']:.3f} | {c['floor_bytes_ms']:.3f} |"
                f" {c['tokens_per_s']:,.0f} | {full} | {times} |"
            )


def by_store(ragged: bool = True) -> dict[tuple[float, int], dict[str, dict[str, Any]]]:
    """Cells of the last version: share and streams -> store -> cell."""
    found: dict[tuple[float, int], dict[str, dict[str, Any]]] = {}
    for c in steps():
        if c["ragged"] == ragged and "store" in c:
            found.setdefault((c["share"], c["streams"]), {})[c["store"]] = c
    return dict(sorted(found.items()))


def store_table() -> None:
    """Padded lists and pages beside each other: what they hold, and a step's milliseconds."""
    print(
        "\n| kept | streams | live GiB | padded: GiB, read / layer ms | paged: GiB, read / layer ms | paged / padded |"
    )
    print("|---|---|---|---|---|---|")
    for (share, streams), cells in by_store().items():
        if share == 0.0 or len(cells) < 2:
            continue
        shown = [
            f"{c['store_gib']:.2f}, {c['step_ms']:.3f} / {c['layer_ms']:.3f}"
            if "step_ms" in c
            else f"{c['store_gib']:.1f}, does not fit"
            for c in (cells["padded"], cells["paged"])
        ]
        both = all("step_ms" in c for c in cells.values())
        ratio = f"{cells['paged']['step_ms'] / cells['padded']['step_ms']:.2f}" if both else "-"
        print(f"| {share:.0%} | {streams:,} | {cells['paged']['live_gib']:.2f} | {' | '.join(shown)} | {ratio} |")


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
    cells = by_store()
    counts = (1, 64, 256, 1024)
    print("\n| kept | " + " | ".join(f"layer ms padded / paged, {n:,} streams" for n in counts) + " |", end="")
    print(" " + " | ".join(f"recall right, `{name}`" for name in models) + " |")
    print("|---|" + "---|" * (len(counts) + len(models)))
    for share in sorted({share for share, _ in cells}):
        times = []
        for streams in counts:
            found = cells.get((share, streams), {})
            both = [found.get(store, {}) for store in ("padded", "paged")]
            each = [f"{c['layer_ms']:.3f}" if "layer_ms" in c else "does not fit" if c else "-" for c in both]
            times.append(" / ".join(each) if found else "-")
        recalled = [f"{known[share]:.3f}" if share in known else "-" for known in models.values()]
        print(f"| {share:.0%} | {' | '.join(times + recalled)} |")
