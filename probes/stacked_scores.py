"""Scores of the routers of stacked layers: what ``hamts.nn.router`` computes for one channel and one head.

S networks · B sequences · T context rows · E memory width · K state width · C values of a row
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from hamts.nn.head import pinball
from hamts.nn.inner import INNER_LEVELS
from hamts.nn.router import MIXED
from hamts.nn.scores import (
    ERROR_HALF_LIFE_TOKENS,
    LARGEST_VALUE,
    innovation,
    log_bias,
    normalised_error,
    residual,
    uncertainty,
    write_size,
)

if TYPE_CHECKING:
    from probes.stacked import StackedNet
    from probes.stacked_data import Rows
    from probes.stacked_ops import Ops

__all__ = ["LayerScores", "error_weights", "layer_scores"]


@dataclass(frozen=True)
class LayerScores:
    scores: torch.Tensor | None  # [S, B, T] detached
    bias: torch.Tensor | None  # [S, B, T] of a learned score, with its gradient
    inner_loss: torch.Tensor | None = None  # [S]


def error_weights(rows: int, device: torch.device) -> torch.Tensor:
    """Weight of each earlier row (column) in the running mean of squared errors before a row, [T, T]."""
    step = torch.arange(rows, device=device)
    lag = step[:, None] - step[None] - 1  # [T, T]
    decay = 0.5 ** (1.0 / ERROR_HALF_LIFE_TOKENS)
    return torch.where(lag >= 0, decay ** lag.clamp_min(0).float(), 0.0)


def layer_scores(
    stack: StackedNet,
    x: torch.Tensor,
    number: int,
    rows: Rows,
    *,
    error: torch.Tensor,
    output: torch.Tensor,
    values: torch.Tensor,
    beta: torch.Tensor,
    ops: Ops,
    with_scores: bool,
    training: bool,
) -> LayerScores:
    """Scores of the context rows.

    Args:
        x: input of the layer, [S, B, N, E].
        error, output, values: of the recurrence, [S, B, N, K].
        beta: write gates, [S, B, N].
        with_scores: also where nothing is decided by them.
        training: with the loss of the inner head.
    """
    T, router, control = stack.T, stack.config.router, stack.config.control
    if router == "tags" or (control is not None and control != "shuffled" and not with_scores):
        return LayerScores(None, None)
    name = "learned" if control == "shuffled" else "innovation" if control is not None else router
    x, beta = x[:, :, :T], beta[:, :, :T].detach()
    error, values = error[:, :, :T].detach(), values[:, :, :T].detach()  # 2 x [S, B, T, K]

    def innovations() -> torch.Tensor:
        squared = error.square().sum(-1)  # [S, B, T]
        heard = (rows.heard[:, :, :T] > 0).to(squared.dtype).expand_as(squared)
        sums = torch.stack([squared * heard, heard], -1)  # [S, B, T, 2]
        before = torch.matmul(stack.frame.error_weights, sums)  # [S, B, T, 2]
        running = before[..., 0] / before[..., 1].clamp_min(torch.finfo(before.dtype).tiny)
        return innovation(squared, running)

    simple = {
        "innovation": innovations,
        "surprise": lambda: ops.surprise(values - error, values),
        "error": lambda: normalised_error(error, values),
        "write": lambda: write_size(error, beta),
    }
    if name in simple:
        return LayerScores(simple[name](), None)
    kind = x.dtype
    observed = rows.inputs[:, :, :T, stack.channels : 2 * stack.channels] > 0  # [S, B, T, C]
    tags = rows.tags.to(kind)
    facts = [part.expand_as(beta) for part in (beta, observed.to(kind).mean(-1), tags, tags)]  # 4 x [S, B, T]
    at, loss = f"blocks.{number}.memory.router.", None
    if name == "learned":
        features = [torch.log1p(innovations()), simple["surprise"](), *facts]  # 6 x [S, B, T]
        logit = _logit(stack, x, features, at + "learned")
    elif name == "mix":
        available = {key: make() for key, make in simple.items()}
        doubts, loss = _doubts(stack, x, output[:, :, :T], rows, observed, at, training)
        available |= doubts
        logit = _logit(stack, x, [torch.log1p(available[key]) for key in MIXED] + facts, at + "mixed")
    else:
        raise ValueError(f"No stacked form of router {name!r}. Train its networks one by one.")
    return LayerScores(logit.detach(), log_bias(logit), loss)


def _logit(stack: StackedNet, x: torch.Tensor, features: list[torch.Tensor], at: str) -> torch.Tensor:
    """A learner's score, [S, B, T]."""
    joined = torch.cat([x, torch.stack(features, -1)], -1)  # [S, B, T, E + features]
    return stack.linear(F.silu(stack.linear(joined, at + ".0")), at + ".2").squeeze(-1)


def _doubts(
    stack: StackedNet,
    x: torch.Tensor,
    recalled: torch.Tensor,
    rows: Rows,
    observed: torch.Tensor,
    at: str,
    training: bool,
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Scores of the inner head, [S, B, T] each, and its loss, [S]."""
    S, _, T, _ = x.shape
    C = stack.channels
    both = torch.cat([x.detach(), recalled.detach()], -1)  # [S, B, T, 2 E]
    raw = stack.linear(both, at + "inner.head.project").unflatten(-1, (C, len(INNER_LEVELS)))
    median, gaps = raw[..., 1:2], F.softplus(raw)
    ahead = torch.cat([median - gaps[..., :1], median, median + gaps[..., 2:]], -1)  # [S, B, T, C, 3]
    truth = rows.inputs[:, :, :T, :C].expand(S, -1, -1, -1)  # [S, B, T, C]
    loss = None
    if training:
        asked = observed[:, :, 1:].expand(S, -1, -1, -1)  # [S, B, T - 1, C]
        levels = stack.inner_levels
        losses = pinball(ahead[:, :, :-1], truth[:, :, 1:].clamp(-LARGEST_VALUE, LARGEST_VALUE), levels)
        loss = (losses * asked).sum((1, 2, 3)) / asked.sum((1, 2, 3)).clamp_min(1)
    expected = ahead[:, :, :-1].detach()  # of rows 1, 2, ...
    width = F.pad(uncertainty(expected), (1, 0), value=1.0)  # [S, B, T]
    apart = residual(expected, truth[:, :, 1:], observed[:, :, 1:])
    return {"uncertainty": width, "residual": F.pad(apart, (1, 0), value=1.0)}, loss
