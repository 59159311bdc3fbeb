"""A router trained on some suites and tested on another: does it know what matters, or the suite's flag?

The network is trained on all suites together. Of the tested suite it only learns to answer: its sequences are read with
everything kept, and teach the router and its thresholds nothing.

B sequences · L rows · F event columns · Q queries · Y numbers in an answer
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hamts.files import written_whole
from probes.contract import CONTRACT_VERSION, FAMILY, ProbeBatch, ProbeConfig, generator
from probes.evaluate import Evaluation, evaluate
from probes.models import NetConfig
from probes.registry import Probe, get_probe
from probes.results import machine
from probes.runner_plan import critical_rows
from probes.train import WARM_SHARE, Fitted, Stream, TrainPlan, calibrate, everything, make_net, training_loss

__all__ = ["Aligned", "Layout", "TransferPlan", "run_transfer", "score_transfer", "train_transfer"]


@dataclass(frozen=True)
class Layout:
    """Columns that suites share; what a suite has not is 0."""

    events: tuple[str, ...]
    actions: tuple[str, ...]
    channels: int
    answers: int

    @classmethod
    def of(cls, batches: Sequence[ProbeBatch]) -> Layout:
        """The columns of all these batches, in order of appearance."""
        events = dict.fromkeys(name for batch in batches for name in batch.event_names)
        actions = dict.fromkeys(name for batch in batches for name in batch.action_names)
        channels = max(batch.x.shape[-1] for batch in batches)
        return cls(tuple(events), tuple(actions), channels, max(batch.y.shape[-1] for batch in batches))

    def align(self, batch: ProbeBatch) -> ProbeBatch:
        """The same sequences in this layout; answers beyond the suite's own are not asked."""
        B, L, C = batch.x.shape
        short = self.answers - batch.y.shape[-1]

        def columns(values: torch.Tensor, own: tuple[str, ...], names: tuple[str, ...]) -> torch.Tensor:
            blank = values.new_zeros(B, L)
            return torch.stack([values[..., own.index(n)] if n in own else blank for n in names], -1)

        def wide(values: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, short))

        x = torch.nn.functional.pad(batch.x, (0, self.channels - C))  # [B, L, C']
        chan = torch.nn.functional.pad(batch.crit_chan, (0, self.channels - C))
        names = batch.x_names + tuple(f"none_{number}" for number in range(self.channels - C))
        return replace(
            batch, x=x, x_names=names, crit_chan=chan, event_names=self.events, action_names=self.actions,
            events=columns(batch.events, batch.event_names, self.events), y=wide(batch.y), y_mask=wide(batch.y_mask),
            actions=columns(batch.actions, batch.action_names, self.actions) if self.actions else batch.actions,
            aux=None,
            floor={name: wide(answer) for name, answer in batch.floor.items()},
        )  # fmt: skip


class Aligned(Probe):
    """A suite in another layout."""

    def __init__(self, probe: Probe, layout: Layout) -> None:
        self.inner, self.layout = probe, layout
        self.curriculum, self.grows = probe.curriculum, probe.grows  # type: ignore[misc]

    def shrunk(self, config: ProbeConfig, parts: int) -> ProbeConfig:
        return self.inner.shrunk(config, parts)

    def sample(self, gen: torch.Generator, n: int, config: ProbeConfig) -> ProbeBatch:
        return self.layout.align(self.inner.sample(gen, n, config))


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """Which suites teach the router, and which one it is tested on."""

    teach: tuple[str, ...] = ("der/derD", "act/actS")
    test: str = "pbc/pbcD"
    preset: str = "smoke"
    router: str = "learned"
    steps: int = 2_100
    learning_rate: float = 4e-3
    seed: int = 0
    device: str = "cpu"
    overrides: dict[str, Any] = field(default_factory=dict)

    def plans(self) -> list[TrainPlan]:
        """A plan for each suite over one layout, the tested suite last."""
        found = [(probe, probe.config(self.preset, rung, **self.overrides)) for probe, rung in
                 (get_probe(name) for name in (*self.teach, self.test))]  # fmt: skip
        layout = Layout.of([probe.sample(generator(0), 1, config) for probe, config in found])
        return [
            TrainPlan(
                probe=Aligned(probe, layout), config=config, net=NetConfig(router=self.router), steps=self.steps,
                learning_rate=self.learning_rate, seed=self.seed + place, device=self.device,
                critical_rows=critical_rows(probe, config),
            )
            for place, (probe, config) in enumerate(found)
        ]  # fmt: skip


def train_transfer(plan: TransferPlan) -> Fitted:
    """Train on all suites in turn; the fitted network is that of the tested suite."""
    started = time.monotonic()
    plans = plan.plans()
    streams = [Stream(part) for part in plans]
    net = make_net(plans[-1])
    routers = [p for name, p in net.named_parameters() if ".router." in name]
    optimizer = torch.optim.AdamW(net.parameters(), lr=plan.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=max(plan.steps, 2))
    budgets, explore = generator(plan.seed + 1), generator(plan.seed + 2)
    for step in range(plan.steps):
        place = step % len(plans)
        tested = place == len(plans) - 1
        batch = streams[place].next(step)
        rows = plans[place].budget(step, budgets)
        given = everything(net, batch) if tested or step < WARM_SHARE * plan.steps else None
        for parameter in routers:
            parameter.requires_grad_(not tested)
        loss = training_loss(net, batch, batch.context_rows if given else rows, explore, given=given, follow=not tested)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    net.eval()
    # thresholds come from the suites that taught, not from the one that is tested
    calibrate(net, streams[0].next(plan.steps), plans[0].critical_rows)
    return Fitted(net, plans[-1], time.monotonic() - started)


def score_transfer(fitted: Fitted, *, budget: float, streams: int, sequences: int) -> Evaluation:
    """Score the tested suite at a multiple of its critical rows."""
    rows = max(round(budget * fitted.plan.critical_rows), 1)
    return evaluate(fitted, budget_rows=rows, streams=streams, sequences=sequences)


# --- on disk


TRANSFER_FOLDER = "transfer"


def run_transfer(
    plan: TransferPlan,
    folder: str | Path,
    *,
    budgets: Sequence[float] = (0.5, 1.0, 2.0),
    streams: int = 2,
    sequences: int = 128,
) -> Path:
    """Train, score the tested suite and those that taught, and write one document; one that is there stays.

    Of the tested suite the document says what the router kept of it (recall above chance is transfer), and what was
    answered with it.
    """
    rung = plan.test.partition("/")[2] or plan.test
    path = Path(folder) / TRANSFER_FOLDER / rung / f"{plan.router}__{plan.preset}__s{plan.seed}.json"
    if path.is_file():
        return path
    fitted = train_transfer(plan)
    parts = plan.plans()
    scores: dict[str, list[dict[str, Any]]] = {}
    for name, part in zip((*plan.teach, plan.test), parts, strict=True):
        one = Fitted(fitted.net, part, fitted.seconds)
        scores[name] = [
            _numbers(budget, score_transfer(one, budget=budget, streams=streams, sequences=sequences))
            for budget in (budgets if part is parts[-1] else (1.0,))
        ]
    content = {
        "family": FAMILY, "contract_version": CONTRACT_VERSION,
        "suite_versions": {probe.name: probe.version for probe, _ in map(get_probe, (*plan.teach, plan.test))},
        "plan": asdict(plan), "train_s": fitted.seconds, "scores": scores, "runtime": machine(),
    }  # fmt: skip
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1, allow_nan=True), encoding="utf-8")
    return path


def _numbers(budget: float, scored: Evaluation) -> dict[str, Any]:
    return {
        "budget": budget, "rows": scored.budget_rows, "floor": scored.floor_name, **scored.metrics,
        "stages": scored.stages, "by_layer": scored.by_layer,
    }  # fmt: skip
