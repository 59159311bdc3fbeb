"""What a results table says about the open questions, as Markdown with intervals: ``hamts probes table``.

Everything is computed from the documents of a folder. Intervals are 95 %, over training seeds and sequences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from probes.answers_more import gates, kinds, markdown_rows, permuted, services, unranked
from probes.gates_trained import SOLVED
from probes.packed import sequence_errors
from probes.stats import Difference, Estimate, holm, mean_interval, paired_difference
from probes.summary import seeds_of, value

__all__ = ["Results", "answers_markdown", "write_between"]

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
ORACLES = ("oracle",)
CONTROLS = ("random", "shuffled", "stride", "recency")
GOAL, GOAL_RUNGS, GOAL_BUDGET = 0.95, ("der", "xcb", "act", "pbcD", "pbcS"), 2.0
RESAMPLES = 1_000
LEVEL = 0.05
# columns of a table; more are another table below it
RUNGS_TOGETHER = 9
STAGES = {"fail_write": "write", "fail_read": "read", "fail_decode": "decode"}
RUNGS = (
    "der", "derD", "exo", "xcb", "xcbF", "xcbG", "xcbC", "xcbP", "rrr", "act", "actS", "topoG", "topo", "topo2", "pbc0",
    "pbcD", "pbcS", "pbcA", "pbcR",
)  # fmt: skip


@dataclass(frozen=True)
class Results:
    """Skill of single sequences by rung, line and budget; lines are routers of HAM and names of rivals.

    Attributes:
        left_out: why a line that ran is not among them.
    """

    groups: dict[tuple[str, str, float], list[dict[str, Any]]]
    tables: dict[tuple[str, str, float], np.ndarray]  # [S, n] 1 - error / floor
    left_out: dict[tuple[str, str, float], str]

    @classmethod
    def of(cls, documents: Sequence[dict[str, Any]]) -> Results:
        groups, tables, left_out = {}, {}, {}
        trained = {key: group for key, group in seeds_of(documents).items() if key[0] == "T1"}
        counts = Counter(len(group) for group in trained.values() if len(group) > 1)
        # the usual number: one line with a seed more must not leave out all others
        usual = max(counts, key=lambda count: (counts[count], count), default=1)
        for (_, rung, _, budget), group in trained.items():
            ordered = sorted(group, key=lambda content: content["data_manifest"]["train_seed"])
            identity = ordered[0]["identity"]
            if identity.get("axis"):
                # another width, say: a line of its own, which no question here is about
                continue
            key = (rung, identity["router"] if identity["model"] == "ham" else identity["model"], budget)
            if len(group) < usual:
                # a trial of learning rates, or a line that is not finished
                left_out[key] = f"{len(group)} of {usual} seeds"
                continue
            errors = [sequence_errors(content) for content in ordered]
            if any(part is None for part in errors):
                left_out[key] = "errors of its sequences are lost"
                continue
            groups[key] = ordered
            tables[key] = np.stack([
                1.0 - part / content["floor"]["mse"] for part, content in zip(errors, ordered, strict=True)
                if part is not None
            ])  # fmt: skip
        return cls(groups, tables, left_out)

    @property
    def rungs(self) -> list[str]:
        there = {rung for rung, _, _ in self.groups}
        return [rung for rung in RUNGS if rung in there] + sorted(there - set(RUNGS))

    @property
    def budgets(self) -> list[float]:
        return sorted({budget for _, line, budget in self.groups if line not in self.sizeless})

    @property
    def sizeless(self) -> tuple[str, ...]:
        return ("full", "recurrent", "gdn_gsa", "block_sparse")

    @property
    def routers(self) -> list[str]:
        found = {group[0]["identity"]["router"] for group in self.groups.values()}
        return sorted(found - {"none"}, key=lambda name: (name in ORACLES, name in CONTROLS, name))

    @property
    def candidates(self) -> list[str]:
        """Routers that could be served."""
        return [name for name in self.routers if name not in (*ORACLES, *CONTROLS)]

    def at(self, rung: str, line: str, budget: float) -> np.ndarray | None:
        return self.tables.get((rung, line, 1.0 if line in self.sizeless else budget))

    def seeds(self, rung: str, line: str, budget: float) -> list[int]:
        group = self.groups[rung, line, 1.0 if line in self.sizeless else budget]
        return [content["data_manifest"]["train_seed"] for content in group]

    def estimate(self, rung: str, line: str, budget: float) -> Estimate | None:
        table = self.at(rung, line, budget)
        return None if table is None else mean_interval(table, resamples=RESAMPLES)

    def difference(self, rung: str, first: str, second: str, budget: float) -> Difference | None:
        a, b = self.at(rung, first, budget), self.at(rung, second, budget)
        if a is None or b is None or a.shape[1] != b.shape[1]:
            return None
        own, other = self.seeds(rung, first, budget), self.seeds(rung, second, budget)
        shared = [seed for seed in own if seed in other]
        if not shared:
            return None
        a, b = a[[own.index(seed) for seed in shared]], b[[other.index(seed) for seed in shared]]
        return paired_difference(a, b, higher_is_better=True, resamples=RESAMPLES)

    def mean(self, rung: str, line: str, budget: float, metric: str) -> float:
        group = self.groups.get((rung, line, 1.0 if line in self.sizeless else budget))
        numbers = [value(content, metric) for content in group or []]
        return float(np.nanmean(numbers)) if numbers and not all(math.isnan(x) for x in numbers) else math.nan

    def best(self, rung: str, budget: float) -> str | None:
        """The router without an oracle with the highest mean skill."""
        found = {name: self.at(rung, name, budget) for name in self.candidates}
        means = {name: float(table.mean()) for name, table in found.items() if table is not None}
        return max(means, key=lambda name: means[name]) if means else None

    def solved(self, rung: str) -> bool:
        """Whether full attention solves it; else skill says nothing about memories."""
        table = self.at(rung, "full", 1.0)
        return table is not None and float(table.mean()) >= SOLVED

    @property
    def ranked(self) -> list[str]:
        """Rungs that full attention solves, without those that some line has not run on yet."""
        lines = {(line, budget) for _, line, budget in self.groups}
        return [
            rung for rung in self.rungs
            if self.solved(rung) and all((rung, line, budget) in self.groups for line, budget in lines)
        ]  # fmt: skip


def answers_markdown(documents: Sequence[dict[str, Any]]) -> str:
    """All tables."""
    found = Results.of(documents)
    parts = [_runs(found, documents)]
    parts += [_skills(found, budget) for budget in reversed(found.budgets)]
    parts += [_recalls(found), _routers(found), _pairs(found), _predictable(found), _wider(found), _goal(found)]
    parts += [gates(found, documents), permuted(found), kinds(found), services(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- parts


def _runs(found: Results, documents: Sequence[dict[str, Any]]) -> str:
    trained = [content for content in documents if content["identity"]["tier"] == "T1"]
    steps = sorted({content["runtime"]["steps"] for content in trained})
    seeds = sorted({len(group) for group in found.groups.values()})
    unsolved = [rung for rung in found.rungs if found.at(rung, "full", 1.0) is not None and not found.solved(rung)]
    short = sorted({content["identity"]["rung"] for content in trained} - set(found.rungs), key=str)
    bad = sum(content["runtime"]["status"] != "ok" for content in trained)
    text = (
        f"{len(trained)} documents, {_list(steps)} training steps, {_list(seeds)} seeds a line, {bad} diverged. Skill"
        " is 1 for the oracle answer and 0 for the best predictor without a memory of items; in brackets 95 % over"
        " seeds and sequences; k/n seeds reach 0.8."
    )
    if short:
        text += f" Of {_list(short)} no line has all seeds: no table below shows them."
    if unsolved:
        text += (
            f" **Full attention does not solve {_list(unsolved)} (gate G1, skill below {SOLVED:g})**: what other lines"
            " score there says how fast they learn, not what they keep."
        )
    return text


def _skills(found: Results, budget: float) -> str:
    lines = ["full", *reversed(found.routers), "recurrent_wide", "window", "recurrent"]

    def cell(line: str, rung: str) -> str:
        estimate, table = found.estimate(rung, line, budget), found.at(rung, line, budget)
        if estimate is None or table is None:
            return ""
        name = f"**{estimate.value:.2f}**" if line == found.best(rung, budget) else f"{estimate.value:.2f}"
        reached = int((table.mean(1) >= 0.8).sum())
        return f"{name} [{estimate.low:.2f}, {estimate.high:.2f}] {reached}/{len(table)}"

    title = f"Skill at {budget:g} x the critical rows (bold: best router without an oracle)"
    return _table(title, lines, found.rungs, cell)


def _recalls(found: Results) -> str:
    if not found.budgets:
        return ""
    budget = 1.0 if 1.0 in found.budgets else found.budgets[0]

    def cell(line: str, rung: str) -> str:
        number = found.mean(rung, line, budget, "recall_corrected")
        return "" if math.isnan(number) else f"{number:.2f}"

    title = f"Selection recall above chance at {budget:g} x the critical rows, any layer"
    return _table(title, found.routers, found.rungs, cell)


def _routers(found: Results) -> str:
    """Mean and worst over the rungs that full attention solves and every line has run on."""
    rungs = found.ranked
    if not rungs or not found.budgets:
        return unranked(found)
    rows = []
    for line in [*found.routers, "recurrent_wide", "window"]:
        row = [line]
        for budget in found.budgets:
            tables = [found.at(rung, line, budget) for rung in rungs]
            if any(table is None for table in tables):
                row += ["", ""]
                continue
            means = [float(np.clip(table, -1, 1).mean()) for table in tables if table is not None]
            seeds = min(len(table) for table in tables if table is not None)
            across = np.stack([table[:seeds].mean(1) for table in tables if table is not None], 1)  # [S, rungs]
            estimate = mean_interval(np.clip(across, -1, 1), resamples=RESAMPLES)
            worst = int(np.argmin(means))
            row += [
                f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]",
                f"{means[worst]:.2f} {rungs[worst]}",
            ]
        rows.append(row)
    head = ["line", *(text for budget in found.budgets for text in (f"mean at {budget:g}x", f"worst at {budget:g}x"))]
    table = f"**Over the rungs that full attention solves ({_list(rungs)}).**\n\n" + markdown_rows(head, rows)
    return "\n\n".join(part for part in (table, unranked(found)) if part)


def _pairs(found: Results) -> str:
    """The router that is best on average against each other one and the state of equal bytes, on every rung."""
    rungs = found.ranked
    budget = max(found.budgets, default=GOAL_BUDGET)
    tables = {name: [found.at(rung, name, budget) for rung in rungs] for name in found.candidates}
    means = {
        name: float(np.mean([np.clip(part, -1, 1).mean() for part in parts if part is not None]))
        for name, parts in tables.items()
        if parts and all(part is not None for part in parts)
    }
    if not means:
        return ""
    first = max(means, key=lambda name: means[name])
    others = [name for name in (*found.candidates, "random", "recurrent_wide") if name != first]
    differences = {
        (rung, other): difference
        for rung in found.rungs
        for other in others
        if (difference := found.difference(rung, first, other, budget)) is not None
    }
    if not differences:
        return ""
    # over the lines that one rung's first is held against
    adjusted: dict[tuple[str, str], float] = {}
    for rung in found.rungs:
        own = {other: part.p_value for (name, other), part in differences.items() if name == rung}
        adjusted |= {(rung, other): p for other, p in holm(own).items()}

    def cell(other: str, rung: str) -> str:
        part = differences.get((rung, other))
        if part is None:
            return ""
        clear = part.verdict in ("better", "worse") and adjusted[rung, other] <= LEVEL
        verdict = part.verdict if clear or part.verdict == "equivalent" else "open"
        return f"{_signed(part)} {verdict}"

    title = (
        f"`{first}`, the best router on average, against the others at {budget:g} x the critical rows"
        " (difference of skill; Holm over the others of a rung)"
    )
    return _table(title, others, found.rungs, cell)


def _predictable(found: Results) -> str:
    """Does error routing keep what is predictable when written?"""
    rungs = [rung for rung in found.rungs if rung.startswith("pbc")]
    rows = []
    for rung in rungs:
        for line in ("surprise", "innovation"):
            for budget in (b for b in (1.0, 2.0) if b in found.budgets):
                chance, top = (
                    found.difference(rung, line, "random", budget),
                    found.difference(rung, line, "oracle", budget),
                )
                if chance is None or top is None:
                    continue
                recall = found.mean(rung, line, budget, "recall_corrected")
                rows.append([
                    rung, line, f"{budget:g}", f"{recall:.2f}", f"{found.mean(rung, line, budget, 'decoy_share'):.2f}",
                    _signed(chance), _signed(top),
                ])  # fmt: skip
    if not rows:
        return ""
    head = ["rung", "router", "budget", "recall above chance", "decoys of what is kept", "skill - random",
            "skill - oracle"]  # fmt: skip
    return "**Does error routing keep predictable but critical events?**\n\n" + markdown_rows(head, rows)


def _wider(found: Results) -> str:
    """Scratchpad against a wider state at equal bytes."""
    rows = []
    for rung in found.rungs:
        for budget in found.budgets:
            best = found.best(rung, budget)
            served = None if best is None else found.difference(rung, best, "recurrent_wide", budget)
            top = found.difference(rung, "oracle", "recurrent_wide", budget)
            if served is None or top is None or best is None:
                continue
            kilobytes = [found.mean(rung, line, budget, "bytes_total") / 1000 for line in (best, "recurrent_wide")]
            rows.append([
                rung, f"{budget:g}", " / ".join(f"{kb:.1f}" for kb in kilobytes), best, _signed(served), served.verdict,
                _signed(top),
            ])  # fmt: skip
    if not rows:
        return ""
    head = ["rung", "budget", "kB HAM / wide", "best router", "skill - wide", "verdict", "oracle - wide"]
    return "**Does the scratchpad beat a wider state at equal bytes?**\n\n" + markdown_rows(head, rows)


def _goal(found: Results) -> str:
    """Goal of the best router without an oracle, and the stage that fails where it is missed."""
    if GOAL_BUDGET not in found.budgets:
        return ""
    rows = []
    for rung in GOAL_RUNGS:
        best, full = found.best(rung, GOAL_BUDGET), found.at(rung, "full", 1.0)
        if best is None or full is None:
            continue
        estimate = found.estimate(rung, best, GOAL_BUDGET)
        assert estimate is not None
        base = float(full.mean())
        if not found.solved(rung):
            rows.append([rung, best, f"{estimate.value:.2f}", f"{base:.2f}", "", "full attention fails (G1)", ""])
            continue
        share = [number / base for number in (estimate.value, estimate.low, estimate.high)]
        group = found.groups[rung, best, GOAL_BUDGET]
        stages = {
            name: float(np.mean([content["diagnosis"]["stages"].get(key, math.nan) for content in group]))
            for key, name in STAGES.items()
        }
        failed = ", ".join(f"{name} {part:.2f}" for name, part in stages.items())
        rows.append([
            rung, best, f"{estimate.value:.2f}", f"{base:.2f}", f"{share[0]:.2f} [{share[1]:.2f}, {share[2]:.2f}]",
            "met" if share[0] >= GOAL else "missed", failed,
        ])  # fmt: skip
    head = ["rung", "best router", "skill", "full", "share of full", f"goal {GOAL:g}", "queries failed by stage"]
    return f"**Goal: {GOAL:g} of full attention at {GOAL_BUDGET:g} x the critical rows.**\n\n" + markdown_rows(
        head, rows
    )


# --- Markdown


def _signed(found: Difference) -> str:
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _list(items: Iterable[Any]) -> str:
    return ", ".join(str(item) for item in items)


def _table(title: str, lines: Sequence[str], rungs: Sequence[str], cell: Callable[[str, str], str]) -> str:
    parts = []
    for first in range(0, len(rungs), RUNGS_TOGETHER):
        some = rungs[first : first + RUNGS_TOGETHER]
        rows = [[line, *(cell(line, rung) for rung in some)] for line in lines]
        rows = [row for row in rows if any(row[1:])]
        parts += [markdown_rows(["", *some], rows)] if rows else []
    return "\n\n".join([f"**{title}.**", *parts]) if parts else ""


def write_between(path: Path, text: str) -> None:
    """Put text between the marks of a page, in the place of what stands there.

    Raises:
        ValueError: the page has no marks.
    """
    from hamts.files import written_whole

    page = path.read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise ValueError(f"'{path}' must hold the lines {BEGIN} and {END}. Add them where the tables belong.")
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    with written_whole(path) as partial:
        partial.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
