"""How much a token asks to be kept.

B items · C channels · N patches · H heads · K key · V value · S score routers · D width
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from hamts.config import ModelConfig
from hamts.nn.inner import Inner, InnerHead
from hamts.nn.scores import (
    BIAS_FLOOR,
    ERROR_HALF_LIFE_TOKENS,
    ON_LOG_SCALE,
    as_level,
    causal_error_mean,
    causal_sums,
    innovation,
    kept_probability,
    log_bias,
    normalised_error,
    residual,
    surprise,
    uncertainty,
    write_size,
)
from hamts.nn.scratchpad import Carried
from hamts.nn.tokens import Tokens
from hamts.ops.types import GatedDelta, UnreadDelta, compute_dtype

__all__ = [
    "BIAS_FLOOR",
    "ERROR_HALF_LIFE_TOKENS",
    "Router",
    "Scores",
    "causal_error_mean",
    "innovation",
    "kept_probability",
    "log_bias",
    "surprise",
]

# scores that the inner head makes
INNER = ("uncertainty", "residual")
# what the scores of `learned` and `mix` see beside the token
MIXED = ("surprise", "error", "innovation", "write", "uncertainty", "residual")
# of a stream's own scores, for allocations that compare each stream with its past
STREAM_HALF_LIFE_TOKENS = 512.0
PRIOR_TOKENS = 8.0


@dataclass(frozen=True)
class Scores:
    """What the routers of one layer say about a chunk."""

    scores: torch.Tensor  # [B, C, N, S] detached
    bias: torch.Tensor  # [B, C, N] log-bias that a kept token's key receives; the learned score's gradient
    error_mean: torch.Tensor  # [B, C, H, 2]
    carried: Carried
    inner_loss: torch.Tensor | None = None  # []


class Router(nn.Module):
    """Scores of the routers named in the configuration, reduced over heads.

    ``learned`` sees the token and, unless told otherwise, the state's error, write gate, gap and tag, detached; ``mix``
    sees all scores. They are trained through the log-bias log sigmoid(score) on the logits of the tokens they keep, and
    by an auxiliary loss of ``training``.
    """

    on_log_scale: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.names = tuple(name for name in config.router_names if name != "tags")
        self.uses_tags = "tags" in config.router_names
        self.reduction, self.decision, self.allocation = config.head_reduction, config.decision, config.allocation
        self.learned_features, self.width = config.learned_features, config.width
        hidden = max(config.width // 4, 8)

        def learner(features: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(config.width + features, hidden), nn.SiLU(), nn.Linear(hidden, 1))

        beside = 6 if config.learned_features == "state" else 0
        self.learned = learner(beside) if "learned" in self.names else None
        self.mixed = learner(len(MIXED) + 4) if "mix" in self.names else None
        self.inner = InnerHead(config) if any(name in self.names for name in (*INNER, "mix")) else None
        self.spend = nn.Linear(config.width, 1) if config.allocation == "learned" and self.names else None
        relative = config.allocation in ("normalised", "learned")
        self.relative = relative and bool(self.names)
        logs = [name in ON_LOG_SCALE for name in self.names]
        self.register_buffer("raw_on_log_scale", torch.tensor(logs, dtype=torch.bool), persistent=False)  # [S]
        # streams' own units may be negative
        on_log = torch.tensor([one and not relative for one in logs], dtype=torch.bool)  # [S]
        self.register_buffer("on_log_scale", on_log, persistent=False)

    raw_on_log_scale: torch.Tensor

    def maps(self) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """What each learner multiplies a token with first: weight [hidden, D] and bias."""
        learners = [learner for learner in (self.learned, self.mixed) if learner is not None]
        firsts = [cast(nn.Linear, learner[0]) for learner in learners]
        return [(first.weight[:, : self.width], first.bias) for first in firsts]

    def empty_carried(self, items: int, channels: int, like: torch.Tensor) -> Carried:
        """What the routers remember of nothing."""
        carried = Carried()
        if self.inner is not None:
            head = self.inner.head
            grid = (items, channels, head.patch_steps, len(head.levels))
            known = torch.zeros(items, channels, dtype=torch.bool, device=like.device)  # [B, C]
            carried = replace(carried, expected=like.new_zeros(grid), expected_known=known)
        if self.relative:
            carried = replace(carried, streams=like.new_zeros(items, channels, len(self.names), 3))
        return carried

    def _compared(
        self, error: torch.Tensor, prediction: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error and surprise of every head, [B, C, N, H, V] each -> 2 x [B, C, N, H], float32 at least."""
        kind = compute_dtype(error)
        return error.to(kind).square().sum(-1), surprise(prediction.to(kind), values.to(kind))

    def _measured(self, recurrent: GatedDelta, values: torch.Tensor, fused: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """``_compared``, or its kernel, which divides what was written by the gate where the error was not read yet."""
        if not fused:
            return self._compared(recurrent.error, recurrent.prediction, values)
        from hamts.ops import layer_triton

        if isinstance(recurrent, UnreadDelta):
            return layer_triton.compared(recurrent.written, values, recurrent.beta)
        return layer_triton.compared(recurrent.error, values)

    def _over_heads(self, score: torch.Tensor) -> torch.Tensor:
        """[B, C, N, H] -> [B, C, N]."""
        if self.reduction == "mean":
            return score.mean(-1)
        return score.amin(-1) if self.reduction == "min" else score.amax(-1)

    def forward(
        self,
        x: torch.Tensor,
        *,
        recurrent: GatedDelta,
        values: torch.Tensor,
        beta: torch.Tensor,
        tokens: Tokens,
        error_mean: torch.Tensor,
        carried: Carried,
        narrow: torch.Tensor | None = None,
        begun: list[torch.Tensor] | None = None,
        fused: bool = False,
    ) -> Scores:
        """Score a chunk.

        Args:
            x: normalised input of the layer, [B, C, N, D].
            recurrent: result of the recurrence, each tensor [B, C, N, H, V].
            values: what came, [B, C, N, H, V].
            beta: write gates, [B, C, N, H].
            error_mean: running error sums, [B, C, H, 2].
            carried: what else the routers remember.
            narrow: x in the dtype of autocast, where it is on; without a gradient where ``begun`` is given.
            begun: what the learners' ``maps`` make of the tokens, [B, C, N, hidden] each; None: it is made here.
            fused: whether errors are compared by one kernel.
        """
        narrow = x if narrow is None else narrow
        # scores are compared with thresholds: under mixed precision too they have all digits
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            squared, unlike = self._measured(recurrent, values, fused)  # 2 x [B, C, N, H]
            squared = squared.to(x.dtype)  # [B, C, N, H]
            running, after = causal_error_mean(squared, tokens.heard > 0, error_mean)  # [B, C, N, H], [B, C, H, 2]
            available = {
                "innovation": self._over_heads(innovation(squared, running)),
                "surprise": self._over_heads(unlike),
            }  # [B, C, N] each
            if "error" in self.names or self.mixed is not None:
                error = recurrent.error.to(x.dtype)  # [B, C, N, H, V]
                available["error"] = self._over_heads(normalised_error(error, values.to(x.dtype)))
            if "write" in self.names or self.mixed is not None:
                available["write"] = self._over_heads(write_size(recurrent.error.to(x.dtype), beta))
        inner, carried = self._expect(x, recurrent, tokens, carried)
        if inner is not None:
            available |= self._doubts(inner, tokens)
        first = [F.linear(narrow, *pair) for pair in self.maps()] if begun is None else begun  # each [B, C, N, hidden]
        logits = self._logits(first, available, beta, tokens, x.dtype)  # [B, C, N] each
        columns = [(logits | available)[name].detach() for name in self.names]  # S x [B, C, N]
        scores = torch.stack(columns, -1) if columns else x.new_zeros(*x.shape[:3], 0)  # [B, C, N, S]
        bias = torch.zeros_like(available["surprise"])  # [B, C, N]
        if logits:
            bias = torch.stack([log_bias(logit) for logit in logits.values()]).mean(0)  # [B, C, N]
        if self.relative:
            scores, carried = self._against_own_past(scores, tokens, carried)
        if self.spend is not None:
            level = self.spend(narrow if begun is None else x).squeeze(-1)  # [B, C, N]
            bias = log_bias(scores.amax(-1) + level)  # [B, C, N]
            scores = scores + level.detach()[..., None]  # [B, C, N, S]
        if self.decision == "step":
            scores = loudest_channel(scores, tokens.routable)  # [B, C, N, S]
        if self.uses_tags:
            bias = torch.where(tokens.must_keep, 0.0, bias)  # [B, C, N]
        return Scores(scores, bias, after, carried, None if inner is None else inner.loss)

    def _logits(
        self,
        begun: list[torch.Tensor],
        available: dict[str, torch.Tensor],
        beta: torch.Tensor,
        tokens: Tokens,
        kind: torch.dtype,
    ) -> dict[str, torch.Tensor]:
        """The learned scores, which have a gradient, [B, C, N] each."""
        logits: dict[str, torch.Tensor] = {}
        if not begun:
            return logits
        facts = [beta.detach().mean(-1), tokens.observed.to(kind).mean(-1)]  # 2 x [B, C, N]
        facts += [tokens.tags.any(-1).to(kind), tokens.must_keep.to(kind)]  # 4 x [B, C, N]
        if self.learned is not None:
            features = [torch.log1p(available["innovation"]), available["surprise"], *facts]  # 6 x [B, C, N]
            chosen = features if self.learned_features == "state" else []
            logits["learned"] = _logit(self.learned, begun[0], chosen)  # [B, C, N]
        if self.mixed is not None:
            # errors have long tails
            features = [torch.log1p(available[name].detach()) for name in MIXED]  # 6 x [B, C, N]
            logits["mix"] = _logit(self.mixed, begun[-1], [*features, *facts])  # [B, C, N]
        return logits

    def _expect(
        self, x: torch.Tensor, recurrent: GatedDelta, tokens: Tokens, carried: Carried
    ) -> tuple[Inner | None, Carried]:
        if self.inner is None:
            return None, carried
        assert carried.expected is not None and carried.expected_known is not None
        recalled = recurrent.output.flatten(-2).to(x.dtype)  # [B, C, N, D]
        inner = self.inner(x, recalled, tokens, carried.expected, carried.expected_known)
        after = replace(carried, expected=inner.last.detach(), expected_known=inner.last_known)
        return inner, after

    def _doubts(self, inner: Inner, tokens: Tokens) -> dict[str, torch.Tensor]:
        """Scores of the inner head, [B, C, N] each; 1 where nothing was expected."""
        expected = inner.expected.detach()
        return {
            "uncertainty": torch.where(inner.known, uncertainty(expected), 1.0),
            "residual": torch.where(inner.known, residual(expected, tokens.values, tokens.observed), 1.0),
        }

    def _against_own_past(self, scores: torch.Tensor, tokens: Tokens, carried: Carried) -> tuple[torch.Tensor, Carried]:
        """Scores in deviations of the stream's own earlier ones, [B, C, N, S]; 0 while there are none."""
        assert carried.streams is not None
        level = as_level(scores, self.raw_on_log_scale)  # [B, C, N, S]
        counted = (tokens.heard >= 0.5).to(level.dtype)[..., None].expand_as(level)  # [B, C, N, S]
        terms = torch.stack([counted, counted * level, counted * level.square()], -1)  # [B, C, N, S, 3]
        before, after = causal_sums(terms, carried.streams, STREAM_HALF_LIFE_TOKENS)
        weight, total, squares = before.unbind(-1)  # 3 x [B, C, N, S]
        mean = total / weight.clamp_min(torch.finfo(level.dtype).tiny)  # [B, C, N, S]
        spread = (squares - weight * mean.square()).clamp_min(0.0)  # [B, C, N, S]
        # a few tokens of spread 1, so that the second token of a stream is no sensation
        deviation = ((spread + PRIOR_TOKENS) / (weight + PRIOR_TOKENS)).sqrt()  # [B, C, N, S]
        relative = torch.where(weight > 0, (level - mean) / deviation, 0.0)  # [B, C, N, S]
        return relative, replace(carried, streams=after)


def _logit(learner: nn.Sequential, hidden: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
    """A learner's score of the token and some numbers about it, its last sum in full precision, [B, C, N].

    The first map is taken in two, of the token before this, [B, C, N, hidden]: a token joined to a few numbers would be
    copied, and as wide as no fast product is.
    """
    first, last = cast(nn.Linear, learner[0]), cast(nn.Linear, learner[-1])
    if features:
        beside = first.weight[:, first.in_features - len(features) :]  # [hidden, features]
        hidden = hidden + F.linear(torch.stack(features, -1), beside)  # [B, C, N, hidden]
    hidden = learner[1:-1](hidden)  # [B, C, N, hidden]
    with torch.autocast(hidden.device.type, enabled=False):
        return last(hidden.to(last.weight.dtype)).squeeze(-1)


def loudest_channel(scores: torch.Tensor, routable: torch.Tensor) -> torch.Tensor:
    """The highest score of a moment's routable channels for all of them: scores [B, C, N, S], routable [B, C, N]."""
    if scores.shape[-1] == 0:
        return scores
    heard = torch.where(routable[..., None], scores, -torch.inf).amax(1, keepdim=True)  # [B, 1, N, S]
    return torch.where(heard.isfinite(), heard, scores)  # [B, C, N, S]
