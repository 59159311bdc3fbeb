"""How well a router's score orders rows, whatever the budget: against what each row was worth to full attention.

The gold utility of a row is the loss increase of the queries when it alone is taken out of the memory of a trained
full-attention network (leave one out). Scores of routers are compared with it within each sequence.

B sequences · T context rows · L rows · Q queries · S scores
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from probes.contract import EVALUATION_SEED, ProbeBatch, generator
from probes.reading import answer_from, read_context
from probes.scores import RECEPTIVE_ROWS, average_precision, query_error, ranks_auroc
from probes.train import Fitted, sample

__all__ = ["Gold", "describe", "gold_utility", "router_scores", "utility_of"]

SEQUENCES = 32


@dataclass(frozen=True)
class Gold:
    """What rows were worth to a full-attention network."""

    batch: ProbeBatch
    utility: torch.Tensor  # [B, T] error that leaving the row out adds, over the error of the floor
    skill: float  # of the network itself: gold is worth no more than its teacher

    @property
    def useful(self) -> torch.Tensor:
        """The rows that were worth most, as many as are critical by design, [B, T] bool."""
        count = self.batch.crit[:, : self.utility.shape[1]].sum(1, keepdim=True)  # [B, 1]
        rank = self.utility.argsort(1, descending=True).argsort(1)  # [B, T]
        return (rank < count) & (self.utility > 0)

    @property
    def truth_auroc(self) -> float:
        """Does the network use the rows that the generator says it needs? AUROC of utility against critical rows."""
        crit = self.batch.crit[:, : self.utility.shape[1]]  # [B, T]
        return _mean(ranks_auroc(worth, needed) for worth, needed in zip(self.utility, crit, strict=True))


@torch.no_grad()
def gold_utility(fitted: Fitted, *, sequences: int = SEQUENCES) -> Gold:
    """Leave each row out of a trained full-attention network's memory in turn, on the first evaluation stream.

    Raises:
        ValueError: the network keeps only some rows.
    """
    net, plan = fitted.net, fitted.plan
    if net.config.model != "full":
        raise ValueError(f"Gold utility is that of full attention. Got a network of {net.config.model!r}.")
    batch = sample(plan, generator(EVALUATION_SEED), sequences)
    floors = [float(query_error(answer, batch).nanmean()) for answer in batch.floor.values()]
    batch = batch.to(plan.device)
    T, rows = batch.context_rows, plan.critical_rows
    context = read_context(net, batch, rows)
    memory = context.memory

    def errors(held: Sequence[Any]) -> torch.Tensor:
        return query_error(answer_from(net, batch, context.policies, held), batch).nanmean(1)  # [B]

    base = errors(memory)  # [B]
    worth = [errors([without(part, row, T) for part in memory]) - base for row in range(T)]
    utility = torch.stack(worth, 1).cpu() / min(floors)  # [B, T]
    return Gold(batch.to("cpu"), utility, 1.0 - float(base.mean()) / min(floors))


def without(memory: Any, row: int, rows: int) -> Any:
    """The memory of a full-attention layer without one of its rows."""
    kept, recent = memory.kept, memory.recent
    kept = replace(kept, alive=kept.alive & (kept.index != row))
    window = recent.present.shape[1]
    place = torch.arange(rows - window, rows, device=kept.alive.device)  # [R] rows of the window
    recent = replace(recent, present=recent.present & (place != row)[None, :, None])
    return replace(memory, kept=kept, recent=recent)


@torch.no_grad()
def router_scores(fitted: Fitted, batch: ProbeBatch) -> list[torch.Tensor]:
    """How much each layer of a network asked to keep each row, each [B, T]; nothing for models without a router.

    A router of tags asks for what is tagged; a control that needs no score for what it is given.
    """
    net = fitted.net
    if net.config.model != "ham":
        return []
    T = batch.context_rows
    tags, crit = batch.tags[:, :T].float(), batch.crit[:, :T].float()  # 2 x [B, T]
    if net.config.control == "oracle":
        return [crit] * net.config.layers
    if net.config.control == "recency":
        return [torch.arange(T).expand(len(batch), T).float()] * net.config.layers
    if net.config.control is not None:
        # chance and schedules have no opinion of a row
        return []
    context = read_context(net, batch.to(fitted.plan.device), fitted.plan.critical_rows)
    found = []
    for layer, trace in zip(net.layers, context.traces, strict=True):
        score = trace.scores[:, 0]  # [B, T, S]
        if score.shape[-1] == 0:
            found.append(tags)
            continue
        rank = layer.thresholds.rank(score).cpu()  # [B, T]
        # what is tagged is kept before all that is only scored
        found.append(rank + (rank.amax() - rank.amin() + 1.0) * tags if net.config.uses_tags else rank)
    return found


def utility_of(scores: Sequence[torch.Tensor], gold: Gold) -> dict[str, float]:
    """AUROC and average precision of scores against the most useful rows, Spearman against the utility itself.

    Layers count alike: of several, the mean of their ranks. Means over sequences. ``utility_auroc_window`` takes the
    best score of a row and the rows after it that a convolution copies it to: a router that keeps the row after an item
    has kept the item.

    Args:
        scores: of layers, each [B, T].
    """
    joined = torch.stack([_ranks(score) for score in scores]).mean(0)  # [B, T]
    useful = gold.useful
    padded = torch.nn.functional.pad(joined, (0, RECEPTIVE_ROWS), value=-1.0)
    window = padded.unfold(1, RECEPTIVE_ROWS + 1, 1).amax(-1)  # [B, T]
    return {
        "utility_auroc": _mean(ranks_auroc(s, u) for s, u in zip(joined, useful, strict=True)),
        "utility_auroc_window": _mean(ranks_auroc(s, u) for s, u in zip(window, useful, strict=True)),
        "utility_ap": _mean(average_precision(s, u) for s, u in zip(joined, useful, strict=True)),
        "utility_ap_chance": float(useful.float().mean()),
        "utility_spearman": _mean(spearman(s, w) for s, w in zip(joined, gold.utility, strict=True)),
    }


def spearman(first: torch.Tensor, second: torch.Tensor) -> float:
    """Correlation of ranks, ties at their mean; NaN where one of them is constant."""
    a, b = (_ranks(x[None])[0] for x in (first, second))
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 0 else math.nan


def _ranks(score: torch.Tensor) -> torch.Tensor:
    """Rank of each value among its sequence's, from 0 to 1, ties at their mean, [B, T]."""
    score = score.double()
    below = (score[:, None] < score[..., None]).sum(-1)  # [B, T]
    equal = (score[:, None] == score[..., None]).sum(-1)  # [B, T]
    return (below + (equal - 1) / 2.0) / max(score.shape[1] - 1, 1)


def _mean(values: Any) -> float:
    """Mean without NaN; NaN of nothing."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def describe(gold: Gold, scores: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What a document says of a router: by layer, and the rows of the first sequence for a picture."""
    joined = torch.stack([_ranks(score) for score in scores]).mean(0)[0]  # [T]
    return {
        "gold_skill": gold.skill,
        "gold_auroc_of_truth": gold.truth_auroc,
        "by_layer": [utility_of([score], gold) for score in scores],
        "points": [
            [round(float(rank), 4), round(float(worth), 6), bool(crit)]
            for rank, worth, crit in zip(joined, gold.utility[0], gold.batch.crit[0], strict=False)
        ],
    }
