"""The causal normaliser: every token is scaled by what its own stream was up to that token's end.

Exponentially weighted mean and deviation, bias-corrected, over observed steps; carried along a stream for ever (warm),
so that a window in the middle of a stream is scaled as the stream itself would be. All in float64, about a reference
value of the stream, so that a large offset costs no digits.

A target may also be bounded: an intermittent demand is never below zero, a share never above one. A bound is what the
stream itself shows, an extreme value at which it keeps lying.

B items · C channels · G targets · N patches · P steps in a patch · L half-lives
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hamts.data.constants import chosen, constant

__all__ = ["CausalScale", "ScaleState", "ScaleStats", "find_bounds"]

# an extreme is a bound if so large a share of the values lies exactly there, and so many of them
ATOM_SHARE, ATOM_STEPS = 0.05, 8.0
# and if it was touched in so many patches that held other values too; single-step patches therefore show no bounds
ATOM_TOUCHES = 3.0

LEAST_MASS = 1e-100


@dataclass(frozen=True)
class ScaleState:
    """What the normaliser carries."""

    sums: torch.Tensor  # [B, C, L, 3] float64: weight, first and second moment about the reference
    reference: torch.Tensor  # [B, C] float64: the first observed value
    known: torch.Tensor  # [B, C] bool: whether there was one
    extreme: torch.Tensor  # [B, G, 2] float64: least and negated greatest value so far, inf before any
    atoms: (
        torch.Tensor
    )  # [B, G, 2, 3] float64: mass there, all mass (over the slowest half-life), patches that touched it


@dataclass(frozen=True)
class ScaleStats:
    """Statistics at the end of every token."""

    mean: torch.Tensor  # [B, C, N, L] float64
    scale: torch.Tensor  # [B, C, N, L] float64, at least the floor
    offset: torch.Tensor  # [B, C, N] float64: mean of the first half-life about the stream's reference
    bounds: torch.Tensor  # [B, G, N, 2] float64: lower and upper bound of each target; -inf and inf where there is none
    bound_share: torch.Tensor  # [B, G, N, 2] float64: share of the values that lie at the bound, 0 where there is none


@dataclass(frozen=True)
class CausalScale:
    """The rule.

    Attributes:
        half_lives: in steps; the first one scales values, the others describe where the level stands.
        unit: typical scale of each channel in the training data, [C] float64.
        adaptive: False for channels that are only divided by ``unit`` (events) or left alone (codes), [C] bool.
        targets: which channels are targets.
        floor_share: smallest scale, as a share of ``unit``.
    """

    half_lives: tuple[float, ...]
    unit: torch.Tensor
    adaptive: torch.Tensor
    targets: tuple[int, ...] = ()
    floor_share: float = 1e-3

    def empty(self, items: int) -> ScaleState:
        C, L, device = len(self.unit), len(self.half_lives), self.unit.device
        return ScaleState(
            sums=torch.zeros(items, C, L, 3, dtype=torch.float64, device=device),
            reference=torch.zeros(items, C, dtype=torch.float64, device=device),
            known=torch.zeros(items, C, dtype=torch.bool, device=device),
            extreme=torch.full((items, len(self.targets), 2), torch.inf, dtype=torch.float64, device=device),
            atoms=torch.zeros(items, len(self.targets), 2, 3, dtype=torch.float64, device=device),
        )

    def advance(self, values: torch.Tensor, observed: torch.Tensor, state: ScaleState) -> tuple[ScaleStats, ScaleState]:
        """Read one chunk.

        Args:
            values: raw, [B, C, N, P] float64; anything where not observed.
            observed: [B, C, N, P] bool.

        Returns:
            Statistics at each token's end, and the state after the chunk.
        """
        sums, reference, known = self.running_sums(values, observed, state)
        extreme, atoms = self.running_atoms(values, observed, state)
        bounds, bound_share = find_bounds(extreme, atoms)
        mass = sums[..., 0].clamp_min(1e-300)  # [B, C, N, L]
        mean = sums[..., 1] / mass  # [B, C, N, L] about the reference
        variance = (sums[..., 2] / mass - mean * mean).clamp_min(0.0)  # [B, C, N, L]
        unit = self.unit.to(values.device)[:, None, None]  # [C, 1, 1]
        scale = torch.maximum(variance.sqrt(), self.floor_share * unit)  # [B, C, N, L]
        adaptive = self.adaptive.to(values.device)[:, None, None]  # [C, 1, 1]
        # the reference is the first observed value: tokens before it must not know it
        heard = sums[..., 0] > 0  # [B, C, N, L]
        absolute = torch.where(adaptive & heard, mean + reference[..., None, None], 0.0)  # [B, C, N, L]
        stats = ScaleStats(
            mean=absolute,
            scale=torch.where(adaptive, scale, unit.expand_as(scale)),
            offset=torch.where(adaptive[..., 0], mean[..., 0], 0.0),
            bounds=bounds,
            bound_share=bound_share,
        )
        return stats, ScaleState(sums[:, :, -1], reference, known, extreme[:, :, -1], atoms[:, :, -1])

    def running_atoms(
        self, values: torch.Tensor, observed: torch.Tensor, state: ScaleState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Extremes of the targets at every token's end, [B, G, N, 2], and what lies at them, [B, G, N, 2, 3].

        The last axis: mass at the extreme, all mass, and patches that touched it and held other values as well.

        Masses age by observed steps: a gap, or a long horizon, must not wear a bound away.
        """
        targets = list(self.targets)
        own = chosen(values, targets)  # [B, G, N, P]
        signed = torch.stack([own, -own], -1)  # [B, G, N, P, 2]
        known = chosen(observed, targets)  # [B, G, N, P]
        seen = known[..., None].expand_as(signed)  # [B, G, N, P, 2]
        signed = torch.where(seen, signed, torch.inf)  # [B, G, N, P, 2]
        lows = torch.cat([state.extreme[:, :, None], signed.amin(3)], 2)  # [B, G, 1 + N, 2]
        extreme = lows.cummin(2).values[:, :, 1:]  # [B, G, N, 2]
        decay = 2.0 ** (-1.0 / self.half_lives[-1])
        there = known.double()  # [B, G, N, P]
        count = there.sum(-1).cumsum(2)  # [B, G, N]
        within = decay ** (there.sum(-1, keepdim=True) - there.cumsum(-1))  # [B, G, N, P]
        hit = (signed == extreme[:, :, :, None]) & seen  # [B, G, N, P, 2]
        pair = torch.stack([hit.double(), seen.double()], -1)  # [B, G, N, P, 2, 2]
        pair = torch.einsum("bgnpet,bgnp->bgnet", pair, within)  # [B, G, N, 2, 2]
        lag = count[:, :, :, None] - count[:, :, None]  # [B, G, N, N]
        powers = (decay ** lag.clamp_min(0)).tril()  # [B, G, N, N]
        earlier = torch.ones_like(lag[:1, :1]).tril()[..., None]  # [1, 1, N, N, 1]
        # what was counted at an extreme that has since been passed counts no more
        same = (extreme[:, :, :, None] == extreme[:, :, None]).double()  # [B, G, N, N, 2]
        at = torch.einsum("bgnm,bgnme,bgme->bgne", powers, same, pair[..., 0])  # [B, G, N, 2]
        mass = torch.einsum("bgnm,bgme->bgne", powers, pair[..., 1])  # [B, G, N, 2]
        aged = (decay**count)[..., None]  # [B, G, N, 1]
        still = (extreme == state.extreme[:, :, None]).double()  # [B, G, N, 2]
        carried = state.atoms[:, :, None]  # [B, G, 1, 2, 3]
        touched = (hit.any(3) & (seen & ~hit).any(3)).double()  # [B, G, N, 2]
        touches = torch.einsum("bgnme,bgme->bgne", same * earlier, touched)  # [B, G, N, 2]
        parts = [at + aged * still * carried[..., 0], mass + aged * carried[..., 1], touches + still * carried[..., 2]]
        return extreme, torch.stack(parts, -1)

    def running_sums(
        self, values: torch.Tensor, observed: torch.Tensor, state: ScaleState
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sums at every token's end, [B, C, N, L, 3]; the reference, [B, C], and whether it is known, [B, C]."""
        P = values.shape[-1]
        reference, known = self._reference(values, observed, state)  # [B, C], [B, C]
        centred = torch.where(observed, values - reference[..., None, None], 0.0)  # [B, C, N, P]
        weight = observed.to(torch.float64)  # [B, C, N, P]
        moments = torch.stack([weight, centred, centred * centred], -1)  # [B, C, N, P, 3]
        rate = constant(self.half_lives, torch.float64, values.device)  # [L]
        decay = torch.exp2(-1.0 / rate)  # [L] per step
        steps = torch.arange(P, device=values.device)  # [P]
        within = decay[:, None] ** (P - 1 - steps)  # [L, P]
        per_patch = torch.einsum("bcnpk,lp->bcnlk", moments, within)  # [B, C, N, L, 3]
        return self._running(per_patch, decay**P, state.sums), reference, known

    def _reference(
        self, values: torch.Tensor, observed: torch.Tensor, state: ScaleState
    ) -> tuple[torch.Tensor, torch.Tensor]:
        flat, heard = values.flatten(2), observed.flatten(2)  # 2 x [B, C, N P]
        first = heard.to(torch.uint8).argmax(-1, keepdim=True)  # [B, C, 1]
        found = heard.any(-1)  # [B, C]
        candidate = torch.where(found, flat.gather(-1, first).squeeze(-1), 0.0)  # [B, C]
        return torch.where(state.known, state.reference, candidate), state.known | found

    def _running(self, per_patch: torch.Tensor, decay: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        """Decayed running sums over patches, the carried ones included: [B, C, N, L, 3]."""
        N = per_patch.shape[2]
        # a long gap must not use up the exponent: mean and deviation are quotients, so the sums may be scaled up
        mass = carried[..., :1]  # [B, C, L, 1]
        carried = torch.where(mass > 0, carried * (LEAST_MASS / mass).clamp_min(1.0), carried)  # [B, C, L, 3]
        steps = torch.arange(N, device=per_patch.device)  # [N]
        lag = steps[:, None] - steps[None, :]  # [N, N]
        powers = decay[:, None, None] ** lag.clamp_min(0)  # [L, N, N]
        powers = torch.where(lag >= 0, powers, 0.0)  # [L, N, N]
        sums = torch.einsum("lnm,bcmlk->bcnlk", powers, per_patch)  # [B, C, N, L, 3]
        aged = decay[None, :] ** (steps[:, None] + 1)  # [N, L]
        return sums + aged[..., None] * carried[:, :, None]


def find_bounds(extreme: torch.Tensor, atoms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of a stream from its extremes and the mass at them, and that mass as a share.

    extreme [..., 2] (least, negated greatest), atoms [..., 2, 3] -> bounds [..., 2], share [..., 2].
    """
    share = atoms[..., 0] / atoms[..., 1].clamp_min(1e-300)  # [..., 2]
    # a stream that never moved shows no bound
    moved = (extreme.sum(-1, keepdim=True) < 0) & torch.isfinite(extreme)  # [..., 2]
    # a staircase lies at its record until the next step: only what was left and touched again is a bound
    again = atoms[..., 2] >= ATOM_TOUCHES  # [..., 2]
    bounded = moved & again & (share >= ATOM_SHARE) & (atoms[..., 0] >= ATOM_STEPS)  # [..., 2]
    lower = torch.where(bounded[..., 0], extreme[..., 0], -torch.inf)  # [...]
    upper = torch.where(bounded[..., 1], -extreme[..., 1], torch.inf)  # [...]
    return torch.stack([lower, upper], -1), torch.where(bounded, share, 0.0)
