"""Training of stacked networks: the loss, the optimiser and the schedule of ``train.py``, all networks in one step.

A step waits for nothing on the device, so that on a GPU it is captured once and replayed.

S networks · B sequences · T context rows · L layers · A shares of a threshold table · P parameters
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hamts.nn.budget import FOLLOW_EXACTLY_STEPS, FOLLOW_RATE
from probes.contract import generator
from probes.registry import TARGET_WEIGHT
from probes.scores import query_error
from probes.stacked import StackedNet, StackedReading
from probes.stacked_data import Decisions, Rows, table_weights
from probes.train import (
    CHECKS,
    INNER_WEIGHT,
    NEXT_ROW_WEIGHT,
    ROUTER_WEIGHT,
    WARM_SHARE,
    Check,
    Fitted,
    Stream,
    TrainPlan,
    hidden_sequences,
    make_net,
)

__all__ = ["StackedStep", "StackedTrainer", "stacked_loss", "train_stacked"]

WEIGHT_DECAY, SECOND_MOMENT, EPSILON, LARGEST_NORM = 0.01, 0.999, 1e-8, 1.0


def stacked_read(
    stack: StackedNet, rows: Rows, decisions: Decisions, *, training: bool = False, with_scores: bool = False
) -> StackedReading:
    """Read; ``shuffled`` first asks the learned router what it would keep of the sequence before."""
    if stack.config.control == "shuffled" and decisions.given is None and not decisions.warm:
        with torch.no_grad():
            plain = replace(stack.config, router="learned")
            own, stack.config = stack.config, plain
            try:
                first = stack.read(rows, replace(decisions, explore=None, warm=False, drop=None))
            finally:
                stack.config = own
            given = [layer.routed.roll(1, 1) for layer in first.layers if layer.routed is not None]
        decisions = replace(decisions, given=given, explore=None)
    return stack.read(rows, decisions, training=training, with_scores=with_scores)


def stacked_loss(
    stack: StackedNet,
    rows: Rows,
    decisions: Decisions,
    *,
    target_weight: float = TARGET_WEIGHT,
    named_after: Sequence[int] = (),
) -> tuple[torch.Tensor, StackedReading]:
    """``train.training_loss`` of every network, [S]."""
    reading = stacked_read(stack, rows, decisions, training=True)
    answer, auxiliary = stack.answers(reading, rows, named_after=named_after)
    mask, y = rows.y_mask, rows.y
    count = mask.sum((1, 2, 3)).clamp_min(1)  # [S]
    scale = (y.square() * mask).sum((1, 2, 3)) / count  # [S]
    loss = ((answer - y).square() * mask).sum((1, 2, 3)) / count / scale.clamp_min(1e-6)
    C, T = stack.channels, stack.T
    ahead, there = rows.inputs[:, :, 1:T, :C], rows.inputs[:, :, 1:T, C : 2 * C]  # 2 x [S, B, T - 1, C]
    apart = ((stack.next_rows(reading) - ahead) * there).square().sum((1, 2, 3))
    loss = loss + NEXT_ROW_WEIGHT * apart / there.sum((1, 2, 3)).clamp_min(1)
    if rows.aux is not None and auxiliary is not None:
        loss = loss + target_weight * (auxiliary - rows.aux).square().mean((1, 2, 3))
    for layer in reading.layers:
        if layer.inner_loss is not None:
            loss = loss + INNER_WEIGHT * layer.inner_loss
        if layer.bias is not None:
            loss = loss + ROUTER_WEIGHT * _router_loss(stack, layer.bias, layer.visible, layer.weight)
    return loss, reading


def _router_loss(
    stack: StackedNet, bias: torch.Tensor, visible: torch.Tensor | None, weight: torch.Tensor | None
) -> torch.Tensor:
    """``train.router_loss`` of every network, [S]."""
    assert visible is not None and weight is not None
    T = stack.T
    seen = visible[:, T:]  # [S B, queries, T]
    sights = seen.sum(1).view(bias.shape)  # [S, B, T]
    mass = (weight.detach()[:, T:, :T] * seen).sum(1).view(bias.shape)  # [S, B, T]
    return stack.ops.router_loss(bias, mass, sights)


# --- the step


class StackedStep:
    """One optimiser step of all networks: AdamW under one cycle, each with its own rate, budget and clipping.

    Everything that changes from step to step lies in tables on the device, read at ``self.step``.
    """

    def __init__(self, stack: StackedNet, plans: Sequence[TrainPlan]) -> None:
        self.stack, self.steps, device = stack, plans[0].steps, stack.device
        cycle, momentum = _one_cycle(self.steps)
        time_step = torch.arange(1, self.steps + 1, dtype=torch.float64)
        beta = torch.tensor(momentum, dtype=torch.float64)
        self.schedule = torch.stack([
            torch.tensor(cycle, dtype=torch.float64), beta, 1 - beta**time_step, (1 - SECOND_MOMENT**time_step).sqrt(),
        ], 1).float().to(device)  # [steps, 4]  # fmt: skip
        self.rates = torch.tensor([plan.learning_rate for plan in plans], device=device)[:, None]  # [S, 1]
        budgets = torch.stack([_budgets(plan) for plan in plans], 1)  # [steps, S] rows
        rows = [plans[0].stages[plans[0].stage(step)][1].context_rows for step in range(self.steps)]
        share = (budgets / torch.tensor(rows)[:, None]).clamp(max=1.0).float()  # [steps, S]
        nodes, beyond = table_weights(share)
        self.budgets, self.share = budgets.float().to(device), share.to(device)
        self.nodes, self.beyond = nodes.to(device), beyond.to(device)
        follow = [1.0 if n < FOLLOW_EXACTLY_STEPS else FOLLOW_RATE for n in range(self.steps)]
        self.follow_rates = torch.tensor(follow, device=device)
        # a reader that has never found anything in its scratchpad gives no router a reason to fill it
        ham = stack.config.model == "ham"
        self.warm_steps = math.ceil(WARM_SHARE * self.steps) if ham else 0
        self.explores = ham and stack.config.control is None and stack.config.router != "tags"
        self.follows = ham and stack.config.control in (None, "shuffled")
        self.hidden_share, self.target_weight = plans[0].hidden_share, plans[0].probe.target_weight
        self.names_after = plans[0].probe.names_after(plans[0].config)
        self.explore: list[torch.Tensor] = []
        self.chances: list[torch.Generator] | None = None
        self.step = torch.zeros(1, dtype=torch.int64, device=device)
        self.first, self.second = torch.zeros_like(stack.flat), torch.zeros_like(stack.flat)  # [S, P]
        self.alive = torch.ones(stack.S, 1, dtype=torch.bool, device=device)
        self.losses = torch.zeros(stack.S, device=device)

    def fit(self, rows: Rows) -> None:
        """Make room for chances of so many rows."""
        S, (B, T) = self.stack.S, rows.tags.shape[1:]
        layers = range(self.stack.config.layers)
        self.explore = [torch.ones(S, B, T, device=self.stack.device) for _ in layers] if self.explores else []
        self.queries = rows.inputs.shape[2] - T

    def draw(self, plans: Sequence[TrainPlan]) -> None:
        """Chances of extra rows from each network's own generator; on a GPU they are drawn there."""
        if not self.explores:
            return
        if self.stack.device.type == "cuda":
            for chance in self.explore:
                chance.uniform_()
            return
        if self.chances is None:
            self.chances = [generator(plan.seed + 2) for plan in plans]
        # drawn in the order of ``train``: context rows of every layer behind the window, then query rows behind it
        (_, B, T), window, queries = self.explore[0].shape, self.stack.window, self.queries
        for number, gen in enumerate(self.chances):
            for chance in self.explore:
                chance[number] = torch.rand(B, window + T, 1, generator=gen)[:, window:, 0]
            for chance in self.explore:
                # rows still in the window are decided when they leave it
                chance[number, :, T - window :] = torch.rand(B, window + queries, 1, generator=gen)[:, :window, 0]

    def __call__(self, rows: Rows, *, warm: bool) -> None:
        """One step on a batch; no wait for the device."""
        hidden = hidden_sequences(rows.tags.shape[1], self.hidden_share) if warm else 0
        decisions = replace(self.decisions(warm=warm), hidden=hidden)
        weight, named = self.target_weight, self.names_after
        loss, reading = stacked_loss(self.stack, rows, decisions, target_weight=weight, named_after=named)
        names = list(self.stack.leaves)
        found = torch.autograd.grad(loss.sum(), [self.stack.leaves[name] for name in names], allow_unused=True)
        with torch.no_grad():
            parts = [
                (torch.zeros_like(self.stack.leaves[name]) if part is None else part).flatten(1)
                for name, part in zip(names, found, strict=True)
            ]
            self._update(torch.cat(parts, 1), loss.detach())
            if self.follows:
                self.stack.follow(reading, self.follow_rates[self.step])
            self.step += 1

    def decisions(self, *, warm: bool) -> Decisions:
        at = self.step
        return Decisions(
            self.budgets[at][0], self.share[at][0], self.nodes[at][0], self.beyond[at][0], warm=warm,
            explore=self.explore if self.explores else None,
        )  # fmt: skip

    def _update(self, grad: torch.Tensor, loss: torch.Tensor) -> None:
        """AdamW of torch, with the gradient of each network clipped to length 1: grad [S, P], loss [S]."""
        flat = self.stack.flat
        self.alive &= loss.isfinite()[:, None]
        self.losses.copy_(loss)
        size = grad.norm(dim=1, keepdim=True)  # [S, 1]
        grad = grad * (LARGEST_NORM / (size + 1e-6)).clamp(max=1.0)
        grad = torch.where(self.alive, grad, 0.0)
        cycle, beta, first_part, second_part = self.schedule[self.step][0]
        rate = torch.where(self.alive, self.rates * cycle, 0.0)  # [S, 1]
        self.first.lerp_(grad, 1 - beta)
        self.second.mul_(SECOND_MOMENT).addcmul_(grad, grad, value=1 - SECOND_MOMENT)
        denominator = self.second.sqrt() / second_part + EPSILON
        flat.mul_(1 - rate * WEIGHT_DECAY).sub_(rate / first_part * self.first / denominator)


def _one_cycle(steps: int) -> tuple[list[float], list[float]]:
    """Share of the largest rate, and the first moment's decay, of every step: as ``OneCycleLR`` gives them."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=max(steps, 2))
    shares, momentum = [], []
    for _ in range(steps):
        shares.append(optimizer.param_groups[0]["lr"])
        momentum.append(optimizer.param_groups[0]["betas"][0])
        optimizer.step()
        schedule.step()
    return shares, momentum


def _budgets(plan: TrainPlan) -> torch.Tensor:
    """Rows of a layer at every step, drawn as ``train`` does, [steps]."""
    gen, found = generator(plan.seed + 1), []
    for step in range(plan.steps):
        found.append(plan.budget(step, gen))
    return torch.tensor(found)


# --- the loop


class StackedTrainer:
    """Networks of one cell that train together, step by step on batches that are given.

    Args:
        plans: of networks that differ in seed or learning rate alone.
    """

    def __init__(self, plans: Sequence[TrainPlan]) -> None:
        self.plans, device = list(plans), plans[0].device
        nets = [make_net(replace(plan, device="cpu")) for plan in plans]
        self.stack = StackedNet(nets, device=device)
        self.one = StackedStep(self.stack, plans)
        self.static: Rows | None = None
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self.stream = torch.cuda.Stream() if self.stack.device.type == "cuda" else None
        self.history: list[list[tuple[int, float]]] = [[] for _ in plans]

    def fit(self, static: Rows) -> None:
        """Take batches from these rows from now on: they are copied in, and a captured step reads them."""
        self.static = static
        self._forget_graphs()
        self.one.fit(static)

    def advance(self, rows: Rows, step: int) -> None:
        """One step, the ``step``-th."""
        self.one.draw(self.plans)
        warm = step < self.one.warm_steps
        if self.stream is None:
            self.one(rows, warm=warm)
            return
        if warm not in self.graphs:
            # the graph of the phase before is not needed any more
            self._forget_graphs()
            self.graphs[warm] = self._capture(warm)
        self.graphs[warm].replay()

    def _forget_graphs(self) -> None:
        """Give back the memory of recorded steps, which no other stack could use."""
        if self.graphs:
            self.graphs.clear()
            torch.cuda.empty_cache()

    def _capture(self, warm: bool) -> torch.cuda.CUDAGraph:
        """Record the step on the static rows, so that it is replayed from now on; nothing is trained by it."""
        assert self.static is not None
        kept = [self.stack.flat, self.one.first, self.one.second, self.one.alive, self.one.step, *self.stack.tables]
        before = [tensor.clone() for tensor in kept]
        # a stream of its own from the first call on: what libraries keep for a stream is shared with no other graph
        stream = torch.cuda.current_stream()
        for _ in range(2):
            # libraries choose and allocate before anything is recorded; the last step has no next one to read
            self.one(self.static, warm=warm)
            self.one.step -= 1
        stream.synchronize()
        # a graph has memory of its own: what these runs took would lie idle, as much again for every stack
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        self.one(self.static, warm=warm)
        graph.capture_end()
        for tensor, old in zip(kept, before, strict=True):
            tensor.copy_(old)
        return graph

    @torch.no_grad()
    def check(self, check: Validation, step: int) -> None:
        """Validation error of every network, noted in its history."""
        for number, error in enumerate(validate(self.stack, check, self.plans[0].critical_rows)):
            self.history[number].append((step, error))

    @torch.no_grad()
    def finish(self, rows: Rows, *, seconds: float) -> list[Fitted]:
        """Calibrate on a last batch and hand the networks back; ``seconds`` is what each took."""
        if self.one.follows:
            plain = Decisions.plain(
                self.plans[0].critical_rows, networks=self.stack.S, context_rows=rows.context_rows,
                device=self.stack.device,
            )  # fmt: skip
            reading = stacked_read(self.stack, rows, plain)
            self.stack.follow(reading, 1.0)
        found = []
        for net, plan, history, alive in zip(
            self.stack.export(), self.plans, self.history, self.one.alive[:, 0].tolist(), strict=True
        ):
            net.eval()
            found.append(Fitted(net, plan, seconds, history, "ok" if alive else "diverged"))
        return found


@dataclass(frozen=True)
class Validation:
    """Validation sequences, the same for all networks of a rung, and the error of their best floor."""

    rows: Rows
    batch: Any
    floor: float

    @classmethod
    def of(cls, plan: TrainPlan) -> Validation:
        check = Check(replace(plan, device="cpu"))
        return cls(Rows.of([check.batch], plan.device), check.batch.to(plan.device), check.floor)


@torch.no_grad()
def validate(stack: StackedNet, check: Validation, rows: int) -> list[float]:
    """Error of every network's answers over that of the best floor."""
    plain = Decisions.plain(rows, networks=stack.S, context_rows=check.rows.context_rows, device=stack.device)
    reading = stacked_read(stack, check.rows, plain)
    answers = stack.answers(reading, check.rows)[0]  # [S, B, Q, Y]
    errors = torch.stack([query_error(answer, check.batch).nanmean() for answer in answers])
    return [float(error) / check.floor for error in errors.cpu()]


def train_stacked(
    plans: Sequence[TrainPlan], *, progress: Callable[[int, int, float], None] | None = None
) -> list[Fitted]:
    """Train networks that differ in seed or learning rate alone, side by side: what ``train`` does to each."""
    started = time.monotonic()
    streams = {plan.seed: Stream(replace(plan, device="cpu")) for plan in plans}
    check, device = Validation.of(plans[0]), plans[0].device

    def batch(step: int) -> Rows:
        drawn = {seed: stream.next(step) for seed, stream in streams.items()}
        return Rows.of([drawn[plan.seed] for plan in plans], device)

    trainer, steps = StackedTrainer(plans), plans[0].steps
    for step in range(steps):
        rows = batch(step)
        if trainer.static is None or trainer.static.inputs.shape != rows.inputs.shape:
            trainer.fit(rows)
        trainer.advance(rows, step)
        if (step + 1) % max(steps // CHECKS, 1) == 0 or step + 1 == steps:
            trainer.check(check, step + 1)
        if progress is not None:
            progress(step + 1, steps, trainer.history[0][-1][1] if trainer.history[0] else float("nan"))
    return trainer.finish(batch(steps), seconds=(time.monotonic() - started) / len(plans))
