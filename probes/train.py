"""Training of tier-1 networks: fresh sequences, a curriculum, one cycle of the learning rate, random budgets.

B sequences · T context rows · Q queries · M entries
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.nn import functional as F

from hamts.nn.router import kept_probability
from probes.contract import VALIDATION_SEED, ProbeBatch, ProbeConfig, generator
from probes.models import NetConfig, ProbeNet
from probes.registry import TARGET_WEIGHT, Probe
from probes.runner_plan import critical_rows
from probes.scores import query_error

__all__ = ["Fitted", "TrainPlan", "forward", "make_net", "train"]

BATCH_SEQUENCES = 32
POOL_SEQUENCES = 1_024
NEXT_ROW_WEIGHT, ROUTER_WEIGHT, INNER_WEIGHT = 0.2, 0.02, 0.1
# of the critical rows; one is drawn for each batch, so that one network serves the whole frontier
BUDGET_FRACTIONS = (0.25, 0.5, 1.0, 2.0, 4.0)
CHECKS = 10
# share of the steps in which HAM keeps everything, whatever its router
WARM_SHARE = 0.6
# share of the sequences of a batch whose questions do not see the state while everything is kept
HIDDEN_SHARE = 0.5
SOLVED = 0.8


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How a network is trained.

    Attributes:
        config: of the probe; the curriculum changes it by stage.
        net: the network.
        steps, learning_rate, seed: of the optimiser.
        critical_rows: that budgets are multiples of.
        hidden_share: ``HIDDEN_SHARE``.
        echo: answers are the next rows of the series instead of a query row's.
    """

    probe: Probe
    config: ProbeConfig
    net: NetConfig
    steps: int
    learning_rate: float
    seed: int
    critical_rows: int
    echo: bool = False
    device: str = "cpu"
    hidden_share: float = HIDDEN_SHARE

    @cached_property
    def stages(self) -> list[tuple[float, ProbeConfig]]:
        """Share of the steps and configuration of each stage of the curriculum; the last is the task."""
        return self.probe.stages(self.config)

    @cached_property
    def stage_rows(self) -> list[int]:
        """Critical rows of each stage."""
        same = [config == self.config for _, config in self.stages]
        return [
            self.critical_rows if known else critical_rows(self.probe, config)
            for known, (_, config) in zip(same, self.stages, strict=True)
        ]

    def stage(self, step: int) -> int:
        """Number of the stage of a step."""
        done, total = step / max(self.steps, 1), 0.0
        for number, (share, _) in enumerate(self.stages):
            total += share
            if done < total - 1e-9:
                return number
        return len(self.stages) - 1

    def budget(self, step: int, gen: torch.Generator) -> int:
        """Rows of a layer at a step, drawn."""
        fraction = BUDGET_FRACTIONS[int(torch.randint(len(BUDGET_FRACTIONS), (), generator=gen))]
        return max(round(fraction * self.stage_rows[self.stage(step)]), 1)


@dataclass
class Fitted:
    """A trained network and how training went."""

    net: ProbeNet
    plan: TrainPlan
    seconds: float
    losses: list[tuple[int, float]] = field(default_factory=list)  # step, validation NMSE against the floor
    status: str = "ok"  # "diverged" where a loss was not finite

    @property
    def steps_to_solve(self) -> int | None:
        """First check at which validation skill reached 0.8."""
        return next((step for step, nerr in self.losses if 1.0 - nerr >= SOLVED), None)


def sample(plan: TrainPlan, gen: torch.Generator, n: int, config: ProbeConfig | None = None) -> ProbeBatch:
    batch = plan.probe.sample(gen, n, config or plan.config)
    return plan.probe.r2_render(batch) if plan.echo else batch


def train(plan: TrainPlan, *, progress: Callable[[int, int, float], None] | None = None) -> Fitted:
    """Train one network.

    Args:
        progress: called with step, steps and the last validation error.
    """
    started = time.monotonic()
    net = make_net(plan)
    fitted = Fitted(net, plan, 0.0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=max(plan.steps, 2))
    stream = Stream(plan)
    budgets, explore = generator(plan.seed + 1), generator(plan.seed + 2)
    check = Check(plan)
    for step in range(plan.steps):
        batch = stream.next(step)
        rows = plan.budget(step, budgets)
        # a reader that has never found anything in its scratchpad gives no router a reason to fill it
        given = everything(net, batch) if step < WARM_SHARE * plan.steps else None
        # nor does one that finds its answers in the state alone learn to look into it
        hidden = hidden_sequences(len(batch), plan.hidden_share) if given else 0
        loss = training_loss(
            net, batch, batch.context_rows if given else rows, explore, given=given, hidden=hidden,
            target_weight=plan.probe.target_weight, named_after=plan.probe.names_after(plan.config),
        )  # fmt: skip
        if not math.isfinite(float(loss.detach())):
            fitted.status = "diverged"
            break
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(plan.steps // CHECKS, 1) == 0 or step + 1 == plan.steps:
            fitted.losses.append((step + 1, check(net)))
        if progress is not None:
            progress(step + 1, plan.steps, fitted.losses[-1][1] if fitted.losses else math.nan)
    net.eval()
    calibrate(net, stream.next(plan.steps), plan.critical_rows)
    fitted.seconds = time.monotonic() - started
    return fitted


def make_net(plan: TrainPlan) -> ProbeNet:
    """The network of a plan, its weights drawn from the seed."""
    first = sample(plan, generator(plan.seed), 2)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(plan.seed)
        net = ProbeNet(
            plan.net, inputs=first.inputs().shape[-1], channels=first.x.shape[-1], answers=first.y.shape[-1],
            auxiliary=0 if first.aux is None else first.aux.shape[-1],
        )  # fmt: skip
    return net.to(plan.device)


class Stream:
    """Training batches: a pool of fresh sequences at a time, by the stage of the curriculum."""

    def __init__(self, plan: TrainPlan) -> None:
        self.plan, self.gen = plan, generator(plan.seed)
        self.pool: ProbeBatch | None = None
        self.place, self.stage = 0, -1

    def next(self, step: int) -> ProbeBatch:
        stage = self.plan.stage(step)
        if self.pool is None or stage != self.stage or self.place + BATCH_SEQUENCES > len(self.pool):
            self.pool = sample(self.plan, self.gen, POOL_SEQUENCES, self.plan.stages[stage][1])
            self.pool = self.pool.to(self.plan.device)
            self.place, self.stage = 0, stage
        batch = self.pool.select(slice(self.place, self.place + BATCH_SEQUENCES))
        self.place += BATCH_SEQUENCES
        return batch


class Check:
    """Validation: error of the answers over that of the best floor."""

    def __init__(self, plan: TrainPlan) -> None:
        self.batch = sample(plan, generator(VALIDATION_SEED), 128).to(plan.device)
        errors = [query_error(answer, self.batch) for answer in self.batch.floor.values()]
        self.floor = min(float(error.nanmean()) for error in errors)
        self.rows = plan.critical_rows

    @torch.no_grad()
    def __call__(self, net: ProbeNet) -> float:
        net.eval()
        answer = forward(net, self.batch, self.rows)[0]
        net.train()
        return float(query_error(answer, self.batch).nanmean()) / self.floor


def forward(
    net: ProbeNet,
    batch: ProbeBatch,
    rows: int | torch.Tensor,
    *,
    explore: torch.Generator | None = None,
    given: Sequence[torch.Tensor] | None = None,
    hidden: int = 0,
) -> tuple[torch.Tensor, Any, Any]:
    """Read the context, then the query rows on its memory: answers [B, Q, Y] and both readings.

    Args:
        hidden: in so many of the sequences, the first, query rows do not see the state.
    """
    T = batch.context_rows
    given = shuffled_rows(net, batch, rows) if given is None and net.config.control == "shuffled" else given
    policies = net.policies(batch, rows, explore=explore, given=given)
    context = net.read(batch, slice(0, T), net.empty_memory(len(batch)), policies)
    # the memory after the queries is not used; only a reading that advances lets a control decide about the rows that
    # are still in the window when the first query comes
    asked = net.read(batch, slice(T, batch.x.shape[1]), context.memory, policies, hidden=hidden)
    index = (batch.q_index - T)[..., None].expand(-1, -1, asked.hidden.shape[-1])  # [B, Q, D]
    return net.answer(asked.hidden.gather(1, index)), context, asked


@torch.no_grad()
def shuffled_rows(net: ProbeNet, batch: ProbeBatch, rows: int | torch.Tensor) -> list[torch.Tensor]:
    """What the learned router would keep of the sequence before: L of [B, T] bool."""
    plain = replace(net.config, router="learned")
    own, net.config = net.config, plain
    try:
        policies = net.policies(batch, rows)
        context = net.read(batch, slice(0, batch.context_rows), net.empty_memory(len(batch)), policies)
    finally:
        net.config = own
    return [trace.routed[:, 0].roll(1, 0) for trace in context.traces]


def hidden_sequences(count: int, share: float) -> int:
    """How many sequences of a batch, which are drawn anew each time, do not show the state to their questions."""
    return round(share * count)


def everything(net: ProbeNet, batch: ProbeBatch) -> list[torch.Tensor] | None:
    """A list that keeps every row, L of [B, T] bool; None for models that do not choose."""
    if net.config.model != "ham":
        return None
    rows = torch.ones(len(batch), batch.context_rows, dtype=torch.bool, device=batch.x.device)
    return [rows] * net.config.layers


def training_loss(
    net: ProbeNet,
    batch: ProbeBatch,
    rows: int,
    explore: torch.Generator,
    *,
    given: Sequence[torch.Tensor] | None = None,
    follow: bool = True,
    hidden: int = 0,
    target_weight: float = TARGET_WEIGHT,
    named_after: Sequence[int] = (),
) -> torch.Tensor:
    """Squared error of the answers, with the next row, the auxiliary target and the router's own losses beside it."""
    answer, context, asked = forward(net, batch, rows, explore=explore, given=given, hidden=hidden)
    mask = batch.y_mask
    scale = (batch.y.square() * mask).sum() / mask.sum().clamp_min(1)
    loss = ((answer - batch.y).square() * mask).sum() / mask.sum().clamp_min(1) / scale.clamp_min(1e-6)
    ahead = batch.x[:, 1 : batch.context_rows]  # [B, T - 1, C]
    there = ~ahead.isnan()
    guess = net.next_row(context.hidden[:, :-1])  # [B, T - 1, C]
    next_row = torch.where(there, guess - torch.nan_to_num(ahead), 0.0).square().sum() / there.sum().clamp_min(1)
    loss = loss + NEXT_ROW_WEIGHT * next_row
    if batch.aux is not None and net.auxiliary is not None:
        told = net.named(asked, batch.q_index - batch.context_rows, named_after)
        loss = loss + target_weight * F.mse_loss(told, batch.aux)
    for layer, before, after in zip(net.layers, context.traces, asked.traces, strict=True):
        if follow and has_thresholds(net):
            layer.thresholds.follow(before.scores[:, 0].flatten(0, 1))
        if getattr(before, "inner_loss", None) is not None:
            loss = loss + INNER_WEIGHT * before.inner_loss
        loss = loss + ROUTER_WEIGHT * router_loss(after)
    return loss


def has_thresholds(net: ProbeNet) -> bool:
    """Whether scores of the network's own decide; ``shuffled`` keeps as many rows as the learned router would."""
    return net.config.model == "ham" and net.config.control in (None, "shuffled")


def router_loss(trace: Any) -> torch.Tensor:
    """Teach the learned score the attention that its row then received, against an even spread."""
    judged, mass = trace.entries_judged, trace.entries_mass
    if mass is None or not trace.entries_bias.requires_grad or not bool(judged.any()):
        return torch.zeros((), device=trace.entries_bias.device)
    even = (mass * judged).sum(1, keepdim=True) / judged.sum(1, keepdim=True).clamp_min(1)  # [B, 1]
    wanted = mass / (mass + even).clamp_min(1e-12)  # [B, M]; a half where it is the mean
    given = kept_probability(trace.entries_bias)  # [B, M]
    return F.binary_cross_entropy(given[judged], wanted[judged].to(given.dtype))


@torch.no_grad()
def calibrate(net: ProbeNet, batch: ProbeBatch, rows: int) -> None:
    """Set thresholds from the scores of the finished network."""
    if not has_thresholds(net):
        return
    context = forward(net, batch, rows)[1]
    for layer, trace in zip(net.layers, context.traces, strict=True):
        layer.thresholds.calibrate(trace.scores[:, 0].flatten(0, 1))
