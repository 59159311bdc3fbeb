"""What another split of a total of entries over layers changes, against the even one of the same networks.

``hamts probes table DIR --splits``; a state of as many bytes stands beside it where its runs are there (``--also``).

S networks · n sequences, or means of a few
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hamts.errors import DataError
from probes.answers_more import markdown_rows
from probes.axes import parts_of
from probes.packed import sequence_errors
from probes.stats import Difference, mean_interval, paired_difference
from probes.summary import best_rates

__all__ = ["split_markdown"]

PREFIX, ALIKE = "layers ", "alike"
SPLITS = {"learned": "best on validation", "first": "all in the first", "last": "all in the last"}
RESAMPLES = 1_000
HEAD = ["rung", "line", "split", "budget", "kB", "entries of the layers", "alike", "as split", "gain",
        "state, equal bytes", "as split - state"]  # fmt: skip
MEAN_HEAD = ["line", "split", "budget", "rungs", "alike", "as split", "state, equal bytes", "worst as split"]
# a line of a rung at a budget: split, seed -> document
Runs = dict[tuple[str, str, float], dict[str, dict[int, dict[str, Any]]]]


@dataclass(frozen=True)
class Pair:
    """Networks of a line that were asked with another split, and with the even one."""

    rung: str
    line: str
    split: str
    budget: float
    here: list[dict[str, Any]]
    tables: list[np.ndarray]  # skill as split, alike, and of a state of as many bytes where it ran, [S, n] each


def split_markdown(documents: Sequence[dict[str, Any]]) -> str:
    """One row for each rung, line, budget and split; below, means over rungs.

    Raises:
        DataError: E-PROBE-COMPARE, no network was asked both ways.
    """
    pairs = _pairs(documents)
    if not pairs:
        raise DataError(
            "E-PROBE-COMPARE", "No network was asked with its entries shared alike and otherwise.",
            fix="hamts probes evaluate DIR --layers learned, then table DIR --splits.",
        )  # fmt: skip
    text = markdown_rows(HEAD, [_row(pair) for pair in pairs])
    means = _means(pairs)
    return text if not means else f"{text}\n\n{markdown_rows(MEAN_HEAD, means)}"


def _pairs(documents: Sequence[dict[str, Any]]) -> list[Pair]:
    runs, states = _runs(documents)
    found = []
    for (rung, line, budget), splits in sorted(runs.items()):
        for split in sorted(set(splits) - {ALIKE}):
            seeds = sorted(set(splits[split]) & set(splits.get(ALIKE, {})))
            if not seeds:
                continue
            groups = [[splits[name][seed] for seed in seeds] for name in (split, ALIKE)]
            wide = states.get((rung, budget), {})
            if set(seeds) <= set(wide):
                groups.append([wide[seed] for seed in seeds])
            found.append(Pair(rung, line, split, budget, groups[0], _skills(groups)))
    return found


def _means(pairs: Sequence[Pair]) -> list[list[str]]:
    """Over the rungs where a state of as many bytes ran, one weight each; intervals over seeds, rung by rung."""
    rows = []
    lines = {(pair.line, pair.split, pair.budget): None for pair in pairs}
    for line, split, budget in sorted(lines, key=lambda key: (key[0], key[1], key[2])):
        some = [p for p in pairs if (p.line, p.split, p.budget) == (line, split, budget) and len(p.tables) > 2]
        if len(some) < 2:
            continue
        rng = np.random.default_rng(0)
        drawn = np.zeros((3, RESAMPLES))
        for pair in some:
            seeds = np.stack([table.mean(1) for table in pair.tables])  # [3, S]
            drawn += seeds[:, rng.integers(seeds.shape[1], size=(RESAMPLES, seeds.shape[1]))].mean(2) / len(some)
        values = [float(np.mean([pair.tables[place].mean() for pair in some])) for place in range(3)]
        told = [
            f"{value:.2f} [{np.quantile(draws, 0.025):.2f}, {np.quantile(draws, 0.975):.2f}]"
            for value, draws in zip(values, drawn, strict=True)
        ]
        worst = min(some, key=lambda pair: pair.tables[0].mean())
        rows.append([line, SPLITS[split], f"{budget:g}", str(len(some)), told[1], told[0], told[2],
                     f"{worst.tables[0].mean():.2f} {worst.rung}"])  # fmt: skip
    return rows


def _runs(documents: Sequence[dict[str, Any]]) -> tuple[Runs, dict[tuple[str, float], dict[int, dict[str, Any]]]]:
    """HAM's runs by split, and those of states of equal bytes by seed."""
    runs: Runs = {}
    states: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for content in best_rates(documents):
        identity, budget = content["identity"], float(content["budget"]["frac"])
        if identity["tier"] != "T1" or content["budget"].get("dtype", "float32") != "float32":
            continue
        words, seed = parts_of(str(identity.get("axis", ""))), content["data_manifest"]["train_seed"]
        if identity["model"] == "recurrent_wide" and not words:
            states.setdefault((identity["rung"], budget), {})[seed] = content
        if identity["model"] != "ham":
            continue
        split = next((word.removeprefix(PREFIX) for word in words if word.startswith(PREFIX)), ALIKE)
        others = [word for word in words if not word.startswith(PREFIX)]
        line = identity["router"] + (f" [{', '.join(others)}]" if others else "")
        runs.setdefault((identity["rung"], line, budget), {}).setdefault(split, {})[seed] = content
    return runs, states


def _row(pair: Pair) -> list[str]:
    here, tables = pair.here, pair.tables
    counts = Counter("+".join(str(rows) for rows in content["budget"]["layer_rows"]) for content in here)
    cells = [pair.rung, pair.line, SPLITS[pair.split], f"{pair.budget:g}",
             f"{np.mean([c['budget']['bytes_total'] for c in here]) / 1000:.1f}",
             ", ".join(f"{many} x {told}" for told, many in counts.most_common())]  # fmt: skip
    cells += [_told(tables[1]), _told(tables[0]), _gain(tables[0], tables[1])]
    return cells + ([_told(tables[2]), _gain(tables[0], tables[2])] if len(tables) > 2 else ["", ""])


def _skills(groups: Sequence[Sequence[dict[str, Any]]]) -> list[np.ndarray]:
    """Skill on the sequences that all were asked, [S, n] each: streams come in order, some runs have fewer."""
    found = [[sequence_errors(content) for content in group] for group in groups]
    lengths = [len(part) for parts in found for part in parts if part is not None]
    if any(part is None for parts in found for part in parts):
        raise DataError(
            "E-PROBE-COMPARE", "The errors of single sequences are lost.",
            fix="Copy the .npz files that lie beside the documents, or run them again.",
        )  # fmt: skip
    # floors of the first group, so that a difference is one of errors
    floors = [content["floor"]["mse"] for content in groups[0]]
    return [
        np.stack(
            [1.0 - part[: min(lengths)] / floor for part, floor in zip(parts, floors, strict=True) if part is not None]
        )
        for parts in found
    ]


def _told(table: np.ndarray) -> str:
    found = mean_interval(table, resamples=RESAMPLES)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _gain(first: np.ndarray, second: np.ndarray) -> str:
    found: Difference = paired_difference(first, second, higher_is_better=True, resamples=RESAMPLES)
    flag = f" ({len(first)} seeds)" if found.flag else ""
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}] {found.verdict}{flag}"
