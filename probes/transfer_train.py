"""Training for transfer: suites in turn, of which the last teaches the router nothing.

Networks that differ in seed alone are one stack, and stacks of different routers train side by side.

S networks · P parameters · A shares of a threshold table
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hamts.nn.budget import FOLLOW_EXACTLY_STEPS, FOLLOW_RATE
from probes.contract import generator
from probes.stacked import StackedNet
from probes.stacked_data import Decisions, Rows, joined_rows, table_weights
from probes.stacked_run import BATCHES, SWITCH_S, Pools, _copy
from probes.stacked_train import StackedStep, StackedTrainer, Validation, stacked_read
from probes.train import CHECKS, Fitted, Stream, TrainPlan

if TYPE_CHECKING:
    from probes.transfer import TransferPlan

__all__ = ["TransferTrainer", "train_side_by_side"]


class TransferStep(StackedStep):
    """A step of the suite whose turn it is; where it is not ``taught`` from, everything is kept and no router moves."""

    def __init__(self, stack: StackedNet, transfers: Sequence[TransferPlan], parts: Sequence[list[TrainPlan]]) -> None:
        super().__init__(stack, [own[-1] for own in parts])
        turns = len(parts[0])
        budgets, rows = [], []
        for transfer, own in zip(transfers, parts, strict=True):
            gen = generator(transfer.seed + 1)
            budgets.append([own[step % turns].budget(step, gen) for step in range(self.steps)])
        for step in range(self.steps):
            plan = parts[0][step % turns]
            rows.append(plan.stages[plan.stage(step)][1].context_rows)
        asked = torch.tensor(budgets, dtype=torch.float32).T  # [steps, S]
        share = (asked / torch.tensor(rows)[:, None]).clamp(max=1.0)  # [steps, S]
        nodes, beyond = table_weights(share)
        device = stack.device
        self.budgets, self.share, self.nodes, self.beyond = (
            part.to(device) for part in (asked, share, nodes, beyond)
        )  # 2 x [steps, S], [steps, S, A], [steps, S]
        # tables follow the suites that teach
        taught = [step - (step + 1) // turns for step in range(self.steps)]
        follow = [1.0 if count < FOLLOW_EXACTLY_STEPS else FOLLOW_RATE for count in taught]
        self.follow_rates = torch.tensor(follow, device=device)
        self.taught = True
        self.of_router = torch.cat([
            torch.full((leaf[0].numel(),), ".router." in name) for name, leaf in stack.leaves.items()
        ]).to(device)  # [P]  # fmt: skip

    def __call__(self, rows: Rows, *, warm: bool) -> None:
        follows = self.follows
        self.stack.taught, self.follows = self.taught, follows and self.taught
        try:
            super().__call__(rows, warm=warm)
        finally:
            self.stack.taught, self.follows = True, follows

    def _update(self, grad: torch.Tensor, loss: torch.Tensor) -> None:
        state = (self.stack.flat, self.first, self.second)
        before = [] if self.taught else [tensor.clone() for tensor in state]
        super()._update(grad, loss)
        for tensor, old in zip(state, before, strict=False):
            tensor.copy_(torch.where(self.of_router, old, tensor))


class TransferTrainer(StackedTrainer):
    """Networks of one router over the suites of a transfer."""

    one: TransferStep

    def __init__(self, transfers: Sequence[TransferPlan]) -> None:
        self.transfers, self.parts = list(transfers), [transfer.plans() for transfer in transfers]
        super().__init__([own[-1] for own in self.parts])
        self.one = TransferStep(self.stack, self.transfers, self.parts)
        self.turns = len(self.parts[0])
        self.statics: dict[int, Rows] = {}
        self.rooms: dict[int, tuple[list[torch.Tensor], int]] = {}
        self.recorded: dict[tuple[int, bool], Any] = {}

    def take(self, place: int, static: Rows) -> None:
        """Read batches of a suite from these rows from now on."""
        self.statics[place] = static
        self._drop(place)
        self.one.fit(static)
        self.rooms[place] = (self.one.explore, self.one.queries)

    def turn(self, step: int) -> None:
        """One step, of the suite whose turn it is."""
        place, one = step % self.turns, self.one
        one.explore, one.queries = self.rooms[place]
        one.draw(self.plans)
        one.taught = place < self.turns - 1
        ham = self.stack.config.model == "ham"
        warm = ham and (not one.taught or step < one.warm_steps)
        if self.stream is None:
            one(self.statics[place], warm=warm)
            return
        if (place, warm) not in self.recorded:
            # what the phase before recorded is not needed any more
            self._drop(place)
            self.static = self.statics[place]
            self.recorded[place, warm] = self._capture(warm)
        self.recorded[place, warm].replay()

    def _drop(self, place: int) -> None:
        stale = [key for key in self.recorded if key[0] == place]
        for key in stale:
            del self.recorded[key]
        if stale:
            torch.cuda.empty_cache()

    @torch.no_grad()
    def settle(self, rows: Rows, *, seconds: float) -> list[Fitted]:
        """Calibrate on a batch of the first suite, and hand the networks back as those of the tested one."""
        if self.one.follows:
            plain = Decisions.plain(
                self.parts[0][0].critical_rows, networks=self.stack.S, context_rows=rows.context_rows,
                device=self.stack.device,
            )  # fmt: skip
            self.stack.follow(stacked_read(self.stack, rows, plain), 1.0)
        alive = self.one.alive[:, 0].tolist()
        found = []
        for net, plan, history, fine in zip(self.stack.export(), self.plans, self.history, alive, strict=True):
            net.eval()
            found.append(Fitted(net, plan, seconds, history, "ok" if fine else "diverged"))
        return found


class _Turns(Pools):
    """Batches of the suite whose turn comes at ``place``, and one more."""

    def __init__(self, plan: TrainPlan, seeds: Sequence[int], *, place: int, turns: int) -> None:
        self.place, self.turns = place, turns
        super().__init__(plan, seeds)

    def _schedule(self, stream: Stream) -> list[tuple[int, int]]:  # type: ignore[override]
        found: list[list[int]] = []
        for step in [*range(self.place, stream.plan.steps, self.turns), stream.plan.steps]:
            stage = stream.plan.stage(step)
            if not found or found[-1][0] != stage or found[-1][1] == BATCHES:
                found.append([stage, 0])
            found[-1][1] += 1
        return [(stage, count) for stage, count in found]


def train_side_by_side(
    groups: Sequence[Sequence[TransferPlan]], *, device: str
) -> list[tuple[TransferTrainer, list[Fitted]]]:
    """Train stacks that read the same sequences: each group differs in seed alone, the groups in router or model."""
    started = time.monotonic()
    if device.startswith("cuda"):
        # the thread that feeds a device must not wait for those that draw sequences
        sys.setswitchinterval(SWITCH_S)
    trainers = [TransferTrainer(group) for group in groups]
    first, turns, steps = trainers[0], trainers[0].turns, groups[0][0].steps
    pools = [
        _Turns(first.parts[0][place], [own[place].seed for own in first.parts], place=place, turns=turns)
        for place in range(turns)
    ]
    feeds: list[Iterator[dict[int, Rows]]] = [pool.batches(device) for pool in pools]
    check = Validation.of(first.plans[0])
    statics: dict[int, Rows] = {}
    try:
        for step in range(steps):
            place = step % turns
            batch = list(next(feeds[place]).values())
            if place not in statics or statics[place].inputs.shape[2] != batch[0].inputs.shape[2]:
                statics[place] = joined_rows(batch)
                for trainer in trainers:
                    trainer.take(place, statics[place])
            _copy(statics[place], batch)
            _turn(trainers, step)
            if (step + 1) % max(steps // CHECKS, 1) == 0 or step + 1 == steps:
                for trainer in trainers:
                    trainer.check(check, step + 1)
        last = joined_rows(list(next(feeds[0]).values()))
    finally:
        for pool in pools:
            pool.close()
    seconds = (time.monotonic() - started) / sum(len(group) for group in groups)
    for trainer in trainers:
        trainer.recorded, trainer.stream = {}, None
    return [(trainer, trainer.settle(last, seconds=seconds)) for trainer in trainers]


def _turn(trainers: Sequence[TransferTrainer], step: int) -> None:
    """One step of every stack; on a GPU side by side."""
    for trainer in trainers:
        if trainer.stream is None:
            trainer.turn(step)
            continue
        trainer.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(trainer.stream):
            trainer.turn(step)
    for trainer in trainers:
        if trainer.stream is not None:
            torch.cuda.current_stream().wait_stream(trainer.stream)
