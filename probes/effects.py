"""Scores of counterfactual answers: effects by rows ahead, over the whole horizon, of plans against one another.

B sequences · M plans (queries) · H horizon rows · C channels · K actions
"""

from __future__ import annotations

from dataclasses import replace

import torch

from probes.contract import EVALUATION_SEED, ProbeBatch, generator
from probes.suites.cfr import CHANNELS, PLANS, CfrConfig, effect_by_tau, plan_regret
from probes.train import TrainPlan, sample

__all__ = ["effect_scores", "placebo_batch", "placebo_score"]

# of the actions of the sequences that ask about actions without an effect
PLACEBO_SHARE = 0.5
# a whole effect counts for its sign from so much of the usual size on
SIGNED_FROM = 0.1


def effect_scores(answer: torch.Tensor, batch: ProbeBatch) -> dict[str, float]:
    """What is measured of answers [B, M, Y].

    ``effect_tau_t``: error t rows ahead, over that of assuming no effect. ``pehe``: root mean squared error of the
    effect summed over the horizon, over the same of assuming none. ``sign_accuracy``: of that sum. ``effect_slope``:
    of predicted on true effects; 1 without bias, below it too small. ``consistency``: size of the effect of doing
    nothing (masked out of the loss: no network was taught that it is 0), and ``additivity``: of what both actions do
    beyond the sum of each, where effects are linear; over the usual size of an effect, 0 is right. ``regret_*``: value
    lost by choosing plans on the answers.
    """
    horizon = batch.extra["baseline"].shape[1]
    size = horizon * CHANNELS
    asked = batch.asked  # [B, M]
    guess, truth = (part[..., :size].unflatten(-1, (horizon, CHANNELS)) for part in (answer, batch.y))  # [B, M, H, C]
    usual = _root(truth[asked])
    found = {f"effect_tau_{t + 1}": float(v) for t, v in enumerate(effect_by_tau(answer, batch, horizon))}
    whole_guess, whole = guess.sum(2)[asked], truth.sum(2)[asked]  # 2 x [n, C]
    found["pehe"] = _root(whole_guess - whole) / max(_root(whole), 1e-9)
    large = whole.abs() >= SIGNED_FROM * _root(whole)
    found["sign_accuracy"] = float((whole_guess.sign() == whole.sign())[large].float().mean())
    found["effect_slope"] = float((guess[asked] * truth[asked]).sum() / truth[asked].square().sum().clamp_min(1e-9))
    found["consistency"] = _root(guess[:, PLANS.index("none")]) / max(usual, 1e-9)
    if bool(batch.extra["linear"].all()):
        both, first, other = (guess[:, PLANS.index(name)] for name in ("both", "dose 1", "other"))
        found["additivity"] = _root(both - first - other) / max(usual, 1e-9)
    found["regret_cost"] = float(plan_regret(answer, batch, horizon).mean())
    if batch.y.shape[-1] > size:
        found["regret_reward"] = float(plan_regret(answer, batch, horizon, by="reward").mean())
    return found


def _root(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def placebo_batch(plan: TrainPlan, sequences: int) -> ProbeBatch | None:
    """Sequences of the first evaluation stream in which half of the actions do nothing; None for other suites."""
    if not isinstance(plan.config, CfrConfig):
        return None
    return sample(plan, generator(EVALUATION_SEED), sequences, replace(plan.config, placebo=PLACEBO_SHARE))


def placebo_score(answer: torch.Tensor, batch: ProbeBatch) -> dict[str, float]:
    """Size of the effects that are told of actions without one, over the usual size of those of the others."""
    size = batch.extra["baseline"].shape[1] * CHANNELS
    acts = batch.extra["gain"].abs().amax(-1) > 0  # [B, K]
    alone = torch.arange(len(PLANS), device=acts.device) != PLANS.index("both")  # [M]
    real = acts.gather(1, batch.q_item)  # [B, M]
    asked = batch.asked & alone
    usual = _root(batch.y[..., :size][asked & real])
    return {"placebo_effect": _root(answer[..., :size][asked & ~real]) / max(usual, 1e-9)}
