"""Networks asked about a longer past than they were trained at: thresholds for it, and scores side by side.

In a longer past the rows that matter are a smaller share, below what a trained threshold table knows, and scores lie
otherwise. So thresholds are found anew, for the share that is asked, on a few sequences of the length that is asked.

``hamts probes evaluate OUT --preset long --device cuda --rungs der,pbcD`` does it for the saved networks of finished
rungs, and goes on where it stopped; several calls may share a folder if each names its own rungs. The seeds of a line
are read together, at each of its budgets: a reading for calibration, one a stream, and one with permuted flags.

Positions are those of a longer past than any that was trained on: kept as they are, or scaled to the ages of training.

S networks · E evaluation streams · B sequences of a stream · T context rows · Q queries
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from probes.contract import VALIDATION_SEED, ProbeBatch, generator
from probes.evaluate import DIAGNOSED_SEQUENCES, Evaluation, _windows
from probes.models import ProbeNet
from probes.reading import read_context
from probes.scores import selection, stages
from probes.stacked_data import Decisions, Rows
from probes.stacked_evaluate import EvaluationSet, _score
from probes.stacked_long import LongStack, Past
from probes.stacked_train import stacked_read
from probes.train import Fitted, TrainPlan, has_thresholds, sample

__all__ = ["CALIBRATION_SEQUENCES", "AskedSequences", "calibrate_at", "calibration", "evaluate_long"]

# thresholds of a longer past are found on so many sequences of it, drawn apart from those that are scored
CALIBRATION_SEED = VALIDATION_SEED + 1
CALIBRATION_SEQUENCES = 8
PERMUTED_STREAMS = 1


def calibration(plan: TrainPlan) -> ProbeBatch:
    """What thresholds are found on."""
    return sample(plan, generator(CALIBRATION_SEED), CALIBRATION_SEQUENCES)


@torch.no_grad()
def calibrate_at(net: ProbeNet, batch: ProbeBatch, rows: int) -> None:
    """Set the thresholds for the share that so many rows are of the context of a batch, from its scores.

    Scores of a layer depend on what the layer below read: each reading settles one layer more.
    """
    share = rows / batch.context_rows
    if not has_thresholds(net) or not 0 < share < 1:
        return
    own = net.config
    if own.control == "shuffled":
        net.config = replace(own, router="learned")
    try:
        for layer in net.layers:
            layer.thresholds = layer.thresholds.finer(share)
        for _ in net.layers:
            context = read_context(net, batch, rows)
            for layer, trace in zip(net.layers, context.traces, strict=True):
                layer.thresholds.calibrate(trace.scores[:, 0].flatten(0, 1))
    finally:
        net.config = own


class AskedSequences:
    """The sequences that all networks of a rung are asked about, and calibrated on; those of one rung at a time.

    Flags are permuted on the first stream alone.
    """

    def __init__(self, seeds: Sequence[int], device: str) -> None:
        self.seeds, self.device = seeds, device
        self.loaded: dict[Path, Fitted] = {}
        self._key: tuple[object, ...] = ()

    def of(self, plan: TrainPlan, *, streams: int, sequences: int) -> tuple[EvaluationSet, Rows]:
        key = (plan.probe.name, plan.config, plan.echo, streams, sequences)
        if key != self._key:
            found = EvaluationSet.of(plan, seeds=self.seeds, streams=streams, sequences=sequences)
            found = replace(found, permuted=found.permuted[:PERMUTED_STREAMS])
            self._key, self._found = key, (found.to(self.device), Rows.of([calibration(plan)], self.device))
        return self._found


@torch.no_grad()
def evaluate_long(
    fitted: Sequence[Fitted],
    data: EvaluationSet,
    settled_on: Rows,
    *,
    rows: int,
    device: str,
    scale: float = 1.0,
) -> list[Evaluation]:
    """Score networks that differ in seed alone at one budget: ``evaluate_stacked`` without causal use.

    Args:
        fitted: with the longer sequences in their plans (``again.asked_at``).
        scale: of positions, see ``LongStack``.
        settled_on: what thresholds for the share that ``rows`` are of the context are found on.
    """
    stack = LongStack([one.net for one in fitted], device=device, scale=scale)
    plain = Decisions.plain(rows, networks=stack.S, context_rows=settled_on.context_rows, device=device)
    stack.calibrate(settled_on, plain)
    answers, kept, scores, found = [], [], [], []
    outcomes: list[dict[str, float]] = [{} for _ in fitted]
    for number, stream in enumerate(data.rows):
        reading = stacked_read(stack, stream, plain, with_scores=True)
        pasts = [cast(Past, layer.visible) for layer in reading.layers if layer.visible is not None]
        answers.append(stack.answers(reading, stream)[0])  # [S, B, Q, Y]
        kept.append([past.kept.unflatten(0, (stack.S, -1)) for past in pasts])  # L of [S, B, T]
        scores.append([layer.scores.expand(stack.S, -1, -1) for layer in reading.layers if layer.scores is not None])
        if number == 0 and stack.config.model == "ham":
            paid = [layer.weight for layer in reading.layers if layer.weight is not None]
            outcomes = _stages(stack, data, answers[0], kept[0], paid)
    permuted = [stack.answers(stacked_read(stack, part, plain), part)[0] for part in data.permuted]
    answer, flags = torch.cat(answers, 1), torch.cat(permuted, 1)  # [S, E B, Q, Y], [S, B, Q, Y]
    kept_rows = [torch.cat(parts, 1) for parts in zip(*kept, strict=True)]  # L of [S, E B, T]
    all_scores = [torch.cat(parts, 1) for parts in zip(*scores, strict=True)]
    for number, one in enumerate(fitted):
        out = Evaluation(rows, stages=outcomes[number])
        _score(
            out, stack.nets[number], data, one.plan.seed, answer[number], flags[number],
            [part[number] for part in kept_rows], [part[number] for part in all_scores],
        )  # fmt: skip
        found.append(out)
    return found


def _stages(
    stack: LongStack, data: EvaluationSet, answers: torch.Tensor, kept: list[torch.Tensor], paid: list[torch.Tensor]
) -> list[dict[str, float]]:
    """The stage at which each query fails, of every network: answers [S, B, Q, Y], paid L of [S B, N - T, T]."""
    batch, T = data.batches[0].select(slice(0, DIAGNOSED_SEQUENCES)), stack.T
    count = len(batch)
    windows = _windows(batch)[..., :T].to(stack.device)  # [B, Q, T]
    place = (batch.q_index - T).to(stack.device)[None, ..., None].expand(stack.S, -1, -1, T)  # [S, B, Q, T]
    mass = torch.zeros(place.shape[:3], device=stack.device)  # [S, B, Q]
    for layer in paid:
        own = layer.unflatten(0, (stack.S, -1))[:, :count]  # [S, B, N - T, T]
        mass = torch.maximum(mass, (own.gather(2, place) * windows).sum(-1))
    union = torch.stack(kept).any(0)[:, :count].cpu()  # [S, B, T]
    found = []
    for number in range(stack.S):
        wide = torch.nn.functional.pad(union[number], (0, batch.x.shape[1] - T))
        chosen = selection(wide, batch)
        apart = ((answers[number, :count].cpu() - batch.y).abs() * batch.y_mask).amax(-1)
        right = apart <= 0.25 * batch.y[batch.y_mask].std()
        found.append(vars(stages(chosen.any_row, mass[number].cpu(), right, batch.asked)))
    return found
