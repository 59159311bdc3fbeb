"""What may decide in the router's place, on the same weights: chance, a schedule, or a list made elsewhere.

Controls answer whether the scores select, and are no way to serve. Where they need chance they count rather than draw:
the number of a token depends on its item, channel, layer and time alone, so that no chunk, batch or order changes it.

B items · C channels · L tokens of the window and the chunk · T tokens of a list
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["CONTROL_KINDS", "Control", "counted_uniform"]

CONTROL_KINDS = ("random", "stride", "recency", "given")
GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed number
FIRST, SECOND = -4658895280553007687, -7723592293110705685
# positions that are equal on the clock may differ in their last digits
NEARBY_PATCHES = 1e-4


@dataclass(frozen=True)
class Control:
    """A rule that keeps tokens of one layer.

    Attributes:
        kind: ``random``: so many as ``Policy.share`` says, by chance; ``stride``: so many, evenly in time, all channels
            of a moment together; ``recency``: all, so that the cap keeps the newest; ``given``: those of a list.
        layer: counted from the input; layers draw their own numbers.
        phase: of the schedule, in patches.
        position, keep, rank: the list, in order of time; ``rank`` is what eviction by score compares.
    """

    kind: str
    key: torch.Tensor  # [B] int64 one number per item
    seed: int = 0
    layer: int = 0
    phase: float = 0.0
    position: torch.Tensor | None = None  # [B, T] float64, +inf for padding
    keep: torch.Tensor | None = None  # [B, T, C] bool
    rank: torch.Tensor | None = None  # [B, T, C]

    def __post_init__(self) -> None:
        if self.kind not in CONTROL_KINDS:
            raise ValueError(f"Unknown control {self.kind!r}. Available: {sorted(CONTROL_KINDS)}.")

    def decide(self, position: torch.Tensor, channels: int, share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether each token is asked for, bool, and its rank: position [B, L], share [B] -> 2 x [B, L, C]."""
        B, L = position.shape
        grid = (B, L, channels)
        level = torch.zeros(grid, dtype=torch.float64, device=position.device)  # [B, L, C]
        if self.kind == "random":
            chance = counted_uniform(self.seed, self.layer, self.key, position, channels)  # [B, L, C]
            return chance >= (1.0 - share.to(chance.dtype))[:, None, None], chance
        if self.kind == "stride":
            rate = share.double()[:, None]  # [B, 1]
            # half a millionth keeps k / rate from rounding below k
            passed = torch.floor((position + self.phase + 1) * rate + 5e-7)  # [B, L]
            before = torch.floor((position + self.phase) * rate + 5e-7)  # [B, L]
            return (passed > before)[..., None].expand(grid), level
        if self.kind == "recency":
            return torch.ones(grid, dtype=torch.bool, device=position.device), level
        return self._listed(position, channels)

    def _listed(self, position: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.position is not None and self.keep is not None and self.rank is not None
        if self.position.shape[1] == 0:
            nothing = torch.zeros(*position.shape, channels, dtype=torch.float64, device=position.device)
            return nothing.bool(), nothing
        place = torch.searchsorted(self.position, (position - NEARBY_PATCHES).contiguous())  # [B, L]
        place = place.clamp_max(self.position.shape[1] - 1)  # [B, L]
        found = (self.position.gather(1, place) - position).abs() <= NEARBY_PATCHES  # [B, L]
        index = place[..., None].expand(-1, -1, channels)  # [B, L, C]
        return self.keep.gather(1, index) & found[..., None], self.rank.gather(1, index).double()


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """One round of splitmix64 on int64, whose products wrap around."""
    x = x + GOLDEN
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift right, zeros moving in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def counted_uniform(
    seed: int, layer: int, key: torch.Tensor, position: torch.Tensor, channels: int | torch.Tensor
) -> torch.Tensor:
    """Numbers in [0, 1), float64, that depend on their coordinates alone.

    Args:
        key: one number per item, [B] int64.
        position: time of the tokens, [B, L] float64.
        channels: C, for all channels of each token, giving [B, L, C]; or the channel of each, [B, L], giving [B, L].

    Source: splitmix64 (Steele, Lea, Flood 2014) as a counter-based generator.
    """
    hashed = _mixed(key * 4 + 1 + _mixed(torch.full_like(key, seed * 1_000_003 + layer)))  # [B]
    # 0 and -0 are the same time
    bits = (position.double() + 0.0).contiguous().view(torch.int64)  # [B, L]
    hashed = _mixed(hashed[:, None] ^ bits)  # [B, L]
    if isinstance(channels, torch.Tensor):
        hashed = _mixed(hashed ^ (channels + 1))  # [B, L]
    else:
        own = torch.arange(1, channels + 1, device=key.device)  # [C]
        hashed = _mixed(hashed[..., None] ^ own)  # [B, L, C]
    return _shifted(hashed, 11).double() * 2.0**-53
