"""What an entry is worth, and what the learned score is taught of it: a token model of 64 tokens, on a CPU in minutes.

Run ``python -m benchmarks.recall_worth``; ``--table`` prints what is there. A model is trained as in the first rung of
``benchmarks.recall``, with half its batch. Then every entry of the last layer is dropped by itself, on sequences never
seen: the rise of the loss is what it is worth. Beside that stand both teachers' targets, and the gradient that reaches
the score.

B sequences · L tokens · M entries (= L, all are kept)
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.cells import write_cell
from benchmarks.recall import train
from benchmarks.recall_ladders import LADDERS
from benchmarks.recall_model import (
    KEYS,
    MODELS,
    TokenModel,
    WideBlocks,
    draw_recall,
    lesson_of,
    places_of_values,
    policies_of,
)  # fmt: skip
from hamts.config import ModelConfig

RESULTS = Path(__file__).parent / "results" / "recall" / "worth"
PICKED = (
    "learned-token", "learned-token-silent", "learned-token-gain", "learned-token-asked", "learned-token-asked-mute",
    "learned-token-asked-own-0.02", "learned-token-asked-own-0.3", "learned-token-asked-own-1",
    "learned-token-asked-own-only",
)  # fmt: skip
LENGTH, SEQUENCES = 64, 24
KINDS = ("value", "key", "filler or query")
SAID = ("worth", "pulled", "attention", "taught_by_attention", "taught_by_gain", "score")


@dataclass(frozen=True)
class Dropping(WideBlocks):
    """Sequence b reads no entry at position b."""

    before: Any = None

    @property
    def attend(self) -> Any:
        return self._attend

    def _attend(self, queries: torch.Tensor, *, scratch: Any, **others: Any) -> Any:
        gone = scratch.visible_from.new_zeros(scratch.bias.shape[:2], dtype=torch.bool)  # [B, M]
        gone[torch.arange(len(gone)), torch.arange(len(gone))] = True
        never = scratch.visible_until.masked_fill(gone, 0)  # [B, M]
        return self.before.attend(queries, scratch=replace(scratch, visible_until=never), **others)


def loss_of(logits: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Sum over the queries of each sequence, [B]."""
    each = F.cross_entropy(logits.transpose(1, 2), (right - KEYS).clamp_min(0), reduction="none")  # [B, L]
    return (each * (right >= 0)).sum(1)


def judged(model: TokenModel, ids: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of every entry of one sequence's last layer, [M] each: ids and right [L]."""
    last = model.layers()[-1]
    logits, traces = model(ids[None], policies_of(model, torch.ones(1)))
    loss, trace = loss_of(logits, right[None])[0], traces[-1]
    (slope,) = torch.autograd.grad(loss, [trace.entries_bias])  # [1, M]
    order = trace.entries_position[0].argsort()  # [M]
    alive = trace.entries_judged[0]
    mass = trace.entries_mass[0]  # [M]
    even = mass[alive].mean()
    gain = -slope[0]  # [M]
    found = {
        "pulled": gain,
        "attention": mass / even,
        "taught_by_attention": mass / (mass + even),
        "taught_by_gain": torch.sigmoid(gain / gain[alive].square().mean().sqrt().clamp_min(1e-12)),
        "score": trace.scores[0, 0, :, 0].gather(0, trace.entries_position[0].long().clamp(0, len(ids) - 1)),
    }
    before, last.kernels = last.kernels, Dropping("torch", "one entry less", before=last.kernels)
    with torch.no_grad():
        many = model(ids.expand(len(order), -1), policies_of(model, torch.ones(len(order))))[0]
        found["worth"] = loss_of(many, right.expand(len(order), -1)) - loss
    last.kernels = before
    place = trace.entries_position[0].long()
    return {name: x.detach() for name, x in found.items()} | {"place": place, "alive": alive}


def run_one(name: str, seed: int, folder: Path, steps: int) -> dict[str, Any]:
    """Train, drop, and write means by kind of token and steps of training."""
    config = ModelConfig(**({"width": 64, "layers": 2, "heads": 2, "patch_steps": 1, "dropout": 0.0} | MODELS[name]))
    torch.manual_seed(seed)
    model = TokenModel(config)
    rung = replace(LADDERS["longer"][0], steps=steps, sequences=64)
    train(
        model, (rung,), rate=3e-3, seed=seed, device="cpu", late=True, after=lambda *_: None, quiet=True,
        lesson=lesson_of(name),
    )  # fmt: skip
    model.severed = False  # what would reach the score is asked of all
    model.eval()
    generator = torch.Generator().manual_seed(10_000)
    rows = []
    for ids, right in zip(*draw_recall(LENGTH, SEQUENCES, generator, rung.tokens_per_pair), strict=True):
        values = places_of_values(ids[None], right[None])[0]  # [L]
        found = judged(model, ids, right)
        for entry in range(len(found["place"])):
            if not found["alive"][entry]:
                continue
            place = int(found["place"][entry])
            stored_key = ids[place] < KEYS and right[place] < 0
            kind = 0 if (values == place).any() else 1 if stored_key else 2
            rows.append([kind, *(float(found[what][entry]) for what in SAID)])
    table = torch.tensor(rows)  # [n, 1 + what is said]
    kinds = {
        kind: {what: round(float(table[table[:, 0] == number, 1 + at].mean()), 4) for at, what in enumerate(SAID)}
        for number, kind in enumerate(KINDS)
    }
    value = table[table[:, 0] == 0]  # [values, ...]
    used = value[value[:, 1] > 1.0]  # those that matter
    cell = {
        "model": name, "seed": seed, "steps": steps, "kinds": kinds, "values": len(value), "values_of_worth": len(used),
        "of_worth_pulled_down": round(float((used[:, 2] < 0).float().mean()), 4) if len(used) else None,
        "worth_against_pull": correlation(table[:, 1], table[:, 2]),
        "worth_against_attention": correlation(table[:, 1], table[:, 3]),
        "worth_against_score": correlation(table[:, 1], table[:, 6]),
    }  # fmt: skip
    write_cell(folder / f"{name}--steps{steps}--seed{seed}.json", cell)
    return cell


def correlation(one: torch.Tensor, two: torch.Tensor) -> float:
    """Of ranks."""
    ranks = torch.stack([x.argsort().argsort().float() for x in (one, two)])
    return round(float(torch.corrcoef(ranks)[0, 1]), 4)


def table(folder: Path) -> str:
    """One row per model and kind of token."""
    head = f"| model | steps | seed | entry | {' | '.join(SAID)} |"
    lines = [f"{head} ranks: pull, attention, score with worth | pulled down of worth |"]
    lines.append("|" + "---|" * (len(SAID) + 6))
    for path in sorted(folder.glob("*.json")):
        cell = json.loads(path.read_text())
        ranks = ", ".join(f"{cell['worth_against_' + x]:.2f}" for x in ("pull", "attention", "score"))
        for kind, said in cell["kinds"].items():
            shown = " | ".join(f"{said[what]:.3f}" for what in SAID)
            down = "" if kind != KINDS[0] or cell["of_worth_pulled_down"] is None else cell["of_worth_pulled_down"]
            lines.append(
                f"| {cell['model']} | {cell['steps']} | {cell['seed']} | {kind} | {shown} | {ranks} | {down} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PICKED), choices=list(PICKED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", nargs="+", type=int, default=[400, 700])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    options = parser.parse_args()
    if not options.table:
        for seed in options.seeds:
            for name in options.models:
                for steps in options.steps:
                    if not (options.folder / f"{name}--steps{steps}--seed{seed}.json").exists():
                        print(json.dumps(run_one(name, seed, options.folder, steps)), flush=True)
    print(table(options.folder))


if __name__ == "__main__":
    main()
