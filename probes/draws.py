"""Small vectorised draws that suites are made of: places, codes, payloads, carriers, tags.

B sequences · T rows · N items · C channels · K types · G numbers in a code
"""

from __future__ import annotations

import math

import torch

from probes.contract import ProbeConfig, generator

__all__ = [
    "TYPES",
    "carrier",
    "choose_rows",
    "clock",
    "codes",
    "fill",
    "hide_rows",
    "noisy_tags",
    "payloads",
    "permutations",
    "segments",
    "uniform",
]

TYPES = 64
CODE_WIDTH = 8
CODE_SEED = 20_260
PAYLOAD_RANGE = 1.7  # uniform in +-1.7 has unit variance
LORENZ_STEP_S = 0.05


def uniform(gen: torch.Generator, shape: tuple[int, ...], low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=gen)


def payloads(gen: torch.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers of unit variance, uniform so that none stands out by size."""
    return uniform(gen, shape, -PAYLOAD_RANGE, PAYLOAD_RANGE)


def permutations(gen: torch.Generator, n: int, size: int) -> torch.Tensor:
    """A random order for each sequence, [B, size]."""
    return torch.rand(n, size, generator=gen).argsort(1)


def choose_rows(gen: torch.Generator, allowed: torch.Tensor, count: int) -> torch.Tensor:
    """Distinct random rows among the allowed ones, [B, T] bool -> [B, count] in random order.

    Raises:
        ValueError: a sequence has fewer allowed rows than are asked for.
    """
    least = int(allowed.sum(1).min())
    if least < count:
        raise ValueError(f"{count} distinct rows are needed, only {least} are free. Ask for fewer items or more rows.")
    score = torch.rand(allowed.shape, generator=gen).masked_fill(~allowed, -1.0)  # [B, T]
    return score.topk(count, dim=1).indices


def segments(gen: torch.Generator, n: int, *, count: int, width: int, rows: int) -> torch.Tensor:
    """Starts of segments that do not overlap, in time order, [B, count]."""
    slack = rows - count * width
    if slack < 0:
        raise ValueError(f"{count} segments of {width} rows need {count * width} rows. Got {rows}.")
    offsets = torch.randint(0, slack + 1, (n, count), generator=gen).sort(1).values  # [B, count]
    return offsets + width * torch.arange(count)


def codes(kind: str, types: int = TYPES) -> torch.Tensor:
    """The code of each type, the same in every sequence, [K, G]."""
    if kind == "onehot":
        return torch.eye(types)
    if kind == "int":
        return torch.linspace(-1.7, 1.7, types)[:, None]
    table = torch.randn(types, CODE_WIDTH, generator=generator(CODE_SEED))  # [K, G]
    return 2.0 * table / table.norm(dim=1, keepdim=True)


def fill(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write values at rows: target [B, L, ...], rows [B, N] (-1 for none), values [B, N, ...]. In place."""
    batch = torch.arange(target.shape[0])[:, None].expand_as(rows)  # [B, N]
    there = rows >= 0  # [B, N]
    target[batch[there], rows[there]] = values.expand(*rows.shape, *target.shape[2:])[there].to(target.dtype)
    return target


def clock(gen: torch.Generator, n: int, rows: int, jitter: float) -> torch.Tensor:
    """Time of each row in seconds, [B, rows] float64; one second apart but for jitter."""
    step = torch.ones(n, rows, dtype=torch.float64)
    if jitter > 0:
        step = torch.exp(jitter * torch.randn(n, rows, generator=gen, dtype=torch.float64))  # [B, rows]
    return step.cumsum(1) - step[:, :1]


def hide_rows(gen: torch.Generator, x: torch.Tensor, share: float, spare: torch.Tensor) -> torch.Tensor:
    """Make a share of the rows missing, never those to spare, [B, L] bool."""
    gone = (torch.rand(x.shape[:2], generator=gen) < share) & ~spare  # [B, L]
    return x.masked_fill(gone[..., None], math.nan)


def noisy_tags(
    gen: torch.Generator, tagged: torch.Tensor, *, config: ProbeConfig, items: int, free: torch.Tensor
) -> torch.Tensor:
    """The tags that a router sees: some lost, some on other rows. All [B, L] bool."""
    chance = torch.rand(tagged.shape, generator=gen)  # [B, L]
    kept = tagged & (chance >= config.missed_tags)  # [B, L]
    false = int(round(config.false_tags * items))
    able = free & ~tagged  # [B, L]
    score = torch.rand(tagged.shape, generator=gen).masked_fill(~able, -1.0)  # [B, L]
    wrong = torch.zeros_like(tagged)
    if false:
        places = score.topk(min(false, tagged.shape[1]), dim=1).indices  # [B, false]
        wrong = wrong.scatter(1, places, torch.ones_like(places, dtype=torch.bool)) & able  # [B, L]
    return kept | wrong


def carrier(gen: torch.Generator, n: int, rows: int, channels: int, config: ProbeConfig) -> torch.Tensor:
    """The background on which items are rendered, [B, T, C].

    season: 0.5 sin(2 pi t / P + phi), P uniform in 12..40 per channel · ar: AR(1) of 0.9 · walk: a random walk of unit
    spread at its end · gp: periodic and smooth random Fourier features · chaos: the Lorenz flow · none: nothing.
    White noise on all.
    """
    noise = config.noise * torch.randn(n, rows, channels, generator=gen)  # [B, T, C]
    if config.carrier == "none":
        return noise
    if config.carrier == "season":
        period = torch.randint(12, 41, (n, 1, channels), generator=gen)  # [B, 1, C]
        phase = uniform(gen, (n, 1, channels), 0.0, 2 * math.pi)  # [B, 1, C]
        step = torch.arange(rows)[None, :, None]  # [1, T, 1]
        return 0.5 * torch.sin(2 * math.pi * step / period + phase) + noise
    if config.carrier == "ar":
        return 0.5 * _autoregression(gen, n, rows, channels, 0.9) + noise
    if config.carrier == "walk":
        steps = torch.randn(n, rows, channels, generator=gen)  # [B, T, C]
        return steps.cumsum(1) / math.sqrt(rows) + noise
    if config.carrier == "gp":
        return 0.5 * _fourier(gen, n, rows, channels) + noise
    if config.carrier == "chaos":
        return 0.5 * _lorenz(gen, n, rows, channels) + noise
    raise ValueError(
        f"Unknown carrier {config.carrier!r}. Available: ['ar', 'chaos', 'gp', 'none', 'season', 'walk']; real ones"
        " come in through SemiSynthetic."
    )


def _autoregression(gen: torch.Generator, n: int, rows: int, channels: int, factor: float) -> torch.Tensor:
    shocks = math.sqrt(1 - factor**2) * torch.randn(n, rows, channels, generator=gen)  # [B, T, C]
    level = torch.randn(n, channels, generator=gen)  # [B, C]
    out = []
    for shock in shocks.unbind(1):
        level = factor * level + shock  # [B, C]
        out.append(level)
    return torch.stack(out, 1)


def _fourier(gen: torch.Generator, n: int, rows: int, channels: int, waves: int = 16) -> torch.Tensor:
    """A draw from a mixture of a squared-exponential and a periodic kernel, by random Fourier features."""
    smooth = torch.randn(n, 1, channels, waves, generator=gen) / 12.0  # [B, 1, C, waves] radians per row
    base = 2 * math.pi / uniform(gen, (n, 1, channels, 1), 12.0, 48.0)  # [B, 1, C, 1]
    periodic = base * torch.randint(1, 4, (n, 1, channels, waves), generator=gen)  # [B, 1, C, waves]
    chosen = torch.rand(n, 1, channels, waves, generator=gen) < 0.5
    rate = torch.where(chosen, smooth, periodic)  # [B, 1, C, waves]
    phase = uniform(gen, (n, 1, channels, waves), 0.0, 2 * math.pi)
    step = torch.arange(rows)[None, :, None, None]  # [1, T, 1, 1]
    return math.sqrt(2.0 / waves) * torch.cos(rate * step + phase).sum(-1)


def _lorenz(gen: torch.Generator, n: int, rows: int, channels: int) -> torch.Tensor:
    """Channels take the three Lorenz coordinates in turn, each group a flow of its own, at unit scale."""
    groups = -(-channels // 3)
    point = torch.randn(n, groups, 3, generator=gen) + torch.tensor([0.0, 0.0, 25.0])  # [B, groups, 3]
    out = []
    for number in range(rows + 100):
        for _ in range(4):
            a, b, c = point.unbind(-1)  # 3 x [B, groups]
            slope = torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)  # [B, groups, 3]
            point = point + LORENZ_STEP_S / 4 * slope
        if number >= 100:
            out.append(point.flatten(1))
    flow = torch.stack(out, 1)[..., :channels]  # [B, T, C]
    place = torch.tensor([0.0, 0.0, 23.5]).repeat(groups)[:channels]
    return (flow - place) / torch.tensor([7.9, 9.0, 8.6]).repeat(groups)[:channels]
