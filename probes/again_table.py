"""Networks that were asked again in one table: skill, recall above chance and bytes, rung by rung."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from probes.summary import score_table

__all__ = ["again_markdown", "asked_again", "told_by"]

COLUMNS = 6


def told_by(documents: Sequence[dict[str, Any]], *, lines: bool, splits: bool) -> str:
    """The table of some documents: splits of layers, every line, or answers to the open questions."""
    from probes.again_splits import split_markdown
    from probes.answers import answers_markdown

    if splits:
        return split_markdown(documents)
    return again_markdown(documents) if lines or asked_again(documents) else answers_markdown(documents)


def asked_again(documents: Sequence[dict[str, Any]]) -> bool:
    """Whether all results are of networks that were asked otherwise than they were trained."""
    return bool(documents) and all(content["identity"].get("axis") for content in documents)


def again_markdown(documents: Sequence[dict[str, Any]]) -> str:
    """Of each budget a table: lines by rungs, skill with its interval over seeds and sequences, recall, kB."""
    scores = score_table(documents)
    rungs = list(dict.fromkeys(scores["rung"]))
    parts = []
    for budget in sorted(scores["budget"].unique(), reverse=True):
        here = scores[scores["budget"] == budget].set_index(["line", "rung"])
        lines = sorted({line for line, _ in here.index})
        for first in range(0, len(rungs), COLUMNS):
            some = rungs[first : first + COLUMNS]
            rows = [[line, *(_cell(here, line, rung) for rung in some)] for line in lines]
            rows = [row for row in rows if any(row[1:])]
            if rows:
                head = ["", *some]
                parts.append("\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]))
        parts[-1] += (
            f"\n\n*At {budget:g} x the critical rows: skill [95 % over seeds and sequences; over seeds alone"
            " where no errors of sequences are there], recall above chance, kB.*"
        )
    return "\n\n".join(parts)


def _cell(scores: Any, line: str, rung: str) -> str:
    if (line, rung) not in scores.index:
        return ""
    row = scores.loc[(line, rung)]
    recall = "" if math.isnan(row["recall"]) else f" r {row['recall']:.2f}"
    return f"{row['skill']:.2f} [{row['low']:.2f}, {row['high']:.2f}]{recall} {row['bytes'] / 1000:.0f} kB"
