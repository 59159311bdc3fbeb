"""Predictors without a memory of single items, and the cheap features that must not suffice.

B sequences · L rows · C channels · Q queries · Y numbers in an answer · I features
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from probes.contract import ProbeBatch, generator

__all__ = ["fit_mlp", "fit_ridge", "learned_floors", "shortcut_features"]

RIDGES = (1e-3, 1e-1, 1e1, 1e3)
MLP_UNITS = 64
MLP_STEPS = 200
# what an epoch must gain on held-out rows to be believed
LEAST_GAIN = 0.01


def query_key(batch: ProbeBatch) -> torch.Tensor:
    """What the query row shows, [B, Q, I]."""
    inputs = batch.inputs()  # [B, L, I]
    index = batch.q_index[..., None].expand(-1, -1, inputs.shape[-1])
    return inputs.gather(1, index)


def learned_floors(train: ProbeBatch, batch: ProbeBatch) -> dict[str, torch.Tensor]:
    """The mean answer, and a ridge regression on the query's key alone; both fitted on training sequences."""
    asked = train.y_mask  # [B, Q, Y]
    mean = (train.y * asked).sum((0, 1)) / asked.sum((0, 1)).clamp_min(1)  # [Y]
    weights = fit_ridge(query_key(train)[train.asked], train.y[train.asked])
    key = query_key(batch)  # [B, Q, I]
    return {"mean": mean.expand_as(batch.y), "key_regression": ridge_answer(key, weights)}


def shortcut_features(batch: ProbeBatch) -> torch.Tensor:
    """Statistics of the context, positions, gaps, counts, the floors and the query's key, [B, Q, I]."""
    T = batch.context_rows
    x = batch.x[:, :T]  # [B, T, C]
    there = (~x.isnan()) & ~batch.query[:, :T, None]
    zeroed = torch.where(there, x, 0.0)
    count = there.sum(1).clamp_min(1)  # [B, C]
    mean = zeroed.sum(1) / count  # [B, C]
    spread = (torch.where(there, x - mean[:, None], 0.0).square().sum(1) / count).sqrt()  # [B, C]
    high = torch.where(there, x, -1e9).amax(1).clamp_min(-50)  # [B, C]
    low = torch.where(there, x, 1e9).amin(1).clamp_max(50)  # [B, C]
    last = zeroed[:, -1]  # [B, C]
    flagged = batch.events[:, :T].abs().sum(-1) > 0  # [B, T]
    step = torch.arange(T) / T  # [T]
    number = flagged.sum(1, keepdim=True)  # [B, 1]
    place = (flagged * step).sum(1, keepdim=True) / number.clamp_min(1)  # [B, 1] mean position of flagged rows
    latest = torch.where(flagged, step, 0.0).amax(1, keepdim=True)  # [B, 1]
    gaps = batch.time[:, :T].diff(dim=1)  # [B, T - 1]
    timing = torch.stack([gaps.mean(1), gaps.std(1)], 1).float()  # [B, 2]
    missing = (~there).float().mean((1, 2))[:, None]  # [B, 1]
    flags = batch.events[:, :T].abs().mean(1)  # [B, F]
    static = torch.cat([mean, spread, high, low, last, number / T, place, latest, timing, missing, flags], -1)
    parts = [static[:, None].expand(-1, batch.q_index.shape[1], -1), query_key(batch)]
    parts += [answer.nan_to_num() for answer in batch.floor.values()]
    return torch.cat(parts, -1)


def _design(features: torch.Tensor, scale: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    mean, spread = scale
    scaled = ((features - mean) / spread).clamp(-8, 8)
    return torch.cat([scaled, torch.ones_like(scaled[..., :1])], -1)


def fit_ridge(features: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ridge regression, features [n, I], answers [n, Y]: weights, and the mean and spread of the features.

    The penalty is the one of ``RIDGES`` that is best on the last fifth; all rows are then fitted with it.
    """
    mean, spread = features.mean(0), features.std(0)
    spread = torch.where(spread < 1e-4, 1e9, spread)  # a constant says nothing
    design, target = _design(features, (mean, spread)).double(), answers.double()
    held = max(len(design) // 5, 1)

    def solve(penalty: float, rows: int) -> torch.Tensor:
        part, wanted = design[:rows], target[:rows]
        weight = torch.full((part.shape[1],), penalty * rows, dtype=torch.float64)
        weight[-1] = 1e-9 * rows  # the constant is free
        return torch.linalg.solve(part.T @ part + torch.diag(weight), part.T @ wanted)

    def error(penalty: float) -> float:
        guess = design[-held:] @ solve(penalty, len(design) - held)
        return float((guess - target[-held:]).square().mean())

    return solve(min(RIDGES, key=error), len(design)).float(), mean, spread


def ridge_answer(features: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return _design(features, weights[1:]) @ weights[0]


def fit_mlp(features: torch.Tensor, answers: torch.Tensor, *, seed: int = 0, steps: int = MLP_STEPS) -> nn.Module:
    """A network of 64 units, full batch, features [n, I] scaled, answers [n, Y]; the last fifth stops it early."""
    mean, spread = features.mean(0), features.std(0)
    spread = torch.where(spread < 1e-4, 1e9, spread)
    n = len(features)
    held = max(n // 5, 1)
    inputs = ((features - mean) / spread).clamp(-8, 8)
    centre = answers.mean(0)  # [Y]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Linear(features.shape[1], MLP_UNITS), nn.GELU(), nn.Linear(MLP_UNITS, answers.shape[1]))
        # it starts as the mean answer, and stays that where nothing better is found
        last = net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        last.bias.data.copy_(centre)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    with torch.no_grad():
        best = float(F.mse_loss(net(inputs[-held:]), answers[-held:]))
    kept = {name: value.clone() for name, value in net.state_dict().items()}
    order = torch.randperm(n - held, generator=generator(seed))
    for step in range(steps):
        rows = order[(torch.arange(1024) + 1024 * step) % (n - held)]
        loss = F.mse_loss(net(inputs[rows]), answers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            with torch.no_grad():
                score = float(F.mse_loss(net(inputs[-held:]), answers[-held:]))
            if score < (1.0 - LEAST_GAIN) * best:
                best, kept = score, {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(kept)
    return _Scaled(net, mean, spread)


class _Scaled(nn.Module):
    """A network behind the scaling of its features."""

    def __init__(self, net: nn.Module, mean: torch.Tensor, spread: torch.Tensor) -> None:
        super().__init__()
        self.net, self.mean, self.spread = net, mean, spread

    @torch.no_grad()
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.net(((features - self.mean) / self.spread).clamp(-8, 8))
