"""Facts as HTML. Every text that came from outside is escaped; the script is one file, allowed by its hash alone."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import pandas as pd

from hamts.plot_base import ANY_REASON, REASONS
from hamts.report_accuracy import Accuracy
from hamts.report_memory import JUDGEMENTS, STATUSES, Memory
from hamts.routes_summary import worth_nothing

__all__ = ["Facts", "page"]

MOST_LINES = 30


@dataclass(frozen=True)
class Facts:
    """What the page says in words and tables; a part without facts has its reason in ``gaps``."""

    title: str
    data: dict[str, Any]
    notes: list[str]
    accuracy: Accuracy | None
    memory: Memory | None
    gaps: dict[str, str]
    run: dict[str, Any]


def page(facts: Facts, data: dict[str, Any]) -> str:
    """The whole file; ``data`` is what its script reads."""
    assets = files("hamts") / "report_assets"
    parts = ["base.js", "forecasts.js", "explorer.js", "detail.js", "main.js"]
    script = "\n".join((assets / name).read_text(encoding="utf-8") for name in parts)
    style = (assets / "report.css").read_text(encoding="utf-8")
    data = data | {
        "statuses": list(STATUSES),
        "judgements": list(JUDGEMENTS),
        "colours": {name: colour for name, (colour, _) in REASONS.items()} | {"": ANY_REASON[0]},
    }
    slots = {
        "TITLE": escape(facts.title),
        "POLICY": f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:",
        "STYLE": style,
        "VERDICT": _verdict(facts),
        "DATA_SUMMARY": _data_summary(facts),
        "ACCURACY": _accuracy(facts),
        "MEMORY": _memory(facts),
        "RUN": _run(facts),
        "EXPLORER_GAP": _gap(facts, "memory", "kept"),
        "FORECAST_GAP": _gap(facts, "accuracy", "future"),
        "JSON": script_json(data),
        "SCRIPT": script,
    }
    text = (assets / "page.html").read_text(encoding="utf-8")
    # one pass, so that nothing from the data is ever taken for a slot
    pieces = text.split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, rest = piece.split("}}", 1)
        filled += [slots[name], rest]
    return "".join(filled)


def script_json(data: Any) -> str:
    """JSON that cannot end its script element, whatever is in it."""
    text = json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return f"'sha256-{digest}'"


# --- parts


def _gap(facts: Facts, *names: str) -> str:
    return "".join(f'<p class="gap">{escape(facts.gaps[name])}</p>' for name in names if name in facts.gaps)


def _verdict(facts: Facts) -> str:
    if facts.accuracy is None:
        return f'<p class="gap">No verdict: {escape(facts.gaps["accuracy"])}</p>'
    lines = [f"<li>{escape(verdict.words)}</li>" for verdict in facts.accuracy.verdicts]
    gain = facts.accuracy.verdict("none")
    if not math.isfinite(gain.low):
        head = "Too few moments to say whether the memory helped."
    elif round(gain.low, 2) > 0:
        head = "The memory helped here."
    else:
        head = "The memory made forecasts worse here." if round(gain.high, 2) < 0 else "The memory did not help here."
    return f'<p class="verdict">{head}</p><ul>{"".join(lines)}</ul>'


def _data_summary(facts: Facts) -> str:
    data = facts.data
    zone = f", {escape(str(data['zone']))} time" if data["zone"] else ""
    length = (
        f"{data['shortest']:,}"
        if data["shortest"] == data["longest"]
        else f"{data['shortest']:,} to {data['longest']:,}"
    )
    lines = [
        f"{data['items']:,} item{'' if data['items'] == 1 else 's'} of {length} steps, {data['steps']:,} in all; from"
        f" {escape(data['first'])} to {escape(data['last'])}{zone}; one step is {escape(str(data['frequency']))}, a"
        f" season {data['season']} steps."
    ]
    if data["new"]:
        names = ", ".join(escape(name) for name in data["new"][:8])
        lines.append(f"{len(data['new'])} items were not in the fit: {names}.")
    empty = [escape(c["name"]) for c in data["columns"] if c["observed"] == 0]
    if empty:
        lines.append(f"No value was ever observed in: {', '.join(empty)}.")
    rows = [
        [c["name"], c["role"], c["kind"], f"{c['observed']:.1%}", *(_number(c[k]) for k in ("min", "mean", "max"))]
        for c in data["columns"]
    ]
    notes = "".join(f"<li>{escape(note)}</li>" for note in facts.notes)
    return (
        "".join(f"<p>{line}</p>" for line in lines)
        + _table(["column", "role", "kind", "observed", "min", "mean", "max"], rows, numbers=range(3, 7))
        + (f"<h3>Notes on the data</h3><ul>{notes}</ul>" if notes else "<p>No notes on the data.</p>")
    )


def _accuracy(facts: Facts) -> str:
    if facts.accuracy is None:
        return f'<p class="gap">Not measured: {escape(facts.gaps["accuracy"])}</p>'
    found = facts.accuracy
    names = ["WQL", "MASE", "MAE", "MSE", "MSIS", "coverage_80", "coverage_95", "usage_share"]
    rows = [
        [
            row["method"],
            *(_number(row[name]) for name in names),
            "" if math.isnan(row["bytes"]) else f"{row['bytes']:,.0f}",
        ]
        for row in found.rows
    ]
    heads = ["method", *(name.replace("_", " ") for name in names), "bytes an item"]
    levels = [_number(level) for level in found.coverage]
    below = [_number(share) for share in found.coverage.values()]
    X = len(found.windows.items)
    return (
        f"<p>{X} forecasts of {found.windows.actual.shape[2]} steps at the ends of the last complete windows, each from"
        " what came before it. The rows below HAM are the same weights with another memory, and seasonal naive. Smaller"
        " is better, but for coverage.</p>"
        + _table(heads, rows, numbers=range(1, len(heads)))
        + "<p>Share of truths at or below each quantile of HAM; on target, both rows are the same.</p>"
        + _table(["quantile", *levels], [["observed", *below]], numbers=range(1, len(levels) + 1))
        + "<p>WQL: weighted quantile loss, mean over deciles and targets. MASE: absolute error of the median in units"
        " of the seasonal naive error of the history. MSIS: scaled score of the 95 % interval.</p>"
    )


def _memory(facts: Facts) -> str:
    memory = facts.memory
    if memory is None:
        return _gap(facts, "memory")
    table = memory.table
    counts = table["status"].value_counts()
    kept, decided = int(counts.get("kept", 0)), len(table) - int(counts.get("pending", 0))
    text = f"<p>{kept:,} of {decided:,} decided tokens are kept at the end ({kept / max(decided, 1):.1%}), "
    text += (
        f"{int(counts.get('evicted', 0)):,} were evicted, {int(counts.get('quota_full', 0)):,} tagged ones had to go"
    )
    text += f" because their quota was full; {memory.entry_bytes} bytes an entry and layer.</p>" + _gap(facts, "kept")
    judged = table["judgement"].value_counts()
    measured = int(judged.drop("", errors="ignore").sum())
    if measured:
        words = ", ".join(f"{int(judged[name]):,} {_WORDS[name]}" for name in _WORDS if name in judged)
        text += f"<p>Worth was measured for {measured:,} kept tokens: {words}.</p>"
    if memory.meeting is not None:
        text += _meeting(memory)
    text += "<h3>Tagged, and not kept</h3>" + _listing(
        memory.missed, ["unique_id", "ds_start", "ds_end", "tag", "status", "channels", "kept"],
        "Every tagged step is kept, or none was tagged.",
    )  # fmt: skip
    idle = worth_nothing(table) if measured else table[:0]
    columns = [
        "unique_id",
        "channel",
        "ds_start",
        "reason",
        "worth",
        "worth_random_low",
        "worth_random_high",
        "read_mass",
    ]
    nothing = "None of those that were measured." if measured else "No worth was measured."
    return text + "<h3>Kept, and worth no more than any other</h3>" + _listing(idle, columns, nothing)


_WORDS = {
    "helps": "help more than random others",
    "moves": "move the forecast more than random others",
    "nothing": "are worth no more than any other",
    "hurts": "hurt",
}


def _meeting(memory: Memory) -> str:
    meeting = memory.meeting
    assert meeting is not None
    return (
        "<h3>Meeting with your labels</h3>"
        f"<p>{_share(meeting.precision)} of the kept steps lie inside labelled windows; {_share(meeting.recall)} of the"
        f" steps inside them are kept. Kept steps shifted along time by chance: {_share(meeting.chance)} inside (5 % to"
        f" 95 %: {_share(meeting.chance_low)} to {_share(meeting.chance_high)}). Corrected for chance:"
        f" {_number(meeting.score)}.</p>"
    )


def _listing(rows: pd.DataFrame, columns: Sequence[str], nothing: str) -> str:
    if rows.empty:
        return f"<p>{nothing}</p>"
    shown = rows.head(MOST_LINES)
    lines = [[_cell(row[name]) for name in columns] for _, row in shown.iterrows()]
    more = f"the first {MOST_LINES} of {len(rows):,}" if len(rows) > MOST_LINES else f"{len(rows):,} in all"
    grid = _table([name.replace("_", " ") for name in columns], lines)
    return f"<details><summary>{more}</summary>{grid}</details>"


def _run(facts: Facts) -> str:
    rows = [[name, str(value)] for name, value in facts.run.items() if name != "command"]
    command = escape(str(facts.run["command"]))
    return f"<p>Made again by:</p><pre>{command}</pre>" + _table(["", ""], rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Iterable[int] = ()) -> str:
    right = set(numbers)
    mark = [' class="n"' if place in right else "" for place in range(len(heads))]
    head = "".join(f'<th scope="col"{m}>{escape(str(text))}</th>' for text, m in zip(heads, mark, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{m}>{escape(str(text))}</td>" for text, m in zip(row, mark, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: Any) -> str:
    return _number(value) if isinstance(value, float) else str(value)


def _count(row: dict[str, Any]) -> str:
    return f"{row['bytes']:,.0f}"


def _share(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"
